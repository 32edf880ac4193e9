/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/memory/state-memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/agent-proto.h"
#include "guest/process.h"
#include "migration/memory/bitmap.h"
#include "migration/core/types.h"

#define STATE_MEMFD_MAGIC   0x5053544154454d46ull /* "PSTATEMF" */
#define STATE_MEMFD_VERSION 3
#define STATE_MEMFD_ALIGN   4096
#define STATE_MEMFD_SEALS   (F_SEAL_SHRINK | F_SEAL_GROW)

#define POLL_US		    (5 * 1000) /* between two checks whether the last engine is gone */

typedef struct StateBlock {
	char idstr[PR_IDSTR_MAX + 1];
	uint64_t size, page_size, base; /* page_size: of the host pages */
	uint64_t bitmap_offset;		/* bytes, page aligned */
} StateBlock;

/* Fixed widths and no pointers, because the reader may be another build. A change has to raise
 * STATE_MEMFD_VERSION. */
typedef struct StateHead {
	uint64_t magic; /* set when the head is complete */
	uint32_t version;
	uint32_t head_bytes;
	uint64_t total_bytes;
	PrBinding binding; /* written by the engine's owner thread, read by the next engine */
	uint32_t stage;	   /* atomic */
	uint32_t paused_by_operator; /* atomic */
	uint32_t was_running;
	uint32_t n_vcpus;
	uint32_t verifies;
	uint32_t spare; /* 0 */
	uint32_t vcpus[PR_STATE_MEMFD_VCPUS_MAX];
	uint64_t zero_bytes;		    /* atomic */
	char engine[PR_PROCESS_TEXT_BYTES]; /* the process of the engine that uses it */
	uint64_t n_blocks;
	StateBlock blocks[PR_BLOCKS_MAX];
} StateHead;

struct PrStateMemfd {
	int fd;
	StateHead *head;
	gsize bytes;
};

static uint64_t align_up(uint64_t value)
{
	return (value + STATE_MEMFD_ALIGN - 1) & ~(uint64_t)(STATE_MEMFD_ALIGN - 1);
}

static uint64_t bitmap_bytes(uint64_t size)
{
	return pr_bitmap_words(size / PR_TARGET_PAGE) * sizeof(unsigned long);
}

static gboolean map(PrStateMemfd *self, gsize bytes, GError **error)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd, 0);

	if (at == MAP_FAILED) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
			    "mmap of the state memfd: %s", g_strerror(errno));
		return FALSE;
	}
	self->head = at;
	self->bytes = bytes;
	return TRUE;
}

static void note_engine(StateHead *head)
{
	g_autofree char *own = pr_process_text(getpid());

	g_strlcpy(head->engine, own, sizeof(head->engine));
}

static void fill(StateHead *head, const PrGuestBlock *blocks, guint n, uint64_t total)
{
	uint64_t at = align_up(sizeof(StateHead));

	head->version = STATE_MEMFD_VERSION;
	head->head_bytes = sizeof(StateHead);
	head->total_bytes = total;
	head->n_blocks = n;
	for (guint i = 0; i < n; i++) {
		StateBlock *block = &head->blocks[i];

		g_strlcpy(block->idstr, blocks[i].idstr, sizeof(block->idstr));
		block->size = blocks[i].size;
		block->page_size = blocks[i].page_size;
		block->base = blocks[i].base;
		block->bitmap_offset = at;
		at += align_up(bitmap_bytes(block->size));
	}
	note_engine(head);
}

PrStateMemfd *pr_state_memfd_new(const PrGuestBlock *blocks, guint n, GError **error)
{
	g_autoptr(PrStateMemfd) self = g_new0(PrStateMemfd, 1);
	uint64_t bytes = align_up(sizeof(StateHead));

	g_assert(n <= PR_BLOCKS_MAX);
	for (guint i = 0; i < n; i++)
		bytes += align_up(bitmap_bytes(blocks[i].size));
	self->fd = memfd_create(PR_AGENT_STATE_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (self->fd < 0 || ftruncate(self->fd, (off_t)bytes) < 0 ||
	    fcntl(self->fd, F_ADD_SEALS, STATE_MEMFD_SEALS) < 0) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
			    "memfd for the received bitmap: %s", g_strerror(errno));
		return NULL;
	}
	if (!map(self, bytes, error))
		return NULL;
	fill(self->head, blocks, n, bytes);
	return g_steal_pointer(&self);
}

