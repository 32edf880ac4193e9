/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination: who is charged for the guest's memory. */
#include "migration/postcopy/allocate.h"
#include "migration/session/session.h"

static void broken(const GError *error, void *opaque)
{
	pr_migration_failed(opaque, NULL, error);
}

static void tell_charged_here(PrMigration *m, const GError *why)
{
	g_autofree char *note = g_strdup_printf(
		"the kernel charges the guest's memory to this engine's memory cgroup as it comes in, "
		"so the engine must not have a limit below the guest's size: %s",
		why->message);

	g_mutex_lock(&m->lock);
	pr_migration_note_locked(m, note);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

gboolean pr_destination_start_allocator(PrMigration *m, gboolean fresh, GError **error)
{
	const PrAllocateHooks hooks = {broken, m, m->watchdog};
	g_autoptr(GError) why = NULL;
	int socket = m->guest->ops->allocator ? m->guest->ops->allocator(m->guest, &why) : -1;

	if (why)
		tell_charged_here(m, why);
	if (socket < 0)
		return TRUE;
	m->ram->allocate = pr_allocate_start(m->ram, socket, fresh ? m->uffd : -1, &hooks, error);
	return m->ram->allocate != NULL;
}

void pr_destination_stop_allocator(PrMigration *m)
{
	if (!m->ram)
		return;
	pr_allocate_stop(m->ram->allocate);
	m->ram->allocate = NULL;
}

gboolean pr_destination_allocate(uint32_t block, uint64_t offset, uint64_t length, void *opaque)
{
	const PrRam *ram = ((PrMigration *)opaque)->ram;
	uint32_t page_size = ram->blocks[block].page_size;
	uint64_t first = offset / page_size, end = (offset + length + page_size - 1) / page_size;

	return pr_allocate(ram->allocate, block, first, end - first, /* bulk= */ FALSE);
}
