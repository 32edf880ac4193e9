/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The requirements for all transports, tested against each of them. */
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/rigs/transport-rig.h"
#include "transport/registry.h"

typedef struct Backend {
	const char *scheme, *options;
} Backend;

static const Backend backends[] = {
	{"tcp", ""},
	{"ofi", ""},
	{"ofi", "?provider=tcp"},
	{"faulty+tcp", ""},
	{"faulty+ofi", "?delay-ms=1"},
	{"rdma", ""},
	{"faulty+rdma", "?delay-ms=1"},
};

static Rig *new_rig(void **state)
{
	const Backend *backend = *state;

	return rig_new(backend->scheme, backend->options);
}

static void reads_of_every_size_bring_the_right_bytes(void **state)
{
	static const uint32_t sizes[] = {4096, 8192, 65536, 262144, PR_READ_MAX};
	g_autoptr(Rig) rig = new_rig(state);

	rig_connect(rig);
	for (guint lane = 0; lane < RIG_LANES; lane++) {
		for (guint i = 0; i < G_N_ELEMENTS(sizes); i++) {
			uint64_t last = RIG_REGION_BYTES - sizes[i];
			uint64_t offsets[] = {0, 4096, last / 2 & ~4095ull, last};

			for (guint j = 0; j < G_N_ELEMENTS(offsets); j++) {
				guint block = (lane + j) % RIG_REGIONS;
				uint8_t *at = rig->destination.regions[block].addr;

				memset(at + offsets[j], 0, sizes[i]);
				assert_true(rig_read(rig, lane, block, offsets[j], sizes[i]));
				rig_assert_read(rig, block, offsets[j], sizes[i]);
			}
		}
	}
	assert_int_equal(g_atomic_int_get(&rig->destination.n_failures), 0);
}

static void a_read_touches_nothing_beside_its_range(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	uint8_t *at = rig->destination.regions[1].addr;

	rig_connect(rig);
	memset(at, 0xee, 5 * 4096);
	assert_true(rig_read(rig, PR_LANE_URGENT, 1, 2 * 4096, 4096));
	rig_assert_read(rig, 1, 2 * 4096, 4096);
	for (guint i = 0; i < 5 * 4096; i++)
		if (i / 4096 != 2)
			assert_int_equal(at[i], 0xee);
}

