/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * Goal: the guest's memory cgroup is charged for the pages that come in, and not the engine's
 * cgroup, which has a limit of its own. The kernel charges the process that allocates a page. So
 * the guest's allocator (guest/allocator.h), which runs in the guest's cgroup, allocates each page
 * before it is read; the READ then finds the page there.
 *
 * Invariant: a page that is allocated and not yet received is seen by nobody (state-memfd.h), and
 * allocating does not change a page that is there.
 *
 * The walk. A round trip to the allocator takes as long as a READ over a fast network. So from the
 * moment that the guest runs, the allocate thread walks through all blocks, ahead of the READs. It
 * allocates what is neither received nor ungranted, CHUNK bytes at a time. For a page behind it
 * pr_allocate() is a look into a bitmap. Zero pages in holes are known by then and left out. Other
 * zero pages get memory when the source has not yet reported them; they have memory at the source,
 * too. A thread that needs a page now requests it itself, and waits for one chunk of the walk at
 * most.
 *
 * What else in the engine grows with the guest:
 *  - The received bitmap and the bitmaps in ram->scratch are memfds. They are allocated in the same
 *    way at the start.
 *  - Page tables of the engine's mappings of RAM: 4 KiB for each 2 MiB (a piece) that a READ has
 *    touched. When PR_ALLOCATE_PIECES_MAX pieces have tables, the tables are freed: a stretch of
 *    pieces is mapped anew at its place, and gets new tables where it is touched again. The memfd's
 *    pages stay, so READs in flight are not disturbed. A card writes to the pages that were pinned.
 *    The kernel copies by address, and finds the same page by the new mapping.
 *  - Page tables of the guest's process. The kernel charges them to the process that maps the first
 *    page of a piece, also by UFFDIO_CONTINUE. So the allocator makes all of them at the start,
 *    while the memfds are empty.
 *
 * Not handled: huge pages (hugetlb). They are not charged to memory cgroups, unless cgroup2 is
 * mounted with memory_hugetlb_accounting (Linux 6.7). For memory that was allocated beforehand
 * (prealloc=on) only the page tables of the engine's mapping are handled.
 *
 * The allocator's death: when its cgroup is full, the kernel may kill it. Then no page can be read
 * any more, and each attempt reports why.
 */
#include "migration/postcopy/allocate.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "guest/allocator.h"
#include "migration/memory/bitmap.h"
#include "migration/core/types.h"
#include "migration/memory/scratch.h"
#include "util/try-alloc.h"

#define CHUNK	     (256u * 1024)	  /* bytes that one request is for at most */
#define PIECE	     (2ull * 1024 * 1024) /* bytes that a page table covers */
#define STRETCH	     32			  /* pieces that are mapped anew at once */
#define FILE_STATE   PR_BLOCKS_MAX
#define FILE_SCRATCH (PR_BLOCKS_MAX + 1)
#define FILE_UFFD    (PR_BLOCKS_MAX + 2)
#define TABLES_BYTES (1ull << 30) /* whose page tables one request is for */
G_STATIC_ASSERT(FILE_UFFD < PR_ALLOCATOR_FILES);

struct PrAllocate {
	/* constant */
	PrRam *ram;
	int socket;
	PrAllocateHooks hooks;
	GThread *thread;
	PrWatch *watch; /* the thread's own */

	/* Pieces that READs have touched since they were mapped. Atomic. */
	unsigned long *pieces[PR_BLOCKS_MAX];
	/* The same before that: a READ that began then may still be in flight. The thread's own. */
	unsigned long *older_pieces[PR_BLOCKS_MAX];
	guint n_pieces; /* atomic: bits set in `pieces` */

	int n_urgent;	     /* atomic: threads that wait for request_lock and need a page now */
	GMutex request_lock; /* protects what follows, and a request until its answer */
	uint32_t last_id;
	GError *end; /* why the allocator is gone; NULL: it lives */

	GMutex lock; /* protects what follows; taken last */
	GCond changed;
	gboolean walking; /* the guest runs, and the last walk did not fail */
	gboolean kicked;
	gboolean stop;
};

