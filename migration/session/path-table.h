/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a side knows of each path: its health, its device, its last error, the bytes that it has
 * carried. A path is known by its name: the text of its URI; at the destination with the address
 * that the source has called.
 *
 * All calls with PrSession.lock held. Changes of a path's state are queued as events.
 */
#pragma once

#include "migration/session/events.h"
#include "transport/transport.h"

typedef struct PrPathRecord {
	char *name;
	char *device;	  /* or NULL */
	char *last_error; /* or NULL */
	uint64_t bytes;	  /* of guest RAM; atomic. A connection's are added when it ends */
	PrHealth health;
} PrPathRecord;

typedef struct PrPathTable {
	GPtrArray *records; /* PrPathRecord*, in order of first use */
	PrEvents *events;   /* of the session */
	GCond *changed;	    /* of the session: broadcast when the state of a path changes */
} PrPathTable;

void pr_path_table_init(PrPathTable *self, PrEvents *events, GCond *changed);
void pr_path_table_clear(PrPathTable *self);

/* The record of this name, which is made if there is none. It lives as long as the table. */
PrPathRecord *pr_path_record(PrPathTable *self, const char *name);
void pr_path_step(PrPathTable *self, const char *name, PrHealthEvent event, const char *reason);
/* The connection over this path has ended. The kind of error says whether the path is to blame. */
void pr_path_ended(PrPathTable *self, const char *name, const GError *error);
void pr_path_set_device(PrPathTable *self, const char *name, PrDataPath *path);
uint64_t pr_path_bytes(const PrPathRecord *record);
