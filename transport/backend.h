/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the backends have in common: options of a URI, the end of a path, bounded waits and the fd that
 * a lane sleeps on. For transport/ only.
 */
#pragma once

#include <gio/gio.h>
#include <poll.h>

#include "transport/transport.h"
#include "util/waker.h"

#define PR_OPTION_BIND "bind"

/* FALSE unless every option of the URI is one of `known` (NULL-terminated) or is `bind`, the address
 * to connect from. The error names the option and lists what there is. */
gboolean pr_backend_check_options(const PrUri *uri, const char *const *known, GError **error);
/* Lines of describe(). */
void pr_backend_describe(GString *out, const char *what, const char *help);
void pr_backend_describe_option(GString *out, const char *option, const char *help);
/* An option that is a number in [min, max]; `fallback` where the URI does not have it. */
gboolean pr_backend_number(const PrUri *uri, const char *option, guint64 min, guint64 max,
			   guint64 fallback, guint64 *ret, GError **error);

/* How long the source's urgent lane looks for the next request before it sleeps: waking up takes longer
 * than a READ. It yields the processor all the while, which the destination may need when both
 * share one (measured: without that, 115 us for a READ instead of 12). */
#define PR_BACKEND_SPIN_US 50

/* PrDataPath.n_lanes of a new path. */
guint pr_backend_n_lanes(const PrPathSetup *setup);
/* Whether a lane that came in belongs to the incarnation that is waited for. The path may have fewer lanes. */
gboolean pr_backend_binding_matches(const PrBinding *binding, const PrLaneHello *hello);
void pr_backend_lane_hello(PrLaneHello *ret, const PrBinding *binding, PrLaneId lane);

/*
 * How a path ends: once, by failure or by shutdown(), whichever comes first. Thread-safe.
 */
typedef enum PrPathLifeState {
	PR_FATE_UP,	/* READs may be posted */
	PR_FATE_FAILED, /* on_failed has been or is being called */
	PR_FATE_SHUT,	/* shutdown() came first: on_failed is never called */
} PrPathLifeState;

typedef struct PrPathLife {
	int state;		/* PrPathLifeState; atomic, leaves UP once */
	char *name;		/* "path tcp:HOST:PORT"; constant */
	PrPathFailed on_failed; /* constant, like opaque */
	void *opaque;
} PrPathLife;

void pr_fate_init(PrPathLife *fate, const PrPathSetup *setup);
void pr_fate_clear(PrPathLife *fate);
gboolean pr_fate_is_up(PrPathLife *fate);
/* TRUE for the one caller that ended the path. It then stops the lanes, and after a failure calls
 * pr_fate_notify(). */
gboolean pr_fate_end(PrPathLife *fate, PrPathLifeState how);
/* Calls on_failed with PR_PATH_ERROR_LOST and "NAME: REASON". */
void pr_fate_notify(PrPathLife *fate, const char *reason);

/* Waits until poll(2) reports one of `events` (or an error) on fd. FALSE: PR_PATH_ERROR_TIMEOUT at the
 * deadline (monotonic time, microseconds), G_IO_ERROR_CANCELLED when cancelled. */
gboolean pr_backend_wait(int fd, short events, gint64 deadline, GCancellable *cancel,
			 GError **error);
gint64 pr_backend_deadline(guint timeout_ms);

/*
 * Storing what was read. Writing whole pages to a memfd that does not have them yet costs half of what
 * receiving them into a mapping of it does: neither a page fault for each, nor zeroing what is about to be
 * overwritten (measured: 2.0 against 1.1 GB/s). So what the kernel or a library copies anyway is received into
 * a buffer that stays in the processor's cache, and written from there.
 */
/* Whether pr_region_store() can write to the region's memfd: not where it has huge pages. */
gboolean pr_region_is_writable_file(const PrRegion *region);
/* Stores bytes in such a region. FALSE: errno says why (no memory is left, say). */
gboolean pr_region_store(const PrRegion *region, uint64_t offset, const void *data, gsize length);

/*
 * What a lane's thread sleeps on: an epoll fd with the lane's own descriptors, and a waker by which any
 * other thread makes it readable for good.
 */
typedef struct PrPollSet {
	int epoll_fd; /* -1: none */
	PrWaker waker;
} PrPollSet;

#define PR_POLL_SET_INIT ((PrPollSet){.epoll_fd = -1, .waker = PR_WAKER_INIT})
gboolean pr_poll_set_init(PrPollSet *set, GError **error);
gboolean pr_poll_set_add(PrPollSet *set, int fd, GError **error);
/* Any thread; does nothing to a set that is PR_POLL_SET_INIT. */
void pr_poll_set_wake(PrPollSet *set);
void pr_poll_set_clear(PrPollSet *set);
