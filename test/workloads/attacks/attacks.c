// SPDX-License-Identifier: Apache-2.0

/* Command attacks tries to do what the phase that it runs in doesn't allow, in all
 * ways that get past a filter which is careless, and prints a line of JSON for each:
 * "done", the errno, or the signal that ended it. An attack in several steps says
 * "not tried: ERRNO" if it is stopped before the one that counts.
 *
 *	attacks run DIR PORT PHASE...	all of them in each phase, waiting until the
 *					container's own socket says that it is in it
 *	attacks forge ID		ask that socket for what it doesn't give, of
 *					another container too
 *	attacks peer PHASE...		ask the sockets of containers that share this
 *					pid namespace
 *	attacks ask PHASE		ask the own socket, as whoever may
 *	attacks api SOCKET ID		ask the daemon's socket as another user, and
 *					as root of an own user namespace
 *
 * Static, so that it runs in an image without libraries, and at addresses that 32-bit
 * calls reach:
 *	gcc -O1 -static -o attacks attacks.c
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#define PR_SYS_DISPATCH_ON 1
#endif

#define OWN_SOCKET "/run/syslatch/phase.sock"

static const char *phase = "";

static void say(const char *attack, const char *format, ...)
{
	char line[512];
	va_list args;
	int n;

	n = snprintf(line, sizeof(line),
		     "{\"phase\":\"%s\",\"attack\":\"%s\",\"result\":\"", phase,
		     attack);
	va_start(args, format);
	n += vsnprintf(line + n, sizeof(line) - n, format, args);
	va_end(args);
	n += snprintf(line + n, sizeof(line) - n, "\"}\n");
	if (write(1, line, n) != n)
		_exit(1);
}

/* An attack runs in a child and returns 0 if it has done it, or an errno. */
enum { NOT_TRIED = 128 };

static int not_tried(void)
{
	return NOT_TRIED | errno;
}

static int result(long r)
{
	return r < 0 ? errno : 0;
}

/* An attack's own file, which isn't there before. Below 4 GiB, as all is that i386
 * calls are given. */
static char made[128];
static struct sockaddr_in server = {.sin_family = AF_INET};

/* Sockets that were made in the first phase, unconnected: one for each attack. */
static int spare[32], used;

static long int80(long nr, long a, long b, long c)
{
	long ret;

	__asm__ volatile("int $0x80"
			 : "=a"(ret)
			 : "0"(nr), "b"(a), "c"(b), "d"(c)
			 : "memory", "r8", "r9", "r10", "r11");
	return (int)ret;
}

/* What the others are another way to. */
static int plain_mkdir(void)
{
	return result(syscall(SYS_mkdir, made, 0700));
}

static int plain_open(void)
{
	return result(syscall(SYS_openat, AT_FDCWD, made, O_WRONLY | O_CREAT,
			      0600));
}

static int plain_connect(void)
{
	return result(connect(spare[used], (void *)&server, sizeof(server)));
}

/* io_uring: one operation, by the kernel's own interface. */
static int ring(const struct io_uring_sqe *op)
{
	static struct io_uring_params p;
	struct io_uring_cqe *cqes;
	struct io_uring_sqe *sqes;
	char *sq, *cq;
	int fd;

	fd = syscall(SYS_io_uring_setup, 1, &p);
	if (fd < 0)
		return not_tried();
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * sizeof(uint32_t),
		  PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
	cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(*cqes),
		  PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_CQ_RING);
	sqes = mmap(NULL, p.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE,
		    MAP_SHARED, fd, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || (void *)sqes == MAP_FAILED)
		return not_tried();
	sqes[0] = *op;
	*(uint32_t *)(sq + p.sq_off.array) = 0;
	__atomic_store_n((uint32_t *)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, fd, 1, 1, IORING_ENTER_GETEVENTS, NULL,
		    0) != 1)
		return not_tried();
	cqes = (void *)(cq + p.cq_off.cqes);
	return cqes[0].res < 0 ? -cqes[0].res : 0;
}

