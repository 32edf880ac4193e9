/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preloaded into a program: limits how many more threads it can start. The number is in the first
 * four bytes of the file $THREAD_SHIM. It falls when a thread starts, and rises when a thread
 * ends.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int Create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

typedef struct Begun {
	void *(*start)(void *);
	void *arg;
} Begun;

static Create *create;
static int32_t *left; /* atomic, mapped from the file; NULL: no limit */
static pthread_key_t ending;

static void count(int by)
{
	__atomic_fetch_add(left, by, __ATOMIC_SEQ_CST);
}

static void thread_ends(void *begun)
{
	free(begun);
	count(1);
}

__attribute__((constructor)) static void open_left(void)
{
	const char *path = getenv("THREAD_SHIM");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	void *map = MAP_FAILED;

	create = (Create *)dlsym(RTLD_NEXT, "pthread_create");
	if (fd >= 0) {
		map = mmap(NULL, sizeof(*left), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
	}
	if (map != MAP_FAILED && pthread_key_create(&ending, thread_ends) == 0)
		left = map;
}

static int may_begin(void)
{
	int32_t n = __atomic_load_n(left, __ATOMIC_SEQ_CST);

	while (n > 0)
		if (__atomic_compare_exchange_n(left, &n, n - 1, 0, __ATOMIC_SEQ_CST,
						__ATOMIC_SEQ_CST))
			return 1;
	return 0;
}

static void *begin(void *opaque)
{
	Begun *begun = opaque;

	pthread_setspecific(ending, begun);
	return begun->start(begun->arg);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg)
{
	Begun *begun;
	int code;

	if (!left)
		return create(thread, attr, start, arg);
	if (!may_begin())
		return EAGAIN;
	begun = malloc(sizeof(*begun));
	if (begun)
		*begun = (Begun){start, arg};
	code = begun ? create(thread, attr, begin, begun) : EAGAIN;
	if (code) {
		free(begun);
		count(1);
	}
	return code;
}
