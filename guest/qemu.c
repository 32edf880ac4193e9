/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The kind `qemu:qmp=PATH[,pid=N][,agent=PATH]`: a stock QEMU. The engine stops, saves, loads and
 * continues it over QMP. A helper that attaches to its process, or the preload agent in it, gives
 * access to memory and faults.
 *
 * qemu-check.c refuses QEMUs that can't be migrated; qemu-facts.c compares both sides;
 * qemu-attach.c finds the process; qemu-blocks.c, qemu-ram.c and qemu-private.c have the RAM
 * blocks; qemu-save.c and qemu-load.c the device state, in the format of qemu-section.c;
 * qemu-watch.c keeps the guest stopped.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest/death.h"
#include "guest/json.h"
#include "guest/kinds.h"
#include "guest/qemu-attach.h"
#include "guest/qemu-blocks.h"
#include "guest/qemu-check.h"
#include "guest/qemu-load.h"
#include "guest/qemu-query.h"
#include "guest/qemu-save.h"
#include "guest/qemu-watch.h"

typedef struct QemuGuest {
	PrGuest parent;
	PrAgentClient *agent; /* constant */
	char *qmp_path;	      /* constant */
	guint timeout_ms;     /* constant */
	/* connecting; connected, before the greeting; NULL: not connected, or qmp has it */
	GSocket *qmp_socket;

	/* Set once, with both locks held, so that a reader needs either: by open(), or by the first
	 * call that needs QMP (connect_qmp()). Constant afterwards. */
	PrQmp *qmp;
	PrQemuSave *save;
	PrQemuLoad *load;
	GMutex connecting;  /* taken before lock */
	PrQemuWatch *watch; /* constant */

	GMutex lock;
	GArray *blocks; /* lock; PrGuestBlock; NULL before prepare() */
	/* lock; a duplicate, where a helper turned the fault mode on; else -1 */
	int uffd;
	gboolean resume_running; /* lock; stop() stopped a running guest, which resume() lets run */
	gboolean may_be_fenced;	 /* lock; by fence(), or by an engine that has died */
	gboolean at_rest;	 /* lock; QEMU has stopped the guest since stop() was called */
	gboolean ran_again; /* lock; and it has been let run or reset since, not by this engine */
	char *dead;	    /* lock; why QEMU is gone, or NULL; constant once set */
	PrDeath death;	    /* has its own lock */
} QemuGuest;

/* The spec */

typedef struct QemuSpec {
	char *qmp;
	char *agent; /* NULL: a helper attaches */
	char *pid;   /* NULL: the process that listens at qmp */
} QemuSpec;

static void qemu_spec_clear(QemuSpec *spec)
{
	g_free(spec->qmp);
	g_free(spec->agent);
	g_free(spec->pid);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(QemuSpec, qemu_spec_clear)

static gboolean spec_error(GError **error, const char *spec, const char *what)
{
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_SPEC,
		    "guest 'qemu:%s': %s; use qemu:qmp=PATH[,pid=N][,agent=PATH]", spec, what);
	return FALSE;
}

static gboolean parse_spec(const char *spec, QemuSpec *ret, GError **error)
{
	g_auto(GStrv) parts = g_strsplit(spec, ",", -1);

	for (guint i = 0; parts[i]; i++) {
		char **value = g_str_has_prefix(parts[i], "qmp=")     ? &ret->qmp
			       : g_str_has_prefix(parts[i], "agent=") ? &ret->agent
			       : g_str_has_prefix(parts[i], "pid=")   ? &ret->pid
								      : NULL;
		g_autofree char *what = NULL;

		if (!value || *value) {
			what = g_strdup_printf("%s '%s'", value ? "a second" : "unknown", parts[i]);
			return spec_error(error, spec, what);
		}
		*value = g_strdup(strchr(parts[i], '=') + 1);
	}
	if (!ret->qmp || !*ret->qmp)
		return spec_error(error, spec, "qmp= is missing");
	if (ret->agent && !*ret->agent)
		return spec_error(error, spec, "agent= names no socket");
	if (ret->pid && ret->agent)
		return spec_error(error, spec, "pid= and agent= exclude each other");
	if (ret->pid && !g_ascii_string_to_unsigned(ret->pid, 10, 1, G_MAXINT32, NULL, NULL))
		return spec_error(error, spec, "pid= is not a process id");
	return TRUE;
}

static gboolean qemu_wants_helper(const char *spec)
{
	g_auto(QemuSpec) parsed = {0};

	return parse_spec(spec, &parsed, NULL) && !parsed.agent;
}

/* QMP events, and the end of QEMU */

