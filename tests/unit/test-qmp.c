/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The QMP client against a server that misbehaves. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest/qmp.h"
#include "util/json-framer.h"
#include "tests/rigs/fake-qmp.h"

#define TIMEOUT	      20000 /* ms; the machine may be busy with other tests */
#define SHORT_TIMEOUT 100   /* ms; where no answer ever comes */
/* ms; for one answer that comes too late, where others have to come in time */
#define LATE_TIMEOUT 3000

/* Calls of the client's reader thread. */
typedef struct Seen {
	GMutex lock;
	GCond cond;	 /* lock */
	GString *events; /* lock; names and a blank each */
	guint deaths;	 /* lock */
	char *reason;	 /* lock */
} Seen;

static void seen_clear(Seen *seen)
{
	g_string_free(seen->events, TRUE);
	g_free(seen->reason);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Seen, seen_clear)

static void on_event(const char *name, JsonObject *data, void *opaque)
{
	Seen *seen = opaque;

	g_mutex_lock(&seen->lock);
	g_string_append_printf(seen->events, "%s%s ", name, data ? "+" : "");
	g_cond_broadcast(&seen->cond);
	g_mutex_unlock(&seen->lock);
}

static void on_died(const char *reason, void *opaque)
{
	Seen *seen = opaque;

	g_mutex_lock(&seen->lock);
	g_free(seen->reason);
	seen->reason = g_strdup(reason);
	seen->deaths++;
	g_cond_broadcast(&seen->cond);
	g_mutex_unlock(&seen->lock);
}

static void wait_for_death(Seen *seen)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;

	g_mutex_lock(&seen->lock);
	while (!seen->deaths)
		assert_true(g_cond_wait_until(&seen->cond, &seen->lock, deadline));
	g_mutex_unlock(&seen->lock);
}

static void wait_for_events(Seen *seen, const char *events)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;

	g_mutex_lock(&seen->lock);
	while (!g_str_equal(seen->events->str, events))
		assert_true(g_cond_wait_until(&seen->cond, &seen->lock, deadline));
	g_mutex_unlock(&seen->lock);
}

static PrQmp *connect_to(FakeQmp *fake, guint timeout_ms, Seen *seen)
{
	g_autoptr(GError) error = NULL;
	PrQmp *qmp =
		pr_qmp_open(fake_qmp_path(fake), timeout_ms, seen ? on_event : NULL, seen, &error);

	assert_null(error);
	assert_non_null(qmp);
	if (seen)
		pr_qmp_on_death(qmp, on_died, seen);
	return qmp;
}

static void assert_fails(PrQmp *qmp, const char *command, PrGuestError code, const char *words)
{
	g_autoptr(GError) error = NULL;

	assert_null(pr_qmp_execute(qmp, command, NULL, -1, &error));
	assert_non_null(error);
	if (!strstr(error->message, words))
		print_error("expected '%s' in: %s\n", words, error->message);
	assert_true(g_error_matches(error, PR_GUEST_ERROR, code));
	assert_non_null(strstr(error->message, words));
}

/* Frames */

typedef struct Cut {
	GString *objects; /* separated by | */
	guint faults;
} Cut;

/* PrFrameSink */
static void collect(const char *message, gsize len, const char *fault, void *opaque)
{
	Cut *cut = opaque;

	if (fault)
		cut->faults++;
	else
		g_string_append_printf(cut->objects, "%s%.*s", cut->objects->len ? "|" : "",
				       (int)len, message);
}

static void objects_are_cut_by_their_braces(void **state)
{
	static const struct {
		const char *bytes;
		const char *objects; /* separated by | */
		gboolean garbage;
	} cases[] = {
		{"", "", FALSE},
		{"{}", "{}", FALSE},
		{"\r\n {} \n{}\t", "{}|{}", FALSE},
		{"{\"a\": {\"b\": [1, 2]}}\n", "{\"a\": {\"b\": [1, 2]}}", FALSE},
		{"{\n  \"a\": 1\n}\n", "{\n  \"a\": 1\n}", FALSE},
		{"{\"}\": \"]\"}", "{\"}\": \"]\"}", FALSE},
		{"{\"\\\"}\": 1}", "{\"\\\"}\": 1}", FALSE},
		{"{\"\\\\\": 1}", "{\"\\\\\": 1}", FALSE},
		{"{\"a\"", "", FALSE},
		{"[1]", "", TRUE},
		{"HTTP/1.0 400", "", TRUE},
		{"{}}", "{}", TRUE},
	};

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		for (gsize piece = 1; piece <= strlen(cases[i].bytes) + 1; piece++) {
			g_autoptr(GString) objects = g_string_new(NULL);
			g_auto(PrFramer) framer;
			Cut cut = {.objects = objects};
			gsize len = strlen(cases[i].bytes);

			pr_framer_init(&framer, PR_FRAMER_OBJECTS);
			for (gsize at = 0; at < len; at += piece)
				pr_framer_feed(&framer, cases[i].bytes + at, MIN(piece, len - at),
					       collect, &cut);
			assert_string_equal(objects->str, cases[i].objects);
			assert_int_equal(cut.faults, cases[i].garbage ? 1 : 0);
		}
	}
}

