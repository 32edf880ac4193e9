/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The helper's own parts: helper.c (socket and requests), confine.c (what it gives up), target.c (the process it
 * serves), ram.c (its regions), inject-*.c (system calls in its main thread), push.c (descriptors into it), uffd.c
 * (faults and fence), state.c (the state memfd), allocator.c (a child that allocates pages).
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "guest/agent-proto.h"

/* Within which the main thread has to be found at rest: less than guest-timeout, and longer than a
 * busy host keeps a thread off its CPUs. */
#define ATTACH_STOP_MS 5000

/* What a request came to. With PR_AGENT_OK the text is for the debug log. */
typedef struct AttachResult {
	PrAgentStatus status;
	uint32_t flags;
	char text[PR_AGENT_TEXT_MAX + 1];
} AttachResult;

/* The guest's process. Everything goes through these descriptors, which never mean another process. */
typedef struct AttachTarget {
	pid_t pid;	/* 0: none yet */
	int pidfd;	/* owned */
	int proc_fd;	/* /proc/PID, owned */
	int mem_fd;	/* its memory, owned; -1: not needed yet */
	int lock_fd;	/* locked while an engine is attached, owned; -1: not locked */
	bool unsettled; /* its main thread was to stop, and has not yet */
} AttachTarget;

typedef struct AttachRegion {
	PrAgentWireRegion wire;
	int fd; /* owned */
	bool chosen;
} AttachRegion;

typedef struct AttachRam {
	AttachRegion regions[PR_AGENT_REGIONS_MAX];
	unsigned n;
	bool chosen; /* the engine has said which */
} AttachRam;

/* target.c */
/* Both return false. */
bool attach_fail(AttachResult *result, PrAgentStatus status, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* The same, about something of the process that errno says can't be had: says why, and what to do. */
bool attach_fail_access(const AttachTarget *target, AttachResult *result, const char *what);
bool attach_is_traced(const AttachTarget *target);
void attach_close_fd(int *fd);
/* Milliseconds. */
int64_t attach_now(void);
void attach_sleep(int ms);
/* Takes the pidfd. */
bool attach_target_open(AttachTarget *target, int pidfd, AttachResult *result);
bool attach_target_gone(const AttachTarget *target);
/* Locks it for one engine. */
bool attach_target_lock(AttachTarget *target, AttachResult *result);
/* -1: see errno. */
int attach_target_memory(const AttachTarget *target);
/* A descriptor of ours for the same open file; -1: see errno. */
int attach_target_fd(const AttachTarget *target, int fd);
/* Reads a file of /proc/PID whole; false: see errno. */
bool attach_target_read(const AttachTarget *target, const char *name, char *text, size_t bytes);
/* "Name:\tVALUE" in such a text; NULL: there is none. */
const char *attach_field(const char *text, const char *name);
/* The letter of its main thread's state; 0: gone. */
char attach_target_state(const AttachTarget *target);
/* Calls see() for each open descriptor until it says false. Returns false if they can't be listed. */
bool attach_each_fd(const AttachTarget *target, bool (*see)(int fd, void *opaque), void *opaque);

/* ram.c */
bool attach_ram_find(AttachRam *ram, const AttachTarget *target, AttachResult *result);
bool attach_ram_choose(AttachRam *ram, const uint64_t *bases, unsigned n, AttachResult *result);
void attach_ram_clear(AttachRam *ram);

/*
 * inject-ARCH.c. One stop of the main thread: attach_stop(), any number of attach_call(), attach_resume(). What
 * calls point to lies in the scratch, which the process sees at scratch_at.
 */
#define ATTACH_SCRATCH_BYTES 256

typedef struct AttachStop AttachStop;
struct AttachStop {
	AttachTarget *target;
	AttachResult *result;
	bool held;    /* it is stopped */
	bool touched; /* a call was made since */
	int64_t deadline;
	uint64_t scratch_at;
	unsigned char found[ATTACH_SCRATCH_BYTES];   /* what was there */
	unsigned char scratch[ATTACH_SCRATCH_BYTES]; /* what the calls see */
	unsigned long registers[32];		     /* as they were */
};

extern const bool attach_has_injector;

bool attach_stop(AttachStop *stop, AttachTarget *target, AttachResult *result);
/* Fills in the scratch, and the arguments that point into it. */
typedef void (*AttachPlan)(AttachStop *stop, unsigned long args[6]);
/* One system call; its result, or -errno, in *ret. False: the process can't be held any more. A signal that comes
 * before the call is delivered first, as if nobody had been there, and the call is planned anew. plan may be NULL. */
bool attach_call(AttachStop *stop, long number, const unsigned long args[6], AttachPlan plan,
		 long *ret);
void attach_resume(AttachStop *stop);
/* Lets go of a thread that could not be stopped in time, if it has stopped since. To be called now and then. */
void attach_settle(AttachTarget *target);

/* push.c: within a stop. */
/* Gives it a descriptor of ours; returns its number there, or -1. */
int attach_push(AttachStop *stop, int fd);
bool attach_close_there(AttachStop *stop, int fd);

/* uffd.c */
/* Flags of HELLO: what is parked in the process. */
bool attach_parked(const AttachTarget *target, uint32_t *ret_flags, AttachResult *result);
bool attach_probe(AttachTarget *target, const AttachRam *ram, AttachResult *result);
/* Returns the userfaultfd, the caller's to close, or -1. */
int attach_uffd_enable(AttachTarget *target, const AttachRam *ram, AttachResult *result);
/* Both leave it parked: attach_close_parked() is for after the answer. */
bool attach_uffd_disable(const AttachTarget *target, const AttachRam *ram, AttachResult *result);
bool attach_fence_on(AttachTarget *target, const AttachRam *ram, AttachResult *result);
bool attach_fence_off(const AttachTarget *target, const AttachRam *ram, AttachResult *result);
/* What was turned off. When it can't be closed now it is the next time: it does nothing. */
void attach_close_parked(AttachTarget *target, AttachResult *result);

/* state.c */
/* fd -1: forget the one kept so far. */
bool attach_store_state_fd(AttachTarget *target, int fd, AttachResult *result);
/* -1 with PR_AGENT_OK: there is none. */
int attach_fetch_state(const AttachTarget *target, AttachResult *result);

/* allocator.c */
typedef struct AttachAllocator {
	pid_t pid;
	int socket; /* the engine's end, owned; -1: there is none, or it was given away */
} AttachAllocator;

/* Before the helper is confined. */
void attach_allocator_fork(AttachAllocator *allocator, bool filter);
/* Has it charged as the process is. Returns the engine's end, which is the caller's to close; -1 with PR_AGENT_OK: both are charged
 * together anyway. */
int attach_allocator(AttachAllocator *allocator, const AttachTarget *target, AttachResult *result);

/* confine.c */
/* Keeps also the other descriptor (-1: none). False: something of it could not be given up; the helper must not serve then. */
bool attach_confine(int socket, int other, bool filter);
/* The same for its child. */
bool attach_confine_allocator(int socket, bool filter);
