/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The agent library, its client and the `agent:` kind, with a real userfaultfd and the test guest.
 * Where the kernel refuses userfaultfd, the tests of faults are skipped, and print that.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <gio/gio.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest/agent-proto.h"
#include "guest/guest.h"
#include "tests/guest/testguest.h"

#define PAGE	4096
#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */

static const TestGuestConfig small = {
	.size = 4 << 20, .n_blocks = 2, .n_threads = 2, .pace_us = 200, .load_touches = 4};

static TestGuest *new_guest(gboolean start, gboolean paused)
{
	g_autoptr(GError) error = NULL;
	TestGuestConfig config = small;
	TestGuest *guest;

	config.paused = paused;
	guest = testguest_new(&config, &error);
	assert_null(error);
	assert_non_null(guest);
	if (start)
		testguest_start(guest);
	return guest;
}

static PrGuest *attach(TestGuest *guest)
{
	g_autoptr(GError) error = NULL;
	PrGuest *engine = pr_guest_open(testguest_spec(guest), NULL, TIMEOUT, &error);

	if (error)
		print_error("%s\n", error->message);
	assert_null(error);
	return engine;
}

static const PrGuestBlock *prepare(PrGuest *engine, guint *ret_n)
{
	g_autoptr(GError) error = NULL;
	const PrGuestBlock *blocks = engine->ops->prepare(engine, PR_GUEST_SOURCE, ret_n, &error);

	assert_null(error);
	assert_non_null(blocks);
	return blocks;
}

static int fault_on_or_skip(PrGuest *engine)
{
	g_autoptr(GError) error = NULL;
	int uffd = engine->ops->uffd_enable(engine, &error);

	if (g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION)) {
		print_message("skipped: %s\n", error->message);
		skip();
	}
	assert_null(error);
	assert_true(uffd >= 0);
	return uffd;
}

static gboolean wait_until(gboolean (*done)(void *), void *opaque)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;

	while (!done(opaque)) {
		if (g_get_monotonic_time() > deadline)
			return FALSE;
		g_usleep(1000);
	}
	return TRUE;
}

/* Raw connections, for packets that a real engine never sends */

static int raw_connect(TestGuest *guest)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	struct timeval bound = {.tv_sec = TIMEOUT / 1000};

	g_strlcpy(addr.sun_path, testguest_socket(guest), sizeof(addr.sun_path));
	assert_int_equal(connect(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof(bound));
	return fd;
}

static void send_fds(int conn, const void *data, gsize len, int fd, guint n_fds)
{
	char control[CMSG_SPACE(16 * sizeof(int))] = {0};
	struct iovec iov = {.iov_base = (void *)data, .iov_len = len};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (n_fds) {
		struct cmsghdr *cmsg;

		msg.msg_control = control;
		msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
		cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		for (guint i = 0; i < n_fds; i++)
			((int *)CMSG_DATA(cmsg))[i] = fd;
	}
	assert_int_equal(sendmsg(conn, &msg, MSG_NOSIGNAL), len);
}

static void send_op(int conn, guint32 op, guint32 id)
{
	PrAgentRequest request = {
		.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = op, .id = id};

	send_fds(conn, &request, sizeof(request), -1, 0);
}

static gboolean recv_reply(int conn, PrAgentReply *reply)
{
	return recv(conn, reply, sizeof(*reply), 0) == sizeof(*reply);
}

static void assert_closed(int conn)
{
	char byte;

	assert_int_equal(recv(conn, &byte, 1, 0), 0);
}

static guint count_fds(void)
{
	g_autoptr(GDir) dir = g_dir_open("/proc/self/fd", 0, NULL);
	guint n = 0;

	while (g_dir_read_name(dir))
		n++;
	return n;
}

/* Tests */

