/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The worker thread calls the VMM's callbacks: stop, run, save and load, one at a time. It is not
 * the server thread, since load() may wait for a page for as long as the path is down.
 *
 * The reply to STOP says whether the guest ran at the first STOP. An engine may die after that
 * STOP, and the next engine stops the guest again to learn this.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/agent/internal.h"

static const char *op_name(uint32_t op)
{
	switch (op) {
	case PR_AGENT_STOP:
		return "stop";
	case PR_AGENT_RUN:
		return "run";
	case PR_AGENT_SAVE:
		return "save";
	default:
		return "load";
	}
}

/* The slot for a job, or NULL. An engine that gives a migration up during STOP or SAVE sends RUN at
 * once: that RUN waits in the second slot. */
static AgentJob *free_slot(PrAgent *agent, uint32_t op)
{
	bool saving = agent->job.op == PR_AGENT_STOP || agent->job.op == PR_AGENT_SAVE;

	if (!agent->job.op)
		return &agent->job;
	return saving && op == PR_AGENT_RUN && !agent->next.op ? &agent->next : NULL;
}

bool agent_worker_start(PrAgent *agent, const PrAgentRequest *request, int fd, AgentResult *result)
{
	if (!agent->has_ops) {
		agent_fail(result, PR_AGENT_UNSUPPORTED, "this agent has no %s callback",
			   op_name(request->op));
		agent_close_fd(&fd);
		return false;
	}
	pthread_mutex_lock(&agent->lock);
	AgentJob *slot = free_slot(agent, request->op);
	if (!slot) {
		agent_fail(result, PR_AGENT_BUSY,
			   "the guest is still busy with '%s'; try again when it is done",
			   op_name(agent->job.op));
		pthread_mutex_unlock(&agent->lock);
		agent_close_fd(&fd);
		return false;
	}
	*slot = (AgentJob){
		.op = request->op,
		.id = request->id,
		.serial = agent->attached_serial,
		.fd = fd,
	};
	pthread_cond_signal(&agent->job_cond);
	pthread_mutex_unlock(&agent->lock);
	return true;
}

static int do_save(PrAgent *agent, int *ret_fd)
{
	int fd = memfd_create("postroad-device-state", MFD_CLOEXEC);
	int err;

	if (fd < 0)
		return -errno;
	err = agent->ops.save(agent->opaque, fd);
	if (err)
		close(fd);
	else
		*ret_fd = fd;
	return err;
}

static int do_load(PrAgent *agent, int fd)
{
	if (lseek(fd, 0, SEEK_SET) < 0)
		return -errno;
	return agent->ops.load(agent->opaque, fd);
}

static void do_job(PrAgent *agent, const AgentJob *job, AgentResult *result, int *ret_fd)
{
	bool was_running = false;
	int err = 0;

	switch (job->op) {
	case PR_AGENT_STOP:
		err = agent->ops.stop(agent->opaque, &was_running);
		agent->stopped_running |= !err && was_running;
		result->flags = agent->stopped_running ? PR_AGENT_FLAG_WAS_RUNNING : 0;
		break;
	case PR_AGENT_RUN:
		err = agent->ops.run(agent->opaque);
		agent->stopped_running &= err != 0;
		break;
	case PR_AGENT_SAVE:
		err = do_save(agent, ret_fd);
		break;
	case PR_AGENT_LOAD:
		err = do_load(agent, job->fd);
		break;
	}
	if (err)
		agent_fail(result, PR_AGENT_FAILED, "the guest's %s failed: %s", op_name(job->op),
			   strerror(-err));
}

static void run_job(PrAgent *agent, const AgentJob *job)
{
	PrAgentRequest request = {.op = job->op, .id = job->id};
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = -1;

	do_job(agent, job, &result, &fd);
	pthread_mutex_lock(&agent->lock);
	agent_close_fd(&agent->job.fd);
	agent->job = agent->next;
	agent->next = (AgentJob){.fd = -1};
	/* The engine that asked may be gone, and another one may be attached. */
	if (agent->attached_fd >= 0 && agent->attached_serial == job->serial &&
	    !agent_reply(agent->attached_fd, &request, &result, &fd, fd >= 0))
		shutdown(agent->attached_fd, SHUT_RDWR);
	pthread_mutex_unlock(&agent->lock);
	agent_close_fd(&fd);
}

void *agent_worker_thread(void *opaque)
{
	PrAgent *agent = opaque;

	pthread_mutex_lock(&agent->lock);
	while (!agent->quit) {
		AgentJob job = agent->job;

		if (!job.op) {
			/* Ended by a job, or by pr_agent_free(). */
			pthread_cond_wait(&agent->job_cond, &agent->lock);
			continue;
		}
		pthread_mutex_unlock(&agent->lock);
		run_job(agent, &job);
		pthread_mutex_lock(&agent->lock);
	}
	pthread_mutex_unlock(&agent->lock);
	return NULL;
}
