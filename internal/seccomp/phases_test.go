// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// TestGroups: groups and the floor have names that there are, and every call of an
// x86 ABI is in one of them.
func TestGroups(t *testing.T) {
	covered := map[string]bool{"clone3": true, "openat2": true, "socketcall": true, "ipc": true}
	for _, name := range profiles.WholePhaseFloor() {
		if !Known(name) {
			t.Errorf("floor: unknown call %s", name)
		}
		covered[name] = true
	}
	if floor := profiles.WholePhaseFloor(); !slices.IsSorted(floor) || len(slices.Compact(slices.Clone(floor))) != len(floor) {
		t.Error("the floor is not sorted")
	}
	groups := profiles.Groups()
	if !slices.IsSortedFunc(groups, func(a, b profiles.Group) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("groups are not sorted")
	}
	for _, g := range groups {
		for _, r := range g.Rules {
			for _, name := range r.Names {
				if !Known(name) {
					t.Errorf("%s: unknown call %s", g.Name, name)
				}
				for _, a := range r.Args {
					if !profiles.ScalarArgument(name, a.Index) && (a.Op != specs.OpEqualTo || a.Value != 0) {
						t.Errorf("%s: argument %d of %s is compared, and no number", g.Name, a.Index, name)
					}
				}
				covered[name] = true
			}
		}
		if g.About == "" || !strings.HasPrefix(g.Name, "@") {
			t.Errorf("%q: %q", g.Name, g.About)
		}
	}
	for abi, numbers := range numbersOf() {
		for _, n := range numbers {
			if !covered[n.name] {
				t.Errorf("%s: %s is in no group", abi, n.name)
			}
		}
	}
}

// phaseModel says what a phase allows from its policy alone, with neither regions nor
// rules.
type phaseModel struct {
	set    *profiles.PhaseSet
	narrow func(name string, index uint) bool
}

func newPhaseModel(t *testing.T, set *profiles.PhaseSet) *phaseModel {
	t.Helper()
	data, err := os.ReadFile("../../profiles/scalars.txt")
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]string{}
	for line := range strings.Lines(string(data)) {
		name, k, _ := strings.Cut(strings.TrimSpace(line), " ")
		kinds[name] = k
	}
	return &phaseModel{set, func(name string, index uint) bool {
		return int(index) < len(kinds[name]) && kinds[name][index] == 'i'
	}}
}

func (m *phaseModel) holds(name string, args []specs.LinuxSeccompArg, d *seccompData) bool {
	cut := *d
	for i := range cut.args {
		if abi, _, _ := split(d); abi != specs.ArchX86_64 || m.narrow(name, uint(i)) {
			cut.args[i] &= 1<<32 - 1
		}
	}
	return matches(args, specs.ArchX86_64, &cut)
}

const openWrites = unix.O_ACCMODE | unix.O_CREAT | unix.O_TRUNC

func (m *phaseModel) allows(p *profiles.Phase, name string, d *seccompData) bool {
	const namespaces = 0x7e020000
	thread := name == "clone" && d.args[0]&namespaces == 0 && d.args[0]&unix.CLONE_THREAD != 0
	if slices.Contains(profiles.WholePhaseFloor(), name) || thread {
		return true
	}
	if slices.Contains(m.set.MustDeny, name) || name == "" {
		return false
	}
	allowed := false
	for _, r := range append(slices.Clone(p.Allow), profiles.PhaseRule{Names: m.set.MustAllow}) {
		for _, n := range r.Names {
			if g, ok := profiles.FindGroup(n); ok {
				for _, gr := range g.Rules {
					allowed = allowed || slices.Contains(gr.Names, name) && m.holds(name, gr.Args, d)
				}
				continue
			}
			is := n == name
			if len(r.Args) == 0 {
				is = is || slices.Contains(modelSame[n], name) ||
					(n == "fork" || n == "vfork") && name == "clone" && d.args[0]&namespaces == 0
			}
			allowed = allowed || is && m.holds(name, r.Args, d)
		}
	}
	if p.WritePaths != nil && len(p.WritePaths) == 0 {
		if i := slices.Index([]string{"", "open", "openat"}, name); i > 0 && d.args[i]&openWrites != 0 {
			return false
		}
	}
	if len(p.Network) > 0 && name == "socket" {
		family := uint32(d.args[0])
		ok := false
		for _, to := range p.Network {
			want := uint32(unix.AF_INET)
			if to == "unix" {
				want = unix.AF_UNIX
			} else if to[0] == '[' {
				want = unix.AF_INET6
			}
			ok = ok || family == want
		}
		return allowed && ok
	}
	return allowed
}

