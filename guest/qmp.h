/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A QMP client. A thread of its own, with its own GMainContext, reads the socket. Calls may be made
 * from any thread and at the same time; each has a timeout. Errors are of the domain
 * PR_GUEST_ERROR, and name the socket and the command.
 *
 * Bytes that are not JSON objects, or an object that is too long, end the connection with
 * PR_GUEST_ERROR_PROTOCOL.
 */
#pragma once

#include <gio/gio.h>
#include <json-glib/json-glib.h>

#include "guest/guest.h"

typedef struct PrQmp PrQmp;

/* Called from the reader thread: must not make calls. data may be NULL. */
typedef void (*PrQmpEvent)(const char *name, JsonObject *data, void *opaque);

/* Connects, waits for the greeting, negotiates. on_event sees every event from then on. */
PrQmp *pr_qmp_open(const char *path, guint timeout_ms, PrQmpEvent on_event, void *opaque,
		   GError **error);
/* The same in two steps. The first does not wait, even if QEMU does not answer. The second waits
 * for the greeting, and takes the socket, also when it fails. */
GSocket *pr_qmp_connect(const char *path, GError **error);
PrQmp *pr_qmp_open_over(GSocket *socket, const char *path, guint timeout_ms, PrQmpEvent on_event,
			void *opaque, GError **error);
/* Joins the reader: never from a callback. */
void pr_qmp_free(PrQmp *qmp);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrQmp, pr_qmp_free)

/* Executes a command and returns its "return". Takes arguments (NULL: none). fd, if not -1, is sent
 * with the command (for getfd), and stays the caller's. */
JsonNode *pr_qmp_execute(PrQmp *qmp, const char *command, JsonObject *arguments, int fd,
			 GError **error);
/* The same, without the answer. */
gboolean pr_qmp_command(PrQmp *qmp, const char *command, JsonObject *arguments, int fd,
			GError **error);
/* A command without arguments whose "return" is an object; the caller's to unref. */
JsonObject *pr_qmp_query(PrQmp *qmp, const char *command, GError **error);
/* The output of a line of the human monitor. */
char *pr_qmp_human(PrQmp *qmp, const char *line, GError **error);

/* died is called once when the connection ends: from the reader thread, or from here if it has
 * ended already. */
void pr_qmp_on_death(PrQmp *qmp, PrGuestDied died, void *opaque);
