/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The facts that two QEMUs must have in common for one to load the other's device state: machine
 * type, CPU model, number of vCPUs, devices with their places, and the private RAM blocks with
 * their sizes. The source sends its facts as JSON while its guest still runs. The destination
 * compares them with those of its own QEMU, and names the difference.
 *
 * QEMU finds a device's state by the device's place (bus and address). So place and type of each
 * device are compared, as `info qtree` lists them. Two versions of QEMU model the inside of a
 * machine differently (its ISA and system bus). Between two versions only the devices are compared
 * that a command line puts on a bus.
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
/* Parses the source's text, which is not trusted. */
JsonObject *pr_qemu_facts_from_text(const char *text, gsize len, GError **error);
/* Whether `here` can load a guest of `source`; else the error names the first difference and the
 * remedy. */
gboolean pr_qemu_facts_check(JsonObject *source, JsonObject *here, GError **error);

/* For its test: the devices in `info qtree`, an array of objects with bus, bus-type, addr, type and
 * id. */
JsonArray *pr_qemu_devices_parse(const char *qtree);
