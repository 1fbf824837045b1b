// SPDX-License-Identifier: Apache-2.0

/* Command forms makes calls in the forms that a recorder could miss or
 * misjudge: from every kind of child, from threads, through other ABIs, at a
 * task's end, after a signal, by orphans. Each form is a subcommand; each task
 * makes a call of its own that nothing else in the run makes, so that a task
 * that was missed shows.
 *
 * What runs in containers too (form "steady") makes the same calls on every
 * run: nothing in it depends on who is first.
 *
 * Static, so that it runs in an image without libraries:
 *	gcc -O1 -static -o forms forms.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

#define CHECK(x)                                                               \
	({                                                                     \
		__typeof__(x) r_ = (x);                                        \
		if (r_ == (__typeof__(x))-1)                                   \
			die(#x);                                               \
		r_;                                                            \
	})

static void join(pid_t pid)
{
	int status;

	CHECK(waitpid(pid, &status, __WALL));
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		exit(1);
}

static long int80(long nr, long a, long b, long c)
{
	long ret;

	__asm__ volatile("int $0x80"
			 : "=a"(ret)
			 : "0"(nr), "b"(a), "c"(b), "d"(c)
			 : "memory", "r8", "r9", "r10", "r11");
	return ret;
}

static void forks(char **argv)
{
	struct clone_args args = {.exit_signal = SIGCHLD};
	pid_t pid;

	pid = CHECK(syscall(SYS_fork));
	if (!pid) {
		syscall(SYS_getpgrp);
		_exit(0);
	}
	join(pid);
	pid = CHECK(vfork());
	if (!pid) {
		syscall(SYS_getsid, 0);
		_exit(0);
	}
	join(pid);
	pid = CHECK(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
	if (!pid) {
		syscall(SYS_getresuid, 0, 0, 0);
		_exit(0);
	}
	join(pid);
	pid = CHECK(syscall(SYS_clone3, &args, sizeof(args)));
	if (!pid) {
		/* And a child of the child. */
		pid = CHECK(fork());
		if (!pid) {
			syscall(SYS_getresgid, 0, 0, 0);
			_exit(0);
		}
		join(pid);
		_exit(0);
	}
	join(pid);
	/* A sibling: our parent becomes its. */
	pid = CHECK(syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0));
	if (!pid) {
		syscall(SYS_getpriority, 0, 0);
		_exit(0);
	}
}

static int ready[2];

static void *thread(void *call)
{
	syscall((long)call, -1, -1, -1);
	if (write(ready[1], "", 1) != 1)
		_exit(1);
	return NULL;
}

static pthread_t leader;

/* Goes on after the process's first thread has ended. */
static void *last(void *unused)
{
	pthread_join(leader, NULL);
	syscall(SYS_sched_getscheduler, 0);
	exit(0);
	return unused;
}

static void threads(char **argv)
{
	long calls[] = {SYS_sched_get_priority_max, SYS_sched_get_priority_min,
			SYS_sched_getparam, SYS_sched_rr_get_interval};
	pthread_t t;
	char c;

	CHECK(pipe(ready));
	for (size_t i = 0; i < sizeof(calls) / sizeof(*calls); i++)
		if (pthread_create(&t, NULL, thread, (void *)calls[i]))
			die("pthread_create");
	for (size_t i = 0; i < sizeof(calls) / sizeof(*calls); i++)
		CHECK(read(ready[0], &c, 1));
	leader = pthread_self();
	if (pthread_create(&t, NULL, last, NULL))
		die("pthread_create");
	pthread_exit(NULL); /* exit, not exit_group */
}

static volatile int alive;

/* Runs a function in a thread and waits for its end: without a call, so that
 * the calls are the same whichever of the two is faster. A pthread_join waits
 * by futex, or needn't.
 */
static void threaded(int (*run)(void *))
{
	static char stack[65536] __attribute__((aligned(16)));

	alive = 1;
	CHECK(clone(run, stack + sizeof(stack),
		    CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND |
			CLONE_THREAD | CLONE_SYSVSEM | CLONE_CHILD_CLEARTID,
		    NULL, NULL, NULL, &alive));
	while (alive) /* the kernel clears it */
		__builtin_ia32_pause();
}

