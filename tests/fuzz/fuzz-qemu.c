/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plays QEMU for the QMP client and the checks of `qemu:` guests. The input's first byte is the
 * role for which the guest is checked. Then each line is the answer to the next command: the value
 * of "return", or arbitrary bytes after a '!'.
 */
#include <glib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/death.h"
#include "guest/qemu-blocks.h"
#include "guest/qemu-check.h"
#include "guest/qemu-load.h"
#include "guest/qemu-ram.h"
#include "guest/qemu-save.h"
#include "guest/qemu-section.h"
#include "tests/fuzz/fuzz.h"

/* Does the reader thread's work where a caller would wait for it. */
static gboolean fuzz_read_answer(GCond *cond, GMutex *lock, gint64 deadline);
#define g_cond_wait_until fuzz_read_answer
#include "guest/qmp.c"
#undef g_cond_wait_until

#define TIMEOUT_MS 1000

static struct {
	PrQmp *qmp;
	FuzzInput input;
	int qemu_fd;
	PrQemuLoad *load;
	PrQemuSave *save;
} rig;

/* Replaces guest.c, which needs the agents. */
G_DEFINE_QUARK(pr_guest_error, pr_guest_error)

/* Replaces an agent: two regions, the first one as large as the RAM of the seed "healthy". */
GArray *pr_guest_blocks_new(void)
{
	return g_array_new(FALSE, TRUE, sizeof(PrGuestBlock));
}

GArray *pr_agent_client_regions(PrAgentClient *client, GError **error)
{
	GArray *regions = pr_guest_blocks_new();
	PrGuestBlock block = {.size = 64 << 20, .page_size = 4096, .base = 0x7f0000000000};

	g_array_append_val(regions, block);
	return regions;
}

int pr_agent_client_memory(PrAgentClient *client, GError **error)
{
	return memfd_create("memory", MFD_CLOEXEC);
}

int pr_agent_client_stderr(PrAgentClient *client, GError **error)
{
	return -1;
}

gboolean pr_agent_client_is_helper(PrAgentClient *client)
{
	return FALSE;
}

gboolean pr_agent_client_choose(PrAgentClient *client, const PrGuestBlock *blocks, guint n,
				GError **error)
{
	return TRUE;
}

static gboolean fuzz_read_answer(GCond *cond, GMutex *lock, gint64 deadline)
{
	g_autofree char *line = fuzz_line(&rig.input);
	g_autofree char *text = NULL;
	char waste[4096];

	g_mutex_unlock(lock);
	while (recv(rig.qemu_fd, waste, sizeof(waste), MSG_DONTWAIT) > 0)
		;
	if (line && *line == '!')
		text = g_strconcat(line + 1, "\n", NULL);
	else if (line)
		text = g_strdup_printf("{\"return\": %s, \"id\": %u}\n", line, rig.qmp->last_id);
	if (!text)
		fail_closed(rig.qmp, "the input is at its end");
	else
		receive_bytes(rig.qmp, text, strlen(text));
	g_mutex_lock(lock);
	return TRUE;
}

static void on_event(const char *name, JsonObject *data, void *opaque)
{
	g_assert(name);
	pr_qemu_load_event(rig.load, name, data);
}

static void open_qmp(int fd)
{
	rig.qmp = g_new0(PrQmp, 1);
	rig.qmp->path = g_strdup("fuzz");
	rig.qmp->timeout_ms = TIMEOUT_MS;
	rig.qmp->socket = g_socket_new_from_fd(fd, NULL);
	g_socket_set_blocking(rig.qmp->socket, FALSE);
	rig.qmp->on_event = on_event;
	rig.qmp->calls = g_hash_table_new(NULL, NULL);
	pr_framer_init(&rig.qmp->framer, PR_FRAMER_OBJECTS);
	pr_death_init(&rig.qmp->death);
	g_mutex_init(&rig.qmp->lock);
	g_mutex_init(&rig.qmp->send_lock);
	g_cond_init(&rig.qmp->cond);
	rig.load = pr_qemu_load_new(rig.qmp, NULL, TIMEOUT_MS);
	rig.save = pr_qemu_save_new(rig.qmp, NULL);
}

/* Like pr_qmp_free(), but there is no thread. */
static void close_qmp(void)
{
	PrQmp *qmp = rig.qmp;

	pr_qemu_load_free(rig.load);
	pr_qemu_save_free(rig.save);
	g_socket_close(qmp->socket, NULL);
	g_object_unref(qmp->socket);
	g_hash_table_unref(qmp->calls);
	pr_framer_clear(&qmp->framer);
	pr_death_clear(&qmp->death);
	g_clear_error(&qmp->failure);
	g_free(qmp->shutdown);
	g_mutex_clear(&qmp->lock);
	g_mutex_clear(&qmp->send_lock);
	g_cond_clear(&qmp->cond);
	g_free(qmp->path);
	g_free(qmp);
}

static void clear_blocks(GArray *blocks)
{
	for (guint i = 0; blocks && i < blocks->len; i++)
		g_free(g_array_index(blocks, PrGuestBlock, i).idstr);
	g_clear_pointer(&blocks, g_array_unref);
}

/* PrGuestSink */
static gboolean discard(const void *data, gsize len, void *opaque, GError **error)
{
	return TRUE;
}

/* Loads the early state of a source whose QEMU differs. */
static gboolean load_early(GError **error)
{
	static const char facts[] =
		"{\"machine\": \"q35\", \"cpus\": 1, \"devices\": [], \"ram\": []}";
	g_autoptr(GByteArray) section = g_byte_array_new();

	pr_qemu_section_append(section, PR_QEMU_SECTION_FACTS, facts, strlen(facts));
	return pr_qemu_load_early(rig.load, section->data, section->len, error);
}

static void run_all_calls(PrGuestRole role)
{
	g_autoptr(GError) check_error = NULL, ram_error = NULL, state_error = NULL;
	gboolean ok = pr_qemu_check(rig.qmp, role, TRUE, &check_error);
	GArray *blocks;

	fuzz_clean_outcome(ok, check_error);
	blocks = pr_qemu_blocks(rig.qmp, NULL, &ram_error);
	fuzz_clean_outcome(blocks != NULL, ram_error);
	clear_blocks(blocks);
	if (role == PR_GUEST_DESTINATION)
		ok = load_early(&state_error) && pr_qemu_load_begin(rig.load, &state_error);
	else
		ok = pr_qemu_save_describe(rig.save, discard, NULL, &state_error) &&
		     pr_qemu_save_early(rig.save, discard, NULL, &state_error) &&
		     pr_qemu_save_state(rig.save, NULL, discard, NULL, &state_error);
	fuzz_clean_outcome(ok, state_error);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int next_fd = fuzz_next_fd();
	int fds[2];

	rig.input = (FuzzInput){data, size};
	g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
	rig.qemu_fd = fds[1];
	open_qmp(fds[0]);
	run_all_calls(fuzz_u8(&rig.input) & 1 ? PR_GUEST_DESTINATION : PR_GUEST_SOURCE);
	close_qmp();
	close(fds[1]);
	g_assert_cmpint(next_fd, ==, fuzz_next_fd());
	return 0;
}
