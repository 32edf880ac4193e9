/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/transport.h"

void pr_data_path_destroy(PrDataPath *path)
{
	if (path)
		path->ops->destroy(path);
}

void pr_data_listener_close(PrDataListener *listener)
{
	if (listener)
		listener->ops->listener_close(listener);
}
