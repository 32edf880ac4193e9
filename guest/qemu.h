/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The parts of the `qemu:` kind: qemu.c (the ops), qemu-check.c (what is refused), qemu-facts.c (what both sides must have
 * in common), qemu-attach.c (which process it is), qemu-ram.c (RAM blocks), qemu-private.c (those that are not shared), qemu-save.c and qemu-load.c (the
 * device state), qemu-section.c (how they travel), qemu-watch.c (the guest stays stopped). */
#pragma once

#include "guest/agent-client.h"
#include "guest/guest.h"
#include "guest/qmp.h"

/* qemu-check.c. Refuses a QEMU that cannot be migrated; touches nothing. fresh: no engine was at work
 * here before, so the run state has to be that of a beginning. */
gboolean pr_qemu_check(PrQmp *qmp, PrGuestRole role, gboolean fresh, GError **error);
/* FALSE, with an error PR_GUEST_ERROR_UNSUPPORTED. */
gboolean pr_qemu_refuse(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* Refuses a QEMU whose RAM is not shared, also one without an agent. */
gboolean pr_qemu_check_ram(PrQmp *qmp, GError **error);
gboolean pr_qemu_version(PrQmp *qmp, guint *ret_major, guint *ret_minor, GError **error);
/* Thread ids (uint32_t) of the vCPUs, in their order. */
GArray *pr_qemu_vcpu_threads(PrQmp *qmp, GError **error);
/* The RAM blocks as PrGuestBlock. */
GArray *pr_qemu_blocks(PrQmp *qmp, PrAgentClient *agent, GError **error);
/* Those that are not among them, as PrQemuPrivateBlock. */
GArray *pr_qemu_private_blocks(PrQmp *qmp, PrAgentClient *agent, GError **error);
/* Where QEMU has a block mapped that `info mtree -f` shows, or 0. */
uint64_t pr_qemu_ask_hva(PrQmp *qmp, const char *mtree, const char *block);

/* qemu-facts.c: the machine type, as in -machine. */
char *pr_qemu_machine(PrQmp *qmp, GError **error);

/* qemu-attach.c: a QEMU that runs already, found by its QMP socket. */
/* pid 0: whoever listens at that socket. Takes the helper. */
PrAgentClient *pr_qemu_attach(GSocket *qmp, const char *qmp_path, pid_t pid, PrGuestHelper *helper,
			      guint timeout_ms, GError **error);
/* What a helper that has ended can't do any more: frees the process of the fault mode. */
void pr_qemu_unregister(int uffd, const PrGuestBlock *blocks, guint n);
/* Refuses a process that is not the QEMU which answers there. named: it was given by pid=. */
gboolean pr_qemu_check_process(PrQmp *qmp, const char *qmp_path, pid_t pid, gboolean named,
			       GError **error);

/*
 * qemu-save.c: the device state of a source's QEMU, which `xen-save-devices-state` writes into a memfd of ours. In spite
 * of its name the command is in every build. With the guest stopped it gives up the locks of disk images,
 * which `cont` takes back.
 */
typedef struct PrQemuSave PrQemuSave;

PrQemuSave *pr_qemu_save_new(PrQmp *qmp, PrAgentClient *agent);
void pr_qemu_save_free(PrQemuSave *save);
/* While the guest runs: what the other side must be like; then private RAM. */
gboolean pr_qemu_save_describe(PrQemuSave *save, PrGuestSink sink, void *opaque, GError **error);
gboolean pr_qemu_save_early(PrQemuSave *save, PrGuestSink sink, void *opaque, GError **error);
/* What needs not be done while the guest is stopped. */
gboolean pr_qemu_save_prepare(PrQemuSave *save, GError **error);
/* With the guest stopped: private RAM that has changed since, and the device state. */
gboolean pr_qemu_save_state(PrQemuSave *save, GCancellable *cancel, PrGuestSink sink, void *opaque,
			    GError **error);
/* Forgets what was prepared. Harmless when nothing was. */
void pr_qemu_save_end(PrQemuSave *save);

/*
 * qemu-load.c: the device state of a destination's QEMU, which reads it as an incoming migration from a socketpair whose
 * other end it gets with getfd.
 */
typedef struct PrQemuLoad PrQemuLoad;

PrQemuLoad *pr_qemu_load_new(PrQmp *qmp, PrAgentClient *agent, guint timeout_ms);
void pr_qemu_load_free(PrQemuLoad *load);
/* For the QMP client: an event came. Reader thread. */
void pr_qemu_load_event(PrQemuLoad *load, const char *name, JsonObject *data);
/* QEMU is gone: nobody needs to wait any more. Returns the reason to tell, which of a QEMU that was loading is what it
 * has said itself; g_free() it. */
char *pr_qemu_load_died(PrQemuLoad *load, const char *reason);

/* What pr_qemu_save_describe() and pr_qemu_save_early() have sent. */
gboolean pr_qemu_load_early(PrQemuLoad *load, const void *data, gsize len, GError **error);
gboolean pr_qemu_load_prepare(PrQemuLoad *load, GError **error);
gboolean pr_qemu_load_begin(PrQemuLoad *load, GError **error);
gboolean pr_qemu_load_data(PrQemuLoad *load, const void *data, gsize len, GError **error);
gboolean pr_qemu_load_end(PrQemuLoad *load, GError **error);
void pr_qemu_load_abort(PrQemuLoad *load);

/*
 * qemu-watch.c: once the guest may run elsewhere, whoever lets it run in this QEMU is seen by QMP's events,
 * and it is stopped at once. The calls of a watch are made by a thread of its own, as they may hang.
 */
typedef struct PrQemuWatch PrQemuWatch;

/* The connection to QMP, which is made when it is needed first; NULL: see error. */
typedef PrQmp *(*PrQemuWatchQmp)(void *opaque, GError **error);

PrQemuWatch *pr_qemu_watch_new(PrQemuWatchQmp qmp, void *opaque);
void pr_qemu_watch_free(PrQemuWatch *watch);
/* Begins, unless it has: looks first whether the guest runs already. */
gboolean pr_qemu_watch_begin(PrQemuWatch *watch, GError **error);
/* Waits for a call in progress, which QMP's timeout bounds. Harmless when there is no watch. */
void pr_qemu_watch_end(PrQemuWatch *watch);
/* For the QMP client: an event came. Reader thread; makes no calls. */
void pr_qemu_watch_event(PrQemuWatch *watch, const char *name);
/* As PrGuestOps.on_run_again. */
void pr_qemu_watch_tell(PrQemuWatch *watch, PrGuestRanAgain ran_again, void *opaque);
