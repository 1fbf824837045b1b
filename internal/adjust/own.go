// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
)

// effective is a profile without the rules that say nothing. Of what is left, a
// rule without conditions decides over its call whatever the others say, and of
// several such rules the first.
func effective(p *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	out := profiles.Clone(p)
	out.Syscalls = slices.DeleteFunc(out.Syscalls, func(r specs.LinuxSyscall) bool { return isDefault(p, &r) })
	return out
}

// isDefault reports whether a rule says nothing, as it does what the profile's
// default does: libseccomp refuses such rules and runtimes leave them out.
func isDefault(p *specs.LinuxSeccomp, r *specs.LinuxSyscall) bool {
	return r.Action == p.DefaultAction && code(r.Action, r.ErrnoRet) == code(p.DefaultAction, p.DefaultErrnoRet)
}

// code is what an action carries along: an errno, or a number for a tracer.
func code(action specs.LinuxSeccompAction, errno *uint) uint {
	switch {
	case action != specs.ActErrno && action != specs.ActTrace:
		return 0
	case errno == nil:
		return errnoPerm
	}
	return *errno
}

// passes reports whether an action lets a call happen without asking anybody.
func passes(action specs.LinuxSeccompAction) bool {
	return action == specs.ActAllow || action == specs.ActLog
}

// ruling is what a profile does with a call: whole, or where that is undecided,
// under conditions. rules are those of the call in an effective profile.
type ruling struct {
	passes, conditional bool
	pass, refuse        []specs.LinuxSyscall // rules with conditions, if it is conditional
}

func rulingOf(rules []specs.LinuxSyscall, byDefault specs.LinuxSeccompAction) ruling {
	f := ruling{passes: passes(byDefault)}
	for _, r := range rules {
		switch {
		case len(r.Args) == 0:
			return ruling{passes: passes(r.Action)}
		case passes(r.Action):
			f.pass = append(f.pass, r)
		default:
			f.refuse = append(f.refuse, r)
		}
	}
	f.conditional = !f.passes && f.pass != nil || f.passes && f.refuse != nil
	return f
}

// within narrows a version to the container's own profile, so that nothing gets
// looser: what the own one denies, or leaves to another process, stays denied,
// and its conditions on arguments hold beside the version's (docker's default
// profile lets clone make no user namespaces). Calls in exempt are left alone.
//
// It also takes over errnos of what is denied: clone3 must answer ENOSYS for libc
// to fall back to clone; EPERM breaks thread creation.
//
// It returns the calls, and the ABIs, that the version allows and the result
// doesn't. An error is a condition that an allow-list can't say.
func within(p, own *specs.LinuxSeccomp, exempt []string) (denied []string, err error) {
	if !profiles.Denies(p.DefaultAction) {
		return nil, fmt.Errorf("the version's default action is %s: it can't be kept within the container's own seccomp profile (set existingProfile: replace if the version is to decide alone)", p.DefaultAction)
	}
	own = effective(own)
	ownRules, versionRules := rulesOf(own), rulesOf(effective(p))
	for _, arch := range profiles.Architectures(p) {
		if !slices.Contains(profiles.Architectures(own), arch) {
			denied = append(denied, string(arch))
		}
	}
	p.Architectures = slices.DeleteFunc(slices.Clone(profiles.Architectures(p)), func(a specs.Arch) bool { return !slices.Contains(profiles.Architectures(own), a) })

	narrowed := map[string][]specs.LinuxSyscall{}
	var unsaid []string
	for name, rules := range versionRules {
		version := rulingOf(rules, p.DefaultAction)
		if slices.Contains(exempt, name) || !version.passes && !version.conditional {
			continue
		}
		o := rulingOf(ownRules[name], own.DefaultAction)
		switch {
		case !o.conditional && o.passes:
			continue
		case o.conditional && o.passes:
			// All but some arguments: to say so takes a default that allows.
			unsaid = append(unsaid, name)
			continue
		}
		narrowed[name] = meet(version, o)
		if narrowed[name] == nil {
			denied = append(denied, name)
		}
	}
	if len(unsaid) > 0 {
		slices.Sort(unsaid)
		return nil, fmt.Errorf("the container's own seccomp profile denies %s with some arguments only, which can't be carried into a version (set existingProfile: replace if the version is to decide alone, or list them in mustAllow or mustDeny)",
			strings.Join(unsaid, ", "))
	}
	shut := shutWays(own, ownRules)
	for _, name := range shut {
		if slices.Contains(exempt, name) {
			continue
		}
		if mentions(p, name) && !slices.Contains(denied, name) {
			denied = append(denied, name)
		}
		errno := otherErrno(p)
		narrowed[name] = []specs.LinuxSyscall{{Action: specs.ActErrno, ErrnoRet: &errno}}
	}
	remove(p, func(_ *specs.LinuxSyscall, name string) bool { _, ok := narrowed[name]; return ok })
	for _, name := range slices.Sorted(maps.Keys(narrowed)) {
		for _, r := range narrowed[name] {
			r.Names = []string{name}
			p.Syscalls = append(p.Syscalls, r)
		}
	}
	ruled := rulesOf(p)
	for _, name := range slices.Sorted(maps.Keys(ownRules)) {
		for _, r := range ownRules[name] {
			if ruled[name] == nil && r.Action == specs.ActErrno && len(r.Args) == 0 && r.ErrnoRet != nil {
				r = profiles.CloneRule(r)
				r.Names = []string{name}
				p.Syscalls = append(p.Syscalls, r)
				break
			}
		}
	}
	slices.Sort(denied)
	return denied, nil
}

