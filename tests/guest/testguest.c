/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tests/guest/testguest.h"

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <gio/gio.h>
#include <glib/gstdio.h>

#include "postroad/agent.h"

#define PAGE	  4096u
#define HUGE_PAGE (2u << 20)

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26) /* of linux/memfd.h, which does not go with libc's header */
#endif
#define WORDS	      (PAGE / sizeof(uint64_t))
#define VERSION_ZEROS 0x80000000u /* this version of the page is all zeros */
#define STATE_MAGIC   0x74736554u
#define STOP_TIMEOUT  10000 /* ms; an engine's own timeout is usually shorter */
#define BURST	      16    /* pages between two pauses */
#define REPORTS	      8	    /* corrupt pages described on stderr; all are counted */

typedef struct Block {
	int memfd;
	uint8_t *map;
	/* each page's belongs to one thread; to the thread that has parked all others while they
	 * are parked */
	uint32_t *versions;
} Block;

typedef struct Worker {
	TestGuest *guest;
	GThread *thread;
	guint index;
	uint64_t random;
} Worker;

struct TestGuest {
	TestGuestConfig config; /* constant */
	char *dir;		/* constant; NULL: the socket's path was given */
	char *socket;		/* constant */
	char *spec;		/* constant */
	uint64_t block_size;	/* constant, bytes */
	uint32_t n_pages;	/* constant, of each block */
	Block *blocks;
	Worker *workers;
	PrAgent *agent;

	GMutex lock;
	GCond cond;	  /* lock; any of the following changed */
	gboolean running; /* lock */
	guint n_parked;	  /* lock */
	gboolean loaded;  /* lock; written with all threads parked */
	uint32_t seed;	  /* as loaded */
	atomic_bool park; /* set under the lock: threads look at it between two pages */
	atomic_bool quit; /* as park */
	atomic_ullong verified, corrupt, written;
	atomic_uint refused_runs; /* so far */
};

typedef struct StateHeader {
	uint32_t magic;
	uint32_t n_blocks;
	uint32_t n_pages;
	uint32_t seed;
} StateHeader;

/* Contents */

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static gboolean is_zeros(uint32_t version)
{
	return version == 0 || (version & VERSION_ZEROS);
}

static uint64_t page_key(const TestGuest *guest, guint block, uint32_t page, uint32_t version)
{
	return mix(((uint64_t)guest->seed << 32 | block) ^ mix((uint64_t)page << 32 | version));
}

static void fill_page(TestGuest *guest, guint block, uint32_t page)
{
	uint64_t *words = (uint64_t *)(guest->blocks[block].map + (uint64_t)page * PAGE);
	uint32_t version = guest->blocks[block].versions[page];
	uint64_t key = page_key(guest, block, page, version);

	if (is_zeros(version)) {
		memset(words, 0, PAGE);
		return;
	}
	for (guint i = 0; i < WORDS; i++)
		words[i] = mix(key + i);
}

static gboolean page_right(TestGuest *guest, guint block, uint32_t page, const uint64_t *words)
{
	uint32_t version = guest->blocks[block].versions[page];
	uint64_t key = page_key(guest, block, page, version);
	gboolean zeros = is_zeros(version);

	for (guint i = 0; i < WORDS; i++) {
		uint64_t want = zeros ? 0 : mix(key + i);

		if (words[i] == want)
			continue;
		if (!atomic_load(&guest->quit) && atomic_load(&guest->corrupt) < REPORTS)
			g_printerr("testguest %s: ram%u page %u version 0x%x word %u: found "
				   "%016" PRIx64 ", expected %016" PRIx64 "\n",
				   guest->socket, block, page, version, i, words[i], want);
		return FALSE;
	}
	return TRUE;
}

static gboolean never_touched(uint32_t page)
{
	return page % 16 == 0;
}

