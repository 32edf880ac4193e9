/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the `qemu:` kind refuses, how it names RAM, and how it saves and loads, against a scripted QMP
 * server and a real agent.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <glib/gstdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/agent-client.h"
#include "guest/guest.h"
#include "guest/qemu-ram.h"
#include "postroad/agent.h"
#include "tests/unit/fake-qmp.h"

#define RAM	      (64u << 20)
#define TIMEOUT	      5000 /* ms */
#define SHORT_TIMEOUT 200  /* ms; for what never comes */
#define COMPLETED     "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n"
#define FAILED	      "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"failed\"}}\n"
#define CANCELLED     "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"cancelled\"}}\n"

#define STOPPED	      "{\"event\": \"STOP\"}\n"
#define RESUMED	      "{\"event\": \"RESUME\"}\n"

/* A QEMU in pieces: the monitor is fake, the agent is real. */
typedef struct Qemu {
	FakeQmp *fake;
	PrAgent *agent;
	char *dir;
	char *socket;
	void *map;
	int memfd;
	PrGuest *guest;
} Qemu;

static Qemu *qemu_new(void)
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

static void qemu_attach(Qemu *qemu, guint timeout_ms)
{
	g_autofree char *spec =
		g_strdup_printf("qemu:qmp=%s,agent=%s", fake_qmp_path(qemu->fake), qemu->socket);
	g_autoptr(GError) error = NULL;

	qemu->guest = pr_guest_open(spec, NULL, timeout_ms, &error);
	assert_null(error);
	assert_non_null(qemu->guest);
}

static void qemu_free(Qemu *qemu)
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
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Qemu, qemu_free)

/* prepare() */

static void a_healthy_qemu_is_accepted(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	const PrGuestBlock *blocks;
	guint n;

	qemu_attach(qemu, TIMEOUT);
	blocks = qemu->guest->ops->prepare(qemu->guest, PR_GUEST_SOURCE, &n, &error);
	assert_null(error);
	assert_int_equal(n, 1);
	assert_string_equal(blocks[0].idstr, "mem");
	assert_ptr_equal((void *)(gsize)blocks[0].base, qemu->map);
}

