/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The checks of the `qemu:` kind and its names of RAM, against a scripted QMP server and a real
 * agent. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>
#include <sys/mman.h>

#include "guest/agent-client.h"
#include "guest/qemu-ram.h"
#include "tests/rigs/qemu-rig.h"

#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */

/* prepare() */

static void a_healthy_qemu_is_accepted(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	const PrGuestBlock *blocks;
	guint n;

	qemu_attach(qemu);
	blocks = qemu->guest->ops->prepare(qemu->guest, PR_GUEST_SOURCE, &n, &error);
	assert_null(error);
	assert_int_equal(n, 1);
	assert_string_equal(blocks[0].idstr, "mem");
	assert_ptr_equal((void *)(gsize)blocks[0].base, qemu->map);
}

static void the_threads_of_vcpus_are_queried(void **state)
{
	static const struct {
		const char *answer, *words; /* words: NULL: there are two, 4711 and 4712 */
	} cases[] = {
		{"[{\"cpu-index\": 0, \"thread-id\": 4711}, "
		 "{\"cpu-index\": 1, \"thread-id\": 4712}]",
		 NULL},
		{"[{\"cpu-index\": 0, \"thread-id\": 4711}, {\"cpu-index\": 1}]", "for CPU 1"},
		{"[{\"thread-id\": -1}]", "for CPU 0"},
		{"[{\"thread-id\": 1e300}]", "for CPU 0"},
		{"[7]", "for CPU 0"},
		{"{}", "not a list"},
		{FAKE_ERROR "not now", "not now"},
	};

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autoptr(Qemu) qemu = qemu_new();
		g_autoptr(GError) error = NULL;
		g_autoptr(GArray) threads = NULL;

		qemu_attach(qemu);
		fake_qmp_set(qemu->fake, "query-cpus-fast", cases[i].answer);
		threads = qemu->guest->ops->vcpu_threads(qemu->guest, &error);
		if (cases[i].words) {
			assert_null(threads);
			assert_non_null(error);
			assert_non_null(strstr(error->message, cases[i].words));
			continue;
		}
		assert_null(error);
		assert_int_equal(threads->len, 2);
		assert_int_equal(g_array_index(threads, uint32_t, 0), 4711);
		assert_int_equal(g_array_index(threads, uint32_t, 1), 4712);
	}
}

