/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/bench/touch.h"

#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>

#include "tests/bench/raw-memory.h"

#define PAGE 4096u

typedef struct Toucher {
	Touch *touch;
	GThread *thread;
	GArray *pages;	/* uint32_t: the pages of its slice, in the order of the touches */
	GArray *faults; /* uint64_t: ns */
	guint64 touched;
} Toucher;

struct Touch {
	TouchConfig config; /* constant */
	Toucher *touchers;  /* each is used by its own thread until touch_finish() has joined it */
	pthread_barrier_t start;
	gint stop;	   /* atomic */
	uint64_t began_ns; /* used by the owner of the Touch alone */
};

/* The test guest leaves 2 of 16 pages as holes or zeros; these are not sent. */
static gboolean is_sent(uint64_t page)
{
	return page % 16 >= 2;
}

static void choose_pages(Toucher *toucher, guint index)
{
	const TouchConfig *config = &toucher->touch->config;
	uint64_t from = config->n_pages * index / config->n_threads;
	uint64_t to = config->n_pages * (index + 1) / config->n_threads;
	g_autoptr(GRand) random = g_rand_new_with_seed(index + 1);

	toucher->pages = g_array_new(FALSE, FALSE, sizeof(uint32_t));
	for (uint64_t page = from; page < to; page++) {
		uint32_t number = (uint32_t)page;
		if (is_sent(page))
			g_array_append_val(toucher->pages, number);
	}
	for (guint i = toucher->pages->len; i > 1; i--) {
		uint32_t *a = &g_array_index(toucher->pages, uint32_t, i - 1);
		uint32_t *b = &g_array_index(toucher->pages, uint32_t,
					     g_rand_int_range(random, 0, (gint32)i));
		uint32_t other = *a;
		*a = *b;
		*b = other;
	}
	g_assert(config->n_each <= toucher->pages->len);
	if (config->n_each)
		g_array_set_size(toucher->pages, config->n_each);
}

/* The kernel's version decides whether a fault that waited counts as major or minor. */
static long faults_so_far(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_majflt + usage.ru_minflt;
}

static void rest(guint us)
{
	struct timespec time = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000l};

	if (us > 0)
		clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL);
}

static void touch_pages(Toucher *toucher)
{
	const TouchConfig *config = &toucher->touch->config;

	for (guint i = 0; i < toucher->pages->len; i++) {
		uint64_t page = g_array_index(toucher->pages, uint32_t, i);
		long faults = faults_so_far();
		uint64_t began = raw_now_ns();

		(void)*(const volatile uint8_t *)(config->map + page * PAGE);
		uint64_t ns = raw_now_ns() - began;
		if (faults_so_far() > faults)
			g_array_append_val(toucher->faults, ns);
		toucher->touched++;
		if (g_atomic_int_get(&toucher->touch->stop))
			return;
		rest(config->rest_us);
	}
}

static gpointer toucher_thread(gpointer opaque)
{
	Toucher *toucher = opaque;

	prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul);
	pthread_barrier_wait(&toucher->touch->start);
	touch_pages(toucher);
	return NULL;
}

Touch *touch_new(const TouchConfig *config)
{
	Touch *touch = g_new0(Touch, 1);

	touch->config = *config;
	touch->touchers = g_new0(Toucher, config->n_threads);
	pthread_barrier_init(&touch->start, NULL, config->n_threads + 1);
	for (guint i = 0; i < config->n_threads; i++) {
		Toucher *toucher = &touch->touchers[i];

		toucher->touch = touch;
		choose_pages(toucher, i);
		toucher->faults =
			g_array_sized_new(FALSE, FALSE, sizeof(uint64_t), toucher->pages->len);
		toucher->thread = g_thread_new("toucher", toucher_thread, toucher);
	}
	return touch;
}

void touch_go(Touch *touch)
{
	touch->began_ns = raw_now_ns();
	pthread_barrier_wait(&touch->start);
}

void touch_finish(Touch *touch, gboolean now, TouchResult *ret)
{
	*ret = (TouchResult){.faults = g_array_new(FALSE, FALSE, sizeof(uint64_t))};
	if (now)
		g_atomic_int_set(&touch->stop, TRUE);
	for (guint i = 0; i < touch->config.n_threads; i++)
		g_thread_join(touch->touchers[i].thread);
	ret->seconds = (double)(raw_now_ns() - touch->began_ns) / 1e9;
	for (guint i = 0; i < touch->config.n_threads; i++) {
		Toucher *toucher = &touch->touchers[i];

		g_array_append_vals(ret->faults, toucher->faults->data, toucher->faults->len);
		ret->touched += toucher->touched;
		g_array_unref(toucher->faults);
		g_array_unref(toucher->pages);
	}
	pthread_barrier_destroy(&touch->start);
	g_free(touch->touchers);
	g_free(touch);
}

void touch_result_clear(TouchResult *result)
{
	g_clear_pointer(&result->faults, g_array_unref);
}

RawLatency touch_latency(const TouchResult *result)
{
	if (result->faults->len == 0)
		return (RawLatency){0};
	return raw_latency((uint64_t *)(void *)result->faults->data, result->faults->len);
}
