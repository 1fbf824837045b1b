// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Group is a set of calls under one name, for phases. What a group allows may
// depend on arguments: @file-read has openat for reading only.
type Group struct {
	Name  string      `json:"name"` // with its "@"
	About string      `json:"about"`
	Rules []PhaseRule `json:"rules"`
}

// Calls lists, sorted, what a group allows, be it under conditions.
func (g *Group) Calls() []string {
	var out []string
	for _, r := range g.Rules {
		out = append(out, r.Names...)
	}
	return sorted(out)
}

// Groups are all of them, sorted by name. Their names follow systemd's sets
// (systemd.exec(5), SystemCallFilter=) where they mean the same; the lists are our
// own, and split where a phase would be: reading from writing, what a program asks
// about itself from what it does to others. Every call of an x86 ABI that
// libseccomp knows is in one of them, or in [WholePhaseFloor].
func Groups() []Group {
	var out []Group
	for i := range groups {
		out = append(out, groups[i].clone())
	}
	return out
}

func (g *Group) clone() Group {
	c := Group{g.Name, g.About, nil}
	for _, r := range g.Rules {
		c.Rules = append(c.Rules, PhaseRule{sorted(slices.Clone(r.Names)), slices.Clone(r.Args)})
	}
	return c
}

// FindGroup is the group of that name, "@" included.
func FindGroup(name string) (Group, bool) {
	if g := findGroup(name); g != nil {
		return g.clone(), true
	}
	return Group{}, false
}

// findGroup shares its answer with all.
func findGroup(name string) *Group {
	for i := range groups {
		if groups[i].Name == name {
			return &groups[i]
		}
	}
	return nil
}

// Linux: include/uapi/asm-generic/fcntl.h, socket.h, ioctls.h, linux/prctl.h.
const (
	openWrites = 0x3 | 0x40 | 0x200 // O_ACCMODE, O_CREAT, O_TRUNC

	afUnix, afInet, afInet6 = 1, 2, 10
)

// openArgument is where a call has open(2)'s flags.
var openArgument = map[string]uint{"open": 1, "openat": 2}

// readingOpen holds for opens that neither write, create nor truncate: O_RDONLY
// alone truncates with O_TRUNC and creates with O_CREAT, and access mode 3 asks for
// both permissions.
func readingOpen(name string) []specs.LinuxSeccompArg {
	return []specs.LinuxSeccompArg{masked(openArgument[name], openWrites, 0)}
}

// number32 compares an argument that the kernel takes for an int or unsigned int.
func number32(index uint, value uint64) []specs.LinuxSeccompArg {
	return []specs.LinuxSeccompArg{masked(index, low32, value)}
}

func each(name string, index uint, values ...uint64) (out []PhaseRule) {
	for _, v := range values {
		out = append(out, PhaseRule{[]string{name}, number32(index, v)})
	}
	return out
}

func names(list ...string) PhaseRule { return PhaseRule{Names: list} }

// forks is clone for processes and threads in no new namespace.
var forks = PhaseRule{[]string{"clone"}, []specs.LinuxSeccompArg{masked(0, cloneNamespaces, 0)}}

// threads is clone for threads in no new namespace: a part of the floor.
var threads = PhaseRule{[]string{"clone"}, []specs.LinuxSeccompArg{masked(0, cloneThread|cloneNamespaces, cloneThread)}}

// floorElsewhere is what the floor of phases has beside [PhaseFloor]: the names that
// its calls have on i386 and x32, what does no more than read and write do (a dynamic
// loader reads with pread64 and complains with writev, and libuv writes with it), and
// what begins a program that is executed in a phase. Without arch_prctl (on i386
// set_thread_area) none begins; set_tid_address is made by every libc; Node
// aborts without pipe2 (libuv) and uname (V8).
var floorElsewhere = []string{
	"pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "readv", "writev",
	"_llseek", "_newselect", "clock_getres_time64", "clock_gettime64", "clock_nanosleep_time64", "eventfd",
	"fcntl64", "fstat64", "futex_time64", "mmap2", "ppoll_time64", "pselect6_time64",
	"sigaction", "signal", "sigprocmask", "sigreturn", "waitpid",
	"arch_prctl", "pipe", "pipe2", "set_thread_area", "set_tid_address", "uname",
}

