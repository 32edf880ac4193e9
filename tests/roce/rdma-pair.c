/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * rdma-pair source|destination URI: one side of a data path, moved step by step from standard input.
 * Each line is a command, answered by one line: "ok", "ok RESULT" or "error WHY". Stands in for
 * the engine where both sides have to be on two hosts; test_verbs.py drives two of them.
 *
 * Memory is BLOCKS memfds of BLOCK_BYTES. What a byte has to be follows from block, offset and a
 * seed, so that each side can tell by itself.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/roce/foreign.h"
#include "transport/rdma/path.h"

#define BLOCKS	    2
#define BLOCK_BYTES (64ull * 1024 * 1024)
#define MARK	    0xee
#define PROBE_TOKEN 0x1234567890ull
#define READ_MS	    10000 /* for a READ, whatever becomes of it, or the end of a path */

typedef struct Puller {
	struct Side *side;
	PrLaneId lane;
	guint length;
	guint posted;
	guint ok, failed; /* atomic */
	GThread *thread;
} Puller;

typedef struct Side {
	gboolean source;
	PrUri *uri;
	const PrTransportOps *ops;
	PrDataListener *listener;
	PrDataPath *path;
	PrRegion regions[BLOCKS];
	guint n_lanes; /* of the next path; 0: as many as there always are */
	Puller pullers[PR_LANES_MAX];
	ForeignBait bait;

	GMutex lock;
	GCond changed;
	char *reason;	  /* of the path's failure; under lock */
	gint64 failed_at; /* real time, microseconds; under lock */
	guint n_failures; /* under lock */
} Side;

/* Sets *ret to the answer's text, or says why not. */
typedef gboolean (*Action)(Side *side, char **words, GString *ret, GError **error);

static gboolean complain(GError **error, const char *text)
{
	g_set_error_literal(error, G_IO_ERROR, G_IO_ERROR_FAILED, text);
	return FALSE;
}

static uint64_t number(const char *word)
{
	return g_ascii_strtoull(word, NULL, 0);
}

static uint64_t word_at(guint block, uint64_t offset, uint64_t seed)
{
	return (offset + 1) * 0x9e3779b97f4a7c15ull ^ (uint64_t)block << 56 ^ seed << 32;
}

static uint64_t *at(Side *side, guint block, uint64_t offset)
{
	return (uint64_t *)(gpointer)((uint8_t *)side->regions[block].addr + offset);
}

static gboolean fill(Side *side, char **words, GString *ret, GError **error)
{
	guint block = number(words[1]);
	uint64_t start = number(words[2]), length = number(words[3]), seed = number(words[4]);
	/* The region is mapped read-only, as the engine has it; the guest has its own mapping. */
	uint8_t *map = mmap(NULL, BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
			    side->regions[block].memfd, 0);

	if (map == MAP_FAILED)
		return complain(error, g_strerror(errno));
	for (uint64_t i = start; i < start + length; i += sizeof(uint64_t))
		*(uint64_t *)(gpointer)(map + i) = word_at(block, i, seed);
	munmap(map, BLOCK_BYTES);
	return TRUE;
}

static gboolean punch(Side *side, char **words, GString *ret, GError **error)
{
	if (fallocate(side->regions[number(words[1])].memfd,
		      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)number(words[2]),
		      (off_t)number(words[3])) == 0)
		return TRUE;
	return complain(error, g_strerror(errno));
}

/* BLOCK OFFSET LENGTH: has every page looked at in the mapping that the path was given. */
static gboolean touch(Side *side, char **words, GString *ret, GError **error)
{
	uint64_t start = number(words[2]), sum = 0;

	for (uint64_t i = start; i < start + number(words[3]); i += 4096)
		sum += *at(side, number(words[1]), i);
	g_string_printf(ret, "%" PRIu64, sum);
	return TRUE;
}

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
		.binding.epoch = number(words[1]),
		.regions = side->regions,
		.n_regions = BLOCKS,
		.n_lanes = side->n_lanes,
		.timeout_ms = (guint)number(words[2]),
		.on_failed = on_failed,
		.opaque = side,
	};

	memset(setup.binding.secret, words[3] ? (int)number(words[3]) : 0x5e,
	       sizeof(setup.binding.secret));
	memset(setup.binding.uuid, words[3] && words[4] ? (int)number(words[4]) : 0x11,
	       sizeof(setup.binding.uuid));
	return setup;
}

