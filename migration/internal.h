/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a migration consists of. A side takes one role at a time; a source may become a destination
 * later, and back. */
#pragma once

#include "migration/destination/role.h"
#include "migration/migration.h"
#include "migration/session/session.h"
#include "migration/source/role.h"

struct PrMigration {
	PrSession session;
	PrSource source;
	PrDestination destination;
};