static const PrWatchPoint walking = {"allocating pages ahead", 2000};

/* ---- one request ---- */

static void set_error(GError **error, const char *what)
{
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
		    "the guest's memory can't be allocated: %s", what);
}

/* With request_lock. */
static gboolean set_end(PrAllocate *self, int code, GError **error)
{
	g_autofree char *what = g_strdup_printf(
		"its allocator has ended%s%s; the kernel may have killed it because the "
		"guest's memory cgroup is full: raise that cgroup's limit (memory.max), and start "
		"this engine anew with --resume",
		code ? ": " : "", code ? g_strerror(code) : "");

	set_error(&self->end, what);
	g_propagate_error(error, g_error_copy(self->end));
	return FALSE;
}

static gboolean check_code(int code, GError **error)
{
	g_autofree char *what = NULL;

	if (code == 0)
		return TRUE;
	what = g_strdup_printf(
		"%s%s", g_strerror(code),
		code == ENOMEM || code == ENOSPC
			? "; the guest's memory cgroup, or its tmpfs, is full: raise "
			  "its limit and recover"
			: "");
	set_error(error, what);
	return FALSE;
}

/* With request_lock. An answer to an earlier request, which has timed out, may come first. */
static gboolean await_answer(PrAllocate *self, GError **error)
{
	PrAllocatorReply reply;
	ssize_t n;

	for (;;) {
		n = recv(self->socket, &reply, sizeof(reply), 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
			set_error(error, "its allocator does not answer");
			return FALSE;
		}
		if (n != (ssize_t)sizeof(reply))
			return set_end(self, n < 0 ? errno : 0, error);
		if (reply.id == self->last_id)
			return check_code(reply.code, error);
	}
}

/* With request_lock. */
static gboolean request(PrAllocate *self, guint file, uint64_t offset, uint64_t length,
			GError **error)
{
	PrAllocatorRequest message = {.op = file == FILE_UFFD ? PR_ALLOCATOR_TABLES
							      : PR_ALLOCATOR_PAGES,
				      .id = ++self->last_id,
				      .file = file,
				      .offset = offset,
				      .length = length};

	if (self->end) {
		g_propagate_error(error, g_error_copy(self->end));
		return FALSE;
	}
	if (!pr_allocator_send(self->socket, &message, -1))
		return set_end(self, errno, error);
	return await_answer(self, error);
}

static gboolean request_locked(PrAllocate *self, guint file, uint64_t offset, uint64_t length,
			       GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&self->request_lock);

	return request(self, file, offset, length, error);
}

/* Whether a memory cgroup is charged for the block's pages. */
static gboolean is_charged(const PrRamBlock *block)
{
	return block->per_host == 1;
}

/* Allocates up to CHUNK bytes from this page on: *ret_n pages. */
static gboolean allocate_chunk(PrAllocate *self, guint index, uint64_t page, uint64_t n,
			       uint64_t *ret_n, GError **error)
{
	PrRamBlock *block = &self->ram->blocks[index];

	n = MIN(n, CHUNK / PR_TARGET_PAGE);
	if (!request_locked(self, index, block->memfd_offset + page * PR_TARGET_PAGE,
			    n * PR_TARGET_PAGE, error))
		return FALSE;
	pr_bitmap_set(block->allocated, page, n);
	*ret_n = n;
	return TRUE;
}

/* The next pages from *page on that are not allocated and have to be: not received, not ungranted.
 * Returns how many, all in one word of the bitmaps; 0: no such page is left. */
static uint64_t next_run(const PrRamBlock *block, uint64_t *page)
{
	for (uint64_t i = *page / PR_LONG_BITS; i < pr_bitmap_words(block->n_pages); i++) {
		unsigned long bits = __atomic_load_n(&block->allocated[i], __ATOMIC_RELAXED) |
				     __atomic_load_n(&block->received[i], __ATOMIC_RELAXED) |
				     __atomic_load_n(&block->ungranted[i], __ATOMIC_RELAXED);

		bits = ~bits & pr_bitmap_span(i, *page, block->n_pages);
		if (!bits)
			continue;
		guint first = (guint)__builtin_ctzl(bits);
		unsigned long rest = ~(bits >> first);
		*page = i * PR_LONG_BITS + first;
		return rest ? (uint64_t)__builtin_ctzl(rest) : PR_LONG_BITS;
	}
	return 0;
}

