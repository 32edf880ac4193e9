/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/show.h"

#include "monitor/json.h"

const char *pr_role_name(PrRole role)
{
	switch (role) {
	case PR_ROLE_SOURCE:
		return "source";
	case PR_ROLE_DESTINATION:
		return "destination";
	case PR_ROLE_NONE:
		break;
	}
	return "none";
}

/* Members that QEMU's schema requires but that Postroad does not have are zero. */
static JsonObject *ram_to_json(const PrMigrationInfo *info)
{
	JsonObject *ram = json_object_new();
	double pages = info->page_size ? info->mbps * 1e6 / 8 / info->page_size : 0;

	json_object_set_int_member(ram, "transferred", info->transferred);
	json_object_set_int_member(ram, "remaining", info->remaining);
	json_object_set_int_member(ram, "total", info->total);
	json_object_set_int_member(ram, "duplicate", info->duplicate);
	json_object_set_int_member(ram, "skipped", 0);
	json_object_set_int_member(ram, "normal", info->normal);
	json_object_set_int_member(ram, "normal-bytes", info->normal * info->page_size);
	json_object_set_int_member(ram, "dirty-pages-rate", 0);
	json_object_set_double_member(ram, "mbps", info->mbps);
	json_object_set_int_member(ram, "dirty-sync-count", 0);
	json_object_set_int_member(ram, "postcopy-requests", info->postcopy_requests);
	json_object_set_int_member(ram, "page-size", info->page_size);
	json_object_set_int_member(ram, "multifd-bytes", 0);
	json_object_set_int_member(ram, "pages-per-second", (gint64)pages);
	return ram;
}

static JsonArray *threads_to_json(const GArray *threads)
{
	JsonArray *array = json_array_sized_new(threads->len);

	for (guint i = 0; i < threads->len; i++) {
		const PrThreadTime *time = &g_array_index(threads, PrThreadTime, i);
		JsonObject *object = json_object_new();

		json_object_set_int_member(object, "thread-id", time->tid);
		json_object_set_int_member(object, "blocked-us", time->blocked_ns / 1000);
		json_object_set_int_member(object, "faults", time->faults);
		json_object_set_int_member(object, "latency", time->latency_ns);
		json_array_add_object_element(array, object);
	}
	return array;
}

static JsonObject *extras_to_json(const PrMigrationInfo *info)
{
	JsonObject *extras = json_object_new();

	json_object_set_string_member(extras, "role", pr_role_name(info->role));
	json_object_set_string_member(extras, "uuid", info->uuid);
	json_object_set_int_member(extras, "epoch", info->epoch);
	if (info->reason)
		json_object_set_string_member(extras, "reason", info->reason);
	json_object_set_int_member(extras, "pauses", info->pauses);
	json_object_set_int_member(extras, "recoveries", info->recoveries);
	json_object_set_int_member(extras, "time-paused", info->time_paused);
	json_object_set_int_member(extras, "last-pause", info->last_pause);
	json_object_set_int_member(extras, "last-recovery", info->last_recovery);
	json_object_set_int_member(extras, "pages-at-pause", info->pages_at_pause);
	json_object_set_int_member(extras, "expected-ms", info->expected_ms);
	json_object_set_int_member(extras, "rails", info->rails);
	json_object_set_int_member(extras, "stalls", info->stalls);
	if (info->last_stall)
		json_object_set_string_member(extras, "last-stall", info->last_stall);
	if (info->role == PR_ROLE_SOURCE)
		json_object_set_boolean_member(extras, "write-protected", info->fenced);
	json_object_set_boolean_member(extras, "verify", info->verifies);
	if (info->role == PR_ROLE_DESTINATION && info->verifies) {
		json_object_set_int_member(extras, "verified-pages", info->verified_pages);
		json_object_set_int_member(extras, "corrupt-reads", info->corrupt_reads);
	}
	if (info->last_corrupt)
		json_object_set_string_member(extras, "last-corrupt-read", info->last_corrupt);
	if (info->role == PR_ROLE_DESTINATION) {
		json_object_set_int_member(extras, "faults", info->faults);
		json_object_set_int_member(extras, "fault-latency-max", info->fault_latency_max_ns);
		json_object_set_int_member(extras, "fault-repeats", info->fault_repeats);
		json_object_set_int_member(extras, "readahead-pages", info->readahead_pages);
		json_object_set_int_member(extras, "readahead-waited", info->readahead_waited);
	}
	if (info->blocktime.threads) {
		json_object_set_array_member(extras,
					     info->blocktime.vcpus_known ? "vcpus" : "threads",
					     threads_to_json(info->blocktime.threads));
		json_object_set_int_member(extras, "other-faults", info->blocktime.other_faults);
	}
	if (info->blocktime.threads && info->blocktime.vcpus_known) {
		json_object_set_int_member(extras, "blocktime-at-most",
					   info->blocktime.at_most_ns / 1000000);
		json_object_set_int_member(extras, "non-vcpu-blocktime",
					   info->blocktime.other_blocked_ns / 1000000);
	}
	return extras;
}

