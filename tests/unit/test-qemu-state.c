/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Saving and loading of the `qemu:` kind: device state, private RAM, and the facts that both sides
 * must have in common. Against a scripted QMP server and a real agent.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/qemu-section.h"
#include "tests/rigs/qemu-rig.h"

#define COMPLETED "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n"
#define FAILED	  "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"failed\"}}\n"

#define STOPPED	  "{\"event\": \"STOP\"}\n"
#define RESUMED	  "{\"event\": \"RESUME\"}\n"

/* Device state */

/* The shortest migration stream: a head, one byte, an end. */
static const char qemu_state[] = "QEVM\0\0\0\3device state";

/* The sections that the source's sink has received. */
typedef struct Sections {
	GByteArray *raw;
	GString *facts, *state;
	guint n_blocks, n_pages;
} Sections;

/* PrQemuSectionHandler */
static gboolean sort(PrQemuSectionType type, const uint8_t *body, gsize len, void *opaque,
		     GError **error)
{
	Sections *sections = opaque;

	if (type == PR_QEMU_SECTION_FACTS)
		g_string_append_len(sections->facts, (const char *)body, len);
	else if (type == PR_QEMU_SECTION_STATE)
		g_string_append_len(sections->state, (const char *)body, len);
	else if (type == PR_QEMU_SECTION_BLOCK)
		sections->n_blocks++;
	else
		sections->n_pages += (len - sizeof(uint64_t)) / 4096;
	return TRUE;
}

static gboolean collect(const void *data, gsize len, void *opaque, GError **error)
{
	g_byte_array_append(((Sections *)opaque)->raw, data, len);
	return TRUE;
}

static void sections_init(Sections *sections)
{
	*sections = (Sections){.raw = g_byte_array_new(),
			       .facts = g_string_new(NULL),
			       .state = g_string_new(NULL)};
}

static void sections_sort(Sections *sections)
{
	g_autoptr(GError) error = NULL;
	PrQemuSectionReader reader;

	pr_qemu_section_reader_init(&reader);
	assert_true(pr_qemu_section_read(&reader, sections->raw->data, sections->raw->len, sort,
					 sections, &error));
	assert_true(pr_qemu_section_at_end(&reader));
	pr_qemu_section_reader_clear(&reader);
}

static void sections_clear(Sections *sections)
{
	g_byte_array_unref(sections->raw);
	g_string_free(sections->facts, TRUE);
	g_string_free(sections->state, TRUE);
}

static void assert_bytes(const GString *bytes, const char *expected, gsize len)
{
	assert_int_equal(bytes->len, len);
	assert_memory_equal(bytes->str, expected, len);
}

static void a_state_is_saved_and_the_guest_resumed(void **state)
{
	static const char expected[] = "QEVM\0\0\0\3"
				       "\7\0\0\0\12pc-q35-7.2"
				       "device state\0"
				       "\6\0\0\0\2{}";
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	const PrGuestOps *ops;
	gboolean was_running;
	Sections sections;

	fake_qmp_set_state(qemu->fake, qemu_state, sizeof(qemu_state));
	sections_init(&sections);
	qemu_attach(qemu);
	ops = qemu->guest->ops;
	assert_true(ops->prepare_save(qemu->guest, &error));
	assert_true(ops->stop(qemu->guest, &was_running, &error));
	assert_true(was_running);
	assert_true(ops->save(qemu->guest, NULL, collect, &sections, &error));
	assert_arguments(qemu, "xen-save-devices-state", "\"filename\":\"/dev/fdset/3\"");
	sections_sort(&sections);
	assert_bytes(sections.state, expected, sizeof(expected) - 1);
	assert_true(ops->check_stopped(qemu->guest, &error));
	assert_true(ops->resume(qemu->guest, &error));
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
	assert_int_equal(fake_qmp_count(qemu->fake, "remove-fd"), 1);
	/* Calling it again has no effect. */
	assert_true(ops->resume(qemu->guest, &error));
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
	/* No migration of QEMU itself was started, and none of its settings was changed. */
	assert_int_equal(fake_qmp_count(qemu->fake, "migrate"), 0);
	assert_int_equal(fake_qmp_count(qemu->fake, "migrate-set-capabilities"), 0);
	sections_clear(&sections);
}

