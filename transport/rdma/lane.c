/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: a lane, which is one queue pair
 *
 * post() puts a READ of the engine on the queue pair as one work request for each granted range
 * that it touches (a piece). Only the last piece is signalled. The READ has a slot, and the
 * slot's number is in the wr_id of all of its pieces. poll() takes completions out of the
 * completion queue and frees their slots.
 *
 * Invariants: one thread uses a lane. A slot is busy from post() until its last piece completes.
 * So an outstanding READ is never forgotten; drain() waits for all slots, and for a marker behind
 * pieces of READs that were only posted in part. `room` counts the work requests that the send
 * queue can still take; probes and the marker have room of their own. A wr_id also carries bits
 * of the epoch, and a completion of another epoch is ignored.
 *
 * Sleeping. The bulk lane polls for up to 50 us (SPIN_MAX_US) before it sleeps, for as long as
 * that has helped recently. Then the lane asks for a completion event, and looks once more for
 * completions that came before the request.
 *
 * Times: a send queue that has no room for 1 s (POST_TIMEOUT_MS) fails the path. The timers of
 * READs are the device's (options.c).
 *
 * Not handled: completions out of order within a queue pair. Reliable connections exclude them.
 */
#include <errno.h>
#include <sched.h>

#include "transport/rdma/path.h"

#define POLL_BATCH	16
#define ACK_BATCH	64   /* completion events that one call acknowledges */
#define RETIRED_MAX	64   /* memory regions that may wait to be freed */
#define SPIN_MAX_US	50   /* before a lane with READs outstanding goes to sleep */
#define POST_TIMEOUT_MS 1000 /* a send queue that has no room for so long is dead */
#define QUEUE_DEPTH	256  /* work requests: READs that cross registered ranges take several */

typedef enum WrKind {
	WR_PIECE = 1, /* a piece of a READ but the last; completes only if it fails */
	WR_LAST,      /* the last piece: as a queue pair completes in order, all have landed */
	WR_MARKER,    /* the last work request of the queue pair: see drain() */
} WrKind;

static uint64_t wr_id(const PrVerbsLane *lane, WrKind kind, guint slot)
{
	return (uint64_t)lane->epoch_tag << 48 | (uint64_t)kind << 32 | slot;
}

static gboolean open_queues(PrVerbsPath *path, PrVerbsLane *lane, GError **error)
{
	struct ibv_context *context = path->device.context;
	guint others = PR_VERBS_PROBES_MAX + 1; /* and the marker */
	guint room = MIN(QUEUE_DEPTH, path->device.caps.max_qp_wr - others);
	struct ibv_qp_init_attr attr = {
		.qp_type = IBV_QPT_RC,
		.cap = {.max_send_wr = room + others,
			.max_recv_wr = 1,
			.max_send_sge = 1,
			.max_recv_sge = 1},
	};

	lane->channel = ibv_create_comp_channel(context);
	if (!lane->channel || !pr_verbs_set_nonblocking(lane->channel->fd))
		return pr_verbs_error(path->uri, "no completion channel", errno, error);
	/* Room for each work request that may be posted: each may fail. */
	lane->cq = ibv_create_cq(context, (int)(room + others), NULL, lane->channel, 0);
	if (!lane->cq)
		return pr_verbs_error(path->uri, "no completion queue", errno, error);
	attr.send_cq = attr.recv_cq = lane->cq;
	lane->qp = ibv_create_qp(path->device.pd, &attr);
	if (!lane->qp)
		return pr_verbs_error(path->uri, "no queue pair", errno, error);
	lane->room = room;
	return TRUE;
}

static gboolean modify(PrVerbsPath *path, PrVerbsLane *lane, struct ibv_qp_attr *attr, int mask,
		       GError **error)
{
	int err = ibv_modify_qp(lane->qp, attr, mask);

	return err ? pr_verbs_error(path->uri, "cannot set the queue pair up", err, error) : TRUE;
}

