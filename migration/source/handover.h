/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The hand-over, as the source writes it down; migration/resume.c argues the order. Each call is
 * the owner's, and in force when it returns. Where no record is kept, they do nothing.
 */
#pragma once

#include "migration/source/role.h"

gboolean pr_handover_stopping(PrSource *source, GError **error);
gboolean pr_handover_handed_over(PrSource *source, GError **error);
/* RUN was not sent after all. Before the guest may run. */
void pr_handover_revoked(PrSource *source);
/* The guest runs on here. */
void pr_handover_aborted(PrSource *source);
void pr_handover_completed(PrSource *source);
/* Paths that were named since, and that the operator has paused it. */
void pr_handover_update(PrSource *source);
/* At the end: nothing needs to be known of a guest that has moved, and whose process is gone. */
void pr_handover_forget(PrSource *source);
