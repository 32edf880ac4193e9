/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The engine's end of an agent socket (guest/agent-proto.h). Both kinds of guest have one: `agent:`
 * for all requests, `qemu:` for memory and faults.
 *
 * A client has a thread that reads replies, so that any number of calls can be in progress at once.
 * All functions may be called from any thread; they block for at most the timeout. Errors are of
 * the domain PR_GUEST_ERROR (a cancelled call: G_IO_ERROR_CANCELLED), and name the socket or the
 * process.
 */
#pragma once

#include <gio/gio.h>

#include "guest/agent-proto.h"
#include "guest/guest.h"

typedef struct PrAgentClient PrAgentClient;

PrAgentClient *pr_agent_client_open(const char *path, guint timeout_ms, GError **error);
/* The same for a helper (guest/attach/), which attaches to that process. Takes the helper and the
 * pidfd, also when it fails; pr_agent_client_free() waits for the helper. If the helper ends and
 * the process does not, calls fail from then on (PR_GUEST_ERROR_UNREACHABLE), and on_death still
 * reports the end of the process. */
PrAgentClient *pr_agent_client_attach(const PrGuestHelper *helper, pid_t pid, int pidfd,
				      guint timeout_ms, GError **error);
/* Joins the reader thread: never call this from the callback of on_death. */
void pr_agent_client_free(PrAgentClient *client);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrAgentClient, pr_agent_client_free)

/* The agent's socket; NULL: the client of a helper. */
const char *pr_agent_client_path(PrAgentClient *client);
/* The pid of the guest's process, in its own pid namespace where an agent reports it. */
pid_t pr_agent_client_pid(PrAgentClient *client);
/* TRUE: a helper, which finds all shared memory of the process, and needs
 * pr_agent_client_choose(). */
gboolean pr_agent_client_is_helper(PrAgentClient *client);
/* TRUE: it offers stop, run, save and load. */
gboolean pr_agent_client_has_callbacks(PrAgentClient *client);
/* TRUE: the fault mode was on already, so this engine follows one that is gone. */
gboolean pr_agent_client_was_faulting(PrAgentClient *client);
/* TRUE: the fence was on already, so an engine that is gone has handed the guest over, or tried
 * to. */
gboolean pr_agent_client_was_fenced(PrAgentClient *client);

/* A GArray of PrGuestBlock that owns its names and memfds. */
GArray *pr_guest_blocks_new(void);

/* A GArray of PrGuestBlock, in the order of registration, checked for sense. */
GArray *pr_agent_client_regions(PrAgentClient *client, GError **error);

/* The regions that another engine knew, with its names and in its order. Refused if one of them
 * does not exist any more. */
GArray *pr_agent_client_adopt(PrAgentClient *client, const PrGuestBlock *known, guint n,
			      GError **error);
/* Tells a helper which regions are the guest's RAM. Fault mode and fence act on these only. */
gboolean pr_agent_client_choose(PrAgentClient *client, const PrGuestBlock *blocks, guint n,
				GError **error);
/* pr_process_text() of the guest's process. */
char *pr_agent_client_process(PrAgentClient *client);

gboolean pr_agent_client_probe(PrAgentClient *client, GError **error);
int pr_agent_client_uffd_enable(PrAgentClient *client, GError **error);
gboolean pr_agent_client_uffd_disable(PrAgentClient *client, GError **error);
/* memfd -1: closes the stored one. */
gboolean pr_agent_client_store_state_fd(PrAgentClient *client, int memfd, GError **error);
/* -1 without an error: the agent has none. */
int pr_agent_client_fetch_state(PrAgentClient *client, GError **error);

gboolean pr_agent_client_stop(PrAgentClient *client, gboolean *ret_was_running, GError **error);
gboolean pr_agent_client_run(PrAgentClient *client, GError **error);
/* Returns a memfd with the state, or -1. */
int pr_agent_client_save(PrAgentClient *client, GCancellable *cancel, GError **error);
gboolean pr_agent_client_load(PrAgentClient *client, int memfd, GCancellable *cancel,
			      GError **error);

/* The memory of the guest's process, open for reading and writing; -1: see error. */
int pr_agent_client_memory(PrAgentClient *client, GError **error);
/* Its standard error, open for reading; -1 without an error: that is not a file. */
int pr_agent_client_stderr(PrAgentClient *client, GError **error);
/* Write-protects the guest's RAM in its process, and ends that. Both are harmless when repeated. */
gboolean pr_agent_client_fence_on(PrAgentClient *client, GError **error);
gboolean pr_agent_client_fence_off(PrAgentClient *client, GError **error);

/* The allocator's socket (allocator.h), which the client owns. -1 without an error: engine and
 * guest are in the same memory cgroup, so no allocator is needed. Only one thread at a time may
 * call this. */
int pr_agent_client_allocator(PrAgentClient *client, GError **error);

/* died is called once: from the reader thread, or from here if the process has ended already. NULL:
 * as pr_death_observe(). */
void pr_agent_client_on_death(PrAgentClient *client, PrGuestDied died, void *opaque);
