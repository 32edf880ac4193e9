/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Other peers connect to the port of a running migration. With TLS they are refused, and the
 * migration does not change.
 */
#include <string.h>

#include "migration/internal.h"
#include "tests/integration/cases.h"
#include "tests/rigs/certs.h"
#include "transport/control/control.h"

#define MIB (1024ull * 1024)

/* Sends a HELLO of the right migration with these certificates. NULL: without TLS. */
static void assert_is_refused(Pair *pair, const PrTls *tls, int code, const char *words)
{
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GError) error = NULL;
	PrWireBlock block = {"mem0", 4096, 4096};
	PrHello hello = {.version = PR_WIRE_VERSION,
			 .role = PR_HELLO_SOURCE,
			 .scheme = "tcp",
			 .n_blocks = 1,
			 .blocks = &block};
	PrHelloAck ack;

	pr_migration_query(pair->destination.engine, &info);
	const PrPathInfo *path = g_ptr_array_index(info.paths, 0);
	g_autoptr(PrUri) uri = pr_uri_parse(path->uri, FALSE, NULL);
	g_mutex_lock(&pair->source.engine->session.lock);
	hello.epoch = pair->source.engine->session.binding.epoch + 1;
	memcpy(hello.uuid, pair->source.engine->session.binding.uuid, PR_UUID_BYTES);
	memcpy(hello.secret, pair->source.engine->session.binding.secret, PR_SECRET_BYTES);
	g_mutex_unlock(&pair->source.engine->session.lock);
	assert_null(pr_control_connect(uri, tls, &hello, 20000, 20000, NULL, &ack, &error));
	if (!g_error_matches(error, PR_PATH_ERROR, code) || !strstr(error->message, words))
		fail_msg("failed with %d, \"%s\", not \"%s\"", error->code, error->message, words);
}

static void peers_without_a_certificate_are_refused_without_effect(void **state)
{
	/*
	 * The migration must last until all peers were refused. The guest does not run, so only the
	 * slow pull moves pages.
	 */
	PairConfig config = {
		.scheme = *state, .size = 16 * MIB, .bandwidth = MIB / 8, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autoptr(Certs) none = certs_new_beside(pair->certs);
	g_autoptr(Certs) old = certs_new_beside(pair->certs);
	g_autoptr(Certs) other = certs_new();

	certs_add(none, 30, "server 127.0.0.1");
	certs_add(old, -1, "client source");
	g_autoptr(PrTls) tls_none = pr_tls_new(none, NULL, NULL);
	g_autoptr(PrTls) tls_old = pr_tls_new(old, NULL, NULL);
	g_autoptr(PrTls) tls_other = pr_tls_new(other, NULL, NULL);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	assert_is_refused(pair, NULL, PR_PATH_ERROR_REFUSED, "wants TLS");
	assert_is_refused(pair, tls_none, PR_PATH_ERROR_REFUSED, "was shown none");
	assert_is_refused(pair, tls_old, PR_PATH_ERROR_REFUSED, "it has expired");
	assert_is_refused(pair, tls_other, PR_PATH_ERROR_CONNECT, "not signed by the CA");
	assert_int_equal(side_state(&pair->destination), PR_STATE_POSTCOPY_ACTIVE);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);

	g_auto(PrMigrationInfo) info = {0};
	pr_migration_query(pair->destination.engine, &info);
	assert_int_equal(info.pauses, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(peers_without_a_certificate_are_refused_without_effect),
	};

	return RUN_CASES("intruders", tests);
}
