/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Injects system calls into the main thread of another program, with ptrace(2).
 *
 * The thread has to sleep in ppoll() or poll(), where QEMU's main loop waits without its lock. It
 * is then at the boundary of a system call, right behind its own syscall instruction. The injector
 * executes that instruction again, with other registers. If the helper is killed in the middle,
 * ppoll() seems to have returned something, which a main loop takes for a spurious wake-up. vCPUs
 * and other threads are not stopped.
 *
 * The injector restores the registers in the signal path, for which it interrupts the thread once
 * more. Only there the kernel decides to restart an interrupted call. An orig_rax of -1 keeps the
 * kernel from restarting an injected call. A signal that arrives is delivered with the thread's own
 * registers, and the call is tried again. Pointer arguments point to memory below the red zone of
 * the stack, whose bytes are restored.
 *
 * It injects only calls that QEMU's seccomp filters allow: socketpair, recvmsg, ioctl, close,
 * madvise.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "guest/attach/internal.h"
#include "guest/attach/crash-point.h"

#define SYSCALL_BYTES	      2	     /* length of the instruction 0f 05 */
#define SYSCALL_CODE	      0x050f /* as little-endian text */
#define USER_CODE	      0x33   /* the code segment of 64-bit programs */
#define RED_ZONE	      128
#define ERESTARTNOHAND	      514 /* linux/errno.h, which programs don't see */
#define ERESTART_RESTARTBLOCK 516
#define SYSCALL_STOP	      (SIGTRAP | 0x80)
#define CHECK_MS	      2
#define RETRY_MS	      100 /* between two stops, where the thread was not at rest */
#define WAIT_MS		      100

typedef struct user_regs_struct Registers;
_Static_assert(sizeof(Registers) <= sizeof(((AttachStop *)NULL)->registers),
	       "room for the registers");

const bool attach_has_injector = true;

typedef enum Stopped {
	STOPPED_INTERRUPTED, /* as PTRACE_INTERRUPT asked */
	STOPPED_AT_CALL,     /* at the entry or the exit of a system call */
	STOPPED_BY_SIGNAL,   /* a signal is about to be delivered */
	STOPPED_BY_JOB,	     /* SIGSTOP and its like */
	STOPPED_NOT,	     /* not in time */
	STOPPED_GONE,
} Stopped;

static long trace(const AttachStop *stop, int request, void *data)
{
	return ptrace(request, stop->target->pid, NULL, data);
}

/* SIGCHLD is blocked, so that it stays pending if it arrives between waitpid() and this wait. */
static void wait_for_child(int64_t ms)
{
	struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
	sigset_t child;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigtimedwait(&child, NULL, &time);
}

static Stopped classify(int status, int *ret_signal)
{
	*ret_signal = 0;
	if (!WIFSTOPPED(status))
		return STOPPED_GONE;
	if (WSTOPSIG(status) == SYSCALL_STOP)
		return STOPPED_AT_CALL;
	if (status >> 16 == PTRACE_EVENT_STOP)
		return WSTOPSIG(status) == SIGTRAP ? STOPPED_INTERRUPTED : STOPPED_BY_JOB;
	*ret_signal = WSTOPSIG(status);
	return STOPPED_BY_SIGNAL;
}

/* deadline 0: none, for a call that has begun and has to end. Ended by the end of the call, or of
 * the process. */
static Stopped wait_stopped(const AttachStop *stop, int64_t deadline, int *ret_signal)
{
	int status;

	for (;;) {
		pid_t pid = waitpid(stop->target->pid, &status, __WALL | WNOHANG);
		int64_t left = deadline ? deadline - attach_now() : WAIT_MS;

		if (pid > 0)
			return classify(status, ret_signal);
		if (pid < 0 && errno != EINTR)
			return STOPPED_GONE;
		if (left <= 0)
			return STOPPED_NOT;
		wait_for_child(left < WAIT_MS ? left : WAIT_MS);
	}
}

static bool peek(AttachStop *stop, uint64_t at, void *to, size_t bytes)
{
	return pread(stop->target->mem_fd, to, bytes, (off_t)at) == (ssize_t)bytes;
}

static bool poke(AttachStop *stop, uint64_t at, const void *from, size_t bytes)
{
	return pwrite(stop->target->mem_fd, from, bytes, (off_t)at) == (ssize_t)bytes;
}

/* Whether the thread sleeps in ppoll() or poll(), and the kernel would restart that call. */
static bool is_at_rest(AttachStop *stop)
{
	const Registers *registers = (const Registers *)stop->registers;
	long result = (long)registers->rax;
	uint16_t code;

	return registers->cs == USER_CODE &&
	       (registers->orig_rax == SYS_ppoll || registers->orig_rax == SYS_poll) &&
	       (result == -ERESTARTNOHAND || result == -ERESTART_RESTARTBLOCK) &&
	       peek(stop, registers->rip - SYSCALL_BYTES, &code, sizeof(code)) &&
	       code == SYSCALL_CODE;
}

