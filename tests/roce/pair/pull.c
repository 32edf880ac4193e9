/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Threads that keep all lanes full of READs, while a test breaks the rail. */
#include "tests/roce/pair/side.h"

/*
 * A rest after each batch of completions. Without it READs fill the CPUs of emulated hosts, and the
 * command that breaks the rail takes seconds.
 */
#define REST_US 40000

/* Keeps a lane's window full until the path ends, then collects the remaining completions. */
static gpointer pull_thread(gpointer opaque)
{
	Puller *puller = opaque;
	Side *side = puller->side;
	guint window = side->ops->max_reads(side->path, puller->lane);
	guint n_slots = PULL_BYTES / puller->length, done = 0;

	for (;;) {
		PrCompletion completions[16];
		guint n;

		while (puller->posted - done < window &&
		       side->ops->post_read(side->path, puller->lane, 0,
					    (uint64_t)(puller->posted % n_slots) * puller->length,
					    puller->length, puller->posted))
			puller->posted++;
		if (puller->posted == done)
			return NULL;
		n = side_await(side, puller->lane, completions, G_N_ELEMENTS(completions));
		for (guint i = 0; i < n; i++)
			g_atomic_int_inc(completions[i].ok ? &puller->ok : &puller->failed);
		done += n;
		if (!n)
			return NULL;
		g_usleep(REST_US);
	}
}

static gboolean has_begun(Puller *puller)
{
	return g_atomic_int_get(&puller->ok) || g_atomic_int_get(&puller->failed);
}

/* Answers after a READ has come back on each lane. */
static gboolean start_pull(Side *side, char **words, GString *ret, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + READ_MS * 1000;

	for (guint i = 0; i < side->path->n_lanes; i++) {
		side->pullers[i] = (Puller){
			.side = side,
			.lane = i,
			.length = pr_lane_is_urgent(i) ? 4096 : 65536,
		};
		side->pullers[i].thread = g_thread_new("pull", pull_thread, &side->pullers[i]);
	}
	for (guint i = 0; i < side->path->n_lanes; i++)
		while (!has_begun(&side->pullers[i])) {
			if (g_get_monotonic_time() > deadline)
				return fail(error, "no READ of a lane has come back");
			g_usleep(1000);
		}
	return TRUE;
}

/* Answers with three numbers for each lane: READs posted, succeeded, failed. */
static gboolean join_pull(Side *side, char **words, GString *ret, GError **error)
{
	for (guint i = 0; i < side->path->n_lanes; i++) {
		Puller *puller = &side->pullers[i];

		g_thread_join(puller->thread);
		g_string_append_printf(ret, "%u %u %u ", puller->posted, puller->ok,
				       puller->failed);
	}
	return TRUE;
}

const Command pull_commands[] = {
	{"pull", 0, NEEDS_PATH, start_pull},
	{"join-pull", 0, NEEDS_PATH, join_pull},
	{NULL},
};