// modelSame is what naming some calls means beside themselves, of those that the
// random policies name.
var modelSame = map[string][]string{
	"open": {"openat"}, "openat": {"open"}, "stat": {"stat64", "lstat", "lstat64", "newfstatat", "fstatat64", "statx"},
	"accept": {"accept4"}, "accept4": {"accept"}, "send": {"sendto"}, "sendto": {"send"},
	"getdents64": {"getdents"}, "unlink": {"unlinkat"}, "unlinkat": {"unlink"}, "dup2": {"dup3"},
	"recvmmsg": {"recvmmsg_time64"},
}

// everywhere are the calls that a policy allows in all phases because the one whose
// flags can be seen is.
func (m *phaseModel) everywhere(name string, asked map[string][][6]uint64) bool {
	other := map[string]string{"openat2": "openat", "clone3": "clone"}[name]
	if other == "" || slices.Contains(m.set.MustDeny, name) {
		return false
	}
	for i := range m.set.Phases {
		for _, args := range append([][6]uint64{{}, {1<<64 - 1, 0, 1<<64 - 1}, {0x7e020000}}, asked[other]...) {
			d := seccompData{arch: unix.AUDIT_ARCH_X86_64, args: args}
			if !m.allows(&m.set.Phases[i], other, &d) {
				return false
			}
		}
	}
	return true
}

// vectors are arguments at which what phases allow changes.
func vectors(set *profiles.PhaseSet, r *rand.Rand) map[string][][6]uint64 {
	values := map[string]map[uint64]bool{}
	note := func(name string, v ...uint64) {
		if values[name] == nil {
			values[name] = map[uint64]bool{}
		}
		for _, x := range v {
			values[name][x] = true
		}
	}
	rule := func(rule profiles.PhaseRule) {
		for _, name := range rule.Names {
			for _, a := range rule.Args {
				for _, v := range []uint64{a.Value, a.ValueTwo} {
					note(name, v, v-1, v+1, v|1<<32, v|1<<63, ^v, v^1, v^0x40)
				}
			}
		}
	}
	for _, p := range set.Phases {
		for _, allow := range p.Allow {
			rule(allow)
			for _, n := range allow.Names {
				if g, ok := profiles.FindGroup(n); ok {
					for _, gr := range g.Rules {
						rule(gr)
					}
				}
			}
		}
	}
	for _, name := range []string{"open", "openat", "creat"} {
		note(name, 0, 1, 2, 3, 0x40, 0x200, 0x80000, 0x80001, 1<<32, 0x10000)
	}
	for _, name := range []string{"socket", "socketpair"} {
		note(name, 1, 2, 10, 16, 17, 1<<32|2, 1<<32|1)
	}
	note("clone", 0x10000, 0, 0x11, 0x10000|0x20000000, 0x7e020000, 1<<32|0x10000)
	out := map[string][][6]uint64{}
	for name, set := range values {
		list := slices.Sorted(maps.Keys(set))
		for _, v := range list {
			out[name] = append(out[name], [6]uint64{v, v, v, v, v, v})
		}
		for range 12 { // each argument by itself
			var args [6]uint64
			for i := range args {
				args[i] = list[r.IntN(len(list))]
			}
			out[name] = append(out[name], args)
		}
	}
	return out
}

