/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/memory/scratch.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define ALIGN 4096 /* so that pieces share no page */

struct PrScratch {
	int fd;
	char *at;
	gsize bytes, taken;
};

gsize pr_scratch_need(gsize bytes)
{
	return (MAX(bytes, 1) + ALIGN - 1) & ~(gsize)(ALIGN - 1);
}

PrScratch *pr_scratch_new(gsize bytes)
{
	PrScratch *self = g_new0(PrScratch, 1);
	int code;

	self->bytes = pr_scratch_need(bytes);
	self->fd = memfd_create("postroad-scratch", MFD_CLOEXEC);
	self->at = MAP_FAILED;
	if (self->fd >= 0 && ftruncate(self->fd, (off_t)self->bytes) == 0)
		self->at = mmap(NULL, self->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd, 0);
	if (self->at != MAP_FAILED)
		return self;
	code = errno;
	pr_scratch_free(self);
	errno = code;
	return NULL;
}

void pr_scratch_free(PrScratch *self)
{
	if (!self)
		return;
	if (self->at != MAP_FAILED)
		munmap(self->at, self->bytes);
	if (self->fd >= 0)
		close(self->fd);
	g_free(self);
}

void *pr_scratch_take(PrScratch *self, gsize bytes)
{
	char *piece = self->at + self->taken;

	self->taken += pr_scratch_need(bytes);
	g_assert(self->taken <= self->bytes);
	return piece;
}

int pr_scratch_fd(const PrScratch *self)
{
	return self->fd;
}

gsize pr_scratch_bytes(const PrScratch *self)
{
	return self->bytes;
}