// WholePhaseFloor lists, sorted, what phases allow under any ABI whatever their policy
// says and whatever the arguments; see [Threads] for what else they do.
//
// None of it is ever decided by a supervisor. read, write and close are made by a
// runtime's init while it hands its listener over, so that it would wait for itself
// (runc refuses SCMP_ACT_NOTIFY for write); the rest is made so often that a round trip
// is no price for it, and from signal handlers and allocators, where nobody expects an
// error: glibc takes a refused brk for memory that it got.
func WholePhaseFloor() []string {
	return sorted(without(append(PhaseFloor(), floorElsewhere...), threads.Names))
}

func inPhaseFloor(name string) bool {
	return slices.Contains(floorElsewhere, name) || slices.ContainsFunc(phaseFloor, func(list []string) bool { return slices.Contains(list, name) })
}

// Threads is clone for threads in no new namespace, which every phase allows beside
// [WholePhaseFloor].
func Threads() PhaseRule { return PhaseRule{slices.Clone(threads.Names), slices.Clone(threads.Args)} }

// Form says where the conditions of a rule hold, as a plan's calls do.
func (r PhaseRule) Form() string {
	if len(r.Names) == 0 {
		return "any"
	}
	where, err := regionOf(r.Names[0], r.Args)
	if err != nil {
		return err.Error()
	}
	return where.String()
}

// fileChanges are the calls that change files, directories or what is known of them
// otherwise than by an open for writing.
var fileChanges = []string{
	"truncate", "truncate64", "ftruncate", "ftruncate64", "fallocate",
	"rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat",
	"unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "mknod", "mknodat",
	"chmod", "fchmod", "fchmodat", "fchmodat2",
	"chown", "chown32", "fchown", "fchown32", "fchownat", "lchown", "lchown32",
	"utime", "utimes", "futimesat", "utimensat", "utimensat_time64",
	"setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
	"umask", "copy_file_range",
}

// networkCalls make sockets and reach addresses. socketpair isn't one: what it makes
// reaches nobody but who is given an end.
var networkCalls = []string{"socket", "connect", "bind", "listen", "accept", "accept4", "send", "sendto", "sendmsg", "sendmmsg"}

// socketIO is what is done with sockets that there are. send and its kin may have an
// address with them.
var socketIO = []string{
	"send", "sendto", "sendmsg", "sendmmsg", "recv", "recvfrom", "recvmsg", "recvmmsg", "recvmmsg_time64",
	"shutdown", "getsockname", "getpeername", "getsockopt", "setsockopt",
}

