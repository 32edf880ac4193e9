/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu-blocks.h"

#include <gio/gunixmounts.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/vfs.h>

#include "guest/json.h"
#include "guest/qemu-private.h"
#include "guest/qemu-query.h"
#include "guest/qemu-ram.h"

static JsonNode *backend_property(PrQmp *qmp, const char *id, const char *property, GError **error)
{
	g_autofree char *path = g_strconcat("/objects/", id, NULL);
	JsonObject *arguments = pr_qemu_path_arguments(path);

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

/* Adds the file of a backend's memory, and its file system. */
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
	JsonArray *array = pr_qemu_execute_array(qmp, "qom-list",
						 pr_qemu_path_arguments("/objects"), &node, error);

	if (!array)
		return NULL;
	for (guint i = 0; i < json_array_get_length(array); i++) {
		const char *type = pr_qemu_element_string(array, i, "type");
		const char *name = pr_qemu_element_string(array, i, "name");

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

/* Addresses are a check, and tell two blocks of the same size apart. Where QEMU does not tell them,
 * blocks are matched by order. */
static void query_addresses(PrQmp *qmp, GArray *ramblocks, const GArray *backends)
{
	g_autofree char *mtree = pr_qmp_human(qmp, "info mtree -f", NULL);

	for (guint i = 0; mtree && i < ramblocks->len; i++) {
		PrQemuRamBlock *block = &g_array_index(ramblocks, PrQemuRamBlock, i);

		if (!block->hva && pr_qemu_backend_of(backends, block->name))
			block->hva = pr_qemu_query_hva(qmp, mtree, block->name);
	}
}

/* Lists QEMU's RAM; refused if it is not shared. files: files in memory are accepted, too. */
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

gboolean pr_qemu_check_ram(PrQmp *qmp, GError **error)
{
	g_autoptr(GArray) ramblocks = NULL;
	g_autoptr(GArray) backends = NULL;

	return list_ram(qmp, FALSE, &ramblocks, &backends, error);
}

/* A helper lists all shared memory of the process, and is told which of it is the guest's RAM. */
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
	query_addresses(qmp, ramblocks, backends);
	regions = pr_agent_client_regions(agent, error);
	if (!regions)
		return NULL;
	return helper ? match_attached(agent, ramblocks, backends, regions, error)
		      : pr_qemu_match(ramblocks, backends, regions, error);
}
