/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The monitor at its real socket, with a fake engine. */
#include <errno.h>
#include <fcntl.h>
#include <gio/gio.h>
#include <gio/gunixsocketaddress.h>
#include <glib/gstdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "monitor/hmp.h"
#include "tests/rigs/fake-engine.h"
#include "util/json-framer.h"

/* The error for an escape that is half of a surrogate pair. json-glib before 1.10 accepts it, and
 * the monitor refuses the result. */
#define NO_PAIR (JSON_CHECK_VERSION(1, 10, 0) ? "surrogate pair" : "does not encode a character")

static void assert_contains(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' is not in: %s", part, text);
}

static void the_greeting_is_qemus(void **state)
{
	g_autoptr(Client) client = client_new(*state);
	G_GNUC_UNUSED g_autoptr(JsonNode) greeting = client_receive(client);
	JsonObject *qmp = json_object_get_object_member(json_node_get_object(greeting), "QMP");
	JsonArray *caps = json_object_get_array_member(qmp, "capabilities");
	JsonObject *version = json_object_get_object_member(qmp, "version");

	assert_int_equal(json_array_get_length(caps), 1);
	assert_string_equal(json_array_get_string_element(caps, 0), "oob");
	assert_true(
		json_object_has_member(json_object_get_object_member(version, "qemu"), "major"));
	assert_string_equal(json_object_get_string_member(version, "package"),
			    "postroad-" PR_VERSION);
}

/* One command of a conversation: the request, and a part of the expected answer. */
typedef struct Turn {
	const char *sent;
	const char *answer;
	const char *call; /* the expected call of the engine; NULL: any */
} Turn;

static void converse(Bench *bench, Client *client, const Turn *turns, guint n)
{
	for (guint i = 0; i < n; i++) {
		g_autofree char *answer = client_request(client, turns[i].sent);
		g_autofree char *call = fake_last_call(bench->migration);

		assert_contains(answer, turns[i].answer);
		if (turns[i].call)
			assert_string_equal(call, turns[i].call);
	}
}

static void commands_are_refused_before_the_negotiation(void **state)
{
	static const Turn turns[] = {
		{"{\"execute\":\"query-migrate\"}", "Expecting capabilities negotiation"},
		{"{\"execute\":\"quit\"}", "\"CommandNotFound\""},
		{"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"x\"]}}", "'x'"},
		{"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[1]}}", "array of"},
		{"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":\"oob\"}}",
		 "expected: array"},
		{"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}",
		 "{\"return\":{}}"},
		{"{\"execute\":\"qmp_capabilities\"}", "already complete"},
		{"{\"exec-oob\":\"migrate-pause\"}", "{\"return\":{}}", "pause"},
	};
	g_autoptr(Client) client = client_new(*state);
	G_GNUC_UNUSED g_autoptr(JsonNode) greeting = client_receive(client);

	converse(*state, client, turns, G_N_ELEMENTS(turns));
	assert_int_equal(g_atomic_int_get(&((Bench *)*state)->quits), 0);
}

static void every_command_succeeds_with_valid_arguments(void **state)
{
	static const Turn turns[] = {
		{"{\"execute\":\"query-version\"}", "{\"return\":{\"qemu\":{\"major\":"},
		{"{\"execute\":\"query-commands\"}", "{\"name\":\"migrate_cancel\"}"},
		{"{\"execute\":\"query-migrate\"}", "\"status\":\"none\""},
		{"{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:a:1,tcp:b:2\"}}",
		 "{\"return\":{}}", "start tcp:a:1,tcp:b:2"},
		{"{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:b:2\",\"resume\":true,"
		 "\"detach\":true,\"blk\":false,\"inc\":false}}",
		 "{\"return\":{}}", "start tcp:b:2 resume"},
		{"{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"tcp:a:1\"}}",
		 "{\"return\":{}}", "incoming tcp:a:1"},
		{"{\"execute\":\"migrate-recover\",\"arguments\":{\"uri\":\"tcp:c:1\"}}",
		 "{\"return\":{}}", "recover tcp:c:1"},
		{"{\"execute\":\"migrate-pause\"}", "{\"return\":{}}", "pause"},
		{"{\"execute\":\"migrate_cancel\",\"arguments\":{}}", "{\"return\":{}}", "cancel"},
		{"{\"execute\":\"query-migrate-capabilities\"}",
		 "{\"capability\":\"postcopy-ram\",\"state\":true}"},
		{"{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":"
		 "[{\"capability\":\"zero-pages\",\"state\":false}]}}",
		 "{\"return\":{}}"},
		{"{\"execute\":\"query-migrate-capabilities\"}",
		 "{\"capability\":\"zero-pages\",\"state\":false}"},
		{"{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"bulk-window\":16,"
		 "\"heartbeat-interval\":2000,\"heartbeat-timeout\":9000}}",
		 "{\"return\":{}}"},
		{"{\"execute\":\"query-migrate-parameters\"}", "\"heartbeat-interval\":2000"},
		{"{\"execute\":\"query-paths\"}",
		 "\"state\":\"failed\",\"since-ms\":1500,\"device\":\"mlx5_0\","
		 "\"last-error\":\"nothing heard\",\"rtt-us\":120,\"data-rtt-us\":9"},
		{"{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":"
		 "\"info status\",\"cpu-index\":0}}",
		 "Engine status: role destination"},
		{"{\"execute\":\"x-postroad-hmp\",\"arguments\":{\"command-line\":\"\"}}",
		 "{\"return\":\"\"}"},
		{"{\"execute\":\"quit\"}", "{\"return\":{}}"},
	};
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	converse(bench, client, turns, G_N_ELEMENTS(turns));
	assert_int_equal(g_atomic_int_get(&bench->quits), 1);
	assert_int_equal(pr_param(&bench->params, PR_PARAM_BULK_WINDOW), 16);
}

