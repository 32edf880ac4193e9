/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A way to a port of this host that does not let the first one through: that one waits, connected, for an answer. */
#pragma once

#include <glib.h>

typedef struct Door Door;

Door *door_new(guint16 to_port);
/* Ends everything that goes through it. */
void door_free(Door *door);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Door, door_free)

guint16 door_port(Door *door);
/* Until somebody waits. */
void door_wait_knocked(Door *door);
/* Turns the one who waits away, and returns when he has gone. */
void door_turn_away(Door *door);
