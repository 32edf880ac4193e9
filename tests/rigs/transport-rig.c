/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/transport-rig.h"

#include <dlfcn.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "transport/registry.h"
#include "transport/wire/wire.h"

#define CHILD_ARGUMENT "--rig-source"

uint8_t rig_byte(guint block, uint64_t offset)
{
	return (uint8_t)(offset * 7 + (offset >> 12) * 13 + block * 101 + 1);
}

/* The last region is in the middle of a memfd, the others are anonymous. */
static PrRegion map_region(gboolean in_memfd)
{
	PrRegion region = {.size = RIG_REGION_BYTES, .memfd = -1};

	if (in_memfd) {
		region.memfd = memfd_create("rig", MFD_CLOEXEC | MFD_ALLOW_SEALING);
		region.memfd_offset = 3 * 4096;
		g_assert(region.memfd >= 0 &&
			 ftruncate(region.memfd, RIG_REGION_BYTES + 5 * 4096) == 0);
	}
	region.addr = mmap(NULL, RIG_REGION_BYTES, PROT_READ | PROT_WRITE,
			   MAP_SHARED | (in_memfd ? 0 : MAP_ANONYMOUS), region.memfd,
			   (off_t)region.memfd_offset);
	g_assert(region.addr != MAP_FAILED);
	return region;
}

static void map_regions(RigSide *side, gboolean filled)
{
	for (guint i = 0; i < RIG_REGIONS; i++) {
		side->regions[i] = map_region(i == RIG_REGIONS - 1);
		uint8_t *at = side->regions[i].addr;
		for (uint64_t j = 0; filled && j < RIG_REGION_BYTES; j++)
			at[j] = rig_byte(i, j);
	}
}

static void clear_side(RigSide *side)
{
	g_clear_pointer(&side->path, pr_data_path_destroy);
	for (guint i = 0; i < RIG_REGIONS; i++)
		if (side->regions[i].addr) {
			munmap(side->regions[i].addr, RIG_REGION_BYTES);
			if (side->regions[i].memfd >= 0)
				close(side->regions[i].memfd);
		}
	g_free(side->reason);
}

static gboolean read_frame(GInputStream *in, GByteArray *ret_body, PrMsgHeader *ret)
{
	uint8_t header[PR_WIRE_HEADER_BYTES];

	if (!g_input_stream_read_all(in, header, sizeof(header), NULL, NULL, NULL) ||
	    !pr_header_decode(header, ret, NULL))
		return FALSE;
	g_byte_array_set_size(ret_body, ret->length);
	return g_input_stream_read_all(in, ret_body->data, ret->length, NULL, NULL, NULL);
}

static void offer(Rig *rig, GSocketConnection *connection)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrMsgHeader header;
	PrLaneHello hello;

	if (read_frame(g_io_stream_get_input_stream(G_IO_STREAM(connection)), body, &header) &&
	    header.type == PR_MSG_LANE &&
	    pr_lane_hello_decode(body->data, body->len, &hello, NULL)) {
		rig->ops->offer(rig->listener, connection, &hello);
		g_atomic_int_inc(&rig->n_offered);
	} else {
		g_object_unref(connection);
	}
}

static gpointer control_thread(gpointer opaque)
{
	GSocketConnection *connection;
	Rig *rig = opaque;

	while ((connection = g_socket_listener_accept(rig->control, NULL, rig->stop, NULL)))
		offer(rig, connection);
	return NULL;
}

gboolean rig_is_rdma(const char *scheme)
{
	return !strcmp(pr_scheme_transport(scheme), "rdma");
}

const char *rig_host(const char *scheme)
{
	return rig_is_rdma(scheme) ? g_getenv(RIG_RDMA_VARIABLE) : "127.0.0.1";
}

Rig *rig_new(const char *scheme, const char *options)
{
	g_autoptr(GError) error = NULL;
	g_autofree char *text = NULL;
	Rig *rig = g_new0(Rig, 1);
	guint16 port;

	rig->control = g_socket_listener_new();
	port = g_socket_listener_add_any_inet_port(rig->control, NULL, &error);
	g_assert_no_error(error);
	text = g_strdup_printf("%s:%s:%u%s", scheme, rig_host(scheme), port, options);
	rig->uri = pr_uri_parse(text, FALSE, &error);
	g_assert_no_error(error);
	rig->ops = pr_transport_find(rig->uri->scheme, &error);
	g_assert_no_error(error);
	rig->listener = rig->ops->listen(rig->uri, &error);
	g_assert_no_error(error);
	memset(rig->binding.uuid, 0x11, sizeof(rig->binding.uuid));
	memset(rig->binding.secret, 0x5e, sizeof(rig->binding.secret));
	rig->binding.epoch = 3;
	map_regions(&rig->destination, FALSE);
	rig->stop = g_cancellable_new();
	/* Tests count descriptors, so this one must exist whether the thread waits or not. */
	g_cancellable_get_fd(rig->stop);
	rig->control_thread = g_thread_new("rig-control", control_thread, rig);
	return rig;
}

