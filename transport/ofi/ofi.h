/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What ofi.c, lane.c and listener.c, the files of the ofi: backend, offer each other. */
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_rma.h>

#include "transport/backend.h"

#define PR_OFI_READS_MAX 64 /* outstanding on a lane */

/* PrTransportOps.warm_up */
void pr_ofi_warm_up(void);

/* Asks libfabric for reliable connections to the URI's host (if `listening`: at that host), with
 * the provider that the URI names, else with the first of our list that works. To be freed with
 * fi_freeinfo(). */
struct fi_info *pr_ofi_getinfo(const PrUri *uri, uint16_t port, gboolean listening, GError **error);

/* An event queue in a fabric of its own, with an fd to sleep on. Used by one thread. */
typedef struct PrOfiEvents {
	struct fid_fabric *fabric;
	struct fid_wait *wait; /* NULL unless the provider is `net`: see ofi.c */
	struct fid_eq *eq;
} PrOfiEvents;

typedef struct PrOfiEvent {
	uint32_t type;	      /* FI_CONNREQ, FI_CONNECTED, FI_SHUTDOWN */
	int error;	      /* not 0: a positive FI_E…, and `type` means nothing */
	gboolean rejected;    /* with error: the peer's engine rejected, not a host on the way */
	struct fi_info *info; /* of FI_CONNREQ; the reader of the event frees it */
	uint8_t data[256];    /* private data of FI_CONNREQ */
	gsize n_data;
} PrOfiEvent;

gboolean pr_ofi_events_open(PrOfiEvents *events, struct fi_info *info, GError **error);
int pr_ofi_events_fd(PrOfiEvents *events);
/* TRUE: the event queue and cq (may be NULL) are empty, and the next entry makes their fds
 * readable. */
gboolean pr_ofi_events_may_sleep(PrOfiEvents *events, struct fid_cq *cq);
/* FALSE: there is no event. */
gboolean pr_ofi_events_read(PrOfiEvents *events, PrOfiEvent *ret);
void pr_ofi_events_close(PrOfiEvents *events);

typedef struct PrOfiSlot {
	struct fi_context2 context; /* belongs to libfabric while busy */
	uint64_t token;
	gboolean busy;
	const PrRegion *region; /* where `buffer` is to be stored; NULL: the READ lands in place */
	uint64_t offset;
	uint32_t length;
	uint8_t *buffer;   /* kept for the next READ of this slot */
	uint32_t capacity; /* bytes of `buffer` */
} PrOfiSlot;

/* Owned by the thread that uses the lane; any thread wakes it or calls fi_shutdown(ep). */
typedef struct PrOfiLane {
	struct fi_info *info;
	PrOfiEvents events;
	struct fid_domain *domain;
	struct fid_cq *cq;
	struct fid_ep *ep;
	struct fid_mr **mrs; /* per region, NULL for an empty one; NULL: the provider needs none */
	guint n_mrs;
	uint8_t scratch; /* the byte that a probe reads lands here */
	struct fid_mr *scratch_mr;
	PrPollSet poll_set;
	gboolean has_request; /* the connect request of `info` belongs to an endpoint */
	int completion_fd;    /* the provider's fd; the poll set adds its eventfd */
	int socket;	      /* the connection's, owned by the provider; -1: not found */
	guint n_posted;	      /* READs since the last pr_ofi_lane_push() */
	gboolean corked;
	PrOfiSlot slots[PR_OFI_READS_MAX];
	guint16 free_slots[PR_OFI_READS_MAX]; /* a stack */
	guint n_free;
} PrOfiLane;

/* Takes info. `access` is what the regions are registered for: FI_REMOTE_READ or FI_READ. */
gboolean pr_ofi_lane_open(PrOfiLane *lane, struct fi_info *info, const PrPathSetup *setup,
			  uint64_t access, GError **error);
gboolean pr_ofi_lane_connect(PrOfiLane *lane, const PrPathSetup *setup, PrLaneId id,
			     gint64 deadline, GError **error);
gboolean pr_ofi_lane_accept(PrOfiLane *lane, const PrPathSetup *setup, gint64 deadline,
			    GError **error);
/* Collects what is sent, for fewer packets, until pr_ofi_lane_push(). */
void pr_ofi_lane_cork(PrOfiLane *lane);
void pr_ofi_lane_push(PrOfiLane *lane);
/* Whether more than one unanswered request has come in. */
gboolean pr_ofi_lane_has_requests(const PrOfiLane *lane);
/* TRUE: nothing is pending, and the next event makes the poll set's fd readable. */
gboolean pr_ofi_lane_may_sleep(PrOfiLane *lane);
/* These free a lane in any state, and end its connection. */
void pr_ofi_lane_close_ep(PrOfiLane *lane);
void pr_ofi_lane_close(PrOfiLane *lane);

/* listener.c */
PrDataListener *pr_ofi_listen(const PrUri *uri, GError **error);
uint16_t pr_ofi_listener_port(PrDataListener *listener);
void pr_ofi_listener_close(PrDataListener *listener);
gboolean pr_ofi_check_options(const PrUri *uri, guint64 *ret_data_port, GError **error);
/* Sets a PR_PATH_ERROR_CONNECT; returns FALSE. */
gboolean pr_ofi_error(const PrUri *uri, const char *what, int number, GError **error);
