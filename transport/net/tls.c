/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The handshakes. A client checks the server's certificate in the handshake, and ends it with an
 * alert. A server completes every handshake, and checks the client's certificate afterwards. With
 * TLS 1.3 the client would get an alert only later, and without a reason. So the answer to its
 * HELLO has the reason.
 */
#include "transport/net/tls.h"

#include <string.h>

#include "transport/net/dial.h"
#include "transport/net/tls-errors.h"
#include "transport/net/tls-proxy.h"
#include "transport/path-error.h"
#include "util/try-alloc.h"

struct PrTls {
	char *dir;
	char **allow; /* NULL: all clients */
};

#define CA_FILE	    "ca-cert.pem"
#define CRL_FILE    "ca-crl.pem"
#define SERVER_NAME "server"
#define CLIENT_NAME "client"

/* Files */

static char *file_of(const PrTls *tls, const char *name)
{
	return g_build_filename(tls->dir, name, NULL);
}

static gboolean has_file(const PrTls *tls, const char *name)
{
	g_autofree char *path = file_of(tls, name);

	return g_file_test(path, G_FILE_TEST_EXISTS);
}

static GTlsDatabase *load_ca(const PrTls *tls, GError **error)
{
	g_autofree char *path = file_of(tls, CA_FILE);
	g_autofree char *absolute = g_canonicalize_filename(path, NULL);
	GTlsDatabase *ca = g_tls_file_database_new(absolute, error);

	if (!ca)
		g_prefix_error(error, "%s: ", path);
	return ca;
}

/* "server" or "client". */
static GTlsCertificate *load_pair(const PrTls *tls, const char *name, GError **error)
{
	g_autofree char *cert_name = g_strdup_printf("%s-cert.pem", name);
	g_autofree char *key_name = g_strdup_printf("%s-key.pem", name);
	g_autofree char *cert = file_of(tls, cert_name);
	g_autofree char *key = file_of(tls, key_name);
	GTlsCertificate *pair = g_tls_certificate_new_from_files(cert, key, error);

	if (!pair)
		g_prefix_error(error, "%s with %s: ", cert, key);
	return pair;
}

static gboolean check_pair(const PrTls *tls, const char *name, GError **error)
{
	g_autofree char *cert_name = g_strdup_printf("%s-cert.pem", name);
	g_autoptr(GTlsCertificate) pair = NULL;

	if (!has_file(tls, cert_name))
		return TRUE;
	pair = load_pair(tls, name, error);
	return pair != NULL;
}

static gboolean check_files(const PrTls *tls, GError **error)
{
	g_autoptr(GTlsDatabase) ca = load_ca(tls, error);

	if (!ca || !check_pair(tls, SERVER_NAME, error) || !check_pair(tls, CLIENT_NAME, error))
		return FALSE;
	if (has_file(tls, CRL_FILE)) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "%s/" CRL_FILE
			    ": certificate revocation lists are not supported; remove it, and "
			    "name the clients that may come with --tls-allow",
			    tls->dir);
		return FALSE;
	}
	if (has_file(tls, "server-cert.pem") || has_file(tls, "client-cert.pem"))
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "%s has neither client-cert.pem (a source needs it) nor server-cert.pem (a "
		    "destination does)",
		    tls->dir);
	return FALSE;
}

PrTls *pr_tls_new(const char *dir, const char *const *allow, GError **error)
{
	g_autoptr(PrTls) tls = g_new0(PrTls, 1);

	tls->dir = g_strdup(dir);
	tls->allow = allow && *allow ? g_strdupv((char **)allow) : NULL;
	if (!g_tls_backend_supports_tls(g_tls_backend_get_default())) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "GIO has no TLS here; install glib-networking");
		return NULL;
	}
	return check_files(tls, error) ? g_steal_pointer(&tls) : NULL;
}

void pr_tls_free(PrTls *tls)
{
	if (!tls)
		return;
	g_free(tls->dir);
	g_strfreev(tls->allow);
	g_free(tls);
}

