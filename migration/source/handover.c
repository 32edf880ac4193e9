/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/handover.h"

#include <string.h>

#include "migration/core/crash-point.h"

static char *join_uris(PrSource *source)
{
	PrSession *session = source->session;
	GString *text = g_string_new(NULL);

	pr_session_lock(session);
	for (guint i = 0; source->uris && i < source->uris->len; i++)
		g_string_append_printf(text, "%s%s", i > 0 ? "," : "",
				       ((PrUri *)g_ptr_array_index(source->uris, i))->text);
	pr_session_unlock(session);
	return g_string_free(text, FALSE);
}

static void note_blocks(PrHandoverRecord *record, const PrRam *ram)
{
	g_autofree PrGuestBlock *blocks = g_new0(PrGuestBlock, ram->n_blocks);

	for (guint i = 0; i < ram->n_blocks; i++)
		blocks[i] = (PrGuestBlock){.idstr = ram->blocks[i].idstr,
					   .size = ram->blocks[i].size,
					   .page_size = (uint32_t)ram->blocks[i].per_host *
							PR_TARGET_PAGE,
					   .base = ram->blocks[i].base};
	pr_handover_record_set_blocks(record, blocks, ram->n_blocks);
}

gboolean pr_handover_stopping(PrSource *source, GError **error)
{
	PrSession *session = source->session;
	PrHandoverRecord *record = source->record;
	g_autofree char *uris = NULL;

	if (!record)
		return TRUE;
	if (!session->guest->ops->is_running(session->guest, &record->was_running, error))
		return FALSE;
	uris = join_uris(source);
	pr_session_lock(session);
	memcpy(record->uuid, session->binding.uuid, PR_UUID_BYTES);
	memcpy(record->secret, session->binding.secret, PR_SECRET_BYTES);
	pr_session_unlock(session);
	record->incarnation = 0;
	record->paused_by_operator = FALSE;
	pr_handover_record_set_uris(record, uris);
	note_blocks(record, session->ram);
	if (!pr_handover_record_save(record, PR_HANDOVER_STOPPING, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_STOPPING_NOTED);
	return TRUE;
}

gboolean pr_handover_handed_over(PrSource *source, GError **error)
{
	if (source->record &&
	    !pr_handover_record_save(source->record, PR_HANDOVER_HANDED_OVER, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_HANDED_OVER_NOTED);
	return TRUE;
}

/* A full disk lets a file be removed even if none can be written. Without a record the next engine
 * would not let the guest run, either, but it could not resume it by mistake. */
void pr_handover_revoked(PrSource *source)
{
	g_autoptr(GError) error = NULL;

	if (!source->record || source->record->stage != PR_HANDOVER_HANDED_OVER)
		return;
	if (!pr_handover_record_save(source->record, PR_HANDOVER_STOPPING, &error) &&
	    !pr_handover_record_remove(source->record, NULL))
		g_critical("%s; remove %s by hand: it says that this guest was handed over, and it "
			   "was not",
			   error->message, source->record->path);
	pr_crash_point(PR_CRASH_SOURCE_TAKEN_BACK_NOTED);
}

void pr_handover_aborted(PrSource *source)
{
	g_autoptr(GError) error = NULL;

	pr_crash_point(PR_CRASH_SOURCE_RESUMED_GUEST);
	if (source->record && source->record->stage != PR_HANDOVER_NONE &&
	    !pr_handover_record_remove(source->record, &error))
		g_warning("%s", error->message);
}

void pr_handover_completed(PrSource *source)
{
	g_autoptr(GError) error = NULL;

	pr_crash_point(PR_CRASH_SOURCE_COMPLETED);
	/* HANDED_OVER says enough: a recovery would learn that it is complete. */
	if (source->record &&
	    !pr_handover_record_save(source->record, PR_HANDOVER_COMPLETED, &error))
		g_warning("%s", error->message);
	pr_crash_point(PR_CRASH_SOURCE_COMPLETED_NOTED);
}

void pr_handover_forget(PrSource *source)
{
	PrSession *session = source->session;

	if (source->record && source->record->stage == PR_HANDOVER_COMPLETED && session->guest_gone)
		pr_handover_record_remove(source->record, NULL);
}

void pr_handover_update(PrSource *source)
{
	PrSession *session = source->session;
	PrHandoverRecord *record = source->record;
	g_autoptr(GError) error = NULL;
	g_autofree char *uris = NULL;

	if (!record || record->stage != PR_HANDOVER_HANDED_OVER)
		return;
	uris = join_uris(source);
	pr_session_lock(session);
	gboolean held = session->paused_by_operator;
	pr_session_unlock(session);
	if (held == record->paused_by_operator &&
	    strcmp(uris, record->uris ? record->uris : "") == 0)
		return;
	record->paused_by_operator = held;
	pr_handover_record_set_uris(record, uris);
	if (!pr_handover_record_save(record, PR_HANDOVER_HANDED_OVER, &error))
		g_warning("%s", error->message);
}
