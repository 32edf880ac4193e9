/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control channel: framed messages (transport/wire/wire.h) over one TCP connection; and the
 * listener that accepts such connections.
 *
 * A started channel has a thread of its own, which reads frames into a queue and checks the
 * heartbeat. So a consumer that is busy (loading device state) is never taken for a dead peer.
 * The first failure (an error, the end of the stream, a malformed frame, silence) closes the
 * channel, with a PR_PATH_ERROR as the reason.
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

/* Source: connects within timeout_ms. Then, within handshake_ms, does the TLS handshake (tls:
 * NULL: none), sends HELLO and receives HELLO_ACK. A refusal is PR_PATH_ERROR_REFUSED with the
 * peer's reason. The error also says where the peer does not speak the Postroad protocol. */
PrControl *pr_control_connect(const PrUri *uri, const PrTls *tls, const PrHello *hello,
			      guint timeout_ms, guint handshake_ms, GCancellable *cancel,
			      PrHelloAck *ret_ack, GError **error);

/* Destination: answers the HELLO of a connection that came from the listener. With a status
 * other than PR_HELLO_OK the connection is closed afterwards. */
gboolean pr_control_answer(PrControl *control, const PrHelloAck *ack, GError **error);

/* FALSE: the answer is a refusal. PR_PATH_ERROR_REFUSED, or _PAUSED_BY_OPERATOR, with the peer's
 * reason. */
gboolean pr_control_check_ack(PrControl *control, const PrHelloAck *ack, GError **error);

/* Called by the reader thread with each message for the engine as soon as it has come in, ahead
 * of messages that are still queued. TRUE: the message is handled, and is not queued. Must
 * neither block nor send. */
typedef gboolean (*PrControlEarly)(const PrMsg *msg, void *opaque);
/* Before the start. */
void pr_control_set_early(PrControl *control, PrControlEarly early, void *opaque);

/* Before the start: the watchdog that reports a reader thread which hangs. */
void pr_control_set_watchdog(PrControl *control, PrWatchdog *watchdog);

/* Starts the reader thread and the heartbeat. on_failed is called once, from the reader thread,
 * before any pr_control_recv() returns the failure. */
gboolean pr_control_start(PrControl *control, guint heartbeat_interval_ms,
			  guint heartbeat_timeout_ms, PrPathFailed on_failed, void *opaque,
			  GError **error);

/* Sends one message; any thread. FALSE: the channel has failed. */
gboolean pr_control_send(PrControl *control, uint16_t type, const void *body, gsize length,
			 GError **error);
/* As above, with the body of a GByteArray (NULL: empty). */
gboolean pr_control_send_bytes(PrControl *control, uint16_t type, GByteArray *body, GError **error);

/* Sends a message, and waits for 2 ms at most: the reason before a pr_control_shutdown(), or a
 * message that is not worth a longer wait. Where another thread needs longer for its own message,
 * the reader sends this one later. If the channel is shut down before that, the peer sees the end
 * without a reason. Any thread. */
void pr_control_send_nowait(PrControl *control, uint16_t type, const GByteArray *body);

/* Receives the next message for the engine. Waits for at most timeout_ms (G_MAXUINT: until one
 * comes in or the channel fails). Messages of unknown types are skipped. Messages that came in
 * before a failure are returned first. At the timeout it returns NULL with PR_PATH_ERROR_TIMEOUT,
 * and the channel stays open. */
PrMsg *pr_control_recv(PrControl *control, guint timeout_ms, GError **error);

/* Closes the channel with this reason, which is copied. The first reason stays. on_failed is not
 * called, and all sends and receives end. Any thread; idempotent. */
void pr_control_shutdown(PrControl *control, const GError *reason);
/* The peer's address, for messages. */
const char *pr_control_peer(PrControl *control);
/* The address of this host that the connection uses; g_free() it. */
char *pr_control_local_host(PrControl *control);
/* Round trip of the last heartbeat, microseconds; 0: none yet. */
guint64 pr_control_rtt_us(PrControl *control);
/* Joins the reader thread and frees. Never from on_failed. */
void pr_control_free(PrControl *control);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrControl, pr_control_free)

/*
 * The listener: one for each incoming URI, with threads of its own. It reads the first message of
 * each connection. Time, number and length are bounded, so that a peer which stalls or sends
 * garbage disturbs no other. Control connections go to on_hello, and data connections to the
 * backend's offer().
 */
typedef struct PrListener PrListener;

/* Called from a thread of the listener, for one connection at a time. Takes the control, whose
 * HELLO is not answered yet. The hello stays the listener's. */
typedef void (*PrOnHello)(PrControl *control, const PrHello *hello, PrListener *listener,
			  void *opaque);

/* security: NULL: plain, and only on loopback addresses. Waits for the look-up of a name, for 5 s
 * at most or until cancelled. With an address it does not wait. */
PrListener *pr_listener_new(const PrUri *uri, const PrSecurity *security, guint handshake_ms,
			    PrOnHello on_hello, void *opaque, GCancellable *cancel, GError **error);
/* With the port that is bound. */
const PrUri *pr_listener_uri(PrListener *listener);
PrDataListener *pr_listener_data(PrListener *listener);
/* Stops accepting, waits for handshakes and a call of on_hello in progress, and frees. */
void pr_listener_free(PrListener *listener);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrListener, pr_listener_free)