gboolean pr_tls_check_server(const PrTls *tls, GError **error)
{
	g_autoptr(GTlsCertificate) pair = load_pair(tls, SERVER_NAME, error);

	return pair != NULL;
}

/* A handshake, in a main context of its own, because GIO's blocking one has no time limit. */
typedef struct Handshake {
	GTlsConnection *tls;
	const char *host;      /* of the server; NULL: the peer is a client */
	char *peer;	       /* its address */
	GCancellable *give_up; /* cancelled by the time limit and by the caller's cancellable */
	GTlsCertificateFlags flaws;
	GTlsCertificate *shown; /* the peer's certificate, if it has flaws */
	GError *error;
	gboolean done, timed_out;
} Handshake;

static void handshake_clear(Handshake *handshake)
{
	g_clear_object(&handshake->tls);
	g_clear_object(&handshake->give_up);
	g_clear_object(&handshake->shown);
	g_clear_error(&handshake->error);
	g_free(handshake->peer);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Handshake, handshake_clear)

static void handshake_done(GObject *tls, GAsyncResult *result, gpointer opaque)
{
	Handshake *handshake = opaque;

	g_tls_connection_handshake_finish(G_TLS_CONNECTION(tls), result, &handshake->error);
	handshake->done = TRUE;
}

static gboolean handshake_too_long(gpointer opaque)
{
	Handshake *handshake = opaque;

	handshake->timed_out = TRUE;
	g_cancellable_cancel(handshake->give_up);
	return G_SOURCE_REMOVE;
}

static void handshake_cancelled(GCancellable *cancel, gpointer give_up)
{
	g_cancellable_cancel(give_up);
}

/* The peer's certificate has flaws. */
static gboolean on_flaws(GTlsConnection *tls, GTlsCertificate *certificate,
			 GTlsCertificateFlags flaws, gpointer opaque)
{
	Handshake *handshake = opaque;

	handshake->flaws = flaws;
	g_set_object(&handshake->shown, certificate);
	return handshake->host == NULL; /* a client's is checked later */
}

static void run_handshake(Handshake *handshake, gint64 deadline, GCancellable *cancel)
{
	gint64 left = MAX(deadline - g_get_monotonic_time(), 0);
	g_autoptr(GMainContext) context = g_main_context_new();
	g_autoptr(GSource) timer = g_timeout_source_new(MIN((left + 999) / 1000, G_MAXUINT));
	gulong chained = 0;

	g_main_context_push_thread_default(context);
	g_source_set_callback(timer, handshake_too_long, handshake, NULL);
	g_source_attach(timer, context);
	if (cancel)
		chained = g_cancellable_connect(cancel, G_CALLBACK(handshake_cancelled),
						g_object_ref(handshake->give_up), g_object_unref);
	g_tls_connection_handshake_async(handshake->tls, G_PRIORITY_DEFAULT, handshake->give_up,
					 handshake_done, handshake);
	while (!handshake->done)
		g_main_context_iteration(context, TRUE);
	g_cancellable_disconnect(cancel, chained);
	g_source_destroy(timer);
	g_main_context_pop_thread_default(context);
}

static void set_handshake_error(const Handshake *handshake, const PrTls *tls, GError **error)
{
	if (handshake->shown && handshake->host) {
		g_autofree char *subject = pr_tls_subject(handshake->shown);
		g_autofree char *complaint =
			pr_tls_complaint(handshake->shown, handshake->flaws, handshake->host);

		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "the destination's certificate (%s) is not accepted: %s (" CA_FILE
			    " is that of %s)",
			    subject, complaint, tls->dir);
	} else if (handshake->host) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "the TLS handshake with %s failed: %s; was the destination started "
			    "with --tls-dir, too?",
			    handshake->peer, handshake->error->message);
	} else {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "the TLS handshake with %s failed: %s; does the source trust the CA of "
			    "%s/server-cert.pem, and is that for the address that was called?",
			    handshake->peer, handshake->error->message, tls->dir);
	}
}

