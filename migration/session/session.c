/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/session/session.h"

#include "migration/memory/state-memfd.h"
#include "migration/session/connection.h"
#include "migration/session/messages.h"
#include "util/try-alloc.h"

void pr_session_init(PrSession *session, PrGuest *guest, PrParams *params,
		     const PrMigrationHooks *hooks)
{
	session->guest = guest;
	session->params = params;
	g_mutex_init(&session->lock);
	g_cond_init(&session->changed);
	pr_events_init(&session->events, hooks);
	pr_path_table_init(&session->paths, &session->events, &session->changed);
	session->standbys = g_ptr_array_new();
	session->cancel = g_cancellable_new();
	session->watchdog = pr_watchdog_new();
	pr_watchdog_start(session->watchdog);
}

void pr_session_clear(PrSession *session)
{
	pr_watchdog_free(session->watchdog);
	pr_ram_free(session->ram);
	g_ptr_array_unref(session->standbys);
	pr_path_table_clear(&session->paths);
	pr_events_clear(&session->events);
	g_clear_error(&session->failure);
	g_object_unref(session->cancel);
	g_free(session->reason);
	g_free(session->error_desc);
	g_free(session->guest_gone);
	g_free(session->fence.refused);
	g_free(session->fence.ran_again);
	g_mutex_clear(&session->lock);
	g_cond_clear(&session->changed);
}

void pr_session_lock(PrSession *session)
{
	g_mutex_lock(&session->lock);
}

void pr_session_unlock(PrSession *session)
{
	pr_events_flush(&session->events, &session->lock);
	g_mutex_unlock(&session->lock);
}

void pr_session_hold_events(PrSession *session)
{
	session->events.n_holds++;
}

void pr_session_release_events(PrSession *session)
{
	pr_session_lock(session);
	session->events.n_holds--;
	pr_session_unlock(session);
}

/* ---- state ---- */

static void note_state(PrSession *session, PrState old, const char *reason)
{
	PrState state = session->sm.state;

	g_info("%s -> %s (%s)", pr_state_name(old), pr_state_name(state), reason);
	g_free(session->reason);
	session->reason = g_strdup(reason);
	pr_events_queue_state(&session->events, state, reason);
	g_cond_broadcast(&session->changed);
}

static uint64_t pages_in_place(const PrSession *session)
{
	return session->sm.role == PR_ROLE_DESTINATION
		       ? pr_ram_received_bytes(session->ram) / PR_TARGET_PAGE
		       : session->progress.received_pages;
}

PrAction pr_session_step_locked(PrSession *session, PrEvent event, PrRole role, const char *reason)
{
	PrState old = session->sm.state;
	PrAction action = pr_state_step(&session->sm, event, role, g_get_monotonic_time());

	if (action == PR_ACTION_REFUSE)
		g_debug("event %s has no place in state %s", pr_event_name(event),
			pr_state_name(old));
	if (session->sm.state == old)
		return action;
	if (session->sm.state == PR_STATE_POSTCOPY_PAUSED && old == PR_STATE_POSTCOPY_ACTIVE)
		session->pages_at_pause = pages_in_place(session);
	note_state(session, old, reason);
	return action;
}

void pr_session_restore_locked(PrSession *session, PrRole role, PrState state, gboolean run,
			       const char *reason)
{
	pr_state_restore(&session->sm, role, state, run, g_get_monotonic_time());
	note_state(session, PR_STATE_NONE, reason);
}

gboolean pr_session_step(PrSession *session, PrEvent event, const char *reason, GError **error)
{
	pr_session_lock(session);
	PrAction action = pr_session_step_locked(session, event, session->sm.role, reason);
	gboolean done = action != PR_ACTION_REFUSE && action != PR_ACTION_IGNORE;
	if (!done)
		pr_session_copy_failure(session, error);
	pr_session_unlock(session);
	return done;
}

void pr_session_set_paused_by_operator(PrSession *session, gboolean paused)
{
	session->paused_by_operator = paused;
	if (session->sm.role == PR_ROLE_DESTINATION && session->ram && session->ram->state_memfd)
		pr_state_memfd_set_paused_by_operator(session->ram->state_memfd, paused);
}

void pr_session_note_locked(PrSession *session, const char *what)
{
	g_warning("%s", what);
	note_state(session, session->sm.state, what);
}

