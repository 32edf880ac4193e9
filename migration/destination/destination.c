/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's story. The load thread waits for a pending_peer, a source whose HELLO was found good,
 * answers it, and carries out its commands until the connection ends; then it fences the connection and
 * either waits for the next pending_peer (paused) or tidies up. Beside it work the fault threads and the
 * pull thread, from the moment the source's guest is stopped.
 *
 * Fence: the workers let go of the path, every READ that was posted has come back, the path is
 * destroyed; only then are the claims of lost READs forgotten and the next HELLO answered. So nothing of that path
 * lands late. Standbys may pull along (rails.c): each fences its own path, and the READs that are under way there
 * keep their claims meanwhile. So the received bitmap that the next source gets never says too much.
 */
#include <string.h>
#include <unistd.h>

#include "guest/process.h"
#include "migration/memory/bitmap.h"
#include "migration/session/session.h"
#include "migration/core/crash-point.h"

#define SHUT_WAIT_MS 5000 /* for the source to close after SHUT */
#define GONE_LOOK_US                                                                               \
	(100 * 1000) /* between two looks whether the process of a guest that is gone has ended */

/* What the load thread is at, and how long that may take; the lengths that users set end it. */
static const PrWatchPoint carrying_out = {"carrying out a command of the source", 2000};
static const PrWatchPoint loading = {"loading the device state", 3000};
static const PrWatchPoint starting = {"starting the guest", 1000};
static const PrWatchPoint preparing = {"preparing the guest", 1000};
static const PrWatchPoint accepting = {"waiting for the source's data lanes", 6000};
static const PrWatchPoint fencing = {"fencing a connection", 3000};
static const PrWatchPoint tidying = {"turning the fault mode off", 1000};

/* ---- workers' news ---- */

static void send_progress(PrMigration *m, PrConn *conn)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrFaultStats stats;

	pr_fault_stats(m->faults, &stats);
	PrProgress progress = pr_destination_progress(m, &stats);
	pr_progress_encode(body, &progress);
	/* A failure reports itself. */
	if (pr_rail_send_rails(m, conn, NULL))
		pr_send(conn, PR_RP_PROGRESS, body, NULL);
}

/* The current connection. Workers may use it while they have its path: pr_conn_close() comes after
 * they have let go. */
static PrConn *current_conn(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	PrConn *conn = m->conn;
	g_mutex_unlock(&m->lock);
	return conn;
}

static void on_progress(void *opaque)
{
	PrMigration *m = opaque;
	PrConn *conn = current_conn(m);
	uint64_t travelled = pr_ram_received_bytes(m->ram) - pr_ram_zero_bytes(m->ram);

	g_mutex_lock(&m->lock);
	pr_migration_sample_rate(m, travelled, g_get_monotonic_time());
	g_mutex_unlock(&m->lock);
	if (conn)
		send_progress(m, conn);
}

void pr_destination_check_complete(PrMigration *m)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	if (!pr_ram_complete(m->ram))
		return;
	g_mutex_lock(&m->lock);
	PrConn *conn = m->conn;
	/* Before the guest has been started there is nothing to complete; RUN looks again. */
	gboolean done = m->guest_started && m->sm.state == PR_STATE_POSTCOPY_ACTIVE &&
			pr_migration_step_locked(m, PR_EVENT_SHUT, PR_ROLE_DESTINATION,
						 "every page is in place") == PR_ACTION_RELEASE;
	if (done)
		pr_state_memfd_set_stage(m->ram->state_memfd, PR_STATE_MEMFD_COMPLETED);
	g_mutex_unlock(&m->lock);
	if (!done)
		return;
	pr_crash_point(PR_CRASH_DESTINATION_COMPLETED_NOTED);
	if (conn) {
		send_progress(m, conn);
		pr_u32_encode(body, 0);
		/* If it is lost, the source finds out when it comes to resume: PR_HELLO_COMPLETED. */
		pr_send(conn, PR_RP_SHUT, body, NULL);
		pr_crash_point(PR_CRASH_DESTINATION_SHUT_SENT);
	}
	pr_session_flush_events(m);
}

static void on_complete(void *opaque)
{
	pr_destination_check_complete(opaque);
}

static void on_want(guint block, uint64_t page, void *opaque)
{
	PrMigration *m = opaque;
	PrConn *conn = current_conn(m);

	if (conn)
		pr_live_grants_request(m, conn, block, page);
}

