/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/agent-call.h"

#include <errno.h>
#include <glib-unix.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/death.h"
#include "guest/kinds.h"
#include "guest/packet.h"
#include "guest/process.h"
#include "util/waker.h"

/* A call that waits for its reply; on the stack of its caller. */
typedef struct Call {
	guint32 id;
	guint32 op;
	PrAgentAnswer *reply; /* NULL: not yet */
} Call;

struct PrAgentClient {
	char *path;	  /* constant; NULL: the client of a helper */
	char *name;	  /* constant; for error texts */
	guint timeout_ms; /* constant */
	int fd;		  /* constant; sends are single packets and need no lock */
	GThread *reader;  /* the owner's */
	guint32 flags;	  /* constant after open */
	pid_t pid;	  /* constant after open; the guest's process, as the agent reports it */

	/* For the client of a helper; constant after open. Else -1. */
	pid_t helper; /* 0: none */
	int pidfd;    /* of the guest's process */
	PrWaker end;  /* ends the reader */
	/* a duplicate of the helper's lock on that process: keeps the lock when the helper dies */
	int lock_fd;

	/* The owner's thread only: pr_agent_client_allocator() */
	gboolean asked_allocator;
	int allocator_fd; /* -1: there is none */

	GMutex lock;
	GCond cond;	   /* lock; a reply, the death, or a cancellation */
	GHashTable *calls; /* lock; id -> Call */
	guint32 last_id;   /* lock */
	GError *failure;   /* lock; set once: the connection is gone */
	gboolean closing;  /* lock; the owner ends the connection: no death */
	PrDeath death;	   /* has its own lock */
};

void pr_agent_answer_free(PrAgentAnswer *reply)
{
	for (guint i = 0; i < reply->n_fds; i++) {
		if (reply->fds[i] >= 0)
			close(reply->fds[i]);
	}
	g_free(reply->head);
	g_free(reply);
}

int pr_agent_answer_take_fd(PrAgentAnswer *reply, guint i)
{
	int fd = i < reply->n_fds ? reply->fds[i] : -1;

	if (fd >= 0)
		reply->fds[i] = -1;
	return fd;
}

const char *pr_agent_op_name(guint32 op)
{
	static const char *const names[PR_AGENT_N_OPS] = {
		[PR_AGENT_HELLO] = "hello",
		[PR_AGENT_REGIONS] = "list of regions",
		[PR_AGENT_PROBE] = "userfaultfd probe",
		[PR_AGENT_UFFD_ENABLE] = "fault mode on",
		[PR_AGENT_UFFD_DISABLE] = "fault mode off",
		[PR_AGENT_STORE_STATE] = "store state",
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
		[PR_AGENT_ALLOCATOR] = "allocator",
	};

	return names[op];
}

/* The reader thread */

static gboolean reply_valid(const PrAgentAnswer *reply, gsize len)
{
	const PrAgentReply *head = reply->head;

	if (len < sizeof(*head) || head->magic != PR_AGENT_MAGIC ||
	    head->n_regions > PR_AGENT_REGIONS_MAX || head->status >= PR_AGENT_N_STATUS)
		return FALSE;
	if (len != sizeof(*head) + head->n_regions * sizeof(PrAgentWireRegion))
		return FALSE;
	if (reply->truncated)
		return TRUE;
	if (head->op == PR_AGENT_REGIONS)
		return reply->n_fds == head->n_regions;
	return reply->n_fds <= 1 && !head->n_regions;
}

/* NULL: the connection is at its end. */
static PrAgentAnswer *receive(PrAgentClient *client, GError **error)
{
	g_autoptr(PrAgentAnswer) reply = g_new0(PrAgentAnswer, 1);
	struct iovec piece = {.iov_base = g_malloc0(PR_AGENT_REPLY_MAX),
			      .iov_len = PR_AGENT_REPLY_MAX};
	PrPacket packet = {
		.pieces = &piece, .n_pieces = 1, .fds = reply->fds, .n_fds = PR_AGENT_REGIONS_MAX};
	ssize_t n;

	reply->head = piece.iov_base;
	n = pr_packet_receive(client->fd, &packet, 0);
	/* An empty packet may come with descriptors, too. */
	reply->n_fds = packet.n_fds;
	if (n <= 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
			    "%s: the guest's process closed the connection%s%s", client->name,
			    n < 0 ? ": " : "", n < 0 ? g_strerror(errno) : "");
		return NULL;
	}
	reply->truncated = (packet.cut & MSG_CTRUNC) != 0;
	if ((packet.cut & MSG_TRUNC) || !reply_valid(reply, n)) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "%s: an answer of %zd bytes makes no sense; is this the socket "
			    "of a Postroad agent of this version?",
			    client->name, n);
		return NULL;
	}
	reply->head->text[PR_AGENT_TEXT_MAX] = '\0';
	return g_steal_pointer(&reply);
}