static void a_guest_that_was_paused_stays_paused(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	gboolean was_running;

	fake_qmp_set(qemu->fake, "query-status", "{\"status\": \"paused\", \"running\": false}");
	qemu_attach(qemu);
	assert_true(qemu->guest->ops->stop(qemu->guest, &was_running, &error));
	assert_false(was_running);
	assert_true(qemu->guest->ops->resume(qemu->guest, &error));
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 0);
}

/* The guest's memory must not change until the destination has its device state. */
static void a_guest_that_runs_during_a_save_is_not_moved(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	gint64 deadline = g_get_monotonic_time() + QEMU_RIG_TIMEOUT * G_TIME_SPAN_MILLISECOND;
	gboolean was_running;

	qemu_attach(qemu);
	assert_true(qemu->guest->ops->stop(qemu->guest, &was_running, &error));
	fake_qmp_send(qemu->fake, STOPPED RESUMED);
	while (qemu->guest->ops->check_stopped(qemu->guest, &error)) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(1000); /* between two checks */
	}
	assert_says(error, "let the guest run");
}

static void a_failed_save_reports_the_cause(void **state)
{
	static const struct {
		const char *answer, *bytes;
		gsize len;
		const char *words;
	} cases[] = {
		{FAKE_ERROR "no space", NULL, 0, "no space"},
		{"{}", "", 0, "not a migration stream"},
		{"{}", "QEVM\0\0\0\4x\0", 10, "not a migration stream"},
		{"{}", "QEVM\0\0\0\3cut off", 15, "not a migration stream"},
	};

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autoptr(Qemu) qemu = qemu_new();
		g_autoptr(GError) error = NULL;
		Sections sections;

		sections_init(&sections);
		fake_qmp_set(qemu->fake, "xen-save-devices-state", cases[i].answer);
		if (cases[i].bytes)
			fake_qmp_set_state(qemu->fake, cases[i].bytes, cases[i].len);
		qemu_attach(qemu);
		assert_false(qemu->guest->ops->save(qemu->guest, NULL, collect, &sections, &error));
		assert_says(error, cases[i].words);
		assert_int_equal(sections.raw->len, 0);
		sections_clear(&sections);
	}
}

