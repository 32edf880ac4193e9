/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Refuses a QEMU that cannot be migrated. */
#pragma once

#include "guest/guest.h"
#include "guest/qmp.h"

/* Changes nothing. fresh: no engine has begun to load a guest here, so the run state has to be the
 * initial one. */
gboolean pr_qemu_check(PrQmp *qmp, PrGuestRole role, gboolean fresh, GError **error);
