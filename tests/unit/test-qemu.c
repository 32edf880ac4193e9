/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The `qemu:` kind with a real QEMU that runs its firmware only: which QEMUs prepare() accepts, and
 * a migration step by step. With the preload agent, and (as root) with a helper that attaches.
 * Skipped without qemu-system-x86_64. POSTROAD_AGENT_LIBRARY: the path of the agent library.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <gio/gio.h>
#include <glib/gstdio.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest/guest.h"
#include "tests/rigs/guard.h"

#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */
#define SPEC	"qemu:qmp=%s/%s.qmp,agent=%s/%s.agent"
#define ATTACH	"qemu:qmp=%s/%s.qmp"

#define RAM                                                                                        \
	"-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-machine",                    \
		"q35,memory-backend=mem", "-m", "64M"

typedef struct Fixture {
	char *dir;
	GPtrArray *qemus;    /* GSubprocess */
	const char *wrapper; /* a program that executes QEMU; NULL: none */
	gboolean attached;   /* without the agent */
	gboolean daemon;     /* qemus has guards, which end their QEMUs (guard.h) */
} Fixture;

static char *path_of(Fixture *fix, const char *name, const char *suffix)
{
	g_autofree char *file = g_strconcat(name, suffix, NULL);

	return g_build_filename(fix->dir, file, NULL);
}

static gboolean socket_answers(const char *path, int type)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	gboolean ok;

	g_strlcpy(addr.sun_path, path, sizeof(addr.sun_path));
	ok = connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0;
	close(fd);
	return ok;
}

static void wait_for_socket(const char *path, int type)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;

	while (!socket_answers(path, type)) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(2000);
	}
}

/* If the test is killed, so is its QEMU. */
static void die_with_parent(gpointer data)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

/* extra ends with NULL. */
static GSubprocess *start_qemu(Fixture *fix, const char *name, gboolean preload,
			       const char *const *extra)
{
	g_autoptr(GSubprocessLauncher) launcher =
		g_subprocess_launcher_new(G_SUBPROCESS_FLAGS_STDERR_SILENCE);
	g_autofree char *agent = path_of(fix, name, ".agent");
	g_autofree char *qmp = path_of(fix, name, ".qmp");
	g_autofree char *qmp_option = g_strdup_printf("unix:%s,server=on,wait=off", qmp);
	g_autoptr(GPtrArray) argv = g_ptr_array_new();
	g_autoptr(GError) error = NULL;
	const char *const fixed[] = {
		"qemu-system-x86_64", "-accel", "kvm",	    "-accel", "tcg", "-display", "none",
		"-nodefaults",	      "-qmp",	qmp_option, NULL};
	GSubprocess *qemu;

	preload = preload && !fix->attached;
	g_subprocess_launcher_set_child_setup(launcher,
					      fix->daemon ? guard_daemons : die_with_parent,
					      GINT_TO_POINTER(getpid()), NULL);
	if (fix->wrapper)
		g_ptr_array_add(argv, (void *)fix->wrapper);
	for (guint i = 0; fixed[i]; i++)
		g_ptr_array_add(argv, (void *)fixed[i]);
	for (guint i = 0; extra[i]; i++)
		g_ptr_array_add(argv, (void *)extra[i]);
	g_ptr_array_add(argv, NULL);
	if (preload) {
		g_subprocess_launcher_setenv(launcher, "LD_PRELOAD",
					     g_getenv("POSTROAD_AGENT_LIBRARY"), TRUE);
		g_subprocess_launcher_setenv(launcher, "POSTROAD_AGENT", agent, TRUE);
	}
	qemu = g_subprocess_launcher_spawnv(launcher, (const char *const *)argv->pdata, &error);
	assert_null(error);
	g_ptr_array_add(fix->qemus, qemu);
	/* QEMU serves one QMP client at a time, so this probe disconnects at once. */
	wait_for_socket(qmp, SOCK_STREAM);
	if (preload)
		wait_for_socket(agent, SOCK_SEQPACKET);
	return qemu;
}

static PrGuest *try_attach(Fixture *fix, const char *name, GError **error)
{
	g_autofree char *spec = fix->attached
					? g_strdup_printf(ATTACH, fix->dir, name)
					: g_strdup_printf(SPEC, fix->dir, name, fix->dir, name);

	if (fix->attached && geteuid() != 0)
		skip();
	return pr_guest_open(spec, NULL, TIMEOUT, error);
}

