/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Finds the process of the QEMU at a QMP socket. The kernel tells which process has called listen()
 * on the socket, but that may be another one: libvirt makes the socket, and passes it to QEMU. So
 * the threads of the vCPUs, which QMP lists, must belong to that process.
 *
 * A pidfd is opened before /proc/PID is read, as the kernel reuses pids. If the process of the
 * pidfd still lives after the reading, the files of /proc/PID were those of that process.
 */
#include "guest/qemu-attach.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/agent/uffd-ranges.h"
#include "guest/attach/attach.h"
#include "guest/qemu-query.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* Linux 6.5 */
#endif

/* The process behind the socket */

static char *name_of(pid_t pid)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/comm", (int)pid);
	char *name = NULL;

	if (!g_file_get_contents(path, &name, NULL, NULL))
		return g_strdup("?");
	return g_strchomp(name);
}

/* 0: not known, as for a process outside of this pid namespace. */
static pid_t listener_of(GSocket *socket)
{
	struct ucred peer = {0};
	socklen_t length = sizeof(peer);

	(void)getsockopt(g_socket_get_fd(socket), SOL_SOCKET, SO_PEERCRED, &peer, &length);
	return peer.pid;
}

static int pidfd_of_listener(GSocket *socket)
{
	socklen_t length = sizeof(int);
	int pidfd;

	if (getsockopt(g_socket_get_fd(socket), SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length) == 0)
		return pidfd;
	return (int)syscall(SYS_pidfd_open, listener_of(socket), 0);
}

static int open_process(GSocket *qmp, const char *qmp_path, pid_t *pid, GError **error)
{
	int pidfd;

	if (*pid) {
		pidfd = (int)syscall(SYS_pidfd_open, *pid, 0);
		if (pidfd < 0)
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE, "pid=%d: %s",
				    (int)*pid, g_strerror(errno));
		return pidfd;
	}
	*pid = listener_of(qmp);
	pidfd = *pid > 0 ? pidfd_of_listener(qmp) : -1;
	if (pidfd < 0)
		g_set_error(
			error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE,
			"QMP %s: the process that made the socket (%d) is gone or can't be seen "
			"from here; name QEMU's with pid=",
			qmp_path, (int)*pid);
	return pidfd;
}

/* Whether the process has a thread with the agent's name (guest/agent/agent.c). A loaded agent that
 * does not serve has none. */
static gboolean has_agent(pid_t pid)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/task", (int)pid);
	g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
	const char *thread;

	while (dir && (thread = g_dir_read_name(dir))) {
		g_autofree char *file = g_build_filename(path, thread, "comm", NULL);
		g_autofree char *name = NULL;

		if (g_file_get_contents(file, &name, NULL, NULL) &&
		    g_str_equal(name, "postroad-agent\n"))
			return TRUE;
	}
	return FALSE;
}

/* Neither agent nor helper knows the userfaultfds of the other. */
static gboolean refuse_agent(pid_t pid, GError **error)
{
	if (!has_agent(pid))
		return FALSE;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
		    "process %d has the preload agent in it: add agent=PATH, with the socket that "
		    "POSTROAD_AGENT named when it was started",
		    (int)pid);
	return TRUE;
}

/* Attaching */

PrAgentClient *pr_qemu_attach(GSocket *qmp, const char *qmp_path, pid_t pid, PrGuestHelper *helper,
			      guint timeout_ms, GError **error)
{
	int pidfd = open_process(qmp, qmp_path, &pid, error);
	PrGuestHelper own = *helper;

	if (pidfd < 0)
		return NULL;
	if (refuse_agent(pid, error)) {
		close(pidfd);
		return NULL;
	}
	*helper = (PrGuestHelper)PR_GUEST_HELPER_NONE;
	return pr_agent_client_attach(&own, pid, pidfd, timeout_ms, error);
}

/* The flags of the parked descriptor change, too, as it is the same open file. */
void pr_qemu_unregister(int uffd, const PrGuestBlock *blocks, guint n)
{
	for (guint i = 0; i < n; i++)
		agent_uffd_unregister(uffd, blocks[i].base, blocks[i].size);
	(void)fcntl(uffd, F_SETFL, PR_ATTACH_UFFD_OFF);
}

/* The check that it runs these vCPUs */

/* The thread id in the process's own pid namespace: the last one of "NSpid:". */
static uint32_t own_thread_id(pid_t pid, const char *thread)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/task/%s/status", (int)pid, thread);
	g_autofree char *text = NULL;
	g_autofree char *own = NULL;
	const char *line;

	if (!g_file_get_contents(path, &text, NULL, NULL))
		return 0;
	line = strstr(text, "\nNSpid:");
	if (!line)
		return (uint32_t)g_ascii_strtoull(thread, NULL, 10);
	line += strlen("\nNSpid:");
	own = g_strndup(line, strcspn(line, "\n"));
	line = strrchr(own, '\t');
	return (uint32_t)g_ascii_strtoull(line ? line + 1 : own, NULL, 10);
}

static GHashTable *threads_of(pid_t pid)
{
	g_autofree char *path = g_strdup_printf("/proc/%d/task", (int)pid);
	g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
	GHashTable *threads = g_hash_table_new(NULL, NULL);
	const char *name;

	while (dir && (name = g_dir_read_name(dir)))
		g_hash_table_add(threads, GUINT_TO_POINTER(own_thread_id(pid, name)));
	return threads;
}

gboolean pr_qemu_check_process(PrQmp *qmp, const char *qmp_path, pid_t pid, gboolean named,
			       GError **error)
{
	g_autoptr(GArray) vcpus = pr_qemu_vcpu_threads(qmp, error);
	g_autoptr(GHashTable) threads = NULL;
	g_autofree char *name = NULL;
	gboolean all = TRUE;

	if (!vcpus)
		return FALSE;
	threads = threads_of(pid);
	for (guint i = 0; i < vcpus->len; i++)
		all = all && g_hash_table_contains(
				     threads, GUINT_TO_POINTER(g_array_index(vcpus, uint32_t, i)));
	if (all)
		return TRUE;
	name = name_of(pid);
	if (named)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "pid=%d is %s, which does not run the vCPUs of the QEMU at %s: name "
			    "that one's",
			    (int)pid, name, qmp_path);
	else
		g_set_error(
			error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			"the QMP socket %s belongs to process %d (%s), which does not run these "
			"vCPUs: name QEMU's with pid=",
			qmp_path, (int)pid, name);
	return FALSE;
}
