/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A fake engine behind migration/migration.h, and a monitor on top of it that runs in a thread of its own,
 * driven by a scripted client over its real socket.
 */
#pragma once

#include <json-glib/json-glib.h>

#include "migration/migration.h"
#include "monitor/monitor.h"

/* What the monitor asked the engine for last, "" for nothing: "start tcp:a:1 resume", "pause", ….
 * The caller's to g_free(). */
char *fake_last_call(PrMigration *migration);
/* News of a path. */
void fake_tell_path(PrMigration *migration, PrPathState state, const char *reason);
/* The next command fails with this message. */
void fake_fail_next(PrMigration *migration, const char *message);
/* While it is held, who is to listen waits for a name server. */
void fake_hold_names(PrMigration *migration, gboolean hold);
/* Changes the state, from the caller's thread, and reports it as the engine does. */
void fake_set_state(PrMigration *migration, PrState state, const char *reason);

typedef struct Bench {
	char *dir, *path; /* of the QMP socket */
	PrParams params;
	PrMigration *migration;
	PrMonitor *monitor; /* belongs to the thread */
	GMainContext *context;
	GMainLoop *loop;
	GThread *thread;
	int hmp_fd; /* our end of an HMP session */
	int quits;  /* atomic */
} Bench;

/* cmocka fixtures; *state is the Bench. */
int bench_setup(void **state);
int bench_teardown(void **state);

/* A blocking QMP client; every wait is bounded and fails the test when it ends. */
typedef struct Client {
	int fd;
	GString *input;
	GQueue *events; /* JsonNode, seen on the way to an answer */
} Client;

Client *client_new(Bench *bench);
/* As above, with greeting and negotiation done. */
Client *client_ready(Bench *bench);
void client_free(Client *client);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Client, client_free)
void client_send(Client *client, const char *text);
/* The next message, of whatever kind. */
JsonNode *client_receive(Client *client);
/* Sends (nothing when NULL) and returns the answer as text; events are put aside. */
char *client_ask(Client *client, const char *text);
/* The next event, put aside or not yet read, as "STATUS" or "STATUS/REASON". */
char *client_event(Client *client);
/* TRUE when the server has closed the connection. */
gboolean client_at_end(Client *client);

/* Reads a line from a descriptor, without its newline; NULL at the end. */
char *read_text_line(int fd, GString *buffer);
