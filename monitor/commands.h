/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The command table of QMP and HMP: names, arguments, checks and the functions that run them. */
#pragma once

#include <json-glib/json-glib.h>

#include "migration/migration.h"
#include "monitor/waits.h"

typedef enum PrCommandError {
	PR_COMMAND_ERROR_NOT_FOUND, /* no such command; QMP's class CommandNotFound */
	PR_COMMAND_ERROR_ARGUMENTS, /* an argument is missing, unknown or of the wrong type */
	PR_COMMAND_ERROR_REFUSED,   /* valid, but not possible now or not supported; says why */
} PrCommandError;
#define PR_COMMAND_ERROR pr_command_error_quark()
GQuark pr_command_error_quark(void);

typedef enum PrArgType { PR_ARG_STRING, PR_ARG_BOOL, PR_ARG_ARRAY, PR_ARG_ANY } PrArgType;

typedef struct PrArg {
	const char *name; /* NULL ends a list */
	PrArgType type;
	char flag; /* the HMP option -FLAG; 0: a positional word */
	gboolean required;
	gboolean hmp_required; /* required in HMP; QMP may use another member instead */
	gboolean qmp_only;
} PrArg;

typedef enum PrCommandKind {
	PR_COMMAND_PLAIN,
	PR_COMMAND_NEGOTIATE,  /* qmp_capabilities: concerns the session; run by qmp.c */
	PR_COMMAND_HMP_TEXT,   /* an HMP line; a failure is a text, as in QEMU; run by qmp.c */
	PR_COMMAND_HMP_STRICT, /* an HMP line; a failure is a QMP error; run by qmp.c */
} PrCommandKind;

typedef struct PrCommand {
	const char *qmp; /* its name in QMP; NULL: only in HMP */
	const char *hmp; /* its name in HMP; NULL: only in QMP */
	PrCommandKind kind;
	const PrArg *args;	 /* NULL: none */
	gboolean unchecked_args; /* run() checks the arguments itself */
	gboolean waits;		 /* HMP without -d answers when the migration has come to a stop */
	/* Instead of run(): called with the URIs in a thread of its own (async-command.h). It has
	 * no result. */
	gboolean (*listen)(PrMigration *migration, const char *uris, GCancellable *cancel,
			   GError **error);
	/* Returns the result, NULL on error. */
	JsonNode *(*run)(PrMonitor *monitor, JsonObject *args, GError **error);
	/* Formats the result for HMP; NULL: HMP shows nothing. */
	void (*show)(JsonNode *result, GString *text);
	const char *usage; /* HMP: the arguments, as help shows them */
	const char *help;
} PrCommand;

const PrCommand *pr_command_table(guint *ret_n);
const PrCommand *pr_command_find_qmp(const char *name, GError **error);
/* words: the line; *ret_used: the number of words that are the command's name. */
const PrCommand *pr_command_find_hmp(char **words, guint *ret_used, GError **error);

/* Names the argument that is missing, unexpected or of the wrong type. */
gboolean pr_command_check(const PrCommand *command, JsonObject *args, GError **error);
/* Call it after pr_command_check(), for a command that has run(). */
JsonNode *pr_command_run(PrMonitor *monitor, const PrCommand *command, JsonObject *args,
			 GError **error);
/* The member `uri`. NULL with an error: it is missing, or QEMU's alternative `channels` was
 * given. */
const char *pr_command_uris(JsonObject *args, GError **error);

/* {"qemu": {"major", "minor", "micro"}, "package"} */
JsonNode *pr_command_version(void);