static void add_latency(JsonObject *object, const PrMigrationInfo *info)
{
	JsonArray *dist = json_array_sized_new(PR_LATENCY_BUCKETS);

	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		json_array_add_int_element(dist, info->latency_dist[i]);
	json_object_set_int_member(object, "postcopy-latency", info->fault_latency_ns);
	json_object_set_array_member(object, "postcopy-latency-dist", dist);
}

/* Fields as in QEMU: block times in ms, latencies in ns. */
static void add_blocktime(JsonObject *object, const PrBlocktimeInfo *info)
{
	JsonArray *blocked = json_array_sized_new(info->threads->len);
	JsonArray *latency = json_array_sized_new(info->threads->len);

	for (guint i = 0; i < info->threads->len; i++) {
		const PrThreadTime *time = &g_array_index(info->threads, PrThreadTime, i);

		json_array_add_int_element(blocked, time->blocked_ns / 1000000);
		json_array_add_int_element(latency, time->latency_ns);
	}
	json_object_set_int_member(object, "postcopy-blocktime", info->all_blocked_ns / 1000000);
	json_object_set_array_member(object, "postcopy-vcpu-blocktime", blocked);
	json_object_set_array_member(object, "postcopy-vcpu-latency", latency);
	json_object_set_int_member(object, "postcopy-non-vcpu-latency", info->other_latency_ns);
}

JsonNode *pr_migrate_to_json(const PrMigrationInfo *info)
{
	JsonObject *object = json_object_new();

	json_object_set_string_member(object, "status", pr_state_name(info->state));
	if (info->state != PR_STATE_NONE) {
		json_object_set_int_member(object, "total-time", info->total_time);
		json_object_set_int_member(object, "setup-time", info->setup_time);
		json_object_set_object_member(object, "ram", ram_to_json(info));
	}
	if (info->downtime)
		json_object_set_int_member(object, "downtime", info->downtime);
	if (info->error_desc)
		json_object_set_string_member(object, "error-desc", info->error_desc);
	if (info->faults)
		add_latency(object, info);
	if (info->blocktime.threads && info->blocktime.vcpus_known)
		add_blocktime(object, &info->blocktime);
	json_object_set_object_member(object, "postroad", extras_to_json(info));
	return pr_json_object(object);
}

JsonNode *pr_paths_to_json(const PrMigrationInfo *info)
{
	JsonArray *array = json_array_new();

	for (guint i = 0; info->paths && i < info->paths->len; i++) {
		const PrPathInfo *path = g_ptr_array_index(info->paths, i);
		JsonObject *object = json_object_new();

		json_object_set_string_member(object, "uri", path->uri);
		json_object_set_string_member(object, "state", pr_path_state_name(path->state));
		json_object_set_int_member(object, "since-ms", path->since_ms);
		if (path->device)
			json_object_set_string_member(object, "device", path->device);
		if (path->last_error)
			json_object_set_string_member(object, "last-error", path->last_error);
		json_object_set_int_member(object, "rtt-us", path->rtt_us);
		json_object_set_int_member(object, "data-rtt-us", path->data_rtt_us);
		json_object_set_int_member(object, "bytes", path->bytes);
		json_object_set_boolean_member(object, "pulls", path->pulls);
		json_array_add_object_element(array, object);
	}
	return pr_json_array(array);
}

/* One line of output, printed if the member exists. */
typedef struct Row {
	const char *member;
	const char *label;
	const char *unit;
	gint64 divisor;
} Row;

static void show_rows(JsonObject *object, const Row *rows, guint n, GString *text)
{
	for (guint i = 0; i < n; i++) {
		if (!json_object_has_member(object, rows[i].member))
			continue;
		g_string_append_printf(text, "%s: %" G_GINT64_FORMAT "%s%s\n", rows[i].label,
				       json_object_get_int_member(object, rows[i].member) /
					       rows[i].divisor,
				       rows[i].unit ? " " : "", rows[i].unit ? rows[i].unit : "");
	}
}

