/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/workers.h"

#include <unistd.h>

#include "migration/core/crash-point.h"
#include "migration/destination/charge.h"
#include "migration/destination/completion.h"
#include "migration/destination/live-grants.h"
#include "migration/destination/page-hashes.h"
#include "migration/memory/state-memfd.h"

/* Without an answer of the VMM there are fewer statistics; nothing else is lost. */
void pr_destination_reset_blocktime(PrDestination *destination)
{
	PrSession *session = destination->session;
	g_autoptr(GError) error = NULL;
	g_autoptr(GArray) vcpus = session->guest->ops->vcpu_threads(session->guest, &error);
	PrBlocktime *times, *old;

	if (!vcpus)
		g_info("no blocktime of vCPUs: %s", error->message);
	times = pr_blocktime_new(vcpus ? (uint32_t *)vcpus->data : NULL, vcpus ? vcpus->len : 0);
	pr_session_lock(session);
	old = destination->times;
	destination->times = times;
	pr_session_unlock(session);
	pr_blocktime_free(old);
	if (vcpus)
		pr_state_memfd_set_vcpus(session->ram->state_memfd, (uint32_t *)vcpus->data,
					 vcpus->len);
}

/* The connection in use. A worker may use it as long as it has the path: pr_destination_detach()
 * comes before pr_conn_close(). */
static PrConn *current_conn(PrSession *session)
{
	pr_session_lock(session);
	PrConn *conn = session->conn;
	pr_session_unlock(session);
	return conn;
}

static void on_progress(void *opaque)
{
	PrSession *session = ((PrDestination *)opaque)->session;
	PrConn *conn = current_conn(session);
	uint64_t travelled = pr_ram_received_bytes(session->ram) - pr_ram_zero_bytes(session->ram);

	pr_session_lock(session);
	pr_session_sample_rate(session, travelled, g_get_monotonic_time());
	pr_session_unlock(session);
	if (conn)
		pr_destination_send_progress(opaque, conn);
}

static void on_complete(void *opaque)
{
	pr_destination_check_complete(opaque);
}

static void on_want(guint block, uint64_t page, void *opaque)
{
	PrConn *conn = current_conn(((PrDestination *)opaque)->session);

	if (conn)
		pr_live_grants_request(conn, block, page);
}

/* A pull that is being ended needs no notice any more. */
static void on_no_huge_read(void *opaque)
{
	PrDestination *destination = opaque;
	PrSession *session = destination->session;

	pr_session_lock(session);
	PrPull *pull = destination->pull ? pr_pull_ref(destination->pull) : NULL;
	pr_session_unlock(session);
	if (pull)
		pr_pull_notify(pull);
	pr_pull_unref(pull);
}

static void on_broken(const GError *error, void *opaque)
{
	pr_session_failed(((PrDestination *)opaque)->session, NULL, error);
}

/* Starts the fault threads and the pull. */
static gboolean start_postcopy(PrDestination *destination, GError **error)
{
	PrSession *session = destination->session;
	const PrFaultHooks fault_hooks = {on_complete, on_want,	    on_no_huge_read,
					  on_broken,   destination, session->watchdog};
	const PrPullHooks pull_hooks = {on_progress, on_complete, on_broken, destination,
					session->watchdog};
	PrFaultService *faults = pr_fault_start(session->ram, destination->uffd, destination->times,
						session->params, &fault_hooks, error);
	PrPull *pull = faults ? pr_pull_start(session->ram, destination->uffd, session->params,
					      faults, &pull_hooks, error)
			      : NULL;

	if (!pull) {
		pr_fault_stop(faults);
		return FALSE;
	}
	pr_session_lock(session);
	destination->faults = faults;
	destination->pull = pull;
	pr_session_unlock(session);
	return TRUE;
}

gboolean pr_destination_start_workers(PrDestination *destination, gboolean fresh, GError **error)
{
	PrSession *session = destination->session;
	const PrGuestOps *guest = session->guest->ops;

	g_free(destination->guest_process);
	destination->guest_process = guest->process(session->guest);
	destination->uffd = guest->uffd_enable(session->guest, error);
	if (destination->uffd < 0)
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_FAULTS_ON);
	/* Every access faults from now on, so the memfds can be emptied of what they held
	 * before. */
	if (fresh && !pr_ram_empty(session->ram, error))
		return FALSE;
	return pr_destination_start_allocator(destination, fresh, error) &&
	       pr_destination_start_verify(destination, error) &&
	       start_postcopy(destination, error);
}

void pr_destination_attach_faults(PrDestination *destination, PrConn *conn)
{
	if (destination->verify)
		pr_verify_attach(destination->verify);
	pr_fault_attach(destination->faults, conn->path);
}

void pr_destination_attach_all(PrDestination *destination, PrConn *conn)
{
	pr_destination_attach_faults(destination, conn);
	pr_pull_attach(destination->pull, conn->path);
}

void pr_destination_detach(PrDestination *destination)
{
	if (!destination->faults)
		return;
	pr_fault_detach(destination->faults);
	pr_pull_detach(destination->pull);
	if (destination->verify)
		pr_verify_detach(destination->verify);
}

void pr_destination_stop_workers(PrDestination *destination)
{
	PrSession *session = destination->session;

	/* Rails may use the pull meanwhile (rails.c). */
	g_mutex_lock(&destination->pull_lock);
	g_mutex_lock(&session->lock);
	PrPull *pull = g_steal_pointer(&destination->pull);
	PrFaultService *faults = destination->faults;
	g_mutex_unlock(&session->lock);
	pr_pull_stop(pull);
	g_mutex_unlock(&destination->pull_lock);
	PrVerify *verify = pr_destination_stop_verify(destination);

	pr_session_lock(session);
	if (faults)
		pr_fault_stats(faults, &destination->fault_stats);
	destination->faults = NULL;
	pr_session_unlock(session);
	pr_fault_stop(faults);
	if (verify)
		session->ram->verify = NULL;
	pr_verify_free(verify);
	pr_destination_stop_allocator(destination);
}

void pr_destination_close_uffd(PrDestination *destination)
{
	if (destination->uffd >= 0)
		close(destination->uffd);
	destination->uffd = -1;
}

void pr_destination_leave(PrDestination *destination)
{
	pr_destination_stop_workers(destination);
	pr_destination_close_uffd(destination);
}
