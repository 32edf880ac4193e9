/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Wakes a thread that sleeps in poll(2): an eventfd that any thread can make readable. The
 * sleeper polls pr_waker_fd() for POLLIN beside its other descriptors. After it woke up it calls
 * pr_waker_drain() first, and then looks at the data that the wake-up is about: so no wake-up is
 * lost. Without a drain the descriptor stays readable, which serves a signal that holds for good,
 * such as the end of a thread.
 *
 * Every function but init and clear may be called from any thread. Several wake-ups before a
 * drain count as one.
 */
#pragma once

#include <gio/gio.h>

typedef struct PrWaker {
	int event_fd; /* constant between init and clear; -1: none */
} PrWaker;

#define PR_WAKER_INIT ((PrWaker){.event_fd = -1})

/* FALSE: PR_RESOURCE_ERROR, and the waker is PR_WAKER_INIT. */
gboolean pr_waker_init(PrWaker *waker, GError **error);
/* Does nothing to a waker that is PR_WAKER_INIT. */
void pr_waker_wake(const PrWaker *waker);
void pr_waker_drain(const PrWaker *waker);
int pr_waker_fd(const PrWaker *waker);
/* Closes the descriptor; idempotent. */
void pr_waker_clear(PrWaker *waker);