static gboolean refuse(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);

static gboolean refuse(GError **error, const char *format, ...)
{
	g_autofree char *what = NULL;
	va_list args;

	va_start(args, format);
	what = g_strdup_vprintf(format, args);
	va_end(args);
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
		    "the state memfd that the agent keeps is not one that this engine can go on "
		    "with: %s",
		    what);
	return FALSE;
}

/* The size must be sealed: nobody may change it under the mapping. */
static gboolean check_file(int fd, uint64_t *ret_bytes, GError **error)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		return refuse(error, "fstat: %s", g_strerror(errno));
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < sizeof(StateHead))
		return refuse(error,
			      "it has %" G_GINT64_FORMAT " bytes, its head alone %" G_GSIZE_FORMAT,
			      (gint64)st.st_size, sizeof(StateHead));
	if ((fcntl(fd, F_GET_SEALS) & STATE_MEMFD_SEALS) != STATE_MEMFD_SEALS)
		return refuse(error, "its size is not sealed");
	*ret_bytes = (uint64_t)st.st_size;
	return TRUE;
}

static gboolean check_head(const StateHead *head, uint64_t bytes, GError **error)
{
	if (head->magic != STATE_MEMFD_MAGIC)
		return refuse(error, "its first bytes are 0x%" G_GINT64_MODIFIER "x", head->magic);
	if (head->version != STATE_MEMFD_VERSION || head->head_bytes != sizeof(StateHead))
		return refuse(error,
			      "its layout is version %u with a head of %u bytes, this engine's "
			      "version %u with %" G_GSIZE_FORMAT
			      "; start an engine of the version that has made it",
			      head->version, head->head_bytes, STATE_MEMFD_VERSION,
			      sizeof(StateHead));
	if (head->total_bytes != bytes)
		return refuse(error,
			      "it has %" G_GUINT64_FORMAT
			      " bytes and should have %" G_GUINT64_FORMAT,
			      bytes, head->total_bytes);
	if (head->n_blocks == 0 || head->n_blocks > PR_BLOCKS_MAX ||
	    head->n_vcpus > PR_STATE_MEMFD_VCPUS_MAX || head->stage >= PR_STATE_MEMFD_N_STAGES ||
	    !memchr(head->engine, '\0', sizeof(head->engine)))
		return refuse(error,
			      "its head makes no sense (%" G_GUINT64_FORMAT " blocks, stage %u)",
			      head->n_blocks, head->stage);
	return TRUE;
}

static gboolean check_block(const StateBlock *block, guint index, uint64_t bytes, GError **error)
{
	gboolean sound = memchr(block->idstr, '\0', sizeof(block->idstr)) &&
			 block->page_size >= STATE_MEMFD_ALIGN && block->page_size <= G_MAXUINT32 &&
			 !(block->page_size & (block->page_size - 1)) && block->size > 0 &&
			 block->size % block->page_size == 0;

	if (sound && block->bitmap_offset % STATE_MEMFD_ALIGN == 0 &&
	    block->bitmap_offset >= sizeof(StateHead) && block->bitmap_offset <= bytes &&
	    bitmap_bytes(block->size) <= bytes - block->bitmap_offset)
		return TRUE;
	return refuse(error, "RAM block %u (size %" G_GUINT64_FORMAT ") makes no sense", index,
		      block->size);
}

PrStateMemfd *pr_state_memfd_attach(int fd, GError **error)
{
	g_autoptr(PrStateMemfd) self = g_new0(PrStateMemfd, 1);
	uint64_t bytes = 0;

	self->fd = fd;
	if (!check_file(fd, &bytes, error) || !map(self, bytes, error) ||
	    !check_head(self->head, bytes, error))
		return NULL;
	for (guint i = 0; i < self->head->n_blocks; i++)
		if (!check_block(&self->head->blocks[i], i, bytes, error))
			return NULL;
	return g_steal_pointer(&self);
}

void pr_state_memfd_free(PrStateMemfd *self)
{
	if (!self)
		return;
	if (self->head)
		munmap(self->head, self->bytes);
	if (self->fd >= 0)
		close(self->fd);
	g_free(self);
}

