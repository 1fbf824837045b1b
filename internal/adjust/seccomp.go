// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// seccomp decides which profile is injected.
func (b *builder) seccomp() error {
	d, own := &b.Decision, b.Container.Seccomp
	keep := d.ExistingProfile != policy.ExistingReplace
	b.plan.Record = d.Mode == policy.ModeRecord || d.Mode == policy.ModeAudit
	if b.plan.Record {
		b.plan.Gate = profiles.GateFilter
	}
	switch d.Mode {
	case policy.ModeRecord:
		switch {
		case keep && b.Container.SeccompUnknown:
			return b.keepUnknown()
		case keep && own != nil:
			b.note("the container's own seccomp profile is kept; calls that it denies are not recorded")
			b.expectFilter()
			if len(d.MustDeny) == 0 {
				return nil
			}
			return b.inject(profiles.Clone(own), missingForStart(own))
		}
		b.note("a profile that allows everything is injected, so that the runtime loads a filter")
		return b.inject(profiles.AllowAll(), nil)

	case policy.ModeAudit:
		version, err := b.version()
		if err != nil {
			return err
		}
		switch {
		case keep && b.Container.SeccompUnknown:
			b.problem("audit would replace a seccomp profile that %s doesn't show to plugins (set existingProfile: replace if that is meant)", b.engine())
			return b.keepUnknown()
		case keep && own != nil:
			b.note("the container's own seccomp profile stays in force under audit")
			b.setVersion()
			return b.inject(auditWithin(own, version), nil)
		}
		b.setVersion()
		return b.inject(profiles.AuditOf(version), nil)
	}

	if d.Phases != nil {
		return b.phases(keep)
	}
	profile, err := b.version()
	if err != nil {
		return err
	}
	b.setVersion()
	switch {
	case !keep:
	case b.Container.SeccompUnknown:
		b.warn("%s doesn't show the container's own seccomp profile to plugins; if it has one, the version replaces it whole (existingProfile: replace says that this is meant)", b.engine())
	case own != nil:
		lacks := missingForStart(profile)
		denied, err := within(profile, own, d.MustAllow)
		if err != nil {
			return fmt.Errorf("version %d of workload %s: %w", b.plan.Version, d.Workload, err)
		}
		if len(denied) > 0 {
			b.warn("version %d allows what the container's own seccomp profile denies, and what stays denied: %s (existingProfile: replace would let the version decide alone)",
				b.plan.Version, strings.Join(denied, ", "))
		}
		return b.inject(profile, slices.DeleteFunc(missingForStart(own), func(call string) bool { return slices.Contains(lacks, call) }))
	}
	return b.inject(profile, nil)
}

// phases injects the filter of phases. A spec has one profile, and what this one asks a
// supervisor about can't be united with the rules of the container's own.
func (b *builder) phases(keep bool) error {
	switch {
	case b.Phases == nil:
		return errors.New("the decision has phases, and nobody compiled them")
	case !keep:
	case b.Container.SeccompUnknown:
		b.warn("%s doesn't show the container's own seccomp profile to plugins; if it has one, the phases replace it whole (existingProfile: replace says that this is meant)", b.engine())
	case b.Container.Seccomp != nil:
		return fmt.Errorf("%w: phases beside the container's own seccomp profile, which they would replace (set existingProfile: replace if that is meant)", ErrNotApplicable)
	}
	profile := profiles.Clone(b.Phases)
	var asked []string
	for _, r := range profile.Syscalls {
		if r.Action == specs.ActNotify {
			asked = append(asked, r.Names...)
		}
	}
	// The compiler saw to the start of a container, and to mustDeny.
	return b.inject(profile, asked)
}

// version returns a copy of the version's profile.
func (b *builder) version() (*specs.LinuxSeccomp, error) {
	if b.Version == nil || b.Version.Profile == nil {
		return nil, fmt.Errorf("%w: %s, mode %s (run it in mode record first)", ErrNoVersion, b.Decision.Workload, b.Decision.Mode)
	}
	return profiles.Clone(b.Version.Profile), nil
}

func (b *builder) setVersion() {
	b.plan.Version, b.plan.Digest = b.Version.Manifest.Version, b.Version.Manifest.Digest
}

// keepUnknown leaves a profile alone that may or may not be there, so nothing
// may be concluded from the number of filters.
func (b *builder) keepUnknown() error {
	if len(b.Decision.MustDeny) > 0 {
		b.problem("mustDeny (%s) within a seccomp profile that %s doesn't show to plugins (set existingProfile: replace)",
			strings.Join(b.Decision.MustDeny, ", "), b.engine())
	}
	b.plan.Gate = profiles.GateExec
	b.note("%s doesn't show the container's own seccomp profile to plugins; it is kept, and calls are counted from the first execve on", b.engine())
	return nil
}

func (b *builder) engine() string {
	if b.Runtime.Engine == "" {
		return "the runtime"
	}
	return b.Runtime.Engine
}

