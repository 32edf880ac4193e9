/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Migration parameters and capabilities: one table each, with name, default, range, unit and help.
 * The tables serve --set, --help, the monitor and validation.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_READAHEAD_MAX 64 /* pages: the largest value of fault-readahead */

typedef enum PrParam {
	PR_PARAM_MAX_POSTCOPY_BANDWIDTH,
	PR_PARAM_HEARTBEAT_INTERVAL,
	PR_PARAM_HEARTBEAT_TIMEOUT,
	PR_PARAM_CONNECT_TIMEOUT,
	PR_PARAM_HANDSHAKE_TIMEOUT,
	PR_PARAM_GUEST_TIMEOUT,
	PR_PARAM_BULK_READ_SIZE,
	PR_PARAM_BULK_WINDOW,
	PR_PARAM_FAULT_SPIN,
	PR_PARAM_FAULT_READAHEAD,
	PR_PARAM_FAULT_THREADS,
	PR_PARAM_PROBE_INTERVAL,
	PR_N_PARAMS
} PrParam;

typedef struct PrParamInfo {
	const char *name;
	uint64_t def, min, max;
	const char *unit;
	const char *help;
} PrParamInfo;

typedef enum PrCapability {
	PR_CAP_POSTCOPY_RAM,  /* fixed on: every migration here is postcopy */
	PR_CAP_RETURN_PATH,   /* fixed on */
	PR_CAP_EVENTS,	      /* send MIGRATION events to monitors */
	PR_CAP_ZERO_PAGES,    /* source: look for zero pages, and send only their numbers */
	PR_CAP_AUTO_RECOVER,  /* when a path is lost, recover over another listed path unasked */
	PR_CAP_STANDBY_PATHS, /* keep the paths that are not in use connected */
	PR_CAP_MULTI_RAIL,    /* destination: pull over the standbys, too */
	PR_CAP_VERIFY,	      /* both sides: compare pages with hashes of the source's pages */
	PR_N_CAPABILITIES
} PrCapability;

typedef struct PrCapabilityInfo {
	const char *name;
	gboolean def;
	gboolean fixed;
	const char *help;
} PrCapabilityInfo;

/* Any thread may read the values; the monitor's thread sets them. All access is atomic. */
typedef struct PrParams {
	uint64_t value[PR_N_PARAMS];	   /* atomic */
	int capability[PR_N_CAPABILITIES]; /* atomic, boolean */
} PrParams;

typedef enum PrParamsError {
	PR_PARAMS_ERROR_UNKNOWN,
	PR_PARAMS_ERROR_VALUE,
	PR_PARAMS_ERROR_FIXED,
} PrParamsError;
#define PR_PARAMS_ERROR pr_params_error_quark()
GQuark pr_params_error_quark(void);

void pr_params_init(PrParams *params);
const PrParamInfo *pr_param_info(PrParam param);
const PrCapabilityInfo *pr_capability_info(PrCapability cap);
uint64_t pr_param(const PrParams *params, PrParam param);
gboolean pr_capability(const PrParams *params, PrCapability cap);

/* How many fault threads the destination starts: the parameter, or a number that depends on the
 * CPUs. */
guint pr_params_fault_threads(const PrParams *params);

/* Sets a parameter by name. The error names the parameter, the value found and the range. */
gboolean pr_params_set(PrParams *params, const char *name, uint64_t value, GError **error);

/* As pr_params_set(), from the text that the operator has typed: a decimal number with an optional
 * suffix k, M or G (powers of 1024). */
gboolean pr_params_set_text(PrParams *params, const char *name, const char *text, GError **error);
gboolean pr_params_set_capability(PrParams *params, const char *name, gboolean on, GError **error);
