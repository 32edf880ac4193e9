/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One lane of rdma: its queue pair, what is posted on it and what comes back. The why is in rdma.c. */
#include <errno.h>
#include <sched.h>
#include <string.h>

#include "transport/rdma/path.h"

#define POLL_BATCH	16
#define ACK_BATCH	64   /* completion events that are acknowledged at once */
#define RETIRED_MAX	64   /* memory regions that wait to be freed */
#define SPIN_MAX_US	50   /* before a lane with READs outstanding goes to sleep */
#define POST_TIMEOUT_MS 1000 /* a queue that takes nothing for as long is dead */
#define QUEUE_DEPTH	256  /* work requests: READs that cross registered ranges take several */

typedef enum WrKind {
	WR_PIECE = 1, /* of a READ, with more to come; completes only if it fails */
	WR_LAST,      /* the end of a READ: a queue completes in order, so all of it is there */
	WR_MARKER,    /* the end of the queue pair */
} WrKind;

static uint64_t wr_id(const PrVerbsLane *lane, WrKind kind, guint slot)
{
	return (uint64_t)lane->epoch_tag << 48 | (uint64_t)kind << 32 | slot;
}

static gboolean open_queues(PrVerbsPath *path, PrVerbsLane *lane, GError **error)
{
	struct ibv_context *context = path->rail.context;
	guint others = PR_VERBS_PROBES_MAX + 1; /* and the marker */
	guint room = MIN(QUEUE_DEPTH, path->rail.caps.max_qp_wr - others);
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
	/* For all that may be posted, since all may fail. */
	lane->cq = ibv_create_cq(context, (int)(room + others), NULL, lane->channel, 0);
	if (!lane->cq)
		return pr_verbs_error(path->uri, "no completion queue", errno, error);
	attr.send_cq = attr.recv_cq = lane->cq;
	lane->qp = ibv_create_qp(path->rail.pd, &attr);
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
	/* Nothing but READs, and those only from the source. */
	attr.qp_access_flags = path->exports ? IBV_ACCESS_REMOTE_READ : 0;
	return modify(path, lane, &attr, mask | IBV_QP_ACCESS_FLAGS, error);
}

gboolean pr_verbs_lane_open(PrVerbsPath *path, PrVerbsLane *lane, GError **error)
{
	lane->retired = g_ptr_array_new();
	for (guint i = 0; i < PR_VERBS_SLOTS; i++)
		lane->free_slots[i] = i;
	lane->n_free = PR_VERBS_SLOTS;
	return open_queues(path, lane, error) && pr_poll_set_init(&lane->waker, error) &&
	       pr_poll_set_add(&lane->waker, lane->channel->fd, error) &&
	       to_init(path, lane, error);
}

static gboolean check_mtu(PrVerbsPath *path, enum ibv_mtu mtu, GError **error)
{
	const guint smallest = 128;
	struct ibv_port_attr port;
	int err = ibv_query_port(path->rail.context, path->rail.port, &port);

	if (err)
		return pr_verbs_error(path->uri, "cannot query the RDMA port", err, error);
	if (mtu <= port.active_mtu)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: the peer sends packets of %u bytes, the port of %s takes %u; set the "
		    "same MTU on both hosts (ip link set dev ETH mtu N, on every switch too)",
		    path->uri->text, smallest << mtu, pr_verbs_device_name(&path->rail),
		    smallest << port.active_mtu);
	return FALSE;
}

/* Remembers our own address on the wire, to notice when it goes. */
static gboolean check_gid(PrVerbsPath *path, PrVerbsLane *lane, uint8_t index, GError **error)
{
	struct ibv_gid_entry entry;
	int err = ibv_query_gid_ex(path->rail.context, path->rail.port, index, &entry, 0);

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
		    path->uri->text, pr_verbs_device_name(&path->rail), index,
		    pr_verbs_device_name(&path->rail), path->rail.port);
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

