/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The migration's interface to the monitor, and what source and destination have in common. */
#include "migration/migration.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "migration/session/session.h"
#include "util/try-alloc.h"

G_DEFINE_QUARK(pr_migration_error, pr_migration_error)

/* Of a change of state, or of a path. */
typedef struct PrNotice {
	PrState state;
	char *path; /* NULL: a change of state */
	PrPathState path_state;
	char *device;
	char *reason;
} PrNotice;

static void notice_free(PrNotice *notice)
{
	g_free(notice->path);
	g_free(notice->device);
	g_free(notice->reason);
	g_free(notice);
}

static gint64 now_us(void)
{
	return g_get_monotonic_time();
}

/* ---- changes of state ---- */

static void queue_state_event(PrMigration *m, PrState old, const char *reason)
{
	PrNotice *notice = g_new(PrNotice, 1);

	g_info("%s -> %s (%s)", pr_state_name(old), pr_state_name(m->sm.state), reason);
	g_free(m->reason);
	m->reason = g_strdup(reason);
	*notice = (PrNotice){.state = m->sm.state, .reason = g_strdup(reason)};
	g_queue_push_tail(&m->notices, notice);
	g_cond_broadcast(&m->changed);
}

PrAction pr_migration_step_locked(PrMigration *m, PrEvent event, PrRole role, const char *reason)
{
	PrState old = m->sm.state;
	PrAction action = pr_state_step(&m->sm, event, role, now_us());

	if (action == PR_ACTION_REFUSE)
		g_debug("event %s has no place in state %s", pr_event_name(event),
			pr_state_name(old));
	if (m->sm.state == old)
		return action;
	if (m->sm.state == PR_STATE_POSTCOPY_PAUSED && old == PR_STATE_POSTCOPY_ACTIVE)
		m->pages_at_pause = (m->sm.role == PR_ROLE_DESTINATION
					     ? pr_ram_received_bytes(m->ram) / PR_TARGET_PAGE
					     : m->progress.received_pages);
	queue_state_event(m, old, reason);
	return action;
}

void pr_migration_restore_locked(PrMigration *m, PrRole role, PrState state, gboolean run,
				 const char *reason)
{
	pr_state_restore(&m->sm, role, state, run, now_us());
	queue_state_event(m, PR_STATE_NONE, reason);
}

void pr_migration_note_path(PrMigration *m, const PrPathRecord *record, const char *reason)
{
	PrNotice *notice = g_new(PrNotice, 1);

	*notice = (PrNotice){
		.path = g_strdup(record->name),
		.path_state = record->health.state,
		.device = g_strdup(record->device),
		.reason = g_strdup(reason),
	};
	g_queue_push_tail(&m->notices, notice);
}

static void tell(PrMigration *m, const PrNotice *notice)
{
	const PrMigrationHooks *hooks = &m->hooks;

	if (!notice->path)
		hooks->on_state(notice->state, notice->reason, hooks->opaque);
	else if (hooks->on_path)
		hooks->on_path(notice->path, notice->path_state, notice->device, notice->reason,
			       hooks->opaque);
}

void pr_session_flush_events(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	while (!m->notifying && !g_queue_is_empty(&m->notices)) {
		PrNotice *notice = g_queue_pop_head(&m->notices);
		m->notifying = TRUE;
		g_mutex_unlock(&m->lock);
		tell(m, notice);
		notice_free(notice);
		g_mutex_lock(&m->lock);
		m->notifying = FALSE;
	}
	g_mutex_unlock(&m->lock);
}

void pr_migration_copy_failure(PrMigration *m, GError **error)
{
	if (m->failure)
		g_propagate_error(error, g_error_copy(m->failure));
	else
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
			    "the migration is %s (%s)", pr_state_name(m->sm.state),
			    m->reason ? m->reason : "no reason given");
}

gboolean pr_migration_step(PrMigration *m, PrEvent event, const char *reason, GError **error)
{
	g_mutex_lock(&m->lock);
	PrAction action = pr_migration_step_locked(m, event, m->sm.role, reason);
	gboolean done = action != PR_ACTION_REFUSE && action != PR_ACTION_IGNORE;
	if (!done)
		pr_migration_copy_failure(m, error);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return done;
}

/* ---- failures ---- */