/* How many pages in a row from this one on have to be allocated, up to CHUNK bytes. */
static uint64_t run_ahead(const PrRamBlock *block, uint64_t first)
{
	uint64_t n, page = first, all = 0;

	while (all < CHUNK / PR_TARGET_PAGE && (n = next_run(block, &page)) > 0 &&
	       page == first + all) {
		all += n;
		page += n;
	}
	return MIN(all, CHUNK / PR_TARGET_PAGE);
}

/* ---- for the threads that read ---- */

static void kick(PrAllocate *self)
{
	g_mutex_lock(&self->lock);
	self->kicked = TRUE;
	g_cond_broadcast(&self->changed);
	g_mutex_unlock(&self->lock);
}

static void note_pieces(PrAllocate *self, guint index, uint64_t page, uint64_t n)
{
	uint64_t first = page * PR_TARGET_PAGE / PIECE;
	uint64_t last = (page + n - 1) * PR_TARGET_PAGE / PIECE;

	for (uint64_t i = first; i <= last; i++)
		if (!pr_bitmap_test(self->pieces[index], i) &&
		    !pr_bitmap_test_and_set(self->pieces[index], i) &&
		    __atomic_add_fetch(&self->n_pieces, 1, __ATOMIC_RELAXED) ==
			    PR_ALLOCATE_PIECES_MAX)
			kick(self);
}

/* Allocates pages before `end`. A pull thread (bulk) goes on behind them, so it allocates more at
 * once, and lets threads that wait for a single page go first. */
static gboolean allocate_now(PrAllocate *self, guint index, uint64_t page, uint64_t end,
			     gboolean bulk)
{
	const PrRamBlock *block = &self->ram->blocks[index];
	g_autoptr(GError) error = NULL;
	gboolean ok = TRUE;
	uint64_t n;

	__atomic_add_fetch(&self->n_urgent, !bulk, __ATOMIC_SEQ_CST);
	while (ok && (page = pr_bitmap_next_clear(block->allocated, end, page)) < end) {
		uint64_t more = bulk ? run_ahead(block, page) : 0;
		ok = allocate_chunk(self, index, page, MAX(more, end - page), &n, &error);
		page += ok ? n : 0;
	}
	__atomic_sub_fetch(&self->n_urgent, !bulk, __ATOMIC_SEQ_CST);
	if (!ok)
		self->hooks.broken(error, self->hooks.opaque);
	return ok;
}

gboolean pr_allocate(PrAllocate *self, guint index, uint64_t page, uint64_t n, gboolean bulk)
{
	if (!self || !is_charged(&self->ram->blocks[index]))
		return TRUE;
	note_pieces(self, index, page, n);
	uint64_t end = page + n;
	page = pr_bitmap_next_clear(self->ram->blocks[index].allocated, end, page);
	return page >= end || allocate_now(self, index, page, end, bulk);
}

void pr_allocate_walk(PrAllocate *self)
{
	if (!self)
		return;
	g_mutex_lock(&self->lock);
	self->walking = TRUE;
	g_mutex_unlock(&self->lock);
	kick(self);
}

void pr_allocate_notify(PrAllocate *self)
{
	if (self)
		kick(self);
}

/* ---- page tables of the engine's mappings ---- */

static uint64_t n_pieces_of(const PrRamBlock *block)
{
	return (block->size + PIECE - 1) / PIECE;
}

