/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/path-error.h"

G_DEFINE_QUARK(pr_path_error, pr_path_error)
