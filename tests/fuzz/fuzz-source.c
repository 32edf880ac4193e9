/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plays the destination for a source, from `migrate` on, with a recovery for each further
 * connection of the input: the answer to HELLO, and all messages of the return path.
 */
#include "migration/source/source.h"
#include "tests/fuzz/engine.h"

static PrState state_of(PrMigration *m, PrConn **ret_conn)
{
	g_mutex_lock(&m->session.lock);
	PrState state = m->session.sm.state;
	*ret_conn = m->session.conn;
	g_mutex_unlock(&m->session.lock);
	return state;
}

static void quit(PrMigration *m)
{
	g_assert(!m->session.quit);
	g_mutex_lock(&m->session.lock);
	m->session.quit = TRUE;
	g_mutex_unlock(&m->session.lock);
}

static void wait_for_peer(FuzzEngine *engine)
{
	PrConn *conn;
	PrState state = state_of(engine->m, &conn);

	if (conn)
		reach_source_handle(conn);
	else if (state != PR_STATE_POSTCOPY_PAUSED || !fuzz_engine_has_next(engine) ||
		 !pr_migration_start(engine->m, FUZZ_URI, TRUE, NULL))
		quit(engine->m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	g_autoptr(FuzzEngine) engine = fuzz_engine_new(data, size, PR_GUEST_SOURCE);
	PrState state;
	PrConn *conn;

	engine->wait = wait_for_peer;
	g_assert(pr_migration_start(engine->m, FUZZ_URI, FALSE, NULL));
	pr_source_thread(&engine->m->source);
	state = state_of(engine->m, &conn);
	/* The guest runs here unless it was handed over. */
	g_assert(engine->handed_over ==
		 (pr_state_is_postcopy(state) || state == PR_STATE_COMPLETED));
	g_assert(engine->handed_over || (!engine->stopped && engine->n_resumes == 1));
	return 0;
}
