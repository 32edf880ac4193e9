/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control channel: framed messages (transport/wire/wire.h) over one TCP connection, and the listener
 * that accepts them.
 *
 * A started channel has a thread of its own that reads frames into a queue and watches the heartbeat:
 * a consumer that is busy (loading device state) never looks like a dead peer. Every failure (error,
 * end of stream, malformed frame, silence) closes the channel once, with a PR_PATH_ERROR as reason.
 */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

#include "transport/uri.h"
#include "transport/net/tls.h"
#include "transport/transport.h"
#include "util/stall-watchdog.h"
#include "transport/wire/wire.h"

typedef struct PrControl PrControl;

typedef struct PrMsg {
	uint16_t type;
	uint32_t length;
	uint8_t *body;
} PrMsg;
void pr_msg_free(PrMsg *msg);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrMsg, pr_msg_free)

/* Source: connects within timeout_ms and, TLS included (tls: NULL: plain), exchanges HELLO for HELLO_ACK
 * within handshake_ms. A peer that refuses is PR_PATH_ERROR_REFUSED with its reason; one that is not Postroad
 * says so. */
PrControl *pr_control_connect(const PrUri *uri, const PrTls *tls, const PrHello *hello,
			      guint timeout_ms, guint handshake_ms, GCancellable *cancel,
			      PrHelloAck *ret_ack, GError **error);

/* Destination: answers the HELLO of a connection that the listener handed over. With a status
 * other than PR_HELLO_OK the connection is closed afterwards. */
gboolean pr_control_answer(PrControl *control, const PrHelloAck *ack, GError **error);

/* FALSE with PR_PATH_ERROR_REFUSED or _HELD and the peer's reason, if that is what it says. */
gboolean pr_control_check_ack(PrControl *control, const PrHelloAck *ack, GError **error);

/* Before the start: each message for the engine is shown to `early` by the reader thread as soon as it has come, before
 * those that still wait to be received; TRUE: that was all that there is to do with it. It must not block and must not
 * send. */
typedef gboolean (*PrControlEarly)(const PrMsg *msg, void *opaque);
void pr_control_set_early(PrControl *control, PrControlEarly early, void *opaque);

/* Before it is started: who looks after its reader. */
void pr_control_set_watchdog(PrControl *control, PrWatchdog *watchdog);

/* Starts the reader thread and the heartbeat. on_failed is called once, from the reader thread or from
 * whichever thread's send failed, before any pr_control_recv() returns the failure. */
gboolean pr_control_start(PrControl *control, guint heartbeat_interval_ms,
			  guint heartbeat_timeout_ms, PrPathFailed on_failed, void *opaque,
			  GError **error);

/* Sends one message; any thread. FALSE: the channel has failed. */
gboolean pr_control_send(PrControl *control, uint16_t type, const void *body, gsize length,
			 GError **error);
/* As above, with the body of a GByteArray (NULL: empty). */
gboolean pr_control_send_bytes(PrControl *control, uint16_t type, GByteArray *body, GError **error);

/* Sends a message and waits for 2 ms at most: the last word before a pr_control_shutdown(), or a word in passing.
 * If somebody is in the middle of a message for longer, it is sent a little later, unless the channel is shut down
 * meanwhile: then the peer sees the end without a reason. Any thread. */
void pr_control_send_nowait(PrControl *control, uint16_t type, const GByteArray *body);

/* Takes the next message for the engine. Waits for at most timeout_ms (G_MAXUINT: until one
 * comes or the channel fails). Unknown types were skipped already. Messages that arrived before
 * a failure are still returned first. On timeout returns NULL with PR_PATH_ERROR_TIMEOUT and
 * the channel stays open. */
PrMsg *pr_control_recv(PrControl *control, guint timeout_ms, GError **error);

/* Closes the channel with this reason (a copy is kept); any thread, idempotent; the first
 * reason stays. on_failed is not called. All sends and receives end. */
void pr_control_shutdown(PrControl *control, const GError *reason);
/* The peer's address, for messages. */
const char *pr_control_peer(PrControl *control);
/* The address that it was called at, as text; g_free() it. */
char *pr_control_local_host(PrControl *control);
/* Round trip of the last heartbeat, microseconds; 0: none yet. */
guint64 pr_control_rtt_us(PrControl *control);
/* Joins the reader thread and frees. Never from on_failed. */
void pr_control_free(PrControl *control);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrControl, pr_control_free)

/*
 * The listener: one per incoming URI, with a thread of its own. It reads the first message of each
 * connection (bounded in time, number and length, so that a stranger who stalls or sends garbage
 * disturbs nobody), gives control connections to on_hello and data connections to the
 * transport's offer().
 */
typedef struct PrListener PrListener;

/* Called from a thread of the listener, one at a time. Takes the control, not yet answered; the hello
 * stays the listener's. data is the listener's data listener. */
typedef void (*PrOnHello)(PrControl *control, const PrHello *hello, PrListener *listener,
			  void *opaque);

/* security: NULL: plain, on addresses of this host's loopback only. Waits for the look-up of a name, at most 5 s or until
 * cancelled; with an address it waits for nothing. */
PrListener *pr_listener_new(const PrUri *uri, const PrSecurity *security, guint handshake_ms,
			    PrOnHello on_hello, void *opaque, GCancellable *cancel, GError **error);
/* With the port that was really bound. */
const PrUri *pr_listener_uri(PrListener *listener);
PrDataListener *pr_listener_data(PrListener *listener);
/* Stops accepting, waits for handshakes and on_hello calls in progress, frees. */
void pr_listener_free(PrListener *listener);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrListener, pr_listener_free)
