/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/commands.h"

#include <stdio.h>
#include <string.h>

#include "monitor/internal.h"
#include "monitor/json.h"
#include "monitor/show.h"

G_DEFINE_QUARK(pr_command_error, pr_command_error)

static JsonNode *empty_result(void)
{
	return pr_json_object(json_object_new());
}

static gboolean flag_arg(JsonObject *args, const char *name)
{
	return json_object_get_boolean_member_with_default(args, name, FALSE);
}

JsonNode *pr_command_version(void)
{
	JsonObject *object = json_object_new(), *numbers = json_object_new();
	int major = 0, minor = 0, micro = 0;

	sscanf(PR_VERSION, "%d.%d.%d", &major, &minor, &micro);
	json_object_set_int_member(numbers, "major", major);
	json_object_set_int_member(numbers, "minor", minor);
	json_object_set_int_member(numbers, "micro", micro);
	json_object_set_object_member(object, "qemu", numbers);
	json_object_set_string_member(object, "package", "postroad-" PR_VERSION);
	return pr_json_object(object);
}

static JsonNode *run_version(PrMonitor *monitor, JsonObject *args, GError **error)
{
	return pr_command_version();
}

static JsonNode *run_commands(PrMonitor *monitor, JsonObject *args, GError **error)
{
	JsonArray *array = json_array_new();
	guint n;
	const PrCommand *table = pr_command_table(&n);

	for (guint i = 0; i < n; i++) {
		JsonObject *object;

		if (!table[i].qmp)
			continue;
		object = json_object_new();
		json_object_set_string_member(object, "name", table[i].qmp);
		json_array_add_object_element(array, object);
	}
	return pr_json_array(array);
}

const char *pr_command_uris(JsonObject *args, GError **error)
{
	const char *uri = json_object_get_string_member_with_default(args, "uri", NULL);

	if (json_object_has_member(args, "channels")) {
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_REFUSED,
			    "'channels' is not supported; give 'uri', one path or several "
			    "separated by commas");
		return NULL;
	}
	if (!uri)
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "Parameter 'uri' is missing");
	return uri;
}

static JsonNode *run_migrate(PrMonitor *monitor, JsonObject *args, GError **error)
{
	const char *uri = pr_command_uris(args, error);

	if (!uri)
		return NULL;
	if (flag_arg(args, "blk") || flag_arg(args, "inc")) {
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_REFUSED,
			    "'%s' is not supported: Postroad moves memory, not disks; share or "
			    "mirror the storage and leave it out",
			    flag_arg(args, "blk") ? "blk" : "inc");
		return NULL;
	}
	if (!pr_migration_start(monitor->migration, uri, flag_arg(args, "resume"), error))
		return NULL;
	return empty_result();
}

static JsonNode *run_pause(PrMonitor *monitor, JsonObject *args, GError **error)
{
	return pr_migration_pause(monitor->migration, error) ? empty_result() : NULL;
}

static JsonNode *run_cancel(PrMonitor *monitor, JsonObject *args, GError **error)
{
	return pr_migration_cancel(monitor->migration, error) ? empty_result() : NULL;
}

static JsonNode *run_query_migrate(PrMonitor *monitor, JsonObject *args, GError **error)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(monitor->migration, &info);
	return pr_migrate_to_json(&info);
}

static JsonNode *run_query_paths(PrMonitor *monitor, JsonObject *args, GError **error)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(monitor->migration, &info);
	return pr_paths_to_json(&info);
}

static JsonNode *run_status(PrMonitor *monitor, JsonObject *args, GError **error)
{
	g_auto(PrMigrationInfo) info = {0};
	g_autofree char *text = NULL;

	pr_migration_query(monitor->migration, &info);
	text = g_strdup_printf("Engine status: role %s, %s%s%s%s\n", pr_role_name(info.role),
			       pr_state_name(info.state), info.reason ? " (" : "",
			       info.reason ? info.reason : "", info.reason ? ")" : "");
	return pr_json_string(text);
}

static JsonNode *run_query_capabilities(PrMonitor *monitor, JsonObject *args, GError **error)
{
	JsonArray *array = json_array_new();

	for (guint i = 0; i < PR_N_CAPABILITIES; i++) {
		JsonObject *object = json_object_new();

		json_object_set_string_member(object, "capability", pr_capability_info(i)->name);
		json_object_set_boolean_member(object, "state", pr_capability(monitor->params, i));
		json_array_add_object_element(array, object);
	}
	return pr_json_array(array);
}

