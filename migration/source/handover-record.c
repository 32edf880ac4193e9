/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/handover-record.h"

#include <errno.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "migration/core/crash-point.h"
#include "migration/core/types.h"

#define GROUP	"postroad source"
#define VERSION 1

static const char *const stage_names[] = {
	[PR_HANDOVER_STOPPING] = "stopping",
	[PR_HANDOVER_HANDED_OVER] = "handed-over",
	[PR_HANDOVER_COMPLETED] = "completed",
};

char *pr_handover_record_default_dir(void)
{
	if (geteuid() == 0)
		return g_strdup("/run/postroad");
	return g_build_filename(g_get_user_runtime_dir(), "postroad", NULL);
}

static gboolean file_error(GError **error, const char *path, const char *what, int code)
{
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
		    "%s: %s: %s; --state-dir names another directory", path, what,
		    g_strerror(code));
	return FALSE;
}

/* ---- to and from text ---- */

static char *to_hex(const uint8_t *bytes, gsize n)
{
	GString *text = g_string_new(NULL);

	for (gsize i = 0; i < n; i++)
		g_string_append_printf(text, "%02x", bytes[i]);
	return g_string_free(text, FALSE);
}

static gboolean from_hex(const char *text, uint8_t *ret, gsize n)
{
	if (!text || strlen(text) != 2 * n)
		return FALSE;
	for (gsize i = 0; i < n; i++) {
		int high = g_ascii_xdigit_value(text[2 * i]),
		    low = g_ascii_xdigit_value(text[2 * i + 1]);

		if (high < 0 || low < 0)
			return FALSE;
		ret[i] = (uint8_t)(high << 4 | low);
	}
	return TRUE;
}

static void put_block(GKeyFile *file, guint i, const PrGuestBlock *block)
{
	g_autofree char *group = g_strdup_printf("block %u", i);

	g_key_file_set_string(file, group, "idstr", block->idstr);
	g_key_file_set_uint64(file, group, "size", block->size);
	g_key_file_set_uint64(file, group, "page-size", block->page_size);
	g_key_file_set_uint64(file, group, "base", block->base);
}

static char *to_text(const PrHandoverRecord *record, PrHandoverStage stage)
{
	g_autoptr(GKeyFile) file = g_key_file_new();
	g_autofree char *uuid = to_hex(record->uuid, PR_UUID_BYTES);
	g_autofree char *secret = to_hex(record->secret, PR_SECRET_BYTES);

	g_key_file_set_integer(file, GROUP, "version", VERSION);
	g_key_file_set_string(file, GROUP, "guest", record->spec);
	g_key_file_set_string(file, GROUP, "process", record->process);
	g_key_file_set_string(file, GROUP, "stage", stage_names[stage]);
	g_key_file_set_boolean(file, GROUP, "was-running", record->was_running);
	g_key_file_set_boolean(file, GROUP, "held", record->paused_by_operator);
	g_key_file_set_uint64(file, GROUP, "incarnation", record->incarnation);
	g_key_file_set_string(file, GROUP, "uuid", uuid);
	g_key_file_set_string(file, GROUP, "secret", secret);
	g_key_file_set_string(file, GROUP, "uris", record->uris ? record->uris : "");
	g_key_file_set_uint64(file, GROUP, "blocks", record->n_blocks);
	for (guint i = 0; i < record->n_blocks; i++)
		put_block(file, i, &record->blocks[i]);
	return g_key_file_to_data(file, NULL, NULL);
}

static gboolean get_block(GKeyFile *file, guint i, PrGuestBlock *ret)
{
	g_autofree char *group = g_strdup_printf("block %u", i);
	uint64_t page_size = g_key_file_get_uint64(file, group, "page-size", NULL);

	ret->idstr = g_key_file_get_string(file, group, "idstr", NULL);
	ret->size = g_key_file_get_uint64(file, group, "size", NULL);
	ret->page_size = (uint32_t)page_size;
	ret->base = g_key_file_get_uint64(file, group, "base", NULL);
	ret->memfd = -1;
	return ret->idstr && strlen(ret->idstr) <= PR_IDSTR_MAX && ret->size > 0 &&
	       page_size >= 4096 && page_size <= G_MAXUINT32 && ret->size % page_size == 0;
}

static gboolean get_stage(GKeyFile *file, PrHandoverStage *ret)
{
	g_autofree char *name = g_key_file_get_string(file, GROUP, "stage", NULL);

	for (guint i = PR_HANDOVER_STOPPING; i < G_N_ELEMENTS(stage_names); i++) {
		if (g_strcmp0(name, stage_names[i]) != 0)
			continue;
		*ret = i;
		return TRUE;
	}
	return FALSE;
}

static gboolean get_blocks(GKeyFile *file, PrHandoverRecord *record)
{
	uint64_t n = g_key_file_get_uint64(file, GROUP, "blocks", NULL);

	if (n == 0 || n > PR_BLOCKS_MAX)
		return FALSE;
	record->blocks = g_new0(PrGuestBlock, n);
	record->n_blocks = (guint)n;
	for (guint i = 0; i < n; i++)
		if (!get_block(file, i, &record->blocks[i]))
			return FALSE;
	return TRUE;
}