/* A pull that is being ended meanwhile is not kicked any more. */
static void on_no_huge_read(void *opaque)
{
	PrMigration *m = opaque;

	g_mutex_lock(&m->lock);
	PrPull *pull = m->pull ? pr_pull_ref(m->pull) : NULL;
	g_mutex_unlock(&m->lock);
	if (pull)
		pr_pull_notify(pull);
	pr_pull_unref(pull);
}

static void on_broken(const GError *error, void *opaque)
{
	pr_migration_failed(opaque, NULL, error);
}

/* ---- the source's commands ---- */

static PrRamBlock *find_block(PrMigration *m, uint32_t index, const char *what, GError **error)
{
	if (index < m->ram->n_blocks)
		return &m->ram->blocks[index];
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
		    "%s for block %u, but there are only %u", what, index, m->ram->n_blocks);
	return NULL;
}

gboolean pr_destination_take_grant(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	uint32_t index;
	g_autofree PrWireGrant *wire = NULL;
	guint n;

	if (!pr_grants_decode(msg->body, msg->length, &index, &wire, &n, error))
		return FALSE;
	PrRamBlock *block = find_block(m, index, "GRANT", error);
	if (!block)
		return FALSE;
	for (guint i = 0; i < n; i++) {
		PrGrant grant = {index, wire[i].offset, wire[i].length, wire[i].addr, wire[i].key};
		if (!pr_ram_block_contains(block, grant.offset, grant.length)) {
			g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
				    "GRANT of a range outside of RAM block %s", block->idstr);
			return FALSE;
		}
		g_array_append_val(conn->grants, grant);
	}
	return TRUE;
}

void pr_destination_use_grants(PrConn *conn)
{
	conn->path->ops->set_grants(conn->path, (const PrGrant *)conn->grants->data,
				    conn->grants->len);
	conn->granted = TRUE;
}

gboolean pr_destination_start_workers(PrMigration *m, gboolean fresh, GError **error)
{
	PrFaultHooks fault_hooks = {on_complete, on_want, on_no_huge_read,
				    on_broken,	 m,	  m->watchdog};
	PrPullHooks pull_hooks = {on_progress, on_complete, on_broken, m, m->watchdog};

	g_free(m->guest_process);
	m->guest_process = m->guest->ops->process(m->guest);
	m->uffd = m->guest->ops->uffd_enable(m->guest, error);
	if (m->uffd < 0)
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_FAULTS_ON);
	/* Now that every access faults, what the memfds held before can go. */
	if (fresh && !pr_ram_empty(m->ram, error))
		return FALSE;
	if (!pr_destination_start_allocator(m, fresh, error) ||
	    !pr_destination_start_verify(m, error))
		return FALSE;
	PrFaultService *faults =
		pr_fault_start(m->ram, m->uffd, m->times, m->params, &fault_hooks, error);
	PrPull *pull =
		faults ? pr_pull_start(m->ram, m->uffd, m->params, faults, &pull_hooks, error)
		       : NULL;
	if (!pull) {
		pr_fault_stop(faults);
		return FALSE;
	}
	g_mutex_lock(&m->lock);
	m->faults = faults;
	m->pull = pull;
	g_mutex_unlock(&m->lock);
	return TRUE;
}

static gboolean begin_told(PrMigration *m, PrConn *conn)
{
	if (conn->path->incremental_grants)
		pr_live_grants_start(m, conn);
	return TRUE;
}

static gboolean store_state_fd(PrMigration *m, GError **error)
{
	if (!m->guest->ops->store_state_fd(m->guest, pr_state_memfd_fd(m->ram->state_memfd), error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_STATE_KEPT);
	return TRUE;
}

static gboolean take_advise(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	uint64_t summary, target;
	PrBinding binding;

	if (!pr_advise_decode(msg->body, msg->length, &summary, &target, error))
		return FALSE;
	if (target != PR_TARGET_PAGE) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
			    "the source's guest has pages of %" G_GUINT64_FORMAT
			    " bytes, ours of %u",
			    target, PR_TARGET_PAGE);
		return FALSE;
	}
	pr_conn_binding(conn, &binding);
	pr_state_memfd_set_verifies(m->ram->state_memfd, m->verifies);
	pr_state_memfd_set_identity(m->ram->state_memfd, &binding);
	/* In this order: who finds the fault mode on finds out why. */
	return (!m->guest->ops->prepare_load || m->guest->ops->prepare_load(m->guest, error)) &&
	       store_state_fd(m, error) &&
	       pr_destination_start_workers(m, /* fresh= */ TRUE, error) && begin_told(m, conn) &&
	       pr_migration_step(m, PR_EVENT_READY, "ready for RAM and device state", error);
}

