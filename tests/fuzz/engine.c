/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/engine.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "migration/memory/bitmap.h"
#include "tests/fuzz/seams.h"

#define CONNECTIONS_MAX 12

/* The peer's end of a connection. */
typedef struct Peer {
	int fd, engine_fd;
	GArray *segments;
	guint at; /* index of the next segment */
	GByteArray *received;
} Peer;

static FuzzEngine *engine;

static PrWireBlock blocks[FUZZ_N_BLOCKS] = {
	{.idstr = "mem0", .size = 70 * 4096, .page_size = 4096},
	{.idstr = "mem1", .size = 128 * 4096, .page_size = 4096},
	{.idstr = "huge", .size = 3 * 65536, .page_size = 65536},
};
static PrGuestBlock guest_blocks[FUZZ_N_BLOCKS];

/* ---- the guest ---- */

static void make_blocks(void)
{
	for (guint i = 0; !guest_blocks[0].idstr && i < FUZZ_N_BLOCKS; i++) {
		PrGuestBlock *block = &guest_blocks[i];

		*block = (PrGuestBlock){
			.size = blocks[i].size,
			.page_size = blocks[i].page_size,
			.memfd = memfd_create("fuzz", MFD_CLOEXEC),
			.base = 0x100000000ull * (i + 1),
		};
		g_assert(block->memfd >= 0 && ftruncate(block->memfd, block->size) == 0);
		/* A page of data, pages of zeros, and a hole. */
		g_assert(pwrite(block->memfd, "data", 4, 0) == 4);
		g_assert(pwrite(block->memfd, "\0", 1, block->page_size) == 1);
	}
	for (guint i = 0; i < FUZZ_N_BLOCKS; i++)
		guest_blocks[i].idstr = blocks[i].idstr;
}

static gboolean guest_does(uint8_t flaw, GError **error)
{
	if (!(engine->flaws & flaw))
		return TRUE;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED, "the guest does not want to");
	return FALSE;
}

static const PrGuestBlock *guest_prepare(PrGuest *guest, PrGuestRole role, guint *ret_n,
					 GError **error)
{
	*ret_n = FUZZ_N_BLOCKS;
	engine->loaded = FALSE;
	engine->n_runs = engine->n_resumes = 0;
	engine->handed_over = FALSE;
	return guest_does(FUZZ_FAIL_PREPARE, error) ? guest_blocks : NULL;
}

static gboolean guest_stop(PrGuest *guest, gboolean *ret_was_running, GError **error)
{
	g_assert(!engine->stopped);
	*ret_was_running = !(engine->flaws & FUZZ_IS_PAUSED);
	engine->stopped = guest_does(FUZZ_FAIL_STOP, error);
	return engine->stopped;
}

/* The guest runs on one side at most, so not here once the peer may have received RUN. */
static gboolean guest_resume(PrGuest *guest, GError **error)
{
	g_assert(!engine->handed_over);
	engine->stopped = FALSE;
	engine->n_resumes++;
	return TRUE;
}

static gboolean guest_save(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			   GError **error)
{
	g_assert(engine->stopped);
	return sink("device", 6, opaque, error) && sink("state", 5, opaque, error) &&
	       guest_does(FUZZ_FAIL_SAVE, error);
}

static gboolean guest_load_begin(PrGuest *guest, GError **error)
{
	g_assert(engine->faulting);
	engine->loading = TRUE;
	return TRUE;
}

static gboolean guest_load_data(PrGuest *guest, const void *data, gsize len, GError **error)
{
	g_assert(engine->loading);
	return guest_does(FUZZ_FAIL_LOAD, error);
}

static gboolean guest_load_end(PrGuest *guest, GError **error)
{
	g_assert(engine->loading);
	engine->loading = FALSE;
	engine->loaded = guest_does(FUZZ_FAIL_LOADED, error);
	return engine->loaded;
}

static void guest_load_abort(PrGuest *guest)
{
	engine->loading = FALSE;
}

/* The guest starts once, and only with all of its device state. */
static gboolean guest_run(PrGuest *guest, GError **error)
{
	g_assert(engine->loaded && !engine->n_runs);
	engine->n_runs++;
	return TRUE;
}

static GArray *guest_vcpu_threads(PrGuest *guest, GError **error)
{
	g_assert(!engine->faulting);
	return g_array_new(FALSE, FALSE, sizeof(uint32_t));
}

static int guest_uffd_enable(PrGuest *guest, GError **error)
{
	if (!guest_does(FUZZ_FAIL_FAULTS, error))
		return -1;
	engine->faulting = TRUE;
	return dup(guest_blocks[0].memfd);
}

static gboolean guest_uffd_disable(PrGuest *guest, GError **error)
{
	engine->faulting = FALSE;
	return TRUE;
}

static gboolean guest_fence(PrGuest *guest, GError **error)
{
	return TRUE;
}

