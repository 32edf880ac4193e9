/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu.h"
#include "guest/qemu-private.h"
#include "guest/qemu-ram.h"

#include <gio/gunixmounts.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/vfs.h>

#include "guest/json.h"

gboolean pr_qemu_refuse(GError **error, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	if (error)
		*error = g_error_new_valist(PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED, format,
					    args);
	va_end(args);
	return FALSE;
}

static JsonArray *execute_array(PrQmp *qmp, const char *command, JsonObject *arguments,
				JsonNode **node, GError **error)
{
	*node = pr_qmp_execute(qmp, command, arguments, -1, error);
	if (!*node)
		return NULL;
	if (JSON_NODE_HOLDS_ARRAY(*node))
		return json_node_get_array(*node);
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "QEMU's answer to '%s' is not a list", command);
	return NULL;
}

/* NULL: not an object, or has no such string. */
static const char *element_string(JsonArray *array, guint i, const char *member)
{
	JsonNode *node = json_array_get_element(array, i);

	if (!JSON_NODE_HOLDS_OBJECT(node))
		return NULL;
	return pr_json_string(json_node_get_object(node), member);
}

static const char *object_string(JsonObject *object, const char *member)
{
	const char *text = pr_json_string(object, member);

	return text ? text : "";
}

gboolean pr_qemu_version(PrQmp *qmp, guint *ret_major, guint *ret_minor, GError **error)
{
	g_autoptr(JsonObject) object = pr_qmp_query(qmp, "query-version", error);
	JsonObject *qemu;

	if (!object)
		return FALSE;
	qemu = pr_json_object(object, "qemu");
	*ret_major = qemu ? (guint)pr_json_int(qemu, "major") : 0;
	*ret_minor = qemu ? (guint)pr_json_int(qemu, "minor") : 0;
	return TRUE;
}

/* Older ones do not tell what keeps them from migrating. */
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

