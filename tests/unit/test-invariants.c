/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A broken invariant ends the process and names itself. Each case runs in a child, which has to
 * die. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "migration/memory/invariants.h"

#define PAGE	4096u
#define N_PAGES 64

/* A destination's RAM of one block. */
static PrRam *new_ram(void)
{
	g_autoptr(GError) error = NULL;
	int memfd = memfd_create("ram", MFD_CLOEXEC);
	PrGuestBlock block = {
		.idstr = (char *)"ram0", .size = N_PAGES * PAGE, .page_size = PAGE, .memfd = memfd};

	assert_true(memfd >= 0);
	assert_int_equal(ftruncate(memfd, N_PAGES * PAGE), 0);
	PrRam *ram = pr_ram_new(&block, 1, PR_GUEST_DESTINATION, &error);
	g_assert_no_error(error);
	return ram;
}

typedef void (*Breach)(PrRam *ram);

/* Breaks an invariant in a child. Returns what the child printed before it died; fails if it
 * lives. */
static char *output_before_death(Breach breach)
{
	char output[1024] = "";
	int pipe_fds[2], status;

	assert_int_equal(pipe(pipe_fds), 0);
	pid_t child = fork();
	assert_true(child >= 0);
	if (child == 0) {
		dup2(pipe_fds[1], STDERR_FILENO);
		/* A library that libfabric loads has set a handler for it. */
		signal(SIGABRT, SIG_DFL);
		breach(new_ram());
		_exit(0);
	}
	close(pipe_fds[1]);
	gsize length = 0;
	ssize_t n;
	while ((n = read(pipe_fds[0], output + length, sizeof(output) - 1 - length)) > 0)
		length += n;
	close(pipe_fds[0]);
	assert_int_equal(waitpid(child, &status, 0), child);
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
		fail_msg("the child lives on: status 0x%x, it printed \"%s\"", status, output);
	return g_strdup(output);
}

static void assert_dies(Breach breach, const char *words)
{
	g_autofree char *output = output_before_death(breach);
	if (!strstr(output, words))
		fail_msg("\"%s\" does not say \"%s\"", output, words);
}

static void place_twice(PrRam *ram)
{
	PrRamBlock *block = &ram->blocks[0];

	assert_true(pr_ram_claim(block, 7));
	pr_ram_received(ram, block, 7, 1, TRUE);
	pr_ram_received(ram, block, 6, 2, TRUE);
}

static void a_page_is_placed_once(void **state)
{
	assert_dies(place_twice, "RAM block ram0, page 7: placed twice");
}

static void write_received(PrRam *ram)
{
	PrRamBlock *block = &ram->blocks[0];

	assert_true(pr_ram_claim(block, 9));
	pr_ram_received(ram, block, 9, 1, TRUE);
	pr_invariant_claimed(block, 8, 2, "a READ is posted");
}

static void write_received_and_claimed(PrRam *ram)
{
	PrRamBlock *block = &ram->blocks[0];

	assert_true(pr_ram_claim(block, 8));
	write_received(ram);
}

static void nothing_is_read_into_a_received_page(void **state)
{
	assert_dies(write_received_and_claimed,
		    "RAM block ram0, page 9: a READ is posted, but the page is received");
}

static void nothing_is_read_into_an_unclaimed_page(void **state)
{
	assert_dies(write_received,
		    "RAM block ram0, page 8: a READ is posted, but nobody has claimed");
}

static void empty_received(PrRam *ram)
{
	pr_ram_zero(ram, &ram->blocks[0], 3, 1);
	pr_ram_empty(ram, NULL);
}

static void received_pages_are_not_emptied(void **state)
{
	assert_dies(empty_received, "RAM block ram0, page 3: the memory is emptied");
}

static void run_after_run(PrRam *ram)
{
	pr_invariant_may_run(TRUE);
}

static void the_source_does_not_run_after_run(void **state)
{
	assert_dies(run_after_run, "the source is about to run its guest");
}

/* As every migration does it. */
static void a_correct_order_breaks_nothing(void **state)
{
	g_autoptr(PrRam) ram = new_ram();
	PrRamBlock *block = &ram->blocks[0];

	assert_true(pr_ram_empty(ram, NULL));
	assert_true(pr_ram_claim(block, 7));
	pr_invariant_check_claimed(block, 7, 1, "a READ is posted");
	pr_ram_received(ram, block, 7, 1, TRUE);
	pr_ram_zero(ram, block, 0, N_PAGES);
	assert_true(pr_ram_complete(ram));
	pr_invariant_check_may_run(FALSE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_page_is_placed_once),
		cmocka_unit_test(nothing_is_read_into_a_received_page),
		cmocka_unit_test(nothing_is_read_into_an_unclaimed_page),
		cmocka_unit_test(received_pages_are_not_emptied),
		cmocka_unit_test(the_source_does_not_run_after_run),
		cmocka_unit_test(a_correct_order_breaks_nothing),
	};

	return cmocka_run_group_tests_name("invariants", tests, NULL, NULL);
}
