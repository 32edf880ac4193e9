/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu-check.h"

#include <string.h>

#include "guest/json.h"
#include "guest/qemu-query.h"

static const char *object_string(JsonObject *object, const char *member)
{
	const char *text = pr_json_string(object, member);

	return text ? text : "";
}

/* A QEMU older than 7.2 does not report its migration blockers. */
static gboolean check_version(PrQmp *qmp, GError **error)
{
	guint major, minor;

	if (!pr_qemu_version(qmp, &major, &minor, error))
		return FALSE;
	if (major > 7 || (major == 7 && minor >= 2))
		return TRUE;
	return pr_qemu_refuse(error, "this is QEMU %u.%u; Postroad needs QEMU 7.2 or later", major,
			      minor);
}

/* With these capabilities QEMU would not read a plain stream. */
static gboolean check_capabilities(PrQmp *qmp, GError **error)
{
	static const char *const bad[] = {"multifd", "postcopy-preempt",    "mapped-ram",
					  "x-colo",  "background-snapshot", "x-ignore-shared",
					  NULL};
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array =
		pr_qemu_execute_array(qmp, "query-migrate-capabilities", NULL, &node, error);

	if (!array)
		return FALSE;
	for (guint i = 0; i < json_array_get_length(array); i++) {
		const char *name = pr_qemu_element_string(array, i, "capability");

		if (name && g_strv_contains(bad, name) &&
		    pr_json_boolean(json_array_get_object_element(array, i), "state"))
			return pr_qemu_refuse(
				error,
				"the destination's QEMU has its migration capability '%s' on; "
				"switch it off (migrate_set_capability %s off in its monitor)",
				name, name);
	}
	return TRUE;
}

/* With TLS credentials QEMU would start a TLS handshake on the engine's socket. */
static gboolean check_parameters(PrQmp *qmp, GError **error)
{
	g_autoptr(JsonObject) parameters = pr_qmp_query(qmp, "query-migrate-parameters", error);

	if (!parameters)
		return FALSE;
	if (!*object_string(parameters, "tls-creds"))
		return TRUE;
	return pr_qemu_refuse(
		error,
		"the destination's QEMU has its migration parameter 'tls-creds' set; clear it "
		"(migrate_set_parameter tls-creds \"\" in its monitor)");
}

/* QEMU's own migration blockers: devices whose state can't be migrated, and jobs that use the guest
 * at present. */
static gboolean check_blockers(JsonObject *migration, GError **error)
{
	JsonNode *node = json_object_get_member(migration, "blocked-reasons");
	JsonNode *first;

	if (!node || !JSON_NODE_HOLDS_ARRAY(node) ||
	    !json_array_get_length(json_node_get_array(node)))
		return TRUE;
	first = json_array_get_element(json_node_get_array(node), 0);
	return pr_qemu_refuse(error, "this QEMU cannot migrate: %s",
			      JSON_NODE_HOLDS_VALUE(first) &&
					      json_node_get_value_type(first) == G_TYPE_STRING
				      ? json_node_get_string(first)
				      : "it does not say why");
}

/* Dirty bitmaps are not in the device state: a backup that relies on one would miss writes. */
static gboolean check_bitmaps_of(JsonObject *node, GError **error)
{
	JsonNode *list = json_object_get_member(node, "dirty-bitmaps");
	const char *bitmap, *name;

	if (!list || !JSON_NODE_HOLDS_ARRAY(list) ||
	    !json_array_get_length(json_node_get_array(list)))
		return TRUE;
	name = object_string(node, "node-name");
	bitmap = pr_qemu_element_string(json_node_get_array(list), 0, "name");
	return pr_qemu_refuse(
		error,
		"block node '%s' has the dirty bitmap '%s', which can't be migrated; remove "
		"it first (block-dirty-bitmap-remove)",
		name, bitmap ? bitmap : "");
}

static gboolean check_bitmaps(PrQmp *qmp, GError **error)
{
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array =
		pr_qemu_execute_array(qmp, "query-named-block-nodes", NULL, &node, error);

	for (guint i = 0; array && i < json_array_get_length(array); i++) {
		JsonNode *element = json_array_get_element(array, i);

		if (JSON_NODE_HOLDS_OBJECT(element) &&
		    !check_bitmaps_of(json_node_get_object(element), error))
			return FALSE;
	}
	return array != NULL;
}

