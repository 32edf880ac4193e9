/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The conversation of rdma_cm that connects a lane. Each step is bounded by the deadline, and can
 * be cancelled:
 *
 * 	source                                  destination
 * 	address, route resolved
 * 	queue pair INIT
 * 	  connect (PrLaneHello, READ depth)  ──▶  checked by the listener
 * 	                                          queue pair INIT, ready
 * 	                                     ◀──  accept, or reject (a reason in words)
 * 	queue pair ready
 * 	  established                        ──▶
 *
 * rdma_cm repeats a lost message after 4 s. That is too late: a link that has just come up loses
 * some. So the source gives an attempt `connect-timeout-ms` and then begins anew while there is
 * time, with twice as much each time, because the host may be slow and nothing lost. The
 * destination accepts another request for a lane whose attempt has failed. The news that the
 * source has given up may be lost as well, so the destination's wait is bounded, too
 * (ANSWER_FACTOR).
 *
 * We make the queue pairs ourselves. rdma_cm would make them in a context of its own, and would
 * set timers that we would have to correct afterwards.
 */
#include <errno.h>
#include <string.h>

#include "transport/net/dial.h"
#include "transport/rdma/path.h"

/* Reasons of a rejection, from the kernel's enum ib_cm_rej_reason. */
#define REJECTED_NOBODY_LISTENS 8
#define REJECTED_BY_THE_ENGINE	28

#define REASON_MAX		148 /* bytes of private data in a rejection */
#define ANSWER_FACTOR		4   /* of connect-timeout-ms: how long the destination waits */
#define PAUSE_MS		50  /* between attempts: an attempt may fail at once */

void pr_verbs_reject(struct rdma_cm_id *id, const char *reason)
{
	rdma_reject(id, reason, MIN(strlen(reason), REASON_MAX));
	rdma_destroy_id(id);
}

/* The peer's reason, with unprintable characters replaced. */
static char *rejection_text(const PrVerbsEvent *event)
{
	g_autofree char *text =
		g_strndup((const char *)event->data, MIN(event->n_data, REASON_MAX));

	return g_strcanon(
		g_steal_pointer(&text),
		"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;=()_-", '?');
}

static gboolean rejected(const PrUri *uri, const PrVerbsEvent *event, GError **error)
{
	g_autofree char *text = rejection_text(event);

	if (event->status == REJECTED_BY_THE_ENGINE)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED,
			    "path %s: the destination refused the data lane: %s", uri->text, text);
	else if (event->status == REJECTED_NOBODY_LISTENS)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: nobody listens there for RDMA connections; does the "
			    "destination have --incoming rdma: for this address?",
			    uri->text);
	else
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: the destination's host rejected the connection (reason %d); "
			    "is the same path MTU and RoCE version set on both?",
			    uri->text, event->status);
	return FALSE;
}

static gboolean event_error(const PrUri *uri, const PrVerbsEvent *event, GError **error)
{
	if (event->status == -ETIMEDOUT) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "path %s: the host does not answer (%s)", uri->text,
			    rdma_event_str(event->type));
		return FALSE;
	}
	switch (event->type) {
	case RDMA_CM_EVENT_REJECTED:
		return rejected(uri, event, error);
	case RDMA_CM_EVENT_ADDR_ERROR:
		return pr_verbs_error(uri, "cannot reach the host", event->status, error);
	case RDMA_CM_EVENT_ROUTE_ERROR:
		return pr_verbs_error(uri, "no route to the host", event->status, error);
	default:
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: cannot connect: %s (%d)", uri->text,
			    rdma_event_str(event->type), event->status);
		return FALSE;
	}
}

static gboolean next_event(PrVerbsPath *path, const PrPathSetup *setup, gint64 deadline,
			   PrVerbsEvent *ret, GError **error)
{
	while (!pr_verbs_next_event(path->channel, ret)) {
		if (!pr_backend_wait(path->channel->fd, POLLIN, deadline, setup->cancel, error)) {
			g_prefix_error(error, "path %s: ", setup->uri->text);
			return FALSE;
		}
	}
	return TRUE;
}

