/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A new engine finds in the state memfd what the previous one has stored. Other files are refused.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/process.h"
#include "migration/memory/bitmap.h"
#include "migration/memory/ram.h"

#define N_BLOCKS 2

static const PrBinding binding = {.uuid = {1, 2, 3}, .epoch = 77, .secret = {9, 8}};

static void make_blocks(PrGuestBlock *blocks)
{
	static const uint64_t pages[N_BLOCKS] = {100, 70000};
	static const char *const names[N_BLOCKS] = {"ram0", "ram1"};

	for (guint i = 0; i < N_BLOCKS; i++) {
		blocks[i] = (PrGuestBlock){.idstr = (char *)names[i],
					   .size = pages[i] * 4096,
					   .page_size = 4096,
					   .base = 0x100000000ull * (i + 1),
					   .memfd = memfd_create(names[i], MFD_CLOEXEC)};
		assert_true(blocks[i].memfd >= 0);
		assert_int_equal(ftruncate(blocks[i].memfd, (off_t)blocks[i].size), 0);
	}
}

static void close_blocks(PrGuestBlock *blocks)
{
	for (guint i = 0; i < N_BLOCKS; i++)
		close(blocks[i].memfd);
}

/* Returns the descriptor of a state memfd as an engine leaves it. */
static int left_behind(const PrGuestBlock *blocks)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrRam) ram = pr_ram_new(blocks, N_BLOCKS, PR_GUEST_DESTINATION, &error);
	const uint32_t vcpus[] = {11, 12, 13};
	uint64_t page;

	g_assert_no_error(error);
	pr_state_memfd_set_identity(ram->state_memfd, &binding);
	pr_state_memfd_set_was_running(ram->state_memfd, TRUE);
	pr_state_memfd_set_vcpus(ram->state_memfd, vcpus, G_N_ELEMENTS(vcpus));
	pr_state_memfd_set_paused_by_operator(ram->state_memfd, TRUE);
	pr_state_memfd_set_stage(ram->state_memfd, PR_STATE_MEMFD_STARTED);
	assert_int_equal(pr_ram_claim_run(&ram->blocks[0], 10, 5, &page), 5);
	pr_ram_received(ram, &ram->blocks[0], 10, 5, TRUE);
	assert_int_equal(pr_ram_zero(ram, &ram->blocks[1], 60000, 10000), 10000);
	/* This READ was outstanding when the engine died. */
	assert_true(pr_ram_claim(&ram->blocks[1], 5));
	return dup(pr_state_memfd_fd(ram->state_memfd));
}

static void received_pages_are_found_by_the_next_engine(void **state)
{
	PrGuestBlock blocks[N_BLOCKS];
	g_autoptr(GError) error = NULL;
	PrBinding found;
	guint n;

	make_blocks(blocks);
	PrStateMemfd *attached = pr_state_memfd_attach(left_behind(blocks), &error);
	g_assert_no_error(error);
	g_autofree PrGuestBlock *known = pr_state_memfd_blocks(attached, &n);
	assert_int_equal(n, N_BLOCKS);
	for (guint i = 0; i < n; i++) {
		assert_string_equal(known[i].idstr, blocks[i].idstr);
		assert_int_equal(known[i].size, blocks[i].size);
		assert_int_equal(known[i].base, blocks[i].base);
	}
	pr_state_memfd_identity(attached, &found);
	assert_memory_equal(&found, &binding, sizeof(found));
	assert_int_equal(pr_state_memfd_stage(attached), PR_STATE_MEMFD_STARTED);
	assert_true(pr_state_memfd_paused_by_operator(attached));
	assert_true(pr_state_memfd_was_running(attached));
	assert_int_equal(pr_state_memfd_vcpus(attached, &n)[2], 13);
	assert_int_equal(n, 3);

	g_autoptr(PrRam) ram = pr_ram_adopt(blocks, N_BLOCKS, attached, &error);
	g_assert_no_error(error);
	assert_int_equal(pr_ram_received_bytes(ram), 10005 * 4096);
	assert_int_equal(pr_ram_zero_bytes(ram), 10000 * 4096);
	assert_false(pr_ram_claim(&ram->blocks[0], 12));
	/* The READ that had claimed the page ended with the engine. */
	assert_true(pr_ram_claim(&ram->blocks[1], 5));
	close_blocks(blocks);
}

