/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One lane of ofi:, with a fabric, domain, queues and endpoint of its own. ofi.c says why. */
#include "transport/ofi/ofi.h"

#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <rdma/fi_errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define PROVIDER_NET	  "net"
#define REQUEST_BYTES_MIN 40 /* bytes that net and tcp send for a READ */

static const char *const providers[] = {PROVIDER_NET, "tcp"}; /* in order of preference */

gboolean pr_ofi_error(const PrUri *uri, const char *what, int number, GError **error)
{
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "path %s: %s: %s", uri->text, what,
		    fi_strerror(ABS(number)));
	return FALSE;
}

gboolean pr_ofi_check_options(const PrUri *uri, guint64 *ret_data_port, GError **error)
{
	static const char *const known[] = {"provider", "data-port", NULL};

	return pr_backend_check_options(uri, known, error) &&
	       pr_backend_number(uri, "data-port", 1, G_MAXUINT16, 0, ret_data_port, error);
}

/* Sets the address to connect from, if the URI has one. libfabric frees it. */
static int set_source(struct fi_info *hints, const PrUri *uri)
{
	const char *bind = g_hash_table_lookup(uri->options, PR_OPTION_BIND);
	g_autoptr(GSocketAddress) address = NULL;

	if (!bind)
		return 0;
	address = g_inet_socket_address_new_from_string(bind, 0);
	if (!address)
		return -FI_EADDRNOTAVAIL;
	hints->src_addrlen = g_socket_address_get_native_size(address);
	hints->src_addr = malloc(hints->src_addrlen);
	if (!hints->src_addr)
		return -FI_ENOMEM;
	hints->addr_format = FI_SOCKADDR;
	g_socket_address_to_native(address, hints->src_addr, hints->src_addrlen, NULL);
	return 0;
}

static int getinfo(const PrUri *uri, uint16_t port, gboolean listening, const char *provider,
		   struct fi_info **ret)
{
	struct fi_info *hints = fi_allocinfo();
	char service[8];
	int err;

	if (!hints)
		return -FI_ENOMEM;
	g_snprintf(service, sizeof(service), "%u", port);
	hints->caps = FI_MSG | FI_RMA;
	hints->mode = FI_RX_CQ_DATA | FI_CONTEXT | FI_CONTEXT2;
	hints->ep_attr->type = FI_EP_MSG;
	hints->domain_attr->mr_mode =
		FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
	hints->domain_attr->threading = FI_THREAD_SAFE;
	hints->fabric_attr->prov_name = strdup(provider);
	err = listening ? 0 : set_source(hints, uri);
	if (!err)
		err = fi_getinfo(FI_VERSION(1, 17), uri->host, service, listening ? FI_SOURCE : 0,
				 hints, ret);
	fi_freeinfo(hints);
	return err;
}

void pr_ofi_warm_up(void)
{
	struct fi_info *hints = fi_allocinfo();
	struct fi_info *info = NULL;

	if (!hints)
		return;
	/* The answer does not matter: the call loads the providers first, which takes long. */
	hints->fabric_attr->prov_name = strdup(PROVIDER_NET);
	if (fi_getinfo(FI_VERSION(1, 17), NULL, NULL, 0, hints, &info) == 0)
		fi_freeinfo(info);
	fi_freeinfo(hints);
}

struct fi_info *pr_ofi_getinfo(const PrUri *uri, uint16_t port, gboolean listening, GError **error)
{
	const char *wanted = g_hash_table_lookup(uri->options, "provider");
	struct fi_info *info = NULL;
	int err = -FI_ENODATA;

	if (wanted)
		err = getinfo(uri, port, listening, wanted, &info);
	for (gsize i = 0; !wanted && err && i < G_N_ELEMENTS(providers); i++)
		err = getinfo(uri, port, listening, providers[i], &info);
	if (!err)
		return info;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: libfabric cannot %s host \"%s\" with provider %s: %s; check the host "
		    "and ?" PR_OPTION_BIND "=, or choose another ?provider=",
		    uri->text, listening ? "listen at" : "reach", uri->host,
		    wanted ? wanted : "net or tcp", fi_strerror(-err));
	return NULL;
}

/* Wait sets are for `net` alone: see ofi.c. libfabric 2 deprecates them, and its `tcp` has
 * replaced `net`. */