static void errors_name_the_mistake(void **state)
{
	static const Turn turns[] = {
		{"{\"execute\":\"frobnicate\"}",
		 "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"The command frobnicate"},
		{"{\"execute\":\"migrate\"}", "Parameter 'uri' is missing", ""},
		{"{\"execute\":\"migrate-incoming\"}", "Parameter 'uri' is missing", ""},
		{"{\"execute\":\"migrate-recover\",\"arguments\":{\"url\":\"x\"}}",
		 "Parameter 'url' is unexpected", ""},
		{"{\"execute\":\"migrate\",\"arguments\":{\"uri\":5}}",
		 "Invalid parameter type for 'uri', expected: string", ""},
		{"{\"execute\":\"migrate\",\"arguments\":{\"uri\":null}}", "expected: string", ""},
		{"{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"a\",\"resume\":1}}",
		 "'resume', expected: boolean", ""},
		{"{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"a\",\"blk\":true}}",
		 "'blk' is not supported", ""},
		{"{\"execute\":\"migrate\",\"arguments\":{\"channels\":[]}}",
		 "'channels' is not supported", ""},
		{"{\"execute\":\"migrate-pause\",\"arguments\":{\"now\":true}}",
		 "Parameter 'now' is unexpected", ""},
		{"{\"execute\":\"query-migrate\",\"arguments\":[]}",
		 "'arguments' must be an object"},
		{"{\"execute\":\"query-migrate\",\"argument\":{}}",
		 "QMP input member 'argument' is unexpected"},
		{"{\"execute\":\"quit\",\"exec-oob\":\"quit\"}", "'exec-oob' is unexpected"},
		{"{\"execute\":{}}", "'execute' must be a string"},
		{"{}", "lacks member 'execute'"},
		{"[]", "must be a JSON object"},
		{"[[[]\n", "ends in the middle"},
		{"{\"execute\":\"query-migrate\"\n", "ends in the middle"},
		{"{\"execute\":\"query\n", "ends in the middle"},
		{"hello\n", "JSON parse error"},
		{"}}\n", "JSON parse error"},
		{"{,}", "JSON parse error"},
		{"\"text\"\n", "must be a JSON object"},
		{"\xff\xfe\n", "not UTF-8"},
		{"{\"execute\":\"\\ud800\"}", "JSON parse error"},
		{"{\"execute\":\"quit\",\"id\":\"\\ud83ddu\\e00\"}", NO_PAIR},
		{"{\"execute\":\"quit\",\"id\":{\"a\":[1e999]}}", "number in it is too large"},
		{"{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"speed\":\"x\"}}",
		 "unknown parameter 'speed'"},
		{"{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"bulk-window\":\"8\"}}",
		 "'bulk-window', expected: integer"},
		{"{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"bulk-window\":-8}}",
		 "'bulk-window': '-8' is not valid"},
		{"{\"execute\":\"migrate-set-parameters\",\"arguments\":"
		 "{\"bulk-window\":9,\"fault-spin\":5000}}",
		 "from 0 to 1000 us"},
		{"{\"execute\":\"migrate-set-parameters\",\"arguments\":"
		 "{\"max-postcopy-bandwidth\":18446744073709551617}}",
		 "beyond 64 bits"},
		{"{\"execute\":\"migrate-set-capabilities\",\"arguments\":{}}",
		 "'capabilities' is missing"},
		{"{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[5]}}",
		 "Invalid element in 'capabilities'"},
		{"{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":"
		 "[{\"capability\":\"zero-pages\",\"state\":false},"
		 "{\"capability\":\"postcopy-ram\",\"state\":false}]}}",
		 "'postcopy-ram' is always on"},
		{"{\"execute\":\"human-monitor-command\"}", "'command-line' is missing"},
		{"{\"execute\":\"human-monitor-command\","
		 "\"arguments\":{\"command-line\":\"bogus\"}}",
		 "{\"return\":\"Error: unknown command: 'bogus'"},
		{"{\"execute\":\"x-postroad-hmp\",\"arguments\":{\"command-line\":\"bogus\"}}",
		 "{\"error\":{\"class\":\"GenericError\",\"desc\":\"unknown command: 'bogus'"},
		{"{\"execute\":\"query-version\"}", "\"package\""},
	};
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	converse(bench, client, turns, G_N_ELEMENTS(turns));
	/* A command with one wrong argument changes nothing. */
	assert_int_equal(pr_param(&bench->params, PR_PARAM_BULK_WINDOW), 32);
	assert_true(pr_capability(&bench->params, PR_CAP_ZERO_PAGES));
	assert_int_equal(g_atomic_int_get(&bench->quits), 0);
}

static void errors_of_the_engine_are_passed_on(void **state)
{
	static const char *const commands[] = {
		"{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:a:1\"}}",
		"{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"tcp:a:1\"}}",
		"{\"execute\":\"migrate-recover\",\"arguments\":{\"uri\":\"tcp:a:1\"}}",
		"{\"execute\":\"migrate-pause\"}",
		"{\"execute\":\"migrate_cancel\"}",
	};
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	for (guint i = 0; i < G_N_ELEMENTS(commands); i++) {
		g_autofree char *answer = NULL;

		fake_fail_next(bench->migration, "not in this state");
		answer = client_request(client, commands[i]);
		assert_string_equal(answer, "{\"error\":{\"class\":\"GenericError\","
					    "\"desc\":\"not in this state\"}}");
	}
}

static void answers_carry_ids_of_any_type(void **state)
{
	static const Turn turns[] = {
		{"{\"execute\":\"migrate-pause\",\"id\":7}", "{\"return\":{},\"id\":7}"},
		{"{\"execute\":\"migrate-pause\",\"id\":\"a b\"}", "\"id\":\"a b\"}"},
		{"{\"execute\":\"migrate-pause\",\"id\":{\"x\":[1,null]}}",
		 "\"id\":{\"x\":[1,null]}}"},
		{"{\"execute\":\"nope\",\"id\":8}", "\"id\":8}"},
		{"{\"id\":9}", "\"id\":9}"},
		{"{\"execute\":\"x-postroad-hmp\",\"arguments\":{\"command-line\":\"nope\"},"
		 "\"id\":10}",
		 "\"id\":10}"},
	};
	g_autoptr(Client) client = client_ready(*state);

	converse(*state, client, turns, G_N_ELEMENTS(turns));
}

static void messages_need_no_newline_and_may_be_split(void **state)
{
	g_autoptr(Client) client = client_ready(*state);
	g_autofree char *first = NULL, *second = NULL;

	client_send(client, "{\"execute\":\"migrate-pause\",");
	client_send(client, "\"id\":1}{\"execute\":\"migrate-pause\",\"id\":\"}{\\\"\"}  \r\n");
	first = client_request(client, NULL);
	second = client_request(client, NULL);
	assert_string_equal(first, "{\"return\":{},\"id\":1}");
	assert_string_equal(second, "{\"return\":{},\"id\":\"}{\\\"\"}");
}

static void query_migrate_has_the_fields_of_qemu_and_postroad(void **state)
{
	static const Turn turns[] = {
		{"{\"execute\":\"query-migrate\"}",
		 "\"status\":\"postcopy-paused\",\"total-time\":2000"},
		{"{\"execute\":\"query-migrate\"}",
		 "\"transferred\":41943040,\"remaining\":16777216,\"total\":67108864,"
		 "\"duplicate\":2048"},
		{"{\"execute\":\"query-migrate\"}", "\"normal\":10240,\"normal-bytes\":41943040"},
		{"{\"execute\":\"query-migrate\"}", "\"postcopy-requests\":77,\"page-size\":4096"},
		{"{\"execute\":\"query-migrate\"}", "\"pages-per-second\":24414"},
		{"{\"execute\":\"query-migrate\"}",
		 "\"postcopy-latency\":21000,\"postcopy-latency-dist\":"
		 "[0,0,0,0,70,0,0,0,0,8,0,0,0,0,0,0,0,0,0,0,0,0,0,0]"},
		{"{\"execute\":\"query-migrate\"}",
		 "\"postcopy-blocktime\":7,\"postcopy-vcpu-blocktime\":[9,12],"
		 "\"postcopy-vcpu-latency\":[198000,480000],\"postcopy-non-vcpu-latency\":33000"},
		{"{\"execute\":\"query-migrate\"}",
		 "\"blocktime-at-most\":17,\"non-vcpu-blocktime\":13"},
		{"{\"execute\":\"query-migrate\"}",
		 "\"fault-repeats\":5,\"readahead-pages\":40,\"readahead-waited\":9"},
		{"{\"execute\":\"query-migrate\"}",
		 "\"vcpus\":[{\"thread-id\":4711,\"blocked-us\":9900,\"faults\":50,"
		 "\"latency\":198000},"},
		{"{\"execute\":\"query-migrate\"}",
		 "\"role\":\"destination\",\"uuid\":\"5a8c\",\"epoch\":3,\"reason\":\"silence\","
		 "\"pauses\":1"},
	};
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	fake_set_state(bench->migration, PR_STATE_POSTCOPY_PAUSED, "silence");
	converse(bench, client, turns, G_N_ELEMENTS(turns));
}

static void state_changes_are_events_in_order(void **state)
{
	static const PrState states[] = {PR_STATE_SETUP, PR_STATE_ACTIVE, PR_STATE_DEVICE,
					 PR_STATE_POSTCOPY_ACTIVE, PR_STATE_COMPLETED};
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);
	g_autoptr(Client) other = client_ready(bench);
	g_autoptr(Client) unready = client_new(bench); /* has not negotiated: gets no events */
	G_GNUC_UNUSED g_autoptr(JsonNode) greeting = client_receive(unready);
	g_autofree char *answer = NULL;

	for (guint i = 0; i < 200; i++)
		fake_set_state(bench->migration, states[i % G_N_ELEMENTS(states)],
			       i % 2 ? "because" : NULL);
	for (guint i = 0; i < 200; i++) {
		g_autofree char *expected =
			g_strjoin("/", pr_state_name(states[i % G_N_ELEMENTS(states)]),
				  i % 2 ? "because" : NULL, NULL);
		g_autofree char *first = client_event(client), *second = client_event(other);

		assert_string_equal(first, expected);
		assert_string_equal(second, expected);
	}
	answer = client_request(unready, "{\"execute\":\"query-version\"}");
	assert_contains(answer, "Expecting capabilities");
	assert_true(g_queue_is_empty(unready->events));
}