static int io_uring_open(void)
{
	struct io_uring_sqe op = {.opcode = IORING_OP_OPENAT,
				  .fd = AT_FDCWD,
				  .addr = (uintptr_t)made,
				  .len = 0600,
				  .open_flags = O_WRONLY | O_CREAT};

	return ring(&op);
}

static int io_uring_connect(void)
{
	struct io_uring_sqe op = {.opcode = IORING_OP_CONNECT,
				  .fd = spare[used],
				  .addr = (uintptr_t)&server,
				  .off = sizeof(server)};

	return ring(&op);
}

/* Numbers of arch/x86/entry/syscalls/syscall_32.tbl. */
static int int80_result(long r)
{
	return r < 0 ? -r : 0;
}

static int int80_open(void)
{
	return int80_result(int80(5, (long)made, O_WRONLY | O_CREAT, 0600));
}

static int int80_mkdir(void)
{
	return int80_result(int80(39, (long)made, 0700, 0));
}

static int int80_connect(void)
{
	return int80_result(
		int80(362, spare[used], (long)&server, sizeof(server)));
}

static int int80_socketcall(void)
{
	static uint32_t args[3];

	args[0] = spare[used];
	args[1] = (uintptr_t)&server;
	args[2] = sizeof(server);
	return int80_result(int80(102, 3 /* SYS_CONNECT */, (long)args, 0));
}

enum { X32 = 0x40000000 };

static int x32_mkdir(void)
{
	return result(syscall(X32 | SYS_mkdir, made, 0700));
}

static int x32_open(void)
{
	return result(syscall(X32 | SYS_openat, AT_FDCWD, made,
			      O_WRONLY | O_CREAT, 0600));
}

static int openat2_(void)
{
	static struct open_how how = {.flags = O_WRONLY | O_CREAT,
				      .mode = 0600};

	return result(
		syscall(SYS_openat2, AT_FDCWD, made, &how, sizeof(how)));
}

static int join(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, __WALL) != pid || !WIFEXITED(status))
		return NOT_TRIED | EINTR;
	return WEXITSTATUS(status);
}

static int clone3_user(void)
{
	static struct clone_args args = {.flags = CLONE_NEWUSER,
					 .exit_signal = SIGCHLD};
	long pid = syscall(SYS_clone3, &args, sizeof(args));

	if (!pid)
		_exit(0);
	return pid < 0 ? errno : join(pid);
}

static int clone_user(void)
{
	long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);

	if (!pid)
		_exit(0);
	return pid < 0 ? errno : join(pid);
}

/* Filters of one's own: ACTION for NR, and all else is allowed. */
static int filter(int nr, unsigned int action, unsigned int flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
			 offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = {sizeof(code) / sizeof(*code), code};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -1;
	if (!flags) /* prctl is in more phases than seccomp is */
		return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog);
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &prog);
}

/* A listener of one's own, which lets everything go on. */
static int own_listener(void)
{
	static struct seccomp_notif asked;
	static struct seccomp_notif_resp answer;
	int fd = filter(SYS_mkdir, SECCOMP_RET_USER_NOTIF,
			SECCOMP_FILTER_FLAG_NEW_LISTENER);
	pid_t pid;

	if (fd < 0)
		return not_tried();
	pid = fork();
	if (!pid)
		_exit(plain_mkdir());
	if (ioctl(fd, SECCOMP_IOCTL_NOTIF_RECV, &asked))
		return not_tried();
	answer.id = asked.id;
	answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
	if (ioctl(fd, SECCOMP_IOCTL_NOTIF_SEND, &answer))
		return not_tried();
	return join(pid);
}

/* The last filter of those with the same action decides. */
static int own_notify(void)
{
	if (filter(SYS_mkdir, SECCOMP_RET_USER_NOTIF, 0))
		return not_tried();
	return plain_mkdir();
}

static int own_allow(void)
{
	if (filter(SYS_mkdir, SECCOMP_RET_ALLOW, 0))
		return not_tried();
	return plain_mkdir();
}