void pr_session_alarm_locked(PrSession *session, const char *what)
{
	g_critical("%s", what);
	note_state(session, session->sm.state, what);
}

PrState pr_session_state(PrSession *session)
{
	pr_session_lock(session);
	PrState state = session->sm.state;
	pr_session_unlock(session);
	return state;
}

void pr_session_set_state_error(const PrSession *session, const char *command, const char *hint,
				GError **error)
{
	gboolean busy = !pr_state_is_over(session->sm.state);

	g_set_error(error, PR_MIGRATION_ERROR,
		    busy ? PR_MIGRATION_ERROR_BUSY : PR_MIGRATION_ERROR_STATE,
		    "%s: not possible while the migration is %s; %s", command,
		    pr_state_name(session->sm.state), hint);
}

/* ---- failures ---- */

/* Adds what travelled since the last path was closed to this path's record. With the lock held. */
static void account_bytes(PrSession *session, PrConn *conn)
{
	const GPtrArray *records = session->paths.records;
	PrPathRecord *own = pr_path_record(&session->paths, conn->name);
	uint64_t all = pr_session_transferred(session), others = 0;

	for (guint i = 0; i < records->len; i++)
		others += pr_path_bytes(g_ptr_array_index(records, i));
	__atomic_fetch_add(&own->bytes, all - MIN(all, others), __ATOMIC_RELAXED);
}

void pr_session_detach_conn(PrSession *session)
{
	if (session->conn)
		account_bytes(session, session->conn);
	session->conn = NULL;
}

static PrEvent event_of(const GError *error)
{
	if (error->domain == PR_PATH_ERROR || error->domain == PR_RESOURCE_ERROR)
		return PR_EVENT_PATH_LOST;
	if (g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_CANCELLED))
		return PR_EVENT_CANCEL;
	if (g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PEER))
		return PR_EVENT_GIVEN_UP;
	return PR_EVENT_ERROR;
}

/* The peer has reported this failure itself. */
static gboolean is_known_to_peer(const GError *error)
{
	return g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_PEER) ||
	       g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_PAUSED_BY_OPERATOR) ||
	       g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PEER);
}

static void tell_peer(PrSession *session, PrAction action, const GError *error)
{
	uint16_t type = action == PR_ACTION_UNDO      ? PR_MSG_ERROR
			: session->paused_by_operator ? PR_MSG_HOLD
						      : PR_MSG_PAUSE;

	pr_send_reason_nowait(session->conn, type, error->message);
	/* The path in use may be what is broken: the standbys carry the news, too. */
	pr_send_lost_nowait(session, session->conn->epoch, error);
}

/* Tells the peer, if that can be done without waiting, and shuts everything down. */
static void cut(PrSession *session, PrAction action, const GError *error)
{
	const PrGuestOps *guest = session->guest->ops;

	g_cancellable_cancel(session->cancel);
	if (session->sm.role == PR_ROLE_DESTINATION && action == PR_ACTION_UNDO)
		guest->load_abort(session->guest);
	if (!session->conn)
		return;
	if (!is_known_to_peer(error))
		tell_peer(session, action, error);
	pr_control_shutdown(session->conn->control, error);
	if (session->conn->path)
		session->conn->path->ops->shutdown(session->conn->path);
}

PrAction pr_session_failed_locked(PrSession *session, const GError *error)
{
	PrEvent event = event_of(error);
	PrAction action = pr_session_step_locked(session, event, session->sm.role, error->message);

	if (action != PR_ACTION_REFUSE &&
	    g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_PAUSED_BY_OPERATOR)) {
		pr_session_set_paused_by_operator(session, TRUE);
		g_cond_broadcast(&session->changed);
	}
	if (action != PR_ACTION_UNDO && action != PR_ACTION_PAUSE)
		return action;
	if (!session->failure)
		session->failure = g_error_copy(error);
	if (session->sm.state == PR_STATE_FAILING && !session->error_desc)
		session->error_desc = g_strdup(error->message);
	if (session->conn)
		pr_path_ended(&session->paths, session->conn->name, error);
	cut(session, action, error);
	/* Later failures of this connection say nothing new. Its owner still has it, and closes
	 * it. */
	pr_session_detach_conn(session);
	return action;
}

