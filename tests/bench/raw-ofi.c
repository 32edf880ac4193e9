/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Floors of libfabric over loopback: one connection, one thread for each end. */
#include <gio/gio.h>
#include <netinet/in.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <string.h>
#include <sys/socket.h>

#include "tests/bench/raw-memory.h"
#include "tests/bench/raw.h"

#define PAGE	      4096
#define LATENCY_PAGES 1024 /* pages that the READs repeat in turn */
#define KEY	      1
#define CONNECT_MS    5000
#define SERVE_MS      10 /* longest sleep of the source in libfabric; then it checks for the end */

typedef struct End {
	struct fi_info *info;
	struct fid_fabric *fabric;
	struct fid_eq *eq;
	struct fid_domain *domain;
	struct fid_cq *cq;
	struct fid_ep *ep;
	struct fid_mr *mr;
	RawMemory memory;
} End;

typedef struct Bench {
	struct fid_pep *pep;
	End source, destination;
	gint stop; /* atomic */
	RawWait wait;
	GThread *thread;
} Bench;

static gboolean fi_failed(const char *what, int err, GError **error)
{
	g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "libfabric: %s: %s", what,
		    fi_strerror(ABS(err)));
	return FALSE;
}

static int get_info(const char *provider, const char *port, uint64_t flags, struct fi_info **ret)
{
	struct fi_info *hints = fi_allocinfo();
	int err;

	hints->caps = FI_MSG | FI_RMA;
	hints->mode = FI_CONTEXT;
	hints->ep_attr->type = FI_EP_MSG;
	hints->fabric_attr->prov_name = strdup(provider);
	err = fi_getinfo(FI_VERSION(1, 17), "127.0.0.1", port, flags, hints, ret);
	fi_freeinfo(hints);
	return err;
}

static int open_events(End *end)
{
	struct fi_eq_attr attr = {.wait_obj = FI_WAIT_FD};
	int err = fi_fabric(end->info->fabric_attr, &end->fabric, NULL);

	return err ? err : fi_eq_open(end->fabric, &attr, &end->eq, NULL);
}

static int open_endpoint(End *end, struct fi_info *info, guint window)
{
	struct fi_cq_attr attr = {
		.format = FI_CQ_FORMAT_CONTEXT, .wait_obj = FI_WAIT_FD, .size = 2 * window};
	int err = fi_domain(end->fabric, info, &end->domain, NULL);

	if (!err)
		err = fi_cq_open(end->domain, &attr, &end->cq, NULL);
	if (!err)
		err = fi_endpoint(end->domain, info, &end->ep, NULL);
	if (!err)
		err = fi_ep_bind(end->ep, &end->eq->fid, 0);
	if (!err)
		err = fi_ep_bind(end->ep, &end->cq->fid, FI_TRANSMIT | FI_RECV);
	return err ? err : fi_enable(end->ep);
}

/* Waits for the event `wanted`. */
static int await_event(End *end, uint32_t wanted, struct fi_eq_cm_entry *ret)
{
	uint32_t type;
	ssize_t n = fi_eq_sread(end->eq, &type, ret, sizeof(*ret), CONNECT_MS, 0);

	if (n < 0)
		return (int)n;
	return type == wanted ? 0 : -FI_ECONNREFUSED;
}

static gboolean is_over(End *end)
{
	struct fi_eq_cm_entry entry;
	uint32_t type;

	return fi_eq_read(end->eq, &type, &entry, sizeof(entry), 0) != -FI_EAGAIN;
}

/* The source accepts the connection, and then only makes progress. Returns an error number as a
 * pointer. */
static gpointer source_thread(gpointer opaque)
{
	Bench *bench = opaque;
	End *end = &bench->source;
	struct fi_eq_cm_entry entry;
	struct fi_cq_entry done;
	int err = await_event(end, FI_CONNREQ, &entry);

	if (err)
		return GINT_TO_POINTER(err);
	err = open_endpoint(end, entry.info, 1);
	if (!err)
		err = fi_mr_reg(end->domain, end->memory.at, end->memory.size, FI_REMOTE_READ, 0,
				KEY, 0, &end->mr, NULL);
	if (!err)
		err = fi_accept(end->ep, NULL, 0);
	fi_freeinfo(entry.info);
	while (!err && !g_atomic_int_get(&bench->stop)) {
		if (bench->wait == RAW_SPIN)
			fi_cq_read(end->cq, &done, 1);
		else if (fi_cq_sread(end->cq, &done, 1, NULL, SERVE_MS) == -FI_EAGAIN)
			is_over(end);
	}
	return GINT_TO_POINTER(err);
}

static int listen_for_source(Bench *bench, const char *provider, char port[8])
{
	struct sockaddr_storage address;
	size_t size = sizeof(address);
	int err = get_info(provider, "0", FI_SOURCE, &bench->source.info);

	if (!err)
		err = open_events(&bench->source);
	if (!err)
		err = fi_passive_ep(bench->source.fabric, bench->source.info, &bench->pep, NULL);
	if (!err)
		err = fi_pep_bind(bench->pep, &bench->source.eq->fid, 0);
	if (!err)
		err = fi_listen(bench->pep);
	if (!err)
		err = fi_getname(&bench->pep->fid, &address, &size);
	if (!err) {
		struct sockaddr_in *in = (struct sockaddr_in *)&address;

		g_snprintf(port, 8, "%u", ntohs(in->sin_port));
	}
	return err;
}