static gboolean to_init(PrVerbsPath *path, PrVerbsLane *lane, GError **error)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT};
	int mask;

	if (rdma_init_qp_attr(lane->cm, &attr, &mask))
		return pr_verbs_error(path->uri, "cannot set the queue pair up", errno, error);
	/* The peer may only READ, and only at the source. */
	attr.qp_access_flags = path->source_mrs ? IBV_ACCESS_REMOTE_READ : 0;
	return modify(path, lane, &attr, mask | IBV_QP_ACCESS_FLAGS, error);
}

gboolean pr_verbs_lane_open(PrVerbsPath *path, PrVerbsLane *lane, GError **error)
{
	lane->retired = g_ptr_array_new();
	for (guint i = 0; i < PR_VERBS_SLOTS; i++)
		lane->free_slots[i] = i;
	lane->n_free = PR_VERBS_SLOTS;
	return open_queues(path, lane, error) && pr_poll_set_init(&lane->poll_set, error) &&
	       pr_poll_set_add(&lane->poll_set, lane->channel->fd, error) &&
	       to_init(path, lane, error);
}

static gboolean check_mtu(PrVerbsPath *path, enum ibv_mtu mtu, GError **error)
{
	const guint smallest = 128;
	struct ibv_port_attr port;
	int err = ibv_query_port(path->device.context, path->device.port, &port);

	if (err)
		return pr_verbs_error(path->uri, "cannot query the RDMA port", err, error);
	if (mtu <= port.active_mtu)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: the peer sends packets of %u bytes, the port of %s takes %u; set the "
		    "same MTU on both hosts (ip link set dev ETH mtu N, on every switch too)",
		    path->uri->text, smallest << mtu, pr_verbs_device_name(&path->device),
		    smallest << port.active_mtu);
	return FALSE;
}

/* Remembers our own address on the wire, so that events.c can tell when it goes. */
static gboolean check_gid(PrVerbsPath *path, PrVerbsLane *lane, uint8_t index, GError **error)
{
	struct ibv_gid_entry entry;
	int err = ibv_query_gid_ex(path->device.context, path->device.port, index, &entry, 0);

	if (err)
		return pr_verbs_error(path->uri, "the RDMA port's address has gone", err, error);
	lane->gid = entry.gid;
	lane->gid_index = index;
	lane->has_gid = TRUE;
	if (entry.gid_type != IBV_GID_TYPE_ROCE_V1)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: %s would speak RoCE version 1 (GID %u), which is not routed; choose "
		    "version 2: cma_roce_mode -d %s -p %u -m 2, or on the peer",
		    path->uri->text, pr_verbs_device_name(&path->device), index,
		    pr_verbs_device_name(&path->device), path->device.port);
	return FALSE;
}

static gboolean to_receive(PrVerbsPath *path, PrVerbsLane *lane, guint depth, GError **error)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR};
	int mask;

	if (rdma_init_qp_attr(lane->cm, &attr, &mask))
		return pr_verbs_error(path->uri, "cannot set the queue pair up", errno, error);
	if (!check_mtu(path, attr.path_mtu, error) ||
	    (attr.ah_attr.is_global && !check_gid(path, lane, attr.ah_attr.grh.sgid_index, error)))
		return FALSE;
	attr.max_dest_rd_atomic = depth;
	attr.min_rnr_timer = path->options.rnr_timer;
	return modify(path, lane, &attr, mask | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
		      error);
}

static gboolean to_send(PrVerbsPath *path, PrVerbsLane *lane, guint depth, GError **error)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS};
	int mask;

	if (rdma_init_qp_attr(lane->cm, &attr, &mask))
		return pr_verbs_error(path->uri, "cannot set the queue pair up", errno, error);
	attr.timeout = path->options.ack_timeout;
	attr.retry_cnt = path->options.retry[pr_verbs_kind(lane->id)];
	attr.rnr_retry = path->options.rnr_retry;
	attr.max_rd_atomic = depth;
	return modify(path, lane, &attr,
		      mask | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			      IBV_QP_MAX_QP_RD_ATOMIC,
		      error);
}

