/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The fault threads by themselves. This process is also the guest, and the tests make the paths. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "migration/core/crash-point.h"
#include "migration/memory/bitmap.h"
#include "migration/postcopy/fault.h"

#define PAGE	    4096u
#define N_PAGES	    256u
#define PATIENCE_US (60 * G_USEC_PER_SEC)

typedef struct Bench {
	int memfd, uffd;
	uint8_t *guest; /* its mapping, whose accesses fault */
	PrRam *ram;
	PrParams params;
	PrBlocktime *times;
	PrWatchdog *watchdog;
	PrFaultService *faults;
} Bench;

static void on_complete(void *opaque)
{
}

static void on_request_grant(guint block, uint64_t page, void *opaque)
{
	g_error("the grant of page %" G_GUINT64_FORMAT " was requested", page);
}

static void on_no_huge_read(void *opaque)
{
}

static void on_broken(const GError *error, void *opaque)
{
	g_error("%s", error->message);
}

/*
 * A userfaultfd that also reports faults of kernel accesses. The system call without flags needs
 * root.
 */
static int new_uffd(void)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int fd;

	if (device < 0)
		return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	close(device);
	return fd;
}

static void register_guest(Bench *bench)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM |
					     UFFD_FEATURE_THREAD_ID};
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)bench->guest, .len = N_PAGES * PAGE},
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};

	assert_int_equal(ioctl(bench->uffd, UFFDIO_API, &api), 0);
	assert_int_equal(ioctl(bench->uffd, UFFDIO_REGISTER, &reg), 0);
}

static Bench *bench_new(void)
{
	Bench *bench = g_new0(Bench, 1);
	g_autoptr(GError) error = NULL;

	bench->uffd = -1;
	bench->watchdog = pr_watchdog_new();
	bench->memfd = memfd_create("guest", MFD_CLOEXEC);
	assert_int_equal(ftruncate(bench->memfd, N_PAGES * PAGE), 0);
	bench->guest =
		mmap(NULL, N_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, bench->memfd, 0);
	assert_ptr_not_equal(bench->guest, MAP_FAILED);
	const PrGuestBlock block = {.idstr = (char *)"ram",
				    .size = N_PAGES * PAGE,
				    .page_size = PAGE,
				    .memfd = bench->memfd,
				    .base = (uintptr_t)bench->guest};
	bench->ram = pr_ram_new(&block, 1, PR_GUEST_DESTINATION, &error);
	g_assert_no_error(error);
	pr_params_init(&bench->params);
	bench->times = pr_blocktime_new(NULL, 0);
	return bench;
}

/* uffd: any descriptor from which faults can be read. */
static void bench_serve(Bench *bench, int uffd, guint n_threads)
{
	const PrFaultHooks hooks = {on_complete, on_request_grant, on_no_huge_read, on_broken,
				    NULL,	 bench->watchdog};
	g_autoptr(GError) error = NULL;

	assert_true(pr_params_set(&bench->params, "fault-threads", n_threads, NULL));
	bench->faults =
		pr_fault_start(bench->ram, uffd, bench->times, &bench->params, &hooks, &error);
	g_assert_no_error(error);
}

/* Skips the test where no userfaultfd can be opened. */
static void bench_serve_uffd(Bench *bench, guint n_threads)
{
	bench->uffd = new_uffd();
	if (bench->uffd < 0) {
		print_message("skipped: userfaultfd: %s\n", strerror(errno));
		skip();
	}
	register_guest(bench);
	bench_serve(bench, bench->uffd, n_threads);
}

static void bench_stop(Bench *bench)
{
	g_clear_pointer(&bench->faults, pr_fault_stop);
}

static void bench_free(Bench *bench)
{
	bench_stop(bench);
	pr_watchdog_free(bench->watchdog);
	pr_blocktime_free(bench->times);
	pr_ram_free(bench->ram);
	munmap(bench->guest, N_PAGES * PAGE);
	if (bench->uffd >= 0)
		close(bench->uffd);
	close(bench->memfd);
	g_free(bench);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Bench, bench_free)

/* Places a page, as when a READ of another thread lands. */
static void land_page(Bench *bench, uint64_t page, uint8_t value)
{
	PrRamBlock *block = &bench->ram->blocks[0];

	assert_true(pr_ram_claim(block, page));
	memset(block->host + page * PAGE, value, PAGE);
	pr_ram_received(bench->ram, block, page, 1, /* travelled= */ TRUE);
	if (pr_bitmap_clear(block->waiting, page, 1) > 0)
		pr_fault_notify(bench->faults);
}

static PrFaultStats stats_of(Bench *bench)
{
	PrFaultStats stats;

	pr_fault_stats(bench->faults, &stats);
	return stats;
}