static void vcpus_are_asked_for_by_thread(void **state)
{
	static const struct {
		const char *answer, *words; /* words: NULL: there are two, 4711 and 4712 */
	} cases[] = {
		{"[{\"cpu-index\": 0, \"thread-id\": 4711}, {\"cpu-index\": 1, \"thread-id\": 4712}]",
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

		qemu_attach(qemu, TIMEOUT);
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

/* One answer differs from a healthy QEMU's: the error names what it is. */
static void each_flaw_is_refused_by_name(void **state)
{
	static const struct {
		PrGuestRole role;
		const char *key, *answer, *words;
		PrGuestError code;
	} cases[] = {
		{PR_GUEST_SOURCE, "query-version", "{\"qemu\": {\"major\": 3, \"minor\": 1}}",
		 "this is QEMU 3", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-version", "7", "not an object", PR_GUEST_ERROR_PROTOCOL},
		{PR_GUEST_SOURCE, "query-migrate-capabilities",
		 "[{\"capability\": \"events\", \"state\": false}, 7]", "'x-ignore-shared'",
		 PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-migrate-capabilities", "{}", "not a list",
		 PR_GUEST_ERROR_PROTOCOL},
		{PR_GUEST_SOURCE, "query-migrate", "{\"status\": \"active\"}",
		 "query-migrate says 'active'", PR_GUEST_ERROR_UNSUPPORTED},
		{PR_GUEST_SOURCE, "query-status", "{\"status\": \"inmigrate\"}",
		 "only be a destination", PR_GUEST_ERROR_UNSUPPORTED},
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

		fake_qmp_set(qemu->fake, cases[i].key, cases[i].answer);
		qemu_attach(qemu, TIMEOUT);
		assert_null(qemu->guest->ops->prepare(qemu->guest, cases[i].role, &n, &error));
		assert_non_null(error);
		if (!strstr(error->message, cases[i].words) ||
		    !g_error_matches(error, PR_GUEST_ERROR, cases[i].code))
			print_error("case %u: %s\n", i, error->message);
		assert_non_null(strstr(error->message, cases[i].words));
		assert_true(g_error_matches(error, PR_GUEST_ERROR, cases[i].code));
		/* Nothing was touched. */
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
	/* an address that is nobody's, one mapping for two blocks, one too few, one too many */
	assert_no_match(0x50000000, 0, 3);
	assert_no_match(0x10000000, 0x10000000, 3);
	assert_no_match(0x30000000, 0, 3);
	assert_no_match(0, 0, 2);
	assert_no_match(0, 0, 4);
}

/* Device state */

typedef struct Saving {
	Qemu *qemu;
	GString *bytes;
	GCancellable *cancel;
	gboolean running; /* stops it first */
	gboolean ok;
	GError *error;
	GThread *thread;
} Saving;

static gboolean collect(const void *data, gsize len, void *opaque, GError **error)
{
	g_string_append_len(((Saving *)opaque)->bytes, data, len);
	return TRUE;
}

static gpointer save_thread(gpointer data)
{
	Saving *saving = data;
	PrGuest *guest = saving->qemu->guest;

	gboolean was_running;

	saving->ok = (!saving->running || guest->ops->stop(guest, &was_running, &saving->error)) &&
		     guest->ops->save(guest, saving->cancel, collect, saving, &saving->error);
	return NULL;
}

static void wait_for_command(Qemu *qemu, const char *key)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;

	while (!fake_qmp_count(qemu->fake, key)) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(1000);
	}
}

/* Returns QEMU's end of the stream. */
static int save_begin(Saving *saving, Qemu *qemu, gboolean running)
{
	int fd;

	*saving = (Saving){.qemu = qemu,
			   .bytes = g_string_new(NULL),
			   .cancel = g_cancellable_new(),
			   .running = running};
	saving->thread = g_thread_new("save", save_thread, saving);
	wait_for_command(qemu, "migrate");
	fd = fake_qmp_take_fd(qemu->fake);
	assert_true(fd >= 0);
	return fd;
}

static void save_clear(Saving *saving)
{
	g_string_free(saving->bytes, TRUE);
	g_object_unref(saving->cancel);
	g_clear_error(&saving->error);
}

static void assert_arguments(Qemu *qemu, const char *key, const char *words)
{
	g_autofree char *arguments = fake_qmp_arguments(qemu->fake, key);

	assert_non_null(arguments);
	if (!strstr(arguments, words))
		print_error("expected '%s' in: %s\n", words, arguments);
	assert_non_null(strstr(arguments, words));
}

static void a_save_is_configured_read_and_undone(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	Saving saving;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = save_begin(&saving, qemu, /* running= */ TRUE);
	assert_arguments(qemu, "migrate", "\"uri\":\"fd:postroad\"");
	assert_arguments(qemu, "migrate-set-capabilities",
			 "{\"capability\":\"x-ignore-shared\",\"state\":true}");
	assert_arguments(qemu, "migrate-set-capabilities",
			 "{\"capability\":\"multifd\",\"state\":false}");
	assert_int_equal(send(fd, "device ", 7, 0), 7);
	fake_qmp_say(qemu->fake, STOPPED);
	assert_int_equal(send(fd, "state", 5, 0), 5);
	close(fd);
	fake_qmp_say(qemu->fake, COMPLETED);
	g_thread_join(saving.thread);
	assert_true(saving.ok);
	assert_string_equal(saving.bytes->str, "device state");
	save_clear(&saving);
	/* QEMU does it by itself. */
	assert_int_equal(fake_qmp_count(qemu->fake, "stop"), 0);

	assert_true(qemu->guest->ops->resume(qemu->guest, &error));
	assert_arguments(qemu, "migrate-set-capabilities",
			 "{\"capability\":\"x-ignore-shared\",\"state\":false}");
	assert_arguments(qemu, "migrate-set-capabilities",
			 "{\"capability\":\"multifd\",\"state\":true}");
	assert_arguments(qemu, "migrate-set-parameters", "134217728");
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
	assert_int_equal(fake_qmp_count(qemu->fake, "migrate_cancel"), 0);
	/* Once is enough. */
	assert_true(qemu->guest->ops->resume(qemu->guest, &error));
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
}

/* Its private RAM may change all the time. */
static void a_guest_that_its_migration_does_not_stop_is_told_to(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Saving saving;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = save_begin(&saving, qemu, /* running= */ TRUE);
	wait_for_command(qemu, "stop");
	fake_qmp_say(qemu->fake, STOPPED);
	close(fd);
	fake_qmp_say(qemu->fake, COMPLETED);
	g_thread_join(saving.thread);
	g_assert_no_error(saving.error);
	save_clear(&saving);
}

static void a_guest_that_is_let_run_in_between_is_not_moved(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Saving saving;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = save_begin(&saving, qemu, /* running= */ TRUE);
	fake_qmp_say(qemu->fake, STOPPED RESUMED);
	close(fd);
	fake_qmp_say(qemu->fake, COMPLETED);
	g_thread_join(saving.thread);
	assert_false(saving.ok);
	assert_non_null(strstr(saving.error->message, "let the guest run"));
	save_clear(&saving);
}

static void a_migration_that_fails_before_the_guest_has_stopped_says_why(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Saving saving;
	int fd;

	fake_qmp_set(qemu->fake, "query-migrate",
		     "{\"status\": \"failed\", \"error-desc\": \"no space\"}");
	qemu_attach(qemu, TIMEOUT);
	fd = save_begin(&saving, qemu, /* running= */ TRUE);
	close(fd);
	fake_qmp_say(qemu->fake, FAILED);
	g_thread_join(saving.thread);
	assert_true(g_error_matches(saving.error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED));
	assert_non_null(strstr(saving.error->message, "no space"));
	save_clear(&saving);
}

static void a_failed_save_says_why(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Saving saving;
	int fd;

	fake_qmp_set(qemu->fake, "query-migrate",
		     "{\"status\": \"failed\", \"error-desc\": \"device is unmigratable\"}");
	qemu_attach(qemu, TIMEOUT);
	fd = save_begin(&saving, qemu, /* running= */ FALSE);
	close(fd);
	fake_qmp_say(qemu->fake, FAILED);
	g_thread_join(saving.thread);
	assert_false(saving.ok);
	assert_true(g_error_matches(saving.error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED));
	assert_non_null(strstr(saving.error->message, "device is unmigratable"));
	save_clear(&saving);
}

/* A save that stands still is given up; resume() cancels it before the guest goes on. */
static void a_save_that_stalls_times_out_and_is_cancelled(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	Saving saving;
	int fd;

	qemu_attach(qemu, SHORT_TIMEOUT);
	fd = save_begin(&saving, qemu, /* running= */ TRUE);
	fake_qmp_say(qemu->fake, STOPPED);
	g_thread_join(saving.thread);
	assert_false(saving.ok);
	assert_true(g_error_matches(saving.error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT));
	save_clear(&saving);
	fake_qmp_set(qemu->fake, "query-migrate", "{\"status\": \"active\"}");
	fake_qmp_set(qemu->fake, "migrate_cancel",
		     FAKE_RAW CANCELLED "{\"return\": {}, \"id\": 0}");
	/* The answer is lost, the event came: the guest has to run in any case. */
	assert_true(qemu->guest->ops->resume(qemu->guest, &error));
	assert_int_equal(fake_qmp_count(qemu->fake, "migrate_cancel"), 1);
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
	close(fd);
}

static void a_save_can_be_cancelled(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Saving saving;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = save_begin(&saving, qemu, /* running= */ FALSE);
	g_cancellable_cancel(saving.cancel);
	g_thread_join(saving.thread);
	assert_false(saving.ok);
	assert_true(g_error_matches(saving.error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	save_clear(&saving);
	close(fd);
}

typedef struct Loading {
	PrGuest *guest;
	gboolean ok;
	GError *error;
	GThread *thread;
} Loading;

static gpointer load_end_thread(gpointer data)
{
	Loading *loading = data;

	loading->ok = loading->guest->ops->load_end(loading->guest, &loading->error);
	return NULL;
}

static int load_begin(Loading *loading, Qemu *qemu)
{
	g_autoptr(GError) error = NULL;
	int fd;

	*loading = (Loading){.guest = qemu->guest};
	assert_true(qemu->guest->ops->load_begin(qemu->guest, &error));
	assert_true(qemu->guest->ops->load_data(qemu->guest, "device state", 12, &error));
	fd = fake_qmp_take_fd(qemu->fake);
	assert_true(fd >= 0);
	loading->thread = g_thread_new("load", load_end_thread, loading);
	return fd;
}

static void assert_stream_is(int fd, const char *text)
{
	g_autoptr(GString) bytes = g_string_new(NULL);
	char chunk[64];
	ssize_t n;

	while ((n = recv(fd, chunk, sizeof(chunk), 0)) > 0)
		g_string_append_len(bytes, chunk, n);
	assert_int_equal(n, 0);
	assert_string_equal(bytes->str, text);
}

/* While it loads, QEMU's main loop may wait for a page: it is asked nothing. */
static void a_load_waits_for_its_event(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	Loading loading;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = load_begin(&loading, qemu);
	assert_stream_is(fd, "device state");
	assert_int_equal(fake_qmp_count(qemu->fake, "query-status"), 0);
	fake_qmp_say(qemu->fake, COMPLETED);
	g_thread_join(loading.thread);
	assert_true(loading.ok);
	assert_int_equal(fake_qmp_count(qemu->fake, "query-status"), 0);
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 0);
	assert_true(qemu->guest->ops->run(qemu->guest, &error));
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
	close(fd);
}

/* A second guest beside the source's. */
static void a_guest_that_runs_when_it_is_loaded_is_refused(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Loading loading;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = load_begin(&loading, qemu);
	assert_stream_is(fd, "device state");
	fake_qmp_say(qemu->fake, RESUMED COMPLETED);
	g_thread_join(loading.thread);
	assert_false(loading.ok);
	assert_non_null(strstr(loading.error->message, "runs already"));
	g_clear_error(&loading.error);
	close(fd);
}

static void a_load_that_hangs_can_be_aborted(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Loading loading;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = load_begin(&loading, qemu);
	assert_stream_is(fd, "device state");
	qemu->guest->ops->load_abort(qemu->guest);
	g_thread_join(loading.thread);
	assert_false(loading.ok);
	assert_true(g_error_matches(loading.error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	g_clear_error(&loading.error);
	close(fd);
}

static void a_load_ends_when_qemu_dies(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Loading loading;
	int fd;

	qemu_attach(qemu, TIMEOUT);
	fd = load_begin(&loading, qemu);
	fake_qmp_say(qemu->fake, "this is not JSON");
	g_thread_join(loading.thread);
	assert_false(loading.ok);
	assert_true(g_error_matches(loading.error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED));
	g_clear_error(&loading.error);
	close(fd);
}

static void loading_without_a_beginning_is_an_error(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;

	qemu_attach(qemu, TIMEOUT);
	assert_false(qemu->guest->ops->load_data(qemu->guest, "x", 1, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL));
	g_clear_error(&error);
	assert_false(qemu->guest->ops->load_end(qemu->guest, &error));
	assert_non_null(error);
	qemu->guest->ops->load_abort(qemu->guest);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_healthy_qemu_is_accepted),
		cmocka_unit_test(each_flaw_is_refused_by_name),
		cmocka_unit_test(vcpus_are_asked_for_by_thread),
		cmocka_unit_test(the_spec_is_checked),
		cmocka_unit_test(ramblocks_of_old_and_new_monitors_are_read),
		cmocka_unit_test(host_addresses_are_found_through_the_guests),
		cmocka_unit_test(mappings_find_their_blocks),
		cmocka_unit_test(a_save_is_configured_read_and_undone),
		cmocka_unit_test(a_guest_that_its_migration_does_not_stop_is_told_to),
		cmocka_unit_test(a_guest_that_is_let_run_in_between_is_not_moved),
		cmocka_unit_test(a_migration_that_fails_before_the_guest_has_stopped_says_why),
		cmocka_unit_test(a_failed_save_says_why),
		cmocka_unit_test(a_save_that_stalls_times_out_and_is_cancelled),
		cmocka_unit_test(a_save_can_be_cancelled),
		cmocka_unit_test(a_load_waits_for_its_event),
		cmocka_unit_test(a_guest_that_runs_when_it_is_loaded_is_refused),
		cmocka_unit_test(a_guest_that_runs_when_it_is_loaded_is_refused),
		cmocka_unit_test(a_load_that_hangs_can_be_aborted),
		cmocka_unit_test(a_load_ends_when_qemu_dies),
		cmocka_unit_test(loading_without_a_beginning_is_an_error),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
