/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The state machine, tested as tables: sequences of events, and every event in every state. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <string.h>

#include "migration/core/state.h"

#define MAX_STEPS 24

typedef struct Step {
	PrEvent event;
	PrState then;
	PrAction action;
} Step;

typedef struct Conversation {
	const char *name;
	PrRole role;
	Step steps[MAX_STEPS];
	guint n;
} Conversation;

#define STEP(event_, then_, action_)                                                               \
	{                                                                                          \
		PR_EVENT_##event_, PR_STATE_##then_, PR_ACTION_##action_                           \
	}
#define TO_POSTCOPY                                                                                \
	STEP(START, SETUP, NONE), STEP(READY, ACTIVE, NONE), STEP(STOP, DEVICE, NONE),             \
		STEP(LOADED, POSTCOPY_ACTIVE, NONE)

static const Conversation conversations[] = {
	{"source completes", PR_ROLE_SOURCE, {TO_POSTCOPY, STEP(SHUT, COMPLETED, RELEASE)}, 5},
	{"source pauses, recovers, completes",
	 PR_ROLE_SOURCE,
	 {TO_POSTCOPY, STEP(PATH_LOST, POSTCOPY_PAUSED, PAUSE),
	  STEP(PATH_LOST, POSTCOPY_PAUSED, IGNORE), STEP(RESUME, POSTCOPY_RECOVER_SETUP, NONE),
	  STEP(CONNECTED, POSTCOPY_RECOVER, NONE), STEP(RESUMED, POSTCOPY_ACTIVE, NONE),
	  STEP(SHUT, COMPLETED, RELEASE)},
	 10},
	{"source fails in every part of a recovery",
	 PR_ROLE_SOURCE,
	 {TO_POSTCOPY, STEP(ERROR, POSTCOPY_PAUSED, PAUSE),
	  STEP(RESUME, POSTCOPY_RECOVER_SETUP, NONE), STEP(RESUME, POSTCOPY_RECOVER_SETUP, REFUSE),
	  STEP(PATH_LOST, POSTCOPY_PAUSED, PAUSE), STEP(RESUME, POSTCOPY_RECOVER_SETUP, NONE),
	  STEP(CONNECTED, POSTCOPY_RECOVER, NONE), STEP(RESUME, POSTCOPY_RECOVER, REFUSE),
	  STEP(ERROR, POSTCOPY_PAUSED, PAUSE), STEP(CANCEL, POSTCOPY_PAUSED, REFUSE),
	  STEP(START, POSTCOPY_PAUSED, REFUSE)},
	 14},
	{"source comes back to a completed destination",
	 PR_ROLE_SOURCE,
	 {TO_POSTCOPY, STEP(PATH_LOST, POSTCOPY_PAUSED, PAUSE),
	  STEP(RESUME, POSTCOPY_RECOVER_SETUP, NONE), STEP(SHUT, COMPLETED, RELEASE),
	  STEP(START, COMPLETED, REFUSE)},
	 8},
	{"source loses the path before RUN, and starts anew",
	 PR_ROLE_SOURCE,
	 {STEP(START, SETUP, NONE), STEP(READY, ACTIVE, NONE), STEP(STOP, DEVICE, NONE),
	  STEP(PATH_LOST, FAILING, UNDO), STEP(ERROR, FAILING, IGNORE),
	  STEP(LOADED, FAILING, REFUSE), STEP(START, FAILING, REFUSE),
	  STEP(CLEANED_UP, FAILED, NONE), STEP(START, SETUP, NONE)},
	 9},
	{"source is cancelled",
	 PR_ROLE_SOURCE,
	 {STEP(START, SETUP, NONE), STEP(CANCEL, CANCELLING, UNDO),
	  STEP(CANCEL, CANCELLING, IGNORE), STEP(PATH_LOST, CANCELLING, IGNORE),
	  STEP(CLEANED_UP, CANCELLED, NONE)},
	 5},
	{"source may not go back once RUN may have been sent",
	 PR_ROLE_SOURCE,
	 {TO_POSTCOPY, STEP(CANCEL, POSTCOPY_ACTIVE, REFUSE),
	  STEP(GIVEN_UP, POSTCOPY_PAUSED, PAUSE)},
	 6},
	{"destination runs and completes",
	 PR_ROLE_DESTINATION,
	 {TO_POSTCOPY, STEP(RUN, POSTCOPY_ACTIVE, RUN), STEP(RUN, POSTCOPY_ACTIVE, NONE),
	  STEP(SHUT, COMPLETED, RELEASE)},
	 7},
	{"destination gets its RUN with the recovery",
	 PR_ROLE_DESTINATION,
	 {TO_POSTCOPY, STEP(PATH_LOST, POSTCOPY_PAUSED, PAUSE),
	  STEP(CONNECTED, POSTCOPY_RECOVER, NONE), STEP(RESUMED, POSTCOPY_ACTIVE, RUN),
	  STEP(PATH_LOST, POSTCOPY_PAUSED, PAUSE), STEP(CONNECTED, POSTCOPY_RECOVER, NONE),
	  STEP(RESUMED, POSTCOPY_ACTIVE, NONE)},
	 10},
	{"destination reads RUN after the path is lost",
	 PR_ROLE_DESTINATION,
	 {TO_POSTCOPY, STEP(PATH_LOST, POSTCOPY_PAUSED, PAUSE), STEP(RUN, POSTCOPY_PAUSED, RUN),
	  STEP(CANCEL, POSTCOPY_PAUSED, REFUSE)},
	 7},
	{"destination waits for RUN and is cancelled",
	 PR_ROLE_DESTINATION,
	 {TO_POSTCOPY, STEP(PATH_LOST, POSTCOPY_PAUSED, PAUSE), STEP(CANCEL, CANCELLING, UNDO),
	  STEP(CLEANED_UP, CANCELLED, NONE), STEP(START, SETUP, NONE)},
	 8},
	{"destination's source gives up before RUN",
	 PR_ROLE_DESTINATION,
	 {TO_POSTCOPY, STEP(GIVEN_UP, FAILING, UNDO), STEP(CLEANED_UP, FAILED, NONE)},
	 6},
	{"destination's source says it gives up after RUN: only a pause",
	 PR_ROLE_DESTINATION,
	 {TO_POSTCOPY, STEP(RUN, POSTCOPY_ACTIVE, RUN), STEP(GIVEN_UP, POSTCOPY_PAUSED, PAUSE),
	  STEP(GIVEN_UP, POSTCOPY_PAUSED, IGNORE)},
	 7},
};

