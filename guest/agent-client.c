/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/agent-client.h"

#include <errno.h>
#include <glib-unix.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest/kinds.h"
#include "guest/process.h"

typedef struct Reply {
	PrAgentReply *head;	       /* PR_AGENT_REPLY_MAX bytes, with the regions behind it */
	int fds[PR_AGENT_REGIONS_MAX]; /* owned, -1: taken */
	guint n_fds;
	gboolean truncated; /* we had no room for all descriptors */
} Reply;

/* A call that waits for its reply; on the stack of its caller. */
typedef struct Call {
	guint32 id;
	guint32 op;
	Reply *reply; /* NULL: not yet */
} Call;

struct PrAgentClient {
	char *path;	  /* constant */
	guint timeout_ms; /* constant */
	int fd;		  /* constant; sends are single packets and need no lock */
	GThread *reader;  /* the owner's */
	guint32 flags;	  /* constant after open */

	GMutex lock;
	GCond cond;	   /* lock; a reply, the death, or a cancellation */
	GHashTable *calls; /* lock; id -> Call */
	guint32 last_id;   /* lock */
	GError *failure;   /* lock; set once: the connection is gone */
	GMutex telling;	   /* held while `died` is called; taken before lock */
	PrGuestDied died;  /* lock; taken when called */
	void *died_opaque; /* lock */
	gboolean closing;  /* lock; the end is ours: nobody died */
};

static void reply_free(Reply *reply)
{
	for (guint i = 0; i < reply->n_fds; i++) {
		if (reply->fds[i] >= 0)
			close(reply->fds[i]);
	}
	g_free(reply->head);
	g_free(reply);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Reply, reply_free)

static int reply_take_fd(Reply *reply, guint i)
{
	int fd = i < reply->n_fds ? reply->fds[i] : -1;

	if (fd >= 0)
		reply->fds[i] = -1;
	return fd;
}

static const char *op_name(guint32 op)
{
	static const char *const names[PR_AGENT_N_OPS] = {
		[PR_AGENT_HELLO] = "hello",
		[PR_AGENT_REGIONS] = "list of regions",
		[PR_AGENT_PROBE] = "userfaultfd probe",
		[PR_AGENT_FAULT_ON] = "fault mode on",
		[PR_AGENT_FAULT_OFF] = "fault mode off",
		[PR_AGENT_KEEP_STATE] = "keep state",
		[PR_AGENT_FETCH_STATE] = "fetch state",
		[PR_AGENT_STOP] = "stop",
		[PR_AGENT_RUN] = "run",
		[PR_AGENT_SAVE] = "save",
		[PR_AGENT_LOAD] = "load",
		[PR_AGENT_MEMORY] = "memory",
		[PR_AGENT_STDERR] = "standard error",
		[PR_AGENT_FENCE_ON] = "fence on",
		[PR_AGENT_FENCE_OFF] = "fence off",
		[PR_AGENT_ATTACH] = "attach",
		[PR_AGENT_CHOOSE] = "choice of regions",
	};

	return names[op];
}

/* The reader thread */

static void take_fds(struct msghdr *msg, Reply *reply)
{
	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg; cmsg = CMSG_NXTHDR(msg, cmsg)) {
		guint n = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		n = MIN(n, PR_AGENT_REGIONS_MAX - reply->n_fds);
		memcpy(reply->fds + reply->n_fds, CMSG_DATA(cmsg), n * sizeof(int));
		reply->n_fds += n;
	}
}

static gboolean reply_valid(const Reply *reply, gsize len)
{
	const PrAgentReply *head = reply->head;
	guint max_fds = 1;

	if (len < sizeof(*head) || head->magic != PR_AGENT_MAGIC ||
	    head->n_regions > PR_AGENT_REGIONS_MAX || head->status >= PR_AGENT_N_STATUS)
		return FALSE;
	if (len != sizeof(*head) + head->n_regions * sizeof(PrAgentWireRegion))
		return FALSE;
	if (reply->truncated)
		return TRUE;
	if (head->op == PR_AGENT_REGIONS)
		return reply->n_fds == head->n_regions;
	return reply->n_fds <= max_fds && !head->n_regions;
}