static PrGuest *attach(Fixture *fix, const char *name)
{
	g_autoptr(GError) error = NULL;
	PrGuest *guest = try_attach(fix, name, &error);

	if (error)
		print_error("%s\n", error->message);
	assert_null(error);
	return guest;
}

static const PrGuestBlock *prepare(PrGuest *guest, PrGuestRole role, guint *ret_n)
{
	g_autoptr(GError) error = NULL;
	const PrGuestBlock *blocks = guest->ops->prepare(guest, role, ret_n, &error);

	if (error)
		print_error("%s\n", error->message);
	assert_non_null(blocks);
	return blocks;
}

static void assert_refused(PrGuest *guest, PrGuestRole role, const char *words)
{
	g_autoptr(GError) error = NULL;
	guint n;

	assert_null(guest->ops->prepare(guest, role, &n, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED));
	if (!strstr(error->message, words))
		print_error("expected '%s' in: %s\n", words, error->message);
	assert_non_null(strstr(error->message, words));
}

static int set_up(void **state)
{
	Fixture *fix = g_new0(Fixture, 1);

	fix->attached = *state != NULL;
	fix->dir = g_dir_make_tmp("test-qemu-XXXXXX", NULL);
	fix->qemus = g_ptr_array_new_with_free_func(g_object_unref);
	*state = fix;
	return fix->dir ? 0 : -1;
}

static int tear_down(void **state)
{
	Fixture *fix = *state;
	g_autoptr(GDir) dir = NULL;
	const char *name;

	for (guint i = 0; i < fix->qemus->len; i++) {
		if (fix->daemon)
			g_subprocess_send_signal(fix->qemus->pdata[i], SIGTERM);
		else
			g_subprocess_force_exit(fix->qemus->pdata[i]);
		g_subprocess_wait(fix->qemus->pdata[i], NULL, NULL);
	}
	g_ptr_array_unref(fix->qemus);
	dir = g_dir_open(fix->dir, 0, NULL);
	while ((name = g_dir_read_name(dir))) {
		g_autofree char *path = g_build_filename(fix->dir, name, NULL);

		g_unlink(path);
	}
	g_rmdir(fix->dir);
	g_free(fix->dir);
	g_free(fix);
	return 0;
}

/* Tests */

static void the_ram_is_found(void **state)
{
	const char *const args[] = {RAM, "-S", NULL};
	g_autoptr(PrGuest) guest = NULL;
	const PrGuestBlock *blocks;
	guint n;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	blocks = prepare(guest, PR_GUEST_SOURCE, &n);
	assert_int_equal(n, 1);
	assert_string_equal(blocks[0].idstr, "mem");
	assert_int_equal(blocks[0].size, 64 << 20);
	assert_int_equal(blocks[0].page_size, 4096);
	assert_int_equal(lseek(blocks[0].memfd, 0, SEEK_END), 64 << 20);
}

/* Two nodes of the same size, and one backend that the machine does not use: each block finds its
 * own memfd, as the guest's memory shows. */
static void numa_nodes_of_one_size_are_distinguished(void **state)
{
	const char *const args[] = {"-machine", "q35",
				    "-m",	"64M",
				    "-object",	"memory-backend-memfd,id=spare,size=32M,share=on",
				    "-object",	"memory-backend-memfd,id=m1,size=32M,share=on",
				    "-object",	"memory-backend-memfd,id=m0,size=32M,share=on",
				    "-numa",	"node,nodeid=0,memdev=m0",
				    "-numa",	"node,nodeid=1,memdev=m1",
				    NULL};
	g_autoptr(PrGuest) guest = NULL;
	gint64 deadline;
	const PrGuestBlock *blocks, *low = NULL;
	guint8 bda[2] = {0};
	guint n;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	blocks = prepare(guest, PR_GUEST_SOURCE, &n);
	deadline = g_get_monotonic_time() + 60 * G_TIME_SPAN_SECOND;
	assert_int_equal(n, 2);
	assert_int_not_equal(blocks[0].base, blocks[1].base);
	for (guint i = 0; i < n; i++) {
		if (g_str_has_suffix(blocks[i].idstr, "m0"))
			low = &blocks[i];
		else
			assert_true(g_str_has_suffix(blocks[i].idstr, "m1"));
	}
	assert_non_null(low);
	/* The firmware writes the size of low memory, 639 KiB, at 0x413: only node 0 has it. */
	while (bda[0] + 256 * bda[1] != 639) {
		assert_true(g_get_monotonic_time() < deadline);
		assert_int_equal(pread(low->memfd, bda, 2, 0x413), 2);
		g_usleep(2000);
	}
}