gboolean pr_verbs_lane_ready(PrVerbsPath *path, PrVerbsLane *lane, guint depth, GError **error)
{
	if (!depth) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: the peer's device answers no RDMA READ; use ofi: or tcp:",
			    path->uri->text);
		return FALSE;
	}
	lane->depth = depth;
	return to_receive(path, lane, depth, error) && to_send(path, lane, depth, error);
}

/* ---- completions ---- */

static gint64 posted_at(const PrVerbsLane *lane, const PrVerbsSlot *slot)
{
	return __atomic_load_n(&lane->posted_us[slot - lane->slots], __ATOMIC_RELAXED);
}

static void set_posted(PrVerbsLane *lane, const PrVerbsSlot *slot, gint64 when)
{
	__atomic_store_n(&lane->posted_us[slot - lane->slots], when, __ATOMIC_RELAXED);
}

gint64 pr_verbs_lane_oldest(const PrVerbsLane *lane)
{
	gint64 oldest = 0;

	for (guint i = 0; i < PR_VERBS_SLOTS; i++) {
		gint64 at = posted_at(lane, &lane->slots[i]);

		if (at && (!oldest || at < oldest))
			oldest = at;
	}
	return oldest;
}

/* Statuses that no failure of a path explains. Bytes that have arrived are right all the same. */
static gboolean is_bug(enum ibv_wc_status status)
{
	switch (status) {
	case IBV_WC_LOC_LEN_ERR:
	case IBV_WC_LOC_PROT_ERR:
	case IBV_WC_LOC_ACCESS_ERR:
	case IBV_WC_REM_INV_REQ_ERR:
	case IBV_WC_REM_ACCESS_ERR:
		return TRUE;
	default:
		return FALSE;
	}
}

static void note_failure(PrVerbsPath *path, const PrVerbsLane *lane, const PrVerbsSlot *slot,
			 const struct ibv_wc *wc)
{
	gint64 ms = (g_get_monotonic_time() - posted_at(lane, slot)) / 1000;

	if (!pr_path_life_is_up(&path->life))
		return;
	/* soft-RoCE checks the key of a probe when it answers the probe for the second time. */
	if (is_bug(wc->status) && !slot->probe)
		g_critical("%s: device %s: a READ failed in a way that only a bug explains: %s "
			   "(vendor 0x%x)",
			   path->life.name, pr_verbs_device_name(&path->device),
			   ibv_wc_status_str(wc->status), wc->vendor_err);
	switch (wc->status) {
	case IBV_WC_RETRY_EXC_ERR:
		pr_verbs_fail(path, "retry count exceeded after %" G_GINT64_FORMAT " ms", ms);
		break;
	case IBV_WC_RNR_RETRY_EXC_ERR:
		pr_verbs_fail(path, "the source was not ready for %" G_GINT64_FORMAT " ms", ms);
		break;
	case IBV_WC_LOC_QP_OP_ERR:
		pr_verbs_fail(path, "cannot send: its link, route or address has gone");
		break;
	case IBV_WC_WR_FLUSH_ERR:
		/* No completion has told a cause: the kernel has moved the queue pair to the
		 * error state. */
		pr_verbs_fail(path, "the connection ended while READs were outstanding");
		break;
	default:
		pr_verbs_fail(path, "%s (vendor 0x%x)", ibv_wc_status_str(wc->status),
			      wc->vendor_err);
	}
}

static void release_slot(PrVerbsLane *lane, PrVerbsSlot *slot)
{
	if (slot->mr)
		g_ptr_array_add(lane->retired, slot->mr);
	slot->mr = NULL;
	slot->busy = FALSE;
	set_posted(lane, slot, 0);
	*(slot->probe ? &lane->n_probes : &lane->n_reads) -= 1;
	lane->room += slot->n_wrs;
	lane->free_slots[lane->n_free++] = slot - lane->slots;
}

