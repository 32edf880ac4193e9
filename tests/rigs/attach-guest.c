/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/attach-guest.h"

#include <errno.h>
#include <gio/gio.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHECK_US   1000
#define TIMEOUT_US (20 * G_TIME_SPAN_SECOND)

struct AttachGuest {
	GSubprocess *process;
	GDataInputStream *output;
	uint64_t memfd, tmpfs;
};

/* The process */

typedef struct Access {
	uint8_t *at;
	uint8_t value;
	gboolean write;
} Access;

static volatile sig_atomic_t n_signals;

static void count_signal(int signal)
{
	n_signals++;
}

static void print_line(const char *format, ...) G_GNUC_PRINTF(1, 2);

/* One write() for each line, as several threads print at the same time. */
static void print_line(const char *format, ...)
{
	char line[128];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (write(STDOUT_FILENO, line, n) != n)
		_exit(1);
}

static void *do_access(void *opaque)
{
	Access access = *(Access *)opaque;
	int thread = (int)syscall(SYS_gettid);

	free(opaque);
	print_line("thread %d\n", thread);
	if (access.write)
		__atomic_store_n(access.at, access.value, __ATOMIC_RELAXED);
	else
		access.value = __atomic_load_n(access.at, __ATOMIC_RELAXED);
	print_line("done %d %u\n", thread, access.value);
	return NULL;
}

static void start_access(const char *line)
{
	Access *access = calloc(1, sizeof(*access));
	unsigned long at;
	unsigned value = 0;
	pthread_t thread;

	access->write = *line != 'r';
	sscanf(line + 1, "%lx %u", &at, &value);
	access->at = (uint8_t *)at;
	access->value = (uint8_t)value;
	if (*line == 'm') {
		do_access(access);
	} else if (pthread_create(&thread, NULL, do_access, access)) {
		_exit(1);
	} else {
		pthread_detach(thread);
	}
}

static void run_command(const char *line)
{
	switch (*line) {
	case 'm':
	case 'w':
	case 'r':
		start_access(line);
		break;
	case 's':
		print_line("signals %d\n", (int)n_signals);
		break;
	case 'l':
		print_line("leaving\n");
		for (;;)
			sleep(1000);
	}
}

static void run_commands(void)
{
	struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
	char line[128];
	size_t used = 0;

	for (;;) {
		if (ppoll(&input, 1, NULL, NULL) < 0 && errno != EINTR)
			_exit(1);
		if (!input.revents)
			continue;
		if (read(STDIN_FILENO, line + used, 1) != 1)
			_exit(0);
		if (line[used] == '\n') {
			line[used] = '\0';
			run_command(line);
			used = 0;
		} else if (used + 1 < sizeof(line)) {
			used++;
		}
		input.revents = 0;
	}
}

static void *map_memfd(void)
{
	size_t size = ATTACH_MEMFD_PAGES * ATTACH_PAGE;
	int fd = memfd_create("ram", MFD_CLOEXEC);
	char *at;

	if (ftruncate(fd, ATTACH_MEMFD_OFFSET + size) < 0)
		_exit(1);
	at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, ATTACH_MEMFD_OFFSET);
	if (at == MAP_FAILED || madvise(at + size / 2, size / 2, MADV_DONTDUMP) < 0)
		_exit(1);
	return at;
}

static void *map_tmpfs(void)
{
	size_t size = ATTACH_TMPFS_PAGES * ATTACH_PAGE;
	char name[] = "/dev/shm/test-attach-XXXXXX";
	int fd = mkstemp(name);
	void *at;

	if (fd < 0 || unlink(name) < 0 || ftruncate(fd, size) < 0)
		_exit(1);
	at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	/*
	 * The second mapping of this file is read-only, so the helper does not list it as guest
	 * RAM.
	 */
	if (at == MAP_FAILED || mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED)
		_exit(1);
	return at;
}

void attach_guest_main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = count_signal};

	if (argc < 2 || strcmp(argv[1], "guest") != 0)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGUSR1, &action, NULL);
	print_line("%lx %lx\n", (unsigned long)map_memfd(), (unsigned long)map_tmpfs());
	run_commands();
}

/* The test's side */

static char *read_line(AttachGuest *guest)
{
	g_autoptr(GError) error = NULL;
	char *line = g_data_input_stream_read_line(guest->output, NULL, NULL, &error);

	g_assert_no_error(error);
	g_assert_nonnull(line);
	return line;
}

static void send_command(AttachGuest *guest, const char *format, ...) G_GNUC_PRINTF(2, 3);