// compose holds what filters, table and hooks let pass to what phases allow, for
// every call of every ABI.
func compose(t *testing.T, set *profiles.PhaseSet, host profiles.PhaseHost, o profiles.PhaseOptions, r *rand.Rand) *profiles.PhasePlan {
	t.Helper()
	plan, err := profiles.CompilePhases(set, host, o)
	if err != nil {
		t.Fatalf("%v\n%+v", err, set)
	}
	base, err := Compile(plan.Profile, Options{})
	if err != nil {
		t.Fatalf("%v\n%+v\n%s", err, set, describe(plan.Profile))
	}
	if err := neverAsked(plan.Profile); err != nil {
		t.Fatal(err)
	}
	model := newPhaseModel(t, set)
	asked := vectors(set, r)
	start := profiles.Floor(o.Runtime)
	decided := map[string]bool{}
	for _, h := range plan.Hooks {
		for _, name := range h.Calls {
			decided[name] = true
		}
	}
	gaps := map[string]bool{}
	for _, g := range plan.Gaps {
		for _, word := range strings.Fields(g.What) {
			gaps[word] = true
		}
	}
	for _, phase := range append([]string{"start"}, plan.Phases...) {
		table := plan.Table(phase, Number)
		rules := plan.HookRules(phase)
		p := &set.Phases[max(0, slices.IndexFunc(set.Phases, func(p profiles.Phase) bool { return p.Name == phase }))]
		if phase == "start" {
			p = &set.Phases[slices.IndexFunc(set.Phases, func(p profiles.Phase) bool { return p.Name == set.Initial })]
		}
		var ratchet Filter
		if f := plan.Ratchets[phase]; f != nil {
			if ratchet, err = Compile(f, Options{}); err != nil {
				t.Fatalf("ratchet of %s: %v\n%+v", phase, err, set)
			}
		} else if p.Irreversible && host.Inject && phase != "start" {
			t.Fatalf("%s has no ratchet", phase)
		}
		for abi, numbers := range numbersOf() {
			for _, n := range append([]number{{unnamed, ""}, {1000, ""}}, numbers...) {
				points := append([][6]uint64{{}}, asked[n.name]...)
				for _, args := range points {
					d := seccompData{nr: n.nr, arch: auditArch[abi], args: args}
					if abi == specs.ArchX32 {
						d.nr, d.arch = n.nr|x32Bit, unix.AUDIT_ARCH_X86_64
					}
					verdict := answer(t, base, &d)
					if ratchet != nil {
						verdict = min(verdict, answer(t, ratchet, &d)) // the kernel takes the strictest
					}
					got := verdict == unix.SECCOMP_RET_ALLOW
					if verdict == unix.SECCOMP_RET_USER_NOTIF {
						got, _ = table.Decide(abi, n.nr, args)
					}
					got = got && plan.HookAllows(phase, abi, n.name, args)
					plain, seen := plainAllows(&rules, n.name, args)
					if hooked := plan.HookAllows(phase, abi, n.name, args); seen && plain != hooked && decided[n.name] {
						t.Fatalf("phase %s, %s under %s, arguments %#x: the hook's plain rules allow %t, its regions %t\n%+v\n%s", phase, n.name, abi, args, plain, hooked, rules, show(set))
					}
					listed := slices.Contains(profiles.Architectures(plan.Profile), abi)
					want := listed && (model.allows(p, n.name, &d) || model.everywhere(n.name, asked))
					if phase == "start" && listed && slices.Contains(start, n.name) && n.name != "openat2" && n.name != "clone3" && !slices.Contains(set.MustDeny, n.name) {
						want = true
					}
					if phase == "start" && got && !want {
						continue // what does the same as the runtime's calls, under other names
					}
					if got && !want && gaps[n.name] {
						continue
					}
					nothingWritten := phase != "start" && p.WritePaths != nil && len(p.WritePaths) == 0
					if want && seen && !plain && !nothingWritten {
						t.Fatalf("phase %s, %s under %s, arguments %#x: allowed, and denied by the hooks\n%+v\n%s", phase, n.name, abi, args, rules, show(set))
					}
					if got != want {
						t.Fatalf("phase %s, %s under %s, arguments %#x: allowed %t, want %t (filter %#x)\nhost %+v\n%s\n%s", phase, n.name, abi, args, got, want, verdict, host, show(set), describe(plan.Profile))
					}
					if phase != "start" && listed && plan.Allows(phase, abi, n.name, args) != want {
						t.Fatalf("phase %s: Allows(%s, %#x) is %t", phase, n.name, args, !want)
					}
				}
			}
		}
	}
	return plan
}

