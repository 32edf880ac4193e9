/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Code that the backends share: options of a URI, the accepting of lanes, the life of a path,
 * bounded waits, storing pages in a memfd, and the fd that a lane sleeps on. For transport/ only.
 */
#pragma once

#include <gio/gio.h>
#include <poll.h>

#include "transport/transport.h"
#include "util/waker.h"

#define PR_OPTION_BIND "bind"

/* FALSE unless each option of the URI is in `known` (NULL-terminated) or is `bind`, the address to
 * connect from. The error names the unknown option and lists the known ones. */
gboolean pr_backend_check_options(const PrUri *uri, const char *const *known, GError **error);
/* These print the lines of describe(). */
void pr_backend_describe(GString *out, const char *what, const char *help);
void pr_backend_describe_option(GString *out, const char *option, const char *help);
/* Reads an option that is a number in [min, max]; without the option *ret is `fallback`. */
gboolean pr_backend_number(const PrUri *uri, const char *option, guint64 min, guint64 max,
			   guint64 fallback, guint64 *ret, GError **error);

/* The source's urgent lane polls for the next request for so long before it sleeps, because
 * waking up takes longer than a READ. Between two looks it yields the processor: the destination
 * may run on the same one (measured without the yield: 115 us for a READ instead of 12). */
#define PR_BACKEND_SPIN_US 50

/* ---- lanes ---- */

/* PrDataPath.n_lanes of a new path. */
guint pr_backend_n_lanes(const PrPathSetup *setup);
/* Whether a lane that came in belongs to this incarnation. The lane's number may be larger than the
 * path's count of lanes. */
gboolean pr_backend_binding_matches(const PrBinding *binding, const PrLaneHello *hello);
void pr_backend_lane_hello(PrLaneHello *ret, const PrBinding *binding, PrLaneId lane);

/* A listener whose lanes wait in `pending` until accept() claims them. */
typedef struct PrBackendListener {
	PrDataListener base;
	struct PrPendingLanes *pending; /* constant; see lane-rendezvous.h */
} PrBackendListener;

/* The steps of accepting that differ between the backends. An arrival is a lane's connection, or
 * the request for one; its type is the backend's. */
typedef struct PrLaneAcceptor {
	gboolean (*has_lane)(const PrDataPath *path, PrLaneId lane);
	/* Connects the lane, which the path does not have yet. Always takes the arrival. */
	gboolean (*accept_lane)(PrDataPath *path, PrDataListener *listener, PrLaneId lane,
				gpointer arrival, const PrPathSetup *setup, gint64 deadline,
				GError **error);
} PrLaneAcceptor;

/* Accepts lanes with the setup's binding until the path has all of its lanes, or for timeout_ms. */
gboolean pr_backend_accept_lanes(PrDataPath *path, PrDataListener *listener,
				 const PrPathSetup *setup, const PrLaneAcceptor *acceptor,
				 GError **error);

/* Entries of an ops table, for a PrBackendListener. */
void pr_backend_expect(PrDataListener *listener, const PrBinding *binding);
void pr_backend_forget(PrDataListener *listener, const PrBinding *binding);
/* offer() where no data lane comes in on the control port: closes the connection. */
void pr_backend_refuse_offer(PrDataListener *listener, GSocketConnection *connection,
			     const PrLaneHello *hello);
/* admit_message() that admits each message. */
gboolean pr_backend_admit_message(const PrUri *uri, gboolean outgoing, uint16_t type);

/* Moves up to `max` completions from the head of `early` to `ret`; returns how many. `early` holds
 * completions that a lane found while it waited for something else. */
guint pr_backend_take_early(PrCompletion *early, guint *n_early, PrCompletion *ret, guint max);

/* ---- the life of a path ---- */

/*
 * A path ends once: by a failure or by shutdown(), whichever comes first. Thread-safe.
 */
typedef enum PrPathLifeState {
	PR_PATH_LIFE_UP,     /* READs may be posted */
	PR_PATH_LIFE_FAILED, /* on_failed has been called, or is being called */
	PR_PATH_LIFE_SHUT,   /* shutdown() came first: on_failed is never called */
} PrPathLifeState;

/* Makes all outstanding READs complete and wakes all threads of the path. */
typedef void (*PrPathStop)(PrDataPath *path);

typedef struct PrPathLife {
	int state;	  /* PrPathLifeState; atomic; leaves UP once */
	char *name;	  /* "path tcp:HOST:PORT"; constant, as is all below */
	PrDataPath *path; /* argument of stop */
	PrPathStop stop;
	PrPathFailed on_failed;
	void *opaque; /* argument of on_failed */
} PrPathLife;

void pr_path_life_init(PrPathLife *life, const PrPathSetup *setup, PrDataPath *path,
		       PrPathStop stop);
void pr_path_life_clear(PrPathLife *life);
gboolean pr_path_life_is_up(PrPathLife *life);
/* TRUE for the one caller whose call ended the path. That caller has to stop the path. */
gboolean pr_path_life_end(PrPathLife *life, PrPathLifeState how);
/* Unless the path has ended: ends it, stops it, and calls on_failed with PR_PATH_ERROR_LOST and
 * "NAME: REASON". The reason is a printf format. */
void pr_path_life_fail(PrPathLife *life, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* Unless the path has ended: ends it and stops it. */
void pr_path_life_shut(PrPathLife *life);

/* Waits until poll(2) reports one of `events` (or an error) on fd. FALSE: PR_PATH_ERROR_TIMEOUT
 * at the deadline (monotonic time, microseconds), G_IO_ERROR_CANCELLED when cancelled. */
gboolean pr_backend_wait(int fd, short events, gint64 deadline, GCancellable *cancel,
			 GError **error);
gint64 pr_backend_deadline(guint timeout_ms);

/*
 * Storing pages. Where the kernel or a library copies the bytes anyway, a READ is received into a
 * buffer that stays in the processor's cache, and is written to the memfd from there. That costs
 * half of receiving into a mapping of the memfd (measured: 2.0 against 1.1 GB/s): writing whole
 * new pages takes no page faults, and the kernel does not zero the pages first.
 */
/* For each region whether pr_region_store() can write to its memfd: not where that has huge
 * pages. To be freed. */
gboolean *pr_regions_storable(const PrRegion *regions, guint n_regions);
/* Stores bytes in such a region. FALSE: errno has the cause, such as a lack of memory. */
gboolean pr_region_store(const PrRegion *region, uint64_t offset, const void *data, gsize length);

/*
 * A lane's thread sleeps in poll on these: an epoll fd with the lane's own descriptors, and a waker
 * with which any other thread makes it readable for good.
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