static void a_save_that_was_cancelled_is_not_begun(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	g_autoptr(GCancellable) cancel = g_cancellable_new();
	Sections sections;

	sections_init(&sections);
	qemu_attach(qemu);
	g_cancellable_cancel(cancel);
	assert_false(qemu->guest->ops->save(qemu->guest, cancel, collect, &sections, &error));
	assert_true(g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	assert_int_equal(fake_qmp_count(qemu->fake, "xen-save-devices-state"), 0);
	sections_clear(&sections);
}

/* Private RAM */

#define VRAM_PAGES 70
#define VRAM	   (VRAM_PAGES * 4096)

/* A frame buffer in this process, which is QEMU's process for the agent. */
static uint8_t *add_vram(Qemu *qemu)
{
	uint8_t *vram =
		mmap(NULL, VRAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	g_autofree char *text = g_strdup_printf(
		"\"mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\\r\\n"
		"0000:00:01.0/vga.vram    4 KiB  0x0000000008000000 0x%016x 0x%016x "
		"0x%016" G_GINT64_MODIFIER "x rw\\r\\n"
		"/rom@etc/acpi/tables    4 KiB  0x0000000009000000 0x0000000000020000 "
		"0x0000000000200000\\r\\n\"",
		VRAM, VRAM, (guint64)(gsize)vram);

	assert_ptr_not_equal(vram, MAP_FAILED);
	fake_qmp_set(qemu->fake, "human-monitor-command info ramblock", text);
	return vram;
}

static void private_ram_moves_and_only_what_changed_moves_again(void **state)
{
	g_autoptr(Qemu) from = qemu_new();
	g_autoptr(Qemu) to = qemu_new();
	g_autoptr(GError) error = NULL;
	uint8_t *vram = add_vram(from), *there = add_vram(to);
	Sections early, late;

	sections_init(&early);
	sections_init(&late);
	fake_qmp_set_state(from->fake, qemu_state, sizeof(qemu_state));
	qemu_attach(from);
	qemu_attach(to);
	memset(vram + 3 * 4096, 'a', 2 * 4096);
	memset(vram + 68 * 4096, 'b', 2 * 4096);
	memset(there, 'x', 10 * 4096); /* sections that do not matter here */
	assert_true(from->guest->ops->describe(from->guest, collect, &early, &error));
	assert_true(from->guest->ops->save_early(from->guest, NULL, collect, &early, &error));
	assert_true(to->guest->ops->prepare_load(to->guest, &error));
	/* The stream may be cut into chunks at any place. */
	for (guint at = 0; at < early.raw->len; at += 1000)
		assert_true(to->guest->ops->load_early(to->guest, early.raw->data + at,
						       MIN(1000, early.raw->len - at), &error));
	assert_memory_equal(vram, there, VRAM);
	sections_sort(&early);
	assert_int_equal(early.n_pages, 4);
	/* The guest wrote to the page, which is zero again. */
	memset(vram + 4 * 4096, 0, 4096);
	vram[60 * 4096 + 7] = 1;
	assert_true(from->guest->ops->save(from->guest, NULL, collect, &late, &error));
	assert_true(to->guest->ops->load_begin(to->guest, &error));
	assert_true(to->guest->ops->load_data(to->guest, late.raw->data, late.raw->len, &error));
	assert_memory_equal(vram, there, VRAM);
	sections_sort(&late);
	assert_int_equal(late.n_blocks, 1);
	assert_int_equal(late.n_pages, 2);
	munmap(vram, VRAM);
	munmap(there, VRAM);
	sections_clear(&early);
	sections_clear(&late);
}

/* As at a destination older than 8.0, whose frame buffer is found only after the device state is
 * loaded. */
static void private_ram_that_is_found_late_is_written_late(void **state)
{
	g_autoptr(Qemu) from = qemu_new();
	g_autoptr(Qemu) to = qemu_new();
	g_autoptr(GError) error = NULL;
	uint8_t *vram = add_vram(from), *there = add_vram(to);
	g_autofree char *hva =
		g_strdup_printf("\"Host virtual address for 0xfd000000 (vga.vram) is "
				"0x%" G_GINT64_MODIFIER "x\\r\\n\"",
				(guint64)(gsize)there);
	g_autofree char *text = g_strdup_printf(
		"\"mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\\r\\n"
		"0000:00:01.0/vga.vram    4 KiB  0x0000000008000000 0x%016x 0x%016x\\r\\n\"",
		VRAM, VRAM);
	Sections bytes;

	sections_init(&bytes);
	fake_qmp_set(to->fake, "human-monitor-command info ramblock", text);
	qemu_attach(from);
	qemu_attach(to);
	memset(vram + 4096, 'a', 4096);
	assert_true(from->guest->ops->describe(from->guest, collect, &bytes, &error));
	assert_true(from->guest->ops->save_early(from->guest, NULL, collect, &bytes, &error));
	assert_true(to->guest->ops->load_early(to->guest, bytes.raw->data, bytes.raw->len, &error));
	assert_int_equal(there[4096], 0);
	fake_qmp_set(to->fake, "human-monitor-command info mtree -f",
		     "\"  00000000fd000000-00000000fd0fffff (prio 1, ram): vga.vram\\r\\n\"");
	fake_qmp_set(to->fake, "human-monitor-command gpa2hva 0xfd000000", hva);
	assert_true(to->guest->ops->load_begin(to->guest, &error));
	fake_qmp_send(to->fake, COMPLETED);
	assert_true(to->guest->ops->load_end(to->guest, &error));
	assert_memory_equal(vram, there, VRAM);
	munmap(vram, VRAM);
	munmap(there, VRAM);
	sections_clear(&bytes);
}

/* A QEMU older than 8.0 lists blocks in the guest's address space by the last part of their names
 * only. */
static void two_frame_buffers_of_one_name_are_not_mixed_up(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	Sections sections;

	fake_qmp_set(
		qemu->fake, "human-monitor-command info ramblock",
		"\"mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\\r\\n"
		"0000:00:01.0/vga.vram    4 KiB  0x0000000008000000 0x1000 0x1000\\r\\n"
		"0000:00:02.0/vga.vram    4 KiB  0x0000000009000000 0x1000 0x1000\\r\\n\"");
	fake_qmp_set(qemu->fake, "human-monitor-command info mtree -f",
		     "\"  00000000fd000000-00000000fd000fff (prio 1, ram): vga.vram\\r\\n"
		     "  00000000fe000000-00000000fe000fff (prio 1, ram): vga.vram\\r\\n\"");
	sections_init(&sections);
	qemu_attach(qemu);
	assert_true(qemu->guest->ops->describe(qemu->guest, collect, &sections, &error));
	assert_true(qemu->guest->ops->save_early(qemu->guest, NULL, collect, &sections, &error));
	sections_sort(&sections);
	assert_int_equal(sections.n_blocks, 0);
	assert_int_equal(fake_qmp_count(qemu->fake, "human-monitor-command gpa2hva 0xfd000000"), 0);
	sections_clear(&sections);
}

/* The facts that both sides must have in common */

static const char qtree[] =
	"\"bus: main-system-bus\\r\\n  type System\\r\\n  dev: q35-pcihost, id \\\"\\\"\\r\\n"
	"    bus: pcie.0\\r\\n      type PCIE\\r\\n"
	"      dev: virtio-net-pci, id \\\"net0\\\"\\r\\n        addr = 02.0\\r\\n"
	"        bus: virtio-bus\\r\\n          type virtio-pci-bus\\r\\n"
	"          dev: virtio-net-device, id \\\"\\\"\\r\\n%s\"";

static void differences_are_named_while_the_guest_runs(void **state)
{
	static const struct {
		const char *key, *answer, *words;
	} cases[] = {
		{"qom-get /machine type", "\"pc-i440fx-7.2-machine\"",
		 "another machine type: 'pc-q35-7.2' at the source, 'pc-i440fx-7.2' at"},
		{"query-cpus-fast", "[{\"qom-path\": \"/cpu0\"}, {\"qom-path\": \"/cpu1\"}]",
		 "number of vCPUs: 1 at the source, 2 at the destination"},
		{"qom-get /cpu0 type", "\"qemu64-x86_64-cpu\"", "'max-x86_64-cpu' at the source"},
		{"human-monitor-command info qtree", "\"\"",
		 "missing at the destination: q35-pcihost (bus main-system-bus"},
		{"query-version", "{\"qemu\": {\"major\": 10, \"minor\": 0}}", NULL},
		{"human-monitor-command info ramblock",
		 "\"mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\\r\\n"
		 "pc.bios    4 KiB  0x0000000004000000 0x0000000000020000 "
		 "0x0000000000020000\\r\\n\"",
		 "RAM block 'pc.bios' has 256 KiB at the source and 128 KiB at the destination"},
		{"human-monitor-command info ramblock",
		 "\"mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\"",
		 "RAM block 'pc.bios' (256 KiB) is missing at the destination"},
	};
	g_autofree char *devices = g_strdup_printf(qtree, "");

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autoptr(Qemu) from = qemu_new();
		g_autoptr(Qemu) to = qemu_new();
		g_autoptr(GError) error = NULL;
		Sections sections;
		gboolean ok;

		sections_init(&sections);
		fake_qmp_set(from->fake, "human-monitor-command info qtree", devices);
		fake_qmp_set(to->fake, "human-monitor-command info qtree", devices);
		fake_qmp_set(to->fake, cases[i].key, cases[i].answer);
		qemu_attach(from);
		qemu_attach(to);
		assert_true(from->guest->ops->describe(from->guest, collect, &sections, &error));
		ok = to->guest->ops->load_early(to->guest, sections.raw->data, sections.raw->len,
						&error);
		assert_int_equal(ok, cases[i].words == NULL);
		if (cases[i].words)
			assert_says(error, cases[i].words);
		assert_int_equal(fake_qmp_count(from->fake, "stop"), 0);
		sections_clear(&sections);
	}
}

/* Two versions model the inside of a machine differently, but list the plugged devices alike. */
static void devices_are_compared_by_place_and_type(void **state)
{
	static const char ps2[] = "  dev: ps2-kbd, id \\\"\\\"\\r\\n";
	static const char rng[] = "      dev: virtio-rng-pci, id \\\"\\\"\\r\\n        addr = "
				  "\\\"03.0\\\"\\r\\n";
	static const struct {
		const char *more_there, *version, *words;
	} cases[] = {
		{ps2, "{\"qemu\": {\"major\": 10, \"minor\": 0}}", NULL},
		{ps2, "{\"qemu\": {\"major\": 7, \"minor\": 2}}",
		 "that the source does not have: ps2-kbd"},
		{rng, "{\"qemu\": {\"major\": 10, \"minor\": 0}}",
		 "virtio-rng-pci (bus pcie.0, address 03.0)"},
	};
	g_autofree char *here = g_strdup_printf(qtree, "");

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autofree char *there = g_strdup_printf(qtree, cases[i].more_there);
		g_autoptr(Qemu) from = qemu_new();
		g_autoptr(Qemu) to = qemu_new();
		g_autoptr(GError) error = NULL;
		Sections sections;
		gboolean ok;

		sections_init(&sections);
		fake_qmp_set(from->fake, "human-monitor-command info qtree", here);
		fake_qmp_set(to->fake, "human-monitor-command info qtree", there);
		fake_qmp_set(to->fake, "query-version", cases[i].version);
		qemu_attach(from);
		qemu_attach(to);
		assert_true(from->guest->ops->describe(from->guest, collect, &sections, &error));
		ok = to->guest->ops->load_early(to->guest, sections.raw->data, sections.raw->len,
						&error);
		assert_int_equal(ok, cases[i].words == NULL);
		if (cases[i].words)
			assert_says(error, cases[i].words);
		sections_clear(&sections);
	}
}