/* xen-save-devices-state stores the run state "running", whatever it was. */
static gboolean check_source_state(const char *migration, const char *run_state, GError **error)
{
	static const char *const at_rest[] = {"", "none", "completed", "cancelled", "failed", NULL};
	static const char *const movable[] = {"running", "paused", "prelaunch", "postmigrate",
					      NULL};

	if (g_str_equal(run_state, "inmigrate"))
		return pr_qemu_refuse(
			error, "this QEMU waits for an incoming migration (-incoming); it can "
			       "only be a destination");
	if (!g_strv_contains(at_rest, migration))
		return pr_qemu_refuse(
			error,
			"this QEMU is migrating already (query-migrate says '%s'); wait for "
			"it or use its migrate_cancel",
			migration);
	if (g_str_equal(run_state, "postmigrate") && g_str_equal(migration, "completed"))
		return pr_qemu_refuse(error,
				      "this QEMU's guest has migrated away already (run state "
				      "'postmigrate'); `cont` in its monitor takes it back");
	if (!g_strv_contains(movable, run_state))
		return pr_qemu_refuse(
			error,
			"this QEMU's guest is in the run state '%s'; only one that runs or is "
			"paused can be moved",
			run_state);
	return TRUE;
}

static gboolean check_destination_state(JsonObject *migration, const char *run_state,
					GError **error)
{
	if (!g_str_equal(run_state, "inmigrate"))
		return pr_qemu_refuse(
			error,
			"this QEMU does not wait for a guest (run state '%s'); start the "
			"destination with -incoming defer",
			run_state);
	if (g_str_equal(object_string(migration, "status"), "failed"))
		return pr_qemu_refuse(error,
				      "this QEMU has failed to load a guest already; start the "
				      "destination anew with -incoming defer");
	if (json_object_has_member(migration, "socket-address") ||
	    *object_string(migration, "status"))
		return pr_qemu_refuse(error,
				      "this QEMU listens for a migration of its own; start the "
				      "destination with -incoming defer");
	return TRUE;
}

static gboolean check_state(PrQmp *qmp, PrGuestRole role, GError **error)
{
	g_autoptr(JsonObject) status = pr_qmp_query(qmp, "query-status", error);
	g_autoptr(JsonObject) migration = NULL;
	const char *run_state;

	if (!status)
		return FALSE;
	migration = pr_qmp_query(qmp, "query-migrate", error);
	if (!migration)
		return FALSE;
	run_state = object_string(status, "status");
	if (role == PR_GUEST_DESTINATION)
		return check_destination_state(migration, run_state, error);
	return check_source_state(object_string(migration, "status"), run_state, error) &&
	       check_blockers(migration, error);
}

/* Devices whose state is outside of QEMU, or which access guest RAM from outside of QEMU. */
static gboolean check_device(const char *path, const char *name, const char *type, GError **error)
{
	static const char *const bad[] = {"child<vfio-", "vhost-user", "vhost-vdpa",
					  "child<ivshmem", NULL};

	for (guint i = 0; bad[i]; i++) {
		if (strstr(type, bad[i]))
			return pr_qemu_refuse(
				error,
				"device %s/%s is a %.*s, which reaches guest RAM from outside "
				"of QEMU and can't be migrated; unplug it first",
				path, name, (int)strcspn(type + 6, ">"), type + 6);
	}
	return TRUE;
}

static gboolean check_devices_at(PrQmp *qmp, const char *path, GError **error)
{
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array =
		pr_qemu_execute_array(qmp, "qom-list", pr_qemu_path_arguments(path), &node, error);

	if (!array)
		return FALSE;
	for (guint i = 0; i < json_array_get_length(array); i++) {
		const char *type = pr_qemu_element_string(array, i, "type");
		const char *name = pr_qemu_element_string(array, i, "name");

		if (type && name && g_str_has_prefix(type, "child<") &&
		    !check_device(path, name, type, error))
			return FALSE;
	}
	return TRUE;
}

static gboolean check_network(PrQmp *qmp, GError **error)
{
	g_autofree char *text = pr_qmp_human(qmp, "info network", error);
	g_auto(GStrv) lines = NULL;

	if (!text)
		return FALSE;
	lines = g_strsplit_set(text, "\r\n", -1);
	for (guint i = 0; lines[i]; i++) {
		const char *line = g_strchug(lines[i]);

		if (strstr(line, "type=vhost-user") || strstr(line, "type=vhost-vdpa"))
			return pr_qemu_refuse(
				error,
				"netdev '%.*s' is served by another process that maps guest "
				"RAM (vhost-user or vhost-vdpa) and can't be migrated; use a "
				"tap netdev",
				(int)strcspn(line, ":"), line);
	}
	return TRUE;
}

static gboolean check_role(PrQmp *qmp, PrGuestRole role, GError **error)
{
	if (role == PR_GUEST_SOURCE)
		return check_bitmaps(qmp, error);
	return check_capabilities(qmp, error) && check_parameters(qmp, error);
}

gboolean pr_qemu_check(PrQmp *qmp, PrGuestRole role, gboolean fresh, GError **error)
{
	if (!check_version(qmp, error) || (fresh && !check_state(qmp, role, error)))
		return FALSE;
	return check_role(qmp, role, error) &&
	       check_devices_at(qmp, "/machine/peripheral", error) &&
	       check_devices_at(qmp, "/machine/peripheral-anon", error) &&
	       check_network(qmp, error);
}