/* NULL: the connection is at its end. */
static Reply *receive(PrAgentClient *client, GError **error)
{
	g_autoptr(Reply) reply = g_new0(Reply, 1);
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(PR_AGENT_REGIONS_MAX * sizeof(int))];
	} control;
	struct iovec iov;
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	ssize_t n;

	reply->head = g_malloc0(PR_AGENT_REPLY_MAX);
	iov = (struct iovec){.iov_base = reply->head, .iov_len = PR_AGENT_REPLY_MAX};
	do {
		n = recvmsg(client->fd, &msg, MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	/* An empty packet, which is no answer, may come with descriptors as well. */
	if (n >= 0)
		take_fds(&msg, reply);
	if (n <= 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
			    "agent %s: the guest's process closed the connection%s%s", client->path,
			    n < 0 ? ": " : "", n < 0 ? g_strerror(errno) : "");
		return NULL;
	}
	reply->truncated = (msg.msg_flags & MSG_CTRUNC) != 0;
	if ((msg.msg_flags & MSG_TRUNC) || !reply_valid(reply, n)) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "agent %s: an answer of %zd bytes makes no sense; is this the socket "
			    "of a Postroad agent of this version?",
			    client->path, n);
		return NULL;
	}
	reply->head->text[PR_AGENT_TEXT_MAX] = '\0';
	return g_steal_pointer(&reply);
}

static void deliver(PrAgentClient *client, Reply *reply)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&client->lock);
	Call *call = g_hash_table_lookup(client->calls, GUINT_TO_POINTER(reply->head->id));

	/* Its caller may have given up. */
	if (!call || call->reply || call->op != reply->head->op) {
		reply_free(reply);
		return;
	}
	call->reply = reply;
	g_cond_broadcast(&client->cond);
}

static void fail(PrAgentClient *client, GError *failure)
{
	PrGuestDied died;
	void *opaque;

	g_mutex_lock(&client->telling);
	g_mutex_lock(&client->lock);
	client->failure = failure;
	died = client->closing ? NULL : g_steal_pointer(&client->died);
	opaque = client->died_opaque;
	g_cond_broadcast(&client->cond);
	g_mutex_unlock(&client->lock);
	if (died)
		died(failure->message, opaque);
	g_mutex_unlock(&client->telling);
}

static gpointer reader_thread(gpointer data)
{
	PrAgentClient *client = data;
	GError *failure = NULL;
	Reply *reply;

	while ((reply = receive(client, &failure)))
		deliver(client, reply);
	fail(client, failure);
	return NULL;
}

/* Calls */

static gboolean send_request(PrAgentClient *client, const PrAgentRequest *request, int fd,
			     GError **error)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec iov = {.iov_base = (void *)request, .iov_len = sizeof(*request)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t n;

	if (fd >= 0) {
		struct cmsghdr *cmsg;

		msg.msg_control = control.bytes;
		msg.msg_controllen = sizeof(control.bytes);
		cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	}
	do {
		n = sendmsg(client->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
			    "agent %s: cannot send '%s': %s", client->path, op_name(request->op),
			    g_strerror(errno));
	return n >= 0;
}

static void wake_calls(GCancellable *cancel, gpointer data)
{
	PrAgentClient *client = data;

	g_mutex_lock(&client->lock);
	g_cond_broadcast(&client->cond);
	g_mutex_unlock(&client->lock);
}

/* With the lock held. */
static gboolean wait_for_reply(PrAgentClient *client, Call *call, gint64 deadline,
			       GCancellable *cancel, GError **error)
{
	while (!call->reply) {
		if (client->failure) {
			if (error)
				*error = g_error_copy(client->failure);
			return FALSE;
		}
		if (g_cancellable_set_error_if_cancelled(cancel, error))
			return FALSE;
		if (g_cond_wait_until(&client->cond, &client->lock, deadline) || call->reply)
			continue;
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
			    "agent %s: no answer to '%s' in time", client->path, op_name(call->op));
		return FALSE;
	}
	return TRUE;
}

static gboolean reply_ok(PrAgentClient *client, const Reply *reply, GError **error)
{
	static const PrGuestError codes[PR_AGENT_N_STATUS] = {
		[PR_AGENT_BUSY] = PR_GUEST_ERROR_REFUSED,
		[PR_AGENT_PERMISSION] = PR_GUEST_ERROR_PERMISSION,
		[PR_AGENT_UNSUPPORTED] = PR_GUEST_ERROR_UNSUPPORTED,
		[PR_AGENT_FAILED] = PR_GUEST_ERROR_REFUSED,
	};

	g_autofree char *text = NULL;

	if (reply->truncated) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED,
			    "agent %s: no room for the descriptors that came with '%s'; raise the "
			    "engine's limit of open files (ulimit -n)",
			    client->path, op_name(reply->head->op));
		return FALSE;
	}
	if (reply->head->status == PR_AGENT_OK)
		return TRUE;
	/* It goes into the monitor's JSON. */
	text = g_utf8_make_valid(reply->head->text, -1);
	g_set_error(error, PR_GUEST_ERROR, codes[reply->head->status], "agent %s: %s", client->path,
		    text);
	return FALSE;
}

