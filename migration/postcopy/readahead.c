/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/readahead.h"

#include <stdlib.h>
#include <string.h>

/* The streams that a fault may belong to. */
typedef struct Streams {
	PrReadaheadStream *at;
	guint n;
} Streams;

static Streams streams_of(PrReadahead *self, uint32_t tid)
{
	guint i = tid * 2654435761u >> 16 & (PR_READAHEAD_THREADS - 1);

	G_STATIC_ASSERT((PR_READAHEAD_THREADS & (PR_READAHEAD_THREADS - 1)) == 0);
	if (tid == PR_READAHEAD_NO_THREAD)
		return (Streams){self->shared, PR_READAHEAD_SHARED};
	if (self->threads[i].tid != tid) {
		memset(&self->threads[i], 0, sizeof(self->threads[i]));
		self->threads[i].tid = tid;
	}
	return (Streams){self->threads[i].streams, PR_READAHEAD_STREAMS};
}

/* Whether the page continues a regular stream: it was suggested, or is the next one behind. */
static gboolean expects(const PrReadaheadStream *stream, guint block, int64_t page)
{
	int64_t step = page - stream->last;

	if (stream->window == 0 || stream->block != block || step % stream->stride != 0)
		return FALSE;
	int64_t steps = step / stream->stride;
	return steps >= 1 && steps <= (stream->front - stream->last) / stream->stride + 1;
}

/* The nearest stream that is not more than PR_READAHEAD_STRIDE away, or NULL. */
static PrReadaheadStream *nearest(Streams streams, guint block, int64_t page)
{
	PrReadaheadStream *best = NULL;
	int64_t least = PR_READAHEAD_STRIDE + 1;

	for (guint i = 0; i < streams.n; i++) {
		PrReadaheadStream *stream = &streams.at[i];
		int64_t distance = llabs(page - stream->last);

		if (stream->used == 0 || stream->block != block || distance >= least)
			continue;
		best = stream;
		least = distance;
	}
	return best;
}

static PrReadaheadStream *oldest(Streams streams)
{
	PrReadaheadStream *best = &streams.at[0];

	for (guint i = 1; i < streams.n; i++)
		if (streams.at[i].used < best->used)
			best = &streams.at[i];
	return best;
}

/* A fault at a page that was not expected. TRUE: it makes the stream regular. */
static gboolean change_course(PrReadaheadStream *stream, int64_t page)
{
	int64_t step = page - stream->last;
	gboolean again = stream->window == 0 && step == stream->stride;

	stream->stride = step;
	stream->last = stream->front = page;
	stream->window = 0;
	return again;
}

/* Adds the fault to its stream, and returns it; NULL: the stream is not regular. */
static PrReadaheadStream *follow(Streams streams, guint block, int64_t page, guint limit,
				 uint64_t now)
{
	PrReadaheadStream *stream;

	for (guint i = 0; i < streams.n; i++) {
		stream = &streams.at[i];
		if (!expects(stream, block, page))
			continue;
		if ((page - stream->front) / stream->stride > 0)
			stream->front = page;
		stream->last = page;
		stream->window = MIN(2 * stream->window, limit);
		stream->used = now;
		return stream;
	}
	stream = nearest(streams, block, page);
	if (!stream) {
		*oldest(streams) = (PrReadaheadStream){
			.block = block, .last = page, .front = page, .used = now};
		return NULL;
	}
	stream->used = now;
	if (page == stream->last || !change_course(stream, page))
		return NULL;
	stream->window = MIN(PR_READAHEAD_START, limit);
	return stream;
}

/* Suggests the pages behind those that were suggested, to the end of the window, within the block.
 * Waits until half of the window is used up, so that READs have some length. Otherwise a thread
 * that is faster than the READs would get single pages, and fault on each. */
static void suggest(PrReadaheadStream *stream, uint64_t n_pages, PrReadaheadRun *ret)
{
	int64_t ahead = (stream->front - stream->last) / stream->stride;

	if (2 * ahead > stream->window)
		return;
	ret->block = stream->block;
	ret->stride = stream->stride;
	ret->page = (uint64_t)(stream->front + stream->stride);
	while (ahead < stream->window) {
		int64_t next = stream->front + stream->stride;

		if (next < 0 || (uint64_t)next >= n_pages)
			return;
		stream->front = next;
		ret->n++;
		ahead++;
	}
}

void pr_readahead_fault(PrReadahead *self, uint32_t tid, guint block, uint64_t page,
			uint64_t n_pages, guint limit, PrReadaheadRun *ret)
{
	*ret = (PrReadaheadRun){0};
	if (limit == 0)
		return;
	PrReadaheadStream *stream = follow(streams_of(self, tid), block, (int64_t)page,
					   MIN(limit, PR_READAHEAD_MAX), ++self->faults);
	if (stream)
		suggest(stream, n_pages, ret);
}

uint64_t pr_readahead_claim(PrReadaheadRun *plan, PrRamBlock *block, uint64_t max,
			    uint64_t *ret_page)
{
	uint64_t n = 0;

	while (plan->n > 0 && n < max) {
		uint64_t page = plan->page;
		gboolean mine = pr_ram_claim(block, page);

		if (!mine && n > 0)
			break;
		plan->page += (uint64_t)plan->stride;
		plan->n--;
		if (!mine)
			continue;
		if (n == 0 || plan->stride < 0)
			*ret_page = page;
		n++;
		if (plan->stride != 1 && plan->stride != -1)
			break;
	}
	return n;
}
