/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination's listeners: `--incoming`, `migrate_incoming`, `migrate_recover`. */
#pragma once

#include "migration/destination/role.h"

/* `migrate_incoming`: starts the owner. FALSE: this side can't become a destination now, or becomes
 * one already. To be followed by pr_destination_end_listening(). */
gboolean pr_destination_begin_listening(PrDestination *destination, GError **error);
void pr_destination_end_listening(PrDestination *destination);
/* `migrate_recover`: only a paused destination may listen on more addresses. */
gboolean pr_destination_check_paused(PrDestination *destination, GError **error);
/* Opens listeners, beside those that are open. uris: PrUri*. */
gboolean pr_destination_listen(PrDestination *destination, const GPtrArray *uris,
			       GCancellable *cancel, GError **error);
/* PrOnHello: an incoming connection, which the control channel's handshake hands on. opaque: the
 * destination. */
void pr_destination_hello(PrControl *control, const PrHello *hello, PrListener *listener,
			  void *opaque);
/* Closes all listeners. Nobody accepts lanes from them any more. */
void pr_destination_stop_listening(PrDestination *destination);