/* One answer differs from that of a healthy QEMU. The error names the cause. */
static void each_flaw_is_refused_by_name(void **state)
{
	static const struct {
		PrGuestRole role;
		const char *key, *answer, *words;
		PrGuestError code;
	} cases[] = {
		{PR_GUEST_SOURCE, "query-version", "{\"qemu\": {\"major\": 7, \"minor\": 1}}",
		 "this is QEMU 7.1", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-version", "7", "not an object", PR_GUEST_ERROR_PROTOCOL},
		{PR_GUEST_DESTINATION, "query-migrate-capabilities",
		 "[7, {\"capability\": \"multifd\", \"state\": true}]", "'multifd' on",
		 PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_DESTINATION, "query-migrate-parameters", "{\"tls-creds\": \"tls0\"}",
		 "'tls-creds' set", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_DESTINATION, "query-migrate", "{\"status\": \"failed\"}",
		 "has failed to load a guest", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_DESTINATION, "query-migrate-capabilities", "{}", "not a list",
		 PR_GUEST_ERROR_PROTOCOL},
		{PR_GUEST_SOURCE, "query-migrate",
		 "{\"blocked-reasons\": [\"State blocked by non-migratable device 'nvme'\"]}",
		 "non-migratable device 'nvme'", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-named-block-nodes",
		 "[7, {\"node-name\": \"disk0\", \"dirty-bitmaps\": [{\"name\": \"backup\"}]}]",
		 "node 'disk0' has the dirty bitmap 'backup'", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "qom-list /machine/peripheral",
		 "[{\"name\": \"shm\", \"type\": \"child<ivshmem-plain>\"}]",
		 "shm is a ivshmem-plain", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-migrate", "{\"status\": \"active\"}",
		 "query-migrate says 'active'", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-status", "{\"status\": \"inmigrate\"}",
		 "only be a destination", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-status", "{\"status\": \"suspended\"}",
		 "run state 'suspended'", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_DESTINATION, "query-status", "{\"status\": \"running\"}",
		 "-incoming defer", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "qom-list /machine/peripheral",
		 "[{\"name\": \"gpu\", \"type\": \"child<vfio-pci>\"}]",
		 "device /machine/peripheral/gpu is a vfio-pci", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "qom-list /machine/peripheral-anon",
		 "[{\"name\": \"device[0]\", \"type\": \"child<vhost-user-fs-pci>\"}]",
		 "device[0] is a vhost-user-fs-pci", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "human-monitor-command info network",
		 "\"nic0: index=0,type=nic\\r\\n \\\\ n7: index=0,type=vhost-user,x\\r\\n\"", "n7",
		 PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "qom-get /objects/mem share", "false", "share=on",
		 PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "qom-list /objects",
		 "[{\"name\": \"mem\", \"type\": \"child<memory-backend-file>\"}]",
		 "shared memory of a memory-backend-file", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "qom-list /objects",
		 "[{\"name\": \"mem\", \"type\": \"child<memory-backend-ram>\"}]",
		 "memory-backend-ram", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "qom-list /objects", "[]", "RAM block 'mem' (64 MiB) is private",
		 PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "human-monitor-command info ramblock", "\"\"",
		 "names no RAM block", PR_GUEST_ERROR_PROTOCOL},
		{PR_GUEST_SOURCE, "human-monitor-command info ramblock",
		 "\" pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 "
		 "0x0000000000040000\"",
		 "no shared RAM", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "human-monitor-command info ramblock",
		 "\" mem    4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000\"",
		 "RAM block 'mem' (32 MiB): the agent has no mapping", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "human-monitor-command info ramblock",
		 "\" mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 "
		 "0x00000000deadb000\"",
		 "the agent has no mapping", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-status", FAKE_ERROR "on fire", "on fire",
		 PR_GUEST_ERROR_REFUSED},
		{PR_GUEST_SOURCE, "query-status", FAKE_CLOSE, "QEMU is gone", PR_GUEST_ERROR_DIED},
	};

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autoptr(Qemu) qemu = qemu_new();
		g_autoptr(GError) error = NULL;
		guint n;

		if (cases[i].role == PR_GUEST_DESTINATION)
			fake_qmp_set(qemu->fake, "query-status", "{\"status\": \"inmigrate\"}");
		fake_qmp_set(qemu->fake, cases[i].key, cases[i].answer);
		qemu_attach(qemu);
		assert_null(qemu->guest->ops->prepare(qemu->guest, cases[i].role, &n, &error));
		assert_non_null(error);
		if (!strstr(error->message, cases[i].words) ||
		    !g_error_matches(error, PR_GUEST_ERROR, cases[i].code))
			print_error("case %u: %s\n", i, error->message);
		assert_non_null(strstr(error->message, cases[i].words));
		assert_true(g_error_matches(error, PR_GUEST_ERROR, cases[i].code));
		/* Nothing was changed. */
		assert_int_equal(fake_qmp_count(qemu->fake, "stop"), 0);
		assert_int_equal(fake_qmp_count(qemu->fake, "migrate-set-capabilities"), 0);
	}
}

static void the_spec_is_checked(void **state)
{
	static const struct {
		const char *spec, *words;
	} cases[] = {
		{"qemu:", "qmp= is missing"},
		{"qemu:qmp=/a,agent=", "agent= names no socket"},
		{"qemu:qmp=/a,pid=0", "pid= is not a process id"},
		{"qemu:qmp=/a,pid=x", "pid= is not a process id"},
		{"qemu:qmp=/a,pid=7,agent=/b", "exclude each other"},
		{"qemu:agent=/a", "qmp= is missing"},
		{"qemu:qmp=,agent=/a", "qmp= is missing"},
		{"qemu:qmp=/a,agent=/b,qmp=/c", "a second 'qmp=/c'"},
		{"qemu:qmp=/a,agent=/b,tea=1", "unknown 'tea=1'"},
		{"qemu", "unknown kind"},
		{"", "unknown kind"},
	};

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autoptr(GError) error = NULL;

		assert_null(pr_guest_open(cases[i].spec, NULL, TIMEOUT, &error));
		assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_SPEC));
		if (!strstr(error->message, cases[i].words))
			print_error("case %u: %s\n", i, error->message);
		assert_non_null(strstr(error->message, cases[i].words));
	}
}

