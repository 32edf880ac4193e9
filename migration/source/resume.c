/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/resume.h"

#include <string.h>

#include "migration/core/crash-point.h"
#include "migration/source/fence.h"
#include "migration/source/handover.h"
#include "migration/source/source.h"
#include "migration/source/take-back.h"

static GPtrArray *parse_recorded_uris(const PrHandoverRecord *record)
{
	g_autoptr(GError) error = NULL;
	GPtrArray *uris = record->uris && *record->uris
				  ? pr_uri_list_parse(record->uris, /* listening= */ FALSE, &error)
				  : NULL;

	if (error)
		g_warning("%s: %s", record->path, error->message);
	return uris ? uris : g_ptr_array_new_with_free_func((GDestroyNotify)pr_uri_free);
}

static void restore_session(PrSource *source)
{
	PrSession *session = source->session;
	const PrHandoverRecord *record = source->record;
	gboolean completed = record->stage == PR_HANDOVER_COMPLETED;

	pr_session_lock(session);
	memcpy(session->binding.uuid, record->uuid, PR_UUID_BYTES);
	memcpy(session->binding.secret, record->secret, PR_SECRET_BYTES);
	session->binding.epoch = (uint64_t)record->incarnation << 32;
	source->uris = parse_recorded_uris(record);
	source->n_asked = source->uris->len;
	session->paused_by_operator = record->paused_by_operator;
	pr_source_begin_attempt(source);
	pr_session_restore_locked(
		session, PR_ROLE_SOURCE, completed ? PR_STATE_COMPLETED : PR_STATE_POSTCOPY_PAUSED,
		FALSE,
		completed ? "the guest had moved when the last engine ended"
			  : "the last engine ended when the guest had been handed over");
	pr_session_unlock(session);
}

static gboolean resume_as_source(PrSource *source, GError **error)
{
	PrSession *session = source->session;
	PrHandoverRecord *record = source->record;
	const PrGuestBlock *blocks;
	PrRam *ram;

	blocks =
		session->guest->ops->adopt(session->guest, record->blocks, record->n_blocks, error);
	ram = blocks ? pr_ram_new(blocks, record->n_blocks, PR_GUEST_SOURCE, error) : NULL;
	if (!ram)
		return FALSE;
	pr_session_lock(session);
	session->ram = ram;
	pr_session_unlock(session);
	record->incarnation++;
	if (!pr_handover_record_save(record, record->stage, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_INCARNATION_NOTED);
	restore_session(source);
	g_message("going on as the source of a migration that is %s; this guest belongs to the "
		  "destination",
		  pr_state_name(session->sm.state));
	if (record->stage == PR_HANDOVER_HANDED_OVER)
		return pr_session_start_thread(session, "migration", pr_source_resumed_thread,
					       source, error);
	pr_source_unfence(source);
	return TRUE;
}

/* The obstacle may last. A thread goes on trying, so that the monitor can answer meanwhile and say
 * so. */
static gboolean go_on_trying(PrSource *source, const GError *why, GError **error)
{
	PrSession *session = source->session;
	g_autofree char *words = g_strdup_printf(
		"the last engine ended while it moved this guest, which is still the source's and "
		"does not run yet: %s",
		why->message);

	pr_session_lock(session);
	session->error_desc = g_strdup(words);
	pr_session_restore_locked(session, PR_ROLE_SOURCE, PR_STATE_FAILING, FALSE, words);
	pr_session_unlock(session);
	return pr_session_start_thread(session, "migration", pr_source_take_back_thread, source,
				       error);
}

static gboolean resume_guest(PrSource *source, GError **error)
{
	g_autoptr(GError) why = NULL;

	g_message("the last engine ended before the guest was handed over: it runs on here, if it "
		  "ran; should the destination be postcopy-paused, cancel there (migrate_cancel)");
	if (!pr_source_try_run(source, /* follows= */ TRUE, &why))
		return go_on_trying(source, why, error);
	pr_handover_aborted(source);
	return TRUE;
}

gboolean pr_source_resume(PrSource *source, gboolean asked, GError **error)
{
	static const char *const left_by_last_engine[] = {
		[PR_HANDOVER_STOPPING] =
			"the last engine of this guest ended while it was moving it, and "
			"may have left it stopped",
		[PR_HANDOVER_HANDED_OVER] =
			"the last engine of this guest ended when it had handed it over: "
			"it belongs to the destination, which needs its memory",
		[PR_HANDOVER_COMPLETED] =
			"this guest has moved to another host for good: quit its VMM; or",
	};
	const PrHandoverRecord *record = source->record;

	if (!asked) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
			    "%s: %s; start this engine with --resume", record->path,
			    left_by_last_engine[record->stage]);
		return FALSE;
	}
	return record->stage == PR_HANDOVER_STOPPING ? resume_guest(source, error)
						     : resume_as_source(source, error);
}