/* The number of such bytes behind an opening brace until there is a fault. */
static guint bytes_until_fault(char byte)
{
	g_autoptr(GString) objects = g_string_new(NULL);
	g_auto(PrFramer) framer;
	Cut cut = {.objects = objects};
	guint n = 0;

	pr_framer_init(&framer, PR_FRAMER_OBJECTS);
	pr_framer_feed(&framer, "{", 1, collect, &cut);
	while (!cut.faults && n <= PR_FRAME_OBJECT_MAX) {
		pr_framer_feed(&framer, &byte, 1, collect, &cut);
		n++;
	}
	assert_int_equal(cut.faults, 1);
	return n;
}

static void depth_and_length_are_bounded(void **state)
{
	assert_int_equal(bytes_until_fault('{'), PR_FRAME_DEPTH);
	assert_int_equal(bytes_until_fault(' '), PR_FRAME_OBJECT_MAX);
}

/* QEMU prints unsigned 64-bit numbers, of up to 20 digits. */
static void long_numbers_pass(void **state)
{
	static const char number[] = "{\"n\": 18446744073709551615}";
	g_autoptr(GString) objects = g_string_new(NULL);
	g_auto(PrFramer) framer;
	Cut cut = {.objects = objects};

	pr_framer_init(&framer, PR_FRAMER_OBJECTS);
	pr_framer_feed(&framer, number, strlen(number), collect, &cut);
	assert_string_equal(objects->str, number);
	assert_int_equal(cut.faults, 0);
}

/* Conversations */

static void a_command_is_answered(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	g_autoptr(PrQmp) qmp = NULL;
	g_autoptr(JsonNode) node = NULL;
	g_autofree char *text = NULL;
	g_autoptr(GError) error = NULL;

	fake_qmp_set(fake, "query-status", "{\"running\": true}");
	fake_qmp_set(fake, "human-monitor-command info version", "\"7.2.0\\r\\n\"");
	qmp = connect_to(fake, TIMEOUT, NULL);
	assert_int_equal(fake_qmp_count(fake, "qmp_capabilities"), 1);
	node = pr_qmp_execute(qmp, "query-status", NULL, -1, &error);
	assert_null(error);
	assert_true(json_object_get_boolean_member(json_node_get_object(node), "running"));
	text = pr_qmp_human(qmp, "info version", &error);
	assert_string_equal(text, "7.2.0\r\n");
	g_clear_pointer(&qmp, pr_qmp_free);
}

static void errors_of_qemu_are_passed_on(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	PrQmp *qmp = connect_to(fake, TIMEOUT, NULL);

	fake_qmp_set(fake, "cont", FAKE_ERROR "the disk is locked");
	assert_fails(qmp, "cont", PR_GUEST_ERROR_REFUSED, "cont: the disk is locked");
	assert_fails(qmp, "make-tea", PR_GUEST_ERROR_UNSUPPORTED, "make-tea: no such command");
	assert_fails(qmp, "cont", PR_GUEST_ERROR_REFUSED, fake_qmp_path(fake));
	pr_qmp_free(qmp);
}

static gpointer call_slow(gpointer data)
{
	return GINT_TO_POINTER(pr_qmp_command(data, "slow", NULL, -1, NULL));
}