/* Calls that the kernel hands to a signal handler before filters see them. */
static volatile char selector;
static volatile int dispatched;

static void handler(int sig)
{
	(void)sig;
	selector = 0; /* SYSCALL_DISPATCH_FILTER_ALLOW */
	dispatched = plain_mkdir();
}

static int user_dispatch(void)
{
	signal(SIGSYS, handler);
	if (prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0, 0,
		  &selector))
		return not_tried();
	selector = 1; /* SYSCALL_DISPATCH_FILTER_BLOCK */
	syscall(SYS_getppid);
	return dispatched;
}

/* A tracer changes the number of a call: when the task is about to make it, and when a
 * filter says so (the number is looked at again after both). */
static int renumber(int event)
{
	struct user_regs_struct regs;
	int status, stop = SIGTRAP | 0x80;
	pid_t pid = fork();

	if (!pid) {
		if (ptrace(PTRACE_TRACEME, 0, 0, 0))
			_exit(not_tried());
		if (event && filter(SYS_getppid, SECCOMP_RET_TRACE, 0))
			_exit(not_tried());
		raise(SIGSTOP);
		_exit(result(syscall(SYS_getppid)));
	}
	if (waitpid(pid, &status, 0) != pid)
		return not_tried();
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	if (ptrace(PTRACE_SETOPTIONS, pid, 0,
		   PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD |
			   PTRACE_O_TRACESECCOMP))
		return not_tried();
	if (event)
		stop = SIGTRAP | PTRACE_EVENT_SECCOMP << 8;
	for (;;) {
		if (ptrace(event ? PTRACE_CONT : PTRACE_SYSCALL, pid, 0, 0) ||
		    waitpid(pid, &status, 0) != pid)
			return not_tried();
		if (WIFEXITED(status))
			return WEXITSTATUS(status);
		if (status >> 8 != stop)
			continue;
		if (ptrace(PTRACE_GETREGS, pid, 0, &regs))
			return not_tried();
		if (regs.orig_rax != SYS_getppid)
			continue;
		regs.orig_rax = SYS_mkdir;
		regs.rdi = (uintptr_t)made;
		regs.rsi = 0700;
		if (ptrace(PTRACE_SETREGS, pid, 0, &regs))
			return not_tried();
	}
}

static int ptrace_number(void)
{
	return renumber(0);
}

static int ptrace_event(void)
{
	return renumber(1);
}

/* Another process's memory and descriptors. Their owner ends with what is there. */
static volatile int poked;
static int go[2];
enum { POKED = 42 };

static pid_t victim(void)
{
	pid_t pid;
	char c;

	if (pipe(go))
		return -1;
	pid = fork();
	if (!pid) {
		close(go[1]);
		while (read(go[0], &c, 1) > 0)
			;
		_exit(poked);
	}
	return pid;
}

static int poked_in(pid_t pid)
{
	close(go[1]);
	return join(pid) == POKED ? 0 : NOT_TRIED;
}

static int write_memory(void)
{
	static int value = POKED;
	struct iovec from = {&value, sizeof(value)};
	struct iovec to = {(void *)&poked, sizeof(poked)};
	pid_t pid = victim();

	if (syscall(SYS_process_vm_writev, pid, &from, 1, &to, 1, 0) < 0)
		return errno;
	return poked_in(pid);
}

static int write_proc_mem(void)
{
	int fd, value = POKED;
	pid_t pid = victim();
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDWR);
	if (fd < 0 ||
	    pwrite(fd, &value, sizeof(value), (uintptr_t)&poked) < 0)
		return errno;
	return poked_in(pid);
}

static int take_descriptor(void)
{
	pid_t pid = victim();
	int fd = syscall(SYS_pidfd_open, pid, 0);

	if (fd < 0)
		return not_tried();
	return result(syscall(SYS_pidfd_getfd, fd, go[0], 0));
}