static void free_tables(PrAllocate *self)
{
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		const PrRamBlock *block = &self->ram->blocks[i];
		uint64_t all = n_pieces_of(block);

		for (uint64_t piece = 0; self->pieces[i] && piece < all; piece += STRETCH) {
			uint64_t n = MIN(STRETCH, all - piece), offset = piece * PIECE;
			guint had = (guint)pr_bitmap_clear(self->pieces[i], piece, n);

			if (had == 0 && !pr_bitmap_any(self->older_pieces[i], piece, n))
				continue;
			pr_bitmap_clear(self->older_pieces[i], piece, n);
			if (had > 0)
				pr_bitmap_set(self->older_pieces[i], piece, n);
			__atomic_sub_fetch(&self->n_pieces, had, __ATOMIC_RELAXED);
			pr_ram_map_anew(block, offset, MIN(n * PIECE, block->size - offset));
		}
	}
}

static gboolean has_many_tables(const PrAllocate *self)
{
	return __atomic_load_n(&self->n_pieces, __ATOMIC_RELAXED) >= PR_ALLOCATE_PIECES_MAX;
}

/* ---- the walk ---- */

static gboolean should_stop(PrAllocate *self)
{
	g_mutex_lock(&self->lock);
	gboolean stop = self->stop;
	g_mutex_unlock(&self->lock);
	return stop;
}

/* Threads that need a page now go first. Each of their requests is bounded. */
static void yield_to_readers(PrAllocate *self)
{
	while (__atomic_load_n(&self->n_urgent, __ATOMIC_SEQ_CST) > 0 && !should_stop(self)) {
		g_mutex_lock(&self->request_lock);
		g_mutex_unlock(&self->request_lock);
		g_thread_yield();
	}
}

/* FALSE: the walk has to end. */
static gboolean walk_block(PrAllocate *self, guint index, GError **error)
{
	PrRamBlock *block = &self->ram->blocks[index];
	uint64_t n, page = 0;

	while (is_charged(block) && next_run(block, &page) > 0) {
		n = run_ahead(block, page);
		if (has_many_tables(self))
			free_tables(self);
		yield_to_readers(self);
		pr_watch_enter(self->watch, &walking);
		if (should_stop(self) ||
		    (n > 0 && !allocate_chunk(self, index, page, n, &n, error)))
			return FALSE;
		page += n;
	}
	return TRUE;
}

/* A failure here is only logged. A thread that needs one of the pages tries again, and reports the
 * failure. */
static void walk(PrAllocate *self)
{
	g_autoptr(GError) error = NULL;

	for (guint i = 0; i < self->ram->n_blocks; i++)
		if (!walk_block(self, i, &error))
			break;
	if (!error)
		return;
	g_info("no memory is allocated ahead until the next path: %s", error->message);
	g_mutex_lock(&self->lock);
	self->walking = FALSE;
	g_mutex_unlock(&self->lock);
}

/* Waits for a kick. *ret_walk: whether to walk. FALSE: the thread has to end. */
static gboolean wait_kick(PrAllocate *self, gboolean *ret_walk)
{
	g_mutex_lock(&self->lock);
	/* Ended by a kick, or by pr_allocate_stop(). */
	while (!self->stop && !self->kicked)
		g_cond_wait(&self->changed, &self->lock);
	gboolean go_on = !self->stop;
	self->kicked = FALSE;
	*ret_walk = self->walking;
	g_mutex_unlock(&self->lock);
	return go_on;
}

static gpointer allocate_thread(gpointer opaque)
{
	PrAllocate *self = opaque;
	g_autoptr(PrWatch) watch = pr_watch_new(self->hooks.watchdog, "allocate");
	gboolean may_walk;

	self->watch = watch;
	while (wait_kick(self, &may_walk)) {
		pr_watch_enter(watch, &walking);
		if (has_many_tables(self))
			free_tables(self);
		if (may_walk)
			walk(self);
		pr_watch_idle(watch);
	}
	return NULL;
}

/* ---- start and stop ---- */

static gboolean send_file(PrAllocate *self, guint file, int fd, GError **error)
{
	PrAllocatorRequest request = {.op = PR_ALLOCATOR_FILE, .file = file};

	return pr_allocator_send(self->socket, &request, fd) || set_end(self, errno, error);
}