static void path_changes_are_events_and_end_no_wait(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);
	g_autofree char *lost = NULL, *next = NULL;

	fake_report_path(bench->migration, PR_PATH_FAILED, "port is DOWN");
	fake_set_state(bench->migration, PR_STATE_POSTCOPY_PAUSED, "lost");
	lost = client_event(client);
	next = client_event(client);
	assert_string_equal(lost, "rdma:10.0.1.2:4444 failed mlx5_0 port is DOWN");
	assert_string_equal(next, "postcopy-paused/lost");
}

static void without_the_capability_there_are_no_events(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);
	g_autofree char *set = client_request(
		client, "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":"
			"[{\"capability\":\"events\",\"state\":false}]}}");
	g_autofree char *event = NULL;

	assert_contains(set, "return");
	fake_set_state(bench->migration, PR_STATE_SETUP, NULL);
	/* An answer follows all events that were queued before. */
	for (guint i = 0; i < 3; i++)
		g_free(client_request(client, "{\"execute\":\"query-migrate\"}"));
	assert_true(g_queue_is_empty(client->events));
	assert_true(pr_params_set_capability(&bench->params, "events", TRUE, NULL));
	fake_set_state(bench->migration, PR_STATE_ACTIVE, NULL);
	event = client_event(client);
	assert_string_equal(event, "active");
}