/* The whole round trip. NULL: no answer, or a refusal. */
static Reply *call_agent(PrAgentClient *client, PrAgentOp op, int fd, guint timeouts,
			 GCancellable *cancel, GError **error)
{
	gint64 deadline = g_get_monotonic_time() +
			  (gint64)client->timeout_ms * timeouts * G_TIME_SPAN_MILLISECOND;
	PrAgentRequest request = {.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = op};
	Call call = {.op = op};
	g_autoptr(Reply) reply = NULL;
	gulong handler = 0;

	g_mutex_lock(&client->lock);
	request.id = call.id = ++client->last_id;
	g_hash_table_insert(client->calls, GUINT_TO_POINTER(call.id), &call);
	g_mutex_unlock(&client->lock);
	if (cancel)
		handler = g_cancellable_connect(cancel, G_CALLBACK(wake_calls), client, NULL);

	gboolean sent = send_request(client, &request, fd, error);

	g_mutex_lock(&client->lock);
	if (sent)
		wait_for_reply(client, &call, deadline, cancel, error);
	g_hash_table_remove(client->calls, GUINT_TO_POINTER(call.id));
	reply = call.reply;
	g_mutex_unlock(&client->lock);
	if (cancel)
		g_cancellable_disconnect(cancel, handler);
	if (!reply || !reply_ok(client, reply, error))
		return NULL;
	return g_steal_pointer(&reply);
}

static gboolean call_simple(PrAgentClient *client, PrAgentOp op, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, op, -1, 1, NULL, error);

	return reply != NULL;
}

/* Opening */

/* A process of another user would be believed what the guest's memory is. Root can't be told whose guest it is to
 * serve; it has named the path. */
static gboolean check_peer(int fd, const char *path, GError **error)
{
	struct ucred peer;
	socklen_t length = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION,
			    "agent %s: whose it is can't be told: %s", path, g_strerror(errno));
		return FALSE;
	}
	if (geteuid() == 0 || peer.uid == 0 || peer.uid == geteuid())
		return TRUE;
	g_set_error(
		error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION,
		"agent %s: it is served by user %u, this engine is user %u's; run the engine as "
		"root or as the user of the guest's process",
		path, peer.uid, geteuid());
	return FALSE;
}

static int connect_socket(const char *path, GError **error)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd;

	if (g_strlcpy(addr.sun_path, path, sizeof(addr.sun_path)) >= sizeof(addr.sun_path) ||
	    !*path) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_SPEC,
			    "agent '%s': a socket's path has 1 to %zu bytes", path,
			    sizeof(addr.sun_path) - 1);
		return -1;
	}
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE, "agent %s: %s", path,
			    g_strerror(errno));
		return -1;
	}
	/* The server only ever polls: if its backlog is full, it is not an agent. */
	g_unix_set_fd_nonblocking(fd, TRUE, NULL);
	if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE,
			    "agent %s: %s; start the guest with LD_PRELOAD=libpostroad-agent.so "
			    "POSTROAD_AGENT=%s, or name its agent's socket",
			    path, g_strerror(errno), path);
		close(fd);
		return -1;
	}
	g_unix_set_fd_nonblocking(fd, FALSE, NULL);
	if (check_peer(fd, path, error))
		return fd;
	close(fd);
	return -1;
}

static gboolean say_hello(PrAgentClient *client, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, PR_AGENT_HELLO, -1, 1, NULL, error);

	if (!reply)
		return FALSE;
	client->flags = reply->head->flags;
	return TRUE;
}

PrAgentClient *pr_agent_client_open(const char *path, guint timeout_ms, GError **error)
{
	int fd = connect_socket(path, error);

	if (fd < 0)
		return NULL;

	g_autoptr(PrAgentClient) client = g_new0(PrAgentClient, 1);

	client->path = g_strdup(path);
	client->timeout_ms = timeout_ms;
	client->fd = fd;
	client->calls = g_hash_table_new(NULL, NULL);
	g_mutex_init(&client->lock);
	g_mutex_init(&client->telling);
	g_cond_init(&client->cond);
	client->reader = g_thread_try_new("agent-client", reader_thread, client, error);
	if (!client->reader || !say_hello(client, error))
		return NULL;
	return g_steal_pointer(&client);
}

