/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/resume.h"

#include "migration/core/crash-point.h"
#include "migration/destination/completion.h"
#include "migration/destination/destination.h"
#include "migration/destination/workers.h"
#include "migration/memory/uffd.h"

/* The faults that the dead engine has read are lost. So all waiting threads are woken, and fault
 * again. */
static gboolean serve_faults(PrDestination *destination, GError **error)
{
	if (!pr_destination_start_workers(destination, /* fresh= */ FALSE, error) ||
	    !pr_uffd_wake_all(destination->uffd, destination->session->ram, error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_WOKEN);
	return TRUE;
}

/* The stage of the last engine says what this one begins with. */
static void restore_session(PrDestination *destination, PrStateMemfdStage stage)
{
	PrSession *session = destination->session;
	const PrStateMemfd *state = session->ram->state_memfd;
	gboolean completed = stage == PR_STATE_MEMFD_COMPLETED;
	const char *reason =
		completed ? "the guest had arrived when the last engine ended"
		: stage == PR_STATE_MEMFD_LOADED
			? "the last engine ended when the device state had been loaded"
			: "the last engine ended while the guest's memory was under way";

	pr_session_lock(session);
	pr_state_memfd_identity(state, &session->binding);
	session->paused_by_operator = pr_state_memfd_paused_by_operator(state);
	session->verifies = pr_state_memfd_verifies(state);
	destination->guest_was_running = pr_state_memfd_was_running(state);
	destination->guest_started = stage == PR_STATE_MEMFD_STARTED || completed;
	session->pages_at_pause = pr_ram_received_bytes(session->ram) / PR_TARGET_PAGE;
	pr_session_restore_locked(session, PR_ROLE_DESTINATION,
				  completed ? PR_STATE_COMPLETED : PR_STATE_POSTCOPY_PAUSED,
				  stage >= PR_STATE_MEMFD_RUN, reason);
	pr_session_unlock(session);
}

/* Takes ownership of state. */
static gboolean adopt_ram(PrDestination *destination, PrStateMemfd *state, GError **error)
{
	PrSession *session = destination->session;
	guint n, n_vcpus;
	g_autofree PrGuestBlock *known = pr_state_memfd_blocks(state, &n);
	const PrGuestBlock *blocks = session->guest->ops->adopt(session->guest, known, n, error);
	PrRam *ram = NULL;

	if (blocks)
		ram = pr_ram_adopt(blocks, n, state, error);
	else
		pr_state_memfd_free(state);
	if (!ram)
		return FALSE;
	const uint32_t *vcpus = pr_state_memfd_vcpus(state, &n_vcpus);
	pr_session_lock(session);
	session->ram = ram;
	destination->times = pr_blocktime_new(vcpus, n_vcpus);
	pr_session_unlock(session);
	pr_crash_point(PR_CRASH_DESTINATION_ADOPTED);
	return TRUE;
}

/* A VMM that waits for a page can't start its guest now. Then the recovery, which brings the page,
 * tries again. */
static void start_guest(PrDestination *destination)
{
	PrSession *session = destination->session;
	g_autoptr(GError) error = NULL;

	if (!pr_destination_try_run(destination, &error)) {
		g_warning("the guest can't be started before the migration has recovered: %s",
			  error->message);
		return;
	}
	pr_session_lock(session);
	destination->guest_started = TRUE;
	pr_session_unlock(session);
}

/* Takes ownership of state. */
static gboolean resume_as_destination(PrDestination *destination, PrStateMemfd *state,
				      GError **error)
{
	PrSession *session = destination->session;
	PrStateMemfdStage stage = pr_state_memfd_stage(state);
	guint timeout = (guint)pr_param(session->params, PR_PARAM_GUEST_TIMEOUT);

	if (!pr_state_memfd_await_engine(state, timeout, error)) {
		pr_state_memfd_free(state);
		return FALSE;
	}
	if (!adopt_ram(destination, state, error))
		return FALSE;
	restore_session(destination, stage);
	if (stage == PR_STATE_MEMFD_COMPLETED
		    ? !session->guest->ops->uffd_disable(session->guest, error)
		    : !serve_faults(destination, error)) {
		pr_destination_leave(destination);
		return FALSE;
	}
	if (stage == PR_STATE_MEMFD_RUN)
		start_guest(destination);
	g_message("going on as the destination of a migration that is %s: %" G_GUINT64_FORMAT
		  " of %" G_GUINT64_FORMAT " pages are here",
		  pr_state_name(session->sm.state),
		  pr_ram_received_bytes(session->ram) / PR_TARGET_PAGE,
		  session->ram->total_bytes / PR_TARGET_PAGE);
	if (pr_session_start_thread(session, "load", pr_load_thread, destination, error))
		return TRUE;
	pr_destination_leave(destination);
	return FALSE;
}

/* The guest had not come here: the state that is left in its process is of no use. Takes ownership
 * of state. READs that the dead engine's card has posted have to land before this memory is used
 * again. */
static gboolean discard_partial_load(PrSession *session, PrStateMemfd *state, GError **error)
{
	guint timeout = (guint)pr_param(session->params, PR_PARAM_GUEST_TIMEOUT);
	gboolean ended = pr_state_memfd_await_engine(state, timeout, error);

	pr_state_memfd_free(state);
	if (!ended || !session->guest->ops->uffd_disable(session->guest, error) ||
	    !session->guest->ops->store_state_fd(session->guest, -1, error))
		return FALSE;
	g_message("the last engine ended before the guest had come here: the guest is still the "
		  "source's, and this side begins anew");
	return TRUE;
}

gboolean pr_destination_resume(PrDestination *destination, PrStateMemfd *state, gboolean asked,
			       GError **error)
{
	PrStateMemfdStage stage = pr_state_memfd_stage(state);

	if (stage == PR_STATE_MEMFD_SETUP || stage == PR_STATE_MEMFD_ENDED)
		return discard_partial_load(destination->session, state, error);
	if (asked)
		return resume_as_destination(destination, state, error);
	pr_state_memfd_free(state);
	if (stage == PR_STATE_MEMFD_COMPLETED)
		return TRUE;
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
		    "the last engine of this guest ended in the middle of its migration to here; "
		    "start this engine with --resume");
	return FALSE;
}

PrStateMemfd *pr_destination_fetch_state(PrDestination *destination, GError **error)
{
	PrGuest *guest = destination->session->guest;
	int fd = guest->ops->fetch_state(guest, error);

	return fd >= 0 ? pr_state_memfd_attach(fd, error) : NULL;
}
