/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/roce/foreign.h"

#include <errno.h>
#include <string.h>

#define FOREIGN_MS   10000
#define ATOMIC_BYTES 8
#define MARK	     0xbd

static gboolean complain(GError **error, const char *what, int number)
{
	g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "%s: %s", what, g_strerror(number));
	return FALSE;
}

static gboolean fill_in(struct ibv_send_wr *wr, const char *operation, uint64_t addr, uint32_t key)
{
	if (!strcmp(operation, "atomic")) {
		wr->opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
		wr->wr.atomic.remote_addr = addr;
		wr->wr.atomic.compare_add = MARK;
		wr->wr.atomic.rkey = key;
		wr->sg_list->length = ATOMIC_BYTES;
		return TRUE;
	}
	wr->opcode = strcmp(operation, "read") ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_READ;
	wr->wr.rdma.remote_addr = addr;
	wr->wr.rdma.rkey = key;
	return wr->opcode == IBV_WR_RDMA_READ || !strcmp(operation, "write");
}

/* The first completion is the operation's: nothing else is under way on the lane. */
static const char *await_status(PrVerbsLane *lane, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + FOREIGN_MS * 1000;
	struct ibv_wc wc;
	int n;

	while (!(n = ibv_poll_cq(lane->cq, 1, &wc)) && g_get_monotonic_time() < deadline)
		g_usleep(100);
	if (n == 1)
		return ibv_wc_status_str(wc.status);
	complain(error, "no completion", n < 0 ? EIO : ETIMEDOUT);
	return NULL;
}

static const char *perform(PrVerbsPath *path, guint lane, const char *operation, uint64_t addr,
			   uint32_t key, struct ibv_mr *mr, GError **error)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)mr->addr, .length = FOREIGN_BYTES, .lkey = mr->lkey};
	struct ibv_send_wr *bad,
		wr = {.sg_list = &sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED};
	int err = fill_in(&wr, operation, addr, key) ? 0 : EINVAL;

	if (!err)
		err = ibv_post_send(path->lanes[lane].qp, &wr, &bad);
	if (!err)
		return await_status(&path->lanes[lane], error);
	complain(error, "not posted", err);
	return NULL;
}

const char *foreign_perform(PrVerbsPath *path, guint lane, const char *operation, uint64_t addr,
			    uint32_t key, GError **error)
{
	g_autofree uint8_t *page = g_malloc(FOREIGN_BYTES);
	struct ibv_mr *mr;
	const char *status;

	memset(page, MARK, FOREIGN_BYTES);
	mr = ibv_reg_mr(path->device.pd, page, FOREIGN_BYTES, IBV_ACCESS_LOCAL_WRITE);
	if (!mr) {
		complain(error, "ibv_reg_mr", errno);
		return NULL;
	}
	status = perform(path, lane, operation, addr, key, mr, error);
	ibv_dereg_mr(mr);
	return status;
}

gboolean foreign_open_queues(PrVerbsPath *path, GError **error)
{
	struct ibv_qp_attr all = {.qp_access_flags = IBV_ACCESS_REMOTE_READ |
						     IBV_ACCESS_REMOTE_WRITE |
						     IBV_ACCESS_REMOTE_ATOMIC};

	for (guint i = 0; i < path->base.n_lanes; i++) {
		int err = ibv_modify_qp(path->lanes[i].qp, &all, IBV_QP_ACCESS_FLAGS);

		if (err)
			return complain(error, "ibv_modify_qp", err);
	}
	return TRUE;
}

gboolean foreign_lay_bait(PrVerbsPath *path, ForeignBait *ret, GError **error)
{
	ForeignBait bait = {.page = g_malloc0(FOREIGN_BYTES)};

	bait.mr = ibv_reg_mr(path->device.pd, bait.page, FOREIGN_BYTES,
			     IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ |
				     IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC);
	if (!bait.mr) {
		g_free(bait.page);
		return complain(error, "ibv_reg_mr", errno);
	}
	*ret = bait;
	return TRUE;
}

void foreign_take_bait(ForeignBait *bait)
{
	if (bait->mr)
		ibv_dereg_mr(bait->mr);
	g_free(bait->page);
	*bait = (ForeignBait){NULL, NULL};
}
