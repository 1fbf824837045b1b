// SPDX-License-Identifier: Apache-2.0
//
// What filters are injected into. It takes commands on standard input, a line each,
// and ends with it. mkdir below a file that isn't there is the call that is tried: it
// fails with ENOENT, or with what a filter answers.
//
//	block KIND      a child blocks in a call, KIND; "go" ends that, and it says what it got
//	threads N       N threads and the main one; "try" has all of them try
//	tree DEPTH N    processes with N children each; "try" has all of them try
//	storm           processes that fork, end and are orphaned; "mark" has all try from then on
//	bomb [signals]  the same with as many processes as its cgroup lets it have; with
//	                SIGUSR1 for "mark" and SIGUSR2 for "stats", without commands
//	filtered WHAT   one with a filter that denies what an injection calls: errno or kill
//	apart           a thread has a filter that the others haven't
//	filters N LEN   one with N filters of LEN instructions that allow all
//	same            the main thread has the filter that denies mkdir, another one that allows all
//	heir            a thread that isn't the main one; "fork" makes a child with a filter that
//	                allows all
//	leaderless      the main thread has ended
//	vfork           its vfork child has executed nothing, until "go"
//	exec            a thread that isn't the main one executes this program, again and again
//	late WHICH      executes this program after a line of input, by a thread or by the first
//	stopped         stops itself
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what) {
	dprintf(2, "injected: %s: %s\n", what, strerror(errno));
	exit(1);
}

// line reads a command; at the end of input the process ends.
static char *line(void) {
	static char buf[256];
	size_t n = 0;
	for (;;) {
		ssize_t r = read(0, buf + n, 1);
		if (r < 0)
			die("read");
		if (r == 0)
			exit(0);
		if (buf[n] == '\n' || n == sizeof buf - 1) {
			buf[n] = 0;
			return buf;
		}
		n++;
	}
}

static int attempt(void) {
	return syscall(SYS_mkdir, "/nothing/here", 0) == 0 ? 0 : errno;
}

// with_parent ends a child with its parent, and after a while anyway.
static void with_parent(pid_t parent) {
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(300);
	if (getppid() != parent)
		_exit(0);
}

static long long ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static void nothing(int sig) { (void)sig; }

static void block(const char *kind) {
	signal(SIGUSR2, nothing);
	int p[2], q[2], lst = -1, sem = -1;
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	socklen_t len = sizeof at;
	int *word = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (pipe(p) || pipe(q) || word == MAP_FAILED)
		die("pipe");
	if (!strcmp(kind, "accept")) {
		lst = socket(AF_UNIX, SOCK_STREAM, 0);
		if (lst < 0 || bind(lst, (void *)&at, sizeof at.sun_family) || listen(lst, 1) || getsockname(lst, (void *)&at, &len))
			die("listen");
	}
	if (!strcmp(kind, "semop") && (sem = semget(IPC_PRIVATE, 1, 0600)) < 0)
		die("semget");
	sigset_t usr1;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, 0);
	pid_t self = getpid(), child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		with_parent(self);
		char c;
		long r = -2;
		struct timespec one = {1, 500000000};
		struct pollfd in = {.fd = p[0], .events = POLLIN};
		fd_set set;
		FD_ZERO(&set);
		FD_SET(p[0], &set);
		struct sembuf down = {.sem_op = -1};
		int ep = epoll_create1(0);
		struct epoll_event ev = {.events = EPOLLIN};
		epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &ev);
		pid_t grandchild = 0;
		if (!strcmp(kind, "wait4") && (grandchild = fork()) == 0) {
			with_parent(getppid());
			exit(read(p[0], &c, 1) == 1 ? 7 : 1);
		}
		int status = 0;
		long long begun = ms();
		errno = 0;
		if (!strcmp(kind, "read"))
			r = read(p[0], &c, 1);
		else if (!strcmp(kind, "futex"))
			r = syscall(SYS_futex, word, FUTEX_WAIT, 0, 0, 0, 0);
		else if (!strcmp(kind, "poll"))
			r = poll(&in, 1, -1);
		else if (!strcmp(kind, "poll-timeout"))
			r = syscall(SYS_poll, &in, 1, 1500);
		else if (!strcmp(kind, "nanosleep"))
			r = syscall(SYS_nanosleep, &one, 0);
		else if (!strcmp(kind, "accept"))
			r = accept(lst, 0, 0) >= 0 ? 0 : -1;
		else if (!strcmp(kind, "epoll_wait"))
			r = epoll_wait(ep, &ev, 1, -1);
		else if (!strcmp(kind, "wait4"))
			r = wait4(grandchild, &status, 0, 0) == grandchild ? WEXITSTATUS(status) : -1;
		else if (!strcmp(kind, "sigtimedwait"))
			r = sigwaitinfo(&usr1, 0);
		else if (!strcmp(kind, "ppoll"))
			r = ppoll(&in, 1, 0, &usr1);
		else if (!strcmp(kind, "select"))
			r = select(p[0] + 1, &set, 0, 0, 0);
		else if (!strcmp(kind, "semop"))
			r = semop(sem, &down, 1);
		int e = r < 0 ? errno : 0;
		dprintf(1, "%ld %d %lld %d\n", r, e, ms() - begun, attempt());
		exit(0);
	}
	dprintf(1, "%d\n", child);
	line();
	if (!strcmp(kind, "futex")) {
		*word = 1;
		syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, 0, 0, 0);
	} else if (!strcmp(kind, "accept")) {
		int s = socket(AF_UNIX, SOCK_STREAM, 0);
		if (connect(s, (void *)&at, len))
			die("connect");
	} else if (!strcmp(kind, "sigtimedwait")) {
		kill(child, SIGUSR1);
	} else if (!strcmp(kind, "semop")) {
		struct sembuf up = {.sem_op = 1};
		semop(sem, &up, 1);
	} else if (strcmp(kind, "poll-timeout") && strcmp(kind, "nanosleep") && write(p[1], "x", 1) != 1) {
		die("write");
	}
	int status;
	waitpid(child, &status, 0);
	if (sem >= 0)
		semctl(sem, 0, IPC_RMID);
	dprintf(1, "%d\n", status);
	line();
}

