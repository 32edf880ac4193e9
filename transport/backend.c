/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/backend.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "transport/lane-rendezvous.h"
#include "transport/net/dial.h"

gboolean pr_backend_check_options(const PrUri *uri, const char *const *known, GError **error)
{
	GHashTableIter iter;
	gpointer key;

	g_hash_table_iter_init(&iter, uri->options);
	while (g_hash_table_iter_next(&iter, &key, NULL)) {
		g_autofree char *list = g_strjoinv(", ", (char **)known);

		if (!strcmp(key, PR_OPTION_BIND) || g_strv_contains(known, key))
			continue;
		g_set_error(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED,
			    "path %s: unknown option \"%s\"; options of %s: are " PR_OPTION_BIND
			    "%s%s",
			    uri->text, (const char *)key, uri->scheme, *list ? ", " : "", list);
		return FALSE;
	}
	return TRUE;
}

void pr_backend_describe(GString *out, const char *what, const char *help)
{
	g_string_append_printf(out, "  %-26s %s\n", what, help);
}

void pr_backend_describe_option(GString *out, const char *option, const char *help)
{
	g_string_append_printf(out, "    ?%-23s %s\n", option, help);
}

gboolean pr_backend_number(const PrUri *uri, const char *option, guint64 min, guint64 max,
			   guint64 fallback, guint64 *ret, GError **error)
{
	const char *text = g_hash_table_lookup(uri->options, option);

	if (!text) {
		*ret = fallback;
		return TRUE;
	}
	if (g_ascii_string_to_unsigned(text, 10, min, max, ret, NULL))
		return TRUE;
	g_set_error(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED,
		    "path %s: option %s is \"%s\"; give a number from %" G_GUINT64_FORMAT
		    " to %" G_GUINT64_FORMAT,
		    uri->text, option, text, min, max);
	return FALSE;
}

/* Takes the same time whatever differs: the time must tell nothing about the token, which is a
 * secret. */
static gboolean same_bytes(const uint8_t *a, const uint8_t *b, gsize n)
{
	uint8_t diff = 0;

	for (gsize i = 0; i < n; i++)
		diff |= a[i] ^ b[i];
	return !diff;
}

guint pr_backend_n_lanes(const PrPathSetup *setup)
{
	g_assert(setup->n_lanes <= PR_LANES_MAX);
	return MAX(setup->n_lanes, PR_LANES_MIN);
}

/*
 * Data paths are not encrypted, so a lane shows a token instead of the secret: HMAC-SHA256, keyed
 * with the secret, of the purpose, the migration, the epoch and the lane. An epoch belongs to one
 * connection over one transport. So a token that was read on the wire connects nothing but its
 * own lane, and recovery takes the secret itself. Not handled: an attacker who reads a token and
 * connects before the lane that it belongs to.
 */
static void make_token(uint8_t ret[PR_TOKEN_BYTES], const PrBinding *binding, uint8_t lane)
{
	static const char purpose[] = "postroad data lane";
	uint64_t epoch = GUINT64_TO_BE(binding->epoch);
	uint8_t digest[32];
	gsize length = sizeof(digest);
	GHmac *hmac = g_hmac_new(G_CHECKSUM_SHA256, binding->secret, PR_SECRET_BYTES);

	g_hmac_update(hmac, (const guchar *)purpose, sizeof(purpose));
	g_hmac_update(hmac, binding->uuid, PR_UUID_BYTES);
	g_hmac_update(hmac, (const guchar *)&epoch, sizeof(epoch));
	g_hmac_update(hmac, &lane, 1);
	g_hmac_get_digest(hmac, digest, &length);
	g_hmac_unref(hmac);
	memcpy(ret, digest, PR_TOKEN_BYTES);
}

gboolean pr_backend_binding_matches(const PrBinding *binding, const PrLaneHello *hello)
{
	uint8_t token[PR_TOKEN_BYTES];

	if (hello->lane >= PR_LANES_MAX || hello->epoch != binding->epoch ||
	    !same_bytes(hello->uuid, binding->uuid, PR_UUID_BYTES))
		return FALSE;
	make_token(token, binding, hello->lane);
	return same_bytes(hello->token, token, PR_TOKEN_BYTES);
}

void pr_backend_lane_hello(PrLaneHello *ret, const PrBinding *binding, PrLaneId lane)
{
	ret->epoch = binding->epoch;
	ret->lane = lane;
	memcpy(ret->uuid, binding->uuid, PR_UUID_BYTES);
	make_token(ret->token, binding, lane);
}

static gboolean has_all_lanes(const PrDataPath *path, const PrLaneAcceptor *acceptor)
{
	for (guint i = 0; i < path->n_lanes; i++)
		if (!acceptor->has_lane(path, i))
			return FALSE;
	return TRUE;
}

gboolean pr_backend_accept_lanes(PrDataPath *path, PrDataListener *listener,
				 const PrPathSetup *setup, const PrLaneAcceptor *acceptor,
				 GError **error)
{
	PrPendingLanes *pending = ((PrBackendListener *)listener)->pending;
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);
	gboolean ok = TRUE;

	pr_pending_lanes_expect(pending, &setup->binding);
	while (ok && !has_all_lanes(path, acceptor)) {
		PrLaneId lane;
		gpointer arrival = pr_pending_lanes_claim(pending, setup, deadline, &lane, error);

		if (!arrival)
			ok = FALSE;
		else if (lane >= path->n_lanes || acceptor->has_lane(path, lane))
			pr_pending_lanes_refuse(pending, arrival,
						"the lane is connected already, or one too many");
		else
			ok = acceptor->accept_lane(path, listener, lane, arrival, setup, deadline,
						   error);
	}
	pr_pending_lanes_forget(pending, &setup->binding);
	return ok;
}