/* Waits for the next event; fails unless it is of this type and for this lane. */
static gboolean await(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
		      enum rdma_cm_event_type type, gint64 deadline, PrVerbsEvent *ret,
		      GError **error)
{
	if (!next_event(path, setup, deadline, ret, error))
		return FALSE;
	if (ret->id == lane->cm && ret->type == type)
		return TRUE;
	return event_error(setup->uri, ret, error);
}

static int ms_left(gint64 deadline)
{
	return (int)CLAMP((deadline - g_get_monotonic_time()) / 1000, 1, G_MAXINT);
}

static gboolean local_address(const PrUri *uri, GSocketAddress **ret, GError **error)
{
	const char *bind = g_hash_table_lookup(uri->options, PR_OPTION_BIND);

	*ret = NULL;
	if (!bind)
		return TRUE;
	*ret = g_inet_socket_address_new_from_string(bind, 0);
	if (*ret)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: option " PR_OPTION_BIND "=%s is no address", uri->text, bind);
	return FALSE;
}

static gboolean resolve_address(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
				GSocketAddress *to, gint64 deadline, GError **error)
{
	g_autoptr(GSocketAddress) from = NULL;
	struct sockaddr_storage source, target;
	PrVerbsEvent event;

	if (!local_address(setup->uri, &from, error))
		return FALSE;
	g_clear_pointer(&lane->cm, rdma_destroy_id);
	if (rdma_create_id(path->channel, &lane->cm, NULL, RDMA_PS_TCP))
		return pr_verbs_error(setup->uri, "no rdma_cm id", errno, error);
	if (rdma_set_option(lane->cm, RDMA_OPTION_ID, RDMA_OPTION_ID_TOS,
			    &path->options.tos[pr_verbs_kind(lane->id)], sizeof(uint8_t)))
		g_info("path %s: traffic class: %s", setup->uri->text, g_strerror(errno));
	g_socket_address_to_native(to, &target, sizeof(target), NULL);
	if (from)
		g_socket_address_to_native(from, &source, sizeof(source), NULL);
	if (rdma_resolve_addr(lane->cm, from ? (struct sockaddr *)&source : NULL,
			      (struct sockaddr *)&target, ms_left(deadline)))
		return pr_verbs_error(setup->uri, "cannot reach the host", errno, error);
	return await(path, lane, setup, RDMA_CM_EVENT_ADDR_RESOLVED, deadline, &event, error);
}

/* Tries all addresses of the name: perhaps only one of them is reached by RDMA. */
static gboolean resolve_any(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			    gint64 deadline, GError **error)
{
	uint16_t port = setup->data_port ? setup->data_port : setup->uri->port;
	g_autoptr(GPtrArray) addresses =
		pr_resolve(setup->uri->host, port, deadline, setup->cancel, error);

	if (!addresses) {
		g_prefix_error(error, "path %s: ", setup->uri->text);
		return FALSE;
	}
	for (guint i = 0; i < addresses->len; i++) {
		g_autoptr(GError) local = NULL;

		if (resolve_address(path, lane, setup, addresses->pdata[i], deadline, &local))
			return TRUE;
		if (i + 1 == addresses->len || g_cancellable_is_cancelled(setup->cancel)) {
			g_propagate_error(error, g_steal_pointer(&local));
			return FALSE;
		}
	}
	return FALSE;
}

/* All lanes of a path use one device, which the first lane opens. */
static gboolean use_device(PrVerbsPath *path, struct rdma_cm_id *id, GError **error)
{
	const char *name = ibv_get_device_name(id->verbs->device);

	if (!path->device.context)
		return pr_verbs_device_open(&path->device, id, path->uri, &path->options, error);
	if (!strcmp(name, pr_verbs_device_name(&path->device)) && id->port_num == path->device.port)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: one lane is on %s port %u, the other on %s port %u; name one host "
		    "address, and give ?" PR_OPTION_BIND "= the address of a single device",
		    path->uri->text, pr_verbs_device_name(&path->device), path->device.port, name,
		    id->port_num);
	return FALSE;
}

