/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The requests to an agent: memory and faults, and the VMM's callbacks. */
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/agent-call.h"
#include "guest/kinds.h"

static gboolean call_simple(PrAgentClient *client, PrAgentOp op, GError **error)
{
	g_autoptr(PrAgentAnswer) reply = pr_agent_call(client, op, -1, 1, NULL, error);

	return reply != NULL;
}

static void block_clear(gpointer data)
{
	PrGuestBlock *block = data;

	g_free(block->idstr);
	if (block->memfd >= 0)
		close(block->memfd);
}

GArray *pr_guest_blocks_new(void)
{
	GArray *blocks = g_array_new(FALSE, TRUE, sizeof(PrGuestBlock));

	g_array_set_clear_func(blocks, block_clear);
	return blocks;
}

static gboolean region_valid(const PrAgentWireRegion *region, int memfd)
{
	gint64 page = sysconf(_SC_PAGESIZE);
	struct stat st;

	return region->page_size >= page && !(region->page_size & (region->page_size - 1)) &&
	       region->size && !(region->size % region->page_size) &&
	       !(region->offset % region->page_size) && !(region->base % region->page_size) &&
	       region->offset + region->size > region->offset &&
	       region->base + region->size > region->base &&
	       memchr(region->idstr, '\0', sizeof(region->idstr)) &&
	       g_utf8_validate(region->idstr, -1, NULL) && fstat(memfd, &st) == 0 &&
	       (guint64)st.st_size >= region->offset + region->size;
}

GArray *pr_agent_client_regions(PrAgentClient *client, GError **error)
{
	g_autoptr(PrAgentAnswer) reply =
		pr_agent_call(client, PR_AGENT_REGIONS, -1, 1, NULL, error);
	g_autoptr(GArray) blocks = NULL;
	const PrAgentWireRegion *regions;

	if (!reply)
		return NULL;
	regions = (const PrAgentWireRegion *)(reply->head + 1);
	blocks = pr_guest_blocks_new();
	for (guint i = 0; i < reply->head->n_regions; i++) {
		PrGuestBlock block = {0};

		if (!region_valid(&regions[i], reply->fds[i])) {
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
				    "%s: region %u makes no sense (size %" G_GUINT64_FORMAT
				    ", page size %u, or a memfd that is too short)",
				    pr_agent_client_name(client), i, regions[i].size,
				    regions[i].page_size);
			return NULL;
		}
		block.idstr = g_strdup(regions[i].idstr);
		block.size = regions[i].size;
		block.page_size = regions[i].page_size;
		block.memfd = pr_agent_answer_take_fd(reply, i);
		block.memfd_offset = regions[i].offset;
		block.base = regions[i].base;
		g_array_append_val(blocks, block);
	}
	return g_steal_pointer(&blocks);
}

static gboolean is_known(const PrGuestBlock *region, const PrGuestBlock *known)
{
	return region->base == known->base && region->size == known->size &&
	       region->page_size == known->page_size && region->memfd >= 0 &&
	       (!*region->idstr || g_str_equal(region->idstr, known->idstr));
}

static gboolean adopt_one(GArray *regions, const PrGuestBlock *known, GArray *out)
{
	for (guint i = 0; i < regions->len; i++) {
		PrGuestBlock *region = &g_array_index(regions, PrGuestBlock, i);
		PrGuestBlock block = *region;

		if (!is_known(region, known))
			continue;
		block.idstr = g_strdup(known->idstr);
		region->memfd = -1; /* the new array owns it now */
		g_array_append_val(out, block);
		return TRUE;
	}
	return FALSE;
}

GArray *pr_agent_client_adopt(PrAgentClient *client, const PrGuestBlock *known, guint n,
			      GError **error)
{
	g_autoptr(GArray) regions = pr_agent_client_regions(client, error);
	g_autoptr(GArray) out = pr_guest_blocks_new();

	if (!regions)
		return NULL;
	for (guint i = 0; i < n; i++) {
		if (adopt_one(regions, &known[i], out))
			continue;
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "%s: RAM block '%s' (%" G_GUINT64_FORMAT
			    " bytes at 0x%" G_GINT64_MODIFIER
			    "x) of the migration that was under way is not in this process",
			    pr_agent_client_name(client), known[i].idstr, known[i].size,
			    known[i].base);
		return NULL;
	}
	return g_steal_pointer(&out);
}