/* GnuTLS does not accept older versions either as GIO sets it up, but the administrator can
 * change that. */
static gboolean check_version(const Handshake *handshake, GError **error)
{
	GTlsProtocolVersion version = g_tls_connection_get_protocol_version(handshake->tls);

	if (version == G_TLS_PROTOCOL_VERSION_TLS_1_3 || version == G_TLS_PROTOCOL_VERSION_TLS_1_2)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "%s speaks a version of TLS below 1.2", handshake->peer);
	return FALSE;
}

static void log_success(const Handshake *handshake)
{
	g_autofree char *cipher = g_tls_connection_get_ciphersuite_name(handshake->tls);
	GTlsProtocolVersion version = g_tls_connection_get_protocol_version(handshake->tls);

	g_info("TLS 1.%d with %s (%s)", version == G_TLS_PROTOCOL_VERSION_TLS_1_3 ? 3 : 2,
	       handshake->peer, cipher ? cipher : "unknown cipher");
}

static gboolean do_handshake(Handshake *handshake, const PrTls *tls, gint64 deadline,
			     GCancellable *cancel, GError **error)
{
	if (!pr_check_fd_headroom(error))
		return FALSE;
	handshake->give_up = g_cancellable_new();
	g_tls_connection_set_require_close_notify(handshake->tls, FALSE);
	g_signal_connect(handshake->tls, "accept-certificate", G_CALLBACK(on_flaws), handshake);
	run_handshake(handshake, deadline, cancel);
	g_signal_handlers_disconnect_by_data(handshake->tls, handshake);
	if (!handshake->error)
		return check_version(handshake, error);
	if (g_cancellable_set_error_if_cancelled(cancel, error))
		return FALSE;
	if (handshake->timed_out)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "%s did not finish the TLS handshake in time", handshake->peer);
	else
		set_handshake_error(handshake, tls, error);
	return FALSE;
}

/* Source */

/* The name that the certificate has to be for: an address has no scope in it. */
static GSocketConnectable *identity_of(const char *host)
{
	g_autofree char *bare = g_strndup(host, strcspn(host, "%"));

	return g_network_address_new(bare, 0);
}

static GTlsConnection *new_client(const PrTls *tls, GSocketConnection *connection, const char *host,
				  GError **error)
{
	g_autoptr(GSocketConnectable) identity = identity_of(host);
	g_autoptr(GTlsDatabase) ca = load_ca(tls, error);
	g_autoptr(GTlsCertificate) own = NULL;
	GTlsConnection *client;

	if (!ca)
		return NULL;
	if (has_file(tls, "client-cert.pem")) {
		own = load_pair(tls, CLIENT_NAME, error);
		if (!own)
			return NULL;
	}
	/* Not g_tls_client_connection_new(): without a database it loads the system's CAs each
	 * time. */
	client = g_initable_new(
		g_tls_backend_get_client_connection_type(g_tls_backend_get_default()), NULL, error,
		"base-io-stream", connection, "server-identity", identity, "database", ca, NULL);
	if (!client)
		return NULL;
	if (own)
		g_tls_connection_set_certificate(client, own);
	return client;
}

static GError *as_path_error(GError *error)
{
	GError *own;

	if (error->domain == PR_PATH_ERROR)
		return error;
	own = g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "--tls-dir: %s", error->message);
	g_error_free(error);
	return own;
}

GSocketConnection *pr_tls_connect(const PrTls *tls, GSocketConnection *taken, const char *host,
				  gint64 deadline, GCancellable *cancel, GError **error)
{
	g_autoptr(GSocketConnection) connection = taken;
	g_auto(Handshake) handshake = {.host = host, .peer = pr_peer_text(connection)};
	GError *wrong = NULL;

	handshake.tls = new_client(tls, connection, host, &wrong);
	if (!handshake.tls) {
		g_propagate_error(error, as_path_error(wrong));
		return NULL;
	}
	if (!do_handshake(&handshake, tls, deadline, cancel, error))
		return NULL;
	log_success(&handshake);
	return pr_tls_proxy_new(connection, G_IO_STREAM(handshake.tls), handshake.peer, error);
}