static const Row time_rows[] = {
	{"total-time", "total time", "ms", 1},
	{"downtime", "downtime", "ms", 1},
	{"setup-time", "setup", "ms", 1},
};

static const Row ram_rows[] = {
	{"transferred", "transferred ram", "kbytes", 1024},
	{"remaining", "remaining ram", "kbytes", 1024},
	{"total", "total ram", "kbytes", 1024},
	{"duplicate", "duplicate", "pages", 1},
	{"normal", "normal", "pages", 1},
	{"normal-bytes", "normal bytes", "kbytes", 1024},
	{"page-size", "page size", "kbytes", 1024},
	{"pages-per-second", "pages-per-second", NULL, 1},
	{"postcopy-requests", "postcopy request count", NULL, 1},
};

static const Row extra_rows[] = {
	{"epoch", "epoch", NULL, 1},
	{"rails", "rails", NULL, 1},
	{"pauses", "pauses", NULL, 1},
	{"recoveries", "recoveries", NULL, 1},
	{"time-paused", "time paused", "ms", 1},
	{"last-pause", "last pause", "ms", 1},
	{"last-recovery", "last recovery", "ms", 1},
	{"pages-at-pause", "pages in place at the last pause", NULL, 1},
	{"faults", "faults", NULL, 1},
	{"fault-repeats", "repeated faults", NULL, 1},
	{"readahead-pages", "read ahead", "pages", 1},
	{"readahead-waited", "read ahead and waited for", "pages", 1},
	{"other-faults", "faults of other threads", NULL, 1},
	{"verified-pages", "verified pages", NULL, 1},
	{"corrupt-reads", "corrupt reads", "pages", 1},
	{"fault-latency-max", "longest fault", "us", 1000},
	{"expected-ms", "expected time left", "ms", 1},
	{"stalls", "thread stalls", NULL, 1},
};

static void show_blocktime(JsonObject *object, JsonObject *extras, GString *text)
{
	static const Row known = {"postcopy-blocktime", "postcopy blocktime", "ms", 1};
	static const Row bounds[] = {
		{"blocktime-at-most", "postcopy blocktime at most", "ms", 1},
		{"non-vcpu-blocktime", "postcopy non-vcpu blocktime", "ms", 1},
	};
	static const Row others = {"postcopy-non-vcpu-latency", "postcopy non-vcpu latency", "ns",
				   1};

	show_rows(object, &known, 1, text);
	show_rows(extras, bounds, G_N_ELEMENTS(bounds), text);
	show_rows(object, &others, 1, text);
}

/* Prints a line for each vCPU, or else for each of the first threads that faulted. */
static void show_threads(JsonObject *extras, GString *text)
{
	gboolean vcpus = json_object_has_member(extras, "vcpus");
	JsonArray *array = json_object_get_array_member(extras, vcpus ? "vcpus" : "threads");

	for (guint i = 0; i < json_array_get_length(array); i++) {
		JsonObject *thread = json_array_get_object_element(array, i);

		g_string_append_printf(text,
				       "%s %u (thread %" G_GINT64_FORMAT
				       "): blocked %.1f ms, %" G_GINT64_FORMAT
				       " faults, latency %" G_GINT64_FORMAT " ns\n",
				       vcpus ? "vcpu" : "guest thread", i,
				       json_object_get_int_member(thread, "thread-id"),
				       json_object_get_int_member(thread, "blocked-us") / 1000.0,
				       json_object_get_int_member(thread, "faults"),
				       json_object_get_int_member(thread, "latency"));
	}
}

static void show_latency(JsonObject *object, GString *text)
{
	JsonArray *dist = json_object_get_array_member(object, "postcopy-latency-dist");

	g_string_append_printf(text, "postcopy latency: %" G_GINT64_FORMAT " ns\n",
			       json_object_get_int_member(object, "postcopy-latency"));
	g_string_append(text, "postcopy latency distribution:\n");
	for (guint i = 0; i < json_array_get_length(dist); i++) {
		gint64 count = json_array_get_int_element(dist, i);

		if (count)
			g_string_append_printf(text, "  [ %u us - %u us ): %" G_GINT64_FORMAT "\n",
					       1u << i, 2u << i, count);
	}
}