var groups = []Group{
	{"@aio", "asynchronous input and output on open files (io_submit and its kin; io_uring is a group of its own)", []PhaseRule{
		names("io_setup", "io_destroy", "io_submit", "io_cancel", "io_getevents", "io_pgetevents", "io_pgetevents_time64"),
	}},
	// ioctl is any driver's call, so only requests that a libc and event loops make:
	// TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. TIOCSTI,
	// which types into a terminal, is not among them.
	{"@basic-io", "reading, writing and copying with open files, pipes, and the ioctls of every event loop", slices.Concat([]PhaseRule{
		names("dup", "dup2", "dup3", "close_range", "pipe", "pipe2", "pread64", "preadv", "preadv2", "readv",
			"pwrite64", "pwritev", "pwritev2", "writev", "splice", "tee", "vmsplice", "sendfile", "sendfile64"),
	}, each("ioctl", 1, 0x5401, 0x540f, 0x5413, 0x541b, 0x5421, 0x5450, 0x5451))},
	{"@clock", "setting the system's time", []PhaseRule{
		names("adjtimex", "clock_adjtime", "clock_adjtime64", "clock_settime", "clock_settime64", "settimeofday", "stime"),
	}},
	{"@debug", "looking into other processes, tracing, BPF", []PhaseRule{
		names("ptrace", "process_vm_readv", "process_vm_writev", "perf_event_open", "bpf", "kcmp", "pidfd_getfd",
			"userfaultfd", "lookup_dcookie", "get_robust_list", "process_madvise", "process_mrelease"),
	}},
	{"@file-read", "opening files for reading, and asking about files and directories", []PhaseRule{
		{[]string{"open"}, readingOpen("open")},
		{[]string{"openat"}, readingOpen("openat")},
		names("stat", "stat64", "lstat", "lstat64", "fstatat64", "newfstatat", "statx", "oldstat", "oldlstat", "oldfstat",
			"statfs", "statfs64", "fstatfs", "fstatfs64", "access", "faccessat", "faccessat2", "readlink", "readlinkat",
			"getdents", "getdents64", "readdir", "getcwd", "chdir", "fchdir",
			"getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr",
			"pread64", "preadv", "preadv2", "readv", "readahead", "fadvise64", "fadvise64_64", "cachestat", "flock",
			"inotify_init", "inotify_init1", "inotify_add_watch", "inotify_rm_watch"),
	}},
	{"@file-write", "opening files in any way, and changing files and directories", []PhaseRule{
		names("open", "openat", "creat", "pwrite64", "pwritev", "pwritev2", "writev",
			"fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "flock"),
		names(fileChanges...),
	}},
	// prlimit64 with a null pointer for new limits changes none; the register tells.
	// prctl: PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_GET_NO_NEW_PRIVS,
	// PR_SET_VMA (names of mappings), all about the caller itself.
	{"@info", "what a program asks about itself and the system", slices.Concat([]PhaseRule{
		names("getuid", "getuid32", "geteuid", "geteuid32", "getgid", "getgid32", "getegid", "getegid32",
			"getresuid", "getresuid32", "getresgid", "getresgid32", "getgroups", "getgroups32",
			"getppid", "getpgid", "getpgrp", "getsid", "capget", "uname", "olduname", "oldolduname", "sysinfo",
			"times", "getrusage", "getrlimit", "ugetrlimit", "getpriority", "sched_getaffinity", "get_thread_area", "membarrier"),
		{[]string{"prlimit64"}, []specs.LinuxSeccompArg{{Index: 2, Op: specs.OpEqualTo}}},
	}, each("prctl", 0, 3, 15, 16, 39, 0x53564d41))},
	{"@io-uring", "io_uring, which opens and connects past every filter; ENOSYS in phases that don't name it", []PhaseRule{
		names("io_uring_setup", "io_uring_enter", "io_uring_register"),
	}},
	{"@ipc", "pipes, pairs of sockets, shared memory, message queues and semaphores", []PhaseRule{
		names("pipe", "pipe2", "socketpair", "memfd_create", "shmget", "shmat", "shmdt", "shmctl",
			"semget", "semop", "semtimedop", "semtimedop_time64", "semctl", "msgget", "msgsnd", "msgrcv", "msgctl",
			"mq_open", "mq_unlink", "mq_timedsend", "mq_timedsend_time64", "mq_timedreceive", "mq_timedreceive_time64",
			"mq_notify", "mq_getsetattr"),
	}},
	{"@keyring", "the kernel's keys", []PhaseRule{names("add_key", "request_key", "keyctl")}},
	{"@memory", "advice about memory, locks in it, protection keys, NUMA", []PhaseRule{
		names("mincore", "msync", "mlock", "mlock2", "mlockall", "munlock", "munlockall", "remap_file_pages",
			"pkey_alloc", "pkey_free", "pkey_mprotect", "memfd_secret", "map_shadow_stack",
			"mbind", "get_mempolicy", "set_mempolicy", "set_mempolicy_home_node", "migrate_pages", "move_pages"),
	}},
	{"@module", "kernel modules and other kernels", []PhaseRule{
		names("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
	}},
	{"@mount", "file systems and namespaces", []PhaseRule{
		names("mount", "umount", "umount2", "mount_setattr", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick",
			"chroot", "pivot_root", "clone", "unshare", "setns", "swapon", "swapoff"),
	}},
	{"@network", "sockets of every family", []PhaseRule{names(sorted(slices.Concat([]string{"socketpair"}, networkCalls, socketIO))...)}},
	{"@obsolete", "calls that the kernel has no more, or that nothing should make", []PhaseRule{
		names("_sysctl", "afs_syscall", "bdflush", "break", "create_module", "epoll_ctl_old", "epoll_wait_old", "ftime",
			"get_kernel_syms", "getpmsg", "gtty", "idle", "lock", "mpx", "nfsservctl", "prof", "profil", "putpmsg",
			"query_module", "security", "sgetmask", "ssetmask", "stty", "sysfs", "tuxcall", "ulimit", "uselib", "ustat", "vserver"),
	}},
	{"@privileged", "what takes a capability", []PhaseRule{
		names("acct", "capset", "fanotify_init", "fanotify_mark", "iopl", "ioperm", "modify_ldt", "name_to_handle_at",
			"open_by_handle_at", "quotactl", "quotactl_fd", "reboot", "sethostname", "setdomainname", "syslog", "vhangup", "vm86", "vm86old"),
	}},
	// clone3 carries its flags in memory; a policy that means it names it. A shell's wait
	// is rt_sigsuspend, again and again if it is denied.
	{"@process", "making processes, in no new namespace, and running programs", []PhaseRule{
		forks,
		names("fork", "vfork", "execve", "execveat", "pidfd_open", "pidfd_send_signal",
			"setpgid", "setsid", "kill", "prctl", "personality", "rt_sigsuspend", "sigsuspend"),
	}},
	{"@sandbox", "filters and rule sets by which a program confines itself", []PhaseRule{
		names("seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"),
	}},
	{"@sched", "priorities, processors and limits of tasks", []PhaseRule{
		names("sched_setaffinity", "sched_getaffinity", "sched_setparam", "sched_getparam", "sched_setscheduler", "sched_getscheduler",
			"sched_setattr", "sched_getattr", "sched_get_priority_max", "sched_get_priority_min",
			"sched_rr_get_interval", "sched_rr_get_interval_time64", "setpriority", "getpriority", "nice", "ioprio_set", "ioprio_get",
			"setrlimit", "prlimit64"),
	}},
	{"@setuid", "becoming another user or group", []PhaseRule{
		names("setuid", "setuid32", "setgid", "setgid32", "setreuid", "setreuid32", "setregid", "setregid32",
			"setresuid", "setresuid32", "setresgid", "setresgid32", "setgroups", "setgroups32",
			"setfsuid", "setfsuid32", "setfsgid", "setfsgid32"),
	}},
	{"@signal", "sending signals, and waiting for them", []PhaseRule{
		names("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "pause",
			"rt_sigpending", "rt_sigsuspend", "rt_sigtimedwait", "rt_sigtimedwait_time64", "sigpending", "sigsuspend",
			"signalfd", "signalfd4"),
	}},
	{"@socket-io", "what is done with sockets that are open; a part of @network", []PhaseRule{names(socketIO...)}},
	{"@sync", "waiting for more than one futex, and the futex calls of 6.7", []PhaseRule{
		names("futex_waitv", "futex_wait", "futex_wake", "futex_requeue"),
	}},
	{"@timer", "timers", []PhaseRule{
		names("alarm", "getitimer", "setitimer", "timer_create", "timer_delete", "timer_getoverrun",
			"timer_gettime", "timer_gettime64", "timer_settime", "timer_settime64",
			"timerfd_create", "timerfd_gettime", "timerfd_gettime64", "timerfd_settime", "timerfd_settime64"),
	}},
}

// sameCalls are calls that do the same, or that one libc makes where another, or a
// later one, makes the other. A phase that names one of them without conditions means
// them all: who writes stat gets it from an old libc only.
var sameCalls = [][]string{
	{"access", "faccessat", "faccessat2"},
	{"accept", "accept4"},
	{"chmod", "fchmodat", "fchmodat2"},
	{"chown", "chown32", "fchownat"},
	{"dup2", "dup3"},
	{"fadvise64", "fadvise64_64"},
	{"fchown", "fchown32"},
	{"fstatfs", "fstatfs64"},
	{"ftruncate", "ftruncate64"},
	{"getdents", "getdents64"},
	{"getegid", "getegid32"},
	{"geteuid", "geteuid32"},
	{"getgid", "getgid32"},
	{"getgroups", "getgroups32"},
	{"getresgid", "getresgid32"},
	{"getresuid", "getresuid32"},
	{"getrlimit", "ugetrlimit"},
	{"getuid", "getuid32"},
	{"inotify_init", "inotify_init1"},
	{"lchown", "lchown32"},
	{"link", "linkat"},
	{"mkdir", "mkdirat"},
	{"mknod", "mknodat"},
	{"open", "openat"},
	{"pipe", "pipe2"},
	{"preadv", "preadv2"},
	{"pwritev", "pwritev2"},
	{"readlink", "readlinkat"},
	{"recv", "recvfrom"},
	{"recvmmsg", "recvmmsg_time64"},
	{"rename", "renameat", "renameat2"},
	{"rt_sigtimedwait", "rt_sigtimedwait_time64"},
	{"send", "sendto"},
	{"sendfile", "sendfile64"},
	{"setgid", "setgid32"},
	{"setgroups", "setgroups32"},
	{"setuid", "setuid32"},
	{"signalfd", "signalfd4"},
	{"lstat", "lstat64", "newfstatat", "fstatat64", "stat", "stat64", "statx"},
	{"statfs", "statfs64"},
	{"symlink", "symlinkat"},
	{"truncate", "truncate64"},
	{"unlink", "unlinkat"},
	{"utime", "utimes", "futimesat", "utimensat", "utimensat_time64"},
}

// same lists the calls that naming one means, itself among them.
func same(name string) []string {
	for _, list := range sameCalls {
		if slices.Contains(list, name) {
			return list
		}
	}
	return []string{name}
}
