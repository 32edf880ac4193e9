/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Each fault does what its option says, once and nothing else. */
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include "tests/rigs/transport-rig.h"
#include "transport/faulty/faulty.h"
#include "transport/registry.h"

#define PAGE 4096

/* Both sides of the rig use the same URI and so the same faults. Only the destination READs. */
static Rig *new_rig(const char *id, const char *more)
{
	g_autofree char *options = g_strdup_printf("?fault-id=%s%s", id, more);

	return rig_new("faulty+tcp", options);
}

static void reconnect(Rig *rig)
{
	g_clear_pointer(&rig->destination.path, pr_data_path_destroy);
	g_clear_pointer(&rig->source.path, pr_data_path_destroy);
	rig->binding.epoch++;
	rig_connect(rig);
}

static gboolean read_page(Rig *rig, guint page)
{
	return rig_read(rig, PR_LANE_URGENT, 0, page * PAGE, PAGE);
}

static void assert_pages_can_be_read(Rig *rig, guint n)
{
	for (guint i = 0; i < n; i++)
		assert_true(read_page(rig, i));
	rig_assert_read(rig, 0, 0, n * PAGE);
}

/* Asserts that the lane sleeps for so long and reports no completion. */
static void assert_nothing_completes(Rig *rig, PrLaneId lane, guint ms)
{
	gint64 end = g_get_monotonic_time() + ms * 1000;
	gint64 left;

	while ((left = end - g_get_monotonic_time()) > 0) {
		struct pollfd fd = {.fd = rig->ops->wait_fd(rig->destination.path, lane),
				    .events = POLLIN};
		PrCompletion done;

		assert_int_equal(rig->ops->poll(rig->destination.path, lane, &done, 1), 0);
		if (rig->ops->arm(rig->destination.path, lane))
			assert_int_equal(poll(&fd, 1, (int)(left / 1000) + 1), 0);
	}
}

static void cut_after_reads_fails_the_path_at_that_read_once(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("cut-reads");
	g_autoptr(Rig) rig = new_rig("cut-reads", "&cut-after-reads=5");

	rig_connect(rig);
	assert_pages_can_be_read(rig, 4);
	assert_false(read_page(rig, 4));
	assert_int_equal(rig->destination.n_failures, 1);
	assert_non_null(strstr(rig->destination.reason, "fault injection"));
	assert_false(read_page(rig, 4));
	assert_int_equal(pr_faults_counts(faults).reads, 5);
	assert_int_equal(pr_faults_counts(faults).fired, 1);
	reconnect(rig);
	assert_pages_can_be_read(rig, 20);
	assert_int_equal(rig->destination.n_failures, 1);
	assert_int_equal(pr_faults_counts(faults).fired, 1);
	assert_int_equal(pr_faults_counts(faults).paths, 4);
}

static void a_cut_fails_the_reads_that_are_outstanding(void **state)
{
	g_autoptr(Rig) rig = new_rig("cut-window", "&cut-after-reads=9");

	rig_connect(rig);
	rig_post(rig, PR_LANE_BULK, 8, PR_READ_MAX);
	assert_false(rig->ops->post_read(rig->destination.path, PR_LANE_URGENT, 0, 0, PAGE, 1));
	assert_int_equal(rig_await_all(rig, PR_LANE_BULK, 8), 0);
	assert_int_equal(rig->destination.n_failures, 1);
}

static void stall_after_reads_keeps_later_ones_until_shutdown(void **state)
{
	g_autoptr(Rig) rig = new_rig("stall", "&stall-after-reads=3");

	rig_connect(rig);
	assert_pages_can_be_read(rig, 3);
	rig_post(rig, PR_LANE_BULK, 2, PAGE);
	rig_post(rig, PR_LANE_URGENT, 3, PAGE);
	assert_nothing_completes(rig, PR_LANE_BULK, 50);
	assert_nothing_completes(rig, PR_LANE_URGENT, 50);
	rig->ops->shutdown(rig->destination.path);
	assert_int_equal(rig_await_all(rig, PR_LANE_BULK, 2), 0);
	assert_int_equal(rig_await_all(rig, PR_LANE_URGENT, 3), 0);
	assert_int_equal(rig->destination.n_failures, 0);
	reconnect(rig);
	assert_pages_can_be_read(rig, 10);
}

static void error_read_fails_that_completion_and_the_path(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("error-read");
	g_autoptr(Rig) rig = new_rig("error-read", "&error-read=2");

	rig_connect(rig);
	assert_true(read_page(rig, 0));
	assert_false(read_page(rig, 1));
	assert_int_equal(rig->destination.n_failures, 1);
	assert_int_equal(pr_faults_counts(faults).completions, 2);
	reconnect(rig);
	assert_pages_can_be_read(rig, 10);
}