#if FI_MAJOR_VERSION < 2
static int open_wait_set(PrOfiEvents *events)
{
	struct fi_wait_attr attr = {.wait_obj = FI_WAIT_FD};

	return fi_wait_open(events->fabric, &attr, &events->wait);
}

static gboolean wait_set_is_quiet(struct fid_wait *wait)
{
	return fi_wait(wait, 0) == -FI_ETIMEDOUT;
}
#else
static int open_wait_set(PrOfiEvents *events)
{
	return -FI_ENOSYS;
}

static gboolean wait_set_is_quiet(struct fid_wait *wait)
{
	g_return_val_if_reached(TRUE);
}
#endif

gboolean pr_ofi_events_open(PrOfiEvents *events, struct fi_info *info, GError **error)
{
	struct fi_eq_attr attr = {.wait_obj = FI_WAIT_FD};
	int err = fi_fabric(info->fabric_attr, &events->fabric, NULL);

	if (!err && !strcmp(info->fabric_attr->prov_name, PROVIDER_NET)) {
		err = open_wait_set(events);
		attr = (struct fi_eq_attr){.wait_obj = FI_WAIT_SET, .wait_set = events->wait};
	}
	if (!err)
		err = fi_eq_open(events->fabric, &attr, &events->eq, NULL);
	if (!err)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "libfabric provider %s gives no event queue: %s", info->fabric_attr->prov_name,
		    fi_strerror(-err));
	return FALSE;
}

int pr_ofi_events_fd(PrOfiEvents *events)
{
	int fd = -1;

	if (fi_control(events->wait ? &events->wait->fid : &events->eq->fid, FI_GETWAIT, &fd))
		return -1;
	return fd;
}

gboolean pr_ofi_events_may_sleep(PrOfiEvents *events, struct fid_cq *cq)
{
	struct fid *fids[] = {&events->eq->fid, cq ? &cq->fid : NULL};

	if (!events->wait)
		return fi_trywait(events->fabric, fids, cq ? 2 : 1) == 0;
	/* The wait set makes progress, which may complete READs: so check the completions last. */
	return wait_set_is_quiet(events->wait) && (!cq || fi_cq_read(cq, NULL, 0) == -FI_EAGAIN);
}

static gboolean read_error_event(PrOfiEvents *events, PrOfiEvent *ret)
{
	uint8_t reason[16];
	struct fi_eq_err_entry entry = {.err_data = reason, .err_data_size = sizeof(reason)};

	if (fi_eq_readerr(events->eq, &entry, 0) < 0)
		return FALSE;
	ret->error = entry.err ? entry.err : FI_EOTHER;
	ret->rejected = entry.err_data_size > 0;
	return TRUE;
}

gboolean pr_ofi_events_read(PrOfiEvents *events, PrOfiEvent *ret)
{
	union {
		struct fi_eq_cm_entry entry;
		uint8_t raw[sizeof(struct fi_eq_cm_entry) + sizeof(ret->data)];
	} buffer;
	ssize_t n = fi_eq_read(events->eq, &ret->type, &buffer, sizeof(buffer), 0);

	ret->error = 0;
	ret->info = NULL;
	ret->n_data = 0;
	if (n == -FI_EAGAIN)
		return FALSE;
	if (n == -FI_EAVAIL)
		return read_error_event(events, ret);
	if (n < (ssize_t)sizeof(buffer.entry)) {
		ret->error = n < 0 ? (int)-n : FI_EOTHER;
		ret->rejected = FALSE;
		return TRUE;
	}
	ret->info = ret->type == FI_CONNREQ ? buffer.entry.info : NULL;
	ret->n_data = n - sizeof(buffer.entry);
	memcpy(ret->data, buffer.entry.data, ret->n_data);
	return TRUE;
}

void pr_ofi_events_close(PrOfiEvents *events)
{
	if (events->eq)
		fi_close(&events->eq->fid);
	if (events->wait)
		fi_close(&events->wait->fid);
	if (events->fabric)
		fi_close(&events->fabric->fid);
	*events = (PrOfiEvents){NULL};
}