static void each_conversation_leads_to_the_expected_states(void **state)
{
	for (guint i = 0; i < G_N_ELEMENTS(conversations); i++) {
		const Conversation *c = &conversations[i];
		PrStateMachine sm = {0};
		for (guint n = 0; n < c->n; n++) {
			const Step *step = &c->steps[n];
			PrAction action = pr_state_step(&sm, step->event, c->role, 1000 + n);
			if (action != step->action || sm.state != step->then)
				fail_msg("%s: step %u (%s): action %d, state %s; expected %d, %s",
					 c->name, n, pr_event_name(step->event), action,
					 pr_state_name(sm.state), step->action,
					 pr_state_name(step->then));
		}
	}
}

/* The events that each state acts upon. It refuses or ignores all others. */
static const char *const acted_upon[2][PR_N_STATES] = {
	{
		[PR_STATE_NONE] = "start",
		[PR_STATE_SETUP] = "ready path-lost error given-up cancel",
		[PR_STATE_ACTIVE] = "stop path-lost error given-up cancel",
		[PR_STATE_DEVICE] = "loaded path-lost error given-up cancel",
		[PR_STATE_POSTCOPY_ACTIVE] = "path-lost error given-up shut",
		[PR_STATE_POSTCOPY_PAUSED] = "resume",
		[PR_STATE_POSTCOPY_RECOVER_SETUP] = "path-lost error given-up connected shut",
		[PR_STATE_POSTCOPY_RECOVER] = "path-lost error given-up resumed",
		[PR_STATE_CANCELLING] = "cleaned-up",
		[PR_STATE_FAILING] = "cleaned-up",
		[PR_STATE_CANCELLED] = "start",
		[PR_STATE_FAILED] = "start",
		[PR_STATE_COMPLETED] = "",
	},
	{
		[PR_STATE_NONE] = "start",
		[PR_STATE_SETUP] = "ready path-lost error given-up cancel",
		[PR_STATE_ACTIVE] = "stop path-lost error given-up cancel",
		[PR_STATE_DEVICE] = "loaded path-lost error given-up cancel",
		[PR_STATE_POSTCOPY_ACTIVE] = "run path-lost error given-up shut",
		[PR_STATE_POSTCOPY_PAUSED] = "run given-up cancel connected",
		[PR_STATE_POSTCOPY_RECOVER_SETUP] = "given-up",
		[PR_STATE_POSTCOPY_RECOVER] = "path-lost error given-up resumed",
		[PR_STATE_CANCELLING] = "cleaned-up",
		[PR_STATE_FAILING] = "cleaned-up",
		[PR_STATE_CANCELLED] = "start",
		[PR_STATE_FAILED] = "start",
		[PR_STATE_COMPLETED] = "",
	},
};

static void every_event_is_decided_in_every_state(void **state)
{
	for (guint r = 0; r < 2; r++) {
		PrRole role = r == 0 ? PR_ROLE_SOURCE : PR_ROLE_DESTINATION;
		for (guint s = 0; s < PR_N_STATES; s++) {
			g_autofree char *list = g_strdup_printf(" %s ", acted_upon[r][s]);
			for (guint e = 0; e < PR_N_EVENTS; e++) {
				PrStateMachine sm = {.role = role, .state = s};
				g_autofree char *word = g_strdup_printf(" %s ", pr_event_name(e));
				PrAction action = pr_state_step(&sm, e, role, 5);
				gboolean acted =
					action != PR_ACTION_REFUSE && action != PR_ACTION_IGNORE;
				if (!acted)
					assert_int_equal(sm.state, s);
				if (acted != (strstr(list, word) != NULL))
					fail_msg("%s, %s, %s: action %d",
						 r ? "destination" : "source", pr_state_name(s),
						 pr_event_name(e), action);
			}
		}
	}
}

