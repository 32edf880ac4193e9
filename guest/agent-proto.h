/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The protocol between engine and agent, over a SOCK_SEQPACKET unix socket of one host. A request
 * is one packet, and so is a reply; native byte order, descriptors by SCM_RIGHTS. The agent is a
 * thread in the guest's process (guest/agent/), or the helper process that attaches to it from
 * outside (guest/attach/).
 *
 *	engine                                  agent
 *	ATTACH + pidfd                  ──▶     (helper only, once: the guest's process)
 *	                                ◀──     ATTACH
 *	HELLO (version)                 ──▶
 *	                                ◀──     HELLO (flags), or BUSY: another engine is attached
 *	REGIONS                         ──▶
 *	                                ◀──     REGIONS, one memfd each
 *	UFFD_ENABLE                     ──▶
 *	                                ◀──     the userfaultfd
 *	LOAD + memfd                    ──▶     (by the agent's worker thread)
 *	UFFD_DISABLE                    ──▶
 *	                                ◀──     UFFD_DISABLE
 *	                                ◀──     LOAD
 *
 * A reply carries the id of its request. STOP, RUN, SAVE and LOAD have their reply when the VMM has
 * finished them, out of order with the others: a LOAD that waits for a page must not delay
 * UFFD_DISABLE. A packet that is not exactly a request closes the connection.
 */
#pragma once

#include <stdint.h>

#include "postroad/agent.h"

#define PR_AGENT_MAGIC	 0x50724167 /* "PrAg" */
#define PR_AGENT_VERSION 2

/* The name of an engine's state memfd (STORE_STATE), by which the helper finds it. */
#define PR_AGENT_STATE_NAME "postroad-state"

typedef enum PrAgentOp {
	PR_AGENT_HELLO = 1,
	PR_AGENT_REGIONS,
	PR_AGENT_PROBE, /* whether UFFD_ENABLE can work here; changes nothing */
	/* replies with the userfaultfd; when on already, with the same one */
	PR_AGENT_UFFD_ENABLE,
	PR_AGENT_UFFD_DISABLE, /* unregisters, which wakes all waiting threads */
	PR_AGENT_STORE_STATE,  /* with a memfd to store; with none: closes the stored one */
	PR_AGENT_FETCH_STATE,  /* replies with the stored memfd, or with none */
	PR_AGENT_STOP,
	PR_AGENT_RUN,
	PR_AGENT_SAVE, /* replies with a memfd */
	PR_AGENT_LOAD, /* with a memfd */
	/* replies with the process's memory (/proc/PID/mem), open for reading and writing */
	PR_AGENT_MEMORY,
	/* replies with its standard error, open for reading, or with none: not a file */
	PR_AGENT_STDERR,
	/* write-protects every region until FENCE_OFF, also while no engine is attached */
	PR_AGENT_FENCE_ON,
	PR_AGENT_FENCE_OFF, /* ends that; waiting writers go on */
	PR_AGENT_ATTACH, /* helper only, once, before HELLO: with a pidfd of the guest's process */
	/* helper only: the bases (uint64_t) of the regions that are the guest's RAM follow the
	 * request */
	PR_AGENT_CHOOSE,
	/* replies with the allocator's socket (allocator.h); with none where engine and guest share
	 * a memory cgroup. Only after HELLO with ALLOCATES, and once per engine */
	PR_AGENT_ALLOCATOR,
	PR_AGENT_N_OPS
} PrAgentOp;

typedef enum PrAgentStatus {
	PR_AGENT_OK = 0,
	PR_AGENT_BUSY,	      /* another engine is attached, or a callback is still running */
	PR_AGENT_PERMISSION,  /* userfaultfd refused */
	PR_AGENT_UNSUPPORTED, /* by the kernel, or by an agent without callbacks */
	PR_AGENT_FAILED,      /* the VMM or the kernel returned an error */
	PR_AGENT_N_STATUS
} PrAgentStatus;

typedef struct PrAgentRequest {
	uint32_t magic;
	uint32_t version;
	uint32_t op; /* PrAgentOp */
	uint32_t id;
} PrAgentRequest;

#define PR_AGENT_FLAG_CALLBACKS	   0x1u	 /* HELLO: stop, run, save and load are offered */
#define PR_AGENT_FLAG_UFFD_ENABLED 0x2u	 /* HELLO: the fault mode is on already */
#define PR_AGENT_FLAG_WAS_RUNNING  0x4u	 /* STOP: it ran at the first STOP since RUN */
#define PR_AGENT_FLAG_FENCE_ON	   0x8u	 /* HELLO: the fence is on already */
#define PR_AGENT_FLAG_ALLOCATES	   0x10u /* HELLO: the agent knows ALLOCATOR; since version 2 */

#define PR_AGENT_TEXT_MAX	   511

typedef struct PrAgentReply {
	uint32_t magic;
	uint32_t version;
	uint32_t op;
	uint32_t id;
	uint32_t status; /* PrAgentStatus */
	uint32_t flags;
	uint32_t pid;			  /* HELLO: of the guest's process */
	uint32_t n_regions;		  /* REGIONS: so many PrAgentWireRegion follow */
	char text[PR_AGENT_TEXT_MAX + 1]; /* the error text for the operator */
} PrAgentReply;

typedef struct PrAgentWireRegion {
	uint64_t base;
	uint64_t size;	 /* bytes */
	uint64_t offset; /* bytes, within the memfd */
	uint32_t page_size;
	uint32_t reserved;
	char idstr[PR_AGENT_IDSTR_MAX + 1];
} PrAgentWireRegion;

_Static_assert(sizeof(PrAgentRequest) == 16, "layout of a request");
_Static_assert(sizeof(PrAgentReply) == 32 + PR_AGENT_TEXT_MAX + 1, "layout of a reply");
_Static_assert(sizeof(PrAgentWireRegion) == 32 + PR_AGENT_IDSTR_MAX + 1, "layout of a region");

#define PR_AGENT_REPLY_MAX (sizeof(PrAgentReply) + PR_AGENT_REGIONS_MAX * sizeof(PrAgentWireRegion))
