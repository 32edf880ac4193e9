/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fault mode and the fence: userfaultfds of the process's, which it holds itself (parked), so that a fault
 * waits, and does not read zeros, while there is neither helper nor engine.
 *
 * The process makes the descriptor, since its address space is the one that counts; everything else is done from
 * outside. Who may make one is judged by the credentials of the caller, but /dev/userfaultfd by those of the opener:
 * so a descriptor of that device of ours goes into the process first.
 *
 * Ours are found again by the features they were opened with: MINOR_SHMEM for faults, WP_HUGETLBFS_SHMEM without it
 * for the fence; QEMU asks for neither. How far it has come is kept in the flags of the open file (Progress), which
 * mean nothing for a userfaultfd that nobody reads in the process.
 *
 * Faults: MISSING|MINOR over the chosen regions, then the page table entries are dropped: an access after that
 * faults, whatever was mapped before. Fence: WP, and every page is protected. Nobody reads that one: who writes waits.
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

#include "guest/agent/uffd-features.h"
#include "guest/attach/attach.h"
#include "guest/attach/internal.h"
#include "guest/attach/kill.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif
#define UFFD_FLAGS    (O_CLOEXEC | O_NONBLOCK)
#define UFFD_DEVICE   "/dev/userfaultfd"
#define PARKED_MAX    16
#define PROTECT_BYTES (1ull << 30) /* at once: the process's mappings are locked meanwhile */

typedef enum Kind { KIND_FAULTS, KIND_FENCE } Kind;

/* The flags of its open file. */
typedef enum Progress {
	PROGRESS_BEGUN = O_NONBLOCK,	       /* made; perhaps registered, in part */
	PROGRESS_DONE = O_NONBLOCK | O_APPEND, /* all is in force */
	PROGRESS_OFF = PR_ATTACH_UFFD_OFF,     /* unregistered, waits to be closed */
} Progress;

/* A userfaultfd in the process. */
typedef struct Parked {
	int there;	   /* its number; -1: none */
	uint64_t features; /* 0: made, and not opened yet */
	unsigned flags;
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

/* "API:\taa:FEATURES:…", in hexadecimal. */
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

static bool see_fd(int fd, void *opaque)
{
	Search *search = opaque;

	if (is_uffd(search->target, fd) &&
	    read_parked(search->target, fd, &search->found[search->n]))
		search->n++;
	return search->n < PARKED_MAX;
}

/* One without features was made by a helper that died, or is in the hands of QEMU, which opens it at once. */
static bool is_kind(const Parked *parked, Kind kind)
{
	bool minor = parked->features & UFFD_FEATURE_MINOR_SHMEM;
	bool shared = parked->features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM;

	return kind == KIND_FAULTS ? minor : shared && !minor;
}

static Parked pick(const Search *search, Kind kind)
{
	for (unsigned i = 0; i < search->n; i++) {
		if (is_kind(&search->found[i], kind))
			return search->found[i];
	}
	return (Parked){.there = -1};
}

static bool search_parked(const AttachTarget *target, Search *search, AttachResult *result)
{
	search->target = target;
	search->n = 0;
	return attach_each_fd(target, see_fd, search) ||
	       attach_fail_access(target, result, "the list of open files");
}

bool attach_parked(const AttachTarget *target, uint32_t *ret_flags, AttachResult *result)
{
	Search search;
	Parked faults, fence;

	if (!search_parked(target, &search, result))
		return false;
	faults = pick(&search, KIND_FAULTS);
	fence = pick(&search, KIND_FENCE);
	*ret_flags = 0;
	if (faults.there >= 0 && faults.flags != PROGRESS_OFF)
		*ret_flags |= PR_AGENT_FLAG_FAULT_ON;
	/* One that a dead helper has not finished holds nobody off. */
	if (fence.there >= 0 && fence.flags == PROGRESS_DONE)
		*ret_flags |= PR_AGENT_FLAG_FENCE_ON;
	return true;
}

/* Features */

static bool has_hugetlb(const AttachRam *ram)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].chosen &&
		    ram->regions[i].wire.page_size != (uint32_t)sysconf(_SC_PAGESIZE))
			return true;
	}
	return false;
}

static uint64_t needed_features(const AttachRam *ram, Kind kind)
{
	uint64_t features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;

	if (kind == KIND_FENCE)
		return UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
	if (has_hugetlb(ram))
		features |= UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
	return features;
}