/* Capabilities of QEMU's own migration with which it would not read a plain stream. */
static gboolean check_capabilities(PrQmp *qmp, GError **error)
{
	static const char *const bad[] = {"multifd", "postcopy-preempt",    "mapped-ram",
					  "x-colo",  "background-snapshot", "x-ignore-shared",
					  NULL};
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array = execute_array(qmp, "query-migrate-capabilities", NULL, &node, error);

	if (!array)
		return FALSE;
	for (guint i = 0; i < json_array_get_length(array); i++) {
		const char *name = element_string(array, i, "capability");

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

/* With a TLS of its own QEMU would shake hands on our socket. */
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

/* What QEMU itself names as a reason not to migrate: devices that have no state, and what uses the guest right now. */
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
	bitmap = element_string(json_node_get_array(list), 0, "name");
	return pr_qemu_refuse(
		error,
		"block node '%s' has the dirty bitmap '%s', which can't be migrated; remove "
		"it first (block-dirty-bitmap-remove)",
		name, bitmap ? bitmap : "");
}

static gboolean check_bitmaps(PrQmp *qmp, GError **error)
{
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array = execute_array(qmp, "query-named-block-nodes", NULL, &node, error);

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

/* Devices whose state, or whose access to guest RAM, lives outside of QEMU. */
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

static JsonObject *path_arguments(const char *path)
{
	JsonObject *arguments = json_object_new();

	json_object_set_string_member(arguments, "path", path);
	return arguments;
}

static gboolean check_devices_at(PrQmp *qmp, const char *path, GError **error)
{
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array = execute_array(qmp, "qom-list", path_arguments(path), &node, error);

	if (!array)
		return FALSE;
	for (guint i = 0; i < json_array_get_length(array); i++) {
		const char *type = element_string(array, i, "type");
		const char *name = element_string(array, i, "name");

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

gboolean pr_qemu_check(PrQmp *qmp, PrGuestRole role, gboolean fresh, GError **error)
{
	return check_version(qmp, error) && (!fresh || check_state(qmp, role, error)) &&
	       (role == PR_GUEST_SOURCE
			? check_bitmaps(qmp, error)
			: check_capabilities(qmp, error) && check_parameters(qmp, error)) &&
	       check_devices_at(qmp, "/machine/peripheral", error) &&
	       check_devices_at(qmp, "/machine/peripheral-anon", error) &&
	       check_network(qmp, error);
}

static JsonNode *backend_property(PrQmp *qmp, const char *id, const char *property, GError **error)
{
	g_autofree char *path = g_strconcat("/objects/", id, NULL);
	JsonObject *arguments = path_arguments(path);

	json_object_set_string_member(arguments, "property", property);
	return pr_qmp_execute(qmp, "qom-get", arguments, -1, error);
}

static char *file_system_of(const char *path)
{
	GUnixMountEntry *mount;
	struct statfs fs;
	char *name;

	if (statfs(path, &fs) < 0 || fs.f_type == TMPFS_MAGIC)
		return g_strdup("tmpfs");
	if (fs.f_type == HUGETLBFS_MAGIC)
		return g_strdup("hugetlbfs");
	mount = g_unix_mount_for(path, NULL);
	name = g_strdup(mount ? g_unix_mount_get_fs_type(mount) : "a disk");
	g_clear_pointer(&mount, g_unix_mount_free);
	return name;
}

/* Which file a backend's memory is, and on what file system. */
static gboolean add_file(PrQmp *qmp, PrQemuBackend *backend, GError **error)
{
	g_autoptr(JsonNode) path = NULL;

	if (g_str_equal(backend->type, "memory-backend-shm"))
		backend->fs = g_strdup("tmpfs");
	if (!g_str_equal(backend->type, "memory-backend-file"))
		return TRUE;
	path = backend_property(qmp, backend->id, "mem-path", error);
	if (!path)
		return FALSE;
	if (json_node_get_value_type(path) != G_TYPE_STRING)
		return TRUE;
	backend->path = g_strdup(json_node_get_string(path));
	backend->fs = file_system_of(backend->path);
	return TRUE;
}

static gboolean add_backend(PrQmp *qmp, GArray *backends, const char *id, const char *type,
			    gboolean files, GError **error)
{
	g_autoptr(JsonNode) share = backend_property(qmp, id, "share", error);
	g_autoptr(JsonNode) size = NULL;
	PrQemuBackend backend = {0};

	if (!share)
		return FALSE;
	size = backend_property(qmp, id, "size", error);
	if (!size)
		return FALSE;
	backend.share = JSON_NODE_HOLDS_VALUE(share) && json_node_get_boolean(share);
	backend.size = JSON_NODE_HOLDS_VALUE(size) ? json_node_get_int(size) : 0;
	backend.id = g_strdup(id);
	/* "child<TYPE>" */
	backend.type = g_strndup(type + 6, strcspn(type + 6, ">"));
	g_array_append_val(backends, backend);
	return !files ||
	       add_file(qmp, &g_array_index(backends, PrQemuBackend, backends->len - 1), error);
}

static GArray *list_backends(PrQmp *qmp, gboolean files, GError **error)
{
	g_autoptr(GArray) backends = pr_qemu_backends_new();
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array = execute_array(qmp, "qom-list", path_arguments("/objects"), &node, error);

	if (!array)
		return NULL;
	for (guint i = 0; i < json_array_get_length(array); i++) {
		const char *type = element_string(array, i, "type");
		const char *name = element_string(array, i, "name");

		if (type && name && g_str_has_prefix(type, "child<memory-backend-") &&
		    !add_backend(qmp, backends, name, type, files, error))
			return NULL;
	}
	return g_steal_pointer(&backends);
}

static gboolean check_blocks(const GArray *ramblocks, const GArray *backends, guint *ret_n_shared,
			     GError **error)
{
	guint n_shared = 0;

	for (guint i = 0; i < ramblocks->len; i++) {
		const PrQemuRamBlock *block = &g_array_index(ramblocks, PrQemuRamBlock, i);
		gboolean shared;

		if (!pr_qemu_block_shared(block, backends, &shared, error))
			return FALSE;
		n_shared += shared && *block->name;
	}
	if (!n_shared)
		return pr_qemu_refuse(error,
				      "this QEMU has no shared RAM; start it with -object "
				      "memory-backend-memfd,id=mem,size=SIZE,share=on and -machine "
				      "memory-backend=mem");
	*ret_n_shared = n_shared;
	return TRUE;
}

uint64_t pr_qemu_ask_hva(PrQmp *qmp, const char *mtree, const char *block)
{
	g_autofree char *line = NULL;
	g_autofree char *text = NULL;
	uint64_t gpa, offset, hva;

	if (!pr_qemu_find_gpa(mtree, block, &gpa, &offset))
		return 0;
	line = g_strdup_printf("gpa2hva 0x%" G_GINT64_MODIFIER "x", gpa);
	text = pr_qmp_human(qmp, line, NULL);
	return text && pr_qemu_parse_hva(text, &hva) ? hva - offset : 0;
}

/* Addresses are a check, and settle which of two blocks of the same size is which. A QEMU that does not
 * tell them is matched by order. */
static void ask_for_addresses(PrQmp *qmp, GArray *ramblocks, const GArray *backends)
{
	g_autofree char *mtree = pr_qmp_human(qmp, "info mtree -f", NULL);

	for (guint i = 0; mtree && i < ramblocks->len; i++) {
		PrQemuRamBlock *block = &g_array_index(ramblocks, PrQemuRamBlock, i);

		if (!block->hva && pr_qemu_backend_of(backends, block->name))
			block->hva = pr_qemu_ask_hva(qmp, mtree, block->name);
	}
}

/* What RAM there is; refused if it is not shared. files: files in memory will do, too. */
static gboolean list_ram(PrQmp *qmp, gboolean files, GArray **ret_ramblocks, GArray **ret_backends,
			 GError **error)
{
	g_autofree char *text = pr_qmp_human(qmp, "info ramblock", error);
	g_autoptr(GArray) ramblocks = text ? pr_qemu_ramblocks_parse(text, error) : NULL;
	g_autoptr(GArray) backends = ramblocks ? list_backends(qmp, files, error) : NULL;
	guint n_shared;

	if (!backends || !check_blocks(ramblocks, backends, &n_shared, error))
		return FALSE;
	*ret_ramblocks = g_steal_pointer(&ramblocks);
	*ret_backends = g_steal_pointer(&backends);
	return TRUE;
}

GArray *pr_qemu_vcpu_threads(PrQmp *qmp, GError **error)
{
	g_autoptr(GArray) threads = g_array_new(FALSE, FALSE, sizeof(uint32_t));
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array = execute_array(qmp, "query-cpus-fast", NULL, &node, error);

	if (!array)
		return NULL;
	for (guint i = 0; i < json_array_get_length(array); i++) {
		JsonNode *cpu = json_array_get_element(array, i);
		gint64 number = JSON_NODE_HOLDS_OBJECT(cpu)
					? pr_json_int(json_node_get_object(cpu), "thread-id")
					: 0;
		uint32_t tid = (uint32_t)number;

		if (number < 1 || number > G_MAXINT32) {
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
				    "QEMU's answer to 'query-cpus-fast' names no thread for CPU %u",
				    i);
			return NULL;
		}
		g_array_append_val(threads, tid);
	}
	return g_steal_pointer(&threads);
}

gboolean pr_qemu_check_ram(PrQmp *qmp, GError **error)
{
	g_autoptr(GArray) ramblocks = NULL;
	g_autoptr(GArray) backends = NULL;

	return list_ram(qmp, FALSE, &ramblocks, &backends, error);
}

/* A helper knows more than the guest's RAM. */
static GArray *match_attached(PrAgentClient *helper, const GArray *ramblocks,
			      const GArray *backends, GArray *regions, GError **error)
{
	g_autoptr(GArray) blocks = pr_qemu_match_attached(ramblocks, backends, regions, error);

	if (!blocks ||
	    !pr_agent_client_choose(helper, (const PrGuestBlock *)blocks->data, blocks->len, error))
		return NULL;
	return g_steal_pointer(&blocks);
}

GArray *pr_qemu_private_blocks(PrQmp *qmp, PrAgentClient *agent, GError **error)
{
	g_autoptr(GArray) ramblocks = NULL;
	g_autoptr(GArray) backends = NULL;
	GArray *blocks;

	if (!list_ram(qmp, pr_agent_client_is_helper(agent), &ramblocks, &backends, error))
		return NULL;
	blocks = pr_qemu_private_list(ramblocks, backends);
	pr_qemu_private_locate(qmp, blocks);
	return blocks;
}

GArray *pr_qemu_blocks(PrQmp *qmp, PrAgentClient *agent, GError **error)
{
	gboolean helper = pr_agent_client_is_helper(agent);
	g_autoptr(GArray) ramblocks = NULL;
	g_autoptr(GArray) backends = NULL;
	g_autoptr(GArray) regions = NULL;

	if (!list_ram(qmp, helper, &ramblocks, &backends, error))
		return NULL;
	ask_for_addresses(qmp, ramblocks, backends);
	regions = pr_agent_client_regions(agent, error);
	if (!regions)
		return NULL;
	return helper ? match_attached(agent, ramblocks, backends, regions, error)
		      : pr_qemu_match(ramblocks, backends, regions, error);
}