#define HMP(line_)                                                                                 \
	"{\"execute\":\"x-postroad-hmp\",\"arguments\":{\"command-line\":\"" line_ "\"},\"id\":1}"

static void migrate_without_d_is_answered_at_its_end(void **state)
{
	static const struct {
		PrState end;
		const char *answer;
	} rows[] = {
		{PR_STATE_COMPLETED,
		 "{\"return\":\"completed: 40960 KiB in 2000 ms, downtime 16 ms\\n\",\"id\":1}"},
		{PR_STATE_FAILED, "the migration has failed: no luck; why"},
		{PR_STATE_CANCELLED, "the migration has been cancelled: why"},
		{PR_STATE_POSTCOPY_PAUSED,
		 "the migration is paused: why; resume it with: migrate -r URI"},
	};
	Bench *bench = *state;

	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		g_autoptr(Client) client = client_ready(bench);
		g_autoptr(Client) other = client_ready(bench);
		g_autofree char *answer = NULL, *same = NULL, *second = NULL;

		client_send(client, HMP("migrate tcp:a:1"));
		/* Meanwhile this client and others are served. */
		same = client_request(client, "{\"execute\":\"query-migrate\",\"id\":2}");
		assert_contains(same, "\"status\":\"setup\"");
		second = client_request(other, "{\"execute\":\"query-migrate\",\"id\":3}");
		assert_contains(second, "\"id\":3");
		fake_set_state(bench->migration, PR_STATE_POSTCOPY_ACTIVE, NULL);
		fake_set_state(bench->migration, rows[i].end, "why");
		answer = client_request(client, NULL);
		assert_contains(answer, rows[i].answer);
	}
}

