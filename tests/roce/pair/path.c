/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The path of a side: opening, grants, attributes, failure and end. */
#include "tests/roce/pair/side.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static void on_failed(const GError *reason, void *opaque)
{
	Side *side = opaque;

	g_mutex_lock(&side->lock);
	side->n_failures++;
	side->failed_at = g_get_real_time();
	g_free(side->reason);
	side->reason = g_strdup(reason->message);
	g_cond_broadcast(&side->changed);
	g_mutex_unlock(&side->lock);
}

static PrPathSetup path_setup(Side *side, char **words)
{
	PrPathSetup setup = {
		.uri = side->uri,
		.binding.epoch = parse_number(words[1]),
		.regions = side->regions,
		.n_regions = BLOCKS,
		.n_lanes = side->n_lanes,
		.timeout_ms = (guint)parse_number(words[2]),
		.on_failed = on_failed,
		.opaque = side,
	};

	memset(setup.binding.secret, words[3] ? (int)parse_number(words[3]) : 0x5e,
	       sizeof(setup.binding.secret));
	memset(setup.binding.uuid, words[3] && words[4] ? (int)parse_number(words[4]) : 0x11,
	       sizeof(setup.binding.uuid));
	return setup;
}

static gboolean set_lanes(Side *side, char **words, GString *ret, GError **error)
{
	side->n_lanes = (guint)parse_number(words[1]);
	return TRUE;
}

/*
 * EPOCH MS [SECRET [UUID]]. A destination gives two answers: one before it waits for the source, so
 * that a test knows when the source may come, and one after.
 */
static gboolean open_path(Side *side, char **words, GString *ret, GError **error)
{
	PrPathSetup setup = path_setup(side, words);
	gint64 begin = g_get_monotonic_time();

	side->n_failures = 0;
	g_clear_pointer(&side->reason, g_free);
	if (!side->source)
		puts("ok waits");
	fflush(stdout);
	side->path = side->source ? side->ops->connect(&setup, error)
				  : side->ops->accept(side->listener, &setup, error);
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	return side->path != NULL;
}

/* A word for each: BLOCK:OFFSET:LENGTH:ADDRESS:KEY. */
static void print_grants(GArray *grants, GString *ret)
{
	for (guint i = 0; i < grants->len; i++) {
		const PrGrant *grant = &g_array_index(grants, PrGrant, i);

		g_string_append_printf(ret, "%u:%" PRIu64 ":%" PRIu64 ":%" PRIu64 ":%" PRIu64 " ",
				       grant->block, grant->offset, grant->length, grant->addr,
				       grant->key);
	}
}

static gboolean list_grants(Side *side, char **words, GString *ret, GError **error)
{
	g_autoptr(GArray) grants = side->ops->grants(side->path);

	print_grants(grants, ret);
	return TRUE;
}

/* BLOCK OFFSET LENGTH */
static gboolean list_grants_within(Side *side, char **words, GString *ret, GError **error)
{
	g_autoptr(GArray) grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));

	side->ops->grants_within(side->path, parse_number(words[1]), parse_number(words[2]),
				 parse_number(words[3]), grants);
	print_grants(grants, ret);
	return TRUE;
}

/* "set-grants" replaces the grants, "add-grants" adds to them: a word for each. */
static gboolean install_grants(Side *side, char **words, GString *ret, GError **error)
{
	guint n = g_strv_length(words + 1);
	g_autofree PrGrant *grants = g_new0(PrGrant, n);

	for (guint i = 0; i < n; i++) {
		PrGrant *grant = &grants[i];

		if (sscanf(words[i + 1], "%u:%" SCNu64 ":%" SCNu64 ":%" SCNu64 ":%" SCNu64,
			   &grant->block, &grant->offset, &grant->length, &grant->addr,
			   &grant->key) != 5)
			return fail(error, words[i + 1]);
	}
	if (strcmp(words[0], "add-grants") == 0)
		side->ops->add_grants(side->path, grants, n);
	else
		side->ops->set_grants(side->path, grants, n);
	return TRUE;
}

/* Answers with the attributes of each lane's queue pair. test_verbs.py has their order. */
static gboolean attributes(Side *side, char **words, GString *ret, GError **error)
{
	PrVerbsPath *path = (PrVerbsPath *)side->path;

	for (guint i = 0; i < side->path->n_lanes; i++) {
		struct ibv_qp_attr a = {0};
		struct ibv_qp_init_attr init;
		int err = ibv_query_qp(path->lanes[i].qp, &a,
				       IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
					       IBV_QP_RNR_RETRY | IBV_QP_MIN_RNR_TIMER |
					       IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_MAX_DEST_RD_ATOMIC |
					       IBV_QP_ACCESS_FLAGS | IBV_QP_AV,
				       &init);

		if (err)
			return fail(error, g_strerror(err));
		g_string_append_printf(ret, "%u:%u:%u:%u:%u:%u:%u:%u ", a.timeout, a.retry_cnt,
				       a.rnr_retry, a.min_rnr_timer, a.max_rd_atomic,
				       a.max_dest_rd_atomic, a.qp_access_flags,
				       a.ah_attr.grh.traffic_class);
	}
	return TRUE;
}

/* MS. Answers: real time of the failure in microseconds, number of failures, reason. */
static gboolean await_failure(Side *side, char **words, GString *ret, GError **error)
{
	gint64 end = g_get_monotonic_time() + (gint64)parse_number(words[1]) * 1000;
	gboolean failed;

	g_mutex_lock(&side->lock);
	while (!side->n_failures && g_cond_wait_until(&side->changed, &side->lock, end))
		;
	failed = side->n_failures > 0;
	if (failed)
		g_string_printf(ret, "%" PRId64 " %u %s", side->failed_at, side->n_failures,
				side->reason);
	g_mutex_unlock(&side->lock);
	return failed ? TRUE : fail(error, "the path has not failed");
}

/* [MS]. Answers with the time that draining took, in microseconds. */
static gboolean close_path(Side *side, char **words, GString *ret, GError **error)
{
	gint64 begin = g_get_monotonic_time();
	gboolean drained =
		side->ops->drain(side->path, words[1] ? (guint)parse_number(words[1]) : READ_MS);

	attack_free_page(&side->open_page);
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	g_clear_pointer(&side->path, pr_data_path_destroy);
	return drained ? TRUE : fail(error, "not drained in time");
}

const Command path_commands[] = {
	{"lanes", 1, NEEDS_SIDE, set_lanes},
	{"open", 2, NEEDS_SIDE, open_path},
	{"grants", 0, NEEDS_PATH, list_grants},
	{"grants-within", 3, NEEDS_PATH, list_grants_within},
	{"set-grants", 0, NEEDS_PATH, install_grants},
	{"add-grants", 0, NEEDS_PATH, install_grants},
	{"attributes", 0, NEEDS_PATH, attributes},
	{"await-failure", 1, NEEDS_PATH, await_failure},
	{"close", 0, NEEDS_PATH, close_path},
	{NULL},
};