/* Executes from a thread that isn't the process's first: the kernel ends the
 * others, and gives it the first's id.
 */
static void *executes(void *argv0)
{
	syscall(SYS_times, 0);
	execl("/proc/self/exe", argv0, "rusage", NULL);
	_exit(1);
}

static void threadexec(char **argv)
{
	pthread_t t;

	if (pthread_create(&t, NULL, executes, argv[0]))
		die("pthread_create");
	for (;;)
		pause();
}

static void rusage(char **argv)
{
	syscall(SYS_getrusage, 0, 0);
}

static void handler(int sig)
{
	syscall(sig == SIGUSR1 ? SYS_getitimer : SYS_alarm, 0, 0);
}

static void slurp(char *text, size_t size, pid_t pid, const char *file)
{
	char path[64];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	fd = CHECK(open(path, O_RDONLY));
	n = CHECK(read(fd, text, size - 1));
	text[n] = 0;
	close(fd);
}

/* Returns when a process sleeps in a call: not while a tracer holds it at the
 * call's entry.
 */
static void await(pid_t pid, const char *call)
{
	char text[512], *state;

	for (;; sched_yield()) {
		slurp(text, sizeof(text), pid, "syscall");
		if (strncmp(text, call, strlen(call)))
			continue;
		slurp(text, sizeof(text), pid, "stat");
		state = strrchr(text, ')');
		if (state && !strncmp(state, ") S", 3))
			return;
	}
}

static void signals(char **argv)
{
	struct sigaction act = {.sa_handler = handler};
	struct timespec second = {.tv_nsec = 300000000};
	sigset_t mask, none;
	int status;
	pid_t pid;

	CHECK(sigaction(SIGUSR1, &act, NULL));
	CHECK(sigaction(SIGUSR2, &act, NULL));
	CHECK(raise(SIGUSR1)); /* rt_sigreturn */

	/* Stopped and continued, a sleep goes on by restart_syscall. */
	pid = CHECK(fork());
	if (!pid)
		_exit(syscall(SYS_nanosleep, &second, 0) ? 1 : 0);
	await(pid, "35 ");
	CHECK(kill(pid, SIGSTOP));
	CHECK(waitpid(pid, &status, WUNTRACED));
	if (!WIFSTOPPED(status))
		exit(1);
	CHECK(kill(pid, SIGCONT));
	join(pid);

	/* Woken from rt_sigsuspend. */
	sigemptyset(&none);
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	CHECK(sigprocmask(SIG_BLOCK, &mask, NULL));
	CHECK(raise(SIGUSR2));
	sigsuspend(&none);
	CHECK(sigprocmask(SIG_UNBLOCK, &mask, NULL));

	/* Ended by a signal: in a call, and by a fault. */
	pid = CHECK(fork());
	if (!pid)
		for (;;)
			syscall(SYS_pause);
	await(pid, "34 ");
	CHECK(kill(pid, SIGKILL));
	CHECK(waitpid(pid, &status, 0));
	pid = CHECK(fork());
	if (!pid) {
		syscall(SYS_getcpu, 0, 0, 0);
		*(volatile int *)16 = 0;
	}
	CHECK(waitpid(pid, &status, 0));
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV)
		exit(1);
}

static void execs(char **argv)
{
	char *rusage[] = {argv[0], "rusage", NULL};
	char script[] = "/tmp/syslatch-forms-XXXXXX";
	int fd;
	pid_t pid;

	execv("/nonexistent", argv);
	execv("/", argv);
	execv("/dev/null", argv);
	/* Neither program nor script: ENOEXEC. */
	fd = CHECK(mkstemp(script));
	CHECK(fchmod(fd, 0700));
	CHECK(close(fd));
	execv(script, argv);
	CHECK(unlink(script));

	pid = CHECK(vfork());
	if (!pid) {
		execv("/nonexistent", rusage);
		execv("/proc/self/exe", rusage);
		_exit(1);
	}
	join(pid);
	if (posix_spawn(&pid, "/proc/self/exe", NULL, NULL, rusage, environ))
		die("posix_spawn");
	join(pid);
	pid = CHECK(fork());
	if (!pid) {
		fd = CHECK(open("/proc/self/exe", O_RDONLY));
		syscall(SYS_execveat, -1, "", rusage, environ, AT_EMPTY_PATH);
		syscall(SYS_execveat, fd, "", rusage, environ, AT_EMPTY_PATH);
		_exit(1);
	}
	join(pid);
	if (posix_spawn(&pid, "/nonexistent", NULL, NULL, rusage, environ) !=
	    ENOENT)
		exit(1);
}

