/* SPDX-License-Identifier: GPL-2.0-or-later */
/* HMP lines: options and words, by the command table. */
#pragma once

#include <json-glib/json-glib.h>

#include "monitor/commands.h"

/* An empty line gives no command (NULL) and no error. */
gboolean pr_hmp_parse(const char *line, const PrCommand **ret_command, JsonObject **ret_args,
		      GError **error);