static gboolean set_lanes(Side *side, char **words, GString *ret, GError **error)
{
	side->n_lanes = (guint)number(words[1]);
	return TRUE;
}

/* EPOCH MS [SECRET [UUID]] */
static gboolean open_path(Side *side, char **words, GString *ret, GError **error)
{
	PrPathSetup setup = path_setup(side, words);
	gint64 begin = g_get_monotonic_time();

	side->n_failures = 0;
	g_clear_pointer(&side->reason, g_free);
	side->path = side->source ? side->ops->connect(&setup, error)
				  : side->ops->accept(side->listener, &setup, error);
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	return side->path != NULL;
}

static void print_grants(GArray *grants, GString *ret)
{
	for (guint i = 0; i < grants->len; i++) {
		const PrGrant *grant = &g_array_index(grants, PrGrant, i);

		g_string_append_printf(ret, "%u:%" PRIu64 ":%" PRIu64 ":%" PRIu64 ":%" PRIu64 " ",
				       grant->block, grant->offset, grant->length, grant->addr,
				       grant->key);
	}
}

static gboolean tell_grants(Side *side, char **words, GString *ret, GError **error)
{
	g_autoptr(GArray) grants = side->ops->grants(side->path);

	print_grants(grants, ret);
	return TRUE;
}

/* BLOCK OFFSET LENGTH */
static gboolean tell_grants_within(Side *side, char **words, GString *ret, GError **error)
{
	g_autoptr(GArray) grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));

	side->ops->grants_within(side->path, number(words[1]), number(words[2]), number(words[3]),
				 grants);
	print_grants(grants, ret);
	return TRUE;
}

/* set-grants or add-grants, and them. */
static gboolean take_grants(Side *side, char **words, GString *ret, GError **error)
{
	guint n = g_strv_length(words + 1);
	g_autofree PrGrant *grants = g_new0(PrGrant, n);

	for (guint i = 0; i < n; i++) {
		PrGrant *grant = &grants[i];

		if (sscanf(words[i + 1], "%u:%" SCNu64 ":%" SCNu64 ":%" SCNu64 ":%" SCNu64,
			   &grant->block, &grant->offset, &grant->length, &grant->addr,
			   &grant->key) != 5)
			return complain(error, words[i + 1]);
	}
	if (strcmp(words[0], "add-grants") == 0)
		side->ops->add_grants(side->path, grants, n);
	else
		side->ops->set_grants(side->path, grants, n);
	return TRUE;
}

/* Waits for completions on a lane; 0 when there are none in time. */
static guint await(Side *side, PrLaneId lane, PrCompletion *ret, guint max)
{
	struct pollfd fd = {.fd = side->ops->wait_fd(side->path, lane), .events = POLLIN};
	gint64 deadline = g_get_monotonic_time() + READ_MS * 1000;
	guint n;

	while (!(n = side->ops->poll(side->path, lane, ret, max))) {
		if (g_get_monotonic_time() > deadline)
			return 0;
		if (side->ops->arm(side->path, lane))
			poll(&fd, 1, READ_MS);
	}
	return n;
}

/* Whether all of a range is what fill() makes of it. */
static gboolean is_filled(Side *side, guint block, uint64_t start, uint64_t end, uint64_t seed,
			  GError **error)
{
	for (uint64_t i = start; i < end; i += sizeof(uint64_t))
		if (*at(side, block, i) != word_at(block, i, seed)) {
			g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
				    "wrong bytes in block %u at %" PRIu64, block, i);
			return FALSE;
		}
	return TRUE;
}

/* A READ that failed; says why, as the path does. */
static gboolean complain_of_read(Side *side, GError **error)
{
	gint64 end = g_get_monotonic_time() + G_USEC_PER_SEC;

	g_mutex_lock(&side->lock);
	while (!side->n_failures && g_cond_wait_until(&side->changed, &side->lock, end))
		;
	g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "the READ failed: %s",
		    side->n_failures ? side->reason : "the path has told no reason");
	g_mutex_unlock(&side->lock);
	return FALSE;
}