static void a_full_memfd_fails_the_path_with_that_reason(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	PrRegion *region = &rig->destination.regions[RIG_REGIONS - 1];

	/* A device writes to the pages of the memfd, which seals do not prevent. */
	if (rig_is_rdma(rig->uri->scheme))
		return;
	rig_connect(rig);
	assert_true(rig_read(rig, PR_LANE_BULK, RIG_REGIONS - 1, 0, 65536));
	/* The seal makes writes to the memfd fail, as if it was full. */
	assert_int_equal(fcntl(region->memfd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
	assert_false(rig_read(rig, PR_LANE_URGENT, RIG_REGIONS - 1, 65536, 4096));
	rig_await_failure(&rig->destination);
	assert_non_null(strstr(rig->destination.reason, "cannot store pages in guest RAM"));
	assert_false(rig->ops->post_read(rig->destination.path, PR_LANE_URGENT, 0, 0, 4096, 1));
}

static void a_probe_is_answered_and_touches_nothing(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);

	rig_connect(rig);
	for (guint i = 0; i < RIG_REGIONS; i++)
		memset(rig->destination.regions[i].addr, 0xee, RIG_REGION_BYTES);
	for (guint lane = 0; lane < RIG_LANES; lane++) {
		PrCompletion done;

		assert_true(rig->ops->post_probe(rig->destination.path, lane, 4711 + lane));
		assert_int_equal(rig_await(rig, lane, &done, 1), 1);
		assert_int_equal(done.token, 4711 + lane);
		assert_true(done.ok);
	}
	for (guint i = 0; i < RIG_REGIONS; i++)
		for (guint at = 0; at < RIG_REGION_BYTES; at++)
			assert_int_equal(((uint8_t *)rig->destination.regions[i].addr)[at], 0xee);
	/* READs work after the probes as before. */
	assert_true(rig_read(rig, PR_LANE_BULK, 1, 4096, 65536));
	rig_assert_read(rig, 1, 4096, 65536);
}

#define PIPELINED_READS 2000

typedef struct Puller {
	Rig *rig;
	PrLaneId lane;
	guint block;
	uint32_t length;
	guint n_ok;
	GThread *thread;
} Puller;

/* Keeps the lane's window full; reads its block again and again. */
static gpointer pull(gpointer opaque)
{
	Puller *puller = opaque;
	const PrTransportOps *ops = puller->rig->ops;
	PrDataPath *path = puller->rig->destination.path;
	guint window = ops->max_reads(path, puller->lane);
	guint posted = 0, completed = 0;

	while (completed < PIPELINED_READS) {
		PrCompletion done[8];
		guint n;

		while (posted < PIPELINED_READS && posted - completed < window) {
			uint64_t at = (uint64_t)posted * puller->length % RIG_REGION_BYTES;

			g_assert(ops->post_read(path, puller->lane, puller->block, at,
						puller->length, posted));
			posted++;
		}
		n = rig_await(puller->rig, puller->lane, done, G_N_ELEMENTS(done));
		for (guint i = 0; i < n; i++)
			puller->n_ok += done[i].ok && done[i].token < posted;
		completed += n;
	}
	return NULL;
}

static void two_threads_keep_both_lanes_full(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	Puller pullers[] = {
		{.rig = rig, .lane = PR_LANE_URGENT, .block = 0, .length = 4096},
		{.rig = rig, .lane = PR_LANE_BULK, .block = 1, .length = 65536},
	};

	rig_connect(rig);
	assert_true(rig->ops->max_reads(rig->destination.path, PR_LANE_URGENT) >= 16);
	assert_true(rig->ops->max_reads(rig->destination.path, PR_LANE_BULK) >= 16);
	for (guint i = 0; i < G_N_ELEMENTS(pullers); i++)
		pullers[i].thread = g_thread_new("puller", pull, &pullers[i]);
	for (guint i = 0; i < G_N_ELEMENTS(pullers); i++) {
		g_thread_join(pullers[i].thread);
		assert_int_equal(pullers[i].n_ok, PIPELINED_READS);
	}
	rig_assert_read(rig, 0, 0, PIPELINED_READS * 4096);
	rig_assert_read(rig, 1, 0, RIG_REGION_BYTES);
}

static void connect_is_refused(Rig *rig, const PrBinding *binding)
{
	PrPathSetup setup = rig_setup(rig, &rig->source);
	g_autoptr(GError) error = NULL;
	PrDataPath *path;

	setup.binding = *binding;
	path = rig->ops->connect(&setup, &error);
	assert_null(path);
	assert_non_null(error);
	if (!g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED))
		fail_msg("%s", error->message);
	assert_non_null(strstr(error->message, "refused"));
}

static gpointer accept_thread(gpointer opaque)
{
	Rig *rig = opaque;
	PrPathSetup setup = rig_setup(rig, &rig->destination);
	g_autoptr(GError) error = NULL;

	rig->destination.path = rig->ops->accept(rig->listener, &setup, &error);
	g_assert_null(error);
	return NULL;
}

static void hand_over_grants(Rig *rig)
{
	g_autoptr(GArray) grants = rig->ops->grants(rig->source.path);

	rig->ops->set_grants(rig->destination.path, (PrGrant *)grants->data, grants->len);
}

static void lanes_with_another_binding_are_refused_and_the_right_ones_accepted(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	PrBinding wrong_secret = rig->binding, old_epoch = rig->binding, other = rig->binding;
	GThread *accepting;

	wrong_secret.secret[PR_SECRET_BYTES - 1] ^= 1;
	old_epoch.epoch--;
	other.uuid[0] ^= 1;
	accepting = g_thread_new("accept", accept_thread, rig);
	connect_is_refused(rig, &wrong_secret);
	connect_is_refused(rig, &old_epoch);
	connect_is_refused(rig, &other);
	rig_fill_source(rig);
	rig_source_thread(rig);
	g_thread_join(accepting);
	hand_over_grants(rig);
	assert_true(rig_read(rig, PR_LANE_BULK, 0, 0, 4096));
	rig_assert_read(rig, 0, 0, 4096);
}