/* A status that no path error explains. What has arrived so far is right all the same. */
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
	const char *rail = pr_verbs_device_name(&path->rail);
	gint64 ms = (g_get_monotonic_time() - posted_at(lane, slot)) / 1000;

	if (!pr_fate_is_up(&path->fate))
		return;
	/* soft-RoCE does not know a probe's key when it has to answer it twice. */
	if (is_bug(wc->status) && !slot->probe)
		g_critical("%s: rail %s: a READ failed in a way that only a bug explains: %s "
			   "(vendor 0x%x)",
			   path->fate.name, rail, ibv_wc_status_str(wc->status), wc->vendor_err);
	switch (wc->status) {
	case IBV_WC_RETRY_EXC_ERR:
		pr_verbs_fail(path, "rail %s: retry count exceeded after %" G_GINT64_FORMAT " ms",
			      rail, ms);
		break;
	case IBV_WC_RNR_RETRY_EXC_ERR:
		pr_verbs_fail(path, "rail %s: the source was not ready for %" G_GINT64_FORMAT " ms",
			      rail, ms);
		break;
	case IBV_WC_LOC_QP_OP_ERR:
		pr_verbs_fail(path, "rail %s: cannot send: its link, route or address has gone",
			      rail);
		break;
	case IBV_WC_WR_FLUSH_ERR:
		/* What came first has no completion: the queue pair was taken from us. */
		pr_verbs_fail(path, "rail %s: the connection was ended under READs", rail);
		break;
	default:
		pr_verbs_fail(path, "rail %s: %s (vendor 0x%x)", rail,
			      ibv_wc_status_str(wc->status), wc->vendor_err);
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

/* Returns whether a READ is complete. */
static gboolean take(PrVerbsPath *path, PrVerbsLane *lane, const struct ibv_wc *wc,
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

/* Moves completions out of the queue; *ret_any: there was something, if only of no interest. */
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
			pr_verbs_fail(path, "rail %s: the completion queue is broken",
				      pr_verbs_device_name(&path->rail));
		if (got <= 0)
			break;
		*ret_any = TRUE;
		for (int i = 0; i < got; i++)
			n += take(path, lane, &wcs[i], ret + n);
		if (got < (int)wanted)
			break;
	}
	return n;
}

/* Keeps what has completed for the next poll. */
static gboolean reap_early(PrVerbsPath *path, PrVerbsLane *lane)
{
	gboolean any;

	lane->n_early +=
		reap(path, lane, lane->early + lane->n_early, PR_VERBS_SLOTS - lane->n_early, &any);
	return any;
}

guint pr_verbs_lane_poll(PrVerbsPath *path, PrVerbsLane *lane, PrCompletion *ret, guint max)
{
	guint n = MIN(lane->n_early, max);
	gboolean any;

	g_atomic_int_set(&lane->asleep, FALSE);
	g_atomic_int_inc(&lane->n_polls);
	if (n) {
		memcpy(ret, lane->early, n * sizeof(*ret));
		lane->n_early -= n;
		memmove(lane->early, lane->early + n, lane->n_early * sizeof(*ret));
	}
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

/* Old notifications would keep the channel readable. */
static void take_cq_events(PrVerbsLane *lane)
{
	struct ibv_cq *cq;
	void *context;

	while (ibv_get_cq_event(lane->channel, &cq, &context) == 0)
		lane->n_cq_events++;
	if (lane->n_cq_events >= ACK_BATCH)
		ack_cq_events(lane);
}

/* Asks for a notification. TRUE: one will come with the next completion, none is there now. */
static gboolean request_event(PrVerbsPath *path, PrVerbsLane *lane)
{
	int err;

	take_cq_events(lane);
	err = ibv_req_notify_cq(lane->cq, 0);
	if (err)
		pr_verbs_fail(path, "rail %s: no completion events: %s",
			      pr_verbs_device_name(&path->rail), g_strerror(err));
	return !reap_early(path, lane);
}

/* Looks for completions for a while whose length follows how often that helps. Not on the urgent lane, whose
 * thread has looked for faults and completions alike for as long as the operator wants. */
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
	if (lane->n_early || !pr_fate_is_up(&path->fate) || spin(path, lane))
		return FALSE;
	free_retired(lane);
	if (!request_event(path, lane) || !pr_fate_is_up(&path->fate))
		return FALSE;
	g_atomic_int_set(&lane->asleep, TRUE);
	return TRUE;
}

