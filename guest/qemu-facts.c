/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu-facts.h"

#include <string.h>

#include "guest/json.h"
#include "guest/qemu-private.h"
#include "guest/qemu-query.h"
#include "util/json-framer.h"

#define DEVICES_MAX 4096 /* the most devices, or RAM blocks, that a source may name */

/* The devices */

/* A bus that contains the current line. */
typedef struct Bus {
	gsize indent;
	char *name;
	char *type;
} Bus;

static void bus_clear(gpointer data)
{
	Bus *bus = data;

	g_free(bus->name);
	g_free(bus->type);
}

typedef struct DeviceParser {
	GArray *buses; /* Bus, the innermost last */
	JsonArray *devices;
	JsonObject *device; /* the device whose properties follow; owned by devices; NULL: none */
	gsize device_indent;
	GString *addr; /* the device's place on its bus, so far */
} DeviceParser;

static Bus *innermost(DeviceParser *parser)
{
	return parser->buses->len ? &g_array_index(parser->buses, Bus, parser->buses->len - 1)
				  : NULL;
}

static void leave_buses(DeviceParser *parser, gsize indent)
{
	while (parser->buses->len && innermost(parser)->indent >= indent)
		g_array_set_size(parser->buses, parser->buses->len - 1);
}

static void end_device(DeviceParser *parser)
{
	if (parser->device)
		json_object_set_string_member(parser->device, "addr", parser->addr->str);
	parser->device = NULL;
	g_string_truncate(parser->addr, 0);
}

/* `TYPE, id "ID"` */
static void begin_device(DeviceParser *parser, gsize indent, const char *text)
{
	const char *comma = strstr(text, ", id \"");
	g_autofree char *type = comma ? g_strndup(text, comma - text) : g_strdup(text);
	g_autofree char *id = g_strdup(comma ? comma + strlen(", id \"") : "");
	const Bus *bus;

	end_device(parser);
	leave_buses(parser, indent);
	bus = innermost(parser);
	id[strcspn(id, "\"")] = '\0';
	parser->device = json_object_new();
	parser->device_indent = indent;
	json_object_set_string_member(parser->device, "type", type);
	json_object_set_string_member(parser->device, "id", id);
	json_object_set_string_member(parser->device, "bus", bus ? bus->name : "");
	json_object_set_string_member(parser->device, "bus-type",
				      bus && bus->type ? bus->type : "");
	json_array_add_object_element(parser->devices, parser->device);
}

/* Whether the property is a part of the device's place on its bus. */
static gboolean is_place(const char *name)
{
	static const char *const places[] = {"addr", "port", "unit", "channel", "scsi-id",
					     "lun",  "nr",   "slot", NULL};

	return g_strv_contains(places, name);
}

/* `name = "value"`, or `name = 7 (0x7)` */
static void parse_property(DeviceParser *parser, const char *text)
{
	const char *equals = strstr(text, " = ");
	g_autofree char *name = equals ? g_strndup(text, equals - text) : NULL;
	g_autofree char *value = NULL;

	if (!name || !is_place(name))
		return;
	value = g_strdup(equals + strlen(" = "));
	if (value[0] == '"')
		memmove(value, value + 1, strlen(value));
	value[strcspn(value, "\" ")] = '\0';
	if (!*value)
		return;
	g_string_append_printf(parser->addr, "%s%s", parser->addr->len ? "/" : "", value);
}

static void parse_line(DeviceParser *parser, const char *line)
{
	gsize indent = strspn(line, " ");
	const char *text = line + indent;
	Bus *bus;

	if (g_str_has_prefix(text, "bus: ")) {
		Bus next = {.indent = indent, .name = g_strdup(text + strlen("bus: "))};

		end_device(parser);
		leave_buses(parser, indent);
		g_array_append_val(parser->buses, next);
	} else if (g_str_has_prefix(text, "dev: ")) {
		begin_device(parser, indent, text + strlen("dev: "));
	} else if (parser->device && indent > parser->device_indent) {
		parse_property(parser, text);
	} else if (g_str_has_prefix(text, "type ") && (bus = innermost(parser)) && !bus->type) {
		bus->type = g_strdup(text + strlen("type "));
	}
}