static int open_queues(PrOfiLane *lane)
{
	struct fi_cq_attr attr = {
		/* Room for a second completion of each READ: see ofi.c. */
		.size = 2 * PR_OFI_READS_MAX,
		.format = FI_CQ_FORMAT_CONTEXT,
		.wait_obj = lane->events.wait ? FI_WAIT_NONE : FI_WAIT_FD,
	};
	int err = fi_domain(lane->events.fabric, lane->info, &lane->domain, NULL);

	if (!err)
		err = fi_cq_open(lane->domain, &attr, &lane->cq, NULL);
	lane->has_request = !err;
	if (!err)
		err = fi_endpoint(lane->domain, lane->info, &lane->ep, NULL);
	if (!err)
		err = fi_ep_bind(lane->ep, &lane->events.eq->fid, 0);
	if (!err)
		err = fi_ep_bind(lane->ep, &lane->cq->fid, FI_TRANSMIT | FI_RECV);
	return err ? err : fi_enable(lane->ep);
}

static gboolean open_waker(PrOfiLane *lane, GError **error)
{
	int events_fd = pr_ofi_events_fd(&lane->events);

	lane->completion_fd = events_fd;
	if (!lane->events.wait && fi_control(&lane->cq->fid, FI_GETWAIT, &lane->completion_fd))
		lane->completion_fd = -1;
	return pr_poll_set_init(&lane->poll_set, error) &&
	       pr_poll_set_add(&lane->poll_set, lane->completion_fd, error) &&
	       (lane->completion_fd == events_fd ||
		pr_poll_set_add(&lane->poll_set, events_fd, error));
}

static int register_regions(PrOfiLane *lane, const PrPathSetup *setup, uint64_t access)
{
	int mode = lane->info->domain_attr->mr_mode;
	int err = 0;

	if (access == FI_READ && !(mode & FI_MR_LOCAL))
		return 0;
	lane->mrs = g_new0(struct fid_mr *, setup->n_regions);
	lane->n_mrs = setup->n_regions;
	for (guint i = 0; i < setup->n_regions && !err; i++) {
		const PrRegion *region = &setup->regions[i];

		if (region->size)
			err = fi_mr_reg(lane->domain, region->addr, region->size, access, 0, i + 1,
					0, &lane->mrs[i], NULL);
	}
	if (!err && access == FI_READ)
		err = fi_mr_reg(lane->domain, &lane->scratch, sizeof(lane->scratch), access, 0,
				setup->n_regions + 1, 0, &lane->scratch_mr, NULL);
	return err;
}

gboolean pr_ofi_lane_open(PrOfiLane *lane, struct fi_info *info, const PrPathSetup *setup,
			  uint64_t access, GError **error)
{
	int err;

	lane->info = info;
	lane->socket = -1;
	for (guint i = 0; i < PR_OFI_READS_MAX; i++)
		lane->free_slots[i] = i;
	lane->n_free = PR_OFI_READS_MAX;
	if (!pr_ofi_events_open(&lane->events, info, error)) {
		g_prefix_error(error, "path %s: ", setup->uri->text);
		return FALSE;
	}
	err = open_queues(lane);
	if (err)
		return pr_ofi_error(setup->uri, "cannot open an endpoint", err, error);
	err = register_regions(lane, setup, access);
	if (err)
		return pr_ofi_error(setup->uri, "cannot register guest memory", err, error);
	return open_waker(lane, error);
}

gboolean pr_ofi_lane_may_sleep(PrOfiLane *lane)
{
	return pr_ofi_events_may_sleep(&lane->events, lane->cq);
}

static gboolean event_error(const PrPathSetup *setup, const PrOfiEvent *event, GError **error)
{
	if (!event->error && event->type == FI_CONNECTED)
		return TRUE;
	if (event->rejected) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED,
			    "path %s: the destination refused the data lane: it waits for no such "
			    "migration",
			    setup->uri->text);
		return FALSE;
	}
	return pr_ofi_error(setup->uri, "cannot connect",
			    event->error ? event->error : FI_ECONNRESET, error);
}

static gboolean is_connected(int fd, const struct sockaddr_storage ends[2], const size_t sizes[2])
{
	struct sockaddr_storage own, peer;
	socklen_t own_size = sizeof(own), peer_size = sizeof(peer), size = sizeof(int);
	int protocol = 0;

	return getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size) == 0 &&
	       protocol == IPPROTO_TCP &&
	       getsockname(fd, (struct sockaddr *)&own, &own_size) == 0 && own_size == sizes[0] &&
	       !memcmp(&own, &ends[0], own_size) &&
	       getpeername(fd, (struct sockaddr *)&peer, &peer_size) == 0 &&
	       peer_size == sizes[1] && !memcmp(&peer, &ends[1], peer_size);
}

/* libfabric does not tell the socket. It is the one of this process with the endpoint's two
 * addresses. */