/* READs that this side offers to have outstanding, the same for both directions. */
static guint own_depth(const PrVerbsPath *path)
{
	guint depth = MIN(path->device.caps.max_qp_rd_atom, path->device.caps.max_qp_init_rd_atom);

	return MIN(depth, path->options.depth);
}

static struct rdma_conn_param conn_param(const PrVerbsPath *path, const PrVerbsLane *lane,
					 guint depth)
{
	return (struct rdma_conn_param){
		.responder_resources = depth,
		.initiator_depth = depth,
		.retry_count = path->options.retry[pr_verbs_kind(lane->id)],
		.rnr_retry_count = path->options.rnr_retry,
		.qp_num = lane->qp->qp_num,
	};
}

static gboolean request(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			GError **error)
{
	g_autoptr(GByteArray) data = g_byte_array_new();
	struct rdma_conn_param param = conn_param(path, lane, own_depth(path));
	PrLaneHello hello;

	pr_backend_lane_hello(&hello, &setup->binding, lane->id);
	pr_lane_hello_encode(data, &hello);
	param.private_data = data->data;
	param.private_data_len = data->len;
	if (rdma_connect(lane->cm, &param))
		return pr_verbs_error(setup->uri, "cannot connect", errno, error);
	return TRUE;
}

static gboolean try_connect(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			    gint64 deadline, GError **error)
{
	PrVerbsEvent event;

	if (!resolve_any(path, lane, setup, deadline, error) || !use_device(path, lane->cm, error))
		return FALSE;
	if (rdma_resolve_route(lane->cm, ms_left(deadline)))
		return pr_verbs_error(setup->uri, "no route to the host", errno, error);
	if (!await(path, lane, setup, RDMA_CM_EVENT_ROUTE_RESOLVED, deadline, &event, error) ||
	    !pr_verbs_lane_open(path, lane, error) || !request(path, lane, setup, error) ||
	    !await(path, lane, setup, RDMA_CM_EVENT_CONNECT_RESPONSE, deadline, &event, error) ||
	    !pr_verbs_lane_ready(path, lane, own_depth(path), error))
		return FALSE;
	if (rdma_establish(lane->cm))
		return pr_verbs_error(setup->uri, "cannot establish the connection", errno, error);
	return TRUE;
}

static gboolean device_is_down(PrVerbsPath *path, GError **error)
{
	g_set_error(
		error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		"path %s: device %s is DOWN, or its address has gone; bring it up or use another "
		"path",
		path->uri->text, pr_verbs_device_name(&path->device));
	return FALSE;
}

/* An event in between is about another lane; the next attempt reads it. */
static gboolean pause_attempts(PrVerbsPath *path, const PrPathSetup *setup, GError **error)
{
	pr_backend_wait(path->channel->fd, POLLIN, pr_backend_deadline(PAUSE_MS), setup->cancel,
			NULL);
	return !g_cancellable_set_error_if_cancelled(setup->cancel, error);
}

gboolean pr_verbs_connect_lane(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			       gint64 deadline, GError **error)
{
	for (guint timeout_ms = path->options.connect_timeout_ms;; timeout_ms *= 2) {
		gint64 attempt = pr_backend_deadline(timeout_ms);
		g_autoptr(GError) local = NULL;

		if (try_connect(path, lane, setup, MIN(attempt, deadline), &local))
			return TRUE;
		if (attempt >= deadline ||
		    !g_error_matches(local, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT)) {
			g_propagate_error(error, g_steal_pointer(&local));
			return FALSE;
		}
		if (pr_verbs_must_defer_free(path))
			return device_is_down(path, error);
		g_info("%s; trying again", local->message);
		pr_verbs_lane_close(lane);
		if (!pause_attempts(path, setup, error))
			return FALSE;
	}
}