static void regions_are_listed_with_their_memfds(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(TRUE, TRUE);
	g_autoptr(PrGuest) engine = attach(guest);
	const PrGuestBlock *blocks;
	guint8 first, second;
	guint n;

	blocks = prepare(engine, &n);
	assert_int_equal(n, 2);
	for (guint i = 0; i < n; i++) {
		g_autofree char *name = g_strdup_printf("ram%u", i);

		assert_string_equal(blocks[i].idstr, name);
		assert_int_equal(blocks[i].size, testguest_block_size(guest));
		assert_int_equal(blocks[i].page_size, PAGE);
		assert_ptr_equal((void *)(gsize)blocks[i].base, testguest_block_map(guest, i));
		assert_int_equal(pread(blocks[i].memfd, &first, 1, 3 * PAGE), 1);
		second = ((guint8 *)testguest_block_map(guest, i))[3 * PAGE];
		assert_int_equal(first, second);
	}
}

static void the_socket_is_private(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	struct stat st;

	assert_int_equal(stat(testguest_socket(guest), &st), 0);
	assert_int_equal(st.st_mode & 07777, 0600);
}

typedef struct Reader {
	const guint8 *address;
	atomic_int value; /* -1: not read yet */
} Reader;

static gpointer read_thread(gpointer data)
{
	Reader *reader = data;

	atomic_store(&reader->value, *(volatile const guint8 *)reader->address);
	return NULL;
}

static struct uffd_msg next_fault(int uffd)
{
	struct pollfd poll_fd = {.fd = uffd, .events = POLLIN};
	struct uffd_msg msg = {0};

	assert_int_equal(poll(&poll_fd, 1, TIMEOUT), 1);
	assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	assert_int_equal(msg.event, UFFD_EVENT_PAGEFAULT);
	return msg;
}

static void place_and_continue(int uffd, const PrGuestBlock *block, guint64 address, guint8 value)
{
	guint8 page[PAGE];
	struct uffdio_continue cont = {.range = {.start = address, .len = PAGE}};

	memset(page, value, sizeof(page));
	assert_int_equal(pwrite(block->memfd, page, PAGE, address - block->base), PAGE);
	assert_int_equal(ioctl(uffd, UFFDIO_CONTINUE, &cont), 0);
	assert_int_equal(cont.mapped, PAGE);
}

/* The engine sees a fault of the guest, puts the page into the memfd, and CONTINUE lets the guest
 * read it. */
static void a_fault_arrives_and_continue_resolves_it(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	guint n;
	const PrGuestBlock *blocks = prepare(engine, &n);
	int uffd = fault_on_or_skip(engine);
	Reader reader = {.value = -1};
	struct uffd_msg msg;
	GThread *thread;

	reader.address = (guint8 *)testguest_block_map(guest, 1) + 5 * PAGE + 17;
	thread = g_thread_new("reader", read_thread, &reader);
	msg = next_fault(uffd);
	assert_int_equal(msg.arg.pagefault.address & ~(guint64)(PAGE - 1),
			 blocks[1].base + 5 * PAGE);
	assert_int_equal(atomic_load(&reader.value), -1);
	place_and_continue(uffd, &blocks[1], blocks[1].base + 5 * PAGE, 0x5a);
	g_thread_join(thread);
	assert_int_equal(atomic_load(&reader.value), 0x5a);
	assert_true(engine->ops->uffd_disable(engine, &error));
	close(uffd);
}

/* Pages that were mapped before the fault mode must fault as well, as the engine has emptied the
 * memfd. */
