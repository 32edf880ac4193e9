/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The QMP server: JSON over a unix socket, as QEMU speaks it. */
#pragma once

#include <json-glib/json-glib.h>

#include "monitor/waits.h"

typedef struct PrQmpServer PrQmpServer;

PrQmpServer *pr_qmp_server_new(PrMonitor *monitor, const char *path, GError **error);
/* Sends an event to every client that has negotiated. Takes the object. */
void pr_qmp_server_event(PrQmpServer *server, JsonObject *event);
void pr_qmp_server_free(PrQmpServer *server);
