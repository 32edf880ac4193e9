/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A guest, which is migrated. Its RAM is a set of RAM blocks, each backed by a shared memfd that
 * the engine maps as well. The rest of the guest travels as an opaque device state.
 *
 * Two kinds: `qemu:qmp=PATH[,pid=N][,agent=PATH]` (a stock QEMU: QMP, plus a helper that attaches
 * to it or the preload agent) and `agent:PATH` (a process that links the agent library,
 * include/postroad/agent.h).
 *
 * All calls block, for at most the guest timeout. They are made by migration threads, never by the
 * main loop, and may be made at the same time. Errors are of the domain PR_GUEST_ERROR.
 */
#pragma once

#include <glib.h>
#include <gio/gio.h>
#include <stdint.h>
#include <sys/types.h>

typedef enum PrGuestError {
	PR_GUEST_ERROR_SPEC,	    /* the --guest option is malformed */
	PR_GUEST_ERROR_UNREACHABLE, /* socket missing or refused, or no answer */
	PR_GUEST_ERROR_UNSUPPORTED, /* this guest can't be migrated; names the device or option */
	PR_GUEST_ERROR_PERMISSION,  /* userfaultfd refused; says what to do */
	PR_GUEST_ERROR_PROTOCOL,    /* an answer that breaks the protocol */
	PR_GUEST_ERROR_REFUSED,	    /* the guest answered with an error of its own */
	PR_GUEST_ERROR_DIED,	    /* the guest's process is gone */
	PR_GUEST_ERROR_TIMEOUT,
} PrGuestError;
#define PR_GUEST_ERROR pr_guest_error_quark()
GQuark pr_guest_error_quark(void);

typedef enum PrGuestRole { PR_GUEST_SOURCE, PR_GUEST_DESTINATION } PrGuestRole;

/* One RAM block. The same block has the same idstr, size and page size on both sides. */
typedef struct PrGuestBlock {
	char *idstr;	       /* at most 255 bytes */
	uint64_t size;	       /* bytes, a multiple of page_size */
	uint32_t page_size;    /* bytes: 4096, or the huge page size of the memfd */
	int memfd;	       /* owned by the guest object */
	uint64_t memfd_offset; /* bytes */
	uint64_t base;	       /* the address at which the guest's process has it mapped */
} PrGuestBlock;

/* Handles a piece of device state; FALSE ends the save. */
typedef gboolean (*PrGuestSink)(const void *data, gsize len, void *opaque, GError **error);
/* The guest's process has ended. Called once, from any thread. */
typedef void (*PrGuestDied)(const char *reason, void *opaque);

/* A fenced guest was let run, not by this engine. what: a text with the event and its outcome.
 * seen: the time of the event, monotonic us; 0: the guest ran when the watch began. Called from any
 * thread. */
typedef void (*PrGuestRanAgain)(const char *what, gint64 seen, void *opaque);

/* A process that keeps the privileges for attaching to a guest, so that the engine can give them
 * up. */
typedef struct PrGuestHelper {
	int fd;	   /* its socket; -1: there is none */
	pid_t pid; /* the engine waits for it */
} PrGuestHelper;
#define PR_GUEST_HELPER_NONE                                                                       \
	{                                                                                          \
		-1, 0                                                                              \
	}

typedef struct PrGuestOps PrGuestOps;
typedef struct PrGuest {
	const PrGuestOps *ops;
} PrGuest;

struct PrGuestOps {
	const char *kind;

	/* Whether a guest of this spec needs a helper. NULL: never. */
	gboolean (*wants_helper)(const char *spec);
	/* spec follows "KIND:". timeout_ms bounds each later call. Takes the helper if the guest
	 * needs it, also when it fails. */
	PrGuest *(*open)(const char *spec, PrGuestHelper *helper, guint timeout_ms, GError **error);
	void (*close)(PrGuest *guest);

	/* Refuses a guest that can't be migrated (device, missing option or kernel feature) before
	 * anything is changed; names the cause and the remedy. Returns the RAM blocks in a stable
	 * order; they belong to the guest and stay valid until close. */
	const PrGuestBlock *(*prepare)(PrGuest *guest, PrGuestRole role, guint *ret_n,
				       GError **error);

	/* Identifies the guest's process (process.h), for records. g_free() it. */
	char *(*process)(PrGuest *guest);

	/* Instead of prepare(), for an engine that follows one that has died. Finds the RAM blocks
	 * that the other engine knew in the guest's process. Does not ask the VMM, whose main loop
	 * may wait for a page that only this engine can bring. Refused if the blocks are not the
	 * same. */
	const PrGuestBlock *(*adopt)(PrGuest *guest, const PrGuestBlock *known, guint n,
				     GError **error);

	/* Source. is_running() returns what stop() will return, so that it can be recorded before
	 * the stop. assume_stopped() is for an engine that follows one that has died: it passes
	 * what that one recorded. The dead engine may have stopped the guest or not, or have begun
	 * to save. resume() undoes it. A kind whose process remembers itself whether the guest ran
	 * returns TRUE from is_running(), and ignores was_running. */
	gboolean (*is_running)(PrGuest *guest, gboolean *ret_running, GError **error);
	gboolean (*assume_stopped)(PrGuest *guest, gboolean was_running, GError **error);