/* Refused here, and the source hears why while its guest still runs. */
static gboolean take_early_state(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	if (m->guest->ops->load_early)
		return m->guest->ops->load_early(m->guest, msg->body, msg->length, error);
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
		    "the source's guest is of another kind than this one (%s)",
		    m->guest->ops->kind);
	return FALSE;
}

gboolean pr_destination_take_zero(PrMigration *m, const PrMsg *msg, GError **error)
{
	uint32_t index;
	g_autofree PrWireRange *ranges = NULL;
	guint n;

	if (!pr_ranges_decode(msg->body, msg->length, &index, &ranges, &n, error))
		return FALSE;
	PrRamBlock *block = find_block(m, index, "RAM_ZERO", error);
	if (!block)
		return FALSE;
	for (guint i = 0; i < n; i++) {
		if (!pr_ram_block_contains(block, ranges[i].offset, ranges[i].length)) {
			g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
				    "RAM_ZERO of a range outside of RAM block %s", block->idstr);
			return FALSE;
		}
		uint64_t page = ranges[i].offset / block->page_size;
		uint64_t pages = ranges[i].length / block->page_size;
		pr_ram_zero(m->ram, block, page, pages);
		pr_crash_point(PR_CRASH_DESTINATION_ZERO_RECEIVED);
		/* The fault threads wake whoever waits (fault.c); a call to the kernel for each range would
		 * cost more than the pages. */
		if (pages > 0 && pr_ram_take_waiting(block, page, pages) > 0)
			pr_fault_notify(m->faults);
	}
	return TRUE;
}

static gboolean take_zero(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	if (!pr_destination_take_zero(m, msg, error))
		return FALSE;
	pr_destination_check_complete(m);
	return TRUE;
}

static gboolean take_listen(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	if (!pr_migration_step(m, PR_EVENT_STOP, "the source's guest is stopped", error))
		return FALSE;
	if (!conn->granted)
		pr_destination_use_grants(conn);
	if (m->verify)
		pr_verify_attach(m->verify);
	/* Loading touches RAM. The bulk of it has to wait: it would slow down what the guest stands still
	 * for. */
	pr_fault_attach(m->faults, conn->path);
	pr_crash_point(PR_CRASH_DESTINATION_LISTENING);
	return m->guest->ops->load_begin(m->guest, error);
}

static gboolean note_loaded(PrMigration *m)
{
	pr_crash_point(PR_CRASH_DESTINATION_LOADED);
	pr_state_memfd_set_was_running(m->ram->state_memfd, m->guest_was_running);
	pr_state_memfd_set_stage(m->ram->state_memfd, PR_STATE_MEMFD_LOADED);
	pr_crash_point(PR_CRASH_DESTINATION_LOADED_NOTED);
	return TRUE;
}

static gboolean take_packaged(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	PrPackaged packaged;

	if (!pr_packaged_decode(msg->body, msg->length, &packaged, error))
		return FALSE;
	m->guest_was_running = packaged.guest_running;
	pr_watch_enter(m->watch, &loading);
	if (!packaged.last)
		return m->guest->ops->load_data(m->guest, packaged.data, packaged.length, error);
	/* The source hands the guest over only after the PONG that answers the PING behind this. */
	return m->guest->ops->load_end(m->guest, error) && note_loaded(m) &&
	       pr_migration_step(m, PR_EVENT_LOADED, "the device state is loaded", error);
}

static gboolean take_ping(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	uint32_t value;
	g_autoptr(GByteArray) body = g_byte_array_new();

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	pr_u32_encode(body, value);
	return pr_send(conn, PR_RP_PONG, body, error);
}

