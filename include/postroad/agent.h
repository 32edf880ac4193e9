/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The Postroad agent: a library that a VMM links so that a postroad engine can migrate its guest
 * (`--guest agent:PATH`).
 *
 * The VMM keeps its guest's RAM in memfds that it maps MAP_SHARED. It names each mapping to the
 * agent with pr_agent_add_region(), passes callbacks, and calls pr_agent_serve(). From then on the
 * agent serves an engine over a unix socket, in threads of its own. The library needs libc and
 * pthreads only.
 *
 *	PrAgent *agent = pr_agent_new(&ops, vm);
 *	pr_agent_add_region(agent, &(PrAgentRegion){ .idstr = "ram", .base = ram, … });
 *	err = pr_agent_serve(agent, "/run/vm/agent.sock");
 *	…
 *	pr_agent_free(agent);
 *
 * One process can have any number of agents. All functions may be called from any thread, except
 * pr_agent_free(): it is called once, when no other thread uses the agent, and not from one of the
 * agent's callbacks. Functions that return int return 0, or a negative errno.
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
 * The callbacks of the VMM. A thread of the agent calls them, one at a time and with all signals
 * blocked. That thread only calls callbacks, so a callback may touch guest RAM and wait there for a
 * page. Each returns 0, or a negative errno, which the operator will see.
 */
typedef struct PrAgentOps {
	/* Stops the vCPUs. When it returns, no thread or device writes to guest RAM any more. */
	int (*stop)(void *opaque, bool *ret_was_running);
	/* Lets the vCPUs run: after stop() (the migration was given up) or after load(). */
	int (*run)(void *opaque);
	/* Writes the state of everything but the registered RAM to fd (a memfd, at offset 0). */
	int (*save)(void *opaque, int fd);
	/* Loads the state that save() wrote on the other host (a memfd, at offset 0). The guest
	 * stays stopped. */
	int (*load)(void *opaque, int fd);
} PrAgentOps;

/* A piece of guest RAM: a MAP_SHARED mapping of a memfd. */
typedef struct PrAgentRegion {
	const char *idstr;  /* its name, the same on both hosts; copied */
	void *base;	    /* its address in this process, page aligned */
	uint64_t size;	    /* bytes, a multiple of page_size */
	uint32_t page_size; /* bytes; 0: that of the memfd (4096, or its huge page size) */
	int memfd;	    /* duplicated: the caller keeps its descriptor */
	uint64_t offset;    /* of base in the memfd, bytes */
} PrAgentRegion;

/* ops NULL: the agent offers memory and faults only. Returns NULL when out of memory. */
PR_AGENT_API PrAgent *pr_agent_new(const PrAgentOps *ops, void *opaque);

/* -ENOSPC: more than PR_AGENT_REGIONS_MAX; -EEXIST: overlaps another region; -EINVAL: not aligned,
 * or the name is too long. Regions are listed in the order in which they were added. */
PR_AGENT_API int pr_agent_add_region(PrAgent *agent, const PrAgentRegion *region);
/* Removes every region that overlaps [base, base + size); returns how many. */
PR_AGENT_API int pr_agent_remove_regions(PrAgent *agent, void *base, uint64_t size);

/* Serves the socket (mode 0600), for engines of root and of this process's user only. A stale
 * socket file is replaced. -EADDRINUSE: another process serves it, or it is not a socket;
 * -EALREADY: this agent serves already. */
PR_AGENT_API int pr_agent_serve(PrAgent *agent, const char *path);

/* Ends the service, removes the socket and turns the fault mode off, so that threads that wait for
 * a page go on. Waits for a callback in progress. */
PR_AGENT_API void pr_agent_free(PrAgent *agent);

#ifdef __cplusplus
}
#endif