/* Another program, which is in the same phase. */
static int exec_self(int fd)
{
	char *argv[] = {"attacks", "mkdir", made, NULL};
	char *envp[] = {NULL};

	syscall(SYS_execveat, fd, "", argv, envp, AT_EMPTY_PATH);
	return not_tried();
}

static int exec_by_descriptor(void)
{
	int fd = open("/proc/self/exe", O_RDONLY);

	return fd < 0 ? not_tried() : exec_self(fd);
}

static int exec_memory(void)
{
	int from = open("/proc/self/exe", O_RDONLY);
	int fd = syscall(SYS_memfd_create, "attacks", 1 /* MFD_CLOEXEC */);
	static char buf[65536];
	ssize_t n;

	if (from < 0 || fd < 0)
		return not_tried();
	while ((n = read(from, buf, sizeof(buf))) > 0)
		if (write(fd, buf, n) != n)
			return not_tried();
	return exec_self(fd);
}

/* Namespaces, where there are capabilities for everybody. */
static int mount_in_namespace(void)
{
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS))
		return not_tried();
	return result(mount("none", "/tmp", "tmpfs", 0, NULL));
}

static int enter_namespace(void)
{
	int fd;

	if (unshare(CLONE_NEWUSER | CLONE_NEWIPC))
		return not_tried();
	fd = open("/proc/self/ns/ipc", O_RDONLY);
	return fd < 0 ? not_tried() : result(setns(fd, 0));
}

/* Out of the cgroup by which a barrier finds its tasks. */
static int leave_cgroup(void)
{
	const char *trees[] = {"/sys/fs/cgroup/cgroup.procs",
			       "/sys/fs/cgroup/unified/cgroup.procs",
			       "/sys/fs/cgroup/pids/cgroup.procs"};

	for (size_t i = 0; i < sizeof(trees) / sizeof(*trees); i++) {
		int fd = open(trees[i], O_WRONLY);

		if (fd >= 0)
			return result(write(fd, "0", 1));
		if (errno != ENOENT)
			return errno;
	}
	return not_tried();
}

/* The socket is the daemon's to make. */
static int replace_socket(void)
{
	return result(syscall(SYS_unlink, OWN_SOCKET));
}

static const struct attack {
	const char *name;
	int (*run)(void);
	int makes; /* it is done if its file is there, and not otherwise */
} attacks[] = {
	{"mkdir", plain_mkdir, 1},
	{"open", plain_open, 1},
	{"connect", plain_connect, 0},
	{"io_uring_open", io_uring_open, 1},
	{"io_uring_connect", io_uring_connect, 0},
	{"int80_open", int80_open, 1},
	{"int80_mkdir", int80_mkdir, 1},
	{"int80_connect", int80_connect, 0},
	{"int80_socketcall", int80_socketcall, 0},
	{"x32_mkdir", x32_mkdir, 1},
	{"x32_open", x32_open, 1},
	{"openat2", openat2_, 1},
	{"clone3_user", clone3_user, 0},
	{"clone_user", clone_user, 0},
	{"own_listener", own_listener, 1},
	{"own_notify", own_notify, 1},
	{"own_allow", own_allow, 1},
	{"user_dispatch", user_dispatch, 1},
	{"ptrace_number", ptrace_number, 1},
	{"ptrace_event", ptrace_event, 1},
	{"write_memory", write_memory, 0},
	{"write_proc_mem", write_proc_mem, 0},
	{"take_descriptor", take_descriptor, 0},
	{"exec_by_descriptor", exec_by_descriptor, 1},
	{"exec_memory", exec_memory, 1},
	{"mount_in_namespace", mount_in_namespace, 0},
	{"enter_namespace", enter_namespace, 0},
	{"leave_cgroup", leave_cgroup, 0},
	{"replace_socket", replace_socket, 0},
};

enum { ATTACKS = sizeof(attacks) / sizeof(*attacks) };

