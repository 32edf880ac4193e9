/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/fake-engine.h"

#include <errno.h>
#include <gio/gio.h>
#include <glib/gstdio.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "transport/transport.h"

#define WAIT_MS 20000 /* a test that waits longer for an answer fails */

/* Needed by util/try-alloc.c. */
G_DEFINE_QUARK(pr_path_error, pr_path_error)

struct PrMigration {
	GMutex lock;
	PrMigrationHooks hooks;
	PrState state;		/* lock */
	char *reason;		/* lock */
	char *last_call;	/* lock */
	char *fail;		/* lock */
	gboolean names_blocked; /* lock; while set, name look-ups do not end */
	GCond changed;		/* signals changes of names_blocked, and cancelled look-ups */
};

PrMigration *pr_migration_new(PrGuest *guest, PrParams *params, const PrMigrationHooks *hooks)
{
	PrMigration *migration = g_new0(PrMigration, 1);

	g_mutex_init(&migration->lock);
	g_cond_init(&migration->changed);
	migration->hooks = *hooks;
	migration->last_call = g_strdup("");
	return migration;
}

void pr_migration_free(PrMigration *migration)
{
	g_mutex_clear(&migration->lock);
	g_cond_clear(&migration->changed);
	g_free(migration->reason);
	g_free(migration->last_call);
	g_free(migration->fail);
	g_free(migration);
}

void fake_set_state(PrMigration *migration, PrState state, const char *reason)
{
	g_mutex_lock(&migration->lock);
	migration->state = state;
	g_free(migration->reason);
	migration->reason = g_strdup(reason);
	g_mutex_unlock(&migration->lock);
	migration->hooks.on_state(state, reason, migration->hooks.opaque);
}

void fake_report_path(PrMigration *migration, PrPathState state, const char *reason)
{
	migration->hooks.on_path("rdma:10.0.1.2:4444", state, "mlx5_0", reason,
				 migration->hooks.opaque);
}

void fake_fail_next(PrMigration *migration, const char *message)
{
	g_mutex_lock(&migration->lock);
	g_free(migration->fail);
	migration->fail = g_strdup(message);
	g_mutex_unlock(&migration->lock);
}

void fake_block_names(PrMigration *migration, gboolean hold)
{
	g_mutex_lock(&migration->lock);
	migration->names_blocked = hold;
	g_cond_broadcast(&migration->changed);
	g_mutex_unlock(&migration->lock);
}

static void wake(GCancellable *cancel, gpointer opaque)
{
	PrMigration *migration = opaque;

	g_mutex_lock(&migration->lock);
	g_cond_broadcast(&migration->changed);
	g_mutex_unlock(&migration->lock);
}

static gboolean find_name(PrMigration *migration, GCancellable *cancel, GError **error)
{
	gulong chained = g_cancellable_connect(cancel, G_CALLBACK(wake), migration, NULL);

	g_mutex_lock(&migration->lock);
	while (migration->names_blocked && !g_cancellable_is_cancelled(cancel))
		g_cond_wait(&migration->changed, &migration->lock);
	g_mutex_unlock(&migration->lock);
	g_cancellable_disconnect(cancel, chained);
	return !g_cancellable_set_error_if_cancelled(cancel, error);
}

char *fake_last_call(PrMigration *migration)
{
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&migration->lock);

	return g_strdup(migration->last_call);
}

/* Owns `call` from now on. */
static gboolean record(PrMigration *migration, char *call, GError **error)
{
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&migration->lock);
	g_autofree char *fail = g_steal_pointer(&migration->fail);

	g_free(migration->last_call);
	migration->last_call = call;
	if (!fail)
		return TRUE;
	g_set_error_literal(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE, fail);
	return FALSE;
}

gboolean pr_migration_start(PrMigration *migration, const char *uris, gboolean resume,
			    GError **error)
{
	if (!record(migration, g_strdup_printf("start %s%s", uris, resume ? " resume" : ""), error))
		return FALSE;
	fake_set_state(migration, resume ? PR_STATE_POSTCOPY_RECOVER_SETUP : PR_STATE_SETUP,
		       "asked to");
	return TRUE;
}

gboolean pr_migration_incoming(PrMigration *migration, const char *uris, GCancellable *cancel,
			       GError **error)
{
	return record(migration, g_strdup_printf("incoming %s", uris), error) &&
	       find_name(migration, cancel, error);
}

gboolean pr_migration_recover(PrMigration *migration, const char *uris, GCancellable *cancel,
			      GError **error)
{
	return record(migration, g_strdup_printf("recover %s", uris), error) &&
	       find_name(migration, cancel, error);
}

gboolean pr_migration_pause(PrMigration *migration, GError **error)
{
	return record(migration, g_strdup("pause"), error);
}

