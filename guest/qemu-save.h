/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The device state of a source's QEMU, which `xen-save-devices-state` writes into a memfd of the
 * engine's. In spite of its name the command is in every build. With the guest stopped it releases
 * the locks of disk images, which `cont` takes again.
 */
#pragma once

#include "guest/agent-client.h"
#include "guest/qmp.h"

typedef struct PrQemuSave PrQemuSave;

PrQemuSave *pr_qemu_save_new(PrQmp *qmp, PrAgentClient *agent);
void pr_qemu_save_free(PrQemuSave *save);
/* While the guest runs: sends the facts that the destination's QEMU has to match, then private
 * RAM. */
gboolean pr_qemu_save_describe(PrQemuSave *save, PrGuestSink sink, void *opaque, GError **error);
gboolean pr_qemu_save_early(PrQemuSave *save, PrGuestSink sink, void *opaque, GError **error);
/* While the guest runs: the steps that would lengthen the downtime. */
gboolean pr_qemu_save_prepare(PrQemuSave *save, GError **error);
/* With the guest stopped: sends private RAM that has changed since, and the device state. */
gboolean pr_qemu_save_state(PrQemuSave *save, GCancellable *cancel, PrGuestSink sink, void *opaque,
			    GError **error);
/* Undoes pr_qemu_save_prepare(). Harmless without it. */
void pr_qemu_save_end(PrQemuSave *save);
