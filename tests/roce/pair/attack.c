/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Operations of a malicious peer: any operation with any key over its own connection, which the
 * engine's code would never post.
 */
#include "tests/roce/pair/side.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define ATTACK_MS    10000
#define ATTACK_BYTES 4096 /* of each operation but an atomic one */
#define ATOMIC_BYTES 8
#define MARK	     0xbd

static gboolean fail_with_errno(GError **error, const char *what, int number)
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

/* The first completion belongs to the operation, as nothing else is in flight on the lane. */
static const char *await_status(PrVerbsLane *lane, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + ATTACK_MS * 1000;
	struct ibv_wc wc;
	int n;

	while (!(n = ibv_poll_cq(lane->cq, 1, &wc)) && g_get_monotonic_time() < deadline)
		g_usleep(100);
	if (n == 1)
		return ibv_wc_status_str(wc.status);
	fail_with_errno(error, "no completion", n < 0 ? EIO : ETIMEDOUT);
	return NULL;
}

static const char *post_and_await(PrVerbsPath *path, guint lane, const char *operation,
				  uint64_t addr, uint32_t key, struct ibv_mr *mr, GError **error)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)mr->addr, .length = ATTACK_BYTES, .lkey = mr->lkey};
	struct ibv_send_wr *bad,
		wr = {.sg_list = &sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED};
	int err = fill_in(&wr, operation, addr, key) ? 0 : EINVAL;

	if (!err)
		err = ibv_post_send(path->lanes[lane].qp, &wr, &bad);
	if (!err)
		return await_status(&path->lanes[lane], error);
	fail_with_errno(error, "not posted", err);
	return NULL;
}

static const char *perform_attack(PrVerbsPath *path, guint lane, const char *operation,
				  uint64_t addr, uint32_t key, GError **error)
{
	g_autofree uint8_t *page = g_malloc(ATTACK_BYTES);
	struct ibv_mr *mr;
	const char *status;

	memset(page, MARK, ATTACK_BYTES);
	mr = ibv_reg_mr(path->device.pd, page, ATTACK_BYTES, IBV_ACCESS_LOCAL_WRITE);
	if (!mr) {
		fail_with_errno(error, "ibv_reg_mr", errno);
		return NULL;
	}
	status = post_and_await(path, lane, operation, addr, key, mr, error);
	ibv_dereg_mr(mr);
	return status;
}

static gboolean open_queues(PrVerbsPath *path, GError **error)
{
	struct ibv_qp_attr all = {.qp_access_flags = IBV_ACCESS_REMOTE_READ |
						     IBV_ACCESS_REMOTE_WRITE |
						     IBV_ACCESS_REMOTE_ATOMIC};

	for (guint i = 0; i < path->base.n_lanes; i++) {
		int err = ibv_modify_qp(path->lanes[i].qp, &all, IBV_QP_ACCESS_FLAGS);

		if (err)
			return fail_with_errno(error, "ibv_modify_qp", err);
	}
	return TRUE;
}

static gboolean make_page(PrVerbsPath *path, AttackPage *ret, GError **error)
{
	AttackPage made = {.page = g_malloc0(ATTACK_BYTES)};

	made.mr = ibv_reg_mr(path->device.pd, made.page, ATTACK_BYTES,
			     IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ |
				     IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC);
	if (!made.mr) {
		g_free(made.page);
		return fail_with_errno(error, "ibv_reg_mr", errno);
	}
	*ret = made;
	return TRUE;
}

void attack_free_page(AttackPage *page)
{
	if (page->mr)
		ibv_dereg_mr(page->mr);
	g_free(page->page);
	*page = (AttackPage){NULL, NULL};
}

/* LANE read|write|atomic ADDRESS KEY. Answers with the status of its completion. */
static gboolean attack(Side *side, char **words, GString *ret, GError **error)
{
	const char *status =
		perform_attack((PrVerbsPath *)side->path, parse_number(words[1]), words[2],
			       parse_number(words[3]), (uint32_t)parse_number(words[4]), error);

	g_string_assign(ret, status ? status : "");
	return status != NULL;
}

/* Lets the peer do anything to the queue pairs and one page. Answers with its ADDRESS and KEY. */
static gboolean allow(Side *side, char **words, GString *ret, GError **error)
{
	PrVerbsPath *path = (PrVerbsPath *)side->path;

	attack_free_page(&side->open_page);
	if (!open_queues(path, error) || !make_page(path, &side->open_page, error))
		return FALSE;
	g_string_printf(ret, "%" PRIuPTR " %u", (uintptr_t)side->open_page.page,
			side->open_page.mr->rkey);
	return TRUE;
}

/* Answers with the first word of the open page. */
static gboolean open_page(Side *side, char **words, GString *ret, GError **error)
{
	if (!side->open_page.mr)
		return fail(error, "there is no open page");
	g_string_printf(ret, "%" PRIx64, *side->open_page.page);
	return TRUE;
}

/* BLOCK OFFSET. Answers with ADDRESS and KEY of this side's own registration of that byte. */
static gboolean own_key(Side *side, char **words, GString *ret, GError **error)
{
	uint64_t offset = parse_number(words[2]);
	const PrVerbsDestinationMr *import = pr_verbs_destination_mr_find(
		(PrVerbsPath *)side->path, parse_number(words[1]), offset);

	if (!import || !import->mr)
		return fail(error, "nothing is registered there");
	g_string_printf(ret, "%" PRIuPTR " %u",
			(uintptr_t)side_address(side, parse_number(words[1]), offset),
			import->mr->lkey);
	return TRUE;
}

const Command attack_commands[] = {
	{"attack", 4, NEEDS_PATH, attack},
	{"allow", 0, NEEDS_PATH, allow},
	{"open-page", 0, NEEDS_PATH, open_page},
	{"own-key", 2, NEEDS_PATH, own_key},
	{NULL},
};
