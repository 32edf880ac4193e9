/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Directories of certificates for tests (make-certs). */
#pragma once

#include <glib.h>

/*
 * A new directory with a CA, a server's certificate for 127.0.0.1, ::1 and localhost, and a
 * client's with the common name "source".
 */
char *certs_new(void);
/* An empty one with the CA of another. */
char *certs_new_beside(const char *of);
/* Adds to a directory: what: further arguments of make-certs. days: its DAYS. */
void certs_add(const char *dir, int days, const char *what);
/* Removes the directory, frees its name. */
void certs_free(char *dir);

/* g_autoptr() for them. */
typedef char Certs;
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Certs, certs_free)