JsonArray *pr_qemu_devices_parse(const char *qtree)
{
	g_auto(GStrv) lines = g_strsplit_set(qtree, "\r\n", -1);
	DeviceParser parser = {.buses = g_array_new(FALSE, TRUE, sizeof(Bus)),
			       .devices = json_array_new(),
			       .addr = g_string_new(NULL)};

	g_array_set_clear_func(parser.buses, bus_clear);
	for (guint i = 0; lines[i]; i++)
		parse_line(&parser, lines[i]);
	end_device(&parser);
	g_array_unref(parser.buses);
	g_string_free(parser.addr, TRUE);
	return parser.devices;
}

/* The facts of a QEMU */

static char *query_type(PrQmp *qmp, const char *path, GError **error)
{
	JsonObject *arguments = json_object_new();
	g_autoptr(JsonNode) node = NULL;

	json_object_set_string_member(arguments, "path", path);
	json_object_set_string_member(arguments, "property", "type");
	node = pr_qmp_execute(qmp, "qom-get", arguments, -1, error);
	if (!node)
		return NULL;
	if (JSON_NODE_HOLDS_VALUE(node) && json_node_get_value_type(node) == G_TYPE_STRING)
		return g_strdup(json_node_get_string(node));
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "QEMU's answer to 'qom-get %s type' is not a name", path);
	return NULL;
}

static char *without(const char *text, const char *suffix)
{
	return g_str_has_suffix(text, suffix) ? g_strndup(text, strlen(text) - strlen(suffix))
					      : g_strdup(text);
}

char *pr_qemu_machine(PrQmp *qmp, GError **error)
{
	g_autofree char *type = query_type(qmp, "/machine", error);

	return type ? without(type, "-machine") : NULL;
}

/* The number of vCPUs, and the model of the first. */
static gboolean query_cpus(PrQmp *qmp, JsonObject *facts, GError **error)
{
	g_autoptr(JsonNode) node = pr_qmp_execute(qmp, "query-cpus-fast", NULL, -1, error);
	g_autofree char *type = NULL;
	const char *path = NULL;
	JsonArray *cpus;

	if (!node)
		return FALSE;
	cpus = JSON_NODE_HOLDS_ARRAY(node) ? json_node_get_array(node) : NULL;
	if (cpus && json_array_get_length(cpus)) {
		JsonNode *first = json_array_get_element(cpus, 0);

		if (JSON_NODE_HOLDS_OBJECT(first))
			path = pr_json_string(json_node_get_object(first), "qom-path");
	}
	if (!path) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "QEMU's answer to 'query-cpus-fast' names no CPU");
		return FALSE;
	}
	type = query_type(qmp, path, error);
	if (!type)
		return FALSE;
	json_object_set_string_member(facts, "cpu", type);
	json_object_set_int_member(facts, "cpus", json_array_get_length(cpus));
	return TRUE;
}

static JsonArray *describe_blocks(const GArray *blocks)
{
	JsonArray *array = json_array_new();

	for (guint i = 0; i < blocks->len; i++) {
		const PrQemuPrivateBlock *block = &g_array_index(blocks, PrQemuPrivateBlock, i);
		JsonObject *object = json_object_new();

		json_object_set_string_member(object, "name", block->name);
		json_object_set_int_member(object, "size", (gint64)block->size);
		json_array_add_object_element(array, object);
	}
	return array;
}

JsonObject *pr_qemu_facts(PrQmp *qmp, const GArray *private_blocks, GError **error)
{
	g_autoptr(JsonObject) facts = json_object_new();
	g_autofree char *version = NULL;
	g_autofree char *machine = pr_qemu_machine(qmp, error);
	g_autofree char *qtree = machine ? pr_qmp_human(qmp, "info qtree", error) : NULL;
	guint major, minor;

	if (!qtree || !query_cpus(qmp, facts, error) ||
	    !pr_qemu_version(qmp, &major, &minor, error))
		return NULL;
	version = g_strdup_printf("%u.%u", major, minor);
	json_object_set_string_member(facts, "qemu", version);
	json_object_set_string_member(facts, "machine", machine);
	json_object_set_array_member(facts, "devices", pr_qemu_devices_parse(qtree));
	json_object_set_array_member(facts, "ram", describe_blocks(private_blocks));
	return g_steal_pointer(&facts);
}

char *pr_qemu_facts_to_text(JsonObject *facts)
{
	g_autoptr(JsonNode) node = json_node_new(JSON_NODE_OBJECT);

	json_node_set_object(node, facts);
	return json_to_string(node, FALSE);
}

