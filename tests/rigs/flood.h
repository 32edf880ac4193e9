/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A host that floods a port: it connects again and again, sends some bytes each time, and keeps its
 * connections open.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define FLOOD_HELD 300 /* connections that it keeps open; more than any listener keeps */

typedef struct Flood Flood;

/* from: an address of this host, such as 127.0.0.2. bytes: not owned. */
Flood *flood_new(const char *from, uint16_t port, const void *bytes, gsize n);
/* Waits until it has made so many more connections. Returns FALSE after a minute. */
gboolean flood_wait(Flood *flood, guint more);
/* Stops the flood, and closes its connections. */
void flood_free(Flood *flood);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Flood, flood_free)
