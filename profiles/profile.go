// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Errno values of profiles (asm-generic/errno-base.h, errno.h).
const (
	errnoEPERM  uint = 1
	errnoENOSYS uint = 38
)

// RenderOptions say what a profile holds beside recorded calls.
type RenderOptions struct {
	// MustAllow is added, then MustDeny taken away, and with it socketcall and
	// ipc where they reach one of its calls.
	MustAllow, MustDeny []string
	// Architectures are listed beside those whose calls were recorded.
	Architectures []ABI
	// NewerThanKernel are calls that the recording kernel doesn't have; see the
	// package comment.
	NewerThanKernel []string
	// Incidental adds what [Incidental] lists.
	Incidental bool
}

// Render makes the profile that allows calls. OCI rules hold for every
// architecture that the profile lists: a name that was recorded under one ABI is
// allowed under all of those. With neither calls nor architectures, the profile
// lists SCMP_ARCH_X86_64: an empty list would be the native one to runtimes.
func Render(calls Calls, o RenderOptions) *specs.LinuxSeccomp {
	eperm, enosys := errnoEPERM, errnoENOSYS
	p := &specs.LinuxSeccomp{
		DefaultAction:   specs.ActErrno,
		DefaultErrnoRet: &eperm,
		Architectures:   sortedABIs(append(calls.ABIs(), o.Architectures...)),
	}
	if len(p.Architectures) == 0 {
		p.Architectures = Architectures(p)
	}
	names, fallback := append(calls.Names(), o.MustAllow...), slices.Clone(o.NewerThanKernel)
	if o.Incidental {
		// In the same rule as what was recorded: recording them then changes nothing.
		names, fallback = append(names, unconditional()...), append(fallback, "clone3")
	}
	deny := append(Multiplexers(o.MustDeny), o.MustDeny...)
	allow := without(sorted(names), deny)
	if len(allow) > 0 {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: allow, Action: specs.ActAllow})
	}
	// What must be denied stays EPERM: a fallback is what nobody wants there. But
	// for clone3: without one, no program that uses glibc makes a thread, and the
	// call that glibc falls back to has its flags where a filter sees them. And
	// without a rule of their own, what libseccomp makes of connect passes through
	// socketcall, and of shmget through ipc.
	fallback = without(without(sorted(fallback), allow), o.MustDeny)
	for _, name := range []string{"clone3", "ipc", "socketcall"} {
		if slices.Contains(o.MustDeny, name) {
			fallback = sorted(append(fallback, name))
		}
	}
	if len(fallback) > 0 {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: fallback, Action: specs.ActErrno, ErrnoRet: &enosys})
	}
	if o.Incidental {
		p.Syscalls = append(p.Syscalls, conditional(append(slices.Clone(allow), deny...))...)
	}
	return p
}

// AllowAll allows every call of every x86 ABI. Runtimes load it as a filter,
// which is what the recorder's gate waits for (runc 1.1.5 and 1.5.2, crun 1.8.1:
// Seccomp_filters is 1 in the container); with an ABI left out, libseccomp would
// kill the first call under it.
func AllowAll() *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Architectures: []specs.Arch{specs.ArchX86, specs.ArchX86_64, specs.ArchX32},
	}
}

// AuditOf is the dry run of a profile: what it denies is logged and allowed.
func AuditOf(p *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	out := &specs.LinuxSeccomp{
		DefaultAction: p.DefaultAction,
		// An ABI that isn't listed would be killed, which is no dry run.
		Architectures: AllowAll().Architectures,
		Flags:         slices.Clone(p.Flags),
	}
	if Denies(p.DefaultAction) {
		out.DefaultAction = specs.ActLog
	} else if p.DefaultErrnoRet != nil {
		errno := *p.DefaultErrnoRet
		out.DefaultErrnoRet = &errno
	}
	for _, rule := range p.Syscalls {
		rule = CloneRule(rule)
		if Denies(rule.Action) {
			rule.Action, rule.ErrnoRet = specs.ActLog, nil
		}
		if rule.Action == out.DefaultAction {
			continue // says nothing
		}
		out.Syscalls = append(out.Syscalls, rule)
	}
	return out
}

// Denies says whether an action keeps a call from happening whoever listens. TRACE
// and NOTIFY leave it to another process, LOG only reports, and what nobody knows is
// no denial.
func Denies(a specs.LinuxSeccompAction) bool {
	switch a {
	case specs.ActErrno, specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap:
		return true
	}
	return false
}

// Denied is what of calls a profile denies whatever the arguments: names
// without a rule that lets them pass, and ABIs that it doesn't list.
func Denied(p *specs.LinuxSeccomp, calls Calls) Calls {
	passes := map[string]bool{}
	for _, rule := range p.Syscalls {
		for _, name := range rule.Names {
			switch {
			case !Denies(rule.Action):
				passes[name] = true
			case len(rule.Args) == 0:
				if _, ok := passes[name]; !ok {
					passes[name] = false
				}
			}
		}
	}
	out := Calls{}
	for abi, names := range calls {
		listed := slices.Contains(Architectures(p), abi)
		for _, name := range names {
			pass, ruled := passes[name]
			if !ruled {
				pass = !Denies(p.DefaultAction)
			}
			if !listed || !pass {
				out[abi] = append(out[abi], name)
			}
		}
	}
	return out
}