static void on_event(const char *name, JsonObject *data, void *opaque)
{
	QemuGuest *self = opaque;
	PrQemuLoad *load;

	g_mutex_lock(&self->lock);
	load = self->load;
	if (g_str_equal(name, "STOP"))
		self->at_rest = TRUE;
	else if (g_str_equal(name, "RESUME") || g_str_equal(name, "RESET"))
		self->ran_again |= self->at_rest;
	g_mutex_unlock(&self->lock);
	if (load)
		pr_qemu_load_event(load, name, data);
	pr_qemu_watch_event(self->watch, name);
}

/* PrGuestDied: called by the reader threads of QMP and of the agent at the end of their
 * connections. The first call reports the death. */
static void on_end(const char *reason, void *opaque)
{
	QemuGuest *self = opaque;

	g_mutex_lock(&self->lock);
	if (!self->dead)
		self->dead = self->load ? pr_qemu_load_died(self->load, reason) : g_strdup(reason);
	g_mutex_unlock(&self->lock);
	pr_death_report(&self->death, self->dead);
}

/* Opening and closing */

static void set_uffd(QemuGuest *self, int uffd)
{
	g_mutex_lock(&self->lock);
	if (self->uffd >= 0)
		close(self->uffd);
	self->uffd = uffd;
	g_mutex_unlock(&self->lock);
}

static void qemu_close(PrGuest *guest)
{
	QemuGuest *self = (QemuGuest *)guest;

	/* The watch's thread makes QMP calls, and QMP's reader thread calls the watch. */
	pr_qemu_watch_end(self->watch);
	g_clear_pointer(&self->qmp, pr_qmp_free);
	g_clear_pointer(&self->watch, pr_qemu_watch_free);
	g_clear_pointer(&self->agent, pr_agent_client_free);
	g_clear_pointer(&self->save, pr_qemu_save_free);
	g_clear_pointer(&self->load, pr_qemu_load_free);
	g_clear_pointer(&self->blocks, g_array_unref);
	g_clear_object(&self->qmp_socket);
	set_uffd(self, -1);
	g_free(self->dead);
	g_free(self->qmp_path);
	g_mutex_clear(&self->connecting);
	g_mutex_clear(&self->lock);
	pr_death_clear(&self->death);
	g_free(self);
}

/* The preload agent begins to listen when QEMU maps the first shared RAM. So if it does not listen,
 * the error names RAM that is not shared as the cause. */
static PrAgentClient *open_preloaded(const QemuSpec *spec, guint timeout_ms, GError **error)
{
	g_autoptr(GError) missing = NULL;
	g_autoptr(GError) cause = NULL;
	PrAgentClient *agent = pr_agent_client_open(spec->agent, timeout_ms, &missing);

	if (agent)
		return agent;
	if (g_error_matches(missing, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE)) {
		PrQmp *qmp = pr_qmp_open(spec->qmp, timeout_ms, NULL, NULL, NULL);
		if (qmp && !pr_qemu_check_ram(qmp, &cause) &&
		    g_error_matches(cause, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED))
			g_set_error_literal(error, cause->domain, cause->code, cause->message);
		g_clear_pointer(&qmp, pr_qmp_free);
	}
	if (error && !*error)
		g_propagate_error(error, g_steal_pointer(&missing));
	return NULL;
}

/* An engine that follows another one must not wait for QMP in open(). QEMU's main loop may itself
 * wait for a page that this engine has to bring, or for the end of the fence. So in that case the
 * first call that needs QMP connects. */
static gboolean connect_qmp(QemuGuest *self, GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&self->connecting);
	PrQmp *qmp;

	if (self->qmp)
		return TRUE;
	if (!self->qmp_socket)
		self->qmp_socket = pr_qmp_connect(self->qmp_path, error);
	if (!self->qmp_socket)
		return FALSE;
	qmp = pr_qmp_open_over(g_steal_pointer(&self->qmp_socket), self->qmp_path, self->timeout_ms,
			       on_event, self, error);
	if (!qmp)
		return FALSE;
	g_mutex_lock(&self->lock);
	self->qmp = qmp;
	self->save = pr_qemu_save_new(qmp, self->agent);
	self->load = pr_qemu_load_new(qmp, self->agent, self->timeout_ms);
	if (self->dead)
		g_free(pr_qemu_load_died(self->load, self->dead));
	g_mutex_unlock(&self->lock);
	pr_qmp_on_death(qmp, on_end, self);
	return TRUE;
}

