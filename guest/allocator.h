/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The allocator: who allocates the pages of the guest's memfds for an engine that is about to fill them.
 *
 * The kernel charges a page of a memfd to the memory cgroup of the process that touches it first, or that asks for it
 * with fallocate(2). An engine that brings a guest's memory in would be charged for the whole guest. So it asks a process in the
 * guest's memory cgroup to allocate pages first: a thread of the agent in the guest's own process (guest/agent/), or
 * a child of the attach helper, which the helper has put into that cgroup (guest/attach/allocator.c).
 *
 * The engine speaks to it over a SOCK_SEQPACKET pair. Two kinds of requests are not answered: FILE gives it a
 * descriptor of the file with that number, END one that becomes readable when it is to end. Two are: PAGES
 * allocates a range of a file. TABLES allocates the page tables of a range of the guest's address space, whose userfaultfd is the
 * file; they are charged to whoever maps a page there first, and that would be the engine. Nothing that was allocated is ever given
 * back or changed. It ends when its socket is closed, or breaks the protocol.
 *
 * libc only, for the agent lives in other people's VMMs.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PR_ALLOCATOR_FILES 67 /* the RAM blocks, the engine's own bitmaps, and the userfaultfd */
#define PR_ALLOCATOR_TABLE (2ull * 1024 * 1024) /* bytes; what one page table maps */

typedef enum PrAllocatorOp {
	PR_ALLOCATOR_FILE = 1, /* with a descriptor */
	PR_ALLOCATOR_END,      /* with a descriptor */
	PR_ALLOCATOR_PAGES,
	PR_ALLOCATOR_TABLES,
} PrAllocatorOp;

typedef struct PrAllocatorRequest {
	uint32_t op; /* PrAllocatorOp */
	uint32_t id;
	uint32_t file;
	uint32_t spare;		 /* 0 */
	uint64_t offset, length; /* bytes within the file; TABLES: addresses */
} PrAllocatorRequest;

typedef struct PrAllocatorReply {
	uint32_t id;
	int32_t code; /* 0, or an errno */
} PrAllocatorReply;

/* Serves until the end. The socket stays the caller's. */
void pr_allocator_serve(int socket);
/* Sends a request; fd -1: none goes with it. Does not wait. False: see errno. */
bool pr_allocator_send(int socket, const PrAllocatorRequest *request, int fd);

/* Which memory cgroup a text like /proc/PID/cgroup names, as a path below where its hierarchy is mounted. *ret_v1: it is of
 * the memory controller's own hierarchy. False: none, or it does not fit. */
bool pr_memory_cgroup(const char *text, char *ret, size_t bytes, bool *ret_v1);
/* Whether both processes are charged together, as far as can be seen. */
bool pr_memory_cgroup_is_shared(pid_t one, pid_t other);