/* RAM blocks */

static void ramblocks_of_old_and_new_monitors_are_read(void **state)
{
	static const char text[] =
		"              Block Name    PSize              Offset               Used         "
		"     Total                HVA  RO\r\n"
		"            /objects/m1    2 MiB  0x0000000002000000 0x0000000002000000 "
		"0x0000000002000000 0x00007f0000000000  rw\r\n"
		"                            4 KiB  0x0000000010000000 0x0000000002000000 "
		"0x0000000002000000\r\n"
		"       /rom@etc/acpi/tables    4 KiB  0x0000000000000000 0x0000000000020000 "
		"0x0000000000200000\r\n";
	g_autoptr(GError) error = NULL;
	g_autoptr(GArray) blocks = pr_qemu_ramblocks_parse(text, &error);
	const PrQemuRamBlock *block;

	assert_null(error);
	assert_int_equal(blocks->len, 3);
	block = &g_array_index(blocks, PrQemuRamBlock, 0);
	assert_string_equal(block[0].name, "/rom@etc/acpi/tables");
	assert_int_equal(block[0].size, 0x200000);
	assert_int_equal(block[0].hva, 0);
	assert_string_equal(block[1].name, "/objects/m1");
	assert_int_equal(block[1].hva, 0x7f0000000000);
	assert_string_equal(block[2].name, "");
	assert_int_equal(block[2].offset, 0x10000000);
}

static void host_addresses_are_found_through_the_guests(void **state)
{
	static const char mtree[] =
		"FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n"
		"  0000000000000000-000000000009ffff (prio 0, ram): m10 KVM\n"
		"  00000000000a0000-00000000000bffff (prio 1, i/o): m1\n"
		"  00000000000c0000-000000000fffffff (prio 0, ram): m1 @00000000000c0000 KVM\n"
		"  0000000010000000-000000001fffffff (prio 0, ram): m2\n";
	uint64_t gpa = 0, offset = 0, hva = 0;

	assert_true(pr_qemu_find_gpa(mtree, "/objects/m1", &gpa, &offset));
	assert_int_equal(gpa, 0xc0000);
	assert_int_equal(offset, 0xc0000);
	assert_true(pr_qemu_find_gpa(mtree, "m2", &gpa, &offset));
	assert_int_equal(gpa, 0x10000000);
	assert_int_equal(offset, 0);
	assert_false(pr_qemu_find_gpa(mtree, "m.", &gpa, &offset));
	assert_false(pr_qemu_find_gpa(mtree, "m3", &gpa, &offset));
	assert_true(pr_qemu_parse_hva("Host virtual address for 0x0 (mem) is 0x7f764bfff000\r\n",
				      &hva));
	assert_int_equal(hva, 0x7f764bfff000);
	assert_false(pr_qemu_parse_hva("No memory is mapped at address 0x0\r\n", &hva));
}

static void add_ramblock(GArray *array, const char *name, uint64_t offset, uint64_t hva)
{
	PrQemuRamBlock block = {.name = (char *)name, .offset = offset, .size = RAM, .hva = hva};

	g_array_append_val(array, block);
}

static void add_backend(GArray *array, const char *id)
{
	PrQemuBackend backend = {.id = g_strdup(id),
				 .type = g_strdup("memory-backend-memfd"),
				 .size = RAM,
				 .share = TRUE};

	g_array_append_val(array, backend);
}