static void delay_ms_delays_each_read_but_not_the_window(void **state)
{
	g_autoptr(Rig) rig = new_rig("delay", "&delay-ms=1000");
	gint64 begin, taken;

	rig_connect(rig);
	begin = g_get_monotonic_time();
	rig_post(rig, PR_LANE_URGENT, 16, PAGE);
	assert_int_equal(rig_await_all(rig, PR_LANE_URGENT, 16), 16);
	taken = g_get_monotonic_time() - begin;
	assert_true(taken >= G_USEC_PER_SEC);
	/* If each READ waited for the one before, all would take 16 s. */
	assert_true(taken < 16 * G_USEC_PER_SEC);
	rig_assert_read(rig, 0, 0, 16 * PAGE);
}

static void cut_after_messages_cuts_at_that_message_once(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("cut-messages");
	g_autoptr(Rig) rig = new_rig("cut-messages", "&cut-after-messages=3");
	const PrTransportOps *ops = rig->ops;

	assert_true(ops->admit_message(rig->uri, TRUE, PR_CMD_PING));
	for (guint i = 0; i < 5; i++)
		assert_true(ops->admit_message(rig->uri, i & 1, PR_MSG_HEARTBEAT));
	assert_true(ops->admit_message(rig->uri, FALSE, PR_RP_PONG));
	assert_false(ops->admit_message(rig->uri, TRUE, PR_CMD_POSTCOPY_LISTEN));
	for (guint i = 0; i < 10; i++)
		assert_true(ops->admit_message(rig->uri, i & 1, PR_CMD_PING));
	assert_int_equal(pr_faults_counts(faults).messages, 13);
	assert_int_equal(pr_faults_counts(faults).fired, 1);
}

static void cut_next_message_cuts_one(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("cut-next");
	g_autoptr(Rig) rig = new_rig("cut-next", "");

	assert_true(rig->ops->admit_message(rig->uri, TRUE, PR_CMD_PING));
	pr_faults_cut_next_message(faults);
	assert_true(rig->ops->admit_message(rig->uri, TRUE, PR_MSG_HEARTBEAT));
	assert_false(rig->ops->admit_message(rig->uri, FALSE, PR_RP_PONG));
	assert_true(rig->ops->admit_message(rig->uri, FALSE, PR_RP_PONG));
}

static void cut_paths_fails_all_open_paths_at_once(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("cut-now");
	g_autoptr(Rig) rig = new_rig("cut-now", "");

	rig_connect(rig);
	assert_true(read_page(rig, 0));
	pr_faults_cut_paths(faults);
	rig_await_failure(&rig->destination);
	rig_await_failure(&rig->source);
	assert_false(read_page(rig, 1));
	reconnect(rig);
	assert_pages_can_be_read(rig, 10);
	assert_int_equal(rig->destination.n_failures, 1);
}

static void stall_paths_stalls_open_paths_until_shutdown(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("stall-now");
	g_autoptr(Rig) rig = new_rig("stall-now", "");

	rig_connect(rig);
	assert_true(read_page(rig, 0));
	pr_faults_stall_paths(faults);
	rig_post(rig, PR_LANE_URGENT, 1, PAGE);
	assert_nothing_completes(rig, PR_LANE_URGENT, 50);
	rig->ops->shutdown(rig->destination.path);
	assert_int_equal(rig_await_all(rig, PR_LANE_URGENT, 1), 0);
	reconnect(rig);
	assert_pages_can_be_read(rig, 10);
}

static void a_new_plan_can_happen_again(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("plan");
	g_autoptr(Rig) rig = new_rig("plan", "");

	for (guint i = 1; i <= 3; i++) {
		PrFaultPlan plan = {.cut_after_reads = pr_faults_counts(faults).reads + 3};

		pr_faults_set_plan(faults, &plan);
		reconnect(rig);
		assert_pages_can_be_read(rig, 2);
		assert_false(read_page(rig, 2));
		assert_int_equal(pr_faults_counts(faults).fired, i);
	}
}

static void different_ids_are_counted_apart(void **state)
{
	g_autoptr(PrFaults) a = pr_faults_new("apart-a"), b = pr_faults_new("apart-b");
	g_autoptr(Rig) rig_a = new_rig("apart-a", ""), rig_b = new_rig("apart-b", "");

	rig_connect(rig_a);
	rig_connect(rig_b);
	assert_pages_can_be_read(rig_a, 3);
	assert_int_equal(pr_faults_counts(a).reads, 3);
	assert_int_equal(pr_faults_counts(b).reads, 0);
	pr_faults_cut_paths(a);
	rig_await_failure(&rig_a->destination);
	assert_pages_can_be_read(rig_b, 3);
}

