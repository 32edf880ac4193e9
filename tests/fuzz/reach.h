/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Ways to what the engine's files keep to themselves; each is in the file reach-FILE.c, which includes FILE.c. */
#pragma once

#include "migration/internal.h"
#include "transport/control/control.h"

/* reader.c: what the reader thread does until there is a message for the engine or the channel has
 * ended, and has told so. FALSE: nothing is there to be read. */
gboolean reach_control_read(PrControl *control);
int reach_control_fd(PrControl *control);
/* The control that this condition belongs to. */
PrControl *reach_control_of(GCond *cond);

/* listener.c: a listener that listens nowhere. */
PrListener *reach_listener_new(const PrUri *uri, const PrTransportOps *ops, PrDataListener *data,
			       PrOnHello on_hello, void *opaque);
void reach_listener_free(PrListener *listener);
/* What its two threads do with one connection, which is taken. */
void reach_listener_accept(PrListener *listener, int fd);

/* source.c: one turn of the return-path thread. */
void reach_source_take(PrConn *conn);