static int threads, start[2], answers[2];
static pthread_barrier_t *all;

static void barrier(int n) {
	pthread_barrierattr_t shared;
	pthread_barrierattr_init(&shared);
	pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
	all = mmap(0, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (all == MAP_FAILED || (n > 0 && pthread_barrier_init(all, &shared, n)))
		die("barrier");
}

static void *worker(void *arg) {
	(void)arg;
	char c;
	int e = 0;
	if (write(answers[1], &e, sizeof e) != sizeof e) // ready
		die("write");
	while (read(start[0], &c, 1) == 1) {
		e = attempt();
		if (write(answers[1], &e, sizeof e) != sizeof e)
			die("write");
		pthread_barrier_wait(all); // one for each
	}
	return 0;
}

// collect counts the answers of n tasks: how many EPERM, ENOENT and others.
static void collect(int n, int own) {
	int eperm = own == EPERM, enoent = own == ENOENT, other = own && !eperm && !enoent;
	while (n-- > 0) {
		int e;
		if (read(answers[0], &e, sizeof e) != sizeof e)
			die("read");
		eperm += e == EPERM;
		enoent += e == ENOENT;
		other += e != EPERM && e != ENOENT;
	}
	dprintf(1, "%d %d %d\n", eperm, enoent, other);
}

static void start_threads(int n, int others) {
	barrier(n + others);
	pthread_attr_t small;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 << 10);
	threads = n;
	for (int i = 0; i < n; i++) {
		pthread_t t;
		if ((errno = pthread_create(&t, &small, worker, 0)))
			die("pthread_create");
	}
	for (int i = 0; i < n; i++) {
		int e;
		if (read(answers[0], &e, sizeof e) != sizeof e)
			die("read");
	}
}

static void try_threads(void) {
	for (int i = 0; i < threads; i++)
		if (write(start[1], "x", 1) != 1)
			die("write");
	collect(threads, attempt());
}

static void commands(void) {
	dprintf(1, "%d\n", getpid());
	for (;;) {
		char *c = line();
		if (!strcmp(c, "try"))
			try_threads();
	}
}

static void make_tree(int depth, int width) {
	for (int i = 0; depth > 0 && i < width; i++) {
		pid_t parent = getpid(), child = fork();
		if (child < 0)
			die("fork");
		if (child)
			continue;
		with_parent(parent);
		make_tree(depth - 1, width);
		char c;
		int e = 0;
		if (write(answers[1], &e, sizeof e) != sizeof e)
			die("write");
		while (read(start[0], &c, 1) == 1) {
			e = attempt();
			if (write(answers[1], &e, sizeof e) != sizeof e)
				die("write");
			pthread_barrier_wait(all);
		}
		_exit(0);
	}
}

// The storm's counters. Each process makes at most one more than live allows, and has
// one chance in three to go on as its own child.
struct shared {
	int live, forks, mark, over, eperm, other;
	pid_t root;
} *sh;

static void storm_check(void) {
	if (!__atomic_load_n(&sh->mark, __ATOMIC_SEQ_CST))
		return;
	if (attempt() == EPERM)
		__atomic_add_fetch(&sh->eperm, 1, __ATOMIC_SEQ_CST);
	else
		__atomic_add_fetch(&sh->other, 1, __ATOMIC_SEQ_CST);
}

static int most = 60; // processes of a storm; 0: as many as there can be

