/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Pages are allocated before they are read: which pages, when, and the effect of a failure.
 * tests/e2e/test_charge.py tests which cgroup is charged. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/allocator.h"
#include "migration/postcopy/allocate.h"
#include "migration/memory/bitmap.h"
#include "migration/memory/scratch.h"

#define PAGE	    4096u
#define PIECE	    (2ull << 20)
#define N_PAGES	    4096
#define PATIENCE_US (20 * G_USEC_PER_SEC)

/* A destination without a guest, with an allocator in a thread. */
typedef struct Rig {
	PrRam *ram;
	PrAllocate *allocate;
	int memfds[2];
	int ours, theirs; /* of the socket */
	GThread *server;
	int code;    /* atomic: the reply code of a server that allocates nothing */
	int n_asked; /* atomic: the number of PAGES requests to it */
	guint broken;
	char *reason; /* of the last request */
} Rig;

static void on_broken(const GError *error, void *opaque)
{
	Rig *rig = opaque;

	rig->broken++;
	g_free(rig->reason);
	rig->reason = g_strdup(error->message);
}

static gpointer real_server(gpointer opaque)
{
	pr_allocator_serve(((Rig *)opaque)->theirs);
	return NULL;
}

/* A server that replies, and allocates nothing. */
static gpointer other_server(gpointer opaque)
{
	Rig *rig = opaque;
	PrAllocatorRequest request;

	while (recv(rig->theirs, &request, sizeof(request), 0) == sizeof(request)) {
		PrAllocatorReply reply = {.id = request.id,
					  .code = __atomic_load_n(&rig->code, __ATOMIC_SEQ_CST)};
		if (request.op != PR_ALLOCATOR_PAGES)
			continue;
		__atomic_fetch_add(&rig->n_asked, 1, __ATOMIC_SEQ_CST);
		g_assert_cmpint(send(rig->theirs, &reply, sizeof(reply), 0), ==, sizeof(reply));
	}
	return NULL;
}

static PrGuestBlock make_block(Rig *rig, guint i, uint64_t size, uint32_t page_size)
{
	rig->memfds[i] = memfd_create("ram", MFD_CLOEXEC);
	assert_int_equal(ftruncate(rig->memfds[i], (off_t)size), 0);
	return (PrGuestBlock){.idstr = i ? "other" : "ram",
			      .size = size,
			      .page_size = page_size,
			      .memfd = rig->memfds[i],
			      .base = 0x10000000ull * (i + 1)};
}

static Rig *rig_new(GThreadFunc server, uint64_t size)
{
	Rig *rig = g_new0(Rig, 1);
	const PrAllocateHooks hooks = {on_broken, rig, NULL};
	PrGuestBlock blocks[2];
	int pair[2];

	/* The kernel does not charge the second block's pages, as they are huge pages. */
	blocks[0] = make_block(rig, 0, size, PAGE);
	blocks[1] = make_block(rig, 1, 64 * 16 * PAGE, 16 * PAGE);
	rig->ram = pr_ram_new(blocks, 2, PR_GUEST_DESTINATION, NULL);
	assert_non_null(rig->ram);
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
	rig->ours = pair[0];
	rig->theirs = pair[1];
	rig->server = g_thread_new("server", server, rig);
	rig->allocate = pr_allocate_start(rig->ram, rig->ours, -1, &hooks, NULL);
	assert_non_null(rig->allocate);
	return rig;
}

static void end_server(Rig *rig)
{
	shutdown(rig->theirs, SHUT_RDWR);
	if (rig->server)
		g_thread_join(g_steal_pointer(&rig->server));
}

static void rig_free(Rig *rig)
{
	pr_allocate_stop(rig->allocate);
	end_server(rig);
	pr_ram_free(rig->ram);
	for (guint i = 0; i < 2; i++)
		close(rig->memfds[i]);
	close(rig->ours);
	close(rig->theirs);
	g_free(rig->reason);
	g_free(rig);
}

/* Pages of 4 KiB that a memfd has. */
static uint64_t has(int memfd)
{
	struct stat st;

	assert_int_equal(fstat(memfd, &st), 0);
	return (uint64_t)st.st_blocks * 512 / PAGE;
}

static void wait_has(const Rig *rig, uint64_t pages)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (has(rig->memfds[0]) < pages && g_get_monotonic_time() < deadline)
		g_usleep(1000); /* between two checks of the condition */
	assert_int_equal(has(rig->memfds[0]), pages);
}