/* Both ends of a process: exit ends a thread, exit_group all. */
static void ends(char **argv)
{
	pid_t pid = CHECK(fork());

	if (!pid) {
		syscall(SYS_exit, 0);
		__builtin_trap();
	}
	join(pid);
	syscall(SYS_exit, 0);
}

/* Processes that outlive their parents, the recorded command among them. */
static void orphans(char **argv)
{
	int held[2], status;
	char c;

	CHECK(pipe(held));
	CHECK(pipe(ready));
	for (int i = 0; i < 2; i++) {
		pid_t pid = CHECK(fork());

		if (pid) {
			CHECK(waitpid(pid, &status, 0));
			continue;
		}
		if (i)
			CHECK(setsid());
		if (CHECK(fork()))
			_exit(0);
		close(held[1]);
		CHECK(write(ready[1], "", 1));
		/* The end comes when everyone else has ended. */
		CHECK(read(held[0], &c, 1));
		syscall(i ? SYS_sysinfo : SYS_getgroups, 0, 0);
		_exit(0);
	}
	CHECK(read(ready[0], &c, 1));
	CHECK(read(ready[0], &c, 1));
}

static void namespaces(char **argv)
{
	pid_t pid;

	CHECK(unshare(CLONE_NEWPID | CLONE_NEWUSER));
	pid = CHECK(fork());
	if (!pid) {
		/* Process 1, which an orphan falls to. */
		pid = CHECK(fork());
		if (!pid) {
			pid = CHECK(fork());
			if (pid)
				_exit(0);
			syscall(SYS_getpgrp);
			_exit(0);
		}
		while (wait(NULL) > 0)
			;
		_exit(0);
	}
	join(pid);
}

/* Nested: a cgroup of its own below the one that the process is in. The
 * argument is where version 2 is mounted.
 */
static void nested(char **argv)
{
	char line[512], path[1024] = "";
	FILE *f = fopen("/proc/self/cgroup", "r");
	int fd;

	if (!f || !argv[2])
		exit(1);
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, "0::", 3)) {
			line[strcspn(line, "\n")] = 0;
			snprintf(path, sizeof(path), "%s%s/inner", argv[2],
				 line + 3);
		}
	fclose(f);
	CHECK(mkdir(path, 0755));
	strcat(path, "/leaf");
	CHECK(mkdir(path, 0755));
	strcat(path, "/cgroup.procs");
	fd = CHECK(open(path, O_WRONLY));
	CHECK(write(fd, "0", 1));
	syscall(SYS_getpgrp);
}

static int compat_thread(void *unused)
{
	int80(64 /* getppid */, 0, 0, 0);
	return !!unused;
}

static void abis(char **argv)
{
	pid_t pid;

	int80(20 /* getpid; 20 is writev of x86_64 */, 0, 0, 0);
	int80(13 /* time; rt_sigaction */, 0, 0, 0);
	/* ioctl by the other gate, for the arguments. */
	int80(54, -1, 0x5401, 0);
	syscall(SYS_ioctl, -1, 0x5402, 0);
	threaded(compat_thread);
	pid = CHECK(fork());
	if (!pid) {
		int80(252 /* exit_group */, 0, 0, 0);
		_exit(1);
	}
	join(pid);
	/* fork, and the child of it, by the other gate. */
	pid = int80(2, 0, 0, 0);
	if (pid < 0)
		exit(1);
	if (!pid) {
		int80(65 /* getpgrp */, 0, 0, 0);
		_exit(0);
	}
	join(pid);
	/* x32's numbers. Where the kernel hasn't that ABI it answers ENOSYS,
	 * and a filter has judged the call by then.
	 */
	syscall(0x40000000 | SYS_getpid);
	syscall(0x40000000 | 514 /* ioctl */, -1, 0x5403);
}

