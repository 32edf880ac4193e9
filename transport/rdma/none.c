/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Replaces the other files of this folder in a build without libibverbs or librdmacm. */
#include "transport/backends.h"

const PrTransportOps *const pr_transport_rdma = NULL;
