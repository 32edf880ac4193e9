/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A device of one path, and the causes and remedies of its errors. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "transport/rdma/path.h"

#define CM_DEVICE "/dev/infiniband/rdma_cm"
#define MIB	  (1024 * 1024)

static gboolean have_devices(void)
{
	g_autoptr(GDir) dir = g_dir_open("/sys/class/infiniband", 0, NULL);

	return dir && g_dir_read_name(dir);
}

#define NO_PERMISSION                                                                              \
	"; no permission on /dev/infiniband/*: run as root, or join the group that owns these "    \
	"(--group, with --user)"

/* The remedy for a system error, or "". */
static const char *remedy(int number)
{
	switch (number) {
	case EACCES:
	case EPERM:
		return NO_PERMISSION;
	case ENODEV:
	case ENOENT:
	case EADDRNOTAVAIL:
	case ENETUNREACH:
	case EHOSTUNREACH:
		if (!have_devices())
			return "; this host has no RDMA device (rdma link); for soft-RoCE: "
			       "soft-roce/rxe-up, or rdma link add rxe0 type rxe netdev ETH";
		if (access(CM_DEVICE, F_OK) < 0)
			return "; " CM_DEVICE " is missing: modprobe rdma_ucm";
		/* librdmacm sets ENOENT in this case. */
		if (access(CM_DEVICE, R_OK | W_OK) < 0)
			return NO_PERMISSION;
		return "; no RDMA device of this host (rdma link) has that address or a route "
		       "to it: check the addresses and links, for soft-RoCE: rdma link add rxe0 "
		       "type rxe netdev ETH";
	case ENOMEM:
		return "; check `ulimit -l` and the limits of the device";
	default:
		return "";
	}
}

gboolean pr_verbs_error(const PrUri *uri, const char *what, int number, GError **error)
{
	number = ABS(number);
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "path %s: %s: %s%s", uri->text,
		    what, g_strerror(number), remedy(number));
	return FALSE;
}

gboolean pr_verbs_set_nonblocking(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

struct rdma_event_channel *pr_verbs_open_channel(const PrUri *uri, GError **error)
{
	struct rdma_event_channel *channel = rdma_create_event_channel();

	if (!channel) {
		pr_verbs_error(uri, "rdma_cm is not available", errno ? errno : ENODEV, error);
		return NULL;
	}
	if (pr_verbs_set_nonblocking(channel->fd))
		return channel;
	pr_verbs_error(uri, "rdma_cm's event channel", errno, error);
	rdma_destroy_event_channel(channel);
	return NULL;
}

const char *pr_verbs_device_name(const PrVerbsDevice *device)
{
	return device->context ? ibv_get_device_name(device->context->device) : "(none)";
}

static gboolean check_device(const PrVerbsDevice *device, const PrUri *uri,
			     const PrVerbsOptions *options, GError **error)
{
	const char *name = pr_verbs_device_name(device);

	if (options->device && strcmp(options->device, name))
		g_set_error(
			error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			"path %s: option dev=%s, but the route there uses %s; give the address of "
			"%s on both sides (?" PR_OPTION_BIND "= for ours), or leave dev out",
			uri->text, options->device, name, options->device);
	else if (device->context->device->transport_type != IBV_TRANSPORT_IB)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: device %s is neither InfiniBand nor RoCE; use ofi: or tcp: "
			    "over it",
			    uri->text, name);
	else if (!MIN(device->caps.max_qp_rd_atom, device->caps.max_qp_init_rd_atom))
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: device %s does no RDMA READ; use ofi: or tcp: over it",
			    uri->text, name);
	else
		return TRUE;
	return FALSE;
}

/* Opens a context for this path: all users of the device in this process share rdma_cm's. */
gboolean pr_verbs_device_open(PrVerbsDevice *device, struct rdma_cm_id *id, const PrUri *uri,
			      const PrVerbsOptions *options, GError **error)
{
	int err;

	device->port = id->port_num;
	device->context = ibv_open_device(id->verbs->device);
	if (!device->context)
		return pr_verbs_error(uri, "cannot open the RDMA device", errno, error);
	err = ibv_query_device(device->context, &device->caps);
	if (err)
		return pr_verbs_error(uri, "cannot query the RDMA device", err, error);
	device->pd = ibv_alloc_pd(device->context);
	if (!device->pd)
		return pr_verbs_error(uri, "no protection domain", errno, error);
	if (!pr_verbs_set_nonblocking(device->context->async_fd))
		return pr_verbs_error(uri, "the RDMA device's events", errno, error);
	return check_device(device, uri, options, error);
}

void pr_verbs_device_close(PrVerbsDevice *device)
{
	if (device->pd)
		ibv_dealloc_pd(device->pd);
	if (device->context)
		ibv_close_device(device->context);
	*device = (PrVerbsDevice){NULL};
}

/* Reads a number of /proc/self/status; `base` as in strtoull(3). */
static uint64_t status_value(const char *name, guint base)
{
	g_autofree char *text = NULL;
	const char *at;

	if (!g_file_get_contents("/proc/self/status", &text, NULL, NULL))
		return 0;
	at = strstr(text, name);
	return at ? g_ascii_strtoull(at + strlen(name), NULL, base) : 0;
}

static gboolean may_pin_anything(void)
{
	const guint cap_ipc_lock = 14;

	return status_value("\nCapEff:", 16) >> cap_ipc_lock & 1;
}

gboolean pr_verbs_check_memlock(uint64_t bytes, GError **error)
{
	uint64_t needed = bytes + status_value("\nVmPin:", 10) * 1024;
	struct rlimit limit;

	if (getrlimit(RLIMIT_MEMLOCK, &limit) < 0 || limit.rlim_cur == RLIM_INFINITY ||
	    needed <= limit.rlim_cur || may_pin_anything())
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "%" G_GUINT64_FORMAT
		    " MiB of guest memory have to be pinned, but RLIMIT_MEMLOCK "
		    "is %" G_GUINT64_FORMAT " MiB; raise it to %" G_GUINT64_FORMAT
		    " MiB (ulimit -l %" G_GUINT64_FORMAT ", LimitMEMLOCK= in a systemd unit), or "
		    "give this process CAP_IPC_LOCK",
		    bytes / MIB, (uint64_t)limit.rlim_cur / MIB, needed / MIB + 1,
		    (needed / MIB + 1) * 1024);
	return FALSE;
}

gboolean pr_verbs_next_event(struct rdma_event_channel *channel, PrVerbsEvent *ret)
{
	struct rdma_cm_event *event;

	if (rdma_get_cm_event(channel, &event))
		return FALSE;
	*ret = (PrVerbsEvent){.type = event->event, .status = event->status, .id = event->id};
	switch (event->event) {
	case RDMA_CM_EVENT_CONNECT_REQUEST:
	case RDMA_CM_EVENT_CONNECT_RESPONSE:
	case RDMA_CM_EVENT_REJECTED:
		ret->depth = MIN(event->param.conn.responder_resources,
				 event->param.conn.initiator_depth);
		ret->n_data = MIN(event->param.conn.private_data_len, sizeof(ret->data));
		if (event->param.conn.private_data && ret->n_data)
			memcpy(ret->data, event->param.conn.private_data, ret->n_data);
		else
			ret->n_data = 0;
		break;
	default:
		break;
	}
	rdma_ack_cm_event(event);
	return TRUE;
}
