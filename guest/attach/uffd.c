/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fault mode and the fence: two userfaultfds of the process. The process holds their
 * descriptors itself (parked), so that a fault waits, and does not read zeros, while there is
 * neither helper nor engine.
 *
 * The process has to make the descriptor, since its ioctls act on the address space of the process
 * that made it. The helper does everything else from outside. For userfaultfd(2) the kernel checks
 * the credentials of the calling process; for /dev/userfaultfd it checks those of the process that
 * opened the device. So the helper opens the device, and gives the process that descriptor first.
 *
 * The helper finds Postroad's userfaultfds again by the features that they were opened with. The
 * fault mode has MINOR_SHMEM; the fence has WP_HUGETLBFS_SHMEM without it. QEMU asks for neither.
 * The flags of the open file record the progress (Progress): they mean nothing else, as the process
 * never reads these userfaultfds.
 *
 * Fault mode: register the chosen regions MISSING|MINOR, then drop the page table entries. An
 * access after that faults, whatever was mapped before. Fence: register WP and protect every page.
 * No process reads the fence's userfaultfd, so a thread that writes waits.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/agent/uffd-ranges.h"
#include "guest/attach/attach.h"
#include "guest/attach/internal.h"
#include "guest/attach/crash-point.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif
#define UFFD_FLAGS  (O_CLOEXEC | O_NONBLOCK)
#define UFFD_DEVICE "/dev/userfaultfd"
#define PARKED_MAX  16

/* The progress of a parked userfaultfd, as flags of its open file. */
typedef enum Progress {
	PROGRESS_BEGUN = O_NONBLOCK, /* made; may be registered in part */
	PROGRESS_DONE =
		O_NONBLOCK | O_APPEND, /* all regions are registered; the fence: and protected */
	PROGRESS_OFF = PR_ATTACH_UFFD_OFF, /* unregistered; has to be closed */
} Progress;

/* A userfaultfd in the process. */
typedef struct Parked {
	int there;	   /* its number in the process; -1: none */
	uint64_t features; /* 0: made, and UFFDIO_API not called yet */
	unsigned flags;	   /* Progress */
} Parked;

typedef struct Search {
	const AttachTarget *target;
	Parked found[PARKED_MAX];
	unsigned n;
} Search;

static bool is_uffd(const AttachTarget *target, int fd)
{
	static const char wanted[] = "anon_inode:[userfaultfd]";
	char name[32], text[64];
	ssize_t n;

	snprintf(name, sizeof(name), "fd/%d", fd);
	n = readlinkat(target->proc_fd, name, text, sizeof(text));
	return n == sizeof(wanted) - 1 && !memcmp(text, wanted, n);
}

/* fdinfo has "API:\taa:FEATURES:…", in hexadecimal. */
static bool read_parked(const AttachTarget *target, int fd, Parked *ret)
{
	char name[32], text[1024];
	const char *api, *flags;

	snprintf(name, sizeof(name), "fdinfo/%d", fd);
	if (!attach_target_read(target, name, text, sizeof(text)))
		return false;
	api = attach_field(text, "API");
	flags = attach_field(text, "flags");
	api = api ? strchr(api, ':') : NULL;
	if (!api || !flags)
		return false;
	ret->there = fd;
	ret->features = strtoull(api + 1, NULL, 16);
	ret->flags = strtoul(flags, NULL, 8) & PROGRESS_DONE;
	return true;
}

static bool note_uffd(int fd, void *opaque)
{
	Search *search = opaque;

	if (is_uffd(search->target, fd) &&
	    read_parked(search->target, fd, &search->found[search->n]))
		search->n++;
	return search->n < PARKED_MAX;
}

/* One without features is of neither kind. A helper that died has made it, or QEMU has, and is
 * about to open it. */
static bool is_kind(const Parked *parked, AgentUffdKind kind)
{
	bool minor = parked->features & UFFD_FEATURE_MINOR_SHMEM;
	bool shared = parked->features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM;

	return kind == AGENT_UFFD_FAULTS ? minor : shared && !minor;
}

static Parked find_kind(const Search *search, AgentUffdKind kind)
{
	for (unsigned i = 0; i < search->n; i++) {
		if (is_kind(&search->found[i], kind))
			return search->found[i];
	}
	return (Parked){.there = -1};
}

static bool search_parked(const AttachTarget *target, Search *search, AgentResult *result)
{
	search->target = target;
	search->n = 0;
	return attach_each_fd(target, note_uffd, search) ||
	       attach_fail_access(target, result, "the list of open files");
}

