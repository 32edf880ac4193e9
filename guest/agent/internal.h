/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The agent's own parts: agent.c (life and regions), server.c (socket and requests), reply.c
 * (results and replies), worker.c (the VMM's callbacks), uffd.c (the fault mode), fence.c (write
 * protection), uffd-ranges.c (the ioctls of both), allocator.c (allocates pages for the engine).
 * libc and pthreads only: this code lives in other people's VMMs.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "guest/agent/reply.h"
#include "postroad/agent.h"

#define PR_AGENT_CONNS 8 /* the attached engine, and connections that have not said HELLO yet */

typedef struct AgentRegion {
	PrAgentWireRegion wire;
	int memfd; /* owned */
} AgentRegion;

typedef struct AgentConn {
	int fd; /* -1: free slot */
	uid_t uid;
	uint64_t serial;
} AgentConn;

typedef struct AgentJob {
	uint32_t op; /* 0: none */
	uint32_t id;
	uint64_t serial; /* of the connection that asked */
	int fd;		 /* LOAD: the state, owned; else -1 */
} AgentJob;

struct PrAgent {
	PrAgentOps ops; /* constant */
	bool has_ops;	/* constant */
	void *opaque;	/* constant */

	pthread_mutex_t lock; /* held over no callback, no wait, no access to guest RAM */
	AgentRegion regions[PR_AGENT_REGIONS_MAX]; /* lock */
	unsigned n_regions;			   /* lock */
	int uffd;				   /* lock; -1: fault mode off */
	int state_fd;				   /* lock; -1: none */
	AgentJob job;		 /* lock; filled by the server thread, emptied by the worker */
	AgentJob next;		 /* lock; a RUN that waits for the job before it */
	bool quit;		 /* lock */
	pthread_cond_t job_cond; /* lock; job or quit changed */
	/* The engine that said HELLO; -1: none. The server thread writes it under the lock, and
	 * reads it without. */
	int attached_fd;
	uint64_t attached_serial; /* as attached_fd */

	/* From here on the fields belong to the server thread; before it starts and after it ended,
	 * to the owner. */
	bool serving;
	int fence_fd;	  /* -1: the fence is off */
	int allocator_fd; /* the agent's end of the allocator's socket; -1: no allocator runs */
	pthread_t allocator;
	int listen_fd;
	int wake_fd; /* eventfd: ends the server thread */
	struct sockaddr_un addr;
	struct stat socket_stat; /* of the socket file that this agent made */
	AgentConn conns[PR_AGENT_CONNS];
	uint64_t last_serial;
	/* the refused user that was logged last; 0, which is never refused: none */
	uid_t refused_uid;
	/* The worker's: the guest ran at the first STOP, and RUN has not been called since. */
	bool stopped_running;
	pthread_t server;
	pthread_t worker;
};

/* thread.c. The thread has all signals blocked: they are for the VMM's own threads. Returns 0 or
 * -errno. */
int agent_thread_create(pthread_t *ret_thread, void *(*run)(void *), PrAgent *agent,
			const char *name);

/* server.c */
int agent_listen(PrAgent *agent, const char *path);
void *agent_server_thread(void *opaque);

/* worker.c */
void *agent_worker_thread(void *opaque);
/* Hands a callback to the worker. Takes fd. False: refused, *result says why. */
bool agent_worker_start(PrAgent *agent, const PrAgentRequest *request, int fd, AgentResult *result);

/* uffd.c. Opens a userfaultfd with all needed features, and with those optional ones that the
 * kernel has; or -1. */
int agent_uffd_open(uint64_t needed, uint64_t optional, AgentResult *result);
/* The caller holds the lock. */
bool agent_uffd_probe(PrAgent *agent, AgentResult *result);
bool agent_uffd_enable(PrAgent *agent, AgentResult *result);
void agent_uffd_disable(PrAgent *agent);

/* allocator.c; called by the server thread, without the lock. Starts an allocator for the engine of
 * this connection. Returns the engine's end of its socket, which the caller closes. -1 with
 * PR_AGENT_OK: the engine needs none. */
int agent_allocator_begin(PrAgent *agent, int conn, AgentResult *result);
void agent_allocator_end(PrAgent *agent);

/* fence.c; called by the server thread, without the lock */
bool agent_fence_on(PrAgent *agent, AgentResult *result);
void agent_fence_off(PrAgent *agent);
