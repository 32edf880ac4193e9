/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Gives the process a descriptor of the helper's. The process makes a socket pair. The helper
 * duplicates one end of it and sends the descriptor there. The process receives it at the other
 * end.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/attach/internal.h"
#include "guest/attach/crash-point.h"
#include "guest/packet.h"

/* The arguments of the process's recvmsg(), in the scratch. */
typedef struct Message {
	struct msghdr head;
	struct iovec piece;
	char byte;
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
} Message;
_Static_assert(sizeof(Message) <= ATTACH_SCRATCH_BYTES, "room for a message");

static bool fail_call(AttachStop *stop, const char *name, long ret)
{
	return agent_fail(stop->result, PR_AGENT_FAILED, "%s in process %d: %s", name,
			  (int)stop->target->pid, strerror((int)-ret));
}

static void prepare_pair(AttachStop *stop, unsigned long args[6])
{
	memset(stop->scratch, 0, sizeof(stop->scratch));
	args[3] = stop->scratch_at;
}

static bool make_pair(AttachStop *stop, int ret_pair[2])
{
	const unsigned long args[6] = {AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC};
	long ret;

	if (!attach_call(stop, SYS_socketpair, args, prepare_pair, &ret))
		return false;
	if (ret < 0)
		return fail_call(stop, "socketpair()", ret);
	memcpy(ret_pair, stop->scratch, 2 * sizeof(int));
	pr_attach_crash_point(PR_ATTACH_CRASH_PAIR_MADE);
	return true;
}

static bool send_fd(int socket, int fd)
{
	struct iovec piece = {.iov_base = "", .iov_len = 1};
	PrPacket packet = {.pieces = &piece, .n_pieces = 1, .fds = &fd, .n_fds = 1};

	return pr_packet_send(socket, &packet, MSG_DONTWAIT);
}

static void prepare_message(AttachStop *stop, unsigned long args[6])
{
	Message message;
	uint64_t at = stop->scratch_at;

	memset(&message, 0, sizeof(message));
	message.piece =
		(struct iovec){.iov_base = (void *)(at + offsetof(Message, byte)), .iov_len = 1};
	message.head = (struct msghdr){.msg_iov = (void *)(at + offsetof(Message, piece)),
				       .msg_iovlen = 1,
				       .msg_control = (void *)(at + offsetof(Message, control)),
				       .msg_controllen = sizeof(message.control.bytes)};
	memcpy(stop->scratch, &message, sizeof(message));
	args[1] = at;
}

/* The number of the descriptor in the process, or -1. */
static int receive_there(AttachStop *stop, int socket)
{
	const unsigned long args[6] = {socket, 0, MSG_DONTWAIT | MSG_CMSG_CLOEXEC};
	Message message;
	struct cmsghdr head;
	long ret;
	int fd;

	if (!attach_call(stop, SYS_recvmsg, args, prepare_message, &ret))
		return -1;
	memcpy(&message, stop->scratch, sizeof(message));
	memcpy(&head, message.control.bytes, sizeof(head));
	if (ret < 0 || (message.head.msg_flags & MSG_CTRUNC) ||
	    message.head.msg_controllen < CMSG_LEN(sizeof(int)) || head.cmsg_type != SCM_RIGHTS) {
		fail_call(stop, "recvmsg()", ret < 0 ? ret : -EMFILE);
		return -1;
	}
	memcpy(&fd, message.control.bytes + CMSG_LEN(0), sizeof(fd));
	pr_attach_crash_point(PR_ATTACH_CRASH_RECEIVED);
	return fd;
}

bool attach_close_there(AttachStop *stop, int fd)
{
	const unsigned long args[6] = {fd};
	long ret;

	return attach_call(stop, SYS_close, args, NULL, &ret);
}

static int push_over(AttachStop *stop, const int pair[2], int fd)
{
	int own_end = attach_target_fd(stop->target, pair[0]);
	bool sent;

	if (own_end < 0) {
		attach_fail_access(stop->target, stop->result, "taking a descriptor");
		return -1;
	}
	sent = send_fd(own_end, fd);
	if (!sent)
		fail_call(stop, "sending a descriptor", -errno);
	close(own_end);
	if (!sent)
		return -1;
	pr_attach_crash_point(PR_ATTACH_CRASH_SENT);
	return receive_there(stop, pair[1]);
}

int attach_push(AttachStop *stop, int fd)
{
	int pair[2], there;

	if (!make_pair(stop, pair))
		return -1;
	there = push_over(stop, pair, fd);
	if (there >= 0)
		pr_attach_crash_point(PR_ATTACH_CRASH_PUSHED);
	if (stop->stopped && attach_close_there(stop, pair[0]))
		attach_close_there(stop, pair[1]);
	return there;
}
