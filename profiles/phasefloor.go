// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// phaseFloor are calls without which no program goes on, whatever it is allowed to
// do: they are part of every phase and of every list that a running process is
// tightened to. None of them opens a file, a socket or a program; those that take a
// descriptor work on what is open already, which is write's and read's case, too.
var phaseFloor = [][]string{
	{"read", "write", "close", "fstat", "lseek"}, // what is open already
	{"brk", "madvise", "mmap", "mprotect", "mremap", "munmap"},
	{"restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"},
	{"futex", "rseq", "set_robust_list"},
	{"exit", "exit_group"},
	{"getpid", "gettid", "tgkill"},
	{"clock_nanosleep", "nanosleep", "sched_yield"},
	// Most are the vDSO's, unless the host's clock source can't be read from user
	// space: see incidental.
	{"clock_getres", "clock_gettime", "getcpu", "getrandom", "gettimeofday", "time"},
	{"epoll_create", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "eventfd2", "poll", "ppoll", "pselect6", "select"},
	{"fcntl"},
	{"wait4", "waitid"},
}

// phaseConditional is the part of the floor that has conditions: clone makes
// threads, and nothing else.
var phaseConditional = []specs.LinuxSyscall{{
	Names: []string{"clone"}, Action: specs.ActAllow,
	Args: []specs.LinuxSeccompArg{masked(0, cloneThread|cloneNamespaces, cloneThread)},
}}

// phaseAbsent are calls that don't exist (ENOSYS) unless they are allowed by name:
// clone3 and openat2 have their flags in memory, where no filter sees them, and libc
// falls back to those that haven't; a ring of io_uring opens and connects past any
// filter.
var phaseAbsent = []string{"clone3", "io_uring_setup", "openat2"}

// PhaseFloor lists, sorted, the calls that every phase allows, clone for threads
// among them.
func PhaseFloor() []string {
	out := slices.Concat(phaseFloor...)
	for _, rule := range phaseConditional {
		out = append(out, rule.Names...)
	}
	return sorted(out)
}

// AllowWithFloor is the profile that allows the named calls and the floor of phases
// under x86_64. What is denied is EPERM.
func AllowWithFloor(names []string) *specs.LinuxSeccomp {
	p := Render(Calls{specs.ArchX86_64: sorted(slices.Concat(append(slices.Clone(phaseFloor), names)...))}, RenderOptions{
		NewerThanKernel: without(slices.Clone(phaseAbsent), names),
	})
	for _, rule := range phaseConditional {
		if rule = CloneRule(rule); len(without(rule.Names, names)) > 0 {
			p.Syscalls = append(p.Syscalls, rule)
		}
	}
	return p
}
