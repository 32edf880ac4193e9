/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Formats the engine's state as JSON with QEMU's field names, and that JSON as text. Does no
 * I/O. */
#pragma once

#include <json-glib/json-glib.h>

#include "migration/migration.h"

JsonNode *pr_migrate_to_json(const PrMigrationInfo *info);
JsonNode *pr_paths_to_json(const PrMigrationInfo *info);
const char *pr_role_name(PrRole role);

void pr_show_migrate(JsonNode *result, GString *text);
void pr_show_paths(JsonNode *result, GString *text);
void pr_show_parameters(JsonNode *result, GString *text);
void pr_show_capabilities(JsonNode *result, GString *text);
void pr_show_version(JsonNode *result, GString *text);
/* For a result that is a text. */
void pr_show_text(JsonNode *result, GString *text);