/* Moves the id to the path's channel, where its events arrive from now on. */
static gboolean migrate_id(PrVerbsPath *path, struct rdma_cm_id *id, GError **error)
{
	if (rdma_migrate_id(id, path->channel))
		return pr_verbs_error(path->uri, "cannot move the data lane to its path", errno,
				      error);
	return use_device(path, id, error);
}

/* Whether the event says that the source has given up this attempt. */
static gboolean gave_up(const PrVerbsPath *path, const PrVerbsLane *lane, const PrVerbsEvent *event,
			GError **error)
{
	switch (event->type) {
	case RDMA_CM_EVENT_REJECTED:
	case RDMA_CM_EVENT_UNREACHABLE:
	case RDMA_CM_EVENT_CONNECT_ERROR:
	case RDMA_CM_EVENT_DISCONNECTED:
		break;
	default:
		return FALSE;
	}
	if (event->id != lane->cm)
		return FALSE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
		    "path %s: the source gave up connecting a lane (%s)", path->uri->text,
		    rdma_event_str(event->type));
	return TRUE;
}

static gboolean establish(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			  gint64 deadline, GError **error)
{
	gint64 attempt = pr_backend_deadline(ANSWER_FACTOR * path->options.connect_timeout_ms);
	PrVerbsEvent event;

	if (!next_event(path, setup, MIN(attempt, deadline), &event, error))
		return FALSE;
	if (event.id == lane->cm && event.type == RDMA_CM_EVENT_ESTABLISHED)
		return TRUE;
	return !gave_up(path, lane, &event, error) && event_error(setup->uri, &event, error);
}

/* The kernel refuses a request that its source has given up. Then an event tells why: use it as
 * the error. */
static void prefer_given_up(PrVerbsPath *path, PrVerbsLane *lane, GError **error)
{
	gint64 deadline = pr_backend_deadline(PAUSE_MS);
	PrVerbsEvent event;

	pr_backend_wait(path->channel->fd, POLLIN, deadline, NULL, NULL);
	if (pr_verbs_next_event(path->channel, &event)) {
		g_autoptr(GError) local = NULL;

		if (gave_up(path, lane, &event, &local)) {
			g_clear_error(error);
			g_propagate_error(error, g_steal_pointer(&local));
		}
	}
}

static gboolean answer(PrVerbsPath *path, PrVerbsLane *lane, guint depth, GError **error)
{
	struct rdma_conn_param param;

	if (!migrate_id(path, lane->cm, error) || !pr_verbs_lane_open(path, lane, error) ||
	    !pr_verbs_lane_ready(path, lane, MIN(depth, own_depth(path)), error))
		return FALSE;
	param = conn_param(path, lane, lane->depth);
	if (rdma_accept(lane->cm, &param))
		return pr_verbs_error(path->uri, "cannot accept a data lane", errno, error);
	return TRUE;
}

gboolean pr_verbs_accept_lane(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			      const PrVerbsRequest *request, gint64 deadline, GError **error)
{
	g_autoptr(GError) local = NULL;

	lane->cm = request->id;
	if (answer(path, lane, request->depth, &local)) {
		if (establish(path, lane, setup, deadline, &local))
			return TRUE;
	} else {
		prefer_given_up(path, lane, &local);
		pr_verbs_reject(g_steal_pointer(&lane->cm), local->message);
	}
	if (!g_error_matches(local, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT) ||
	    g_get_monotonic_time() >= deadline) {
		g_propagate_error(error, g_steal_pointer(&local));
		return FALSE;
	}
	if (pr_verbs_must_defer_free(path))
		return device_is_down(path, error);
	g_info("%s; waiting for another attempt", local->message);
	pr_verbs_lane_close(lane);
	return TRUE;
}
