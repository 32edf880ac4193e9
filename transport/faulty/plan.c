/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The plans of faults, their counters, and the registry in which paths and tests find them. */
#include "transport/faulty/plan.h"

#include "transport/backend.h"

#define OPTION_ID "fault-id"

typedef struct FaultOption {
	const char *name;
	gsize offset; /* in PrFaultPlan */
	guint64 max;
	const char *help;
} FaultOption;

static const FaultOption fault_options[] = {
	{"cut-after-messages", G_STRUCT_OFFSET(PrFaultPlan, cut_after_messages), G_MAXINT64,
	 "cut the control channel instead of its N-th message, either way"},
	{"cut-after-reads", G_STRUCT_OFFSET(PrFaultPlan, cut_after_reads), G_MAXINT64,
	 "fail the data path at its N-th READ"},
	{"stall-after-reads", G_STRUCT_OFFSET(PrFaultPlan, stall_after_reads), G_MAXINT64,
	 "do not answer READs after the N-th"},
	{"error-read", G_STRUCT_OFFSET(PrFaultPlan, error_read), G_MAXINT64,
	 "fail the N-th READ to complete, and the data path"},
	{"corrupt-read", G_STRUCT_OFFSET(PrFaultPlan, corrupt_read), G_MAXINT64,
	 "flip a bit of the bytes that the N-th READ to complete has brought"},
	{"corrupt-reads", G_STRUCT_OFFSET(PrFaultPlan, corrupt_reads), G_MAXINT64,
	 "of how many READs from there on to flip a bit (1)"},
	{"delay-ms", G_STRUCT_OFFSET(PrFaultPlan, delay_ms), 60000,
	 "delay each completion of a READ by so much"},
	{"piecewise-us", G_STRUCT_OFFSET(PrFaultPlan, incremental_grants_us), 60000,
	 "grant guest RAM in pieces, each MiB of which takes so long (both sides)"},
};

void pr_faults_describe(GString *out)
{
	for (gsize i = 0; i < G_N_ELEMENTS(fault_options); i++) {
		g_autofree char *option = g_strconcat(fault_options[i].name, "=N", NULL);

		pr_backend_describe_option(out, option, fault_options[i].help);
	}
	pr_backend_describe_option(out, OPTION_ID "=NAME",
				   "share the counters among all URIs with this name");
}

struct PrFaults {
	gint refs; /* under registry_lock */
	char *id;  /* constant */
	GMutex lock;
	GCond idle;	  /* signalled when calling becomes FALSE */
	PrFaultPlan plan; /* under lock, as all below; a fault that has happened becomes 0 */
	PrFaultCounts counts;
	GHashTable *applied; /* set of the texts of URIs whose options have become the plan */
	gboolean cut_next_message;
	GPtrArray *hooks; /* of PrFaultyHook */
	gboolean calling; /* a thread is calling hooks; detaching waits for it */
};

/* All faults of this process by id. The registry keeps a reference to those that a URI has made:
 * the counters must outlive the path. */
static GMutex registry_lock;
static GHashTable *registry; /* id -> PrFaults; under registry_lock */

/* Under registry_lock. */
static PrFaults *lookup(const char *id, gboolean *ret_made)
{
	PrFaults *faults;

	if (!registry)
		registry = g_hash_table_new(g_str_hash, g_str_equal);
	faults = g_hash_table_lookup(registry, id);
	*ret_made = !faults;
	if (!faults) {
		faults = g_new0(PrFaults, 1);
		faults->id = g_strdup(id);
		g_mutex_init(&faults->lock);
		g_cond_init(&faults->idle);
		faults->applied = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
		faults->hooks = g_ptr_array_new();
		g_hash_table_insert(registry, faults->id, faults);
	}
	faults->refs++;
	return faults;
}

PrFaults *pr_faults_new(const char *id)
{
	PrFaults *faults;
	gboolean made;

	g_mutex_lock(&registry_lock);
	faults = lookup(id, &made);
	g_mutex_unlock(&registry_lock);
	return faults;
}

void pr_faults_free(PrFaults *faults)
{
	gboolean last;

	g_mutex_lock(&registry_lock);
	last = --faults->refs == 0;
	if (last)
		g_hash_table_remove(registry, faults->id);
	g_mutex_unlock(&registry_lock);
	if (!last)
		return;
	g_ptr_array_unref(faults->hooks);
	g_hash_table_unref(faults->applied);
	g_cond_clear(&faults->idle);
	g_mutex_clear(&faults->lock);
	g_free(faults->id);
	g_free(faults);
}

static gboolean parse_plan(const PrUri *uri, PrFaultPlan *ret, gboolean *ret_any, GError **error)
{
	*ret = (PrFaultPlan){0};
	*ret_any = FALSE;
	for (gsize i = 0; i < G_N_ELEMENTS(fault_options); i++) {
		const FaultOption *option = &fault_options[i];

		*ret_any |= g_hash_table_contains(uri->options, option->name);
		if (!pr_backend_number(uri, option->name, 1, option->max, 0,
				       (guint64 *)((char *)ret + option->offset), error))
			return FALSE;
	}
	return TRUE;
}

gboolean pr_faults_check_options(const PrUri *uri, GError **error)
{
	PrFaultPlan plan;
	gboolean any;

	return parse_plan(uri, &plan, &any, error);
}

void pr_faults_strip_options(PrUri *uri)
{
	g_hash_table_remove(uri->options, OPTION_ID);
	for (gsize i = 0; i < G_N_ELEMENTS(fault_options); i++)
		g_hash_table_remove(uri->options, fault_options[i].name);
}