static void only_read_pages_are_allocated_before_the_guest_runs(void **state)
{
	Rig *rig = rig_new(real_server, N_PAGES * PAGE);

	pr_allocate_notify(rig->allocate);
	assert_true(pr_allocate(rig->allocate, 0, 10, 3, FALSE));
	assert_int_equal(has(rig->memfds[0]), 3);
	assert_true(pr_allocate(rig->allocate, 0, 8, 8, FALSE));
	assert_int_equal(has(rig->memfds[0]), 8);
	assert_true(pr_allocate(rig->allocate, 0, N_PAGES - 256, 256, FALSE));
	assert_int_equal(has(rig->memfds[0]), 8 + 256);
	/* Pages that exist already are not requested. */
	end_server(rig);
	assert_true(pr_allocate(rig->allocate, 0, 9, 7, FALSE));
	assert_int_equal(rig->broken, 0);
	rig_free(rig);
}

static void data_in_an_allocated_page_is_kept(void **state)
{
	Rig *rig = rig_new(real_server, N_PAGES * PAGE);
	uint8_t *host = rig->ram->blocks[0].host;

	assert_true(pr_allocate(rig->allocate, 0, 5, 1, FALSE));
	memset(host + 5 * PAGE, 0xa5, PAGE);
	assert_true(pr_allocate(rig->allocate, 0, 4, 3, FALSE));
	assert_int_equal(host[5 * PAGE], 0xa5);
	assert_int_equal(host[6 * PAGE - 1], 0xa5);
	assert_int_equal(host[6 * PAGE], 0);
	rig_free(rig);
}

static void blocks_of_huge_pages_are_not_allocated(void **state)
{
	Rig *rig = rig_new(real_server, N_PAGES * PAGE);

	assert_true(pr_allocate(rig->allocate, 1, 3, 4, FALSE));
	pr_allocate_walk(rig->allocate);
	wait_has(rig, N_PAGES);
	assert_int_equal(has(rig->memfds[1]), 0);
	rig_free(rig);
}

static void the_walk_skips_received_and_ungranted_pages(void **state)
{
	Rig *rig = rig_new(real_server, N_PAGES * PAGE);
	PrRamBlock *block = &rig->ram->blocks[0];

	pr_ram_mark_ungranted(rig->ram);
	pr_ram_grant(block, 0, 1000);
	pr_ram_zero(rig->ram, block, 100, 33);
	pr_allocate_walk(rig->allocate);
	wait_has(rig, 1000 - 33);
	/* The source has granted more. */
	pr_ram_zero(rig->ram, block, 1500, 500);
	pr_ram_grant(block, 1000, 1000);
	pr_allocate_notify(rig->allocate);
	wait_has(rig, 1000 - 33 + 500);
	pr_allocate_stop(g_steal_pointer(&rig->allocate));
	assert_int_equal(has(rig->memfds[0]), 1000 - 33 + 500);
	rig_free(rig);
}

static void the_engines_own_bitmaps_are_allocated_likewise(void **state)
{
	Rig *rig = rig_new(real_server, N_PAGES * PAGE);
	const PrRam *ram = rig->ram;

	assert_int_equal(has(pr_scratch_fd(ram->scratch)), pr_scratch_bytes(ram->scratch) / PAGE);
	assert_int_equal(has(pr_state_memfd_fd(ram->state_memfd)),
			 pr_state_memfd_bytes(ram->state_memfd) / PAGE);
	rig_free(rig);
}

static void a_full_cgroup_fails_the_read_and_can_be_mended(void **state)
{
	Rig *rig = rig_new(other_server, N_PAGES * PAGE);

	__atomic_store_n(&rig->code, ENOMEM, __ATOMIC_SEQ_CST);
	assert_false(pr_allocate(rig->allocate, 0, 7, 1, FALSE));
	assert_int_equal(rig->broken, 1);
	assert_non_null(strstr(rig->reason, "raise its limit"));
	/* Requested each time, as the migration may have recovered in between. */
	assert_false(pr_allocate(rig->allocate, 0, 7, 1, FALSE));
	assert_int_equal(rig->broken, 2);
	__atomic_store_n(&rig->code, 0, __ATOMIC_SEQ_CST);
	assert_true(pr_allocate(rig->allocate, 0, 7, 1, FALSE));
	assert_int_equal(rig->broken, 2);
	rig_free(rig);
}

static void a_failure_ahead_of_the_pull_fails_no_read(void **state)
{
	Rig *rig = rig_new(other_server, N_PAGES * PAGE);
	int before = __atomic_load_n(&rig->n_asked, __ATOMIC_SEQ_CST);
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	__atomic_store_n(&rig->code, ENOMEM, __ATOMIC_SEQ_CST);
	pr_allocate_walk(rig->allocate);
	while (__atomic_load_n(&rig->n_asked, __ATOMIC_SEQ_CST) == before &&
	       g_get_monotonic_time() < deadline)
		g_usleep(1000); /* between two checks of the condition */
	pr_allocate_stop(g_steal_pointer(&rig->allocate));
	assert_int_equal(__atomic_load_n(&rig->n_asked, __ATOMIC_SEQ_CST), before + 1);
	assert_int_equal(rig->broken, 0);
	rig_free(rig);
}

