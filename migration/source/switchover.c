/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The switch-over. Up to hand_over() every failure leaves the guest with the source. In hand_over()
 * the state machine goes to postcopy-active before RUN is sent: from then on the destination may
 * have seen RUN, and this guest never runs here again.
 *
 * The downtime begins when the guest stops, and ends when the destination has seen RUN. Work that
 * can wait is done after RUN, work that need not wait is done before the stop.
 */
#include "migration/source/switchover.h"

#include "migration/core/crash-point.h"
#include "migration/session/messages.h"
#include "migration/source/choose-path.h"
#include "migration/source/fence.h"
#include "migration/source/grants.h"
#include "migration/source/handover.h"
#include "migration/source/ram-scan.h"
#include "migration/source/zero-pages.h"

/* Bytes of device state that are sent while RAM is still being scanned; well below what a control
 * channel receives ahead. */
#define STATE_DURING_SCAN (8 * 1024 * 1024)

/* What the migration thread does, and how long that may take. Where a parameter bounds it, that
 * applies instead. */
static const PrWatchPoint preparing = {"preparing the guest", 1000};
static const PrWatchPoint awaiting = {"waiting for the destination", 3000};
static const PrWatchPoint stopping = {"stopping the guest", 1000};
static const PrWatchPoint telling = {"telling the destination where guest RAM is", 2000};
static const PrWatchPoint saving = {"saving the device state", 2000};

static gint64 now_us(void)
{
	return g_get_monotonic_time();
}

/* ---- before the guest stops ---- */

static gboolean prepare_guest(PrSource *source, GError **error)
{
	PrSession *session = source->session;
	const PrGuestOps *guest = session->guest->ops;
	guint n;

	pr_watch_enter(source->watch, &preparing);
	const PrGuestBlock *blocks = guest->prepare(session->guest, PR_GUEST_SOURCE, &n, error);
	PrRam *ram = blocks ? pr_ram_new(blocks, n, PR_GUEST_SOURCE, error) : NULL;

	if (!ram)
		return FALSE;
	/* Connections of the last migration that are being closed may use its RAM. */
	pr_conn_await_threads(session);
	pr_session_forget_fence(session);
	/* The agent need not keep the state of a migration that brought this guest here. */
	if (session->ram && session->ram->state_memfd)
		guest->store_state_fd(session->guest, -1, NULL);
	pr_session_lock(session);
	PrRam *old = session->ram;
	session->ram = ram;
	pr_session_unlock(session);
	pr_ram_free(old);
	return TRUE;
}

static gboolean wait_for_pong(PrSource *source, uint32_t ping, GError **error)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	/* Ended by the PONG, or by any failure, silence among them. */
	while (!session->failure && source->pong != ping)
		g_cond_wait(&session->changed, &session->lock);
	gboolean answered = !session->failure;
	if (!answered)
		pr_session_copy_failure(session, error);
	pr_session_unlock(session);
	return answered;
}

/* Waits until the destination has carried out everything that was sent. */
static gboolean await_destination(PrSource *source, PrConn *conn, uint32_t ping, GError **error)
{
	return pr_source_send_ping(conn, ping, error) && wait_for_pong(source, ping, error);
}

/* PrGuestSink */
static gboolean send_early(const void *data, gsize length, void *opaque, GError **error)
{
	PrConn *conn = opaque;
	const uint8_t *at = data;

	while (length > 0) {
		g_autoptr(GByteArray) body = g_byte_array_new();
		gsize chunk = MIN(length, PR_PACKAGED_CHUNK);

		g_byte_array_append(body, at, (guint)chunk);
		if (!pr_send(conn, PR_CMD_EARLY_STATE, body, error))
			return FALSE;
		at += chunk;
		length -= chunk;
	}
	return TRUE;
}

static gboolean send_advise(PrConn *conn, GError **error)
{
	PrGuest *guest = conn->session->guest;
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_advise_encode(body, conn->session->ram->page_size_summary, PR_TARGET_PAGE);
	return pr_send(conn, PR_CMD_POSTCOPY_ADVISE, body, error) &&
	       (!guest->ops->describe || guest->ops->describe(guest, send_early, conn, error));
}

static gboolean prepare_save(PrGuest *guest, GError **error)
{
	return !guest->ops->prepare_save || guest->ops->prepare_save(guest, error);
}

/* Tells the destination what kind of guest and of RAM comes, and waits until both sides are ready
 * for it. They prepare at the same time. */
static gboolean advise(PrSource *source, PrConn *conn, GError **error)
{
	PrSession *session = source->session;

	pr_watch_enter(source->watch, &awaiting);
	return send_advise(conn, error) && pr_source_send_ping(conn, PR_PING_READY, error) &&
	       prepare_save(session->guest, error) && wait_for_pong(source, PR_PING_READY, error) &&
	       pr_session_step(session, PR_EVENT_READY, "the destination is ready", error);
}

