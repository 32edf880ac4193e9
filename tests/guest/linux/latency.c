/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The workload of the benchmark's guest. One worker on each vCPU accesses pages of a large buffer
 * and times every access.
 *
 * There is no time between two accesses: one lasts from the end of the last to its own end. So a
 * missing page of the kernel or of the program counts as well, and so does time in which the vCPU
 * is not run. The guest's clock stands still while it is stopped: downtime is not in these
 * figures.
 *
 * The figures do not go over the console. They are in a region of the guest's RAM, as a histogram
 * for each SLOT_NS of the guest's clock, and the benchmark reads them there. The console says in
 * which pages they are. tests/bench/compare/guest.py knows this layout, too.
 *
 * Environment: lat_mb (size of the buffer, MiB), lat_kind (random-write, sequential, read-mostly,
 * idle), lat_threads, lat_stall_ns (accesses that take as long count as stalls). Prints
 *
 *	latency: pages=N clock=tsc clock_ns=90	(cost of reading the clock)
 *	latency: at FIRST+COUNT …		(page frames of the region, in order; several lines)
 *	latency: ready				(the buffer is filled, the workers run)
 */
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
#include <time.h>
#include <unistd.h>

#define PAGE	      4096u
#define WORDS	      (PAGE / sizeof(uint64_t))
#define MAX_WORKERS   8
#define STAMP	      0x706f7374726f6164ull /* first word of each page, xor its number */
#define SECOND	      1000000000ull

#define MAGIC	      0x3179636e6574616cull /* "latency1" */
#define SLOT_NS	      10000000ull
#define N_SLOTS	      4096u	 /* 41 s, then the slots are used again */
#define N_BUCKETS     120u	 /* four for each doubling, from 64 ns */
#define IDLE_NS	      1000000ull /* an idle worker touches a page this often */
#define HOT_PART      10u	 /* read-mostly: a tenth of the pages … */
#define HOT_PERCENT   90u	 /* … has nine tenths of the accesses */
#define WRITE_PERCENT 5u

/* The accesses that ended within one slot of the guest's clock. */
struct slot {
	uint64_t number; /* the slot's start / SLOT_NS */
	uint64_t sum_ns, max_ns;
	uint64_t stall_ns; /* total of those that lasted lat_stall_ns or longer */
	uint32_t buckets[N_BUCKETS];
};

/* Written by one worker only, read by the host. */
struct head {
	uint64_t magic, worker;
	uint64_t now; /* end of the last access, guest's clock, ns */
	uint64_t accesses, corrupt;
	uint64_t clock_ns; /* the time to read the clock */
	uint64_t rest[WORDS - 6];
};

struct region {
	struct head head;
	struct slot slot[N_SLOTS];
};

_Static_assert(sizeof(struct slot) == 512 && sizeof(struct head) == PAGE, "read from outside");
_Static_assert(sizeof(struct region) % PAGE == 0, "regions begin at pages");

struct worker;

struct kind {
	const char *name;
	void (*access)(struct worker *worker);
	bool paced;
};

struct worker {
	const struct kind *kind;
	struct region *region;
	uint64_t *buffer;
	uint64_t n_pages;
	uint64_t first, n_own; /* this worker's part, for sequential */
	uint64_t stall_ns;
	uint64_t random, next;
	unsigned int id;
};

static atomic_uint n_ready;

static uint64_t env_number(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);

	return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

static void die(const char *what)
{
	printf("latency: fatal: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * SECOND + (uint64_t)ts.tv_nsec;
}

/* The accesses */

static uint64_t next_random(struct worker *w)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random >> 11;
}

/* Checks that a page is the right one. */
static volatile uint64_t *open_page(struct worker *w, uint64_t number)
{
	volatile uint64_t *page = w->buffer + number * WORDS;

	if (page[0] != (STAMP ^ number))
		w->region->head.corrupt++;
	return page;
}