void pr_agent_client_free(PrAgentClient *client)
{
	g_mutex_lock(&client->lock);
	client->closing = TRUE;
	g_mutex_unlock(&client->lock);
	shutdown(client->fd, SHUT_RDWR);
	if (client->reader)
		g_thread_join(client->reader);
	close(client->fd);
	g_hash_table_unref(client->calls);
	g_clear_error(&client->failure);
	g_mutex_clear(&client->lock);
	g_mutex_clear(&client->telling);
	g_cond_clear(&client->cond);
	g_free(client->path);
	g_free(client);
}

const char *pr_agent_client_path(PrAgentClient *client)
{
	return client->path;
}

gboolean pr_agent_client_has_callbacks(PrAgentClient *client)
{
	return client->flags & PR_AGENT_FLAG_CALLBACKS;
}

gboolean pr_agent_client_was_faulting(PrAgentClient *client)
{
	return (client->flags & PR_AGENT_FLAG_FAULT_ON) != 0;
}

gboolean pr_agent_client_was_fenced(PrAgentClient *client)
{
	return (client->flags & PR_AGENT_FLAG_FENCE_ON) != 0;
}

void pr_agent_client_on_death(PrAgentClient *client, PrGuestDied died, void *opaque)
{
	g_autofree char *reason = NULL;

	g_mutex_lock(&client->telling);
	g_mutex_lock(&client->lock);
	if (client->failure) {
		reason = g_strdup(client->failure->message);
	} else {
		client->died = died;
		client->died_opaque = opaque;
	}
	g_mutex_unlock(&client->lock);
	if (reason && died)
		died(reason, opaque);
	g_mutex_unlock(&client->telling);
}

/* Memory and faults */

static void block_clear(gpointer data)
{
	PrGuestBlock *block = data;

	g_free(block->idstr);
	if (block->memfd >= 0)
		close(block->memfd);
}

GArray *pr_guest_blocks_new(void)
{
	GArray *blocks = g_array_new(FALSE, TRUE, sizeof(PrGuestBlock));

	g_array_set_clear_func(blocks, block_clear);
	return blocks;
}

static gboolean region_valid(const PrAgentWireRegion *region, int memfd)
{
	gint64 page = sysconf(_SC_PAGESIZE);
	struct stat st;

	return region->page_size >= page && !(region->page_size & (region->page_size - 1)) &&
	       region->size && !(region->size % region->page_size) &&
	       !(region->offset % region->page_size) && !(region->base % region->page_size) &&
	       region->offset + region->size > region->offset &&
	       region->base + region->size > region->base &&
	       memchr(region->idstr, '\0', sizeof(region->idstr)) &&
	       g_utf8_validate(region->idstr, -1, NULL) && fstat(memfd, &st) == 0 &&
	       (guint64)st.st_size >= region->offset + region->size;
}

GArray *pr_agent_client_regions(PrAgentClient *client, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, PR_AGENT_REGIONS, -1, 1, NULL, error);
	g_autoptr(GArray) blocks = NULL;
	const PrAgentWireRegion *regions;

	if (!reply)
		return NULL;
	regions = (const PrAgentWireRegion *)(reply->head + 1);
	blocks = pr_guest_blocks_new();
	for (guint i = 0; i < reply->head->n_regions; i++) {
		PrGuestBlock block = {0};

		if (!region_valid(&regions[i], reply->fds[i])) {
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
				    "agent %s: region %u makes no sense (size %" G_GUINT64_FORMAT
				    ", page size %u, or a memfd that is too short)",
				    client->path, i, regions[i].size, regions[i].page_size);
			return NULL;
		}
		block.idstr = g_strdup(regions[i].idstr);
		block.size = regions[i].size;
		block.page_size = regions[i].page_size;
		block.memfd = reply_take_fd(reply, i);
		block.memfd_offset = regions[i].offset;
		block.base = regions[i].base;
		g_array_append_val(blocks, block);
	}
	return g_steal_pointer(&blocks);
}

static gboolean is_known(const PrGuestBlock *region, const PrGuestBlock *known)
{
	return region->base == known->base && region->size == known->size &&
	       region->page_size == known->page_size && region->memfd >= 0 &&
	       (!*region->idstr || g_str_equal(region->idstr, known->idstr));
}