/* Accounts for one completion. TRUE: it completes a READ, which *ret describes. */
static gboolean account_completion(PrVerbsPath *path, PrVerbsLane *lane, const struct ibv_wc *wc,
				   PrCompletion *ret)
{
	guint index = (uint32_t)wc->wr_id;
	WrKind kind = wc->wr_id >> 32 & 0xffff;
	PrVerbsSlot *slot;

	if (wc->wr_id >> 48 != lane->epoch_tag)
		return FALSE;
	if (kind == WR_MARKER) {
		lane->marker_due = FALSE;
		return FALSE;
	}
	slot = &lane->slots[index % PR_VERBS_SLOTS];
	if (!slot->busy)
		return FALSE;
	if (wc->status != IBV_WC_SUCCESS) {
		slot->failed = TRUE;
		note_failure(path, lane, slot, wc);
	}
	if (kind != WR_LAST)
		return FALSE;
	*ret = (PrCompletion){.token = slot->token, .ok = !slot->failed};
	release_slot(lane, slot);
	return TRUE;
}

/* Takes completions out of the queue. *ret_any: the queue had entries, even if none completes a
 * READ. */
static guint reap(PrVerbsPath *path, PrVerbsLane *lane, PrCompletion *ret, guint max,
		  gboolean *ret_any)
{
	struct ibv_wc wcs[POLL_BATCH];
	guint n = 0;

	*ret_any = FALSE;
	while (n < max) {
		guint wanted = MIN(max - n, POLL_BATCH);
		int got = ibv_poll_cq(lane->cq, (int)wanted, wcs);

		if (got < 0)
			pr_verbs_fail(path, "the completion queue is broken");
		if (got <= 0)
			break;
		*ret_any = TRUE;
		for (int i = 0; i < got; i++)
			n += account_completion(path, lane, &wcs[i], ret + n);
		if (got < (int)wanted)
			break;
	}
	return n;
}

/* Keeps completions for the next poll. TRUE: the queue had entries. */
static gboolean reap_early(PrVerbsPath *path, PrVerbsLane *lane)
{
	gboolean any;

	lane->n_early +=
		reap(path, lane, lane->early + lane->n_early, PR_VERBS_SLOTS - lane->n_early, &any);
	return any;
}

guint pr_verbs_lane_poll(PrVerbsPath *path, PrVerbsLane *lane, PrCompletion *ret, guint max)
{
	guint n = pr_backend_take_early(lane->early, &lane->n_early, ret, max);
	gboolean any;

	g_atomic_int_set(&lane->asleep, FALSE);
	g_atomic_int_inc(&lane->n_polls);
	return n + reap(path, lane, ret + n, max - n, &any);
}

static void free_retired(PrVerbsLane *lane)
{
	for (guint i = 0; i < lane->retired->len; i++)
		ibv_dereg_mr(lane->retired->pdata[i]);
	g_ptr_array_set_size(lane->retired, 0);
}

static void ack_cq_events(PrVerbsLane *lane)
{
	if (lane->n_cq_events)
		ibv_ack_cq_events(lane->cq, lane->n_cq_events);
	lane->n_cq_events = 0;
}

/* Reads old notifications, which would keep the channel readable. */
static void read_cq_events(PrVerbsLane *lane)
{
	struct ibv_cq *cq;
	void *context;

	while (ibv_get_cq_event(lane->channel, &cq, &context) == 0)
		lane->n_cq_events++;
	if (lane->n_cq_events >= ACK_BATCH)
		ack_cq_events(lane);
}

/* Asks for a notification. TRUE: the queue is empty, and the next completion sends one. */
static gboolean request_event(PrVerbsPath *path, PrVerbsLane *lane)
{
	int err;

	read_cq_events(lane);
	err = ibv_req_notify_cq(lane->cq, 0);
	if (err)
		pr_verbs_fail(path, "no completion events: %s", g_strerror(err));
	return !reap_early(path, lane);
}

