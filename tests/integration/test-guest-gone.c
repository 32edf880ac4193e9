/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The destination's guest is killed, in a process of its own (WORKLOAD names the program). */
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

typedef struct Stranger {
	char *dir, *socket, *spec;
	GSubprocess *process;
	pid_t pid;
} Stranger;

static gboolean wait_for(gboolean (*is_so)(void *opaque), void *opaque)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (!is_so(opaque) && g_get_monotonic_time() < deadline)
		g_usleep(1000); /* between two looks at the condition */
	return is_so(opaque);
}

/* The socket has a name before it listens; to connect would take the place of the engine. */
static gboolean listens(void *path)
{
	g_autofree char *text = NULL;

	if (!g_file_get_contents("/proc/net/unix", &text, NULL, NULL))
		return FALSE;
	g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
	for (char **line = lines; *line; line++)
		if (g_str_has_suffix(*line, path) && strstr(*line, " 00010000 ")) /* it listens */
			return TRUE;
	return FALSE;
}

static void die_with_parent(gpointer unused)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static void stranger_start(Stranger *stranger)
{
	g_autoptr(GError) error = NULL;

	stranger->dir = g_dir_make_tmp("guest-gone-XXXXXX", &error);
	g_assert_no_error(error);
	stranger->socket = g_build_filename(stranger->dir, "agent", NULL);
	stranger->spec = g_strconcat("agent:", stranger->socket, NULL);
	g_autoptr(GSubprocessLauncher) launcher =
		g_subprocess_launcher_new(G_SUBPROCESS_FLAGS_STDOUT_SILENCE);
	g_subprocess_launcher_set_child_setup(launcher, die_with_parent, NULL, NULL);
	stranger->process =
		g_subprocess_launcher_spawn(launcher, &error, g_getenv("WORKLOAD"), "--socket",
					    stranger->socket, "--size", "16M", "--threads", "2",
					    "--incoming", NULL);
	g_assert_no_error(error);
	stranger->pid = (pid_t)atoi(g_subprocess_get_identifier(stranger->process));
	g_assert_true(wait_for(listens, stranger->socket));
}

static void stranger_clear(Stranger *stranger)
{
	g_subprocess_force_exit(stranger->process);
	g_subprocess_wait(stranger->process, NULL, NULL);
	g_object_unref(stranger->process);
	unlink(stranger->socket);
	rmdir(stranger->dir);
	g_free(stranger->dir);
	g_free(stranger->socket);
	g_free(stranger->spec);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Stranger, stranger_clear)

/* The destination's engine serves the stranger from now on. */
static void give_to_destination(Pair *pair, const Stranger *stranger)
{
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GError) error = NULL;

	side_end_engine(&pair->destination);
	side_begin_engine_for(&pair->destination, stranger->spec);
	pr_migration_incoming(pair->destination.engine, "tcp:127.0.0.1:0", NULL, &error);
	g_assert_no_error(error);
	pr_migration_query(pair->destination.engine, &info);
	g_free(pair->uri);
	pair->uri = g_strdup(((PrPathInfo *)g_ptr_array_index(info.paths, 0))->uri);
}

/* As KVM's kworkers do: a thread of nobody's waits for a page of the guest, in the guest's address space. */
typedef struct Outsider {
	pid_t guest;
	uint64_t at;
	Pair *pair;
	gint tid;  /* atomic */
	gint done; /* atomic */
	GThread *thread;
} Outsider;

static gpointer look_at_page(gpointer opaque)
{
	Outsider *outsider = opaque;
	char byte;
	const struct iovec here = {&byte, 1}, there = {(void *)(uintptr_t)outsider->at, 1};

	g_atomic_int_set(&outsider->tid, gettid());
	(void)!process_vm_readv(outsider->guest, &here, 1, &there, 1, 0);
	g_atomic_int_set(&outsider->done, TRUE);
	return NULL;
}

/* Or has got it, or the kernel's refusal. */
static gboolean waits_for_page(void *opaque)
{
	Outsider *outsider = opaque;
	g_auto(PrMigrationInfo) info = {0};
	uint32_t tid = (uint32_t)g_atomic_int_get(&outsider->tid);

	pr_migration_query(outsider->pair->destination.engine, &info);
	for (guint i = 0; info.blocktime.threads && i < info.blocktime.threads->len; i++)
		if (g_array_index(info.blocktime.threads, PrThreadTime, i).tid == tid)
			return TRUE;
	return g_atomic_int_get(&outsider->done) != 0;
}

static gboolean has_looked(void *opaque)
{
	return g_atomic_int_get(&((Outsider *)opaque)->done) != 0;
}

static void outsider_start(Outsider *outsider, Pair *pair, const Stranger *stranger)
{
	g_autoptr(GError) error = NULL;
	PrGuest *guest = pair->destination.adapter;
	guint n;
	const PrGuestBlock *blocks = guest->ops->prepare(guest, PR_GUEST_DESTINATION, &n, &error);

	g_assert_no_error(error);
	*outsider = (Outsider){.guest = stranger->pid,
			       .at = blocks[1].base + 1003 * PAGE, /* no hole */
			       .pair = pair};
	outsider->thread = g_thread_new("outsider", look_at_page, outsider);
	assert_true(wait_for(waits_for_page, outsider));
	assert_false(has_looked(outsider));
}

/* Hardly anything is in place: nobody but the load has faulted, and the pull is slow. */
static void pause_midway(Pair *pair)
{
	g_autoptr(GError) error = NULL;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_migration_pause(pair->destination.engine, &error);
	g_assert_no_error(error);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
}

/* The waiting thread may go on before the engine has set its error. */
static gboolean destination_knows_that_the_guest_is_gone(void *opaque)
{
	Pair *pair = opaque;
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(pair->destination.engine, &info);
	return info.error_desc && strstr(info.error_desc, "the guest is gone");
}

static void who_waits_for_a_page_of_a_killed_guest_is_let_go(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 16 * MIB, .bandwidth = 1, .paused = TRUE};
	g_auto(Stranger) stranger = {0};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};
	Outsider outsider;

	stranger_start(&stranger);
	give_to_destination(pair, &stranger);
	pause_midway(pair);
	outsider_start(&outsider, pair, &stranger);
	kill(stranger.pid, SIGKILL);
	/* Else it would wait until the engine ends, which this thread would then wait for. */
	if (!wait_for(has_looked, &outsider))
		g_error("the engine holds the userfaultfd of a process that was killed");
	g_thread_join(outsider.thread);
	assert_true(wait_for(destination_knows_that_the_guest_is_gone, pair));
	pr_migration_query(pair->destination.engine, &info);
	assert_int_equal(info.state, PR_STATE_POSTCOPY_PAUSED);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		OVER("tcp", who_waits_for_a_page_of_a_killed_guest_is_let_go),
	};

	return RUN_CASES("guest-gone", tests);
}
