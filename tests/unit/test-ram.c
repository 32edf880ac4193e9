/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps, claims of pages, and the received bitmap. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "migration/memory/bitmap.h"
#include "migration/migration.h"
#include "migration/memory/ram.h"

#define N_BITS 1000

/* Makes the same changes to a bitmap and to an array of booleans, and compares them. */
static void bitmaps_match_arrays_of_booleans(void **state)
{
	g_autoptr(GRand) random = g_rand_new_with_seed(7);
	g_autofree unsigned long *map = pr_bitmap_new(N_BITS);
	gboolean model[N_BITS] = {FALSE};

	for (guint round = 0; round < 2000; round++) {
		uint64_t start = (uint64_t)g_rand_int_range(random, 0, N_BITS);
		uint64_t n =
			(uint64_t)g_rand_int_range(random, 0, (gint32)MIN(200, N_BITS - start + 1));
		gboolean set = g_rand_boolean(random);
		uint64_t changed = 0, count = 0, next_set = N_BITS, next_clear = N_BITS;
		for (uint64_t i = start; i < start + n; i++) {
			changed += model[i] != set;
			model[i] = set;
		}
		assert_int_equal((set ? pr_bitmap_set : pr_bitmap_clear)(map, start, n), changed);
		for (guint i = 0; i < N_BITS; i++)
			count += model[i] != FALSE;
		for (uint64_t i = N_BITS; i-- > start;) {
			next_set = model[i] ? i : next_set;
			next_clear = model[i] ? next_clear : i;
		}
		assert_int_equal(pr_bitmap_count(map, N_BITS), count);
		assert_int_equal(pr_bitmap_next_set(map, N_BITS, start), next_set);
		assert_int_equal(pr_bitmap_next_clear(map, N_BITS, start), next_clear);
		assert_int_equal(pr_bitmap_any(map, start, n), n > 0 && next_set < start + n);
	}
}

typedef struct Fixture {
	PrGuestBlock blocks[2];
	PrRam *ram;
} Fixture;

static void make_block(PrGuestBlock *block, const char *idstr, uint64_t pages)
{
	*block = (PrGuestBlock){.idstr = g_strdup(idstr), .size = pages * 4096, .page_size = 4096};
	block->memfd = memfd_create(idstr, MFD_CLOEXEC);
	assert_true(block->memfd >= 0);
	assert_int_equal(ftruncate(block->memfd, (off_t)block->size), 0);
}

static Fixture *fixture_new(PrGuestRole role)
{
	Fixture *fixture = g_new0(Fixture, 1);
	g_autoptr(GError) error = NULL;

	make_block(&fixture->blocks[0], "ram0", 100);
	make_block(&fixture->blocks[1], "ram1", 300);
	fixture->ram = pr_ram_new(fixture->blocks, 2, role, &error);
	g_assert_no_error(error);
	return fixture;
}

static void fixture_free(Fixture *fixture)
{
	pr_ram_free(fixture->ram);
	for (guint i = 0; i < 2; i++) {
		g_free(fixture->blocks[i].idstr);
		close(fixture->blocks[i].memfd);
	}
	g_free(fixture);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Fixture, fixture_free)

static void a_page_has_one_reader_at_a_time(void **state)
{
	g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_DESTINATION);
	PrRam *ram = fixture->ram;
	PrRamBlock *block = &ram->blocks[0];
	uint64_t page;

	assert_true(pr_ram_claim(block, 5));
	assert_false(pr_ram_claim(block, 5));
	assert_int_equal(pr_ram_claim_run(block, 0, 64, &page), 5);
	assert_int_equal(page, 0);
	assert_int_equal(pr_ram_claim_run(block, 0, 64, &page), 64);
	assert_int_equal(page, 6);
	pr_ram_received(ram, block, 5, 1, TRUE);
	assert_false(pr_ram_claim(block, 5));
	pr_ram_forget_inflight(ram, NULL, 0);
	assert_false(pr_ram_claim(block, 5));
	assert_true(pr_ram_claim(block, 6));
	assert_int_equal(pr_ram_claim_run(block, 99, 64, &page), 1);
	assert_int_equal(pr_ram_claim_run(block, 99, 64, &page), 0);
	assert_int_equal(pr_ram_received_bytes(ram), 4096);
}