gboolean pr_destination_try_run(PrMigration *m, GError **error)
{
	pr_state_memfd_set_stage(m->ram->state_memfd, PR_STATE_MEMFD_RUN);
	pr_crash_point(PR_CRASH_DESTINATION_RUN_NOTED);
	if (m->guest_was_running && !m->guest->ops->run(m->guest, error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_RUNNING);
	pr_state_memfd_set_stage(m->ram->state_memfd, PR_STATE_MEMFD_STARTED);
	pr_crash_point(PR_CRASH_DESTINATION_STARTED_NOTED);
	return TRUE;
}

void pr_destination_run(PrMigration *m)
{
	g_autoptr(GError) error = NULL;

	pr_watch_enter(m->watch, &starting);
	if (!pr_destination_try_run(m, &error))
		g_critical("the guest has arrived but could not be started, start it by hand: %s",
			   error->message);
	g_mutex_lock(&m->lock);
	m->guest_started = TRUE;
	g_mutex_unlock(&m->lock);
}

static gboolean take_run(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	g_mutex_lock(&m->lock);
	PrAction action = pr_migration_step_locked(m, PR_EVENT_RUN, PR_ROLE_DESTINATION, "RUN");
	if (action == PR_ACTION_REFUSE)
		pr_migration_copy_failure(m, error);
	g_mutex_unlock(&m->lock);
	if (action == PR_ACTION_RUN) {
		pr_destination_run(m);
		pr_pull_attach(m->pull, conn->path);
	}
	if (action != PR_ACTION_REFUSE)
		pr_destination_check_complete(m);
	return action != PR_ACTION_REFUSE;
}

static gboolean take_recv_bitmap(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_destination_send_bitmap(m, conn, msg, error);
}

static gboolean take_resume(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	if (!conn->granted)
		pr_destination_use_grants(conn);
	return pr_destination_resume(m, conn, error);
}

static gboolean take_reason(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_take_reason(msg, "source", error);
}

/* Malformed, or it would have been taken early (connection.c). */
static gboolean take_hashes(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_hashes_take(conn, msg, error);
}

static gboolean take_note(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_take_note(m, msg, "source", error);
}

/* Over a connection that was a standby until just now. */
static gboolean take_lost(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_standby_take_lost(m, msg, "source", error);
}

#define IN(state_) (1u << PR_STATE_##state_)
#define IN_POSTCOPY                                                                                \
	(IN(POSTCOPY_ACTIVE) | IN(POSTCOPY_PAUSED) | IN(POSTCOPY_RECOVER) | IN(COMPLETED))
#define IN_ANY (~0u)

/* The commands, and the states in which they make sense. A late one of an epoch that has ended is
 * carried out where that is harmless. */
static const struct Command {
	uint16_t type;
	guint states;
	gboolean (*take)(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error);
} commands[] = {
	{PR_CMD_GRANT, IN(ACTIVE) | IN(POSTCOPY_RECOVER) | IN(POSTCOPY_PAUSED),
	 pr_destination_take_grant},
	{PR_CMD_POSTCOPY_ADVISE, IN(SETUP), take_advise},
	{PR_CMD_EARLY_STATE, IN(ACTIVE), take_early_state},
	{PR_CMD_PING, IN_ANY, take_ping},
	{PR_CMD_RAM_ZERO, IN(ACTIVE) | IN(DEVICE) | IN_POSTCOPY, take_zero},
	{PR_CMD_POSTCOPY_LISTEN, IN(ACTIVE), take_listen},
	{PR_CMD_PACKAGED, IN(DEVICE), take_packaged},
	{PR_CMD_POSTCOPY_RUN, IN_POSTCOPY, take_run},
	{PR_CMD_RECV_BITMAP, IN(POSTCOPY_RECOVER), take_recv_bitmap},
	{PR_CMD_POSTCOPY_RESUME, IN(POSTCOPY_RECOVER), take_resume},
	{PR_CMD_HASHES, IN_ANY, take_hashes},
	{PR_MSG_NOTE, IN_ANY, take_note},
	{PR_MSG_LOST, IN_ANY, take_lost},
	{PR_MSG_PAUSE, IN_ANY, take_reason},
	{PR_MSG_HOLD, IN_ANY, take_reason},
	{PR_MSG_ERROR, IN_ANY, take_reason},
};

static PrState current_state(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	PrState state = m->sm.state;
	g_mutex_unlock(&m->lock);
	return state;
}

static gboolean take_message(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	PrState state = current_state(m);

	for (guint i = 0; i < G_N_ELEMENTS(commands); i++)
		if (commands[i].type == msg->type && (commands[i].states & 1u << state))
			return commands[i].take(m, conn, msg, error);
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
		    "the source sent %s, which makes no sense to a destination that is %s",
		    pr_msg_name(msg->type), pr_state_name(state));
	return FALSE;
}

