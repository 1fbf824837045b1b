// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Incidental are calls that a container runtime written in Go, such as runc,
// makes at moments that differ from start to start, because the Go runtime in it
// makes them: the scheduler, the allocator, signals, new threads. Between the
// load of the container's filter and the execve of its program a start makes a
// few of them, rarely the same, so no recording tells which ones the next start
// needs. Denied, most end the process: of 300 starts under the profile of one
// start, runc 1.1.5 failed 9, some by SIGSEGV; of 500 with these calls allowed,
// none.
//
// Unlike a [StartFloor] they come from reading the sources, not from counting,
// because the rare ones may not show in thousands of starts: runtime/os_linux.go,
// sys_linux_amd64.s, netpoll_epoll.go and mem_linux.go of Go 1.19 to 1.26, and
// pthread_create(3) and malloc(3) of glibc 2.36, which make the threads of a runc
// that is linked with libseccomp. A container that is created and not started
// stays in between for as long as its engine likes, so that the timers of
// Go's sysmon count, too. Not listed is what Go makes do without: sched_getaffinity
// and pread64 (GOMAXPROCS from the cgroup, once a second since Go 1.25) and
// prctl(PR_SET_VMA).
//
// What would let a program do more than it was recorded to is bounded by
// conditions: clone makes threads only, in no new namespace, and what mmap and
// mprotect map are no files and can't be executed. clone3, whose flags are in
// memory, is answered ENOSYS: glibc then uses clone. tgkill is not bound to the
// scheduler's SIGURG: most recordings catch some, and each would make a version;
// so a program can signal those that the kernel lets it, in its pid namespace.
//
// BUG(profiles): where a profile lists SCMP_ARCH_X86 and didn't see mmap under
// any ABI, the conditions don't bind i386's old mmap, whose arguments are in
// memory: such a profile lets a 32-bit program map executable memory. Nor do they
// bind a program that runs with the personality READ_IMPLIES_EXEC, as 32-bit ones
// without PT_GNU_STACK do.
var incidental = []struct {
	names []string
	args  []specs.LinuxSeccompArg // nil: whatever the arguments
}{
	{names: []string{"futex", "nanosleep", "restart_syscall", "sched_yield"}}, // sysmon, locks, sleeping threads
	{names: []string{"getpid", "gettid", "tgkill"}},                           // preemption: signalM
	{names: []string{"rt_sigprocmask", "rt_sigreturn", "sigaltstack"}},        // its handler; a denied one is a crash
	// The poller's own descriptors are there before the filter: runc's init reads
	// its configuration through it.
	{names: []string{"epoll_ctl", "epoll_pwait"}},
	{names: []string{"read", "write"}}, // netpollBreak
	// What the vDSO answers without a call as long as the host's clock source can
	// be read from user space. A TSC that the kernel finds unstable ends that on a
	// host that runs, for the container's program, too, which knows no errors there
	// (seen on 6.12: date makes none with tsc, and clock_gettime with acpi_pm).
	{names: []string{"clock_getres", "clock_gettime", "getcpu", "gettimeofday", "time"}},
	{names: []string{"madvise", "munmap"}}, // allocator, stacks
	// glibc takes any error of brk for memory that it got (x86_64: -EPERM is above
	// the address that it asked for), so that malloc crashes.
	{names: []string{"brk"}},
	{names: []string{"exit", "rseq", "set_robust_list"}}, // a thread's begin and end
	// newosproc, pthread_create
	{names: []string{"clone"}, args: []specs.LinuxSeccompArg{masked(0, cloneThread|cloneNamespaces, cloneThread)}},
	// heap, thread stacks
	{names: []string{"mmap"}, args: []specs.LinuxSeccompArg{masked(2, protExec, 0), masked(3, mapAnonymous, mapAnonymous)}},
	// thread stacks, their guards
	{names: []string{"mprotect"}, args: []specs.LinuxSeccompArg{masked(2, protExec, 0)}},
}

// Linux: include/uapi/linux/sched.h, include/uapi/asm-generic/mman-common.h.
// clone(2) looks at the lower 32 bits of its flags; prot and flags of mmap are
// whole registers, and these bits of them are what counts.
const (
	cloneThread = 0x10000
	// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. NEWTIME is
	// for clone3 and unshare.
	cloneNamespaces = 0x7e020000
	protExec        = 0x4
	mapAnonymous    = 0x20
)

func masked(index uint, mask, value uint64) specs.LinuxSeccompArg {
	return specs.LinuxSeccompArg{Index: index, Op: specs.OpMaskedEqual, Value: mask, ValueTwo: value}
}

// Incidental lists, sorted, the calls that [MergeOptions].Incidental allows, be
// it under conditions.
func Incidental() []string {
	var out []string
	for _, i := range incidental {
		out = append(out, i.names...)
	}
	return sorted(out)
}

// unconditional are those of them that are allowed whatever their arguments.
func unconditional() []string {
	var out []string
	for _, i := range incidental {
		if i.args == nil {
			out = append(out, i.names...)
		}
	}
	return out
}

// conditional are the rules for the others, without names in except.
func conditional(except []string) []specs.LinuxSyscall {
	var rules []specs.LinuxSyscall
	for _, i := range incidental {
		if names := without(slices.Clone(i.names), except); i.args != nil && len(names) > 0 {
			rules = append(rules, specs.LinuxSyscall{Names: names, Action: specs.ActAllow, Args: slices.Clone(i.args)})
		}
	}
	return rules
}
