/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "guest/agent/internal.h"

PrAgent *pr_agent_new(const PrAgentOps *ops, void *opaque)
{
	PrAgent *agent = calloc(1, sizeof(*agent));

	if (!agent)
		return NULL;
	if (ops)
		agent->ops = *ops;
	agent->has_ops = ops && ops->stop && ops->run && ops->save && ops->load;
	agent->opaque = opaque;
	agent->uffd = -1;
	agent->state_fd = -1;
	agent->fence_fd = -1;
	agent->allocator_fd = -1;
	agent->attached_fd = -1;
	agent->listen_fd = -1;
	agent->wake_fd = -1;
	agent->job.fd = -1;
	agent->next.fd = -1;
	for (unsigned i = 0; i < PR_AGENT_CONNS; i++)
		agent->conns[i].fd = -1;
	pthread_mutex_init(&agent->lock, NULL);
	pthread_cond_init(&agent->job_cond, NULL);
	return agent;
}

static uint32_t memfd_page_size(int memfd)
{
	struct statfs fs;

	if (fstatfs(memfd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC)
		return fs.f_bsize;
	return sysconf(_SC_PAGESIZE);
}

static bool overlaps(const AgentRegion *region, uint64_t base, uint64_t size)
{
	return region->wire.base < base + size && base < region->wire.base + region->wire.size;
}

static bool region_valid(const PrAgentRegion *region, uint32_t page_size)
{
	uint64_t base = (uintptr_t)region->base;

	return page_size && !(page_size & (page_size - 1)) && region->size &&
	       !(region->size % page_size) && !(base % page_size) &&
	       !(region->offset % page_size) && base + region->size > base &&
	       (!region->idstr || strlen(region->idstr) <= PR_AGENT_IDSTR_MAX);
}

static int insert_region(PrAgent *agent, const AgentRegion *region)
{
	int err = 0;

	pthread_mutex_lock(&agent->lock);
	for (unsigned i = 0; i < agent->n_regions; i++) {
		if (overlaps(&agent->regions[i], region->wire.base, region->wire.size))
			err = -EEXIST;
	}
	if (!err && agent->n_regions == PR_AGENT_REGIONS_MAX)
		err = -ENOSPC;
	if (!err)
		agent->regions[agent->n_regions++] = *region;
	pthread_mutex_unlock(&agent->lock);
	return err;
}

int pr_agent_add_region(PrAgent *agent, const PrAgentRegion *region)
{
	uint32_t page_size = memfd_page_size(region->memfd);
	AgentRegion copy = {.memfd = -1};
	int err;

	if (!region_valid(region, page_size) ||
	    (region->page_size && region->page_size != page_size))
		return -EINVAL;
	copy.wire.base = (uintptr_t)region->base;
	copy.wire.size = region->size;
	copy.wire.offset = region->offset;
	copy.wire.page_size = page_size;
	if (region->idstr)
		strcpy(copy.wire.idstr, region->idstr);
	copy.memfd = fcntl(region->memfd, F_DUPFD_CLOEXEC, 3);
	if (copy.memfd < 0)
		return -errno;
	err = insert_region(agent, &copy);
	if (err)
		close(copy.memfd);
	return err;
}

int pr_agent_remove_regions(PrAgent *agent, void *base, uint64_t size)
{
	unsigned kept = 0;
	int removed;

	pthread_mutex_lock(&agent->lock);
	for (unsigned i = 0; i < agent->n_regions; i++) {
		if (overlaps(&agent->regions[i], (uintptr_t)base, size))
			close(agent->regions[i].memfd);
		else
			agent->regions[kept++] = agent->regions[i];
	}
	removed = agent->n_regions - kept;
	agent->n_regions = kept;
	pthread_mutex_unlock(&agent->lock);
	return removed;
}

static void stop_listening(PrAgent *agent)
{
	struct stat now;

	if (agent->listen_fd < 0)
		return;
	agent_close_fd(&agent->listen_fd);
	if (stat(agent->addr.sun_path, &now) == 0 && now.st_ino == agent->socket_stat.st_ino &&
	    now.st_dev == agent->socket_stat.st_dev)
		unlink(agent->addr.sun_path);
}

static void end_worker(PrAgent *agent)
{
	pthread_mutex_lock(&agent->lock);
	agent->quit = true;
	/* This ends a load that waits for a page. */
	agent_uffd_disable(agent);
	pthread_cond_signal(&agent->job_cond);
	pthread_mutex_unlock(&agent->lock);
	pthread_join(agent->worker, NULL);
	agent_close_fd(&agent->job.fd);
	agent->job.op = 0;
	agent->next.op = 0;
	agent->quit = false;
}

static int start_threads(PrAgent *agent)
{
	int err = agent_thread_create(&agent->worker, agent_worker_thread, agent, "postroad-calls");

	if (err)
		return err;
	err = agent_thread_create(&agent->server, agent_server_thread, agent, "postroad-agent");
	if (err)
		end_worker(agent);
	return err;
}

int pr_agent_serve(PrAgent *agent, const char *path)
{
	int err;

	if (agent->serving)
		return -EALREADY;
	err = agent_listen(agent, path);
	if (err)
		return err;
	agent->wake_fd = eventfd(0, EFD_CLOEXEC);
	err = agent->wake_fd < 0 ? -errno : start_threads(agent);
	if (err) {
		agent_close_fd(&agent->wake_fd);
		stop_listening(agent);
		return err;
	}
	agent->serving = true;
	return 0;
}

static void stop_serving(PrAgent *agent)
{
	uint64_t one = 1;

	while (write(agent->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	pthread_join(agent->server, NULL);
	agent_allocator_end(agent);
	/* This ends a callback that waits to write. */
	agent_fence_off(agent);
	end_worker(agent);
	agent_close_fd(&agent->wake_fd);
	stop_listening(agent);
	agent->serving = false;
}

void pr_agent_free(PrAgent *agent)
{
	if (!agent)
		return;
	if (agent->serving)
		stop_serving(agent);
	agent_close_fd(&agent->state_fd);
	for (unsigned i = 0; i < agent->n_regions; i++)
		close(agent->regions[i].memfd);
	pthread_cond_destroy(&agent->job_cond);
	pthread_mutex_destroy(&agent->lock);
	free(agent);
}
