/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The control channel over loopback sockets: what its tests share. Peers that misbehave are raw
 * sockets. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "transport/control/control.h"

#define LONG_MS	    20000  /* bound of what should happen at once, on a slow machine */
#define PATIENT_MS  120000 /* handshake timeout of a destination: longer than any test waits */
#define STALL_MS    3000   /* instead of PATIENT_MS, in tests that wait for this timeout */
#define INTERVAL_MS 20
#define TIMEOUT_MS  4000 /* heartbeat timeout: a thread may get no CPU for a few seconds */
#define SILENCE_MS  1000 /* instead of TIMEOUT_MS, in tests that wait for this timeout */
#define MIB	    (1024 * 1024)

/* The failure that on_failed has got for a channel. */
typedef struct Failure {
	GMutex lock; /* protects the rest */
	GCond changed;
	guint calls;
	GError *reason;
} Failure;

void failure_clear(Failure *failure);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Failure, failure_clear)

/* A destination: a listener that gives every HELLO the same answer. */
typedef struct Destination {
	PrListener *listener;
	const PrTls *tls; /* the source uses it, too */
	PrHelloAck ack;
	GMutex lock; /* protects the rest */
	GCond changed;
	GQueue controls; /* PrControl: the channels whose HELLO was answered */
	guint hellos;
	gboolean hold; /* while it is set, on_hello waits */
	char scheme[16];
} Destination;

void destination_free(Destination *destination);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Destination, destination_free)

/* Two ends of a started channel. */
typedef struct Pair {
	Destination *destination;
	PrControl *source, *sink;
	PrTls *tls; /* or NULL */
	Failure source_failure, sink_failure;
} Pair;

void pair_free(Pair *pair);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Pair, pair_free)

/* A server of one connection, which runs a script. */
typedef struct Raw {
	int listening, fd;
	PrUri *uri;
	void (*script)(int fd);
	GThread *thread;
} Raw;

void raw_free(Raw *raw);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Raw, raw_free)

guint failure_calls(Failure *failure);
/* Waits until on_failed is called. Returns FALSE after the time is up. */
gboolean failure_wait(Failure *failure, gint64 ms);
void start(PrControl *control, Failure *failure);
void on_hello(PrControl *control, const PrHello *hello, PrListener *listener, void *opaque);
Destination *destination_new(const char *text);
Destination *destination_new_tls(const char *text, const PrTls *tls);
/* The same with STALL_MS as handshake timeout. */
Destination *destination_new_hasty(const char *text, const PrTls *tls);
void destination_block_hello(Destination *destination, gboolean hold);
PrControl *destination_control(Destination *destination);
void destination_wait_hellos(Destination *destination, guint n);
uint16_t destination_port(Destination *destination);
PrHello hello_of(uint16_t version);
PrControl *connect_to(const PrUri *uri, guint handshake_ms, PrHelloAck *ack, GError **error);
PrControl *connect_destination(Destination *destination);
/* With TLS where the environment has CONTROL_RIG_TLS. */
Pair *pair_new(void);
int raw_connect(uint16_t port);
int raw_listen(PrUri **ret_uri);
void raw_write(int fd, const void *data, gsize length);
void raw_send(int fd, uint16_t type, const void *body, uint32_t length);
/* Reads exactly so many bytes, also if the process is stopped in between. */
void raw_read(int fd, void *data, gsize length);
/*
 * Reads and drops everything up to the end of the stream or a reset. Returns FALSE if neither
 * comes.
 */
gboolean raw_reaches_end(int fd);
void raw_read_hello(int fd);
Raw *raw_new(void (*script)(int fd));
/* Waits until the script is done; the connection stays open. */
int raw_join(Raw *raw);
void script_answer(int fd);
/* A started channel to a raw peer that has answered HELLO properly. */
PrControl *connect_raw(Raw *raw, Failure *failure);
/* The same with SILENCE_MS as heartbeat timeout. */
PrControl *connect_raw_hasty(Raw *raw, Failure *failure);
/*
 * Gives a channel that is not started a connection whose other end the test has, so the test can
 * make its writes fail. Returns the other end.
 */
int put_socket_pair(PrControl *control);
/*
 * Asserts that the channel has failed with this code and text, and that on_failed was called once,
 * earlier.
 */
void assert_fails(PrControl *control, Failure *failure, int code, const char *text);
void assert_receives(PrControl *control, uint16_t type, const void *body, gsize length);
void on_failed(const GError *reason, void *opaque);