/* ---- the load thread ---- */

/* After SHUT the source closes; should it not, we do. */
static gboolean shutdown_timed_out(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	gboolean over = pr_state_is_over(m->sm.state) &&
			g_get_monotonic_time() - m->sm.ended > SHUT_WAIT_MS * 1000ll;
	g_mutex_unlock(&m->lock);
	return over;
}

static void carry_out_commands(PrMigration *m, PrConn *conn)
{
	while (!shutdown_timed_out(m)) {
		g_autoptr(GError) error = NULL;
		pr_watch_idle(m->watch);
		g_autoptr(PrMsg) msg = pr_control_recv(conn->control, SHUT_WAIT_MS, &error);
		pr_watch_enter(m->watch, &carrying_out);
		if (!msg && g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT))
			continue;
		if (!msg || !take_message(m, conn, msg, &error)) {
			pr_conn_failed(error, conn);
			return;
		}
	}
}

static gboolean admit_guest(PrMigration *m, PrConn *conn, const PrHello *hello, GError **error)
{
	guint n;
	pr_watch_enter(m->watch, &preparing);
	const PrGuestBlock *blocks =
		m->guest->ops->prepare(m->guest, PR_GUEST_DESTINATION, &n, error);
	g_autoptr(PrRam) ram = blocks ? pr_ram_new(blocks, n, PR_GUEST_DESTINATION, error) : NULL;

	if (!ram || !pr_ram_check_blocks(ram, hello->blocks, hello->n_blocks, error))
		return FALSE;
	/* What is left of the last attempt's connections may use its RAM. */
	pr_migration_await_threads(m);
	pr_migration_begin_unfenced(m);
	g_mutex_lock(&m->lock);
	PrRam *old = m->ram;
	m->ram = g_steal_pointer(&ram);
	m->verifies = pr_capability(m->params, PR_CAP_VERIFY) &&
		      (conn->peer_can & PR_HELLO_CAN_VERIFY) != 0;
	m->verify_stats = (PrVerifyStats){0};
	g_clear_pointer(&m->last_corrupt, g_free);
	g_mutex_unlock(&m->lock);
	pr_ram_free(old);
	pr_migration_begin_times(m);
	return TRUE;
}

static gboolean admit(PrMigration *m, PrConn *conn, const PrHello *hello, GError **error)
{
	const PrUri *uri = conn->uri;
	g_autofree char *reason = g_strdup_printf("connected again over %s", conn->name);
	PrBinding binding;

	if (strcmp(pr_scheme_transport(hello->scheme), pr_scheme_transport(uri->scheme)) != 0) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
			    "the source comes over \"%s\", but this port is for \"%s\"",
			    hello->scheme, uri->scheme);
		return FALSE;
	}
	if (!hello->resume)
		return admit_guest(m, conn, hello, error);
	if (!pr_ram_check_blocks(m->ram, hello->blocks, hello->n_blocks, error))
		return FALSE;
	pr_conn_binding(conn, &binding);
	binding.epoch = hello->epoch;
	pr_state_memfd_set_identity(m->ram->state_memfd, &binding);
	pr_crash_point(PR_CRASH_DESTINATION_READMITTED);
	return pr_migration_step(m, PR_EVENT_CONNECTED, reason, error);
}

gboolean pr_destination_accept(PrConn *conn, PrListener *listener, gboolean standby, GError **error)
{
	PrDataListener *data = pr_listener_data(listener);
	guint more = MIN(pr_params_fault_threads(conn->m->params) - 1,
			 pr_hello_get_more_lanes(conn->peer_can));
	PrHelloAck ack = {
		.status = PR_HELLO_OK,
		.capabilities =
			pr_hello_more_lanes(more) | (conn->m->verifies ? PR_HELLO_CAN_VERIFY : 0),
		.data_port = data->ops->listener_port(data),
	};
	PrBinding binding;
	PrDataPath *path;

	conn->n_lanes = PR_LANES_MIN + more;
	pr_conn_binding(conn, &binding);
	data->ops->expect(data, &binding);
	if (!pr_control_answer(conn->control, &ack, error) ||
	    !(standby ? pr_conn_stand_by(conn, error) : pr_conn_publish(conn, error))) {
		data->ops->forget(data, &binding);
		return FALSE;
	}
	PrPathSetup setup = pr_conn_setup(conn, &binding, ack.data_port);
	path = data->ops->accept(data, &setup, error);
	/* The source may have hung up over it by now, and that is all that is told then. */
	if (!path && error)
		g_debug("%s", (*error)->message);
	return path && pr_conn_set_path(conn, path, error);
}

