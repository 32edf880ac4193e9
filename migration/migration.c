/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The migration's interface to the monitor: its life, and the operator's commands. */
#include "migration/migration.h"

#include "migration/destination/admission.h"
#include "migration/destination/destination.h"
#include "migration/destination/listen.h"
#include "migration/internal.h"
#include "migration/session/messages.h"
#include "migration/source/commands.h"
#include "migration/source/fence.h"
#include "migration/source/handover.h"
#include "migration/source/source.h"
#include "transport/registry.h"

/* ---- the guest's process ends ---- */

/* The source's guest is needed no more, only its RAM, and that is mapped here. With the lock
 * held. */
static void source_guest_died(PrSession *session, const char *reason)
{
	g_autofree char *here = g_strdup_printf(
		"%s; its RAM is kept by this engine, which must not end: the migration goes on",
		reason);
	g_autofree char *there = g_strdup_printf(
		"the source's guest process is gone, its RAM is in its engine alone: %s", reason);

	pr_session_note_locked(session, here);
	if (session->conn)
		pr_send_reason_nowait(session->conn, PR_MSG_NOTE, there);
}

/* The destination's process was all of the guest. A recovery would bring memory that nobody needs,
 * so both sides stay paused until the operator acts. With the lock held. */
static void destination_guest_died(PrSession *session, const char *reason)
{
	g_autoptr(GError) error = g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
					      "the guest is gone at the destination: %s", reason);

	pr_session_set_paused_by_operator(session, TRUE);
	g_free(session->error_desc);
	session->error_desc = g_strdup(error->message);
	if (pr_session_failed_locked(session, error) == PR_ACTION_IGNORE)
		pr_session_note_locked(session, error->message);
}

static void guest_died(const char *reason, void *opaque)
{
	PrSession *session = opaque;
	g_autoptr(GError) error =
		g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_DIED, "the guest is gone: %s", reason);

	pr_session_lock(session);
	g_free(session->guest_gone);
	session->guest_gone = g_strdup(reason);
	g_cond_broadcast(&session->changed);
	if (pr_state_is_over(session->sm.state))
		g_message("%s", error->message);
	else if (!pr_state_is_postcopy(session->sm.state))
		pr_session_failed_locked(session, error);
	else if (session->sm.role == PR_ROLE_SOURCE)
		source_guest_died(session, reason);
	else
		destination_guest_died(session, reason);
	pr_session_unlock(session);
}

/* ---- life ---- */

PrMigration *pr_migration_new(PrGuest *guest, PrParams *params, const PrMigrationHooks *hooks)
{
	PrMigration *m = g_new0(PrMigration, 1);

	pr_session_init(&m->session, guest, params, hooks);
	pr_source_init(&m->source, &m->session);
	pr_destination_init(&m->destination, &m->session);
	guest->ops->on_death(guest, guest_died, &m->session);
	guest->ops->on_run_again(guest, pr_source_ran_again, &m->source);
	return m;
}

PrWatchdog *pr_migration_watchdog(PrMigration *m)
{
	return m->session.watchdog;
}

void pr_migration_secure(PrMigration *m, const PrSecurity *security)
{
	m->session.security = *security;
}

/* Ends what the owner is doing: what may be cancelled is cancelled, all else is paused. */
static void quit(PrSession *session)
{
	g_autoptr(GError) cancelled = g_error_new_literal(
		PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_CANCELLED, "the engine quits");
	g_autoptr(GError) left =
		g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "the engine quits");

	pr_session_lock(session);
	session->quit = TRUE;
	/* A destination that is paused before it has seen RUN could be cancelled. But RUN may have
	 * been lost, and then nobody else has the guest. Only the operator may decide that, not
	 * whoever ends an engine. */
	pr_session_failed_locked(session,
				 pr_state_is_postcopy(session->sm.state) ? left : cancelled);
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);
}

