/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/core/state.h"

#include <string.h>

static const char *const state_names[PR_N_STATES] = {
	[PR_STATE_NONE] = "none",
	[PR_STATE_SETUP] = "setup",
	[PR_STATE_ACTIVE] = "active",
	[PR_STATE_DEVICE] = "device",
	[PR_STATE_POSTCOPY_ACTIVE] = "postcopy-active",
	[PR_STATE_POSTCOPY_PAUSED] = "postcopy-paused",
	[PR_STATE_POSTCOPY_RECOVER_SETUP] = "postcopy-recover-setup",
	[PR_STATE_POSTCOPY_RECOVER] = "postcopy-recover",
	[PR_STATE_CANCELLING] = "cancelling",
	[PR_STATE_FAILING] = "failing",
	[PR_STATE_CANCELLED] = "cancelled",
	[PR_STATE_FAILED] = "failed",
	[PR_STATE_COMPLETED] = "completed",
};

static const char *const event_names[PR_N_EVENTS] = {
	[PR_EVENT_START] = "start",	[PR_EVENT_READY] = "ready",
	[PR_EVENT_STOP] = "stop",	[PR_EVENT_LOADED] = "loaded",
	[PR_EVENT_RUN] = "run",		[PR_EVENT_PATH_LOST] = "path-lost",
	[PR_EVENT_ERROR] = "error",	[PR_EVENT_GIVEN_UP] = "given-up",
	[PR_EVENT_CANCEL] = "cancel",	[PR_EVENT_CLEANED_UP] = "cleaned-up",
	[PR_EVENT_RESUME] = "resume",	[PR_EVENT_CONNECTED] = "connected",
	[PR_EVENT_RESUMED] = "resumed", [PR_EVENT_SHUT] = "shut",
};

typedef struct Rule {
	PrAction action; /* 0 is NONE; a rule with `next` unset and no action is no rule */
	PrState next;
	gboolean defined;
} Rule;

/* clang-format off */
#define TO(state_)		{PR_ACTION_NONE, PR_STATE_##state_, TRUE}
#define TO_DO(state_, action_)	{PR_ACTION_##action_, PR_STATE_##state_, TRUE}
/* What each kind of failure leads to. */
#define FAILURES(state_, action_) \
	[PR_EVENT_PATH_LOST] = TO_DO(state_, action_), \
	[PR_EVENT_ERROR] = TO_DO(state_, action_), \
	[PR_EVENT_GIVEN_UP] = TO_DO(state_, action_)
/* Before RUN a failure or a cancel ends the migration, and the guest stays with the source. */
#define MAY_END	FAILURES(FAILING, UNDO), [PR_EVENT_CANCEL] = TO_DO(CANCELLING, UNDO)
#define OVER(state_) [PR_STATE_##state_] = {[PR_EVENT_START] = TO(SETUP), FAILURES(state_, IGNORE)}
#define ENDING(state_, next_) \
	[PR_STATE_##state_] = { \
		[PR_EVENT_CLEANED_UP] = TO(next_), \
		[PR_EVENT_CANCEL] = TO_DO(state_, IGNORE), \
		FAILURES(state_, IGNORE), \
	}

/*
 * Every (state, event) pair that is not listed is refused. Reports of a failure that come when the
 * migration is over, or while a failure is being handled, are listed as IGNORE, because several
 * observers report the same loss.
 */
