/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Control connections that have sent a complete HELLO. A thread gives them to the listener's
 * owner one by one, which may take seconds each. At most PR_HELLOS_MAX wait meanwhile: one more
 * closes one of the host that has most of them (peer-limits.h).
 */
#pragma once

#include "transport/control/control.h"

#define PR_HELLOS_MAX 32

typedef struct PrHelloQueue PrHelloQueue;

/* From the queue's thread. Takes the control; the hello stays the queue's. */
typedef void (*PrHelloHandler)(PrControl *control, const PrHello *hello, void *opaque);

/* Starts the thread. */
PrHelloQueue *pr_hello_queue_new(PrHelloHandler handler, void *opaque, GError **error);
/* Waits for a handler that runs, and closes what still waits. Nobody pushes any more. */
void pr_hello_queue_free(PrHelloQueue *queue);
/* Takes the control and what the hello points to. */
void pr_hello_queue_push(PrHelloQueue *queue, PrControl *control, const PrHello *hello);
