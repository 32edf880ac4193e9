/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/hmp.h"

#include <string.h>

#include "monitor/async-command.h"
#include "monitor/internal.h"
#include "monitor/stream.h"

#define LINE_MAX_BYTES (64 * 1024)
#define PROMPT	       "(postroad) "

static gboolean usage_error(const PrCommand *command, const char *what, const char *word,
			    GError **error)
{
	g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
		    "%s: %s%s%s%s; usage: %s%s%s", command->hmp, what, word ? " '" : "",
		    word ? word : "", word ? "'" : "", command->hmp, command->usage ? " " : "",
		    command->usage ? command->usage : "");
	return FALSE;
}

/* A word such as "-dr": every letter must be an option of the command. */
static gboolean parse_flags(const PrCommand *command, const char *word, JsonObject *args,
			    GError **error)
{
	for (const char *letter = word + 1; *letter; letter++) {
		const PrArg *arg = command->args;

		while (arg && arg->name && arg->flag != *letter)
			arg++;
		if (!arg || !arg->name)
			return usage_error(command, "unknown option", word, error);
		json_object_set_boolean_member(args, arg->name, TRUE);
	}
	return TRUE;
}

/* The next positional argument, from arg on; or the end of the list. */
static const PrArg *next_positional(const PrArg *arg)
{
	while (arg && arg->name && (arg->flag || arg->qmp_only))
		arg++;
	return arg;
}

static gboolean parse_words(const PrCommand *command, char **words, JsonObject *args,
			    GError **error)
{
	const PrArg *positional = next_positional(command->args);

	for (; *words; words++) {
		if (words[0][0] == '-' && words[0][1]) {
			if (!parse_flags(command, *words, args, error))
				return FALSE;
			continue;
		}
		if (!positional || !positional->name)
			return usage_error(command, "unexpected word", *words, error);
		json_object_set_string_member(args, positional->name, *words);
		positional = next_positional(positional + 1);
	}
	if (positional && positional->name && (positional->required || positional->hmp_required))
		return usage_error(command, "missing", positional->name, error);
	return TRUE;
}

gboolean pr_hmp_parse(const char *line, const PrCommand **ret_command, JsonObject **ret_args,
		      GError **error)
{
	g_auto(GStrv) words = NULL;
	g_autoptr(JsonObject) args = json_object_new();
	g_autoptr(GError) local = NULL;
	const PrCommand *command;
	guint used;

	if (!g_shell_parse_argv(line, NULL, &words, &local)) {
		if (g_error_matches(local, G_SHELL_ERROR, G_SHELL_ERROR_EMPTY_STRING)) {
			*ret_command = NULL;
			*ret_args = NULL;
			return TRUE;
		}
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "can't parse the line: %s", local->message);
		return FALSE;
	}
	command = pr_command_find_hmp(words, &used, error);
	if (!command || !parse_words(command, words + used, args, error))
		return FALSE;
	*ret_command = command;
	*ret_args = g_steal_pointer(&args);
	return TRUE;
}

PrWait *pr_hmp_run(PrMonitor *monitor, const char *line, PrAnswer answer, void *opaque)
{
	g_autoptr(JsonObject) args = NULL;
	g_autoptr(JsonNode) result = NULL;
	g_autoptr(GError) error = NULL;
	g_autoptr(GString) text = g_string_new(NULL);
	guint64 mark = pr_monitor_mark(monitor);
	const PrCommand *command;
	PrWait *wait = NULL;

	if (!pr_hmp_parse(line, &command, &args, &error)) {
		answer(NULL, error, opaque);
		return NULL;
	}
	if (command && command->listen)
		wait = pr_async_command_start(monitor, command, args, answer, opaque, &error);
	else if (command)
		result = pr_command_run(monitor, command, args, &error);
	if (wait)
		return wait;
	if (error) {
		answer(NULL, error, opaque);
		return NULL;
	}
	if (command && command->waits &&
	    !json_object_get_boolean_member_with_default(args, "detach", FALSE))
		return pr_monitor_wait(monitor, mark, answer, opaque);
	if (command && command->show)
		command->show(result, text);
	answer(text->str, NULL, opaque);
	return NULL;
}

/* One HMP terminal. Owned by the thread of the main context. */
struct PrHmpSession {
	PrMonitor *monitor;
	PrStream *stream;
	GString *input; /* lines not run yet */
	PrWait *wait;	/* the command whose answer the next lines wait for; or NULL */
	gboolean prompt;
	gboolean skip; /* the rest of a line that was too long is discarded */
};

static void write_text(PrHmpSession *session, const char *text)
{
	pr_stream_write(session->stream, text, strlen(text));
}

static void show_prompt(PrHmpSession *session)
{
	if (session->prompt)
		write_text(session, PROMPT);
}

static void run_lines(PrHmpSession *session);

static void show_answer(PrHmpSession *session, const char *text, const GError *error)
{
	if (error) {
		write_text(session, "Error: ");
		write_text(session, error->message);
		write_text(session, "\n");
	} else {
		write_text(session, text);
	}
	show_prompt(session);
}

static void on_answer(const char *text, const GError *error, void *opaque)
{
	PrHmpSession *session = opaque;
	gboolean waited = session->wait != NULL;

	session->wait = NULL;
	show_answer(session, text, error);
	if (waited) {
		pr_stream_set_reading(session->stream, TRUE);
		run_lines(session);
	}
}

static void run_lines(PrHmpSession *session)
{
	char *end;

	while (!session->wait && (end = memchr(session->input->str, '\n', session->input->len))) {
		gsize len = end - session->input->str;
		g_autofree char *line = g_strndup(session->input->str, len);

		g_string_erase(session->input, 0, len + 1);
		if (session->skip)
			session->skip = FALSE;
		else
			session->wait = pr_hmp_run(session->monitor, line, on_answer, session);
	}
	if (session->wait) {
		pr_stream_set_reading(session->stream, FALSE);
	} else if (session->input->len > LINE_MAX_BYTES) {
		if (!session->skip)
			write_text(session, "Error: the line is longer than 64 KiB\n");
		session->skip = TRUE;
		g_string_truncate(session->input, 0);
	}
}

static void on_input(const char *data, gsize len, void *opaque)
{
	PrHmpSession *session = opaque;

	g_string_append_len(session->input, data, len);
	run_lines(session);
}

/* The engine runs on without its terminal, as QEMU does. */
static void on_closed(const char *why, void *opaque)
{
	PrHmpSession *session = opaque;

	g_debug("HMP: the terminal was closed: %s", why ? why : "end of input");
	g_ptr_array_remove(session->monitor->sessions, session);
}

PrHmpSession *pr_hmp_session_new(PrMonitor *monitor, int in_fd, int out_fd, gboolean prompt)
{
	PrHmpSession *session = g_new0(PrHmpSession, 1);

	session->monitor = monitor;
	session->input = g_string_new(NULL);
	session->prompt = prompt;
	session->stream =
		pr_stream_new(monitor->context, in_fd, out_fd, on_input, on_closed, session);
	show_prompt(session);
	return session;
}

void pr_hmp_session_free(PrHmpSession *session)
{
	if (session->wait)
		pr_monitor_unwait(session->wait);
	pr_stream_free(session->stream);
	g_string_free(session->input, TRUE);
	g_free(session);
}