static void private_ram_is_refused(void **state)
{
	const char *const args[] = {"-machine", "q35",
				    "-m",	"64M",
				    "-object",	"memory-backend-memfd,id=dimm,size=64M,share=on",
				    "-S",	NULL};
	g_autoptr(PrGuest) guest = NULL;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	assert_refused(guest, PR_GUEST_SOURCE, "memory-backend-memfd,id=pc.ram,size=64M,share=on");
}

static void shared_ram_of_a_file_is_refused(void **state)
{
	Fixture *fix = *state;
	/* Not in /tmp, which is often in memory: a helper accepts a file there. */
	const char *backend = "memory-backend-file,id=mem,size=64M,share=on,mem-path=/var/tmp";
	const char *const args[] = {"-object",	backend,
				    "-machine", "q35,memory-backend=mem",
				    "-m",	"64M",
				    "-object",	"memory-backend-memfd,id=spare,size=16M,share=on",
				    "-S",	NULL};
	g_autoptr(PrGuest) guest = NULL;

	start_qemu(fix, "a", TRUE, args);
	guest = attach(fix, "a");
	assert_refused(guest, PR_GUEST_SOURCE,
		       fix->attached ? "is the file" : "shared memory of a memory-backend-file");
}

/* A helper finds a file in memory as it finds a memfd. */
static void ram_in_a_file_in_memory_is_found(void **state)
{
	g_autofree char *file = g_strdup_printf("/dev/shm/test-qemu-%d", (int)getpid());
	g_autofree char *backend =
		g_strdup_printf("memory-backend-file,id=mem,size=64M,share=on,mem-path=%s", file);
	const char *const args[] = {"-object", backend, "-machine", "q35,memory-backend=mem",
				    "-m",      "64M",	"-S",	    NULL};
	g_autoptr(PrGuest) guest = NULL;
	const PrGuestBlock *blocks;
	guint n;

	start_qemu(*state, "a", FALSE, args);
	guest = attach(*state, "a");
	blocks = prepare(guest, PR_GUEST_SOURCE, &n);
	g_unlink(file);
	assert_int_equal(blocks[0].size, 64 << 20);
}

/* libvirt makes the socket in its own process and passes it to QEMU. */
static void a_socket_that_another_process_made_needs_the_pid(void **state)
{
	Fixture *fix = *state;
	g_autofree char *path = path_of(fix, "a", ".qmp");
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	const char *argv[] = {"qemu-system-x86_64",
			      "-accel",
			      "tcg",
			      "-display",
			      "none",
			      "-nodefaults",
			      RAM,
			      "-S",
			      "-chardev",
			      "socket,id=qmp,fd=3,server=on,wait=off",
			      "-mon",
			      "chardev=qmp,mode=control",
			      NULL};
	g_autoptr(GSubprocessLauncher) launcher =
		g_subprocess_launcher_new(G_SUBPROCESS_FLAGS_STDERR_SILENCE);
	g_autofree char *words = g_strdup_printf("belongs to process %d (", getpid());
	g_autofree char *spec = NULL;
	g_autoptr(GError) error = NULL;
	g_autoptr(PrGuest) guest = NULL;
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	GSubprocess *qemu;

	g_strlcpy(addr.sun_path, path, sizeof(addr.sun_path));
	assert_int_equal(bind(listener, (struct sockaddr *)&addr, sizeof(addr)), 0);
	assert_int_equal(listen(listener, 1), 0);
	g_subprocess_launcher_set_child_setup(launcher, die_with_parent, NULL, NULL);
	g_subprocess_launcher_take_fd(launcher, listener, 3);
	qemu = g_subprocess_launcher_spawnv(launcher, argv, NULL);
	g_ptr_array_add(fix->qemus, qemu);
	assert_null(try_attach(fix, "a", &error));
	assert_non_null(strstr(error->message, words));
	spec = g_strdup_printf(ATTACH ",pid=%s", fix->dir, "a", g_subprocess_get_identifier(qemu));
	g_clear_error(&error);
	guest = pr_guest_open(spec, NULL, TIMEOUT, &error);
	assert_null(error);
}

