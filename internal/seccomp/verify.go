// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"fmt"
	"maps"
	"slices"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// libseccomp (2.5.4) fails in three ways, none of which it reports:
//
//   - It loops for ever in seccomp_rule_add when two rules for one call share a
//     condition other than EQ and MASKED_EQ and each has another on a higher
//     argument. [endless] finds them before it is asked: a pod's profile must not
//     hang the node.
//   - When two rules for one call share an argument and one of them has two
//     conditions or more, it may not try the other after the one, or compare the
//     wrong argument (the one that it loaded last).
//   - Where a filter is for both x86_64 and x32 and has hardly any rules for
//     x86_64, but a condition, it may not load the number before it compares it:
//     no rule for x86_64 counts.
//
// The last two may allow what the profile denies. [verify] runs each filter and
// refuses those; podman's and containerd's default profiles pass.
//
// BUG(seccomp): it is this process's libseccomp that is held to the profile. A
// runtime that is linked with another one may make another filter of it.

// maxPoints bounds what verify asks of a profile's conditions, for each ABI.
const maxPoints = 1 << 15

// conditional are the rules with conditions, by call, as addRule hands them to
// libseccomp.
func conditional(p *specs.LinuxSeccomp) map[string][]alternative {
	out := map[string][]alternative{}
	for i, rule := range p.Syscalls {
		sets := [][]specs.LinuxSeccompArg{rule.Args}
		if repeats(rule.Args) {
			sets = nil
			for _, a := range rule.Args {
				sets = append(sets, []specs.LinuxSeccompArg{a})
			}
		}
		for _, name := range rule.Names {
			for _, set := range sets {
				if len(set) > 0 {
					out[name] = append(out[name], alternative{i, set})
				}
			}
		}
	}
	return out
}

type alternative struct {
	rule int // position in the profile
	args []specs.LinuxSeccompArg
}

// inner are the conditions that libseccomp puts before another (all but that of
// the highest argument), without those for equality, which do no harm: found by
// trying all pairs of operators.
func (a alternative) inner() []specs.LinuxSeccompArg {
	chain := slices.SortedFunc(slices.Values(a.args), func(x, y specs.LinuxSeccompArg) int { return int(x.Index) - int(y.Index) })
	return slices.DeleteFunc(chain[:len(chain)-1], func(c specs.LinuxSeccompArg) bool {
		return c.Op == specs.OpEqualTo || c.Op == specs.OpMaskedEqual
	})
}

// endless finds the rules that libseccomp would never return from.
func endless(p *specs.LinuxSeccomp) (problems []error) {
	calls := conditional(p)
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		seen := map[specs.LinuxSeccompArg]int{}
		for _, a := range calls[name] {
			for _, c := range a.inner() {
				c.ValueTwo = 0 // has no meaning but for masks
				if other, ok := seen[c]; ok {
					problems = append(problems, fmt.Errorf("syscalls[%d]: %s: shares the condition on argument %d with syscalls[%d], and each has one on a higher argument: libseccomp %s would not return from that; use rules with one condition each", a.rule, name, c.Index, other, libraryVersion()))
				}
				seen[c] = a.rule
			}
		}
	}
	return problems
}

// points are the arguments with which verify asks about the calls that have
// conditions, by call.
func points(p *specs.LinuxSeccomp) (map[string][][6]uint64, error) {
	out := map[string][][6]uint64{}
	calls, left := conditional(p), maxPoints
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		at, ok := edges(calls[name], left)
		if !ok {
			return nil, fmt.Errorf("syscalls[%d]: %s: too many conditions to check what libseccomp makes of them: use fewer, with one for each rule", calls[name][0].rule, name)
		}
		out[name] = at
		left -= len(at)
	}
	return out, nil
}

// number is a call of an ABI by number, without the x32 bit.
type number struct {
	nr   uint32
	name string
}

// numbersOf are all that libseccomp has a name for, by ABI.
var numbersOf = sync.OnceValue(func() map[profiles.ABI][]number {
	out := map[profiles.ABI][]number{}
	for _, abi := range []profiles.ABI{specs.ArchX86_64, specs.ArchX86, specs.ArchX32} {
		for nr := range uint32(1024) {
			if name, ok := Name(abi, nr); ok {
				out[abi] = append(out[abi], number{nr, name})
			}
		}
	}
	return out
})

// unnamed is a number that no ABI has a call for.
const unnamed = 1 << 20

// verify asks a filter about every call of every x86 ABI, and at the edges of
// their conditions about those that have some.
func verify(p *specs.LinuxSeccomp, f Filter, at map[string][][6]uint64) error {
	m := newModel(p)
	architectures := p.Architectures
	if len(architectures) == 0 {
		architectures = []specs.Arch{specs.ArchX86_64}
	}
	for abi, numbers := range numbersOf() {
		listed := slices.Contains(architectures, abi)
		for _, n := range append([]number{{unnamed, ""}}, numbers...) {
			d := seccompData{nr: n.nr, arch: auditArch[abi]}
			if abi == specs.ArchX32 {
				d.nr, d.arch = n.nr|x32Bit, auditArch[specs.ArchX86_64]
			}
			asked := at[n.name]
			if way := profiles.Multiplexed(n.name); way != nil {
				for i := range uint64(32) {
					asked = append(slices.Clip(asked), [6]uint64{i})
				}
			} else if asked == nil {
				asked = [][6]uint64{{}}
			}
			for _, d.args = range asked {
				got, err := run(f, &d)
				if err != nil {
					return fmt.Errorf("compiled filter: %w", err)
				}
				want := []uint32{unix.SECCOMP_RET_KILL_THREAD}
				if listed {
					want = m.answers(n.name, abi, &d)
				}
				if !slices.Contains(want, got) {
					return fmt.Errorf("libseccomp %s compiles the rules for %s wrongly: under %s with arguments %#x it answers %#x; rules with one condition each, beside some without, are safe", libraryVersion(), call(n), abi, d.args, got)
				}
			}
		}
	}
	return nil
}