/* The path in use was fenced, while READs of other rails are still outstanding. */
static void claims_of_other_rails_outlive_a_fence(void **state)
{
	g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_DESTINATION);
	PrRam *ram = fixture->ram;
	PrRamBlock *block = &ram->blocks[1];
	uint64_t page;
	/*
	 * Ranges out of order, adjacent to each other, at both ends of a block, and in another
	 * block.
	 */
	const uint64_t kept[] = {pr_token_pack(1, 290, 10), pr_token_pack(1, 70, 30),
				 pr_token_pack(1, 0, 2), pr_token_pack(1, 100, 1),
				 pr_token_pack(0, 50, 5)};

	assert_int_equal(pr_ram_claim_run(&ram->blocks[0], 0, 100, &page), 100);
	assert_int_equal(pr_ram_claim_run(block, 0, 300, &page), 300);
	pr_ram_forget_inflight(ram, kept, G_N_ELEMENTS(kept));
	assert_int_equal(pr_bitmap_count(ram->blocks[0].inflight, 100), 5);
	assert_true(pr_bitmap_test(ram->blocks[0].inflight, 54));
	assert_int_equal(pr_bitmap_count(block->inflight, 300), 43);
	assert_int_equal(pr_ram_claim_run(block, 0, 300, &page), 68);
	assert_int_equal(page, 2);
	assert_int_equal(pr_ram_claim_run(block, 70, 300, &page), 189);
	assert_int_equal(page, 101);
	/* One of these READs fails as well. */
	pr_ram_forget(ram, kept[1]);
	assert_int_equal(pr_ram_claim_run(block, 0, 300, &page), 30);
	assert_int_equal(page, 70);
}

static void zero_ranges_skip_pages_that_are_being_read(void **state)
{
	g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_DESTINATION);
	PrRam *ram = fixture->ram;
	PrRamBlock *block = &ram->blocks[1];

	assert_true(pr_ram_claim(block, 70));
	assert_true(pr_ram_claim(block, 200));
	pr_ram_received(ram, block, 200, 1, TRUE);
	assert_int_equal(pr_ram_zero(ram, block, 10, 240), 238);
	assert_false(pr_bitmap_test(block->received, 70));
	assert_true(pr_bitmap_test(block->inflight, 70));
	assert_int_equal(pr_bitmap_count(block->inflight, block->n_pages), 1);
	assert_int_equal(pr_bitmap_count(block->received, block->n_pages), 239);
	assert_int_equal(pr_ram_zero_bytes(ram), 238 * 4096);
	assert_int_equal(pr_ram_received_bytes(ram), 239 * 4096);
	assert_int_equal(pr_ram_zero(ram, block, 0, 300), 60);
	assert_false(pr_ram_complete(ram));
	pr_ram_received(ram, block, 70, 1, TRUE);
	assert_int_equal(pr_ram_zero(ram, &ram->blocks[0], 0, 100), 100);
	assert_true(pr_ram_complete(ram));
}

static gpointer claim_all(gpointer data)
{
	PrRam *ram = data;
	PrRamBlock *block = &ram->blocks[1];
	uint64_t page, n, mine = 0;

	while ((n = pr_ram_claim_run(block, 0, 7, &page)) > 0) {
		pr_ram_received(ram, block, page, n, TRUE);
		mine += n;
	}
	return GSIZE_TO_POINTER(mine);
}