/* There is no copy: a mapping of the memfd shows each bit at once. */
static void the_bitmap_is_the_memfd(void **state)
{
	PrGuestBlock blocks[N_BLOCKS];
	g_autoptr(GError) error = NULL;

	make_blocks(blocks);
	g_autoptr(PrRam) ram = pr_ram_new(blocks, N_BLOCKS, PR_GUEST_DESTINATION, &error);
	g_assert_no_error(error);
	pr_state_memfd_set_identity(ram->state_memfd, &binding);
	g_autoptr(PrStateMemfd) other =
		pr_state_memfd_attach(dup(pr_state_memfd_fd(ram->state_memfd)), &error);
	g_assert_no_error(error);
	assert_true(pr_ram_claim(&ram->blocks[1], 4711));
	assert_false(pr_bitmap_test(pr_state_memfd_received(other, 1), 4711));
	pr_ram_received(ram, &ram->blocks[1], 4711, 1, TRUE);
	assert_true(pr_bitmap_test(pr_state_memfd_received(other, 1), 4711));
	close_blocks(blocks);
}

static int plain_memfd(gsize bytes)
{
	int fd = memfd_create("foreign", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
	return fd;
}

static void assert_refused(int fd, const char *why)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrStateMemfd) attached = pr_state_memfd_attach(fd, &error);

	assert_null(attached);
	assert_non_null(error);
	if (!strstr(error->message, why))
		fail_msg("\"%s\" does not say \"%s\"", error->message, why);
}

/* Returns a copy of a valid state memfd, cut to `bytes` bytes and with one word changed. */
static int damaged_copy(gsize bytes, gsize offset, uint64_t value)
{
	PrGuestBlock blocks[N_BLOCKS];
	struct stat st;

	make_blocks(blocks);
	int good = left_behind(blocks);
	close_blocks(blocks);
	assert_int_equal(fstat(good, &st), 0);
	bytes = MIN(bytes, (gsize)st.st_size);
	g_autofree uint8_t *copy = g_malloc(bytes);
	assert_int_equal(pread(good, copy, bytes, 0), bytes);
	close(good);
	if (offset < bytes)
		memcpy(copy + offset, &value, sizeof(value));
	int fd = plain_memfd(bytes);
	assert_int_equal(pwrite(fd, copy, bytes, 0), bytes);
	assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
	return fd;
}

static void a_damaged_state_memfd_is_refused(void **state)
{
	int fd = plain_memfd(1 << 20);

	assert_refused(plain_memfd(100), "bytes");
	assert_refused(fd, "not sealed");
	fd = plain_memfd(1 << 20);
	assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
	assert_refused(fd, "its first bytes are 0x0");
	assert_refused(damaged_copy(G_MAXSIZE, 8, 99), "version 99");
	assert_refused(damaged_copy(7 * 4096, G_MAXSIZE, 0), "should have");
	assert_refused(damaged_copy(G_MAXSIZE, 16, 5), "should have 5");
	/* A copy without changes is accepted. */
	g_autoptr(GError) error = NULL;
	g_autoptr(PrStateMemfd) attached =
		pr_state_memfd_attach(damaged_copy(G_MAXSIZE, G_MAXSIZE, 0), &error);
	g_assert_no_error(error);
}

/*
 * Each word of the head is changed to extreme values. The memfd is then refused, or using it is
 * harmless.
 */
static void no_value_in_the_head_leads_outside_the_memfd(void **state)
{
	static const uint64_t values[] = {0, 1, 4096, G_MAXUINT32, 1ull << 40, G_MAXUINT64};
	PrGuestBlock blocks[N_BLOCKS];
	guint refused = 0;

	make_blocks(blocks);
	int good = left_behind(blocks);
	/* The part of the head that is in use: to the end of the second block. */
	for (gsize offset = 0; offset < 6144; offset += 8) {
		for (guint i = 0; i < G_N_ELEMENTS(values); i++) {
			uint64_t old;
			g_autoptr(GError) error = NULL;

			assert_int_equal(pread(good, &old, sizeof(old), (off_t)offset), 8);
			assert_int_equal(pwrite(good, &values[i], 8, (off_t)offset), 8);
			g_autoptr(PrStateMemfd) attached = pr_state_memfd_attach(dup(good), &error);
			refused += !attached;
			for (guint b = 0; attached && b < N_BLOCKS; b++) {
				guint n;
				g_autofree PrGuestBlock *known =
					pr_state_memfd_blocks(attached, &n);
				if (b < n)
					pr_bitmap_count(pr_state_memfd_received(attached, b),
							known[b].size / known[b].page_size);
			}
			assert_int_equal(pwrite(good, &old, 8, (off_t)offset), 8);
		}
	}
	assert_true(refused > 50);
	close(good);
	close_blocks(blocks);
}