/* Device state that need not wait until the guest has stopped. */
static gboolean send_early_state(PrSource *source, PrConn *conn, GError **error)
{
	PrSession *session = source->session;
	PrGuest *guest = session->guest;

	if (!guest->ops->save_early)
		return TRUE;
	return guest->ops->save_early(guest, session->cancel, send_early, conn, error) &&
	       await_destination(source, conn, PR_PING_EARLY, error);
}

/* ---- the downtime ---- */

/* When its steps were done, monotonic us. */
typedef struct Downtime {
	gint64 began, stopped, granted, saved, loaded;
	gsize state_bytes;
} Downtime;

static double ms_between(gint64 from, gint64 to)
{
	return (double)(to - from) / 1e3;
}

static void log_downtime(const Downtime *times)
{
	g_info("%.1f ms since the guest stopped: telling what may be read %.1f, saving and sending "
	       "%" G_GSIZE_FORMAT " bytes of device state %.1f, loading them %.1f; before that "
	       "%.1f until it had stopped",
	       ms_between(times->stopped, times->loaded),
	       ms_between(times->stopped, times->granted), times->state_bytes,
	       ms_between(times->granted, times->saved), ms_between(times->saved, times->loaded),
	       ms_between(times->began, times->stopped));
}

static gboolean stop_guest(PrSource *source, gboolean *ret_was_running, GError **error)
{
	PrSession *session = source->session;

	pr_watch_enter(source->watch, &stopping);
	if (!pr_session_step(session, PR_EVENT_STOP, "stopping the guest", error) ||
	    !session->guest->ops->stop(session->guest, ret_was_running, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_STOPPED);
	/* The guest ran until now: a VMM may have work to do before it stops. */
	pr_session_lock(session);
	session->sm.stopped = now_us();
	pr_session_unlock(session);
	return TRUE;
}

/* The grants of a path that has failed meanwhile are not all that there are. */
static gboolean check_attempt(PrSession *session, GError **error)
{
	pr_session_lock(session);
	gboolean failed = session->failure != NULL;
	if (failed)
		pr_session_copy_failure(session, error);
	pr_session_unlock(session);
	return !failed;
}

/* Tells the destination what it may read. Over a path with incremental grants a thread finds that
 * out, *ret_scanner, beside all that follows: the destination reads a page as soon as it is
 * granted. */
static gboolean grant_ram(PrSource *source, PrConn *conn, GThread **ret_scanner, GError **error)
{
	pr_watch_enter(source->watch, &telling);
	if (!conn->path->incremental_grants)
		return pr_source_send_all_grants(conn, error) &&
		       check_attempt(source->session, error);
	*ret_scanner = pr_ram_scan_start(conn, error);
	return *ret_scanner != NULL;
}

typedef struct Package {
	PrConn *conn;
	gboolean was_running;
	gsize bytes;
} Package;

static gboolean send_chunk(Package *package, gboolean last, const void *data, gsize length,
			   GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_sized_new((guint)length + 16);

	pr_packaged_encode(body, last, package->was_running, data, length);
	return pr_send(package->conn, PR_CMD_PACKAGED, body, error);
}

/* PrGuestSink */
static gboolean send_state(const void *data, gsize length, void *opaque, GError **error)
{
	Package *package = opaque;
	const uint8_t *at = data;

	/* The destination handles grants while it loads, but only those that it has received. */
	if (package->bytes > STATE_DURING_SCAN)
		pr_ram_scan_await(pr_conn_source(package->conn));
	package->bytes += length;
	while (length > 0) {
		gsize chunk = MIN(length, PR_PACKAGED_CHUNK);

		if (!send_chunk(package, /* last= */ FALSE, at, chunk, error))
			return FALSE;
		at += chunk;
		length -= chunk;
	}
	return TRUE;
}

/* Sends the device state as the guest produces it, and waits until it is loaded. */
static gboolean send_device_state(PrSource *source, PrConn *conn, gboolean was_running,
				  Downtime *times, GError **error)
{
	PrSession *session = source->session;
	PrGuest *guest = session->guest;
	Package package = {.conn = conn, .was_running = was_running};

	pr_watch_enter(source->watch, &saving);
	if (!pr_send(conn, PR_CMD_POSTCOPY_LISTEN, NULL, error) ||
	    !guest->ops->save(guest, session->cancel, send_state, &package, error) ||
	    !send_chunk(&package, /* last= */ TRUE, NULL, 0, error))
		return FALSE;
	times->state_bytes = package.bytes;
	times->saved = now_us();
	pr_crash_point(PR_CRASH_SOURCE_STATE_SENT);
	if (!await_destination(source, conn, PR_PING_LOADED, error))
		return FALSE;
	times->loaded = now_us();
	pr_crash_point(PR_CRASH_SOURCE_LOADED);
	return TRUE;
}

/* The guest is the destination's from here on, whatever becomes of RUN. */
static gboolean hand_over(PrSource *source, PrConn *conn, GError **error)
{
	PrSession *session = source->session;
	PrGuest *guest = session->guest;
	g_autoptr(GError) lost = NULL;

	/* The order is argued in migration/resume.c. */
	if ((guest->ops->check_stopped && !guest->ops->check_stopped(guest, error)) ||
	    !pr_handover_handed_over(source, error) ||
	    !pr_session_step(session, PR_EVENT_LOADED, "the device state is loaded", error))
		return FALSE;
	source->run_may_be_seen = TRUE;
	pr_crash_point(PR_CRASH_SOURCE_ACTIVE);
	if (!pr_send(conn, PR_CMD_POSTCOPY_RUN, NULL, &lost))
		pr_session_failed(session, conn, lost);
	pr_crash_point(PR_CRASH_SOURCE_RUN_SENT);
	pr_source_fence(source);
	return TRUE;
}

/* From the moment that the guest is to stop until it is the destination's. */
static gboolean stop_and_hand_over(PrSource *source, PrConn *conn, GThread **ret_scanner,
				   GError **error)
{
	gboolean was_running;
	Downtime times = {0};

	if (!pr_handover_stopping(source, error))
		return FALSE;
	times.began = now_us();
	if (!stop_guest(source, &was_running, error))
		return FALSE;
	times.stopped = now_us();
	if (!grant_ram(source, conn, ret_scanner, error))
		return FALSE;
	times.granted = now_us();
	pr_crash_point(PR_CRASH_SOURCE_RAM_TOLD);
	if (!send_device_state(source, conn, was_running, &times, error) ||
	    !hand_over(source, conn, error))
		return FALSE;
	log_downtime(&times);
	return TRUE;
}

/* ---- after RUN ---- */

/* Whether the destination has carried out everything that was sent, and the migration still needs
 * it. */
static gboolean ping_and_wait(PrSource *source, PrConn *conn, uint32_t ping)
{
	PrSession *session = source->session;

	if (!pr_source_send_ping(conn, ping, NULL))
		return FALSE;
	pr_session_lock(session);
	/* Ended by the PONG, or by a change of state: SHUT, which may come first, or any
	 * failure. */
	while (session->sm.state == PR_STATE_POSTCOPY_ACTIVE && !session->quit &&
	       source->pong != ping)
		g_cond_wait(&session->changed, &session->lock);
	gboolean active = session->sm.state == PR_STATE_POSTCOPY_ACTIVE && !session->quit;
	pr_session_unlock(session);
	return active;
}

/* Tells the destination which pages it need not read. Finding them takes longer the more RAM there
 * is, and takes processors, so it waits until the guest runs; until a hole was sent, the
 * destination reads zeros there. Returns whether all were sent; a failure reports itself. */
static gboolean send_remaining_holes(PrSource *source, PrConn *conn)
{
	pr_watch_idle(source->watch);
	return ping_and_wait(source, conn, PR_PING_RUNNING) && pr_source_send_holes(conn, NULL) &&
	       ping_and_wait(source, conn, PR_PING_TOLD);
}

static gboolean move_guest(PrSource *source, PrConn *conn, GError **error)
{
	GThread *scanner = NULL;

	source->holes_sent = FALSE;
	source->run_may_be_seen = FALSE;
	gboolean moved = stop_and_hand_over(source, conn, &scanner, error);
	if (!moved)
		/* So that the scanner does not wait for the destination. */
		pr_session_attempt_failed(source->session, *error);
	if (scanner)
		source->holes_sent = pr_ram_scan_finish(source, scanner) &&
				     ping_and_wait(source, conn, PR_PING_TOLD);
	else if (moved)
		source->holes_sent = send_remaining_holes(source, conn);
	return moved;
}

gboolean pr_source_switch_over(PrSource *source, PrConn **ret_conn, GError **error)
{
	PrConn *conn;

	if (!prepare_guest(source, error))
		return FALSE;
	switch (pr_source_connect_any(source, &conn, error)) {
	case PR_CONNECT_UP:
		break;
	case PR_CONNECT_COMPLETED:
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "the destination says that a new migration is complete");
		return FALSE;
	default:
		return FALSE;
	}
	*ret_conn = conn;
	return advise(source, conn, error) && send_early_state(source, conn, error) &&
	       move_guest(source, conn, error);
}