static void stale_mappings_are_dropped(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(TRUE, TRUE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	guint n;
	const PrGuestBlock *blocks = prepare(engine, &n);
	Reader reader = {.value = -1};
	GThread *thread;
	int uffd;

	reader.address = (guint8 *)testguest_block_map(guest, 0) + 2 * PAGE;
	read_thread(&reader);
	atomic_store(&reader.value, -1);
	uffd = fault_on_or_skip(engine);
	assert_int_equal(fallocate(blocks[0].memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
				   blocks[0].size),
			 0);
	thread = g_thread_new("reader", read_thread, &reader);
	assert_int_equal(next_fault(uffd).arg.pagefault.address & ~(guint64)(PAGE - 1),
			 blocks[0].base + 2 * PAGE);
	place_and_continue(uffd, &blocks[0], blocks[0].base + 2 * PAGE, 7);
	g_thread_join(thread);
	assert_int_equal(atomic_load(&reader.value), 7);
	assert_true(engine->ops->uffd_disable(engine, &error));
	close(uffd);
}

static void fault_mode_off_wakes_all_threads(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	int uffd = fault_on_or_skip(engine);
	Reader reader = {.value = -1};
	GThread *thread;

	reader.address = testguest_block_map(guest, 0);
	thread = g_thread_new("reader", read_thread, &reader);
	next_fault(uffd);
	assert_int_equal(atomic_load(&reader.value), -1);
	assert_true(engine->ops->uffd_disable(engine, &error));
	g_thread_join(thread);
	assert_int_equal(atomic_load(&reader.value), 0);
	assert_true(engine->ops->uffd_disable(engine, &error));
	close(uffd);
}

/* The engine dies with a fault pending: the guest waits on, and the next engine gets the same
 * userfaultfd and resolves the fault. */
static void faults_outlive_the_engine(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	PrGuest *first = attach(guest);
	g_autoptr(PrGuest) second = NULL;
	g_autoptr(GError) error = NULL;
	Reader reader = {.value = -1};
	const PrGuestBlock *blocks;
	GThread *thread;
	guint n;
	int uffd = fault_on_or_skip(first);

	reader.address = testguest_block_map(guest, 0);
	thread = g_thread_new("reader", read_thread, &reader);
	next_fault(uffd);
	close(uffd);
	pr_guest_close(first);

	second = attach(guest);
	assert_int_equal(atomic_load(&reader.value), -1);
	blocks = prepare(second, &n);
	uffd = fault_on_or_skip(second);
	place_and_continue(uffd, &blocks[0], blocks[0].base, 9);
	g_thread_join(thread);
	assert_int_equal(atomic_load(&reader.value), 9);
	assert_true(second->ops->uffd_disable(second, &error));
	close(uffd);
}

static void the_state_memfd_outlives_the_engine(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	PrGuest *first = attach(guest);
	g_autoptr(PrGuest) second = NULL;
	g_autoptr(GError) error = NULL;
	char text[8] = {0};
	int memfd = memfd_create("test-state", MFD_CLOEXEC);
	int back;

	assert_int_equal(first->ops->fetch_state(first, &error), -1);
	assert_null(error);
	assert_int_equal(write(memfd, "bitmap", 6), 6);
	assert_true(first->ops->store_state_fd(first, memfd, &error));
	close(memfd);
	pr_guest_close(first);

	second = attach(guest);
	back = second->ops->fetch_state(second, &error);
	assert_true(back >= 0);
	assert_int_equal(pread(back, text, sizeof(text), 0), 6);
	assert_string_equal(text, "bitmap");
	close(back);
	assert_true(second->ops->store_state_fd(second, -1, &error));
	assert_int_equal(second->ops->fetch_state(second, &error), -1);
	assert_null(error);
}

static void a_second_engine_is_refused(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	guint n;

	assert_null(pr_guest_open(testguest_spec(guest), NULL, TIMEOUT, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED));
	assert_non_null(strstr(error->message, "another engine is attached"));
	assert_non_null(strstr(error->message, testguest_socket(guest)));
	prepare(engine, &n);
}

static void a_missing_socket_is_named(void **state)
{
	g_autoptr(GError) error = NULL;

	assert_null(pr_guest_open("agent:/nonexistent/agent.sock", NULL, TIMEOUT, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE));
	assert_non_null(strstr(error->message, "/nonexistent/agent.sock"));
	g_clear_error(&error);
	assert_null(pr_guest_open("teapot:x", NULL, TIMEOUT, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_SPEC));
}

/* Each of these ends its connection, and no descriptor stays open. */
static void garbage_closes_the_connection_only(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	guint before = count_fds();
	const PrAgentRequest wrong[] = {
		{.magic = 1, .version = PR_AGENT_VERSION, .op = PR_AGENT_HELLO},
		{.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = 0},
		{.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = PR_AGENT_N_OPS},
		/* before HELLO */
		{.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = PR_AGENT_REGIONS},
	};
	g_autoptr(PrGuest) engine = NULL;
	char big[8192] = {0};

	for (guint i = 0; i < G_N_ELEMENTS(wrong); i++) {
		int conn = raw_connect(guest);

		send_fds(conn, &wrong[i], sizeof(wrong[i]), -1, 0);
		assert_closed(conn);
		close(conn);
	}
	for (gsize len = 1; len <= sizeof(big); len *= 2) {
		int conn = raw_connect(guest);

		send_fds(conn, big, len, -1, 0);
		assert_closed(conn);
		close(conn);
	}
	for (guint n_fds = 1; n_fds <= 16; n_fds++) {
		PrAgentRequest hello = {
			.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = PR_AGENT_HELLO};
		int conn = raw_connect(guest);

		send_fds(conn, &hello, sizeof(hello), 0, n_fds);
		assert_closed(conn);
		close(conn);
	}
	assert_int_equal(count_fds(), before);
	engine = attach(guest);
}

static void garbage_after_hello_frees_the_place(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) engine = NULL;
	int conn = raw_connect(guest);
	PrAgentReply reply;

	send_op(conn, PR_AGENT_HELLO, 1);
	assert_true(recv_reply(conn, &reply));
	assert_int_equal(reply.status, PR_AGENT_OK);
	assert_true(reply.flags & PR_AGENT_FLAG_CALLBACKS);
	/* LOAD needs a memfd */
	send_op(conn, PR_AGENT_LOAD, 2);
	assert_closed(conn);
	close(conn);
	engine = attach(guest);
}

