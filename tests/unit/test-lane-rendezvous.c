/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which lane goes to which accept(), and which lanes are refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <string.h>

#include "transport/lane-rendezvous.h"

#define NEVER_MS 60000

typedef struct Bench {
	PrPendingLanes *pending;
	PrUri *uri;
	GMutex lock;
	GCond changed;
	GPtrArray *refused; /* lock */
} Bench;

static void refuse(gpointer lane, const char *reason, gpointer opaque)
{
	Bench *bench = opaque;

	assert_non_null(reason);
	g_mutex_lock(&bench->lock);
	g_ptr_array_add(bench->refused, lane);
	g_cond_broadcast(&bench->changed);
	g_mutex_unlock(&bench->lock);
}

static int setup(void **state)
{
	Bench *bench = g_new0(Bench, 1);

	g_mutex_init(&bench->lock);
	g_cond_init(&bench->changed);
	bench->refused = g_ptr_array_new();
	bench->uri = pr_uri_parse("tcp:127.0.0.1:1", FALSE, NULL);
	bench->pending = pr_pending_lanes_new(refuse, bench, NULL);
	*state = bench;
	return 0;
}

static int teardown(void **state)
{
	Bench *bench = *state;

	pr_pending_lanes_free(bench->pending);
	g_ptr_array_unref(bench->refused);
	pr_uri_free(bench->uri);
	g_mutex_clear(&bench->lock);
	g_cond_clear(&bench->changed);
	g_free(bench);
	return 0;
}

static PrPathSetup waiter(Bench *bench, uint64_t epoch)
{
	return (PrPathSetup){
		.uri = bench->uri,
		.binding = {.uuid = {1, 2, 3}, .epoch = epoch, .secret = {4, 5, 6}},
	};
}

/* A lane is a number here. */
static void offer(Bench *bench, guint number, const PrPathSetup *setup, PrLaneId lane)
{
	PrLaneHello hello;

	pr_backend_lane_hello(&hello, &setup->binding, lane);
	pr_pending_lanes_offer(bench->pending, GUINT_TO_POINTER(number), &hello);
}

static guint claim(Bench *bench, const PrPathSetup *setup, guint ms, PrLaneId *ret_lane)
{
	return GPOINTER_TO_UINT(pr_pending_lanes_claim(bench->pending, setup,
						       pr_backend_deadline(ms), ret_lane, NULL));
}

static gboolean is_refused(Bench *bench, guint number)
{
	gboolean found;

	g_mutex_lock(&bench->lock);
	found = g_ptr_array_find(bench->refused, GUINT_TO_POINTER(number), NULL);
	g_mutex_unlock(&bench->lock);
	return found;
}

static void each_accept_gets_the_lanes_of_its_binding(void **state)
{
	Bench *bench = *state;
	PrPathSetup old = waiter(bench, 3), new = waiter(bench, 4);
	PrLaneId lane;

	pr_pending_lanes_expect(bench->pending, &old.binding);
	pr_pending_lanes_expect(bench->pending, &new.binding);
	offer(bench, 41, &new, PR_LANE_BULK);
	offer(bench, 31, &old, PR_LANE_URGENT);
	assert_int_equal(claim(bench, &old, NEVER_MS, &lane), 31);
	assert_int_equal(lane, PR_LANE_URGENT);
	assert_int_equal(claim(bench, &new, NEVER_MS, &lane), 41);
	assert_int_equal(lane, PR_LANE_BULK);
	pr_pending_lanes_forget(bench->pending, &old.binding);
	pr_pending_lanes_forget(bench->pending, &new.binding);
	assert_int_equal(bench->refused->len, 0);
}

static void an_unexpected_lane_is_refused_while_another_is_expected(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3), past = waiter(bench, 2), stranger = setup;
	PrLaneId lane;

	stranger.binding.secret[0] ^= 1;
	pr_pending_lanes_expect(bench->pending, &setup.binding);
	offer(bench, 1, &past, PR_LANE_BULK);
	offer(bench, 2, &stranger, PR_LANE_BULK);
	assert_true(is_refused(bench, 1));
	assert_true(is_refused(bench, 2));
	assert_int_equal(claim(bench, &setup, 1, &lane), 0);
	pr_pending_lanes_forget(bench->pending, &setup.binding);
}

static void an_expected_lane_is_held_for_its_claim(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3), other = waiter(bench, 2);
	PrLaneId lane;

	pr_pending_lanes_expect(bench->pending, &setup.binding);
	pr_pending_lanes_expect(bench->pending, &other.binding);
	pr_pending_lanes_expect(bench->pending, &other.binding);
	offer(bench, 7, &other, PR_LANE_BULK);
	assert_int_equal(claim(bench, &setup, 1, &lane), 0);
	assert_int_equal(claim(bench, &other, NEVER_MS, &lane), 7);
	pr_pending_lanes_forget(bench->pending, &other.binding);
	offer(bench, 8, &other, PR_LANE_BULK);
	assert_true(is_refused(bench, 8));
	pr_pending_lanes_forget(bench->pending, &setup.binding);
}

static void held_lanes_are_refused_when_others_are_expected(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3), stranger = setup;

	stranger.binding.uuid[0] ^= 1;
	offer(bench, 1, &stranger, PR_LANE_BULK);
	assert_false(is_refused(bench, 1));
	pr_pending_lanes_expect(bench->pending, &setup.binding);
	assert_true(is_refused(bench, 1));
	pr_pending_lanes_forget(bench->pending, &setup.binding);
}

