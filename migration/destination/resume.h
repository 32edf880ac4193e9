/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An engine goes on as the destination, where the engine before it has ended. migration/resume.c
 * has the theory. */
#pragma once

#include "migration/destination/role.h"
#include "migration/memory/state-memfd.h"

/* The state memfd that the last engine has left with the guest. NULL: there is none, or an
 * error. */
PrStateMemfd *pr_destination_fetch_state(PrDestination *destination, GError **error);
/* Takes ownership of the state. asked: with --resume. Without it, fails where there is something to
 * go on with. */
gboolean pr_destination_resume(PrDestination *destination, PrStateMemfd *state, gboolean asked,
			       GError **error);
