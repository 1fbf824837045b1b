// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"errors"
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

// PhaseFloor lists, sorted, the calls that every phase allows, clone for threads
// among them.
func PhaseFloor() []string {
	out := slices.Concat(phaseFloor...)
	for _, rule := range phaseConditional {
		out = append(out, rule.Names...)
	}
	return sorted(out)
}

// AllowOnly is the profile of one irreversible phase by itself: calls and groups by
// name, as a phase's `allow` means them, and the floor. What is denied is answered as
// in phases, EPERM or ENOSYS.
func AllowOnly(allow []string, o PhaseOptions) (*specs.LinuxSeccomp, error) {
	const before, only = "before", "only"
	var rules []PhaseRule
	if len(allow) > 0 {
		rules = []PhaseRule{names(allow...)}
	}
	plan, err := CompilePhases(&PhaseSet{Initial: before, Phases: []Phase{
		{Name: before, Allow: rules},
		{Name: only, Allow: rules, Irreversible: true},
	}}, PhaseHost{Inject: true}, o)
	var of *PhaseError
	if errors.As(err, &of) {
		return nil, of.Err
	}
	if err != nil {
		return nil, err
	}
	return plan.Ratchets[only], nil
}
