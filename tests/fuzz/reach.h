/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Functions that call static functions of the engine. Each is in a file reach-FILE.c, which
 * includes FILE.c. */
#pragma once

#include "migration/internal.h"
#include "transport/control/control.h"

/* reader.c: does the reader thread's work until it has a message for the engine, or has reported
 * the end of the channel. FALSE: nothing to read. */
gboolean reach_control_read(PrControl *control);
int reach_control_fd(PrControl *control);
/* Returns the control channel that owns this condition. */
PrControl *reach_control_of(GCond *cond);

/* listener.c: creates a listener without a socket. */
PrListener *reach_listener_new(const PrUri *uri, const PrTransportOps *ops, PrDataListener *data,
			       PrOnHello on_hello, void *opaque);
void reach_listener_free(PrListener *listener);
/* Does the work of the listener's two threads for one connection. Takes the descriptor. */
void reach_listener_accept(PrListener *listener, int fd);

/* return-path.c: lets the return-path thread's code handle one message. */
void reach_source_handle(PrConn *conn);