/* PrFrameSink; opaque: the number of objects so far, 2 behind a fault. */
static void count_object(const char *message, gsize len, const char *fault, void *opaque)
{
	*(guint *)opaque += fault ? 2 : 1;
}

/* json-glib's parser recurses, so the depth of the peer's text is checked first. It has to be one
 * object, with nothing behind it. */
static gboolean is_shallow_object(const char *text, gsize len)
{
	g_auto(PrFramer) framer;
	guint objects = 0;

	pr_framer_init(&framer, PR_FRAMER_OBJECTS);
	pr_framer_feed(&framer, text, len, count_object, &objects);
	return objects == 1 && !framer.busy && text[len - 1] == '}';
}

JsonObject *pr_qemu_facts_from_text(const char *text, gsize len, GError **error)
{
	g_autoptr(JsonParser) parser = json_parser_new();
	JsonNode *root = NULL;

	if (is_shallow_object(text, len) &&
	    json_parser_load_from_data(parser, text, (gssize)len, NULL))
		root = json_parser_get_root(parser);
	if (root && JSON_NODE_HOLDS_OBJECT(root))
		return json_object_ref(json_node_get_object(root));
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "the source's description of its QEMU is not a JSON object");
	return NULL;
}

/* Comparing */

static const char *fact(JsonObject *object, const char *name)
{
	const char *text = pr_json_string(object, name);

	return text ? text : "";
}

static JsonArray *fact_list(JsonObject *facts, const char *name)
{
	JsonNode *node = json_object_get_member(facts, name);

	return node && JSON_NODE_HOLDS_ARRAY(node) ? json_node_get_array(node) : NULL;
}

static JsonObject *element(JsonArray *array, guint i)
{
	JsonNode *node = json_array_get_element(array, i);

	return JSON_NODE_HOLDS_OBJECT(node) ? json_node_get_object(node) : NULL;
}

static gboolean check_machine(JsonObject *source, JsonObject *here, GError **error)
{
	const char *theirs = fact(source, "machine"), *ours = fact(here, "machine");
	gint64 n_theirs = pr_json_int(source, "cpus"), n_ours = pr_json_int(here, "cpus");

	if (!g_str_equal(theirs, ours))
		return pr_qemu_refuse(
			error,
			"another machine type: '%s' at the source, '%s' at the destination; start "
			"the destination's QEMU with -machine %s",
			theirs, ours, theirs);
	if (n_theirs != n_ours)
		return pr_qemu_refuse(
			error,
			"another number of vCPUs: %d at the source, %d at the destination; start "
			"the destination's QEMU with -smp %d",
			(int)n_theirs, (int)n_ours, (int)n_theirs);
	if (g_str_equal(fact(source, "cpu"), fact(here, "cpu")))
		return TRUE;
	return pr_qemu_refuse(
		error,
		"another CPU model: '%s' at the source, '%s' at the destination; start the "
		"destination's QEMU with the same -cpu",
		fact(source, "cpu"), fact(here, "cpu"));
}

/* Whether a command line can put devices on such a bus. */
static gboolean is_pluggable_bus(const char *type)
{
	static const char *const types[] = {
		"PCI", "PCIE", "usb-bus", "SCSI", "IDE", "virtio-serial-bus", NULL};

	return g_strv_contains(types, type);
}

static char *place_of(JsonObject *device)
{
	return g_strdup_printf("%s\n%s\n%s", fact(device, "bus"), fact(device, "addr"),
			       fact(device, "type"));
}

/* The device of the list, if it has to be the same on both sides; else NULL. */
static JsonObject *compared(JsonArray *devices, guint i, gboolean all)
{
	JsonObject *device = element(devices, i);

	return device && (all || is_pluggable_bus(fact(device, "bus-type"))) ? device : NULL;
}

/* Adds to the number of devices in a place; returns the number before. */
static guint count_place(GHashTable *places, JsonObject *device, gint change)
{
	g_autofree char *place = place_of(device);
	guint n = GPOINTER_TO_UINT(g_hash_table_lookup(places, place));

	if (change > 0 || n > 0)
		g_hash_table_insert(places, g_steal_pointer(&place), GUINT_TO_POINTER(n + change));
	return n;
}

