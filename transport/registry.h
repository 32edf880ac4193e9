/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which backends this build has, found by the scheme of a URI. */
#pragma once

#include "transport/transport.h"

/* The ops of a URI's scheme. NULL: PR_URI_ERROR, which lists the schemes of this build. */
const PrTransportOps *pr_transport_find(const char *scheme, GError **error);

/* Sets up what the backends' libraries set up at first use (libfabric looks for all its
 * providers: 0.1 s), so that the first migration need not wait for it. Takes that long; any
 * thread may call it. */
void pr_transport_warm_up(void);

/* All schemes of this build and their options, for --help. */
void pr_transport_describe(GString *out);