gboolean pr_migration_cancel(PrMigration *migration, GError **error)
{
	return record(migration, g_strdup("cancel"), error);
}

static void path_free(gpointer opaque)
{
	PrPathInfo *path = opaque;

	g_free(path->uri);
	g_free(path->device);
	g_free(path->last_error);
	g_free(path);
}

void pr_migration_query(PrMigration *migration, PrMigrationInfo *ret)
{
	static const PrThreadTime vcpus[] = {
		{.tid = 4711, .blocked_ns = 9900000, .faults = 50, .latency_ns = 198000},
		{.tid = 4712, .blocked_ns = 12000000, .faults = 25, .latency_ns = 480000},
	};
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&migration->lock);
	PrPathInfo *path = g_new0(PrPathInfo, 1);

	*ret = (PrMigrationInfo){
		.role = PR_ROLE_DESTINATION,
		.state = migration->state,
		.reason = g_strdup(migration->reason),
		.error_desc = migration->state == PR_STATE_FAILED ? g_strdup("no luck") : NULL,
		.uuid = "5a8c",
		.epoch = 3,
		.total_time = 2000,
		.downtime = 16,
		.total = 64 << 20,
		.remaining = 16 << 20,
		.transferred = 40 << 20,
		.normal = 10240,
		.duplicate = 2048,
		.postcopy_requests = 77,
		.page_size = 4096,
		.mbps = 800,
		.expected_ms = 167,
		.pauses = 1,
		.faults = 78,
		.fault_latency_ns = 21000,
		.fault_latency_max_ns = 900000,
		.fault_repeats = 5,
		.readahead_pages = 40,
		.readahead_waited = 9,
		.latency_dist = {[4] = 70, [9] = 8},
		.paths = g_ptr_array_new_with_free_func(path_free),
	};
	ret->blocktime = (PrBlocktimeInfo){
		.vcpus_known = TRUE,
		.all_blocked_ns = 7800000,
		.threads = g_array_new(FALSE, FALSE, sizeof(PrThreadTime)),
		.at_most_ns = 17900000,
		.other_blocked_ns = 13000000,
		.other_faults = 3,
		.other_latency_ns = 33000,
	};
	g_array_append_vals(ret->blocktime.threads, vcpus, G_N_ELEMENTS(vcpus));
	path->uri = g_strdup("tcp:10.0.1.2:4444");
	path->state = PR_PATH_FAILED;
	path->device = g_strdup("mlx5_0");
	path->since_ms = 1500;
	path->data_rtt_us = 9;
	path->last_error = g_strdup("nothing heard");
	path->rtt_us = 120;
	path->bytes = 40 << 20;
	g_ptr_array_add(ret->paths, path);
}

void pr_migration_info_clear(PrMigrationInfo *info)
{
	g_free(info->reason);
	g_free(info->error_desc);
	g_clear_pointer(&info->paths, g_ptr_array_unref);
	g_clear_pointer(&info->blocktime.threads, g_array_unref);
}

static void on_quit(void *opaque)
{
	Bench *bench = opaque;

	g_atomic_int_inc(&bench->quits);
}

typedef struct Start {
	Bench *bench;
	GAsyncQueue *ready;
	int hmp_fd;
} Start;

static gpointer serve(gpointer opaque)
{
	Start start = *(Start *)opaque;
	Bench *bench = start.bench;
	g_autoptr(GError) error = NULL;
	PrMigrationHooks hooks;

	bench->monitor = pr_monitor_new(&bench->params, bench->context, on_quit, bench);
	hooks = pr_monitor_hooks(bench->monitor);
	bench->migration = pr_migration_new(NULL, &bench->params, &hooks);
	pr_monitor_attach(bench->monitor, bench->migration);
	if (!pr_monitor_listen(bench->monitor, bench->path, &error))
		g_error("%s", error->message);
	pr_monitor_hmp(bench->monitor, start.hmp_fd, start.hmp_fd, TRUE);
	g_async_queue_push(start.ready, bench);
	g_main_loop_run(bench->loop);
	pr_monitor_close(bench->monitor);
	pr_migration_free(bench->migration);
	pr_monitor_free(bench->monitor);
	return NULL;
}

int bench_setup(void **state)
{
	Bench *bench = g_new0(Bench, 1);
	g_autoptr(GAsyncQueue) ready = g_async_queue_new();
	Start start = {bench, ready, -1};
	int pair[2];

	bench->dir = g_dir_make_tmp("postroad-test-XXXXXX", NULL);
	bench->path = g_build_filename(bench->dir, "qmp", NULL);
	bench->context = g_main_context_new();
	bench->loop = g_main_loop_new(bench->context, FALSE);
	pr_params_init(&bench->params);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair),
			 0);
	bench->hmp_fd = pair[0];
	start.hmp_fd = pair[1];
	bench->thread = g_thread_new("monitor", serve, &start);
	g_async_queue_pop(ready);
	*state = bench;
	return 0;
}