static bool check_features(uint64_t supported, uint64_t needed, AttachResult *result)
{
	const AgentFeature *missing = agent_missing_feature(supported, needed);

	return !missing ||
	       attach_fail(result, PR_AGENT_UNSUPPORTED,
			   "userfaultfd: this kernel has no UFFD_FEATURE_%s; use Linux %s or later",
			   missing->name, missing->since);
}

static int uffd_of_ours(void)
{
	int device = open(UFFD_DEVICE, O_RDWR | O_CLOEXEC);
	int fd;

	if (device < 0)
		return (int)syscall(SYS_userfaultfd, UFFD_FLAGS | UFFD_USER_MODE_ONLY);
	fd = ioctl(device, USERFAULTFD_IOC_NEW, UFFD_FLAGS);
	close(device);
	return fd;
}

/* A descriptor shakes hands once only, so the question takes one of our own. */
static bool supported_features(uint64_t *ret_features, AttachResult *result)
{
	struct uffdio_api api = {.api = UFFD_API};
	int fd = uffd_of_ours();
	bool ok;

	if (fd < 0)
		return attach_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: %s",
				   strerror(errno));
	ok = ioctl(fd, UFFDIO_API, &api) == 0;
	if (!ok)
		attach_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: UFFDIO_API: %s",
			    strerror(errno));
	*ret_features = api.features;
	close(fd);
	return ok;
}

/* Making one */

static bool fail_new(AttachStop *stop, long ret)
{
	if (ret == -EPERM)
		return attach_fail(
			stop->result, PR_AGENT_PERMISSION,
			"userfaultfd: the kernel refused it to process %d; run `sysctl "
			"vm.unprivileged_userfaultfd=1`, or give the engine's user access "
			"to " UFFD_DEVICE " (Linux 6.1 or later)",
			(int)stop->target->pid);
	return attach_fail(stop->result, PR_AGENT_UNSUPPORTED, "userfaultfd in process %d: %s",
			   (int)stop->target->pid, strerror((int)-ret));
}

/* Each returns its number there, or -1. */
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

	attach_close_fd(&device);
	if (there >= 0)
		pr_attach_point(PR_ATTACH_UFFD_MADE);
	return there;
}

/* Without the device, whether the process gets one is for the kernel to say. */
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

bool attach_probe(AttachTarget *target, const AttachRam *ram, AttachResult *result)
{
	uint64_t supported;
	AttachStop stop;
	bool ok;

	if (!supported_features(&supported, result) ||
	    !check_features(supported, needed_features(ram, KIND_FAULTS), result) ||
	    !attach_stop(&stop, target, result))
		return false;
	ok = try_to_make(&stop);
	attach_resume(&stop);
	return ok;
}

/* Opens one for use: our descriptor of it, or -1. */
static int shake_hands(const AttachTarget *target, int there, uint64_t features,
		       AttachResult *result)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	int uffd = attach_target_fd(target, there);

	if (uffd < 0) {
		attach_fail_access(target, result, "taking the userfaultfd");
		return -1;
	}
	if (ioctl(uffd, UFFDIO_API, &api) == 0) {
		pr_attach_point(PR_ATTACH_UFFD_READY);
		return uffd;
	}
	attach_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: UFFDIO_API: %s", strerror(errno));
	close(uffd);
	return -1;
}

/* Ours of this kind, or one that a dead helper had just made; -1: there is none. */
static int take_parked(const AttachTarget *target, Kind kind, Parked *ret_parked,
		       AttachResult *result)
{
	Search search;
	int uffd;

	*ret_parked = (Parked){.there = -1};
	if (!search_parked(target, &search, result))
		return -1;
	*ret_parked = pick(&search, kind);
	if (ret_parked->there < 0)
		return -1;
	uffd = attach_target_fd(target, ret_parked->there);
	if (uffd < 0)
		attach_fail_access(target, result, "taking the userfaultfd");
	return uffd;
}

/* One that was made and not opened: within a stop, QEMU's main thread is not about to do that itself. */
static int take_unopened(const AttachTarget *target)
{
	Search search;
	AttachResult ignored;

	if (!search_parked(target, &search, &ignored))
		return -1;
	for (unsigned i = 0; i < search.n; i++) {
		if (!search.found[i].features)
			return search.found[i].there;
	}
	return -1;
}

