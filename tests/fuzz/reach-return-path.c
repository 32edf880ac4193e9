/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/reach.h"

#include "migration/source/return-path.c"

/* As pr_source_return_path_thread() does it. */
void reach_source_handle(PrConn *conn)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrMsg) msg = pr_control_recv(conn->control, G_MAXUINT, &error);

	if (!msg || !handle_message(conn, msg, &error))
		pr_conn_failed(error, conn);
}
