/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * An engine follows one that has died.
 *
 * The destination's facts are in the state memfd that the agent keeps (state-memfd.h), the source's in a file (handover-record.h).
 * Both say how far the migration had come, and each step of them is in force before what it says may be seen by
 * anybody else:
 *
 *	source                                             what who follows does
 *	  no record                                         nothing: the guest has not been stopped
 *	  STOPPING     before the guest is stopped          lets it run on (take-back.c), removes the record
 *	  HANDED_OVER  before RUN can be sent               postcopy-paused; this guest never runs again;
 *	                                                    fences it (fence.c), which is harmless if it is fenced
 *	  (STOPPING    again, before a guest whose RUN was never sent may run: taken back)
 *	  (removed     after it runs)
 *	  COMPLETED    after the destination has said so    completed; lifts the fence
 *
 *	destination
 *	  SETUP        before the fault mode is on          gives it up: the guest is the source's
 *	  LOADED       before PONG can be sent              postcopy-paused; runs when a recovery says so
 *	  RUN          before the guest is let run          lets it run (again: harmless), postcopy-paused
 *	  STARTED      after it                             postcopy-paused
 *	  COMPLETED    before SHUT can be sent              completed, and tells a source that asks
 *	  ENDED        before the fault mode is turned off  turns it off
 *
 * So the guest runs on one side at most: the source runs it only while its record says that RUN was never sent, and
 * the destination only after it has seen RUN, or a RESUME, which a source sends only after HANDED_OVER. And on one
 * side at least, once a human or the paths let the two sides meet: HANDED_OVER is only ever left for COMPLETED, and a
 * destination that has LOADED waits for ever.
 *
 * RAM of the guest itself needs no durability: whatever loses it loses the guest's process, and the record or
 * the memfd with it, as they are about that one process.
 *
 * Epochs. A destination takes no epoch that is not higher than those it knows. A source may have used any number
 * of them since its record was written; so the upper half of an epoch is the incarnation, which is raised in the
 * record before the first epoch of a new engine is used.
 *
 * Two engines for one guest: the agent serves one connection at a time, and the kernel closes that of a process that
 * ends. state-memfd.h tells why nothing of the dead one lands late.
 */
#include <string.h>

#include "migration/session/session.h"
#include "migration/core/crash-point.h"
#include "migration/memory/uffd.h"
#include "util/try-alloc.h"

/* ---- what the source notes ---- */

static char *join_uris(PrMigration *m)
{
	GString *text = g_string_new(NULL);

	g_mutex_lock(&m->lock);
	for (guint i = 0; m->uris && i < m->uris->len; i++)
		g_string_append_printf(text, "%s%s", i > 0 ? "," : "",
				       ((PrUri *)g_ptr_array_index(m->uris, i))->text);
	g_mutex_unlock(&m->lock);
	return g_string_free(text, FALSE);
}

static void note_blocks(PrHandoverRecord *record, const PrRam *ram)
{
	g_autofree PrGuestBlock *blocks = g_new0(PrGuestBlock, ram->n_blocks);

	for (guint i = 0; i < ram->n_blocks; i++)
		blocks[i] = (PrGuestBlock){.idstr = ram->blocks[i].idstr,
					   .size = ram->blocks[i].size,
					   .page_size = (uint32_t)ram->blocks[i].per_host *
							PR_TARGET_PAGE,
					   .base = ram->blocks[i].base};
	pr_handover_record_set_blocks(record, blocks, ram->n_blocks);
}