void pr_backend_expect(PrDataListener *listener, const PrBinding *binding)
{
	pr_pending_lanes_expect(((PrBackendListener *)listener)->pending, binding);
}

void pr_backend_forget(PrDataListener *listener, const PrBinding *binding)
{
	pr_pending_lanes_forget(((PrBackendListener *)listener)->pending, binding);
}

void pr_backend_refuse_offer(PrDataListener *listener, GSocketConnection *connection,
			     const PrLaneHello *hello)
{
	g_object_unref(connection);
}

gboolean pr_backend_admit_message(const PrUri *uri, gboolean outgoing, uint16_t type)
{
	return TRUE;
}

guint pr_backend_take_early(PrCompletion *early, guint *n_early, PrCompletion *ret, guint max)
{
	guint n = MIN(*n_early, max);

	if (!n)
		return 0;
	memcpy(ret, early, n * sizeof(*ret));
	*n_early -= n;
	memmove(early, early + n, *n_early * sizeof(*early));
	return n;
}

void pr_path_life_init(PrPathLife *life, const PrPathSetup *setup, PrDataPath *path,
		       PrPathStop stop)
{
	g_autofree char *address = pr_uri_address(setup->uri);

	*life = (PrPathLife){
		.state = PR_PATH_LIFE_UP,
		.name = g_strdup_printf("path %s", address),
		.path = path,
		.stop = stop,
		.on_failed = setup->on_failed,
		.opaque = setup->opaque,
	};
}

void pr_path_life_clear(PrPathLife *life)
{
	g_clear_pointer(&life->name, g_free);
}

gboolean pr_path_life_is_up(PrPathLife *life)
{
	return g_atomic_int_get(&life->state) == PR_PATH_LIFE_UP;
}

gboolean pr_path_life_end(PrPathLife *life, PrPathLifeState how)
{
	return g_atomic_int_compare_and_exchange(&life->state, PR_PATH_LIFE_UP, (int)how);
}

static void report_failure(PrPathLife *life, PrPathError code, const char *what)
{
	g_autoptr(GError) error = g_error_new(PR_PATH_ERROR, code, "%s: %s", life->name, what);

	life->stop(life->path);
	life->on_failed(error, life->opaque);
}

void pr_path_life_fail(PrPathLife *life, const char *format, ...)
{
	g_autofree char *what = NULL;
	va_list args;

	if (!pr_path_life_end(life, PR_PATH_LIFE_FAILED))
		return;
	va_start(args, format);
	what = g_strdup_vprintf(format, args);
	va_end(args);
	report_failure(life, PR_PATH_ERROR_LOST, what);
}

void pr_path_life_fail_closed(PrPathLife *life)
{
	if (pr_path_life_end(life, PR_PATH_LIFE_FAILED))
		report_failure(life, PR_PATH_ERROR_CLOSED,
			       "the peer closed the connection, or has died");
}

void pr_path_life_shut(PrPathLife *life)
{
	if (pr_path_life_end(life, PR_PATH_LIFE_SHUT))
		life->stop(life->path);
}

gint64 pr_backend_deadline(guint timeout_ms)
{
	return g_get_monotonic_time() + (gint64)timeout_ms * 1000;
}

gboolean pr_backend_wait(int fd, short events, gint64 deadline, GCancellable *cancel,
			 GError **error)
{
	switch (pr_wait_fd(fd, events, deadline, cancel)) {
	case PR_WAIT_READY:
		return TRUE;
	case PR_WAIT_CANCELLED:
		return !g_cancellable_set_error_if_cancelled(cancel, error);
	case PR_WAIT_TIMEOUT:
		break;
	}
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
		    "no answer in time; is the peer alive, and is a firewall in between?");
	return FALSE;
}

static gboolean is_storable(const PrRegion *region)
{
	struct statfs fs;

	return region->memfd >= 0 && fstatfs(region->memfd, &fs) == 0 && fs.f_type == TMPFS_MAGIC &&
	       (fcntl(region->memfd, F_GETFL) & O_ACCMODE) == O_RDWR;
}

gboolean *pr_regions_storable(const PrRegion *regions, guint n_regions)
{
	gboolean *storable = g_new(gboolean, n_regions);

	for (guint i = 0; i < n_regions; i++)
		storable[i] = is_storable(&regions[i]);
	return storable;
}

gboolean pr_region_store(const PrRegion *region, uint64_t offset, const void *data, gsize length)
{
	const uint8_t *at = data;

	while (length > 0) {
		ssize_t n =
			pwrite(region->memfd, at, length, (off_t)(region->memfd_offset + offset));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return FALSE;
		at += n;
		offset += (uint64_t)n;
		length -= (gsize)n;
	}
	return TRUE;
}

static gboolean epoll_error(const char *call, GError **error)
{
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "%s: %s", call, g_strerror(errno));
	return FALSE;
}

gboolean pr_poll_set_init(PrPollSet *set, GError **error)
{
	*set = PR_POLL_SET_INIT;
	set->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (set->epoll_fd < 0)
		return epoll_error("epoll_create1", error);
	return pr_waker_init(&set->waker, error) &&
	       pr_poll_set_add(set, pr_waker_fd(&set->waker), error);
}

gboolean pr_poll_set_add(PrPollSet *set, int fd, GError **error)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

	if (epoll_ctl(set->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
		return epoll_error("epoll_ctl", error);
	return TRUE;
}

void pr_poll_set_wake(PrPollSet *set)
{
	pr_waker_wake(&set->waker);
}

void pr_poll_set_clear(PrPollSet *set)
{
	pr_waker_clear(&set->waker);
	if (set->epoll_fd >= 0)
		close(set->epoll_fd);
	*set = PR_POLL_SET_INIT;
}