/* PrQemuWatchQmp */
static PrQmp *watch_qmp(void *opaque, GError **error)
{
	QemuGuest *self = opaque;

	return connect_qmp(self, error) ? self->qmp : NULL;
}

/* QEMU serves one QMP client at a time. So the connection that shows which process listens is used
 * for QMP later. */
static gboolean open_agent(QemuGuest *self, const QemuSpec *spec, PrGuestHelper *helper,
			   GError **error)
{
	pid_t pid = spec->pid ? atoi(spec->pid) : 0;

	if (spec->agent) {
		self->agent = open_preloaded(spec, self->timeout_ms, error);
		return self->agent != NULL;
	}
	self->qmp_socket = pr_qmp_connect(self->qmp_path, error);
	if (!self->qmp_socket)
		return FALSE;
	self->agent = pr_qemu_attach(self->qmp_socket, self->qmp_path, pid, helper,
				     self->timeout_ms, error);
	return self->agent != NULL;
}

/* Not called where the fault mode or the fence is on: the engine before has checked the process. */
static gboolean check_process(QemuGuest *self, const QemuSpec *spec, GError **error)
{
	return spec->agent ||
	       pr_qemu_check_process(self->qmp, self->qmp_path, pr_agent_client_pid(self->agent),
				     spec->pid != NULL, error);
}

static PrGuest *qemu_open(const char *spec, PrGuestHelper *helper, guint timeout_ms, GError **error)
{
	g_auto(QemuSpec) parsed = {0};
	g_autoptr(PrGuest) guest = NULL;
	QemuGuest *self;
	gboolean follows;

	if (!parse_spec(spec, &parsed, error))
		return NULL;
	self = g_new0(QemuGuest, 1);
	guest = &self->parent;
	guest->ops = &pr_guest_qemu;
	g_mutex_init(&self->lock);
	pr_death_init(&self->death);
	g_mutex_init(&self->connecting);
	self->qmp_path = g_strdup(parsed.qmp);
	self->timeout_ms = timeout_ms;
	self->uffd = -1;
	self->watch = pr_qemu_watch_new(watch_qmp, self);
	if (!open_agent(self, &parsed, helper, error))
		return NULL;
	self->may_be_fenced = pr_agent_client_was_fenced(self->agent);
	follows = pr_agent_client_was_faulting(self->agent) || self->may_be_fenced;
	if (!follows && (!connect_qmp(self, error) || !check_process(self, &parsed, error)))
		return NULL;
	pr_agent_client_on_death(self->agent, on_end, self);
	return g_steal_pointer(&guest);
}

/* RAM blocks */

static const PrGuestBlock *qemu_prepare(PrGuest *guest, PrGuestRole role, guint *ret_n,
					GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	g_autoptr(GArray) blocks = NULL;
	g_autoptr(GMutexLocker) locker = NULL;
	gboolean fresh;

	fresh = role == PR_GUEST_SOURCE || !pr_agent_client_was_faulting(self->agent);
	if (!connect_qmp(self, error) || !pr_qemu_check(self->qmp, role, fresh, error))
		return NULL;
	blocks = pr_qemu_blocks(self->qmp, self->agent, error);
	if (!blocks)
		return NULL;
	if (role == PR_GUEST_DESTINATION && !pr_agent_client_probe(self->agent, error))
		return NULL;
	locker = g_mutex_locker_new(&self->lock);
	/* Callers hold pointers into the first array, so a later one is dropped. */
	if (!self->blocks)
		self->blocks = g_steal_pointer(&blocks);
	*ret_n = self->blocks->len;
	return (const PrGuestBlock *)self->blocks->data;
}

static char *qemu_process(PrGuest *guest)
{
	return pr_agent_client_process(((QemuGuest *)guest)->agent);
}

static const PrGuestBlock *qemu_adopt(PrGuest *guest, const PrGuestBlock *known, guint n,
				      GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	g_autoptr(GArray) blocks = pr_agent_client_adopt(self->agent, known, n, error);
	g_autoptr(GMutexLocker) locker = NULL;

	if (!blocks || (pr_agent_client_is_helper(self->agent) &&
			!pr_agent_client_choose(self->agent, (const PrGuestBlock *)blocks->data,
						blocks->len, error)))
		return NULL;
	locker = g_mutex_locker_new(&self->lock);
	g_return_val_if_fail(!self->blocks, NULL);
	self->blocks = g_steal_pointer(&blocks);
	return (const PrGuestBlock *)self->blocks->data;
}

/* Source: stop, save, resume */