// storm_fork forks in one of the ways that there are.
static pid_t storm_fork(unsigned way) {
	switch (most ? 0 : way % 3) {
	case 1: // no tracer is told
		return syscall(SYS_clone, CLONE_UNTRACED | SIGCHLD, 0, 0, 0, 0);
	case 2: // a sibling
		return syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
	}
	return fork();
}

static void storm_body(unsigned seed) {
	prctl(PR_SET_PDEATHSIG, SIGKILL); // of its parent's end; orphans live on by clearing it
	alarm(300);
	for (unsigned i = 0;; i++) {
		seed = seed * 1103515245 + 12345;
		storm_check();
		if (sh->over || kill(sh->root, 0))
			break;
		int live = __atomic_add_fetch(&sh->live, 1, __ATOMIC_SEQ_CST);
		if (most && live > most) {
			__atomic_sub_fetch(&sh->live, 1, __ATOMIC_SEQ_CST);
			while (waitpid(-1, 0, WNOHANG) > 0)
				;
			sched_yield();
			if (i > 20)
				break;
			continue;
		}
		pid_t child = storm_fork(seed >> 20);
		if (child < 0) {
			__atomic_sub_fetch(&sh->live, 1, __ATOMIC_SEQ_CST);
			while (waitpid(-1, 0, WNOHANG) > 0)
				;
			if (seed >> 17 & 1)
				break;
			continue;
		}
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, 0);
			__atomic_add_fetch(&sh->forks, 1, __ATOMIC_SEQ_CST);
			i = 0;
			seed ^= getpid();
			continue;
		}
		if ((seed >> 16 & 3) < (most ? 2 : 1))
			break; // the child goes on, orphaned
	}
	__atomic_sub_fetch(&sh->live, 1, __ATOMIC_SEQ_CST);
	_exit(0);
}

static volatile sig_atomic_t told;

static void tell(int sig) { told = sig; }

static void storm(int signals) {
	sh = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	sh->root = getpid();
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	if (signals) {
		signal(SIGUSR1, tell);
		signal(SIGUSR2, tell);
	}
	dprintf(1, "%d\n", getpid());
	char buf[64];
	for (unsigned i = 0;; i++) {
		struct pollfd in = {.fd = signals ? -1 : 0, .events = POLLIN};
		while (waitpid(-1, 0, WNOHANG) > 0)
			;
		// Whatever died out or was killed, there are always some.
		if (!sh->over && __atomic_load_n(&sh->live, __ATOMIC_SEQ_CST) < 8) {
			__atomic_add_fetch(&sh->live, 1, __ATOMIC_SEQ_CST);
			if (fork() == 0)
				storm_body(i * 7919);
		}
		int sig = told;
		told = 0;
		if (sig == SIGUSR1)
			sh->mark = 1;
		if (sig)
			dprintf(1, "%d %d %d\n", sh->forks, sh->eperm, sh->other);
		if (poll(&in, 1, 1) <= 0)
			continue;
		ssize_t n = read(0, buf, sizeof buf - 1);
		if (n <= 0) {
			sh->over = 1;
			while (waitpid(-1, 0, 0) > 0)
				;
			exit(0);
		}
		if (!strncmp(buf, "mark", 4)) {
			sh->mark = 1;
			dprintf(1, "%d\n", sh->forks);
		} else {
			dprintf(1, "%d %d %d\n", sh->forks, sh->eperm, sh->other);
		}
	}
}

static void own_filter(unsigned action, const int *calls, int n) {
	struct sock_filter code[64];
	int i = 0;
	code[i++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (int j = 0; j < n; j++) {
		code[i++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[j], 0, 1);
		code[i++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action);
	}
	code[i++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog prog = {.len = i, .filter = code};
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog))
		die("seccomp");
}

static void *apart(void *arg) {
	const int rmdir_only[] = {SYS_rmdir};
	own_filter(SECCOMP_RET_ERRNO | EACCES, rmdir_only, 1);
	return worker(arg);
}

static void *allows(void *arg) {
	own_filter(SECCOMP_RET_ALLOW, 0, 0);
	return worker(arg);
}

static void *leader(void *arg) {
	(void)arg;
	commands();
	return 0;
}

// heirs has a child that looks as if it had one filter more, when it is told.
static void *heirs(void *arg) {
	pid_t self = getpid();
	dprintf(1, "%d\n", self);
	line();
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		with_parent(self);
		allows(0);
		_exit(0);
	}
	int e;
	if (read(answers[0], &e, sizeof e) != sizeof e)
		die("read");
	threads = 1;
	return leader(arg);
}

static void *execs(void *arg) {
	(void)arg;
	char left[16];
	int n = atoi(getenv("EXECS"));
	if (n > 0) {
		snprintf(left, sizeof left, "%d", n - 1);
		setenv("EXECS", left, 1);
		execl("/proc/self/exe", "injected", "exec", (char *)0);
		die("execl");
	}
	commands();
	return 0;
}