bool attach_parked(const AttachTarget *target, uint32_t *ret_flags, AgentResult *result)
{
	Search search;
	Parked faults, fence;

	if (!search_parked(target, &search, result))
		return false;
	faults = find_kind(&search, AGENT_UFFD_FAULTS);
	fence = find_kind(&search, AGENT_UFFD_FENCE);
	*ret_flags = 0;
	if (faults.there >= 0 && faults.flags != PROGRESS_OFF)
		*ret_flags |= PR_AGENT_FLAG_UFFD_ENABLED;
	/* A fence that a dead helper has not finished does not hold all writers. */
	if (fence.there >= 0 && fence.flags == PROGRESS_DONE)
		*ret_flags |= PR_AGENT_FLAG_FENCE_ON;
	return true;
}

/* Features */

static uint64_t needed_features(const AttachRam *ram, AgentUffdKind kind)
{
	bool hugetlb = false;

	for (unsigned i = 0; i < ram->n; i++)
		hugetlb |= ram->regions[i].chosen &&
			   ram->regions[i].wire.page_size != (uint32_t)sysconf(_SC_PAGESIZE);
	return agent_uffd_needed(kind, hugetlb);
}

static int uffd_of_helper(void)
{
	int device = open(UFFD_DEVICE, O_RDWR | O_CLOEXEC);
	int fd;

	if (device < 0)
		return (int)syscall(SYS_userfaultfd, UFFD_FLAGS | UFFD_USER_MODE_ONLY);
	fd = ioctl(device, USERFAULTFD_IOC_NEW, UFFD_FLAGS);
	close(device);
	return fd;
}

/* UFFDIO_API works once per descriptor, so the question for the features takes one of the helper's
 * own. */
static bool check_features(uint64_t needed, uint64_t *ret_supported, AgentResult *result)
{
	int fd = uffd_of_helper();
	bool ok;

	if (fd < 0)
		return agent_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: %s", strerror(errno));
	ok = agent_uffd_supported(fd, ret_supported, result) &&
	     agent_uffd_check(*ret_supported, needed, result);
	close(fd);
	return ok;
}

/* Making one */

static bool fail_new(AttachStop *stop, long ret)
{
	if (ret == -EPERM)
		return agent_fail(
			stop->result, PR_AGENT_PERMISSION,
			"userfaultfd: the kernel refused it to process %d; run `sysctl "
			"vm.unprivileged_userfaultfd=1`, or give the engine's user access "
			"to " UFFD_DEVICE " (Linux 6.1 or later)",
			(int)stop->target->pid);
	return agent_fail(stop->result, PR_AGENT_UNSUPPORTED, "userfaultfd in process %d: %s",
			  (int)stop->target->pid, strerror((int)-ret));
}

/* The two ways to make one. Both return its number in the process, or -1. */
static int make_by_device(AttachStop *stop, int device)
{
	int there = attach_push(stop, device);
	const unsigned long args[6] = {there, USERFAULTFD_IOC_NEW, UFFD_FLAGS};
	long ret = -1;

	if (there < 0)
		return -1;
	if (!attach_call(stop, SYS_ioctl, args, NULL, &ret) || !attach_close_there(stop, there))
		return -1;
	if (ret < 0)
		fail_new(stop, ret);
	return ret < 0 ? -1 : (int)ret;
}

static int make_by_call(AttachStop *stop)
{
	const unsigned long args[6] = {UFFD_FLAGS};
	long ret;

	if (!attach_call(stop, SYS_userfaultfd, args, NULL, &ret))
		return -1;
	if (ret < 0)
		fail_new(stop, ret);
	return ret < 0 ? -1 : (int)ret;
}

static int make_there(AttachStop *stop)
{
	int device = open(UFFD_DEVICE, O_RDWR | O_CLOEXEC);
	int there = device >= 0 ? make_by_device(stop, device) : make_by_call(stop);

	agent_close_fd(&device);
	if (there >= 0)
		pr_attach_crash_point(PR_ATTACH_CRASH_UFFD_MADE);
	return there;
}

/* With the device it works. Without, only a try shows whether the kernel lets this process make
 * one. */
static bool try_to_make(AttachStop *stop)
{
	int device = open(UFFD_DEVICE, O_RDWR | O_CLOEXEC);
	int there;

	if (device >= 0) {
		close(device);
		return true;
	}
	there = make_by_call(stop);
	return there >= 0 && attach_close_there(stop, there);
}

bool attach_probe(AttachTarget *target, const AttachRam *ram, AgentResult *result)
{
	uint64_t supported;
	AttachStop stop;
	bool ok;

	if (!check_features(needed_features(ram, AGENT_UFFD_FAULTS), &supported, result) ||
	    !attach_stop(&stop, target, result))
		return false;
	ok = try_to_make(&stop);
	attach_resume(&stop);
	return ok;
}