static gboolean query_running(QemuGuest *self, gboolean *ret_running, GError **error)
{
	g_autoptr(JsonObject) object = NULL;

	if (!connect_qmp(self, error))
		return FALSE;
	object = pr_qmp_query(self->qmp, "query-status", error);
	if (!object)
		return FALSE;
	*ret_running = pr_json_boolean(object, "running");
	return TRUE;
}

static gboolean qemu_is_running(PrGuest *guest, gboolean *ret_running, GError **error)
{
	return query_running((QemuGuest *)guest, ret_running, error);
}

static gboolean qemu_assume_stopped(PrGuest *guest, gboolean was_running, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	if (!connect_qmp(self, error))
		return FALSE;
	g_mutex_lock(&self->lock);
	self->resume_running = was_running;
	g_mutex_unlock(&self->lock);
	return TRUE;
}

static gboolean qemu_describe(PrGuest *guest, PrGuestSink sink, void *opaque, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) && pr_qemu_save_describe(self->save, sink, opaque, error);
}

static gboolean qemu_save_early(PrGuest *guest, GCancellable *cancel, PrGuestSink sink,
				void *opaque, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) && pr_qemu_save_early(self->save, sink, opaque, error);
}

static gboolean qemu_prepare_save(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) && pr_qemu_save_prepare(self->save, error);
}

static gboolean qemu_stop(PrGuest *guest, gboolean *ret_was_running, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	gboolean running;

	if (!query_running(self, &running, error))
		return FALSE;
	/* Set before the `stop`, as its event may come before its answer. */
	g_mutex_lock(&self->lock);
	self->resume_running = running;
	self->at_rest = !running;
	self->ran_again = FALSE;
	g_mutex_unlock(&self->lock);
	*ret_was_running = running;
	return pr_qmp_command(self->qmp, "stop", NULL, -1, error);
}

static gboolean qemu_check_stopped(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	gboolean ran_again;

	g_mutex_lock(&self->lock);
	ran_again = self->ran_again;
	g_mutex_unlock(&self->lock);
	if (ran_again)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED,
			    "another client of QEMU let the guest run, or reset it, during the "
			    "hand-over");
	return !ran_again;
}

static gboolean qemu_resume(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	gboolean cont;

	/* From here on this engine lets the guest run, which is no fault. */
	pr_qemu_watch_end(self->watch);
	if (!connect_qmp(self, error))
		return FALSE;
	pr_qemu_save_end(self->save);
	g_mutex_lock(&self->lock);
	cont = self->resume_running;
	g_mutex_unlock(&self->lock);
	if (cont && !pr_qmp_command(self->qmp, "cont", NULL, -1, error))
		return FALSE;
	g_mutex_lock(&self->lock);
	self->resume_running = FALSE;
	g_mutex_unlock(&self->lock);
	return TRUE;
}

static gboolean qemu_save(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			  GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) &&
	       pr_qemu_save_state(self->save, cancel, sink, opaque, error);
}

/* Destination: load, run */

static gboolean qemu_load_early(PrGuest *guest, const void *data, gsize len, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) && pr_qemu_load_early(self->load, data, len, error);
}

static gboolean qemu_prepare_load(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) && pr_qemu_load_prepare(self->load, error);
}

static gboolean qemu_load_begin(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) && pr_qemu_load_begin(self->load, error);
}

static gboolean qemu_load_data(PrGuest *guest, const void *data, gsize len, GError **error)
{
	return pr_qemu_load_data(((QemuGuest *)guest)->load, data, len, error);
}

static gboolean qemu_load_end(PrGuest *guest, GError **error)
{
	return pr_qemu_load_end(((QemuGuest *)guest)->load, error);
}

static void qemu_load_abort(PrGuest *guest)
{
	QemuGuest *self = (QemuGuest *)guest;
	PrQemuLoad *load;

	g_mutex_lock(&self->lock);
	load = self->load;
	g_mutex_unlock(&self->lock);
	if (load)
		pr_qemu_load_abort(load);
}

static gboolean qemu_run(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) && pr_qmp_command(self->qmp, "cont", NULL, -1, error);
}

static GArray *qemu_vcpu_threads(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	return connect_qmp(self, error) ? pr_qemu_vcpu_threads(self->qmp, error) : NULL;
}

/* Fault mode and fence */

static int qemu_uffd_enable(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	int uffd = pr_agent_client_uffd_enable(self->agent, error);

	if (uffd >= 0 && pr_agent_client_is_helper(self->agent))
		set_uffd(self, fcntl(uffd, F_DUPFD_CLOEXEC, 3));
	return uffd;
}

