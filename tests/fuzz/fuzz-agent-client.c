/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plays the agent for the engine's agent client. An input is a list of packets, each the answer to
 * the current call. A packet is a byte, a length of two bytes, and data. The byte has the number of
 * descriptors, and says whether a head that fits the call is put before the data. Calls are made
 * until the input or the connection ends.
 */
#include <glib.h>
#include <sys/mman.h>

#include "tests/fuzz/fuzz.h"

/* Does the reader thread's work where a caller would wait for it. */
static gboolean fuzz_read_answer(GCond *cond, GMutex *lock, gint64 deadline);
#define g_cond_wait_until     fuzz_read_answer
#define g_thread_join(thread) g_thread_unref(thread)
#include "guest/agent-client.c"
#undef g_cond_wait_until
#undef g_thread_join

#define TIMEOUT_MS 1000
#define FDS_MAX	   (PR_AGENT_REGIONS_MAX + 2)

static struct {
	PrAgentClient *client;
	FuzzInput input;
	int agent_fd;
} rig;

static void send_packet(const GByteArray *packet, guint n_fds)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
	} control = {0};
	struct iovec iov = {packet->data, packet->len};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	int fd = memfd_create("fuzz", MFD_CLOEXEC);

	g_assert(fd >= 0 && ftruncate(fd, 65536) == 0);
	if (n_fds) {
		struct cmsghdr *cmsg = &control.align;

		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		for (guint i = 0; i < n_fds; i++)
			memcpy(CMSG_DATA(cmsg) + i * sizeof(int), &fd, sizeof(fd));
	}
	sendmsg(rig.agent_fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
	close(fd);
}

static void put_fitting_head(GByteArray *packet, uint8_t how)
{
	PrAgentRequest request = {0};
	PrAgentReply head = {.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .pid = 1};

	recv(rig.agent_fd, &request, sizeof(request), MSG_DONTWAIT);
	head.op = request.op;
	head.id = request.id;
	head.status = how & 0x40 ? fuzz_u8(&rig.input) : PR_AGENT_OK;
	head.flags = PR_AGENT_FLAG_CALLBACKS;
	head.n_regions = how & 0x20 ? fuzz_u8(&rig.input) : 0;
	memset(head.text, how & 0x40 ? fuzz_u8(&rig.input) : 'x', sizeof(head.text));
	g_byte_array_append(packet, (const uint8_t *)&head, sizeof(head));
}

/* Adds a valid region, with the flaws that the input names. */
static void put_region(GByteArray *packet, guint i)
{
	PrAgentWireRegion region = {.base = 0x100000 * (i + 1), .size = 65536, .page_size = 4096};

	g_snprintf(region.idstr, sizeof(region.idstr), "region%u", i);
	for (guint flaws = fuzz_u8(&rig.input) & 3; flaws; flaws--) {
		gsize at = fuzz_u16(&rig.input) % sizeof(region);

		((uint8_t *)&region)[at] = fuzz_u8(&rig.input);
	}
	g_byte_array_append(packet, (const uint8_t *)&region, sizeof(region));
}

static gboolean next_packet(void)
{
	g_autoptr(GByteArray) packet = g_byte_array_new();
	uint8_t how = fuzz_u8(&rig.input);
	guint n_fds = how & 0x1f, n_regions;
	const uint8_t *bytes;
	gsize n;

	if (!rig.input.left)
		return FALSE;
	if (how & 0x80)
		put_fitting_head(packet, how);
	n_regions = packet->len ? ((PrAgentReply *)packet->data)->n_regions : 0;
	for (guint i = 0; i < n_regions; i++)
		put_region(packet, i);
	if (!(how & 0x80)) {
		bytes = fuzz_take(&rig.input, fuzz_u16(&rig.input), &n);
		if (n)
			g_byte_array_append(packet, bytes, n);
	}
	send_packet(packet, MIN(n_fds == 0x1f ? PR_AGENT_REGIONS_MAX : n_fds, FDS_MAX));
	return TRUE;
}

static gboolean fuzz_read_answer(GCond *cond, GMutex *lock, gint64 deadline)
{
	GError *failure = NULL;
	PrAgentAnswer *reply;

	g_mutex_unlock(lock);
	if (!next_packet())
		shutdown(rig.agent_fd, SHUT_WR);
	reply = receive(rig.client, &failure);
	if (reply)
		deliver(rig.client, reply);
	else
		fail(rig.client, failure);
	g_mutex_lock(lock);
	return TRUE;
}

static void check_regions(GError **error)
{
	g_autoptr(GArray) blocks = pr_agent_client_regions(rig.client, error);

	for (guint i = 0; blocks && i < blocks->len; i++) {
		const PrGuestBlock *block = &g_array_index(blocks, PrGuestBlock, i);
		struct stat st;

		g_assert(block->memfd >= 0 && fstat(block->memfd, &st) == 0);
		g_assert(block->size && block->page_size && block->size % block->page_size == 0);
		g_assert(block->memfd_offset + block->size <= (guint64)st.st_size);
		g_assert(g_utf8_validate(block->idstr, -1, NULL));
	}
}

/* Makes one call. An error is set if it failed. */
static void call(guint which, GError **error)
{
	gboolean was_running;

	switch (which) {
	case 0:
		send_hello(rig.client, error);
		break;
	case 1:
		check_regions(error);
		break;
	case 2:
		pr_agent_client_probe(rig.client, error);
		break;
	case 3:
		close_fd(pr_agent_client_uffd_enable(rig.client, error));
		break;
	case 4:
		close_fd(pr_agent_client_fetch_state(rig.client, error));
		break;
	case 5:
		pr_agent_client_stop(rig.client, &was_running, error);
		break;
	case 6:
		close_fd(pr_agent_client_save(rig.client, NULL, error));
		break;
	case 7:
		pr_agent_client_load(rig.client, STDERR_FILENO, NULL, error);
		break;
	}
}

static void call_all(void)
{
	for (guint i = 0; !rig.client->failure && rig.input.left; i++) {
		g_autoptr(GError) error = NULL;

		call(i % 8, &error);
		fuzz_clean_outcome(!error, error);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int next_fd = fuzz_next_fd();
	int fds[2];

	g_assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) == 0);
	rig.input = (FuzzInput){data, size};
	rig.agent_fd = fds[1];
	rig.client = client_new(fds[0], TIMEOUT_MS);
	rig.client->path = g_strdup("fuzz");
	rig.client->name = g_strdup("agent fuzz");
	call_all();
	rig.client->reader = g_thread_ref(g_thread_self());
	pr_agent_client_free(rig.client);
	close(fds[1]);
	g_assert_cmpint(next_fd, ==, fuzz_next_fd());
	return 0;
}