static guint n_waiting(Bench *bench)
{
	PrBlocktimeInfo info;
	guint n;

	pr_blocktime_read(bench->times, G_MAXINT64, &info);
	n = info.threads->len;
	g_array_unref(info.threads);
	return n;
}

/* A thread for which the kernel reads a missing page: its write(2) to a pipe. */
typedef struct Writer {
	const uint8_t *at;
	int pipe[2];
	pthread_t thread;
} Writer;

static void on_signal(int number)
{
}

static void *write_page(void *opaque)
{
	Writer *writer = opaque;

	/* The C library's write() is not used, as a sanitizer would read the page in it first. */
	while (syscall(SYS_write, writer->pipe[1], writer->at, 1) < 0 && errno == EINTR)
		;
	return NULL;
}

static void writer_start(Writer *writer, Bench *bench, uint64_t page)
{
	const struct sigaction action = {.sa_handler = on_signal};

	*writer = (Writer){.at = bench->guest + page * PAGE};
	sigaction(SIGUSR1, &action, NULL);
	assert_int_equal(pipe2(writer->pipe, O_CLOEXEC), 0);
	assert_int_equal(pthread_create(&writer->thread, NULL, write_page, writer), 0);
}

static uint8_t writer_end(Writer *writer)
{
	uint8_t value;

	pthread_join(writer->thread, NULL);
	assert_int_equal(read(writer->pipe[0], &value, 1), 1);
	close(writer->pipe[0]);
	close(writer->pipe[1]);
	return value;
}

/*
 * Interrupts the writer's call, after which the kernel repeats its fault until the page is there.
 */
static void make_fault_repeat(Writer *writer, Bench *bench)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (n_waiting(bench) == 0 && g_get_monotonic_time() < deadline)
		g_usleep(200); /* between two checks of the condition */
	assert_int_equal(n_waiting(bench), 1);
	pthread_kill(writer->thread, SIGUSR1);
}

static void wait_repeats(Bench *bench, uint64_t repeats)
{
	gint64 start = g_get_monotonic_time();

	while (stats_of(bench).repeats < repeats) {
		if (g_get_monotonic_time() - start > PATIENCE_US)
			fail_msg("%" G_GUINT64_FORMAT " repeats of %" G_GUINT64_FORMAT,
				 stats_of(bench).repeats, repeats);
		g_usleep(200); /* between two checks of the condition */
	}
}

/* A pipe instead of a userfaultfd, which repeats one fault as fast as it is read. */
typedef struct Flood {
	int pipe[2];
	struct uffd_msg msgs[64];
	gint stop; /* atomic */
	GThread *thread;
} Flood;

static gpointer report(gpointer opaque)
{
	Flood *flood = opaque;

	while (!g_atomic_int_get(&flood->stop))
		if (write(flood->pipe[1], flood->msgs, sizeof(flood->msgs)) < 0)
			sched_yield();
	return NULL;
}

static void flood_start(Flood *flood, uint64_t address)
{
	*flood = (Flood){0};
	for (guint i = 0; i < G_N_ELEMENTS(flood->msgs); i++) {
		flood->msgs[i].event = UFFD_EVENT_PAGEFAULT;
		flood->msgs[i].arg.pagefault.address = address;
		flood->msgs[i].arg.pagefault.feat.ptid = 4711;
	}
	assert_int_equal(pipe2(flood->pipe, O_CLOEXEC | O_NONBLOCK), 0);
	flood->thread = g_thread_new("flood", report, flood);
}

static void flood_end(Flood *flood)
{
	g_atomic_int_set(&flood->stop, TRUE);
	g_thread_join(flood->thread);
	close(flood->pipe[0]);
	close(flood->pipe[1]);
}

/* About one batch in a millisecond. */
static void repeats_of_a_pending_fault_are_read_seldom(void **state)
{
	g_autoptr(Bench) bench = bench_new();
	Flood flood;

	flood_start(&flood, (uintptr_t)bench->guest + 7 * PAGE);
	/* This thread may get no CPU between any two steps, so the time includes all batches. */
	gint64 start = g_get_monotonic_time();
	bench_serve(bench, flood.pipe[0], 1);
	wait_repeats(bench, 30000);
	uint64_t batches = stats_of(bench).repeats / G_N_ELEMENTS(flood.msgs);
	uint64_t took_ms = (uint64_t)(g_get_monotonic_time() - start) / 1000;
	bench_stop(bench);
	flood_end(&flood);
	/*
	 * The limit is twice the expected number, and allows for the first batches, whose rests are
	 * shorter.
	 */
	if (batches > 2 * took_ms + 20)
		fail_msg("%" G_GUINT64_FORMAT " batches were read in %" G_GUINT64_FORMAT " ms",
			 batches, took_ms);
}