static void a_flood_evicts_the_oldest(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	PrLaneId lane;

	for (guint i = 1; i <= PR_PENDING_LANES_MAX + 3; i++)
		offer(bench, i, &setup, PR_LANE_BULK);
	assert_int_equal(bench->refused->len, 3);
	assert_int_equal(claim(bench, &setup, NEVER_MS, &lane), 4);
}

static void a_held_lane_expires(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	gint64 deadline = g_get_monotonic_time() + (PR_PENDING_LANES_MS + 30000) * 1000ll;

	offer(bench, 1, &setup, PR_LANE_BULK);
	g_mutex_lock(&bench->lock);
	while (!bench->refused->len && g_cond_wait_until(&bench->changed, &bench->lock, deadline))
		;
	g_mutex_unlock(&bench->lock);
	assert_true(is_refused(bench, 1));
}

static gboolean is_number(gconstpointer lane, gconstpointer number)
{
	return lane == number;
}

static void a_lane_that_its_peer_has_closed_can_be_withdrawn(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	PrLaneId lane;

	offer(bench, 1, &setup, PR_LANE_BULK);
	offer(bench, 2, &setup, PR_LANE_BULK);
	assert_ptr_equal(pr_pending_lanes_withdraw(bench->pending, is_number, GUINT_TO_POINTER(1)),
			 GUINT_TO_POINTER(1));
	assert_null(pr_pending_lanes_withdraw(bench->pending, is_number, GUINT_TO_POINTER(1)));
	assert_int_equal(claim(bench, &setup, NEVER_MS, &lane), 2);
}

/* The URI goes into a refusal, whose length is limited. */
static void the_error_of_a_claim_has_the_address_without_options(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	g_autoptr(GError) error = NULL;
	g_autofree char *id = g_strnfill(5000, 'x');
	g_autofree char *text = g_strconcat("faulty+tcp:127.0.0.1:1?id=", id, NULL);
	g_autoptr(PrUri) uri = pr_uri_parse(text, FALSE, NULL);
	PrLaneId lane;

	setup.uri = uri;
	assert_null(pr_pending_lanes_claim(bench->pending, &setup, pr_backend_deadline(1), &lane,
					   &error));
	assert_true(g_str_has_prefix(error->message, "path faulty+tcp:127.0.0.1:1: waiting for"));
}

static gpointer cancel_it(gpointer cancel)
{
	g_cancellable_cancel(cancel);
	return NULL;
}

static void a_claim_can_be_cancelled(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	g_autoptr(GCancellable) cancel = g_cancellable_new();
	g_autoptr(GError) error = NULL;
	GThread *thread = g_thread_new("cancel", cancel_it, cancel);
	PrLaneId lane;

	setup.cancel = cancel;
	assert_null(pr_pending_lanes_claim(bench->pending, &setup, pr_backend_deadline(NEVER_MS),
					   &lane, &error));
	assert_true(g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	g_thread_join(thread);
}

#define WITH_BENCH(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

/* The token does not contain the secret, and it differs for each lane, epoch and migration. */
static void a_token_is_good_for_one_lane_of_one_connection(void **state)
{
	PrBinding binding = {.uuid = {1, 2, 3}, .epoch = 7, .secret = "0123456789abcde"};
	PrBinding next = binding, foreign = binding, guess = binding;
	g_autoptr(GByteArray) bytes = g_byte_array_new();
	PrLaneHello urgent, bulk, later;

	next.epoch++;
	foreign.uuid[0] ^= 1;
	guess.secret[0] ^= 1;
	pr_backend_lane_hello(&urgent, &binding, PR_LANE_URGENT);
	pr_backend_lane_hello(&bulk, &binding, PR_LANE_BULK);
	pr_backend_lane_hello(&later, &next, PR_LANE_URGENT);
	assert_true(pr_backend_binding_matches(&binding, &urgent));
	assert_true(pr_backend_binding_matches(&binding, &bulk));
	assert_false(pr_backend_binding_matches(&guess, &urgent));
	assert_memory_not_equal(urgent.token, bulk.token, PR_TOKEN_BYTES);
	assert_memory_not_equal(urgent.token, later.token, PR_TOKEN_BYTES);

	/*
	 * An attacker may replay a token that he has read on the wire for another lane, epoch or
	 * migration.
	 */
	later = urgent;
	later.lane = PR_LANE_BULK;
	assert_false(pr_backend_binding_matches(&binding, &later));
	later = urgent;
	later.epoch = next.epoch;
	assert_false(pr_backend_binding_matches(&next, &later));
	later = urgent;
	memcpy(later.uuid, foreign.uuid, PR_UUID_BYTES);
	assert_false(pr_backend_binding_matches(&foreign, &later));

	pr_lane_hello_encode(bytes, &urgent);
	assert_int_equal(bytes->len, PR_LANE_HELLO_BYTES);
	assert_null(memmem(bytes->data, bytes->len, binding.secret, 4));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_token_is_good_for_one_lane_of_one_connection),
		WITH_BENCH(each_accept_gets_the_lanes_of_its_binding),
		WITH_BENCH(an_unexpected_lane_is_refused_while_another_is_expected),
		WITH_BENCH(an_expected_lane_is_held_for_its_claim),
		WITH_BENCH(held_lanes_are_refused_when_others_are_expected),
		WITH_BENCH(a_flood_evicts_the_oldest),
		WITH_BENCH(a_held_lane_expires),
		WITH_BENCH(a_lane_that_its_peer_has_closed_can_be_withdrawn),
		WITH_BENCH(the_error_of_a_claim_has_the_address_without_options),
		WITH_BENCH(a_claim_can_be_cancelled),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
