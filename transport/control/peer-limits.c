/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/peer-limits.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#define NETWORK_BYTES 8 /* of an IPv6 address */
#define TURN_US	      (G_USEC_PER_SEC / PR_TURNS_PER_SECOND)

void pr_crowd_host(int fd, PrCrowdHost *ret)
{
	struct sockaddr_storage address = {0};
	socklen_t size = sizeof(address);
	const struct sockaddr_in *v4 = (const void *)&address;
	const struct sockaddr_in6 *v6 = (const void *)&address;

	*ret = (PrCrowdHost){{0}};
	if (getpeername(fd, (struct sockaddr *)&address, &size) < 0)
		return;
	if (address.ss_family == AF_INET)
		memcpy(ret->bytes, &v4->sin_addr, sizeof(v4->sin_addr));
	else if (address.ss_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr))
		memcpy(ret->bytes, v6->sin6_addr.s6_addr + 12, 4);
	else if (address.ss_family == AF_INET6)
		memcpy(ret->bytes, v6->sin6_addr.s6_addr, NETWORK_BYTES);
}

static gboolean same_host(const PrCrowdHost *a, const PrCrowdHost *b)
{
	return !memcmp(a, b, sizeof(*a));
}

static guint count(const PrCrowdHost *hosts, guint n, const PrCrowdHost *host)
{
	guint found = 0;

	for (guint i = 0; i < n; i++)
		found += same_host(&hosts[i], host);
	return found;
}

guint pr_peer_pick_eviction(const PrCrowdHost *hosts, guint n)
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

gint64 pr_token_bucket_when(const PrTokenBucket *turns, gint64 now)
{
	return MAX(now, turns->full_at - (PR_TURNS_BURST - 1) * TURN_US);
}

guint pr_token_bucket_whose(const PrTokenBucket *turns, const PrCrowdHost *hosts, guint n)
{
	guint known = MIN(turns->n, PR_TURNS_REMEMBERED), whose = 0, fewest = G_MAXUINT;

	for (guint i = 0; i < n; i++) {
		guint had = count(turns->last, known, &hosts[i]);

		if (had < fewest) {
			fewest = had;
			whose = i;
		}
	}
	return whose;
}

void pr_token_bucket_take(PrTokenBucket *turns, const PrCrowdHost *host, gint64 now)
{
	turns->full_at = MAX(turns->full_at, now) + TURN_US;
	turns->last[turns->n++ % PR_TURNS_REMEMBERED] = *host;
}

gboolean pr_log_ratelimit_allows(PrLogRatelimit *quiet, gint64 now, guint *ret_left_out)
{
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&quiet->lock);

	if (now - quiet->since >= G_USEC_PER_SEC) {
		quiet->since = now;
		quiet->lines = 0;
	}
	if (quiet->lines == PR_QUIET_LINES) {
		quiet->left_out++;
		return FALSE;
	}
	quiet->lines++;
	*ret_left_out = quiet->left_out;
	quiet->left_out = 0;
	return TRUE;
}