// inject applies the policy's lists and refuses what could not start. Calls in
// excused were missing before the policy had a say.
func (b *builder) inject(profile *specs.LinuxSeccomp, excused []string) error {
	d := &b.Decision
	if r := &b.Runtime; r.Adapter == AdapterNRI && r.Engine == "containerd" && before(r.EngineVersion, 2, 2) {
		// Not a word of it in NRI's answer, and under a profile of the container's
		// own the read-back would find a filter, too.
		return fmt.Errorf("%w: containerd %s drops the seccomp profiles of NRI plugins (NRI knows them since 0.10: install containerd 2.2 or later)", ErrNotApplicable, r.EngineVersion)
	} else if r.Adapter == AdapterNRI && r.Engine == "cri-o" && before(r.EngineVersion, 1, 35) {
		// 1.34.0 has NRI 0.9.
		return fmt.Errorf("%w: CRI-O %s drops the seccomp profiles of NRI plugins (NRI knows them since 0.10: install CRI-O 1.36 or later)", ErrNotApplicable, r.EngineVersion)
	}
	if b.plan.Version > 0 {
		mustAllow(profile, d.MustAllow)
		for _, arch := range d.Architectures {
			if !slices.Contains(profile.Architectures, arch) {
				profile.Architectures = append(profile.Architectures, arch)
			}
		}
	}
	// Last: nothing may widen the profile after this.
	for _, via := range mustDeny(profile, d.MustDeny) {
		b.warn("%s is denied too: it reaches calls of mustDeny", via)
	}
	if risky := slices.DeleteFunc(profiles.Incidental(), func(call string) bool { return !slices.Contains(d.MustDeny, call) }); len(risky) > 0 {
		b.warn("mustDeny holds %s: a runtime written in Go, such as runc, calls that at random while it starts a container; some starts may fail",
			strings.Join(risky, ", "))
	}
	missing := slices.DeleteFunc(missingForStart(profile), func(call string) bool { return slices.Contains(excused, call) })
	if len(missing) > 0 {
		return &MissingCallsError{Workload: d.Workload, Version: b.plan.Version, Calls: missing}
	}
	if errno := profile.DefaultErrnoRet; errno != nil && *errno != errnoPerm && b.Runtime.Adapter == AdapterNRI {
		b.warn("calls without a rule are denied with EPERM instead of errno %d: NRI has the runtime drop the profile's default errno", *errno)
	}
	if b.Runtime.NoErrno {
		if changed := withoutErrno(profile); len(changed) > 0 {
			b.warn("denied with EPERM, not the errno of their rules: %s (%s %s crashes on such a rule, and a program that may ptrace could undo another denial; where clone3 is among them, programs that use glibc make no threads)",
				strings.Join(changed, ", "), b.engine(), b.Runtime.EngineVersion)
		}
	}
	b.plan.Seccomp = profile
	if len(b.plan.Expect) == 0 {
		b.expectFilter()
	}
	return nil
}

// withoutErrno takes the errnos out of a profile's rules, and returns the calls
// that are denied with EPERM instead. Where there is no tracer, a call that is left
// to one fails with ENOSYS (seccomp(2)). Under a profile that denies ptrace, no
// process of the container is one.
func withoutErrno(p *specs.LinuxSeccomp) (changed []string) {
	traced := mentions(p, "ptrace") || !profiles.Denies(p.DefaultAction)
	for i := range p.Syscalls {
		r := &p.Syscalls[i]
		if r.ErrnoRet == nil {
			continue
		}
		switch errno := *r.ErrnoRet; {
		case r.Action != specs.ActErrno || errno == errnoPerm:
		case errno == errnoNoCall && !traced:
			r.Action = specs.ActTrace
		default:
			changed = append(changed, r.Names...)
		}
		r.ErrnoRet = nil
	}
	return changed
}

// before reports whether a version such as "2.1.4" or "v1.7.27" comes before
// another. What can't be read doesn't.
func before(version string, major, minor int) bool {
	var gotMajor, gotMinor int
	if n, _ := fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &gotMajor, &gotMinor); n != 2 {
		return false
	}
	return gotMajor < major || gotMajor == major && gotMinor < minor
}

// expectFilter: /proc/PID/status has mode 2 (filter), and one filter more than
// the runtime itself. Whether the filter is loaded before the program is
// executed depends on no_new_privs, so it is looked for only then.
func (b *builder) expectFilter() {
	b.expect(Expectation{Stage: StageRunning, Source: SourceProc, File: "status", Field: "Seccomp", Want: "2", Rule: RuleEqual})
	b.expect(Expectation{
		Stage: StageRunning, Source: SourceProc, File: "status", Field: "Seccomp_filters",
		Want: strconv.Itoa(b.Runtime.BaseFilters + 1), Rule: RuleAtLeast,
	})
}

func (b *builder) expect(e Expectation) { b.plan.Expect = append(b.plan.Expect, e) }

// What a runtime answers where a rule names no errno, and what libc takes for a
// call that the kernel lacks.
const (
	errnoPerm   uint = 1
	errnoNoCall uint = 38
)

