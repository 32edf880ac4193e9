/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tests/rigs/pair.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/rigs/certs.h"
#include "tests/rigs/huge-pool.h"

/* Far longer than any step takes here, even with sanitizers on a busy machine. */
#define PATIENCE_US (60 * G_USEC_PER_SEC)
#define HUGE_PAGES  640 /* as tests/run makes them */

/* Fails the test case if there is an error. */
static void check_no_error(const GError *error)
{
	if (error)
		fail_msg("%s", error->message);
}

/* Runs before main(). The programs that need huge pages share them, so each may have to wait. */
static void __attribute__((constructor)) require_huge_pages(void)
{
	g_autofree char *text = NULL;

	if (!g_getenv("PAIR_HUGE"))
		return;
	huge_pool_use();
	if ((g_file_get_contents("/proc/sys/vm/nr_hugepages", &text, NULL, NULL) &&
	     atoi(text) >= HUGE_PAGES))
		return;
	printf("skipped: vm.nr_hugepages is %s here, and has to be %d\n",
	       text ? g_strchomp(text) : "not", HUGE_PAGES);
	exit(77);
}

static void on_state(PrState state, const char *reason, void *opaque)
{
	Side *side = opaque;
	gint64 now = g_get_monotonic_time();

	g_mutex_lock(&side->lock);
	g_debug("%s: %s (%s)", side->name, pr_state_name(state), reason);
	side->state = state;
	g_array_append_val(side->states, state);
	g_array_append_val(side->times, now);
	g_cond_broadcast(&side->changed);
	g_mutex_unlock(&side->lock);
}

static void on_path(const char *uri, PrPathState state, const char *device, const char *reason,
		    void *opaque)
{
	Side *side = opaque;
	PathEvent event = {g_strdup(uri), state};

	g_mutex_lock(&side->lock);
	g_debug("%s: path %s is %s (%s)", side->name, uri, pr_path_state_name(state), reason);
	g_array_append_val(side->path_events, event);
	g_cond_broadcast(&side->changed);
	g_mutex_unlock(&side->lock);
}

static void clear_path_event(gpointer event)
{
	g_free(((PathEvent *)event)->uri);
}

static void side_init(Side *side, const char *name, const PairConfig *config, uint64_t size)
{
	g_autoptr(GError) error = NULL;
	gboolean source = strcmp(name, "source") == 0;
	guint which = source ? PAIR_SOURCE : PAIR_DESTINATION;
	TestGuestConfig guest = {
		.size = size,
		.huge_pages = g_getenv("PAIR_HUGE") && !(config->small_pages & which),
		.n_blocks = config->n_blocks ? config->n_blocks : 2,
		.n_threads = config->n_threads ? config->n_threads : 3,
		.pace_us = config->pace_us,
		.paused = config->paused,
		.load_touches = 8,
		.refused_runs = source ? config->refused_runs : 0,
	};

	side->name = name;
	g_mutex_init(&side->lock);
	g_cond_init(&side->changed);
	side->states = g_array_new(FALSE, FALSE, sizeof(PrState));
	side->times = g_array_new(FALSE, FALSE, sizeof(gint64));
	side->path_events = g_array_new(FALSE, FALSE, sizeof(PathEvent));
	g_array_set_clear_func(side->path_events, clear_path_event);
	side->guest = testguest_new(&guest, &error);
	check_no_error(error);
	pr_params_init(&side->params);
	/*
	 * Two engines, a guest and perhaps a sanitizer share few cores, so the timeouts are long.
	 */
	assert_true(pr_params_set(&side->params, "heartbeat-timeout", 10000, NULL));
	assert_true(pr_params_set(&side->params, "connect-timeout", 20000, NULL));
	assert_true(pr_params_set(&side->params, "handshake-timeout", 20000, NULL));
	assert_true(
		pr_params_set(&side->params, "max-postcopy-bandwidth", config->bandwidth, NULL));
	assert_true(pr_params_set_capability(&side->params, "verify", config->verify, NULL));
	side_begin_engine(side);
}

void side_begin_engine(Side *side)
{
	side_begin_engine_for(side, testguest_spec(side->guest));
}

void side_begin_engine_for(Side *side, const char *spec)
{
	PrMigrationHooks hooks = {on_state, on_path, side};
	g_autoptr(GError) error = NULL;

	side->adapter = pr_guest_open(spec, NULL, 20000, &error);
	check_no_error(error);
	side->engine = pr_migration_new(side->adapter, &side->params, &hooks);
}

void side_end_engine(Side *side)
{
	pr_migration_free(side->engine);
	pr_guest_close(side->adapter);
}

