/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/choose-path.h"

#include "migration/source/connect.h"
#include "migration/source/standby.h"

static const PrWatchPoint connecting = {"connecting", 15000};

typedef struct Candidate {
	PrUri *uri;
	gboolean anew; /* it may be connected; else only its standby may be activated */
} Candidate;

static void candidate_clear(gpointer data)
{
	pr_uri_free(((Candidate *)data)->uri);
}

static void add_candidate(GArray *candidates, const PrUri *uri, gboolean anew)
{
	Candidate candidate = {pr_uri_copy(uri), anew};

	g_array_append_val(candidates, candidate);
}

/* ---- the order of the paths; all with the lock held ---- */

static gint64 hold_until(PrSource *source, const PrUri *uri)
{
	return pr_path_record(&source->session->paths, uri->text)->health.hold_until;
}

/* The path whose hold-down ends first comes first. A path that was lost just now may be connected
 * again already; its hold-down has only begun. A GCompareDataFunc of Candidate. */
static gint compare_hold_down(gconstpointer a, gconstpointer b, gpointer source)
{
	gint64 one = hold_until(source, ((const Candidate *)a)->uri);
	gint64 other = hold_until(source, ((const Candidate *)b)->uri);

	return (one > other) - (one < other);
}

static GArray *standbys_of_rank(PrSource *source, PrStandbyRank rank)
{
	GArray *standbys = g_array_new(FALSE, FALSE, sizeof(Candidate));

	for (guint i = 0; i < source->uris->len; i++)
		if (pr_standby_rank(source, source->uris->pdata[i]) == rank)
			add_candidate(standbys, source->uris->pdata[i], FALSE);
	return standbys;
}

/* The fit standbys in the operator's order, then those on probation, the first to be trusted
 * first. */
static void add_standbys(PrSource *source, GArray *candidates)
{
	g_autoptr(GArray) fit = standbys_of_rank(source, PR_STANDBY_FIT);
	g_autoptr(GArray) on_probation = standbys_of_rank(source, PR_STANDBY_ON_PROBATION);

	g_array_sort_with_data(on_probation, compare_hold_down, source);
	if (fit->len > 0)
		g_array_append_vals(candidates, fit->data, fit->len);
	if (on_probation->len > 0)
		g_array_append_vals(candidates, on_probation->data, on_probation->len);
}

/* The index behind the path that connected last. */
static guint behind_last_path(const PrSource *source)
{
	for (guint i = source->uris->len; i > 0; i--)
		if (g_strcmp0(((PrUri *)source->uris->pdata[i - 1])->text, source->last_path) == 0)
			return i;
	return 0;
}

/* The paths of this attempt in the order in which to try them. Paths that the operator has named:
 * as they were named. An automatic attempt: first the standbys, since connecting anew may take
 * long; then all paths, beginning behind the one that was lost. */
static GArray *candidates_of_attempt(PrSource *source)
{
	GArray *candidates = g_array_new(FALSE, FALSE, sizeof(Candidate));
	gboolean automatic = source->resume == PR_RESUME_AUTOMATIC;
	guint n = automatic ? source->uris->len : source->n_asked;
	guint first = automatic ? behind_last_path(source) : 0;

	g_array_set_clear_func(candidates, candidate_clear);
	if (automatic)
		add_standbys(source, candidates);
	for (guint i = 0; i < n; i++)
		add_candidate(candidates, source->uris->pdata[(first + i) % n], TRUE);
	return candidates;
}

/* ---- trying them ---- */

static void note_last_path(PrSource *source, const PrUri *uri)
{
	pr_session_lock(source->session);
	g_free(source->last_path);
	source->last_path = g_strdup(uri->text);
	pr_session_unlock(source->session);
}

static void note_failure(PrSession *session, const PrUri *uri, const GError *error)
{
	pr_session_lock(session);
	pr_path_step(&session->paths, uri->text, PR_HEALTH_FAILED, error->message);
	pr_session_unlock(session);
}

/* The destination has refused, and would refuse over any path. */
static gboolean is_refusal(const GError *error)
{
	return g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED) ||
	       g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_PAUSED_BY_OPERATOR);
}

/* Over the path's standby if it has one. Where it has none, or that one turns out to be dead, anew
 * if it may. */
static PrConnectOutcome try_path(PrSource *source, const Candidate *candidate, PrResume resume,
				 PrConn **ret_conn, GError **error)
{
	PrSession *session = source->session;
	const PrUri *uri = candidate->uri;
	g_autoptr(GError) why = NULL;
	PrConnectOutcome outcome = pr_standby_activate(source, uri, resume, ret_conn, &why);

	if (outcome == PR_CONNECT_UP || outcome == PR_CONNECT_COMPLETED)
		return outcome;
	if (outcome == PR_CONNECT_NONE && !candidate->anew) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_LOST,
			    "path %s: it has no standby any more", uri->text);
		return PR_CONNECT_FAILED;
	}
	if (outcome == PR_CONNECT_FAILED) {
		if (!candidate->anew || pr_session_attempt_has_failed(session) || is_refusal(why)) {
			g_propagate_error(error, g_steal_pointer(&why));
			return PR_CONNECT_FAILED;
		}
		g_warning("%s; connecting anew", why->message);
	}
	return pr_source_connect(source, uri, resume, session->cancel, ret_conn, error);
}

PrConnectOutcome pr_source_connect_any(PrSource *source, PrConn **ret_conn, GError **error)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	g_autoptr(GArray) candidates = candidates_of_attempt(source);
	PrResume resume = source->resume;
	pr_session_unlock(session);

	for (guint i = 0; i < candidates->len; i++) {
		const Candidate *candidate = &g_array_index(candidates, Candidate, i);
		g_autoptr(GError) why = NULL;

		pr_watch_enter(source->watch, &connecting);
		PrConnectOutcome outcome = try_path(source, candidate, resume, ret_conn, &why);
		pr_standby_unclaim(source);
		if (outcome == PR_CONNECT_UP)
			note_last_path(source, candidate->uri);
		if (outcome != PR_CONNECT_FAILED)
			return outcome;
		gboolean superseded = pr_session_attempt_has_failed(session);
		if (candidate->anew && !superseded)
			note_failure(session, candidate->uri, why);
		if (i + 1 == candidates->len || superseded || is_refusal(why)) {
			g_propagate_error(error, g_steal_pointer(&why));
			return PR_CONNECT_FAILED;
		}
		g_warning("%s; trying the next path", why->message);
	}
	g_assert_not_reached();
}