static JsonNode *run_query_parameters(PrMonitor *monitor, JsonObject *args, GError **error)
{
	JsonObject *object = json_object_new();

	for (guint i = 0; i < PR_N_PARAMS; i++)
		json_object_set_int_member(object, pr_param_info(i)->name,
					   pr_param(monitor->params, i));
	return pr_json_object(object);
}

/* Copies the parameters, so that a set of changes can be tried: all are applied, or none. */
static void copy_params(PrParams *to, const PrParams *from)
{
	for (guint i = 0; i < PR_N_PARAMS; i++)
		to->value[i] = pr_param(from, i);
	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		to->capability[i] = pr_capability(from, i);
}

static gboolean set_one_capability(PrParams *params, JsonNode *element, GError **error)
{
	JsonObject *object = JSON_NODE_HOLDS_OBJECT(element) ? json_node_get_object(element) : NULL;
	JsonNode *name = object ? json_object_get_member(object, "capability") : NULL;
	JsonNode *state = object ? json_object_get_member(object, "state") : NULL;

	if (!name || json_node_get_value_type(name) != G_TYPE_STRING || !state ||
	    json_node_get_value_type(state) != G_TYPE_BOOLEAN) {
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "Invalid element in 'capabilities', expected: {\"capability\": string, "
			    "\"state\": boolean}");
		return FALSE;
	}
	return pr_params_set_capability(params, json_node_get_string(name),
					json_node_get_boolean(state), error);
}

static JsonNode *run_set_capabilities(PrMonitor *monitor, JsonObject *args, GError **error)
{
	JsonArray *array = json_object_get_array_member(args, "capabilities");
	PrParams trial;

	copy_params(&trial, monitor->params);
	for (guint i = 0; i < json_array_get_length(array); i++)
		if (!set_one_capability(&trial, json_array_get_element(array, i), error))
			return NULL;
	for (guint i = 0; i < json_array_get_length(array); i++)
		if (!set_one_capability(monitor->params, json_array_get_element(array, i), error))
			return NULL;
	return empty_result();
}

static gboolean is_parameter(const char *name)
{
	for (guint i = 0; i < PR_N_PARAMS; i++)
		if (!strcmp(pr_param_info(i)->name, name))
			return TRUE;
	return FALSE;
}

static gboolean set_one_parameter(PrParams *params, const char *name, JsonNode *value,
				  GError **error)
{
	gint64 number;

	if (!is_parameter(name))
		return pr_params_set(params, name, 0, error);
	if (json_node_get_value_type(value) != G_TYPE_INT64) {
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "Invalid parameter type for '%s', expected: integer", name);
		return FALSE;
	}
	number = json_node_get_int(value);
	if (number < 0) {
		g_autofree char *text = g_strdup_printf("%" G_GINT64_FORMAT, number);

		return pr_params_set_text(params, name, text, error);
	}
	return pr_params_set(params, name, number, error);
}

/* The range of a parameter may depend on another one. So that the order in the object does not
 * matter, the first round ignores errors and the second one, with the others set, reports them. */
static gboolean set_parameters(PrParams *params, JsonObject *args, GError **error)
{
	g_autoptr(GList) names = json_object_get_members(args);

	for (GList *i = names; i; i = i->next)
		set_one_parameter(params, i->data, json_object_get_member(args, i->data), NULL);
	for (GList *i = names; i; i = i->next)
		if (!set_one_parameter(params, i->data, json_object_get_member(args, i->data),
				       error))
			return FALSE;
	return TRUE;
}

static JsonNode *run_set_parameters(PrMonitor *monitor, JsonObject *args, GError **error)
{
	PrParams trial;

	copy_params(&trial, monitor->params);
	if (!set_parameters(&trial, args, error) || !set_parameters(monitor->params, args, error))
		return NULL;
	return empty_result();
}

static JsonNode *run_set_parameter_text(PrMonitor *monitor, JsonObject *args, GError **error)
{
	if (!pr_params_set_text(monitor->params, json_object_get_string_member(args, "parameter"),
				json_object_get_string_member(args, "value"), error))
		return NULL;
	return empty_result();
}

static JsonNode *run_set_capability_text(PrMonitor *monitor, JsonObject *args, GError **error)
{
	const char *state = json_object_get_string_member(args, "state");
	gboolean on = !strcmp(state, "on");

	if (!on && strcmp(state, "off")) {
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "capability '%s': state '%s' is neither on nor off",
			    json_object_get_string_member(args, "capability"), state);
		return NULL;
	}
	if (!pr_params_set_capability(monitor->params,
				      json_object_get_string_member(args, "capability"), on, error))
		return NULL;
	return empty_result();
}

static JsonNode *run_quit(PrMonitor *monitor, JsonObject *args, GError **error)
{
	monitor->on_quit(monitor->opaque);
	return empty_result();
}