/* Destination */

static GTlsConnection *new_server(const PrTls *tls, GSocketConnection *connection, GError **error)
{
	g_autoptr(GTlsDatabase) ca = load_ca(tls, error);
	g_autoptr(GTlsCertificate) own = ca ? load_pair(tls, SERVER_NAME, error) : NULL;
	GTlsConnection *server;

	if (!own)
		return NULL;
	server = g_initable_new(
		g_tls_backend_get_server_connection_type(g_tls_backend_get_default()), NULL, error,
		"base-io-stream", connection, "certificate", own, "database", ca, NULL);
	if (!server)
		return NULL;
	/* Not required: a client without one would be disconnected without a reason. */
	g_object_set(server, "authentication-mode", G_TLS_AUTHENTICATION_REQUESTED, NULL);
	return server;
}

/* Reading the certificates takes long. Only one thread does it at a time, so that in a flood the
 * handshakes that are cancelled meanwhile cost nothing. */
static gboolean begin_server(const PrTls *tls, GSocketConnection *connection, GCancellable *cancel,
			     GTlsConnection **ret, GError **error)
{
	static GMutex turn;
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&turn);

	if (g_cancellable_set_error_if_cancelled(cancel, error))
		return FALSE;
	*ret = new_server(tls, connection, error);
	return *ret != NULL;
}

/* Why this client is refused; NULL: it is not. */
static char *check_client(const Handshake *handshake, const PrTls *tls)
{
	GTlsCertificate *shown = g_tls_connection_get_peer_certificate(handshake->tls);
	GTlsCertificateFlags flaws = g_tls_connection_get_peer_certificate_errors(handshake->tls);
	g_autofree char *subject = shown ? pr_tls_subject(shown) : NULL;
	g_autofree char *complaint = NULL;

	if (!shown)
		return g_strdup("this destination wants a client certificate and was shown none: "
				"put client-cert.pem and client-key.pem into the source's "
				"--tls-dir");
	/* The flaws that were found in the handshake count, and those that the connection has
	 * now. */
	flaws |= handshake->flaws;
	if (flaws) {
		complaint = pr_tls_complaint(shown, flaws, NULL);
		return g_strdup_printf("the client certificate (%s) is not accepted: %s", subject,
				       complaint);
	}
	if (tls->allow && !pr_tls_is_named(subject, tls->allow))
		return g_strdup_printf("the client certificate (%s) is not one of those that "
				       "--tls-allow names",
				       subject);
	return NULL;
}

GSocketConnection *pr_tls_accept(const PrTls *tls, GSocketConnection *taken, gint64 deadline,
				 GCancellable *cancel, char **ret_refusal, GError **error)
{
	g_autoptr(GSocketConnection) connection = taken;
	g_auto(Handshake) handshake = {.peer = pr_peer_text(connection)};
	g_autofree char *refusal = NULL;
	GSocketConnection *proxy;
	GError *wrong = NULL;

	if (!begin_server(tls, connection, cancel, &handshake.tls, &wrong)) {
		if (g_error_matches(wrong, G_IO_ERROR, G_IO_ERROR_CANCELLED)) {
			g_propagate_error(error, wrong);
			return NULL;
		}
		g_propagate_error(error, as_path_error(wrong));
		return NULL;
	}
	if (!do_handshake(&handshake, tls, deadline, cancel, error))
		return NULL;
	log_success(&handshake);
	refusal = check_client(&handshake, tls);
	proxy = pr_tls_proxy_new(connection, G_IO_STREAM(handshake.tls), handshake.peer, error);
	if (proxy)
		*ret_refusal = g_steal_pointer(&refusal);
	return proxy;
}
