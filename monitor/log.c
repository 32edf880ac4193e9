/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/log.h"

#include <string.h>
#include <unistd.h>

typedef struct Level {
	const char *name;
	GLogLevelFlags flags; /* GLib's levels that are shown as this one */
	const char *colour;
} Level;

/* From the most to the least important. */
static const Level levels[] = {
	{"error", G_LOG_LEVEL_ERROR | G_LOG_LEVEL_CRITICAL, "\033[1;31m"},
	{"warning", G_LOG_LEVEL_WARNING, "\033[1;33m"},
	{"info", G_LOG_LEVEL_MESSAGE | G_LOG_LEVEL_INFO, "\033[32m"},
	{"debug", G_LOG_LEVEL_DEBUG, "\033[2m"},
};

gboolean pr_log_parse_level(const char *name, GLogLevelFlags *ret)
{
	for (guint i = 0; i < G_N_ELEMENTS(levels); i++) {
		if (!strcmp(levels[i].name, name)) {
			*ret = levels[i].flags;
			return TRUE;
		}
	}
	return FALSE;
}

static const char *find_field(const GLogField *fields, gsize n, const char *key)
{
	for (gsize i = 0; i < n; i++)
		if (!strcmp(fields[i].key, key) && fields[i].length < 0)
			return fields[i].value;
	return "";
}

/* What the libraries think aloud is not about this program. */
static gboolean is_chatter(GLogLevelFlags level, const GLogField *fields, gsize n)
{
	return level & (G_LOG_LEVEL_INFO | G_LOG_LEVEL_DEBUG) &&
	       g_str_has_prefix(find_field(fields, n, "GLIB_DOMAIN"), "GLib");
}

static GLogWriterOutput write_entry(GLogLevelFlags level, const GLogField *fields, gsize n,
				    gpointer opaque)
{
	GLogLevelFlags last = GPOINTER_TO_UINT(opaque);
	g_autoptr(GDateTime) now = g_date_time_new_now_local();
	g_autofree char *time = g_date_time_format(now, "%Y-%m-%dT%H:%M:%S.%f");
	gboolean colour = g_log_writer_supports_color(STDERR_FILENO);
	const Level *entry = levels;

	/* flags of more important levels are lower bits */
	if ((level & G_LOG_LEVEL_MASK) > last || is_chatter(level, fields, n))
		return G_LOG_WRITER_HANDLED;
	while (!(entry->flags & level) && entry < &levels[G_N_ELEMENTS(levels) - 1])
		entry++;
	/* milliseconds; one call, so that lines of two threads don't mix */
	g_printerr("%.23s %s%s%s: %s\n", time, colour ? entry->colour : "", entry->name,
		   colour ? "\033[0m" : "", find_field(fields, n, "MESSAGE"));
	return G_LOG_WRITER_HANDLED;
}

void pr_log_start(GLogLevelFlags level)
{
	g_log_set_writer_func(write_entry, GUINT_TO_POINTER(level), NULL);
}
