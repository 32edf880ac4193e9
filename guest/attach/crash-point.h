/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Crash points: the moments at which the death of a helper leaves a different state behind in the
 * guest's process. A test program may set the hook and kill the helper there
 * (tests/e2e/killable.c). The installed engine sets no hook, so that a crash point costs one
 * comparison.
 */
#pragma once

#include <stddef.h>

/* Each is named for the step that has just been done. */
#define PR_ATTACH_CRASH_POINTS(POINT)                                                              \
	POINT(STOPPED, "attach-stopped")                                                           \
	POINT(SCRATCH_WRITTEN, "attach-scratch-written")                                           \
	POINT(REGISTERS_SET, "attach-registers-set")                                               \
	POINT(IN_CALL, "attach-in-call")                                                           \
	POINT(CALL_DONE, "attach-call-done")                                                       \
	POINT(BEFORE_RESTORE, "attach-before-restore")                                             \
	POINT(RESTORED, "attach-restored")                                                         \
	POINT(PAIR_MADE, "attach-pair-made")                                                       \
	POINT(SENT, "attach-sent")                                                                 \
	POINT(RECEIVED, "attach-received")                                                         \
	POINT(PUSHED, "attach-pushed")                                                             \
	POINT(OLD_STATE_CLOSED, "attach-old-state-closed")                                         \
	POINT(UFFD_MADE, "attach-uffd-made")                                                       \
	POINT(UFFD_READY, "attach-uffd-ready")                                                     \
	POINT(REGISTERED, "attach-registered")                                                     \
	POINT(ENTRIES_DROPPED, "attach-entries-dropped")                                           \
	POINT(MARKED, "attach-marked")                                                             \
	POINT(UNREGISTERED, "attach-unregistered")                                                 \
	POINT(UFFD_CLOSED, "attach-uffd-closed")

#define PR_ATTACH_CRASH_ID(id, name) PR_ATTACH_CRASH_##id,
typedef enum PrAttachCrashPoint {
	PR_ATTACH_CRASH_POINTS(PR_ATTACH_CRASH_ID) PR_ATTACH_N_CRASH_POINTS
} PrAttachCrashPoint;
#undef PR_ATTACH_CRASH_ID

typedef void (*PrAttachCrashHook)(PrAttachCrashPoint point);
extern PrAttachCrashHook pr_attach_crash_hook; /* set before the fork; NULL but in tests */
const char *pr_attach_crash_point_name(PrAttachCrashPoint point);

static inline void pr_attach_crash_point(PrAttachCrashPoint point)
{
	if (__builtin_expect(pr_attach_crash_hook != NULL, 0))
		pr_attach_crash_hook(point);
}