void pr_show_migrate(JsonNode *result, GString *text)
{
	JsonObject *object = json_node_get_object(result);
	JsonObject *extras = json_object_get_object_member(object, "postroad");
	const char *status = json_object_get_string_member(object, "status");
	const char *reason = json_object_get_string_member_with_default(extras, "reason", NULL);

	g_string_append_printf(text, "Migration status: %s", status);
	if (reason)
		g_string_append_printf(text, " (%s)", reason);
	g_string_append_c(text, '\n');
	if (json_object_has_member(object, "error-desc"))
		g_string_append_printf(text, "error: %s\n",
				       json_object_get_string_member(object, "error-desc"));
	if (!json_object_has_member(object, "ram"))
		return;
	show_rows(object, time_rows, G_N_ELEMENTS(time_rows), text);
	object = json_object_get_object_member(object, "ram");
	g_string_append_printf(text, "throughput: %.2f mbps\n",
			       json_object_get_double_member(object, "mbps"));
	show_rows(object, ram_rows, G_N_ELEMENTS(ram_rows), text);
	g_string_append_printf(text, "role: %s\nuuid: %s\n",
			       json_object_get_string_member(extras, "role"),
			       json_object_get_string_member(extras, "uuid"));
	show_rows(extras, extra_rows, G_N_ELEMENTS(extra_rows), text);
	if (json_object_get_boolean_member_with_default(extras, "write-protected", FALSE))
		g_string_append(text, "guest RAM at the source: write-protected\n");
	if (json_object_has_member(extras, "last-stall"))
		g_string_append_printf(text, "last stall: %s\n",
				       json_object_get_string_member(extras, "last-stall"));
	if (json_object_has_member(extras, "last-corrupt-read"))
		g_string_append_printf(text, "last corrupt read: %s\n",
				       json_object_get_string_member(extras, "last-corrupt-read"));
	object = json_node_get_object(result);
	if (json_object_has_member(object, "postcopy-latency-dist"))
		show_latency(object, text);
	show_blocktime(object, extras, text);
	if (json_object_has_member(extras, "other-faults"))
		show_threads(extras, text);
}

void pr_show_paths(JsonNode *result, GString *text)
{
	JsonArray *array = json_node_get_array(result);

	if (!json_array_get_length(array))
		g_string_append(text, "no paths yet\n");
	for (guint i = 0; i < json_array_get_length(array); i++) {
		JsonObject *path = json_array_get_object_element(array, i);
		const char *last_error =
			json_object_get_string_member_with_default(path, "last-error", NULL);
		const char *device =
			json_object_get_string_member_with_default(path, "device", NULL);

		g_string_append_printf(
			text,
			"%s: %s%s for %.1f s%s%s, rtt %" G_GINT64_FORMAT
			" us (data %" G_GINT64_FORMAT " us), %" G_GINT64_FORMAT " kbytes",
			json_object_get_string_member(path, "uri"),
			json_object_get_string_member(path, "state"),
			json_object_get_boolean_member(path, "pulls") ? ", pulls" : "",
			json_object_get_int_member(path, "since-ms") / 1000.0, device ? ", " : "",
			device ? device : "", json_object_get_int_member(path, "rtt-us"),
			json_object_get_int_member(path, "data-rtt-us"),
			json_object_get_int_member(path, "bytes") / 1024);
		if (last_error)
			g_string_append_printf(text, ", last error: %s", last_error);
		g_string_append_c(text, '\n');
	}
}

void pr_show_parameters(JsonNode *result, GString *text)
{
	JsonObject *object = json_node_get_object(result);

	for (guint i = 0; i < PR_N_PARAMS; i++) {
		const PrParamInfo *info = pr_param_info(i);

		g_string_append_printf(text, "%s: %" G_GINT64_FORMAT " %s\n", info->name,
				       json_object_get_int_member(object, info->name), info->unit);
	}
}

void pr_show_capabilities(JsonNode *result, GString *text)
{
	JsonArray *array = json_node_get_array(result);

	for (guint i = 0; i < json_array_get_length(array); i++) {
		JsonObject *cap = json_array_get_object_element(array, i);

		g_string_append_printf(text, "%s: %s\n",
				       json_object_get_string_member(cap, "capability"),
				       json_object_get_boolean_member(cap, "state") ? "on" : "off");
	}
}

void pr_show_version(JsonNode *result, GString *text)
{
	g_string_append_printf(text, "%s\n",
			       json_object_get_string_member(json_node_get_object(result),
							     "package"));
}

void pr_show_text(JsonNode *result, GString *text)
{
	g_string_append(text, json_node_get_string(result));
}
