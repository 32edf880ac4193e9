/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source's story. The migration thread walks it from the top of pr_source_thread() down; each
 * connection has a return-path thread beside it, which reads what the destination sends.
 *
 * Up to hand_over() every failure leads to undo(): the guest runs on here and the cause is named. In
 * hand_over() the machine goes to postcopy-active before RUN is sent: from then on RUN may have been
 * seen, and this guest never runs again.
 *
 * The source's RAM does not change once the guest is stopped; the data path serves it without us. What is
 * left to do in postcopy is to look for zero pages, so that they need not travel.
 */
#include <string.h>

#include "migration/memory/bitmap.h"
#include "migration/session/session.h"
#include "migration/core/crash-point.h"
#include "util/try-alloc.h"

#define BACKOFF_MIN_US	   (100 * 1000) /* between automatic recoveries, doubling */
#define BACKOFF_MAX_US	   (2 * G_USEC_PER_SEC)
#define CAPABILITY_LOOK_US (200 * 1000) /* between two looks whether auto-recover was switched on */
/* Device state that is sent while a incremental_grants path's RAM is looked at, bytes; well below what a control channel
 * receives ahead. */
#define STATE_BESIDE_LOOKING (8 * 1024 * 1024)

/* What the migration thread is at, and how long that may take; the lengths that users set end it. */
static const PrWatchPoint preparing = {"preparing the guest", 1000};
static const PrWatchPoint connecting = {"connecting", 15000};
static const PrWatchPoint awaiting = {"waiting for the destination", 3000};
static const PrWatchPoint stopping = {"stopping the guest", 1000};
static const PrWatchPoint telling = {"telling the destination where guest RAM is", 2000};
static const PrWatchPoint saving = {"saving the device state", 2000};
static const PrWatchPoint exchanging = {"exchanging what has arrived", 3000};
static const PrWatchPoint closing = {"closing a connection", 3000};

/* Waits with the lock held until `*value` is `wanted` or the attempt has failed. */
static gboolean wait_value(PrMigration *m, const uint32_t *value, uint32_t wanted, GError **error)
{
	g_mutex_lock(&m->lock);
	/* Ended by the PONG, or by any failure, silence among them. */
	while (!m->failure && *value != wanted)
		g_cond_wait(&m->changed, &m->lock);
	gboolean reached = !m->failure;
	if (!reached)
		pr_migration_copy_failure(m, error);
	g_mutex_unlock(&m->lock);
	return reached;
}

/* ---- connecting ---- */

gboolean pr_source_tell_grants(PrConn *conn, const GArray *grants, GError **error)
{
	for (guint i = 0; i < grants->len;) {
		g_autoptr(GByteArray) body = g_byte_array_new();
		g_autofree PrWireGrant *wire = g_new(PrWireGrant, grants->len - i);
		uint32_t block = g_array_index(grants, PrGrant, i).block;
		guint n = 0;
		for (; i < grants->len && n < PR_RANGES_MAX; i++, n++) {
			const PrGrant *grant = &g_array_index(grants, PrGrant, i);
			if (grant->block != block)
				break;
			wire[n] = (PrWireGrant){grant->offset, grant->length, grant->addr,
						grant->key};
		}
		pr_grants_encode(body, block, wire, n);
		if (!pr_send(conn, PR_CMD_GRANT, body, error))
			return FALSE;
	}
	return TRUE;
}

/* Only once the guest has stopped: until then it may touch what was a hole. */
gboolean pr_source_send_grants(PrConn *conn, GError **error)
{
	g_autoptr(GArray) grants = conn->path->ops->grants(conn->path);

	conn->granted = pr_source_tell_grants(conn, grants, error);
	return conn->granted;
}