static void side_clear(Side *side)
{
	g_autoptr(GError) error = NULL;

	pr_migration_free(side->engine);
	if (!side->adapter->ops->uffd_disable(side->adapter, &error))
		g_warning("%s: fault off: %s", side->name, error->message);
	pr_guest_close(side->adapter);
	testguest_free(side->guest);
	g_array_unref(side->states);
	g_array_unref(side->times);
	g_array_unref(side->path_events);
	g_mutex_clear(&side->lock);
	g_cond_clear(&side->changed);
}

/* The URIs on which the destination listens. */
static char *incoming_uris(const PairConfig *config)
{
	GString *uris = g_string_new(NULL);

	if (config->incremental_grants_us)
		g_string_printf(uris, "faulty+%s:127.0.0.1:0?piecewise-us=%u", config->scheme,
				config->incremental_grants_us);
	else if (config->landing)
		g_string_printf(uris, "faulty+%s:127.0.0.1:0?fault-id=%s", config->scheme,
				config->landing);
	else
		g_string_printf(uris, "%s:127.0.0.1:0", config->scheme);
	for (guint i = 0; i < G_N_ELEMENTS(config->more) && config->more[i]; i++)
		g_string_append_printf(uris, ",%s:127.0.0.1:0", config->more[i]);
	return g_string_free(uris, FALSE);
}

/* Returns "tcp:127.0.0.1:PORT", the address of the destination without fault injection. */
static char *listening_uri(Side *destination)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(destination->engine, &info);
	assert_int_not_equal(info.paths->len, 0);
	const char *uri = ((PrPathInfo *)g_ptr_array_index(info.paths, 0))->uri;
	if (g_str_has_prefix(uri, "faulty+"))
		uri += strlen("faulty+");
	return g_strndup(uri, strcspn(uri, "?"));
}

static char *the_certs; /* shared by all pairs of the process; the main thread's */

static void free_shared_certs(void)
{
	certs_free(g_steal_pointer(&the_certs));
}

static const char *shared_certs(void)
{
	if (!the_certs) {
		the_certs = certs_new();
		atexit(free_shared_certs);
	}
	return the_certs;
}

/* Call it before the engines get any command. */
static void use_tls(Pair *pair)
{
	g_autoptr(GError) error = NULL;

	if (!g_getenv("PAIR_TLS"))
		return;
	pair->certs = shared_certs();
	pair->tls = pr_tls_new(pair->certs, NULL, &error);
	check_no_error(error);
	const PrSecurity security = {.tls = pair->tls};
	pr_migration_secure(pair->source.engine, &security);
	pr_migration_secure(pair->destination.engine, &security);
}

Pair *pair_new(const PairConfig *config)
{
	static int count; /* atomic; makes the fault IDs unique */
	Pair *pair = g_new0(Pair, 1);
	g_autoptr(GError) error = NULL;
	g_autofree char *id = g_strdup_printf("pair-%d", g_atomic_int_add(&count, 1));
	g_autofree char *incoming = incoming_uris(config);

	side_init(&pair->source, "source", config, config->size);
	side_init(&pair->destination, "destination", config,
		  config->destination_size ? config->destination_size : config->size);
	use_tls(pair);
	testguest_start(pair->source.guest);
	pr_migration_incoming(pair->destination.engine, incoming, NULL, &error);
	check_no_error(error);
	g_autofree char *listening = listening_uri(&pair->destination);
	pair->faults = pr_faults_new(id);
	g_autofree char *incremental_grants =
		config->incremental_grants_us
			? g_strdup_printf("piecewise-us=%u&", config->incremental_grants_us)
			: g_strdup("");
	pair->uri = g_strdup_printf("faulty+%s?%sfault-id=%s", listening, incremental_grants, id);
	return pair;
}

void pair_free(Pair *pair)
{
	side_clear(&pair->source);
	side_clear(&pair->destination);
	pr_faults_free(pair->faults);
	pr_tls_free(pair->tls);
	g_free(pair->uri);
	g_free(pair);
}

void pair_migrate(Pair *pair)
{
	g_autoptr(GError) error = NULL;

	pr_migration_start(pair->source.engine, pair->uri, /* resume= */ FALSE, &error);
	check_no_error(error);
}