static void answers_out_of_order_find_their_callers(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	PrQmp *qmp = connect_to(fake, TIMEOUT, NULL);
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;
	g_autoptr(JsonNode) node = NULL;
	GThread *thread;

	fake_qmp_set(fake, "slow", FAKE_HOLD);
	fake_qmp_set(fake, "fast", "42");
	thread = g_thread_new("slow", call_slow, qmp);
	while (!fake_qmp_count(fake, "slow")) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(1000);
	}
	node = pr_qmp_execute(qmp, "fast", NULL, -1, NULL);
	assert_int_equal(json_node_get_int(node), 42);
	assert_true(GPOINTER_TO_INT(g_thread_join(thread)));
	pr_qmp_free(qmp);
}

static void a_descriptor_travels_with_its_command(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	PrQmp *qmp = connect_to(fake, TIMEOUT, NULL);
	g_autoptr(GError) error = NULL;
	int memfd = memfd_create("test", MFD_CLOEXEC);
	char text[8] = {0};
	int fd;

	fake_qmp_set(fake, "getfd", "{}");
	assert_int_equal(write(memfd, "hello", 5), 5);
	assert_true(pr_qmp_command(qmp, "getfd", NULL, memfd, &error));
	fd = fake_qmp_take_fd(fake);
	assert_true(fd >= 0);
	assert_int_equal(pread(fd, text, 5, 0), 5);
	assert_string_equal(text, "hello");
	close(fd);
	close(memfd);
	pr_qmp_free(qmp);
}

static void a_late_answer_is_ignored(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	PrQmp *qmp = connect_to(fake, LATE_TIMEOUT, NULL);

	fake_qmp_set(fake, "slow", FAKE_HOLD);
	fake_qmp_set(fake, "fast", "{}");
	assert_fails(qmp, "slow", PR_GUEST_ERROR_TIMEOUT, "no answer to 'slow'");
	/* The late answer comes behind the answer to the first of these commands. */
	assert_true(pr_qmp_command(qmp, "fast", NULL, -1, NULL));
	assert_true(pr_qmp_command(qmp, "fast", NULL, -1, NULL));
	pr_qmp_free(qmp);
}

static void events_are_delivered_in_order(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	g_auto(Seen) seen = {.events = g_string_new(NULL)};
	PrQmp *qmp = connect_to(fake, TIMEOUT, &seen);

	fake_qmp_send(fake,
		      "{\"event\": \"STOP\"}{\"event\": \"MIGRATION\", \"data\": {\"status\": "
		      "\"setup\"}}\n{\n\"event\"\n:\"RESUME\"}\n");
	wait_for_events(&seen, "STOP MIGRATION+ RESUME ");
	pr_qmp_free(qmp);
	assert_int_equal(seen.deaths, 0);
}

static void no_greeting_is_a_timeout(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new("");
	g_autoptr(GError) error = NULL;

	assert_null(pr_qmp_open(fake_qmp_path(fake), SHORT_TIMEOUT, NULL, NULL, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT));
	assert_non_null(strstr(error->message, "one client at a time"));
}

static void a_missing_socket_is_named(void **state)
{
	g_autoptr(GError) error = NULL;

	assert_null(pr_qmp_open("/nonexistent/qmp", TIMEOUT, NULL, NULL, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE));
	assert_non_null(strstr(error->message, "/nonexistent/qmp"));
}

static void another_protocol_is_recognized(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new("SSH-2.0-OpenSSH_9.2\r\n");
	g_autoptr(GError) error = NULL;

	assert_null(pr_qmp_open(fake_qmp_path(fake), TIMEOUT, NULL, NULL, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL));
}

/* Each of these ends the waiting call and every later one, and is reported once. */
static void garbage_ends_the_connection(void **state)
{
	static const char *const garbage[] = {
		"nonsense\n", "{\"return\": }\n", "{\"return\": [}]\n", "{\"a\" \"b\"}", "{{{{}}}}",
	};

	for (guint i = 0; i < G_N_ELEMENTS(garbage); i++) {
		g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
		g_auto(Seen) seen = {.events = g_string_new(NULL)};
		g_autofree char *raw = g_strconcat(FAKE_RAW, garbage[i], NULL);
		PrQmp *qmp = connect_to(fake, TIMEOUT, &seen);

		fake_qmp_set(fake, "stop", raw);
		assert_fails(qmp, "stop", PR_GUEST_ERROR_PROTOCOL, "is this the socket of");
		assert_fails(qmp, "cont", PR_GUEST_ERROR_PROTOCOL, "is this the socket of");
		wait_for_death(&seen);
		pr_qmp_free(qmp);
		assert_int_equal(seen.deaths, 1);
	}
}

