/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/health.h"

static const char *const names[] = {
	[PR_PATH_IDLE] = "idle",
	[PR_PATH_LISTENING] = "listening",
	[PR_PATH_CONNECTING] = "connecting",
	[PR_PATH_PROBATION] = "probation",
	[PR_PATH_STANDBY] = "standby",
	[PR_PATH_ACTIVE] = "active",
	[PR_PATH_FAILED] = "failed",
};
G_STATIC_ASSERT(G_N_ELEMENTS(names) == PR_PATH_N_STATES);

const char *pr_path_state_name(PrPathState state)
{
	g_assert(state < PR_PATH_N_STATES);
	return names[state];
}

static gboolean is_up(PrPathState state)
{
	return state == PR_PATH_PROBATION || state == PR_PATH_STANDBY || state == PR_PATH_ACTIVE;
}

static gboolean is_fit(PrPathState state)
{
	return state == PR_PATH_STANDBY || state == PR_PATH_ACTIVE;
}

static gboolean has_failed_before(const PrHealth *health)
{
	return health->failures || health->hold_down;
}

static void note_failure(PrHealth *health, gint64 now)
{
	gint64 retry = PR_HEALTH_RETRY_MIN << MIN(health->failures, 10);
	gboolean forgiven = is_fit(health->state) &&
			    now - health->since > PR_HEALTH_FORGIVENESS * health->hold_down;

	if (is_up(health->state)) {
		health->hold_down = forgiven ? PR_HEALTH_HOLD_DOWN_MIN
					     : CLAMP(2 * health->hold_down, PR_HEALTH_HOLD_DOWN_MIN,
						     PR_HEALTH_HOLD_DOWN_MAX);
		health->hold_until = now + health->hold_down;
	}
	health->failures++;
	health->retry_at = now + MIN(retry, PR_HEALTH_RETRY_MAX);
}

static PrPathState after_probe(PrHealth *health, gint64 now)
{
	guint needed = has_failed_before(health) ? PR_HEALTH_PROBES : 1;

	health->probes++;
	if (health->state != PR_PATH_PROBATION)
		return health->state;
	if (health->probes < needed || now < health->hold_until)
		return PR_PATH_PROBATION;
	health->failures = 0;
	return PR_PATH_STANDBY;
}

static PrPathState next_state(PrHealth *health, PrHealthEvent event, gint64 now)
{
	switch (event) {
	case PR_HEALTH_LISTENS:
		health->listens = TRUE;
		return PR_PATH_LISTENING;
	case PR_HEALTH_CONNECTS:
		/* A path that failed stays failed until an attempt succeeds. */
		return health->state == PR_PATH_IDLE ? PR_PATH_CONNECTING : health->state;
	case PR_HEALTH_CONNECTED:
		health->probes = 0;
		return health->state == PR_PATH_ACTIVE ? PR_PATH_ACTIVE : PR_PATH_PROBATION;
	case PR_HEALTH_PROBED:
		return after_probe(health, now);
	case PR_HEALTH_ACTIVATED:
		return PR_PATH_ACTIVE;
	case PR_HEALTH_FAILED:
		note_failure(health, now);
		return PR_PATH_FAILED;
	case PR_HEALTH_CLOSED:
		if (health->state == PR_PATH_FAILED)
			return PR_PATH_FAILED;
		return health->listens ? PR_PATH_LISTENING : PR_PATH_IDLE;
	case PR_HEALTH_N_EVENTS:
		break;
	}
	g_assert_not_reached();
}

gboolean pr_health_step(PrHealth *health, PrHealthEvent event, gint64 now)
{
	PrPathState next = next_state(health, event, now);
	gboolean changed = next != health->state;

	health->state = next;
	if (changed || !health->since)
		health->since = now;
	return changed;
}