func call(n number) string {
	if n.name == "" {
		return fmt.Sprintf("call %d", n.nr)
	}
	return n.name
}

// model is a profile by call, without the rules that say nothing.
type model struct {
	rules     map[string][]specs.LinuxSyscall
	byDefault uint32
}

func newModel(p *specs.LinuxSeccomp) *model {
	m := &model{map[string][]specs.LinuxSyscall{}, verdict(p.DefaultAction, p.DefaultErrnoRet)}
	for _, rule := range p.Syscalls {
		if verdict(rule.Action, rule.ErrnoRet) == m.byDefault {
			continue
		}
		for _, name := range rule.Names {
			m.rules[name] = append(m.rules[name], rule)
		}
	}
	return m
}

// answers are those that a profile gives to a call: of the first rule without
// conditions, or else of every rule that matches, because which of them is first
// means nothing to libseccomp.
func (m *model) answers(name string, abi profiles.ABI, d *seccompData) (out []uint32) {
	for _, rule := range m.rules[name] {
		switch {
		case len(rule.Args) == 0:
			return []uint32{verdict(rule.Action, rule.ErrnoRet)}
		case holds(rule.Args, abi, &d.args):
			out = append(out, verdict(rule.Action, rule.ErrnoRet))
		}
	}
	if abi == specs.ArchX86 {
		// What libseccomp makes of the conditions of a call behind socketcall, whose
		// arguments are in memory, is its business.
		for _, behind := range profiles.Multiplexed(name) {
			for _, rule := range m.rules[behind] {
				out = append(out, verdict(rule.Action, rule.ErrnoRet), m.byDefault)
			}
		}
	}
	if out == nil {
		out = append(out, m.byDefault)
	}
	return out
}

// edges are the argument values around which conditions change their mind; false
// if there are more than most. Where rules have several conditions, they are
// combined, and each argument gets the values of all: libseccomp may compare one
// argument with what was meant for another.
func edges(alternatives []alternative, most int) (points [][6]uint64, ok bool) {
	var values [6][]uint64 // by argument
	combine := false
	for _, a := range alternatives {
		combine = combine || len(alternatives) > 1 && len(a.args) > 1
		for _, c := range a.args {
			v := &values[c.Index]
			if c.Op == specs.OpMaskedEqual {
				two := c.ValueTwo & c.Value
				*v = append(*v, two, two|^c.Value, two^c.Value, two^(c.Value&-c.Value))
			} else {
				*v = append(*v, c.Value-1, c.Value, c.Value+1)
			}
		}
	}
	if !combine {
		all := 0
		for i := range values {
			all += 2 * len(values[i])
		}
		if all > most {
			return nil, false
		}
		for i := range values {
			for _, v := range values[i] {
				for _, other := range []uint64{0, 1<<64 - 1} {
					point := [6]uint64{other, other, other, other, other, other}
					point[i] = v
					points = append(points, point)
				}
			}
		}
		return points, true
	}
	every := slices.Concat(values[:]...)
	slices.Sort(every)
	every = slices.Compact(every)
	points = [][6]uint64{{}}
	for i := range values {
		if values[i] == nil {
			continue
		}
		if len(points)*len(every) > most {
			return nil, false
		}
		var next [][6]uint64
		for _, p := range points {
			for _, v := range every {
				p[i] = v
				next = append(next, p)
			}
		}
		points = next
	}
	return points, true
}

func holds(conditions []specs.LinuxSeccompArg, abi profiles.ABI, args *[6]uint64) bool {
	any, all := false, true
	for _, c := range conditions {
		v, value, two := args[c.Index], c.Value, c.ValueTwo
		if abi != specs.ArchX86_64 { // libseccomp compares 32 bits there
			v, value, two = v&(1<<32-1), value&(1<<32-1), two&(1<<32-1)
		}
		var ok bool
		switch c.Op {
		case specs.OpEqualTo:
			ok = v == value
		case specs.OpNotEqual:
			ok = v != value
		case specs.OpLessThan:
			ok = v < value
		case specs.OpLessEqual:
			ok = v <= value
		case specs.OpGreaterEqual:
			ok = v >= value
		case specs.OpGreaterThan:
			ok = v > value
		case specs.OpMaskedEqual:
			ok = v&value == two&value
		}
		any, all = any || ok, all && ok
	}
	if repeats(conditions) {
		return any
	}
	return all
}

// repeats says whether an argument has two conditions. As runc has it, such a
// rule becomes one rule for each: libseccomp can't AND them.
func repeats(conditions []specs.LinuxSeccompArg) bool {
	var seen [6]bool
	for _, c := range conditions {
		if seen[c.Index] {
			return true
		}
		seen[c.Index] = true
	}
	return false
}

// verdict is a filter's return value for an action.
func verdict(a specs.LinuxSeccompAction, errno *uint) uint32 {
	code := uint32(unix.EPERM)
	if errno != nil {
		code = uint32(*errno)
	}
	switch a {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG
	case specs.ActErrno:
		return unix.SECCOMP_RET_ERRNO | code
	case specs.ActTrace:
		return unix.SECCOMP_RET_TRACE | code
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP
	case specs.ActNotify:
		return unix.SECCOMP_RET_USER_NOTIF
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS
	}
	return unix.SECCOMP_RET_KILL_THREAD
}