// mustDeny makes the profile deny calls whatever it said of them, and returns
// the multiplexers that it denied with them.
func mustDeny(p *specs.LinuxSeccomp, calls []string) (via []string) {
	if len(calls) == 0 {
		return nil
	}
	deny := set(calls)
	open := !profiles.Denies(p.DefaultAction)
	// A rule that allows socketcall(2) or ipc(2) whatever their arguments allows
	// all that they multiplex, and in libseccomp wins over the rule by argument
	// that a denied socket(2) becomes on x86. Where the profile has no such
	// rule, libseccomp's own multiplexing is exact for socketcall. For ipc it is
	// not: the kernel looks at the lower 16 bits of what libseccomp compares
	// whole (ipc/syscall.c: "version = call >> 16"), so an ipc that nothing
	// denies reaches all.
	for _, name := range profiles.Multiplexers(calls) {
		if !deny[name] && (mentions(p, name) || open && name == "ipc") {
			deny[name] = true
			via = append(via, name)
		}
	}
	// Calls that need a rule of their own, also beside a default that denies.
	noCall := map[string]bool{}
	// glibc makes no threads if clone3 fails with anything but ENOSYS: it then
	// uses clone, whose flags a filter sees.
	if deny["clone3"] && (open || mentions(p, "clone3")) {
		noCall["clone3"] = true
	}
	// Without one, libseccomp lets connect(2) pass through socketcall(2), and past
	// conditions that socketcall had.
	for name := range deny {
		if profiles.Multiplexed(name) != nil && (!slices.Contains(via, name) || slices.ContainsFunc(p.Syscalls, func(r specs.LinuxSyscall) bool {
			return len(r.Args) > 0 && slices.Contains(r.Names, name)
		})) {
			noCall[name] = true
		}
	}
	kept := remove(p, func(rule *specs.LinuxSyscall, name string) bool {
		return deny[name] && (!profiles.Denies(rule.Action) || len(rule.Args) > 0 || isDefault(p, rule))
	})
	add := func(errno uint, names []string) {
		names = slices.DeleteFunc(names, func(c string) bool { return kept[c] })
		for _, name := range names {
			kept[name] = true
		}
		if len(names) > 0 {
			p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: names, Action: specs.ActErrno, ErrnoRet: &errno})
		}
	}
	add(otherErrno(p), slices.Sorted(maps.Keys(noCall)))
	if open {
		add(errnoPerm, slices.Sorted(maps.Keys(deny)))
	}
	return via
}

// otherErrno is one that a rule can have and still say something: not that of
// the default.
func otherErrno(p *specs.LinuxSeccomp) uint {
	errno := errnoNoCall
	if isDefault(p, &specs.LinuxSyscall{Action: specs.ActErrno, ErrnoRet: &errno}) {
		return errnoPerm
	}
	return errno
}

// mentions reports whether a rule that doesn't deny has the call.
func mentions(p *specs.LinuxSeccomp, name string) bool {
	return slices.ContainsFunc(p.Syscalls, func(r specs.LinuxSyscall) bool {
		return !profiles.Denies(r.Action) && slices.Contains(r.Names, name)
	})
}

// mustAllow makes the profile allow calls whatever their arguments.
func mustAllow(p *specs.LinuxSeccomp, calls []string) {
	if len(calls) == 0 {
		return
	}
	allow := set(calls)
	kept := remove(p, func(rule *specs.LinuxSyscall, name string) bool {
		return allow[name] && !(rule.Action == specs.ActAllow && len(rule.Args) == 0)
	})
	explicit := slices.DeleteFunc(slices.Sorted(maps.Keys(allow)), func(c string) bool { return kept[c] })
	if len(explicit) > 0 && p.DefaultAction != specs.ActAllow {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: explicit, Action: specs.ActAllow})
	}
}

// remove takes names out of rules, drops rules without names, and returns the
// names that are left.
func remove(p *specs.LinuxSeccomp, which func(*specs.LinuxSyscall, string) bool) map[string]bool {
	kept := map[string]bool{}
	rules := p.Syscalls[:0]
	for _, rule := range p.Syscalls {
		rule.Names = slices.DeleteFunc(rule.Names, func(name string) bool { return which(&rule, name) })
		if len(rule.Names) == 0 {
			continue
		}
		for _, name := range rule.Names {
			kept[name] = true
		}
		rules = append(rules, rule)
	}
	p.Syscalls = rules
	return kept
}

// rulesOf sorts a profile's rules by call.
func rulesOf(p *specs.LinuxSeccomp) map[string][]specs.LinuxSyscall {
	rules := map[string][]specs.LinuxSyscall{}
	for _, rule := range p.Syscalls {
		for _, name := range rule.Names {
			rules[name] = append(rules[name], rule)
		}
	}
	return rules
}

func set(names []string) map[string]bool {
	s := make(map[string]bool, len(names))
	for _, n := range names {
		s[n] = true
	}
	return s
}