static gboolean end_loop(gpointer opaque)
{
	g_main_loop_quit(opaque);
	return G_SOURCE_REMOVE;
}

int bench_teardown(void **state)
{
	Bench *bench = *state;

	g_main_context_invoke(bench->context, end_loop, bench->loop);
	g_thread_join(bench->thread);
	/* The socket file was removed, so the directory is empty. */
	assert_int_equal(g_rmdir(bench->dir), 0);
	g_main_loop_unref(bench->loop);
	g_main_context_unref(bench->context);
	close(bench->hmp_fd);
	g_free(bench->dir);
	g_free(bench->path);
	g_free(bench);
	return 0;
}

Client *client_new(Bench *bench)
{
	Client *client = g_new0(Client, 1);
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	g_strlcpy(address.sun_path, bench->path, sizeof(address.sun_path));
	client->input = g_string_new(NULL);
	client->events = g_queue_new();
	client->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_true(client->fd >= 0);
	assert_int_equal(connect(client->fd, (struct sockaddr *)&address, sizeof(address)), 0);
	return client;
}

Client *client_ready(Bench *bench)
{
	g_autoptr(Client) client = client_new(bench);
	G_GNUC_UNUSED g_autoptr(JsonNode) greeting = client_receive(client);
	g_autofree char *answer = client_request(client, "{\"execute\":\"qmp_capabilities\"}");

	assert_string_equal(answer, "{\"return\":{}}");
	return g_steal_pointer(&client);
}

void client_free(Client *client)
{
	close(client->fd);
	g_string_free(client->input, TRUE);
	g_queue_free_full(client->events, (GDestroyNotify)json_node_unref);
	g_free(client);
}

void client_send(Client *client, const char *text)
{
	gsize left = strlen(text);

	while (left) {
		ssize_t n = send(client->fd, text, left, MSG_NOSIGNAL);

		assert_true(n > 0);
		text += n;
		left -= n;
	}
}

char *read_text_line(int fd, GString *buffer)
{
	for (;;) {
		char *end = memchr(buffer->str, '\n', buffer->len), data[4096];
		struct pollfd wait = {fd, POLLIN, 0};
		ssize_t n;

		if (end) {
			char *line = g_strchomp(g_strndup(buffer->str, end - buffer->str));

			g_string_erase(buffer, 0, end - buffer->str + 1);
			return line;
		}
		if (poll(&wait, 1, WAIT_MS) != 1)
			fail_msg("nothing came within %d ms; so far: %s", WAIT_MS, buffer->str);
		n = read(fd, data, sizeof(data));
		if (n <= 0)
			return NULL;
		g_string_append_len(buffer, data, n);
	}
}

JsonNode *client_receive(Client *client)
{
	g_autofree char *line = read_text_line(client->fd, client->input);
	g_autoptr(GError) error = NULL;
	JsonNode *node;

	if (!line)
		fail_msg("the server closed the connection");
	node = json_from_string(line, &error);
	if (!node)
		fail_msg("not JSON: %s", line);
	return node;
}

char *client_request(Client *client, const char *text)
{
	if (text)
		client_send(client, text);
	for (;;) {
		g_autoptr(JsonNode) node = client_receive(client);

		if (!json_object_has_member(json_node_get_object(node), "event"))
			return json_to_string(node, FALSE);
		g_queue_push_tail(client->events, g_steal_pointer(&node));
	}
}

char *client_event(Client *client)
{
	g_autoptr(JsonNode) node = g_queue_pop_head(client->events);
	JsonObject *object, *data, *time;
	const char *reason;

	if (!node)
		node = client_receive(client);
	object = json_node_get_object(node);
	time = json_object_get_object_member(object, "timestamp");
	assert_true(json_object_get_int_member(time, "seconds") > 1600000000);
	assert_in_range(json_object_get_int_member(time, "microseconds"), 0, 999999);
	data = json_object_get_object_member(object, "data");
	reason = json_object_get_string_member_with_default(data, "reason", NULL);
	if (!g_strcmp0(json_object_get_string_member(object, "event"), "MIGRATION_PATH"))
		return g_strjoin(" ", json_object_get_string_member(data, "uri"),
				 json_object_get_string_member(data, "state"),
				 json_object_get_string_member(data, "device"), reason, NULL);
	assert_string_equal(json_object_get_string_member(object, "event"), "MIGRATION");
	return g_strjoin("/", json_object_get_string_member(data, "status"), reason, NULL);
}

gboolean client_at_end(Client *client)
{
	g_autofree char *line = NULL;

	while ((line = read_text_line(client->fd, client->input)))
		g_clear_pointer(&line, g_free);
	return TRUE;
}
