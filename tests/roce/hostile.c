/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A library that is preloaded into an engine, to play a destination that attacks its source. It
 * turns the WRITE_AT-th READ of a guest's page into an RDMA WRITE, and the ATOMIC_AT-th into an
 * atomic addition, with the same address and key. It reports both on standard error.
 */
#include <dlfcn.h>
#include <infiniband/verbs.h>
#include <stdatomic.h>
#include <stdio.h>

#define WRITE_AT     10
#define ATOMIC_AT    40
#define ATOMIC_BYTES 8

typedef int (*PostSend)(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);

static _Atomic(PostSend) post_send; /* the driver's; all devices have the same one */
static atomic_uint n_reads;

static void report(const char *what, const struct ibv_send_wr *wr)
{
	fprintf(stderr, "hostile: %s to 0x%llx instead of a READ\n", what,
		(unsigned long long)wr->wr.rdma.remote_addr);
}

static int post_one(struct ibv_qp *qp, const struct ibv_send_wr *wanted, struct ibv_send_wr **bad)
{
	struct ibv_send_wr wr = *wanted;
	struct ibv_sge sge;
	unsigned number = 0;

	wr.next = NULL;
	if (wr.opcode == IBV_WR_RDMA_READ && wr.num_sge == 1)
		number = atomic_fetch_add(&n_reads, 1) + 1;
	if (number == WRITE_AT) {
		report("WRITE", &wr);
		wr.opcode = IBV_WR_RDMA_WRITE;
	} else if (number == ATOMIC_AT) {
		report("atomic", &wr);
		sge = wanted->sg_list[0];
		sge.length = ATOMIC_BYTES;
		wr.sg_list = &sge;
		wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
		wr.wr.atomic.remote_addr = wanted->wr.rdma.remote_addr;
		wr.wr.atomic.rkey = wanted->wr.rdma.rkey;
		wr.wr.atomic.compare_add = 1;
	}
	return atomic_load(&post_send)(qp, &wr, bad);
}

static int hostile_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct ibv_send_wr *ignored;

	for (; wr; wr = wr->next) {
		int err = post_one(qp, wr, &ignored);

		if (err) {
			*bad = wr;
			return err;
		}
	}
	return 0;
}

/* Takes the place of libibverbs's function. */
struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	struct ibv_context *(*open_device)(struct ibv_device *) = NULL;
	struct ibv_context *context;

	*(void **)&open_device = dlsym(RTLD_NEXT, "ibv_open_device");
	context = open_device ? open_device(device) : NULL;
	if (!context)
		return NULL;
	atomic_store(&post_send, context->ops.post_send);
	context->ops.post_send = hostile_post_send;
	return context;
}