void pair_resume(Pair *pair)
{
	g_autoptr(GError) error = NULL;
	Side *side = &pair->source;

	g_mutex_lock(&side->lock);
	guint reported = side->states->len;
	g_mutex_unlock(&side->lock);
	pr_migration_start(side->engine, pair->uri, /* resume= */ TRUE, &error);
	check_no_error(error);
	/*
	 * The state must have changed, or a caller's wait could see the state before the recovery.
	 */
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;
	gboolean in_time = TRUE;
	g_mutex_lock(&side->lock);
	while (side->states->len == reported && in_time)
		in_time = g_cond_wait_until(&side->changed, &side->lock, deadline);
	g_mutex_unlock(&side->lock);
	if (!in_time)
		fail_msg("%s: it accepted the recovery, and did not change its state", side->name);
}

PrState side_wait_any(Side *side, guint mask)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	g_mutex_lock(&side->lock);
	/* No state follows after completed. */
	while (!(mask & 1u << side->state) && side->state != PR_STATE_COMPLETED &&
	       g_cond_wait_until(&side->changed, &side->lock, deadline))
		;
	PrState state = side->state;
	g_mutex_unlock(&side->lock);
	if (!(mask & 1u << state)) {
		g_auto(PrMigrationInfo) info = {0};
		pr_migration_query(side->engine, &info);
		fail_msg("%s: waited for states 0x%x, it is %s: %s (%s)", side->name, mask,
			 pr_state_name(state), info.reason,
			 info.error_desc ? info.error_desc : "no error");
	}
	return state;
}

void side_wait(Side *side, PrState state)
{
	side_wait_any(side, 1u << state);
}

/* The caller holds the side's lock. */
static gboolean was_reported(const Side *side, PrState state)
{
	for (guint i = 0; i < side->states->len; i++)
		if (g_array_index(side->states, PrState, i) == state)
			return TRUE;
	return FALSE;
}

void side_wait_reported(Side *side, PrState state)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	g_mutex_lock(&side->lock);
	while (!was_reported(side, state) &&
	       g_cond_wait_until(&side->changed, &side->lock, deadline))
		;
	gboolean reported = was_reported(side, state);
	PrState now = side->state;
	g_mutex_unlock(&side->lock);
	if (!reported)
		fail_msg("%s: was never %s, it is %s", side->name, pr_state_name(state),
			 pr_state_name(now));
}

void pair_wait_taken_back(Pair *pair)
{
	guint over = 1u << PR_STATE_NONE | 1u << PR_STATE_FAILED | 1u << PR_STATE_CANCELLED;

	if (side_wait_any(&pair->destination, over | 1u << PR_STATE_POSTCOPY_PAUSED) !=
	    PR_STATE_POSTCOPY_PAUSED)
		return;
	assert_true(pr_migration_cancel(pair->destination.engine, NULL));
	side_wait_any(&pair->destination, over);
}

PrState side_state(Side *side)
{
	g_mutex_lock(&side->lock);
	PrState state = side->state;
	g_mutex_unlock(&side->lock);
	return state;
}

gint64 side_reported_at(Side *side, PrState state)
{
	gint64 at = 0;

	g_mutex_lock(&side->lock);
	for (guint i = 0; i < side->states->len; i++)
		if (g_array_index(side->states, PrState, i) == state)
			at = g_array_index(side->times, gint64, i);
	g_mutex_unlock(&side->lock);
	assert_int_not_equal(at, 0);
	return at;
}

void pair_wait(Pair *pair, PrState both)
{
	side_wait(&pair->source, both);
	side_wait(&pair->destination, both);
}

PrPathInfo side_path(Side *side, const char *uri)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(side->engine, &info);
	for (guint i = 0; i < info.paths->len; i++) {
		const PrPathInfo *path = g_ptr_array_index(info.paths, i);
		if (strcmp(path->uri, uri) == 0)
			return (PrPathInfo){.state = path->state,
					    .data_rtt_us = path->data_rtt_us,
					    .bytes = path->bytes,
					    .pulls = path->pulls};
	}
	return (PrPathInfo){.state = PR_PATH_N_STATES};
}

void side_check_path(Side *side, const char *uri, PrPathState state)
{
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GString) all = g_string_new(NULL);

	if (side_path(side, uri).state == state)
		return;
	pr_migration_query(side->engine, &info);
	for (guint i = 0; i < info.paths->len; i++) {
		const PrPathInfo *path = g_ptr_array_index(info.paths, i);
		g_string_append_printf(all, "; path %s is %s since %" G_GUINT64_FORMAT " ms (%s)",
				       path->uri, pr_path_state_name(path->state), path->since_ms,
				       path->last_error ? path->last_error : "no error");
	}
	fail_msg("%s, after %" G_GUINT64_FORMAT " pauses and %" G_GUINT64_FORMAT
		 " recoveries: path %s is not %s%s",
		 side->name, info.pauses, info.recoveries, uri, pr_path_state_name(state),
		 all->str);
}

