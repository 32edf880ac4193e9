/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Which hashes the verify thread requests, which landed READs it keeps, and which it gives up. All
 * pages here are wrong, as placing a page needs a userfaultfd. tests/integration/test-verify.c
 * tests correct pages.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "migration/memory/bitmap.h"
#include "migration/postcopy/verify.h"

#define PAGE	    4096u
#define N_PAGES	    256
#define PATIENCE_US (20 * G_USEC_PER_SEC)

/* A destination without a guest, and the calls of its hooks. */
typedef struct Rig {
	PrRam *ram;
	PrVerify *verify;
	GMutex lock; /* protects what follows */
	GCond changed;
	GArray *requested; /* uint64_t: the requested ranges as tokens, in order */
	GArray *corrupt;   /* PrCorrupt */
	guint settled;
} Rig;

static void on_request(guint block, const PrWireRange *ranges, guint n, void *opaque)
{
	Rig *rig = opaque;

	g_mutex_lock(&rig->lock);
	for (guint i = 0; i < n; i++) {
		uint64_t token =
			pr_token_pack(block, ranges[i].offset / PAGE, ranges[i].length / PAGE);
		g_array_append_val(rig->requested, token);
	}
	g_cond_broadcast(&rig->changed);
	g_mutex_unlock(&rig->lock);
}

static void on_settled(void *opaque)
{
	Rig *rig = opaque;

	g_mutex_lock(&rig->lock);
	rig->settled++;
	g_cond_broadcast(&rig->changed);
	g_mutex_unlock(&rig->lock);
}

static void on_complete(void *opaque)
{
	g_assert_not_reached();
}

static void on_corrupt(const PrCorrupt *corrupt, void *opaque)
{
	Rig *rig = opaque;

	/* The page is still claimed here, so no other thread may read it. */
	g_assert_false(pr_ram_claim(&rig->ram->blocks[0], corrupt->page));
	g_mutex_lock(&rig->lock);
	g_array_append_val(rig->corrupt, *corrupt);
	g_mutex_unlock(&rig->lock);
}

static void on_broken(const GError *error, void *opaque)
{
	g_assert_not_reached();
}

static int rig_setup(void **state)
{
	Rig *rig = g_new0(Rig, 1);
	const PrVerifyHooks hooks = {on_request, on_settled, on_complete,
				     on_corrupt, on_broken,  rig};
	int memfd = memfd_create("ram", MFD_CLOEXEC);
	PrGuestBlock block = {
		.idstr = (char *)"ram0", .size = N_PAGES * PAGE, .page_size = PAGE, .memfd = memfd};

	g_assert_cmpint(ftruncate(memfd, N_PAGES * PAGE), ==, 0);
	rig->ram = pr_ram_new(&block, 1, PR_GUEST_DESTINATION, NULL);
	g_mutex_init(&rig->lock);
	g_cond_init(&rig->changed);
	rig->requested = g_array_new(FALSE, FALSE, sizeof(uint64_t));
	rig->corrupt = g_array_new(FALSE, FALSE, sizeof(PrCorrupt));
	rig->verify = pr_verify_start(rig->ram, -1, &hooks, NULL);
	*state = rig;
	return 0;
}

static int rig_teardown(void **state)
{
	Rig *rig = *state;
	int memfd = rig->ram->blocks[0].memfd;

	pr_verify_stop(rig->verify);
	pr_verify_free(rig->verify);
	pr_ram_free(rig->ram);
	close(memfd);
	g_array_unref(rig->requested);
	g_array_unref(rig->corrupt);
	g_mutex_clear(&rig->lock);
	g_cond_clear(&rig->changed);
	g_free(rig);
	return 0;
}

/* Waits until n ranges were requested in all. Fails if there are more. */
static void wait_requested(Rig *rig, guint n)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	g_mutex_lock(&rig->lock);
	while (rig->requested->len < n)
		assert_true(g_cond_wait_until(&rig->changed, &rig->lock, deadline));
	assert_int_equal(rig->requested->len, n);
	g_mutex_unlock(&rig->lock);
}

static uint64_t requested(Rig *rig, guint i)
{
	g_mutex_lock(&rig->lock);
	uint64_t token = g_array_index(rig->requested, uint64_t, i);
	g_mutex_unlock(&rig->lock);
	return token;
}

static void wait_settled(Rig *rig, guint n)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	g_mutex_lock(&rig->lock);
	while (rig->settled < n)
		assert_true(g_cond_wait_until(&rig->changed, &rig->lock, deadline));
	g_mutex_unlock(&rig->lock);
}

static uint64_t claim(Rig *rig, uint64_t page, uint64_t n)
{
	for (uint64_t i = page; i < page + n; i++)
		assert_true(pr_ram_claim(&rig->ram->blocks[0], i));
	return pr_token_pack(0, page, n);
}

/* Sends hashes that match no page. */
static void send_wrong_hashes(Rig *rig, uint64_t page, guint n)
{
	PrHashes hashes = {.offset = page * PAGE, .n = n};

	pr_verify_answer(rig->verify, &hashes);
}

static guint count_landed(Rig *rig)
{
	g_autoptr(GArray) tokens = g_array_new(FALSE, FALSE, sizeof(uint64_t));

	pr_verify_add_landed(rig->verify, tokens);
	return tokens->len;
}