static gboolean read_one(Side *side, PrLaneId lane, guint block, uint64_t offset, uint32_t length,
			 GError **error)
{
	PrCompletion done = {0};

	if (!side->ops->post_read(side->path, lane, block, offset, length, offset))
		return complain(error, "the READ was not posted");
	if (!await(side, lane, &done, 1))
		return complain(error, "the READ did not complete");
	if (!done.ok)
		return complain_of_read(side, error);
	return done.token == offset ? TRUE : complain(error, "another READ's completion came");
}

/* LANE BLOCK OFFSET LENGTH SIZE SEED: READs of SIZE bytes, one by one. */
static gboolean check(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = number(words[1]), block = number(words[2]), size = number(words[5]);
	uint64_t start = number(words[3]), end = start + number(words[4]), seed = number(words[6]);

	for (uint64_t i = start; i < end; i += size)
		if (!read_one(side, lane, block, i, MIN(size, end - i), error))
			return FALSE;
	return is_filled(side, block, start, end, seed, error);
}

/* BLOCK OFFSET LENGTH SEED: in our own memory, without any READ. */
static gboolean filled(Side *side, char **words, GString *ret, GError **error)
{
	uint64_t start = number(words[2]);

	return is_filled(side, number(words[1]), start, start + number(words[3]), number(words[4]),
			 error);
}

/* LANE read|write|atomic ADDRESS KEY, as foreign_perform(): how it ended. */
static gboolean foreign(Side *side, char **words, GString *ret, GError **error)
{
	const char *status = foreign_perform((PrVerbsPath *)side->path, number(words[1]), words[2],
					     number(words[3]), (uint32_t)number(words[4]), error);

	g_string_assign(ret, status ? status : "");
	return status != NULL;
}

/* Our queue pairs let the peer do anything. Answers where the bait is: ADDRESS KEY. */
static gboolean allow(Side *side, char **words, GString *ret, GError **error)
{
	PrVerbsPath *path = (PrVerbsPath *)side->path;

	foreign_take_bait(&side->bait);
	if (!foreign_open_queues(path, error) || !foreign_lay_bait(path, &side->bait, error))
		return FALSE;
	g_string_printf(ret, "%" PRIuPTR " %u", (uintptr_t)side->bait.page, side->bait.mr->rkey);
	return TRUE;
}

/* The first word of the bait. */
static gboolean bait(Side *side, char **words, GString *ret, GError **error)
{
	if (!side->bait.mr)
		return complain(error, "there is no bait");
	g_string_printf(ret, "%" PRIx64, *side->bait.page);
	return TRUE;
}

/* BLOCK OFFSET: where our own registration of that byte is, whoever may use it: ADDRESS KEY. */
static gboolean own_key(Side *side, char **words, GString *ret, GError **error)
{
	uint64_t offset = number(words[2]);
	const PrVerbsDestinationMr *import =
		pr_verbs_destination_mr_find((PrVerbsPath *)side->path, number(words[1]), offset);

	if (!import || !import->mr)
		return complain(error, "nothing is registered there");
	g_string_printf(ret, "%" PRIuPTR " %u", (uintptr_t)at(side, number(words[1]), offset),
			import->mr->lkey);
	return TRUE;
}

/* LANE COUNT: probes, so many at a time. Answers how long they took, in microseconds. */
static gboolean probe(Side *side, char **words, GString *ret, GError **error)
{
	PrVerbsPath *path = (PrVerbsPath *)side->path;
	guint lane = number(words[1]), n = number(words[2]), done = 0, got;
	gint64 begin = g_get_monotonic_time();

	for (guint i = 0; i < n; i++)
		if (!pr_verbs_lane_probe(path, &path->lanes[lane], PROBE_TOKEN + i))
			return complain(error, "the probe was not posted");
	for (; done < n; done += got) {
		PrCompletion completions[16];

		got = await(side, lane, completions, G_N_ELEMENTS(completions));
		if (!got)
			return complain(error, "the probe did not complete");
		for (guint i = 0; i < got; i++)
			if (!completions[i].ok || completions[i].token != PROBE_TOKEN + done + i)
				return complain(error, "the probe failed");
	}
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	return TRUE;
}