void rig_kill_child(Rig *rig)
{
	if (!rig->child)
		return;
	kill(rig->child, SIGKILL);
	waitpid(rig->child, NULL, 0);
	rig->child = 0;
}

void rig_free(Rig *rig)
{
	rig_kill_child(rig);
	g_cancellable_cancel(rig->stop);
	g_thread_join(rig->control_thread);
	clear_side(&rig->source);
	clear_side(&rig->destination);
	pr_data_listener_close(rig->listener);
	g_socket_listener_close(rig->control);
	g_object_unref(rig->control);
	g_cancellable_release_fd(rig->stop);
	g_object_unref(rig->stop);
	pr_uri_free(rig->uri);
	g_free(rig);
}

static void on_failed(const GError *reason, void *opaque)
{
	RigSide *side = opaque;

	g_assert(reason->domain == PR_PATH_ERROR);
	if (!side->reason)
		side->reason = g_strdup(reason->message);
	g_atomic_int_inc(&side->n_failures);
}

PrPathSetup rig_setup(Rig *rig, RigSide *side)
{
	return (PrPathSetup){
		.uri = rig->uri,
		.data_port = rig->ops->listener_port(rig->listener),
		.binding = rig->binding,
		.regions = side->regions,
		.n_regions = RIG_REGIONS,
		.n_lanes = RIG_LANES,
		.timeout_ms = RIG_TIMEOUT_MS,
		.on_failed = on_failed,
		.opaque = side,
	};
}

gpointer rig_source_thread(gpointer opaque)
{
	Rig *rig = opaque;
	PrPathSetup setup = rig_setup(rig, &rig->source);
	g_autoptr(GError) error = NULL;

	rig->source.path = rig->ops->connect(&setup, &error);
	g_assert_no_error(error);
	return NULL;
}

static void accept_path(Rig *rig)
{
	PrPathSetup setup = rig_setup(rig, &rig->destination);
	g_autoptr(GError) error = NULL;

	rig->destination.path = rig->ops->accept(rig->listener, &setup, &error);
	g_assert_no_error(error);
}

void rig_fill_source(Rig *rig)
{
	if (!rig->source.regions[0].addr)
		map_regions(&rig->source, TRUE);
}

void rig_await_backlog(Rig *rig)
{
	/* The backlog is in the kernel and cannot be read: give it time to fill. */
	if (rig->ops->listener_port(rig->listener)) {
		g_usleep(50000);
		return;
	}
	while (!g_atomic_int_get(&rig->n_offered))
		g_usleep(1000);
}

void rig_connect(Rig *rig)
{
	g_autoptr(GArray) grants = NULL;
	GThread *thread;

	rig_fill_source(rig);
	thread = g_thread_new("rig-source", rig_source_thread, rig);
	accept_path(rig);
	g_thread_join(thread);
	grants = rig->ops->grants(rig->source.path);
	rig->ops->set_grants(rig->destination.path, (PrGrant *)grants->data, grants->len);
}

static gint threads_are_refused; /* atomic */

void rig_refuse_threads(gboolean refuse)
{
	g_atomic_int_set(&threads_are_refused, refuse);
}

/* Replaces GLib's function in the whole test program. */
GThread *g_thread_try_new(const char *name, GThreadFunc function, gpointer data, GError **error)
{
	GThread *(*try_new)(const char *, GThreadFunc, gpointer, GError **) = NULL;

	*(void **)&try_new = dlsym(RTLD_NEXT, "g_thread_try_new");
	if (!g_atomic_int_get(&threads_are_refused))
		return try_new(name, function, data, error);
	g_set_error_literal(error, G_THREAD_ERROR, G_THREAD_ERROR_AGAIN, "refused by the test");
	return NULL;
}

GSocketConnection *rig_connect_and_send(Rig *rig, const char *bytes)
{
	guint16 port = rig->ops->listener_port(rig->listener);
	g_autoptr(GSocketClient) client =
		g_object_new(G_TYPE_SOCKET_CLIENT, "enable-proxy", FALSE, NULL);
	g_autoptr(GError) error = NULL;
	GSocketConnection *connection;

	connection = g_socket_client_connect_to_host(client, "127.0.0.1",
						     port ? port : rig->uri->port, NULL, &error);
	assert_null(error);
	g_output_stream_write_all(g_io_stream_get_output_stream(G_IO_STREAM(connection)), bytes,
				  strlen(bytes), NULL, NULL, NULL);
	return connection;
}

#define CHILD_GRANTS 16

/* Reads the child's grants: their count, then the grants. */
static void receive_grants(Rig *rig, int fd)
{
	PrGrant grants[CHILD_GRANTS];
	guint n = 0;

	g_assert(read(fd, &n, sizeof(n)) == sizeof(n) && n <= CHILD_GRANTS);
	g_assert(!n || read(fd, grants, n * sizeof(*grants)) == (gssize)(n * sizeof(*grants)));
	close(fd);
	rig->ops->set_grants(rig->destination.path, grants, n);
}

