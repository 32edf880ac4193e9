/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Logging never blocks the thread that logs. A line goes into a queue, and the writer thread writes
 * it to standard error. So a pipe that nobody reads, a stopped terminal or a full disk blocks the
 * writer thread only. A line that finds the queue full, or that can't be written, is dropped. The
 * log has the number of dropped lines in their place, as soon as it can be written again.
 */
#include "monitor/log.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define QUEUE_LINES_MAX 4096
#define QUEUE_BYTES_MAX (1024 * 1024)

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

/* One line; or, where text is NULL, the number of lines dropped in this place. */
typedef struct Entry {
	char *text;
	guint64 dropped;
} Entry;

/* One for the process, like GLib's log writer. */
static struct {
	int fd;		  /* constant after pr_log_start() */
	gboolean colour;  /* constant after pr_log_start() */
	GThread *writer;  /* constant after pr_log_start(); NULL: lines are written at once */
	GMutex lock;	  /* protects changed, queue, bytes and writing */
	GCond changed;	  /* signals changes of queue or writing */
	GQueue queue;	  /* Entry, oldest first */
	gsize bytes;	  /* of all texts in the queue */
	gboolean writing; /* the writer thread is writing an entry */
	gboolean partial; /* owned by the writer thread: it has written part of a line */
} the_log = {.fd = STDERR_FILENO};

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

/* The debug messages of GLib and its libraries do not help to understand this program. */
static gboolean is_library_debug(GLogLevelFlags level, const GLogField *fields, gsize n)
{
	return level & (G_LOG_LEVEL_INFO | G_LOG_LEVEL_DEBUG) &&
	       g_str_has_prefix(find_field(fields, n, "GLIB_DOMAIN"), "GLib");
}

/* ---- the writer ---- */

