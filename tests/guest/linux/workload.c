/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The workload of the Linux test guest. Workers rewrite and verify every page of a large buffer,
 * and a reporter prints progress lines on the console.
 *
 * Each page holds a stamp (buffer position and generation) and a pattern made from the stamp. A
 * worker visits its pages in a scattered but known order, so that it knows which generation each of
 * them must have. It counts and reports pages that are torn, swapped with another, zeroed or stale.
 *
 * The reporter is a process of its own on CPU 0, and the workers are on CPU 1. So the reporter
 * prints on while workers wait for a page that can't be fetched. They share one page, `stats`: the
 * reporter only reads it, each worker writes its own part, and all accesses are atomic.
 *
 * The kernel has pages as well, and CPU 0 may need any of them. With work_survey=1 a surveyor on
 * CPU 1 reads a word of every page of RAM that is not in the buffer, over and over. When it has
 * finished a round after a switch-over, only pages of the buffer can be missing. With
 * work_per_survey=N the workers visit at most N pages during a round of the surveyor, so that it
 * finishes before they do.
 *
 * Environment: work_mb (size of the buffer, MiB), work_threads, work_rate (pages a second, 0: no
 * limit), work_survey, work_per_survey (pages, 0: no limit). When all pages have their first
 * generation, and then every work_tick ms, it prints:
 *
 *	guest: t=12.345 rounds=3 pages=123456 corrupt=0 surveys=0
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE	    4096u
#define WORDS	    (PAGE / sizeof(uint64_t))
#define MAX_WORKERS 8
#define MAX_REPORTS 16
#define STAMP	    0x706f7374726f6164ull /* first word of each page, xor position and generation */
#define BATCH	    64			  /* pages between two readings of the clock */

struct report {
	atomic_bool ready;
	uint64_t page, word, expected, found;
};

struct worker_stats {
	_Atomic uint64_t rounds, pages, corrupt;
};

/* Shared between the reporter and the workers. */
struct stats {
	atomic_uint ready; /* workers that have filled their part */
	atomic_uint n_reports;
	atomic_uint surveys; /* rounds of the surveyor, over all of RAM but the buffer */
	struct worker_stats worker[MAX_WORKERS];
	struct report report[MAX_REPORTS];
};

struct worker {
	struct stats *stats;
	unsigned int id;
	uint64_t *buffer; /* this worker's part of the buffer */
	uint64_t first;	  /* the first page number of that part in the whole buffer */
	uint64_t n_pages;
	uint64_t rate;	     /* pages a second, 0: no limit */
	uint64_t per_survey; /* pages during a round of the surveyor, 0: no limit */
};

static uint64_t env_number(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);

	return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