static void send_grants(Rig *rig, int fd)
{
	g_autoptr(GArray) grants = rig->ops->grants(rig->source.path);
	gssize size = (gssize)(grants->len * sizeof(PrGrant));

	g_assert(write(fd, &grants->len, sizeof(grants->len)) == sizeof(grants->len));
	g_assert(!size || write(fd, grants->data, (gsize)size) == size);
}

void rig_connect_child(Rig *rig)
{
	g_autofree char *port = g_strdup_printf("%u", rig->ops->listener_port(rig->listener));
	char *argv[] = {(char *)"/proc/self/exe", (char *)CHILD_ARGUMENT, rig->uri->text, port,
			NULL};
	g_autoptr(GError) error = NULL;
	int fd;

	g_spawn_async_with_pipes(NULL, argv, NULL, G_SPAWN_DO_NOT_REAP_CHILD, NULL, NULL,
				 &rig->child, NULL, &fd, NULL, &error);
	g_assert_no_error(error);
	accept_path(rig);
	receive_grants(rig, fd);
}

void rig_main_source(int argc, char **argv)
{
	g_autoptr(GError) error = NULL;
	PrPathSetup setup;
	Rig rig = {0};

	if (argc != 4 || strcmp(argv[1], CHILD_ARGUMENT))
		return;
	/* This process must not outlive a test that was killed. */
	alarm(60);
	rig.uri = pr_uri_parse(argv[2], FALSE, &error);
	g_assert_no_error(error);
	rig.ops = pr_transport_find(rig.uri->scheme, &error);
	g_assert_no_error(error);
	map_regions(&rig.source, TRUE);
	setup = (PrPathSetup){
		.uri = rig.uri,
		.data_port = atoi(argv[3]),
		.binding.epoch = 3,
		.regions = rig.source.regions,
		.n_regions = RIG_REGIONS,
		.n_lanes = RIG_LANES,
		.timeout_ms = RIG_TIMEOUT_MS,
		.on_failed = on_failed,
		.opaque = &rig.source,
	};
	memset(setup.binding.uuid, 0x11, sizeof(setup.binding.uuid));
	memset(setup.binding.secret, 0x5e, sizeof(setup.binding.secret));
	rig.source.path = rig.ops->connect(&setup, &error);
	g_assert_no_error(error);
	send_grants(&rig, STDOUT_FILENO);
	for (;;)
		pause();
}

void rig_assert_read(Rig *rig, guint block, uint64_t offset, uint32_t length)
{
	const uint8_t *at = rig->destination.regions[block].addr;

	for (uint64_t i = offset; i < offset + length; i++)
		if (at[i] != rig_byte(block, i))
			fail_msg("block %u: wrong byte at %" G_GUINT64_FORMAT, block, i);
}

guint rig_await(Rig *rig, PrLaneId lane, PrCompletion *ret, guint max)
{
	PrDataPath *path = rig->destination.path;
	gint64 deadline = g_get_monotonic_time() + RIG_TIMEOUT_MS * 1000;
	guint n;

	while (!(n = rig->ops->poll(path, lane, ret, max))) {
		struct pollfd fd = {.fd = rig->ops->wait_fd(path, lane), .events = POLLIN};

		/* Not fail_msg(), which works only in the thread of the test. */
		g_assert(g_get_monotonic_time() < deadline);
		if (rig->ops->arm(path, lane))
			poll(&fd, 1, RIG_TIMEOUT_MS);
	}
	return n;
}

gboolean rig_read(Rig *rig, PrLaneId lane, guint block, uint64_t offset, uint32_t length)
{
	uint64_t token = offset ^ length;
	PrCompletion done;

	if (!rig->ops->post_read(rig->destination.path, lane, block, offset, length, token))
		return FALSE;
	rig_await(rig, lane, &done, 1);
	assert_true(done.token == token);
	return done.ok;
}

void rig_post(Rig *rig, PrLaneId lane, guint n, uint32_t length)
{
	g_assert(n <= rig->ops->max_reads(rig->destination.path, lane) &&
		 (uint64_t)n * length <= RIG_REGION_BYTES);
	for (guint i = 0; i < n; i++)
		assert_true(rig->ops->post_read(rig->destination.path, lane, 0,
						(uint64_t)i * length, length, i));
}

guint rig_await_all(Rig *rig, PrLaneId lane, guint n)
{
	g_autofree gboolean *seen = g_new0(gboolean, n);
	guint n_seen = 0, n_ok = 0;

	while (n_seen < n) {
		PrCompletion done[4];
		guint got = rig_await(rig, lane, done, G_N_ELEMENTS(done));

		for (guint i = 0; i < got; i++) {
			assert_true(done[i].token < n && !seen[done[i].token]);
			seen[done[i].token] = TRUE;
			n_ok += done[i].ok;
		}
		n_seen += got;
	}
	return n_ok;
}

void rig_await_failure(RigSide *side)
{
	gint64 deadline = g_get_monotonic_time() + RIG_TIMEOUT_MS * 1000;

	while (!g_atomic_int_get(&side->n_failures)) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(1000);
	}
	assert_int_equal(g_atomic_int_get(&side->n_failures), 1);
}
