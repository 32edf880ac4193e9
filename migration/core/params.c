/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/core/params.h"

#include <errno.h>
#include <string.h>

#include "transport/transport.h"

G_DEFINE_QUARK(pr_params_error, pr_params_error)

#define KIB G_GUINT64_CONSTANT(1024)
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)

static const PrParamInfo param_table[PR_N_PARAMS] = {
	[PR_PARAM_MAX_POSTCOPY_BANDWIDTH] = {"max-postcopy-bandwidth", 0, 0, G_MAXINT64, "bytes/s",
					     "highest rate of the bulk pull; 0: unlimited"},
	[PR_PARAM_HEARTBEAT_INTERVAL] = {"heartbeat-interval", 100, 10, 10000, "ms",
					 "time between two heartbeats, both ways"},
	[PR_PARAM_HEARTBEAT_TIMEOUT] = {"heartbeat-timeout", 500, 50, 60000, "ms",
					"silence after which a path counts as dead"},
	[PR_PARAM_CONNECT_TIMEOUT] = {"connect-timeout", 1000, 10, 60000, "ms",
				      "time to connect, for each path of the list"},
	[PR_PARAM_HANDSHAKE_TIMEOUT] = {"handshake-timeout", 5000, 10, 600000, "ms",
					"time for each step of a handshake with the peer"},
	[PR_PARAM_GUEST_TIMEOUT] = {"guest-timeout", 10000, 100, 3600000, "ms",
				    "time for each call to the guest"},
	[PR_PARAM_BULK_READ_SIZE] =
		{"bulk-read-size", 128 * KIB, 4 * KIB, MIB, "bytes",
		 "longest bulk READ, a power of two; READs are shorter where one "
		 "would take long on the wire"},
	[PR_PARAM_BULK_WINDOW] = {"bulk-window", 32, 1, 64, "READs",
				  "most bulk READs in flight over a path; fewer where it does not "
				  "carry so much"},
	[PR_PARAM_FAULT_SPIN] = {"fault-spin", 50, 0, 1000, "us",
				 "time that a fault thread polls before it sleeps"},
	[PR_PARAM_FAULT_READAHEAD] = {"fault-readahead", 0, 0, PR_READAHEAD_MAX, "pages",
				      "most pages to read ahead of regular faults; "
				      "max-postcopy-bandwidth does not limit them; 0: none"},
	[PR_PARAM_FAULT_THREADS] =
		{"fault-threads", 0, 0, PR_URGENT_LANES_MAX, "threads",
		 "destination: threads that serve faults, each with a lane of its "
		 "own, from the next migration on; 0: 1, with 4 CPUs 2, with 16 "
		 "CPUs 4"},
	[PR_PARAM_PROBE_INTERVAL] = {"probe-interval", 1000, 10, 60000, "ms",
				     "time between two probes of a standby path"},
};

static const PrCapabilityInfo capability_table[PR_N_CAPABILITIES] = {
	[PR_CAP_POSTCOPY_RAM] = {"postcopy-ram", TRUE, TRUE,
				 "RAM follows while the guest runs at the destination"},
	[PR_CAP_RETURN_PATH] = {"return-path", TRUE, TRUE, "the destination answers the source"},
	[PR_CAP_EVENTS] = {"events", TRUE, FALSE, "send MIGRATION events to QMP clients"},
	[PR_CAP_ZERO_PAGES] = {"zero-pages", TRUE, FALSE,
			       "look for zero pages and send only their numbers"},
	[PR_CAP_AUTO_RECOVER] = {"auto-recover", TRUE, FALSE,
				 "when a path is lost and more than one is listed, recover over "
				 "another one without being asked"},
	[PR_CAP_STANDBY_PATHS] =
		{"standby-paths", TRUE, FALSE,
		 "keep the listed paths that are not in use connected and probed; over "
		 "rdma: each pins the guest's memory once more"},
	[PR_CAP_MULTI_RAIL] =
		{"multi-rail", TRUE, FALSE,
		 "destination: pull over the fit standby paths of the same transport at "
		 "the same time"},
	[PR_CAP_VERIFY] =
		{"verify", FALSE, FALSE,
		 "both sides: place a page only when it has the hash that the source's has"},
};

const PrParamInfo *pr_param_info(PrParam param)
{
	return &param_table[param];
}

const PrCapabilityInfo *pr_capability_info(PrCapability cap)
{
	return &capability_table[cap];
}

uint64_t pr_param(const PrParams *params, PrParam param)
{
	return __atomic_load_n(&params->value[param], __ATOMIC_RELAXED);
}

gboolean pr_capability(const PrParams *params, PrCapability cap)
{
	return __atomic_load_n(&params->capability[cap], __ATOMIC_RELAXED);
}

guint pr_params_fault_threads(const PrParams *params)
{
	uint64_t wanted = pr_param(params, PR_PARAM_FAULT_THREADS);
	guint cpus = g_get_num_processors();

	if (wanted > 0)
		return (guint)wanted;
	return cpus < 4 ? 1 : cpus < 16 ? 2 : 4;
}

void pr_params_init(PrParams *params)
{
	for (guint i = 0; i < PR_N_PARAMS; i++)
		__atomic_store_n(&params->value[i], param_table[i].def, __ATOMIC_RELAXED);
	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		__atomic_store_n(&params->capability[i], capability_table[i].def, __ATOMIC_RELAXED);
}

