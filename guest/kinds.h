/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The ops tables of the kinds of guests. */
#pragma once

#include "guest/guest.h"

extern const PrGuestOps pr_guest_agent;
extern const PrGuestOps pr_guest_qemu;

/* Loading may take this many guest timeouts, as it touches guest RAM whose pages come over the
 * network. load_abort() ends it sooner. */
#define PR_GUEST_LOAD_TIMEOUTS 20
