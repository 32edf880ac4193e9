/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/guest.h"

#include <errno.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/attach/attach.h"
#include "guest/kinds.h"

G_DEFINE_QUARK(pr_guest_error, pr_guest_error)

static const PrGuestOps *const kinds[] = {&pr_guest_qemu, &pr_guest_agent};

static const PrGuestOps *find_kind(const char *spec, const char **ret_rest)
{
	const char *colon = strchr(spec, ':');

	for (guint i = 0; colon && i < G_N_ELEMENTS(kinds); i++) {
		*ret_rest = colon + 1;
		if (strlen(kinds[i]->kind) == (gsize)(colon - spec) &&
		    g_str_has_prefix(spec, kinds[i]->kind))
			return kinds[i];
	}
	return NULL;
}

void pr_guest_helper_end(PrGuestHelper *helper)
{
	if (helper->fd < 0)
		return;
	close(helper->fd);
	helper->fd = -1;
	/* Ended by the helper, which ends when its socket does. */
	while (waitpid(helper->pid, NULL, 0) < 0 && errno == EINTR)
		;
}

gboolean pr_guest_fork_helper(const char *spec, gboolean filter, PrGuestHelper *ret, GError **error)
{
	const char *rest;
	const PrGuestOps *kind = find_kind(spec, &rest);
	int fd;

	*ret = (PrGuestHelper)PR_GUEST_HELPER_NONE;
	if (!kind || !kind->wants_helper || !kind->wants_helper(rest))
		return TRUE;
	fd = pr_attach_fork(filter, &ret->pid);
	if (fd >= 0) {
		ret->fd = fd;
		return TRUE;
	}
	if (fd == -ENOSYS)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "guest '%s': this architecture has no injector; use the preload agent: "
			    "start QEMU with LD_PRELOAD=libpostroad-agent.so and add agent=PATH",
			    spec);
	else
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE,
			    "guest '%s': no helper process: %s", spec, g_strerror(-fd));
	return FALSE;
}

PrGuest *pr_guest_open(const char *spec, PrGuestHelper *helper, guint timeout_ms, GError **error)
{
	PrGuestHelper own = PR_GUEST_HELPER_NONE;
	const char *rest;
	const PrGuestOps *kind = find_kind(spec, &rest);
	PrGuest *guest;

	if (!kind) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_SPEC,
			    "guest '%s': unknown kind; use qemu:qmp=PATH[,pid=N][,agent=PATH] or "
			    "agent:PATH",
			    spec);
		return NULL;
	}
	if (!helper && !pr_guest_fork_helper(spec, TRUE, &own, error))
		return NULL;
	if (!helper)
		helper = &own;
	guest = kind->open(rest, helper, timeout_ms, error);
	/* Ends a helper that was not taken. */
	pr_guest_helper_end(helper);
	return guest;
}

void pr_guest_close(PrGuest *guest)
{
	if (guest)
		guest->ops->close(guest);
}