/* PR_N_PARAMS: no parameter has this name. */
static PrParam find_param(const char *name)
{
	guint i;

	for (i = 0; i < PR_N_PARAMS; i++)
		if (!strcmp(param_table[i].name, name))
			break;
	return i;
}

static gboolean unknown_param(const char *name, GError **error)
{
	g_autoptr(GString) known = g_string_new(NULL);

	for (guint i = 0; i < PR_N_PARAMS; i++)
		g_string_append_printf(known, "%s%s", i ? ", " : "", param_table[i].name);
	g_set_error(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_UNKNOWN,
		    "unknown parameter '%s'; the parameters are: %s", name, known->str);
	return FALSE;
}

/* Reports a value that the parameter can't have, as it was found. */
static gboolean bad_value(PrParam param, const char *found, GError **error)
{
	const PrParamInfo *info = &param_table[param];

	g_set_error(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_VALUE,
		    "parameter '%s': %s is not valid; expected %s from %" G_GUINT64_FORMAT
		    " to %" G_GUINT64_FORMAT " %s",
		    info->name, found,
		    param == PR_PARAM_BULK_READ_SIZE ? "a power of two" : "a whole number",
		    info->min, info->max, info->unit);
	return FALSE;
}

/* The interval must be below the timeout, or each path would count as dead at once. */
static gboolean check_heartbeat(const PrParams *params, PrParam param, uint64_t value,
				GError **error)
{
	uint64_t interval = pr_param(params, PR_PARAM_HEARTBEAT_INTERVAL);
	uint64_t timeout = pr_param(params, PR_PARAM_HEARTBEAT_TIMEOUT);

	if (param == PR_PARAM_HEARTBEAT_INTERVAL && value >= timeout) {
		g_set_error(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_VALUE,
			    "parameter 'heartbeat-interval': %" G_GUINT64_FORMAT
			    " ms is not below heartbeat-timeout (%" G_GUINT64_FORMAT
			    " ms); raise heartbeat-timeout first",
			    value, timeout);
		return FALSE;
	}
	if (param == PR_PARAM_HEARTBEAT_TIMEOUT && value <= interval) {
		g_set_error(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_VALUE,
			    "parameter 'heartbeat-timeout': %" G_GUINT64_FORMAT
			    " ms is not above heartbeat-interval (%" G_GUINT64_FORMAT
			    " ms); lower heartbeat-interval first",
			    value, interval);
		return FALSE;
	}
	return TRUE;
}

static gboolean set_value(PrParams *params, PrParam param, uint64_t value, const char *found,
			  GError **error)
{
	const PrParamInfo *info = &param_table[param];

	if (value < info->min || value > info->max)
		return bad_value(param, found, error);
	if (param == PR_PARAM_BULK_READ_SIZE && (value & (value - 1)))
		return bad_value(param, found, error);
	if (!check_heartbeat(params, param, value, error))
		return FALSE;
	__atomic_store_n(&params->value[param], value, __ATOMIC_RELAXED);
	return TRUE;
}

gboolean pr_params_set(PrParams *params, const char *name, uint64_t value, GError **error)
{
	PrParam param = find_param(name);
	char found[32];

	if (param == PR_N_PARAMS)
		return unknown_param(name, error);
	g_snprintf(found, sizeof(found), "%" G_GUINT64_FORMAT, value);
	return set_value(params, param, value, found, error);
}

static gboolean parse_number(const char *text, uint64_t *ret)
{
	char *end;
	uint64_t value, unit;

	if (!g_ascii_isdigit(text[0]))
		return FALSE;
	errno = 0;
	value = g_ascii_strtoull(text, &end, 10);
	if (errno)
		return FALSE;
	switch (*end) {
	case '\0':
		*ret = value;
		return TRUE;
	case 'k':
	case 'K':
		unit = KIB;
		break;
	case 'M':
		unit = MIB;
		break;
	case 'G':
		unit = GIB;
		break;
	default:
		return FALSE;
	}
	return end[1] == '\0' && g_uint64_checked_mul(ret, value, unit);
}

gboolean pr_params_set_text(PrParams *params, const char *name, const char *text, GError **error)
{
	PrParam param = find_param(name);
	g_autofree char *found = g_strdup_printf("'%s'", text);
	uint64_t value;

	if (param == PR_N_PARAMS)
		return unknown_param(name, error);
	if (!parse_number(text, &value))
		return bad_value(param, found, error);
	return set_value(params, param, value, found, error);
}

static gboolean unknown_capability(const char *name, GError **error)
{
	g_autoptr(GString) known = g_string_new(NULL);

	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		g_string_append_printf(known, "%s%s", i ? ", " : "", capability_table[i].name);
	g_set_error(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_UNKNOWN,
		    "unknown capability '%s'; the capabilities are: %s", name, known->str);
	return FALSE;
}

gboolean pr_params_set_capability(PrParams *params, const char *name, gboolean on, GError **error)
{
	guint cap;

	for (cap = 0; cap < PR_N_CAPABILITIES; cap++)
		if (!strcmp(capability_table[cap].name, name))
			break;
	if (cap == PR_N_CAPABILITIES)
		return unknown_capability(name, error);
	if (capability_table[cap].fixed && !on != !capability_table[cap].def) {
		g_set_error(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_FIXED,
			    "capability '%s' is always %s and can't be turned %s", name,
			    capability_table[cap].def ? "on" : "off", on ? "on" : "off");
		return FALSE;
	}
	__atomic_store_n(&params->capability[cap], !!on, __ATOMIC_RELAXED);
	return TRUE;
}