/* The previous engine may still be ending. The wait for its end has a bound. */
static void the_previous_engine_is_waited_for(void **state)
{
	PrGuestBlock blocks[N_BLOCKS];
	g_autoptr(GError) error = NULL;

	make_blocks(blocks);
	pid_t child = fork();
	if (child == 0) {
		pause();
		_exit(0);
	}
	g_autofree char *text = pr_process_text(child);
	assert_true(pr_process_lives(text));
	g_autoptr(PrStateMemfd) attached = pr_state_memfd_new(blocks, N_BLOCKS, &error);
	g_assert_no_error(error);
	pr_state_memfd_set_identity(attached, &binding);
	/* Puts the child's text into the head, as if the child had used the memfd. */
	g_autofree char *own = pr_process_text(getpid());
	uint8_t *head = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED,
			     pr_state_memfd_fd(attached), 0);
	assert_ptr_not_equal(head, MAP_FAILED);
	uint8_t *at = memmem(head, 64 * 1024, own, strlen(own) + 1);
	assert_non_null(at);
	strcpy((char *)at, text);

	assert_false(pr_state_memfd_await_engine(attached, 20, &error));
	assert_non_null(strstr(error->message, "has not ended yet"));
	g_clear_error(&error);
	kill(child, SIGKILL);
	/* A zombie has freed everything, also before its parent has waited for it. */
	assert_true(pr_state_memfd_await_engine(attached, 10000, &error));
	assert_false(pr_process_lives(text));
	assert_int_equal(waitpid(child, NULL, 0), child);
	assert_string_equal((char *)at, own);
	munmap(head, 1 << 20);
	close_blocks(blocks);
}

static void *sleep_on(void *opaque)
{
	pause();
	return NULL;
}

/* Ends the first thread of the process, while another one lives on. */
static void end_first_thread(void)
{
	pthread_t thread;

	pthread_create(&thread, NULL, sleep_on, NULL);
	pthread_exit(NULL);
}

static void wait_gone(const char *text, gboolean (*is_so)(const char *text))
{
	gint64 deadline = g_get_monotonic_time() + 10 * G_TIME_SPAN_SECOND;

	while (is_so(text) && g_get_monotonic_time() < deadline)
		g_usleep(1000); /* between two checks of the condition */
	assert_false(is_so(text));
}

static void a_process_uses_its_memory_until_its_last_thread_ends(void **state)
{
	pid_t child = fork();

	if (child == 0) {
		end_first_thread();
		_exit(1);
	}
	g_autofree char *text = pr_process_text(child);
	g_autofree char *first = g_strdup_printf("/proc/%d/task/%d/statm", child, child);
	g_autofree char *statm = NULL;
	gint64 deadline = g_get_monotonic_time() + 10 * G_TIME_SPAN_SECOND;
	while (!g_file_get_contents(first, &statm, NULL, NULL) || statm[0] != '0') {
		assert_true(g_get_monotonic_time() < deadline);
		g_clear_pointer(&statm, g_free);
		g_usleep(1000); /* between two checks of the condition */
	}
	assert_true(pr_process_uses_memory(text));
	kill(child, SIGKILL);
	/* As a zombie, and after it was reaped. */
	wait_gone(text, pr_process_uses_memory);
	assert_int_equal(waitpid(child, NULL, 0), child);
	assert_false(pr_process_uses_memory(text));
}

/* A process that can't be seen may still be there. */
static void a_process_that_cannot_be_seen_may_use_its_memory(void **state)
{
	assert_true(pr_process_uses_memory("0 0 4026531836 -"));
	assert_true(pr_process_uses_memory("4711 0 4026531836 -"));
	assert_true(pr_process_uses_memory("nobody"));
	assert_false(pr_process_uses_memory("4711 1 4026531836 -"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(received_pages_are_found_by_the_next_engine),
		cmocka_unit_test(the_bitmap_is_the_memfd),
		cmocka_unit_test(a_damaged_state_memfd_is_refused),
		cmocka_unit_test(no_value_in_the_head_leads_outside_the_memfd),
		cmocka_unit_test(the_previous_engine_is_waited_for),
		cmocka_unit_test(a_process_uses_its_memory_until_its_last_thread_ends),
		cmocka_unit_test(a_process_that_cannot_be_seen_may_use_its_memory),
	};

	return cmocka_run_group_tests_name("state-memfd", tests, NULL, NULL);
}