int pr_state_memfd_fd(const PrStateMemfd *self)
{
	return self->fd;
}

gsize pr_state_memfd_bytes(const PrStateMemfd *self)
{
	return self->bytes;
}

unsigned long *pr_state_memfd_received(const PrStateMemfd *self, guint block)
{
	return (unsigned long *)((uint8_t *)self->head + self->head->blocks[block].bitmap_offset);
}

uint64_t *pr_state_memfd_zero_bytes(const PrStateMemfd *self)
{
	return &self->head->zero_bytes;
}

PrGuestBlock *pr_state_memfd_blocks(const PrStateMemfd *self, guint *ret_n)
{
	guint n = (guint)self->head->n_blocks;
	PrGuestBlock *blocks = g_new0(PrGuestBlock, n);

	for (guint i = 0; i < n; i++) {
		StateBlock *block = &self->head->blocks[i];

		blocks[i] = (PrGuestBlock){.idstr = block->idstr,
					   .size = block->size,
					   .page_size = (uint32_t)block->page_size,
					   .base = block->base,
					   .memfd = -1};
	}
	*ret_n = n;
	return blocks;
}

void pr_state_memfd_set_identity(PrStateMemfd *self, const PrBinding *binding)
{
	self->head->binding = *binding;
	__atomic_store_n(&self->head->magic, STATE_MEMFD_MAGIC, __ATOMIC_RELEASE);
}

void pr_state_memfd_identity(const PrStateMemfd *self, PrBinding *ret)
{
	*ret = self->head->binding;
}

PrStateMemfdStage pr_state_memfd_stage(const PrStateMemfd *self)
{
	return __atomic_load_n(&self->head->stage, __ATOMIC_SEQ_CST);
}

void pr_state_memfd_set_stage(PrStateMemfd *self, PrStateMemfdStage stage)
{
	__atomic_store_n(&self->head->stage, stage, __ATOMIC_SEQ_CST);
}

gboolean pr_state_memfd_paused_by_operator(const PrStateMemfd *self)
{
	return __atomic_load_n(&self->head->paused_by_operator, __ATOMIC_SEQ_CST) != 0;
}

void pr_state_memfd_set_paused_by_operator(PrStateMemfd *self, gboolean paused)
{
	__atomic_store_n(&self->head->paused_by_operator, paused != FALSE, __ATOMIC_SEQ_CST);
}

gboolean pr_state_memfd_verifies(const PrStateMemfd *self)
{
	return self->head->verifies != 0;
}

void pr_state_memfd_set_verifies(PrStateMemfd *self, gboolean verifies)
{
	self->head->verifies = verifies != FALSE;
}

gboolean pr_state_memfd_was_running(const PrStateMemfd *self)
{
	return self->head->was_running != 0;
}

void pr_state_memfd_set_was_running(PrStateMemfd *self, gboolean was_running)
{
	self->head->was_running = was_running != FALSE;
}

void pr_state_memfd_set_vcpus(PrStateMemfd *self, const uint32_t *vcpus, guint n)
{
	n = MIN(n, PR_STATE_MEMFD_VCPUS_MAX);
	if (n > 0)
		memcpy(self->head->vcpus, vcpus, n * sizeof(*vcpus));
	self->head->n_vcpus = n;
}

const uint32_t *pr_state_memfd_vcpus(const PrStateMemfd *self, guint *ret_n)
{
	*ret_n = self->head->n_vcpus;
	return self->head->vcpus;
}

gboolean pr_state_memfd_await_engine(PrStateMemfd *self, guint timeout_ms, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + timeout_ms * 1000ll;
	g_autofree char *own = pr_process_text(getpid());

	/* A former engine of this process has fenced its paths itself. */
	while (strcmp(self->head->engine, own) != 0 && pr_process_lives(self->head->engine)) {
		if (g_get_monotonic_time() > deadline) {
			g_set_error(
				error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_BUSY,
				"the engine that served this guest has not ended yet (process %s); "
				"end it first",
				self->head->engine);
			return FALSE;
		}
		g_usleep(POLL_US); /* between two checks of the condition */
	}
	note_engine(self->head);
	return TRUE;
}
