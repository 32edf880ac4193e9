/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What is wrong with a certificate, in words; and the names in it. */
#include <string.h>

#include "transport/net/tls-errors.h"

static char *date_text(GDateTime *date)
{
	return date ? g_date_time_format_iso8601(date) : g_strdup("an unknown date");
}

/* The names and addresses that a certificate is for, as "a, b"; "nothing". */
static char *names_text(GTlsCertificate *certificate)
{
	g_autoptr(GPtrArray) names = g_tls_certificate_get_dns_names(certificate);
	g_autoptr(GPtrArray) addresses = g_tls_certificate_get_ip_addresses(certificate);
	g_autoptr(GString) text = g_string_new(NULL);

	for (guint i = 0; names && i < names->len; i++) {
		gsize length;
		const char *name = g_bytes_get_data(names->pdata[i], &length);

		g_string_append_printf(text, "%s%.*s", text->len ? ", " : "", (int)length, name);
	}
	for (guint i = 0; addresses && i < addresses->len; i++) {
		g_autofree char *address = g_inet_address_to_string(addresses->pdata[i]);

		g_string_append_printf(text, "%s%s", text->len ? ", " : "", address);
	}
	if (!text->len)
		g_string_append(text, "nothing: it has no subject alternative name");
	return g_string_free(g_steal_pointer(&text), FALSE);
}

char *pr_tls_subject(GTlsCertificate *certificate)
{
	char *subject = g_tls_certificate_get_subject_name(certificate);

	return subject ? subject : g_strdup("a certificate without a name");
}

static void add_wrong_names(GPtrArray *out, GTlsCertificate *certificate, const char *host)
{
	g_autofree char *names = names_text(certificate);

	g_ptr_array_add(out, g_strdup_printf("it is not for %s but for %s",
					     host ? host : "this peer", names));
}

static void add_wrong_time(GPtrArray *out, GTlsCertificate *certificate, gboolean expired)
{
	g_autoptr(GDateTime) date = expired ? g_tls_certificate_get_not_valid_after(certificate)
					    : g_tls_certificate_get_not_valid_before(certificate);
	g_autofree char *text = date_text(date);

	g_ptr_array_add(out,
			expired ? g_strdup_printf("it has expired at %s; renew it", text)
				: g_strdup_printf("it is valid only from %s; look at the clocks",
						  text));
}

char *pr_tls_complaint(GTlsCertificate *certificate, GTlsCertificateFlags flags, const char *host)
{
	g_autoptr(GPtrArray) out = g_ptr_array_new_with_free_func(g_free);

	if (flags & G_TLS_CERTIFICATE_UNKNOWN_CA)
		g_ptr_array_add(out, g_strdup("it is not signed by the CA that it is checked "
					      "against"));
	if (flags & G_TLS_CERTIFICATE_BAD_IDENTITY)
		add_wrong_names(out, certificate, host);
	if (flags & G_TLS_CERTIFICATE_NOT_ACTIVATED)
		add_wrong_time(out, certificate, FALSE);
	if (flags & G_TLS_CERTIFICATE_EXPIRED)
		add_wrong_time(out, certificate, TRUE);
	if (flags & G_TLS_CERTIFICATE_REVOKED)
		g_ptr_array_add(out, g_strdup("it was revoked"));
	if (flags & G_TLS_CERTIFICATE_INSECURE)
		g_ptr_array_add(out, g_strdup("its algorithms are too weak"));
	if (!out->len)
		g_ptr_array_add(out, g_strdup("it is not sound"));
	g_ptr_array_add(out, NULL);
	return g_strjoinv("; ", (char **)out->pdata);
}

/* The next attribute of a distinguished name (RFC 4514), "CN=host", without the escapes'
 * backslashes. Moves *at behind it. An escaped comma ends nothing: no name can pretend to be
 * two. */
static char *next_attribute(const char **at)
{
	GString *text = g_string_new(NULL);
	const char *c = *at;

	for (; *c && *c != ',' && *c != '+'; c++) {
		if (*c == '\\' && c[1])
			c++;
		g_string_append_c(text, *c);
	}
	*at = *c ? c + 1 : c;
	return g_string_free(text, FALSE);
}

gboolean pr_tls_is_named(const char *subject, char **names)
{
	const char *at = subject;

	if (g_strv_contains((const char *const *)names, subject))
		return TRUE;
	while (*at) {
		g_autofree char *attribute = next_attribute(&at);

		/* What has another '=' in the list is a whole name. */
		if (g_str_has_prefix(attribute, "CN=") && !strchr(attribute + strlen("CN="), '=') &&
		    g_strv_contains((const char *const *)names, attribute + strlen("CN=")))
			return TRUE;
	}
	return FALSE;
}