/* JSON that is not an answer is ignored. */
static void objects_that_are_no_answer_are_skipped(void **state)
{
	static const char *const strange[] = {
		"{}",
		"{\"return\": {}}",
		"{\"return\": {}, \"id\": \"x\"}",
		"{\"return\": {}, \"id\": {}}",
		"{\"return\": {}, \"id\": -1}",
		"{\"return\": {}, \"id\": 999999999999}",
		"{\"event\": 5}",
		"{\"event\": {}}",
		"{\"event\": \"SHUTDOWN\", \"data\": {\"reason\": 7}}",
		"{\"event\": \"SHUTDOWN\", \"data\": 7}",
		"{\"error\": 7}",
	};
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	PrQmp *qmp = connect_to(fake, TIMEOUT, NULL);

	fake_qmp_set(fake, "stop", "{}");
	for (guint i = 0; i < G_N_ELEMENTS(strange); i++) {
		fake_qmp_send(fake, strange[i]);
		assert_true(pr_qmp_command(qmp, "stop", NULL, -1, NULL));
	}
	pr_qmp_free(qmp);
}

static void an_answer_without_return_or_error_is_an_error(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	PrQmp *qmp = connect_to(fake, TIMEOUT, NULL);

	/* qmp_capabilities was 1 */
	fake_qmp_set(fake, "stop", FAKE_RAW "{\"id\": 2}");
	assert_fails(qmp, "stop", PR_GUEST_ERROR_PROTOCOL, "neither return nor error");
	fake_qmp_set(fake, "stop", FAKE_RAW "{\"id\": 3, \"error\": {\"class\": 1, \"desc\": 2}}");
	assert_fails(qmp, "stop", PR_GUEST_ERROR_REFUSED, "stop");
	pr_qmp_free(qmp);
}

static void the_end_is_reported_once_with_its_cause(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	g_auto(Seen) seen = {.events = g_string_new(NULL)};
	g_auto(Seen) late = {.events = g_string_new(NULL)};
	PrQmp *qmp = connect_to(fake, TIMEOUT, &seen);

	fake_qmp_set(fake, "stop", FAKE_CLOSE);
	assert_fails(qmp, "stop", PR_GUEST_ERROR_DIED, "QEMU is gone");
	assert_fails(qmp, "stop", PR_GUEST_ERROR_DIED, "");
	wait_for_death(&seen);
	assert_non_null(strstr(seen.reason, "QEMU is gone"));
	/* A later observer is called at once. */
	pr_qmp_on_death(qmp, on_died, &late);
	assert_int_equal(late.deaths, 1);
	pr_qmp_free(qmp);
	assert_int_equal(seen.deaths, 1);
}

static void a_shutdown_is_named(void **state)
{
	g_autoptr(FakeQmp) fake = fake_qmp_new(NULL);
	g_auto(Seen) seen = {.events = g_string_new(NULL)};
	PrQmp *qmp = connect_to(fake, TIMEOUT, &seen);

	fake_qmp_set(fake, "stop", FAKE_CLOSE);
	fake_qmp_send(fake, "{\"event\": \"SHUTDOWN\", \"data\": {\"reason\": \"host-qmp-quit\"}}");
	assert_fails(qmp, "stop", PR_GUEST_ERROR_DIED, "host-qmp-quit");
	pr_qmp_free(qmp);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(objects_are_cut_by_their_braces),
		cmocka_unit_test(depth_and_length_are_bounded),
		cmocka_unit_test(long_numbers_pass),
		cmocka_unit_test(a_command_is_answered),
		cmocka_unit_test(errors_of_qemu_are_passed_on),
		cmocka_unit_test(answers_out_of_order_find_their_callers),
		cmocka_unit_test(a_descriptor_travels_with_its_command),
		cmocka_unit_test(a_late_answer_is_ignored),
		cmocka_unit_test(events_are_delivered_in_order),
		cmocka_unit_test(no_greeting_is_a_timeout),
		cmocka_unit_test(a_missing_socket_is_named),
		cmocka_unit_test(another_protocol_is_recognized),
		cmocka_unit_test(garbage_ends_the_connection),
		cmocka_unit_test(objects_that_are_no_answer_are_skipped),
		cmocka_unit_test(an_answer_without_return_or_error_is_an_error),
		cmocka_unit_test(the_end_is_reported_once_with_its_cause),
		cmocka_unit_test(a_shutdown_is_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
