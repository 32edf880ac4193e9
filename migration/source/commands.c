/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/commands.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "migration/source/source.h"
#include "util/try-alloc.h"

/* A new migration has a fresh identity. With the lock held. */
static void become_source(PrSession *session)
{
	PrBinding *binding = &session->binding;

	if (getentropy(binding->uuid, PR_UUID_BYTES) < 0 ||
	    getentropy(binding->secret, PR_SECRET_BYTES) < 0)
		g_error("getentropy: %s", g_strerror(errno));
	binding->uuid[6] = (binding->uuid[6] & 0x0f) | 0x40; /* RFC 4122, version 4 */
	binding->uuid[8] = (binding->uuid[8] & 0x3f) | 0x80;
	binding->epoch = 0;
	memset(&session->progress, 0, sizeof(session->progress));
	session->pages_at_pause = 0;
	pr_session_set_paused_by_operator(session, FALSE);
	g_clear_pointer(&session->error_desc, g_free);
}

static gboolean start_locked(PrSource *source, GPtrArray *uris, GError **error)
{
	PrSession *session = source->session;

	if (pr_session_step_locked(session, PR_EVENT_START, PR_ROLE_SOURCE,
				   "migrate was asked for") == PR_ACTION_REFUSE) {
		pr_session_set_state_error(
			session, "migrate",
			session->sm.state == PR_STATE_COMPLETED
				? "this guest has moved to the destination"
				: "wait for it, cancel it (migrate_cancel) or, when it is "
				  "paused, resume it (migrate -r)",
			error);
		return FALSE;
	}
	become_source(session);
	g_clear_pointer(&source->uris, g_ptr_array_unref);
	source->uris = g_ptr_array_ref(uris);
	source->n_asked = uris->len;
	source->resume = PR_RESUME_NO;
	pr_source_begin_attempt(source);
	return TRUE;
}

/* old: the owner of the migration before, which has ended but may still be closing its connection.
 * The main loop must not wait for that; the new owner does. */
static gboolean start_owner(PrSource *source, GThread *old, GError **error)
{
	PrSession *session = source->session;
	g_autoptr(GError) why = NULL;

	pr_session_lock(session);
	if (old)
		session->previous_thread = old;
	session->thread = pr_thread_try("migration", pr_source_thread, source, &why);
	gboolean started = session->thread != NULL;
	if (!started) {
		g_autoptr(GError) failure = g_error_new_literal(
			PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM, why->message);

		pr_session_failed_locked(session, failure);
		pr_session_step_locked(session, PR_EVENT_CLEANED_UP, PR_ROLE_SOURCE,
				       "the guest runs on at the source");
		g_propagate_error(error, g_steal_pointer(&failure));
	}
	pr_session_unlock(session);
	return started;
}

gboolean pr_source_start(PrSource *source, GPtrArray *uris, GError **error)
{
	PrSession *session = source->session;
	GThread *old = NULL;

	/* If the owner can't be started, the failure is reported right behind the start. */
	pr_session_lock(session);
	pr_session_hold_events(session);
	gboolean started = start_locked(source, uris, error);
	if (started)
		old = g_steal_pointer(&session->thread);
	pr_session_unlock(session);
	if (started)
		started = start_owner(source, old, error);
	pr_session_release_events(session);
	return started;
}

static gboolean is_listed(GPtrArray *uris, const PrUri *uri)
{
	for (guint i = 0; i < uris->len; i++)
		if (strcmp(((PrUri *)g_ptr_array_index(uris, i))->text, uri->text) == 0)
			return TRUE;
	return FALSE;
}

/* Puts these paths before those that were listed already. With the lock held. */
static void prefer_uris(PrSource *source, GPtrArray *uris)
{
	GPtrArray *all = g_ptr_array_new_with_free_func((GDestroyNotify)pr_uri_free);

	for (guint i = 0; i < uris->len; i++)
		g_ptr_array_add(all, pr_uri_copy(g_ptr_array_index(uris, i)));
	for (guint i = 0; i < source->uris->len; i++)
		if (!is_listed(uris, g_ptr_array_index(source->uris, i)))
			g_ptr_array_add(all, pr_uri_copy(g_ptr_array_index(source->uris, i)));
	source->n_asked = uris->len;
	g_ptr_array_unref(source->uris);
	source->uris = all;
}

/* The operator's command ends an automatic attempt. With the lock held. */
static void end_automatic_attempt(PrSource *source)
{
	PrSession *session = source->session;
	PrState state = session->sm.state;
	g_autoptr(GError) outranked = g_error_new_literal(
		PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "migrate -r was asked for");

	if (source->resume == PR_RESUME_AUTOMATIC &&
	    (state == PR_STATE_POSTCOPY_RECOVER_SETUP || state == PR_STATE_POSTCOPY_RECOVER))
		pr_session_failed_locked(session, outranked);
}

static gboolean recover_locked(PrSource *source, GPtrArray *uris, GError **error)
{
	PrSession *session = source->session;

	if (session->sm.role != PR_ROLE_SOURCE) {
		pr_session_set_state_error(session, "migrate -r", "give it on the source", error);
		return FALSE;
	}
	end_automatic_attempt(source);
	if (pr_session_step_locked(session, PR_EVENT_RESUME, PR_ROLE_SOURCE,
				   "a recovery was asked for") == PR_ACTION_REFUSE) {
		pr_session_set_state_error(
			session, "migrate -r",
			"there is nothing to resume unless it is postcopy-paused", error);
		return FALSE;
	}
	source->resume = PR_RESUME_ASKED;
	pr_session_set_paused_by_operator(session, FALSE);
	prefer_uris(source, uris);
	return TRUE;
}

gboolean pr_source_recover_over(PrSource *source, GPtrArray *uris, GError **error)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	gboolean begun = recover_locked(source, uris, error);
	pr_session_unlock(session);
	return begun;
}