/* Counts, unless the guest is being freed: then waiting threads read zeros. */
static gboolean check_page(TestGuest *guest, guint block, uint32_t page)
{
	const uint64_t *words = (uint64_t *)(guest->blocks[block].map + (uint64_t)page * PAGE);
	uint64_t copy[WORDS];
	gboolean right;

	/* Reading a hole through the mapping would fill it. */
	if (never_touched(page) && !guest->loaded) {
		if (pread(guest->blocks[block].memfd, copy, PAGE, (uint64_t)page * PAGE) != PAGE)
			return FALSE;
		words = copy;
	}
	right = page_right(guest, block, page, words);
	if (right)
		atomic_fetch_add(&guest->verified, 1);
	else if (!atomic_load(&guest->quit))
		atomic_fetch_add(&guest->corrupt, 1);
	return right;
}

/* Threads */

static uint64_t next_random(Worker *worker)
{
	worker->random ^= worker->random << 13;
	worker->random ^= worker->random >> 7;
	worker->random ^= worker->random << 17;
	return worker->random;
}

static void rewrite_page(Worker *worker, guint block, uint32_t page)
{
	TestGuest *guest = worker->guest;
	uint32_t *version = &guest->blocks[block].versions[page];

	*version = (*version & ~VERSION_ZEROS) + 1;
	if (next_random(worker) % 32 == 0)
		*version |= VERSION_ZEROS;
	fill_page(guest, block, page);
	atomic_fetch_add(&guest->written, 1);
}

static void work_on_a_page(Worker *worker)
{
	TestGuest *guest = worker->guest;
	guint n_threads = guest->config.n_threads;
	guint block = next_random(worker) % guest->config.n_blocks;
	uint32_t page = next_random(worker) % guest->n_pages;

	/* A page belongs to one thread. */
	page = page - page % n_threads + worker->index;
	if (page >= guest->n_pages || (never_touched(page) && !guest->loaded))
		return;
	if (check_page(guest, block, page) && !never_touched(page) && next_random(worker) % 2)
		rewrite_page(worker, block, page);
}

/* FALSE: the thread has to end. */
static gboolean park(TestGuest *guest)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&guest->lock);

	guest->n_parked++;
	g_cond_broadcast(&guest->cond);
	while (atomic_load(&guest->park) && !atomic_load(&guest->quit))
		g_cond_wait(&guest->cond, &guest->lock);
	guest->n_parked--;
	return !atomic_load(&guest->quit);
}

static gpointer worker_thread(gpointer data)
{
	Worker *worker = data;
	TestGuest *guest = worker->guest;

	while (!atomic_load(&guest->quit)) {
		if (atomic_load(&guest->park) && !park(guest))
			break;
		for (guint i = 0; i < BURST && !atomic_load(&guest->park); i++)
			work_on_a_page(worker);
		if (guest->config.pace_us)
			g_usleep(guest->config.pace_us);
	}
	return NULL;
}

/* With the lock held. */
static gboolean stop_locked(TestGuest *guest, guint timeout_ms, gboolean *ret_was_running)
{
	gint64 deadline = g_get_monotonic_time() + timeout_ms * G_TIME_SPAN_MILLISECOND;

	*ret_was_running = guest->running;
	guest->running = FALSE;
	atomic_store(&guest->park, TRUE);
	while (guest->n_parked < guest->config.n_threads && !atomic_load(&guest->quit)) {
		if (g_cond_wait_until(&guest->cond, &guest->lock, deadline))
			continue;
		guest->running = *ret_was_running;
		atomic_store(&guest->park, !guest->running);
		g_cond_broadcast(&guest->cond);
		return FALSE;
	}
	return !atomic_load(&guest->quit);
}

static void run_locked(TestGuest *guest)
{
	guest->running = TRUE;
	atomic_store(&guest->park, FALSE);
	g_cond_broadcast(&guest->cond);
}

gboolean testguest_pause(TestGuest *guest, guint timeout_ms)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&guest->lock);
	gboolean was_running;

	return stop_locked(guest, timeout_ms, &was_running);
}

void testguest_resume(TestGuest *guest)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&guest->lock);

	run_locked(guest);
}

/* The callbacks of the agent */

