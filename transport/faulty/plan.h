/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What faulty.c asks of plan.c: whether a fault is due. Thread-safe. */
#pragma once

#include "transport/faulty/faulty.h"
#include "transport/uri.h"

typedef enum PrFault {
	PR_FAULT_NONE,
	PR_FAULT_CUT,	  /* what is being done fails, and the path or channel with it */
	PR_FAULT_CORRUPT, /* a bit of what it has brought is flipped */
	PR_FAULT_STALL,	  /* this READ and all later ones on its path stay without an answer */
} PrFault;

/* A path that faults can be injected into from outside. */
typedef struct PrFaultyHook PrFaultyHook;
struct PrFaultyHook {
	void (*cut)(PrFaultyHook *hook);
	void (*stall)(PrFaultyHook *hook);
};

/* The options, for --help. */
void pr_faults_describe(GString *out);
/* The options of the URI are well formed. */
gboolean pr_faults_check_options(const PrUri *uri, GError **error);
/* Removes them, so that the inner backend sees only its own. */
void pr_faults_strip_options(PrUri *uri);
/* A reference to the URI's faults. Options that were not seen yet become the plan; they must have been
 * checked, and count for nothing otherwise. */
PrFaults *pr_faults_for_uri(const PrUri *uri);

void pr_faults_attach(PrFaults *faults, PrFaultyHook *hook);
/* Returns when no call of the hook is in progress. */
void pr_faults_detach(PrFaults *faults, PrFaultyHook *hook);

PrFault pr_faults_on_message(PrFaults *faults);
PrFault pr_faults_on_read(PrFaults *faults);
PrFault pr_faults_on_completion(PrFaults *faults);
guint64 pr_faults_delay_ms(PrFaults *faults);
guint64 pr_faults_piecewise_us(PrFaults *faults);