static int find_socket(PrOfiLane *lane)
{
	g_autoptr(GDir) dir = g_dir_open("/proc/self/fd", 0, NULL);
	struct sockaddr_storage ends[2];
	size_t sizes[2] = {sizeof(ends[0]), sizeof(ends[1])};
	const char *name;

	if (fi_getname(&lane->ep->fid, &ends[0], &sizes[0]) ||
	    fi_getpeer(lane->ep, &ends[1], &sizes[1]))
		return -1;
	while (dir && (name = g_dir_read_name(dir))) {
		int fd = (int)g_ascii_strtoll(name, NULL, 10);

		if (is_connected(fd, ends, sizes))
			return fd;
	}
	return -1;
}

static void set_cork(PrOfiLane *lane, int on)
{
	/* Without the option, each READ and answer leaves in a packet of its own, which works
	 * too. */
	(void)setsockopt(lane->socket, IPPROTO_TCP, TCP_CORK, &on, sizeof(on));
	lane->corked = on;
}

void pr_ofi_lane_cork(PrOfiLane *lane)
{
	if (lane->socket >= 0 && !lane->corked)
		set_cork(lane, TRUE);
}

void pr_ofi_lane_push(PrOfiLane *lane)
{
	lane->n_posted = 0;
	if (lane->corked)
		set_cork(lane, FALSE);
}

gboolean pr_ofi_lane_has_requests(const PrOfiLane *lane)
{
	int bytes = 0;

	return lane->socket >= 0 && ioctl(lane->socket, SIOCINQ, &bytes) == 0 &&
	       bytes >= 2 * REQUEST_BYTES_MIN;
}

static gboolean wait_connected(PrOfiLane *lane, const PrPathSetup *setup, gint64 deadline,
			       GError **error)
{
	PrOfiEvent event = {0};

	while (!pr_ofi_events_read(&lane->events, &event)) {
		if (!pr_ofi_lane_may_sleep(lane))
			continue;
		if (!pr_backend_wait(lane->poll_set.epoll_fd, POLLIN, deadline, setup->cancel,
				     error)) {
			g_prefix_error(error, "path %s: ", setup->uri->text);
			return FALSE;
		}
	}
	if (!event_error(setup, &event, error))
		return FALSE;
	lane->socket = find_socket(lane);
	return TRUE;
}

gboolean pr_ofi_lane_connect(PrOfiLane *lane, const PrPathSetup *setup, PrLaneId id,
			     gint64 deadline, GError **error)
{
	g_autoptr(GByteArray) data = g_byte_array_new();
	PrLaneHello hello;
	int err;

	pr_backend_lane_hello(&hello, &setup->binding, id);
	pr_lane_hello_encode(data, &hello);
	err = fi_connect(lane->ep, lane->info->dest_addr, data->data, data->len);
	if (err)
		return pr_ofi_error(setup->uri, "cannot connect", err, error);
	return wait_connected(lane, setup, deadline, error);
}

gboolean pr_ofi_lane_accept(PrOfiLane *lane, const PrPathSetup *setup, gint64 deadline,
			    GError **error)
{
	int err = fi_accept(lane->ep, NULL, 0);

	if (err)
		return pr_ofi_error(setup->uri, "cannot accept a data lane", err, error);
	return wait_connected(lane, setup, deadline, error);
}

void pr_ofi_lane_close_ep(PrOfiLane *lane)
{
	if (lane->ep)
		fi_close(&lane->ep->fid);
	lane->ep = NULL;
	lane->socket = -1;
	lane->corked = FALSE;
}

void pr_ofi_lane_close(PrOfiLane *lane)
{
	pr_ofi_lane_close_ep(lane);
	for (guint i = 0; i < lane->n_mrs; i++)
		if (lane->mrs[i])
			fi_close(&lane->mrs[i]->fid);
	g_clear_pointer(&lane->mrs, g_free);
	if (lane->scratch_mr)
		fi_close(&lane->scratch_mr->fid);
	if (lane->cq)
		fi_close(&lane->cq->fid);
	if (lane->domain)
		fi_close(&lane->domain->fid);
	pr_poll_set_clear(&lane->poll_set);
	pr_ofi_events_close(&lane->events);
	for (guint i = 0; i < PR_OFI_READS_MAX; i++)
		g_clear_pointer(&lane->slots[i].buffer, g_free);
	if (lane->info)
		fi_freeinfo(lane->info);
	lane->info = NULL;
}