static void the_end_of_an_earlier_migration_ends_no_wait(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	for (guint i = 0; i < 50; i++) {
		g_autofree char *query = NULL, *ended = NULL;

		/* The state changes and the command may reach the main loop in any order. */
		fake_set_state(bench->migration, PR_STATE_ACTIVE, NULL);
		fake_set_state(bench->migration, PR_STATE_FAILED, "stale");
		client_send(client, HMP("migrate -r tcp:b:1"));
		query = client_request(client, "{\"execute\":\"query-migrate\",\"id\":2}");
		assert_contains(query, "\"id\":2");
		fake_set_state(bench->migration, PR_STATE_COMPLETED, NULL);
		ended = client_request(client, NULL);
		assert_contains(ended, "completed: ");
	}
}

static void a_waiting_client_may_disconnect(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) other = client_ready(bench);
	g_autoptr(Client) client = client_ready(bench);
	g_autofree char *query = NULL, *still = NULL;

	client_send(client, HMP("migrate tcp:a:1"));
	query = client_request(client, "{\"execute\":\"query-migrate\"}");
	g_clear_pointer(&client, client_free);
	fake_set_state(bench->migration, PR_STATE_COMPLETED, NULL);
	still = client_request(other, "{\"execute\":\"query-migrate\"}");
	assert_contains(still, "completed");
}

static void detached_and_qmp_migrate_are_answered_at_once(void **state)
{
	static const Turn turns[] = {
		{HMP("migrate -d tcp:a:1"), "{\"return\":\"\",\"id\":1}", "start tcp:a:1"},
		{HMP("migrate -d -r tcp:a:1"), "{\"return\":\"\",\"id\":1}",
		 "start tcp:a:1 resume"},
		{"{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:c:1\"}}", "{\"return\":{}}",
		 "start tcp:c:1"},
	};
	g_autoptr(Client) client = client_ready(*state);

	converse(*state, client, turns, G_N_ELEMENTS(turns));
}

static void a_refused_migrate_is_answered_at_once(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);
	g_autofree char *answer = NULL, *text = NULL;

	fake_fail_next(bench->migration, "one runs already");
	answer = client_request(client, HMP("migrate tcp:a:1"));
	assert_contains(answer, "\"desc\":\"one runs already\"");
	fake_fail_next(bench->migration, "one runs already");
	text = client_request(client, "{\"execute\":\"human-monitor-command\",\"arguments\":"
				      "{\"command-line\":\"migrate tcp:a:1\"}}");
	assert_string_equal(text, "{\"return\":\"Error: one runs already\\r\\n\"}");
}

static void hmp_shows_and_sets(void **state)
{
	static const Turn turns[] = {
		{HMP("info version"), "postroad-"},
		{HMP("info migrate"), "Migration status: postcopy-active (moving)\\n"},
		{HMP("info migrate"), "total ram: 65536 kbytes\\n"},
		{HMP("info migrate"), "[ 16 us - 32 us ): 70\\n"},
		{HMP("info migrate"), "longest fault: 900 us\\n"},
		{HMP("info migrate"), "repeated faults: 5\\n"},
		{HMP("info migrate"),
		 "read ahead: 40 pages\\nread ahead and waited for: 9 pages\\n"},
		{HMP("info migrate"),
		 "postcopy blocktime: 7 ms\\npostcopy blocktime at most: 17 ms\\n"
		 "postcopy non-vcpu blocktime: 13 ms\\n"},
		{HMP("info migrate"),
		 "vcpu 1 (thread 4712): blocked 12.0 ms, 25 faults, latency 480000 ns\\n"},
		{HMP("info paths"), "tcp:10.0.1.2:4444: failed for 1.5 s, mlx5_0, rtt 120 us "
				    "(data 9 us), 40960 kbytes, last error: nothing heard\\n"},
		{HMP("info migrate_capabilities"), "postcopy-ram: on\\n"},
		{HMP("migrate_set_capability zero-pages off"), "{\"return\":\"\""},
		{HMP("info migrate_capabilities"), "zero-pages: off\\n"},
		{HMP("migrate_set_parameter bulk-read-size 64k"), "{\"return\":\"\""},
		{HMP("info migrate_parameters"), "bulk-read-size: 65536 bytes\\n"},
		{HMP("migrate_set_parameter bulk-read-size lots"), "'lots' is not valid"},
		{HMP("migrate_set_capability zero-pages maybe"), "neither on nor off"},
		{HMP("migrate_incoming tcp:a:1"), "{\"return\":\"\"", "incoming tcp:a:1"},
		{HMP("migrate_recover tcp:a:2"), "{\"return\":\"\"", "recover tcp:a:2"},
		{HMP("migrate_pause"), "{\"return\":\"\"", "pause"},
		{HMP("migrate_cancel"), "{\"return\":\"\"", "cancel"},
		{HMP("help"), "migrate_set_parameter NAME VALUE"},
		{HMP("help migrate_pause"), "{\"return\":\"migrate_pause "},
		{HMP("help info"), "info migrate_parameters"},
		{HMP("help info paths"), "{\"return\":\"info paths "},
		{HMP("help frobnicate"), "there is no command 'frobnicate'"},
		{HMP("info"), "unknown command: 'info'; 'help info'"},
		{HMP("info frobs"), "unknown command: 'info frobs'"},
	};
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	fake_set_state(bench->migration, PR_STATE_POSTCOPY_ACTIVE, "moving");
	converse(bench, client, turns, G_N_ELEMENTS(turns));
}

