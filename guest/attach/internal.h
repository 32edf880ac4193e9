/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The helper's own parts: helper.c (socket and requests), confine.c (gives privileges up), target.c
 * (the process that it serves), ram.c (the process's shared memory), inject-*.c (system calls in
 * its main thread), push.c (gives it descriptors), uffd.c (faults and fence), state.c (the state
 * memfd), allocator.c (a child that allocates pages).
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "guest/agent/reply.h"

/* The time for the main thread to come to rest in its poll: less than guest-timeout, and longer
 * than a busy host keeps a thread off its CPUs. */
#define ATTACH_STOP_MS 5000

/* The guest's process. All access goes through these descriptors, which never come to mean another
 * process. */
typedef struct AttachTarget {
	pid_t pid;	   /* 0: before ATTACH */
	int pidfd;	   /* owned */
	int proc_fd;	   /* /proc/PID, owned */
	int mem_fd;	   /* its memory, owned; -1: not needed yet */
	int lock_fd;	   /* locked while an engine is attached, owned; -1: not locked */
	bool stop_pending; /* its main thread was told to stop, and has not stopped yet */
} AttachTarget;

typedef struct AttachRegion {
	PrAgentWireRegion wire;
	int fd;	     /* owned */
	bool chosen; /* CHOOSE named it: it is the guest's RAM */
} AttachRegion;

typedef struct AttachRam {
	AttachRegion regions[PR_AGENT_REGIONS_MAX];
	unsigned n;
	bool chosen; /* CHOOSE has come */
} AttachRam;

/* target.c */
/* As agent_fail(), for a part of the process that could not be accessed, by errno: says why, and
 * what to do. */
bool attach_fail_access(const AttachTarget *target, AgentResult *result, const char *what);
bool attach_is_traced(const AttachTarget *target);
/* Monotonic milliseconds. */
int64_t attach_now(void);
void attach_sleep(int ms);
/* Takes the pidfd. */
bool attach_target_open(AttachTarget *target, int pidfd, AgentResult *result);
bool attach_target_gone(const AttachTarget *target);
/* Locks it for one engine. */
bool attach_target_lock(AttachTarget *target, AgentResult *result);
/* -1: see errno. */
int attach_target_memory(const AttachTarget *target);
/* A duplicate of the process's descriptor; -1: see errno. */
int attach_target_fd(const AttachTarget *target, int fd);
/* Reads a file of /proc/PID whole; false: see errno. */
bool attach_target_read(const AttachTarget *target, const char *name, char *text, size_t bytes);
/* The VALUE of "Name:\tVALUE" in such a text, or NULL. */
const char *attach_field(const char *text, const char *name);
/* The letter of its main thread's state; 0: gone. */
char attach_target_state(const AttachTarget *target);
/* Calls visit() for each open descriptor until it returns false. Returns false if they can't be
 * listed. */
bool attach_each_fd(const AttachTarget *target, bool (*visit)(int fd, void *opaque), void *opaque);

/* ram.c */
bool attach_ram_find(AttachRam *ram, const AttachTarget *target, AgentResult *result);
bool attach_ram_choose(AttachRam *ram, const uint64_t *bases, unsigned n, AgentResult *result);
void attach_ram_clear(AttachRam *ram);

/*
 * inject-ARCH.c. One stop of the main thread: attach_stop(), any number of attach_call(),
 * attach_resume(). Pointer arguments of the calls point into the scratch, which lies at scratch_at
 * in the process.
 */
#define ATTACH_SCRATCH_BYTES 256

typedef struct AttachStop AttachStop;
struct AttachStop {
	AttachTarget *target;
	AgentResult *result;
	bool stopped; /* the main thread is stopped */
	bool touched; /* a call was made since: memory and registers have to be restored */
	int64_t deadline;
	uint64_t scratch_at;
	unsigned char found[ATTACH_SCRATCH_BYTES];   /* the original bytes at scratch_at */
	unsigned char scratch[ATTACH_SCRATCH_BYTES]; /* the arguments and results of the call */
	unsigned long registers[32];		     /* the original ones */
};

extern const bool attach_has_injector;

bool attach_stop(AttachStop *stop, AttachTarget *target, AgentResult *result);
/* Fills in the scratch, and the arguments that point into it. Called again when a call is
 * repeated. */
typedef void (*AttachPrepare)(AttachStop *stop, unsigned long args[6]);
/* One system call; *ret is its result, or -errno. False: the process can't be stopped any more. A
 * signal that arrives before the call is delivered to the original thread state first. Then the
 * call is prepared and tried again. prepare may be NULL. */
bool attach_call(AttachStop *stop, long number, const unsigned long args[6], AttachPrepare prepare,
		 long *ret);
void attach_resume(AttachStop *stop);
/* Detaches from a thread that did not stop in time, if it has stopped since. To be called now and
 * then. */
void attach_detach_pending(AttachTarget *target);

/* push.c: within a stop. */
/* Gives the process a duplicate of the descriptor; returns its number there, or -1. */
int attach_push(AttachStop *stop, int fd);
bool attach_close_there(AttachStop *stop, int fd);

/* uffd.c */
/* The flags of HELLO: the fault mode and the fence that are parked in the process. */
bool attach_parked(const AttachTarget *target, uint32_t *ret_flags, AgentResult *result);
bool attach_probe(AttachTarget *target, const AttachRam *ram, AgentResult *result);
/* Returns the userfaultfd, the caller's to close, or -1. */
int attach_uffd_enable(AttachTarget *target, const AttachRam *ram, AgentResult *result);
/* Both leave the descriptor parked: attach_close_parked() closes it after the reply. */
bool attach_uffd_disable(const AttachTarget *target, const AttachRam *ram, AgentResult *result);
bool attach_fence_on(AttachTarget *target, const AttachRam *ram, AgentResult *result);
bool attach_fence_off(const AttachTarget *target, const AttachRam *ram, AgentResult *result);
/* Closes the parked descriptors that were turned off. One that can't be closed now is closed the
 * next time; it has no effect meanwhile. */
void attach_close_parked(AttachTarget *target, AgentResult *result);

/* state.c */
/* fd -1: closes the stored one. */
bool attach_store_state_fd(AttachTarget *target, int fd, AgentResult *result);
/* -1 with PR_AGENT_OK: there is none. */
int attach_fetch_state(const AttachTarget *target, AgentResult *result);

/* allocator.c */
typedef struct AttachAllocator {
	pid_t pid;
	int socket; /* the engine's end, owned; -1: no child, or the engine has it */
} AttachAllocator;

/* Before the helper is confined. */
void attach_allocator_fork(AttachAllocator *allocator, bool filter);
/* Moves the child into the memory cgroup of the process. Returns the engine's end of its socket,
 * which the caller closes. -1 with PR_AGENT_OK: engine and process are in the same memory cgroup
 * anyway. */
int attach_allocator(AttachAllocator *allocator, const AttachTarget *target, AgentResult *result);

/* confine.c */
/* Gives up all privileges that are not needed, and all descriptors but socket, other (-1: none) and
 * standard error. False: it failed, and the helper must not serve. */
bool attach_confine(int socket, int other, bool filter);
/* The same for the child that allocates pages. */
bool attach_confine_allocator(int socket, bool filter);
