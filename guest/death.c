/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/death.h"

void pr_death_init(PrDeath *death)
{
	*death = (PrDeath){0};
	g_mutex_init(&death->calling);
	g_mutex_init(&death->lock);
}

void pr_death_clear(PrDeath *death)
{
	g_mutex_clear(&death->calling);
	g_mutex_clear(&death->lock);
	g_clear_pointer(&death->reason, g_free);
}

/* With `calling` held. */
static void call_observer(PrDeath *death)
{
	PrGuestDied died = NULL;
	void *opaque;

	g_mutex_lock(&death->lock);
	if (death->reason)
		died = g_steal_pointer(&death->died);
	opaque = death->opaque;
	g_mutex_unlock(&death->lock);
	if (died)
		died(death->reason, opaque);
}

void pr_death_report(PrDeath *death, const char *reason)
{
	g_autoptr(GMutexLocker) calling = g_mutex_locker_new(&death->calling);

	g_mutex_lock(&death->lock);
	if (!death->reason)
		death->reason = g_strdup(reason);
	g_mutex_unlock(&death->lock);
	call_observer(death);
}

void pr_death_observe(PrDeath *death, PrGuestDied died, void *opaque)
{
	g_autoptr(GMutexLocker) calling = g_mutex_locker_new(&death->calling);

	g_mutex_lock(&death->lock);
	death->died = died;
	death->opaque = opaque;
	g_mutex_unlock(&death->lock);
	call_observer(death);
}
