/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The test guest as a program: `workload --socket PATH --size 64M …`. It prints a line each
 * --report ms. On SIGUSR1 it verifies every page and prints the result. On SIGTERM or SIGINT, or
 * after --seconds, it does the same and exits: with 0 if no page was ever wrong.
 */
#include <glib-unix.h>
#include <stdio.h>

#include "tests/guest/testguest.h"

typedef struct Workload {
	TestGuest *guest;
	GMainLoop *loop;
} Workload;

static gboolean parse_size(const char *text, uint64_t *ret_size)
{
	static const char suffixes[] = "kMG";
	char *end;
	guint64 value = g_ascii_strtoull(text, &end, 10);
	guint shift = 0;

	for (guint i = 0; suffixes[i] && *end; i++) {
		if (*end == suffixes[i])
			shift = 10 * (i + 1);
	}
	if (end == text || (*end && (!shift || end[1])) || value > (G_MAXUINT64 >> shift))
		return FALSE;
	*ret_size = value << shift;
	return *ret_size > 0;
}

static gboolean print_line(gpointer data)
{
	Workload *work = data;

	printf("%s verified=%" G_GUINT64_FORMAT " written=%" G_GUINT64_FORMAT
	       " corrupt=%" G_GUINT64_FORMAT "\n",
	       testguest_running(work->guest) ? "running" : "paused",
	       testguest_verified(work->guest), testguest_written(work->guest),
	       testguest_corrupt(work->guest));
	fflush(stdout);
	return G_SOURCE_CONTINUE;
}

static gboolean verify(gpointer data)
{
	Workload *work = data;
	guint64 now = 0;

	if (!testguest_verify(work->guest, &now))
		printf("not verified: threads wait for pages\n");
	else
		printf("verified all corrupt=%" G_GUINT64_FORMAT " now=%" G_GUINT64_FORMAT "\n",
		       testguest_corrupt(work->guest), now);
	fflush(stdout);
	return G_SOURCE_CONTINUE;
}

static gboolean quit(gpointer data)
{
	g_main_loop_quit(((Workload *)data)->loop);
	return G_SOURCE_CONTINUE;
}

static int final_check(TestGuest *guest, gboolean has_memory)
{
	guint64 corrupt = 0;

	if (has_memory && !testguest_verify(guest, &corrupt)) {
		fprintf(stderr, "workload: the guest's threads wait for pages; nothing verified\n");
		return 1;
	}
	printf("final corrupt=%" G_GUINT64_FORMAT " now=%" G_GUINT64_FORMAT "\n",
	       testguest_corrupt(guest), corrupt);
	return testguest_corrupt(guest) || corrupt ? 1 : 0;
}

static void run_until_told(Workload *work, int seconds, int report_ms)
{
	g_autoptr(GMainLoop) loop = g_main_loop_new(NULL, FALSE);

	work->loop = loop;
	g_timeout_add(report_ms, print_line, work);
	g_unix_signal_add(SIGUSR1, verify, work);
	g_unix_signal_add(SIGTERM, quit, work);
	g_unix_signal_add(SIGINT, quit, work);
	if (seconds > 0)
		g_timeout_add_seconds(seconds, quit, work);
	g_main_loop_run(loop);
}

int main(int argc, char **argv)
{
	g_autofree char *socket = NULL;
	g_autofree char *size = NULL;
	int blocks = 2, threads = 4, pace_us = 0, seconds = 0, seed = 1, report_ms = 1000;
	gboolean incoming = FALSE, paused = FALSE;
	const GOptionEntry entries[] = {
		{"socket", 0, 0, G_OPTION_ARG_FILENAME, &socket, "agent socket to serve", "PATH"},
		{"size", 0, 0, G_OPTION_ARG_STRING, &size, "guest RAM, k, M or G (64M)", "SIZE"},
		{"blocks", 0, 0, G_OPTION_ARG_INT, &blocks, "RAM blocks (2)", "N"},
		{"threads", 0, 0, G_OPTION_ARG_INT, &threads, "threads (4)", "N"},
		{"pace", 0, 0, G_OPTION_ARG_INT, &pace_us, "rest between 16 pages (0)", "US"},
		{"seed", 0, 0, G_OPTION_ARG_INT, &seed, "of the contents (1)", "N"},
		{"report", 0, 0, G_OPTION_ARG_INT, &report_ms, "time between two lines (1000)",
		 "MS"},
		{"seconds", 0, 0, G_OPTION_ARG_INT, &seconds, "then verify and exit", "N"},
		{"incoming", 0, 0, G_OPTION_ARG_NONE, &incoming, "wait to be loaded", NULL},
		{"paused", 0, 0, G_OPTION_ARG_NONE, &paused, "fill memory, do not run", NULL},
		{NULL},
	};
	g_autoptr(GOptionContext) context = g_option_context_new(NULL);
	g_autoptr(GError) error = NULL;
	TestGuestConfig config = {.size = 64 << 20, .load_touches = 8};
	Workload work = {0};

	g_option_context_add_main_entries(context, entries, NULL);
	if (!g_option_context_parse(context, &argc, &argv, &error)) {
		fprintf(stderr, "workload: %s\n", error->message);
		return 2;
	}
	if (!socket || (size && !parse_size(size, &config.size)) || blocks < 1 || threads < 1 ||
	    pace_us < 0 || report_ms < 1) {
		fprintf(stderr, "workload: needs --socket PATH, a --size such as 64M, and --blocks "
				"and --threads of at least 1\n");
		return 2;
	}
	config.socket = socket;
	config.n_blocks = blocks;
	config.n_threads = threads;
	config.seed = seed;
	config.paused = paused;
	config.pace_us = pace_us;

	g_autoptr(TestGuest) guest = testguest_new(&config, &error);

	if (!guest) {
		fprintf(stderr, "workload: %s\n", error->message);
		return 1;
	}
	if (!incoming)
		testguest_start(guest);
	work.guest = guest;
	run_until_told(&work, seconds, report_ms);
	return final_check(guest, !incoming || testguest_loaded(guest));
}