static bool hold_if_at_rest(AttachStop *stop)
{
	Registers *registers = (Registers *)stop->registers;

	if (trace(stop, PTRACE_GETREGS, registers) < 0 || !is_at_rest(stop))
		return false;
	stop->scratch_at = (registers->rsp - RED_ZONE - ATTACH_SCRATCH_BYTES) & ~15ul;
	if (!peek(stop, stop->scratch_at, stop->found, sizeof(stop->found)))
		return false;
	stop->stopped = true;
	stop->touched = false;
	return true;
}

/* Delivers the signal, unless it is 0. */
static void detach(AttachStop *stop, int signal)
{
	stop->stopped = false;
	trace(stop, PTRACE_DETACH, (void *)(long)signal);
}

/* Waits until the thread has stopped. A signal that arrives before that is delivered. */
static Stopped interrupt(AttachStop *stop)
{
	Stopped how;
	int signal;

	trace(stop, PTRACE_INTERRUPT, NULL);
	for (;;) {
		how = wait_stopped(stop, stop->deadline, &signal);
		if (how == STOPPED_BY_SIGNAL)
			trace(stop, PTRACE_CONT, (void *)(long)signal);
		else if (how != STOPPED_AT_CALL)
			return how;
	}
}

/* The kernel detaches also when this helper ends. */
void attach_detach_pending(AttachTarget *target)
{
	AttachStop stop = {.target = target};
	int signal;

	if (!target->stop_pending || wait_stopped(&stop, 1, &signal) == STOPPED_NOT)
		return;
	target->stop_pending = false;
	detach(&stop, signal);
}

static bool fail_pending(AttachStop *stop)
{
	stop->target->stop_pending = true;
	return agent_fail(stop->result, PR_AGENT_FAILED,
			  "the main thread of process %d can't be stopped; it waits in the kernel",
			  (int)stop->target->pid);
}

typedef enum Attempt {
	ATTEMPT_STOPPED,
	ATTEMPT_AGAIN,
	ATTEMPT_TRACED, /* another process traces it: a debugger, or a helper that is just ending */
	ATTEMPT_FAILED,
} Attempt;

static Attempt attempt(AttachStop *stop)
{
	int pid = stop->target->pid;

	attach_detach_pending(stop->target);
	if (stop->target->stop_pending) {
		fail_pending(stop);
		return ATTEMPT_FAILED;
	}
	if (trace(stop, PTRACE_SEIZE, (void *)PTRACE_O_TRACESYSGOOD) < 0) {
		attach_fail_access(stop->target, stop->result, "stopping the main thread");
		return attach_is_traced(stop->target) ? ATTEMPT_TRACED : ATTEMPT_FAILED;
	}
	switch (interrupt(stop)) {
	case STOPPED_INTERRUPTED:
		if (hold_if_at_rest(stop))
			return ATTEMPT_STOPPED;
		detach(stop, 0);
		return ATTEMPT_AGAIN;
	case STOPPED_BY_JOB:
		detach(stop, 0);
		agent_fail(stop->result, PR_AGENT_FAILED,
			   "process %d is stopped by a signal; let it run: kill -CONT %d", pid,
			   pid);
		return ATTEMPT_FAILED;
	case STOPPED_NOT:
		fail_pending(stop);
		return ATTEMPT_FAILED;
	default:
		agent_fail(stop->result, PR_AGENT_FAILED, "process %d is gone", pid);
		return ATTEMPT_FAILED;
	}
}

/* Whether the thread seems to be in such a call. Reading this does not stop it, as an attempt
 * would. */
static bool may_be_at_rest(const AttachStop *stop)
{
	char text[256];
	long number;

	if (!attach_target_read(stop->target, "syscall", text, sizeof(text)))
		return true;
	number = text[0] >= '0' && text[0] <= '9' ? atol(text) : -1;
	return number == SYS_ppoll || number == SYS_poll;
}

/* ptrace(2) takes a pid, which may be another process's by now. The pidfd tells whether it is. */
static bool check_state(AttachStop *stop)
{
	char state = attach_target_state(stop->target);
	int pid = stop->target->pid;

	if (attach_target_gone(stop->target))
		return agent_fail(stop->result, PR_AGENT_FAILED, "process %d is gone", pid);
	if (state == 'T')
		return agent_fail(stop->result, PR_AGENT_FAILED,
				  "process %d is stopped by a signal; let it run: kill -CONT %d",
				  pid, pid);
	return true;
}

static bool stop_at_rest(AttachStop *stop)
{
	const AgentResult before = *stop->result;
	Attempt how = ATTEMPT_AGAIN;

	stop->deadline = attach_now() + ATTACH_STOP_MS;
	while ((how == ATTEMPT_AGAIN || how == ATTEMPT_TRACED) && attach_now() < stop->deadline) {
		bool tries = attach_target_state(stop->target) == 't' || may_be_at_rest(stop);

		if (!check_state(stop))
			return false;
		if (tries)
			how = attempt(stop);
		/* Between two checks of the condition. */
		if (how == ATTEMPT_AGAIN || how == ATTEMPT_TRACED)
			attach_sleep(tries ? RETRY_MS : CHECK_MS);
	}
	if (how == ATTEMPT_AGAIN)
		agent_fail(stop->result, PR_AGENT_FAILED,
			   "the main thread of process %d never slept in ppoll() within %d ms; "
			   "is it a QEMU, and does its monitor answer?",
			   (int)stop->target->pid, ATTACH_STOP_MS);
	/* A tracer that has ended meanwhile is no failure. */
	if (how == ATTEMPT_STOPPED)
		*stop->result = before;
	return how == ATTEMPT_STOPPED;
}