static void try(const struct attack *a)
{
	int status, code;
	pid_t pid = fork();

	if (!pid)
		_exit(a->run());
	if (pid < 0 || waitpid(pid, &status, 0) != pid) {
		say(a->name, "not tried: %s", strerrorname_np(errno));
		return;
	}
	code = WEXITSTATUS(status);
	if (a->makes && !access(made, F_OK))
		say(a->name, "done");
	else if (WIFSIGNALED(status))
		say(a->name, "SIG%s", sigabbrev_np(WTERMSIG(status)));
	else if (!code)
		say(a->name, a->makes ? "nothing" : "done");
	else if (code & NOT_TRIED)
		say(a->name, "not tried: %s",
		    strerrorname_np(code & ~NOT_TRIED));
	else
		say(a->name, "%s", strerrorname_np(code));
}

static int dial(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
	if (fd < 0 || connect(fd, (void *)&a, sizeof(a))) {
		int failed = errno;

		if (fd >= 0)
			close(fd);
		errno = failed;
		return -1;
	}
	return fd;
}

static void send_all(int fd, const char *data, size_t n)
{
	while (n) {
		ssize_t sent = send(fd, data, n, MSG_NOSIGNAL);

		if (sent < 0)
			return; /* the answer tells */
		data += sent;
		n -= sent;
	}
}

/* One answer on a connection that stays open: its status, and what it says. */
static int exchange(int fd, const char *request, char *answer, size_t size)
{
	size_t n = 0;

	/* write and read are in every phase, send and recv aren't. */
	if (write(fd, request, strlen(request)) < 0)
		return -errno;
	for (;;) {
		char *body, *length;
		ssize_t got = read(fd, answer + n, size - 1 - n);

		if (got <= 0)
			return got ? -errno : -EPIPE;
		n += got;
		answer[n] = 0;
		body = strstr(answer, "\r\n\r\n");
		length = strcasestr(answer, "\r\nContent-Length: ");
		if (body && length && n >= body + 4 - answer +
						 strtoul(length + 18, NULL, 10))
			return atoi(answer + 9);
	}
}

static const char *loosen = "{\"phase\":\"write_logs\"}";

static void doze(int ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000L};

	nanosleep(&t, NULL);
}

/* Waits until the socket says that the phase is the one wanted. */
static void await(int fd, const char *want)
{
	static char answer[8192], said[128];

	snprintf(said, sizeof(said), "\"phase\":\"%s\"", want);
	for (;;) {
		int status = exchange(
			fd, "GET /v1/phase HTTP/1.1\r\nHost: x\r\n\r\n", answer,
			sizeof(answer));

		if (status < 0) {
			say("await", "%s", strerrorname_np(-status));
			_exit(1);
		}
		if (status == 200 && strstr(answer, said))
			return;
		doze(300); /* it may be asked five times a second */
	}
}

static void run(const char *dir, int port, char **phases)
{
	static char request[256], answer[8192];
	int kept = dial(OWN_SOCKET), status;

	server.sin_port = htons(port);
	server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	for (size_t i = 0; i < sizeof(spare) / sizeof(*spare); i++)
		spare[i] = socket(AF_INET, SOCK_STREAM, 0);
	for (; *phases; phases++) {
		phase = *phases;
		if (kept >= 0)
			await(kept, phase);
		for (size_t i = 0; i < ATTACKS; i++) {
			snprintf(made, sizeof(made), "%s/%s-%s", dir, phase,
				 attacks[i].name);
			try(&attacks[i]);
			/* One that has connected can't again. */
			if (strstr(attacks[i].name, "connect") ||
			    strstr(attacks[i].name, "socketcall"))
				used++;
		}
		if (kept >= 0) {
			snprintf(request, sizeof(request),
				 "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n%s",
				 strlen(loosen), loosen);
			while ((status = exchange(kept, request, answer,
						  sizeof(answer))) == 429)
				doze(1000);
			say("kept_connection", "%d", status);
		}
		say("end", "");
	}
	poll(NULL, 0, -1);
}

