/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The agent's own parts: agent.c (life and regions), server.c (socket and requests), worker.c (the VMM's
 * callbacks), uffd.c (the fault mode), fence.c (write protection), allocator.c (pages for the engine). libc and pthreads only: this code lives in
 * other people's VMMs.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "guest/agent-proto.h"
#include "postroad/agent.h"

#define PR_AGENT_CONNS 8 /* the attached engine, and whoever has not said HELLO yet */

typedef struct AgentRegion {
	PrAgentWireRegion wire;
	int memfd; /* owned */
} AgentRegion;

/* What a request came to. */
typedef struct AgentResult {
	PrAgentStatus status;
	uint32_t flags;
	char text[PR_AGENT_TEXT_MAX + 1];
} AgentResult;

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
	AgentJob job;		 /* lock; filled by the server, emptied by the worker */
	AgentJob next;		 /* lock; a RUN that waits for the job before it */
	bool quit;		 /* lock */
	pthread_cond_t job_cond; /* lock; job or quit changed */
	/* The engine that said HELLO; written by the server thread under the lock, so that it reads
	 * without. -1: nobody. */
	int attached_fd;
	uint64_t attached_serial; /* as attached_fd */

	/* From here on: the server thread's; before it starts and after it ended, the owner's. */
	bool serving;
	int fence_fd;	  /* -1: the fence is off */
	int allocator_fd; /* our end of the allocator's socket; -1: there is none */
	pthread_t allocator;
	int listen_fd;
	int wake_fd; /* eventfd: end the server thread */
	struct sockaddr_un addr;
	struct stat socket_stat; /* of the socket file we made */
	AgentConn conns[PR_AGENT_CONNS];
	uint64_t last_serial;
	uid_t refused_uid; /* whom the log was told of last; 0, which never is: nobody */
	/* The worker's: the guest ran when it was stopped first, and was not let run since. */
	bool stopped_running;
	pthread_t server;
	pthread_t worker;
};

/* agent.c */
void agent_close_fd(int *fd);
/* The VMM's signals are for its own threads. Returns 0 or -errno. */
int agent_thread_create(pthread_t *ret_thread, void *(*run)(void *), PrAgent *agent,
			const char *name);
void agent_result_fail(AgentResult *result, PrAgentStatus status, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* server.c */
int agent_listen(PrAgent *agent, const char *path);
void *agent_server_thread(void *opaque);
/* Sends a reply with up to PR_AGENT_REGIONS_MAX descriptors, without blocking. False: give the
 * connection up. */
bool agent_reply(int conn, const PrAgentRequest *request, const AgentResult *result, const int *fds,
		 unsigned n_fds);

/* worker.c */
void *agent_worker_thread(void *opaque);
/* Hands a callback to the worker. Takes fd. False: refused, *result says why. */
bool agent_worker_start(PrAgent *agent, const PrAgentRequest *request, int fd, AgentResult *result);

/* uffd.c. A userfaultfd with all the needed features and those of the optional ones that there are; or -1. */
int agent_uffd_open(uint64_t needed, uint64_t optional, AgentResult *result);
/* The caller holds the lock. */
bool agent_uffd_probe(PrAgent *agent, AgentResult *result);
bool agent_uffd_enable(PrAgent *agent, AgentResult *result);
void agent_uffd_disable(PrAgent *agent);

/* allocator.c; the server thread, without the lock. Begins one for the engine of this connection; returns the engine's end of
 * its socket, the caller's to close. -1 with PR_AGENT_OK: none is needed. */
int agent_allocator_begin(PrAgent *agent, int conn, AgentResult *result);
void agent_allocator_end(PrAgent *agent);

/* fence.c; the server thread, without the lock */
bool agent_fence_on(PrAgent *agent, AgentResult *result);
void agent_fence_off(PrAgent *agent);
