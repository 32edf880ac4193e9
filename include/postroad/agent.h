/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The Postroad agent: what a VMM links to be migrated by a postroad engine (`--guest agent:PATH`).
 *
 * The VMM keeps its guest's RAM in memfds that it maps MAP_SHARED, tells the agent about each mapping
 * with pr_agent_add_region(), hands over callbacks, and calls pr_agent_serve(). From then on the
 * agent answers an engine over a unix socket from threads of its own. It needs libc and pthreads only.
 *
 *	PrAgent *agent = pr_agent_new(&ops, vm);
 *	pr_agent_add_region(agent, &(PrAgentRegion){ .idstr = "ram", .base = ram, … });
 *	err = pr_agent_serve(agent, "/run/vm/agent.sock");
 *	…
 *	pr_agent_free(agent);
 *
 * Any number of agents can live in one process. All calls may be made from any thread, except that an
 * agent is freed once, when nobody else uses it, and not from one of its callbacks.
 * Functions that return int return 0, or a negative errno.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PR_AGENT_API	     __attribute__((visibility("default")))

#define PR_AGENT_IDSTR_MAX   255 /* bytes, without the end mark */
#define PR_AGENT_REGIONS_MAX 64

typedef struct PrAgent PrAgent;

/*
 * What the engine asks the VMM to do. Called one at a time, from a thread of the agent with all signals
 * blocked, which is not the one that serves page faults' set-up: a callback may touch guest RAM and
 * wait there for a page. Each returns 0, or a negative errno which the operator will see.
 */
typedef struct PrAgentOps {
	/* Stops the vCPUs; when it returns, nothing writes to guest RAM any more. */
	int (*stop)(void *opaque, bool *ret_was_running);
	/* Lets the vCPUs run: after stop() (the migration was given up) or after load(). */
	int (*run)(void *opaque);
	/* Writes the state of everything but the registered RAM to fd (a memfd, at offset 0). */
	int (*save)(void *opaque, int fd);
	/* Reads what save() wrote on the other side (a memfd, at offset 0). The guest stays stopped. */
	int (*load)(void *opaque, int fd);
} PrAgentOps;

/* A piece of guest RAM: a MAP_SHARED mapping of a memfd. */
typedef struct PrAgentRegion {
	const char *idstr;  /* names it, the same on both hosts; copied */
	void *base;	    /* where it is mapped in this process, page aligned */
	uint64_t size;	    /* bytes, a multiple of page_size */
	uint32_t page_size; /* bytes; 0: ask the memfd (4096, or its huge page size) */
	int memfd;	    /* duplicated: the caller keeps its own */
	uint64_t offset;    /* of base within the memfd, bytes */
} PrAgentRegion;

/* ops may be NULL: an agent that offers memory and faults only. NULL: out of memory. */
PR_AGENT_API PrAgent *pr_agent_new(const PrAgentOps *ops, void *opaque);

/* -ENOSPC: more than PR_AGENT_REGIONS_MAX; -EEXIST: overlaps another region; -EINVAL: not aligned, or
 * the name is too long. Regions are listed in the order in which they were added. */
PR_AGENT_API int pr_agent_add_region(PrAgent *agent, const PrAgentRegion *region);
/* Forgets every region that [base, base + size) touches; returns how many. */
PR_AGENT_API int pr_agent_remove_regions(PrAgent *agent, void *base, uint64_t size);

/* Serves the socket (mode 0600; engines of root and of this process's user only). A stale socket file is replaced; -EADDRINUSE: a live one, or not a
 * socket at all; -EALREADY: this agent serves already. */
PR_AGENT_API int pr_agent_serve(PrAgent *agent, const char *path);

/* Ends the service, removes the socket, turns the fault mode off: whoever waits for a page wakes up.
 * Waits for a callback in progress. */
PR_AGENT_API void pr_agent_free(PrAgent *agent);

#ifdef __cplusplus
}
#endif