void side_wait_path(Side *side, const char *uri, PrPathState state)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (side_path(side, uri).state != state) {
		if (g_get_monotonic_time() > deadline)
			fail_msg("%s: path %s is %s, not %s", side->name, uri,
				 pr_path_state_name(side_path(side, uri).state),
				 pr_path_state_name(state));
		g_usleep(500); /* between two checks of the condition */
	}
}

void pair_wait_recovered(Pair *pair, guint64 n)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;
	Side *sides[] = {&pair->source, &pair->destination};

	for (guint i = 0; i < 2; i++)
		for (;;) {
			g_auto(PrMigrationInfo) info = {0};
			pr_migration_query(sides[i]->engine, &info);
			if (info.recoveries >= n && info.state == PR_STATE_POSTCOPY_ACTIVE)
				break;
			if (info.state == PR_STATE_COMPLETED || g_get_monotonic_time() > deadline)
				fail_msg("%s: waited for recovery %" G_GUINT64_FORMAT
					 " of a migration that is %s: %s",
					 sides[i]->name, n, pr_state_name(info.state), info.reason);
			g_usleep(500); /* between two checks of the condition */
		}
}

void pair_wait_fenced(Pair *pair, gboolean fenced)
{
	gint64 deadline = g_get_monotonic_time() + 30 * G_USEC_PER_SEC;

	for (;;) {
		g_auto(PrMigrationInfo) info = {0};

		pr_migration_query(pair->source.engine, &info);
		if (info.fenced == fenced)
			return;
		if (g_get_monotonic_time() > deadline)
			fail_msg("the guest of the source is %s", fenced ? "not fenced" : "fenced");
		g_usleep(1000); /* between two checks of the condition */
	}
}

void pair_wait_received(Pair *pair, uint64_t bytes)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	for (;;) {
		g_auto(PrMigrationInfo) info = {0};
		pr_migration_query(pair->destination.engine, &info);
		if (info.total > 0 && info.total - info.remaining >= bytes)
			return;
		if (g_get_monotonic_time() > deadline)
			fail_msg("the destination never received %" G_GUINT64_FORMAT " bytes: %s",
				 bytes, info.reason);
		g_usleep(200); /* between two checks of the condition */
	}
}

void pair_resume_until_completed(Pair *pair, guint limit)
{
	guint settled = 1u << PR_STATE_POSTCOPY_PAUSED | 1u << PR_STATE_COMPLETED;

	for (guint i = 0; i <= limit; i++) {
		if (side_wait_any(&pair->source, settled) == PR_STATE_COMPLETED) {
			side_wait(&pair->destination, PR_STATE_COMPLETED);
			return;
		}
		side_wait_any(&pair->destination, settled);
		pair_resume(pair);
		side_wait_any(&pair->source, settled | 1u << PR_STATE_POSTCOPY_ACTIVE);
	}
	fail_msg("not completed after %u recoveries", limit);
}

void pair_check_completed(Pair *pair)
{
	g_auto(PrMigrationInfo) here = {0}, there = {0};
	guint64 corrupt = 1;

	pr_migration_query(pair->source.engine, &there);
	pr_migration_query(pair->destination.engine, &here);
	assert_int_equal(there.state, PR_STATE_COMPLETED);
	assert_int_equal(here.state, PR_STATE_COMPLETED);
	assert_int_equal(here.remaining, 0);
	assert_int_equal(there.remaining, 0);
	assert_int_equal(here.transferred + here.duplicate * here.page_size, here.total);
	assert_int_equal(there.transferred, here.transferred);
	assert_int_equal(there.duplicate, here.duplicate);
	assert_int_equal(there.postcopy_requests, here.postcopy_requests);
	/*
	 * A source may learn only from a recovery that the destination has completed. That recovery
	 * is not counted, so it has one more pause.
	 */
	assert_in_range(there.recoveries, there.pauses - MIN(there.pauses, 1), there.pauses);

	assert_false(testguest_running(pair->source.guest));
	assert_true(testguest_loaded(pair->destination.guest));
	assert_true(testguest_verify(pair->destination.guest, &corrupt));
	assert_int_equal(corrupt, 0);
	assert_int_equal(testguest_corrupt(pair->destination.guest), 0);
}

void pair_check_undone(Pair *pair)
{
	guint64 corrupt = 1;

	assert_true(testguest_running(pair->source.guest));
	assert_true(testguest_verify(pair->source.guest, &corrupt));
	assert_int_equal(corrupt, 0);
}