void pr_session_failed(PrSession *session, PrConn *from, const GError *error)
{
	pr_session_lock(session);
	if (!from || session->conn == from)
		pr_session_failed_locked(session, error);
	pr_session_unlock(session);
}

void pr_session_attempt_failed(PrSession *session, const GError *error)
{
	pr_session_lock(session);
	if (!session->failure)
		pr_session_failed_locked(session, error);
	pr_session_unlock(session);
}

gboolean pr_session_attempt_has_failed(PrSession *session)
{
	pr_session_lock(session);
	gboolean failed = session->failure != NULL;
	pr_session_unlock(session);
	return failed;
}

void pr_session_copy_failure(PrSession *session, GError **error)
{
	if (session->failure)
		g_propagate_error(error, g_error_copy(session->failure));
	else
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
			    "the migration is %s (%s)", pr_state_name(session->sm.state),
			    session->reason ? session->reason : "no reason given");
}

void pr_session_begin_attempt(PrSession *session)
{
	g_clear_error(&session->failure);
	g_object_unref(session->cancel);
	session->cancel = g_cancellable_new();
}

/* ---- what has travelled ---- */

uint64_t pr_session_transferred(PrSession *session)
{
	const PrRam *ram = session->ram;

	if (session->sm.role == PR_ROLE_SOURCE)
		return session->progress.postcopy_bytes;
	return ram ? pr_ram_received_bytes(ram) - pr_ram_zero_bytes(ram) : 0;
}

void pr_session_sample_rate(PrSession *session, uint64_t bytes, gint64 now)
{
	PrRate *rate = &session->rate;
	guint last = (rate->next + PR_RATE_SAMPLES - 1) % PR_RATE_SAMPLES;

	if (rate->time[last] != 0 && now - rate->time[last] < G_USEC_PER_SEC / 12)
		return;
	rate->time[rate->next] = now;
	rate->bytes[rate->next] = bytes;
	rate->next = (rate->next + 1) % PR_RATE_SAMPLES;
}

double pr_session_rate(const PrSession *session, uint64_t bytes, gint64 now)
{
	const PrRate *rate = &session->rate;

	for (guint i = 0; i < PR_RATE_SAMPLES; i++) {
		guint at = (rate->next + i) % PR_RATE_SAMPLES;
		gint64 age = now - rate->time[at];

		if (rate->time[at] == 0 || age > 1500 * 1000 || rate->bytes[at] > bytes)
			continue;
		return age > 0 ? (double)(bytes - rate->bytes[at]) * G_USEC_PER_SEC / (double)age
			       : 0;
	}
	return 0;
}

/* ---- the write protection of the source's RAM ---- */

gboolean pr_session_lift_fence(PrSession *session)
{
	g_autoptr(GError) error = NULL;

	/* A guest whose process has ended has no protected RAM. */
	if (session->guest->ops->unfence(session->guest, &error) ||
	    g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED))
		return TRUE;
	g_warning("the write protection of the guest's RAM could not be lifted: %s",
		  error->message);
	return FALSE;
}

void pr_session_forget_fence(PrSession *session)
{
	pr_session_lift_fence(session);
	pr_session_lock(session);
	session->fence.state = PR_FENCE_NONE;
	g_clear_pointer(&session->fence.refused, g_free);
	g_clear_pointer(&session->fence.ran_again, g_free);
	pr_session_unlock(session);
}

/* ---- threads ---- */

gboolean pr_session_start_thread(PrSession *session, const char *name, GThreadFunc func,
				 gpointer opaque, GError **error)
{
	pr_session_lock(session);
	session->thread = pr_thread_try(name, func, opaque, error);
	gboolean started = session->thread != NULL;
	pr_session_unlock(session);
	return started;
}

void pr_session_spawn(PrSession *session, const char *name, GThreadFunc func, gpointer opaque)
{
	pr_session_lock(session);
	session->n_threads++;
	pr_session_unlock(session);
	GThread *thread = g_thread_try_new(name, func, opaque, NULL);
	if (thread)
		g_thread_unref(thread);
	else
		func(opaque);
}

void pr_session_thread_ends(PrSession *session)
{
	pr_session_lock(session);
	session->n_threads--;
	g_cond_broadcast(&session->changed);
	/* Not pr_session_unlock(): the migration may be freed as soon as the lock is released. */
	g_mutex_unlock(&session->lock);
}