func answer(t *testing.T, f Filter, d *seccompData) uint32 {
	t.Helper()
	v, err := run(f, d)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// plainAllows says what programs do to a call that take a plan's plain rules, and
// whether the call passes one of them: what package bpf's do, leaving paths and
// destinations aside.
func plainAllows(r *profiles.HookRules, name string, args [6]uint64) (allowed, seen bool) {
	open := func(flags uint64) bool {
		if uint32(flags)&openWrites != 0 {
			return r.OpenWrite
		}
		return r.OpenRead
	}
	switch name {
	case "open":
		return open(args[1]), true
	case "openat":
		return open(args[2]), true
	case "creat", "mknod", "mknodat":
		return r.OpenWrite, true
	case "openat2", "open_by_handle_at":
		return r.OpenRead && r.OpenWrite, true // flags that nobody sees
	case "socket", "socketpair":
		family := uint32(args[0])
		// The kernel has no other, and says so before any hook.
		return family < 64 && r.Families&(1<<family) != 0, family < 64
	case "connect":
		return r.Connect, true
	case "bind":
		return r.Bind, true
	case "listen":
		return r.Listen, true
	case "accept", "accept4":
		return r.Accept, true
	case "execve", "execveat":
		return r.Exec, true
	}
	return true, false
}

func neverAsked(p *specs.LinuxSeccomp) error {
	for _, r := range p.Syscalls {
		for _, name := range r.Names {
			if r.Action == specs.ActNotify && slices.Contains(profiles.WholePhaseFloor(), name) {
				return fmt.Errorf("the supervisor is asked about %s", name)
			}
		}
	}
	return nil
}

func show(set *profiles.PhaseSet) string {
	var b strings.Builder
	fmt.Fprintf(&b, "initial %s, must allow %v, must deny %v\n", set.Initial, set.MustAllow, set.MustDeny)
	for _, p := range set.Phases {
		fmt.Fprintf(&b, "%+v\n", p)
	}
	return b.String()
}

var (
	allHost  = profiles.PhaseHost{Notify: true, WaitKillable: true, LSM: true, CgroupConnect: true, Inject: true}
	askHost  = profiles.PhaseHost{Notify: true, CgroupConnect: true, Inject: true}
	noHost   = profiles.PhaseHost{}
	phaseSet = profiles.PhaseSet{
		Initial: "read_only",
		Phases: []profiles.Phase{
			{Name: "read_only", Allow: []profiles.PhaseRule{{Names: []string{"@file-read", "@info"}}}, WritePaths: []string{}, Network: []string{}},
			{Name: "write_logs", Allow: []profiles.PhaseRule{{Names: []string{"@file-read", "@file-write", "@info"}}}, WritePaths: []string{"/var/log"}},
			{Name: "network", Allow: []profiles.PhaseRule{{Names: []string{"@file-read", "@info", "@network"}}}, Network: []string{"unix", "10.0.0.0/8:443"}},
			{Name: "locked", Irreversible: true},
		},
	}
)

func TestPhases(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	naive := profiles.PhaseSet{Initial: "a", Phases: []profiles.Phase{
		{Name: "a", Allow: []profiles.PhaseRule{{Names: []string{"read", "close", "stat", "getdents64", "mmap"}}}},
		{Name: "b", Allow: []profiles.PhaseRule{{Names: []string{"read", "write", "openat", "execve", "fork"}}}},
	}}
	loose := profiles.PhaseSet{Initial: "a", Phases: []profiles.Phase{
		{Name: "a", Allow: []profiles.PhaseRule{{Names: []string{"open", "clone", "@io-uring"}}}},
		{Name: "b", Allow: []profiles.PhaseRule{{Names: []string{"openat", "clone"}}}},
	}}
	for name, set := range map[string]*profiles.PhaseSet{"agent": &phaseSet, "naive": &naive, "loose": &loose} {
		for hostName, host := range map[string]profiles.PhaseHost{"all": allHost, "ask": askHost, "none": noHost} {
			for _, abis := range [][]specs.Arch{nil, allABIs} {
				t.Run(fmt.Sprintf("%s/%s/%d", name, hostName, len(abis)), func(t *testing.T) {
					compose(t, set, host, profiles.PhaseOptions{Architectures: abis, Runtime: "runc"}, r)
				})
			}
		}
	}
}

// conditioned are the calls of random policies, with arguments that are numbers.
var conditioned = map[string][]uint{
	"open": {1, 2}, "openat": {2, 3}, "socket": {0, 1, 2}, "socketpair": {0, 1}, "clone": {0, 1, 4}, "ioctl": {1, 2},
	"prctl": {0, 1, 4}, "personality": {0}, "kill": {0, 1}, "connect": {0, 2}, "sendto": {2, 3}, "accept4": {3}, "unlinkat": {2},
	"dup2": {0, 1}, "execveat": {4}, "mlock2": {1, 2}, "io_uring_setup": {0}, "openat2": {3}, "recvmmsg": {2}, "creat": {1},
	"getdents64": {2}, "lseek": nil, "stat": nil, "clone3": {1}, "fork": nil, "execve": nil, "accept": nil,
}

func randomPhases(r *rand.Rand) *profiles.PhaseSet {
	names := slices.Sorted(maps.Keys(conditioned))
	var groups []string
	for _, g := range profiles.Groups() {
		groups = append(groups, g.Name)
	}
	operators := []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpEqualTo, specs.OpNotEqual, specs.OpMaskedEqual, specs.OpMaskedEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual}
	edges := []uint64{0, 1, 2, 3, 10, 0x11, 0x40, 0x243, 0x5401, 0x10000, 0x7e030000, 1 << 31, 1<<32 - 1}
	set := &profiles.PhaseSet{}
	for i := range 1 + r.IntN(4) {
		p := profiles.Phase{Name: string(rune('a' + i)), Irreversible: i > 0 && r.IntN(3) == 0}
		if r.IntN(4) == 0 {
			p.WritePaths = [][]string{{}, {"/tmp"}}[r.IntN(2)]
		}
		if r.IntN(4) == 0 {
			p.Network = [][]string{{}, {"unix"}, {"10.0.0.0/8", "[::1]"}}[r.IntN(3)]
		}
		for range r.IntN(6) {
			name := names[r.IntN(len(names))]
			rule := profiles.PhaseRule{Names: []string{name}}
			switch args := conditioned[name]; {
			case r.IntN(4) == 0:
				rule.Names = []string{groups[r.IntN(len(groups))]}
			case len(args) > 0 && r.IntN(4) > 0:
				for _, index := range args[:1+r.IntN(len(args))] {
					if len(rule.Args) > 0 && r.IntN(3) > 0 {
						continue
					}
					a := specs.LinuxSeccompArg{Index: index, Op: operators[r.IntN(len(operators))], Value: edges[r.IntN(len(edges))]}
					if a.Op == specs.OpMaskedEqual {
						a.ValueTwo = a.Value & edges[r.IntN(len(edges))]
					}
					rule.Args = append(rule.Args, a)
				}
			}
			p.Allow = append(p.Allow, rule)
			// What contradicts the rest, or is too much, is refused, and of no interest here.
			one := profiles.PhaseSet{Initial: p.Name, Phases: []profiles.Phase{p}}
			if one.Check() != nil {
				p.Allow = p.Allow[:len(p.Allow)-1]
			}
		}
		set.Phases = append(set.Phases, p)
	}
	set.Initial = "a"
	for _, list := range []*[]string{&set.MustAllow, &set.MustDeny} {
		if r.IntN(3) == 0 {
			*list = []string{[]string{"connect", "unlink", "openat", "execve"}[r.IntN(4)]}
			if set.Check() != nil {
				*list = nil
			}
		}
	}
	return set
}

// TestPhasesRandom: in each phase of any policy, all parts together let exactly that
// pass which the phase allows.
func TestPhasesRandom(t *testing.T) {
	n := 20
	if testing.Short() {
		n = 10
	}
	for seed := range uint64(n) {
		randomPlan(t, seed)
	}
}

func FuzzPhases(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(func(t *testing.T, seed uint64) { randomPlan(t, seed) })
}

func randomPlan(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 3))
	set := randomPhases(r)
	host := []profiles.PhaseHost{allHost, askHost, {Notify: true}, {Notify: true, LSM: true}, {LSM: true, Inject: true}, noHost}[r.IntN(6)]
	abis := [][]specs.Arch{nil, allABIs[:2], allABIs}[r.IntN(3)]
	func() {
		defer func() {
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
		}()
		compose(t, set, host, profiles.PhaseOptions{Architectures: abis, Runtime: []string{"", "runc"}[r.IntN(2)]}, r)
	}()
}