	/* While the guest still runs. Source: describe() sends the facts that the destination has
	 * to match, save_early() sends state ahead of the stop. Destination: load_early() handles
	 * the pieces of both as they come, and refuses a guest that does not fit. All three may be
	 * NULL: nothing is sent. */
	gboolean (*describe)(PrGuest *guest, PrGuestSink sink, void *opaque, GError **error);
	gboolean (*save_early)(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			       GError **error);
	gboolean (*load_early)(PrGuest *guest, const void *data, gsize len, GError **error);

	/* Source, before stop(), and destination, before load_begin(): prepares the transfer of the
	 * device state, which would lengthen the downtime. resume() undoes it at the source. NULL:
	 * nothing to do. */
	gboolean (*prepare_save)(PrGuest *guest, GError **error);
	gboolean (*prepare_load)(PrGuest *guest, GError **error);

	/* Source. stop() remembers whether the guest was running. resume() lets it run again in
	 * that case; it is harmless when nothing was stopped. */
	gboolean (*stop)(PrGuest *guest, gboolean *ret_was_running, GError **error);
	gboolean (*resume)(PrGuest *guest, GError **error);
	/* Fails if the guest has run since stop(), as another client of the VMM has let it. Returns
	 * at once, without a question to the VMM. NULL: no other client can. */
	gboolean (*check_stopped)(PrGuest *guest, GError **error);
	gboolean (*save)(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			 GError **error);

	/* Destination. load_begin, load_data…, load_end; load_end returns when the state is loaded
	 * and the guest is ready to run, but stopped. Loading touches guest RAM; other threads
	 * serve the faults meanwhile. load_abort() makes a load in progress on another thread
	 * return soon. */
	gboolean (*load_begin)(PrGuest *guest, GError **error);
	gboolean (*load_data)(PrGuest *guest, const void *data, gsize len, GError **error);
	gboolean (*load_end)(PrGuest *guest, GError **error);
	void (*load_abort)(PrGuest *guest);
	/* Lets the loaded guest run. */
	gboolean (*run)(PrGuest *guest, GError **error);

	/* Destination, before the fault mode is on: thread ids (uint32_t) of the vCPUs, in the
	 * guest's order and in the pid namespace of its process. The caller frees the array. Empty:
	 * this kind does not know them. */
	GArray *(*vcpu_threads)(PrGuest *guest, GError **error);

	/* Destination: turns the fault mode on for all blocks. A userfaultfd is made in the guest's
	 * process, every block is registered MISSING|MINOR, and stale page table entries are
	 * dropped. Returns the descriptor (non-blocking, the caller closes it) or -1. The agent
	 * keeps a duplicate. If an engine that has died has turned the fault mode on already, this
	 * returns that userfaultfd and changes nothing. */
	int (*uffd_enable)(PrGuest *guest, GError **error);
	/* Unregisters, wakes all waiting threads, closes the agent's duplicate. Harmless when
	 * off. */
	gboolean (*uffd_disable)(PrGuest *guest, GError **error);
	/* The guest's process has ended: closes the guest object's duplicate of its userfaultfd,
	 * which keeps the address space alive. NULL: it has no duplicate. */
	void (*close_uffd)(PrGuest *guest);

	/* Destination: the socket of an allocator (allocator.h) in the guest's memory cgroup. The
	 * guest object owns it; only the guest's owner may call this. -1 without an error: pages
	 * are charged to the guest anyway. NULL: they always are. */
	int (*allocator)(PrGuest *guest, GError **error);

	/* Source, once the guest may run elsewhere. fence() write-protects its RAM here in the
	 * kernel, whatever the VMM is told to do. The protection lasts until unfence(), also when
	 * this engine ends. From fence() on, a guest that is let run here is stopped at once, with
	 * or without the protection. Then the observer of on_run_again() is called. fence() fails
	 * where the kernel refuses the protection. Both are harmless when repeated. */
	gboolean (*fence)(PrGuest *guest, GError **error);
	gboolean (*unfence)(PrGuest *guest, GError **error);
	/* Whether an engine that has died has write-protected the guest before this engine
	 * attached. */
	gboolean (*was_fenced)(PrGuest *guest);
	/* Sets the observer. NULL: no observer any more, and no call is in progress when this
	 * returns. Not from within such a call. */
	void (*on_run_again)(PrGuest *guest, PrGuestRanAgain ran_again, void *opaque);

	/* The agent stores the engine's state memfd (-1: closes it), and returns a duplicate of it,
	 * or -1. */
	gboolean (*store_state_fd)(PrGuest *guest, int memfd, GError **error);
	int (*fetch_state)(PrGuest *guest, GError **error);

	/* Sets the observer of the end of the guest's process. NULL: no observer any more, and no
	 * call is in progress when this returns. Not from within such a call. */
	void (*on_death)(PrGuest *guest, PrGuestDied died, void *opaque);
};

/* Forks the helper if a guest of this spec needs one. To be called before the engine gives
 * privileges up, and before it has threads. filter: the helper may make only the system calls that
 * it needs. */
gboolean pr_guest_fork_helper(const char *spec, gboolean filter, PrGuestHelper *ret,
			      GError **error);
/* Closes the helper's socket and waits for its end. Harmless without a helper. */
void pr_guest_helper_end(PrGuestHelper *helper);

/* spec as given to --guest: "qemu:…" or "agent:…". Takes the helper of pr_guest_fork_helper(), also
 * when this fails. helper NULL: this forks one if the guest needs it. */
PrGuest *pr_guest_open(const char *spec, PrGuestHelper *helper, guint timeout_ms, GError **error);
void pr_guest_close(PrGuest *guest);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrGuest, pr_guest_close)