/* Without the helper the unregistered descriptor stays open in QEMU, where it has no effect. */
static gboolean unregister(QemuGuest *self)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&self->lock);

	if (self->uffd < 0 || !self->blocks)
		return FALSE;
	pr_qemu_unregister(self->uffd, (const PrGuestBlock *)self->blocks->data, self->blocks->len);
	return TRUE;
}

static gboolean qemu_uffd_disable(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	g_autoptr(GError) failure = NULL;

	if (!pr_agent_client_uffd_disable(self->agent, &failure) &&
	    (!g_error_matches(failure, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE) ||
	     !unregister(self))) {
		g_propagate_error(error, g_steal_pointer(&failure));
		return FALSE;
	}
	set_uffd(self, -1);
	return TRUE;
}

static void qemu_close_uffd(PrGuest *guest)
{
	set_uffd((QemuGuest *)guest, -1);
}

/* The watch begins first: it works also where the kernel refuses the fence, and while the fence is
 * being set up. */
static gboolean qemu_fence(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;

	g_autoptr(GError) unwatched = NULL;
	gboolean watched = pr_qemu_watch_begin(self->watch, &unwatched);

	g_mutex_lock(&self->lock);
	self->may_be_fenced = TRUE;
	g_mutex_unlock(&self->lock);
	if (!pr_agent_client_fence_on(self->agent, error))
		return FALSE;
	if (!watched)
		g_propagate_error(error, g_steal_pointer(&unwatched));
	return watched;
}

/* Does not end the watch. */
static gboolean qemu_unfence(PrGuest *guest, GError **error)
{
	QemuGuest *self = (QemuGuest *)guest;
	gboolean fenced;

	/* Without a fence the helper is not needed; it may have ended. */
	g_mutex_lock(&self->lock);
	fenced = self->may_be_fenced;
	g_mutex_unlock(&self->lock);
	if (!fenced)
		return TRUE;
	if (!pr_agent_client_fence_off(self->agent, error))
		return FALSE;
	g_mutex_lock(&self->lock);
	self->may_be_fenced = FALSE;
	g_mutex_unlock(&self->lock);
	return TRUE;
}

static int qemu_allocator(PrGuest *guest, GError **error)
{
	return pr_agent_client_allocator(((QemuGuest *)guest)->agent, error);
}

static gboolean qemu_was_fenced(PrGuest *guest)
{
	return pr_agent_client_was_fenced(((QemuGuest *)guest)->agent);
}

static void qemu_on_run_again(PrGuest *guest, PrGuestRanAgain ran_again, void *opaque)
{
	pr_qemu_watch_observe(((QemuGuest *)guest)->watch, ran_again, opaque);
}

/* The state memfd, and the end of the process */

static gboolean qemu_store_state_fd(PrGuest *guest, int memfd, GError **error)
{
	return pr_agent_client_store_state_fd(((QemuGuest *)guest)->agent, memfd, error);
}

static int qemu_fetch_state(PrGuest *guest, GError **error)
{
	return pr_agent_client_fetch_state(((QemuGuest *)guest)->agent, error);
}

static void qemu_on_death(PrGuest *guest, PrGuestDied died, void *opaque)
{
	pr_death_observe(&((QemuGuest *)guest)->death, died, opaque);
}

const PrGuestOps pr_guest_qemu = {
	.kind = "qemu",
	.wants_helper = qemu_wants_helper,
	.open = qemu_open,
	.close = qemu_close,
	.prepare = qemu_prepare,
	.process = qemu_process,
	.adopt = qemu_adopt,
	.is_running = qemu_is_running,
	.assume_stopped = qemu_assume_stopped,
	.describe = qemu_describe,
	.save_early = qemu_save_early,
	.load_early = qemu_load_early,
	.prepare_save = qemu_prepare_save,
	.prepare_load = qemu_prepare_load,
	.stop = qemu_stop,
	.check_stopped = qemu_check_stopped,
	.resume = qemu_resume,
	.save = qemu_save,
	.load_begin = qemu_load_begin,
	.load_data = qemu_load_data,
	.load_end = qemu_load_end,
	.load_abort = qemu_load_abort,
	.run = qemu_run,
	.vcpu_threads = qemu_vcpu_threads,
	.uffd_enable = qemu_uffd_enable,
	.uffd_disable = qemu_uffd_disable,
	.close_uffd = qemu_close_uffd,
	.allocator = qemu_allocator,
	.fence = qemu_fence,
	.unfence = qemu_unfence,
	.was_fenced = qemu_was_fenced,
	.on_run_again = qemu_on_run_again,
	.store_state_fd = qemu_store_state_fd,
	.fetch_state = qemu_fetch_state,
	.on_death = qemu_on_death,
};
