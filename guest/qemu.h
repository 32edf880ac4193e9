/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The parts of the `qemu:` kind: qemu.c (the ops), qemu-check.c (what is refused), qemu-stream.c (the
 * device state), qemu-attach.c (which process it is), qemu-settings.c (what QEMU migrates with), qemu-ram.c (RAM blocks). */
#pragma once

#include "guest/agent-client.h"
#include "guest/guest.h"
#include "guest/qmp.h"

/* qemu-check.c. Refuses a QEMU that cannot be migrated; touches nothing. fresh: no engine was at work
 * here before, so the run state has to be that of a beginning. */
gboolean pr_qemu_check(PrQmp *qmp, PrGuestRole role, gboolean fresh, GError **error);
/* Refuses a QEMU whose RAM is not shared, also one without an agent. */
gboolean pr_qemu_check_ram(PrQmp *qmp, GError **error);
/* Thread ids (uint32_t) of the vCPUs, in their order. */
GArray *pr_qemu_vcpu_threads(PrQmp *qmp, GError **error);
/* The RAM blocks as PrGuestBlock. */
GArray *pr_qemu_blocks(PrQmp *qmp, PrAgentClient *agent, GError **error);

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
 * qemu-stream.c: QEMU's own migration stream, through a socketpair whose other end QEMU gets with
 * getfd. With x-ignore-shared it holds the device state and private RAM only.
 */
typedef struct PrQemuStream PrQemuStream;

PrQemuStream *pr_qemu_stream_new(PrQmp *qmp, guint timeout_ms);
void pr_qemu_stream_free(PrQemuStream *stream);
/* For the QMP client: an event came. Reader thread. */
void pr_qemu_stream_event(PrQemuStream *stream, const char *name, JsonObject *data);
/* QEMU is gone: nobody needs to wait any more. */
void pr_qemu_stream_died(PrQemuStream *stream, const char *reason);

/* Makes QEMU ready for a save or a load, which otherwise does that itself. */
gboolean pr_qemu_stream_prepare(PrQemuStream *stream, GError **error);
/* Begins the save of a guest that runs, which QEMU stops in the course of it; returns when it has stopped. */
gboolean pr_qemu_stream_stop(PrQemuStream *stream, GError **error);
/* Goes on with the save, or begins that of a guest that does not run. */
gboolean pr_qemu_stream_save(PrQemuStream *stream, GCancellable *cancel, PrGuestSink sink,
			     void *opaque, GError **error);
/* As if this one had saved, or begun to: for the traces of an engine that has died. What QEMU was set to before
 * is not known; undo() sets its defaults. */
void pr_qemu_stream_follow(PrQemuStream *stream);
/* Ends a save in progress and undoes what it, or preparing it, changed in QEMU. Harmless when there was none. */
gboolean pr_qemu_stream_undo(PrQemuStream *stream, GError **error);

gboolean pr_qemu_stream_load_begin(PrQemuStream *stream, GError **error);
gboolean pr_qemu_stream_load_data(PrQemuStream *stream, const void *data, gsize len,
				  GError **error);
gboolean pr_qemu_stream_load_end(PrQemuStream *stream, GError **error);
void pr_qemu_stream_load_abort(PrQemuStream *stream);

/* qemu-settings.c. */
void pr_qemu_add_capability(JsonArray *list, const char *name, gboolean on);
/* From all capabilities as QEMU tells them: how those that must differ have to be, and how they are. */
void pr_qemu_plan_capabilities(JsonArray *found, JsonArray *wanted, JsonArray *old);
gboolean pr_qemu_set_capabilities(PrQmp *qmp, JsonArray *list, GError **error);
/* Bytes a second, of QEMU's own migration. */
gboolean pr_qemu_set_bandwidth(PrQmp *qmp, gint64 bandwidth, GError **error);
gboolean pr_qemu_query_bandwidth(PrQmp *qmp, gint64 *ret_bandwidth, GError **error);
