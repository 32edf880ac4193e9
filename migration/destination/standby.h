/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination's half of standby paths; source/standby.c tells what they are for. */
#pragma once

#include "migration/destination/role.h"

/* A source wants to connect a standby. From the listener's thread; takes the control. */
void pr_standby_admit(PrDestination *destination, PrControl *control, const PrHello *hello,
		      PrListener *listener);
