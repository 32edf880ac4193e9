/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu-query.h"

#include "guest/json.h"
#include "guest/qemu-ram.h"

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

JsonArray *pr_qemu_execute_array(PrQmp *qmp, const char *command, JsonObject *arguments,
				 JsonNode **ret_node, GError **error)
{
	*ret_node = pr_qmp_execute(qmp, command, arguments, -1, error);
	if (!*ret_node)
		return NULL;
	if (JSON_NODE_HOLDS_ARRAY(*ret_node))
		return json_node_get_array(*ret_node);
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "QEMU's answer to '%s' is not a list", command);
	return NULL;
}

const char *pr_qemu_element_string(JsonArray *array, guint i, const char *member)
{
	JsonNode *node = json_array_get_element(array, i);

	if (!JSON_NODE_HOLDS_OBJECT(node))
		return NULL;
	return pr_json_string(json_node_get_object(node), member);
}

JsonObject *pr_qemu_path_arguments(const char *path)
{
	JsonObject *arguments = json_object_new();

	json_object_set_string_member(arguments, "path", path);
	return arguments;
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

GArray *pr_qemu_vcpu_threads(PrQmp *qmp, GError **error)
{
	g_autoptr(GArray) threads = g_array_new(FALSE, FALSE, sizeof(uint32_t));
	g_autoptr(JsonNode) node = NULL;
	JsonArray *array = pr_qemu_execute_array(qmp, "query-cpus-fast", NULL, &node, error);

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

uint64_t pr_qemu_query_hva(PrQmp *qmp, const char *mtree, const char *block)
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
