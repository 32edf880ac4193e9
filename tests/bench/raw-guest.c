/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The kernel's ceiling: a bare loop continues the faults of a mapping at once. The data is in
 * memory. */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/bench/raw-memory.h"
#include "tests/bench/raw.h"

#define PAGE	    4096
#define BATCH	    64
#define THREADS_MAX 8

struct RawGuest {
	RawMemory memory;
	uint8_t *map; /* the second mapping, with the userfaultfd */
	int uffd;
	int stop_fd;
	guint spin_us;	 /* constant */
	gint stop;	 /* atomic */
	guint n_threads; /* constant */
	GThread *threads[THREADS_MAX];
};

static gboolean continue_some(RawGuest *guest)
{
	struct uffd_msg msgs[BATCH];
	ssize_t got = read(guest->uffd, msgs, sizeof(msgs) / guest->n_threads);

	for (gsize i = 0; got > 0 && i < (gsize)got / sizeof(msgs[0]); i++) {
		struct uffdio_continue go = {
			.range = {.start = msgs[i].arg.pagefault.address & ~(PAGE - 1ull),
				  .len = PAGE},
		};

		if (ioctl(guest->uffd, UFFDIO_CONTINUE, &go) < 0)
			g_error("UFFDIO_CONTINUE: %s", g_strerror(errno));
	}
	return got > 0;
}

/* Like the engine, polls for spin_us after the last fault, and then sleeps. */
static gpointer continue_thread(gpointer opaque)
{
	RawGuest *guest = opaque;
	uint64_t busy = raw_now_ns();
	struct pollfd fds[] = {{.fd = guest->uffd, .events = POLLIN},
			       {.fd = guest->stop_fd, .events = POLLIN}};

	while (!g_atomic_int_get(&guest->stop)) {
		gboolean worked = continue_some(guest);
		uint64_t now = raw_now_ns();

		if (worked)
			busy = now;
		else if (now - busy > guest->spin_us * 1000ull)
			poll(fds, G_N_ELEMENTS(fds), -1);
		else
			sched_yield();
	}
	return NULL;
}

static gboolean set_up(RawGuest *guest, uint64_t size, GError **error)
{
	void *map;

	if (!raw_memory_init(&guest->memory, size, TRUE, error))
		return FALSE;
	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, guest->memory.fd, 0);
	if (map == MAP_FAILED)
		return raw_errno("mmap", error);
	guest->map = map;
	guest->uffd = raw_minor_uffd(guest->map, size, error);
	if (guest->uffd < 0)
		return FALSE;
	guest->stop_fd = eventfd(0, EFD_CLOEXEC);
	return guest->stop_fd >= 0 || raw_errno("eventfd", error);
}

RawGuest *raw_guest_new(uint64_t n_pages, guint n_threads, guint spin_us, GError **error)
{
	g_autoptr(RawGuest) guest = g_new0(RawGuest, 1);

	*guest = (RawGuest){.memory = RAW_MEMORY_INIT,
			    .uffd = -1,
			    .stop_fd = -1,
			    .spin_us = spin_us,
			    .n_threads = n_threads};
	g_assert(n_threads >= 1 && n_threads <= THREADS_MAX);
	if (!set_up(guest, n_pages * PAGE, error))
		return NULL;
	for (guint i = 0; i < n_threads; i++)
		guest->threads[i] = g_thread_new("continue", continue_thread, guest);
	return g_steal_pointer(&guest);
}

const uint8_t *raw_guest_map(const RawGuest *guest)
{
	return guest->map;
}

void raw_guest_free(RawGuest *guest)
{
	if (!guest)
		return;
	g_atomic_int_set(&guest->stop, TRUE);
	if (guest->stop_fd >= 0)
		eventfd_write(guest->stop_fd, 1);
	for (guint i = 0; i < THREADS_MAX; i++)
		if (guest->threads[i])
			g_thread_join(guest->threads[i]);
	if (guest->uffd >= 0)
		close(guest->uffd);
	if (guest->stop_fd >= 0)
		close(guest->stop_fd);
	if (guest->map)
		munmap(guest->map, guest->memory.size);
	raw_memory_clear(&guest->memory);
	g_free(guest);
}
