/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The source's commands. uris: PrUri*, in the order of preference; the caller keeps its
 * reference. */
#pragma once

#include "migration/source/role.h"

/* `migrate`: begins a migration. */
gboolean pr_source_start(PrSource *source, GPtrArray *uris, GError **error);
/* `migrate -r`: a paused migration is to be recovered over these paths. */
gboolean pr_source_recover_over(PrSource *source, GPtrArray *uris, GError **error);
