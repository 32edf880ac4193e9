/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The scan of the source's RAM over a path with incremental grants: ranges with data are granted,
 * all others are zero.
 *
 * The scan takes longer the more RAM there is (holes and exchanged pages have to be found:
 * transport/rdma/source-mr.c), and can't begin before the guest has stopped. So a thread scans
 * piece by piece, while the device state is saved and loaded and while the guest runs at the
 * destination already. Each piece is granted as soon as it was scanned. Nothing between the stop
 * and RUN waits for the scan.
 *
 * The destination is told about every page once: by GRANT or by RAM_ZERO. Until then it does not
 * read the page (destination/live-grants.c). If a fault waits for it, the destination asks, and the
 * unit with that page is scanned next. So a fault waits for the piece that is being scanned, its
 * own unit and a round trip, however much RAM there is.
 *
 * The guest's RAM is what it was when it stopped, so it makes no difference when a piece is
 * scanned.
 */
#include "migration/source/ram-scan.h"

#include "migration/memory/bitmap.h"
#include "migration/source/grants.h"
#include "migration/source/zero-pages.h"
#include "util/try-alloc.h"

#define UNIT	     (2ull * 1024 * 1024) /* bytes: scanned for one fault */
#define UNITS	     16u		  /* scanned in one piece when no fault waits */
#define REQUESTS_MAX 8192u

typedef struct PrScanRequest {
	uint32_t block;
	uint64_t unit;
} PrScanRequest;

typedef struct RamScanner {
	PrConn *conn;
	unsigned long *scanned[PR_BLOCKS_MAX]; /* for each block a bitmap of its units */
	uint32_t block;			       /* the scan goes on here */
	uint64_t unit;
} RamScanner;

static void scanner_free(RamScanner *self)
{
	for (guint i = 0; i < PR_BLOCKS_MAX; i++)
		g_free(self->scanned[i]);
	g_free(self);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(RamScanner, scanner_free)

static uint64_t n_units(const RamScanner *self, uint32_t block)
{
	return (self->conn->session->ram->blocks[block].size + UNIT - 1) / UNIT;
}

/* All RAM is scanned in the end, so requests that do not fit may be dropped. With the lock held. */
static void add_requests(PrSource *source, uint32_t block, const PrWireRange *range)
{
	uint64_t end = range->offset + range->length;

	for (uint64_t unit = range->offset / UNIT;
	     unit * UNIT < end && source->scan_requests->len < REQUESTS_MAX; unit++)
		g_array_append_vals(source->scan_requests, &(PrScanRequest){block, unit}, 1);
}

gboolean pr_source_handle_scan_first(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSource *source = pr_conn_source(conn);
	PrSession *session = conn->session;
	g_autofree PrWireRange *ranges = NULL;
	uint32_t block;
	guint n;

	if (!pr_ranges_decode(msg->body, msg->length, &block, &ranges, &n, error))
		return FALSE;
	for (guint i = 0; i < n; i++)
		if (block >= session->ram->n_blocks ||
		    !pr_ram_block_contains(&session->ram->blocks[block], ranges[i].offset,
					   ranges[i].length)) {
			g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
				    "the destination asks about a range outside of RAM block %u",
				    block);
			return FALSE;
		}
	pr_session_lock(session);
	for (guint i = 0; i < n && source->scanning; i++)
		add_requests(source, block, &ranges[i]);
	pr_session_unlock(session);
	return TRUE;
}

/* The next unit that a fault waits for. */
static gboolean next_requested(RamScanner *self, PrScanRequest *ret)
{
	PrSource *source = pr_conn_source(self->conn);
	PrSession *session = source->session;
	gboolean found = FALSE;

	pr_session_lock(session);
	while (!found && source->scan_requests->len > 0) {
		*ret = g_array_index(source->scan_requests, PrScanRequest, 0);
		g_array_remove_index(source->scan_requests, 0);
		found = !pr_bitmap_test(self->scanned[ret->block], ret->unit);
	}
	pr_session_unlock(session);
	return found;
}