static gboolean adopt_one(GArray *regions, const PrGuestBlock *known, GArray *out)
{
	for (guint i = 0; i < regions->len; i++) {
		PrGuestBlock *region = &g_array_index(regions, PrGuestBlock, i);
		PrGuestBlock block = *region;

		if (!is_known(region, known))
			continue;
		block.idstr = g_strdup(known->idstr);
		region->memfd = -1; /* has gone over */
		g_array_append_val(out, block);
		return TRUE;
	}
	return FALSE;
}

GArray *pr_agent_client_adopt(PrAgentClient *client, const PrGuestBlock *known, guint n,
			      GError **error)
{
	g_autoptr(GArray) regions = pr_agent_client_regions(client, error);
	g_autoptr(GArray) out = pr_guest_blocks_new();

	if (!regions)
		return NULL;
	for (guint i = 0; i < n; i++) {
		if (adopt_one(regions, &known[i], out))
			continue;
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "agent %s: RAM block '%s' (%" G_GUINT64_FORMAT
			    " bytes at 0x%" G_GINT64_MODIFIER
			    "x) of the migration that was under way is not in this process",
			    client->path, known[i].idstr, known[i].size, known[i].base);
		return NULL;
	}
	return g_steal_pointer(&out);
}

char *pr_agent_client_process(PrAgentClient *client)
{
	struct ucred peer = {0};
	socklen_t len = sizeof(peer);

	(void)getsockopt(client->fd, SOL_SOCKET, SO_PEERCRED, &peer, &len);
	return pr_process_text(peer.pid);
}

gboolean pr_agent_client_probe(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_PROBE, error);
}

static int call_for_fd(PrAgentClient *client, PrAgentOp op, GCancellable *cancel, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, op, -1, 1, cancel, error);
	int fd;

	if (!reply)
		return -1;
	fd = reply_take_fd(reply, 0);
	if (fd < 0)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "agent %s: the answer to '%s' came without a descriptor", client->path,
			    op_name(op));
	return fd;
}

int pr_agent_client_fault_on(PrAgentClient *client, GError **error)
{
	int uffd = call_for_fd(client, PR_AGENT_FAULT_ON, NULL, error);

	/* It may be on, and we have nothing to serve the faults with. */
	if (uffd < 0)
		call_simple(client, PR_AGENT_FAULT_OFF, NULL);
	return uffd;
}

gboolean pr_agent_client_fault_off(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_FAULT_OFF, error);
}

gboolean pr_agent_client_keep_state(PrAgentClient *client, int memfd, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, PR_AGENT_KEEP_STATE, memfd, 1, NULL, error);

	return reply != NULL;
}

int pr_agent_client_fetch_state(PrAgentClient *client, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, PR_AGENT_FETCH_STATE, -1, 1, NULL, error);

	return reply ? reply_take_fd(reply, 0) : -1;
}

int pr_agent_client_memory(PrAgentClient *client, GError **error)
{
	return call_for_fd(client, PR_AGENT_MEMORY, NULL, error);
}

int pr_agent_client_stderr(PrAgentClient *client, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, PR_AGENT_STDERR, -1, 1, NULL, error);

	return reply ? reply_take_fd(reply, 0) : -1;
}

/* The kernel walks all page tables; a guest may have more RAM than that takes in one timeout. */
gboolean pr_agent_client_fence_on(PrAgentClient *client, GError **error)
{
	g_autoptr(Reply) reply =
		call_agent(client, PR_AGENT_FENCE_ON, -1, PR_GUEST_LOAD_TIMEOUTS, NULL, error);

	return reply != NULL;
}

gboolean pr_agent_client_fence_off(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_FENCE_OFF, error);
}

/* The VMM's callbacks */

gboolean pr_agent_client_stop(PrAgentClient *client, gboolean *ret_was_running, GError **error)
{
	g_autoptr(Reply) reply = call_agent(client, PR_AGENT_STOP, -1, 1, NULL, error);

	if (!reply)
		return FALSE;
	*ret_was_running = (reply->head->flags & PR_AGENT_FLAG_WAS_RUNNING) != 0;
	return TRUE;
}

gboolean pr_agent_client_run(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_RUN, error);
}

int pr_agent_client_save(PrAgentClient *client, GCancellable *cancel, GError **error)
{
	return call_for_fd(client, PR_AGENT_SAVE, cancel, error);
}

gboolean pr_agent_client_load(PrAgentClient *client, int memfd, GCancellable *cancel,
			      GError **error)
{
	g_autoptr(Reply) reply =
		call_agent(client, PR_AGENT_LOAD, memfd, PR_GUEST_LOAD_TIMEOUTS, cancel, error);

	return reply != NULL;
}