/* A filter of the program's own, on top. */
static void ownfilter(char **argv)
{
	struct sock_filter code[] = {
	    BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
		     offsetof(struct seccomp_data, nr)),
	    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpgrp, 0, 1),
	    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
	    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = {sizeof(code) / sizeof(*code), code};

	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog));
	syscall(SYS_getpgrp);
	syscall(SYS_times, 0);
}

/* uretprobe and uprobe (Linux 6.11, 6.18) are answered with SIGILL outside of
 * their trampolines, by older kernels with ENOSYS.
 */
static void uprobes(char **argv)
{
	int status;

	for (long nr = 335; nr <= 336; nr++) {
		pid_t pid = CHECK(fork());

		if (!pid) {
			syscall(nr);
			_exit(0);
		}
		CHECK(waitpid(pid, &status, 0));
	}
}

/* Calls through the vsyscall page, as programs from before 2012 make them. The
 * kernel emulates them, and asks seccomp about the real numbers. These can't
 * fail but by a filter.
 */
static void vsyscall(char **argv)
{
	long (*gettimeofday_)(void *, void *) = (void *)0xffffffffff600000;
	long (*time_)(long *) = (void *)0xffffffffff600400;
	long (*getcpu_)(unsigned *, unsigned *, void *) =
	    (void *)0xffffffffff600800;

	CHECK(gettimeofday_(NULL, NULL));
	CHECK(time_(NULL));
	CHECK(getcpu_(NULL, NULL, NULL));
}

static int steady_thread(void *unused)
{
	syscall(SYS_gettid);
	return !!unused;
}

/* The same calls on every run, each checked: the status tells of any denial. */
static void steady(char **argv)
{
	struct sigaction act = {.sa_handler = handler};
	struct stat st;
	char c;
	pid_t pid;
	int fd;

	CHECK(mkdir("/dev/shm/steady", 0700));
	fd = CHECK(open("/dev/shm/steady/file", O_RDWR | O_CREAT, 0600));
	CHECK(write(fd, "x", 1));
	CHECK(lseek(fd, 0, SEEK_SET));
	CHECK(read(fd, &c, 1));
	CHECK(ftruncate(fd, 4096));
	CHECK(fstat(fd, &st));
	CHECK(close(fd));
	CHECK(unlink("/dev/shm/steady/file"));
	CHECK(rmdir("/dev/shm/steady"));
	CHECK(pipe(ready));
	/* In the order that the pipe makes. */
	pid = CHECK(fork());
	if (!pid) {
		CHECK(read(ready[0], &c, 1));
		CHECK(syscall(SYS_getpgrp));
		_exit(0);
	}
	CHECK(write(ready[1], "", 1));
	join(pid);
	threaded(steady_thread);
	CHECK(sigaction(SIGUSR1, &act, NULL));
	CHECK(raise(SIGUSR1));
	pid = CHECK(vfork());
	if (!pid) {
		execl("/proc/self/exe", argv[0], "rusage", NULL);
		_exit(1);
	}
	join(pid);
	if (write(1, "steady\n", 7) != 7)
		exit(1);
}

/* Waits until a byte, or the end, comes on standard input. */
static void waits(char **argv)
{
	char c;

	if (write(1, "waits\n", 6) != 6)
		exit(1);
	CHECK(read(0, &c, 1));
}

static const struct {
	const char *name;
	void (*run)(char **argv);
} forms[] = {
    {"forks", forks},	  {"threads", threads},	  {"threadexec", threadexec},
    {"rusage", rusage},	  {"signals", signals},	  {"execs", execs},
    {"ends", ends},	  {"orphans", orphans},	  {"namespaces", namespaces},
    {"nested", nested},	  {"abis", abis},	  {"ownfilter", ownfilter},
    {"uprobes", uprobes}, {"vsyscall", vsyscall}, {"steady", steady},
    {"waits", waits},
};

int main(int argc, char **argv)
{
	for (size_t i = 0; argc > 1 && i < sizeof(forms) / sizeof(*forms); i++)
		if (!strcmp(forms[i].name, argv[1])) {
			forms[i].run(argv);
			return 0;
		}
	fprintf(stderr, "usage: %s FORM\n", argv[0]);
	return 2;
}
