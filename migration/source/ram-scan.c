/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source looks through its RAM, over a incremental_grants path: what holds data is granted, all else is zero.
 *
 * That takes the longer the more RAM there is (holes and exchanged pages have to be looked for: transport/rdma/export.c),
 * and can't be done before the guest has stopped. So a thread does it, piece by piece, while the device state is saved
 * and loaded and while the guest runs at the destination already; each piece is told as soon as it was
 * looked at. Nothing between the stop and RUN waits for it.
 *
 * Every page is told once: either by GRANT or by RAM_ZERO. Until then the destination does not read it (live-grants.c); if
 * a fault waits for it, the destination asks, and the unit with that page is the next one to be looked at. So a fault
 * waits for one piece that is being looked at, its own unit and a round trip, however much RAM there is.
 *
 * The guest's RAM is what it was when it stopped, so it makes no difference when a piece is looked at.
 */
#include "migration/memory/bitmap.h"
#include "migration/session/session.h"
#include "util/try-alloc.h"

#define UNIT	  (2ull * 1024 * 1024) /* bytes: what is looked at for one fault */
#define UNITS	  16u		       /* that are looked at in one go when nobody asks */
#define ASKED_MAX 8192u

typedef struct PrScanRequest {
	uint32_t block;
	uint64_t unit;
} PrScanRequest;

typedef struct RamScanner {
	PrMigration *m;
	PrConn *conn;
	unsigned long *told[PR_BLOCKS_MAX]; /* for each block: units */
	uint32_t block;			    /* the walk goes on here */
	uint64_t unit;
} RamScanner;

static void looker_free(RamScanner *self)
{
	for (guint i = 0; i < PR_BLOCKS_MAX; i++)
		g_free(self->told[i]);
	g_free(self);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(RamScanner, looker_free)

static uint64_t n_units(const RamScanner *self, uint32_t block)
{
	return (self->m->ram->blocks[block].size + UNIT - 1) / UNIT;
}

/* All comes in its turn; what does not fit need not come first. With the lock held. */
static void ask_for(PrMigration *m, uint32_t block, const PrWireRange *range)
{
	uint64_t end = range->offset + range->length;

	for (uint64_t unit = range->offset / UNIT; unit * UNIT < end && m->asked->len < ASKED_MAX;
	     unit++)
		g_array_append_vals(m->asked, &(PrScanRequest){block, unit}, 1);
}

gboolean pr_source_take_look(PrMigration *m, const PrMsg *msg, GError **error)
{
	g_autofree PrWireRange *ranges = NULL;
	uint32_t block;
	guint n;

	if (!pr_ranges_decode(msg->body, msg->length, &block, &ranges, &n, error))
		return FALSE;
	for (guint i = 0; i < n; i++)
		if (block >= m->ram->n_blocks ||
		    !pr_ram_block_contains(&m->ram->blocks[block], ranges[i].offset,
					   ranges[i].length)) {
			g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
				    "the destination asks about a range outside of RAM block %u",
				    block);
			return FALSE;
		}
	g_mutex_lock(&m->lock);
	for (guint i = 0; i < n && m->looking; i++)
		ask_for(m, block, &ranges[i]);
	g_mutex_unlock(&m->lock);
	return TRUE;
}

/* The next unit that a fault waits for and that was not told yet. */
static gboolean next_asked(RamScanner *self, PrScanRequest *ret)
{
	PrMigration *m = self->m;
	gboolean found = FALSE;

	g_mutex_lock(&m->lock);
	while (!found && m->asked->len > 0) {
		*ret = g_array_index(m->asked, PrScanRequest, 0);
		g_array_remove_index(m->asked, 0);
		found = !pr_bitmap_test(self->told[ret->block], ret->unit);
	}
	g_mutex_unlock(&m->lock);
	return found;
}