/* ---- posting ---- */

/* Waits until the send queue takes one more. FALSE: it will not. */
static gboolean wait_for_room(PrVerbsPath *path, PrVerbsLane *lane)
{
	gint64 deadline = pr_backend_deadline(POST_TIMEOUT_MS);

	while (!lane->room && pr_fate_is_up(&path->fate)) {
		if (reap_early(path, lane) || !request_event(path, lane))
			continue;
		if (!pr_backend_wait(lane->waker.epoll_fd, POLLIN, deadline, NULL, NULL))
			pr_verbs_fail(path, "rail %s: no READ has completed for %d ms",
				      pr_verbs_device_name(&path->rail), POST_TIMEOUT_MS);
	}
	return lane->room > 0;
}

static gboolean post_wr(PrVerbsPath *path, PrVerbsLane *lane, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad;
	int err = ibv_post_send(lane->qp, wr, &bad);

	if (!err)
		return TRUE;
	pr_verbs_fail(path, "rail %s: a READ was not taken: %s", pr_verbs_device_name(&path->rail),
		      g_strerror(err));
	return FALSE;
}

/* Posts what one import covers of [offset, offset + length); returns how many bytes, 0 when the path has
 * failed. */
static uint32_t post_piece(PrVerbsPath *path, PrVerbsLane *lane, PrVerbsSlot *slot, uint32_t block,
			   uint64_t offset, uint32_t length)
{
	PrVerbsDestinationMr *import = pr_verbs_destination_mr_find(path, block, offset);
	struct ibv_sge sge = {.addr = (uintptr_t)path->regions[block].addr + offset};
	struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_READ};
	gboolean last, alone;

	if (!import) {
		pr_verbs_fail(path, "the source does not let us read all of its RAM");
		return 0;
	}
	sge.length = (uint32_t)MIN(length, import->offset + import->length - offset);
	last = sge.length == length;
	alone = pr_lane_is_urgent(lane->id) && last && !slot->n_wrs;
	if (!pr_verbs_destination_mr_key(path, import, alone, offset, sge.length, &sge.lkey,
					 &slot->mr) ||
	    !wait_for_room(path, lane))
		return 0;
	wr.wr_id = wr_id(lane, last ? WR_LAST : WR_PIECE, slot - lane->slots);
	wr.send_flags = last ? IBV_SEND_SIGNALED : 0;
	wr.wr.rdma.remote_addr = import->remote + (offset - import->offset);
	wr.wr.rdma.rkey = import->rkey;
	if (!post_wr(path, lane, &wr))
		return 0;
	lane->room--;
	slot->n_wrs++;
	return sge.length;
}

static PrVerbsSlot *take_slot(PrVerbsLane *lane, uint64_t token, gboolean probe)
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
	slot = take_slot(lane, token, FALSE);
	while (length) {
		uint32_t done = post_piece(path, lane, slot, block, offset, length);

		if (!done) {
			/* What is posted of it completes to nobody; drain() waits for it. */
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
	if (!pr_fate_is_up(&path->fate))
		return FALSE;
	slot = take_slot(lane, token, TRUE);
	wr.wr_id = wr_id(lane, WR_LAST, slot - lane->slots);
	/* Nothing is read, so nobody has to look at a key; soft-RoCE does, when it answers for the second
	 * time. */
	wr.wr.rdma.rkey = (uint32_t)g_atomic_int_get(&path->probe_key);
	/* The queue has room for it beside READs. */
	if (post_wr(path, lane, &wr))
		return TRUE;
	release_slot(lane, slot);
	return FALSE;
}

/* ---- the end ---- */

void pr_verbs_lane_stop(PrVerbsLane *lane)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
	int err = lane->qp ? ibv_modify_qp(lane->qp, &attr, IBV_QP_STATE) : 0;

	if (err)
		g_info("queue pair 0x%x: %s", lane->qp->qp_num, g_strerror(err));
	pr_poll_set_wake(&lane->waker);
}

/* The last work request of all: when it has completed, all have. */
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
	/* Tells the peer, and waits for nobody. */
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
	pr_poll_set_clear(&lane->waker);
}