gboolean pr_agent_client_choose(PrAgentClient *client, const PrGuestBlock *blocks, guint n,
				GError **error)
{
	g_autofree uint64_t *bases = g_new(uint64_t, n);
	const PrAgentPayload load = {.fd = -1, .bases = bases, .n_bases = n};
	g_autoptr(PrAgentAnswer) reply = NULL;

	for (guint i = 0; i < n; i++)
		bases[i] = blocks[i].base;
	reply = pr_agent_call_with(client, PR_AGENT_CHOOSE, &load, 1, NULL, error);
	return reply != NULL;
}

gboolean pr_agent_client_probe(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_PROBE, error);
}

static int call_for_fd(PrAgentClient *client, PrAgentOp op, GCancellable *cancel, GError **error)
{
	g_autoptr(PrAgentAnswer) reply = pr_agent_call(client, op, -1, 1, cancel, error);
	int fd;

	if (!reply)
		return -1;
	fd = pr_agent_answer_take_fd(reply, 0);
	if (fd < 0)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "%s: the answer to '%s' came without a descriptor",
			    pr_agent_client_name(client), pr_agent_op_name(op));
	return fd;
}

int pr_agent_client_uffd_enable(PrAgentClient *client, GError **error)
{
	int uffd = call_for_fd(client, PR_AGENT_UFFD_ENABLE, NULL, error);

	/* The fault mode may be on, but without a descriptor no engine can serve the faults. */
	if (uffd < 0)
		call_simple(client, PR_AGENT_UFFD_DISABLE, NULL);
	return uffd;
}

gboolean pr_agent_client_uffd_disable(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_UFFD_DISABLE, error);
}

gboolean pr_agent_client_store_state_fd(PrAgentClient *client, int memfd, GError **error)
{
	g_autoptr(PrAgentAnswer) reply =
		pr_agent_call(client, PR_AGENT_STORE_STATE, memfd, 1, NULL, error);

	return reply != NULL;
}

int pr_agent_client_fetch_state(PrAgentClient *client, GError **error)
{
	g_autoptr(PrAgentAnswer) reply =
		pr_agent_call(client, PR_AGENT_FETCH_STATE, -1, 1, NULL, error);

	return reply ? pr_agent_answer_take_fd(reply, 0) : -1;
}

int pr_agent_client_memory(PrAgentClient *client, GError **error)
{
	return call_for_fd(client, PR_AGENT_MEMORY, NULL, error);
}

int pr_agent_client_stderr(PrAgentClient *client, GError **error)
{
	g_autoptr(PrAgentAnswer) reply = pr_agent_call(client, PR_AGENT_STDERR, -1, 1, NULL, error);

	return reply ? pr_agent_answer_take_fd(reply, 0) : -1;
}

/* The kernel walks all page tables, which may take longer than one timeout for a large guest. */
gboolean pr_agent_client_fence_on(PrAgentClient *client, GError **error)
{
	g_autoptr(PrAgentAnswer) reply =
		pr_agent_call(client, PR_AGENT_FENCE_ON, -1, PR_GUEST_LOAD_TIMEOUTS, NULL, error);

	return reply != NULL;
}

gboolean pr_agent_client_fence_off(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_FENCE_OFF, error);
}

/* The VMM's callbacks */

gboolean pr_agent_client_stop(PrAgentClient *client, gboolean *ret_was_running, GError **error)
{
	g_autoptr(PrAgentAnswer) reply = pr_agent_call(client, PR_AGENT_STOP, -1, 1, NULL, error);

	if (!reply)
		return FALSE;
	*ret_was_running = (reply->head->flags & PR_AGENT_FLAG_WAS_RUNNING) != 0;
	return TRUE;
}

gboolean pr_agent_client_run(PrAgentClient *client, GError **error)
{
	return call_simple(client, PR_AGENT_RUN, error);
}

int pr_agent_client_save(PrAgentClient *client, GCancellable *cancel, GError **error)
{
	return call_for_fd(client, PR_AGENT_SAVE, cancel, error);
}

gboolean pr_agent_client_load(PrAgentClient *client, int memfd, GCancellable *cancel,
			      GError **error)
{
	g_autoptr(PrAgentAnswer) reply =
		pr_agent_call(client, PR_AGENT_LOAD, memfd, PR_GUEST_LOAD_TIMEOUTS, cancel, error);

	return reply != NULL;
}