/* An attacker with a certificate may be the source. */
static void invalid_early_state_is_refused(void **state)
{
	static char deep[1 << 20] = "{\"a\": "; /* deeper than the stack of a recursive parser */
	static const struct {
		PrQemuSectionType type;
		const char *body;
		gsize len;
		const char *words;
	} cases[] = {
		{PR_QEMU_SECTION_FACTS, "nonsense", 8, "not a JSON object"},
		{PR_QEMU_SECTION_FACTS, "[]", 2, "not a JSON object"},
		{PR_QEMU_SECTION_FACTS, "{}{}", 4, "not a JSON object"},
		{PR_QEMU_SECTION_FACTS, deep, sizeof(deep), "not a JSON object"},
		{PR_QEMU_SECTION_FACTS, "{}", 2, "another machine type: '' at the source"},
		{PR_QEMU_SECTION_FACTS, "{\"machine\": 7}", 14, "another machine type"},
		{PR_QEMU_SECTION_BLOCK, "pc.bios", 7, "RAM of an unknown block"},
		{PR_QEMU_SECTION_PAGES, "12345678x", 9, "pages of no RAM block"},
		{PR_QEMU_SECTION_STATE, "QEVM", 4, "before its guest has stopped"},
		{PR_QEMU_SECTION_N, "", 0, "makes no sense"},
	};

	memset(deep + strlen(deep), '[', sizeof(deep) - strlen(deep));
	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autoptr(Qemu) qemu = qemu_new();
		g_autoptr(GByteArray) bytes = g_byte_array_new();
		g_autoptr(GError) error = NULL;

		pr_qemu_section_append(bytes, cases[i].type, cases[i].body, cases[i].len);
		qemu_attach(qemu);
		assert_false(
			qemu->guest->ops->load_early(qemu->guest, bytes->data, bytes->len, &error));
		assert_says(error, cases[i].words);
	}
}