PrFaults *pr_faults_for_uri(const PrUri *uri)
{
	const char *id = g_hash_table_lookup(uri->options, OPTION_ID);
	PrFaults *faults;
	gboolean made, any;
	PrFaultPlan plan;

	g_mutex_lock(&registry_lock);
	faults = lookup(id ? id : uri->text, &made);
	faults->refs += made;
	g_mutex_unlock(&registry_lock);
	if (!parse_plan(uri, &plan, &any, NULL) || !any)
		return faults;
	g_mutex_lock(&faults->lock);
	if (g_hash_table_add(faults->applied, g_strdup(uri->text)))
		faults->plan = plan;
	g_mutex_unlock(&faults->lock);
	return faults;
}

void pr_faults_attach(PrFaults *faults, PrFaultyHook *hook)
{
	g_mutex_lock(&faults->lock);
	faults->counts.paths++;
	g_ptr_array_add(faults->hooks, hook);
	g_mutex_unlock(&faults->lock);
}

void pr_faults_detach(PrFaults *faults, PrFaultyHook *hook)
{
	g_mutex_lock(&faults->lock);
	/* Ended by the thread that calls the hooks; no hook waits. */
	while (faults->calling)
		g_cond_wait(&faults->idle, &faults->lock);
	g_ptr_array_remove(faults->hooks, hook);
	g_mutex_unlock(&faults->lock);
}

/* Calls each hook without the lock, because a hook may lead to a call of this file. */
static void call_hooks(PrFaults *faults, gboolean cut)
{
	g_autoptr(GPtrArray) hooks = NULL;

	g_mutex_lock(&faults->lock);
	/* Ended as in pr_faults_detach(). */
	while (faults->calling)
		g_cond_wait(&faults->idle, &faults->lock);
	faults->calling = TRUE;
	faults->counts.fired++;
	hooks = g_ptr_array_copy(faults->hooks, NULL, NULL);
	g_mutex_unlock(&faults->lock);
	for (guint i = 0; i < hooks->len; i++) {
		PrFaultyHook *hook = hooks->pdata[i];

		(cut ? hook->cut : hook->stall)(hook);
	}
	g_mutex_lock(&faults->lock);
	faults->calling = FALSE;
	g_cond_broadcast(&faults->idle);
	g_mutex_unlock(&faults->lock);
}

void pr_faults_cut_paths(PrFaults *faults)
{
	call_hooks(faults, TRUE);
}

void pr_faults_stall_paths(PrFaults *faults)
{
	call_hooks(faults, FALSE);
}

void pr_faults_set_plan(PrFaults *faults, const PrFaultPlan *plan)
{
	g_mutex_lock(&faults->lock);
	faults->plan = *plan;
	g_mutex_unlock(&faults->lock);
}

void pr_faults_cut_next_message(PrFaults *faults)
{
	g_mutex_lock(&faults->lock);
	faults->cut_next_message = TRUE;
	g_mutex_unlock(&faults->lock);
}

PrFaultCounts pr_faults_counts(PrFaults *faults)
{
	PrFaultCounts counts;

	g_mutex_lock(&faults->lock);
	counts = faults->counts;
	g_mutex_unlock(&faults->lock);
	return counts;
}

/* Whether the fault *when is due at this count; if so, uses it up. Under the lock. */
static gboolean is_due(PrFaults *faults, guint64 *when, guint64 count)
{
	if (!*when || count < *when)
		return FALSE;
	*when = 0;
	faults->counts.fired++;
	return TRUE;
}

PrFault pr_faults_on_message(PrFaults *faults)
{
	gboolean cut;

	g_mutex_lock(&faults->lock);
	faults->counts.messages++;
	cut = is_due(faults, &faults->plan.cut_after_messages, faults->counts.messages);
	if (faults->cut_next_message) {
		faults->cut_next_message = FALSE;
		faults->counts.fired++;
		cut = TRUE;
	}
	g_mutex_unlock(&faults->lock);
	return cut ? PR_FAULT_CUT : PR_FAULT_NONE;
}

PrFault pr_faults_on_read(PrFaults *faults)
{
	PrFault fault = PR_FAULT_NONE;

	g_mutex_lock(&faults->lock);
	faults->counts.reads++;
	if (is_due(faults, &faults->plan.cut_after_reads, faults->counts.reads))
		fault = PR_FAULT_CUT;
	else if (faults->plan.stall_after_reads &&
		 is_due(faults, &faults->plan.stall_after_reads, faults->counts.reads - 1))
		fault = PR_FAULT_STALL;
	g_mutex_unlock(&faults->lock);
	return fault;
}

/* Under the lock. */
static gboolean is_to_be_corrupted(PrFaults *faults)
{
	PrFaultPlan *plan = &faults->plan;

	if (!plan->corrupt_read || faults->counts.completions < plan->corrupt_read)
		return FALSE;
	faults->counts.corrupted++;
	if (plan->corrupt_reads > 1)
		plan->corrupt_reads--;
	else
		plan->corrupt_read = 0;
	return TRUE;
}

PrFault pr_faults_on_completion(PrFaults *faults)
{
	PrFault fault = PR_FAULT_NONE;

	g_mutex_lock(&faults->lock);
	faults->counts.completions++;
	if (is_due(faults, &faults->plan.error_read, faults->counts.completions))
		fault = PR_FAULT_CUT;
	else if (is_to_be_corrupted(faults))
		fault = PR_FAULT_CORRUPT;
	g_mutex_unlock(&faults->lock);
	return fault;
}

guint64 pr_faults_incremental_grants_us(PrFaults *faults)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&faults->lock);

	return faults->plan.incremental_grants_us;
}

guint64 pr_faults_delay_ms(PrFaults *faults)
{
	guint64 delay;

	g_mutex_lock(&faults->lock);
	delay = faults->plan.delay_ms;
	g_mutex_unlock(&faults->lock);
	return delay;
}
