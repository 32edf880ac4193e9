/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/qemu-rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <glib/gstdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

Qemu *qemu_new(void)
{
	Qemu *qemu = g_new0(Qemu, 1);
	PrAgentRegion region = {.size = RAM};

	qemu->fake = fake_qmp_new(NULL);
	fake_qmp_set_healthy(qemu->fake);
	qemu->dir = g_dir_make_tmp("test-checks-XXXXXX", NULL);
	qemu->socket = g_build_filename(qemu->dir, "agent", NULL);
	qemu->memfd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
	assert_int_equal(ftruncate(qemu->memfd, RAM), 0);
	qemu->map = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, qemu->memfd, 0);
	assert_ptr_not_equal(qemu->map, MAP_FAILED);
	region.base = qemu->map;
	region.memfd = qemu->memfd;
	qemu->agent = pr_agent_new(NULL, NULL);
	assert_int_equal(pr_agent_add_region(qemu->agent, &region), 0);
	assert_int_equal(pr_agent_serve(qemu->agent, qemu->socket), 0);
	return qemu;
}

void qemu_attach(Qemu *qemu)
{
	g_autofree char *spec =
		g_strdup_printf("qemu:qmp=%s,agent=%s", fake_qmp_path(qemu->fake), qemu->socket);
	g_autoptr(GError) error = NULL;

	qemu->guest = pr_guest_open(spec, NULL, QEMU_RIG_TIMEOUT, &error);
	assert_null(error);
	assert_non_null(qemu->guest);
}

void qemu_free(Qemu *qemu)
{
	pr_guest_close(qemu->guest);
	pr_agent_free(qemu->agent);
	fake_qmp_free(qemu->fake);
	munmap(qemu->map, RAM);
	close(qemu->memfd);
	g_rmdir(qemu->dir);
	g_free(qemu->socket);
	g_free(qemu->dir);
	g_free(qemu);
}

void assert_arguments(Qemu *qemu, const char *key, const char *words)
{
	g_autofree char *arguments = fake_qmp_arguments(qemu->fake, key);

	assert_non_null(arguments);
	if (!strstr(arguments, words))
		print_error("expected '%s' in: %s\n", words, arguments);
	assert_non_null(strstr(arguments, words));
}

void assert_says(const GError *error, const char *words)
{
	assert_non_null(error);
	if (!strstr(error->message, words))
		print_error("expected '%s' in: %s\n", words, error->message);
	assert_non_null(strstr(error->message, words));
}
