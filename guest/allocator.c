/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/allocator.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/packet.h"

#define CGROUP_BYTES 8192

typedef struct Allocator {
	int socket;
	int end_fd;		       /* owned; -1: none was given */
	int files[PR_ALLOCATOR_FILES]; /* owned; -1: none was given */
} Allocator;

typedef struct Incoming {
	PrAllocatorRequest request;
	int fd; /* owned; -1: none came */
} Incoming;

bool pr_allocator_send(int socket, const PrAllocatorRequest *request, int fd)
{
	struct iovec piece = {.iov_base = (void *)request, .iov_len = sizeof(*request)};
	PrPacket packet = {.pieces = &piece, .n_pieces = 1, .fds = &fd, .n_fds = fd >= 0};

	return pr_packet_send(socket, &packet, 0);
}

static bool receive(int socket, Incoming *in)
{
	struct iovec piece = {.iov_base = &in->request, .iov_len = sizeof(in->request)};
	PrPacket packet = {.pieces = &piece, .n_pieces = 1, .fds = &in->fd, .n_fds = 1};

	return pr_packet_receive(socket, &packet, 0) == sizeof(in->request) && !packet.cut;
}

static int allocate(int fd, uint64_t offset, uint64_t length)
{
	int code;

	do {
		code = fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) < 0 ? errno
											    : 0;
	} while (code == EINTR);
	return code;
}

/* UFFDIO_CONTINUE on a page that the file does not have fails with EFAULT, but the kernel has made
 * the page table by then. EEXIST: the file had the page, so the range was not empty. */
static int make_table(int uffd, uint64_t at, uint64_t page_size)
{
	struct uffdio_continue args = {.range = {.start = at, .len = page_size},
				       .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};

	for (;;) {
		args.mapped = 0;
		if (ioctl(uffd, UFFDIO_CONTINUE, &args) == 0)
			return EEXIST;
		if (errno != EAGAIN && errno != EINTR)
			return errno == EFAULT ? 0 : errno;
	}
}

static int make_tables(int uffd, uint64_t start, uint64_t length)
{
	uint64_t page_size = (uint64_t)sysconf(_SC_PAGESIZE), end = start + length;
	int code = 0;

	for (uint64_t at = start; at < end && !code;
	     at = (at / PR_ALLOCATOR_TABLE + 1) * PR_ALLOCATOR_TABLE)
		code = make_table(uffd, at, page_size);
	return code;
}

static int execute(int fd, const PrAllocatorRequest *request)
{
	if (fd < 0)
		return EBADF;
	if (request->op == PR_ALLOCATOR_PAGES)
		return allocate(fd, request->offset, request->length);
	return make_tables(fd, request->offset, request->length);
}