static void a_missing_agent_is_named(void **state)
{
	const char *const args[] = {RAM, "-S", NULL};
	g_autoptr(GError) error = NULL;

	start_qemu(*state, "a", FALSE, args);
	assert_null(try_attach(*state, "a", &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE));
	assert_non_null(strstr(error->message, "libpostroad-agent.so"));
}

static void the_agent_of_another_qemu_is_refused(void **state)
{
	Fixture *fix = *state;
	const char *const args[] = {RAM, "-S", NULL};
	const char *const other[] = {"-object",	 "memory-backend-memfd,id=mem,size=32M,share=on",
				     "-machine", "q35,memory-backend=mem",
				     "-m",	 "32M",
				     "-S",	 NULL};
	g_autofree char *spec = g_strdup_printf(SPEC, fix->dir, "a", fix->dir, "b");
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GError) error = NULL;

	start_qemu(fix, "a", TRUE, args);
	start_qemu(fix, "b", TRUE, other);
	guest = pr_guest_open(spec, NULL, TIMEOUT, &error);
	assert_null(error);
	assert_refused(guest, PR_GUEST_SOURCE, "is this the agent of this QEMU?");
}

static void roles_need_their_run_state(void **state)
{
	const char *const args[] = {RAM, "-S", NULL};
	const char *const incoming[] = {RAM, "-incoming", "defer", NULL};
	const char *const listening[] = {RAM, "-incoming", "tcp:127.0.0.1:0", NULL};
	g_autoptr(PrGuest) a = NULL;
	g_autoptr(PrGuest) b = NULL;
	g_autoptr(PrGuest) c = NULL;
	guint n;

	start_qemu(*state, "a", TRUE, args);
	start_qemu(*state, "b", TRUE, incoming);
	start_qemu(*state, "c", TRUE, listening);
	a = attach(*state, "a");
	b = attach(*state, "b");
	c = attach(*state, "c");
	assert_refused(a, PR_GUEST_DESTINATION, "-incoming defer");
	assert_refused(b, PR_GUEST_SOURCE, "can only be a destination");
	assert_refused(c, PR_GUEST_DESTINATION, "-incoming defer");
	prepare(b, PR_GUEST_DESTINATION, &n);
}

static void the_preload_library_is_not_inherited(void **state)
{
	Fixture *fix = *state;
	g_autofree char *script = g_build_filename(fix->dir, "print-env", NULL);
	g_autofree char *output = g_build_filename(fix->dir, "env", NULL);
	g_autofree char *text = g_strdup_printf("#!/bin/sh\nenv >%s.new\nmv %s.new %s\nexit 1\n",
						output, output, output);
	g_autofree char *netdev =
		g_strdup_printf("tap,id=n0,ifname=postroadtest0,script=%s,downscript=no", script);
	const char *argv[] = {"qemu-system-x86_64",
			      "-display",
			      "none",
			      "-nodefaults",
			      RAM,
			      "-S",
			      "-netdev",
			      netdev,
			      NULL};
	g_autoptr(GSubprocessLauncher) launcher =
		g_subprocess_launcher_new(G_SUBPROCESS_FLAGS_STDERR_SILENCE);
	g_autofree char *agent = path_of(fix, "a", ".agent");
	g_autofree char *env = NULL;
	g_autoptr(GSubprocess) qemu = NULL;

	assert_true(g_file_set_contents(script, text, -1, NULL));
	g_chmod(script, 0700);
	g_subprocess_launcher_setenv(launcher, "LD_PRELOAD", g_getenv("POSTROAD_AGENT_LIBRARY"),
				     TRUE);
	g_subprocess_launcher_setenv(launcher, "POSTROAD_AGENT", agent, TRUE);
	qemu = g_subprocess_launcher_spawnv(launcher, argv, NULL);
	assert_non_null(qemu);
	/* The script fails, so this QEMU ends by itself. */
	g_subprocess_wait(qemu, NULL, NULL);
	if (!g_file_get_contents(output, &env, NULL, NULL)) {
		print_message("skipped: no tap device can be made here\n");
		skip();
	}
	assert_non_null(strstr(env, "PATH="));
	assert_null(strstr(env, "POSTROAD_AGENT="));
	assert_null(strstr(env, "LD_PRELOAD="));
}

