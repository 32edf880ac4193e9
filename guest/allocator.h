/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The allocator allocates pages of the guest's memfds for an engine that is about to fill them.
 *
 * The kernel charges a page of a memfd to the memory cgroup of the process that touches it first,
 * or that allocates it with fallocate(2). An engine that places a guest's pages would be charged
 * for the whole guest. So it asks a process in the guest's memory cgroup to allocate the pages
 * first. That is a thread of the agent in the guest's own process (guest/agent/), or a child of the
 * attach helper. The helper has moved the child into that cgroup (guest/attach/allocator.c).
 *
 * The engine speaks to the allocator over a SOCK_SEQPACKET pair. Two kinds of requests have no
 * reply. FILE gives the allocator a descriptor of the file with that number. END gives it a
 * descriptor whose becoming readable ends it. Two kinds have a reply. PAGES allocates a range of a
 * file. TABLES allocates the page tables of a range of the guest's address space, whose userfaultfd
 * is the file. The kernel charges page tables to the process that maps a page there first, which
 * would be the engine.
 *
 * The allocator never frees or changes what it has allocated. It ends when its socket is closed, or
 * when the engine breaks the protocol.
 *
 * libc only: the agent lives in other people's VMMs.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PR_ALLOCATOR_FILES 67 /* the RAM blocks, the engine's own bitmaps, and the userfaultfd */
#define PR_ALLOCATOR_TABLE (2ull * 1024 * 1024) /* bytes that one page table maps */

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
/* Sends a request, with a descriptor unless fd is -1. Does not wait for the reply. False: see
 * errno. */
bool pr_allocator_send(int socket, const PrAllocatorRequest *request, int fd);

/* The memory cgroup that a text like /proc/PID/cgroup names, as a path below the mount point of its
 * hierarchy. *ret_v1: it is in the memory controller's own hierarchy. False: the text names none,
 * or the path does not fit. */
bool pr_memory_cgroup(const char *text, char *ret, size_t bytes, bool *ret_v1);
/* Whether both processes are in the same memory cgroup, as far as /proc shows it. */
bool pr_memory_cgroup_is_shared(pid_t one, pid_t other);