/* Within a stop. */
static int make(AttachStop *stop, const AttachRam *ram, Kind kind)
{
	uint64_t supported, needed = needed_features(ram, kind);
	int there;

	if (!supported_features(&supported, stop->result) ||
	    !check_features(supported, needed, stop->result))
		return -1;
	if (kind == KIND_FAULTS)
		needed |= supported & UFFD_FEATURE_THREAD_ID;
	there = take_unopened(stop->target);
	if (there < 0)
		there = make_there(stop);
	return there < 0 ? -1 : shake_hands(stop->target, there, needed, stop->result);
}

/* Ranges */

static bool set_progress(int uffd, Progress progress)
{
	return fcntl(uffd, F_SETFL, progress) == 0;
}

static bool register_region(int uffd, const PrAgentWireRegion *region, Kind kind,
			    AttachResult *result)
{
	struct uffdio_register reg = {
		.range = {.start = region->base, .len = region->size},
		.mode = kind == KIND_FENCE
				? UFFDIO_REGISTER_MODE_WP
				: UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};
	unsigned needed = kind == KIND_FENCE ? _UFFDIO_WRITEPROTECT : _UFFDIO_CONTINUE;

	if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
		return attach_fail(result, PR_AGENT_FAILED,
				   "userfaultfd: RAM at 0x%llx: UFFDIO_REGISTER: %s%s",
				   (unsigned long long)region->base, strerror(errno),
				   errno == EBUSY
					   ? "; the process has another userfaultfd there: a "
					     "migration or snapshot of QEMU's own?"
					   : "");
	return (reg.ioctls & (1ULL << needed)) ||
	       attach_fail(result, PR_AGENT_UNSUPPORTED,
			   "userfaultfd: RAM at 0x%llx: this kernel offers no %s there",
			   (unsigned long long)region->base,
			   kind == KIND_FENCE ? "UFFDIO_WRITEPROTECT" : "UFFDIO_CONTINUE");
}

static bool register_all(int uffd, const AttachRam *ram, Kind kind, AttachResult *result)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].chosen &&
		    !register_region(uffd, &ram->regions[i].wire, kind, result))
			return false;
	}
	pr_attach_point(PR_ATTACH_REGISTERED);
	return true;
}

/* Wakes whoever waits: unregistering does so only for pages that are missing, and not for writers. Harmless where
 * nothing is registered; where nothing was chosen: everywhere. */
static void unregister_all(int uffd, const AttachRam *ram)
{
	set_progress(uffd, PROGRESS_BEGUN);
	for (unsigned i = 0; i < ram->n; i++) {
		struct uffdio_range range = {
			.start = ram->regions[i].wire.base,
			.len = ram->regions[i].wire.size,
		};

		if (ram->chosen && !ram->regions[i].chosen)
			continue;
		(void)ioctl(uffd, UFFDIO_UNREGISTER, &range);
		(void)ioctl(uffd, UFFDIO_WAKE, &range);
	}
	set_progress(uffd, PROGRESS_OFF);
	pr_attach_point(PR_ATTACH_UNREGISTERED);
}

static bool drop_entries(AttachStop *stop, const PrAgentWireRegion *region)
{
	static const int advice[] = {MADV_DONTNEED, MADV_DONTNEED_LOCKED};
	long ret = -EINVAL;

	/* The second is for locked memory (-overcommit mem-lock=on). */
	for (unsigned i = 0; i < 2 && ret == -EINVAL; i++) {
		const unsigned long args[6] = {region->base, region->size, advice[i]};

		if (!attach_call(stop, SYS_madvise, args, NULL, &ret))
			return false;
	}
	return !ret ||
	       attach_fail(stop->result, PR_AGENT_FAILED, "RAM at 0x%llx: MADV_DONTNEED: %s",
			   (unsigned long long)region->base, strerror((int)-ret));
}

static bool drop_all_entries(AttachStop *stop, const AttachRam *ram)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].chosen && !drop_entries(stop, &ram->regions[i].wire))
			return false;
	}
	pr_attach_point(PR_ATTACH_ENTRIES_DROPPED);
	return true;
}

static bool protect(int uffd, const PrAgentWireRegion *region, AttachResult *result)
{
	for (uint64_t at = 0; at < region->size; at += PROTECT_BYTES) {
		uint64_t left = region->size - at;
		struct uffdio_writeprotect wp = {
			.range = {.start = region->base + at,
				  .len = left < PROTECT_BYTES ? left : PROTECT_BYTES},
			.mode = UFFDIO_WRITEPROTECT_MODE_WP,
		};
		int err;

		do {
			err = ioctl(uffd, UFFDIO_WRITEPROTECT, &wp);
		} while (err < 0 && (errno == EAGAIN || errno == EINTR));
		if (err < 0)
			return attach_fail(result, PR_AGENT_FAILED,
					   "userfaultfd: RAM at 0x%llx: UFFDIO_WRITEPROTECT: %s",
					   (unsigned long long)wp.range.start, strerror(errno));
	}
	return true;
}

