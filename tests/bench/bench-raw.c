/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * bench-raw [--quick] [ofi|tcp|memory]… prints the floors of raw.h as one JSON object; without
 * names, all floors.
 */
#include <gio/gio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/raw.h"

#define RATE_READ    (1024u * 1024)
#define RATE_WINDOW  16
#define OFI_PROVIDER "net"

static guint rate_bytes = 256u * 1024 * 1024, n_latency = 5000;
static const char *separator = "{";

static void print_rate(const char *name, double rate)
{
	printf("%s\n  \"%s\": {\"bytes_per_s\": %.0f}", separator, name, rate);
	separator = ",";
}

static void print_latency(const char *name, const RawLatency *latency)
{
	printf("%s\n  \"%s\": {\"n\": %u, \"mean_us\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f}",
	       separator, name, latency->n, latency->mean_us, latency->p50_us, latency->p99_us);
	separator = ",";
}

static gboolean bench_ofi(GError **error)
{
	RawLatency sleeping, spinning;
	double rate;

	if (!raw_ofi_rate(OFI_PROVIDER, rate_bytes, RATE_READ, RATE_WINDOW, &rate, error) ||
	    !raw_ofi_latency(OFI_PROVIDER, n_latency, RAW_SLEEP, &sleeping, error) ||
	    !raw_ofi_latency(OFI_PROVIDER, n_latency, RAW_SPIN, &spinning, error))
		return FALSE;
	print_rate("ofi_read", rate);
	print_latency("ofi_read_4k_sleeping", &sleeping);
	print_latency("ofi_read_4k_spinning", &spinning);
	return TRUE;
}

static gboolean bench_tcp(GError **error)
{
	RawLatency latency;
	double rate;

	if (!raw_tcp_rate(rate_bytes, RATE_READ, RATE_WINDOW, &rate, error) ||
	    !raw_tcp_latency(n_latency, &latency, error))
		return FALSE;
	print_rate("tcp_read", rate);
	print_latency("tcp_read_4k", &latency);
	return TRUE;
}

static gboolean bench_memory(GError **error)
{
	RawLatency sleeping, spinning;
	double rate;

	if (!raw_memcpy(rate_bytes, RATE_READ, &rate, error) ||
	    !raw_minor_fault(n_latency, RAW_SLEEP, &sleeping, error) ||
	    !raw_minor_fault(n_latency, RAW_SPIN, &spinning, error))
		return FALSE;
	print_rate("memcpy_to_memfd", rate);
	print_latency("minor_fault_sleeping", &sleeping);
	print_latency("minor_fault_spinning", &spinning);
	return TRUE;
}

static const struct {
	const char *name;
	gboolean (*run)(GError **error);
} benches[] = {{"memory", bench_memory}, {"tcp", bench_tcp}, {"ofi", bench_ofi}};

int main(int argc, char **argv)
{
	if (argc > 1 && strcmp(argv[1], "--quick") == 0) {
		rate_bytes /= 8;
		n_latency /= 10;
		argc--;
		argv++;
	}
	for (guint i = 0; i < G_N_ELEMENTS(benches); i++) {
		g_autoptr(GError) error = NULL;

		if (argc > 1 && !g_strv_contains((const char *const *)argv + 1, benches[i].name))
			continue;
		if (!benches[i].run(&error)) {
			fprintf(stderr, "bench-raw: %s: %s\n", benches[i].name, error->message);
			return EXIT_FAILURE;
		}
	}
	printf("%s\n}\n", *separator == '{' ? "{" : "");
	return EXIT_SUCCESS;
}