static void append_help(const PrCommand *command, GString *text)
{
	g_autofree char *synopsis =
		g_strdup_printf("%s %s", command->hmp, command->usage ? command->usage : "");

	g_string_append_printf(text, "%-46s %s\n", g_strchomp(synopsis), command->help);
}

static JsonNode *run_help(PrMonitor *monitor, JsonObject *args, GError **error)
{
	const char *name = json_object_get_string_member_with_default(args, "command", NULL);
	const char *sub = json_object_get_string_member_with_default(args, "subcommand", NULL);
	g_autofree char *wanted = name ? g_strjoin(" ", name, sub, NULL) : NULL;
	g_autoptr(GString) text = g_string_new(NULL);
	guint n;
	const PrCommand *table = pr_command_table(&n);

	for (guint i = 0; i < n; i++) {
		const char *hmp = table[i].hmp;

		if (!hmp)
			continue;
		/* `help info` lists all info commands. */
		if (!wanted || !strcmp(hmp, wanted) ||
		    (g_str_has_prefix(hmp, wanted) && hmp[strlen(wanted)] == ' '))
			append_help(&table[i], text);
	}
	if (text->len)
		return pr_json_string(text->str);
	g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_NOT_FOUND,
		    "there is no command '%s'; 'help' lists the commands", wanted);
	return NULL;
}

static const PrArg negotiate_args[] = {{"enable", PR_ARG_ARRAY}, {NULL}};
static const PrArg migrate_args[] = {
	{"uri", PR_ARG_STRING, .hmp_required = TRUE},
	{"detach", PR_ARG_BOOL, 'd'},
	{"resume", PR_ARG_BOOL, 'r'},
	{"blk", PR_ARG_BOOL, .qmp_only = TRUE},
	{"inc", PR_ARG_BOOL, .qmp_only = TRUE},
	{"channels", PR_ARG_ANY, .qmp_only = TRUE},
	{NULL},
};
static const PrArg uri_args[] = {
	{"uri", PR_ARG_STRING, .hmp_required = TRUE},
	{"channels", PR_ARG_ANY, .qmp_only = TRUE},
	{NULL},
};
static const PrArg capabilities_args[] = {{"capabilities", PR_ARG_ARRAY, .required = TRUE}, {NULL}};
static const PrArg set_parameter_args[] = {
	{"parameter", PR_ARG_STRING, .required = TRUE},
	{"value", PR_ARG_STRING, .required = TRUE},
	{NULL},
};
static const PrArg set_capability_args[] = {
	{"capability", PR_ARG_STRING, .required = TRUE},
	{"state", PR_ARG_STRING, .required = TRUE},
	{NULL},
};
static const PrArg hmp_line_args[] = {
	{"command-line", PR_ARG_STRING, .required = TRUE},
	{"cpu-index", PR_ARG_ANY},
	{NULL},
};
static const PrArg help_args[] = {
	{"command", PR_ARG_STRING},
	{"subcommand", PR_ARG_STRING},
	{NULL},
};

#define URIS "URI[,URI...]"

static const PrCommand command_table[] = {
	{"qmp_capabilities", NULL, PR_COMMAND_NEGOTIATE, negotiate_args},
	{"query-commands", NULL, .run = run_commands},
	{"human-monitor-command", NULL, PR_COMMAND_HMP_TEXT, hmp_line_args},
	{"x-postroad-hmp", NULL, PR_COMMAND_HMP_STRICT, hmp_line_args},
	{"migrate", "migrate", .args = migrate_args, .waits = TRUE, .run = run_migrate,
	 .usage = "[-d] [-r] " URIS,
	 .help = "migrate over the first path that answers (-d: don't wait; -r: resume a paused "
		 "migration)"},
	{"migrate-incoming", "migrate_incoming", .args = uri_args, .listen = pr_migration_incoming,
	 .usage = URIS, .help = "listen for a migration on these paths"},
	{"migrate-recover", "migrate_recover", .args = uri_args, .listen = pr_migration_recover,
	 .usage = URIS,
	 .help = "on the destination of a paused migration: listen on these paths as well"},
	{"migrate-pause", "migrate_pause", .run = run_pause,
	 .help = "pause a postcopy migration, on both sides"},
	{"migrate_cancel", "migrate_cancel", .run = run_cancel,
	 .help = "cancel the migration; the guest stays on the source"},
	{"query-migrate", "info migrate", .run = run_query_migrate, .show = pr_show_migrate,
	 .help = "show the state of the migration"},
	{"query-migrate-capabilities", "info migrate_capabilities", .run = run_query_capabilities,
	 .show = pr_show_capabilities, .help = "show the capabilities"},
	{"query-migrate-parameters", "info migrate_parameters", .run = run_query_parameters,
	 .show = pr_show_parameters, .help = "show the parameters"},
	{"query-paths", "info paths", .run = run_query_paths, .show = pr_show_paths,
	 .help = "show the paths and their states"},
	{NULL, "info status", .run = run_status, .show = pr_show_text,
	 .help = "show the engine's role and state in one line"},
	{"query-version", "info version", .run = run_version, .show = pr_show_version,
	 .help = "show the version of this program"},
	{"migrate-set-capabilities", NULL, .args = capabilities_args, .run = run_set_capabilities},
	{NULL, "migrate_set_capability", .args = set_capability_args,
	 .run = run_set_capability_text, .usage = "NAME on|off", .help = "set a capability"},
	{"migrate-set-parameters", NULL, .unchecked_args = TRUE, .run = run_set_parameters},
	{NULL, "migrate_set_parameter", .args = set_parameter_args, .run = run_set_parameter_text,
	 .usage = "NAME VALUE", .help = "set a parameter (VALUE may end in k, M or G)"},
	{NULL, "help", .args = help_args, .run = run_help, .show = pr_show_text,
	 .usage = "[COMMAND]", .help = "show the commands"},
	{"quit", "quit", .run = run_quit,
	 .help = "end this engine; a running postcopy is paused and can be resumed"},
};