/* Answers the ACTIVATE. */
static gboolean take_over(PrConn *conn, GError **error)
{
	PrHelloAck ack = {.status = PR_HELLO_OK};

	return pr_conn_adopt(conn, error) && pr_destination_send_activated(conn, &ack, error);
}

/* Nothing of this connection touches guest RAM after this. */
static void fence(PrMigration *m, PrConn *conn)
{
	pr_watch_enter(m->watch, &fencing);
	pr_conn_shutdown(conn);
	pr_live_grants_stop(conn);
	if (m->faults) {
		pr_fault_detach(m->faults);
		pr_pull_detach(m->pull);
		if (m->verify)
			pr_verify_detach(m->verify);
	}
	pr_conn_close(conn);
	if (m->pull) {
		pr_ram_clear_ungranted(m->ram);
		pr_pull_reclaim_inflight(m->pull);
	}
}

/* Whether the pending_peer is still wanted, now that its turn has come. */
static gboolean begin(PrMigration *m, const PrHello *hello, GError **error)
{
	g_mutex_lock(&m->lock);
	gboolean wanted =
		m->sm.state == (hello->resume ? PR_STATE_POSTCOPY_PAUSED : PR_STATE_SETUP);
	if (wanted)
		pr_migration_begin_attempt(m);
	else
		pr_migration_copy_failure(m, error);
	g_mutex_unlock(&m->lock);
	return wanted;
}

static PrConn *conn_of(PrMigration *m, PrPendingPeer *pending_peer)
{
	g_autofree char *name = NULL;
	PrConn *conn;

	if (pending_peer->standby)
		return g_steal_pointer(&pending_peer->standby);
	name = pr_destination_path_name(pending_peer->control, pending_peer->listener);
	conn = pr_conn_new(m, pr_listener_uri(pending_peer->listener), name,
			   pending_peer->hello.epoch);
	conn->control = g_steal_pointer(&pending_peer->control);
	return conn;
}

static void turn_away(PrConn *conn, gboolean standby, const GError *why)
{
	PrHelloAck ack = {.status = PR_HELLO_OK};

	pr_refuse(&ack, "%s", why->message);
	if (standby)
		pr_destination_send_activated(conn, &ack, NULL);
	else
		pr_control_answer(conn->control, &ack, NULL);
}

static gboolean bring_up(PrConn *conn, PrPendingPeer *pending_peer, gboolean standby,
			 GError **error)
{
	pr_watch_enter(conn->m->watch, &accepting);
	return standby ? take_over(conn, error)
		       : pr_destination_accept(conn, pending_peer->listener, FALSE, error);
}

static void serve(PrMigration *m, PrPendingPeer *pending_peer)
{
	g_autoptr(GError) error = NULL;
	gboolean standby = pending_peer->standby != NULL;
	PrConn *conn = conn_of(m, pending_peer);

	if (!begin(m, &pending_peer->hello, &error)) {
		turn_away(conn, standby, error);
		pr_attempt_failed(m, error);
		fence(m, conn);
		return;
	}
	g_set_object(&conn->cancel, m->cancel);
	conn->peer_can = pending_peer->hello.capabilities;
	if (!admit(m, conn, &pending_peer->hello, &error)) {
		turn_away(conn, standby, error);
		pr_attempt_failed(m, error);
	} else if (!bring_up(conn, pending_peer, standby, &error)) {
		pr_attempt_failed(m, error);
	} else {
		carry_out_commands(m, conn);
	}
	fence(m, conn);
}