void pr_migration_free(PrMigration *m)
{
	if (!m)
		return;
	PrSession *session = &m->session;

	quit(session);
	/* These threads accept lanes from the listeners, so the listeners end after them. A source
	 * that connects meanwhile is refused, or becomes a pending peer that nobody serves. */
	if (session->thread)
		g_thread_join(session->thread);
	if (session->previous_thread)
		g_thread_join(session->previous_thread);
	pr_conn_await_threads(session);
	pr_destination_stop_listening(&m->destination);
	session->guest->ops->on_death(session->guest, NULL, NULL);
	session->guest->ops->on_run_again(session->guest, NULL, NULL);
	pr_destination_clear(&m->destination);
	pr_conn_await_threads(session);
	pr_source_clear(&m->source);
	pr_session_clear(session);
	g_free(m);
}

/* ---- commands ---- */

static gboolean check_schemes(GPtrArray *uris, GError **error)
{
	for (guint i = 0; i < uris->len; i++) {
		PrUri *uri = g_ptr_array_index(uris, i);
		if (!pr_transport_find(uri->scheme, error)) {
			g_prefix_error(error, "path %s: ", uri->text);
			return FALSE;
		}
	}
	return TRUE;
}

static GPtrArray *parse_uris(const char *text, gboolean listening, GError **error)
{
	g_autoptr(GError) inner = NULL;
	g_autoptr(GPtrArray) uris = pr_uri_list_parse(text, listening, &inner);

	if (uris && check_schemes(uris, &inner))
		return g_steal_pointer(&uris);
	g_set_error_literal(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_URI, inner->message);
	return NULL;
}

gboolean pr_migration_start(PrMigration *m, const char *text, gboolean resume, GError **error)
{
	g_autoptr(GPtrArray) uris = parse_uris(text, /* listening= */ FALSE, error);

	if (!uris)
		return FALSE;
	return resume ? pr_source_recover_over(&m->source, uris, error)
		      : pr_source_start(&m->source, uris, error);
}

gboolean pr_migration_incoming(PrMigration *m, const char *text, GCancellable *cancel,
			       GError **error)
{
	if (!pr_destination_begin_listening(&m->destination, error))
		return FALSE;
	g_autoptr(GPtrArray) uris = parse_uris(text, /* listening= */ TRUE, error);
	gboolean done = uris && pr_destination_listen(&m->destination, uris, cancel, error);

	pr_destination_end_listening(&m->destination);
	return done;
}

gboolean pr_migration_recover(PrMigration *m, const char *text, GCancellable *cancel,
			      GError **error)
{
	if (!pr_destination_check_paused(&m->destination, error))
		return FALSE;
	g_autoptr(GPtrArray) uris = parse_uris(text, /* listening= */ TRUE, error);

	return uris && pr_destination_listen(&m->destination, uris, cancel, error);
}

gboolean pr_migration_pause(PrMigration *m, GError **error)
{
	PrSession *session = &m->session;
	g_autoptr(GError) asked = g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
						      "migrate_pause was asked for");

	pr_session_lock(session);
	gboolean paused = session->sm.state == PR_STATE_POSTCOPY_PAUSED;
	/* Pausing a paused migration keeps it from recovering by itself. */
	gboolean fit =
		pr_state_is_postcopy(session->sm.state) && !(paused && session->paused_by_operator);
	if (fit) {
		pr_session_set_paused_by_operator(session, TRUE);
		pr_session_failed_locked(session, asked);
	} else {
		pr_session_set_state_error(session, "migrate_pause",
					   "only a migration in postcopy can be paused", error);
	}
	pr_session_unlock(session);
	return fit;
}

gboolean pr_migration_cancel(PrMigration *m, GError **error)
{
	PrSession *session = &m->session;
	g_autoptr(GError) cancelled = g_error_new_literal(
		PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_CANCELLED, "migrate_cancel was asked for");

	pr_session_lock(session);
	/* As in QEMU, cancelling a migration that has ended is no error. */
	PrAction action = pr_state_is_over(session->sm.state)
				  ? PR_ACTION_IGNORE
				  : pr_session_failed_locked(session, cancelled);
	if (action == PR_ACTION_REFUSE)
		pr_session_set_state_error(
			session, "migrate_cancel",
			"the guest runs on the destination already; migrate_pause pauses the "
			"migration, migrate -r resumes it",
			error);
	pr_session_unlock(session);
	return action != PR_ACTION_REFUSE;
}
