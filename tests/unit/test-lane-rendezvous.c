/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Where lanes and accept()s meet: who gets what, and what becomes of the rest. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <string.h>

#include "transport/lane-rendezvous.h"

#define NEVER_MS 60000

typedef struct Bench {
	PrPendingLanes *desk;
	PrUri *uri;
	GMutex lock;
	GCond changed;
	GPtrArray *refused; /* lock */
} Bench;

static void refuse(gpointer arrival, const char *reason, gpointer opaque)
{
	Bench *bench = opaque;

	assert_non_null(reason);
	g_mutex_lock(&bench->lock);
	g_ptr_array_add(bench->refused, arrival);
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
	bench->desk = pr_pending_lanes_new(refuse, bench, NULL);
	*state = bench;
	return 0;
}

static int teardown(void **state)
{
	Bench *bench = *state;

	pr_pending_lanes_free(bench->desk);
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

/* Arrivals are numbers here. */
static void offer(Bench *bench, guint number, const PrPathSetup *whose, PrLaneId lane)
{
	PrLaneHello hello;

	pr_backend_lane_hello(&hello, &whose->binding, lane);
	pr_pending_lanes_offer(bench->desk, GUINT_TO_POINTER(number), &hello);
}

static guint claim(Bench *bench, const PrPathSetup *setup, guint ms, PrLaneId *ret_lane)
{
	return GPOINTER_TO_UINT(pr_pending_lanes_claim(bench->desk, setup, pr_backend_deadline(ms),
						       ret_lane, NULL));
}

static gboolean is_refused(Bench *bench, guint number)
{
	gboolean found;

	g_mutex_lock(&bench->lock);
	found = g_ptr_array_find(bench->refused, GUINT_TO_POINTER(number), NULL);
	g_mutex_unlock(&bench->lock);
	return found;
}

static void each_accept_gets_its_own(void **state)
{
	Bench *bench = *state;
	PrPathSetup old = waiter(bench, 3), new = waiter(bench, 4);
	PrLaneId lane;

	pr_pending_lanes_expect(bench->desk, &old.binding);
	pr_pending_lanes_expect(bench->desk, &new.binding);
	offer(bench, 41, &new, PR_LANE_BULK);
	offer(bench, 31, &old, PR_LANE_URGENT);
	assert_int_equal(claim(bench, &old, NEVER_MS, &lane), 31);
	assert_int_equal(lane, PR_LANE_URGENT);
	assert_int_equal(claim(bench, &new, NEVER_MS, &lane), 41);
	assert_int_equal(lane, PR_LANE_BULK);
	pr_pending_lanes_forget(bench->desk, &old.binding);
	pr_pending_lanes_forget(bench->desk, &new.binding);
	assert_int_equal(bench->refused->len, 0);
}

static void what_nobody_expects_is_refused_while_somebody_waits(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3), past = waiter(bench, 2), stranger = setup;
	PrLaneId lane;

	stranger.binding.secret[0] ^= 1;
	pr_pending_lanes_expect(bench->desk, &setup.binding);
	offer(bench, 1, &past, PR_LANE_BULK);
	offer(bench, 2, &stranger, PR_LANE_BULK);
	assert_true(is_refused(bench, 1));
	assert_true(is_refused(bench, 2));
	assert_int_equal(claim(bench, &setup, 1, &lane), 0);
	pr_pending_lanes_forget(bench->desk, &setup.binding);
}

static void what_is_expected_is_kept_for_the_claim_that_comes(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3), other = waiter(bench, 2);
	PrLaneId lane;

	pr_pending_lanes_expect(bench->desk, &setup.binding);
	pr_pending_lanes_expect(bench->desk, &other.binding);
	pr_pending_lanes_expect(bench->desk, &other.binding);
	offer(bench, 7, &other, PR_LANE_BULK);
	assert_int_equal(claim(bench, &setup, 1, &lane), 0);
	assert_int_equal(claim(bench, &other, NEVER_MS, &lane), 7);
	pr_pending_lanes_forget(bench->desk, &other.binding);
	offer(bench, 8, &other, PR_LANE_BULK);
	assert_true(is_refused(bench, 8));
	pr_pending_lanes_forget(bench->desk, &setup.binding);
}

static void strangers_that_came_early_go_when_somebody_waits(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3), stranger = setup;

	stranger.binding.uuid[0] ^= 1;
	offer(bench, 1, &stranger, PR_LANE_BULK);
	assert_false(is_refused(bench, 1));
	pr_pending_lanes_expect(bench->desk, &setup.binding);
	assert_true(is_refused(bench, 1));
	pr_pending_lanes_forget(bench->desk, &setup.binding);
}

static void a_flood_pushes_the_oldest_out(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	PrLaneId lane;

	for (guint i = 1; i <= PR_DESK_HELD + 3; i++)
		offer(bench, i, &setup, PR_LANE_BULK);
	assert_int_equal(bench->refused->len, 3);
	assert_int_equal(claim(bench, &setup, NEVER_MS, &lane), 4);
}

static void what_nobody_wants_is_refused_after_a_while(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	gint64 deadline = g_get_monotonic_time() + (PR_DESK_HOLD_MS + 30000) * 1000ll;

	offer(bench, 1, &setup, PR_LANE_BULK);
	g_mutex_lock(&bench->lock);
	while (!bench->refused->len && g_cond_wait_until(&bench->changed, &bench->lock, deadline))
		;
	g_mutex_unlock(&bench->lock);
	assert_true(is_refused(bench, 1));
}

static gboolean is_number(gconstpointer arrival, gconstpointer number)
{
	return arrival == number;
}

static void what_has_come_to_nothing_can_be_withdrawn(void **state)
{
	Bench *bench = *state;
	PrPathSetup setup = waiter(bench, 3);
	PrLaneId lane;

	offer(bench, 1, &setup, PR_LANE_BULK);
	offer(bench, 2, &setup, PR_LANE_BULK);
	assert_ptr_equal(pr_pending_lanes_withdraw(bench->desk, is_number, GUINT_TO_POINTER(1)),
			 GUINT_TO_POINTER(1));
	assert_null(pr_pending_lanes_withdraw(bench->desk, is_number, GUINT_TO_POINTER(1)));
	assert_int_equal(claim(bench, &setup, NEVER_MS, &lane), 2);
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
	assert_null(pr_pending_lanes_claim(bench->desk, &setup, pr_backend_deadline(NEVER_MS),
					   &lane, &error));
	assert_true(g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	g_thread_join(thread);
}

#define WITH_DESK(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

/* As long as the secret is not to be found in it, and what it was made for differs. */
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

	/* What was read on the wire, said again for something else. */
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
		WITH_DESK(each_accept_gets_its_own),
		WITH_DESK(what_nobody_expects_is_refused_while_somebody_waits),
		WITH_DESK(what_is_expected_is_kept_for_the_claim_that_comes),
		WITH_DESK(strangers_that_came_early_go_when_somebody_waits),
		WITH_DESK(a_flood_pushes_the_oldest_out),
		WITH_DESK(what_nobody_wants_is_refused_after_a_while),
		WITH_DESK(what_has_come_to_nothing_can_be_withdrawn),
		WITH_DESK(a_claim_can_be_cancelled),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