/* What a connection answers until it is closed, by status. */
static void statuses(int fd, const char *request, size_t n, char *out,
		     size_t size)
{
	static char answer[65536];
	size_t have = 0, at = 0;
	ssize_t got;

	send_all(fd, request, n);
	while ((got = read(fd, answer + have, sizeof(answer) - 1 - have)) > 0)
		have += got;
	answer[have] = 0;
	out[0] = 0;
	for (char *p = answer; (p = strstr(p, "HTTP/1.")); p += 8)
		at += snprintf(out + at, size - at, "%s%.3s", at ? " " : "",
			       p + 9);
	close(fd);
}

static void ask(const char *name, const char *path, const char *request,
		size_t n)
{
	char got[128];

	for (;;) {
		int fd = dial(path);

		if (fd < 0) {
			say(name, "%s", strerrorname_np(errno));
			return;
		}
		statuses(fd, request, n, got, sizeof(got));
		if (!strstr(got, "429"))
			break;
		doze(1000);
	}
	say(name, "%s", got[0] ? got : "closed");
}

/* A request of these lines and body, after which the connection ends. */
static void put(const char *name, const char *path, const char *line,
		const char *headers, const char *body)
{
	static char request[65536];

	snprintf(request, sizeof(request),
		 "%s HTTP/1.1\r\n%sConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
		 line, headers, strlen(body), body);
	ask(name, path, request, strlen(request));
}

static const char *with(const char *format, const char *id)
{
	static char out[4][512];
	static int i;

	i = (i + 1) % 4;
	snprintf(out[i], sizeof(out[i]), format, id);
	return out[i];
}