static void the_allocators_end_is_reported_with_the_remedy(void **state)
{
	Rig *rig = rig_new(real_server, N_PAGES * PAGE);

	end_server(rig);
	for (guint i = 1; i <= 2; i++) {
		assert_false(pr_allocate(rig->allocate, 0, 7, 1, FALSE));
		assert_int_equal(rig->broken, i);
		assert_non_null(strstr(rig->reason, "--resume"));
	}
	rig_free(rig);
}

/* Sanitizers need page tables of their own for each page that is touched. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TABLES_ARE_OURS FALSE
#else
#define TABLES_ARE_OURS TRUE
#endif

static uint64_t table_bytes(void)
{
	g_autofree char *text = NULL;

	assert_true(g_file_get_contents("/proc/self/status", &text, NULL, NULL));
	const char *line = strstr(text, "VmPTE:");
	assert_non_null(line);
	return g_ascii_strtoull(line + strlen("VmPTE:"), NULL, 10) * 1024;
}

static void page_tables_are_given_back_and_the_pages_stay(void **state)
{
	guint n = 2 * PR_ALLOCATE_PIECES_MAX;
	Rig *rig = rig_new(real_server, n * PIECE);
	uint8_t *host = rig->ram->blocks[0].host;
	/* One page table for each piece would be 8 MiB in all; the last half may stay. */
	uint64_t most = table_bytes() + PR_ALLOCATE_PIECES_MAX * PAGE + PIECE / 4;
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	for (guint i = 0; i < n; i++) {
		assert_true(pr_allocate(rig->allocate, 0, i * (PIECE / PAGE), 1, FALSE));
		host[i * PIECE] = (uint8_t)(i * 7 + 1);
	}
	while (TABLES_ARE_OURS && table_bytes() > most && g_get_monotonic_time() < deadline)
		g_usleep(1000); /* between two checks of the condition */
	assert_true(!TABLES_ARE_OURS || table_bytes() <= most);
	assert_int_equal(has(rig->memfds[0]), n);
	for (guint i = 0; i < n; i++)
		assert_int_equal(host[i * PIECE], (uint8_t)(i * 7 + 1));
	rig_free(rig);
}

/* The guest's mapping of a block, in fault mode. */
static int register_faults(void *map, uint64_t size)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM};
	struct uffdio_register reg = {
		.range = {(uintptr_t)map, size},
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);

	assert_true(uffd >= 0);
	assert_int_equal(ioctl(uffd, UFFDIO_API, &api), 0);
	assert_int_equal(ioctl(uffd, UFFDIO_REGISTER, &reg), 0);
	return uffd;
}

static gpointer touch(gpointer at)
{
	return GUINT_TO_POINTER(*(volatile uint8_t *)at);
}

static void expect_fault(int uffd, uint8_t *at)
{
	struct pollfd look = {.fd = uffd, .events = POLLIN};
	struct uffdio_range range = {(uintptr_t)at, PAGE};
	struct uffdio_zeropage zero = {.range = range};
	GThread *thread = g_thread_new("touch", touch, at);

	assert_int_equal(poll(&look, 1, PATIENCE_US / 1000), 1);
	assert_int_equal(ioctl(uffd, UFFDIO_ZEROPAGE, &zero), 0);
	assert_int_equal(GPOINTER_TO_UINT(g_thread_join(thread)), 0);
}

static void the_guests_page_tables_are_made_and_its_pages_are_not(void **state)
{
	enum { N_PIECES = 512 };
	uint64_t size = N_PIECES * PIECE;
	int memfd = memfd_create("ram", MFD_CLOEXEC);
	assert_int_equal(ftruncate(memfd, (off_t)size), 0);
	uint8_t *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	assert_true(map != MAP_FAILED);
	int uffd = register_faults(map, size), pair[2];
	Rig rig = {.theirs = -1};
	PrAllocatorRequest give = {.op = PR_ALLOCATOR_FILE, .file = 1};
	PrAllocatorRequest tables = {
		.op = PR_ALLOCATOR_TABLES, .file = 1, .offset = (uintptr_t)map, .length = size};
	PrAllocatorReply reply;

	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
	rig.theirs = pair[1];
	GThread *server = g_thread_new("server", real_server, &rig);
	uint64_t before = table_bytes();
	assert_true(pr_allocator_send(pair[0], &give, uffd));
	assert_true(pr_allocator_send(pair[0], &tables, -1));
	assert_int_equal(recv(pair[0], &reply, sizeof(reply), 0), sizeof(reply));
	assert_int_equal(reply.code, 0);
	assert_true(table_bytes() >= before + (N_PIECES - 1) * PAGE);
	assert_int_equal(has(memfd), 0);
	expect_fault(uffd, map);
	expect_fault(uffd, map + 7 * PIECE);
	/* A range with pages must not be requested: the guest would see them. So it is an error. */
	assert_true(pr_allocator_send(pair[0], &tables, -1));
	assert_int_equal(recv(pair[0], &reply, sizeof(reply), 0), sizeof(reply));
	assert_int_equal(reply.code, EEXIST);
	close(pair[0]);
	g_thread_join(server);
	close(pair[1]);
	close(uffd);
	munmap(map, size);
	close(memfd);
}

