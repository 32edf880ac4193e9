/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/listen.h"

#include "migration/destination/admission.h"
#include "migration/destination/destination.h"
#include "migration/destination/standby.h"
#include "util/try-alloc.h"

void pr_destination_hello(PrControl *control, const PrHello *hello, PrListener *listener,
			  void *opaque)
{
	if (hello->role == PR_HELLO_SOURCE && hello->resume == PR_RESUME_STANDBY)
		pr_standby_admit(opaque, control, hello, listener);
	else
		pr_destination_admit(opaque, control, hello, listener);
}

static gboolean add_listener(PrDestination *destination, const PrUri *uri, GCancellable *cancel,
			     GError **error)
{
	PrSession *session = destination->session;
	guint handshake_ms = (guint)pr_param(session->params, PR_PARAM_HANDSHAKE_TIMEOUT);
	g_autoptr(GError) inner = NULL;
	PrListener *listener = pr_listener_new(uri, &session->security, handshake_ms,
					       pr_destination_hello, destination, cancel, &inner);

	if (!listener) {
		g_set_error_literal(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_LISTEN,
				    inner->message);
		return FALSE;
	}
	const char *name = pr_listener_uri(listener)->text;
	pr_session_lock(session);
	g_ptr_array_add(destination->listeners, listener);
	pr_path_step(&session->paths, name, PR_HEALTH_LISTENS, "listening");
	pr_session_unlock(session);
	g_message("listening on %s", name);
	return TRUE;
}

gboolean pr_destination_listen(PrDestination *destination, const GPtrArray *uris,
			       GCancellable *cancel, GError **error)
{
	for (guint i = 0; i < uris->len; i++)
		if (!add_listener(destination, g_ptr_array_index(uris, i), cancel, error))
			return FALSE;
	return TRUE;
}

void pr_destination_stop_listening(PrDestination *destination)
{
	for (guint i = 0; i < destination->listeners->len; i++)
		pr_listener_free(g_ptr_array_index(destination->listeners, i));
	g_ptr_array_set_size(destination->listeners, 0);
}

/* Why this side can't begin to listen; NULL: it can. With the lock held. */
static const char *obstacle(const PrDestination *destination)
{
	const PrSession *session = destination->session;

	if (destination->opening)
		return "another one is about to listen; wait for its answer";
	if (destination->listeners->len > 0)
		return "this side is listening already";
	/* A destination without a listener follows an engine that has died. */
	if (session->sm.state != PR_STATE_NONE && session->sm.role != PR_ROLE_DESTINATION)
		return "it is only for a side that has done nothing yet";
	return NULL;
}

static gboolean begin_locked(PrDestination *destination, GError **error)
{
	PrSession *session = destination->session;
	const char *why_not = obstacle(destination);

	if (why_not) {
		pr_session_set_state_error(session, "migrate_incoming", why_not, error);
		return FALSE;
	}
	if (!session->thread)
		session->thread = pr_thread_try("load", pr_load_thread, destination, error);
	destination->opening = session->thread != NULL;
	return destination->opening;
}

gboolean pr_destination_begin_listening(PrDestination *destination, GError **error)
{
	PrSession *session = destination->session;

	pr_session_lock(session);
	gboolean begun = begin_locked(destination, error);
	pr_session_unlock(session);
	return begun;
}

void pr_destination_end_listening(PrDestination *destination)
{
	PrSession *session = destination->session;

	pr_session_lock(session);
	destination->opening = FALSE;
	pr_session_unlock(session);
}

gboolean pr_destination_check_paused(PrDestination *destination, GError **error)
{
	PrSession *session = destination->session;

	pr_session_lock(session);
	gboolean fit = session->sm.role == PR_ROLE_DESTINATION &&
		       session->sm.state == PR_STATE_POSTCOPY_PAUSED;
	if (!fit)
		pr_session_set_state_error(
			session, "migrate_recover",
			session->sm.role == PR_ROLE_SOURCE
				? "it is for the destination; on the source use migrate -r"
				: "it is only for a migration that is postcopy-paused",
			error);
	pr_session_unlock(session);
	return fit;
}
