/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Attaching to a QEMU that runs already. Its process is found by its QMP socket. */
#pragma once

#include "guest/agent-client.h"
#include "guest/qmp.h"

/* pid 0: the process that listens at that socket. Takes the helper. */
PrAgentClient *pr_qemu_attach(GSocket *qmp, const char *qmp_path, pid_t pid, PrGuestHelper *helper,
			      guint timeout_ms, GError **error);
/* Ends the fault mode where the helper has ended and can't do it. */
void pr_qemu_unregister(int uffd, const PrGuestBlock *blocks, guint n);
/* Refuses a process that is not the QEMU at that socket. named: the operator gave it by pid=. */
gboolean pr_qemu_check_process(PrQmp *qmp, const char *qmp_path, pid_t pid, gboolean named,
			       GError **error);