static PrControl *say_hello(PrMigration *m, PrConn *conn, PrResume resume, PrHelloAck *ret_ack,
			    GError **error)
{
	g_autofree PrWireBlock *blocks = pr_ram_wire_blocks(m->ram);
	PrHello hello = {
		.version = PR_WIRE_VERSION,
		.role = PR_HELLO_SOURCE,
		.epoch = conn->epoch,
		.resume = resume,
		.capabilities = PR_HELLO_CAN_ZSTD | pr_hello_more_lanes(PR_URGENT_LANES_MAX - 1) |
				(pr_capability(m->params, PR_CAP_VERIFY) ? PR_HELLO_CAN_VERIFY : 0),
		.n_blocks = m->ram->n_blocks,
		.blocks = blocks,
	};

	memcpy(hello.uuid, m->binding.uuid, PR_UUID_BYTES);
	memcpy(hello.secret, m->binding.secret, PR_SECRET_BYTES);
	g_strlcpy(hello.scheme, conn->uri->scheme, sizeof(hello.scheme));
	return pr_control_connect(conn->uri, m->security.tls, &hello,
				  (guint)pr_param(m->params, PR_PARAM_CONNECT_TIMEOUT),
				  (guint)pr_param(m->params, PR_PARAM_HANDSHAKE_TIMEOUT),
				  conn->cancel, ret_ack, error);
}

static gboolean count_lanes(PrConn *conn, const PrHelloAck *ack, GError **error)
{
	guint more = pr_hello_get_more_lanes(ack->capabilities);

	conn->n_lanes = PR_LANES_MIN + more;
	if (conn->n_lanes <= PR_LANES_MAX)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: the destination asks for %u urgent lanes, of %u that were offered; "
		    "use the same version of Postroad on both sides",
		    conn->name, more + 1, PR_URGENT_LANES_MAX);
	return FALSE;
}

/* Brings up a published connection's lanes and return path. */
static gboolean open_lanes(PrConn *conn, const PrHelloAck *ack, GError **error)
{
	const PrTransportOps *ops = pr_transport_find(conn->uri->scheme, error);
	PrBinding binding;

	if (!count_lanes(conn, ack, error))
		return FALSE;
	pr_conn_binding(conn, &binding);
	PrPathSetup setup = pr_conn_setup(conn, &binding, ack->data_port);
	PrDataPath *path = ops ? ops->connect(&setup, error) : NULL;

	if (!path || !pr_conn_set_path(conn, path, error))
		return FALSE;
	conn->return_path = pr_thread_try("return-path", pr_source_return_path_thread, conn, error);
	return conn->return_path != NULL;
}

static gboolean admit(PrConn *conn, PrResume resume, GError **error)
{
	return resume == PR_RESUME_STANDBY ? pr_conn_stand_by(conn, error)
					   : pr_conn_publish(conn, error);
}

/* Connects one path. On failure returns NULL, with everything closed again. *ret_completed: the
 * destination says that it needs us no more; then NULL too, without an error. */
PrConn *pr_source_connect(PrMigration *m, const PrUri *uri, PrResume resume, GCancellable *cancel,
			  gboolean *ret_completed, GError **error)
{
	PrHelloAck ack = {0};

	*ret_completed = FALSE;
	g_mutex_lock(&m->lock);
	g_autoptr(PrConn) conn = pr_conn_new(m, uri, /* name= */ NULL, ++m->binding.epoch);
	g_mutex_unlock(&m->lock);
	conn->cancel = g_object_ref(cancel);
	conn->control = say_hello(m, conn, resume, &ack, error);
	if (!conn->control)
		return NULL;
	if (ack.status == PR_HELLO_COMPLETED) {
		*ret_completed = TRUE;
		g_mutex_lock(&m->lock);
		m->progress = ack.progress;
		g_mutex_unlock(&m->lock);
		return NULL;
	}
	if (resume == PR_RESUME_NO)
		pr_source_note_verify(m, &ack);
	if (!admit(conn, resume, error))
		return NULL;
	if (open_lanes(conn, &ack, error))
		return g_steal_pointer(&conn);
	pr_conn_close(g_steal_pointer(&conn));
	return NULL;
}

