/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The kind `agent:PATH`: a process that links the agent library, with callbacks for stop, run, save
 * and load.
 */
#include <errno.h>
#include <glib-unix.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest/agent-client.h"
#include "guest/kinds.h"

#define SAVE_CHUNK (256 * 1024) /* bytes */
/* the time for a callback to end that an engine, since dead, has asked for */
#define BUSY_MS	      10000
#define BUSY_CHECK_US 5000

typedef struct AgentGuest {
	PrGuest parent;
	PrAgentClient *client; /* constant */

	GMutex lock;
	GArray *blocks;		 /* lock; PrGuestBlock; NULL before prepare() */
	gboolean resume_running; /* lock; stop() stopped a running guest, which resume() lets run */
	int load_fd;		 /* lock; memfd of the load in progress, or -1 */
	GCancellable *load_cancel; /* lock; of the load in progress, or NULL */
} AgentGuest;

static void agent_close(PrGuest *guest)
{
	AgentGuest *self = (AgentGuest *)guest;

	pr_agent_client_free(self->client);
	g_clear_pointer(&self->blocks, g_array_unref);
	g_clear_object(&self->load_cancel);
	if (self->load_fd >= 0)
		close(self->load_fd);
	g_mutex_clear(&self->lock);
	g_free(self);
}

static PrGuest *agent_open(const char *spec, PrGuestHelper *helper, guint timeout_ms,
			   GError **error)
{
	PrAgentClient *client = pr_agent_client_open(spec, timeout_ms, error);
	AgentGuest *self;

	if (!client)
		return NULL;
	self = g_new0(AgentGuest, 1);
	self->parent.ops = &pr_guest_agent;
	self->client = client;
	self->load_fd = -1;
	g_mutex_init(&self->lock);
	return &self->parent;
}

static gboolean check_names(AgentGuest *self, GArray *blocks, GError **error)
{
	g_autoptr(GHashTable) names = g_hash_table_new(g_str_hash, g_str_equal);

	for (guint i = 0; i < blocks->len; i++) {
		const PrGuestBlock *block = &g_array_index(blocks, PrGuestBlock, i);

		if (*block->idstr && g_hash_table_add(names, block->idstr))
			continue;
		g_set_error(
			error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			"agent %s: region %u is named '%s'; each region needs a name of its own",
			pr_agent_client_path(self->client), i, block->idstr);
		return FALSE;
	}
	return TRUE;
}

static const PrGuestBlock *agent_prepare(PrGuest *guest, PrGuestRole role, guint *ret_n,
					 GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	g_autoptr(GArray) blocks = NULL;
	g_autoptr(GMutexLocker) locker = NULL;

	if (!pr_agent_client_has_callbacks(self->client)) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "agent %s: offers memory only; if this is a QEMU, use "
			    "qemu:qmp=PATH,agent=%s",
			    pr_agent_client_path(self->client), pr_agent_client_path(self->client));
		return NULL;
	}
	blocks = pr_agent_client_regions(self->client, error);
	if (!blocks || !check_names(self, blocks, error))
		return NULL;
	if (!blocks->len) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "agent %s: the guest has registered no RAM",
			    pr_agent_client_path(self->client));
		return NULL;
	}
	if (role == PR_GUEST_DESTINATION && !pr_agent_client_probe(self->client, error))
		return NULL;
	locker = g_mutex_locker_new(&self->lock);
	/* Callers hold pointers into the first array, so a later one is dropped. */
	if (!self->blocks)
		self->blocks = g_steal_pointer(&blocks);
	*ret_n = self->blocks->len;
	return (const PrGuestBlock *)self->blocks->data;
}

static char *agent_process(PrGuest *guest)
{
	return pr_agent_client_process(((AgentGuest *)guest)->client);
}