/* A daemon forks before it maps its RAM. The agent has to work in the child. */
static void a_daemon_is_served(void **state)
{
	Fixture *fix = *state;
	g_autofree char *pidfile = path_of(fix, "a", ".pid");
	const char *const args[] = {RAM, "-S", "-daemonize", "-pidfile", pidfile, NULL};
	g_autoptr(PrGuest) guest = NULL;
	g_autofree char *pid = NULL;
	GSubprocess *guard;
	guint n;

	fix->daemon = TRUE;
	guard = start_qemu(fix, "a", TRUE, args);
	assert_true(g_file_get_contents(pidfile, &pid, NULL, NULL));
	guest = attach(fix, "a");
	prepare(guest, PR_GUEST_SOURCE, &n);
	assert_int_equal(n, 1);
	/* The guard gets this signal when a test is killed. */
	g_subprocess_send_signal(guard, SIGTERM);
	g_subprocess_wait(guard, NULL, NULL);
	assert_int_equal(kill(atoi(pid), 0), -1);
	assert_int_equal(errno, ESRCH);
}

/* The preload variables reach QEMU through a program that executes it. */
static void a_wrapper_does_not_lose_the_agent(void **state)
{
	Fixture *fix = *state;
	const char *const args[] = {RAM, "-S", NULL};
	g_autoptr(PrGuest) guest = NULL;
	guint n;

	fix->wrapper = "nice";
	start_qemu(fix, "a", TRUE, args);
	guest = attach(fix, "a");
	prepare(guest, PR_GUEST_SOURCE, &n);
	assert_int_equal(n, 1);
}

/* Locked memory needs a madvise() of its own. */
static void locked_ram_takes_the_fault_mode(void **state)
{
	const char *const args[] = {RAM, "-S", "-overcommit", "mem-lock=on", NULL};
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GError) error = NULL;
	int uffd;
	guint n;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	prepare(guest, PR_GUEST_SOURCE, &n);
	uffd = guest->ops->uffd_enable(guest, &error);
	if (g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION))
		skip();
	assert_null(error);
	assert_true(uffd >= 0);
	close(uffd);
	assert_true(guest->ops->uffd_disable(guest, &error));
}

static gboolean collect(const void *data, gsize len, void *opaque, GError **error)
{
	g_byte_array_append(opaque, data, len);
	return TRUE;
}

static void copy_memory(const PrGuestBlock *from, const PrGuestBlock *to)
{
	g_autofree guint8 *chunk = g_malloc(1 << 20);

	assert_int_equal(from->size, to->size);
	for (guint64 at = 0; at < from->size; at += 1 << 20) {
		assert_int_equal(pread(from->memfd, chunk, 1 << 20, at), 1 << 20);
		assert_int_equal(pwrite(to->memfd, chunk, 1 << 20, at), 1 << 20);
	}
}

static void load_bytes(PrGuest *guest, GByteArray *bytes)
{
	g_autoptr(GError) error = NULL;

	assert_true(guest->ops->load_begin(guest, &error));
	assert_true(guest->ops->load_data(guest, bytes->data, bytes->len, &error));
	if (!guest->ops->load_end(guest, &error))
		print_error("%s\n", error->message);
	assert_null(error);
}

static gboolean is_running(PrGuest *guest)
{
	g_autoptr(GError) error = NULL;
	gboolean was_running = FALSE;

	assert_true(guest->ops->stop(guest, &was_running, &error));
	if (was_running)
		assert_true(guest->ops->resume(guest, &error));
	return was_running;
}

