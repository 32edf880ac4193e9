/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The engine's end of an agent socket (guest/agent-proto.h). Both kinds of guest have one: `agent:` for
 * everything, `qemu:` for memory and faults.
 *
 * A client has a thread that reads replies, so that any number of calls can be under way at once. All
 * functions are safe from any thread; they block for at most the timeout. Errors are of the domain
 * PR_GUEST_ERROR (a cancelled call: G_IO_ERROR_CANCELLED) and name the socket, or the process.
 */
#pragma once

#include <gio/gio.h>

#include "guest/agent-proto.h"
#include "guest/guest.h"

typedef struct PrAgentClient PrAgentClient;

PrAgentClient *pr_agent_client_open(const char *path, guint timeout_ms, GError **error);
/* The same for a helper (guest/attach/), which attaches to that process. Takes the helper, which pr_agent_client_free()
 * waits for, and the pidfd, also when it fails. When the helper ends, and the process does not, calls fail from then on
 * (PR_GUEST_ERROR_UNREACHABLE), and on_death still tells of the process. */
PrAgentClient *pr_agent_client_attach(const PrGuestHelper *helper, pid_t pid, int pidfd,
				      guint timeout_ms, GError **error);
/* Joins the reader: never from the callback of on_death. */
void pr_agent_client_free(PrAgentClient *client);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrAgentClient, pr_agent_client_free)

/* NULL: a helper's. */
const char *pr_agent_client_path(PrAgentClient *client);
/* Of the guest's process, as the agent tells it. */
pid_t pr_agent_client_pid(PrAgentClient *client);
/* Is it a helper, which knows all memory of the process, and has to be told which is the guest's RAM? */
gboolean pr_agent_client_is_helper(PrAgentClient *client);
/* Does it offer stop, run, save and load? */
gboolean pr_agent_client_has_callbacks(PrAgentClient *client);
/* Was the fault mode on already: does this engine follow another one that is gone? */
gboolean pr_agent_client_was_faulting(PrAgentClient *client);
/* The same of the fence: was the guest handed over, or has somebody tried to? */
gboolean pr_agent_client_was_fenced(PrAgentClient *client);

/* A GArray of PrGuestBlock that owns its names and memfds. */
GArray *pr_guest_blocks_new(void);

/* A GArray of PrGuestBlock, in the order of registration, checked for sense. */
GArray *pr_agent_client_regions(PrAgentClient *client, GError **error);

/* The same, those of them that another engine knew: with its names, in its order. Refused if one of them is not
 * there any more. */
GArray *pr_agent_client_adopt(PrAgentClient *client, const PrGuestBlock *known, guint n,
			      GError **error);
/* To a helper: these are the guest's RAM. Faults and fence act on them only. */
gboolean pr_agent_client_choose(PrAgentClient *client, const PrGuestBlock *blocks, guint n,
				GError **error);
/* pr_process_text() of the guest's process. */
char *pr_agent_client_process(PrAgentClient *client);

gboolean pr_agent_client_probe(PrAgentClient *client, GError **error);
int pr_agent_client_uffd_enable(PrAgentClient *client, GError **error);
gboolean pr_agent_client_uffd_disable(PrAgentClient *client, GError **error);
/* memfd -1: forget the one kept so far. */
gboolean pr_agent_client_store_state_fd(PrAgentClient *client, int memfd, GError **error);
/* -1 without an error: the agent keeps none. */
int pr_agent_client_fetch_state(PrAgentClient *client, GError **error);

gboolean pr_agent_client_stop(PrAgentClient *client, gboolean *ret_was_running, GError **error);
gboolean pr_agent_client_run(PrAgentClient *client, GError **error);
/* Returns a memfd with the state, or -1. */
int pr_agent_client_save(PrAgentClient *client, GCancellable *cancel, GError **error);
gboolean pr_agent_client_load(PrAgentClient *client, int memfd, GCancellable *cancel,
			      GError **error);

/* The memory of the guest's process, open for reading and writing; -1: see error. */
int pr_agent_client_memory(PrAgentClient *client, GError **error);
/* Its standard error, open for reading; -1 without an error: it is not a file. */
int pr_agent_client_stderr(PrAgentClient *client, GError **error);
/* Write-protects the guest's RAM in its process, and undoes that. Both harmless when it is so already. */
gboolean pr_agent_client_fence_on(PrAgentClient *client, GError **error);
gboolean pr_agent_client_fence_off(PrAgentClient *client, GError **error);

/* The allocator's socket (allocator.h), which stays the client's. -1 without an error: the engine is in the guest's memory
 * cgroup, nothing has to be done. By one thread at a time. */
int pr_agent_client_allocator(PrAgentClient *client, GError **error);

/* died is called once, from the reader thread, or from here if it happened already. */
void pr_agent_client_on_death(PrAgentClient *client, PrGuestDied died, void *opaque);
