/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/backend.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/vfs.h>
#include <unistd.h>

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

/* In constant time: the token is what keeps strangers out. */
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
 * What a lane shows in place of the secret, because data paths are not encrypted: HMAC-SHA256, keyed with the
 * secret, of all that it is to be good for. An epoch is of one connection, over one transport; so whoever reads
 * a token on the wire can't connect anything else with it, nor come back for the migration, which takes the
 * secret. Whoever reads it and is there before the lane it is of is past what a data path can fend off.
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

void pr_fate_init(PrPathLife *fate, const PrPathSetup *setup)
{
	g_autofree char *address = pr_uri_address(setup->uri);

	fate->state = PR_FATE_UP;
	fate->name = g_strdup_printf("path %s", address);
	fate->on_failed = setup->on_failed;
	fate->opaque = setup->opaque;
}

void pr_fate_clear(PrPathLife *fate)
{
	g_clear_pointer(&fate->name, g_free);
}

gboolean pr_fate_is_up(PrPathLife *fate)
{
	return g_atomic_int_get(&fate->state) == PR_FATE_UP;
}

gboolean pr_fate_end(PrPathLife *fate, PrPathLifeState how)
{
	return g_atomic_int_compare_and_exchange(&fate->state, PR_FATE_UP, (int)how);
}

void pr_fate_notify(PrPathLife *fate, const char *reason)
{
	g_autoptr(GError) error =
		g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOST, "%s: %s", fate->name, reason);

	fate->on_failed(error, fate->opaque);
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

gboolean pr_region_is_writable_file(const PrRegion *region)
{
	struct statfs fs;

	return region->memfd >= 0 && fstatfs(region->memfd, &fs) == 0 && fs.f_type == TMPFS_MAGIC &&
	       (fcntl(region->memfd, F_GETFL) & O_ACCMODE) == O_RDWR;
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
