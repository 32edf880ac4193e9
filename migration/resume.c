/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * An engine follows one that has died.
 *
 * The destination's facts are in the state memfd that the agent keeps (memory/state-memfd.h), the
 * source's in a file (source/handover-record.h). Both say how far the migration had come. Each step
 * is in force before anybody else may see what it stands for:
 *
 *   source                                             the next engine
 *     no record                                         nothing: the guest has not been stopped
 *     STOPPING     before the guest is stopped          lets it run on (take-back.c)
 *     HANDED_OVER  before RUN can be sent               postcopy-paused; fences the guest again
 *                                                       (fence.c), which is harmless
 *     (STOPPING    again, before a guest whose RUN was never sent may run: revoked)
 *     (removed     after it runs: aborted)
 *     COMPLETED    after the destination has said so    completed; lifts the fence
 *
 *   destination
 *     SETUP        before the fault mode is on          discards it: the guest is the source's
 *     LOADED       before PONG can be sent              postcopy-paused; a recovery lets it run
 *     RUN          before the guest may run             lets it run again: harmless; paused
 *     STARTED      after it runs                        postcopy-paused
 *     COMPLETED    before SHUT can be sent              completed, and tells a source that asks
 *     ENDED        before the fault mode is turned off  turns it off
 *
 * So the guest runs on one side at most. The source runs it only while its record says that RUN was
 * never sent. The destination runs it only after it has seen RUN, or RESUME, which a source sends
 * only after HANDED_OVER. And the guest runs on one side at least, once the operator or a path lets
 * the two sides meet: HANDED_OVER is only ever left for COMPLETED, and a destination that has
 * LOADED waits for ever.
 *
 * The guest's RAM needs no durability. An event that loses it also ends the guest's process, and
 * the record or the state memfd is about that one process.
 *
 * Epochs. A destination takes no epoch that is not higher than those it knows. A source may have
 * used any number of epochs since its record was written. So the upper half of an epoch is the
 * incarnation, which is raised in the record before a new engine uses its first epoch.
 *
 * Two engines for one guest: the agent serves one connection at a time, and the kernel closes the
 * connection of a process that ends. state-memfd.h tells why no READ of the dead engine lands late.
 */
#include "migration/destination/resume.h"
#include "migration/internal.h"
#include "migration/source/resume.h"

gboolean pr_migration_keep_record(PrMigration *m, const char *dir, const char *spec, GError **error)
{
	PrGuest *guest = m->session.guest;
	g_autofree char *process = guest->ops->process(guest);

	m->source.record = pr_handover_record_open(dir, spec, process, error);
	return m->source.record != NULL;
}

/* The fence (source/fence.c) stands from RUN until everything has moved. A guest with a fence is
 * the destination's, also when the record of its engine is lost. */
static gboolean check_fence(PrMigration *m, GError **error)
{
	const PrHandoverRecord *record = m->source.record;
	PrGuest *guest = m->session.guest;

	if (!record || record->stage >= PR_HANDOVER_HANDED_OVER || !guest->ops->was_fenced(guest))
		return TRUE;
	g_set_error(
		error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
		"this guest was handed over to another host, for its RAM is write-protected, and "
		"%s does not say so; name the --state-dir of the last engine, or quit the "
		"guest's VMM",
		record->path);
	return FALSE;
}

static gboolean resume_role(PrMigration *m, gboolean asked, GError **error)
{
	const PrHandoverRecord *record = m->source.record;
	g_autoptr(GError) inner = NULL;
	PrStateMemfd *state;

	if (record && record->stage != PR_HANDOVER_NONE)
		return pr_source_resume(&m->source, asked, error);
	state = pr_destination_fetch_state(&m->destination, &inner);
	if (state)
		return pr_destination_resume(&m->destination, state, asked, error);
	if (inner) {
		g_propagate_error(error, g_steal_pointer(&inner));
		return FALSE;
	}
	if (asked)
		g_message("nothing to resume: no engine has left a migration of this guest behind");
	return TRUE;
}

gboolean pr_migration_resume(PrMigration *m, gboolean asked, PrRole *ret_role, GError **error)
{
	PrSession *session = &m->session;

	if (!check_fence(m, error))
		return FALSE;
	gboolean done = resume_role(m, asked, error);
	pr_session_lock(session);
	*ret_role = session->sm.role;
	pr_session_unlock(session);
	return done;
}
