/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/grants.h"

#include "migration/session/messages.h"

gboolean pr_source_send_grants(PrConn *conn, const GArray *grants, GError **error)
{
	for (guint i = 0; i < grants->len;) {
		g_autoptr(GByteArray) body = g_byte_array_new();
		g_autofree PrWireGrant *wire = g_new(PrWireGrant, grants->len - i);
		uint32_t block = g_array_index(grants, PrGrant, i).block;
		guint n = 0;

		for (; i < grants->len && n < PR_RANGES_MAX; i++, n++) {
			const PrGrant *grant = &g_array_index(grants, PrGrant, i);

			if (grant->block != block)
				break;
			wire[n] = (PrWireGrant){grant->offset, grant->length, grant->addr,
						grant->key};
		}
		pr_grants_encode(body, block, wire, n);
		if (!pr_send(conn, PR_CMD_GRANT, body, error))
			return FALSE;
	}
	return TRUE;
}

gboolean pr_source_send_all_grants(PrConn *conn, GError **error)
{
	g_autoptr(GArray) grants = conn->path->ops->grants(conn->path);

	conn->granted = pr_source_send_grants(conn, grants, error);
	return conn->granted;
}

gboolean pr_source_send_ping(PrConn *conn, uint32_t value, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_u32_encode(body, value);
	return pr_send(conn, PR_CMD_PING, body, error);
}
