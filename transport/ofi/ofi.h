/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The parts of the ofi: backend among themselves: ofi.c, lane.c, listener.c. */
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_rma.h>

#include "transport/backend.h"
#include "transport/lane-rendezvous.h"

#define PR_OFI_READS_MAX 64 /* outstanding on a lane */

/* PrTransportOps.warm_up */
void pr_ofi_warm_up(void);

/* Asks libfabric for reliable connections to (or, listening, at) the URI's host, with the provider that
 * it names or the first of our list. To be freed with fi_freeinfo(). */
struct fi_info *pr_ofi_getinfo(const PrUri *uri, uint16_t port, gboolean listening, GError **error);

/* An event queue in a fabric of its own, with something to sleep on. Thread: its user's. */
typedef struct PrOfiEvents {
	struct fid_fabric *fabric;
	struct fid_wait *wait; /* of `net` only: see ofi.c */
	struct fid_eq *eq;
} PrOfiEvents;

typedef struct PrOfiEvent {
	uint32_t type;	      /* FI_CONNREQ, FI_CONNECTED, FI_SHUTDOWN */
	int error;	      /* instead: a positive FI_E… */
	gboolean rejected;    /* with error: by the peer's engine, not on the way to it */
	struct fi_info *info; /* of FI_CONNREQ; the receiver's to free */
	uint8_t data[256];    /* private data of FI_CONNREQ */
	gsize n_data;
} PrOfiEvent;

gboolean pr_ofi_events_open(PrOfiEvents *events, struct fi_info *info, GError **error);
int pr_ofi_events_fd(PrOfiEvents *events);
/* TRUE: neither the event queue nor cq (may be NULL) has anything, and whatever comes makes their fds readable. */
gboolean pr_ofi_events_may_sleep(PrOfiEvents *events, struct fid_cq *cq);
/* FALSE: there is none. */
gboolean pr_ofi_events_read(PrOfiEvents *events, PrOfiEvent *ret);
void pr_ofi_events_close(PrOfiEvents *events);

typedef struct PrOfiSlot {
	struct fi_context2 context; /* libfabric's while busy */
	uint64_t token;
	gboolean busy;
	const PrRegion
		*region; /* what is to be stored there when it has come; NULL: it lands there */
	uint64_t offset;
	uint32_t length;
	uint8_t *buffer; /* kept for the next READ */
	uint32_t capacity;
} PrOfiSlot;

/* Owned by the thread that uses the lane; wake and fi_shutdown(ep): anyone. */
typedef struct PrOfiLane {
	struct fi_info *info;
	PrOfiEvents events;
	struct fid_domain *domain;
	struct fid_cq *cq;
	struct fid_ep *ep;
	struct fid_mr **mrs; /* per region; NULL where it has none */
	guint n_mrs;
	uint8_t scratch; /* where a probe's byte lands */
	struct fid_mr *scratch_mr;
	PrPollSet waker;
	gboolean has_request; /* what info came with was given to an endpoint */
	int completion_fd;    /* the provider's own, without the waker's eventfd */
	int socket;	/* likewise, of the connection; -1: it has none, or not one of its own */
	guint n_posted; /* READs since the last pr_ofi_lane_push() */
	gboolean corked;
	PrOfiSlot slots[PR_OFI_READS_MAX];
	guint16 free_slots[PR_OFI_READS_MAX]; /* a stack */
	guint n_free;
} PrOfiLane;

/* Takes info. `access`: what the regions are registered for, FI_REMOTE_READ or FI_READ. */
gboolean pr_ofi_lane_open(PrOfiLane *lane, struct fi_info *info, const PrPathSetup *setup,
			  uint64_t access, GError **error);
gboolean pr_ofi_lane_connect(PrOfiLane *lane, const PrPathSetup *setup, PrLaneId id,
			     gint64 deadline, GError **error);
gboolean pr_ofi_lane_accept(PrOfiLane *lane, const PrPathSetup *setup, gint64 deadline,
			    GError **error);
/* From now on what is sent may wait, for others to go with it, until pr_ofi_lane_push(). */
void pr_ofi_lane_cork(PrOfiLane *lane);
void pr_ofi_lane_push(PrOfiLane *lane);
/* Whether more than one request has come in that is not answered. */
gboolean pr_ofi_lane_has_requests(const PrOfiLane *lane);
/* TRUE: nothing is pending, and whatever comes makes the waker's fd readable. */
gboolean pr_ofi_lane_may_sleep(PrOfiLane *lane);
/* Frees what there is, in any state; the connection ends if it has not yet. */
void pr_ofi_lane_close_ep(PrOfiLane *lane);
void pr_ofi_lane_close(PrOfiLane *lane);

/* listener.c */
PrDataListener *pr_ofi_listen(const PrUri *uri, GError **error);
uint16_t pr_ofi_listener_port(PrDataListener *listener);
void pr_ofi_offer(PrDataListener *listener, GSocketConnection *connection,
		  const PrLaneHello *hello);
void pr_ofi_listener_close(PrDataListener *listener);
/* Where accept() claims connect requests, struct fi_info* to open the lanes with. */
PrPendingLanes *pr_ofi_listener_desk(PrDataListener *listener);
void pr_ofi_listener_reject(PrDataListener *listener, struct fi_info *info);
gboolean pr_ofi_check_options(const PrUri *uri, guint64 *ret_data_port, GError **error);
/* Sets a PR_PATH_ERROR_CONNECT; returns FALSE. */
gboolean pr_ofi_error(const PrUri *uri, const char *what, int number, GError **error);
