/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The guest runs on at the source; take-back.c has the theory. follows: another engine has stopped
 * it. */
#pragma once

#include "migration/source/role.h"

/* One try to let the guest run. */
gboolean pr_source_try_run(PrSource *source, gboolean follows, GError **error);
/* The owner: tries until the guest runs, its process is gone or the engine is to end. Then the
 * migration is over. */
void pr_source_take_back(PrSource *source, gboolean follows);
/* GThreadFunc of an owner that does just that; opaque: the source. */
gpointer pr_source_take_back_thread(gpointer source);
