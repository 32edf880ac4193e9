/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The return path: what the destination sends, handled by a thread for each connection. */
#pragma once

#include "migration/source/role.h"

/* GThreadFunc; opaque: the PrConn. */
gpointer pr_source_return_path_thread(gpointer conn);