static void a_corrupt_page_may_be_read_again_at_once(void **state)
{
	Rig *rig = *state;

	pr_verify_attach(rig->verify);
	for (guint strike = 1; strike <= PR_VERIFY_STRIKES; strike++) {
		uint64_t token = claim(rig, 7, 1);

		pr_verify_posted(rig->verify, token, /* urgent= */ TRUE);
		wait_requested(rig, strike);
		assert_int_equal(requested(rig, strike - 1), token);
		pr_verify_landed(rig->verify, token, /* rail= */ 0);
		assert_int_equal(count_landed(rig), 1);
		send_wrong_hashes(rig, 7, 1);
		wait_settled(rig, strike);
		assert_int_equal(count_landed(rig), 0);
		assert_int_equal(rig->corrupt->len, strike);
		const PrCorrupt *corrupt = &g_array_index(rig->corrupt, PrCorrupt, strike - 1);
		assert_int_equal(corrupt->page, 7);
		assert_int_equal(corrupt->strikes, strike);
	}
	assert_false(pr_bitmap_test(rig->ram->blocks[0].received, 7));
	pr_verify_detach(rig->verify);
}

/* A corrupt page is emptied. The source may then send it as a zero page. */
static void a_corrupt_page_may_become_a_zero_page(void **state)
{
	Rig *rig = *state;
	PrRamBlock *block = &rig->ram->blocks[0];
	uint64_t token = claim(rig, 7, 2);
	static const uint8_t zeros[2 * PAGE];

	pr_verify_attach(rig->verify);
	pr_verify_posted(rig->verify, token, /* urgent= */ TRUE);
	wait_requested(rig, 1);
	memset(block->host + 7 * PAGE, 0x10, 2 * PAGE);
	pr_verify_landed(rig->verify, token, /* rail= */ 0);
	send_wrong_hashes(rig, 7, 2);
	wait_settled(rig, 1);
	assert_int_equal(pr_ram_zero(rig->ram, block, 7, 2), 2);
	assert_memory_equal(block->host + 7 * PAGE, zeros, sizeof(zeros));
	pr_verify_detach(rig->verify);
}

static void landed_pages_are_kept_across_connections(void **state)
{
	Rig *rig = *state;
	uint64_t landed = claim(rig, 10, 4), lost = claim(rig, 20, 4);

	pr_verify_attach(rig->verify);
	pr_verify_posted(rig->verify, landed, FALSE);
	pr_verify_posted(rig->verify, lost, FALSE);
	wait_requested(rig, 2);
	pr_verify_landed(rig->verify, landed, 0);
	pr_verify_detach(rig->verify);
	assert_int_equal(count_landed(rig), 1);
	/* Hashes that arrive after the detach are ignored. */
	send_wrong_hashes(rig, 10, 4);
	assert_int_equal(count_landed(rig), 1);
	/* This READ belongs to another rail, whose path still works. */
	pr_verify_landed(rig->verify, lost, /* rail= */ 3);
	assert_int_equal(count_landed(rig), 2);
	pr_verify_attach(rig->verify);
	wait_requested(rig, 4);
	assert_true(requested(rig, 2) != requested(rig, 3));
	pr_verify_detach(rig->verify);
}

/*
 * Hashes for faults are requested at once. Only a few requests for the bulk pull are outstanding at
 * a time.
 */
static void hashes_for_faults_do_not_queue_behind_the_bulk(void **state)
{
	Rig *rig = *state;

	pr_verify_attach(rig->verify);
	for (guint i = 0; i < 20; i++)
		pr_verify_posted(rig->verify, claim(rig, i * 4, 4), FALSE);
	wait_requested(rig, 8);
	uint64_t fault = claim(rig, 200, 1);
	pr_verify_posted(rig->verify, fault, TRUE);
	wait_requested(rig, 9);
	assert_int_equal(requested(rig, 8), fault);
	/* Each answer lets one more request be sent. */
	send_wrong_hashes(rig, 0, 4);
	wait_requested(rig, 10);
	assert_int_equal(requested(rig, 9), pr_token_pack(0, 32, 4));
	/* No hashes are requested for a READ that was dropped. */
	pr_verify_drop(rig->verify, pr_token_pack(0, 36, 4));
	send_wrong_hashes(rig, 4, 4);
	wait_requested(rig, 11);
	assert_int_equal(requested(rig, 10), pr_token_pack(0, 40, 4));
	pr_verify_detach(rig->verify);
}

/* The bulk pull pauses while many landed READs wait for their hashes. */
static void the_bulk_pauses_when_hashes_are_late(void **state)
{
	Rig *rig = *state;
	guint held = 0;

	pr_verify_attach(rig->verify);
	for (; pr_verify_has_room(rig->verify); held++) {
		uint64_t token = claim(rig, held, 1);

		assert_true(held < N_PAGES - 1);
		pr_verify_posted(rig->verify, token, FALSE);
		pr_verify_landed(rig->verify, token, 0);
	}
	assert_true(held > 8);
	wait_requested(rig, 8);
	send_wrong_hashes(rig, 0, 1);
	assert_true(pr_verify_has_room(rig->verify));
	pr_verify_detach(rig->verify);
}

#define ON_RIG(test_) cmocka_unit_test_setup_teardown(test_, rig_setup, rig_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		ON_RIG(a_corrupt_page_may_be_read_again_at_once),
		ON_RIG(a_corrupt_page_may_become_a_zero_page),
		ON_RIG(landed_pages_are_kept_across_connections),
		ON_RIG(hashes_for_faults_do_not_queue_behind_the_bulk),
		ON_RIG(the_bulk_pauses_when_hashes_are_late),
	};

	return cmocka_run_group_tests_name("verify-ranges", tests, NULL, NULL);
}
