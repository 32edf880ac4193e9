/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/peer-limits.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#define NETWORK_BYTES 8 /* of an IPv6 address */
#define TOKEN_US      (G_USEC_PER_SEC / PR_TOKENS_PER_SECOND)

void pr_peer_host(int fd, PrPeerHost *ret)
{
	struct sockaddr_storage address = {0};
	socklen_t size = sizeof(address);
	const struct sockaddr_in *v4 = (const void *)&address;
	const struct sockaddr_in6 *v6 = (const void *)&address;

	*ret = (PrPeerHost){{0}};
	if (getpeername(fd, (struct sockaddr *)&address, &size) < 0)
		return;
	if (address.ss_family == AF_INET)
		memcpy(ret->bytes, &v4->sin_addr, sizeof(v4->sin_addr));
	else if (address.ss_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr))
		memcpy(ret->bytes, v6->sin6_addr.s6_addr + 12, 4);
	else if (address.ss_family == AF_INET6)
		memcpy(ret->bytes, v6->sin6_addr.s6_addr, NETWORK_BYTES);
}

static gboolean same_host(const PrPeerHost *a, const PrPeerHost *b)
{
	return !memcmp(a, b, sizeof(*a));
}

static guint count(const PrPeerHost *hosts, guint n, const PrPeerHost *host)
{
	guint found = 0;

	for (guint i = 0; i < n; i++)
		found += same_host(&hosts[i], host);
	return found;
}

guint pr_peer_pick_eviction(const PrPeerHost *hosts, guint n)
{
	guint victim = 0, most = 0;

	for (guint i = 0; i < n; i++) {
		guint has = count(hosts, n, &hosts[i]);

		if (has > most) {
			most = has;
			victim = i;
		}
	}
	return victim;
}

gint64 pr_token_bucket_available_at(const PrTokenBucket *bucket, gint64 now)
{
	return MAX(now, bucket->full_at - (PR_TOKENS_BURST - 1) * TOKEN_US);
}

guint pr_token_bucket_pick_next(const PrTokenBucket *bucket, const PrPeerHost *hosts, guint n)
{
	guint known = MIN(bucket->n_taken, PR_TOKENS_REMEMBERED), next = 0, fewest = G_MAXUINT;

	for (guint i = 0; i < n; i++) {
		guint had = count(bucket->last, known, &hosts[i]);

		if (had < fewest) {
			fewest = had;
			next = i;
		}
	}
	return next;
}

void pr_token_bucket_take(PrTokenBucket *bucket, const PrPeerHost *host, gint64 now)
{
	bucket->full_at = MAX(bucket->full_at, now) + TOKEN_US;
	bucket->last[bucket->n_taken++ % PR_TOKENS_REMEMBERED] = *host;
}

gboolean pr_log_ratelimit_allows(PrLogRatelimit *limit, gint64 now, guint *ret_suppressed)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&limit->lock);

	if (now - limit->since >= G_USEC_PER_SEC) {
		limit->since = now;
		limit->lines = 0;
	}
	if (limit->lines == PR_LOG_LINES_PER_SECOND) {
		limit->suppressed++;
		return FALSE;
	}
	limit->lines++;
	*ret_suppressed = limit->suppressed;
	limit->suppressed = 0;
	return TRUE;
}
