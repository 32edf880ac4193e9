/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Types and constants that all rooms of migration/ share. */
#pragma once

#include <glib.h>

typedef enum PrMigrationError {
	PR_MIGRATION_ERROR_BUSY,     /* a migration is in progress */
	PR_MIGRATION_ERROR_STATE,    /* the command makes no sense in this state; says which */
	PR_MIGRATION_ERROR_URI,	     /* malformed URI or unknown scheme */
	PR_MIGRATION_ERROR_LISTEN,   /* could not listen */
	PR_MIGRATION_ERROR_MISMATCH, /* the block tables of the two sides differ */
	PR_MIGRATION_ERROR_PEER,     /* the other side gave up; its reason */
	PR_MIGRATION_ERROR_PROTOCOL, /* the other side broke the protocol */
	PR_MIGRATION_ERROR_CANCELLED,
	PR_MIGRATION_ERROR_SYSTEM, /* the kernel refused something */
} PrMigrationError;
#define PR_MIGRATION_ERROR pr_migration_error_quark()
GQuark pr_migration_error_quark(void);

#define PR_LATENCY_BUCKETS 24 /* bucket N: [2^N us, 2^(N+1) us), as QEMU's postcopy-latency-dist */
