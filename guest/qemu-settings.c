/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* QEMU's migration settings: how they have to be for a stream to or from us. */
#include "guest/json.h"
#include "guest/qemu.h"

/* Off: they change the stream, or want more than one connection. */
static gboolean wanted_capability(const char *name, gboolean *ret_on)
{
	static const char *const off[] = {"multifd",
					  "postcopy-ram",
					  "xbzrle",
					  "compress",
					  "x-colo",
					  "dirty-bitmaps",
					  "return-path",
					  "rdma-pin-all",
					  "zero-copy-send",
					  "mapped-ram",
					  "auto-converge",
					  "pause-before-switchover",
					  "postcopy-preempt",
					  "background-snapshot",
					  "block",
					  NULL};

	*ret_on = g_str_equal(name, "x-ignore-shared") || g_str_equal(name, "events");
	return *ret_on || g_strv_contains(off, name);
}

void pr_qemu_add_capability(JsonArray *list, const char *name, gboolean on)
{
	JsonObject *object = json_object_new();

	json_object_set_string_member(object, "capability", name);
	json_object_set_boolean_member(object, "state", on);
	json_array_add_object_element(list, object);
}

void pr_qemu_plan_capabilities(JsonArray *found, JsonArray *wanted, JsonArray *old)
{
	for (guint i = 0; i < json_array_get_length(found); i++) {
		JsonNode *node = json_array_get_element(found, i);
		JsonObject *object;
		const char *name;
		gboolean is, on;

		if (!JSON_NODE_HOLDS_OBJECT(node))
			continue;
		object = json_node_get_object(node);
		name = pr_json_string(object, "capability");
		is = pr_json_boolean(object, "state");
		if (!name || !wanted_capability(name, &on) || is == on)
			continue;
		pr_qemu_add_capability(wanted, name, on);
		pr_qemu_add_capability(old, name, is);
	}
}

gboolean pr_qemu_set_capabilities(PrQmp *qmp, JsonArray *list, GError **error)
{
	JsonObject *arguments;

	if (!json_array_get_length(list))
		return TRUE;
	arguments = json_object_new();
	json_object_set_array_member(arguments, "capabilities", json_array_ref(list));
	return pr_qmp_command(qmp, "migrate-set-capabilities", arguments, -1, error);
}

gboolean pr_qemu_set_bandwidth(PrQmp *qmp, gint64 bandwidth, GError **error)
{
	JsonObject *arguments = json_object_new();

	json_object_set_int_member(arguments, "max-bandwidth", bandwidth);
	return pr_qmp_command(qmp, "migrate-set-parameters", arguments, -1, error);
}

gboolean pr_qemu_query_bandwidth(PrQmp *qmp, gint64 *ret_bandwidth, GError **error)
{
	g_autoptr(JsonObject) object = pr_qmp_query(qmp, "query-migrate-parameters", error);

	if (!object)
		return FALSE;
	*ret_bandwidth = pr_json_int(object, "max-bandwidth");
	return TRUE;
}
