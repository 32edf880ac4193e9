/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/certs.h"

#include <glib/gstdio.h>

static void run(const char *command)
{
	g_autoptr(GError) error = NULL;
	int status;

	if (!g_spawn_command_line_sync(command, NULL, NULL, &status, &error) ||
	    !g_spawn_check_wait_status(status, &error))
		g_error("%s: %s", command, error->message);
}

void certs_add(const char *dir, int days, const char *what)
{
	const char *program = g_getenv("POSTROAD_MAKE_CERTS");
	g_autofree char *command = NULL;

	if (!program)
		g_error("POSTROAD_MAKE_CERTS is not set; run this with meson test");
	command = g_strdup_printf("env DAYS=%d %s %s %s", days, program, dir, what);
	run(command);
}

static char *new_dir(void)
{
	g_autoptr(GError) error = NULL;
	char *dir = g_dir_make_tmp("postroad-certs-XXXXXX", &error);

	g_assert_no_error(error);
	return dir;
}

char *certs_new(void)
{
	char *dir = new_dir();

	certs_add(dir, 30, "ca");
	certs_add(dir, 30, "server 127.0.0.1 ::1 localhost");
	certs_add(dir, 30, "client source");
	return dir;
}

char *certs_new_beside(const char *of)
{
	char *dir = new_dir();
	g_autofree char *command =
		g_strdup_printf("cp %s/ca-cert.pem %s/ca-key.pem %s", of, of, dir);

	run(command);
	return dir;
}

void certs_free(char *dir)
{
	g_autofree char *command = g_strdup_printf("rm -r %s", dir);

	run(command);
	g_free(dir);
}