static void deliver(PrAgentClient *client, PrAgentAnswer *reply)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&client->lock);
	Call *call = g_hash_table_lookup(client->calls, GUINT_TO_POINTER(reply->head->id));

	/* No call: its caller has given up. */
	if (!call || call->reply || call->op != reply->head->op) {
		pr_agent_answer_free(reply);
		return;
	}
	call->reply = reply;
	g_cond_broadcast(&client->cond);
}

/* Takes failure. */
static void fail(PrAgentClient *client, GError *failure)
{
	gboolean closing;

	g_mutex_lock(&client->lock);
	g_clear_error(&client->failure);
	client->failure = failure;
	closing = client->closing;
	g_cond_broadcast(&client->cond);
	g_mutex_unlock(&client->lock);
	if (!closing)
		pr_death_report(&client->death, failure->message);
}

/* Waits until the process ends, the time is up, or this client is closed. timeout_ms -1: without a
 * limit of time. */
static gboolean process_ended(PrAgentClient *client, int timeout_ms)
{
	struct pollfd polls[] = {{.fd = client->pidfd, .events = POLLIN},
				 {.fd = pr_waker_fd(&client->end), .events = POLLIN}};
	int n;

	do {
		n = poll(polls, 2, timeout_ms);
	} while (n < 0 && errno == EINTR);
	return polls[0].revents != 0;
}

/* The helper has ended, and the process has not. All calls fail from now on. Waits for the end of
 * the process, to report it. */
static void wait_without_helper(PrAgentClient *client)
{
	gboolean closing;

	g_mutex_lock(&client->lock);
	closing = client->closing;
	if (!closing)
		client->failure = g_error_new(
			PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE,
			"%s: it has ended; the guest goes on, and its faults wait; restart this "
			"engine with --resume",
			client->name);
	g_cond_broadcast(&client->cond);
	g_mutex_unlock(&client->lock);
	if (closing)
		return;
	g_warning("%s", client->failure->message);
	process_ended(client, -1);
}

static void report_end(PrAgentClient *client, GError *failure)
{
	if (client->helper && !process_ended(client, 0))
		wait_without_helper(client);
	if (client->helper && process_ended(client, 0)) {
		g_clear_error(&failure);
		failure = g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
				      "%s: the process has ended", client->name);
	}
	fail(client, failure);
}

static gpointer reader_thread(gpointer data)
{
	PrAgentClient *client = data;
	GError *failure = NULL;
	PrAgentAnswer *reply;

	while ((reply = receive(client, &failure)))
		deliver(client, reply);
	report_end(client, failure);
	return NULL;
}

/* Calls */

static gboolean send_request(PrAgentClient *client, const PrAgentRequest *request,
			     const PrAgentPayload *load, GError **error)
{
	const struct iovec pieces[] = {
		{.iov_base = (void *)request, .iov_len = sizeof(*request)},
		{.iov_base = (void *)load->bases, .iov_len = load->n_bases * sizeof(uint64_t)},
	};
	PrPacket packet = {
		.pieces = pieces, .n_pieces = 2, .fds = (int *)&load->fd, .n_fds = load->fd >= 0};

	if (pr_packet_send(client->fd, &packet, MSG_DONTWAIT))
		return TRUE;
	/* Then the reader thread finds out why the connection has ended. */
	if (errno == EPIPE || errno == ECONNRESET)
		return TRUE;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED, "%s: cannot send '%s': %s",
		    client->name, pr_agent_op_name(request->op), g_strerror(errno));
	return FALSE;
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
			    "%s: no answer to '%s' in time", client->name,
			    pr_agent_op_name(call->op));
		return FALSE;
	}
	return TRUE;
}

