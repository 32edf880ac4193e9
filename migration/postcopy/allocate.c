/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * The pages that come in belong to the guest, and so its memory cgroup is to be charged for them, and not the
 * engine's, which has a limit of its own. The kernel charges whoever allocates a page. So each page is
 * allocated by the guest's allocator (guest/allocator.h) before it is read: a READ then finds it there. What is
 * allocated and was not read yet is seen by nobody (state-memfd.h), and allocating changes no page that is there.
 *
 * A round trip to the allocator takes as long as a READ over a fast network. So a thread goes ahead from the
 * moment that the guest runs: through all blocks, allocating what is neither received nor veiled, CHUNK bytes at a time.
 * Where it has been, pr_allocate() is a look into a bitmap. Zero pages in holes are known by then, and left out. Others
 * that the source has not told of yet get memory; they have it at the source, too.
 * A thread that needs a page now asks for it itself, and waits for one chunk of the walk at most.
 *
 * What else of the engine grows with the guest:
 *  - the received bitmap and those in ram->scratch are memfds, which are allocated in the same way at the start.
 *  - page tables of our mappings, 4 KiB for each 2 MiB (a piece) that was read into. When there are PR_ALLOCATE_PIECES_MAX of them, they
 *    are given back: a stretch is mapped anew where it was. Whoever touches it again gets new ones. The memfd's pages
 *    stay where they are, so that a READ into them is not disturbed: a card writes to the pages that were pinned, and the
 *    kernel, which copies by address, finds the same page through the new mapping.
 *
 *  - page tables of the guest's process: the kernel charges them to whoever maps the first page of a piece, also by UFFDIO_CONTINUE.
 *    So the allocator makes all of them at the start, when the memfds are empty and nothing is read yet.
 *
 * Huge pages (hugetlb) are not charged to memory cgroups, unless cgroup2 is mounted with memory_hugetlb_accounting (Linux 6.7);
 * nothing is done for them. Nor for memory that was allocated
 * beforehand (prealloc=on), but for the tables of our mapping.
 *
 * The allocator's end: when its cgroup is full the kernel may kill it. Then nothing can be read any more, and each try
 * says why.
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

#define CHUNK	     (256u * 1024) /* bytes; a request is for so many at most */
#define PIECE	     (2ull * 1024 * 1024)
#define STRETCH	     32 /* pieces that are mapped anew at once */
#define FILE_KEPT    PR_BLOCKS_MAX
#define FILE_SCRATCH (PR_BLOCKS_MAX + 1)
#define FILE_UFFD    (PR_BLOCKS_MAX + 2)
#define TABLES_BYTES (1ull << 30) /* whose tables are asked for at once */
G_STATIC_ASSERT(FILE_UFFD < PR_ALLOCATOR_FILES);

struct PrAllocate {
	/* constant */
	PrRam *ram;
	int socket;
	PrAllocateHooks hooks;
	GThread *thread;
	PrWatch *watch; /* the thread's own */

	unsigned long *pieces[PR_BLOCKS_MAX]; /* atomic: what was read into since it was mapped */
	unsigned long *before
		[PR_BLOCKS_MAX]; /* the thread's own: and before that, when a READ may have been under
					       * way still */
	guint n_pieces;		 /* atomic: of them */

	int hasty;   /* atomic: threads that want a turn and have a page to read */
	GMutex turn; /* protects what follows, and the socket: a request and its answer */
	uint32_t last_id;
	GError *end; /* the allocator has ended */

	GMutex lock; /* protects what follows; taken last */
	GCond changed;
	gboolean walking; /* the guest runs, and the last walk did not fail */
	gboolean news;	  /* there is something to look at */
	gboolean stop;
};

static const PrWatchPoint walking = {"allocating pages ahead", 2000};

/* ---- one request ---- */

static void set_error(GError **error, const char *what)
{
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
		    "the guest's memory can't be allocated: %s", what);
}

