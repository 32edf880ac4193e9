/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the source tells of its RAM over a incremental_grants path: the destination's half of ram-scan.c.
 *
 * From ADVISE on every page is veiled (ram.h): claimed, by nobody who reads. GRANT takes the veil off and frees the
 * claim, RAM_ZERO turns it into a received page. A page that was never told is never read, and one that was told
 * twice is not freed twice: the claim that its veil stands for can be taken once.
 *
 * The load thread cannot take these messages: while it loads the device state or starts the guest it waits for
 * the guest's process, which may itself wait for a page. So the control channel's reader thread takes them as they
 * come, past whatever the load thread has yet to carry out. It blocks on nothing: the bitmaps are atomic, the
 * workers are kicked, and that all pages are there is found out by the pull thread. What it cannot make sense
 * of it leaves to the load thread, which says what is wrong with it.
 *
 * The end: grants_lock. The connection is fenced only after pr_live_grants_stop(), when nobody takes anything any more; then
 * the veil is dropped, and its claims are forgotten with those of the lost READs.
 */
#include "migration/postcopy/allocate.h"
#include "migration/session/session.h"

static gboolean take_grant(PrConn *conn, const PrMsg *msg)
{
	PrMigration *m = conn->m;
	guint had = conn->grants->len;

	if (!pr_destination_take_grant(m, conn, msg, NULL))
		return FALSE;
	if (conn->grants->len == had)
		return TRUE;
	const PrGrant *news = &g_array_index(conn->grants, PrGrant, had);
	guint n = conn->grants->len - had;
	conn->path->ops->add_grants(conn->path, news, n);
	for (guint i = 0; i < n; i++) {
		PrRamBlock *block = &m->ram->blocks[news[i].block];
		pr_ram_grant(block, news[i].offset / block->page_size,
			     news[i].length / block->page_size);
	}
	/* The path has them. */
	g_array_set_size(conn->grants, had);
	pr_fault_notify(m->faults);
	pr_pull_notify(m->pull);
	pr_allocate_notify(m->ram->allocate);
	return TRUE;
}

static gboolean take_zero(PrConn *conn, const PrMsg *msg)
{
	PrMigration *m = conn->m;

	if (!pr_destination_take_zero(m, msg, NULL))
		return FALSE;
	if (pr_ram_complete(m->ram))
		pr_pull_notify(m->pull);
	return TRUE;
}

gboolean pr_live_grants_handle(PrConn *conn, const PrMsg *msg)
{
	gboolean taken = FALSE;

	g_mutex_lock(&conn->grants_lock);
	if (conn->receiving_grants)
		taken = msg->type == PR_CMD_GRANT ? take_grant(conn, msg) : take_zero(conn, msg);
	g_mutex_unlock(&conn->grants_lock);
	return taken;
}

void pr_live_grants_start(PrMigration *m, PrConn *conn)
{
	pr_ram_mark_ungranted(m->ram);
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

void pr_live_grants_request(PrMigration *m, PrConn *conn, guint block, uint64_t page)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	uint64_t page_size = m->ram->blocks[block].page_size;
	PrWireRange range = {page * page_size, m->ram->blocks[block].per_host * page_size};

	pr_ranges_encode(body, block, &range, 1);
	/* A failure reports itself. */
	pr_send(conn, PR_RP_SCAN_FIRST, body, NULL);
}