static void half_a_request_does_not_delay_other_lanes(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	g_autoptr(GSocketConnection) silent = NULL, half = NULL, garbage = NULL;

	/* On tcp the listener of the control port handles these, which the rig does not have. On
	 * rdma the kernel does. */
	if (!rig->ops->listener_port(rig->listener) || rig_is_rdma(rig->uri->scheme))
		return;
	silent = rig_connect_and_send(rig, "");
	half = rig_connect_and_send(rig, "\x02");
	garbage = rig_connect_and_send(rig, "GET / HTTP/1.1\r\nHost: postroad\r\n\r\n");
	rig_connect(rig);
	assert_true(rig_read(rig, PR_LANE_URGENT, 0, 0, 4096));
	rig_assert_read(rig, 0, 0, 4096);
}

/* One of several incarnations that connect at the same time. */
typedef struct Incarnation {
	Rig *rig;
	PrPathSetup source, destination;
	PrDataPath *connected, *accepted;
	GThread *accepting, *connecting;
} Incarnation;

static gpointer accept_incarnation(gpointer opaque)
{
	Incarnation *self = opaque;

	self->accepted = self->rig->ops->accept(self->rig->listener, &self->destination, NULL);
	return NULL;
}

static gpointer connect_incarnation(gpointer opaque)
{
	Incarnation *self = opaque;

	self->connected = self->rig->ops->connect(&self->source, NULL);
	return NULL;
}

/* Ignores the failure: the first of the two sides to end fails the other one. */
static void on_end(const GError *reason, void *opaque)
{
}

#define INCARNATIONS 4

/* The listener expects all of them before the first lane comes. The newest one connects first. */
static void incarnations_that_connect_at_once_get_their_own_lanes(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	Incarnation all[INCARNATIONS] = {0};

	rig_fill_source(rig);
	for (guint i = 0; i < INCARNATIONS; i++) {
		all[i].rig = rig;
		all[i].source = rig_setup(rig, &rig->source);
		all[i].destination = rig_setup(rig, &rig->destination);
		all[i].source.on_failed = all[i].destination.on_failed = on_end;
		all[i].source.binding.epoch += i;
		all[i].destination.binding.epoch += i;
		rig->ops->expect(rig->listener, &all[i].destination.binding);
		all[i].accepting = g_thread_new("accept", accept_incarnation, &all[i]);
	}
	for (guint i = INCARNATIONS; i-- > 0;)
		all[i].connecting = g_thread_new("connect", connect_incarnation, &all[i]);
	for (guint i = 0; i < INCARNATIONS; i++) {
		g_thread_join(all[i].accepting);
		g_thread_join(all[i].connecting);
		assert_non_null(all[i].accepted);
		assert_non_null(all[i].connected);
	}
	for (guint i = 0; i < INCARNATIONS; i++) {
		g_autoptr(GArray) grants = rig->ops->grants(all[i].connected);

		rig->ops->set_grants(all[i].accepted, (PrGrant *)grants->data, grants->len);
		rig->destination.path = all[i].accepted;
		assert_true(rig_read(rig, PR_LANE_BULK, 0, i * 8192, 8192));
		rig_assert_read(rig, 0, i * 8192, 8192);
	}
	rig->destination.path = NULL;
	for (guint i = 0; i < INCARNATIONS; i++) {
		pr_data_path_destroy(all[i].accepted);
		pr_data_path_destroy(all[i].connected);
	}
}

static void a_lane_that_comes_before_accept_is_kept(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	GThread *connecting;

	rig_fill_source(rig);
	connecting = g_thread_new("connect", rig_source_thread, rig);
	rig_await_backlog(rig);
	accept_thread(rig);
	g_thread_join(connecting);
	hand_over_grants(rig);
	assert_true(rig_read(rig, PR_LANE_BULK, 1, 4096, 65536));
	rig_assert_read(rig, 1, 4096, 65536);
}

/* Sleeps on the lane, as the engine does, until the path fails. */
static void await_failure_on(Rig *rig, PrLaneId lane)
{
	PrCompletion done;

	while (!g_atomic_int_get(&rig->destination.n_failures)) {
		struct pollfd fd = {.fd = rig->ops->wait_fd(rig->destination.path, lane),
				    .events = POLLIN};

		assert_int_equal(rig->ops->poll(rig->destination.path, lane, &done, 1), 0);
		if (rig->ops->arm(rig->destination.path, lane))
			assert_true(poll(&fd, 1, RIG_TIMEOUT_MS) > 0);
	}
}