static void without_an_id_the_text_of_the_uri_counts(void **state)
{
	g_autoptr(Rig) rig = rig_new("faulty+tcp", "?cut-after-reads=2");

	rig_connect(rig);
	assert_true(read_page(rig, 0));
	assert_false(read_page(rig, 1));
	reconnect(rig);
	assert_pages_can_be_read(rig, 10);
}

static gpointer pull_until_failure(gpointer opaque)
{
	Rig *rig = opaque;
	guint posted = 0, completed = 0;

	while (rig->ops->post_read(rig->destination.path, PR_LANE_BULK, 1,
				   (uint64_t)posted % 2048 * PAGE, PAGE, posted)) {
		PrCompletion done[4];

		if (++posted - completed == 16)
			completed += rig_await(rig, PR_LANE_BULK, done, G_N_ELEMENTS(done));
	}
	while (completed < posted) {
		PrCompletion done[4];

		completed += rig_await(rig, PR_LANE_BULK, done, G_N_ELEMENTS(done));
	}
	return GUINT_TO_POINTER(posted);
}

static void a_cut_under_load_completes_every_read(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("load");
	g_autoptr(Rig) rig = new_rig("load", "");
	GThread *thread;
	guint posted;

	rig_connect(rig);
	thread = g_thread_new("puller", pull_until_failure, rig);
	while (pr_faults_counts(faults).completions < 100)
		g_usleep(100);
	pr_faults_cut_paths(faults);
	posted = GPOINTER_TO_UINT(g_thread_join(thread));
	assert_true(posted >= 100);
	assert_true(pr_faults_counts(faults).completions <= posted);
	assert_int_equal(rig->destination.n_failures, 1);
}

static void assert_listen_fails(const char *text, const char *domain_part)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrUri) uri = pr_uri_parse(text, TRUE, &error);
	const PrTransportOps *ops;

	assert_non_null(uri);
	ops = pr_transport_find(uri->scheme, &error);
	assert_non_null(ops);
	assert_null(ops->listen(uri, &error));
	assert_non_null(error);
	assert_non_null(strstr(error->message, domain_part));
}

static void a_bad_number_is_refused_with_the_options_name(void **state)
{
	assert_listen_fails("faulty+tcp:127.0.0.1:1?cut-after-reads=0", "cut-after-reads");
	assert_listen_fails("faulty+tcp:127.0.0.1:1?stall-after-reads=x", "stall-after-reads");
	assert_listen_fails("faulty+tcp:127.0.0.1:1?error-read=-1", "error-read");
	assert_listen_fails("faulty+tcp:127.0.0.1:1?delay-ms=60001", "60000");
	assert_listen_fails("faulty+tcp:127.0.0.1:1?cut-after-messages=1e3", "1e3");
}

static void other_options_go_to_the_inner_backend(void **state)
{
	assert_listen_fails("faulty+ofi:127.0.0.1:1?delay-ms=1&provider=nonesuch", "nonesuch");
	assert_listen_fails("faulty+ofi:127.0.0.1:1?delay-ms=1&data-port=0", "data-port");
}

static void every_option_is_in_the_help(void **state)
{
	static const char *const options[] = {"cut-after-messages", "cut-after-reads",
					      "stall-after-reads",  "error-read",
					      "delay-ms",	    "fault-id"};
	g_autoptr(GString) help = g_string_new(NULL);

	pr_transport_describe(help);
	for (guint i = 0; i < G_N_ELEMENTS(options); i++)
		assert_non_null(strstr(help->str, options[i]));
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(cut_after_reads_fails_the_path_at_that_read_once),
		cmocka_unit_test(a_cut_fails_the_reads_that_are_outstanding),
		cmocka_unit_test(stall_after_reads_keeps_later_ones_until_shutdown),
		cmocka_unit_test(error_read_fails_that_completion_and_the_path),
		cmocka_unit_test(delay_ms_delays_each_read_but_not_the_window),
		cmocka_unit_test(cut_after_messages_cuts_at_that_message_once),
		cmocka_unit_test(cut_next_message_cuts_one),
		cmocka_unit_test(cut_paths_fails_all_open_paths_at_once),
		cmocka_unit_test(stall_paths_stalls_open_paths_until_shutdown),
		cmocka_unit_test(a_new_plan_can_happen_again),
		cmocka_unit_test(different_ids_are_counted_apart),
		cmocka_unit_test(without_an_id_the_text_of_the_uri_counts),
		cmocka_unit_test(a_cut_under_load_completes_every_read),
		cmocka_unit_test(a_bad_number_is_refused_with_the_options_name),
		cmocka_unit_test(other_options_go_to_the_inner_backend),
		cmocka_unit_test(every_option_is_in_the_help),
	};

	rig_main_source(argc, argv);
	return cmocka_run_group_tests_name("faulty", tests, NULL, NULL);
}