/* Opens the one with this number for use. Returns the helper's duplicate of it, or -1. */
static int open_api(const AttachTarget *target, int there, uint64_t features, AgentResult *result)
{
	int uffd = attach_target_fd(target, there);

	if (uffd < 0)
		attach_fail_access(target, result, "taking the userfaultfd");
	else if (agent_uffd_api(uffd, features, result))
		pr_attach_crash_point(PR_ATTACH_CRASH_UFFD_READY);
	else
		agent_close_fd(&uffd);
	return uffd;
}

/* The helper's duplicate of the parked userfaultfd of this kind; -1: there is none, or see
 * *result. */
static int dup_parked(const AttachTarget *target, AgentUffdKind kind, Parked *ret_parked,
		      AgentResult *result)
{
	Search search;
	int uffd;

	*ret_parked = (Parked){.there = -1};
	if (!search_parked(target, &search, result))
		return -1;
	*ret_parked = find_kind(&search, kind);
	if (ret_parked->there < 0)
		return -1;
	uffd = attach_target_fd(target, ret_parked->there);
	if (uffd < 0)
		attach_fail_access(target, result, "taking the userfaultfd");
	return uffd;
}

/* One that a dead helper has made and not opened. QEMU opens its own in the main thread at once,
 * which is stopped here between two system calls of its main loop; so an unopened one is not
 * QEMU's. */
static int find_unopened(const AttachTarget *target)
{
	Search search;
	AgentResult ignored;

	if (!search_parked(target, &search, &ignored))
		return -1;
	for (unsigned i = 0; i < search.n; i++) {
		if (!search.found[i].features)
			return search.found[i].there;
	}
	return -1;
}

/* Makes the userfaultfd; within a stop. Returns the helper's duplicate, or -1. */
static int make(AttachStop *stop, const AttachRam *ram, AgentUffdKind kind)
{
	uint64_t supported, needed = needed_features(ram, kind);
	int there;

	if (!check_features(needed, &supported, stop->result))
		return -1;
	if (kind == AGENT_UFFD_FAULTS)
		needed |= supported & UFFD_FEATURE_THREAD_ID;
	there = find_unopened(stop->target);
	if (there < 0)
		there = make_there(stop);
	return there < 0 ? -1 : open_api(stop->target, there, needed, stop->result);
}

/* The RAM */

static bool set_progress(int uffd, Progress progress)
{
	return fcntl(uffd, F_SETFL, progress) == 0;
}

static bool register_all(int uffd, const AttachRam *ram, AgentUffdKind kind, AgentResult *result)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].chosen &&
		    !agent_uffd_register(uffd, &ram->regions[i].wire, kind, result))
			return false;
	}
	pr_attach_crash_point(PR_ATTACH_CRASH_REGISTERED);
	return true;
}

/* Unregisters the chosen regions; where none were chosen, all of them, which is harmless where
 * nothing is registered. */
static void unregister_all(int uffd, const AttachRam *ram)
{
	set_progress(uffd, PROGRESS_BEGUN);
	for (unsigned i = 0; i < ram->n; i++) {
		if (!ram->chosen || ram->regions[i].chosen)
			agent_uffd_unregister(uffd, ram->regions[i].wire.base,
					      ram->regions[i].wire.size);
	}
	set_progress(uffd, PROGRESS_OFF);
	pr_attach_crash_point(PR_ATTACH_CRASH_UNREGISTERED);
}

static bool drop_entries(AttachStop *stop, const PrAgentWireRegion *region)
{
	static const int advice[] = {MADV_DONTNEED, MADV_DONTNEED_LOCKED};
	long ret = -EINVAL;

	/* The second advice is for locked memory (-overcommit mem-lock=on). */
	for (unsigned i = 0; i < 2 && ret == -EINVAL; i++) {
		const unsigned long args[6] = {region->base, region->size, advice[i]};

		if (!attach_call(stop, SYS_madvise, args, NULL, &ret))
			return false;
	}
	return !ret || agent_fail(stop->result, PR_AGENT_FAILED, "RAM at 0x%llx: MADV_DONTNEED: %s",
				  (unsigned long long)region->base, strerror((int)-ret));
}

static bool drop_all_entries(AttachStop *stop, const AttachRam *ram)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].chosen && !drop_entries(stop, &ram->regions[i].wire))
			return false;
	}
	pr_attach_crash_point(PR_ATTACH_CRASH_ENTRIES_DROPPED);
	return true;
}

static bool protect_all(int uffd, const AttachRam *ram, AgentResult *result)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].chosen &&
		    !agent_uffd_protect(uffd, &ram->regions[i].wire, result))
			return false;
	}
	return true;
}

/* The operations */

/* Within a stop. Makes the userfaultfd unless one is parked (*uffd), and does all further steps,
 * which a helper that died may have left undone. */
