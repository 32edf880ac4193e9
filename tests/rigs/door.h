/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A proxy in front of a port of this host. It accepts the first connection and forwards nothing: the
 * client waits for an answer. Later connections are forwarded.
 */
#pragma once

#include <glib.h>

typedef struct Door Door;

Door *door_new(guint16 to_port);
/* Ends everything that goes through it. */
void door_free(Door *door);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Door, door_free)

guint16 door_port(Door *door);
/* Waits until the first client has connected. */
void door_wait_knocked(Door *door);
/* Closes the first client's connection, and returns when the client has closed it, too. */
void door_turn_away(Door *door);