typedef struct Reader {
	Rig *rig;
	guint seed;
} Reader;

static gpointer read_all(gpointer opaque)
{
	const Reader *reader = opaque;
	Rig *rig = reader->rig;
	uint8_t *host = rig->ram->blocks[0].host;
	GRand *rand = g_rand_new_with_seed(reader->seed);

	for (guint i = 0; i < 2000; i++) {
		uint64_t page = (uint64_t)g_rand_int_range(rand, 0, N_PAGES - 4);
		g_assert_true(pr_allocate(rig->allocate, 0, page, 4, FALSE));
		__atomic_fetch_add(&host[page * PAGE], 1, __ATOMIC_RELAXED);
	}
	g_rand_free(rand);
	return NULL;
}

static void several_threads_read_beside_the_walk(void **state)
{
	Rig *rig = rig_new(real_server, N_PAGES * PAGE);
	Reader readers[4];
	GThread *threads[4];

	pr_allocate_walk(rig->allocate);
	for (guint i = 0; i < G_N_ELEMENTS(threads); i++) {
		readers[i] = (Reader){rig, i + 1};
		threads[i] = g_thread_new("reader", read_all, &readers[i]);
	}
	for (guint i = 0; i < G_N_ELEMENTS(threads); i++)
		g_thread_join(threads[i]);
	wait_has(rig, N_PAGES);
	assert_int_equal(rig->broken, 0);
	rig_free(rig);
}

static void expect_cgroup(const char *text, const char *path, gboolean v1)
{
	char found[64];
	bool is_v1;

	assert_true(pr_memory_cgroup(text, found, sizeof(found), &is_v1));
	assert_string_equal(found, path);
	assert_int_equal(is_v1, v1);
}

static void the_memory_cgroup_is_found_in_the_kernels_text(void **state)
{
	char found[8];
	bool v1;

	expect_cgroup("0::/machine.slice/a:b.scope\n", "/machine.slice/a:b.scope", FALSE);
	expect_cgroup("5:memory:/m\n0::/u\n", "/m", TRUE);
	expect_cgroup("0::/u\n5:cpu,memory,pids:/m", "/m", TRUE);
	expect_cgroup("6:memoryless:/x\n5:cpuset:/y\n0::/u\n", "/u", FALSE);
	expect_cgroup("10:cpu:/c\n0::/\n", "/", FALSE);
	assert_false(pr_memory_cgroup("", found, sizeof(found), &v1));
	assert_false(pr_memory_cgroup("5:cpu:/m\n", found, sizeof(found), &v1));
	assert_false(pr_memory_cgroup("0:/m\n0\n::\n", found, sizeof(found), &v1));
	assert_false(pr_memory_cgroup("0::/much-too-long\n", found, sizeof(found), &v1));
	assert_true(pr_memory_cgroup_is_shared(getpid(), getpid()));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(only_read_pages_are_allocated_before_the_guest_runs),
		cmocka_unit_test(data_in_an_allocated_page_is_kept),
		cmocka_unit_test(blocks_of_huge_pages_are_not_allocated),
		cmocka_unit_test(the_walk_skips_received_and_ungranted_pages),
		cmocka_unit_test(the_engines_own_bitmaps_are_allocated_likewise),
		cmocka_unit_test(a_full_cgroup_fails_the_read_and_can_be_mended),
		cmocka_unit_test(a_failure_ahead_of_the_pull_fails_no_read),
		cmocka_unit_test(the_allocators_end_is_reported_with_the_remedy),
		cmocka_unit_test(page_tables_are_given_back_and_the_pages_stay),
		cmocka_unit_test(the_guests_page_tables_are_made_and_its_pages_are_not),
		cmocka_unit_test(several_threads_read_beside_the_walk),
		cmocka_unit_test(the_memory_cgroup_is_found_in_the_kernels_text),
	};

	return cmocka_run_group_tests_name("allocate", tests, NULL, NULL);
}