// shutWays are the multiplexers by which something is denied that has rules
// itself, or whose calls have: what libseccomp makes of an allowed connect(2)
// passes through socketcall(2), and an allowed socketcall passes all.
func shutWays(own *specs.LinuxSeccomp, rules map[string][]specs.LinuxSyscall) (shut []string) {
	closed := func(name string) bool {
		r := rulingOf(rules[name], own.DefaultAction)
		return r.conditional || !r.passes
	}
	for _, way := range profiles.Multiplexers(slices.Collect(maps.Keys(rules))) {
		if rules[way] == nil && passes(own.DefaultAction) && slices.ContainsFunc(profiles.Multiplexed(way), closed) {
			shut = append(shut, way)
		}
	}
	for name := range rules {
		if profiles.Multiplexed(name) != nil && closed(name) {
			shut = append(shut, name)
		}
	}
	return shut
}

// meet makes the rules for a call that both profiles let pass under conditions,
// or one of them whole; nil if there is nothing in common, or nothing that rules
// can say: then less is allowed.
func meet(version, own ruling) (rules []specs.LinuxSyscall) {
	if !version.conditional {
		for _, r := range own.pass {
			rules = append(rules, profiles.CloneRule(r))
		}
		// Whether a refusal comes before them, only libseccomp knows.
		for _, r := range own.refuse {
			if rules != nil && profiles.Denies(r.Action) {
				rules = append(rules, profiles.CloneRule(r))
			}
		}
		return rules
	}
	if own.refuse != nil {
		return nil
	}
	for _, v := range version.pass {
		for _, o := range own.pass {
			if args, ok := both(v.Args, o.Args); ok {
				v := profiles.CloneRule(v)
				v.Args = args
				rules = append(rules, v)
			}
		}
	}
	return rules
}

// both is one rule's conditions that hold where those of two rules do. A rule
// can have one condition for each argument: with two, runtimes make two rules of
// it, and OR takes the place of AND.
func both(a, b []specs.LinuxSeccompArg) ([]specs.LinuxSeccompArg, bool) {
	out := slices.Clone(a)
	for _, y := range b {
		i := slices.IndexFunc(out, func(x specs.LinuxSeccompArg) bool { return x.Index == y.Index })
		switch {
		case i < 0:
			out = append(out, y)
		case out[i] == y:
		case out[i].Op == specs.OpMaskedEqual && y.Op == specs.OpMaskedEqual:
			x := &out[i]
			if (x.ValueTwo^y.ValueTwo)&x.Value&y.Value != 0 {
				return nil, false // they contradict each other
			}
			x.Value, x.ValueTwo = x.Value|y.Value, x.ValueTwo&x.Value|y.ValueTwo&y.Value
		default:
			return nil, false
		}
	}
	return out, !repeated(a) && !repeated(b)
}

func repeated(args []specs.LinuxSeccompArg) bool {
	seen := map[uint]bool{}
	for _, a := range args {
		if seen[a.Index] {
			return true
		}
		seen[a.Index] = true
	}
	return false
}

// auditWithin is the container's own profile with LOG for what the version
// doesn't allow: what the own profile denies stays denied, so that a dry run
// never loosens a container.
func auditWithin(own, version *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	// Without the rules that say nothing: beside another default they would.
	p := effective(own)
	ownRules, versionRules := rulesOf(p), rulesOf(effective(version))
	// Conditions on arguments are not audited: any ALLOW counts.
	inVersion := func(name string) bool {
		f := rulingOf(versionRules[name], version.DefaultAction)
		return f.passes || f.conditional
	}
	rules := p.Syscalls
	p.Syscalls = nil
	for _, rule := range rules {
		if rule.Action != specs.ActAllow {
			p.Syscalls = append(p.Syscalls, rule)
			continue
		}
		allowed, reported := profiles.CloneRule(rule), profiles.CloneRule(rule)
		reported.Action = specs.ActLog
		allowed.Names = slices.DeleteFunc(allowed.Names, func(n string) bool { return !inVersion(n) })
		reported.Names = slices.DeleteFunc(reported.Names, inVersion)
		for _, r := range []specs.LinuxSyscall{allowed, reported} {
			if len(r.Names) > 0 {
				p.Syscalls = append(p.Syscalls, r)
			}
		}
	}
	if own.DefaultAction == specs.ActAllow {
		p.DefaultAction, p.DefaultErrnoRet = specs.ActLog, nil
		var allowed []string
		for name := range versionRules {
			// Allowing a multiplexer would allow what own denies behind it.
			if inVersion(name) && ownRules[name] == nil && profiles.Multiplexed(name) == nil {
				allowed = append(allowed, name)
			}
		}
		if slices.Sort(allowed); len(allowed) > 0 {
			p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: allowed, Action: specs.ActAllow})
		}
	}
	return p
}