/* Polls for a while, the longer the more often that has helped. Not on an urgent lane, whose
 * thread has already polled for faults and completions as long as the operator wants. TRUE: there
 * are completions. */
static gboolean spin(PrVerbsPath *path, PrVerbsLane *lane)
{
	gint64 until = g_get_monotonic_time() + lane->spin_us;

	if (pr_lane_is_urgent(lane->id) || lane->n_free == PR_VERBS_SLOTS)
		return FALSE;
	do {
		if (reap_early(path, lane)) {
			lane->spin_us = MIN(lane->spin_us * 2 + 1, SPIN_MAX_US);
			return TRUE;
		}
		sched_yield();
	} while (g_get_monotonic_time() < until);
	lane->spin_us /= 2;
	return FALSE;
}

gboolean pr_verbs_lane_arm(PrVerbsPath *path, PrVerbsLane *lane)
{
	if (lane->n_early || !pr_path_life_is_up(&path->life) || spin(path, lane))
		return FALSE;
	free_retired(lane);
	if (!request_event(path, lane) || !pr_path_life_is_up(&path->life))
		return FALSE;
	g_atomic_int_set(&lane->asleep, TRUE);
	return TRUE;
}

/* ---- posting ---- */

/* Waits until the send queue has room for one more. FALSE: the path has failed. */
static gboolean wait_for_room(PrVerbsPath *path, PrVerbsLane *lane)
{
	gint64 deadline = pr_backend_deadline(POST_TIMEOUT_MS);

	while (!lane->room && pr_path_life_is_up(&path->life)) {
		if (reap_early(path, lane) || !request_event(path, lane))
			continue;
		if (!pr_backend_wait(lane->poll_set.epoll_fd, POLLIN, deadline, NULL, NULL))
			pr_verbs_fail(path, "no READ has completed for %d ms", POST_TIMEOUT_MS);
	}
	return lane->room > 0;
}

static gboolean post_wr(PrVerbsPath *path, PrVerbsLane *lane, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad;
	int err = ibv_post_send(lane->qp, wr, &bad);

	if (!err)
		return TRUE;
	pr_verbs_fail(path, "the device refuses a READ: %s", g_strerror(err));
	return FALSE;
}

/* Posts the part of [offset, offset + length) that one granted range covers. Returns its bytes, 0
 * when the path has failed. */
static uint32_t post_piece(PrVerbsPath *path, PrVerbsLane *lane, PrVerbsSlot *slot, uint32_t block,
			   uint64_t offset, uint32_t length)
{
	PrVerbsDestinationMr *range = pr_verbs_destination_mr_find(path, block, offset);
	struct ibv_sge sge = {.addr = (uintptr_t)path->regions[block].addr + offset};
	struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_READ};
	gboolean last, alone;

	if (!range) {
		pr_path_life_fail(&path->life, "the source does not let us read all of its RAM");
		return 0;
	}
	sge.length = (uint32_t)MIN(length, range->offset + range->length - offset);
	last = sge.length == length;
	alone = pr_lane_is_urgent(lane->id) && last && !slot->n_wrs;
	if (!pr_verbs_destination_mr_key(path, range, alone, offset, sge.length, &sge.lkey,
					 &slot->mr) ||
	    !wait_for_room(path, lane))
		return 0;
	wr.wr_id = wr_id(lane, last ? WR_LAST : WR_PIECE, slot - lane->slots);
	wr.send_flags = last ? IBV_SEND_SIGNALED : 0;
	wr.wr.rdma.remote_addr = range->remote + (offset - range->offset);
	wr.wr.rdma.rkey = range->rkey;
	if (!post_wr(path, lane, &wr))
		return 0;
	lane->room--;
	slot->n_wrs++;
	return sge.length;
}

