/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The agent library by itself: its socket, its regions, and huge pages. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <gio/gio.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest/agent-client.h"
#include "guest/guest.h"
#include "postroad/agent.h"
#include "tests/rigs/as-user.h"
#include "tests/rigs/huge-pool.h"

#define PAGE	4096
#define HUGE	(2u << 20)
#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26) /* from linux/memfd.h, which conflicts with libc's header */
#endif

static void a_live_socket_is_kept_and_a_stale_one_replaced(void **state)
{
	g_autofree char *dir = g_dir_make_tmp("test-agent-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(dir, "agent.sock", NULL);
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	PrAgent *first = pr_agent_new(NULL, NULL);
	PrAgent *second = pr_agent_new(NULL, NULL);
	int stale = socket(AF_UNIX, SOCK_SEQPACKET, 0);

	g_strlcpy(addr.sun_path, path, sizeof(addr.sun_path));
	assert_int_equal(bind(stale, (struct sockaddr *)&addr, sizeof(addr)), 0);
	close(stale);
	assert_int_equal(pr_agent_serve(first, path), 0);
	assert_int_equal(pr_agent_serve(first, path), -EALREADY);
	assert_int_equal(pr_agent_serve(second, path), -EADDRINUSE);
	pr_agent_free(first);
	assert_false(g_file_test(path, G_FILE_TEST_EXISTS));
	assert_true(g_file_set_contents(path, "precious", -1, NULL));
	assert_int_equal(pr_agent_serve(second, path), -EADDRINUSE);
	assert_true(g_file_test(path, G_FILE_TEST_IS_REGULAR));
	unlink(path);
	assert_int_equal(pr_agent_serve(second, path), 0);
	pr_agent_free(second);
	rmdir(dir);
}

typedef struct Place {
	char *dir, *path;
	int fd; /* the user of the process that serves the socket */
} Place;

static void place_init(Place *place)
{
	place->dir = g_dir_make_tmp("test-agent-XXXXXX", NULL);
	place->path = g_build_filename(place->dir, "agent.sock", NULL);
	place->fd = -1;
	assert_int_equal(chmod(place->dir, 0777), 0);
}

static void place_clear(Place *place)
{
	unlink(place->path);
	rmdir(place->dir);
	g_free(place->path);
	g_free(place->dir);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Place, place_clear)

static void open_as_other_user(void *opaque)
{
	Place *place = opaque;

	/* These are more connections than the agent has slots. It closes all of them. */
	for (guint i = 0; i < 20; i++) {
		g_autoptr(GError) error = NULL;

		assert_null(pr_agent_client_open(place->path, TIMEOUT, &error));
		assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION));
		assert_non_null(strstr(error->message, "an engine of user 65534 is not served: run "
						       "it as root"));
	}
}

static void engines_of_other_users_are_refused(void **state)
{
	PrAgent *agent = pr_agent_new(NULL, NULL);
	g_autoptr(GError) error = NULL;
	PrAgentClient *client;

	if (geteuid() != 0)
		skip();

	g_auto(Place) place;
	place_init(&place);
	assert_int_equal(pr_agent_serve(agent, place.path), 0);
	/* The mode of the socket file keeps other users out. The test widens it, as an
	 * administrator might. */
	assert_int_equal(chmod(place.path, 0666), 0);
	as_user(NOBODY, open_as_other_user, &place);
	client = pr_agent_client_open(place.path, TIMEOUT, &error);
	g_assert_no_error(error);
	pr_agent_client_free(client);
	pr_agent_free(agent);
}

static void serve_as_impostor(void *opaque)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	Place *place = opaque;

	g_strlcpy(addr.sun_path, place->path, sizeof(addr.sun_path));
	place->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(place->fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
	assert_int_equal(chmod(place->path, 0666), 0);
	assert_int_equal(listen(place->fd, 1), 0);
}

