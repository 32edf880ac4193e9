/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * rdma-pair: one side of a data path at a time, driven by commands on standard input.
 *
 * Each line is a command. The answer is one line: "ok", "ok RESULT" or "error REASON". "begin"
 * starts a side and "end" closes it, so that one process serves many tests. rdma-pair stands in for
 * the engine where the two sides have to be on two hosts. tests/roce/rdma_pair.py drives two of
 * them.
 */
#include <stdio.h>
#include <string.h>

#include "tests/roce/pair/side.h"

static const Command *const tables[] = {
	side_commands, path_commands, read_commands, pull_commands, attack_commands,
};

gboolean fail(GError **error, const char *text)
{
	g_set_error_literal(error, G_IO_ERROR, G_IO_ERROR_FAILED, text);
	return FALSE;
}

uint64_t parse_number(const char *word)
{
	return g_ascii_strtoull(word, NULL, 0);
}

static const Command *find_command(const char *name)
{
	for (guint i = 0; i < G_N_ELEMENTS(tables); i++)
		for (const Command *command = tables[i]; command->name; command++)
			if (g_strcmp0(name, command->name) == 0)
				return command;
	return NULL;
}

static gboolean run_command(Side *side, char **words, GString *ret, GError **error)
{
	const Command *command = find_command(words[0]);

	if (!command)
		return fail(error, "no such command");
	if (g_strv_length(words) <= command->n_words)
		return fail(error, "too few arguments");
	if (command->needs >= NEEDS_SIDE && !side->uri)
		return fail(error, "no side has begun");
	if (command->needs >= NEEDS_PATH && !side->path)
		return fail(error, "there is no path");
	return command->action(side, words, ret, error);
}

static void run_line(Side *side, char *line)
{
	g_auto(GStrv) words = g_strsplit(g_strstrip(line), " ", -1);
	g_autoptr(GString) answer = g_string_new(NULL);
	g_autoptr(GError) error = NULL;

	if (run_command(side, words, answer, &error))
		printf("ok %s\n", answer->str);
	else
		printf("error %s\n", error->message);
	fflush(stdout);
}

int main(void)
{
	static char line[1 << 20];
	Side side = {0};

	g_log_writer_default_set_use_stderr(TRUE);
	while (fgets(line, sizeof(line), stdin))
		run_line(&side, line);
	side_end(&side);
	return 0;
}