static void record_failure(PrMigration *m, const PrUri *uri, const GError *error)
{
	g_mutex_lock(&m->lock);
	pr_path_step(m, uri->text, PR_HEALTH_FAILED, error->message);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

/* Orders paths on probation by the end of their hold-downs. A path that was lost just now may be connected again
 * already; its hold-down has only begun. A GCompareDataFunc; with the lock held. */
static gint compare_hold_down(gconstpointer a, gconstpointer b, gpointer m)
{
	const PrUri *const *one = a, *const *other = b;
	gint64 mine = pr_path_record(m, (*one)->text)->health.hold_until;
	gint64 others = pr_path_record(m, (*other)->text)->health.hold_until;

	return (mine > others) - (mine < others);
}

/* The paths of this rank, copied. With the lock held. */
static GPtrArray *standbys_of_rank(PrMigration *m, guint rank)
{
	GPtrArray *paths = g_ptr_array_new_with_free_func((GDestroyNotify)pr_uri_free);

	for (guint i = 0; i < m->uris->len; i++)
		if (pr_standby_rank(m, m->uris->pdata[i]) == rank)
			g_ptr_array_add(paths, pr_uri_copy(m->uris->pdata[i]));
	return paths;
}

/* The paths of this attempt, in the order in which to try them. Those that a human has named, as they were
 * named. By itself, first over what stands by, *ret_standbys of them: the fit ones in the operator's order,
 * then those on probation, the first to be trusted first; then all of them anew, beginning behind the one that was lost, which may take long.
 * With the lock held. */
static GPtrArray *paths_to_try(PrMigration *m, guint *ret_standbys)
{
	GPtrArray *paths = g_ptr_array_new_with_free_func((GDestroyNotify)pr_uri_free);
	gboolean automatic = m->resume == PR_RESUME_AUTOMATIC;
	guint n = automatic ? m->uris->len : m->n_asked;
	guint first = 0;

	if (automatic) {
		GPtrArray *on_probation = standbys_of_rank(m, 1);
		g_ptr_array_extend_and_steal(paths, standbys_of_rank(m, 2));
		g_ptr_array_sort_with_data(on_probation, compare_hold_down, m);
		g_ptr_array_extend_and_steal(paths, on_probation);
	}
	*ret_standbys = paths->len;
	for (guint i = 0; automatic && i < n; i++)
		if (g_strcmp0(((PrUri *)m->uris->pdata[i])->text, m->last_path) == 0)
			first = i + 1;
	for (guint i = 0; i < n; i++)
		g_ptr_array_add(paths, pr_uri_copy(m->uris->pdata[(first + i) % n]));
	return paths;
}

static void note_last_path(PrMigration *m, const PrUri *uri)
{
	g_mutex_lock(&m->lock);
	g_free(m->last_path);
	m->last_path = g_strdup(uri->text);
	g_mutex_unlock(&m->lock);
}

/* Whether the destination has turned us away, and would again over any path. */
static gboolean is_turned_away(const GError *error)
{
	return g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED) ||
	       g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_HELD);
}

/* One path: over its standby if it has one; else, or if that turns out to be dead, anew if it may. */
static PrConn *try_path(PrMigration *m, const PrUri *uri, PrResume resume, gboolean anew,
			gboolean *ret_completed, GError **error)
{
	g_autoptr(GError) why = NULL;
	PrConn *conn = pr_standby_activate(m, uri, resume, ret_completed, &why);

	if (conn || *ret_completed)
		return conn;
	if (!anew && !why)
		g_set_error(&why, PR_PATH_ERROR, PR_PATH_ERROR_LOST,
			    "path %s: nothing stands by there any more", uri->text);
	if (why && (!anew || pr_attempt_has_failed(m) || is_turned_away(why))) {
		g_propagate_error(error, g_steal_pointer(&why));
		return NULL;
	}
	if (why)
		g_warning("%s; connecting anew", why->message);
	return pr_source_connect(m, uri, resume, m->cancel, ret_completed, error);
}

/* Tries the paths in order; the first that connects is taken. A peer that refuses us ends it. */
static PrConn *connect_any(PrMigration *m, gboolean *ret_completed, GError **error)
{
	g_mutex_lock(&m->lock);
	guint n_standbys;
	g_autoptr(GPtrArray) uris = paths_to_try(m, &n_standbys);
	PrResume resume = m->resume;
	g_mutex_unlock(&m->lock);

	*ret_completed = FALSE;
	for (guint i = 0; i < uris->len; i++) {
		pr_watch_enter(m->watch, &connecting);
		const PrUri *uri = g_ptr_array_index(uris, i);
		g_autoptr(GError) why = NULL;
		gboolean anew = i >= n_standbys;
		PrConn *conn = try_path(m, uri, resume, anew, ret_completed, &why);
		pr_standby_unclaim(m);
		if (conn)
			note_last_path(m, uri);
		if (conn || *ret_completed)
			return conn;
		if (anew && !pr_attempt_has_failed(m))
			record_failure(m, uri, why);
		if (i + 1 == uris->len || pr_attempt_has_failed(m) || is_turned_away(why)) {
			g_propagate_error(error, g_steal_pointer(&why));
			return NULL;
		}
		g_warning("%s; trying the next path", why->message);
	}
	g_assert_not_reached();
}