static gboolean guest_unfence(PrGuest *guest, GError **error)
{
	return TRUE;
}

static gboolean guest_was_fenced(PrGuest *guest)
{
	return FALSE;
}

static void guest_on_run_again(PrGuest *guest, PrGuestRanAgain ran_again, void *opaque)
{
}

static gboolean guest_store_state_fd(PrGuest *guest, int memfd, GError **error)
{
	return TRUE;
}

static int guest_fetch_state(PrGuest *guest, GError **error)
{
	return -1;
}

static char *guest_process(PrGuest *guest)
{
	return g_strdup("0 0 0 -"); /* of a process that does not exist here */
}

static void guest_on_death(PrGuest *guest, PrGuestDied died, void *opaque)
{
}

static const PrGuestOps guest_ops = {
	.kind = "fuzz",
	.prepare = guest_prepare,
	.process = guest_process,
	.stop = guest_stop,
	.resume = guest_resume,
	.save = guest_save,
	.load_begin = guest_load_begin,
	.load_data = guest_load_data,
	.load_end = guest_load_end,
	.load_abort = guest_load_abort,
	.run = guest_run,
	.vcpu_threads = guest_vcpu_threads,
	.uffd_enable = guest_uffd_enable,
	.uffd_disable = guest_uffd_disable,
	.fence = guest_fence,
	.unfence = guest_unfence,
	.was_fenced = guest_was_fenced,
	.on_run_again = guest_on_run_again,
	.store_state_fd = guest_store_state_fd,
	.fetch_state = guest_fetch_state,
	.on_death = guest_on_death,
};

/* ---- connections ---- */

static void peer_free(gpointer opaque)
{
	Peer *peer = opaque;

	close(peer->fd);
	g_array_unref(peer->segments);
	g_byte_array_unref(peer->received);
	g_free(peer);
}

/* Checks that the peer can decode each frame that the engine has sent. */
static void check_frames(GByteArray *received)
{
	gsize at = 0;

	while (received->len - at >= PR_WIRE_HEADER_BYTES) {
		PrMsgHeader header;

		g_assert(pr_header_decode(received->data + at, &header, NULL));
		g_assert(pr_msg_is_known(header.type));
		if (received->len - at - PR_WIRE_HEADER_BYTES < header.length)
			break;
		at += PR_WIRE_HEADER_BYTES + header.length;
	}
	if (at)
		g_byte_array_remove_range(received, 0, at);
}

static void drain(Peer *peer)
{
	uint8_t room[16384];
	ssize_t n;

	while ((n = recv(peer->fd, room, sizeof room, MSG_DONTWAIT)) > 0)
		g_byte_array_append(peer->received, room, n);
	check_frames(peer->received);
}

static Peer *find_peer(int engine_fd)
{
	/* From the last one, because descriptors are reused. */
	for (guint i = engine->peers->len; i > 0; i--) {
		Peer *peer = engine->peers->pdata[i - 1];

		if (peer->engine_fd == engine_fd)
			return peer;
	}
	g_assert_not_reached();
}

static void command(uint8_t what)
{
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GError) error = NULL;
	gboolean ok = TRUE;

	switch (what % 4) {
	case 0:
		ok = pr_migration_pause(engine->m, &error);
		break;
	case 1:
		ok = pr_migration_cancel(engine->m, &error);
		break;
	case 2:
		ok = pr_migration_start(engine->m, FUZZ_URI, TRUE, &error);
		break;
	}
	fuzz_outcome(ok, error);
	pr_migration_query(engine->m, &info);
}

