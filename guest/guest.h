/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A guest: what is migrated. Its RAM is a set of RAM blocks, each backed by a shared memfd that the
 * engine maps as well; everything else it is travels as an opaque device state.
 *
 * Two kinds: `qemu:qmp=PATH[,pid=N][,agent=PATH]` (a stock QEMU: QMP, plus a helper that attaches to it or the
 * preload agent) and `agent:PATH` (a process that links the agent library, include/postroad/agent.h).
 *
 * All calls block, for at most the guest timeout, and are made from migration threads, never from
 * the main loop; each call is safe against the others. Errors are of the domain PR_GUEST_ERROR.
 */
#pragma once

#include <glib.h>
#include <gio/gio.h>
#include <stdint.h>
#include <sys/types.h>

typedef enum PrGuestError {
	PR_GUEST_ERROR_SPEC,	    /* the --guest option is malformed */
	PR_GUEST_ERROR_UNREACHABLE, /* socket missing, refused, or nobody answers */
	PR_GUEST_ERROR_UNSUPPORTED, /* this guest can't be migrated: says which device or option */
	PR_GUEST_ERROR_PERMISSION,  /* userfaultfd refused: says what to do */
	PR_GUEST_ERROR_PROTOCOL,    /* an answer that makes no sense */
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
	uint64_t base;	       /* where the guest process has it mapped */
} PrGuestBlock;

/* Takes a piece of device state; FALSE ends the save. */
typedef gboolean (*PrGuestSink)(const void *data, gsize len, void *opaque, GError **error);
/* The guest's process is gone. Called once, from any thread. */
typedef void (*PrGuestDied)(const char *reason, void *opaque);

/* Somebody has let a guest run that is fenced. what: what was seen and what became of it. seen: when, monotonic us; 0: it
 * ran when the watch began. From any thread. */
typedef void (*PrGuestRanAgain)(const char *what, gint64 seen, void *opaque);