static const PrGuestBlock *agent_adopt(PrGuest *guest, const PrGuestBlock *known, guint n,
				       GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	g_autoptr(GArray) blocks = pr_agent_client_adopt(self->client, known, n, error);
	g_autoptr(GMutexLocker) locker = NULL;

	if (!blocks)
		return NULL;
	locker = g_mutex_locker_new(&self->lock);
	g_return_val_if_fail(!self->blocks, NULL);
	self->blocks = g_steal_pointer(&blocks);
	return (const PrGuestBlock *)self->blocks->data;
}

static gboolean agent_is_running(PrGuest *guest, gboolean *ret_running, GError **error)
{
	*ret_running = TRUE;
	return TRUE;
}

static gboolean agent_stop(PrGuest *guest, gboolean *ret_was_running, GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	gboolean was_running;

	if (!pr_agent_client_stop(self->client, &was_running, error))
		return FALSE;
	g_mutex_lock(&self->lock);
	self->resume_running = was_running;
	g_mutex_unlock(&self->lock);
	*ret_was_running = was_running;
	return TRUE;
}

/* To stop the guest once more does no harm, and the reply says whether it ran at the first stop
 * (agent/worker.c). The agent may still run a callback for the last engine. */
static gboolean agent_assume_stopped(PrGuest *guest, gboolean was_running, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + BUSY_MS * G_TIME_SPAN_MILLISECOND;

	for (;;) {
		g_autoptr(GError) inner = NULL;

		if (agent_stop(guest, &was_running, &inner))
			return TRUE;
		if (!g_error_matches(inner, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED) ||
		    g_get_monotonic_time() > deadline) {
			g_propagate_error(error, g_steal_pointer(&inner));
			return FALSE;
		}
		g_usleep(BUSY_CHECK_US); /* between two checks whether it has ended */
	}
}

static gboolean agent_resume(PrGuest *guest, GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	gboolean running;

	g_mutex_lock(&self->lock);
	running = self->resume_running;
	g_mutex_unlock(&self->lock);
	if (!running)
		return TRUE;
	if (!pr_agent_client_run(self->client, error))
		return FALSE;
	g_mutex_lock(&self->lock);
	self->resume_running = FALSE;
	g_mutex_unlock(&self->lock);
	return TRUE;
}

static gboolean agent_save(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			   GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	g_autofree char *chunk = g_malloc(SAVE_CHUNK);
	int fd = pr_agent_client_save(self->client, cancel, error);
	gboolean ok = fd >= 0;
	off_t offset = 0;

	while (ok) {
		ssize_t n = pread(fd, chunk, SAVE_CHUNK, offset);

		if (n == 0)
			break;
		if (n < 0)
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
				    "agent %s: cannot read the device state: %s",
				    pr_agent_client_path(self->client), g_strerror(errno));
		ok = n > 0 && !g_cancellable_set_error_if_cancelled(cancel, error) &&
		     sink(chunk, n, opaque, error);
		offset += n;
	}
	if (fd >= 0)
		close(fd);
	return ok;
}

static gboolean agent_load_begin(PrGuest *guest, GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&self->lock);
	int fd = memfd_create("postroad-device-state", MFD_CLOEXEC);

	if (fd < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL, "memfd_create: %s",
			    g_strerror(errno));
		return FALSE;
	}
	if (self->load_fd >= 0)
		close(self->load_fd);
	self->load_fd = fd;
	g_clear_object(&self->load_cancel);
	self->load_cancel = g_cancellable_new();
	return TRUE;
}

static gboolean agent_load_data(PrGuest *guest, const void *data, gsize len, GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&self->lock);

	g_return_val_if_fail(self->load_fd >= 0, FALSE);
	for (const char *at = data; len > 0;) {
		ssize_t n = write(self->load_fd, at, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
				    "cannot store the device state: %s", g_strerror(errno));
			return FALSE;
		}
		at += n;
		len -= n;
	}
	return TRUE;
}