static void another_version_is_refused(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	PrAgentRequest hello = {
		.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION + 1, .op = PR_AGENT_HELLO};
	int conn = raw_connect(guest);
	PrAgentReply reply;

	send_fds(conn, &hello, sizeof(hello), -1, 0);
	assert_true(recv_reply(conn, &reply));
	assert_int_equal(reply.status, PR_AGENT_UNSUPPORTED);
	assert_non_null(strstr(reply.text, "version"));
	close(conn);
}

/* Connections that never send anything do not keep an engine out. */
static void silent_connections_do_not_keep_the_engine_out(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) engine = NULL;
	int conns[32];
	guint n;

	for (guint i = 0; i < G_N_ELEMENTS(conns); i++) {
		conns[i] = raw_connect(guest);
		/* To accept a new connection the agent closes an older one. */
		if (i >= 16)
			assert_closed(conns[i - 16]);
	}
	engine = attach(guest);
	prepare(engine, &n);
	assert_int_equal(n, 2);
	for (guint i = 0; i < G_N_ELEMENTS(conns); i++)
		close(conns[i]);
}

typedef struct Death {
	char *reason;
	atomic_int calls;
} Death;

static void on_died(const char *reason, void *opaque)
{
	Death *death = opaque;

	death->reason = g_strdup(reason);
	atomic_fetch_add(&death->calls, 1);
}

static gboolean has_died(void *opaque)
{
	return atomic_load(&((Death *)opaque)->calls) > 0;
}