/* A process that keeps the privileges which a guest may need, for an engine that gives them up. */
typedef struct PrGuestHelper {
	int fd;	   /* its socket; -1: there is none */
	pid_t pid; /* to be waited for */
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

	/* Whether a guest of this spec is reached through a helper. NULL: never. */
	gboolean (*wants_helper)(const char *spec);
	/* spec is what follows "KIND:". timeout_ms bounds each later call. Takes the helper (NULL: none was forked),
	 * also when it fails. */
	PrGuest *(*open)(const char *spec, PrGuestHelper *helper, guint timeout_ms, GError **error);
	void (*close)(PrGuest *guest);

	/* Refuses, before anything is touched, what can't be migrated (device, missing option or
	 * kernel feature), naming it and the remedy. Returns the RAM blocks in a stable order; they
	 * belong to the guest and stay valid until close. */
	const PrGuestBlock *(*prepare)(PrGuest *guest, PrGuestRole role, guint *ret_n,
				       GError **error);

	/* Who the guest's process is (process.h): for what is written down about it. g_free() it. */
	char *(*process)(PrGuest *guest);

	/* Instead of prepare(), for an engine that follows one that has died: the blocks as that one knew
	 * them, found again in the guest's process without asking the VMM, whose main loop may be waiting
	 * for a page that only this engine can bring. Refused if they are not the same. */
	const PrGuestBlock *(*adopt)(PrGuest *guest, const PrGuestBlock *known, guint n,
				     GError **error);

	/* Source. is_running(): what stop() is about to say, so that it can be written down first.
	 * assume_stopped(): what an engine that has died since wrote down then; that one may have got no
	 * further, or have begun to save. resume() undoes it. A kind whose process remembers
	 * itself who was stopped says TRUE, and does not believe what it is told. */
	gboolean (*is_running)(PrGuest *guest, gboolean *ret_running, GError **error);
	gboolean (*assume_stopped)(PrGuest *guest, gboolean was_running, GError **error);

	/* While the guest still runs. Source: describe() tells what the destination must be like, save_early() what
	 * it may have early. Destination: load_early() takes the pieces of both as they come, and refuses a guest
	 * that it can't be host to. NULL, all of them: nothing. */
	gboolean (*describe)(PrGuest *guest, PrGuestSink sink, void *opaque, GError **error);
	gboolean (*save_early)(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			       GError **error);
	gboolean (*load_early)(PrGuest *guest, const void *data, gsize len, GError **error);

	/* Source, before stop(), and destination, before load_begin(): readies what the device state needs, so
	 * that it does not count as downtime. resume() undoes it at the source. NULL: nothing to do. */
	gboolean (*prepare_save)(PrGuest *guest, GError **error);
	gboolean (*prepare_load)(PrGuest *guest, GError **error);

	/* Source. stop() remembers whether the guest was running; resume() undoes it (a guest that was
	 * paused stays paused) and is harmless when nothing was stopped. */
	gboolean (*stop)(PrGuest *guest, gboolean *ret_was_running, GError **error);
	gboolean (*resume)(PrGuest *guest, GError **error);
	/* Whether it has not run since stop(): nobody else has let it. Asks nobody, and returns at once. NULL: nobody
	 * else can. */
	gboolean (*check_stopped)(PrGuest *guest, GError **error);
	gboolean (*save)(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			 GError **error);

	/* Destination. load_begin, load_data…, load_end; load_end returns when the state is in
	 * place and the guest is ready to run, and still stopped. Loading touches guest RAM: the
	 * faults are served by other threads meanwhile. load_abort() makes a load in progress on
	 * another thread return soon. */
	gboolean (*load_begin)(PrGuest *guest, GError **error);
	gboolean (*load_data)(PrGuest *guest, const void *data, gsize len, GError **error);
	gboolean (*load_end)(PrGuest *guest, GError **error);
	void (*load_abort)(PrGuest *guest);
	/* Lets the loaded guest run. */
	gboolean (*run)(PrGuest *guest, GError **error);

	/* Destination, before the fault mode is on: thread ids (uint32_t) of the vCPUs, in the guest's order,
	 * as its process sees them; the array is the caller's. Empty: this kind can't tell. */
	GArray *(*vcpu_threads)(PrGuest *guest, GError **error);

	/* Destination: turns the fault mode on for all blocks: a userfaultfd is made in the guest's
	 * process, every block registered MISSING|MINOR, stale page table entries dropped. Returns
	 * the descriptor (non-blocking, the caller's to close) or -1. The agent keeps a duplicate; where the
	 * fault mode is on already, by an engine that has died, it gives that one and changes nothing. */
	int (*uffd_enable)(PrGuest *guest, GError **error);
	/* Unregisters, wakes everybody, closes the agent's duplicate. Harmless when off. */
	gboolean (*uffd_disable)(PrGuest *guest, GError **error);
	/* The guest's process has ended: closes what keeps its address space busy, which is any userfaultfd of it that the guest
	 * object has. NULL: it has none. */
	void (*let_go)(PrGuest *guest);

	/* Destination: the socket of an allocator (allocator.h) that is charged as the guest is. It stays the
	 * guest's; the owner alone calls this. -1 without an error: pages are charged to the guest anyway. NULL: always
	 * so. */
	int (*allocator)(PrGuest *guest, GError **error);

	/* Source, once the guest may run elsewhere: write-protects its RAM here in the kernel, whatever the VMM is
	 * told, until unfence(), also when this engine ends. From fence() on a guest that is let run here is
	 * stopped at once, with or without the protection, and on_run_again() is told. fence() fails where the
	 * protection can't be had. Both harmless when it is so already. */
	gboolean (*fence)(PrGuest *guest, GError **error);
	gboolean (*unfence)(PrGuest *guest, GError **error);
	/* Was it write-protected when this engine came, by one that has died? */
	gboolean (*was_fenced)(PrGuest *guest);
	/* NULL: no more, and no call is in progress when this returns. Not from within such a call. */
	void (*on_run_again)(PrGuest *guest, PrGuestRanAgain ran_again, void *opaque);

	/* The agent keeps the engine's state memfd, and gives it back (a new descriptor, or -1). */
	gboolean (*store_state_fd)(PrGuest *guest, int memfd, GError **error);
	int (*fetch_state)(PrGuest *guest, GError **error);

	/* Watches for the death of the guest's process; NULL: no more,
	 * and no call is in progress when this returns. Not from within such a call. */
	void (*on_death)(PrGuest *guest, PrGuestDied died, void *opaque);
};

/* Before privileges are given up, and before there are threads: forks the helper if a guest of this spec takes one.
 * filter: it may make only the system calls that it needs. */
gboolean pr_guest_begin(const char *spec, gboolean filter, PrGuestHelper *ret, GError **error);
/* Closes its socket and waits for its end. Harmless when there is none. */
void pr_guest_helper_end(PrGuestHelper *helper);

/* spec as given to --guest: "qemu:…" or "agent:…". helper: of pr_guest_begin(), is taken, also when this fails;
 * NULL: one is forked here if it takes one. */
PrGuest *pr_guest_open(const char *spec, PrGuestHelper *helper, guint timeout_ms, GError **error);
void pr_guest_close(PrGuest *guest);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrGuest, pr_guest_close)
