/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The write protection of the source's RAM, and the watch over its guest; fence.c has the
 * theory. */
#pragma once

#include "migration/source/role.h"

/* The owner, once RUN may have been sent: begins to write-protect the guest's RAM. Where that is
 * not possible both sides are told. */
void pr_source_fence(PrSource *source);
/* The same for an engine that follows another one, which may have done it. */
void pr_source_fence_again(PrSource *source);
/* Waits until that is done. */
void pr_source_await_fence(PrSource *source);
/* Everything has moved. The watch goes on. */
void pr_source_unfence(PrSource *source);
/* PrGuestRanAgain; opaque: the source. */
void pr_source_ran_again(const char *what, gint64 seen, void *source);
/* Tells the destination what it has to know of the source's guest; once for each connection, as the
 * destination's engine may be another one. */
void pr_source_report_guest(PrConn *conn);
