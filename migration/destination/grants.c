/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/grants.h"

#include "migration/postcopy/place.h"

static PrRamBlock *find_block(PrRam *ram, uint32_t index, const char *what, GError **error)
{
	if (index < ram->n_blocks)
		return &ram->blocks[index];
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
		    "%s for block %u, but there are only %u", what, index, ram->n_blocks);
	return NULL;
}

gboolean pr_destination_handle_grant(PrConn *conn, const PrMsg *msg, GError **error)
{
	uint32_t index;
	g_autofree PrWireGrant *wire = NULL;
	guint n;

	if (!pr_grants_decode(msg->body, msg->length, &index, &wire, &n, error))
		return FALSE;
	PrRamBlock *block = find_block(conn->session->ram, index, "GRANT", error);
	if (!block)
		return FALSE;
	for (guint i = 0; i < n; i++) {
		PrGrant grant = {index, wire[i].offset, wire[i].length, wire[i].addr, wire[i].key};
		if (!pr_ram_block_contains(block, grant.offset, grant.length)) {
			g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
				    "GRANT of a range outside of RAM block %s", block->idstr);
			return FALSE;
		}
		g_array_append_val(conn->grants, grant);
	}
	return TRUE;
}

void pr_destination_use_grants(PrConn *conn)
{
	conn->path->ops->set_grants(conn->path, (const PrGrant *)conn->grants->data,
				    conn->grants->len);
	conn->granted = TRUE;
}

gboolean pr_destination_handle_zero(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	PrRam *ram = conn->session->ram;
	uint32_t index;
	g_autofree PrWireRange *ranges = NULL;
	guint n;

	if (!pr_ranges_decode(msg->body, msg->length, &index, &ranges, &n, error))
		return FALSE;
	PrRamBlock *block = find_block(ram, index, "RAM_ZERO", error);
	if (!block)
		return FALSE;
	for (guint i = 0; i < n; i++) {
		if (!pr_ram_block_contains(block, ranges[i].offset, ranges[i].length)) {
			g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
				    "RAM_ZERO of a range outside of RAM block %s", block->idstr);
			return FALSE;
		}
		uint64_t page = ranges[i].offset / block->page_size;
		uint64_t pages = ranges[i].length / block->page_size;
		if (pr_place_zero(ram, block, page, pages) > 0)
			pr_fault_notify(destination->faults);
	}
	return TRUE;
}
