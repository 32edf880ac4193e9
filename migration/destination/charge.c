/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/charge.h"

#include "migration/postcopy/allocate.h"

static void broken(const GError *error, void *opaque)
{
	pr_session_failed(((PrDestination *)opaque)->session, NULL, error);
}

static void note_charged_here(PrSession *session, const GError *why)
{
	g_autofree char *note = g_strdup_printf(
		"the kernel charges the guest's memory to this engine's memory cgroup as it comes "
		"in, so the engine must not have a limit below the guest's size: %s",
		why->message);

	pr_session_lock(session);
	pr_session_note_locked(session, note);
	pr_session_unlock(session);
}

gboolean pr_destination_start_allocator(PrDestination *destination, gboolean fresh, GError **error)
{
	PrSession *session = destination->session;
	const PrAllocateHooks hooks = {broken, destination, session->watchdog};
	g_autoptr(GError) why = NULL;
	int socket = session->guest->ops->allocator
			     ? session->guest->ops->allocator(session->guest, &why)
			     : -1;

	if (why)
		note_charged_here(session, why);
	if (socket < 0)
		return TRUE;
	session->ram->allocate = pr_allocate_start(session->ram, socket,
						   fresh ? destination->uffd : -1, &hooks, error);
	return session->ram->allocate != NULL;
}

void pr_destination_stop_allocator(PrDestination *destination)
{
	PrSession *session = destination->session;

	if (!session->ram)
		return;
	pr_allocate_stop(session->ram->allocate);
	session->ram->allocate = NULL;
}

gboolean pr_destination_allocate(uint32_t block, uint64_t offset, uint64_t length, void *opaque)
{
	const PrRam *ram = ((PrDestination *)opaque)->session->ram;
	uint32_t page_size = ram->blocks[block].page_size;
	uint64_t first = offset / page_size, end = (offset + length + page_size - 1) / page_size;

	return pr_allocate(ram->allocate, block, first, end - first, /* bulk= */ FALSE);
}