static void an_idle_lane_notices_that_the_source_is_gone(void **state)
{
	for (guint lane = 0; lane < RIG_LANES; lane++) {
		g_autoptr(Rig) rig = new_rig(state);

		rig_connect(rig);
		assert_true(rig_read(rig, lane, 0, 0, 4096));
		g_clear_pointer(&rig->source.path, pr_data_path_destroy);
		await_failure_on(rig, lane);
		assert_int_equal(g_atomic_int_get(&rig->destination.n_failures), 1);
		assert_non_null(strstr(rig->destination.reason, rig->uri->host));
		assert_false(rig->ops->post_read(rig->destination.path, lane, 0, 0, 4096, 1));
	}
}

static void a_source_learns_that_the_destination_is_gone(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);

	rig_connect(rig);
	g_clear_pointer(&rig->destination.path, pr_data_path_destroy);
	rig_await_failure(&rig->source);
}

static void reads_complete_once_when_the_source_goes_away_under_them(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	guint n_ok;

	rig_connect(rig);
	rig_post(rig, PR_LANE_URGENT, 16, 4096);
	rig_post(rig, PR_LANE_BULK, 8, PR_READ_MAX);
	g_clear_pointer(&rig->source.path, pr_data_path_destroy);
	n_ok = rig_await_all(rig, PR_LANE_BULK, 8);
	rig_assert_read(rig, 0, 0, n_ok * PR_READ_MAX);
	rig_await_all(rig, PR_LANE_URGENT, 16);
	await_failure_on(rig, PR_LANE_URGENT);
	assert_int_equal(g_atomic_int_get(&rig->destination.n_failures), 1);
}

/* Freezes the source's process, so that READs stay outstanding. */
static void freeze(Rig *rig)
{
	int status;

	assert_int_equal(kill(rig->child, SIGSTOP), 0);
	assert_int_equal(waitpid(rig->child, &status, WUNTRACED), rig->child);
	assert_true(WIFSTOPPED(status));
}

static void reads_fail_when_the_sources_process_dies(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);

	/* Over rdma the device answers for a frozen process. */
	if (rig_is_rdma(rig->uri->scheme))
		return;
	rig_connect_child(rig);
	assert_true(rig_read(rig, PR_LANE_BULK, 0, 0, 65536));
	freeze(rig);
	rig_post(rig, PR_LANE_URGENT, 5, 4096);
	rig_post(rig, PR_LANE_BULK, 7, PR_READ_MAX);
	rig_kill_child(rig);
	assert_int_equal(rig_await_all(rig, PR_LANE_BULK, 7), 0);
	assert_int_equal(rig_await_all(rig, PR_LANE_URGENT, 5), 0);
	assert_int_equal(g_atomic_int_get(&rig->destination.n_failures), 1);
	assert_false(rig->ops->post_read(rig->destination.path, PR_LANE_URGENT, 0, 0, 4096, 1));
}

static void a_device_answers_for_a_frozen_source_until_it_dies(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);

	if (!rig_is_rdma(rig->uri->scheme))
		return;
	rig_connect_child(rig);
	freeze(rig);
	rig_post(rig, PR_LANE_URGENT, 5, 4096);
	rig_post(rig, PR_LANE_BULK, 7, PR_READ_MAX);
	assert_int_equal(rig_await_all(rig, PR_LANE_BULK, 7), 7);
	assert_int_equal(rig_await_all(rig, PR_LANE_URGENT, 5), 5);
	rig_assert_read(rig, 0, 0, 7 * PR_READ_MAX);
	rig_kill_child(rig);
	rig_await_failure(&rig->destination);
	assert_non_null(strstr(rig->destination.reason, "has died"));
	assert_false(rig->ops->post_read(rig->destination.path, PR_LANE_URGENT, 0, 0, 4096, 1));
}

/* Returns how long shutdown and drain have taken, in us. */
static gint64 drain_with_a_silent_source(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	gint64 begin, took;

	rig_connect_child(rig);
	freeze(rig);
	rig_post(rig, PR_LANE_URGENT, 16, 4096);
	rig_post(rig, PR_LANE_BULK, 8, PR_READ_MAX);
	begin = g_get_monotonic_time();
	rig->ops->shutdown(rig->destination.path);
	assert_true(rig->ops->drain(rig->destination.path, RIG_TIMEOUT_MS));
	took = g_get_monotonic_time() - begin;
	assert_int_equal(g_atomic_int_get(&rig->destination.n_failures), 0);
	return took;
}