static bool set_up(AttachStop *stop, const AttachRam *ram, AgentUffdKind kind, int *uffd)
{
	if (*uffd < 0)
		*uffd = make(stop, ram, kind);
	return *uffd >= 0 && set_progress(*uffd, PROGRESS_BEGUN) &&
	       register_all(*uffd, ram, kind, stop->result) &&
	       (kind == AGENT_UFFD_FENCE || drop_all_entries(stop, ram));
}

/* Whether it is Postroad's, and unregistered. */
static bool is_off(const Parked *parked)
{
	return parked->flags == PROGRESS_OFF &&
	       (is_kind(parked, AGENT_UFFD_FAULTS) || is_kind(parked, AGENT_UFFD_FENCE));
}

/* Within a stop. */
static void close_all_off(AttachStop *stop, const Search *search)
{
	for (unsigned i = 0; i < search->n && stop->stopped; i++) {
		if (is_off(&search->found[i]) && attach_close_there(stop, search->found[i].there))
			pr_attach_crash_point(PR_ATTACH_CRASH_UFFD_CLOSED);
	}
}

void attach_close_parked(AttachTarget *target, AgentResult *result)
{
	AttachStop stop;
	Search search;
	bool any = false;

	if (!search_parked(target, &search, result))
		return;
	for (unsigned i = 0; i < search.n; i++)
		any |= is_off(&search.found[i]);
	if (!any || !attach_stop(&stop, target, result))
		return;
	close_all_off(&stop, &search);
	attach_resume(&stop);
}

static bool turn_on(AttachTarget *target, const AttachRam *ram, AgentUffdKind kind, int *uffd,
		    AgentResult *result)
{
	AgentResult ignored = {0};
	AttachStop stop;
	Search search;
	bool ok;

	if (!attach_stop(&stop, target, result))
		return false;
	ok = set_up(&stop, ram, kind, uffd);
	if (!ok && *uffd >= 0) {
		unregister_all(*uffd, ram);
		stop.result = &ignored;
		if (search_parked(target, &search, &ignored))
			close_all_off(&stop, &search);
	}
	attach_resume(&stop);
	return ok;
}

/* False with a refusal: no CHOOSE came before. */
static bool check_chosen(const AttachRam *ram, AgentResult *result)
{
	return ram->chosen || agent_fail(result, PR_AGENT_FAILED,
					 "the engine has not said which memory is the guest's RAM");
}

int attach_uffd_enable(AttachTarget *target, const AttachRam *ram, AgentResult *result)
{
	Parked parked;
	int uffd;

	if (!check_chosen(ram, result))
		return -1;
	uffd = dup_parked(target, AGENT_UFFD_FAULTS, &parked, result);
	if (result->status != PR_AGENT_OK)
		return -1;
	if (uffd >= 0 && parked.flags == PROGRESS_DONE)
		return uffd;
	if (turn_on(target, ram, AGENT_UFFD_FAULTS, &uffd, result)) {
		set_progress(uffd, PROGRESS_DONE);
		pr_attach_crash_point(PR_ATTACH_CRASH_MARKED);
		return uffd;
	}
	agent_close_fd(&uffd);
	return -1;
}

static bool turn_off(const AttachTarget *target, const AttachRam *ram, AgentUffdKind kind,
		     AgentResult *result)
{
	Parked parked;
	int uffd = dup_parked(target, kind, &parked, result);

	if (uffd < 0)
		return result->status == PR_AGENT_OK;
	unregister_all(uffd, ram);
	close(uffd);
	return true;
}

bool attach_uffd_disable(const AttachTarget *target, const AttachRam *ram, AgentResult *result)
{
	return turn_off(target, ram, AGENT_UFFD_FAULTS, result);
}

bool attach_fence_on(AttachTarget *target, const AttachRam *ram, AgentResult *result)
{
	Parked parked;
	bool ok;
	int uffd;

	if (!check_chosen(ram, result))
		return false;
	uffd = dup_parked(target, AGENT_UFFD_FENCE, &parked, result);
	if (result->status != PR_AGENT_OK)
		return false;
	ok = (uffd >= 0 && parked.flags != PROGRESS_OFF
		      ? register_all(uffd, ram, AGENT_UFFD_FENCE, result)
		      : turn_on(target, ram, AGENT_UFFD_FENCE, &uffd, result)) &&
	     protect_all(uffd, ram, result);
	if (ok)
		set_progress(uffd, PROGRESS_DONE);
	agent_close_fd(&uffd);
	return ok;
}

bool attach_fence_off(const AttachTarget *target, const AttachRam *ram, AgentResult *result)
{
	return turn_off(target, ram, AGENT_UFFD_FENCE, result);
}