/* Adds what travelled since the last path was closed to this path's record. With the lock held. */
static void account_bytes(PrMigration *m, PrConn *conn)
{
	uint64_t others = 0;
	PrPathRecord *own = pr_path_record(m, conn->name);

	for (guint i = 0; i < m->records->len; i++)
		others += pr_path_bytes(g_ptr_array_index(m->records, i));
	uint64_t all = pr_migration_transferred(m);
	__atomic_fetch_add(&own->bytes, all - MIN(all, others), __ATOMIC_RELAXED);
}

void pr_session_detach_conn(PrMigration *m)
{
	if (m->conn)
		account_bytes(m, m->conn);
	m->conn = NULL;
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

void pr_send_reason_nowait(PrConn *conn, uint16_t type, const char *reason)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_reason_encode(body, reason);
	pr_control_send_nowait(conn->control, type, body);
}

/* Tells the peer, if that can be done without waiting, and shuts everything down. */
static void cut(PrMigration *m, PrAction action, const GError *error)
{
	g_cancellable_cancel(m->cancel);
	if (m->sm.role == PR_ROLE_DESTINATION && action == PR_ACTION_UNDO)
		m->guest->ops->load_abort(m->guest);
	if (!m->conn)
		return;
	/* What the peer told us it need not hear back. */
	if (!g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_PEER) &&
	    !g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_HELD) &&
	    !g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PEER)) {
		pr_send_reason_nowait(m->conn,
				      action == PR_ACTION_UNDO ? PR_MSG_ERROR
				      : m->held		       ? PR_MSG_HOLD
							       : PR_MSG_PAUSE,
				      error->message);
		/* The path itself may be what is broken. */
		pr_standby_tell_lost(m, m->conn->epoch, error);
	}
	pr_control_shutdown(m->conn->control, error);
	if (m->conn->path)
		m->conn->path->ops->shutdown(m->conn->path);
}

void pr_migration_set_held(PrMigration *m, gboolean held)
{
	m->held = held;
	if (m->sm.role == PR_ROLE_DESTINATION && m->ram && m->ram->state_memfd)
		pr_state_memfd_set_held(m->ram->state_memfd, held);
}

PrAction pr_migration_failed_locked(PrMigration *m, const GError *error)
{
	PrEvent event = event_of(error);
	PrAction action = pr_migration_step_locked(m, event, m->sm.role, error->message);

	if (action != PR_ACTION_REFUSE &&
	    g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_HELD)) {
		pr_migration_set_held(m, TRUE);
		g_cond_broadcast(&m->changed);
	}
	if (action != PR_ACTION_UNDO && action != PR_ACTION_PAUSE)
		return action;
	if (!m->failure)
		m->failure = g_error_copy(error);
	if (m->sm.state == PR_STATE_FAILING && !m->error_desc)
		m->error_desc = g_strdup(error->message);
	if (m->conn)
		pr_path_ended(m, m->conn->name, error);
	cut(m, action, error);
	/* What else is heard of this connection is old news. Its owner still has it, and closes it. */
	pr_session_detach_conn(m);
	return action;
}