/* Workers share the pages, but each writes its own words of them. */
static void write_word(struct worker *w, uint64_t number)
{
	open_page(w, number)[1 + w->id]++;
}

static void access_random(struct worker *w)
{
	write_word(w, next_random(w) % w->n_pages);
}

static void access_sequential(struct worker *w)
{
	volatile uint64_t *page = open_page(w, w->first + w->next);

	for (unsigned int i = 1; i < WORDS; i++)
		page[i] = w->random + i;
	w->random++;
	w->next = (w->next + 1) % w->n_own;
}

static void access_read_mostly(struct worker *w)
{
	uint64_t dice = next_random(w), number = next_random(w) % w->n_pages;

	if (dice % 100 < HOT_PERCENT)
		number -= number % HOT_PART;
	if (dice / 100 % 100 < WRITE_PERCENT)
		write_word(w, number);
	else
		(void)open_page(w, number)[WORDS / 2];
}

static const struct kind kinds[] = {
	{"random-write", access_random, false},
	{"sequential", access_sequential, false},
	{"read-mostly", access_read_mostly, false},
	{"idle", access_random, true},
};

/* The figures */

/* 0: below 64 ns; then four for each doubling. */
static unsigned int bucket_of(uint64_t ns)
{
	if (ns < 64)
		return 0;
	unsigned int log2 = 63 - (unsigned int)__builtin_clzll(ns);
	unsigned int bucket = 1 + (log2 - 6) * 4 + (unsigned int)(ns >> (log2 - 2) & 3);

	return bucket < N_BUCKETS ? bucket : N_BUCKETS - 1;
}

static void record(struct worker *w, uint64_t now, uint64_t took)
{
	struct head *head = &w->region->head;
	uint64_t number = now / SLOT_NS;
	struct slot *slot = &w->region->slot[number % N_SLOTS];

	if (slot->number != number) {
		memset(slot, 0, sizeof(*slot));
		slot->number = number;
	}
	slot->buckets[bucket_of(took)]++;
	slot->sum_ns += took;
	if (took > slot->max_ns)
		slot->max_ns = took;
	if (took >= w->stall_ns)
		slot->stall_ns += took;
	head->accesses++;
	head->now = now;
}

