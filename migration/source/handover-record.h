/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The hand-over record: what a source writes down, so that the engine which follows it knows whose
 * the guest is.
 *
 * One file for each guest, in the state directory. It holds the migration's secret and is readable
 * by its owner only (0600). A change is in force when the call returns: it is written beside the
 * file, and renamed over it. So whenever the engine dies, the file is the old one or the new one.
 * The file need not reach a disk, which would lengthen the downtime: a host that goes down takes
 * the guest's process with it, and the file is about that process.
 *
 * It is about one process of a guest (guest/process.h). The file of a guest that is gone says
 * nothing about the guest that has its sockets now.
 */
#pragma once

#include "guest/guest.h"
#include "transport/transport.h"

typedef enum PrHandoverStage {
	PR_HANDOVER_NONE,	 /* no file */
	PR_HANDOVER_STOPPING,	 /* the guest may have been stopped; RUN was not sent */
	PR_HANDOVER_HANDED_OVER, /* RUN may have been sent: the guest is the destination's */
	PR_HANDOVER_COMPLETED,	 /* and it has all of it */
} PrHandoverStage;

typedef struct PrHandoverRecord {
	char *path;    /* constant; of the file */
	char *spec;    /* constant; of the guest, as in --guest */
	char *process; /* constant; of the guest */

	PrHandoverStage stage;
	gboolean was_running;	     /* the guest ran before it was stopped */
	gboolean paused_by_operator; /* automatic recovery waits until the operator resumes */
	/* How many engines have gone on with this migration. The upper half of its epochs. */
	uint32_t incarnation;
	uint8_t uuid[PR_UUID_BYTES];
	uint8_t secret[PR_SECRET_BYTES];
	char *uris;
	PrGuestBlock *blocks; /* n_blocks; idstr, size, page_size and base */
	guint n_blocks;
} PrHandoverRecord;

/* Reads the record of a guest in a directory; without a file, PR_HANDOVER_NONE. Refuses a file that
 * is not a whole record, naming it. */
PrHandoverRecord *pr_handover_record_open(const char *dir, const char *spec, const char *process,
					  GError **error);
void pr_handover_record_free(PrHandoverRecord *record);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrHandoverRecord, pr_handover_record_free)

void pr_handover_record_set_blocks(PrHandoverRecord *record, const PrGuestBlock *blocks, guint n);
void pr_handover_record_set_uris(PrHandoverRecord *record, const char *uris);
/* In force when it returns TRUE; otherwise the file is as it was. The error names the directory. */
gboolean pr_handover_record_save(PrHandoverRecord *record, PrHandoverStage stage, GError **error);
/* PR_HANDOVER_NONE. */
gboolean pr_handover_record_remove(PrHandoverRecord *record, GError **error);

/* Where records are by default: /run/postroad for root, else in $XDG_RUNTIME_DIR. g_free() it. */
char *pr_handover_record_default_dir(void);