/* The next units in the walk; 0: all were told. */
static uint64_t next_in_turn(RamScanner *self, PrScanRequest *ret)
{
	for (; self->block < self->m->ram->n_blocks; self->block++, self->unit = 0) {
		const unsigned long *told = self->told[self->block];
		uint64_t all = n_units(self, self->block), n = 0;

		self->unit = pr_bitmap_next_clear(told, all, self->unit);
		*ret = (PrScanRequest){self->block, self->unit};
		while (n < UNITS && self->unit < all && !pr_bitmap_test(told, self->unit)) {
			self->unit++;
			n++;
		}
		if (n > 0)
			return n;
	}
	return 0;
}

static gboolean look_at(RamScanner *self, const PrScanRequest *look, uint64_t n)
{
	PrConn *conn = self->conn;
	uint64_t start = look->unit * UNIT;
	uint64_t end = MIN(start + n * UNIT, self->m->ram->blocks[look->block].size);
	g_autoptr(GArray) grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));

	pr_bitmap_set(self->told[look->block], look->unit, n);
	conn->path->ops->grants_within(conn->path, look->block, start, end - start, grants);
	/* A path that has failed does not grant all that there is: the rest would pass for zero. */
	return !pr_attempt_has_failed(self->m) && pr_source_tell_grants(conn, grants, NULL) &&
	       pr_source_tell_ungranted(conn, look->block, start, end, grants, NULL);
}

static gboolean look_through(RamScanner *self)
{
	PrScanRequest look;
	uint64_t n;

	for (;;) {
		n = next_asked(self, &look) ? 1 : next_in_turn(self, &look);
		if (n == 0)
			return TRUE;
		if (!look_at(self, &look, n))
			return FALSE;
	}
}

static gpointer look_thread(gpointer opaque)
{
	g_autoptr(RamScanner) self = opaque;
	PrMigration *m = self->m;
	gint64 began = g_get_monotonic_time();
	gboolean all = look_through(self);

	g_info("looking at %" G_GUINT64_FORMAT " MiB of RAM took %.1f ms, beside all else%s",
	       m->ram->total_bytes >> 20, (double)(g_get_monotonic_time() - began) / 1e3,
	       all ? "" : "; not all was told");

	g_mutex_lock(&m->lock);
	m->looking = FALSE;
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
	return GINT_TO_POINTER(all);
}

static RamScanner *looker_new(PrMigration *m, PrConn *conn, GError **error)
{
	g_autoptr(RamScanner) self = g_new0(RamScanner, 1);

	self->m = m;
	self->conn = conn;
	for (guint i = 0; i < m->ram->n_blocks; i++) {
		gsize bytes = pr_bitmap_words(n_units(self, i)) * sizeof(unsigned long);

		self->told[i] = pr_try_alloc(bytes, "what of the RAM was looked at", error);
		if (!self->told[i])
			return NULL;
	}
	return g_steal_pointer(&self);
}

GThread *pr_look_begin(PrMigration *m, PrConn *conn, GError **error)
{
	g_autoptr(RamScanner) self = looker_new(m, conn, error);
	GThread *looker;

	if (!self)
		return NULL;
	g_mutex_lock(&m->lock);
	g_clear_pointer(&m->asked, g_array_unref);
	m->asked = g_array_new(FALSE, FALSE, sizeof(PrScanRequest));
	m->looking = TRUE;
	g_mutex_unlock(&m->lock);
	looker = pr_thread_try("look", look_thread, self, error);
	if (looker)
		g_steal_pointer(&self);
	else
		m->looking = FALSE; /* nobody waits for it yet */
	return looker;
}

gboolean pr_look_end(PrMigration *m, GThread *looker)
{
	gboolean all = GPOINTER_TO_INT(g_thread_join(looker));

	g_mutex_lock(&m->lock);
	g_clear_pointer(&m->asked, g_array_unref);
	g_mutex_unlock(&m->lock);
	return all;
}

void pr_look_await(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	/* Ended by the looker, or by a failure. */
	while (m->looking && !m->failure)
		g_cond_wait(&m->changed, &m->lock);
	g_mutex_unlock(&m->lock);
}