static void hmp_lines_parse_by_the_table(void **state)
{
	static const struct {
		const char *line, *name,
			*args; /* name NULL: an error, and args is a part of its text */
	} rows[] = {
		{"migrate tcp:a:1", "migrate", "{\"uri\":\"tcp:a:1\"}"},
		{"  migrate   -d\ttcp:a:1 ", "migrate", "{\"detach\":true,\"uri\":\"tcp:a:1\"}"},
		{"migrate -dr a,b", "migrate", "{\"detach\":true,\"resume\":true,\"uri\":\"a,b\"}"},
		{"migrate -r -d a", "migrate", "{\"resume\":true,\"detach\":true,\"uri\":\"a\"}"},
		{"migrate 'tcp:a:1' -d", "migrate", "{\"uri\":\"tcp:a:1\",\"detach\":true}"},
		{"migrate -x a", NULL, "unknown option '-x'; usage: migrate [-d] [-r] URI"},
		{"migrate -d", NULL, "migrate: missing 'uri'"},
		{"migrate a b", NULL, "unexpected word 'b'"},
		{"migrate \"a", NULL, "can't parse the line"},
		{"migrate_pause now", NULL, "unexpected word 'now'; usage: migrate_pause"},
		{"migrate_pause -f", NULL, "unknown option '-f'"},
		{"migrate_recover", NULL, "missing 'uri'"},
		{"migrate_incoming", NULL, "missing 'uri'"},
		{"migrate_set_parameter x", NULL, "missing 'value'"},
		{"migrate_set_parameter x 8k", "migrate_set_parameter",
		 "{\"parameter\":\"x\",\"value\":\"8k\"}"},
		{"migrate_set_capability", NULL, "missing 'capability'"},
		{"info migrate", "info migrate", "{}"},
		{"help", "help", "{}"},
		{"help info paths", "help", "{\"command\":\"info\",\"subcommand\":\"paths\"}"},
		{"query-migrate", NULL, "unknown command: 'query-migrate'"},
	};

	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		g_autoptr(JsonObject) args = NULL;
		g_autoptr(GError) error = NULL;
		g_autoptr(JsonNode) node = json_node_new(JSON_NODE_OBJECT);
		g_autofree char *text = NULL;
		const PrCommand *command = NULL;
		gboolean ok = pr_hmp_parse(rows[i].line, &command, &args, &error);

		assert_int_equal(ok, rows[i].name != NULL);
		if (!ok) {
			assert_contains(error->message, rows[i].args);
			continue;
		}
		assert_string_equal(command->hmp, rows[i].name);
		json_node_set_object(node, args);
		text = json_to_string(node, FALSE);
		assert_string_equal(text, rows[i].args);
	}
}

/* Reads one line of the session's output, with the prompt before it. */
static void assert_hmp_line(Bench *bench, GString *buffer, const char *expected)
{
	g_autofree char *line = read_text_line(bench->hmp_fd, buffer);

	assert_non_null(line);
	assert_contains(line, expected);
}

static void hmp_send(Bench *bench, const char *text)
{
	assert_int_equal(write(bench->hmp_fd, text, strlen(text)), strlen(text));
}

