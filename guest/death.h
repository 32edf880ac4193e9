/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The death of a guest's process, or the end of a connection to it: reported to one observer,
 * once. */
#pragma once

#include "guest/guest.h"

typedef struct PrDeath {
	GMutex calling; /* held while the observer is called; taken before lock */
	GMutex lock;
	char *reason;	  /* lock; NULL: alive; constant once set */
	PrGuestDied died; /* lock; the observer; NULL: none, or it was called */
	void *opaque;	  /* lock; the observer's */
} PrDeath;

void pr_death_init(PrDeath *death);
void pr_death_clear(PrDeath *death);
/* Calls the observer. Only the first report counts. */
void pr_death_report(PrDeath *death, const char *reason);
/* Sets the observer. If the death was reported already, calls it from here. NULL: no observer any
 * more, and no call is in progress when this returns. Not from within such a call. */
void pr_death_observe(PrDeath *death, PrGuestDied died, void *opaque);
