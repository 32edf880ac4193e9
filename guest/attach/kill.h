/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The moments at which it matters what a helper that dies leaves behind in a guest's process. A test program may
 * hook itself in and kill the helper there (tests/e2e/killable.c); in the engine as it is installed nobody does,
 * and a point is one comparison.
 */
#pragma once

#include <stddef.h>

/* What the names say has just been done. */
#define PR_ATTACH_POINTS(POINT)                                                                    \
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

#define PR_ATTACH_POINT_ID(id, name) PR_ATTACH_##id,
typedef enum PrAttachPoint {
	PR_ATTACH_POINTS(PR_ATTACH_POINT_ID) PR_ATTACH_N_POINTS
} PrAttachPoint;
#undef PR_ATTACH_POINT_ID

typedef void (*PrAttachHook)(PrAttachPoint point);
extern PrAttachHook pr_attach_hook; /* set before the fork; NULL but in tests */
const char *pr_attach_point_name(PrAttachPoint point);

static inline void pr_attach_point(PrAttachPoint point)
{
	if (__builtin_expect(pr_attach_hook != NULL, 0))
		pr_attach_hook(point);
}