void pr_migration_failed(PrMigration *m, PrConn *from, const GError *error)
{
	g_mutex_lock(&m->lock);
	if (!from || m->conn == from)
		pr_migration_failed_locked(m, error);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

void pr_attempt_failed(PrMigration *m, const GError *error)
{
	g_mutex_lock(&m->lock);
	if (!m->failure)
		pr_migration_failed_locked(m, error);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

gboolean pr_attempt_has_failed(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	gboolean failed = m->failure != NULL;
	g_mutex_unlock(&m->lock);
	return failed;
}

/* The source's guest is needed no more, only its RAM, and that is mapped here. With the lock held. */
static void source_guest_died(PrMigration *m, const char *reason)
{
	g_autofree char *here = g_strdup_printf(
		"%s; its RAM is kept by this engine, which must not end: the migration goes on",
		reason);
	g_autofree char *there = g_strdup_printf(
		"the source's guest process is gone, its RAM is in its engine alone: %s", reason);

	pr_migration_note_locked(m, here);
	if (m->conn)
		pr_send_reason_nowait(m->conn, PR_MSG_NOTE, there);
}

/* The destination's is all there was of the guest. A recovery would bring memory that nobody needs: both sides
 * are held, for a human. With the lock held. */
static void destination_guest_died(PrMigration *m, const char *reason)
{
	g_autoptr(GError) error = g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
					      "the guest is gone at the destination: %s", reason);

	pr_migration_set_held(m, TRUE);
	g_free(m->error_desc);
	m->error_desc = g_strdup(error->message);
	if (pr_migration_failed_locked(m, error) == PR_ACTION_IGNORE)
		pr_migration_note_locked(m, error->message);
}

static void guest_died(const char *reason, void *opaque)
{
	PrMigration *m = opaque;
	g_autoptr(GError) error =
		g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_DIED, "the guest is gone: %s", reason);

	g_mutex_lock(&m->lock);
	g_free(m->guest_gone);
	m->guest_gone = g_strdup(reason);
	g_cond_broadcast(&m->changed);
	if (pr_state_is_over(m->sm.state))
		g_message("%s", error->message);
	else if (!pr_state_is_postcopy(m->sm.state))
		pr_migration_failed_locked(m, error);
	else if (m->sm.role == PR_ROLE_SOURCE)
		source_guest_died(m, reason);
	else
		destination_guest_died(m, reason);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

/* ---- connections ---- */

void pr_migration_begin_attempt(PrMigration *m)
{
	g_clear_error(&m->failure);
	g_set_object(&m->cancel, NULL);
	m->cancel = g_cancellable_new();
	m->pong = 0;
	m->bitmaps_due = 0;
}

gboolean pr_send(PrConn *conn, uint16_t type, GByteArray *body, GError **error)
{
	return pr_control_send_bytes(conn->control, type, body, error);
}

void pr_migration_note_locked(PrMigration *m, const char *what)
{
	g_warning("%s", what);
	queue_state_event(m, m->sm.state, what);
}

void pr_migration_alarm_locked(PrMigration *m, const char *what)
{
	g_critical("%s", what);
	queue_state_event(m, m->sm.state, what);
}

gboolean pr_take_note(PrMigration *m, const PrMsg *msg, const char *peer, GError **error)
{
	char reason[PR_REASON_MAX + 1];
	g_autofree char *what = NULL;

	if (!pr_reason_decode(msg->body, msg->length, reason, error))
		return FALSE;
	what = g_strdup_printf("the %s says: %s", peer, reason);
	g_mutex_lock(&m->lock);
	pr_migration_note_locked(m, what);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return TRUE;
}

gboolean pr_take_reason(const PrMsg *msg, const char *peer, GError **error)
{
	char reason[PR_REASON_MAX + 1];

	if (!pr_reason_decode(msg->body, msg->length, reason, error))
		return FALSE;
	if (msg->type == PR_MSG_ERROR)
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PEER,
			    "the %s has given up: %s", peer, reason);
	else
		g_set_error(error, PR_PATH_ERROR,
			    msg->type == PR_MSG_HOLD ? PR_PATH_ERROR_HELD : PR_PATH_ERROR_PEER,
			    "the %s has paused: %s", peer, reason);
	return FALSE;
}

void pr_pending_peer_free(PrPendingPeer *pending_peer)
{
	if (!pending_peer)
		return;
	pr_control_free(pending_peer->control);
	if (pending_peer->standby)
		pr_conn_close(pending_peer->standby);
	pr_hello_clear(&pending_peer->hello);
	g_free(pending_peer);
}

/* ---- life ---- */

PrMigration *pr_migration_new(PrGuest *guest, PrParams *params, const PrMigrationHooks *hooks)
{
	PrMigration *m = g_new0(PrMigration, 1);

	m->guest = guest;
	m->params = params;
	m->hooks = *hooks;
	g_mutex_init(&m->refusals.lock);
	g_mutex_init(&m->pull_lock);
	g_mutex_init(&m->lock);
	g_cond_init(&m->changed);
	g_queue_init(&m->notices);
	m->records = g_ptr_array_new_with_free_func(pr_path_record_free);
	m->listeners = g_ptr_array_new();
	m->standbys = g_ptr_array_new();
	m->keepers = g_ptr_array_new();
	m->cancel = g_cancellable_new();
	m->uffd = -1;
	m->watchdog = pr_watchdog_new();
	pr_watchdog_start(m->watchdog);
	guest->ops->on_death(guest, guest_died, m);
	guest->ops->on_run_again(guest, pr_source_ran_again, m);
	return m;
}

