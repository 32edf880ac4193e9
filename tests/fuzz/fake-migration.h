/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A fake engine for the monitor. It executes each command at once, and reports its state
 * changes. */
#pragma once

#include "monitor/monitor.h"

struct PrMigration {
	PrMonitor *monitor;
	PrState state;
};

void fake_migration_set(PrMigration *migration, PrState state);
