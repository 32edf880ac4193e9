/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A fake engine that implements migration/migration.h, and a monitor for it in a thread of its own.
 * A scripted client drives the monitor over its real socket.
 */
#pragma once

#include <json-glib/json-glib.h>

#include "migration/migration.h"
#include "monitor/monitor.h"

/* Returns the monitor's last call to the engine, such as "start tcp:a:1 resume" or "pause"; "":
 * none yet. Free it with g_free(). */
char *fake_last_call(PrMigration *migration);
/* Reports a path's new state to the monitor. */
void fake_report_path(PrMigration *migration, PrPathState state, const char *reason);
/* The next command fails with this message. */
void fake_fail_next(PrMigration *migration, const char *message);
/* While blocked, commands that listen wait for a name server. */
void fake_block_names(PrMigration *migration, gboolean hold);
/* Sets the state in the caller's thread, and reports it to the monitor as the engine does. */
void fake_set_state(PrMigration *migration, PrState state, const char *reason);

typedef struct Bench {
	char *dir, *path; /* of the QMP socket */
	PrParams params;
	PrMigration *migration;
	PrMonitor *monitor; /* owned by the monitor's thread */
	GMainContext *context;
	GMainLoop *loop;
	GThread *thread;
	int hmp_fd; /* the test's end of an HMP session */
	int quits;  /* atomic */
} Bench;

/* cmocka fixtures; *state is the Bench. */
int bench_setup(void **state);
int bench_teardown(void **state);

/* A blocking QMP client. A wait that takes too long fails the test. */
typedef struct Client {
	int fd;
	GString *input;
	GQueue *events; /* JsonNode; events that came before an answer */
} Client;

Client *client_new(Bench *bench);
/* The same, after greeting and negotiation. */
Client *client_ready(Bench *bench);
void client_free(Client *client);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Client, client_free)
void client_send(Client *client, const char *text);
/* Returns the next message of any kind. */
JsonNode *client_receive(Client *client);
/* Sends text (NULL: nothing) and returns the next answer. Events that come first are queued. */
char *client_request(Client *client, const char *text);
/* Returns the next event, queued or not read yet, as "STATUS" or "STATUS/REASON". */
char *client_event(Client *client);
/* Reads to the end of the connection. TRUE: the server has closed it in time. */
gboolean client_at_end(Client *client);

/* Reads a line from a descriptor, without its newline. NULL: the end. */
char *read_text_line(int fd, GString *buffer);
