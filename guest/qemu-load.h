/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The device state of a destination's QEMU, which reads it as an incoming migration from a
 * socketpair whose other end it gets with `getfd`.
 */
#pragma once

#include "guest/agent-client.h"
#include "guest/qmp.h"

typedef struct PrQemuLoad PrQemuLoad;

PrQemuLoad *pr_qemu_load_new(PrQmp *qmp, PrAgentClient *agent, guint timeout_ms);
void pr_qemu_load_free(PrQemuLoad *load);
/* An event of QMP has come. Called by the QMP client's reader thread. */
void pr_qemu_load_event(PrQemuLoad *load, const char *name, JsonObject *data);
/* QEMU is gone: ends all waits. Returns the reason to report, which the caller frees. For a QEMU
 * that was loading it is the last text on QEMU's standard error. */
char *pr_qemu_load_died(PrQemuLoad *load, const char *reason);

/* Before the guest stops: handles a piece of pr_qemu_save_describe() and pr_qemu_save_early(). */
gboolean pr_qemu_load_early(PrQemuLoad *load, const void *data, gsize len, GError **error);
/* As PrGuestOps. */
gboolean pr_qemu_load_prepare(PrQemuLoad *load, GError **error);
gboolean pr_qemu_load_begin(PrQemuLoad *load, GError **error);
gboolean pr_qemu_load_data(PrQemuLoad *load, const void *data, gsize len, GError **error);
gboolean pr_qemu_load_end(PrQemuLoad *load, GError **error);
void pr_qemu_load_abort(PrQemuLoad *load);
