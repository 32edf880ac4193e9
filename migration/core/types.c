/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/core/types.h"

G_DEFINE_QUARK(pr_migration_error, pr_migration_error)