/* LANE MS: posts a READ and looks for its completion no sooner than after that time. */
static gboolean neglect(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = number(words[1]);
	PrCompletion done = {0};

	if (!side->ops->post_read(side->path, lane, 0, 0, 4096, 1))
		return complain(error, "the READ was not posted");
	g_usleep(number(words[2]) * 1000);
	if (!await(side, lane, &done, 1))
		return complain(error, "the READ did not complete");
	return done.ok ? TRUE : complain_of_read(side, error);
}

/* Answers for each lane what its queue pair is set to: see test_verbs.py. */
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
			return complain(error, g_strerror(err));
		g_string_append_printf(ret, "%u:%u:%u:%u:%u:%u:%u:%u ", a.timeout, a.retry_cnt,
				       a.rnr_retry, a.min_rnr_timer, a.max_rd_atomic,
				       a.max_dest_rd_atomic, a.qp_access_flags,
				       a.ah_attr.grh.traffic_class);
	}
	return TRUE;
}

/* Keeps a lane's window full until the path ends, and then takes what is left. */
static gpointer pull_thread(gpointer opaque)
{
	Puller *puller = opaque;
	Side *side = puller->side;
	guint window = side->ops->max_reads(side->path, puller->lane);
	guint n_slots = BLOCK_BYTES / 4 / puller->length, done = 0;

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
		n = await(side, puller->lane, completions, G_N_ELEMENTS(completions));
		for (guint i = 0; i < n; i++)
			g_atomic_int_inc(completions[i].ok ? &puller->ok : &puller->failed);
		done += n;
		if (!n)
			return NULL;
	}
}

static gboolean has_begun(Puller *puller)
{
	return g_atomic_int_get(&puller->ok) || g_atomic_int_get(&puller->failed);
}

/* Returns when READs are under way on each lane. */
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
				return complain(error, "no READ of a lane has come back");
			g_usleep(1000);
		}
	return TRUE;
}

/* Answers: for each lane READs posted, in place, failed. */
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

/* MS. Answers: real time of the failure in microseconds, how many there were, the reason. */
static gboolean await_failure(Side *side, char **words, GString *ret, GError **error)
{
	gint64 end = g_get_monotonic_time() + (gint64)number(words[1]) * 1000;
	gboolean failed;

	g_mutex_lock(&side->lock);
	while (!side->n_failures && g_cond_wait_until(&side->changed, &side->lock, end))
		;
	failed = side->n_failures > 0;
	if (failed)
		g_string_printf(ret, "%" PRId64 " %u %s", side->failed_at, side->n_failures,
				side->reason);
	g_mutex_unlock(&side->lock);
	return failed ? TRUE : complain(error, "the path has not failed");
}

/* [MS]: how long it took, in microseconds. */
static gboolean close_path(Side *side, char **words, GString *ret, GError **error)
{
	gint64 begin = g_get_monotonic_time();
	gboolean drained =
		side->ops->drain(side->path, words[1] ? (guint)number(words[1]) : READ_MS);

	foreign_take_bait(&side->bait);
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	g_clear_pointer(&side->path, pr_data_path_destroy);
	return drained ? TRUE : complain(error, "not drained in time");
}

/* LANE COUNT SIZE: posts READs from the beginning of block 0 and ends the path under them, then marks where
 * they would have landed. How long the end took, in microseconds. */
static gboolean abandon(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = number(words[1]), n = number(words[2]), size = number(words[3]);
	gint64 begin;

	for (guint i = 0; i < n; i++)
		if (!side->ops->post_read(side->path, lane, 0, (uint64_t)i * size, size, i))
			return complain(error, "the READ was not posted");
	begin = g_get_monotonic_time();
	if (!side->ops->drain(side->path, READ_MS))
		return complain(error, "not drained in time");
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	memset(at(side, 0, 0), MARK, (gsize)n * size);
	g_clear_pointer(&side->path, pr_data_path_destroy);
	return TRUE;
}

/* LENGTH: whether the mark is still there. */
static gboolean marked(Side *side, char **words, GString *ret, GError **error)
{
	const uint8_t *from = side->regions[0].addr;

	for (uint64_t i = 0; i < number(words[1]); i++)
		if (from[i] != MARK)
			return complain(error, "something has landed after the end of the path");
	return TRUE;
}