static int on_stop(void *opaque, bool *ret_was_running)
{
	TestGuest *guest = opaque;
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&guest->lock);
	gboolean was_running;

	if (!stop_locked(guest, STOP_TIMEOUT, &was_running))
		return -ETIMEDOUT;
	*ret_was_running = was_running;
	return 0;
}

/* As a QEMU whose disk image is locked. */
static int on_run(void *opaque)
{
	TestGuest *guest = opaque;

	if (atomic_load(&guest->refused_runs) < guest->config.refused_runs) {
		atomic_fetch_add(&guest->refused_runs, 1);
		return -EAGAIN;
	}
	testguest_resume(guest);
	return 0;
}

guint testguest_refused_runs(TestGuest *guest)
{
	return atomic_load(&guest->refused_runs);
}

static gboolean all_parked(TestGuest *guest)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&guest->lock);

	return !guest->running && guest->n_parked == guest->config.n_threads;
}

static int write_all(int fd, const void *data, gsize len)
{
	for (const char *at = data; len > 0;) {
		ssize_t n = write(fd, at, len);

		if (n < 0)
			return -errno;
		at += n;
		len -= n;
	}
	return 0;
}

static int read_all(int fd, void *data, gsize len)
{
	for (char *at = data; len > 0;) {
		ssize_t n = read(fd, at, len);

		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		at += n;
		len -= n;
	}
	return 0;
}

static int on_save(void *opaque, int fd)
{
	TestGuest *guest = opaque;
	StateHeader header = {.magic = STATE_MAGIC,
			      .n_blocks = guest->config.n_blocks,
			      .n_pages = guest->n_pages,
			      .seed = guest->seed};
	int err;

	if (!all_parked(guest))
		return -EBUSY;
	err = write_all(fd, &header, sizeof(header));
	for (guint i = 0; !err && i < guest->config.n_blocks; i++)
		err = write_all(fd, guest->blocks[i].versions, guest->n_pages * sizeof(uint32_t));
	return err;
}

static int load_versions(TestGuest *guest, int fd)
{
	StateHeader header;
	int err = read_all(fd, &header, sizeof(header));

	if (err)
		return err;
	if (header.magic != STATE_MAGIC || header.n_blocks != guest->config.n_blocks ||
	    header.n_pages != guest->n_pages)
		return -EINVAL;
	guest->seed = header.seed;
	for (guint i = 0; !err && i < guest->config.n_blocks; i++)
		err = read_all(fd, guest->blocks[i].versions, guest->n_pages * sizeof(uint32_t));
	return err;
}

static int on_load(void *opaque, int fd)
{
	TestGuest *guest = opaque;
	int err;

	/* The threads read these fields only after they have taken the lock. */
	if (!testguest_pause(guest, STOP_TIMEOUT))
		return -EBUSY;
	err = load_versions(guest, fd);
	if (err)
		return err;
	g_mutex_lock(&guest->lock);
	guest->loaded = TRUE;
	g_mutex_unlock(&guest->lock);
	/* A load that was aborted may have read pages that were not there yet. */
	atomic_store(&guest->corrupt, 0);
	for (guint i = 0; i < guest->config.load_touches; i++)
		check_page(guest, i % guest->config.n_blocks,
			   mix(guest->seed + i) % guest->n_pages);
	return 0;
}

static const PrAgentOps agent_ops = {
	.stop = on_stop,
	.run = on_run,
	.save = on_save,
	.load = on_load,
};

/* Life */

static gboolean fail(GError **error, const char *what, int err)
{
	g_set_error(error, G_IO_ERROR, g_io_error_from_errno(err), "testguest: %s: %s", what,
		    g_strerror(err));
	return FALSE;
}