/* One of five tries must be fast enough, as this process may get no CPU in some of them. */
static void a_silent_source_delays_shutdown_and_drain_by_less_than_a_second(void **state)
{
	for (guint i = 0; i < 5; i++)
		if (drain_with_a_silent_source(state) < G_USEC_PER_SEC)
			return;
	fail_msg("shutdown and drain took a second or more, five times");
}

static void nothing_lands_after_drain(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	uint8_t *at = rig->destination.regions[0].addr;

	rig_connect(rig);
	rig_post(rig, PR_LANE_BULK, 8, PR_READ_MAX);
	rig->ops->shutdown(rig->destination.path);
	assert_true(rig->ops->drain(rig->destination.path, RIG_TIMEOUT_MS));
	memset(at, 0xee, RIG_REGION_BYTES);
	/* When the source's path is destroyed, it sends nothing any more. */
	g_clear_pointer(&rig->source.path, pr_data_path_destroy);
	g_clear_pointer(&rig->destination.path, pr_data_path_destroy);
	for (guint i = 0; i < RIG_REGION_BYTES; i++)
		assert_int_equal(at[i], 0xee);
}

typedef struct Sleeper {
	Rig *rig;
	int posted; /* atomic */
	guint n_failed;
} Sleeper;

/* Posts one READ after the other until the path ends. */
static gpointer sleep_on_bulk(gpointer opaque)
{
	Sleeper *sleeper = opaque;
	Rig *rig = sleeper->rig;
	PrCompletion done;

	while (rig->ops->post_read(rig->destination.path, PR_LANE_BULK, 0, 0, 4096, 1)) {
		g_atomic_int_set(&sleeper->posted, 1);
		rig_await(rig, PR_LANE_BULK, &done, 1);
		sleeper->n_failed += !done.ok;
	}
	g_atomic_int_set(&sleeper->posted,
			 1); /* even if the first READ was refused, so that the wait for it ends */
	return NULL;
}

static void shutdown_wakes_a_thread_that_sleeps_on_a_lane(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	Sleeper sleeper = {.rig = rig};
	GThread *thread;

	rig_connect_child(rig);
	freeze(rig);
	thread = g_thread_new("sleeper", sleep_on_bulk, &sleeper);
	while (!g_atomic_int_get(&sleeper.posted))
		g_usleep(1000);
	/* By now the thread is most likely asleep; the test is right if it is not. */
	g_usleep(20000);
	rig->ops->shutdown(rig->destination.path);
	g_thread_join(thread);
	/* Over rdma the device answers, so the path may have ended between two READs. */
	assert_true(sleeper.n_failed == 1 ||
		    (sleeper.n_failed == 0 && rig_is_rdma(rig->uri->scheme)));
	rig->ops->shutdown(rig->destination.path);
	assert_int_equal(g_atomic_int_get(&rig->destination.n_failures), 0);
	assert_false(rig->ops->post_read(rig->destination.path, PR_LANE_BULK, 0, 0, 4096, 1));
}

static gint64 cpu_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * G_USEC_PER_SEC + now.tv_nsec / 1000;
}

static void an_idle_path_sleeps(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	gint64 end, cpu;
	guint wakes = 0;

	rig_connect(rig);
	assert_true(rig_read(rig, PR_LANE_BULK, 0, 0, 65536));
	cpu = cpu_us();
	end = g_get_monotonic_time() + 300 * 1000;
	for (gint64 left = 300 * 1000; left > 0; left = end - g_get_monotonic_time()) {
		struct pollfd fd = {.fd = rig->ops->wait_fd(rig->destination.path, PR_LANE_BULK),
				    .events = POLLIN};
		PrCompletion done;

		assert_int_equal(rig->ops->poll(rig->destination.path, PR_LANE_BULK, &done, 1), 0);
		if (rig->ops->arm(rig->destination.path, PR_LANE_BULK))
			poll(&fd, 1, (int)(left / 1000) + 1);
		wakes++;
	}
	/* A thread that spins, on either side, uses 300 ms of processor time. */
	assert_true(cpu_us() - cpu < 100 * 1000);
	assert_true(wakes < 10);
}