static void a_guest_moves_step_by_step(void **state)
{
	const char *const args[] = {RAM, "-device", "VGA", NULL};
	const char *const incoming[] = {RAM, "-device", "VGA", "-incoming", "defer", NULL};
	g_autoptr(GByteArray) bytes = g_byte_array_new();
	g_autoptr(PrGuest) from = NULL;
	g_autoptr(PrGuest) to = NULL;
	g_autoptr(GError) error = NULL;
	const PrGuestBlock *source, *destination;
	gboolean was_running = FALSE;
	guint n_source, n_destination;

	start_qemu(*state, "a", TRUE, args);
	start_qemu(*state, "b", TRUE, incoming);
	from = attach(*state, "a");
	to = attach(*state, "b");
	source = prepare(from, PR_GUEST_SOURCE, &n_source);
	destination = prepare(to, PR_GUEST_DESTINATION, &n_destination);
	assert_int_equal(n_source, n_destination);
	assert_string_equal(source[0].idstr, destination[0].idstr);
	assert_true(from->ops->stop(from, &was_running, &error));
	assert_true(was_running);
	assert_true(from->ops->save(from, NULL, collect, bytes, &error));
	assert_null(error);
	assert_true(bytes->len > 10000);
	/* The device state has no shared RAM. */
	assert_true(bytes->len < 32 << 20);
	copy_memory(source, destination);
	load_bytes(to, bytes);
	assert_false(is_running(to));
	assert_true(to->ops->run(to, &error));
	assert_true(is_running(to));
	/* The migration fails at the last moment. The source can resume, and try again. */
	assert_true(from->ops->resume(from, &error));
	assert_true(is_running(from));
	prepare(from, PR_GUEST_SOURCE, &n_source);
	assert_true(from->ops->stop(from, &was_running, &error));
	assert_true(from->ops->save(from, NULL, collect, bytes, &error));
	assert_null(error);
}

static gboolean refuse_data(const void *data, gsize len, void *opaque, GError **error)
{
	g_set_error(error, G_IO_ERROR, G_IO_ERROR_BROKEN_PIPE, "no more");
	return FALSE;
}

static void a_broken_save_resumes(void **state)
{
	const char *const args[] = {RAM, NULL};
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GByteArray) bytes = g_byte_array_new();
	g_autoptr(GCancellable) cancel = g_cancellable_new();
	g_autoptr(GError) error = NULL;
	gboolean was_running = FALSE;
	guint n;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	prepare(guest, PR_GUEST_SOURCE, &n);
	assert_true(guest->ops->stop(guest, &was_running, &error));
	assert_false(guest->ops->save(guest, NULL, refuse_data, NULL, &error));
	g_assert_error(error, G_IO_ERROR, G_IO_ERROR_BROKEN_PIPE);
	g_clear_error(&error);
	guest->ops->resume(guest, &error);
	g_assert_no_error(error);
	assert_true(is_running(guest));

	g_cancellable_cancel(cancel);
	assert_true(guest->ops->stop(guest, &was_running, &error));
	assert_false(guest->ops->save(guest, cancel, collect, bytes, &error));
	assert_true(g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	g_clear_error(&error);
	assert_true(guest->ops->resume(guest, &error));
	assert_true(is_running(guest));
	prepare(guest, PR_GUEST_SOURCE, &n);
}

static void a_paused_guest_stays_paused(void **state)
{
	const char *const args[] = {RAM, "-S", NULL};
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GError) error = NULL;
	gboolean was_running = TRUE;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	assert_true(guest->ops->stop(guest, &was_running, &error));
	assert_false(was_running);
	assert_true(guest->ops->resume(guest, &error));
	assert_false(is_running(guest));
}

typedef struct Loading {
	PrGuest *guest;
	GByteArray *bytes;
	gboolean ok;
	GError *error;
} Loading;

static gpointer load_thread(gpointer data)
{
	Loading *loading = data;
	PrGuest *guest = loading->guest;

	loading->ok = guest->ops->load_begin(guest, &loading->error) &&
		      guest->ops->load_data(guest, loading->bytes->data, loading->bytes->len,
					    &loading->error) &&
		      guest->ops->load_end(guest, &loading->error);
	return NULL;
}

/* The load gets only half of a device state, and waits until it is aborted. */
static void a_load_can_be_aborted(void **state)
{
	const char *const args[] = {RAM, "-incoming", "defer", NULL};
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GByteArray) bytes = g_byte_array_new();
	g_autoptr(GError) error = NULL;
	Loading loading = {.bytes = bytes};
	GThread *thread;
	guint n;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	prepare(guest, PR_GUEST_DESTINATION, &n);
	loading.guest = guest;
	assert_true(guest->ops->load_begin(guest, &error));
	assert_true(guest->ops->load_data(guest, "QEVM", 4, &error));
	guest->ops->load_abort(guest);
	assert_false(guest->ops->load_data(guest, "more", 4, &error));
	g_clear_error(&error);
	assert_false(guest->ops->load_end(guest, &error));
	assert_non_null(error);
	/* This QEMU can't load again. Another load fails instead of hanging. */
	thread = g_thread_new("load", load_thread, &loading);
	g_thread_join(thread);
	assert_false(loading.ok);
	assert_non_null(loading.error);
	g_clear_error(&loading.error);
}

