/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A host floods the port of a running migration in every way. The migration continues, and the real
 * source can still reconnect.
 */
#include <string.h>

#include "migration/internal.h"
#include "tests/integration/cases.h"
#include "tests/rigs/flood.h"
#include "transport/control/control.h"

#define MIB (1024ull * 1024)

static guint count_fds(void)
{
	g_autoptr(GDir) dir = g_dir_open("/proc/self/fd", 0, NULL);
	guint n = 0;

	while (g_dir_read_name(dir))
		n++;
	return n;
}

/* A HELLO frame of a migration that the destination does not know. */
static GByteArray *foreign_hello(const char *scheme)
{
	PrWireBlock block = {"mem0", 4096, 4096};
	PrHello hello = {.version = PR_WIRE_VERSION,
			 .role = PR_HELLO_SOURCE,
			 .resume = PR_RESUME_ASKED,
			 .epoch = 1000,
			 .uuid = "not this one",
			 .n_blocks = 1,
			 .blocks = &block};
	g_autoptr(GByteArray) body = g_byte_array_new();
	GByteArray *frame = g_byte_array_new();
	uint8_t header[PR_WIRE_HEADER_BYTES];

	g_strlcpy(hello.scheme, scheme, sizeof(hello.scheme));
	pr_hello_encode(body, &hello);
	pr_header_encode(header, PR_MSG_HELLO, body->len);
	g_byte_array_append(frame, header, sizeof(header));
	g_byte_array_append(frame, body->data, body->len);
	return frame;
}

/* A LANE frame for the running migration, with a wrong token. */
static GByteArray *foreign_lane(Pair *pair)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	GByteArray *frame = g_byte_array_new();
	uint8_t header[PR_WIRE_HEADER_BYTES];
	PrLaneHello lane = {.lane = 0, .token = "guessed"};

	g_mutex_lock(&pair->source.engine->session.lock);
	memcpy(lane.uuid, pair->source.engine->session.binding.uuid, PR_UUID_BYTES);
	lane.epoch =
		pair->source.engine->session.binding.epoch + 1; /* the epoch of the next recovery */
	g_mutex_unlock(&pair->source.engine->session.lock);
	pr_lane_hello_encode(body, &lane);
	pr_header_encode(header, PR_MSG_LANE, body->len);
	g_byte_array_append(frame, header, sizeof(header));
	g_byte_array_append(frame, body->data, body->len);
	return frame;
}

static uint16_t port_of(Pair *pair)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(pair->destination.engine, &info);
	const PrPathInfo *path = g_ptr_array_index(info.paths, 0);
	g_autoptr(PrUri) uri = pr_uri_parse(path->uri, FALSE, NULL);
	return uri->port;
}

static guint64 pauses(Side *side)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(side->engine, &info);
	return info.pauses;
}

/* Waits until the descriptors of the flood's connections are closed. */
static void wait_fds(guint at_most)
{
	gint64 deadline = g_get_monotonic_time() + 30 * G_USEC_PER_SEC;

	while (count_fds() > at_most) {
		if (g_get_monotonic_time() > deadline)
			fail_msg("there are %u descriptors, %u before the flood", count_fds(),
				 at_most);
		g_usleep(10000);
	}
}

static void a_flood_does_not_disturb_a_migration(void **state)
{
	static const char garbage[64] = "GET / HTTP/1.1\r\n\r\n";
	static const char tls[] = "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
	/* Longer than PAIR_LASTS, so that all floods end before the migration. */
	PairConfig config = {
		.scheme = *state, .size = 64 * MIB, .bandwidth = MIB / 4, .pace_us = 500000};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autoptr(GByteArray) hello = foreign_hello(*state);
	g_autoptr(GByteArray) lane = NULL;
	g_autoptr(GPtrArray) floods = g_ptr_array_new_with_free_func((GDestroyNotify)flood_free);
	guint fds, port;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	/* The fence opens a descriptor, so the test counts descriptors after it. */
	pair_wait_fenced(pair, TRUE);
	lane = foreign_lane(pair);
	port = port_of(pair);
	fds = count_fds();
	const struct {
		const void *bytes;
		gsize n;
	} kinds[] = {
		{NULL, 0},
		{garbage, sizeof(garbage)},
		{tls, sizeof(tls) - 1},
		{hello->data, hello->len},
		{lane->data, lane->len},
	};
	for (guint i = 0; i < G_N_ELEMENTS(kinds); i++)
		g_ptr_array_add(floods, flood_new("127.0.0.2", port, kinds[i].bytes, kinds[i].n));
	for (guint i = 0; i < floods->len; i++)
		assert_true(flood_wait(floods->pdata[i], 400));
	assert_int_equal(side_state(&pair->source), PR_STATE_POSTCOPY_ACTIVE);
	assert_int_equal(pauses(&pair->source), 0);
	assert_int_equal(pauses(&pair->destination), 0);

	/* The real source recovers while the floods go on. */
	for (guint64 n = 1; n <= 3; n++) {
		pr_faults_cut_paths(pair->faults);
		pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
		pair_resume(pair);
		pair_wait_recovered(pair, n);
	}
	for (guint i = 0; i < floods->len; i++)
		assert_true(flood_wait(floods->pdata[i], 100));
	assert_int_equal(pauses(&pair->source), 3);
	g_ptr_array_set_size(floods, 0);
	wait_fds(fds);

	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	assert_int_equal(pauses(&pair->destination), 3);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(a_flood_does_not_disturb_a_migration),
	};

	return RUN_CASES("flood", tests);
}
