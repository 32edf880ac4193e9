/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The ops tables of this build, for pr_transport_find() and for the files of the backends. All
 * other code calls pr_transport_find().
 */
#pragma once

#include "transport/transport.h"

/* NULL in a build without libibverbs and librdmacm. */
extern const PrTransportOps *const pr_transport_rdma;
extern const PrTransportOps pr_transport_tcp;
extern const PrTransportOps pr_transport_ofi;
/* Serves each scheme "faulty+X"; it finds X itself. */
extern const PrTransportOps pr_transport_faulty;

/* Schemes that begin with this belong to pr_transport_faulty. */
#define PR_FAULTY_PREFIX "faulty+"