static gboolean prepare_block(PrAllocate *self, guint index, GError **error)
{
	const PrRamBlock *block = &self->ram->blocks[index];

	if (!is_charged(block))
		return TRUE;
	if (pr_file_is_preallocated(block->memfd))
		pr_bitmap_set(block->allocated, 0, block->n_pages);
	self->pieces[index] = pr_bitmap_new(n_pieces_of(block));
	self->older_pieces[index] = pr_bitmap_new(n_pieces_of(block));
	if (!self->pieces[index] || !self->older_pieces[index]) {
		set_error(error, g_strerror(ENOMEM));
		return FALSE;
	}
	return send_file(self, index, block->memfd, error);
}

/* Registers the memfds with the allocator. The engine's bitmaps are charged to the guest, too. */
static gboolean prepare(PrAllocate *self, GError **error)
{
	const PrRam *ram = self->ram;
	gsize state = pr_state_memfd_bytes(ram->state_memfd),
	      scratch = pr_scratch_bytes(ram->scratch);

	for (guint i = 0; i < ram->n_blocks; i++)
		if (!prepare_block(self, i, error))
			return FALSE;
	return send_file(self, FILE_STATE, pr_state_memfd_fd(ram->state_memfd), error) &&
	       send_file(self, FILE_SCRATCH, pr_scratch_fd(ram->scratch), error) &&
	       request_locked(self, FILE_STATE, 0, state, error) &&
	       request_locked(self, FILE_SCRATCH, 0, scratch, error);
}

/* A memfd with pages, as after a preallocation, gets no page tables from the allocator. */
static gboolean is_empty(const PrRamBlock *block)
{
	struct stat st;

	return fstat(block->memfd, &st) == 0 && st.st_blocks == 0;
}

/* Only while the memfds are holes: making a page table where there is a page would show that page
 * to the guest. */
static gboolean request_tables(PrAllocate *self, GError **error)
{
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		const PrRamBlock *block = &self->ram->blocks[i];

		if (!is_charged(block) || !is_empty(block))
			continue;
		for (uint64_t at = 0; at < block->size; at += TABLES_BYTES)
			if (!request_locked(self, FILE_UFFD, block->base + at,
					    MIN(TABLES_BYTES, block->size - at), error))
				return FALSE;
	}
	return TRUE;
}

/* Another file takes the userfaultfd's place at the end: a guest that is killed may not end while
 * some process has its userfaultfd open. */
static gboolean make_tables(PrAllocate *self, int uffd, GError **error)
{
	if (uffd < 0)
		return TRUE;
	gboolean made = send_file(self, FILE_UFFD, uffd, error) && request_tables(self, error);

	return send_file(self, FILE_UFFD, pr_state_memfd_fd(self->ram->state_memfd),
			 made ? error : NULL) &&
	       made;
}

static void allocate_free(PrAllocate *self)
{
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		g_free(self->pieces[i]);
		g_free(self->older_pieces[i]);
	}
	g_clear_error(&self->end);
	g_mutex_clear(&self->request_lock);
	g_mutex_clear(&self->lock);
	g_cond_clear(&self->changed);
	g_free(self);
}

PrAllocate *pr_allocate_start(PrRam *ram, int socket, int uffd, const PrAllocateHooks *hooks,
			      GError **error)
{
	const struct timeval timeout = {.tv_sec = PR_ALLOCATE_TIMEOUT_MS / 1000};
	PrAllocate *self = g_new0(PrAllocate, 1);

	self->ram = ram;
	self->socket = socket;
	self->last_id = g_random_int(); /* an answer to an earlier attempt may still come */
	self->hooks = *hooks;
	g_mutex_init(&self->request_lock);
	g_mutex_init(&self->lock);
	g_cond_init(&self->changed);
	(void)setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	(void)setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	if (prepare(self, error) && make_tables(self, uffd, error))
		self->thread = pr_thread_try("allocate", allocate_thread, self, error);
	if (!self->thread) {
		allocate_free(self);
		return NULL;
	}
	return self;
}

void pr_allocate_stop(PrAllocate *self)
{
	if (!self)
		return;
	g_mutex_lock(&self->lock);
	self->stop = TRUE;
	g_cond_broadcast(&self->changed);
	g_mutex_unlock(&self->lock);
	g_thread_join(self->thread);
	allocate_free(self);
}
