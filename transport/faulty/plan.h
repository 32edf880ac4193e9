/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Whether a fault is due: what plan.c offers faulty.c. Thread-safe. */
#pragma once

#include "transport/faulty/faulty.h"
#include "transport/uri.h"

typedef enum PrFault {
	PR_FAULT_NONE,
	PR_FAULT_CUT,	  /* the READ or message fails, and the path or channel with it */
	PR_FAULT_CORRUPT, /* a bit of the READ's bytes is flipped */
	PR_FAULT_STALL,	  /* this READ and all later ones on its path are not answered */
} PrFault;

/* How a test cuts or stalls a path that is up. */
typedef struct PrFaultyHook PrFaultyHook;
struct PrFaultyHook {
	void (*cut)(PrFaultyHook *hook);
	void (*stall)(PrFaultyHook *hook);
};

/* Prints the options, for --help. */
void pr_faults_describe(GString *out);
/* Whether the options of the URI are well formed. */
gboolean pr_faults_check_options(const PrUri *uri, GError **error);
/* Removes our options, so that the inner backend sees only its own. */
void pr_faults_strip_options(PrUri *uri);
/* A reference to the URI's faults. Options of a URI that is used for the first time become the
 * plan. They must have been checked; options that are not well formed are ignored. */
PrFaults *pr_faults_for_uri(const PrUri *uri);

void pr_faults_attach(PrFaults *faults, PrFaultyHook *hook);
/* Returns only when no call of the hook is in progress. */
void pr_faults_detach(PrFaults *faults, PrFaultyHook *hook);

PrFault pr_faults_on_message(PrFaults *faults);
PrFault pr_faults_on_read(PrFaults *faults);
PrFault pr_faults_on_completion(PrFaults *faults);
guint64 pr_faults_delay_ms(PrFaults *faults);
guint64 pr_faults_incremental_grants_us(PrFaults *faults);