static void add_region(GArray *array, uint64_t base)
{
	PrGuestBlock region = {.size = RAM,
			       .page_size = 4096,
			       .memfd = memfd_create("test", MFD_CLOEXEC),
			       .base = base};

	g_array_append_val(array, region);
}

typedef struct Match {
	GArray *ramblocks, *backends, *regions;
} Match;

/* Backends a, b and c; the machine uses a and c. */
static void match_init(Match *match, uint64_t hva_a, uint64_t hva_c)
{
	match->ramblocks = g_array_new(FALSE, TRUE, sizeof(PrQemuRamBlock));
	match->backends = pr_qemu_backends_new();
	match->regions = pr_guest_blocks_new();
	add_ramblock(match->ramblocks, "/objects/a", 0, hva_a);
	add_ramblock(match->ramblocks, "", RAM, 0);
	add_ramblock(match->ramblocks, "c", 2ull * RAM, hva_c);
	add_backend(match->backends, "a");
	add_backend(match->backends, "b");
	add_backend(match->backends, "c");
	add_region(match->regions, 0x10000000);
	add_region(match->regions, 0x20000000);
	add_region(match->regions, 0x30000000);
}

static void match_clear(Match *match)
{
	g_array_unref(match->ramblocks);
	g_array_unref(match->backends);
	g_array_unref(match->regions);
}

static void assert_match(uint64_t hva_a, uint64_t hva_c, uint64_t base_a, uint64_t base_c)
{
	g_autoptr(GArray) blocks = NULL;
	g_autoptr(GError) error = NULL;
	const PrGuestBlock *block;
	Match match;

	match_init(&match, hva_a, hva_c);
	blocks = pr_qemu_match(match.ramblocks, match.backends, match.regions, &error);
	assert_null(error);
	assert_int_equal(blocks->len, 2);
	block = &g_array_index(blocks, PrGuestBlock, 0);
	assert_string_equal(block[0].idstr, "/objects/a");
	assert_int_equal(block[0].base, base_a);
	assert_string_equal(block[1].idstr, "c");
	assert_int_equal(block[1].base, base_c);
	match_clear(&match);
}

static void assert_no_match(uint64_t hva_a, uint64_t hva_c, guint n_regions)
{
	g_autoptr(GArray) blocks = NULL;
	g_autoptr(GError) error = NULL;
	Match match;

	match_init(&match, hva_a, hva_c);
	if (n_regions < 3)
		g_array_set_size(match.regions, n_regions);
	for (guint i = 3; i < n_regions; i++)
		add_region(match.regions, (i + 1) * 0x10000000ull);
	blocks = pr_qemu_match(match.ramblocks, match.backends, match.regions, &error);
	assert_null(blocks);
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED));
	match_clear(&match);
}

static void mappings_find_their_blocks(void **state)
{
	/* by order */
	assert_match(0, 0, 0x10000000, 0x30000000);
	/* by address, even when it contradicts the order */
	assert_match(0x30000000, 0x10000000, 0x30000000, 0x10000000);
	assert_match(0x10000000, 0x20000000, 0x10000000, 0x20000000);
	/* an address of no mapping, one mapping for two blocks, a mapping too few, one too many */
	assert_no_match(0x50000000, 0, 3);
	assert_no_match(0x10000000, 0x10000000, 3);
	assert_no_match(0x30000000, 0, 3);
	assert_no_match(0, 0, 2);
	assert_no_match(0, 0, 4);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_healthy_qemu_is_accepted),
		cmocka_unit_test(each_flaw_is_refused_by_name),
		cmocka_unit_test(the_threads_of_vcpus_are_queried),
		cmocka_unit_test(the_spec_is_checked),
		cmocka_unit_test(ramblocks_of_old_and_new_monitors_are_read),
		cmocka_unit_test(host_addresses_are_found_through_the_guests),
		cmocka_unit_test(mappings_find_their_blocks),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