static void die(const char *what)
{
	printf("guest: fatal: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void pin_to(unsigned int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set) < 0)
		die("sched_setaffinity");
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint64_t page_word(uint64_t page, uint64_t generation, unsigned int word)
{
	uint64_t stamp = STAMP ^ (page << 32) ^ generation;

	return word == 0 ? stamp : (stamp + word) * 0x9e3779b97f4a7c15ull;
}

static void fill(uint64_t *at, uint64_t page, uint64_t generation)
{
	for (unsigned int i = 0; i < WORDS; i++)
		at[i] = page_word(page, generation, i);
}

static void report(struct worker *w, uint64_t page, uint64_t generation, const uint64_t *at,
		   unsigned int word)
{
	unsigned int slot = atomic_fetch_add(&w->stats->n_reports, 1);

	if (slot >= MAX_REPORTS)
		return;
	struct report *r = &w->stats->report[slot];
	r->page = page;
	r->word = word;
	r->expected = page_word(page, generation, word);
	r->found = at[word];
	atomic_store(&r->ready, 1);
}

static void verify(struct worker *w, const uint64_t *at, uint64_t page, uint64_t generation)
{
	for (unsigned int i = 0; i < WORDS; i++) {
		if (at[i] == page_word(page, generation, i))
			continue;
		atomic_fetch_add(&w->stats->worker[w->id].corrupt, 1);
		report(w, page, generation, at, i);
		return;
	}
}

/* Sleeps until the worker may visit `pages` at its rate. */
static void pace(const struct worker *w, uint64_t start, uint64_t pages)
{
	uint64_t due = start + pages * 1000000000u / w->rate;
	struct timespec ts = {(time_t)(due / 1000000000u), (long)(due % 1000000000u)};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

/* Returns a step that scatters the visits. It is coprime to n, so that it reaches every page. */
static uint64_t scatter(uint64_t n)
{
	for (uint64_t step = n * 5 / 8 | 1;; step += 2) {
		uint64_t a = n, b = step % n;

		while (b) {
			uint64_t rest = a % b;

			a = b;
			b = rest;
		}
		if (a == 1)
			return step % n;
	}
}

/* Waits until the surveyor has finished enough rounds for n pages in all. */
static void await_survey(const struct worker *w, uint64_t n)
{
	struct timespec rest = {.tv_nsec = 1000000};

	while (n > w->per_survey * (atomic_load(&w->stats->surveys) + 1))
		nanosleep(&rest, NULL);
}

static void work_round(struct worker *w, uint64_t step, uint64_t generation)
{
	struct worker_stats *stats = &w->stats->worker[w->id];
	uint64_t start = now_ns(), at = 0;

	for (uint64_t i = 0; i < w->n_pages; i++) {
		uint64_t *page = w->buffer + at * WORDS;

		verify(w, page, w->first + at, generation);
		fill(page, w->first + at, generation + 1);
		atomic_fetch_add(&stats->pages, 1);
		at = (at + step) % w->n_pages;
		if (w->rate && i % BATCH == BATCH - 1)
			pace(w, start, i + 1);
		if (w->per_survey && i % BATCH == BATCH - 1)
			await_survey(w, atomic_load(&stats->pages));
	}
	atomic_fetch_add(&stats->rounds, 1);
}

static void *work(void *opaque)
{
	struct worker *w = opaque;
	uint64_t step = scatter(w->n_pages);

	for (uint64_t i = 0; i < w->n_pages; i++)
		fill(w->buffer + i * WORDS, w->first + i, 0);
	atomic_fetch_add(&w->stats->ready, 1);
	for (uint64_t generation = 0;; generation++)
		work_round(w, step, generation);
	return NULL;
}

/* Sets the bits of the buffer's physical pages in a bitmap of n_bits. */
static void mark_buffer(uint8_t *map, uint64_t n_bits, const uint64_t *buffer, uint64_t n_pages)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry;

	if (fd < 0)
		die("/proc/self/pagemap");
	memset(map, 0, n_bits / 8 + 1);
	for (uint64_t i = 0; i < n_pages; i++) {
		off_t at = (off_t)(((uintptr_t)buffer / PAGE + i) * sizeof(entry));

		if (pread(fd, &entry, sizeof(entry), at) != sizeof(entry))
			die("/proc/self/pagemap");
		uint64_t frame = entry & ((1ull << 55) - 1);
		if (frame < n_bits)
			map[frame / 8] |= (uint8_t)(1u << frame % 8);
	}
	close(fd);
}

/* Reads a word of each page in one segment of /proc/kcore, but not of pages of the buffer. */
static void survey_stretch(int kcore, const Elf64_Phdr *stretch, const uint8_t *map,
			   uint64_t n_bits)
{
	uint64_t word;

	for (uint64_t at = 0; at < stretch->p_filesz; at += PAGE) {
		uint64_t frame = (stretch->p_paddr + at) / PAGE;

		if (frame < n_bits && !(map[frame / 8] >> frame % 8 & 1) &&
		    pread(kcore, &word, sizeof(word), (off_t)(stretch->p_offset + at)) < 0 &&
		    errno != EFAULT)
			die("/proc/kcore");
	}
}

static void survey_ram(int kcore, const uint8_t *map, uint64_t n_bits)
{
	Elf64_Ehdr head;
	Elf64_Phdr stretch;

	if (pread(kcore, &head, sizeof(head), 0) != sizeof(head))
		die("/proc/kcore");
	for (unsigned int i = 0; i < head.e_phnum; i++) {
		off_t at = (off_t)(head.e_phoff + i * sizeof(stretch));

		if (pread(kcore, &stretch, sizeof(stretch), at) != sizeof(stretch))
			die("/proc/kcore");
		/* The direct map of RAM; the other segments have no physical address. */
		if (stretch.p_type == PT_LOAD && stretch.p_paddr / PAGE < n_bits)
			survey_stretch(kcore, &stretch, map, n_bits);
	}
}

struct surveyor {
	struct stats *stats;
	const uint64_t *buffer;
	uint64_t n_pages;
	unsigned int n_workers;
};

static void *survey(void *opaque)
{
	struct surveyor *s = opaque;
	struct timespec rest = {.tv_nsec = 100 * 1000000};
	uint64_t n_bits = 4ull << 30 >> 12; /* the guest is smaller than 4 GiB */
	uint8_t *map = malloc(n_bits / 8 + 1);
	int kcore = open("/proc/kcore", O_RDONLY);

	if (!map || kcore < 0)
		die("/proc/kcore");
	for (;; nanosleep(&rest, NULL)) {
		if (atomic_load(&s->stats->ready) < s->n_workers)
			continue;
		mark_buffer(map, n_bits, s->buffer, s->n_pages);
		survey_ram(kcore, map, n_bits);
		atomic_fetch_add(&s->stats->surveys, 1);
	}
	return NULL;
}

static void run_workers(struct stats *stats, uint64_t n_pages, unsigned int n, uint64_t rate)
{
	static struct worker workers[MAX_WORKERS];
	static struct surveyor surveyor;
	pthread_t threads[MAX_WORKERS], extra;
	uint64_t each = n_pages / n;
	uint64_t *buffer = mmap(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (buffer == MAP_FAILED)
		die("buffer");
	if (sysconf(_SC_NPROCESSORS_ONLN) > 1)
		pin_to(1);
	for (unsigned int i = 0; i < n; i++) {
		workers[i] = (struct worker){
			.stats = stats,
			.id = i,
			.buffer = buffer + i * each * WORDS,
			.first = i * each,
			.n_pages = each,
			.rate = rate ? rate / n + 1 : 0,
			.per_survey = env_number("work_per_survey", 0) / n,
		};
		if (pthread_create(&threads[i], NULL, work, &workers[i]))
			die("pthread_create");
	}
	surveyor = (struct surveyor){stats, buffer, each * n, n};
	if (env_number("work_survey", 0) && pthread_create(&extra, NULL, survey, &surveyor))
		die("pthread_create");
	for (unsigned int i = 0; i < n; i++)
		pthread_join(threads[i], NULL);
}

static void print_reports(struct stats *stats)
{
	static bool printed[MAX_REPORTS];

	for (unsigned int i = 0; i < MAX_REPORTS; i++) {
		struct report *r = &stats->report[i];

		if (printed[i] || !atomic_load(&r->ready))
			continue;
		printf("guest: page %" PRIu64 " word %" PRIu64 ": expected %016" PRIx64
		       " found %016" PRIx64 "\n",
		       r->page, r->word, r->expected, r->found);
		printed[i] = true;
	}
}

static void print_progress(struct stats *stats, unsigned int n, uint64_t t)
{
	uint64_t rounds = UINT64_MAX, pages = 0, corrupt = 0;

	for (unsigned int i = 0; i < n; i++) {
		uint64_t r = atomic_load(&stats->worker[i].rounds);

		rounds = r < rounds ? r : rounds;
		pages += atomic_load(&stats->worker[i].pages);
		corrupt += atomic_load(&stats->worker[i].corrupt);
	}
	printf("guest: t=%" PRIu64 ".%03" PRIu64 " rounds=%" PRIu64 " pages=%" PRIu64
	       " corrupt=%" PRIu64 " surveys=%u\n",
	       t / 1000000000u, t / 1000000u % 1000u, rounds, pages, corrupt,
	       atomic_load(&stats->surveys));
}

static void run_reporter(struct stats *stats, unsigned int n, uint64_t tick_ms)
{
	struct timespec tick = {(time_t)(tick_ms / 1000), (long)(tick_ms % 1000) * 1000000};

	pin_to(0);
	mlockall(MCL_CURRENT | MCL_FUTURE);
	while (atomic_load(&stats->ready) < n)
		nanosleep(&tick, NULL);
	for (uint64_t start = now_ns();;) {
		print_progress(stats, n, now_ns() - start);
		print_reports(stats);
		nanosleep(&tick, NULL);
		if (waitpid(-1, NULL, WNOHANG) > 0)
			die("the workers are gone");
	}
}

int main(void)
{
	uint64_t n_pages = env_number("work_mb", 64) * (1024 * 1024 / PAGE);
	unsigned int n = (unsigned int)env_number("work_threads", 1);
	struct stats *stats = mmap(NULL, sizeof(*stats), PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (stats == MAP_FAILED)
		die("stats");
	if (n < 1 || n > MAX_WORKERS || n_pages < n) {
		errno = EINVAL;
		die("work_threads, work_mb");
	}
	if (fork() == 0)
		run_workers(stats, n_pages, n, env_number("work_rate", 0));
	else
		run_reporter(stats, n, env_number("work_tick", 1000));
	return 1;
}
