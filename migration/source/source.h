/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "migration/source/role.h"

void pr_source_init(PrSource *source, PrSession *session);
/* When no thread of this role is left. */
void pr_source_clear(PrSource *source);
/* pr_session_begin_attempt(), and what the source waits for in an attempt. With the lock held. */
void pr_source_begin_attempt(PrSource *source);
/* GThreadFuncs of the owner; opaque: the source. The second begins in postcopy-paused, where
 * another engine ended. */
gpointer pr_source_thread(gpointer source);
gpointer pr_source_resumed_thread(gpointer source);