static void garbage_instead_of_a_device_state_is_an_error(void **state)
{
	const char *const args[] = {RAM, "-incoming", "defer", NULL};
	g_autoptr(GByteArray) bytes = g_byte_array_new();
	Loading loading = {.bytes = bytes};
	g_autoptr(PrGuest) guest = NULL;
	guint n;

	start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	prepare(guest, PR_GUEST_DESTINATION, &n);
	g_byte_array_set_size(bytes, 100000);
	memset(bytes->data, 0x5a, bytes->len);
	loading.guest = guest;
	load_thread(&loading);
	assert_false(loading.ok);
	assert_int_equal(loading.error->domain, PR_GUEST_ERROR);
	g_clear_error(&loading.error);
}

typedef struct Death {
	GMutex lock;
	GCond cond;
	guint calls;  /* lock */
	char *reason; /* lock */
} Death;

static void on_died(const char *reason, void *opaque)
{
	Death *death = opaque;

	g_mutex_lock(&death->lock);
	death->reason = g_strdup(reason);
	death->calls++;
	g_cond_broadcast(&death->cond);
	g_mutex_unlock(&death->lock);
}

static void the_death_of_qemu_is_reported_at_once(void **state)
{
	const char *const args[] = {RAM, NULL};
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GError) error = NULL;
	GSubprocess *qemu;
	Death death = {0};
	gint64 deadline;
	gboolean was_running;

	qemu = start_qemu(*state, "a", TRUE, args);
	guest = attach(*state, "a");
	guest->ops->on_death(guest, on_died, &death);
	g_subprocess_send_signal(qemu, SIGKILL);
	deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;
	g_mutex_lock(&death.lock);
	while (!death.calls)
		assert_true(g_cond_wait_until(&death.cond, &death.lock, deadline));
	g_mutex_unlock(&death.lock);
	assert_false(guest->ops->stop(guest, &was_running, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED));
	g_clear_pointer(&guest, pr_guest_close);
	assert_int_equal(death.calls, 1);
	g_free(death.reason);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
#define ATTACHED(name)                                                                             \
	{                                                                                          \
#name "_attached", name, set_up, tear_down, "attached"                             \
	}

int main(void)
{
	g_autofree char *qemu = g_find_program_in_path("qemu-system-x86_64");
	const struct CMUnitTest tests[] = {
		TEST(the_ram_is_found),
		TEST(numa_nodes_of_one_size_are_distinguished),
		TEST(private_ram_is_refused),
		TEST(shared_ram_of_a_file_is_refused),
		TEST(a_missing_agent_is_named),
		TEST(the_agent_of_another_qemu_is_refused),
		TEST(roles_need_their_run_state),
		TEST(the_preload_library_is_not_inherited),
		TEST(a_daemon_is_served),
		TEST(a_wrapper_does_not_lose_the_agent),
		TEST(locked_ram_takes_the_fault_mode),
		TEST(a_guest_moves_step_by_step),
		TEST(a_broken_save_resumes),
		TEST(a_paused_guest_stays_paused),
		TEST(a_load_can_be_aborted),
		TEST(garbage_instead_of_a_device_state_is_an_error),
		TEST(the_death_of_qemu_is_reported_at_once),
		ATTACHED(the_ram_is_found),
		ATTACHED(numa_nodes_of_one_size_are_distinguished),
		ATTACHED(private_ram_is_refused),
		ATTACHED(shared_ram_of_a_file_is_refused),
		ATTACHED(ram_in_a_file_in_memory_is_found),
		ATTACHED(a_socket_that_another_process_made_needs_the_pid),
		ATTACHED(roles_need_their_run_state),
		ATTACHED(a_daemon_is_served),
		ATTACHED(a_wrapper_does_not_lose_the_agent),
		ATTACHED(locked_ram_takes_the_fault_mode),
		ATTACHED(a_guest_moves_step_by_step),
		ATTACHED(a_paused_guest_stays_paused),
		ATTACHED(the_death_of_qemu_is_reported_at_once),
	};

	if (!qemu || !g_getenv("POSTROAD_AGENT_LIBRARY")) {
		print_message("skipped: needs qemu-system-x86_64 and POSTROAD_AGENT_LIBRARY\n");
		return 77;
	}
	cmocka_set_test_filter(g_getenv("TEST_FILTER"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
