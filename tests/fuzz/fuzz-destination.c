/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plays the source and unauthenticated peers for a destination: the listener's first frames, all
 * commands of the load thread, recoveries and standby paths.
 */
#include "migration/destination/destination.h"
#include "migration/destination/listen.h"
#include "tests/fuzz/engine.h"

static void wait_for_peer(FuzzEngine *engine)
{
	if (fuzz_engine_accept(engine))
		return;
	g_assert(!engine->m->session.quit);
	g_mutex_lock(&engine->m->session.lock);
	engine->m->session.quit = TRUE;
	g_mutex_unlock(&engine->m->session.lock);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	g_autoptr(FuzzEngine) engine = fuzz_engine_new(data, size, PR_GUEST_DESTINATION);
	g_autoptr(PrUri) uri = pr_uri_parse(FUZZ_URI, TRUE, NULL);

	engine->wait = wait_for_peer;
	engine->listener = reach_listener_new(uri, &fuzz_transport, &engine->data,
					      pr_destination_hello, &engine->m->destination);
	/* As pr_migration_incoming() sets it. */
	engine->m->session.thread = g_thread_ref(g_thread_self());
	pr_load_thread(&engine->m->destination);
	return 0;
}
