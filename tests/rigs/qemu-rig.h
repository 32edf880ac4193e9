/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The parts of a QEMU, for tests of the `qemu:` kind: the monitor is a fake (fake-qmp.h), the agent
 * is real. */
#pragma once

#include "guest/guest.h"
#include "postroad/agent.h"
#include "tests/rigs/fake-qmp.h"

#define RAM		 (64u << 20)
#define QEMU_RIG_TIMEOUT 20000 /* ms; the machine may be busy with other tests */

typedef struct Qemu {
	FakeQmp *fake;
	PrAgent *agent;
	char *dir;
	char *socket;
	void *map; /* RAM bytes */
	int memfd;
	PrGuest *guest; /* NULL before qemu_attach() */
} Qemu;

Qemu *qemu_new(void);
void qemu_attach(Qemu *qemu);
void qemu_free(Qemu *qemu);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Qemu, qemu_free)

/* The last arguments of that command contain these words. */
void assert_arguments(Qemu *qemu, const char *key, const char *words);
/* There is an error, whose message contains these words. */
void assert_says(const GError *error, const char *words);