static void stop_workers(PrMigration *m)
{
	g_mutex_lock(&m->pull_lock);
	g_mutex_lock(&m->lock);
	PrPull *pull = g_steal_pointer(&m->pull);
	PrFaultService *faults = m->faults;
	g_mutex_unlock(&m->lock);
	pr_pull_stop(pull);
	g_mutex_unlock(&m->pull_lock);
	PrVerify *verify = pr_destination_stop_verify(m);

	g_mutex_lock(&m->lock);
	if (faults)
		pr_fault_stats(faults, &m->fault_stats);
	m->faults = NULL;
	g_mutex_unlock(&m->lock);
	pr_fault_stop(faults);
	if (verify)
		m->ram->verify = NULL;
	pr_verify_free(verify);
	pr_destination_stop_allocator(m);
}

static void close_uffd(PrMigration *m)
{
	if (m->uffd >= 0)
		close(m->uffd);
	m->uffd = -1;
}

void pr_destination_leave(PrMigration *m)
{
	stop_workers(m);
	close_uffd(m);
}

/* Ends it, one way or the other: the guest is freed of the fault mode. */
static void tidy_up(PrMigration *m)
{
	g_autoptr(GError) error = NULL;
	PrState state = current_state(m);
	gboolean undone = state == PR_STATE_FAILING || state == PR_STATE_CANCELLING;

	pr_watch_enter(m->watch, &tidying);
	stop_workers(m);
	if (undone && m->ram && m->ram->state_memfd) {
		pr_state_memfd_set_stage(m->ram->state_memfd, PR_STATE_MEMFD_ENDED);
		pr_crash_point(PR_CRASH_DESTINATION_ENDED_NOTED);
	}
	if (m->uffd >= 0 && !m->guest->ops->uffd_disable(m->guest, &error))
		g_warning("turning the fault mode off: %s", error->message);
	else if (undone)
		m->guest->ops->store_state_fd(m->guest, -1, NULL);
	pr_crash_point(PR_CRASH_DESTINATION_RELEASED);
	/* A process that has ended is let go of as a whole (await_change). */
	if (!g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED))
		close_uffd(m);
	if (undone)
		pr_migration_step(m, PR_EVENT_CLEANED_UP, "ready for another try", NULL);
}

static void let_go(PrMigration *m)
{
	stop_workers(m);
	close_uffd(m);
	if (m->guest->ops->let_go)
		m->guest->ops->let_go(m->guest);
	g_info("the guest's process has ended: its page faults are served no more");
}

/* Nobody can recover a guest that is gone (admission.c). But kernel threads may wait for its pages, as KVM's do for
 * asynchronous page faults: they, its memory, and perhaps the end of its process, for as long as a userfaultfd of it
 * is open. Who told that it is gone may have meant QMP's socket alone, so the process itself is looked at. With the
 * lock held. */
static void await_change(PrMigration *m)
{
	if (!m->guest_gone || m->uffd < 0) {
		/* Ended by a pending_peer, a cancellation, another role, the guest's death, or the end. */
		g_cond_wait(&m->changed, &m->lock);
		return;
	}
	g_mutex_unlock(&m->lock);
	if (!pr_process_uses_memory(m->guest_process))
		let_go(m);
	g_mutex_lock(&m->lock);
	if (m->uffd >= 0)
		g_cond_wait_until(&m->changed, &m->lock, g_get_monotonic_time() + GONE_LOOK_US);
}

/* Waits for something to do. FALSE: the thread's time is over. */
static gboolean wait_for_peer(PrMigration *m, PrPendingPeer **ret)
{
	pr_watch_idle(m->watch);
	g_mutex_lock(&m->lock);
	while (!m->quit && !m->pending_peer && m->sm.role != PR_ROLE_SOURCE &&
	       m->sm.state != PR_STATE_CANCELLING)
		await_change(m);
	gboolean go_on = !m->quit && m->sm.role != PR_ROLE_SOURCE;
	*ret = go_on ? g_steal_pointer(&m->pending_peer) : NULL;
	g_mutex_unlock(&m->lock);
	return go_on;
}

gpointer pr_load_thread(gpointer migration)
{
	PrMigration *m = migration;
	PrPendingPeer *pending_peer;
	g_autoptr(PrWatch) watch = pr_watch_new(m->watchdog, "load");

	m->watch = watch;
	while (wait_for_peer(m, &pending_peer)) {
		if (pending_peer)
			serve(m, pending_peer);
		pr_pending_peer_free(pending_peer);
		if (!pr_state_is_postcopy(current_state(m)))
			tidy_up(m);
	}
	pr_destination_leave(m);
	return NULL;
}