gboolean pr_handover_stopping(PrMigration *m, GError **error)
{
	PrHandoverRecord *record = m->record;
	g_autofree char *uris = NULL;

	if (!record)
		return TRUE;
	if (!m->guest->ops->is_running(m->guest, &record->was_running, error))
		return FALSE;
	uris = join_uris(m);
	g_mutex_lock(&m->lock);
	memcpy(record->uuid, m->binding.uuid, PR_UUID_BYTES);
	memcpy(record->secret, m->binding.secret, PR_SECRET_BYTES);
	g_mutex_unlock(&m->lock);
	record->incarnation = 0;
	record->held = FALSE;
	pr_handover_record_set_uris(record, uris);
	note_blocks(record, m->ram);
	if (!pr_handover_record_save(record, PR_HANDOVER_STOPPING, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_STOPPING_NOTED);
	return TRUE;
}

gboolean pr_handover_handed_over(PrMigration *m, GError **error)
{
	if (m->record && !pr_handover_record_save(m->record, PR_HANDOVER_HANDED_OVER, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_HANDED_OVER_NOTED);
	return TRUE;
}

/* A full disk lets a file be removed, if it lets none be written. Without any record who follows would not let the
 * guest run either, but could not resume it by a mistake. */
void pr_handover_revoked(PrMigration *m)
{
	g_autoptr(GError) error = NULL;

	if (!m->record || m->record->stage != PR_HANDOVER_HANDED_OVER)
		return;
	if (!pr_handover_record_save(m->record, PR_HANDOVER_STOPPING, &error) &&
	    !pr_handover_record_remove(m->record, NULL))
		g_critical(
			"%s; remove %s by hand: it says that this guest was handed over, and it was "
			"not",
			error->message, m->record->path);
	pr_crash_point(PR_CRASH_SOURCE_TAKEN_BACK_NOTED);
}

void pr_handover_aborted(PrMigration *m)
{
	g_autoptr(GError) error = NULL;

	pr_crash_point(PR_CRASH_SOURCE_RESUMED_GUEST);
	if (m->record && m->record->stage != PR_HANDOVER_NONE &&
	    !pr_handover_record_remove(m->record, &error))
		g_warning("%s", error->message);
}

void pr_handover_completed(PrMigration *m)
{
	g_autoptr(GError) error = NULL;

	pr_crash_point(PR_CRASH_SOURCE_COMPLETED);
	/* HANDED_OVER says enough: a recovery would learn that it is complete. */
	if (m->record && !pr_handover_record_save(m->record, PR_HANDOVER_COMPLETED, &error))
		g_warning("%s", error->message);
	pr_crash_point(PR_CRASH_SOURCE_COMPLETED_NOTED);
}

void pr_source_forget(PrMigration *m)
{
	if (m->record && m->record->stage == PR_HANDOVER_COMPLETED && m->guest_gone)
		pr_handover_record_remove(m->record, NULL);
}

/* Paths that were named since, and a human's wish that it stays paused. */
void pr_handover_update(PrMigration *m)
{
	PrHandoverRecord *record = m->record;
	g_autoptr(GError) error = NULL;
	g_autofree char *uris = NULL;

	if (!record || record->stage != PR_HANDOVER_HANDED_OVER)
		return;
	uris = join_uris(m);
	g_mutex_lock(&m->lock);
	gboolean held = m->held;
	g_mutex_unlock(&m->lock);
	if (held == record->held && strcmp(uris, record->uris ? record->uris : "") == 0)
		return;
	record->held = held;
	pr_handover_record_set_uris(record, uris);
	if (!pr_handover_record_save(record, PR_HANDOVER_HANDED_OVER, &error))
		g_warning("%s", error->message);
}

gboolean pr_migration_keep_record(PrMigration *m, const char *dir, const char *spec, GError **error)
{
	g_autofree char *process = m->guest->ops->process(m->guest);

	m->record = pr_handover_record_open(dir, spec, process, error);
	return m->record != NULL;
}

/* Without, this engine has to end; another one can go on from here. */
static gboolean begin_owner(PrMigration *m, const char *name, GThreadFunc func, GError **error)
{
	g_mutex_lock(&m->lock);
	m->thread = pr_thread_try(name, func, m, error);
	gboolean begun = m->thread != NULL;
	g_mutex_unlock(&m->lock);
	return begun;
}

/* ---- the destination ---- */

static gboolean wake_all(PrMigration *m, GError **error)
{
	if (!pr_uffd_wake_all(m->uffd, m->ram, error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_WOKEN);
	return TRUE;
}

/* The faults that the dead engine has read are lost; whoever waits is woken, and faults again. */
static gboolean serve_faults(PrMigration *m, GError **error)
{
	return pr_destination_start_workers(m, /* fresh= */ FALSE, error) && wake_all(m, error);
}

/* Which parts of the state machine follow from the stage. */
static void restore_destination(PrMigration *m, PrStateMemfdStage stage)
{
	gboolean completed = stage == PR_STATE_MEMFD_COMPLETED;
	const char *reason =
		completed ? "the guest had arrived when the last engine ended"
		: stage == PR_STATE_MEMFD_LOADED
			? "the last engine ended when the device state had been loaded"
			: "the last engine ended while the guest's memory was under way";

	g_mutex_lock(&m->lock);
	pr_state_memfd_identity(m->ram->state_memfd, &m->binding);
	m->held = pr_state_memfd_held(m->ram->state_memfd);
	m->verifies = pr_state_memfd_verifies(m->ram->state_memfd);
	m->guest_was_running = pr_state_memfd_was_running(m->ram->state_memfd);
	m->guest_started = stage == PR_STATE_MEMFD_STARTED || completed;
	m->pages_at_pause = pr_ram_received_bytes(m->ram) / PR_TARGET_PAGE;
	pr_migration_restore_locked(m, PR_ROLE_DESTINATION,
				    completed ? PR_STATE_COMPLETED : PR_STATE_POSTCOPY_PAUSED,
				    stage >= PR_STATE_MEMFD_RUN, reason);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

/* Takes kept. */
static gboolean adopt_ram(PrMigration *m, PrStateMemfd *kept, GError **error)
{
	guint n, n_vcpus;
	g_autofree PrGuestBlock *known = pr_state_memfd_blocks(kept, &n);
	const PrGuestBlock *blocks = m->guest->ops->adopt(m->guest, known, n, error);
	PrRam *ram = NULL;

	if (blocks)
		ram = pr_ram_adopt(blocks, n, kept, error);
	else
		pr_state_memfd_free(kept);
	if (!ram)
		return FALSE;
	const uint32_t *vcpus = pr_state_memfd_vcpus(kept, &n_vcpus);
	g_mutex_lock(&m->lock);
	m->ram = ram;
	m->times = pr_blocktime_new(vcpus, n_vcpus);
	g_mutex_unlock(&m->lock);
	pr_crash_point(PR_CRASH_DESTINATION_ADOPTED);
	return TRUE;
}

/* A VMM that waits for a page does not do it now; the recovery that brings the page tries again. */
static void let_run(PrMigration *m)
{
	g_autoptr(GError) error = NULL;

	if (!pr_destination_try_run(m, &error)) {
		g_warning("the guest can't be started before the migration has recovered: %s",
			  error->message);
		return;
	}
	g_mutex_lock(&m->lock);
	m->guest_started = TRUE;
	g_mutex_unlock(&m->lock);
}

/* Takes kept. */
static gboolean resume_destination(PrMigration *m, PrStateMemfd *kept, GError **error)
{
	PrStateMemfdStage stage = pr_state_memfd_stage(kept);
	guint timeout = (guint)pr_param(m->params, PR_PARAM_GUEST_TIMEOUT);

	if (!pr_state_memfd_await_engine(kept, timeout, error)) {
		pr_state_memfd_free(kept);
		return FALSE;
	}
	if (!adopt_ram(m, kept, error))
		return FALSE;
	restore_destination(m, stage);
	if (stage == PR_STATE_MEMFD_COMPLETED ? !m->guest->ops->uffd_disable(m->guest, error)
					      : !serve_faults(m, error)) {
		pr_destination_leave(m);
		return FALSE;
	}
	if (stage == PR_STATE_MEMFD_RUN)
		let_run(m);
	g_message("going on as the destination of a migration that is %s: %" G_GUINT64_FORMAT
		  " of %" G_GUINT64_FORMAT " pages are here",
		  pr_state_name(m->sm.state), pr_ram_received_bytes(m->ram) / PR_TARGET_PAGE,
		  m->ram->total_bytes / PR_TARGET_PAGE);
	if (begin_owner(m, "load", pr_load_thread, error))
		return TRUE;
	pr_destination_leave(m);
	return FALSE;
}

/* The guest had not come. What is left of it in the process is of no use to anybody. */
/* Takes kept. What the dead engine's card still writes is to land before this memory is used again. */
static gboolean discard_partial_load(PrMigration *m, PrStateMemfd *kept, GError **error)
{
	guint timeout = (guint)pr_param(m->params, PR_PARAM_GUEST_TIMEOUT);
	gboolean ended = pr_state_memfd_await_engine(kept, timeout, error);

	pr_state_memfd_free(kept);
	if (!ended || !m->guest->ops->uffd_disable(m->guest, error) ||
	    !m->guest->ops->store_state_fd(m->guest, -1, error))
		return FALSE;
	g_message("the last engine ended before the guest had come here: the guest is still the "
		  "source's, and this side begins anew");
	return TRUE;
}

/* ---- the source ---- */

static GPtrArray *parse_recorded_uris(const PrHandoverRecord *record)
{
	g_autoptr(GError) error = NULL;
	GPtrArray *uris = record->uris && *record->uris
				  ? pr_uri_list_parse(record->uris, /* listening= */ FALSE, &error)
				  : NULL;

	if (error)
		g_warning("%s: %s", record->path, error->message);
	return uris ? uris : g_ptr_array_new_with_free_func((GDestroyNotify)pr_uri_free);
}

static void restore_source(PrMigration *m)
{
	const PrHandoverRecord *record = m->record;
	gboolean completed = record->stage == PR_HANDOVER_COMPLETED;

	g_mutex_lock(&m->lock);
	memcpy(m->binding.uuid, record->uuid, PR_UUID_BYTES);
	memcpy(m->binding.secret, record->secret, PR_SECRET_BYTES);
	m->binding.epoch = (uint64_t)record->incarnation << 32;
	m->uris = parse_recorded_uris(record);
	m->n_asked = m->uris->len;
	m->held = record->held;
	pr_migration_begin_attempt(m);
	pr_migration_restore_locked(
		m, PR_ROLE_SOURCE, completed ? PR_STATE_COMPLETED : PR_STATE_POSTCOPY_PAUSED, FALSE,
		completed ? "the guest had moved when the last engine ended"
			  : "the last engine ended when the guest had been handed over");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

static gboolean resume_source(PrMigration *m, GError **error)
{
	PrHandoverRecord *record = m->record;
	const PrGuestBlock *blocks;
	PrRam *ram;

	blocks = m->guest->ops->adopt(m->guest, record->blocks, record->n_blocks, error);
	ram = blocks ? pr_ram_new(blocks, record->n_blocks, PR_GUEST_SOURCE, error) : NULL;
	if (!ram)
		return FALSE;
	g_mutex_lock(&m->lock);
	m->ram = ram;
	g_mutex_unlock(&m->lock);
	record->incarnation++;
	if (!pr_handover_record_save(record, record->stage, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_INCARNATION_NOTED);
	restore_source(m);
	g_message("going on as the source of a migration that is %s; this guest belongs to the "
		  "destination",
		  pr_state_name(m->sm.state));
	if (record->stage == PR_HANDOVER_HANDED_OVER)
		return begin_owner(m, "migration", pr_source_resumed_thread, error);
	pr_source_unfence(m);
	return TRUE;
}

/* What keeps it from running may last: then the monitor answers meanwhile, and says so. */
static gboolean go_on_trying(PrMigration *m, const GError *why, GError **error)
{
	g_autofree char *words = g_strdup_printf(
		"the last engine ended while it moved this guest, which is still the source's and "
		"does not run yet: %s",
		why->message);

	g_mutex_lock(&m->lock);
	m->error_desc = g_strdup(words);
	pr_migration_restore_locked(m, PR_ROLE_SOURCE, PR_STATE_FAILING, FALSE, words);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return begin_owner(m, "migration", pr_source_take_back_thread, error);
}

static gboolean resume_guest(PrMigration *m, GError **error)
{
	g_autoptr(GError) why = NULL;

	g_message("the last engine ended before the guest was handed over: it runs on here, if it "
		  "ran; should the destination be postcopy-paused, cancel there (migrate_cancel)");
	if (!pr_source_try_run(m, /* follows= */ TRUE, &why))
		return go_on_trying(m, why, error);
	pr_handover_aborted(m);
	return TRUE;
}

/* ---- both ---- */

static gboolean needs_resume(GError **error, const char *what)
{
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
		    "%s; start this engine with --resume", what);
	return FALSE;
}

static gboolean resume_as_source(PrMigration *m, gboolean asked, GError **error)
{
	static const char *const words[] = {
		[PR_HANDOVER_STOPPING] =
			"the last engine of this guest ended while it was moving it, and "
			"may have left it stopped",
		[PR_HANDOVER_HANDED_OVER] =
			"the last engine of this guest ended when it had handed it over: "
			"it belongs to the destination, which needs its memory",
		[PR_HANDOVER_COMPLETED] =
			"this guest has moved to another host for good: quit its VMM; or",
	};

	if (!asked) {
		needs_resume(error, words[m->record->stage]);
		g_prefix_error(error, "%s: ", m->record->path);
		return FALSE;
	}
	return m->record->stage == PR_HANDOVER_STOPPING ? resume_guest(m, error)
							: resume_source(m, error);
}

/* Takes kept. */
static gboolean take_up_destination(PrMigration *m, PrStateMemfd *kept, gboolean asked,
				    GError **error)
{
	PrStateMemfdStage stage = pr_state_memfd_stage(kept);
	gboolean half = stage == PR_STATE_MEMFD_SETUP || stage == PR_STATE_MEMFD_ENDED;

	if (half || asked)
		return half ? discard_partial_load(m, kept, error)
			    : resume_destination(m, kept, error);
	pr_state_memfd_free(kept);
	return stage == PR_STATE_MEMFD_COMPLETED ||
	       needs_resume(error, "the last engine of this guest ended in the middle of its "
				   "migration to here");
}

/* FALSE with *ret NULL: the agent keeps nothing, or an error. */
static gboolean fetch_kept(PrMigration *m, PrStateMemfd **ret, GError **error)
{
	g_autoptr(GError) inner = NULL;
	int fd = m->guest->ops->fetch_state(m->guest, &inner);

	*ret = NULL;
	if (inner)
		g_propagate_error(error, g_steal_pointer(&inner));
	else if (fd >= 0)
		*ret = pr_state_memfd_attach(fd, error);
	return *ret != NULL;
}

/* The fence (fence.c) stands from behind RUN until everything has moved: such a guest is the destination's, also when
 * what its engine wrote down is lost. */
static gboolean check_fence(PrMigration *m, GError **error)
{
	if (!m->record || m->record->stage >= PR_HANDOVER_HANDED_OVER ||
	    !m->guest->ops->was_fenced(m->guest))
		return TRUE;
	g_set_error(
		error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
		"this guest was handed over to another host, for its RAM is write-protected, and "
		"%s does not say so; name the --state-dir of the last engine, or quit the "
		"guest's VMM",
		m->record->path);
	return FALSE;
}

gboolean pr_migration_resume(PrMigration *m, gboolean asked, PrRole *ret_role, GError **error)
{
	g_autoptr(GError) inner = NULL;
	PrStateMemfd *kept;
	gboolean done = TRUE;

	if (!check_fence(m, error))
		return FALSE;
	if (m->record && m->record->stage != PR_HANDOVER_NONE)
		done = resume_as_source(m, asked, error);
	else if (fetch_kept(m, &kept, &inner))
		done = take_up_destination(m, kept, asked, error);
	else if (inner) {
		g_propagate_error(error, g_steal_pointer(&inner));
		done = FALSE;
	} else if (asked)
		g_message("nothing to resume: no engine has left a migration of this guest behind");
	g_mutex_lock(&m->lock);
	*ret_role = m->sm.role;
	g_mutex_unlock(&m->lock);
	return done;
}