static int connect_destination(Bench *bench, const char *provider, const char *port, guint window)
{
	End *end = &bench->destination;
	struct fi_eq_cm_entry entry;
	int err = get_info(provider, port, 0, &end->info);

	if (!err)
		err = open_events(end);
	if (!err)
		err = open_endpoint(end, end->info, window);
	if (!err)
		err = fi_connect(end->ep, end->info->dest_addr, NULL, 0);
	return err ? err : await_event(end, FI_CONNECTED, &entry);
}

static gboolean bench_init(Bench *bench, const char *provider, uint64_t size, guint window,
			   GError **error)
{
	char port[8];
	int err;

	if (!raw_memory_init(&bench->source.memory, size, TRUE, error) ||
	    !raw_memory_init(&bench->destination.memory, size, FALSE, error))
		return FALSE;
	err = listen_for_source(bench, provider, port);
	if (err)
		return fi_failed("listen", err, error);
	bench->thread = g_thread_new("source", source_thread, bench);
	err = connect_destination(bench, provider, port, window);
	return err ? fi_failed("connect", err, error) : TRUE;
}

static void close_fid(void *object, struct fid *fid)
{
	if (object)
		fi_close(fid);
}

static void end_clear(End *end)
{
	close_fid(end->ep, end->ep ? &end->ep->fid : NULL);
	close_fid(end->mr, end->mr ? &end->mr->fid : NULL);
	close_fid(end->cq, end->cq ? &end->cq->fid : NULL);
	close_fid(end->domain, end->domain ? &end->domain->fid : NULL);
	close_fid(end->eq, end->eq ? &end->eq->fid : NULL);
	close_fid(end->fabric, end->fabric ? &end->fabric->fid : NULL);
	if (end->info)
		fi_freeinfo(end->info);
	raw_memory_clear(&end->memory);
}

#define BENCH_INIT                                                                                 \
	((Bench){.source.memory = RAW_MEMORY_INIT, .destination.memory = RAW_MEMORY_INIT})

static void bench_clear(Bench *bench)
{
	g_atomic_int_set(&bench->stop, 1);
	if (bench->thread)
		g_thread_join(bench->thread);
	end_clear(&bench->destination);
	close_fid(bench->pep, bench->pep ? &bench->pep->fid : NULL);
	end_clear(&bench->source);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Bench, bench_clear)

/* Returns the start of the peer's memory: an address or 0, as the provider's mr_mode demands. */
static uint64_t remote_base(Bench *bench)
{
	int mode = bench->destination.info->domain_attr->mr_mode;

	return mode & FI_MR_VIRT_ADDR ? (uintptr_t)bench->source.memory.at : 0;
}

static gboolean post(Bench *bench, uint64_t offset, uint64_t length, struct fi_context *context,
		     GError **error)
{
	End *end = &bench->destination;
	ssize_t err = fi_read(end->ep, end->memory.at + offset, length, NULL, 0,
			      remote_base(bench) + offset, KEY, context);

	return err ? fi_failed("READ", (int)err, error) : TRUE;
}

/* Returns the number of completed READs; -1: error. */
static gssize await_reads(Bench *bench, struct fi_cq_entry *ret, gsize max, GError **error)
{
	struct fid_cq *cq = bench->destination.cq;
	ssize_t n;

	do
		n = bench->wait == RAW_SPIN ? fi_cq_read(cq, ret, max)
					    : fi_cq_sread(cq, ret, max, NULL, -1);
	while (n == -FI_EAGAIN);
	if (n < 0)
		fi_failed("completion", (int)n, error);
	return n;
}

gboolean raw_ofi_rate(const char *provider, uint64_t total, uint32_t size, guint window,
		      double *ret_rate, GError **error)
{
	g_autofree struct fi_context *contexts = g_new0(struct fi_context, window);
	g_autofree struct fi_cq_entry *done = g_new0(struct fi_cq_entry, window);
	g_auto(Bench) bench = BENCH_INIT;
	uint64_t posted = 0, completed = 0, n_reads = (total + size - 1) / size, begin;

	bench.wait = RAW_SLEEP;
	if (!bench_init(&bench, provider, total, window, error))
		return FALSE;
	begin = raw_now_ns();
	while (completed < n_reads) {
		gssize n;

		for (; posted < n_reads && posted - completed < window; posted++) {
			uint64_t at = posted * size;

			/* READs of one connection complete in order. */
			if (!post(&bench, at, MIN(size, total - at), &contexts[posted % window],
				  error))
				return FALSE;
		}
		n = await_reads(&bench, done, window, error);
		if (n < 0)
			return FALSE;
		completed += n;
	}
	*ret_rate = total * 1e9 / (raw_now_ns() - begin);
	return TRUE;
}

gboolean raw_ofi_latency(const char *provider, guint n, RawWait wait, RawLatency *ret,
			 GError **error)
{
	g_autofree uint64_t *samples = g_new0(uint64_t, n);
	g_auto(Bench) bench = BENCH_INIT;
	struct fi_context context;
	struct fi_cq_entry done;

	bench.wait = wait;
	if (!bench_init(&bench, provider, LATENCY_PAGES * PAGE, 1, error))
		return FALSE;
	for (guint i = 0; i < n; i++) {
		uint64_t begin = raw_now_ns(), offset = (uint64_t)(i % LATENCY_PAGES) * PAGE;

		if (!post(&bench, offset, PAGE, &context, error) ||
		    await_reads(&bench, &done, 1, error) < 0)
			return FALSE;
		samples[i] = raw_now_ns() - begin;
	}
	*ret = raw_latency(samples, n);
	return TRUE;
}
