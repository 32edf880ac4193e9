/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Crash points: the moments at which it matters what a dying engine leaves behind. A test program
 * can set a hook and kill the process there (tests/e2e/killable.c). In the installed engine no hook
 * is set, and a crash point costs one comparison.
 */
#pragma once

#include <glib.h>

/* A name says what has just been done. First the points of the source, then those of the
 * destination, then those of both. */
#define PR_CRASH_POINTS(POINT)                                                                     \
	POINT(SOURCE_STOPPING_NOTED, "source-stopping-noted")                                      \
	POINT(SOURCE_STOPPED, "source-stopped")                                                    \
	POINT(SOURCE_RAM_TOLD, "source-ram-told")                                                  \
	POINT(SOURCE_STATE_SENT, "source-state-sent")                                              \
	POINT(SOURCE_LOADED, "source-loaded")                                                      \
	POINT(SOURCE_HANDED_OVER_NOTED, "source-handed-over-noted")                                \
	POINT(SOURCE_ACTIVE, "source-active")                                                      \
	POINT(SOURCE_RUN_SENT, "source-run-sent")                                                  \
	POINT(SOURCE_FENCED, "source-fenced")                                                      \
	POINT(SOURCE_TAKEN_BACK_NOTED, "source-taken-back-noted")                                  \
	POINT(SOURCE_RESUMED_GUEST, "source-resumed-guest")                                        \
	POINT(SOURCE_COMPLETED, "source-completed")                                                \
	POINT(SOURCE_COMPLETED_NOTED, "source-completed-noted")                                    \
	POINT(SOURCE_UNFENCED, "source-unfenced")                                                  \
	POINT(SOURCE_INCARNATION_NOTED, "source-incarnation-noted")                                \
	POINT(SOURCE_RECONNECTED, "source-reconnected")                                            \
	POINT(SOURCE_BITMAPS_TAKEN, "source-bitmaps-taken")                                        \
	POINT(SOURCE_RESUME_SENT, "source-resume-sent")                                            \
	POINT(SOURCE_RECOVERED, "source-recovered")                                                \
	POINT(DESTINATION_STATE_KEPT, "destination-state-kept")                                    \
	POINT(DESTINATION_FAULTS_ON, "destination-faults-on")                                      \
	POINT(DESTINATION_LISTENING, "destination-listening")                                      \
	POINT(DESTINATION_LOADED, "destination-loaded")                                            \
	POINT(DESTINATION_LOADED_NOTED, "destination-loaded-noted")                                \
	POINT(DESTINATION_RUN_NOTED, "destination-run-noted")                                      \
	POINT(DESTINATION_RUNNING, "destination-running")                                          \
	POINT(DESTINATION_STARTED_NOTED, "destination-started-noted")                              \
	POINT(DESTINATION_PAGE_LANDED, "destination-page-landed")                                  \
	POINT(DESTINATION_PAGE_RECEIVED, "destination-page-received")                              \
	POINT(DESTINATION_PAGE_EXPOSED, "destination-page-exposed")                                \
	POINT(DESTINATION_ZERO_RECEIVED, "destination-zero-received")                              \
	POINT(DESTINATION_READMITTED, "destination-readmitted")                                    \
	POINT(DESTINATION_BITMAP_SENT, "destination-bitmap-sent")                                  \
	POINT(DESTINATION_RESUME_ACKED, "destination-resume-acked")                                \
	POINT(DESTINATION_COMPLETED_NOTED, "destination-completed-noted")                          \
	POINT(DESTINATION_SHUT_SENT, "destination-shut-sent")                                      \
	POINT(DESTINATION_RELEASED, "destination-released")                                        \
	POINT(DESTINATION_ENDED_NOTED, "destination-ended-noted")                                  \
	POINT(DESTINATION_ADOPTED, "destination-adopted")                                          \
	POINT(DESTINATION_WOKEN, "destination-woken")                                              \
	POINT(RECORD_WRITTEN, "record-written")                                                    \
	POINT(RECORD_RENAMED, "record-renamed")

#define PR_CRASH_POINT_ID(id, name) PR_CRASH_##id,
typedef enum PrCrashPoint { PR_CRASH_POINTS(PR_CRASH_POINT_ID) PR_N_CRASH_POINTS } PrCrashPoint;
#undef PR_CRASH_POINT_ID

typedef void (*PrCrashHook)(PrCrashPoint point);
extern PrCrashHook pr_crash_hook; /* atomic; NULL but in tests */
const char *pr_crash_point_name(PrCrashPoint point);

static inline void pr_crash_point(PrCrashPoint point)
{
	PrCrashHook hook = __atomic_load_n(&pr_crash_hook, __ATOMIC_ACQUIRE);

	if (G_UNLIKELY(hook))
		hook(point);
}
