/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Justice among strangers, who have shown nothing yet but the address that they come from: who has to go when
 * there are too many, whose turn it is when there is not enough for all, and how much is said about them. So
 * that a host which floods us gets in its own way, and not in the real peer's. Where both are one host, or the flood
 * comes from many, whoever came first goes first. For transport/ only. Not thread-safe, except for PrLogRatelimit.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

/* A host: its address; of IPv6 the network's half of it, because a host has all of the other half. */
typedef struct PrCrowdHost {
	uint8_t bytes[16];
} PrCrowdHost;

/* The far end of a socket; zeros where that can't be told. */
void pr_crowd_host(int fd, PrCrowdHost *ret);

/* Of n > 0 in the order of their coming: who goes: the first of the host that has most. */
guint pr_peer_pick_eviction(const PrCrowdHost *hosts, guint n);

/* Turns at something that costs us: at most PR_TURNS_BURST at once and PR_TURNS_PER_SECOND for long. */
#define PR_TURNS_BURST	    64
#define PR_TURNS_PER_SECOND 32
#define PR_TURNS_REMEMBERED 64

typedef struct PrTokenBucket {
	gint64 full_at; /* microseconds: when there will be a whole burst again */
	PrCrowdHost last[PR_TURNS_REMEMBERED]; /* who had the last ones; a ring */
	guint n;			       /* ever given */
} PrTokenBucket;

/* When there is a turn: now, or a later time. Microseconds. */
gint64 pr_token_bucket_when(const PrTokenBucket *turns, gint64 now);
/* Of n > 0 who wait, in the order of their coming: whose turn it is: that of the host that had fewest of late. */
guint pr_token_bucket_whose(const PrTokenBucket *turns, const PrCrowdHost *hosts, guint n);
void pr_token_bucket_take(PrTokenBucket *turns, const PrCrowdHost *host, gint64 now);

/* Lines of a log that others can make us write: at most PR_QUIET_LINES a second. Zeros are a new one. */
#define PR_QUIET_LINES 10

typedef struct PrLogRatelimit {
	GMutex lock;	/* of the rest */
	gint64 since;	/* the second began */
	guint lines;	/* in it */
	guint left_out; /* since the last line */
} PrLogRatelimit;

/* FALSE: say nothing. *ret_left_out: how often that was the answer since the last line. */
gboolean pr_log_ratelimit_allows(PrLogRatelimit *quiet, gint64 now, guint *ret_left_out);