static void hmp_at_a_terminal_waits_for_migrate(void **state)
{
	Bench *bench = *state;
	g_autoptr(GString) buffer = g_string_new(NULL);
	g_autoptr(Client) client = client_ready(bench);
	g_autofree char *event = NULL, *query = NULL;

	hmp_send(bench, "\nbogus\ninfo version\n");
	assert_hmp_line(bench, buffer, "(postroad) (postroad) Error: unknown command");
	assert_hmp_line(bench, buffer, "(postroad) postroad-");
	hmp_send(bench, "migrate tcp:a:1\nmigrate_pause\ninfo status\n");
	event = client_event(client);
	assert_string_equal(event, "setup/asked to");
	/* The next lines wait; the QMP client is served. */
	query = client_request(client, "{\"execute\":\"query-migrate\"}");
	assert_contains(query, "setup");
	{
		g_autofree char *call = fake_last_call(bench->migration);

		assert_string_equal(call, "start tcp:a:1");
	}
	fake_set_state(bench->migration, PR_STATE_FAILED, "no route");
	assert_hmp_line(bench, buffer,
			"(postroad) Error: the migration has failed: no luck; no route");
	assert_hmp_line(bench, buffer,
			"(postroad) (postroad) Engine status: role destination, "
			"failed (no route)");
}

static void the_end_of_the_terminal_affects_no_other_client(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);
	g_autofree char *answer = NULL;

	hmp_send(bench, "migrate tcp:a:1\n");
	assert_int_equal(shutdown(bench->hmp_fd, SHUT_RDWR), 0);
	fake_set_state(bench->migration, PR_STATE_SETUP, NULL);
	fake_set_state(bench->migration, PR_STATE_COMPLETED, NULL);
	answer = client_request(client, "{\"execute\":\"query-version\"}");
	assert_contains(answer, "return");
}

static void a_client_that_does_not_read_is_disconnected(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) silent = client_ready(bench);
	g_autoptr(Client) client = client_ready(bench);
	static const char flood[] = "{\"execute\":\"query-commands\"}";
	gboolean dropped = FALSE;

	assert_int_equal(fcntl(silent->fd, F_SETFL, O_NONBLOCK), 0);
	for (guint i = 0; i < 200000 && !dropped; i++) {
		ssize_t n = send(silent->fd, flood, strlen(flood), MSG_NOSIGNAL);

		if (n < 0 && errno == EAGAIN) {
			/* The silent client's queue is full; the other client is still served. */
			g_autofree char *answer =
				client_request(client, "{\"execute\":\"query-version\"}");

			assert_contains(answer, "return");
		} else if (n != (ssize_t)strlen(flood)) {
			dropped = n < 0;
			assert_true(dropped || n > 0);
			break;
		}
	}
	/* Its connection ends, because it did not read its answers. */
	assert_true(client_at_end(silent));
	{
		g_autofree char *answer = client_request(client, "{\"execute\":\"query-version\"}");

		assert_contains(answer, "return");
	}
}

static void after_a_huge_message_the_client_is_served(void **state)
{
	g_autoptr(Client) client = client_ready(*state);
	g_autofree char *filler = g_strnfill(2 * PR_FRAME_MAX, 'x');
	g_autofree char *huge =
		g_strdup_printf("{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"%s\"}}", filler);
	g_autofree char *brackets = g_strnfill(100000, '[');
	g_autofree char *deep = g_strdup_printf("%s\n", brackets);
	g_autofree char *first = NULL, *second = NULL, *third = NULL, *fourth = NULL;

	first = client_request(client, huge);
	assert_contains(first, "longer than 1 MiB");
	second = client_request(client, "{\"execute\":\"query-version\"}");
	assert_contains(second, "return");
	third = client_request(client, deep);
	assert_contains(third, "64 deep");
	fourth = client_request(client, "{\"execute\":\"query-version\"}");
	assert_contains(fourth, "return");
}

static void many_clients_come_and_go(void **state)
{
	Bench *bench = *state;

	for (guint round = 0; round < 3; round++) {
		Client *clients[40];

		for (guint i = 0; i < G_N_ELEMENTS(clients); i++)
			clients[i] = client_ready(bench);
		fake_set_state(bench->migration, PR_STATE_SETUP, NULL);
		for (guint i = 0; i < G_N_ELEMENTS(clients); i++) {
			g_autofree char *event = client_event(clients[i]);

			assert_string_equal(event, "setup");
			client_free(clients[i]);
		}
	}
}

static void collect(const char *message, gsize len, const char *fault, void *opaque)
{
	g_string_append_printf(opaque, "%s|", fault ? "!" : message);
}

