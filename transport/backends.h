/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The ops tables of this build, for pr_transport_find() and for their own files. All other code
 * calls pr_transport_find().
 */
#pragma once

#include "transport/transport.h"

/* NULL in a build without libibverbs and librdmacm. */
extern const PrTransportOps *const pr_transport_rdma;
extern const PrTransportOps pr_transport_tcp;
extern const PrTransportOps pr_transport_ofi;
/* Stands for every scheme "faulty+X"; it finds X itself. */
extern const PrTransportOps pr_transport_faulty;

/* A scheme that begins with this is pr_transport_faulty's. */
#define PR_FAULTY_PREFIX "faulty+"