static void send_command(AttachGuest *guest, const char *format, ...)
{
	g_autofree char *line = NULL;
	va_list args;

	va_start(args, format);
	line = g_strdup_vprintf(format, args);
	va_end(args);
	g_assert_true(g_output_stream_write_all(g_subprocess_get_stdin_pipe(guest->process), line,
						strlen(line), NULL, NULL, NULL));
}

AttachGuest *attach_guest_new(void)
{
	AttachGuest *guest = g_new0(AttachGuest, 1);
	g_autofree char *line = NULL;
	unsigned long memfd, tmpfs;

	guest->process =
		g_subprocess_new(G_SUBPROCESS_FLAGS_STDIN_PIPE | G_SUBPROCESS_FLAGS_STDOUT_PIPE,
				 NULL, "/proc/self/exe", "guest", NULL);
	g_assert_nonnull(guest->process);
	guest->output = g_data_input_stream_new(g_subprocess_get_stdout_pipe(guest->process));
	line = read_line(guest);
	g_assert_cmpint(sscanf(line, "%lx %lx", &memfd, &tmpfs), ==, 2);
	guest->memfd = memfd;
	guest->tmpfs = tmpfs;
	return guest;
}

void attach_guest_free(AttachGuest *guest)
{
	g_subprocess_force_exit(guest->process);
	g_subprocess_wait(guest->process, NULL, NULL);
	g_object_unref(guest->output);
	g_object_unref(guest->process);
	g_free(guest);
}

pid_t attach_guest_pid(AttachGuest *guest)
{
	return atoi(g_subprocess_get_identifier(guest->process));
}

uint64_t attach_guest_memfd(AttachGuest *guest)
{
	return guest->memfd;
}

uint64_t attach_guest_tmpfs(AttachGuest *guest)
{
	return guest->tmpfs;
}

static pid_t read_thread(AttachGuest *guest)
{
	g_autofree char *line = read_line(guest);
	int thread;

	g_assert_cmpint(sscanf(line, "thread %d", &thread), ==, 1);
	return thread;
}

pid_t attach_guest_write(AttachGuest *guest, uint64_t at, uint8_t value)
{
	send_command(guest, "w%" G_GINT64_MODIFIER "x %u\n", at, value);
	return read_thread(guest);
}

pid_t attach_guest_write_in_main(AttachGuest *guest, uint64_t at, uint8_t value)
{
	send_command(guest, "m%" G_GINT64_MODIFIER "x %u\n", at, value);
	return read_thread(guest);
}

pid_t attach_guest_read(AttachGuest *guest, uint64_t at)
{
	send_command(guest, "r%" G_GINT64_MODIFIER "x\n", at);
	return read_thread(guest);
}

pid_t attach_guest_done(AttachGuest *guest, uint8_t *ret_value)
{
	g_autofree char *line = read_line(guest);
	unsigned value;
	int thread;

	g_assert_cmpint(sscanf(line, "done %d %u", &thread, &value), ==, 2);
	if (ret_value)
		*ret_value = (uint8_t)value;
	return thread;
}

uint8_t attach_guest_value(AttachGuest *guest, uint64_t at)
{
	pid_t thread = attach_guest_read(guest, at);
	uint8_t value;

	g_assert_cmpint(attach_guest_done(guest, &value), ==, thread);
	return value;
}

/* proc(5): "-1" for a thread that sleeps, and not in a system call. */
void attach_guest_wait_faulting(AttachGuest *guest, pid_t thread)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/task/%d/syscall",
						(int)attach_guest_pid(guest), (int)thread);
	gint64 deadline = g_get_monotonic_time() + TIMEOUT_US;

	for (;;) {
		g_autofree char *text = NULL;

		g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
		if (g_str_has_prefix(text, "-1 "))
			return;
		g_assert_cmpint(g_get_monotonic_time(), <, deadline);
		g_usleep(CHECK_US);
	}
}

guint attach_guest_signals(AttachGuest *guest)
{
	g_autofree char *line = NULL;
	guint n;

	send_command(guest, "s\n");
	line = read_line(guest);
	g_assert_cmpint(sscanf(line, "signals %u", &n), ==, 1);
	return n;
}

guint attach_guest_files(AttachGuest *guest)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/fd", (int)attach_guest_pid(guest));
	g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
	guint n = 0;

	while (g_dir_read_name(dir))
		n++;
	return n;
}

void attach_guest_leave_poll(AttachGuest *guest)
{
	g_autofree char *line = NULL;

	send_command(guest, "l\n");
	line = read_line(guest);
	g_assert_cmpstr(line, ==, "leaving");
}