static void accept_gives_up_when_time_is_up(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	PrPathSetup setup = rig_setup(rig, &rig->destination);
	gint64 begin = g_get_monotonic_time();
	g_autoptr(GError) error = NULL;

	setup.timeout_ms = 100;
	assert_null(rig->ops->accept(rig->listener, &setup, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT));
	assert_true(g_get_monotonic_time() - begin >= 100 * 1000);
	/* The listener still accepts lanes. */
	rig_connect(rig);
	assert_true(rig_read(rig, PR_LANE_URGENT, 0, 0, 4096));
}

static void connect_gives_up_when_nobody_accepts(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	PrPathSetup setup = rig_setup(rig, &rig->source);
	g_autoptr(GError) error = NULL;

	setup.timeout_ms = 100;
	assert_null(rig->ops->connect(&setup, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT));
}

static gpointer cancel_soon(gpointer opaque)
{
	g_usleep(20000);
	g_cancellable_cancel(opaque);
	return NULL;
}

static void accept_and_connect_can_be_cancelled(void **state)
{
	for (guint connecting = 0; connecting < 2; connecting++) {
		g_autoptr(Rig) rig = new_rig(state);
		PrPathSetup setup = rig_setup(rig, &rig->source);
		g_autoptr(GCancellable) cancel = g_cancellable_new();
		GThread *thread = g_thread_new("cancel", cancel_soon, cancel);
		g_autoptr(GError) error = NULL;
		PrDataPath *path;

		setup.cancel = cancel;
		path = connecting ? rig->ops->connect(&setup, &error)
				  : rig->ops->accept(rig->listener, &setup, &error);
		assert_null(path);
		assert_true(g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
		g_thread_join(thread);
	}
}

static void a_port_where_nobody_listens_is_a_connect_error(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	PrPathSetup setup = rig_setup(rig, &rig->source);
	g_autoptr(GSocketListener) listener = g_socket_listener_new();
	g_autoptr(GError) error = NULL;

	setup.data_port = g_socket_listener_add_any_inet_port(listener, NULL, &error);
	assert_null(error);
	g_socket_listener_close(listener);
	assert_null(rig->ops->connect(&setup, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT));
	assert_non_null(strstr(error->message, rig->uri->host));
}

static void a_lack_of_threads_is_an_error_of_listen(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	g_autoptr(GError) error = NULL;

	rig_refuse_threads(TRUE);
	assert_null(rig->ops->listen(rig->uri, &error));
	rig_refuse_threads(FALSE);
	assert_non_null(error);
}

static void a_lack_of_threads_is_an_error_of_connect(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	PrPathSetup setup = rig_setup(rig, &rig->source);
	Incarnation peer = {.rig = rig, .destination = rig_setup(rig, &rig->destination)};
	g_autoptr(GError) error = NULL;

	setup.on_failed = peer.destination.on_failed = on_end;
	rig_fill_source(rig);
	peer.accepting = g_thread_new("accept", accept_incarnation, &peer);
	rig_refuse_threads(TRUE);
	assert_null(rig->ops->connect(&setup, &error));
	rig_refuse_threads(FALSE);
	assert_non_null(error);
	g_thread_join(peer.accepting);
	if (peer.accepted)
		pr_data_path_destroy(peer.accepted);
}

static void an_unknown_option_is_named(void **state)
{
	const Backend *backend = *state;
	g_autofree char *text =
		g_strdup_printf("%s:%s:1%cwarp=9", backend->scheme, rig_host(backend->scheme), '?');
	g_autoptr(GError) error = NULL;
	g_autoptr(PrUri) uri = pr_uri_parse(text, FALSE, &error);
	const PrTransportOps *ops;

	assert_non_null(uri);
	ops = pr_transport_find(uri->scheme, &error);
	assert_non_null(ops);
	assert_null(ops->listen(uri, &error));
	assert_true(g_error_matches(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED));
	assert_non_null(strstr(error->message, "\"warp\""));
}

static guint count_entries(const char *path)
{
	DIR *dir = opendir(path);
	guint n = 0;

	assert_non_null(dir);
	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

/* Waits: a joined thread may be listed for a moment, and GIO begins and ends threads of its own. */
static void assert_threads_at_most(guint n)
{
	gint64 deadline = g_get_monotonic_time() + RIG_TIMEOUT_MS * 1000;

	while (count_entries("/proc/self/task") > n) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(1000);
	}
}

static void connect_read_and_destroy(Rig *rig)
{
	rig_connect(rig);
	assert_true(rig_read(rig, PR_LANE_BULK, 0, 0, 4096));
	g_clear_pointer(&rig->destination.path, pr_data_path_destroy);
	g_clear_pointer(&rig->source.path, pr_data_path_destroy);
}

static void fifty_paths_leave_no_descriptor_and_no_thread_behind(void **state)
{
	g_autoptr(Rig) rig = new_rig(state);
	guint n_fds, n_threads;

	/* The first path opens descriptors that the libraries keep. */
	connect_read_and_destroy(rig);
	n_fds = count_entries("/proc/self/fd");
	n_threads = count_entries("/proc/self/task");
	for (guint i = 0; i < 50; i++) {
		rig->binding.epoch++;
		connect_read_and_destroy(rig);
	}
	assert_int_equal(count_entries("/proc/self/fd"), n_fds);
	assert_threads_at_most(n_threads);
}

#define FOR_BACKEND(test)                                                                          \
	{                                                                                          \
		.name = #test, .test_func = test                                                   \
	}

static const struct CMUnitTest tests[] = {
	FOR_BACKEND(reads_of_every_size_bring_the_right_bytes),
	FOR_BACKEND(a_read_touches_nothing_beside_its_range),
	FOR_BACKEND(a_full_memfd_fails_the_path_with_that_reason),
	FOR_BACKEND(a_probe_is_answered_and_touches_nothing),
	FOR_BACKEND(two_threads_keep_both_lanes_full),
	FOR_BACKEND(lanes_with_another_binding_are_refused_and_the_right_ones_accepted),
	FOR_BACKEND(half_a_request_does_not_delay_other_lanes),
	FOR_BACKEND(incarnations_that_connect_at_once_get_their_own_lanes),
	FOR_BACKEND(a_lane_that_comes_before_accept_is_kept),
	FOR_BACKEND(an_idle_lane_notices_that_the_source_is_gone),
	FOR_BACKEND(a_source_learns_that_the_destination_is_gone),
	FOR_BACKEND(reads_complete_once_when_the_source_goes_away_under_them),
	FOR_BACKEND(reads_fail_when_the_sources_process_dies),
	FOR_BACKEND(a_device_answers_for_a_frozen_source_until_it_dies),
	FOR_BACKEND(a_silent_source_delays_shutdown_and_drain_by_less_than_a_second),
	FOR_BACKEND(nothing_lands_after_drain),
	FOR_BACKEND(shutdown_wakes_a_thread_that_sleeps_on_a_lane),
	FOR_BACKEND(an_idle_path_sleeps),
	FOR_BACKEND(accept_gives_up_when_time_is_up),
	FOR_BACKEND(connect_gives_up_when_nobody_accepts),
	FOR_BACKEND(accept_and_connect_can_be_cancelled),
	FOR_BACKEND(a_port_where_nobody_listens_is_a_connect_error),
	FOR_BACKEND(a_lack_of_threads_is_an_error_of_listen),
	FOR_BACKEND(a_lack_of_threads_is_an_error_of_connect),
	FOR_BACKEND(an_unknown_option_is_named),
	FOR_BACKEND(fifty_paths_leave_no_descriptor_and_no_thread_behind),
};

#define SKIPPED 77 /* meson's exit status for a skipped test */

/* Arguments after the program's name select the backend: "tcp", "ofi?provider=tcp", … */
int main(int argc, char **argv)
{
	gboolean skipped = FALSE;
	int failed = 0;

	rig_main_source(argc, argv);
	for (guint i = 0; i < G_N_ELEMENTS(backends); i++) {
		struct CMUnitTest run[G_N_ELEMENTS(tests)];
		g_autofree char *name = g_strconcat(backends[i].scheme, backends[i].options, NULL);

		if (argc > 1 && strcmp(argv[1], name))
			continue;
		if (!rig_host(backends[i].scheme)) {
			print_message("%s: skipped: " RIG_RDMA_VARIABLE
				      " does not give the address of an RDMA device\n",
				      name);
			skipped = TRUE;
			continue;
		}
		memcpy(run, tests, sizeof(tests));
		for (guint j = 0; j < G_N_ELEMENTS(run); j++)
			run[j].initial_state = (void *)&backends[i];
		failed += _cmocka_run_group_tests(name, run, G_N_ELEMENTS(run), NULL, NULL);
	}
	return skipped && argc > 1 ? SKIPPED : failed;
}
