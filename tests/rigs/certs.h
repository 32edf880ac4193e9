/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Directories of certificates for tests (make-certs). */
#pragma once

#include <glib.h>

/*
 * Makes a directory with a CA, a server's certificate for 127.0.0.1, ::1 and localhost, and a
 * client's with the common name "source".
 */
char *certs_new(void);
/* Makes a directory with the CA of another one, and no certificates. */
char *certs_new_beside(const char *of);
/* Adds certificates to a directory. days: their DAYS; what: further arguments of make-certs. */
void certs_add(const char *dir, int days, const char *what);
/* Removes the directory, frees its name. */
void certs_free(char *dir);

/* g_autoptr() for them. */
typedef char Certs;
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Certs, certs_free)