static const Rule source_rules[PR_N_STATES][PR_N_EVENTS] = {
	OVER(NONE),
	[PR_STATE_SETUP] = {[PR_EVENT_READY] = TO(ACTIVE), MAY_END},
	[PR_STATE_ACTIVE] = {[PR_EVENT_STOP] = TO(DEVICE), MAY_END},
	[PR_STATE_DEVICE] = {[PR_EVENT_LOADED] = TO(POSTCOPY_ACTIVE), MAY_END},
	[PR_STATE_POSTCOPY_ACTIVE] = {
		[PR_EVENT_SHUT] = TO_DO(COMPLETED, RELEASE),
		FAILURES(POSTCOPY_PAUSED, PAUSE),
	},
	[PR_STATE_POSTCOPY_PAUSED] = {
		[PR_EVENT_RESUME] = TO(POSTCOPY_RECOVER_SETUP),
		FAILURES(POSTCOPY_PAUSED, IGNORE),
	},
	[PR_STATE_POSTCOPY_RECOVER_SETUP] = {
		[PR_EVENT_CONNECTED] = TO(POSTCOPY_RECOVER),
		[PR_EVENT_SHUT] = TO_DO(COMPLETED, RELEASE),
		FAILURES(POSTCOPY_PAUSED, PAUSE),
	},
	[PR_STATE_POSTCOPY_RECOVER] = {
		[PR_EVENT_RESUMED] = TO(POSTCOPY_ACTIVE),
		FAILURES(POSTCOPY_PAUSED, PAUSE),
	},
	ENDING(CANCELLING, CANCELLED),
	ENDING(FAILING, FAILED),
	OVER(CANCELLED),
	OVER(FAILED),
	[PR_STATE_COMPLETED] = {FAILURES(COMPLETED, IGNORE)},
};

static const Rule destination_rules[PR_N_STATES][PR_N_EVENTS] = {
	OVER(NONE),
	[PR_STATE_SETUP] = {[PR_EVENT_READY] = TO(ACTIVE), MAY_END},
	[PR_STATE_ACTIVE] = {[PR_EVENT_STOP] = TO(DEVICE), MAY_END},
	[PR_STATE_DEVICE] = {[PR_EVENT_LOADED] = TO(POSTCOPY_ACTIVE), MAY_END},
	/* A failure here may come after the source has sent RUN, so it only pauses. find_rule() has
	 * the two exceptions. */
	[PR_STATE_POSTCOPY_ACTIVE] = {
		[PR_EVENT_RUN] = TO_DO(POSTCOPY_ACTIVE, RUN),
		[PR_EVENT_SHUT] = TO_DO(COMPLETED, RELEASE),
		FAILURES(POSTCOPY_PAUSED, PAUSE),
	},
	[PR_STATE_POSTCOPY_PAUSED] = {
		[PR_EVENT_RUN] = TO_DO(POSTCOPY_PAUSED, RUN), /* read late; still true */
		[PR_EVENT_CONNECTED] = TO(POSTCOPY_RECOVER),
		[PR_EVENT_CANCEL] = TO_DO(CANCELLING, UNDO),
		FAILURES(POSTCOPY_PAUSED, IGNORE),
	},
	[PR_STATE_POSTCOPY_RECOVER] = {
		[PR_EVENT_RESUMED] = TO_DO(POSTCOPY_ACTIVE, RUN),
		FAILURES(POSTCOPY_PAUSED, PAUSE),
	},
	ENDING(CANCELLING, CANCELLED),
	ENDING(FAILING, FAILED),
	OVER(CANCELLED),
	OVER(FAILED),
	/* The guest lives here now. It may be moved on, with this side as the source. */
	OVER(COMPLETED),
};
/* Before RUN, a source that says that it has given up ends the migration at once. */
static const Rule given_up_before_run = TO_DO(FAILING, UNDO);
/* clang-format on */

G_STATIC_ASSERT(G_N_ELEMENTS(state_names) == PR_N_STATES);
G_STATIC_ASSERT(G_N_ELEMENTS(event_names) == PR_N_EVENTS);

const char *pr_state_name(PrState state)
{
	g_assert(state < PR_N_STATES);
	return state_names[state];
}

const char *pr_event_name(PrEvent event)
{
	g_assert(event < PR_N_EVENTS);
	return event_names[event];
}

gboolean pr_state_is_postcopy(PrState state)
{
	return state == PR_STATE_POSTCOPY_ACTIVE || state == PR_STATE_POSTCOPY_PAUSED ||
	       state == PR_STATE_POSTCOPY_RECOVER_SETUP || state == PR_STATE_POSTCOPY_RECOVER;
}

gboolean pr_state_is_over(PrState state)
{
	return state == PR_STATE_NONE || state == PR_STATE_CANCELLED || state == PR_STATE_FAILED ||
	       state == PR_STATE_COMPLETED;
}