bool attach_stop(AttachStop *stop, AttachTarget *target, AgentResult *result)
{
	stop->target = target;
	stop->result = result;
	stop->stopped = false;
	memset(stop->scratch, 0, sizeof(stop->scratch));
	if (target->mem_fd < 0)
		target->mem_fd = attach_target_memory(target);
	if (target->mem_fd < 0)
		return attach_fail_access(target, result, "opening the memory");
	if (!stop_at_rest(stop))
		return false;
	pr_attach_crash_point(PR_ATTACH_CRASH_STOPPED);
	return true;
}

/* Restores the memory and the registers. */
static void restore(AttachStop *stop)
{
	poke(stop, stop->scratch_at, stop->found, sizeof(stop->found));
	trace(stop, PTRACE_SETREGS, stop->registers);
}

static bool begin_call(AttachStop *stop, long number, const unsigned long args[6])
{
	Registers registers = *(const Registers *)stop->registers;

	registers.rax = number;
	registers.orig_rax = -1;
	registers.rip -= SYSCALL_BYTES;
	registers.rdi = args[0];
	registers.rsi = args[1];
	registers.rdx = args[2];
	registers.r10 = args[3];
	registers.r8 = args[4];
	registers.r9 = args[5];
	if (!poke(stop, stop->scratch_at, stop->scratch, sizeof(stop->scratch)))
		return false;
	stop->touched = true;
	pr_attach_crash_point(PR_ATTACH_CRASH_SCRATCH_WRITTEN);
	if (trace(stop, PTRACE_SETREGS, &registers) < 0)
		return false;
	pr_attach_crash_point(PR_ATTACH_CRASH_REGISTERS_SET);
	return true;
}

/* Runs the thread to the next entry or exit of a call, or to an earlier stop. */
static Stopped run_on(AttachStop *stop, int *ret_signal)
{
	Stopped how;

	do {
		if (trace(stop, PTRACE_SYSCALL, NULL) < 0)
			return STOPPED_GONE;
		how = wait_stopped(stop, 0, ret_signal);
	} while (how == STOPPED_INTERRUPTED);
	return how;
}

/* If the process is still there, restores and detaches as far as possible. */
static bool fail_gone(AttachStop *stop)
{
	int code = errno, pid = stop->target->pid;

	if (attach_target_gone(stop->target)) {
		stop->stopped = false;
		return agent_fail(stop->result, PR_AGENT_FAILED, "process %d is gone", pid);
	}
	restore(stop);
	detach(stop, 0);
	return agent_fail(stop->result, PR_AGENT_FAILED,
			  "the memory or the registers of process %d can't be reached: %s", pid,
			  strerror(code));
}

static bool finish_call(AttachStop *stop, long *ret)
{
	Registers registers;
	int signal;

	pr_attach_crash_point(PR_ATTACH_CRASH_IN_CALL);
	if (run_on(stop, &signal) != STOPPED_AT_CALL ||
	    trace(stop, PTRACE_GETREGS, &registers) < 0 ||
	    !peek(stop, stop->scratch_at, stop->scratch, sizeof(stop->scratch)))
		return fail_gone(stop);
	*ret = (long)registers.rax;
	pr_attach_crash_point(PR_ATTACH_CRASH_CALL_DONE);
	return true;
}

bool attach_call(AttachStop *stop, long number, const unsigned long args[6], AttachPrepare prepare,
		 long *ret)
{
	unsigned long planned[6];
	int signal;

	for (;;) {
		memcpy(planned, args, sizeof(planned));
		/* After a detach the thread may have come to rest with another stack pointer. */
		if (prepare)
			prepare(stop, planned);
		if (!begin_call(stop, number, planned))
			return fail_gone(stop);
		switch (run_on(stop, &signal)) {
		case STOPPED_AT_CALL:
			return finish_call(stop, ret);
		case STOPPED_BY_SIGNAL:
		case STOPPED_BY_JOB:
			restore(stop);
			detach(stop, signal);
			if (!stop_at_rest(stop))
				return false;
			break;
		default:
			return fail_gone(stop);
		}
	}
}

void attach_resume(AttachStop *stop)
{
	int signal = 0;

	if (!stop->stopped)
		return;
	if (stop->touched) {
		trace(stop, PTRACE_INTERRUPT, NULL);
		trace(stop, PTRACE_CONT, NULL);
		/* Ended by the interruption, which no program can block. */
		if (wait_stopped(stop, 0, &signal) == STOPPED_GONE)
			return;
		pr_attach_crash_point(PR_ATTACH_CRASH_BEFORE_RESTORE);
		restore(stop);
		pr_attach_crash_point(PR_ATTACH_CRASH_RESTORED);
	}
	detach(stop, signal);
}