static gboolean load_state(Qemu *qemu, const char *text, gsize len, GError **error)
{
	g_autoptr(GByteArray) bytes = g_byte_array_new();

	pr_qemu_section_append(bytes, PR_QEMU_SECTION_STATE, text, len);
	return qemu->guest->ops->load_data(qemu->guest, bytes->data, bytes->len, error);
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
	assert_true(load_state(qemu, "device state", 12, &error));
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

/* While QEMU loads, its main loop may wait for a page. So no command is sent. */
static void a_load_waits_for_its_event(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	g_autoptr(GError) error = NULL;
	Loading loading;
	int fd;

	qemu_attach(qemu);
	fd = load_begin(&loading, qemu);
	assert_stream_is(fd, "device state");
	assert_int_equal(fake_qmp_count(qemu->fake, "query-status"), 0);
	fake_qmp_send(qemu->fake, COMPLETED);
	g_thread_join(loading.thread);
	assert_true(loading.ok);
	assert_int_equal(fake_qmp_count(qemu->fake, "query-status"), 0);
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 0);
	assert_true(qemu->guest->ops->run(qemu->guest, &error));
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
	assert_arguments(qemu, "migrate-set-capabilities", "late-block-activate");
	assert_int_equal(fake_qmp_count(qemu->fake, "stop"), 1);
	close(fd);
}

