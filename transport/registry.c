/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/registry.h"

#include <string.h>

#include "transport/backends.h"

#define N_BACKENDS 3

/* In the order in which an error lists them. NULL: this build does not have it. */
static const PrTransportOps *backend(gsize i)
{
	const PrTransportOps *const backends[N_BACKENDS] = {
		pr_transport_rdma,
		&pr_transport_ofi,
		&pr_transport_tcp,
	};

	return backends[i];
}

static const PrTransportOps *find_backend(const char *scheme)
{
	for (gsize i = 0; i < N_BACKENDS; i++)
		if (backend(i) && !strcmp(backend(i)->scheme, scheme))
			return backend(i);
	return NULL;
}

static char *list_schemes(void)
{
	GString *list = g_string_new(NULL);

	for (gsize i = 0; i < N_BACKENDS; i++)
		if (backend(i))
			g_string_append_printf(list, "%s, ", backend(i)->scheme);
	g_string_append(list, PR_FAULTY_PREFIX "SCHEME");
	return g_string_free(list, FALSE);
}

const PrTransportOps *pr_transport_find(const char *scheme, GError **error)
{
	g_autofree char *schemes = NULL;
	const PrTransportOps *ops;

	if (g_str_has_prefix(scheme, PR_FAULTY_PREFIX) &&
	    find_backend(scheme + strlen(PR_FAULTY_PREFIX)))
		return &pr_transport_faulty;
	ops = find_backend(scheme);
	if (ops)
		return ops;
	schemes = list_schemes();
	g_set_error(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED,
		    "scheme \"%s\" is not known here; use one of %s%s", scheme, schemes,
		    pr_transport_rdma ? "" : " (this build has no rdma: libibverbs was missing)");
	return NULL;
}

void pr_transport_warm_up(void)
{
	for (gsize i = 0; i < N_BACKENDS; i++)
		if (backend(i) && backend(i)->warm_up)
			backend(i)->warm_up();
}

void pr_transport_describe(GString *out)
{
	for (gsize i = 0; i < N_BACKENDS; i++)
		if (backend(i))
			backend(i)->describe(out);
	pr_transport_faulty.describe(out);
}