/* A path whose READs never end. */
static guint path_max_reads(PrDataPath *path, PrLaneId lane)
{
	return 64;
}

static gboolean path_post_read(PrDataPath *path, PrLaneId lane, uint32_t block, uint64_t offset,
			       uint32_t length, uint64_t token)
{
	return TRUE;
}

static guint path_poll(PrDataPath *path, PrLaneId lane, PrCompletion *ret, guint max)
{
	return 0;
}

static int path_wait_fd(PrDataPath *path, PrLaneId lane)
{
	return -1;
}

static gboolean path_arm(PrDataPath *path, PrLaneId lane)
{
	return TRUE;
}

static const PrTransportOps endless_ops = {
	.max_reads = path_max_reads,
	.post_read = path_post_read,
	.poll = path_poll,
	.wait_fd = path_wait_fd,
	.arm = path_arm,
};

/* Waits until the fault was read, so that each fault is a batch. */
static void report_one(int pipe[2], uint64_t address, uint32_t tid)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;
	struct uffd_msg msg = {.event = UFFD_EVENT_PAGEFAULT};
	int unread = 1;

	msg.arg.pagefault.address = address;
	msg.arg.pagefault.feat.ptid = tid;
	assert_int_equal(write(pipe[1], &msg, sizeof(msg)), sizeof(msg));
	while (unread > 0 && g_get_monotonic_time() < deadline) {
		sched_yield();
		assert_int_equal(ioctl(pipe[0], FIONREAD, &unread), 0);
	}
	assert_int_equal(unread, 0);
}

/* KVM's asynchronous faults of one vCPU: each is another kworker's. Returns the pages that were
 * read ahead. */
static uint64_t walk_by_kworkers(Bench *bench)
{
	PrDataPath path = {.ops = &endless_ops, .n_lanes = PR_LANES_MIN};
	uint64_t random = 88172645463325252ull;
	int pipe[2];

	assert_int_equal(pipe2(pipe, O_CLOEXEC | O_NONBLOCK), 0);
	bench_serve(bench, pipe[0], 1);
	pr_fault_attach(bench->faults, &path);
	for (guint i = 0; i < 32; i++) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		report_one(pipe, (uintptr_t)bench->guest + i * PAGE, 9000 + random % 64);
	}
	pr_fault_detach(bench->faults);
	uint64_t ahead = stats_of(bench).ahead_pages;
	bench_stop(bench);
	close(pipe[0]);
	close(pipe[1]);
	return ahead;
}

static void faults_of_kworkers_are_read_ahead_by_address(void **state)
{
	static const uint32_t vcpus[] = {101, 102};
	g_autoptr(Bench) bench = bench_new();

	pr_blocktime_free(bench->times);
	bench->times = pr_blocktime_new(vcpus, G_N_ELEMENTS(vcpus));
	assert_true(pr_params_set(&bench->params, "fault-readahead", 16, NULL));
	/* All that may be in flight, because no READ ends. */
	assert_int_equal(walk_by_kworkers(bench), 16);
}

static guint refused; /* READs; the fault thread writes it, and is joined before it is read */

static gboolean path_refuse_read(PrDataPath *path, PrLaneId lane, uint32_t block, uint64_t offset,
				 uint32_t length, uint64_t token)
{
	refused++;
	return FALSE;
}

/* A refusal may take long, as with an allocator that does not answer, and the thread has to stop
 * using the path. */
static void a_path_that_refuses_a_read_is_not_used_again(void **state)
{
	PrTransportOps ops = endless_ops;
	PrDataPath path = {.ops = &ops, .n_lanes = PR_LANES_MIN};
	g_autoptr(Bench) bench = bench_new();
	int pipe[2];

	ops.post_read = path_refuse_read;
	refused = 0;
	assert_int_equal(pipe2(pipe, O_CLOEXEC | O_NONBLOCK), 0);
	bench_serve(bench, pipe[0], 1);
	for (guint round = 0; round < 2; round++) {
		pr_fault_attach(bench->faults, &path);
		for (guint i = 0; i < 8; i++)
			report_one(pipe, (uintptr_t)bench->guest + (8 * round + i) * PAGE,
				   9000 + i);
		pr_fault_detach(bench->faults);
		pr_ram_forget_inflight(bench->ram, NULL, 0);
	}
	bench_stop(bench);
	assert_int_equal(refused, 2);
	close(pipe[0]);
	close(pipe[1]);
}

typedef struct Toucher {
	const volatile uint8_t *map;
	guint first, n;
	uint64_t sum;
} Toucher;

static gpointer touch(gpointer opaque)
{
	Toucher *toucher = opaque;

	for (guint i = 0; i < toucher->n; i++)
		toucher->sum += toucher->map[(toucher->first + i) * PAGE];
	return NULL;
}