static void times_of_pauses_add_up(void **state)
{
	PrStateMachine sm = {0};
	gint64 t = 100;

	pr_state_step(&sm, PR_EVENT_START, PR_ROLE_SOURCE, t);
	pr_state_step(&sm, PR_EVENT_READY, PR_ROLE_SOURCE, t += 10);
	pr_state_step(&sm, PR_EVENT_STOP, PR_ROLE_SOURCE, t += 10);
	pr_state_step(&sm, PR_EVENT_LOADED, PR_ROLE_SOURCE, t += 7);
	assert_int_equal(sm.loaded - sm.stopped, 7);
	pr_state_step(&sm, PR_EVENT_PATH_LOST, PR_ROLE_SOURCE, t += 100);
	assert_int_equal(pr_state_time_paused(&sm, t + 5), 5);
	pr_state_step(&sm, PR_EVENT_RESUME, PR_ROLE_SOURCE, t += 1000);
	pr_state_step(&sm, PR_EVENT_PATH_LOST, PR_ROLE_SOURCE,
		      t += 30); /* the same pause continues */
	pr_state_step(&sm, PR_EVENT_RESUME, PR_ROLE_SOURCE, t += 500);
	pr_state_step(&sm, PR_EVENT_CONNECTED, PR_ROLE_SOURCE, t += 20);
	pr_state_step(&sm, PR_EVENT_RESUMED, PR_ROLE_SOURCE, t += 3);
	assert_int_equal(sm.pauses, 1);
	assert_int_equal(sm.recoveries, 1);
	assert_int_equal(sm.last_recovery, 23);
	assert_int_equal(sm.last_pause, 1000 + 30 + 500 + 23);
	pr_state_step(&sm, PR_EVENT_PATH_LOST, PR_ROLE_SOURCE, t += 100);
	pr_state_step(&sm, PR_EVENT_RESUME, PR_ROLE_SOURCE, t += 40);
	pr_state_step(&sm, PR_EVENT_SHUT, PR_ROLE_SOURCE, t += 2);
	assert_int_equal(sm.pauses, 2);
	assert_int_equal(pr_state_time_paused(&sm, t + 999), 1553 + 42);
	assert_int_equal(sm.ended, t);
}

static void a_completed_destination_may_become_a_source(void **state)
{
	PrStateMachine sm = {.role = PR_ROLE_DESTINATION, .state = PR_STATE_COMPLETED, .run = TRUE};

	assert_int_equal(pr_state_step(&sm, PR_EVENT_START, PR_ROLE_DESTINATION, 1),
			 PR_ACTION_REFUSE);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_START, PR_ROLE_SOURCE, 1), PR_ACTION_NONE);
	assert_int_equal(sm.role, PR_ROLE_SOURCE);
	assert_int_equal(sm.state, PR_STATE_SETUP);
	assert_false(sm.run);
}

/*
 * A new engine starts in the state of the previous engine's migration, and continues as that engine
 * would have.
 */
static void a_restored_machine_continues_the_migration(void **state)
{
	PrStateMachine sm;

	pr_state_restore(&sm, PR_ROLE_DESTINATION, PR_STATE_POSTCOPY_PAUSED, /* run= */ TRUE, 100);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_CANCEL, sm.role, 110), PR_ACTION_REFUSE);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_CONNECTED, sm.role, 120), PR_ACTION_NONE);
	/* The guest has run already, so there is no second RUN. */
	assert_int_equal(pr_state_step(&sm, PR_EVENT_RESUMED, sm.role, 130), PR_ACTION_NONE);
	assert_int_equal(sm.state, PR_STATE_POSTCOPY_ACTIVE);
	assert_int_equal(sm.recoveries, 1);
	assert_int_equal(sm.last_pause, 30);

	pr_state_restore(&sm, PR_ROLE_DESTINATION, PR_STATE_POSTCOPY_PAUSED, /* run= */ FALSE, 100);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_CONNECTED, sm.role, 120), PR_ACTION_NONE);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_RESUMED, sm.role, 130), PR_ACTION_RUN);

	pr_state_restore(&sm, PR_ROLE_SOURCE, PR_STATE_POSTCOPY_PAUSED, FALSE, 100);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_CANCEL, sm.role, 110), PR_ACTION_REFUSE);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_RESUME, sm.role, 120), PR_ACTION_NONE);

	pr_state_restore(&sm, PR_ROLE_SOURCE, PR_STATE_COMPLETED, FALSE, 100);
	assert_int_equal(pr_state_step(&sm, PR_EVENT_START, PR_ROLE_SOURCE, 110), PR_ACTION_REFUSE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_conversation_leads_to_the_expected_states),
		cmocka_unit_test(every_event_is_decided_in_every_state),
		cmocka_unit_test(times_of_pauses_add_up),
		cmocka_unit_test(a_completed_destination_may_become_a_source),
		cmocka_unit_test(a_restored_machine_continues_the_migration),
	};

	return cmocka_run_group_tests_name("state", tests, NULL, NULL);
}