/* A page may be granted as part of different ranges. A second grant of a page has no effect. */
static void ungranted_pages_cannot_be_claimed(void **state)
{
	g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_DESTINATION);
	PrRam *ram = fixture->ram;
	PrRamBlock *block = &ram->blocks[1];
	uint64_t page;

	pr_ram_mark_ungranted(ram);
	assert_false(pr_ram_claim(block, 70));
	assert_int_equal(pr_ram_claim_run(block, 0, 8, &page), 0);
	pr_ram_grant(block, 60, 20);
	assert_int_equal(pr_ram_claim_run(block, 0, 8, &page), 8);
	assert_int_equal(page, 60);
	/* A reader has claimed 60 to 67, so the second grant must not release them. */
	pr_ram_grant(block, 60, 20);
	assert_false(pr_ram_claim(block, 60));
	assert_int_equal(pr_ram_zero(ram, block, 50, 100), 92);
	assert_false(pr_bitmap_any(block->received, 60, 8));
	assert_true(pr_bitmap_test(block->received, 68) && pr_bitmap_test(block->received, 50));
	pr_ram_received(ram, block, 60, 8, TRUE);
	assert_int_equal(pr_bitmap_count(block->received, block->n_pages), 100);
	assert_int_equal(pr_ram_zero_bytes(ram), 92 * 4096);
	pr_ram_grant(block, 0, 300);
	assert_int_equal(pr_bitmap_count(block->ungranted, block->n_pages), 0);
	assert_int_equal(pr_bitmap_count(block->inflight, block->n_pages), 0);

	pr_ram_clear_ungranted(ram);
	pr_ram_forget_inflight(ram, NULL, 0);
	assert_true(pr_ram_claim(&ram->blocks[0], 3));
}

static void concurrent_readers_claim_each_page_once(void **state)
{
	for (guint round = 0; round < 50; round++) {
		g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_DESTINATION);
		GThread *threads[3];
		gsize sum = 0;
		for (guint i = 0; i < 3; i++)
			threads[i] = g_thread_new("reader", claim_all, fixture->ram);
		for (guint i = 0; i < 3; i++)
			sum += GPOINTER_TO_SIZE(g_thread_join(threads[i]));
		assert_int_equal(sum, 300);
		assert_int_equal(pr_ram_received_bytes(fixture->ram), 300 * 4096);
		assert_int_equal(pr_bitmap_count(fixture->ram->blocks[1].inflight, 300), 0);
	}
}

static void holes_and_zero_pages_are_found(void **state)
{
	g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_SOURCE);
	PrRamBlock *block = &fixture->ram->blocks[1];
	PrExtent data;
	char byte = 1, zero = 0;

	assert_false(pr_ram_next_data(block, 0, block->size, &data));
	assert_int_equal(pwrite(block->memfd, &byte, 1, 10 * 4096 + 4095), 1);
	assert_int_equal(pwrite(block->memfd, &zero, 1, 11 * 4096), 1);
	assert_int_equal(pwrite(block->memfd, &byte, 1, 299 * 4096), 1);
	assert_true(pr_ram_next_data(block, 0, block->size, &data));
	assert_int_equal(data.start, 10 * 4096);
	assert_int_equal(data.end, 12 * 4096);
	assert_false(pr_ram_next_data(block, data.end, 299 * 4096, &data));
	assert_true(pr_ram_next_data(block, 0, 11 * 4096, &data));
	assert_int_equal(data.end, 11 * 4096);
	assert_true(pr_ram_next_data(block, 12 * 4096, block->size, &data));
	assert_int_equal(data.start, 299 * 4096);
	assert_int_equal(data.end, 300 * 4096);
	assert_false(pr_ram_next_data(block, data.end, block->size, &data));
	assert_false(pr_ram_page_is_zero(block, 10));
	assert_true(pr_ram_page_is_zero(block, 11));
	assert_false(pr_ram_page_is_zero(block, 299));
}

