/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "migration/destination/role.h"

void pr_destination_init(PrDestination *destination, PrSession *session);
/* When no thread of this role is left. */
void pr_destination_clear(PrDestination *destination);
/* GThreadFunc of the owner; opaque: the destination. */
gpointer pr_load_thread(gpointer destination);