/* Returns FALSE, with errno, when the text was not written, or in part only. */
static gboolean write_all(const char *text)
{
	gsize left = strlen(text);

	while (left > 0) {
		ssize_t n = write(the_log.fd, text, left);

		if (n < 0 && errno == EAGAIN) {
			/* Another process has made the shared descriptor non-blocking. Ended by its
			 * reader, or with the process: only the writer thread may block here. */
			poll(&(struct pollfd){.fd = the_log.fd, .events = POLLOUT}, 1, -1);
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return FALSE;
		text += n;
		left -= (gsize)n;
		the_log.partial = left > 0;
	}
	return TRUE;
}

static char *time_text(void)
{
	g_autoptr(GDateTime) now = g_date_time_new_now_local();
	g_autofree char *time = g_date_time_format(now, "%Y-%m-%dT%H:%M:%S.%f");

	return g_strndup(time, 23); /* milliseconds */
}

static gboolean write_dropped(guint64 dropped, const char *why)
{
	if (dropped == 0)
		return TRUE;
	g_autofree char *time = time_text();
	g_autofree char *text =
		g_strdup_printf("%s warning: %" G_GUINT64_FORMAT " %s missing here: %s\n", time,
				dropped,
				dropped == 1 ? "line of the log is" : "lines of the log are", why);

	return write_all(text);
}

/* Writes an entry. *failed counts the lines that could not be written since the last success. */
static void write_entry(const Entry *entry, guint64 *failed, int *failed_code)
{
	g_autofree char *why =
		g_strdup_printf("they could not be written: %s", g_strerror(*failed_code));

	if ((!the_log.partial || write_all("\n")) && write_dropped(*failed, why)) {
		*failed = 0;
		if (entry->text ? write_all(entry->text)
				: write_dropped(entry->dropped, "the log was not read in time"))
			return;
	}
	*failed_code = errno;
	*failed += entry->text ? 1 : entry->dropped;
}

static void entry_free(Entry *entry)
{
	g_free(entry->text);
	g_free(entry);
}

static gpointer writer_thread(gpointer opaque)
{
	guint64 failed = 0;
	int code = 0;

	g_mutex_lock(&the_log.lock);
	for (;;) {
		/* Ended by the next line, or with the process. */
		while (g_queue_is_empty(&the_log.queue))
			g_cond_wait(&the_log.changed, &the_log.lock);
		Entry *entry = g_queue_pop_head(&the_log.queue);
		the_log.bytes -= entry->text ? strlen(entry->text) : 0;
		the_log.writing = TRUE;
		g_mutex_unlock(&the_log.lock);
		write_entry(entry, &failed, &code);
		entry_free(entry);
		g_mutex_lock(&the_log.lock);
		the_log.writing = FALSE;
		g_cond_broadcast(&the_log.changed);
	}
	return NULL;
}

/* ---- the threads that log ---- */

/* Counts a dropped line in its place in the queue. Call it with the lock held. */
static void drop_one(void)
{
	Entry *last = g_queue_peek_tail(&the_log.queue);

	if (!last || last->text) {
		last = g_new0(Entry, 1);
		g_queue_push_tail(&the_log.queue, last);
	}
	last->dropped++;
}

static gboolean has_room(gsize bytes)
{
	return the_log.queue.length < QUEUE_LINES_MAX && the_log.bytes + bytes <= QUEUE_BYTES_MAX;
}

/* Takes the text, a whole line. */
static void queue_line(char *text)
{
	gsize bytes = strlen(text);

	if (!the_log.writer) {
		write_all(text);
		g_free(text);
		return;
	}
	g_mutex_lock(&the_log.lock);
	if (has_room(bytes)) {
		Entry *entry = g_new0(Entry, 1);
		entry->text = text;
		the_log.bytes += bytes;
		g_queue_push_tail(&the_log.queue, entry);
	} else {
		drop_one();
		g_free(text);
	}
	g_cond_broadcast(&the_log.changed);
	g_mutex_unlock(&the_log.lock);
}

gboolean pr_log_flush(guint timeout_ms)
{
	gint64 deadline = g_get_monotonic_time() + (gint64)timeout_ms * 1000;
	gboolean in_time = TRUE;

	if (!the_log.writer)
		return TRUE;
	g_mutex_lock(&the_log.lock);
	while (in_time && (the_log.writing || !g_queue_is_empty(&the_log.queue)))
		in_time = g_cond_wait_until(&the_log.changed, &the_log.lock, deadline);
	g_mutex_unlock(&the_log.lock);
	return in_time;
}

void pr_log_final(const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	queue_line(g_strdup_vprintf(format, ap));
	va_end(ap);
	pr_log_flush(PR_LOG_FINAL_FLUSH_MS);
}

static GLogWriterOutput log_entry(GLogLevelFlags level, const GLogField *fields, gsize n,
				  gpointer opaque)
{
	GLogLevelFlags last = GPOINTER_TO_UINT(opaque);
	const Level *entry = levels;

	/* The flags of more important levels are lower bits. */
	if ((level & G_LOG_LEVEL_MASK) > last || is_library_debug(level, fields, n))
		return G_LOG_WRITER_HANDLED;
	g_autofree char *time = time_text();
	gboolean colour = the_log.colour;
	while (!(entry->flags & level) && entry < &levels[G_N_ELEMENTS(levels) - 1])
		entry++;
	queue_line(g_strdup_printf("%s %s%s%s: %s\n", time, colour ? entry->colour : "",
				   entry->name, colour ? "\033[0m" : "",
				   find_field(fields, n, "MESSAGE")));
	if (level & (G_LOG_FLAG_FATAL | G_LOG_LEVEL_ERROR))
		pr_log_flush(PR_LOG_FINAL_FLUSH_MS); /* abort() is next */
	return G_LOG_WRITER_HANDLED;
}

/* GLib prints failed assertions this way, and calls abort() next. */
static void on_printerr(const char *text)
{
	queue_line(g_strdup(text));
	pr_log_flush(PR_LOG_FINAL_FLUSH_MS);
}

gboolean pr_log_start(GLogLevelFlags level, int fd, GError **error)
{
	the_log.fd = fd;
	the_log.colour = g_log_writer_supports_color(fd);
	if (!the_log.writer)
		the_log.writer = g_thread_try_new("log", writer_thread, NULL, error);
	g_log_set_writer_func(log_entry, GUINT_TO_POINTER(level), NULL);
	g_set_printerr_handler(on_printerr);
	return the_log.writer != NULL;
}