PrWatchdog *pr_migration_watchdog(PrMigration *m)
{
	return m->watchdog;
}

void pr_migration_secure(PrMigration *m, const PrSecurity *security)
{
	m->security = *security;
}

/* Ends what the owner is doing: what may be cancelled is, what may not is paused. */
static void quit(PrMigration *m)
{
	g_autoptr(GError) cancelled = g_error_new_literal(
		PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_CANCELLED, "the engine quits");
	g_autoptr(GError) left =
		g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "the engine quits");

	g_mutex_lock(&m->lock);
	m->quit = TRUE;
	/* A destination that is paused before it has seen RUN could be cancelled. But RUN may have been lost, and
	 * then nobody else has the guest: that is for a human to say, not for who ends an engine. */
	pr_migration_failed_locked(m, pr_state_is_postcopy(m->sm.state) ? left : cancelled);
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

void pr_migration_free(PrMigration *m)
{
	if (!m)
		return;
	quit(m);
	/* Listeners are what these threads accept lanes from. Whoever comes in meanwhile is turned away, or is
	 * a pending_peer that nobody serves. */
	if (m->thread)
		g_thread_join(m->thread);
	if (m->previous_thread)
		g_thread_join(m->previous_thread);
	pr_migration_await_threads(m);
	for (guint i = 0; i < m->listeners->len; i++)
		pr_listener_free(g_ptr_array_index(m->listeners, i));
	m->guest->ops->on_death(m->guest, NULL, NULL);
	m->guest->ops->on_run_again(m->guest, NULL, NULL);
	pr_pending_peer_free(m->pending_peer);
	pr_migration_await_threads(m);
	pr_watchdog_free(m->watchdog);
	pr_ram_free(m->ram);
	pr_source_forget(m);
	pr_handover_record_free(m->record);
	pr_blocktime_free(m->times);
	g_clear_pointer(&m->uris, g_ptr_array_unref);
	g_ptr_array_unref(m->listeners);
	g_ptr_array_unref(m->records);
	g_ptr_array_unref(m->standbys);
	g_ptr_array_unref(m->keepers);
	g_clear_error(&m->failure);
	g_object_unref(m->cancel);
	g_queue_clear_full(&m->notices, (GDestroyNotify)notice_free);
	g_free(m->reason);
	g_free(m->error_desc);
	g_free(m->guest_gone);
	g_free(m->guest_process);
	g_free(m->unfenced);
	g_free(m->ran_again);
	g_free(m->last_path);
	g_free(m->last_corrupt);
	g_free(m->claimed);
	g_mutex_clear(&m->refusals.lock);
	g_mutex_clear(&m->pull_lock);
	g_mutex_clear(&m->lock);
	g_cond_clear(&m->changed);
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

static void set_state_error(PrMigration *m, const char *command, const char *hint, GError **error)
{
	gboolean busy = !pr_state_is_over(m->sm.state);

	g_set_error(error, PR_MIGRATION_ERROR,
		    busy ? PR_MIGRATION_ERROR_BUSY : PR_MIGRATION_ERROR_STATE,
		    "%s: not possible while the migration is %s; %s", command,
		    pr_state_name(m->sm.state), hint);
}

/* A new migration: a fresh identity. With the lock held. */
static void become_source(PrMigration *m)
{
	if (getentropy(m->binding.uuid, PR_UUID_BYTES) < 0 ||
	    getentropy(m->binding.secret, PR_SECRET_BYTES) < 0)
		g_error("getentropy: %s", g_strerror(errno));
	m->binding.uuid[6] = (m->binding.uuid[6] & 0x0f) | 0x40; /* RFC 4122, version 4 */
	m->binding.uuid[8] = (m->binding.uuid[8] & 0x3f) | 0x80;
	m->binding.epoch = 0;
	memset(&m->progress, 0, sizeof(m->progress));
	m->pages_at_pause = 0;
	pr_migration_set_held(m, FALSE);
	g_clear_pointer(&m->error_desc, g_free);
}

static gboolean start_locked(PrMigration *m, GPtrArray *uris, GError **error)
{
	if (pr_migration_step_locked(m, PR_EVENT_START, PR_ROLE_SOURCE, "migrate was asked for") ==
	    PR_ACTION_REFUSE) {
		set_state_error(m, "migrate",
				m->sm.state == PR_STATE_COMPLETED
					? "this guest has moved to the destination"
					: "wait for it, cancel it (migrate_cancel) or, when it is "
					  "paused, resume it (migrate -r)",
				error);
		return FALSE;
	}
	become_source(m);
	g_clear_pointer(&m->uris, g_ptr_array_unref);
	m->uris = g_ptr_array_ref(uris);
	m->n_asked = uris->len;
	m->resume = PR_RESUME_NO;
	pr_migration_begin_attempt(m);
	return TRUE;
}

static gboolean is_listed(GPtrArray *uris, const PrUri *uri)
{
	for (guint i = 0; i < uris->len; i++)
		if (strcmp(((PrUri *)g_ptr_array_index(uris, i))->text, uri->text) == 0)
			return TRUE;
	return FALSE;
}

/* These first, then what was listed before. With the lock held. */
static void prefer_uris(PrMigration *m, GPtrArray *uris)
{
	GPtrArray *all = g_ptr_array_new_with_free_func((GDestroyNotify)pr_uri_free);

	for (guint i = 0; i < uris->len; i++)
		g_ptr_array_add(all, pr_uri_copy(g_ptr_array_index(uris, i)));
	for (guint i = 0; i < m->uris->len; i++)
		if (!is_listed(uris, g_ptr_array_index(m->uris, i)))
			g_ptr_array_add(all, pr_uri_copy(g_ptr_array_index(m->uris, i)));
	m->n_asked = uris->len;
	g_ptr_array_unref(m->uris);
	m->uris = all;
}

static gboolean resume_locked(PrMigration *m, GPtrArray *uris, GError **error)
{
	gboolean mine = m->sm.role == PR_ROLE_SOURCE;
	g_autoptr(GError) outranked = g_error_new_literal(
		PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "migrate -r was asked for");

	/* A human's word ends an automatic attempt. */
	if (mine && m->resume == PR_RESUME_AUTOMATIC &&
	    (m->sm.state == PR_STATE_POSTCOPY_RECOVER_SETUP ||
	     m->sm.state == PR_STATE_POSTCOPY_RECOVER))
		pr_migration_failed_locked(m, outranked);
	if (!mine || pr_migration_step_locked(m, PR_EVENT_RESUME, PR_ROLE_SOURCE,
					      "a recovery was asked for") == PR_ACTION_REFUSE) {
		set_state_error(m, "migrate -r",
				mine ? "there is nothing to resume unless it is postcopy-paused"
				     : "give it on the source",
				error);
		return FALSE;
	}
	m->resume = PR_RESUME_ASKED;
	pr_migration_set_held(m, FALSE);
	prefer_uris(m, uris);
	return TRUE;
}

/* The last owner of an ended migration may still be closing its connection, which nobody waits for in the main
 * loop: the new one does. */
static gboolean begin_source(PrMigration *m, GThread *old, GError **error)
{
	g_autoptr(GError) why = NULL;

	g_mutex_lock(&m->lock);
	if (old)
		m->previous_thread = old;
	m->thread = pr_thread_try("migration", pr_source_thread, m, &why);
	gboolean begun = m->thread != NULL;
	if (!begun) {
		g_autoptr(GError) failure = g_error_new_literal(
			PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM, why->message);

		pr_migration_failed_locked(m, failure);
		pr_migration_step_locked(m, PR_EVENT_CLEANED_UP, PR_ROLE_SOURCE,
					 "the guest runs on at the source");
		g_propagate_error(error, g_steal_pointer(&failure));
	}
	g_mutex_unlock(&m->lock);
	return begun;
}

gboolean pr_migration_start(PrMigration *m, const char *text, gboolean resume, GError **error)
{
	g_autoptr(GPtrArray) uris = parse_uris(text, /* listening= */ FALSE, error);

	if (!uris)
		return FALSE;
	g_mutex_lock(&m->lock);
	gboolean done = resume ? resume_locked(m, uris, error) : start_locked(m, uris, error);
	GThread *old = done && !resume ? g_steal_pointer(&m->thread) : NULL;
	g_mutex_unlock(&m->lock);
	if (!done)
		return FALSE;
	if (!resume)
		done = begin_source(m, old, error);
	pr_session_flush_events(m);
	return done;
}

static gboolean add_listener(PrMigration *m, const PrUri *uri, GCancellable *cancel, GError **error)
{
	g_autoptr(GError) inner = NULL;
	PrListener *listener =
		pr_listener_new(uri, &m->security,
				(guint)pr_param(m->params, PR_PARAM_HANDSHAKE_TIMEOUT),
				pr_destination_hello, m, cancel, &inner);

	if (!listener) {
		g_set_error_literal(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_LISTEN,
				    inner->message);
		return FALSE;
	}
	g_mutex_lock(&m->lock);
	g_ptr_array_add(m->listeners, listener);
	pr_path_step(m, pr_listener_uri(listener)->text, PR_HEALTH_LISTENS, "listening");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	g_message("listening on %s", pr_listener_uri(listener)->text);
	return TRUE;
}

static gboolean add_listeners(PrMigration *m, const char *text, GCancellable *cancel,
			      GError **error)
{
	g_autoptr(GPtrArray) uris = parse_uris(text, /* listening= */ TRUE, error);

	if (!uris)
		return FALSE;
	for (guint i = 0; i < uris->len; i++)
		if (!add_listener(m, g_ptr_array_index(uris, i), cancel, error))
			return FALSE;
	return TRUE;
}

gboolean pr_migration_incoming(PrMigration *m, const char *text, GCancellable *cancel,
			       GError **error)
{
	g_mutex_lock(&m->lock);
	/* A destination without a listener follows an engine that has died. */
	gboolean fresh = m->listeners->len == 0 && !m->opening &&
			 (m->sm.state == PR_STATE_NONE || m->sm.role == PR_ROLE_DESTINATION);
	if (!fresh)
		set_state_error(m, "migrate_incoming",
				m->opening ? "another one is about to listen; wait for its answer"
				: m->listeners->len > 0
					? "this side is listening already"
					: "it is only for a side that has done nothing yet",
				error);
	else if (!m->thread)
		m->thread = pr_thread_try("load", pr_load_thread, m, error);
	fresh = fresh && m->thread;
	if (fresh)
		m->opening = TRUE;
	g_mutex_unlock(&m->lock);
	if (!fresh)
		return FALSE;
	gboolean done = add_listeners(m, text, cancel, error);
	g_mutex_lock(&m->lock);
	m->opening = FALSE;
	g_mutex_unlock(&m->lock);
	return done;
}

gboolean pr_migration_recover(PrMigration *m, const char *text, GCancellable *cancel,
			      GError **error)
{
	g_mutex_lock(&m->lock);
	gboolean fit = m->sm.role == PR_ROLE_DESTINATION && m->sm.state == PR_STATE_POSTCOPY_PAUSED;
	if (!fit)
		set_state_error(m, "migrate_recover",
				m->sm.role == PR_ROLE_SOURCE
					? "it is for the destination; on the source use migrate -r"
					: "it is only for a migration that is postcopy-paused",
				error);
	g_mutex_unlock(&m->lock);
	return fit && add_listeners(m, text, cancel, error);
}

gboolean pr_migration_pause(PrMigration *m, GError **error)
{
	g_autoptr(GError) asked = g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
						      "migrate_pause was asked for");

	g_mutex_lock(&m->lock);
	gboolean paused = m->sm.state == PR_STATE_POSTCOPY_PAUSED;
	/* Pausing what is paused keeps it from recovering by itself. */
	gboolean fit = pr_state_is_postcopy(m->sm.state) && !(paused && m->held);
	if (fit) {
		pr_migration_set_held(m, TRUE);
		pr_migration_failed_locked(m, asked);
	}
	if (!fit)
		set_state_error(m, "migrate_pause", "only a migration in postcopy can be paused",
				error);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return fit;
}

gboolean pr_migration_cancel(PrMigration *m, GError **error)
{
	g_autoptr(GError) cancelled = g_error_new_literal(
		PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_CANCELLED, "migrate_cancel was asked for");

	g_mutex_lock(&m->lock);
	/* As in QEMU, cancelling what has ended already is no error. */
	PrAction action = pr_state_is_over(m->sm.state) ? PR_ACTION_IGNORE
							: pr_migration_failed_locked(m, cancelled);
	if (action == PR_ACTION_REFUSE)
		set_state_error(
			m, "migrate_cancel",
			"the guest runs on the destination already; migrate_pause pauses the "
			"migration, migrate -r resumes it",
			error);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return action != PR_ACTION_REFUSE;
}
