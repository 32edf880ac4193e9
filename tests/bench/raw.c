/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Floors without a network: copying and faults. */
#include "tests/bench/raw.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "tests/bench/raw-memory.h"

#define PAGE 4096

uint64_t raw_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

gboolean raw_errno(const char *what, GError **error)
{
	int number = errno;

	g_set_error(error, G_FILE_ERROR, g_file_error_from_errno(number), "%s: %s", what,
		    g_strerror(number));
	return FALSE;
}

gboolean raw_memory_init(RawMemory *memory, uint64_t size, gboolean filled, GError **error)
{
	*memory = (RawMemory){.fd = memfd_create("bench", MFD_CLOEXEC), .size = size};
	if (memory->fd < 0 || ftruncate(memory->fd, (off_t)size) < 0)
		return raw_errno("memfd", error);
	memory->at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd, 0);
	if (memory->at == MAP_FAILED) {
		memory->at = NULL;
		return raw_errno("mmap", error);
	}
	if (filled)
		memset(memory->at, 0x5a, size);
	return TRUE;
}

void raw_memory_clear(RawMemory *memory)
{
	if (memory->at)
		munmap(memory->at, memory->size);
	if (memory->fd >= 0)
		close(memory->fd);
	*memory = RAW_MEMORY_INIT;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

RawLatency raw_latency(uint64_t *samples, guint n)
{
	double sum = 0;

	qsort(samples, n, sizeof(*samples), compare);
	for (guint i = 0; i < n; i++)
		sum += samples[i];
	return (RawLatency){
		.n = n,
		.mean_us = sum / n / 1000,
		.p50_us = samples[n / 2] / 1000.0,
		.p99_us = samples[(uint64_t)n * 99 / 100] / 1000.0,
		.max_us = samples[n - 1] / 1000.0,
	};
}

gboolean raw_memcpy(uint64_t total, uint32_t chunk, double *ret_rate, GError **error)
{
	g_auto(RawMemory) from = RAW_MEMORY_INIT, to = RAW_MEMORY_INIT;
	uint64_t begin;

	if (!raw_memory_init(&from, total, TRUE, error) ||
	    !raw_memory_init(&to, total, FALSE, error))
		return FALSE;
	begin = raw_now_ns();
	for (uint64_t at = 0; at < total; at += chunk)
		memcpy(to.at + at, from.at + at, MIN(chunk, total - at));
	*ret_rate = total * 1e9 / (raw_now_ns() - begin);
	return TRUE;
}

typedef struct FaultHandler {
	int uffd, stop_fd;
	RawWait wait;
	gint stop; /* atomic */
} FaultHandler;

static void serve_faults(FaultHandler *handler)
{
	struct uffd_msg msg;

	while (read(handler->uffd, &msg, sizeof(msg)) == sizeof(msg)) {
		struct uffdio_continue go = {
			.range = {.start = msg.arg.pagefault.address & ~(PAGE - 1ull), .len = PAGE},
		};

		if (ioctl(handler->uffd, UFFDIO_CONTINUE, &go) < 0)
			g_error("UFFDIO_CONTINUE: %s", g_strerror(errno));
	}
}

static gpointer handler_thread(gpointer opaque)
{
	FaultHandler *handler = opaque;
	struct pollfd fds[] = {{.fd = handler->uffd, .events = POLLIN},
			       {.fd = handler->stop_fd, .events = POLLIN}};

	while (!g_atomic_int_get(&handler->stop)) {
		if (poll(fds, 2, handler->wait == RAW_SLEEP ? -1 : 0) > 0)
			serve_faults(handler);
	}
	return NULL;
}

int raw_minor_uffd(uint8_t *at, uint64_t size, GError **error)
{
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)at, .len = size},
		.mode = UFFDIO_REGISTER_MODE_MINOR,
	};
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 && ioctl(fd, UFFDIO_REGISTER, &reg) == 0)
		return fd;
	raw_errno("userfaultfd", error);
	if (fd >= 0)
		close(fd);
	return -1;
}

static void measure_touches(const uint8_t *at, uint64_t *samples, guint n)
{
	for (guint i = 0; i < n; i++) {
		uint64_t begin = raw_now_ns();

		(void)*(const volatile uint8_t *)(at + (uint64_t)i * PAGE);
		samples[i] = raw_now_ns() - begin;
	}
}

static gboolean run_faults(FaultHandler *handler, const uint8_t *at, uint64_t *samples, guint n,
			   GError **error)
{
	GThread *thread;

	handler->stop_fd = eventfd(0, EFD_CLOEXEC);
	if (handler->stop_fd < 0)
		return raw_errno("eventfd", error);
	thread = g_thread_new("faults", handler_thread, handler);
	measure_touches(at, samples, n);
	g_atomic_int_set(&handler->stop, 1);
	eventfd_write(handler->stop_fd, 1);
	g_thread_join(thread);
	close(handler->stop_fd);
	return TRUE;
}

gboolean raw_minor_fault(guint n, RawWait wait, RawLatency *ret, GError **error)
{
	g_autofree uint64_t *samples = g_new0(uint64_t, n);
	g_auto(RawMemory) memory = RAW_MEMORY_INIT;
	FaultHandler handler = {.wait = wait};
	uint64_t size = (uint64_t)n * PAGE;
	uint8_t *guest;
	gboolean ok;

	if (!raw_memory_init(&memory, size, TRUE, error))
		return FALSE;
	guest = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0);
	if (guest == MAP_FAILED)
		return raw_errno("mmap", error);
	handler.uffd = raw_minor_uffd(guest, size, error);
	ok = handler.uffd >= 0 && run_faults(&handler, guest, samples, n, error);
	if (handler.uffd >= 0)
		close(handler.uffd);
	munmap(guest, size);
	if (ok)
		*ret = raw_latency(samples, n);
	return ok;
}