static void write_segment(Peer *peer)
{
	const GByteArray *bytes = g_array_index(peer->segments, ScriptSegment, peer->at).bytes;

	/* The engine may have shut the connection down. */
	if (bytes->len)
		send(peer->fd, bytes->data, bytes->len, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* The engine has read the whole segment: does the segment's end action, and sends the next one. */
static void continue_script(Peer *peer)
{
	ScriptSegment done = g_array_index(peer->segments, ScriptSegment, peer->at);

	if (done.then == SCRIPT_END) {
		shutdown(peer->fd, SHUT_WR);
		return;
	}
	peer->at++;
	if (done.then == SCRIPT_COMMAND)
		command(done.what);
	else
		fuzz_engine_accept(engine);
	write_segment(peer);
}

gboolean fuzz_engine_has_next(const FuzzEngine *self)
{
	return self->input.left && self->peers->len < CONNECTIONS_MAX;
}

/* Returns -1 when the input has no more connections. */
static int next_fd(FuzzEngine *self)
{
	Peer *peer;
	int fds[2];

	if (!fuzz_engine_has_next(self))
		return -1;
	self->lanes_fail = fuzz_u8(&self->input) & FUZZ_FAIL_LANES;
	g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
	peer = g_new0(Peer, 1);
	*peer = (Peer){
		.fd = fds[1],
		.engine_fd = fds[0],
		.segments = script_read(&self->input, blocks, FUZZ_N_BLOCKS),
		.received = g_byte_array_new(),
	};
	g_ptr_array_add(self->peers, peer);
	write_segment(peer);
	return fds[0];
}

GSocket *fuzz_engine_next(FuzzEngine *self)
{
	int fd = next_fd(self);

	return fd < 0 ? NULL : g_socket_new_from_fd(fd, NULL);
}

gboolean fuzz_engine_accept(FuzzEngine *self)
{
	int fd = self->listener ? next_fd(self) : -1;

	if (fd >= 0)
		reach_listener_accept(self->listener, fd);
	return fd >= 0;
}

/* ---- the seams ---- */

/* A thread that serves or frees one connection runs here, to its end. The rig does the work of the
 * other threads. */
GThread *fuzz_thread_new(const char *name, GThreadFunc func, gpointer opaque)
{
	if (strcmp(name, "standby") == 0 || strcmp(name, "closing") == 0 ||
	    strcmp(name, "holes") == 0)
		func(opaque);
	return g_thread_ref(g_thread_self());
}

gpointer fuzz_thread_join(GThread *thread)
{
	g_thread_unref(thread);
	return NULL;
}

static void read_message(PrControl *control)
{
	Peer *peer = find_peer(reach_control_fd(control));

	drain(peer);
	while (!reach_control_read(control))
		continue_script(peer);
}

void fuzz_cond_wait(GCond *cond, GMutex *lock)
{
	g_mutex_unlock(lock);
	if (cond == &engine->m->session.changed)
		engine->wait(engine);
	else
		read_message(reach_control_of(cond));
	g_mutex_lock(lock);
}

gboolean fuzz_cond_wait_until(GCond *cond, GMutex *lock, gint64 deadline)
{
	if (cond != &engine->m->session.changed && deadline <= g_get_monotonic_time())
		return FALSE;
	fuzz_cond_wait(cond, lock);
	return TRUE;
}

PrWait fuzz_wait_fd(int fd, short events, gint64 deadline, GCancellable *cancel)
{
	Peer *peer = find_peer(fd);

	drain(peer);
	if (events & G_IO_IN)
		continue_script(peer);
	return PR_WAIT_READY;
}

GSocketConnection *fuzz_dial(const PrUri *uri, uint16_t port, gint64 deadline, GCancellable *cancel,
			     GError **error)
{
	g_autoptr(GSocket) socket = fuzz_engine_next(engine);

	if (socket)
		return g_socket_connection_factory_create_connection(socket);
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "nobody is there");
	return NULL;
}

const PrTransportOps *fuzz_transport_find(const char *scheme, GError **error)
{
	if (strcmp(scheme, fuzz_transport.scheme) == 0)
		return &fuzz_transport;
	g_set_error(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED, "scheme \"%s\" is not known",
		    scheme);
	return NULL;
}

/* ---- creation and end ---- */

static void on_state(PrState state, const char *reason, void *opaque)
{
	g_assert(*reason);
	if (engine->role == PR_GUEST_SOURCE && state == PR_STATE_POSTCOPY_ACTIVE)
		engine->handed_over = TRUE;
}

static void on_path(const char *uri, PrPathState state, const char *device, const char *reason,
		    void *opaque)
{
}

FuzzEngine *fuzz_engine_new(const uint8_t *data, gsize size, PrGuestRole role)
{
	PrMigrationHooks hooks = {.on_state = on_state, .on_path = on_path};

	make_blocks();
	g_assert(!engine);
	engine = g_new0(FuzzEngine, 1);
	engine->input = (FuzzInput){data, size};
	engine->flaws = fuzz_u8(&engine->input);
	engine->role = role;
	engine->guest.ops = &guest_ops;
	engine->data.ops = &fuzz_transport;
	engine->peers = g_ptr_array_new_with_free_func(peer_free);
	pr_params_init(&engine->params);
	engine->m = pr_migration_new(&engine->guest, &engine->params, &hooks);
	return engine;
}

/* Checks that the bitmaps agree with the counts of received, transferred and requested pages. */
static void check_ram(const PrSession *session)
{
	uint64_t received = 0;

	if (!session->ram || engine->role == PR_GUEST_SOURCE)
		return;
	for (guint i = 0; i < session->ram->n_blocks; i++) {
		const PrRamBlock *block = &session->ram->blocks[i];

		received += pr_bitmap_count(block->received, block->n_pages) * block->page_size;
		g_assert(!pr_bitmap_any(block->inflight, 0, block->n_pages));
	}
	g_assert_cmpuint(received, ==, pr_ram_received_bytes(session->ram));
	g_assert_cmpuint(pr_ram_zero_bytes(session->ram), <=, received);
	if (session->sm.role == PR_ROLE_DESTINATION && session->sm.state == PR_STATE_COMPLETED)
		g_assert(pr_ram_complete(session->ram));
}

void fuzz_engine_free(FuzzEngine *self)
{
	check_ram(&self->m->session);
	g_assert(!self->m->session.conn);
	pr_migration_free(self->m);
	if (self->listener)
		reach_listener_free(self->listener);
	g_assert(!self->n_expected && !self->n_paths);
	for (guint i = 0; i < self->peers->len; i++)
		drain(self->peers->pdata[i]);
	g_ptr_array_unref(self->peers);
	g_free(self);
	engine = NULL;
}

/* ---- the transport ---- */

typedef struct Path {
	PrDataPath parent;
	gboolean granted, shut, drained;
	guint probes[PR_LANES_MAX];
} Path;

static uint16_t transport_listener_port(PrDataListener *listener)
{
	return 0;
}

static void transport_offer(PrDataListener *listener, GSocketConnection *connection,
			    const PrLaneHello *hello)
{
	g_object_unref(connection);
}

static void transport_listener_close(PrDataListener *listener)
{
}

static void transport_expect(PrDataListener *listener, const PrBinding *binding)
{
	engine->n_expected++;
}

static void transport_forget(PrDataListener *listener, const PrBinding *binding)
{
	g_assert(engine->n_expected);
	engine->n_expected--;
}

static PrDataPath *transport_connect(const PrPathSetup *setup, GError **error)
{
	Path *path;

	g_assert(setup->n_regions == FUZZ_N_BLOCKS && setup->timeout_ms);
	if (engine->lanes_fail) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT, "no lanes");
		return NULL;
	}
	path = g_new0(Path, 1);
	path->parent.ops = &fuzz_transport;
	path->parent.n_lanes = MAX(setup->n_lanes, PR_LANES_MIN);
	engine->n_paths++;
	return &path->parent;
}

