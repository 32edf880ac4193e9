/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Malformed packets to an attach helper, as an attacker who controls the engine may send them.
 * Needs root.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/agent-proto.h"
#include "guest/attach/attach.h"
#include "guest/attach/internal.h"
#include "tests/rigs/attach-guest.h"

#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */

static void send_raw(int socket, const void *packet, gsize bytes, int fd)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec iov = {(void *)packet, bytes};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = sizeof(control.bytes);
		control.align = (struct cmsghdr){.cmsg_level = SOL_SOCKET,
						 .cmsg_type = SCM_RIGHTS,
						 .cmsg_len = CMSG_LEN(sizeof(int))};
		memcpy(CMSG_DATA(&control.align), &fd, sizeof(fd));
	}
	assert_int_equal(sendmsg(socket, &msg, MSG_NOSIGNAL), bytes);
}

static PrAgentRequest request_of(PrAgentOp op)
{
	return (PrAgentRequest){
		.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = op, .id = op};
}

/* Returns FALSE if the helper has ended instead of replying. */
static gboolean is_answered(int socket)
{
	g_autofree PrAgentReply *reply = g_malloc(PR_AGENT_REPLY_MAX);
	struct pollfd look = {.fd = socket, .events = POLLIN};

	assert_int_equal(poll(&look, 1, TIMEOUT), 1);
	return recv(socket, reply, PR_AGENT_REPLY_MAX, 0) >= (ssize_t)sizeof(*reply);
}

static gboolean send_op_raw(int socket, PrAgentOp op, int fd)
{
	PrAgentRequest request = request_of(op);

	send_raw(socket, &request, sizeof(request), fd);
	return is_answered(socket);
}

static void send_malformed(int socket, guint which, int pidfd)
{
	struct {
		PrAgentRequest head;
		uint64_t bases[PR_AGENT_REGIONS_MAX + 1];
	} packet = {.head = request_of(PR_AGENT_CHOOSE)};

	switch (which) {
	case 0: /* another process */
		assert_false(send_op_raw(socket, PR_AGENT_ATTACH, pidfd));
		break;
	case 1:
		assert_false(send_op_raw(socket, PR_AGENT_HELLO, -1));
		break;
	case 2:
		assert_false(send_op_raw(socket, PR_AGENT_REGIONS, pidfd));
		break;
	case 3:
		assert_false(send_op_raw(socket, PR_AGENT_N_OPS, -1));
		break;
	case 4:
		send_raw(socket, &packet, sizeof(packet), -1);
		assert_false(is_answered(socket));
		break;
	case 5:
		send_raw(socket, &packet, sizeof(packet.head) + 3, -1);
		assert_false(is_answered(socket));
		break;
	case 6:
		packet.head.magic++;
		send_raw(socket, &packet, sizeof(packet.head), -1);
		assert_false(is_answered(socket));
		break;
	}
}

static void malformed_packets_end_the_helper_and_harm_no_process(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	int pidfd = (int)syscall(SYS_pidfd_open, attach_guest_pid(guest), 0), status;

	for (guint which = 0; which < 7; which++) {
		pid_t helper;
		int socket = pr_attach_fork(TRUE, &helper);

		assert_true(socket >= 0);
		assert_true(send_op_raw(socket, PR_AGENT_ATTACH, pidfd));
		assert_true(send_op_raw(socket, PR_AGENT_HELLO, -1));
		send_malformed(socket, which, pidfd);
		close(socket);
		assert_int_equal(waitpid(helper, &status, 0), helper);
		assert_true(WIFEXITED(status));
	}
	close(pidfd);
	assert_int_equal(attach_guest_value(guest, attach_guest_memfd(guest)), 0);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(malformed_packets_end_the_helper_and_harm_no_process),
	};

	attach_guest_main(argc, argv);
	if (geteuid() != 0 || !attach_has_injector) {
		print_message("skipped: needs root, and an architecture with an injector\n");
		return 77;
	}
	cmocka_set_test_filter(g_getenv("TEST_FILTER"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
