/* SPDX-License-Identifier: GPL-2.0-or-later */
/* An engine for the monitor to talk to: it does as it is told, at once, and tells its news. */
#pragma once

#include "monitor/monitor.h"

struct PrMigration {
	PrMonitor *monitor;
	PrState state;
};

void fake_migration_set(PrMigration *migration, PrState state);