/* A path over which each READ has landed when it is posted. Only the fault thread uses it. */
typedef struct LandingPath {
	PrDataPath path;
	const PrRam *ram;
	uint64_t token; /* of the READ that has completed and was not polled yet; 0: none */
} LandingPath;

static gboolean landing_post_read(PrDataPath *path, PrLaneId lane, uint32_t block, uint64_t offset,
				  uint32_t length, uint64_t token)
{
	LandingPath *self = (LandingPath *)path;

	memset(self->ram->blocks[block].host + offset, 0x5a, length);
	self->token = token;
	return TRUE;
}

static guint landing_poll(PrDataPath *path, PrLaneId lane, PrCompletion *ret, guint max)
{
	LandingPath *self = (LandingPath *)path;

	if (self->token == 0)
		return 0;
	*ret = (PrCompletion){.token = self->token, .ok = TRUE};
	self->token = 0;
	return 1;
}

static PrCrashPoint
	passed[8];     /* the fault thread writes them, and is joined before they are read */
static guint n_passed; /* likewise */

static void record_crash_point(PrCrashPoint point)
{
	if (n_passed < G_N_ELEMENTS(passed))
		passed[n_passed++] = point;
}

/*
 * Between the end of a READ and the waking of the guest there are crash points, where tests kill
 * the engine.
 */
static void a_page_for_a_fault_passes_each_crash_point(void **state)
{
	PrTransportOps ops = endless_ops;
	g_autoptr(Bench) bench = bench_new();
	LandingPath landing = {{.ops = &ops, .n_lanes = PR_LANES_MIN}, bench->ram, 0};
	Toucher toucher = {.map = bench->guest, .first = 7, .n = 1};

	ops.post_read = landing_post_read;
	ops.poll = landing_poll;
	n_passed = 0;
	bench_serve_uffd(bench, 1);
	__atomic_store_n(&pr_crash_hook, record_crash_point, __ATOMIC_RELEASE);
	pr_fault_attach(bench->faults, &landing.path);
	g_thread_join(g_thread_new("toucher", touch, &toucher));
	pr_fault_detach(bench->faults);
	bench_stop(bench);
	__atomic_store_n(&pr_crash_hook, NULL, __ATOMIC_RELEASE);
	assert_int_equal(toucher.sum, 0x5a);
	assert_int_equal(n_passed, 3);
	assert_int_equal(passed[0], PR_CRASH_DESTINATION_PAGE_LANDED);
	assert_int_equal(passed[1], PR_CRASH_DESTINATION_PAGE_RECEIVED);
	assert_int_equal(passed[2], PR_CRASH_DESTINATION_PAGE_EXPOSED);
}

/* With one fault thread or several, the page is placed at once and the kernel's access ends. */
static void a_thread_whose_fault_repeats_gets_its_page(void **state)
{
	for (guint n_threads = 1; n_threads <= 3; n_threads += 2) {
		g_autoptr(Bench) bench = bench_new();
		Writer writer;

		bench_serve_uffd(bench, n_threads);
		writer_start(&writer, bench, 7);
		make_fault_repeat(&writer, bench);
		wait_repeats(bench, 100);
		land_page(bench, 7, 0x5a);
		assert_int_equal(writer_end(&writer), 0x5a);
	}
}

/* Each fault of another thread ends the series of repeats, so the fault thread rests less. */
static void faults_of_others_are_served_beside_repeats(void **state)
{
	g_autoptr(Bench) bench = bench_new();
	Toucher toucher = {.map = bench->guest, .first = 100, .n = 100};
	Writer writer;

	bench_serve_uffd(bench, 1);
	for (guint i = 0; i < toucher.n; i++)
		land_page(bench, toucher.first + i, 1);
	writer_start(&writer, bench, 7);
	make_fault_repeat(&writer, bench);
	wait_repeats(bench, 100);
	gint64 start = g_get_monotonic_time();
	g_thread_join(g_thread_new("toucher", touch, &toucher));
	assert_in_range(g_get_monotonic_time() - start, 0, toucher.n * 50000);
	assert_int_equal(toucher.sum, toucher.n);
	land_page(bench, 7, 0x5a);
	assert_int_equal(writer_end(&writer), 0x5a);
	assert_int_equal(stats_of(bench).resolved, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(repeats_of_a_pending_fault_are_read_seldom),
		cmocka_unit_test(faults_of_kworkers_are_read_ahead_by_address),
		cmocka_unit_test(a_path_that_refuses_a_read_is_not_used_again),
		cmocka_unit_test(a_page_for_a_fault_passes_each_crash_point),
		cmocka_unit_test(a_thread_whose_fault_repeats_gets_its_page),
		cmocka_unit_test(faults_of_others_are_served_beside_repeats),
	};

	return cmocka_run_group_tests_name("fault", tests, NULL, NULL);
}