/* The error has QEMU's own text. */
static void a_failed_load_reports_the_cause(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Loading loading;
	int fd;

	fake_qmp_set(qemu->fake, "query-version", "{\"qemu\": {\"major\": 9, \"minor\": 1}}");
	qemu_attach(qemu);
	fd = load_begin(&loading, qemu);
	assert_arguments(qemu, "migrate-incoming", "\"exit-on-error\":false");
	assert_stream_is(fd, "device state");
	fake_qmp_set(qemu->fake, "query-migrate",
		     "{\"status\": \"failed\", \"error-desc\": \"Unknown savevm section\"}");
	fake_qmp_send(qemu->fake, FAILED);
	g_thread_join(loading.thread);
	assert_false(loading.ok);
	assert_true(g_error_matches(loading.error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED));
	assert_says(loading.error, "Unknown savevm section");
	g_clear_error(&loading.error);
	close(fd);
}

/* The guest would run on both sides. */
static void a_guest_that_runs_when_it_is_loaded_is_refused(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Loading loading;
	int fd;

	qemu_attach(qemu);
	fd = load_begin(&loading, qemu);
	assert_stream_is(fd, "device state");
	fake_qmp_send(qemu->fake, RESUMED COMPLETED);
	g_thread_join(loading.thread);
	assert_false(loading.ok);
	assert_says(loading.error, "runs already");
	g_clear_error(&loading.error);
	close(fd);
}

static void a_load_that_hangs_can_be_aborted(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new();
	Loading loading;
	int fd;

	qemu_attach(qemu);
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

	qemu_attach(qemu);
	fd = load_begin(&loading, qemu);
	fake_qmp_send(qemu->fake, "this is not JSON");
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

	qemu_attach(qemu);
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
		cmocka_unit_test(a_state_is_saved_and_the_guest_resumed),
		cmocka_unit_test(a_guest_that_was_paused_stays_paused),
		cmocka_unit_test(a_guest_that_runs_during_a_save_is_not_moved),
		cmocka_unit_test(a_failed_save_reports_the_cause),
		cmocka_unit_test(a_save_that_was_cancelled_is_not_begun),
		cmocka_unit_test(private_ram_moves_and_only_what_changed_moves_again),
		cmocka_unit_test(private_ram_that_is_found_late_is_written_late),
		cmocka_unit_test(two_frame_buffers_of_one_name_are_not_mixed_up),
		cmocka_unit_test(differences_are_named_while_the_guest_runs),
		cmocka_unit_test(devices_are_compared_by_place_and_type),
		cmocka_unit_test(invalid_early_state_is_refused),
		cmocka_unit_test(a_failed_load_reports_the_cause),
		cmocka_unit_test(a_load_waits_for_its_event),
		cmocka_unit_test(a_guest_that_runs_when_it_is_loaded_is_refused),
		cmocka_unit_test(a_load_that_hangs_can_be_aborted),
		cmocka_unit_test(a_load_ends_when_qemu_dies),
		cmocka_unit_test(loading_without_a_beginning_is_an_error),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