// late prints who is to execute something, and does it when it is told.
static void *late(void *arg) {
	dprintf(1, "%d %ld\n", getpid(), syscall(SYS_gettid));
	line();
	execl("/proc/self/exe", "injected", "threads", "0", (char *)0);
	dprintf(1, "%d\n", errno);
	return arg;
}

static void *idle(void *arg) {
	(void)arg;
	for (;;)
		pause();
	return 0;
}

int main(int argc, char **argv) {
	alarm(300);
	if (argc > 1 && !strcmp(argv[1], "-n")) {
		prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
		argc--, argv++;
	}
	if (argc < 2)
		return 2;
	const char *mode = argv[1];
	if (pipe(start) || pipe(answers))
		die("pipe");
	if (!strcmp(mode, "block") && argc > 2) {
		block(argv[2]);
	} else if (!strcmp(mode, "threads") && argc > 2) {
		start_threads(atoi(argv[2]), 0);
		commands();
	} else if (!strcmp(mode, "tree") && argc > 3) {
		int depth = atoi(argv[2]), width = atoi(argv[3]), n = 0, level = 1;
		for (int i = 0; i < depth; i++)
			n += level *= width;
		barrier(n);
		make_tree(depth, width);
		for (int i = 0; i < n; i++) {
			int e;
			if (read(answers[0], &e, sizeof e) != sizeof e)
				die("read");
		}
		threads = n;
		commands();
	} else if (!strcmp(mode, "storm")) {
		storm(0);
	} else if (!strcmp(mode, "bomb")) {
		most = 0;
		storm(argc > 2);
	} else if (!strcmp(mode, "filtered") && argc > 2) {
		const int calls[] = {SYS_seccomp, SYS_prctl, SYS_mmap, SYS_munmap, SYS_mkdirat};
		own_filter(!strcmp(argv[2], "kill") ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | EACCES, calls, 5);
		commands();
	} else if (!strcmp(mode, "apart")) {
		pthread_t t;
		start_threads(2, 1);
		if ((errno = pthread_create(&t, 0, apart, 0)))
			die("pthread_create");
		int e;
		if (read(answers[0], &e, sizeof e) != sizeof e)
			die("read");
		threads = 3;
		commands();
	} else if (!strcmp(mode, "filters") && argc > 3) {
		static struct sock_filter code[BPF_MAXINSNS];
		int n = atoi(argv[3]);
		for (int i = 0; i < n - 1; i++)
			code[i] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
		code[n - 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
		struct sock_fprog prog = {.len = n, .filter = code};
		prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
		for (int i = 0; i < atoi(argv[2]); i++) {
			if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog))
				die("seccomp");
		}
		commands();
	} else if (!strcmp(mode, "same")) {
		const int calls[] = {SYS_mkdir};
		pthread_t t;
		barrier(1);
		if ((errno = pthread_create(&t, 0, allows, 0)))
			die("pthread_create");
		int e;
		if (read(answers[0], &e, sizeof e) != sizeof e)
			die("read");
		threads = 1;
		own_filter(SECCOMP_RET_ERRNO | EPERM, calls, 1);
		commands();
	} else if (!strcmp(mode, "heir")) {
		pthread_t t;
		barrier(1);
		if ((errno = pthread_create(&t, 0, heirs, 0)))
			die("pthread_create");
		idle(0);
	} else if (!strcmp(mode, "leaderless")) {
		pthread_t t;
		start_threads(3, 0);
		if ((errno = pthread_create(&t, 0, leader, 0)))
			die("pthread_create");
		pthread_exit(0);
	} else if (!strcmp(mode, "vfork")) {
		dprintf(1, "%d\n", getpid());
		pid_t child = vfork();
		if (child == 0) {
			char c;
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (read(0, &c, 1) != 1 || read(0, &c, 1) != 1 || read(0, &c, 1) != 1) // "go\n"
				_exit(1);
			execl("/proc/self/exe", "injected", "threads", "0", (char *)0);
			_exit(1);
		}
		waitpid(child, 0, 0);
	} else if (!strcmp(mode, "exec")) {
		pthread_t t;
		for (int i = 0; i < 3; i++)
			pthread_create(&t, 0, i ? idle : execs, 0);
		idle(0);
	} else if (!strcmp(mode, "late") && argc > 2) {
		pthread_t t;
		if (!strcmp(argv[2], "thread"))
			pthread_create(&t, 0, late, 0);
		else
			late(0);
		idle(0);
	} else if (!strcmp(mode, "stopped")) {
		start_threads(3, 0);
		dprintf(1, "%d\n", getpid());
		raise(SIGSTOP);
		commands();
	} else {
		return 2;
	}
	return 0;
}
