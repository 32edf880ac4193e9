/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Logging never blocks, even if no process reads the log; the log has the number of dropped
 * lines. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cmocka.h>

#include "monitor/log.h"

#define LINES	 20000
#define PATIENCE 60000 /* ms; for output that must arrive */
/* ms; for LINES lines, with a sanitizer on a busy machine. If logging blocked, it would take
 * longer. */
#define PER_BURST 60000

/* The log's descriptor for the whole program. Each test points it to another file. */
static int log_fd;

static void log_to(int fd)
{
	assert_int_equal(dup2(fd, log_fd), log_fd);
}

static void log_many(void)
{
	gint64 began = g_get_monotonic_time();

	for (guint i = 0; i < LINES; i++)
		g_message("line %u of many", i);
	assert_in_range(g_get_monotonic_time() - began, 0, PER_BURST * 1000);
}

/* Reads until the wanted text has arrived. Returns all text. */
static char *read_until(int fd, const char *wanted)
{
	g_autoptr(GString) got = g_string_new(NULL);
	gint64 deadline = g_get_monotonic_time() + PATIENCE * 1000;
	char chunk[4096];

	while (!strstr(got->str, wanted)) {
		struct pollfd ready = {.fd = fd, .events = POLLIN};

		assert_true(g_get_monotonic_time() < deadline);
		poll(&ready, 1, 100);
		ssize_t n = ready.revents ? read(fd, chunk, sizeof(chunk)) : 0;
		if (n > 0)
			g_string_append_len(got, chunk, n);
	}
	return g_string_free(g_steal_pointer(&got), FALSE);
}

static guint count(const char *text, const char *word)
{
	guint n = 0;

	for (const char *at = text; (at = strstr(at, word)); at += strlen(word))
		n++;
	return n;
}

/* Returns the number before the word. The word must occur once. */
static guint number_before(const char *text, const char *word)
{
	const char *at = strstr(text, word);

	assert_non_null(at);
	assert_int_equal(count(text, word), 1);
	while (at > text && g_ascii_isdigit(at[-1]))
		at--;
	return (guint)g_ascii_strtoull(at, NULL, 10);
}

/* Returns the sum of all lines that the log says are missing. */
static guint count_missing(const char *text)
{
	static const char *const words[] = {
		" line of the log is missing here: the log was not read",
		" lines of the log are missing here: the log was not read"};
	guint n = 0;

	for (guint i = 0; i < G_N_ELEMENTS(words); i++)
		for (const char *at = text; (at = strstr(at, words[i])); at += strlen(words[i])) {
			const char *number = at;

			while (number > text && g_ascii_isdigit(number[-1]))
				number--;
			n += (guint)g_ascii_strtoull(number, NULL, 10);
		}
	return n;
}

static void lines_are_whole_and_in_order(void **state)
{
	int ends[2];

	assert_int_equal(pipe(ends), 0);
	log_to(ends[1]);
	g_message("the first");
	g_warning("the second");
	g_debug("too unimportant");
	g_message("the last");
	g_autofree char *text = read_until(ends[0], "the last\n");
	assert_true(strstr(text, "info: the first\n") < strstr(text, "warning: the second\n"));
	assert_null(strstr(text, "unimportant"));
	close(ends[0]);
	close(ends[1]);
}

static void a_pipe_that_is_not_read_does_not_block(void **state)
{
	int ends[2];

	assert_int_equal(pipe(ends), 0);
	log_to(ends[1]);
	log_many();
	/* A flush at the end of the program has a bound, too. */
	assert_false(pr_log_flush(50));
	/* If the writer thread gets no CPU at first, the log has several gaps. So all of it is read
	 * before the next line is logged. */
	g_autoptr(GString) all = g_string_new(NULL);
	guint missing = 0;
	while (count(all->str, "of many\n") + missing < LINES) {
		g_autofree char *text = read_until(ends[0], "\n");
		g_string_append(all, text);
		missing = count_missing(all->str);
	}
	g_message("after all that");
	g_autofree char *rest = read_until(ends[0], "after all that\n");
	g_string_append(all, rest);
	assert_int_equal(count(all->str, "of many\n") + count_missing(all->str), LINES);
	assert_in_range(missing, 1, LINES - 1);
	assert_true(pr_log_flush(PATIENCE));
	close(ends[0]);
	close(ends[1]);
}

static void a_pipe_without_a_reader_does_not_block(void **state)
{
	int gone[2], ends[2];

	assert_int_equal(pipe(gone), 0);
	log_to(gone[1]);
	close(gone[0]);
	close(gone[1]);
	g_message("to nobody");
	g_message("to nobody either");
	assert_true(pr_log_flush(PATIENCE));
	assert_int_equal(pipe(ends), 0);
	log_to(ends[1]);
	g_message("to somebody");
	g_autofree char *text = read_until(ends[0], "to somebody\n");
	assert_int_equal(number_before(text, " lines of the log are missing here"), 2);
	assert_non_null(strstr(text, "Broken pipe"));
	close(ends[0]);
	close(ends[1]);
}

/* Opens a file in a tmpfs of 64 KiB, in a mount namespace of this process. -1: it can't be mounted
 * here. */
static int open_small_file(void)
{
	if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
	    mount("none", "/tmp", "tmpfs", 0, "size=64k") != 0)
		return -1;
	return open("/tmp/log", O_RDWR | O_CREAT | O_APPEND, 0600);
}

static void a_full_disk_does_not_block_and_is_logged_later(void **state)
{
	int fd = open_small_file();
	char text[8192];

	if (fd < 0) {
		print_message("skipped: a small tmpfs: %s\n", g_strerror(errno));
		skip();
	}
	log_to(fd);
	log_many();
	assert_true(pr_log_flush(PATIENCE));
	assert_int_equal(ftruncate(fd, 0), 0);
	g_message("there is room again");
	assert_true(pr_log_flush(PATIENCE));
	ssize_t n = pread(fd, text, sizeof(text) - 1, 0);
	assert_true(n > 0);
	text[n] = '\0';
	assert_true(number_before(text, " lines of the log are missing here: they could") > 1000);
	assert_non_null(strstr(text, "No space left on device"));
	assert_non_null(strstr(text, "there is room again\n"));
	log_to(STDERR_FILENO);
	close(fd);
}

static int start_log(void **state)
{
	g_autoptr(GError) error = NULL;

	signal(SIGPIPE, SIG_IGN);
	log_fd = dup(STDERR_FILENO);
	return pr_log_start(G_LOG_LEVEL_INFO, log_fd, &error) ? 0 : -1;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(lines_are_whole_and_in_order),
		cmocka_unit_test(a_pipe_that_is_not_read_does_not_block),
		cmocka_unit_test(a_pipe_without_a_reader_does_not_block),
		cmocka_unit_test(a_full_disk_does_not_block_and_is_logged_later),
	};

	return cmocka_run_group_tests(tests, start_log, NULL);
}