static void open_as_other(void *opaque)
{
	Place *place = opaque;
	g_autoptr(GError) error = NULL;

	assert_null(pr_agent_client_open(place->path, TIMEOUT, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION));
	assert_non_null(
		strstr(error->message, "served by user 65534, this engine is user 65533's"));
}

static void an_agent_of_another_user_is_refused(void **state)
{
	if (geteuid() != 0)
		skip();

	g_auto(Place) place;
	place_init(&place);
	as_user(NOBODY, serve_as_impostor, &place);
	as_user(NOBODY - 1, open_as_other, &place);
	close(place.fd);
}

static void regions_are_checked(void **state)
{
	PrAgent *agent = pr_agent_new(NULL, NULL);
	int memfd = memfd_create("test", MFD_CLOEXEC);
	char *base = mmap(NULL, 65 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	PrAgentRegion region = {.idstr = "ram", .base = base, .size = PAGE, .memfd = memfd};
	g_autofree char *long_name = g_strnfill(PR_AGENT_IDSTR_MAX + 1, 'x');

	assert_int_equal(pr_agent_add_region(agent, &region), 0);
	assert_int_equal(pr_agent_add_region(agent, &region), -EEXIST);
	region.base = base + PAGE + 1;
	assert_int_equal(pr_agent_add_region(agent, &region), -EINVAL);
	region.base = base + PAGE;
	region.size = PAGE + 1;
	assert_int_equal(pr_agent_add_region(agent, &region), -EINVAL);
	region.size = PAGE;
	region.idstr = long_name;
	assert_int_equal(pr_agent_add_region(agent, &region), -EINVAL);
	region.idstr = "ram";
	for (guint i = 1; i < PR_AGENT_REGIONS_MAX; i++) {
		region.base = base + i * PAGE;
		assert_int_equal(pr_agent_add_region(agent, &region), 0);
	}
	region.base = base + PR_AGENT_REGIONS_MAX * PAGE;
	assert_int_equal(pr_agent_add_region(agent, &region), -ENOSPC);
	assert_int_equal(pr_agent_remove_regions(agent, base + PAGE + 5, PAGE), 2);
	assert_int_equal(pr_agent_add_region(agent, &region), 0);
	pr_agent_free(agent);
	munmap(base, 65 * PAGE);
	close(memfd);
}

/* The error names the options for such an agent, with the path of its socket and nothing else. */
static void an_agent_without_callbacks_is_refused_by_the_path_of_its_socket(void **state)
{
	g_autofree char *dir = g_dir_make_tmp("test-agent-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(dir, "agent.sock", NULL);
	g_autofree char *spec = g_strconcat("agent:", path, NULL);
	g_autofree char *expected =
		g_strdup_printf("agent %s: offers memory only; if this is a QEMU, use "
				"qemu:qmp=PATH,agent=%s",
				path, path);
	PrAgent *agent = pr_agent_new(NULL, NULL);
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GError) error = NULL;
	guint n;

	assert_int_equal(pr_agent_serve(agent, path), 0);
	guest = pr_guest_open(spec, NULL, TIMEOUT, &error);
	assert_non_null(guest);
	assert_null(guest->ops->prepare(guest, PR_GUEST_SOURCE, &n, &error));
	assert_string_equal(error->message, expected);
	pr_agent_free(agent);
	rmdir(dir);
}

/*
 * Without free descriptors the agent waits instead of spinning. It accepts connections again later.
 */
static void an_agent_without_descriptors_goes_on_later(void **state)
{
	g_autofree char *dir = g_dir_make_tmp("test-agent-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(dir, "agent.sock", NULL);
	PrAgent *agent = pr_agent_new(NULL, NULL);
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	struct rlimit old, low;
	g_autoptr(PrAgentClient) client = NULL;
	g_autoptr(GError) error = NULL;
	int conn = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	assert_int_equal(pr_agent_serve(agent, path), 0);
	g_strlcpy(addr.sun_path, path, sizeof(addr.sun_path));
	getrlimit(RLIMIT_NOFILE, &old);
	low = old;
	low.rlim_cur = conn + 1;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
	assert_int_equal(connect(conn, (struct sockaddr *)&addr, sizeof(addr)), 0);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
	close(conn);
	client = pr_agent_client_open(path, TIMEOUT, &error);
	assert_null(error);
	assert_non_null(client);
	pr_agent_free(agent);
	rmdir(dir);
}

typedef struct Reader {
	const volatile guint8 *address;
	guint8 value;
} Reader;

static gpointer read_thread(gpointer data)
{
	Reader *reader = data;

	reader->value = *reader->address;
	return NULL;
}

static void resolve_huge_fault(int uffd, const PrGuestBlock *block, guint8 value)
{
	struct uffdio_continue cont = {.range = {.start = block->base, .len = HUGE}};
	struct pollfd poll_fd = {.fd = uffd, .events = POLLIN};
	struct uffd_msg msg;
	guint8 *alias;

	assert_int_equal(poll(&poll_fd, 1, TIMEOUT), 1);
	assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	assert_int_equal(msg.event, UFFD_EVENT_PAGEFAULT);
	alias = mmap(NULL, HUGE, PROT_READ | PROT_WRITE, MAP_SHARED, block->memfd, 0);
	assert_ptr_not_equal(alias, MAP_FAILED);
	alias[5] = value;
	munmap(alias, HUGE);
	assert_int_equal(ioctl(uffd, UFFDIO_CONTINUE, &cont), 0);
}

/* A memfd of huge pages: the agent reports its page size, and one CONTINUE resolves a huge page. */
static void huge_pages_are_served(void **state)
{
	huge_pool_use();
	int memfd = memfd_create("test", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
	g_autofree char *dir = g_dir_make_tmp("test-agent-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(dir, "agent.sock", NULL);
	PrAgentRegion region = {.idstr = "huge", .size = HUGE, .memfd = memfd};
	PrAgent *agent = pr_agent_new(NULL, NULL);
	g_autoptr(PrAgentClient) client = NULL;
	g_autoptr(GArray) blocks = NULL;
	g_autoptr(GError) error = NULL;
	Reader reader = {0};
	GThread *thread;
	int uffd;

	if (memfd >= 0 && ftruncate(memfd, HUGE) == 0)
		region.base = mmap(NULL, HUGE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (!region.base || region.base == MAP_FAILED) {
		pr_agent_free(agent);
		rmdir(dir);
		/* skip() does not return. */
		g_clear_pointer(&dir, g_free);
		g_clear_pointer(&path, g_free);
		print_message("skipped: no huge page is free (vm.nr_hugepages)\n");
		skip();
	}
	assert_int_equal(pr_agent_add_region(agent, &region), 0);
	assert_int_equal(pr_agent_serve(agent, path), 0);
	client = pr_agent_client_open(path, TIMEOUT, &error);
	assert_null(error);
	blocks = pr_agent_client_regions(client, &error);
	assert_int_equal(g_array_index(blocks, PrGuestBlock, 0).page_size, HUGE);
	uffd = pr_agent_client_uffd_enable(client, &error);
	assert_null(error);
	reader.address = (guint8 *)region.base + 5;
	thread = g_thread_new("reader", read_thread, &reader);
	resolve_huge_fault(uffd, &g_array_index(blocks, PrGuestBlock, 0), 42);
	g_thread_join(thread);
	assert_int_equal(reader.value, 42);
	assert_true(pr_agent_client_uffd_disable(client, &error));
	close(uffd);
	pr_agent_free(agent);
	munmap(region.base, HUGE);
	close(memfd);
	rmdir(dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_live_socket_is_kept_and_a_stale_one_replaced),
		cmocka_unit_test(engines_of_other_users_are_refused),
		cmocka_unit_test(an_agent_of_another_user_is_refused),
		cmocka_unit_test(regions_are_checked),
		cmocka_unit_test(an_agent_without_callbacks_is_refused_by_the_path_of_its_socket),
		cmocka_unit_test(an_agent_without_descriptors_goes_on_later),
		cmocka_unit_test(huge_pages_are_served),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