static bool execute_and_reply(const Allocator *self, const PrAllocatorRequest *request)
{
	PrAllocatorReply reply = {.id = request->id,
				  .code = execute(self->files[request->file], request)};
	ssize_t n;

	do {
		n = send(self->socket, &reply, sizeof(reply), MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	return n == (ssize_t)sizeof(reply);
}

static void replace_fd(int *at, int *fd)
{
	if (*at >= 0)
		close(*at);
	*at = *fd;
	*fd = -1;
}

static bool handle_request(Allocator *self, Incoming *in)
{
	bool wants_fd = in->request.op == PR_ALLOCATOR_FILE || in->request.op == PR_ALLOCATOR_END;

	if (in->request.file >= PR_ALLOCATOR_FILES || wants_fd != (in->fd >= 0))
		return false;
	switch (in->request.op) {
	case PR_ALLOCATOR_FILE:
		replace_fd(&self->files[in->request.file], &in->fd);
		return true;
	case PR_ALLOCATOR_END:
		replace_fd(&self->end_fd, &in->fd);
		return true;
	case PR_ALLOCATOR_PAGES:
	case PR_ALLOCATOR_TABLES:
		return execute_and_reply(self, &in->request);
	default:
		return false;
	}
}

static bool serve_request(Allocator *self)
{
	Incoming in = {.fd = -1};
	bool ok = receive(self->socket, &in) && handle_request(self, &in);

	if (in.fd >= 0)
		close(in.fd);
	return ok;
}

void pr_allocator_serve(int socket)
{
	Allocator self = {.socket = socket, .end_fd = -1};
	bool go_on = true;

	for (unsigned i = 0; i < PR_ALLOCATOR_FILES; i++)
		self.files[i] = -1;
	while (go_on) {
		struct pollfd polls[] = {{.fd = socket, .events = POLLIN},
					 {.fd = self.end_fd, .events = POLLIN}};

		/* Ended by a request, by the end of the engine, or by the descriptor that END
		 * gave. */
		if (poll(polls, 2, -1) < 0 && errno != EINTR)
			break;
		go_on = !polls[1].revents && (!polls[0].revents || serve_request(&self));
	}
	for (unsigned i = 0; i < PR_ALLOCATOR_FILES; i++) {
		if (self.files[i] >= 0)
			close(self.files[i]);
	}
	if (self.end_fd >= 0)
		close(self.end_fd);
}

/* CONTROLLERS of a line "NUMBER:CONTROLLERS:PATH" is a list with commas. */
static bool has_memory(const char *controllers, size_t length)
{
	static const char memory[] = "memory";

	for (const char *at = controllers, *end = controllers + length; at < end;) {
		const char *comma = memchr(at, ',', (size_t)(end - at));
		size_t n = (size_t)((comma ? comma : end) - at);

		if (n == sizeof(memory) - 1 && !memcmp(at, memory, n))
			return true;
		at += n + 1;
	}
	return false;
}

/* The path of such a line, if it is of the memory controller's own hierarchy (v1), or of version 2;
 * else NULL. */
static const char *path_of(const char *line, size_t length, bool v1)
{
	const char *one = memchr(line, ':', length);
	const char *two = one ? memchr(one + 1, ':', length - (size_t)(one + 1 - line)) : NULL;

	if (!two)
		return NULL;
	if (v1 ? has_memory(one + 1, (size_t)(two - one - 1)) : *line == '0' && two == one + 1)
		return two + 1;
	return NULL;
}

static bool find_path(const char *text, bool v1, char *ret, size_t bytes)
{
	for (const char *line = text; *line;) {
		size_t length = strcspn(line, "\n");
		const char *path = path_of(line, length, v1);
		size_t n = path ? length - (size_t)(path - line) : 0;

		if (path && n > 0 && n < bytes) {
			memcpy(ret, path, n);
			ret[n] = '\0';
			return true;
		}
		line += length + (line[length] == '\n');
	}
	return false;
}

bool pr_memory_cgroup(const char *text, char *ret, size_t bytes, bool *ret_v1)
{
	*ret_v1 = find_path(text, true, ret, bytes);
	return *ret_v1 || find_path(text, false, ret, bytes);
}

static bool read_cgroup(pid_t pid, char *ret, size_t bytes)
{
	char name[64], text[CGROUP_BYTES];
	size_t used = 0;
	ssize_t n;
	bool v1;
	int fd;

	snprintf(name, sizeof(name), "/proc/%d/cgroup", (int)pid);
	fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	while (used + 1 < sizeof(text) && (n = read(fd, text + used, sizeof(text) - 1 - used)) > 0)
		used += (size_t)n;
	text[used] = '\0';
	close(fd);
	return pr_memory_cgroup(text, ret, bytes, &v1);
}

bool pr_memory_cgroup_is_shared(pid_t one, pid_t other)
{
	char mine[CGROUP_BYTES], theirs[CGROUP_BYTES];

	return read_cgroup(one, mine, sizeof(mine)) && read_cgroup(other, theirs, sizeof(theirs)) &&
	       !strcmp(mine, theirs);
}
