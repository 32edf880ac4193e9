/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/reach.h"

#include "transport/handshake.c"

gboolean reach_handshake_exchange(PrControl *control, const PrHello *hello, PrHelloAck *ret,
				  GError **error)
{
	g_autoptr(GError) cause = NULL;

	if (exchange(control, hello, ret, &cause))
		return TRUE;
	explain(control->uri, control, cause, error);
	return FALSE;
}
