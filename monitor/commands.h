/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The command table: what QMP and HMP can be asked, checked and run in one place. */
#pragma once

#include <json-glib/json-glib.h>

#include "monitor/monitor.h"

typedef enum PrCommandError {
	PR_COMMAND_ERROR_NOT_FOUND, /* no such command; QMP's class CommandNotFound */
	PR_COMMAND_ERROR_ARGUMENTS, /* missing, unexpected or of the wrong type; names it */
	PR_COMMAND_ERROR_REFUSED,   /* understood, but not done; says why */
} PrCommandError;
#define PR_COMMAND_ERROR pr_command_error_quark()
GQuark pr_command_error_quark(void);

typedef enum PrArgType { PR_ARG_STRING, PR_ARG_BOOL, PR_ARG_ARRAY, PR_ARG_ANY } PrArgType;

typedef struct PrArg {
	const char *name; /* NULL ends a list */
	PrArgType type;
	char flag; /* in HMP the option -FLAG; 0: a word in its place */
	gboolean required;
	gboolean hmp_required; /* QMP has another way to say it */
	gboolean qmp_only;
} PrArg;

typedef enum PrCommandKind {
	PR_COMMAND_PLAIN,
	PR_COMMAND_NEGOTIATE,  /* qmp_capabilities: about the session, done by qmp.c */
	PR_COMMAND_HMP_TEXT,   /* an HMP line whose failure is text, as in QEMU; done by qmp.c */
	PR_COMMAND_HMP_STRICT, /* an HMP line whose failure is an error; done by qmp.c */
} PrCommandKind;

typedef struct PrCommand {
	const char *qmp; /* its name there; NULL: only in HMP */
	const char *hmp; /* its name there; NULL: only in QMP */
	PrCommandKind kind;
	const PrArg *args;	 /* NULL: none */
	gboolean unchecked_args; /* run() checks the arguments itself */
	gboolean waits; /* in HMP, without -d, answered when the migration has come to a stop */
	/* Instead of run(): what it does with its URIs, on a thread of its own (async-command.c). It has no result to show. */
	gboolean (*listen)(PrMigration *migration, const char *uris, GCancellable *cancel,
			   GError **error);
	/* Returns the result, NULL on error. */
	JsonNode *(*run)(PrMonitor *monitor, JsonObject *args, GError **error);
	/* The result as HMP shows it; NULL: nothing to show. */
	void (*show)(JsonNode *result, GString *text);
	const char *usage; /* HMP: what follows the name */
	const char *help;
} PrCommand;

const PrCommand *pr_command_table(guint *ret_n);
const PrCommand *pr_command_find_qmp(const char *name, GError **error);
/* words: the line; *ret_used: how many of them are the name. */
const PrCommand *pr_command_find_hmp(char **words, guint *ret_used, GError **error);

/* Names the argument that is missing, unexpected or of the wrong type. */
gboolean pr_command_check(const PrCommand *command, JsonObject *args, GError **error);
/* After the check, of a command that has run(). */
JsonNode *pr_command_run(PrMonitor *monitor, const PrCommand *command, JsonObject *args,
			 GError **error);
/* The URIs of a command that QEMU lets say `channels` instead; NULL with an error. */
const char *pr_command_uris(JsonObject *args, GError **error);

/* {"qemu": {"major", "minor", "micro"}, "package"} */
JsonNode *pr_command_version(void);