/* The next units in their order; 0: all were scanned. */
static uint64_t next_in_turn(RamScanner *self, PrScanRequest *ret)
{
	for (; self->block < self->conn->session->ram->n_blocks; self->block++, self->unit = 0) {
		const unsigned long *scanned = self->scanned[self->block];
		uint64_t all = n_units(self, self->block), n = 0;

		self->unit = pr_bitmap_next_clear(scanned, all, self->unit);
		*ret = (PrScanRequest){self->block, self->unit};
		while (n < UNITS && self->unit < all && !pr_bitmap_test(scanned, self->unit)) {
			self->unit++;
			n++;
		}
		if (n > 0)
			return n;
	}
	return 0;
}

static gboolean scan_piece(RamScanner *self, const PrScanRequest *piece, uint64_t n)
{
	PrConn *conn = self->conn;
	uint64_t start = piece->unit * UNIT;
	uint64_t end = MIN(start + n * UNIT, self->conn->session->ram->blocks[piece->block].size);
	g_autoptr(GArray) grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));

	pr_bitmap_set(self->scanned[piece->block], piece->unit, n);
	conn->path->ops->grants_within(conn->path, piece->block, start, end - start, grants);
	/* A path that has failed does not grant all data. The rest must not pass for zeros. */
	return !pr_session_attempt_has_failed(conn->session) &&
	       pr_source_send_grants(conn, grants, NULL) &&
	       pr_source_send_ungranted(conn, piece->block, start, end, grants, NULL);
}

static gboolean scan_all(RamScanner *self)
{
	PrScanRequest piece;
	uint64_t n;

	for (;;) {
		n = next_requested(self, &piece) ? 1 : next_in_turn(self, &piece);
		if (n == 0)
			return TRUE;
		if (!scan_piece(self, &piece, n))
			return FALSE;
	}
}

static gpointer scan_thread(gpointer opaque)
{
	g_autoptr(RamScanner) self = opaque;
	PrSource *source = pr_conn_source(self->conn);
	PrSession *session = source->session;
	gint64 began = g_get_monotonic_time();
	gboolean all = scan_all(self);

	g_info("scanning %" G_GUINT64_FORMAT " MiB of RAM took %.1f ms, in the background%s",
	       session->ram->total_bytes >> 20, (double)(g_get_monotonic_time() - began) / 1e3,
	       all ? "" : "; it was not finished");

	pr_session_lock(session);
	source->scanning = FALSE;
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);
	return GINT_TO_POINTER(all);
}

static RamScanner *scanner_new(PrConn *conn, GError **error)
{
	const PrRam *ram = conn->session->ram;
	g_autoptr(RamScanner) self = g_new0(RamScanner, 1);

	self->conn = conn;
	for (guint i = 0; i < ram->n_blocks; i++) {
		gsize bytes = pr_bitmap_words(n_units(self, i)) * sizeof(unsigned long);

		self->scanned[i] = pr_try_alloc(bytes, "the bitmap of scanned RAM", error);
		if (!self->scanned[i])
			return NULL;
	}
	return g_steal_pointer(&self);
}

GThread *pr_ram_scan_start(PrConn *conn, GError **error)
{
	PrSource *source = pr_conn_source(conn);
	PrSession *session = conn->session;
	g_autoptr(RamScanner) self = scanner_new(conn, error);
	GThread *scanner;

	if (!self)
		return NULL;
	pr_session_lock(session);
	g_clear_pointer(&source->scan_requests, g_array_unref);
	source->scan_requests = g_array_new(FALSE, FALSE, sizeof(PrScanRequest));
	source->scanning = TRUE;
	pr_session_unlock(session);
	scanner = pr_thread_try("ram-scan", scan_thread, self, error);
	if (scanner)
		g_steal_pointer(&self);
	else
		source->scanning = FALSE; /* no thread waits for it yet */
	return scanner;
}

gboolean pr_ram_scan_finish(PrSource *source, GThread *scanner)
{
	PrSession *session = source->session;
	gboolean all = GPOINTER_TO_INT(g_thread_join(scanner));

	pr_session_lock(session);
	g_clear_pointer(&source->scan_requests, g_array_unref);
	pr_session_unlock(session);
	return all;
}

void pr_ram_scan_await(PrSource *source)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	/* Ended by the end of the scan, or by a failure. */
	while (source->scanning && !session->failure)
		g_cond_wait(&session->changed, &session->lock);
	pr_session_unlock(session);
}
