/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A scripted QMP server for tests. It serves one connection, on a thread of its own, and answers
 * each command from a table.
 *
 * The key is the command's name with some arguments: "query-status", "qom-list PATH", "qom-get PATH
 * PROPERTY", "human-monitor-command LINE", "migrate-set-capabilities", … An unknown key is answered
 * with CommandNotFound. The answer is JSON for "return", or one of the FAKE_… below.
 */
#pragma once

#include <glib.h>

typedef struct FakeQmp FakeQmp;

#define FAKE_SILENCE "!silence" /* no answer */
#define FAKE_CLOSE   "!close"	/* closes the connection */
#define FAKE_HOLD    "!hold"	/* answers {} after the answer to the next command */
#define FAKE_RAW     "!raw "	/* sends the rest of the text unchanged */
#define FAKE_ERROR   "!error "	/* an error of class GenericError with this description */

/* greeting: NULL for the usual one, "" for none. */
FakeQmp *fake_qmp_new(const char *greeting);
/*
 * Waits for the server's thread. The client must be gone by then, or the server must have closed
 * the connection.
 */
void fake_qmp_free(FakeQmp *fake);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(FakeQmp, fake_qmp_free)

const char *fake_qmp_path(FakeQmp *fake);
void fake_qmp_set(FakeQmp *fake, const char *key, const char *answer);
/* Sends raw text that is not an answer, once a client is connected. */
void fake_qmp_send(FakeQmp *fake, const char *text);
/* How often the client has sent a command. */
guint fake_qmp_count(FakeQmp *fake, const char *key);
/* The command's last arguments, as JSON; NULL: none. */
char *fake_qmp_arguments(FakeQmp *fake, const char *key);
/* The last descriptor that came, which the caller closes; -1: none. */
int fake_qmp_take_fd(FakeQmp *fake);

/* The bytes that `xen-save-devices-state` writes to the last descriptor that came. */
void fake_qmp_set_state(FakeQmp *fake, const void *bytes, gsize len);

/*
 * Sets the answers of a QEMU 7.2 with 64 MiB of shared RAM in a backend named "mem". Its guest can
 * be migrated unless the test changes an answer.
 */
void fake_qmp_set_healthy(FakeQmp *fake);