gint64 pr_state_time_paused(const PrStateMachine *sm, gint64 now)
{
	gboolean paused = pr_state_is_postcopy(sm->state) && sm->state != PR_STATE_POSTCOPY_ACTIVE;

	return sm->time_paused + (paused ? now - sm->paused : 0);
}

static const Rule *find_rule(const PrStateMachine *sm, PrEvent event, PrRole role)
{
	/* Only a guest that has arrived here may leave again. A START as a destination is refused:
	 * a guest is here. */
	if (event == PR_EVENT_START && sm->state == PR_STATE_COMPLETED &&
	    (sm->role != PR_ROLE_DESTINATION || role != PR_ROLE_SOURCE))
		return NULL;
	/* Once RUN was seen the guest lives here and nobody can end the migration. */
	if (event == PR_EVENT_CANCEL && sm->state == PR_STATE_POSTCOPY_PAUSED && sm->run)
		return NULL;
	if (event == PR_EVENT_GIVEN_UP && sm->role == PR_ROLE_DESTINATION && !sm->run &&
	    pr_state_is_postcopy(sm->state))
		return &given_up_before_run;
	const Rule *rule = sm->role == PR_ROLE_DESTINATION ? &destination_rules[sm->state][event]
							   : &source_rules[sm->state][event];
	return rule->defined ? rule : NULL;
}

static void note_times(PrStateMachine *sm, PrState old, PrEvent event, gint64 now)
{
	switch (event) {
	case PR_EVENT_STOP:
		sm->stopped = now;
		break;
	case PR_EVENT_LOADED:
		sm->loaded = now;
		break;
	case PR_EVENT_RESUME:
	case PR_EVENT_CONNECTED:
		if (old == PR_STATE_POSTCOPY_PAUSED)
			sm->recovering = now;
		break;
	case PR_EVENT_RESUMED:
		sm->recoveries++;
		sm->last_recovery = now - sm->recovering;
		break;
	default:
		break;
	}
	if (old == PR_STATE_POSTCOPY_ACTIVE && sm->state == PR_STATE_POSTCOPY_PAUSED) {
		sm->pauses++;
		sm->paused = now;
	}
	gboolean was_paused = pr_state_is_postcopy(old) && old != PR_STATE_POSTCOPY_ACTIVE;
	gboolean left = sm->state == PR_STATE_POSTCOPY_ACTIVE || pr_state_is_over(sm->state);
	if (was_paused && left) {
		sm->last_pause = now - sm->paused;
		sm->time_paused += sm->last_pause;
	}
	if (pr_state_is_over(sm->state) && !pr_state_is_over(old))
		sm->ended = now;
}

static PrAction run_once(PrStateMachine *sm, gint64 now)
{
	if (sm->run)
		return PR_ACTION_NONE;
	sm->run = TRUE;
	sm->running = now;
	return PR_ACTION_RUN;
}

PrAction pr_state_step(PrStateMachine *sm, PrEvent event, PrRole role, gint64 now)
{
	const Rule *rule = find_rule(sm, event, role);
	if (!rule)
		return PR_ACTION_REFUSE;
	if (rule->action == PR_ACTION_IGNORE)
		return PR_ACTION_IGNORE;

	if (event == PR_EVENT_START)
		*sm = (PrStateMachine){.role = role, .state = PR_STATE_NONE, .started = now};

	PrState old = sm->state;
	sm->state = rule->next;
	note_times(sm, old, event, now);
	return rule->action == PR_ACTION_RUN ? run_once(sm, now) : rule->action;
}

void pr_state_restore(PrStateMachine *sm, PrRole role, PrState state, gboolean run, gint64 now)
{
	g_assert(state == PR_STATE_POSTCOPY_PAUSED || state == PR_STATE_COMPLETED ||
		 state == PR_STATE_FAILING);
	if (state == PR_STATE_FAILING) {
		*sm = (PrStateMachine){
			.role = role, .state = state, .started = now, .stopped = now};
		return;
	}
	*sm = (PrStateMachine){
		.role = role,
		.state = state,
		.run = run,
		.started = now,
		.stopped = now,
		.loaded = now,
		.running = run ? now : 0,
	};
	if (state == PR_STATE_COMPLETED) {
		sm->ended = now;
		return;
	}
	sm->pauses = 1;
	sm->paused = now;
}
