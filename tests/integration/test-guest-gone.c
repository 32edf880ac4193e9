/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The destination's guest is a process of its own, and is killed while a thread waits for one of
 * its pages. The variable WORKLOAD has the path of the program.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "tests/integration/cases.h"

#define MIB	    (1024ull * 1024)
#define PAGE	    4096
#define PATIENCE_US (60 * G_USEC_PER_SEC)

typedef struct GuestProcess {
	char *dir, *socket, *spec;
	GSubprocess *process;
	pid_t pid;
} GuestProcess;

static gboolean wait_for(gboolean (*is_so)(void *opaque), void *opaque)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (!is_so(opaque) && g_get_monotonic_time() < deadline)
		g_usleep(1000); /* between two checks of the condition */
	return is_so(opaque);
}

/*
 * The socket file exists before the agent listens. The test must not connect to find out, as the
 * agent accepts only one engine.
 */
static gboolean listens(void *path)
{
	g_autofree char *text = NULL;

	if (!g_file_get_contents("/proc/net/unix", &text, NULL, NULL))
		return FALSE;
	g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
	for (char **line = lines; *line; line++)
		/* 00010000 is the flag of a listening socket. */
		if (g_str_has_suffix(*line, path) && strstr(*line, " 00010000 "))
			return TRUE;
	return FALSE;
}

static void die_with_parent(gpointer unused)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static void process_start(GuestProcess *victim)
{
	g_autoptr(GError) error = NULL;

	victim->dir = g_dir_make_tmp("guest-gone-XXXXXX", &error);
	g_assert_no_error(error);
	victim->socket = g_build_filename(victim->dir, "agent", NULL);
	victim->spec = g_strconcat("agent:", victim->socket, NULL);
	g_autoptr(GSubprocessLauncher) launcher =
		g_subprocess_launcher_new(G_SUBPROCESS_FLAGS_STDOUT_SILENCE);
	g_subprocess_launcher_set_child_setup(launcher, die_with_parent, NULL, NULL);
	victim->process = g_subprocess_launcher_spawn(launcher, &error, g_getenv("WORKLOAD"),
						      "--socket", victim->socket, "--size", "16M",
						      "--threads", "2", "--incoming", NULL);
	g_assert_no_error(error);
	victim->pid = (pid_t)atoi(g_subprocess_get_identifier(victim->process));
	g_assert_true(wait_for(listens, victim->socket));
}

static void process_clear(GuestProcess *victim)
{
	g_subprocess_force_exit(victim->process);
	g_subprocess_wait(victim->process, NULL, NULL);
	g_object_unref(victim->process);
	unlink(victim->socket);
	rmdir(victim->dir);
	g_free(victim->dir);
	g_free(victim->socket);
	g_free(victim->spec);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(GuestProcess, process_clear)

/* Replaces the destination's engine by one that serves this process. */
static void replace_destination_guest(Pair *pair, const GuestProcess *victim)
{
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GError) error = NULL;

	side_end_engine(&pair->destination);
	side_begin_engine_for(&pair->destination, victim->spec);
	pr_migration_incoming(pair->destination.engine, "tcp:127.0.0.1:0", NULL, &error);
	g_assert_no_error(error);
	pr_migration_query(pair->destination.engine, &info);
	g_free(pair->uri);
	pair->uri = g_strdup(((PrPathInfo *)g_ptr_array_index(info.paths, 0))->uri);
}

/*
 * A thread outside the guest that reads the guest's memory and waits for a page, as KVM's kworkers
 * do.
 */
typedef struct ForeignReader {
	pid_t guest;
	uint64_t at;
	Pair *pair;
	gint tid;  /* atomic */
	gint done; /* atomic */
	GThread *thread;
} ForeignReader;

static gpointer read_page(gpointer opaque)
{
	ForeignReader *reader = opaque;
	char byte;
	const struct iovec here = {&byte, 1}, there = {(void *)(uintptr_t)reader->at, 1};

	g_atomic_int_set(&reader->tid, gettid());
	(void)!process_vm_readv(reader->guest, &here, 1, &there, 1, 0);
	g_atomic_int_set(&reader->done, TRUE);
	return NULL;
}

/* Returns TRUE also if the read has ended already, with the page or with an error of the kernel. */
static gboolean waits_for_page(void *opaque)
{
	ForeignReader *reader = opaque;
	g_auto(PrMigrationInfo) info = {0};
	uint32_t tid = (uint32_t)g_atomic_int_get(&reader->tid);

	pr_migration_query(reader->pair->destination.engine, &info);
	for (guint i = 0; info.blocktime.threads && i < info.blocktime.threads->len; i++)
		if (g_array_index(info.blocktime.threads, PrThreadTime, i).tid == tid)
			return TRUE;
	return g_atomic_int_get(&reader->done) != 0;
}

static gboolean has_read(void *opaque)
{
	return g_atomic_int_get(&((ForeignReader *)opaque)->done) != 0;
}

static void reader_start(ForeignReader *reader, Pair *pair, const GuestProcess *victim)
{
	g_autoptr(GError) error = NULL;
	PrGuest *guest = pair->destination.adapter;
	guint n;
	const PrGuestBlock *blocks = guest->ops->prepare(guest, PR_GUEST_DESTINATION, &n, &error);

	g_assert_no_error(error);
	*reader = (ForeignReader){.guest = victim->pid,
				  .at = blocks[1].base + 1003 * PAGE, /* not a hole */
				  .pair = pair};
	reader->thread = g_thread_new("reader", read_page, reader);
	assert_true(wait_for(waits_for_page, reader));
	assert_false(has_read(reader));
}

/* The pull is slow and only loading has caused faults, so almost all pages are still missing. */
static void pause_midway(Pair *pair)
{
	g_autoptr(GError) error = NULL;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_migration_pause(pair->destination.engine, &error);
	g_assert_no_error(error);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
}

/* The waiting thread may be released before the engine has set its error. */
static gboolean destination_reports_that_the_guest_is_gone(void *opaque)
{
	Pair *pair = opaque;
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(pair->destination.engine, &info);
	return info.error_desc && strstr(info.error_desc, "the guest is gone");
}

static void a_thread_that_waits_for_a_page_of_a_killed_guest_is_released(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 16 * MIB, .bandwidth = 1, .paused = TRUE};
	g_auto(GuestProcess) victim = {0};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};
	ForeignReader reader;

	process_start(&victim);
	replace_destination_guest(pair, &victim);
	pause_midway(pair);
	reader_start(&reader, pair, &victim);
	kill(victim.pid, SIGKILL);
	/*
	 * A reader that is not released would wait until the engine ends. So the test ends here, as
	 * a join of that thread would never return.
	 */
	if (!wait_for(has_read, &reader))
		g_error("the engine holds the userfaultfd of a process that was killed");
	g_thread_join(reader.thread);
	assert_true(wait_for(destination_reports_that_the_guest_is_gone, pair));
	pr_migration_query(pair->destination.engine, &info);
	assert_int_equal(info.state, PR_STATE_POSTCOPY_PAUSED);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		OVER("tcp", a_thread_that_waits_for_a_page_of_a_killed_guest_is_released),
	};

	return RUN_CASES("guest-gone", tests);
}