static void the_guests_death_is_reported_once(void **state)
{
	TestGuest *guest = new_guest(TRUE, FALSE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	gboolean was_running;
	Death death = {0};

	engine->ops->on_death(engine, on_died, &death);
	testguest_free(guest);
	assert_true(wait_until(has_died, &death));
	assert_non_null(strstr(death.reason, "closed the connection"));
	assert_false(engine->ops->stop(engine, &was_running, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED));
	assert_int_equal(atomic_load(&death.calls), 1);
	g_free(death.reason);
}

static gboolean collect(const void *data, gsize len, void *opaque, GError **error)
{
	g_byte_array_append(opaque, data, len);
	return TRUE;
}

static GByteArray *save(PrGuest *engine)
{
	g_autoptr(GError) error = NULL;
	GByteArray *bytes = g_byte_array_new();

	engine->ops->save(engine, NULL, collect, bytes, &error);
	g_assert_no_error(error);
	assert_true(bytes->len > 0);
	return bytes;
}

static void stop_and_resume_keep_the_run_state(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(TRUE, FALSE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	gboolean was_running = FALSE;
	guint64 written;

	assert_true(engine->ops->resume(engine, &error));
	assert_true(engine->ops->stop(engine, &was_running, &error));
	assert_true(was_running);
	assert_false(testguest_running(guest));
	written = testguest_written(guest);
	g_byte_array_unref(save(engine));
	assert_int_equal(testguest_written(guest), written);
	assert_true(engine->ops->resume(engine, &error));
	assert_true(testguest_running(guest));
	assert_true(testguest_pause(guest, TIMEOUT));
	assert_true(engine->ops->stop(engine, &was_running, &error));
	assert_false(was_running);
	assert_true(engine->ops->resume(engine, &error));
	assert_false(testguest_running(guest));
}

static void a_running_guest_does_not_save(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(TRUE, FALSE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GByteArray) bytes = g_byte_array_new();
	g_autoptr(GError) error = NULL;

	assert_false(engine->ops->save(engine, NULL, collect, bytes, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED));
	assert_non_null(strstr(error->message, "save failed"));
}

static void copy_memory(TestGuest *from, TestGuest *to)
{
	g_autofree guint8 *page = g_malloc(PAGE);

	for (guint i = 0; i < testguest_n_blocks(from); i++) {
		for (guint64 at = 0; at < testguest_block_size(from); at += PAGE) {
			assert_int_equal(pread(testguest_block_memfd(from, i), page, PAGE, at),
					 PAGE);
			assert_int_equal(pwrite(testguest_block_memfd(to, i), page, PAGE, at),
					 PAGE);
		}
	}
}

static void load(PrGuest *engine, GByteArray *bytes)
{
	g_autoptr(GError) error = NULL;

	assert_true(engine->ops->load_begin(engine, &error));
	for (guint at = 0; at < bytes->len; at += 1000)
		assert_true(engine->ops->load_data(engine, bytes->data + at,
						   MIN(1000, bytes->len - at), &error));
	assert_true(engine->ops->load_end(engine, &error));
}

static gboolean has_verified(void *opaque)
{
	return testguest_verified(opaque) > 2000;
}

/* A whole migration by hand: stop, save, copy, load, run. */
static void a_guest_moves_step_by_step(void **state)
{
	g_autoptr(TestGuest) source = new_guest(TRUE, FALSE);
	g_autoptr(TestGuest) destination = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) from = attach(source);
	g_autoptr(PrGuest) to = attach(destination);
	g_autoptr(GByteArray) bytes = NULL;
	g_autoptr(GError) error = NULL;
	g_autofree char *difference = NULL;
	guint64 corrupt = 1;
	gboolean was_running;

	assert_true(wait_until(has_verified, source));
	assert_true(from->ops->stop(from, &was_running, &error));
	bytes = save(from);
	copy_memory(source, destination);
	assert_true(testguest_equal(source, destination, &difference));
	load(to, bytes);
	assert_true(testguest_loaded(destination));
	assert_false(testguest_running(destination));
	assert_true(to->ops->run(to, &error));
	assert_true(wait_until(has_verified, destination));
	assert_true(testguest_verify(destination, &corrupt));
	assert_int_equal(corrupt, 0);
	assert_int_equal(testguest_corrupt(destination), 0);
	assert_int_equal(testguest_corrupt(source), 0);
}

/* The test guest has to find a page that is wrong by one bit. */
static void one_wrong_bit_is_detected(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(TRUE, TRUE);
	g_autoptr(TestGuest) other = new_guest(TRUE, TRUE);
	g_autofree char *difference = NULL;
	guint8 byte;
	guint64 corrupt = 0;
	off_t at = 77 * PAGE + 99;

	assert_true(testguest_verify(guest, &corrupt));
	assert_int_equal(corrupt, 0);
	assert_int_equal(pread(testguest_block_memfd(guest, 1), &byte, 1, at), 1);
	byte ^= 4;
	assert_int_equal(pwrite(testguest_block_memfd(guest, 1), &byte, 1, at), 1);
	assert_true(testguest_verify(guest, &corrupt));
	assert_int_equal(corrupt, 1);
	assert_int_equal(testguest_corrupt(guest), 1);
	assert_false(testguest_equal(guest, other, &difference));
	assert_non_null(strstr(difference, "page 77"));
}

typedef struct Loading {
	PrGuest *engine;
	GByteArray *bytes;
	gboolean ok;
	GError *error;
} Loading;

static gpointer load_thread(gpointer data)
{
	Loading *loading = data;
	PrGuest *engine = loading->engine;

	loading->ok = engine->ops->load_begin(engine, &loading->error) &&
		      engine->ops->load_data(engine, loading->bytes->data, loading->bytes->len,
					     &loading->error) &&
		      engine->ops->load_end(engine, &loading->error);
	return NULL;
}

/* The load waits for a page that never comes. load_abort() ends the call in the engine, the agent
 * answers meanwhile, and UFFD_DISABLE ends the load in the guest. */
static void a_load_that_waits_for_a_page_can_be_aborted(void **state)
{
	g_autoptr(TestGuest) source = new_guest(TRUE, TRUE);
	g_autoptr(TestGuest) destination = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) from = attach(source);
	g_autoptr(PrGuest) to = attach(destination);
	g_autoptr(GByteArray) bytes = save(from);
	g_autoptr(GError) error = NULL;
	int uffd = fault_on_or_skip(to);
	Loading loading = {.engine = to, .bytes = bytes};
	GThread *thread = g_thread_new("load", load_thread, &loading);

	next_fault(uffd);
	assert_int_equal(to->ops->fetch_state(to, &error), -1);
	assert_null(error);
	to->ops->load_abort(to);
	g_thread_join(thread);
	assert_false(loading.ok);
	assert_true(g_error_matches(loading.error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	g_clear_error(&loading.error);
	/* The guest's load callback still runs. */
	assert_false(to->ops->run(to, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED));
	assert_non_null(strstr(error->message, "busy"));
	g_clear_error(&error);
	assert_true(to->ops->uffd_disable(to, &error));
	close(uffd);
}

/* Threads of the guest wait for pages, and both path and engine are gone. */
static void a_guest_that_waits_for_pages_can_be_freed(void **state)
{
	TestGuest *guest = new_guest(FALSE, FALSE);
	PrGuest *engine = attach(guest);
	int uffd = fault_on_or_skip(engine);

	testguest_resume(guest);
	next_fault(uffd);
	close(uffd);
	pr_guest_close(engine);
	assert_false(testguest_pause(guest, 50));
	testguest_free(guest);
}

static void a_foreign_state_is_refused(void **state)
{
	g_autoptr(TestGuest) guest = new_guest(FALSE, FALSE);
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;

	assert_true(engine->ops->load_begin(engine, &error));
	assert_true(engine->ops->load_data(engine, "nonsense", 8, &error));
	assert_false(engine->ops->load_end(engine, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED));
	assert_non_null(strstr(error->message, "load failed"));
	assert_false(testguest_loaded(guest));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(regions_are_listed_with_their_memfds),
		cmocka_unit_test(the_socket_is_private),
		cmocka_unit_test(a_fault_arrives_and_continue_resolves_it),
		cmocka_unit_test(stale_mappings_are_dropped),
		cmocka_unit_test(fault_mode_off_wakes_all_threads),
		cmocka_unit_test(faults_outlive_the_engine),
		cmocka_unit_test(the_state_memfd_outlives_the_engine),
		cmocka_unit_test(a_second_engine_is_refused),
		cmocka_unit_test(a_missing_socket_is_named),
		cmocka_unit_test(garbage_closes_the_connection_only),
		cmocka_unit_test(garbage_after_hello_frees_the_place),
		cmocka_unit_test(another_version_is_refused),
		cmocka_unit_test(silent_connections_do_not_keep_the_engine_out),
		cmocka_unit_test(the_guests_death_is_reported_once),
		cmocka_unit_test(stop_and_resume_keep_the_run_state),
		cmocka_unit_test(a_running_guest_does_not_save),
		cmocka_unit_test(a_guest_moves_step_by_step),
		cmocka_unit_test(one_wrong_bit_is_detected),
		cmocka_unit_test(a_load_that_waits_for_a_page_can_be_aborted),
		cmocka_unit_test(a_guest_that_waits_for_pages_can_be_freed),
		cmocka_unit_test(a_foreign_state_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