static gboolean reply_ok(PrAgentClient *client, const PrAgentAnswer *reply, GError **error)
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
			    "%s: no room for the descriptors that came with '%s'; raise the "
			    "engine's limit of open files (ulimit -n)",
			    client->name, pr_agent_op_name(reply->head->op));
		return FALSE;
	}
	if (reply->head->status == PR_AGENT_OK && *reply->head->text)
		g_debug("%s: %s", client->name, reply->head->text);
	if (reply->head->status == PR_AGENT_OK)
		return TRUE;
	/* It goes into the monitor's JSON. */
	text = g_utf8_make_valid(reply->head->text, -1);
	g_set_error(error, PR_GUEST_ERROR, codes[reply->head->status], "%s: %s", client->name,
		    text);
	return FALSE;
}

PrAgentAnswer *pr_agent_call_with(PrAgentClient *client, PrAgentOp op, const PrAgentPayload *load,
				  guint timeouts, GCancellable *cancel, GError **error)
{
	gint64 deadline = g_get_monotonic_time() +
			  (gint64)client->timeout_ms * timeouts * G_TIME_SPAN_MILLISECOND;
	PrAgentRequest request = {.magic = PR_AGENT_MAGIC, .version = PR_AGENT_VERSION, .op = op};
	Call call = {.op = op};
	g_autoptr(PrAgentAnswer) reply = NULL;
	gulong handler = 0;

	g_mutex_lock(&client->lock);
	request.id = call.id = ++client->last_id;
	g_hash_table_insert(client->calls, GUINT_TO_POINTER(call.id), &call);
	g_mutex_unlock(&client->lock);
	if (cancel)
		handler = g_cancellable_connect(cancel, G_CALLBACK(wake_calls), client, NULL);

	gboolean sent = send_request(client, &request, load, error);

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

PrAgentAnswer *pr_agent_call(PrAgentClient *client, PrAgentOp op, int fd, guint timeouts,
			     GCancellable *cancel, GError **error)
{
	const PrAgentPayload load = {.fd = fd};

	return pr_agent_call_with(client, op, &load, timeouts, cancel, error);
}

/* Opening */

/* The engine believes the agent what the guest's memory is. So another user must not serve the
 * socket. An engine of root accepts any user, as root has named the path. */
static gboolean check_peer(int fd, const char *path, GError **error)
{
	struct ucred peer;
	socklen_t length = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION,
			    "agent %s: cannot find out which user serves it: %s", path,
			    g_strerror(errno));
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
	/* An agent accepts at once. If the backlog of this socket is full, its server is no
	 * agent. */
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

static gboolean send_hello(PrAgentClient *client, GError **error)
{
	/* A helper waits for the lock of the last engine's helper, which may just be ending. */
	guint timeouts = client->helper ? 2 : 1;
	g_autoptr(PrAgentAnswer) reply =
		pr_agent_call(client, PR_AGENT_HELLO, -1, timeouts, NULL, error);

	if (!reply)
		return FALSE;
	client->flags = reply->head->flags;
	client->pid = (pid_t)reply->head->pid;
	if (client->helper)
		client->lock_fd = pr_agent_answer_take_fd(reply, 0);
	return TRUE;
}

static PrAgentClient *client_new(int fd, guint timeout_ms)
{
	PrAgentClient *client = g_new0(PrAgentClient, 1);

	client->timeout_ms = timeout_ms;
	client->fd = fd;
	client->pidfd = client->lock_fd = client->allocator_fd = -1;
	client->end = PR_WAKER_INIT;
	client->calls = g_hash_table_new(NULL, NULL);
	g_mutex_init(&client->lock);
	pr_death_init(&client->death);
	g_cond_init(&client->cond);
	return client;
}

static gboolean start_reader(PrAgentClient *client, GError **error)
{
	client->reader = g_thread_try_new("agent-client", reader_thread, client, error);
	return client->reader != NULL;
}

PrAgentClient *pr_agent_client_open(const char *path, guint timeout_ms, GError **error)
{
	int fd = connect_socket(path, error);

	if (fd < 0)
		return NULL;

	g_autoptr(PrAgentClient) client = client_new(fd, timeout_ms);

	client->path = g_strdup(path);
	client->name = g_strconcat("agent ", path, NULL);
	if (!start_reader(client, error) || !send_hello(client, error))
		return NULL;
	return g_steal_pointer(&client);
}

static gboolean send_attach(PrAgentClient *client, GError **error)
{
	g_autoptr(PrAgentAnswer) reply =
		pr_agent_call(client, PR_AGENT_ATTACH, client->pidfd, 1, NULL, error);

	return reply != NULL;
}

PrAgentClient *pr_agent_client_attach(const PrGuestHelper *helper, pid_t pid, int pidfd,
				      guint timeout_ms, GError **error)
{
	g_autoptr(PrAgentClient) client = client_new(helper->fd, timeout_ms);

	client->helper = helper->pid;
	client->pidfd = pidfd;
	client->name = g_strdup_printf("attach helper of process %d", (int)pid);
	if (!pr_waker_init(&client->end, error) || !start_reader(client, error) ||
	    !send_attach(client, error) || !send_hello(client, error))
		return NULL;
	return g_steal_pointer(&client);
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

/* Ended by the helper, which ends when its socket does. */
static void end_helper(PrAgentClient *client)
{
	while (client->helper && waitpid(client->helper, NULL, 0) < 0 && errno == EINTR)
		;
}

void pr_agent_client_free(PrAgentClient *client)
{
	g_mutex_lock(&client->lock);
	client->closing = TRUE;
	g_mutex_unlock(&client->lock);
	shutdown(client->fd, SHUT_RDWR);
	pr_waker_wake(&client->end);
	if (client->reader)
		g_thread_join(client->reader);
	close(client->fd);
	end_helper(client);
	close_fd(client->pidfd);
	pr_waker_clear(&client->end);
	close_fd(client->lock_fd);
	close_fd(client->allocator_fd);
	g_hash_table_unref(client->calls);
	g_clear_error(&client->failure);
	g_mutex_clear(&client->lock);
	pr_death_clear(&client->death);
	g_cond_clear(&client->cond);
	g_free(client->path);
	g_free(client->name);
	g_free(client);
}

/* Properties */

const char *pr_agent_client_path(PrAgentClient *client)
{
	return client->path;
}

const char *pr_agent_client_name(PrAgentClient *client)
{
	return client->name;
}

pid_t pr_agent_client_pid(PrAgentClient *client)
{
	return client->pid;
}

gboolean pr_agent_client_is_helper(PrAgentClient *client)
{
	return client->helper != 0;
}

gboolean pr_agent_client_has_callbacks(PrAgentClient *client)
{
	return client->flags & PR_AGENT_FLAG_CALLBACKS;
}

gboolean pr_agent_client_was_faulting(PrAgentClient *client)
{
	return (client->flags & PR_AGENT_FLAG_UFFD_ENABLED) != 0;
}

gboolean pr_agent_client_was_fenced(PrAgentClient *client)
{
	return (client->flags & PR_AGENT_FLAG_FENCE_ON) != 0;
}

/* The allocator, and the end of the process */

int pr_agent_client_allocator(PrAgentClient *client, GError **error)
{
	g_autoptr(PrAgentAnswer) reply = NULL;

	if (client->asked_allocator)
		return client->allocator_fd;
	if (!(client->flags & PR_AGENT_FLAG_ALLOCATES)) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "%s: it is of an older version, which does not allocate pages",
			    client->name);
		return -1;
	}
	reply = pr_agent_call(client, PR_AGENT_ALLOCATOR, -1, 1, NULL, error);
	if (!reply)
		return -1;
	client->asked_allocator = TRUE;
	client->allocator_fd = pr_agent_answer_take_fd(reply, 0);
	return client->allocator_fd;
}

void pr_agent_client_on_death(PrAgentClient *client, PrGuestDied died, void *opaque)
{
	pr_death_observe(&client->death, died, opaque);
}

char *pr_agent_client_process(PrAgentClient *client)
{
	struct ucred peer = {0};
	socklen_t len = sizeof(peer);

	if (client->helper)
		return pr_process_text(client->pid);
	(void)getsockopt(client->fd, SOL_SOCKET, SO_PEERCRED, &peer, &len);
	return pr_process_text(peer.pid);
}