static void forge(const char *id)
{
	const char *own = "PUT /v1/phase", *host = "Host: x\r\n";
	static char big[40000];

#define PUT(name, line, headers, body) put(name, OWN_SOCKET, line, headers, body)
#define RAW(name, text) ask(name, OWN_SOCKET, text, sizeof(text) - 1)
#define BODY "{\"phase\":\"write_logs\"}"
	PUT("loosen", own, host, loosen);
	PUT("other_by_path", with("PUT /v1/instances/%s/phase", id), host,
	    loosen);
	PUT("other_by_uri", with("PUT http://x/v1/instances/%s/phase", id),
	    host, loosen);
	PUT("other_by_climbing",
	    with("PUT /v1/phase/../instances/%s/phase", id), host, loosen);
	PUT("other_by_escapes", with("PUT /v1%%2finstances%%2f%s%%2fphase", id),
	    host, loosen);
	PUT("other_by_host", own, with("Host: %s\r\n", id), loosen);
	PUT("other_by_authority", with("PUT http://%s/v1/phase", id), host,
	    loosen);
	PUT("other_by_query", with("PUT /v1/phase?instance=%s", id), host,
	    loosen);
	PUT("other_in_body", own, host,
	    with("{\"phase\":\"write_logs\",\"id\":\"%s\"}", id));
	PUT("origin_in_body", own, host,
	    "{\"phase\":\"write_logs\",\"origin\":\"outside\"}");
	PUT("phase_twice", own, host,
	    "{\"phase\":\"read_only\",\"phase\":\"write_logs\"}");
	PUT("two_bodies", own, host, "{\"phase\":\"open\"}" BODY);
	PUT("no_phase", own, host, "{\"phase\":\"\"}");
	PUT("start_phase", own, host, "{\"phase\":\"start\"}");
	PUT("if_match", own, "Host: x\r\nIf-Match: *\r\n", loosen);
	PUT("forwarded", own,
	    "Host: x\r\nX-Forwarded-For: 127.0.0.1\r\nForwarded: for=root\r\n",
	    loosen);
	PUT("method_override", "GET /v1/phase",
	    "Host: x\r\nX-HTTP-Method-Override: PUT\r\n", loosen);
	PUT("unknown_method", "LOOSEN /v1/phase", host, loosen);
	PUT("connect", with("CONNECT %s:1", id), host, "");
	PUT("events", "GET /v1/events", host, "");
	PUT("upgrade", own,
	    "Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA\r\n",
	    loosen);
	RAW("http10",
	    "PUT /v1/phase HTTP/1.0\r\nContent-Length: 22\r\n\r\n" BODY);
	RAW("http09", "PUT /v1/phase\r\n\r\n" BODY);
	RAW("http2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
	RAW("pipelined",
	    "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nContent-Length: 22\r\n\r\n" BODY
	    "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 22\r\n\r\n" BODY);
	RAW("chunked",
	    "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
	    "4\r\n{\"ph\r\n12\r\nase\":\"write_logs\"}\r\n0\r\n\r\n");
	RAW("chunk_too_long",
	    "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
	    "fffffffffffffffff\r\n" BODY);
	RAW("smuggled",
	    "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nContent-Length: 22\r\nTransfer-Encoding: chunked\r\n\r\n"
	    "0\r\n\r\nPUT /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 22\r\n\r\n" BODY);
	RAW("two_lengths",
	    "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 22\r\nContent-Length: 2\r\n\r\n" BODY);
	RAW("nul_bytes", "PUT /v1/\0phase HTTP/1.1\r\nHost: x\r\n\r\n");
	memset(big, 'x', sizeof(big) - 1);
	memcpy(big, "X: ", 3);
	memcpy(big + sizeof(big) - 3, "\r\n", 2);
	PUT("giant_header", own, big, loosen);
	PUT("giant_body", own, host, big);
#undef PUT
#undef RAW
}

/* Containers that share a pid namespace are at each other's files by /proc. */
static void peer(char **phases)
{
	static char path[512], body[128];
	struct stat own, other;
	struct dirent *e;
	DIR *proc = opendir("/proc");

	if (!proc || stat(OWN_SOCKET, &own)) {
		say("peer", "not tried: %s", strerrorname_np(errno));
		return;
	}
	while ((e = readdir(proc))) {
		if (atoi(e->d_name) <= 0)
			continue;
		snprintf(path, sizeof(path), "/proc/%s/root" OWN_SOCKET,
			 e->d_name);
		if (stat(path, &other) || other.st_ino == own.st_ino)
			continue;
		for (; *phases; phases++) {
			snprintf(body, sizeof(body), "{\"phase\":\"%s\"}",
				 *phases);
			put(*phases, path, "PUT /v1/phase", "Host: x\r\n",
			    body);
		}
		return;
	}
	say("peer", "not tried: ENOENT");
}

static void map_root(void)
{
	int fd = open("/proc/self/uid_map", O_WRONLY);

	if (fd < 0 || write(fd, "0 1000 1", 8) != 8 || getuid())
		say("map_root", "%s", strerrorname_np(errno));
	close(fd);
}

static void api(const char *path, const char *id)
{
	const char *line = with("PUT /v1/instances/%s/phase", id);

	/* Setting a user takes away what /proc/self is needed for. */
	if (setresgid(1000, 1000, 1000) || setresuid(1000, 1000, 1000) ||
	    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)) {
		say("other_user", "not tried: %s", strerrorname_np(errno));
		return;
	}
	put("other_user", path, line, "Host: x\r\n", loosen);
	if (unshare(CLONE_NEWUSER)) {
		say("root_of_namespace", "not tried: %s",
		    strerrorname_np(errno));
		return;
	}
	map_root();
	put("root_of_namespace", path, line, "Host: x\r\n", loosen);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "mkdir")) {
		snprintf(made, sizeof(made), "%s", argv[2]);
		return plain_mkdir();
	}
	if (argc > 4 && !strcmp(argv[1], "run"))
		run(argv[2], atoi(argv[3]), argv + 4);
	else if (argc == 3 && !strcmp(argv[1], "forge"))
		forge(argv[2]);
	else if (argc == 3 && !strcmp(argv[1], "ask"))
		put("ask", OWN_SOCKET, "PUT /v1/phase", "Host: x\r\n",
		    with("{\"phase\":\"%s\"}", argv[2]));
	else if (argc > 2 && !strcmp(argv[1], "peer"))
		peer(argv + 2);
	else if (argc == 4 && !strcmp(argv[1], "api"))
		api(argv[2], argv[3]);
	else
		return 2;
	return 0;
}
