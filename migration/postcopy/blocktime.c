/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/blocktime.h"

typedef struct Slot {
	uint32_t tid; /* constant once n_slots counts it */

	uint32_t serial;  /* the writer's own */
	gboolean is_vcpu; /* constant */

	/* Atomic. The end of a wait clears since_ns, then counts in `faults`, then in blocked_ns.
	 * So a reader that reads blocked_ns first counts no wait twice and computes no mean that is
	 * too high. */
	int64_t since_ns; /* 0: the thread does not wait */
	uint64_t blocked_ns;
	uint64_t faults;
} Slot;

/* How long a condition has held, in all. Atomic, with the same rules as a slot's wait. */
typedef struct Span {
	int64_t since_ns; /* 0: it does not hold */
	uint64_t sum_ns;
} Span;

struct PrBlocktime {
	/* constant */
	guint n_vcpus;	     /* as the guest counts them */
	uint32_t *vcpu_slot; /* of each */
	guint n_vcpu_slots;  /* different threads among them */
	guint max_slots;
	guint hash_mask;

	/* the writer's own */
	uint32_t *hash;	 /* slot + 1, 0: free; open addressing */
	guint n_blocked; /* vCPUs that wait, by slots */
	guint n_others;	 /* current waits of other threads */

	Slot *slots;	       /* has its own rules */
	guint n_slots;	       /* atomic; only grows */
	Span all;	       /* all vCPUs wait */
	Span at_most;	       /* as many waits go on as there are vCPUs */
	Span other;	       /* at least one other thread waits */
	uint64_t other_faults; /* atomic */
	uint64_t other_ns;     /* atomic */
};

/* There is one writer, so a sum needs no read-modify-write. */
static void add(uint64_t *counter, uint64_t value)
{
	uint64_t old = __atomic_load_n(counter, __ATOMIC_RELAXED);

	__atomic_store_n(counter, old + value, __ATOMIC_RELEASE);
}