/* With the turn. */
static gboolean note_end(PrAllocate *self, int code, GError **error)
{
	g_autofree char *what = g_strdup_printf(
		"what allocates it has ended%s%s; perhaps the kernel has killed it because the "
		"guest's memory cgroup is full: raise that one's limit (memory.max), and start "
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

/* With the turn. An answer to a question that was given up before may come first. */
static gboolean await_answer(PrAllocate *self, GError **error)
{
	PrAllocatorReply reply;
	ssize_t n;

	for (;;) {
		n = recv(self->socket, &reply, sizeof(reply), 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
			set_error(error, "what allocates it does not answer");
			return FALSE;
		}
		if (n != (ssize_t)sizeof(reply))
			return note_end(self, n < 0 ? errno : 0, error);
		if (reply.id == self->last_id)
			return check_code(reply.code, error);
	}
}

/* With the turn. */
static gboolean ask(PrAllocate *self, guint file, uint64_t offset, uint64_t length, GError **error)
{
	PrAllocatorRequest request = {.op = file == FILE_UFFD ? PR_ALLOCATOR_TABLES
							      : PR_ALLOCATOR_PAGES,
				      .id = ++self->last_id,
				      .file = file,
				      .offset = offset,
				      .length = length};

	if (self->end) {
		g_propagate_error(error, g_error_copy(self->end));
		return FALSE;
	}
	if (!pr_allocator_send(self->socket, &request, -1))
		return note_end(self, errno, error);
	return await_answer(self, error);
}

static gboolean ask_in_turn(PrAllocate *self, guint file, uint64_t offset, uint64_t length,
			    GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&self->turn);

	return ask(self, file, offset, length, error);
}

static gboolean is_charged(const PrRamBlock *block)
{
	return block->per_host == 1;
}

/* Up to CHUNK bytes; *ret_n pages are allocated then. */
static gboolean allocate_some(PrAllocate *self, guint index, uint64_t page, uint64_t n,
			      uint64_t *ret_n, GError **error)
{
	PrRamBlock *block = &self->ram->blocks[index];

	n = MIN(n, CHUNK / PR_TARGET_PAGE);
	if (!ask_in_turn(self, index, block->memfd_offset + page * PR_TARGET_PAGE,
			 n * PR_TARGET_PAGE, error))
		return FALSE;
	pr_bitmap_set(block->allocated, page, n);
	*ret_n = n;
	return TRUE;
}

/* The next pages from *page on that are to come and are not allocated. Returns how many, all in one word of the bitmaps;
 * 0: none. */
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

/* How many pages in a row from this one on are to come and are not allocated, up to CHUNK bytes. */
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

/* ---- who reads ---- */

static void kick(PrAllocate *self)
{
	g_mutex_lock(&self->lock);
	self->news = TRUE;
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

/* Who pulls goes on behind these pages: asks for what comes next as well, and lets who waits for a single page pass. */
static gboolean allocate_now(PrAllocate *self, guint index, uint64_t page, uint64_t end,
			     gboolean bulk)
{
	const PrRamBlock *block = &self->ram->blocks[index];
	g_autoptr(GError) error = NULL;
	gboolean ok = TRUE;
	uint64_t n;

	__atomic_add_fetch(&self->hasty, !bulk, __ATOMIC_SEQ_CST);
	while (ok && (page = pr_bitmap_next_clear(block->allocated, end, page)) < end) {
		uint64_t more = bulk ? run_ahead(block, page) : 0;
		ok = allocate_some(self, index, page, MAX(more, end - page), &n, &error);
		page += ok ? n : 0;
	}
	__atomic_sub_fetch(&self->hasty, !bulk, __ATOMIC_SEQ_CST);
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

/* ---- page tables ---- */

static uint64_t n_pieces_of(const PrRamBlock *block)
{
	return (block->size + PIECE - 1) / PIECE;
}

static void give_tables_back(PrAllocate *self)
{
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		const PrRamBlock *block = &self->ram->blocks[i];
		uint64_t all = n_pieces_of(block);

		for (uint64_t piece = 0; self->pieces[i] && piece < all; piece += STRETCH) {
			uint64_t n = MIN(STRETCH, all - piece), offset = piece * PIECE;
			guint had = (guint)pr_bitmap_clear(self->pieces[i], piece, n);

			if (had == 0 && !pr_bitmap_any(self->before[i], piece, n))
				continue;
			pr_bitmap_clear(self->before[i], piece, n);
			if (had > 0)
				pr_bitmap_set(self->before[i], piece, n);
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

/* Who has a page to read goes first. Each turn is bounded. */
static void let_others_pass(PrAllocate *self)
{
	while (__atomic_load_n(&self->hasty, __ATOMIC_SEQ_CST) > 0 && !should_stop(self)) {
		g_mutex_lock(&self->turn);
		g_mutex_unlock(&self->turn);
		g_thread_yield();
	}
}

/* FALSE: it is over. */
static gboolean walk_block(PrAllocate *self, guint index, GError **error)
{
	PrRamBlock *block = &self->ram->blocks[index];
	uint64_t n, page = 0;

	while (is_charged(block) && next_run(block, &page) > 0) {
		n = run_ahead(block, page);
		if (has_many_tables(self))
			give_tables_back(self);
		let_others_pass(self);
		pr_watch_enter(self->watch, &walking);
		if (should_stop(self) || (n > 0 && !allocate_some(self, index, page, n, &n, error)))
			return FALSE;
		page += n;
	}
	return TRUE;
}

/* A failure is told to whoever needs one of the pages, if that happens. */
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

/* Waits for something to do. FALSE: the thread is to end. */
static gboolean wait_news(PrAllocate *self, gboolean *ret_walk)
{
	g_mutex_lock(&self->lock);
	/* Ended by a kick, or the end of the service. */
	while (!self->stop && !self->news)
		g_cond_wait(&self->changed, &self->lock);
	gboolean go_on = !self->stop;
	self->news = FALSE;
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
	while (wait_news(self, &may_walk)) {
		pr_watch_enter(watch, &walking);
		if (has_many_tables(self))
			give_tables_back(self);
		if (may_walk)
			walk(self);
		pr_watch_idle(watch);
	}
	return NULL;
}

/* ---- beginning and end ---- */

static gboolean give_file(PrAllocate *self, guint file, int fd, GError **error)
{
	PrAllocatorRequest request = {.op = PR_ALLOCATOR_FILE, .file = file};

	return pr_allocator_send(self->socket, &request, fd) || note_end(self, errno, error);
}

static gboolean prepare_block(PrAllocate *self, guint index, GError **error)
{
	const PrRamBlock *block = &self->ram->blocks[index];

	if (!is_charged(block))
		return TRUE;
	if (pr_file_is_preallocated(block->memfd))
		pr_bitmap_set(block->allocated, 0, block->n_pages);
	self->pieces[index] = pr_bitmap_new(n_pieces_of(block));
	self->before[index] = pr_bitmap_new(n_pieces_of(block));
	if (!self->pieces[index] || !self->before[index]) {
		set_error(error, g_strerror(ENOMEM));
		return FALSE;
	}
	return give_file(self, index, block->memfd, error);
}

/* Our own bitmaps are the guest's, too. */
static gboolean prepare(PrAllocate *self, GError **error)
{
	const PrRam *ram = self->ram;
	gsize kept = pr_state_memfd_bytes(ram->state_memfd),
	      scratch = pr_scratch_bytes(ram->scratch);

	for (guint i = 0; i < ram->n_blocks; i++)
		if (!prepare_block(self, i, error))
			return FALSE;
	return give_file(self, FILE_KEPT, pr_state_memfd_fd(ram->state_memfd), error) &&
	       give_file(self, FILE_SCRATCH, pr_scratch_fd(ram->scratch), error) &&
	       ask_in_turn(self, FILE_KEPT, 0, kept, error) &&
	       ask_in_turn(self, FILE_SCRATCH, 0, scratch, error);
}

/* A memfd that keeps its pages, as where they were preallocated, gets no tables from us. */
static gboolean is_empty(const PrRamBlock *block)
{
	struct stat st;

	return fstat(block->memfd, &st) == 0 && st.st_blocks == 0;
}

/* While all of it is holes: to ask for a table where there is a page would show that to the guest. */
static gboolean ask_for_tables(PrAllocate *self, GError **error)
{
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		const PrRamBlock *block = &self->ram->blocks[i];

		if (!is_charged(block) || !is_empty(block))
			continue;
		for (uint64_t at = 0; at < block->size; at += TABLES_BYTES)
			if (!ask_in_turn(self, FILE_UFFD, block->base + at,
					 MIN(TABLES_BYTES, block->size - at), error))
				return FALSE;
	}
	return TRUE;
}

/* The userfaultfd is taken back: while somebody has it open a guest that is killed may not come to its end. */
static gboolean make_tables(PrAllocate *self, int uffd, GError **error)
{
	if (uffd < 0)
		return TRUE;
	gboolean made = give_file(self, FILE_UFFD, uffd, error) && ask_for_tables(self, error);

	return give_file(self, FILE_UFFD, pr_state_memfd_fd(self->ram->state_memfd),
			 made ? error : NULL) &&
	       made;
}

static void allocate_free(PrAllocate *self)
{
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		g_free(self->pieces[i]);
		g_free(self->before[i]);
	}
	g_clear_error(&self->end);
	g_mutex_clear(&self->turn);
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
	self->last_id = g_random_int(); /* an answer to the last attempt may still come */
	self->hooks = *hooks;
	g_mutex_init(&self->turn);
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