static bool protect_all(int uffd, const AttachRam *ram, AttachResult *result)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].chosen && !protect(uffd, &ram->regions[i].wire, result))
			return false;
	}
	return true;
}

/* The operations */

/* Within a stop: what a parked one of another time has not come to, or all of it. */
static bool set_up(AttachStop *stop, const AttachRam *ram, Kind kind, int *uffd)
{
	if (*uffd < 0)
		*uffd = make(stop, ram, kind);
	return *uffd >= 0 && set_progress(*uffd, PROGRESS_BEGUN) &&
	       register_all(*uffd, ram, kind, stop->result) &&
	       (kind == KIND_FENCE || drop_all_entries(stop, ram));
}

/* Whether it is one of ours, and does nothing any more. */
static bool is_off(const Parked *parked)
{
	return parked->flags == PROGRESS_OFF &&
	       (is_kind(parked, KIND_FAULTS) || is_kind(parked, KIND_FENCE));
}

/* Within a stop. */
static void close_those_off(AttachStop *stop, const Search *search)
{
	for (unsigned i = 0; i < search->n && stop->held; i++) {
		if (is_off(&search->found[i]) && attach_close_there(stop, search->found[i].there))
			pr_attach_point(PR_ATTACH_UFFD_CLOSED);
	}
}

void attach_close_parked(AttachTarget *target, AttachResult *result)
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
	close_those_off(&stop, &search);
	attach_resume(&stop);
}

static bool turn_on(AttachTarget *target, const AttachRam *ram, Kind kind, int *uffd,
		    AttachResult *result)
{
	AttachResult ignored = {0};
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
			close_those_off(&stop, &search);
	}
	attach_resume(&stop);
	return ok;
}

static bool refuse_unchosen(const AttachRam *ram, AttachResult *result)
{
	return ram->chosen ||
	       attach_fail(result, PR_AGENT_FAILED,
			   "the engine has not said which memory is the guest's RAM");
}

int attach_uffd_enable(AttachTarget *target, const AttachRam *ram, AttachResult *result)
{
	Parked parked;
	int uffd;

	if (!refuse_unchosen(ram, result))
		return -1;
	uffd = take_parked(target, KIND_FAULTS, &parked, result);
	if (result->status != PR_AGENT_OK)
		return -1;
	if (uffd >= 0 && parked.flags == PROGRESS_DONE)
		return uffd;
	if (turn_on(target, ram, KIND_FAULTS, &uffd, result)) {
		set_progress(uffd, PROGRESS_DONE);
		pr_attach_point(PR_ATTACH_MARKED);
		return uffd;
	}
	attach_close_fd(&uffd);
	return -1;
}

static bool turn_off(const AttachTarget *target, const AttachRam *ram, Kind kind,
		     AttachResult *result)
{
	Parked parked;
	int uffd = take_parked(target, kind, &parked, result);

	if (uffd < 0)
		return result->status == PR_AGENT_OK;
	unregister_all(uffd, ram);
	close(uffd);
	return true;
}

bool attach_uffd_disable(const AttachTarget *target, const AttachRam *ram, AttachResult *result)
{
	return turn_off(target, ram, KIND_FAULTS, result);
}

bool attach_fence_on(AttachTarget *target, const AttachRam *ram, AttachResult *result)
{
	Parked parked;
	bool ok;
	int uffd;

	if (!refuse_unchosen(ram, result))
		return false;
	uffd = take_parked(target, KIND_FENCE, &parked, result);
	if (result->status != PR_AGENT_OK)
		return false;
	ok = (uffd >= 0 && parked.flags != PROGRESS_OFF
		      ? register_all(uffd, ram, KIND_FENCE, result)
		      : turn_on(target, ram, KIND_FENCE, &uffd, result)) &&
	     protect_all(uffd, ram, result);
	if (ok)
		set_progress(uffd, PROGRESS_DONE);
	attach_close_fd(&uffd);
	return ok;
}

bool attach_fence_off(const AttachTarget *target, const AttachRam *ram, AttachResult *result)
{
	return turn_off(target, ram, KIND_FENCE, result);
}