// MayDeny is what of calls a profile denies, be it with some arguments only.
func MayDeny(p *specs.LinuxSeccomp, calls Calls) Calls {
	strict := *p
	strict.Syscalls = nil
	for _, rule := range p.Syscalls {
		switch {
		case len(rule.Args) == 0:
		case Denies(rule.Action):
			rule.Args = nil
		default:
			continue
		}
		strict.Syscalls = append(strict.Syscalls, rule)
	}
	return Denied(&strict, calls)
}

// MayDenyOf is what of a recording's calls a profile denies, be it with some
// arguments only. A call that is allowed under conditions is none of them if every
// value that the recording kept of it meets those of one rule; where values
// weren't kept, it is one.
func MayDenyOf(p *specs.LinuxSeccomp, rec *Recording) Calls {
	calls := rec.All()
	out := MayDeny(p, calls)
	surely := Denied(p, calls)
	for abi, names := range out {
		out[abi] = slices.DeleteFunc(names, func(name string) bool {
			return !surely.Has(abi, name) && rec.meets(p, abi, name)
		})
		if len(out[abi]) == 0 {
			delete(out, abi)
		}
	}
	return out
}

// meets says whether all that a recording kept of a call's arguments meets the
// conditions of one of the profile's rules that allow it.
func (r *Recording) meets(p *specs.LinuxSeccomp, abi ABI, name string) bool {
	met := false
	for _, rule := range p.Syscalls {
		switch {
		case !slices.Contains(rule.Names, name):
		case Denies(rule.Action):
			return false // which of two rules is first, only libseccomp knows
		case !met:
			met = !slices.ContainsFunc(rule.Args, func(c specs.LinuxSeccompArg) bool { return !r.meet(c, abi, name) })
		}
	}
	return met
}

func (r *Recording) meet(c specs.LinuxSeccompArg, abi ABI, name string) bool {
	whole := uint64(1<<64 - 1)
	if abi != specs.ArchX86_64 {
		whole = 1<<32 - 1 // libseccomp compares no more there
	}
	mask := whole
	switch c.Op {
	case specs.OpMaskedEqual:
		mask = c.Value & whole
	case specs.OpEqualTo:
		c.ValueTwo = c.Value
	default:
		return false
	}
	for phase, calls := range r.Phases {
		if !calls.Has(abi, name) {
			continue
		}
		i := slices.IndexFunc(r.Arguments, func(a Argument) bool {
			return a.ABI == abi && a.Name == name && a.Phase == phase && a.Index == int(c.Index)
		})
		if i < 0 {
			return false
		}
		a := &r.Arguments[i]
		if a.AnyValue || len(a.Values) == 0 || a.Mask&mask != mask ||
			slices.ContainsFunc(a.Values, func(v uint64) bool { return (v^c.ValueTwo)&mask != 0 }) {
			return false
		}
	}
	return true
}

// Architectures are those that p is for. To a runtime, none means the native
// one, and x86_64 is the only native one that syslatch runs on.
func Architectures(p *specs.LinuxSeccomp) []specs.Arch {
	if len(p.Architectures) == 0 {
		return []specs.Arch{specs.ArchX86_64}
	}
	return p.Architectures
}

// Clone shares no memory with p.
func Clone(p *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	c := *p
	if p.DefaultErrnoRet != nil {
		errno := *p.DefaultErrnoRet
		c.DefaultErrnoRet = &errno
	}
	c.Architectures, c.Flags = slices.Clone(p.Architectures), slices.Clone(p.Flags)
	c.Syscalls = nil
	for _, r := range p.Syscalls {
		c.Syscalls = append(c.Syscalls, CloneRule(r))
	}
	return &c
}

// CloneRule shares no memory with r.
func CloneRule(r specs.LinuxSyscall) specs.LinuxSyscall {
	r.Names, r.Args = slices.Clone(r.Names), slices.Clone(r.Args)
	if r.ErrnoRet != nil {
		errno := *r.ErrnoRet
		r.ErrnoRet = &errno
	}
	return r
}

// normal is p with sorted, merged parts, for writing: the order in which
// runtimes apply rules doesn't matter to libseccomp.
func normal(p *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	out := *p
	out.Architectures = sortedABIs(slices.Clone(p.Architectures))
	out.Syscalls = make([]specs.LinuxSyscall, len(p.Syscalls))
	for i, rule := range p.Syscalls {
		rule = CloneRule(rule)
		rule.Names = sorted(rule.Names)
		out.Syscalls[i] = rule
	}
	return &out
}

func sorted(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

func sortedABIs(abis []ABI) []ABI {
	slices.Sort(abis)
	return slices.Compact(abis)
}

func without(names, remove []string) []string {
	return slices.DeleteFunc(names, func(n string) bool { return slices.Contains(remove, n) })
}
