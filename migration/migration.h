/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One migration of one guest, either side: what the monitor and the program use. All calls are safe
 * from any thread, take no lock that is held over I/O, and return at once; progress shows in
 * pr_migration_query() and in events.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "guest/guest.h"
#include "migration/core/params.h"
#include "migration/core/state.h"
#include "migration/core/types.h"
#include "migration/postcopy/blocktime.h"
#include "migration/session/events.h"
#include "transport/health.h"
#include "transport/net/tls.h"

typedef struct PrMigration PrMigration;

/* A path as the operator sees it. */
typedef struct PrPathInfo {
	char *uri;	      /* at the destination with the address that the source has called */
	PrPathState state;    /* transport/health.h */
	char *device;	      /* the RDMA device or provider, or NULL */
	char *last_error;     /* or NULL */
	uint64_t since_ms;    /* since the last change of state */
	uint64_t rtt_us;      /* of the control channel; 0: not known */
	uint64_t data_rtt_us; /* of the lanes, as last probed; 0: not known */
	uint64_t bytes;	      /* of guest RAM carried */
	gboolean pulls;	      /* it is a rail: the path in use, or a standby that pulls along */
} PrPathInfo;

/* A snapshot. Times in ms unless the name says otherwise; bytes and pages are of guest RAM. */
typedef struct PrMigrationInfo {
	PrRole role; /* PR_ROLE_NONE before the first command */
	PrState state;
	char *reason;	  /* of the last change of state, or NULL */
	char *error_desc; /* why the migration failed, or NULL */
	char uuid[37];
	uint64_t epoch;

	uint64_t total_time;
	uint64_t setup_time;
	uint64_t downtime;
	uint64_t total;		    /* bytes of guest RAM */
	uint64_t remaining;	    /* bytes not yet in place at the destination */
	uint64_t transferred;	    /* bytes of guest RAM that travelled */
	uint64_t normal;	    /* pages that travelled */
	uint64_t duplicate;	    /* zero pages and holes, in pages */
	uint64_t postcopy_requests; /* READs for faults */
	guint rails;		    /* paths over which pages are pulled; 0: none is in use */
	uint64_t page_size;
	double mbps;	      /* over the last second, Mbit/s */
	uint64_t expected_ms; /* time left at this rate; 0: not known */

	uint64_t pauses;      /* how often postcopy-paused was entered */
	uint64_t recoveries;  /* how often it was left for postcopy-active */
	uint64_t time_paused; /* total, the current pause included */
	uint64_t last_pause;  /* length of the last pause, the current one included */
	uint64_t
		last_recovery; /* from command (source) or HELLO (destination) to postcopy-active */
	uint64_t pages_at_pause; /* pages in place when the last pause began */

	/* destination only */
	uint64_t faults;	   /* resolved */
	uint64_t fault_latency_ns; /* mean */
	uint64_t fault_latency_max_ns;
	uint64_t fault_repeats; /* reports of faults that were pending already (repeats.h) */
	uint64_t latency_dist[PR_LATENCY_BUCKETS];
	uint64_t readahead_pages;  /* read ahead of faults */
	uint64_t readahead_waited; /* of these, those that a fault waited for when they landed */
	PrBlocktimeInfo blocktime; /* threads NULL: nothing known yet */

	gboolean fenced;	 /* source: the guest's RAM is write-protected here */
	gboolean verifies;	 /* either side: pages are compared with the source's hashes */
	uint64_t verified_pages; /* that were equal */
	uint64_t corrupt_reads;	 /* pages that came in wrong, and were read again */
	char *last_corrupt;	 /* the last of these, or NULL */

	GPtrArray *paths; /* PrPathInfo */

	uint64_t stalls;  /* how often a thread stayed at one point for too long */
	char *last_stall; /* NULL: never */
} PrMigrationInfo;
void pr_migration_info_clear(PrMigrationInfo *info);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PrMigrationInfo, pr_migration_info_clear)

/* Neither guest nor params are owned; both outlive the migration. */
PrMigration *pr_migration_new(PrGuest *guest, PrParams *params, const PrMigrationHooks *hooks);
/* Cancels what may be cancelled, leaves a paused or running postcopy as a path failure for the
 * other side, joins all threads. */
void pr_migration_free(PrMigration *migration);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrMigration, pr_migration_free)
/* The watchdog of its threads. Other threads may use it, and free their watches first. */
struct PrWatchdog *pr_migration_watchdog(PrMigration *migration);
/* Before the first command; without it connections are plain, and come in from this host only. */
void pr_migration_secure(PrMigration *migration, const PrSecurity *security);

/*
 * An engine follows one that has died (resume.c). Both come before the first command, from the
 * thread that made the migration, and may block for the guest's timeout.
 *
 * keep_record(): the source writes down, in a file of this directory, what its next engine has to
 * know. spec: the guest, as in --guest. Without this call nothing is written. Refuses a file that
 * it does not understand.
 *
 * resume(): goes on with the migration that the last engine of this guest has left. asked: with
 * --resume; without, it fails where there is a migration to go on with. *ret_role: this side's role
 * now; PR_ROLE_NONE: there was no such migration.
 */
gboolean pr_migration_keep_record(PrMigration *migration, const char *dir, const char *spec,
				  GError **error);
gboolean pr_migration_resume(PrMigration *migration, gboolean asked, PrRole *ret_role,
			     GError **error);

/* Source: `migrate URI[,URI…]`, and with resume `migrate -r`. The first path that connects is
 * used. */
gboolean pr_migration_start(PrMigration *migration, const char *uris, gboolean resume,
			    GError **error);
/* Destination: listens on all of the URIs (`--incoming`, `migrate-incoming`). This and the next one
 * wait for the look-up of names, at most 5 s each or until cancelled, and may be called from any
 * thread. */
gboolean pr_migration_incoming(PrMigration *migration, const char *uris, GCancellable *cancel,
			       GError **error);
/* Destination: adds listeners, the old ones stay open (`migrate_recover`). Only in
 * postcopy-paused. */
gboolean pr_migration_recover(PrMigration *migration, const char *uris, GCancellable *cancel,
			      GError **error);
/* Either side: pauses both (`migrate_pause`). */
gboolean pr_migration_pause(PrMigration *migration, GError **error);
gboolean pr_migration_cancel(PrMigration *migration, GError **error);
void pr_migration_query(PrMigration *migration, PrMigrationInfo *ret);