static uint64_t get(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

static uint64_t between(int64_t from_ns, int64_t to_ns)
{
	return to_ns > from_ns ? (uint64_t)(to_ns - from_ns) : 0;
}

/* The bucket of a thread, or a free one. */
static uint32_t *hash_bucket(const PrBlocktime *self, uint32_t tid)
{
	for (guint i = tid * 2654435761u;; i++) {
		uint32_t *bucket = &self->hash[i & self->hash_mask];

		if (*bucket == 0 || self->slots[*bucket - 1].tid == tid)
			return bucket;
	}
}

static uint32_t add_slot(PrBlocktime *self, uint32_t tid, uint32_t *bucket, gboolean is_vcpu)
{
	guint index = self->n_slots;

	self->slots[index].tid = tid;
	self->slots[index].is_vcpu = is_vcpu;
	*bucket = index + 1;
	__atomic_store_n(&self->n_slots, index + 1, __ATOMIC_RELEASE);
	return index;
}

static uint32_t slot_of(PrBlocktime *self, uint32_t tid)
{
	if (tid == 0)
		return PR_PAGE_WAIT_OTHER;
	uint32_t *bucket = hash_bucket(self, tid);
	if (*bucket)
		return *bucket - 1;
	if (self->n_vcpus > 0 || self->n_slots == self->max_slots)
		return PR_PAGE_WAIT_OTHER;
	return add_slot(self, tid, bucket, FALSE);
}

PrBlocktime *pr_blocktime_new(const uint32_t *vcpus, guint n)
{
	PrBlocktime *self = g_new0(PrBlocktime, 1);
	guint buckets = 2;

	self->n_vcpus = n;
	self->max_slots = n > 0 ? n : PR_BLOCKTIME_LEARN;
	while (buckets < 2 * self->max_slots)
		buckets *= 2;
	self->hash_mask = buckets - 1;
	self->hash = g_new0(uint32_t, buckets);
	self->slots = g_new0(Slot, self->max_slots);
	self->vcpu_slot = g_new0(uint32_t, n);
	for (guint i = 0; i < n; i++) {
		uint32_t *bucket = hash_bucket(self, vcpus[i]);

		self->vcpu_slot[i] = *bucket ? *bucket - 1 : add_slot(self, vcpus[i], bucket, TRUE);
	}
	self->n_vcpu_slots = n > 0 ? self->n_slots : 0;
	return self;
}

void pr_blocktime_free(PrBlocktime *self)
{
	if (!self)
		return;
	g_free(self->vcpu_slot);
	g_free(self->hash);
	g_free(self->slots);
	g_free(self);
}

gboolean pr_blocktime_is_other(const PrBlocktime *self, uint32_t tid)
{
	return tid == 0 || (self->n_vcpus > 0 && *hash_bucket(self, tid) == 0);
}

static void span_update(Span *span, gboolean is_so, int64_t now_ns)
{
	int64_t since_ns = __atomic_load_n(&span->since_ns, __ATOMIC_RELAXED);

	if (is_so == (since_ns != 0))
		return;
	__atomic_store_n(&span->since_ns, is_so ? now_ns : 0, __ATOMIC_RELAXED);
	if (!is_so)
		add(&span->sum_ns, between(since_ns, now_ns));
}

/* After n_blocked or n_others has changed. */
static void update_spans(PrBlocktime *self, int64_t now_ns)
{
	guint n = self->n_vcpu_slots;

	span_update(&self->other, self->n_others > 0, now_ns);
	span_update(&self->all, n > 0 && self->n_blocked == n, now_ns);
	span_update(&self->at_most, n > 0 && self->n_blocked + self->n_others >= n, now_ns);
}

static void begin(PrBlocktime *self, Slot *slot, int64_t now_ns)
{
	slot->serial++;
	__atomic_store_n(&slot->since_ns, now_ns, __ATOMIC_RELAXED);
	if (!slot->is_vcpu)
		return;
	self->n_blocked++;
	update_spans(self, now_ns);
}

static void end(PrBlocktime *self, Slot *slot, int64_t now_ns)
{
	int64_t since_ns = __atomic_load_n(&slot->since_ns, __ATOMIC_RELAXED);

	__atomic_store_n(&slot->since_ns, 0, __ATOMIC_RELAXED);
	add(&slot->faults, 1);
	add(&slot->blocked_ns, between(since_ns, now_ns));
	if (!slot->is_vcpu)
		return;
	self->n_blocked--;
	update_spans(self, now_ns);
}

static void begin_other(PrBlocktime *self, int64_t now_ns)
{
	self->n_others++;
	update_spans(self, now_ns);
}

static void end_other(PrBlocktime *self, const PrPageWait *wait, int64_t now_ns)
{
	add(&self->other_faults, 1);
	add(&self->other_ns, between(wait->since_ns, now_ns));
	/* 0: pr_blocktime_close() has ended this wait. */
	if (self->n_others == 0)
		return;
	self->n_others--;
	update_spans(self, now_ns);
}

static gboolean waits(const Slot *slot)
{
	return __atomic_load_n(&slot->since_ns, __ATOMIC_RELAXED) != 0;
}

void pr_blocktime_blocked(PrBlocktime *self, uint32_t tid, int64_t now_ns, PrPageWait *ret)
{
	uint32_t index = slot_of(self, tid);

	*ret = (PrPageWait){.since_ns = now_ns, .tid = tid, .slot = index};
	if (index == PR_PAGE_WAIT_OTHER) {
		begin_other(self, now_ns);
		return;
	}
	Slot *slot = &self->slots[index];
	if (waits(slot))
		end(self, slot, now_ns);
	begin(self, slot, now_ns);
	ret->serial = slot->serial;
}

void pr_blocktime_woken(PrBlocktime *self, const PrPageWait *wait, int64_t now_ns)
{
	if (wait->slot == PR_PAGE_WAIT_OTHER) {
		end_other(self, wait, now_ns);
		return;
	}
	Slot *slot = &self->slots[wait->slot];
	if (slot->serial == wait->serial && waits(slot))
		end(self, slot, now_ns);
}

void pr_blocktime_close(PrBlocktime *self, int64_t now_ns)
{
	for (guint i = 0; i < self->n_slots; i++)
		if (waits(&self->slots[i]))
			end(self, &self->slots[i], now_ns);
	self->n_others = 0;
	update_spans(self, now_ns);
}

/* The time blocked, with a wait that goes on. */
static uint64_t so_far(const uint64_t *blocked_ns, const int64_t *since_ns, int64_t now_ns)
{
	uint64_t ended = get(blocked_ns);
	int64_t since = __atomic_load_n(since_ns, __ATOMIC_RELAXED);

	return since ? ended + between(since, now_ns) : ended;
}

static uint64_t span_so_far(const Span *span, int64_t now_ns)
{
	return so_far(&span->sum_ns, &span->since_ns, now_ns);
}

static void read_slot(const Slot *slot, int64_t now_ns, PrThreadTime *ret)
{
	uint64_t ended_ns = get(&slot->blocked_ns), faults = get(&slot->faults);

	ret->tid = slot->tid;
	ret->faults = faults;
	ret->latency_ns = faults ? ended_ns / faults : 0;
	ret->blocked_ns = so_far(&slot->blocked_ns, &slot->since_ns, now_ns);
}

void pr_blocktime_read(const PrBlocktime *self, int64_t now_ns, PrBlocktimeInfo *ret)
{
	guint n_slots = __atomic_load_n(&self->n_slots, __ATOMIC_ACQUIRE);
	guint n = self->n_vcpus ? self->n_vcpus : n_slots;
	uint64_t ns = get(&self->other_ns), faults = get(&self->other_faults);

	*ret = (PrBlocktimeInfo){
		.vcpus_known = self->n_vcpus > 0,
		.threads = g_array_sized_new(FALSE, TRUE, sizeof(PrThreadTime), n),
		.other_faults = faults,
		.other_latency_ns = faults ? ns / faults : 0,
		.all_blocked_ns = span_so_far(&self->all, now_ns),
		.at_most_ns = span_so_far(&self->at_most, now_ns),
		.other_blocked_ns = span_so_far(&self->other, now_ns),
	};
	for (guint i = 0; i < n; i++) {
		guint slot = self->n_vcpus ? self->vcpu_slot[i] : i;
		PrThreadTime time;

		read_slot(&self->slots[slot], now_ns, &time);
		g_array_append_val(ret->threads, time);
	}
}