static GHashTable *count_places(JsonArray *devices, gboolean all)
{
	GHashTable *places = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);

	for (guint i = 0; devices && i < json_array_get_length(devices); i++) {
		JsonObject *device = compared(devices, i, all);

		if (device)
			count_place(places, device, 1);
	}
	return places;
}

/* The first device of a list that is not among the places of the other side. */
static JsonObject *find_other(JsonArray *devices, GHashTable *places, gboolean all)
{
	for (guint i = 0; devices && i < json_array_get_length(devices); i++) {
		JsonObject *device = compared(devices, i, all);

		if (device && count_place(places, device, -1) == 0)
			return device;
	}
	return NULL;
}

static char *name_device(JsonObject *device)
{
	const char *id = fact(device, "id");

	return g_strdup_printf("%s%s%s%s (bus %s, address %s)", fact(device, "type"),
			       *id ? " '" : "", id, *id ? "'" : "", fact(device, "bus"),
			       *fact(device, "addr") ? fact(device, "addr") : "none");
}

static gboolean check_devices(JsonObject *source, JsonObject *here, GError **error)
{
	gboolean all = g_str_equal(fact(source, "qemu"), fact(here, "qemu"));
	JsonArray *theirs = fact_list(source, "devices"), *ours = fact_list(here, "devices");
	g_autoptr(GHashTable) our_places = count_places(ours, all);
	g_autoptr(GHashTable) their_places = count_places(theirs, all);
	JsonObject *missing = find_other(theirs, our_places, all);
	JsonObject *extra = missing ? NULL : find_other(ours, their_places, all);
	g_autofree char *name = NULL;

	if (!missing && !extra)
		return TRUE;
	name = name_device(missing ? missing : extra);
	return pr_qemu_refuse(
		error,
		missing ? "a device is missing at the destination: %s; start the "
			  "destination's QEMU with the source's devices, in the same places"
			: "the destination has a device that the source does not have: %s; "
			  "start the destination's QEMU with the source's devices, in the same "
			  "places",
		name);
}

static gint64 size_of_block(JsonArray *blocks, const char *name)
{
	for (guint i = 0; blocks && i < json_array_get_length(blocks); i++) {
		JsonObject *block = element(blocks, i);

		if (block && g_str_equal(fact(block, "name"), name))
			return pr_json_int(block, "size");
	}
	return -1;
}

/* Whether `others` has each block of `blocks`, with the same size. here, where: the sides of the
 * two, for the error. */
static gboolean check_blocks_in(JsonArray *blocks, JsonArray *others, const char *here,
				const char *where, GError **error)
{
	for (guint i = 0; blocks && i < json_array_get_length(blocks); i++) {
		JsonObject *block = element(blocks, i);
		gint64 size = block ? pr_json_int(block, "size") : 0;
		gint64 other = block ? size_of_block(others, fact(block, "name")) : 0;

		if (other < 0)
			return pr_qemu_refuse(
				error,
				"RAM block '%s' (%" G_GINT64_FORMAT
				" KiB) is missing at the %s; start the destination's QEMU "
				"with the source's devices and firmware",
				fact(block, "name"), size >> 10, where);
		if (size != other)
			return pr_qemu_refuse(
				error,
				"RAM block '%s' has %" G_GINT64_FORMAT
				" KiB at the %s and %" G_GINT64_FORMAT
				" KiB at the %s; start the destination's QEMU with the "
				"source's devices and firmware",
				fact(block, "name"), size >> 10, here, other >> 10, where);
	}
	return TRUE;
}

static gboolean check_ram(JsonObject *source, JsonObject *here, GError **error)
{
	JsonArray *theirs = fact_list(source, "ram"), *ours = fact_list(here, "ram");

	return check_blocks_in(theirs, ours, "source", "destination", error) &&
	       check_blocks_in(ours, theirs, "destination", "source", error);
}

static gboolean check_length(JsonObject *source, const char *name, GError **error)
{
	JsonArray *list = fact_list(source, name);

	if (!list || json_array_get_length(list) <= DEVICES_MAX)
		return TRUE;
	return pr_qemu_refuse(error, "the source names %u %s; at most %u can be compared",
			      json_array_get_length(list), name, DEVICES_MAX);
}

gboolean pr_qemu_facts_check(JsonObject *source, JsonObject *here, GError **error)
{
	return check_length(source, "devices", error) && check_length(source, "ram", error) &&
	       check_machine(source, here, error) && check_devices(source, here, error) &&
	       check_ram(source, here, error);
}