static void sleep_until(uint64_t due)
{
	struct timespec ts = {(time_t)(due / SECOND), (long)(due % SECOND)};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

/* Accesses without rest. */
static void run_busy(struct worker *w)
{
	for (uint64_t last = now_ns();;) {
		w->kind->access(w);
		uint64_t now = now_ns();
		record(w, now, now - last);
		last = now;
	}
}

/* An access every IDLE_NS. It lasts from the time when it was due, so a late wake-up counts. */
static void run_paced(struct worker *w)
{
	for (uint64_t due = now_ns();;) {
		due += IDLE_NS;
		sleep_until(due);
		w->kind->access(w);
		uint64_t now = now_ns();
		record(w, now, now - due);
		if (now > due + IDLE_NS) /* accesses that were missed are not made up for */
			due = now;
	}
}

static void *work(void *opaque)
{
	struct worker *w = opaque;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(w->id, &set);
	if (sched_setaffinity(0, sizeof(set), &set) < 0)
		die("sched_setaffinity");
	for (uint64_t i = w->first; i < w->first + w->n_own; i++) {
		uint64_t *page = w->buffer + i * WORDS;

		for (unsigned int word = 0; word < WORDS; word++)
			page[word] = (i + word) * 0x9e3779b97f4a7c15ull;
		page[0] = STAMP ^ i;
	}
	atomic_fetch_add(&n_ready, 1);
	/* Busy waiting: emulated vCPUs have been seen to sleep far too long here. */
	while (atomic_load(&n_ready) <= w->n_pages / w->n_own)
		sched_yield();
	if (w->kind->paced)
		run_paced(w);
	run_busy(w);
	return NULL;
}

/* Set-up */

static void *map_pages(uint64_t size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

/* Returns the shortest of many readings: the others were interrupted. */
static uint64_t clock_cost(void)
{
	uint64_t best = UINT64_MAX;

	for (int round = 0; round < 100; round++) {
		uint64_t start = now_ns();

		for (int i = 0; i < 9; i++)
			(void)now_ns();
		uint64_t each = (now_ns() - start) / 10;
		best = each < best ? each : best;
	}
	return best;
}

static uint64_t frame_of(int pagemap, const void *at)
{
	uint64_t entry;

	if (pread(pagemap, &entry, sizeof(entry), (off_t)((uintptr_t)at / PAGE * sizeof(entry))) !=
	    sizeof(entry))
		die("/proc/self/pagemap");
	return entry & ((1ull << 55) - 1);
}

static void print_frames(const uint8_t *at, uint64_t n_pages)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	uint64_t run = 0;

	if (pagemap < 0)
		die("/proc/self/pagemap");
	for (uint64_t i = 0; i < n_pages; i += run) {
		uint64_t first = frame_of(pagemap, at + i * PAGE);

		for (run = 1; i + run < n_pages; run++)
			if (frame_of(pagemap, at + (i + run) * PAGE) != first + run)
				break;
		printf("latency: at %" PRIu64 "+%" PRIu64 "\n", first, run);
	}
	close(pagemap);
}

static void print_clock(uint64_t n_pages, uint64_t cost)
{
	char name[32] = "unknown";
	int fd = open("/sys/devices/system/clocksource/clocksource0/current_clocksource", O_RDONLY);

	if (fd >= 0 && read(fd, name, sizeof(name) - 1) > 0)
		name[strcspn(name, "\n")] = '\0';
	printf("latency: pages=%" PRIu64 " clock=%s clock_ns=%" PRIu64 "\n", n_pages, name, cost);
}

static const struct kind *find_kind(const char *name)
{
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
		if (name && strcmp(kinds[i].name, name) == 0)
			return &kinds[i];
	errno = EINVAL;
	die("lat_kind");
	return NULL;
}

static void start(struct region *regions, unsigned int n, uint64_t n_pages, uint64_t cost)
{
	static struct worker workers[MAX_WORKERS];
	uint64_t *buffer = map_pages(n_pages * PAGE);
	pthread_t thread;

	for (unsigned int i = 0; i < n; i++) {
		regions[i].head = (struct head){.magic = MAGIC, .worker = i, .clock_ns = cost};
		workers[i] = (struct worker){
			.kind = find_kind(getenv("lat_kind")),
			.region = &regions[i],
			.buffer = buffer,
			.n_pages = n_pages,
			.first = n_pages / n * i,
			.n_own = n_pages / n,
			.stall_ns = env_number("lat_stall_ns", 1000000),
			.random = 0x2545f4914f6cdd1dull * (i + 1),
			.id = i,
		};
		if (pthread_create(&thread, NULL, work, &workers[i]))
			die("pthread_create");
	}
	while (atomic_load(&n_ready) < n)
		sleep_until(now_ns() + IDLE_NS);
}

int main(void)
{
	unsigned int n = (unsigned int)env_number("lat_threads", 1);
	uint64_t n_pages = env_number("lat_mb", 64) * (1024 * 1024 / PAGE);
	uint64_t size = n * sizeof(struct region);

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (n < 1 || n > MAX_WORKERS || n_pages < n * WORDS) {
		errno = EINVAL;
		die("lat_threads, lat_mb");
	}
	struct region *regions = map_pages(size);
	memset(regions, 0, size);
	uint64_t cost = clock_cost();
	print_clock(size / PAGE, cost);
	print_frames((const uint8_t *)regions, size / PAGE);
	start(regions, n, n_pages / n * n, cost);
	printf("latency: ready\n");
	atomic_fetch_add(&n_ready, 1);
	for (;;)
		pause();
}
