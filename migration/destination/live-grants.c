/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's half of source/ram-scan.c.
 *
 * From ADVISE on every page is ungranted (ram.h): claimed, but by no thread that reads. GRANT frees
 * the claim, RAM_ZERO turns the page into a received one. A page that was never granted is never
 * read. A page that is granted twice is not freed twice: the claim of an ungranted page can be
 * freed only once.
 *
 * The owner cannot handle these messages: while it loads the device state or starts the guest it
 * waits for the guest's process, which may itself wait for a page. So the control channel's reader
 * thread handles them as they come, ahead of the commands that the owner has yet to carry out. It
 * never blocks: the bitmaps are atomic, the workers are notified, and the pull thread finds out
 * that all pages are in place. A malformed message is left to the owner, which refuses it.
 *
 * The end: grants_lock. The connection is fenced only after pr_live_grants_stop(). Then no page is
 * ungranted any more, and the claims are freed with those of the lost READs.
 */
#include "migration/destination/live-grants.h"

#include "migration/destination/grants.h"
#include "migration/postcopy/allocate.h"
#include "migration/session/messages.h"

static gboolean handle_grant(PrConn *conn, const PrMsg *msg)
{
	PrDestination *destination = pr_conn_destination(conn);
	PrRam *ram = conn->session->ram;
	guint had = conn->grants->len;

	if (!pr_destination_handle_grant(conn, msg, NULL))
		return FALSE;
	if (conn->grants->len == had)
		return TRUE;
	const PrGrant *added = &g_array_index(conn->grants, PrGrant, had);
	guint n = conn->grants->len - had;
	conn->path->ops->add_grants(conn->path, added, n);
	for (guint i = 0; i < n; i++) {
		PrRamBlock *block = &ram->blocks[added[i].block];
		pr_ram_grant(block, added[i].offset / block->page_size,
			     added[i].length / block->page_size);
	}
	/* The path has copied them. */
	g_array_set_size(conn->grants, had);
	pr_fault_notify(destination->faults);
	pr_pull_notify(destination->pull);
	pr_allocate_notify(ram->allocate);
	return TRUE;
}

static gboolean handle_zero(PrConn *conn, const PrMsg *msg)
{
	PrDestination *destination = pr_conn_destination(conn);

	if (!pr_destination_handle_zero(conn, msg, NULL))
		return FALSE;
	if (pr_ram_complete(conn->session->ram))
		pr_pull_notify(destination->pull);
	return TRUE;
}

gboolean pr_live_grants_handle(PrConn *conn, const PrMsg *msg)
{
	gboolean handled = FALSE;

	g_mutex_lock(&conn->grants_lock);
	if (conn->receiving_grants)
		handled = msg->type == PR_CMD_GRANT ? handle_grant(conn, msg)
						    : handle_zero(conn, msg);
	g_mutex_unlock(&conn->grants_lock);
	return handled;
}

void pr_live_grants_start(PrConn *conn)
{
	pr_ram_mark_ungranted(conn->session->ram);
	pr_destination_use_grants(conn);
	g_mutex_lock(&conn->grants_lock);
	conn->receiving_grants = TRUE;
	g_mutex_unlock(&conn->grants_lock);
}

void pr_live_grants_stop(PrConn *conn)
{
	g_mutex_lock(&conn->grants_lock);
	conn->receiving_grants = FALSE;
	g_mutex_unlock(&conn->grants_lock);
}

void pr_live_grants_request(PrConn *conn, guint block, uint64_t page)
{
	const PrRamBlock *wanted = &conn->session->ram->blocks[block];
	PrWireRange range = {page * wanted->page_size, wanted->per_host * wanted->page_size};
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_ranges_encode(body, block, &range, 1);
	/* A failure reports itself. */
	pr_send(conn, PR_RP_SCAN_FIRST, body, NULL);
}
