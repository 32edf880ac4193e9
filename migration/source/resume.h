/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An engine goes on as the source, where the engine before it has ended. migration/resume.c has the
 * theory. */
#pragma once

#include "migration/source/role.h"

/* asked: with --resume. Without it, fails where there is something to go on with. The record has a
 * stage. */
gboolean pr_source_resume(PrSource *source, gboolean asked, GError **error);