const PrCommand *pr_command_table(guint *ret_n)
{
	*ret_n = G_N_ELEMENTS(command_table);
	return command_table;
}

const PrCommand *pr_command_find_qmp(const char *name, GError **error)
{
	for (guint i = 0; i < G_N_ELEMENTS(command_table); i++)
		if (command_table[i].qmp && !strcmp(command_table[i].qmp, name))
			return &command_table[i];
	g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_NOT_FOUND,
		    "The command %s has not been found", name);
	return NULL;
}

const PrCommand *pr_command_find_hmp(char **words, guint *ret_used, GError **error)
{
	gboolean info = !strcmp(words[0], "info");
	g_autofree char *name =
		info ? g_strjoin(" ", words[0], words[1], NULL) : g_strdup(words[0]);

	for (guint i = 0; i < G_N_ELEMENTS(command_table); i++) {
		if (command_table[i].hmp && !strcmp(command_table[i].hmp, name)) {
			*ret_used = info ? 2 : 1;
			return &command_table[i];
		}
	}
	g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_NOT_FOUND,
		    "unknown command: '%s'; '%s' lists the commands", name,
		    info ? "help info" : "help");
	return NULL;
}

static const char *type_name(PrArgType type)
{
	switch (type) {
	case PR_ARG_STRING:
		return "string";
	case PR_ARG_BOOL:
		return "boolean";
	case PR_ARG_ARRAY:
		return "array";
	case PR_ARG_ANY:
		break;
	}
	return "any";
}

static gboolean has_type(JsonNode *node, PrArgType type)
{
	switch (type) {
	case PR_ARG_STRING:
		return json_node_get_value_type(node) == G_TYPE_STRING;
	case PR_ARG_BOOL:
		return json_node_get_value_type(node) == G_TYPE_BOOLEAN;
	case PR_ARG_ARRAY:
		return JSON_NODE_HOLDS_ARRAY(node);
	case PR_ARG_ANY:
		break;
	}
	return TRUE;
}

static gboolean is_known(const PrCommand *command, const char *name)
{
	for (const PrArg *arg = command->args; arg && arg->name; arg++)
		if (!strcmp(arg->name, name))
			return TRUE;
	return FALSE;
}

gboolean pr_command_check(const PrCommand *command, JsonObject *args, GError **error)
{
	g_autoptr(GList) names = json_object_get_members(args);

	if (command->unchecked_args)
		return TRUE;
	for (const PrArg *arg = command->args; arg && arg->name; arg++) {
		JsonNode *node = json_object_get_member(args, arg->name);

		if (!node && arg->required) {
			g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "Parameter '%s' is missing", arg->name);
			return FALSE;
		}
		if (node && !has_type(node, arg->type)) {
			g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "Invalid parameter type for '%s', expected: %s", arg->name,
				    type_name(arg->type));
			return FALSE;
		}
	}
	for (GList *i = names; i; i = i->next) {
		if (!is_known(command, i->data)) {
			g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "Parameter '%s' is unexpected", (const char *)i->data);
			return FALSE;
		}
	}
	return TRUE;
}

JsonNode *pr_command_run(PrMonitor *monitor, const PrCommand *command, JsonObject *args,
			 GError **error)
{
	return command->run(monitor, args, error);
}
