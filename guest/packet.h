/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One packet of a SOCK_SEQPACKET unix socket, with descriptors. libc only: the agent lives in other
 * people's VMMs.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

#define PR_PACKET_FDS_MAX 64

typedef struct PrPacket {
	const struct iovec *pieces;
	size_t n_pieces;
	int *fds;	/* the descriptors to send, or the room for those that come */
	unsigned n_fds; /* how many to send; on receiving: the room, then how many came */
	/* on receiving: MSG_TRUNC if bytes did not fit, MSG_CTRUNC if descriptors did not */
	int cut;
} PrPacket;

/* flags: of sendmsg(2). False: see errno. */
bool pr_packet_send(int socket, const PrPacket *packet, int flags);
/* Returns the number of bytes, or -1: see errno. Received descriptors are the caller's to close,
 * and close-on-exec. The kernel closes those that do not fit. flags: of recvmsg(2). */
ssize_t pr_packet_receive(int socket, PrPacket *packet, int flags);
