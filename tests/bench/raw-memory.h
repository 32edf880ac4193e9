/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Code that the files of raw.h share. */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct RawMemory {
	int fd; /* memfd */
	uint8_t *at;
	uint64_t size;
} RawMemory;

#define RAW_MEMORY_INIT ((RawMemory){.fd = -1})
/* filled: the pages are allocated and have data. */
gboolean raw_memory_init(RawMemory *memory, uint64_t size, gboolean filled, GError **error);
void raw_memory_clear(RawMemory *memory);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(RawMemory, raw_memory_clear)

uint64_t raw_now_ns(void);
/* Sets "WHAT: strerror(errno)"; returns FALSE. */
gboolean raw_errno(const char *what, GError **error);
/* Returns a non-blocking userfaultfd for minor faults of a shared mapping; or -1. */
int raw_minor_uffd(uint8_t *at, uint64_t size, GError **error);
