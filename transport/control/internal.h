/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A started channel. Goals: a busy consumer is never taken for a dead peer. A dead peer is
 * detected within the heartbeat timeout whatever this side is doing. Messages that arrived before
 * the end are not lost.
 *
 * Threads. Only the reader reads the socket, sends heartbeats, and declares the end. Senders
 * write whole frames under send_lock, without blocking in the kernel: they poll for room together
 * with `closed`, which becomes readable for good when the channel ends. The reader only tries to
 * take send_lock: when it is taken, a frame is being sent, which shows the peer that this side is
 * alive. The part of a heartbeat that the socket has no room for stays in `tail`, and is sent
 * before the next frame.
 *
 * Silence. The peer is dead when nothing was received for the timeout (heartbeat.c). While the
 * queue is full the reader does not read the socket, and that time does not count as silence.
 *
 * The end. A failed write is left to the reader, which first reads what the peer had still sent:
 * often that says why it left. The first reason stays. pr_control_shutdown() closes only the
 * sending direction at once. The reader then waits up to LINGER_MS for the peer to close its
 * direction. Closing a TCP socket with unread data in it would make the kernel drop what this
 * side sent last.
 */
#pragma once

#include <sys/uio.h>

#include "transport/control/control.h"
#include "transport/control/heartbeat.h"
#include "util/waker.h"

#define PR_AHEAD_BYTES 4096 /* several small messages */

struct PrControl {
	/* Constant; connection and fd once there is TLS. */
	GSocketConnection *connection;
	int fd;
	PrUri *uri;
	const PrTransportOps *ops;
	char *peer;
	char *local_host;
	PrWaker reader_waker; /* the reader has to look at the data under `lock` */
	PrWaker closed;	      /* never drained: woken once, by the end of the channel */
	/* Set before the reader starts. */
	PrPathFailed on_failed;
	void *opaque;
	PrControlEarly early; /* or NULL */
	void *early_opaque;
	GThread *reader;
	PrWatchdog *watchdog;	   /* constant once it is started */
	gint64 handshake_deadline; /* bounds reads and writes until the start, then 0 */
	GCancellable *cancel;	   /* the caller's; until the start */

	GMutex send_lock;
	GByteArray *tail; /* send_lock */

	GMutex lock; /* of the rest; taken inside send_lock */
	GCond changed;
	GQueue queue; /* PrMsg */
	gsize queued_bytes;
	gboolean handling; /* the engine handles the message that it received last */
	gboolean started;
	GError *failure;       /* the first reason, set once */
	gboolean reported;     /* on_failed has returned, or need not be called */
	GError *send_error;    /* why a write failed; for the reader */
	GByteArray *postponed; /* frames of pr_control_send_nowait() for the reader; or NULL */
	gboolean linger;
	gboolean full; /* the reader waits for room in the queue */
	guint64 rtt_us;

	/* The reader's; before the start, of the thread that has the channel. */
	PrHeartbeat heartbeat;
	uint8_t header[PR_WIRE_HEADER_BYTES];
	gsize header_filled;
	PrMsg *incoming; /* its header is complete; NULL: none */
	gsize filled, allocated;
	/* Bytes that were received behind the part of a message that was asked for. Only after
	 * the start: until then the connection may be handed to other code, which has to find its
	 * bytes in the socket. */
	gboolean reads_ahead;
	uint8_t ahead[PR_AHEAD_BYTES];
	gsize ahead_at, ahead_n;
	gboolean drained; /* the last receive has emptied the socket */
};

/* Takes the connection (also when it fails), copies the URI. */
PrControl *pr_control_new(GSocketConnection *connection, const PrUri *uri,
			  const PrTransportOps *ops, GError **error);
/* Until the start, reads and writes end at this time or when cancelled. */
void pr_control_set_handshake(PrControl *control, gint64 deadline, GCancellable *cancel);
/* Reads the first frame of a channel that is not started. At the deadline of the handshake it
 * fails with PR_PATH_ERROR_TIMEOUT, and can be called again for the rest. PR_WIRE_ERROR: the peer
 * does not speak the Postroad protocol. Reads nothing beyond the frame. */
PrMsg *pr_control_read_first(PrControl *control, GError **error);
/* Takes the connection out, for a TLS handshake, and puts the encrypted one in its place. Before
 * anything was read. */
GSocketConnection *pr_control_take_connection(PrControl *control);
void pr_control_put_connection(PrControl *control, GSocketConnection *connection);
/* Frees the channel, but not its connection. */
GSocketConnection *pr_control_release(PrControl *control);

/* Between control.c and reader.c. */
#define PR_CUT_TEXT "cut by fault injection"
gpointer pr_control_reader(gpointer control);
GError *pr_control_lost(PrControl *control, const char *what);
GError *pr_control_lost_errno(PrControl *control, const char *doing, int code);
gboolean pr_control_has_ended(PrControl *control);
/* Ends the channel unless it has ended; takes the reason. */
void pr_control_fail(PrControl *control, GError *reason);
/* FALSE: the fault injection has cut the channel at this message. */
gboolean pr_control_admit(PrControl *control, gboolean outgoing, uint16_t type);

typedef struct PrFrame {
	struct iovec part[3];
	gsize left; /* bytes */
} PrFrame;
/* Writes what the socket takes: bytes, or -errno. */
gssize pr_frame_write(int fd, PrFrame *frame);
/* Under send_lock. Appends frames to the tail, and writes as much of it as the socket takes. 0,
 * or -errno. */
int pr_control_write_tail(PrControl *control, const void *frames, gsize length);
