/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/guest.h"

#include <string.h>

#include "guest/kinds.h"

G_DEFINE_QUARK(pr_guest_error, pr_guest_error)

static const PrGuestOps *const kinds[] = {&pr_guest_qemu, &pr_guest_agent};

PrGuest *pr_guest_open(const char *spec, guint timeout_ms, GError **error)
{
	const char *colon = strchr(spec, ':');

	for (guint i = 0; colon && i < G_N_ELEMENTS(kinds); i++) {
		if (strlen(kinds[i]->kind) == (gsize)(colon - spec) &&
		    g_str_has_prefix(spec, kinds[i]->kind))
			return kinds[i]->open(colon + 1, timeout_ms, error);
	}
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_SPEC,
		    "guest '%s': unknown kind; use qemu:qmp=PATH,agent=PATH or agent:PATH", spec);
	return NULL;
}

void pr_guest_close(PrGuest *guest)
{
	if (guest)
		guest->ops->close(guest);
}