/* ---- the switch-over ---- */

static gboolean prepare_guest(PrMigration *m, GError **error)
{
	guint n;

	pr_watch_enter(m->watch, &preparing);
	const PrGuestBlock *blocks = m->guest->ops->prepare(m->guest, PR_GUEST_SOURCE, &n, error);
	PrRam *ram = blocks ? pr_ram_new(blocks, n, PR_GUEST_SOURCE, error) : NULL;

	if (!ram)
		return FALSE;
	/* What is left of the last migration's connections may use its RAM; and a guest that came here before
	 * is on its way elsewhere now. */
	pr_migration_await_threads(m);
	pr_migration_begin_unfenced(m);
	if (m->ram && m->ram->state_memfd)
		m->guest->ops->store_state_fd(m->guest, -1, NULL);
	g_mutex_lock(&m->lock);
	PrRam *old = m->ram;
	m->ram = ram;
	g_mutex_unlock(&m->lock);
	pr_ram_free(old);
	return TRUE;
}

gboolean pr_source_ping(PrConn *conn, uint32_t value, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_u32_encode(body, value);
	return pr_send(conn, PR_CMD_PING, body, error);
}

static gboolean prepare_save(PrMigration *m, GError **error)
{
	return !m->guest->ops->prepare_save || m->guest->ops->prepare_save(m->guest, error);
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

static gboolean describe_guest(PrMigration *m, PrConn *conn, GError **error)
{
	return !m->guest->ops->describe ||
	       m->guest->ops->describe(m->guest, send_early, conn, error);
}

/* Tells the destination what kind of guest and of RAM comes, and waits until both sides are ready for it. */
static gboolean advise(PrMigration *m, PrConn *conn, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_watch_enter(m->watch, &awaiting);
	pr_advise_encode(body, m->ram->page_size_summary, PR_TARGET_PAGE);
	return pr_send(conn, PR_CMD_POSTCOPY_ADVISE, body, error) &&
	       describe_guest(m, conn, error) && pr_source_ping(conn, PR_PING_READY, error) &&
	       prepare_save(m, error) && wait_value(m, &m->pong, PR_PING_READY, error) &&
	       pr_migration_step(m, PR_EVENT_READY, "the destination is ready", error);
}

/* What need not wait until the guest has stopped. */
static gboolean send_early_state(PrMigration *m, PrConn *conn, GError **error)
{
	if (!m->guest->ops->save_early)
		return TRUE;
	return m->guest->ops->save_early(m->guest, m->cancel, send_early, conn, error) &&
	       pr_source_ping(conn, PR_PING_EARLY, error) &&
	       wait_value(m, &m->pong, PR_PING_EARLY, error);
}

/* When the steps of the downtime were done, us. */
typedef struct Downtime {
	gint64 began, stopped, told, saved, loaded;
	gsize state_bytes;
} Downtime;

static gboolean mark(gint64 *ret_now)
{
	*ret_now = g_get_monotonic_time();
	return TRUE;
}

static gboolean reached(PrCrashPoint point)
{
	pr_crash_point(point);
	return TRUE;
}

static void log_downtime(const Downtime *times)
{
	g_info("%.1f ms since the guest stopped: telling what may be read %.1f, saving and sending "
	       "%" G_GSIZE_FORMAT " bytes of device state %.1f, loading them %.1f; before that "
	       "%.1f until it had stopped",
	       (double)(times->loaded - times->stopped) / 1e3,
	       (double)(times->told - times->stopped) / 1e3, times->state_bytes,
	       (double)(times->saved - times->told) / 1e3,
	       (double)(times->loaded - times->saved) / 1e3,
	       (double)(times->stopped - times->began) / 1e3);
}

static gboolean stop_guest(PrMigration *m, gboolean *ret_was_running, GError **error)
{
	pr_watch_enter(m->watch, &stopping);
	if (!pr_migration_step(m, PR_EVENT_STOP, "stopping the guest", error) ||
	    !m->guest->ops->stop(m->guest, ret_was_running, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_STOPPED);
	/* It ran until now: a VMM may have things to do before it stops. */
	g_mutex_lock(&m->lock);
	m->sm.stopped = g_get_monotonic_time();
	g_mutex_unlock(&m->lock);
	return TRUE;
}

/* The grants of a path that has failed meanwhile are not all there are. */
static gboolean check_attempt(PrMigration *m, GError **error)
{
	g_mutex_lock(&m->lock);
	gboolean failed = m->failure != NULL;
	if (failed)
		pr_migration_copy_failure(m, error);
	g_mutex_unlock(&m->lock);
	return !failed;
}

/* Tells the destination what it may read. Over a incremental_grants path that is looked for by a thread, beside all that
 * follows: the destination reads a page once it has heard of it. */
static gboolean tell_ram(PrMigration *m, PrConn *conn, GThread **ret_looker, GError **error)
{
	pr_watch_enter(m->watch, &telling);
	if (!conn->path->incremental_grants)
		return pr_source_send_grants(conn, error) && check_attempt(m, error);
	*ret_looker = pr_look_begin(m, conn, error);
	return *ret_looker != NULL;
}

/* Whether the destination has carried out all that it was sent, while that matters. */
static gboolean ping_and_wait(PrMigration *m, PrConn *conn, uint32_t ping)
{
	if (!pr_source_ping(conn, ping, NULL))
		return FALSE;
	g_mutex_lock(&m->lock);
	/* Ended by the PONG, or by a change of state: SHUT, which may come first, or any failure. */
	while (m->sm.state == PR_STATE_POSTCOPY_ACTIVE && !m->quit && m->pong != ping)
		g_cond_wait(&m->changed, &m->lock);
	gboolean done = m->sm.state == PR_STATE_POSTCOPY_ACTIVE && !m->quit;
	g_mutex_unlock(&m->lock);
	return done;
}

/* What the destination need not read. Looking takes the longer the more RAM there is, and takes processors, so it waits
 * until the guest runs; while it has not been told a hole, the destination reads zeros there. Returns whether all was
 * told; a failure reports itself. */
static gboolean send_remaining_holes(PrMigration *m, PrConn *conn, GThread *looker, gboolean moved)
{
	if (looker)
		return pr_look_end(m, looker) && ping_and_wait(m, conn, PR_PING_TOLD);
	pr_watch_idle(m->watch);
	return moved && ping_and_wait(m, conn, PR_PING_RUNNING) &&
	       pr_source_tell_holes(m, conn, NULL) && ping_and_wait(m, conn, PR_PING_TOLD);
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

	/* The destination takes what is told of RAM while it loads; but only what it has received. */
	if (package->bytes > STATE_BESIDE_LOOKING)
		pr_look_await(package->conn->m);
	package->bytes += length;
	while (length > 0) {
		gsize chunk = MIN(length, PR_PACKAGED_CHUNK);
		if (!send_chunk(opaque, /* last= */ FALSE, at, chunk, error))
			return FALSE;
		at += chunk;
		length -= chunk;
	}
	return TRUE;
}

/* Sends the device state as the guest produces it, and waits until it is loaded. */
static gboolean send_device_state(PrMigration *m, PrConn *conn, gboolean was_running,
				  Downtime *times, GError **error)
{
	Package package = {.conn = conn, .was_running = was_running};

	pr_watch_enter(m->watch, &saving);
	gboolean ok = pr_send(conn, PR_CMD_POSTCOPY_LISTEN, NULL, error) &&
		      m->guest->ops->save(m->guest, m->cancel, send_state, &package, error) &&
		      send_chunk(&package, /* last= */ TRUE, NULL, 0, error) &&
		      mark(&times->saved) && reached(PR_CRASH_SOURCE_STATE_SENT) &&
		      pr_source_ping(conn, PR_PING_LOADED, error) &&
		      wait_value(m, &m->pong, PR_PING_LOADED, error) && mark(&times->loaded) &&
		      reached(PR_CRASH_SOURCE_LOADED);

	times->state_bytes = package.bytes;
	return ok;
}

/* The guest is the destination's from here on, whatever becomes of RUN. */
static gboolean hand_over(PrMigration *m, PrConn *conn, GError **error)
{
	g_autoptr(GError) lost = NULL;

	/* The order is argued in resume.c. */
	if ((m->guest->ops->check_stopped && !m->guest->ops->check_stopped(m->guest, error)) ||
	    !pr_handover_handed_over(m, error) ||
	    !pr_migration_step(m, PR_EVENT_LOADED, "the device state is loaded", error))
		return FALSE;
	m->run_may_be_seen = TRUE;
	pr_crash_point(PR_CRASH_SOURCE_ACTIVE);
	if (!pr_send(conn, PR_CMD_POSTCOPY_RUN, NULL, &lost))
		pr_migration_failed(m, conn, lost);
	pr_crash_point(PR_CRASH_SOURCE_RUN_SENT);
	pr_source_fence(m);
	return TRUE;
}

/* From the moment that the guest is to stop until it is the destination's. */
static gboolean move_guest(PrMigration *m, PrConn *conn, GError **error)
{
	GThread *looker = NULL;
	gboolean was_running;
	Downtime times;

	m->holes_told = FALSE;
	m->run_may_be_seen = FALSE;
	gboolean ok = pr_handover_stopping(m, error) && mark(&times.began) &&
		      stop_guest(m, &was_running, error) && mark(&times.stopped) &&
		      tell_ram(m, conn, &looker, error) && mark(&times.told) &&
		      reached(PR_CRASH_SOURCE_RAM_TOLD) &&
		      send_device_state(m, conn, was_running, &times, error) &&
		      hand_over(m, conn, error);

	if (ok)
		log_downtime(&times);
	else
		pr_attempt_failed(m, *error); /* so that the thread does not wait for the peer */
	m->holes_told = send_remaining_holes(m, conn, looker, ok);
	return ok;
}

static gboolean switch_over(PrMigration *m, PrConn **ret_conn, GError **error)
{
	gboolean completed;

	if (!prepare_guest(m, error))
		return FALSE;
	PrConn *conn = connect_any(m, &completed, error);
	if (!conn && completed)
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "the destination says that a new migration is complete");
	if (!conn)
		return FALSE;
	*ret_conn = conn;
	return advise(m, conn, error) && send_early_state(m, conn, error) &&
	       move_guest(m, conn, error);
}

/* Before RUN: the guest runs on here. */
static void undo(PrMigration *m, PrConn *conn, const GError *why)
{
	pr_attempt_failed(m, why);
	pr_watch_enter(m->watch, &closing);
	if (conn)
		pr_conn_close(conn);
	pr_handover_revoked(m);
	pr_source_take_back(m, /* follows= */ FALSE);
}

/* ---- postcopy ---- */

static void wait_while_active(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	/* Ended by a change of state: SHUT, or any failure. */
	while (m->sm.state == PR_STATE_POSTCOPY_ACTIVE && !m->quit)
		g_cond_wait(&m->changed, &m->lock);
	g_mutex_unlock(&m->lock);
}

static gboolean is_over(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	gboolean over = m->quit || pr_state_is_over(m->sm.state);
	g_mutex_unlock(&m->lock);
	return over;
}

/* Whether this pause is ours to end. With the lock held. */
static gboolean may_recover_alone(PrMigration *m)
{
	return m->sm.state == PR_STATE_POSTCOPY_PAUSED && !m->held && !m->quit &&
	       m->uris->len > 1 && pr_capability(m->params, PR_CAP_AUTO_RECOVER);
}

/* Waits in postcopy-paused for a human, or for the time of the next automatic attempt. */
static void wait_for_recovery(PrMigration *m, guint attempts)
{
	gint64 due =
		g_get_monotonic_time() +
		(attempts == 0 ? 0 : MIN(BACKOFF_MIN_US << MIN(attempts - 1, 10), BACKOFF_MAX_US));

	g_mutex_lock(&m->lock);
	while (m->sm.state == PR_STATE_POSTCOPY_PAUSED && !m->quit) {
		gint64 look_again = g_get_monotonic_time() + CAPABILITY_LOOK_US;
		if (!may_recover_alone(m)) {
			g_mutex_unlock(&m->lock);
			pr_handover_update(m);
			g_mutex_lock(&m->lock);
			if (m->sm.state == PR_STATE_POSTCOPY_PAUSED && !m->quit)
				g_cond_wait_until(&m->changed, &m->lock, look_again);
		} else if (g_get_monotonic_time() >= due) {
			m->resume = PR_RESUME_AUTOMATIC;
			pr_migration_step_locked(m, PR_EVENT_RESUME, PR_ROLE_SOURCE,
						 "recovering over another path");
		} else {
			g_cond_wait_until(&m->changed, &m->lock, due);
		}
	}
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

/* The connection may have been lost before all holes were told; over rdma they can't be read. */
static gboolean tell_rest(PrMigration *m, PrConn *conn, GError **error)
{
	return m->holes_told || pr_source_tell_holes(m, conn, error);
}

/* One recovery: from recover-setup to postcopy-active, or back to paused. */
static PrConn *recover(PrMigration *m)
{
	g_autoptr(GError) error = NULL;
	gboolean completed;

	g_mutex_lock(&m->lock);
	gboolean wanted = m->sm.state == PR_STATE_POSTCOPY_RECOVER_SETUP;
	if (wanted)
		pr_migration_begin_attempt(m);
	g_mutex_unlock(&m->lock);
	if (!wanted)
		return NULL;

	PrConn *conn = connect_any(m, &completed, &error);
	if (completed) {
		pr_migration_step(m, PR_EVENT_SHUT, "the destination had every page already", NULL);
		return NULL;
	}
	pr_watch_enter(m->watch, &exchanging);
	if (conn && (conn->granted || pr_source_send_grants(conn, &error)) &&
	    tell_rest(m, conn, &error) && pr_source_recover(m, conn, &error)) {
		m->holes_told = TRUE; /* before what it has answered */
		pr_handover_update(m);
		pr_source_tell_guest(m, conn);
		pr_crash_point(PR_CRASH_SOURCE_RECOVERED);
		return conn;
	}
	pr_attempt_failed(m, error);
	if (conn)
		pr_conn_close(conn);
	return NULL;
}

static void await_last_owner(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	GThread *before = g_steal_pointer(&m->previous_thread);
	g_mutex_unlock(&m->lock);
	if (before)
		g_thread_join(before);
}

/* conn NULL: paused. */
static void run_until_complete(PrMigration *m, PrConn *conn)
{
	PrWatch *watch = m->watch;

	for (guint attempts = 0;; attempts++) {
		if (conn) {
			attempts = 0;
			pr_standby_keep(m);
			/* From here on it is for the destination to get on; a channel that takes nothing is
			 * silent, too. */
			pr_watch_idle(watch);
			if (pr_capability(m->params, PR_CAP_ZERO_PAGES))
				pr_source_tell_zero_pages(m, conn);
			wait_while_active(m);
			pr_watch_enter(watch, &closing);
			pr_conn_close(conn);
		}
		pr_watch_idle(watch);
		wait_for_recovery(m, attempts);
		if (is_over(m)) {
			pr_watch_enter(watch, &closing);
			pr_standby_stop(m);
			return;
		}
		conn = recover(m);
	}
}

static void note_end(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	gboolean completed = m->sm.state == PR_STATE_COMPLETED;
	g_mutex_unlock(&m->lock);
	if (completed)
		pr_handover_completed(m);
	pr_source_await_fence(m);
	if (completed)
		pr_source_unfence(m);
}

gpointer pr_source_thread(gpointer migration)
{
	PrMigration *m = migration;
	g_autoptr(GError) error = NULL;
	PrConn *conn = NULL;
	g_autoptr(PrWatch) watch = pr_watch_new(m->watchdog, "migration");

	pr_watch_enter(watch, &closing);
	await_last_owner(m);
	m->watch = watch;
	if (!switch_over(m, &conn, &error)) {
		undo(m, conn, error);
		return NULL;
	}
	run_until_complete(m, conn);
	note_end(m);
	return NULL;
}

gpointer pr_source_resumed_thread(gpointer migration)
{
	PrMigration *m = migration;
	g_autoptr(PrWatch) watch = pr_watch_new(m->watchdog, "migration");

	m->watch = watch;
	pr_source_fence_again(m);
	run_until_complete(m, NULL);
	note_end(m);
	return NULL;
}
