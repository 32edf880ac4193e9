/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What two QEMUs must have in common for one to take the other's device state: machine type, CPU model, number of vCPUs,
 * devices with their places, and the private RAM blocks with their sizes. The source tells them, as JSON, while its
 * guest still runs; the destination compares them with its own QEMU's and names what differs.
 *
 * QEMU finds a device's state by its place (bus and address), so that is what is compared, and the device's type. The
 * list is of `info qtree`. Two versions of QEMU model the inside of a machine differently (its ISA and system
 * bus), so there only what a command line puts on a bus is compared.
 */
#pragma once

#include <glib.h>
#include <json-glib/json-glib.h>

#include "guest/qmp.h"

/* The machine type, as in -machine. */
char *pr_qemu_machine(PrQmp *qmp, GError **error);
/* private_blocks: of pr_qemu_private_list(). */
JsonObject *pr_qemu_facts(PrQmp *qmp, const GArray *private_blocks, GError **error);
char *pr_qemu_facts_to_text(JsonObject *facts);
/* Of the other side: not to be trusted. */
JsonObject *pr_qemu_facts_from_text(const char *text, gsize len, GError **error);
/* Whether a guest of `source` can be loaded by `here`; else the error names the first difference and what to do. */
gboolean pr_qemu_facts_check(JsonObject *source, JsonObject *here, GError **error);

/* For its test: the devices in `info qtree`, an array of objects with bus, bus-type, addr, type and id. */
JsonArray *pr_qemu_devices_parse(const char *qtree);
