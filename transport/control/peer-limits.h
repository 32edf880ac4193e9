/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fair limits for unauthenticated peers. All that is known of such a peer is the address that it
 * connects from. These functions say which connection is closed when there are too many, which is
 * served next when there is not enough for all, and how much is logged about them.
 *
 * A host that floods the listener thus competes with itself, and not with the real peer. Where
 * both are one host, or the flood comes from many hosts, the oldest connection is the first to
 * go.
 *
 * Not thread-safe, except for PrLogRatelimit.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

/* A host: its IPv4 address, or the network half of its IPv6 address, because a host may use all
 * of the other half. */
typedef struct PrPeerHost {
	uint8_t bytes[16];
} PrPeerHost;

/* The host at the far end of a socket; zeros where it is not known. */
void pr_peer_host(int fd, PrPeerHost *ret);

/* Which of n > 0 connections, in the order in which they came, is to be closed: the first one of
 * the host that has most of them. */
guint pr_peer_pick_eviction(const PrPeerHost *hosts, guint n);

/* A budget for work that costs this side processor time: at most PR_TOKENS_BURST at once, and
 * PR_TOKENS_PER_SECOND in the long run. Zeros are a full bucket. */
#define PR_TOKENS_BURST	     64
#define PR_TOKENS_PER_SECOND 32
#define PR_TOKENS_REMEMBERED 64

typedef struct PrTokenBucket {
	gint64 full_at;			       /* when it is full again; us, monotonic */
	PrPeerHost last[PR_TOKENS_REMEMBERED]; /* the hosts that had the last tokens; a ring */
	guint n_taken;			       /* ever */
} PrTokenBucket;

/* When there is a token: now, or a later time (us). */
gint64 pr_token_bucket_available_at(const PrTokenBucket *bucket, gint64 now);
/* Which of n > 0 hosts that wait, in the order in which they came, is next: the one that had
 * fewest of the last tokens. */
guint pr_token_bucket_pick_next(const PrTokenBucket *bucket, const PrPeerHost *hosts, guint n);
void pr_token_bucket_take(PrTokenBucket *bucket, const PrPeerHost *host, gint64 now);

/* Limits the log lines that peers can cause: PR_LOG_LINES_PER_SECOND. Zeros, and a lock, are a
 * new one. */
#define PR_LOG_LINES_PER_SECOND 10

typedef struct PrLogRatelimit {
	GMutex lock;	  /* of the rest; the owner's to init and clear */
	gint64 since;	  /* when the current second began */
	guint lines;	  /* logged in it */
	guint suppressed; /* since the last line that was logged */
} PrLogRatelimit;

/* Any thread. FALSE: do not log. *ret_suppressed: how many lines were not logged since the last
 * one that was. */
gboolean pr_log_ratelimit_allows(PrLogRatelimit *limit, gint64 now, guint *ret_suppressed);