static gboolean make_block(TestGuest *guest, guint i, GError **error)
{
	Block *block = &guest->blocks[i];
	g_autofree char *name = g_strdup_printf("ram%u", i);
	int err;

	block->versions = g_new0(uint32_t, guest->n_pages);
	block->memfd = memfd_create(
		name, MFD_CLOEXEC | (guest->config.huge_pages ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
	if (block->memfd < 0 || ftruncate(block->memfd, guest->block_size) < 0)
		return fail(error, "memfd", errno);
	block->map =
		mmap(NULL, guest->block_size, PROT_READ | PROT_WRITE, MAP_SHARED, block->memfd, 0);
	if (block->map == MAP_FAILED) {
		block->map = NULL;
		return fail(error, "mmap", errno);
	}
	err = pr_agent_add_region(guest->agent, &(PrAgentRegion){.idstr = name,
								 .base = block->map,
								 .size = guest->block_size,
								 .memfd = block->memfd});
	return err ? fail(error, "pr_agent_add_region", -err) : TRUE;
}

static gboolean choose_socket(TestGuest *guest, GError **error)
{
	if (guest->config.socket) {
		guest->socket = g_strdup(guest->config.socket);
	} else {
		guest->dir = g_dir_make_tmp("testguest-XXXXXX", error);
		if (!guest->dir)
			return FALSE;
		guest->socket = g_build_filename(guest->dir, "agent.sock", NULL);
	}
	guest->spec = g_strconcat("agent:", guest->socket, NULL);
	return TRUE;
}

static void start_workers(TestGuest *guest)
{
	guest->workers = g_new0(Worker, guest->config.n_threads);
	for (guint i = 0; i < guest->config.n_threads; i++) {
		Worker *worker = &guest->workers[i];

		worker->guest = guest;
		worker->index = i;
		worker->random = mix(guest->config.seed + i) | 1;
		worker->thread = g_thread_new("testguest", worker_thread, worker);
	}
}

TestGuest *testguest_new(const TestGuestConfig *config, GError **error)
{
	g_autoptr(TestGuest) guest = g_new0(TestGuest, 1);
	uint64_t host_page;
	int err;

	guest->config = *config;
	guest->config.seed = config->seed ? config->seed : 1;
	guest->config.n_blocks = MAX(config->n_blocks, 1);
	guest->config.n_threads = MAX(config->n_threads, 1);
	guest->seed = guest->config.seed;
	host_page = config->huge_pages ? HUGE_PAGE : PAGE;
	guest->block_size = MAX(config->size / guest->config.n_blocks, 1) + host_page - 1;
	guest->block_size -= guest->block_size % host_page;
	guest->n_pages = guest->block_size / PAGE;
	g_mutex_init(&guest->lock);
	g_cond_init(&guest->cond);
	atomic_init(&guest->park, TRUE);
	guest->blocks = g_new0(Block, guest->config.n_blocks);
	for (guint i = 0; i < guest->config.n_blocks; i++)
		guest->blocks[i].memfd = -1;
	guest->agent = pr_agent_new(&agent_ops, guest);
	for (guint i = 0; i < guest->config.n_blocks; i++) {
		if (!make_block(guest, i, error))
			return NULL;
	}
	if (!choose_socket(guest, error))
		return NULL;
	start_workers(guest);
	err = pr_agent_serve(guest->agent, guest->socket);
	if (err) {
		fail(error, guest->socket, -err);
		return NULL;
	}
	return g_steal_pointer(&guest);
}

static void free_block(TestGuest *guest, Block *block)
{
	if (block->map)
		munmap(block->map, guest->block_size);
	if (block->memfd >= 0)
		close(block->memfd);
	g_free(block->versions);
}

void testguest_free(TestGuest *guest)
{
	if (!guest)
		return;
	g_mutex_lock(&guest->lock);
	atomic_store(&guest->quit, TRUE);
	g_cond_broadcast(&guest->cond);
	g_mutex_unlock(&guest->lock);
	/* Turns the fault mode off: threads that wait for pages go on, and see quit. */
	pr_agent_free(guest->agent);
	for (guint i = 0; guest->workers && i < guest->config.n_threads; i++)
		g_thread_join(guest->workers[i].thread);
	for (guint i = 0; i < guest->config.n_blocks; i++)
		free_block(guest, &guest->blocks[i]);
	if (guest->dir)
		g_rmdir(guest->dir);
	g_mutex_clear(&guest->lock);
	g_cond_clear(&guest->cond);
	g_free(guest->workers);
	g_free(guest->blocks);
	g_free(guest->dir);
	g_free(guest->socket);
	g_free(guest->spec);
	g_free(guest);
}

void testguest_start(TestGuest *guest)
{
	for (guint block = 0; block < guest->config.n_blocks; block++) {
		for (uint32_t page = 0; page < guest->n_pages; page++) {
			if (never_touched(page))
				continue;
			guest->blocks[block].versions[page] = page % 16 == 1 ? 0 : 1;
			fill_page(guest, block, page);
		}
	}
	if (!guest->config.paused) {
		testguest_resume(guest);
		return;
	}
	/* Its threads have just started. The guest can be saved when they are parked. */
	gboolean was_running;
	g_mutex_lock(&guest->lock);
	stop_locked(guest, STOP_TIMEOUT, &was_running);
	g_mutex_unlock(&guest->lock);
}

/* Questions */

gboolean testguest_verify(TestGuest *guest, guint64 *ret_corrupt)
{
	gboolean was_running, stopped;
	guint64 corrupt = 0;

	g_mutex_lock(&guest->lock);
	stopped = stop_locked(guest, STOP_TIMEOUT, &was_running);
	g_mutex_unlock(&guest->lock);
	if (!stopped)
		return FALSE;
	for (guint block = 0; block < guest->config.n_blocks; block++) {
		for (uint32_t page = 0; page < guest->n_pages; page++)
			corrupt += !check_page(guest, block, page);
	}
	if (was_running)
		testguest_resume(guest);
	*ret_corrupt = corrupt;
	return TRUE;
}

static gboolean page_equal(TestGuest *a, TestGuest *b, guint block, uint32_t page)
{
	uint8_t bytes_a[PAGE], bytes_b[PAGE];
	off_t offset = (off_t)page * PAGE;

	return pread(a->blocks[block].memfd, bytes_a, PAGE, offset) == PAGE &&
	       pread(b->blocks[block].memfd, bytes_b, PAGE, offset) == PAGE &&
	       memcmp(bytes_a, bytes_b, PAGE) == 0;
}

gboolean testguest_equal(TestGuest *a, TestGuest *b, char **ret_difference)
{
	if (a->config.n_blocks != b->config.n_blocks || a->n_pages != b->n_pages) {
		*ret_difference = g_strdup("the guests differ in shape");
		return FALSE;
	}
	for (guint block = 0; block < a->config.n_blocks; block++) {
		for (uint32_t page = 0; page < a->n_pages; page++) {
			if (page_equal(a, b, block, page))
				continue;
			*ret_difference = g_strdup_printf("ram%u: page %u of %u differs", block,
							  page, a->n_pages);
			return FALSE;
		}
	}
	return TRUE;
}

gboolean testguest_running(TestGuest *guest)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&guest->lock);

	return guest->running;
}

gboolean testguest_loaded(TestGuest *guest)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&guest->lock);

	return guest->loaded;
}

const char *testguest_socket(TestGuest *guest)
{
	return guest->socket;
}

const char *testguest_spec(TestGuest *guest)
{
	return guest->spec;
}

guint64 testguest_verified(TestGuest *guest)
{
	return atomic_load(&guest->verified);
}

guint64 testguest_corrupt(TestGuest *guest)
{
	return atomic_load(&guest->corrupt);
}

guint64 testguest_written(TestGuest *guest)
{
	return atomic_load(&guest->written);
}

guint testguest_n_blocks(TestGuest *guest)
{
	return guest->config.n_blocks;
}

uint64_t testguest_block_size(TestGuest *guest)
{
	return guest->block_size;
}

void *testguest_block_map(TestGuest *guest, guint block)
{
	return guest->blocks[block].map;
}

int testguest_block_memfd(TestGuest *guest, guint block)
{
	return guest->blocks[block].memfd;
}