static PrDataPath *transport_accept(PrDataListener *listener, const PrPathSetup *setup,
				    GError **error)
{
	transport_forget(listener, &setup->binding);
	return transport_connect(setup, error);
}

static GArray *transport_grants(PrDataPath *path)
{
	GArray *grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));

	for (guint i = 0; i < FUZZ_N_BLOCKS; i++) {
		PrGrant grant = {i, 0, blocks[i].page_size, 0x1000, 1};

		g_array_append_val(grants, grant);
	}
	return grants;
}

static void transport_set_grants(PrDataPath *opaque, const PrGrant *grants, guint n)
{
	Path *path = (Path *)opaque;

	g_assert(!path->granted && !path->drained);
	path->granted = TRUE;
	for (guint i = 0; i < n; i++) {
		g_assert(grants[i].block < FUZZ_N_BLOCKS && grants[i].length);
		g_assert(grants[i].offset + grants[i].length <= blocks[grants[i].block].size);
	}
}

static gboolean transport_post_probe(PrDataPath *opaque, PrLaneId lane, uint64_t token)
{
	Path *path = (Path *)opaque;

	g_assert(path->granted && !path->drained && !path->probes[lane]);
	path->probes[lane] = !path->shut;
	return !path->shut;
}

static guint transport_poll(PrDataPath *opaque, PrLaneId lane, PrCompletion *ret, guint max)
{
	Path *path = (Path *)opaque;

	g_assert(path->probes[lane] == 1 && max);
	path->probes[lane] = 0;
	*ret = (PrCompletion){lane, TRUE};
	return 1;
}

static const char *transport_device(PrDataPath *path)
{
	return NULL;
}

static void transport_shutdown(PrDataPath *path)
{
	((Path *)path)->shut = TRUE;
}

static gboolean transport_drain(PrDataPath *path, guint timeout_ms)
{
	((Path *)path)->drained = TRUE;
	return TRUE;
}

static void transport_destroy(PrDataPath *opaque)
{
	Path *path = (Path *)opaque;

	g_assert(path->shut && path->drained);
	engine->n_paths--;
	g_free(path);
}

static gboolean transport_admit_message(const PrUri *uri, gboolean outgoing, uint16_t type)
{
	return TRUE;
}

const PrTransportOps fuzz_transport = {
	.scheme = "fuzz",
	.listener_port = transport_listener_port,
	.offer = transport_offer,
	.listener_close = transport_listener_close,
	.expect = transport_expect,
	.forget = transport_forget,
	.accept = transport_accept,
	.connect = transport_connect,
	.grants = transport_grants,
	.set_grants = transport_set_grants,
	.post_probe = transport_post_probe,
	.poll = transport_poll,
	.device = transport_device,
	.shutdown = transport_shutdown,
	.drain = transport_drain,
	.destroy = transport_destroy,
	.admit_message = transport_admit_message,
};
