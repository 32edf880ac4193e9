/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/packet.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

/* The room for control messages; the union aligns it. */
typedef union Control {
	struct cmsghdr align;
	char bytes[CMSG_SPACE(PR_PACKET_FDS_MAX * sizeof(int))];
} Control;

static void attach_fds(struct msghdr *msg, Control *control, const int *fds, unsigned n_fds)
{
	struct cmsghdr *cmsg;

	memset(control, 0, sizeof(*control));
	msg->msg_control = control->bytes;
	msg->msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
	cmsg = CMSG_FIRSTHDR(msg);
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
	memcpy(CMSG_DATA(cmsg), fds, n_fds * sizeof(int));
}

bool pr_packet_send(int socket, const PrPacket *packet, int flags)
{
	struct msghdr msg = {.msg_iov = (struct iovec *)packet->pieces,
			     .msg_iovlen = packet->n_pieces};
	Control control;
	ssize_t n;

	if (packet->n_fds)
		attach_fds(&msg, &control, packet->fds, packet->n_fds);
	do {
		n = sendmsg(socket, &msg, MSG_NOSIGNAL | flags);
	} while (n < 0 && errno == EINTR);
	return n >= 0;
}

static unsigned take_fds(struct msghdr *msg, int *fds)
{
	unsigned n_fds = 0;

	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg; cmsg = CMSG_NXTHDR(msg, cmsg)) {
		unsigned n = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(fds + n_fds, CMSG_DATA(cmsg), n * sizeof(int));
		n_fds += n;
	}
	return n_fds;
}

ssize_t pr_packet_receive(int socket, PrPacket *packet, int flags)
{
	Control control;
	/* CMSG_LEN, as the padding of CMSG_SPACE has room for a descriptor more. */
	struct msghdr msg = {.msg_iov = (struct iovec *)packet->pieces,
			     .msg_iovlen = packet->n_pieces,
			     .msg_control = control.bytes,
			     .msg_controllen = CMSG_LEN(packet->n_fds * sizeof(int))};
	ssize_t n;

	do {
		n = recvmsg(socket, &msg, MSG_CMSG_CLOEXEC | flags);
	} while (n < 0 && errno == EINTR);
	packet->n_fds = n < 0 ? 0 : take_fds(&msg, packet->fds);
	packet->cut = n < 0 ? 0 : msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC);
	return n;
}