static void framing_does_not_depend_on_the_split(void **state)
{
	static const struct {
		const char *input, *messages;
	} rows[] = {
		{"{}{}\n{}", "{}|{}|{}|"},
		{" \r\n\n {} \n", "{}|"},
		{"[{\"a\":\"]\\\\\"}]x\n", "[{\"a\":\"]\\\\\"}]|x|"},
		{"{\"a\n{}", "!|{}|"},
		{"{[\n}\n{}", "!|}|{}|"},
		{"foo{}bar\n", "foo{}|bar|"},
		{"{\"n\":1234567890123456789}", "{\"n\":1234567890123456789}|"},
		{"{\"n\":12345678901234567890}{}", "!|{}|"},
		{"{\"n\":\"12345678901234567890\"}", "{\"n\":\"12345678901234567890\"}|"},
		{"{\"half\":", ""},
	};

	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		for (gsize piece = 1; piece <= strlen(rows[i].input); piece++) {
			g_auto(PrFramer) framer;
			g_autoptr(GString) seen = g_string_new(NULL);
			gsize len = strlen(rows[i].input);

			pr_framer_init(&framer, PR_FRAMER_LINES);
			for (gsize at = 0; at < len; at += piece)
				pr_framer_feed(&framer, rows[i].input + at, MIN(piece, len - at),
					       collect, seen);
			assert_string_equal(seen->str, rows[i].messages);
		}
	}
}

static void the_socket_is_private_and_a_served_one_is_not_replaced(void **state)
{
	Bench *bench = *state;
	g_autofree char *file = g_build_filename(bench->dir, "file", NULL);
	g_autofree char *stale = g_build_filename(bench->dir, "stale", NULL);
	g_autofree char *nowhere = g_build_filename(bench->dir, "no", "qmp", NULL);
	g_autofree char *deep = g_strnfill(200, 'p');
	const char *refused[][2] = {
		{bench->path, "another process serves it"},
		{file, "not a socket"},
		{nowhere, "No such file"},
		{deep, "too long for a unix socket"},
	};
	g_autoptr(GMainContext) context = g_main_context_new();
	g_autoptr(PrMonitor) monitor = pr_monitor_new(&bench->params, context, NULL, NULL);
	g_autoptr(GSocketAddress) address = g_unix_socket_address_new(stale);
	GSocket *dead = g_socket_new(G_SOCKET_FAMILY_UNIX, G_SOCKET_TYPE_STREAM, 0, NULL);
	GStatBuf st;

	assert_int_equal(g_stat(bench->path, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0600);
	assert_true(g_file_set_contents(file, "x", 1, NULL));
	for (guint i = 0; i < G_N_ELEMENTS(refused); i++) {
		g_autoptr(GError) error = NULL;

		assert_false(pr_monitor_listen(monitor, refused[i][0], &error));
		assert_contains(error->message, refused[i][0]);
		assert_contains(error->message, refused[i][1]);
	}
	assert_true(g_socket_bind(dead, address, FALSE, NULL));
	g_object_unref(dead);
	assert_true(pr_monitor_listen(monitor, stale, NULL));
	pr_monitor_close(monitor);
	assert_int_not_equal(g_access(stale, F_OK), 0);
	assert_int_equal(g_unlink(file), 0);
}

#define ON_BENCH(test_) cmocka_unit_test_setup_teardown(test_, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		ON_BENCH(the_greeting_is_qemus),
		ON_BENCH(commands_are_refused_before_the_negotiation),
		ON_BENCH(every_command_succeeds_with_valid_arguments),
		ON_BENCH(errors_name_the_mistake),
		ON_BENCH(errors_of_the_engine_are_passed_on),
		ON_BENCH(answers_carry_ids_of_any_type),
		ON_BENCH(messages_need_no_newline_and_may_be_split),
		ON_BENCH(query_migrate_has_the_fields_of_qemu_and_postroad),
		ON_BENCH(state_changes_are_events_in_order),
		ON_BENCH(path_changes_are_events_and_end_no_wait),
		ON_BENCH(without_the_capability_there_are_no_events),
		ON_BENCH(migrate_without_d_is_answered_at_its_end),
		ON_BENCH(the_end_of_an_earlier_migration_ends_no_wait),
		ON_BENCH(a_waiting_client_may_disconnect),
		ON_BENCH(detached_and_qmp_migrate_are_answered_at_once),
		ON_BENCH(a_refused_migrate_is_answered_at_once),
		ON_BENCH(hmp_shows_and_sets),
		cmocka_unit_test(hmp_lines_parse_by_the_table),
		ON_BENCH(hmp_at_a_terminal_waits_for_migrate),
		ON_BENCH(the_end_of_the_terminal_affects_no_other_client),
		ON_BENCH(a_client_that_does_not_read_is_disconnected),
		ON_BENCH(after_a_huge_message_the_client_is_served),
		ON_BENCH(many_clients_come_and_go),
		cmocka_unit_test(framing_does_not_depend_on_the_split),
		ON_BENCH(the_socket_is_private_and_a_served_one_is_not_replaced),
	};

	return cmocka_run_group_tests_name("monitor", tests, NULL, NULL);
}