/* Returns what is wrong, or NULL. */
static const char *from_text(PrHandoverRecord *record, GKeyFile *file)
{
	g_autofree char *uuid = g_key_file_get_string(file, GROUP, "uuid", NULL);
	g_autofree char *secret = g_key_file_get_string(file, GROUP, "secret", NULL);
	uint64_t incarnation = g_key_file_get_uint64(file, GROUP, "incarnation", NULL);

	if (g_key_file_get_integer(file, GROUP, "version", NULL) != VERSION)
		return "its version is not this engine's";
	if (!get_stage(file, &record->stage))
		return "its stage is unknown";
	if (!from_hex(uuid, record->uuid, PR_UUID_BYTES) ||
	    !from_hex(secret, record->secret, PR_SECRET_BYTES) || incarnation >= G_MAXUINT32)
		return "uuid, secret or incarnation make no sense";
	record->incarnation = (uint32_t)incarnation;
	record->was_running = g_key_file_get_boolean(file, GROUP, "was-running", NULL);
	record->paused_by_operator = g_key_file_get_boolean(file, GROUP, "held", NULL);
	record->uris = g_key_file_get_string(file, GROUP, "uris", NULL);
	return get_blocks(file, record) ? NULL : "its RAM blocks make no sense";
}

/* ---- the file ---- */

/* Of another guest process, or none at all: nothing is known of this one. */
static gboolean load(PrHandoverRecord *record, GError **error)
{
	struct stat st;
	g_autoptr(GKeyFile) file = g_key_file_new();
	g_autoptr(GError) inner = NULL;
	g_autofree char *process = NULL;
	const char *wrong;

	/* No engine leaves it like that, but a host that goes down may (handover-record.h). */
	if (stat(record->path, &st) == 0 && st.st_size == 0) {
		g_message("%s is empty: this host went down when it was written", record->path);
		return TRUE;
	}
	if (!g_key_file_load_from_file(file, record->path, G_KEY_FILE_NONE, &inner) &&
	    g_error_matches(inner, G_FILE_ERROR, G_FILE_ERROR_NOENT))
		return TRUE;
	process = inner ? NULL : g_key_file_get_string(file, GROUP, "process", NULL);
	if (process && strcmp(process, record->process) != 0) {
		g_message(
			"%s is about a guest that is gone (process %s); it says nothing about this "
			"one",
			record->path, process);
		return TRUE;
	}
	wrong = inner ? inner->message : !process ? "it names no process" : from_text(record, file);
	if (!wrong)
		return TRUE;
	g_set_error(
		error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
		"%s is not a record that this engine understands (%s), so it is not known whether "
		"this guest has been handed over; find out, and remove the file if it was not",
		record->path, wrong);
	return FALSE;
}

PrHandoverRecord *pr_handover_record_open(const char *dir, const char *spec, const char *process,
					  GError **error)
{
	g_autoptr(PrHandoverRecord) record = g_new0(PrHandoverRecord, 1);
	g_autofree char *hash = g_compute_checksum_for_string(G_CHECKSUM_SHA256, spec, -1);
	g_autofree char *name = g_strdup_printf("source-%.16s", hash);

	record->path = g_build_filename(dir, name, NULL);
	record->spec = g_strdup(spec);
	record->process = g_strdup(process);
	return load(record, error) ? g_steal_pointer(&record) : NULL;
}

static void clear_blocks(PrHandoverRecord *record)
{
	for (guint i = 0; i < record->n_blocks; i++)
		g_free(record->blocks[i].idstr);
	g_clear_pointer(&record->blocks, g_free);
	record->n_blocks = 0;
}

void pr_handover_record_free(PrHandoverRecord *record)
{
	if (!record)
		return;
	clear_blocks(record);
	g_free(record->path);
	g_free(record->spec);
	g_free(record->process);
	g_free(record->uris);
	g_free(record);
}

void pr_handover_record_set_blocks(PrHandoverRecord *record, const PrGuestBlock *blocks, guint n)
{
	clear_blocks(record);
	record->blocks = g_new0(PrGuestBlock, n);
	record->n_blocks = n;
	for (guint i = 0; i < n; i++) {
		record->blocks[i] = blocks[i];
		record->blocks[i].idstr = g_strdup(blocks[i].idstr);
		record->blocks[i].memfd = -1;
	}
}

void pr_handover_record_set_uris(PrHandoverRecord *record, const char *uris)
{
	g_free(record->uris);
	record->uris = g_strdup(uris);
}

static gboolean write_text(const char *path, const char *text, GError **error)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	gsize left = strlen(text);
	gboolean done;
	int code;

	if (fd < 0)
		return file_error(error, path, "cannot be made", errno);
	while (left > 0) {
		ssize_t n = write(fd, text, left);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			break;
		text += n;
		left -= (gsize)n;
	}
	done = left == 0 && fchmod(fd, 0600) == 0;
	code = errno;
	close(fd);
	return done || file_error(error, path, "cannot be written", code);
}

gboolean pr_handover_record_save(PrHandoverRecord *record, PrHandoverStage stage, GError **error)
{
	g_autofree char *dir = g_path_get_dirname(record->path);
	g_autofree char *beside = g_strconcat(record->path, ".new", NULL);
	g_autofree char *text = to_text(record, stage);

	if (g_mkdir_with_parents(dir, 0700) < 0)
		return file_error(error, dir, "cannot be made", errno);
	if (!write_text(beside, text, error))
		return FALSE;
	pr_crash_point(PR_CRASH_RECORD_WRITTEN);
	if (g_rename(beside, record->path) < 0)
		return file_error(error, record->path, "cannot be replaced", errno);
	pr_crash_point(PR_CRASH_RECORD_RENAMED);
	record->stage = stage;
	return TRUE;
}

gboolean pr_handover_record_remove(PrHandoverRecord *record, GError **error)
{
	if (g_unlink(record->path) < 0 && errno != ENOENT)
		return file_error(error, record->path, "cannot be removed", errno);
	record->stage = PR_HANDOVER_NONE;
	return TRUE;
}
