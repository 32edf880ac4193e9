/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A started channel. Goals: a busy consumer never looks like a dead peer; a dead peer is seen within
 * the heartbeat timeout whatever this side is doing; what arrived before the end is not lost.
 *
 * Threads. The reader alone reads the socket, sends the heartbeats and declares the end. Senders
 * write whole frames under send_lock, without blocking in the kernel: they poll for room together with
 * `closed`, which becomes readable for good when the channel ends. The reader only ever tries
 * send_lock: when it is taken, a frame is on its way and is a sign of life itself. What the reader could
 * not write of a heartbeat stays in `tail` and goes before the next frame.
 *
 * Silence. The peer is dead when nothing at all was received for the timeout (heartbeat.c). While the
 * queue is full the reader doesn't look at the socket, and that silence is ours.
 *
 * The end. A failed write is handed to the reader, which first takes in what the peer had still sent:
 * often that says why it left. The first reason stays. After pr_control_shutdown() only the sending
 * direction is closed at once; the reader waits up to LINGER_MS for the peer to close its own, because
 * closing a TCP socket with unread data in it makes the kernel drop what we sent last.
 */
#pragma once

#include <sys/uio.h>

#include "transport/control/control.h"
#include "transport/control/heartbeat.h"
#include "util/waker.h"

#define PR_AHEAD_BYTES 4096 /* several small messages */

struct PrControl {
	/* Constant; connection and fd once TLS is in place. */
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
	GCancellable *cancel;	   /* the caller's, until the start */

	GMutex send_lock;
	GByteArray *tail; /* send_lock */

	GMutex lock; /* of the rest; taken inside send_lock */
	GCond changed;
	GQueue queue; /* PrMsg */
	gsize queued_bytes;
	gboolean handling; /* what was received last is being carried out */
	gboolean started;
	GError *failure;    /* the first reason, set once */
	gboolean reported;  /* on_failed has returned, or nobody has to be told */
	GError *send_error; /* why a write failed, for the reader */
	GByteArray *
		postponed; /* frames said in passing, when somebody was in the middle of one; or NULL */
	gboolean linger;
	gboolean full; /* the reader waits for room in the queue */
	guint64 rtt_us;

	/* The reader's own; before the start, of whoever has the channel. */
	PrHeartbeat heartbeat;
	uint8_t header[PR_WIRE_HEADER_BYTES];
	gsize header_filled;
	PrMsg *coming; /* its header is complete */
	gsize filled, allocated;
	/* What was received behind the part of a message that was wanted. Only once it is started: until then the
	 * connection may be somebody else's next. */
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
/* PR_WIRE_ERROR: the peer is not Postroad. Reads the first frame of a channel that is not started, whole. When the handshake's deadline comes
 * first, fails with PR_PATH_ERROR_TIMEOUT and can be called again. Nothing beyond the frame is read. */
PrMsg *pr_control_read_first(PrControl *control, GError **error);
/* Takes the connection out, for TLS, and puts in its place what that makes of it; before anything was read. */
GSocketConnection *pr_control_take_connection(PrControl *control);
void pr_control_put_connection(PrControl *control, GSocketConnection *connection);
/* Frees the channel but for its connection. */
GSocketConnection *pr_control_release(PrControl *control);

/* Between control.c and reader.c. */
#define PR_CUT_TEXT "cut by fault injection"
gpointer pr_control_reader(gpointer control);
GError *pr_control_lost(PrControl *control, const char *what);
GError *pr_control_lost_errno(PrControl *control, const char *doing, int code);
gboolean pr_control_has_ended(PrControl *control);
/* Ends the channel unless it has ended; takes the reason. */
void pr_control_fail(PrControl *control, GError *reason);
/* FALSE: the fault injection has ended the channel here. */
gboolean pr_control_admit(PrControl *control, gboolean outgoing, uint16_t type);

typedef struct PrFrame {
	struct iovec part[3];
	gsize left; /* bytes */
} PrFrame;
/* Writes what the socket takes: bytes, or -errno. */
gssize pr_frame_write(int fd, PrFrame *frame);
/* Under send_lock. Appends to the tail, and writes of it what the socket takes: 0, or -errno. */
int pr_control_write_tail(PrControl *control, const void *frames, gsize length);
