/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Questions to a QEMU that several files of the `qemu:` kind ask. */
#pragma once

#include "guest/qmp.h"

/* Sets an error PR_GUEST_ERROR_UNSUPPORTED; returns FALSE. */
gboolean pr_qemu_refuse(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);

/* Executes a command whose "return" is an array. Takes arguments (NULL: none). The array belongs to
 * *ret_node, which the caller frees. */
JsonArray *pr_qemu_execute_array(PrQmp *qmp, const char *command, JsonObject *arguments,
				 JsonNode **ret_node, GError **error);
/* A string of the object at that place of the array. NULL: not an object, or it has no such
 * string. */
const char *pr_qemu_element_string(JsonArray *array, guint i, const char *member);
/* The arguments of a command about a QOM path. */
JsonObject *pr_qemu_path_arguments(const char *path);

gboolean pr_qemu_version(PrQmp *qmp, guint *ret_major, guint *ret_minor, GError **error);
/* Thread ids (uint32_t) of the vCPUs, in the order of the vCPUs. */
GArray *pr_qemu_vcpu_threads(PrQmp *qmp, GError **error);
/* The host address at which QEMU has mapped a block that `info mtree -f` shows, or 0. */
uint64_t pr_qemu_query_hva(PrQmp *qmp, const char *mtree, const char *block);