static void differing_block_tables_are_named(void **state)
{
	g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_DESTINATION);
	static const struct {
		guint index;
		const char *idstr;
		uint64_t size;
		guint n;
		const char *mentions;
	} cases[] = {
		{0, "other", 409600, 2, "other"},
		{0, "ram0", 8192, 2, "8192"},
		{1, "ram1", 1228800, 1, "\"ram1\" exists only at the destination"},
		{2, "ram2", 4096, 3, "\"ram2\" exists only at the source"},
	};

	for (guint i = 0; i < G_N_ELEMENTS(cases); i++) {
		g_autofree PrWireBlock *wire = pr_ram_wire_blocks(fixture->ram);
		g_autoptr(GError) error = NULL;
		assert_true(pr_ram_check_blocks(fixture->ram, wire, 2, NULL));
		wire = g_renew(PrWireBlock, wire, 3);
		g_strlcpy(wire[cases[i].index].idstr, cases[i].idstr, sizeof(wire->idstr));
		wire[cases[i].index].size = cases[i].size;
		wire[cases[i].index].page_size = 4096;
		assert_false(pr_ram_check_blocks(fixture->ram, wire, cases[i].n, &error));
		assert_true(
			g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH));
		if (!strstr(error->message, cases[i].mentions))
			fail_msg("\"%s\" does not mention %s", error->message, cases[i].mentions);
	}
}

static void offsets_outside_a_block_are_detected(void **state)
{
	g_autoptr(Fixture) fixture = fixture_new(PR_GUEST_DESTINATION);
	const PrRamBlock *block = &fixture->ram->blocks[0];

	assert_true(pr_ram_block_contains(block, 0, block->size));
	assert_true(pr_ram_block_contains(block, block->size, 0));
	assert_false(pr_ram_block_contains(block, 4096, block->size));
	assert_false(pr_ram_block_contains(block, 8192, UINT64_MAX - 4095));
	assert_false(pr_ram_block_contains(block, block->size + 4096, 0));
	assert_false(pr_ram_block_contains(block, 1, 4096));
	assert_false(pr_ram_block_contains(block, 0, 100));
}

/* Returns VmFlags of the mapping that starts at `map`, from /proc/self/smaps. */
static char *flags_of(const void *map)
{
	g_autofree char *text = NULL;
	g_autofree char *begin = g_strdup_printf("%" G_GINTPTR_MODIFIER "x-", (guintptr)map);
	const char *at;

	assert_true(g_file_get_contents("/proc/self/smaps", &text, NULL, NULL));
	at = strstr(text, begin);
	assert_non_null(at);
	at = strstr(at, "VmFlags:");
	assert_non_null(at);
	return g_strndup(at, strcspn(at, "\n"));
}

static void a_core_dump_has_no_guest_memory(void **state)
{
	static const PrGuestRole roles[] = {PR_GUEST_SOURCE, PR_GUEST_DESTINATION};

	for (guint role = 0; role < G_N_ELEMENTS(roles); role++) {
		Fixture *fixture = fixture_new(roles[role]);

		for (guint i = 0; i < 2; i++) {
			g_autofree char *flags = flags_of(fixture->ram->blocks[i].host);

			if (!strstr(flags, " dd"))
				fail_msg("block %u would be dumped: %s", i, flags);
		}
		fixture_free(fixture);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(bitmaps_match_arrays_of_booleans),
		cmocka_unit_test(a_page_has_one_reader_at_a_time),
		cmocka_unit_test(claims_of_other_rails_outlive_a_fence),
		cmocka_unit_test(zero_ranges_skip_pages_that_are_being_read),
		cmocka_unit_test(ungranted_pages_cannot_be_claimed),
		cmocka_unit_test(concurrent_readers_claim_each_page_once),
		cmocka_unit_test(holes_and_zero_pages_are_found),
		cmocka_unit_test(differing_block_tables_are_named),
		cmocka_unit_test(a_core_dump_has_no_guest_memory),
		cmocka_unit_test(offsets_outside_a_block_are_detected),
	};

	return cmocka_run_group_tests_name("ram", tests, NULL, NULL);
}