static guint count_entries(const char *path)
{
	g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
	guint n = 0;

	while (dir && g_dir_read_name(dir))
		n++;
	return n;
}

static uint64_t pinned_kib(void)
{
	g_autofree char *text = NULL;
	const char *line;

	if (!g_file_get_contents("/proc/self/status", &text, NULL, NULL))
		return 0;
	line = strstr(text, "VmPin:");
	return line ? g_ascii_strtoull(line + strlen("VmPin:"), NULL, 10) : 0;
}

/* Answers: descriptors, threads, pinned KiB, KiB in each block's memfd. */
static gboolean census(Side *side, char **words, GString *ret, GError **error)
{
	g_string_printf(ret, "%u %u %" PRIu64, count_entries("/proc/self/fd"),
			count_entries("/proc/self/task"), pinned_kib());
	for (guint i = 0; i < BLOCKS; i++) {
		struct stat st;

		if (fstat(side->regions[i].memfd, &st) < 0)
			return complain(error, g_strerror(errno));
		g_string_append_printf(ret, " %" PRIu64, (uint64_t)st.st_blocks / 2);
	}
	return TRUE;
}

static int compare(gconstpointer a, gconstpointer b)
{
	const gint64 *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* LANE SIZE COUNT: one READ after the other; answers median and 99th percentile in nanoseconds. The lane is
 * polled, as the engine and ib_read_lat do. */
static gboolean latency(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = number(words[1]), size = number(words[2]), n = number(words[3]);
	g_autofree gint64 *times = g_new(gint64, n);

	for (guint i = 0; i < n; i++) {
		uint64_t offset = (uint64_t)i * size % (BLOCK_BYTES / 4);
		struct timespec begin, end;
		PrCompletion done;

		clock_gettime(CLOCK_MONOTONIC, &begin);
		if (!side->ops->post_read(side->path, lane, 0, offset, size, i))
			return complain(error, "the READ was not posted");
		while (!side->ops->poll(side->path, lane, &done, 1))
			;
		clock_gettime(CLOCK_MONOTONIC, &end);
		if (!done.ok)
			return complain_of_read(side, error);
		times[i] = (end.tv_sec - begin.tv_sec) * 1000000000ll + end.tv_nsec - begin.tv_nsec;
	}
	qsort(times, n, sizeof(*times), compare);
	g_string_printf(ret, "%" PRId64 " %" PRId64, times[n / 2], times[n * 99 / 100]);
	return TRUE;
}

/* SIZE BYTES: with the bulk lane's window full; answers bytes a second. */
static gboolean bandwidth(Side *side, char **words, GString *ret, GError **error)
{
	guint size = number(words[1]), window = side->ops->max_reads(side->path, PR_LANE_BULK);
	guint n = number(words[2]) / size, posted = 0, done = 0;
	gint64 begin = g_get_monotonic_time();

	while (done < n) {
		PrCompletion completions[16];
		guint got;

		for (; posted < n && posted - done < window; posted++)
			if (!side->ops->post_read(side->path, PR_LANE_BULK, 0,
						  (uint64_t)posted * size % (BLOCK_BYTES / 4), size,
						  posted))
				return complain(error, "a READ was not posted");
		got = await(side, PR_LANE_BULK, completions, G_N_ELEMENTS(completions));
		if (!got)
			return complain(error, "a READ did not complete");
		for (guint i = 0; i < got; i++)
			if (!completions[i].ok)
				return complain(error, "a READ failed");
		done += got;
	}
	g_string_printf(ret, "%.0f",
			(double)n * size * G_USEC_PER_SEC / (g_get_monotonic_time() - begin));
	return TRUE;
}

typedef struct Command {
	const char *name;
	guint n_words; /* at least, without the name */
	gboolean needs_path;
	Action action;
} Command;

static const Command commands[] = {
	{"fill", 4, FALSE, fill},
	{"punch", 3, FALSE, punch},
	{"touch", 3, FALSE, touch},
	{"lanes", 1, FALSE, set_lanes},
	{"open", 2, FALSE, open_path},
	{"grants", 0, TRUE, tell_grants},
	{"grants-within", 0, TRUE, tell_grants_within},
	{"set-grants", 0, TRUE, take_grants},
	{"add-grants", 0, TRUE, take_grants},
	{"check", 6, TRUE, check},
	{"filled", 4, FALSE, filled},
	{"foreign", 4, TRUE, foreign},
	{"allow", 0, TRUE, allow},
	{"bait", 0, TRUE, bait},
	{"own-key", 2, TRUE, own_key},
	{"probe", 2, TRUE, probe},
	{"neglect", 2, TRUE, neglect},
	{"attributes", 0, TRUE, attributes},
	{"pull", 0, TRUE, start_pull},
	{"join-pull", 0, TRUE, join_pull},
	{"await-failure", 1, TRUE, await_failure},
	{"close", 0, TRUE, close_path},
	{"abandon", 3, TRUE, abandon},
	{"marked", 1, FALSE, marked},
	{"census", 0, FALSE, census},
	{"latency", 3, TRUE, latency},
	{"bandwidth", 2, TRUE, bandwidth},
};

static gboolean perform(Side *side, char **words, GString *ret, GError **error)
{
	for (guint i = 0; i < G_N_ELEMENTS(commands); i++) {
		const Command *command = &commands[i];

		if (g_strcmp0(words[0], command->name))
			continue;
		if (g_strv_length(words) <= command->n_words)
			return complain(error, "too few arguments");
		if (command->needs_path && !side->path)
			return complain(error, "there is no path");
		return command->action(side, words, ret, error);
	}
	return complain(error, "no such command");
}

static void obey(Side *side, char *line)
{
	g_auto(GStrv) words = g_strsplit(g_strstrip(line), " ", -1);
	g_autoptr(GString) answer = g_string_new(NULL);
	g_autoptr(GError) error = NULL;

	if (perform(side, words, answer, &error))
		printf("ok %s\n", answer->str);
	else
		printf("error %s\n", error->message);
	fflush(stdout);
}

static gboolean open_side(Side *side, const char *role, const char *uri, GError **error)
{
	side->source = !strcmp(role, "source");
	side->uri = pr_uri_parse(uri, !side->source, error);
	side->ops = side->uri ? pr_transport_find(side->uri->scheme, error) : NULL;
	if (!side->ops)
		return FALSE;
	for (guint i = 0; i < BLOCKS; i++) {
		int prot = side->source ? PROT_READ : PROT_READ | PROT_WRITE;
		int fd = memfd_create("rdma-pair", MFD_CLOEXEC);
		void *map;

		if (fd < 0 || ftruncate(fd, BLOCK_BYTES) < 0)
			return complain(error, g_strerror(errno));
		map = mmap(NULL, BLOCK_BYTES, prot, MAP_SHARED | MAP_NORESERVE, fd, 0);
		if (map == MAP_FAILED)
			return complain(error, g_strerror(errno));
		side->regions[i] = (PrRegion){map, BLOCK_BYTES, .memfd = fd};
	}
	if (!side->source)
		side->listener = side->ops->listen(side->uri, error);
	return side->source || side->listener;
}

static void close_side(Side *side)
{
	foreign_take_bait(&side->bait);
	g_clear_pointer(&side->path, pr_data_path_destroy);
	g_clear_pointer(&side->listener, pr_data_listener_close);
	g_clear_pointer(&side->uri, pr_uri_free);
	for (guint i = 0; i < BLOCKS; i++) {
		if (!side->regions[i].addr)
			continue;
		munmap(side->regions[i].addr, BLOCK_BYTES);
		close(side->regions[i].memfd);
	}
	g_free(side->reason);
}

int main(int argc, char **argv)
{
	static char line[1 << 20];
	g_autoptr(GError) error = NULL;
	Side side = {0};

	if (argc != 3) {
		fprintf(stderr, "usage: rdma-pair source|destination URI\n");
		return 2;
	}
	g_log_writer_default_set_use_stderr(TRUE);
	if (open_side(&side, argv[1], argv[2], &error)) {
		printf("ok\n");
		fflush(stdout);
		while (fgets(line, sizeof(line), stdin))
			obey(&side, line);
	} else {
		printf("error %s\n", error->message);
	}
	close_side(&side);
	return error ? 1 : 0;
}