static PrVerbsSlot *claim_slot(PrVerbsLane *lane, uint64_t token, gboolean probe)
{
	PrVerbsSlot *slot = &lane->slots[lane->free_slots[--lane->n_free]];

	*slot = (PrVerbsSlot){
		.token = token,
		.busy = TRUE,
		.probe = probe,
	};
	set_posted(lane, slot, g_get_monotonic_time());
	*(probe ? &lane->n_probes : &lane->n_reads) += 1;
	return slot;
}

gboolean pr_verbs_lane_post(PrVerbsPath *path, PrVerbsLane *lane, uint32_t block, uint64_t offset,
			    uint32_t length, uint64_t token)
{
	PrVerbsSlot *slot;

	g_assert(lane->n_reads < lane->depth);
	slot = claim_slot(lane, token, FALSE);
	while (length) {
		uint32_t done = post_piece(path, lane, slot, block, offset, length);

		if (!done) {
			/* The pieces that were posted may still land; drain() waits for them. */
			release_slot(lane, slot);
			return FALSE;
		}
		offset += done;
		length -= done;
	}
	if (lane->retired->len >= RETIRED_MAX)
		free_retired(lane);
	return TRUE;
}

gboolean pr_verbs_lane_probe(PrVerbsPath *path, PrVerbsLane *lane, uint64_t token)
{
	struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_READ, .send_flags = IBV_SEND_SIGNALED};
	PrVerbsSlot *slot;

	g_assert(lane->n_probes < PR_VERBS_PROBES_MAX);
	if (!pr_path_life_is_up(&path->life))
		return FALSE;
	slot = claim_slot(lane, token, TRUE);
	wr.wr_id = wr_id(lane, WR_LAST, slot - lane->slots);
	/* For a READ of no bytes the key need not be valid. But soft-RoCE checks the key when it
	 * answers for the second time. */
	wr.wr.rdma.rkey = (uint32_t)g_atomic_int_get(&path->probe_key);
	/* The queue has room of its own for probes. */
	if (post_wr(path, lane, &wr))
		return TRUE;
	release_slot(lane, slot);
	return FALSE;
}

/* ---- the end ---- */

/* Posts the last work request of the queue pair: when it has completed, all have. */
static void post_marker(PrVerbsLane *lane)
{
	struct ibv_send_wr *bad, wr = {
					 .wr_id = wr_id(lane, WR_MARKER, 0),
					 .opcode = IBV_WR_RDMA_READ,
					 .send_flags = IBV_SEND_SIGNALED,
				 };

	lane->marker_due = ibv_post_send(lane->qp, &wr, &bad) == 0;
}

gboolean pr_verbs_lane_drain(PrVerbsPath *path, PrVerbsLane *lane, gint64 deadline)
{
	if (!lane->qp)
		return TRUE;
	lane->n_early = 0;
	post_marker(lane);
	while (lane->marker_due || lane->n_free < PR_VERBS_SLOTS) {
		gboolean quiet = request_event(path, lane);

		lane->n_early = 0;
		if (quiet && !pr_backend_wait(lane->channel->fd, POLLIN, deadline, NULL, NULL))
			return FALSE;
	}
	return TRUE;
}

void pr_verbs_lane_fence(PrVerbsLane *lane)
{
	g_clear_pointer(&lane->qp, ibv_destroy_qp);
}

void pr_verbs_lane_close(PrVerbsLane *lane)
{
	pr_verbs_lane_fence(lane);
	/* Tells the peer, and does not wait for an answer. */
	g_clear_pointer(&lane->cm, rdma_destroy_id);
	for (guint i = 0; i < PR_VERBS_SLOTS; i++)
		if (lane->slots[i].mr)
			ibv_dereg_mr(lane->slots[i].mr);
	if (lane->retired)
		free_retired(lane);
	g_clear_pointer(&lane->retired, g_ptr_array_unref);
	if (lane->cq) {
		ack_cq_events(lane);
		ibv_destroy_cq(lane->cq);
	}
	if (lane->channel)
		ibv_destroy_comp_channel(lane->channel);
	lane->cq = NULL;
	lane->channel = NULL;
	pr_poll_set_clear(&lane->poll_set);
}