static gboolean agent_load_end(PrGuest *guest, GError **error)
{
	AgentGuest *self = (AgentGuest *)guest;
	g_autoptr(GCancellable) cancel = NULL;
	gboolean ok;
	int fd;

	g_mutex_lock(&self->lock);
	fd = self->load_fd;
	self->load_fd = -1;
	g_set_object(&cancel, self->load_cancel);
	g_mutex_unlock(&self->lock);
	g_return_val_if_fail(fd >= 0, FALSE);
	ok = pr_agent_client_load(self->client, fd, cancel, error);
	close(fd);
	return ok;
}

static void agent_load_abort(PrGuest *guest)
{
	AgentGuest *self = (AgentGuest *)guest;
	g_autoptr(GCancellable) cancel = NULL;

	g_mutex_lock(&self->lock);
	g_set_object(&cancel, self->load_cancel);
	g_mutex_unlock(&self->lock);
	g_cancellable_cancel(cancel);
}

static gboolean agent_run(PrGuest *guest, GError **error)
{
	return pr_agent_client_run(((AgentGuest *)guest)->client, error);
}

static GArray *agent_vcpu_threads(PrGuest *guest, GError **error)
{
	return g_array_new(FALSE, FALSE, sizeof(uint32_t));
}

static int agent_uffd_enable(PrGuest *guest, GError **error)
{
	return pr_agent_client_uffd_enable(((AgentGuest *)guest)->client, error);
}

static gboolean agent_uffd_disable(PrGuest *guest, GError **error)
{
	return pr_agent_client_uffd_disable(((AgentGuest *)guest)->client, error);
}

static int agent_allocator(PrGuest *guest, GError **error)
{
	return pr_agent_client_allocator(((AgentGuest *)guest)->client, error);
}

static gboolean agent_fence(PrGuest *guest, GError **error)
{
	return pr_agent_client_fence_on(((AgentGuest *)guest)->client, error);
}

static gboolean agent_unfence(PrGuest *guest, GError **error)
{
	return pr_agent_client_fence_off(((AgentGuest *)guest)->client, error);
}

static gboolean agent_was_fenced(PrGuest *guest)
{
	return pr_agent_client_was_fenced(((AgentGuest *)guest)->client);
}

/* The observer is never called: the agent lets the guest run for its engine only, and a VMM that
 * runs its guest by itself does not tell the agent. */
static void agent_on_run_again(PrGuest *guest, PrGuestRanAgain ran_again, void *opaque)
{
}

static gboolean agent_store_state_fd(PrGuest *guest, int memfd, GError **error)
{
	return pr_agent_client_store_state_fd(((AgentGuest *)guest)->client, memfd, error);
}

static int agent_fetch_state(PrGuest *guest, GError **error)
{
	return pr_agent_client_fetch_state(((AgentGuest *)guest)->client, error);
}

static void agent_on_death(PrGuest *guest, PrGuestDied died, void *opaque)
{
	pr_agent_client_on_death(((AgentGuest *)guest)->client, died, opaque);
}

const PrGuestOps pr_guest_agent = {
	.kind = "agent",
	.open = agent_open,
	.close = agent_close,
	.prepare = agent_prepare,
	.process = agent_process,
	.adopt = agent_adopt,
	.is_running = agent_is_running,
	.assume_stopped = agent_assume_stopped,
	.stop = agent_stop,
	.resume = agent_resume,
	.save = agent_save,
	.load_begin = agent_load_begin,
	.load_data = agent_load_data,
	.load_end = agent_load_end,
	.load_abort = agent_load_abort,
	.run = agent_run,
	.vcpu_threads = agent_vcpu_threads,
	.uffd_enable = agent_uffd_enable,
	.uffd_disable = agent_uffd_disable,
	.allocator = agent_allocator,
	.fence = agent_fence,
	.unfence = agent_unfence,
	.was_fenced = agent_was_fenced,
	.on_run_again = agent_on_run_again,
	.store_state_fd = agent_store_state_fd,
	.fetch_state = agent_fetch_state,
	.on_death = agent_on_death,
};
