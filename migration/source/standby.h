/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Standby paths; source/standby.c has the theory. */
#pragma once

#include "migration/source/role.h"

/* Source: keeps a standby for one of the listed paths. */
typedef struct PrKeeper PrKeeper;

/* The owner: sees to it that every listed path has a keeper; ends all of them. */
void pr_standby_keep(PrSource *source);
void pr_standby_stop(PrSource *source);
/* The owner: makes a path's standby the connection in use. Whatever the outcome, the path's keeper
 * stays away from it until pr_standby_unclaim(). */
PrConnectOutcome pr_standby_activate(PrSource *source, const PrUri *uri, PrResume resume,
				     PrConn **ret_conn, GError **error);
void pr_standby_unclaim(PrSource *source);

/* How good a path's standby is. */
typedef enum PrStandbyRank {
	PR_STANDBY_NONE,
	PR_STANDBY_ON_PROBATION,
	PR_STANDBY_FIT,
} PrStandbyRank;
/* The owner, with the lock held. */
PrStandbyRank pr_standby_rank(PrSource *source, const PrUri *uri);
