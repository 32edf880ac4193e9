/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/process.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define FIELD_STATE 3  /* proc(5): of /proc/PID/stat, counted from 1 */
#define FIELD_START 22 /* clock ticks since the boot */

/* The fields behind the name, which may hold any characters. The first field is FIELD_STATE. NULL:
 * no such process. */
static char **stat_fields(pid_t pid)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/stat", (int)pid);
	g_autofree char *text = NULL;
	const char *behind;

	if (!g_file_get_contents(path, &text, NULL, NULL))
		return NULL;
	behind = strrchr(text, ')');
	return behind && behind[1] ? g_strsplit(behind + 2, " ", -1) : NULL;
}

static guint64 start_time(pid_t pid)
{
	g_auto(GStrv) fields = stat_fields(pid);
	guint index = FIELD_START - FIELD_STATE;

	return fields && g_strv_length(fields) > index ? g_ascii_strtoull(fields[index], NULL, 10)
						       : 0;
}

static guint64 pid_namespace(void)
{
	struct stat st;

	return stat("/proc/self/ns/pid", &st) == 0 ? st.st_ino : 0;
}

char *pr_process_text(pid_t pid)
{
	g_autofree char *boot = NULL;

	if (!g_file_get_contents("/proc/sys/kernel/random/boot_id", &boot, NULL, NULL))
		boot = g_strdup("-");
	g_strchomp(boot);
	return g_strdup_printf("%d %" G_GUINT64_FORMAT " %" G_GUINT64_FORMAT " %.40s", (int)pid,
			       start_time(pid), pid_namespace(), boot);
}

/* A zombie has released its memory and its files. */
static gboolean is_zombie(pid_t pid)
{
	g_auto(GStrv) fields = stat_fields(pid);

	return !fields || !fields[0] || strchr("ZX", fields[0][0]) != NULL;
}

/* The main thread of a process may be a zombie while other threads still run. */
static gboolean has_other_threads(pid_t pid)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/task", (int)pid);
	g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
	guint n = 0;

	while (dir && g_dir_read_name(dir))
		n++;
	return n > 1;
}

gboolean pr_process_lives(const char *text)
{
	g_autofree char *now = NULL;
	int pid = 0;

	if (sscanf(text, "%d ", &pid) != 1 || pid <= 0)
		return FALSE;
	now = pr_process_text(pid);
	return strcmp(now, text) == 0 && (!is_zombie(pid) || has_other_threads(pid));
}

/* proc(5): /proc/PID/task/TID/statm begins with the size of the address space, which is 0 once the
 * thread has released it. */
static gboolean thread_uses_memory(pid_t pid, const char *tid)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/task/%s/statm", (int)pid, tid);
	g_autofree char *text = NULL;

	return g_file_get_contents(path, &text, NULL, NULL) && atoll(text) > 0;
}

static gboolean any_thread_uses_memory(pid_t pid)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/task", (int)pid);
	g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
	const char *tid;

	while (dir && (tid = g_dir_read_name(dir)))
		if (thread_uses_memory(pid, tid))
			return TRUE;
	return FALSE;
}

gboolean pr_process_uses_memory(const char *text)
{
	g_autofree char *now = NULL;
	unsigned long long start = 0;
	int pid = 0;

	if (sscanf(text, "%d %llu", &pid, &start) != 2 || pid <= 0 || start == 0)
		return TRUE;
	now = pr_process_text(pid);
	return strcmp(now, text) == 0 && any_thread_uses_memory(pid);
}
