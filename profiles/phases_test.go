// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ruled(names ...string) []PhaseRule { return []PhaseRule{{Names: names}} }

// randomRegion has two arguments with few bits, so that boxes meet.
func randomRegion(r *rand.Rand) region {
	var out region
	for range r.IntN(4) {
		var b box
		for i := range 2 {
			b[i].mask = r.Uint64() & (above | 7)
			b[i].val = r.Uint64() & b[i].mask
		}
		out = append(out, b)
	}
	return out
}

// TestRegionLaws: regions are sets, at every point of those that the boxes speak of.
func TestRegionLaws(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 300 {
		a, b := randomRegion(r), randomRegion(r)
		minus, err := a.minus(b)
		if err != nil {
			t.Fatal(err)
		}
		and, err := a.and(b)
		if err != nil {
			t.Fatal(err)
		}
		spread, err := a.spread(b)
		if err != nil {
			t.Fatal(err)
		}
		or := a.or(b)
		within, subset := true, false
		if subset, err = a.within(b); err != nil {
			t.Fatal(err)
		}
		for x := range uint64(16) {
			for y := range uint64(16) {
				args := [6]uint64{x&7 | x>>3<<40, y&7 | y>>3<<63}
				inA, inB := a.has(specs.ArchX86_64, args), b.has(specs.ArchX86_64, args)
				within = within && (!inA || inB)
				for name, c := range map[string]struct {
					r    region
					want bool
				}{"minus": {minus, inA && !inB}, "spread": {spread, inA && !inB}, "and": {and, inA && inB}, "or": {or, inA || inB}, "tidy": {a.tidy(), inA}} {
					if got := c.r.has(specs.ArchX86_64, args); got != c.want {
						t.Fatalf("%s of %v and %v at %#x: %t, want %t", name, a, b, args, got, c.want)
					}
				}
			}
		}
		if within != subset {
			t.Fatalf("%v within %v: %t, want %t", a, b, subset, within)
		}
		for i, x := range minus {
			for _, y := range minus[:i] {
				if len(a) == 1 && !x.disjoint(y) {
					t.Fatalf("%v minus %v: %v and %v meet", a, b, x, y)
				}
			}
		}
	}
}

// TestRegionOf: a condition holds where the runtime-spec says, and for an int it
// looks at no more than the kernel does.
func TestRegionOf(t *testing.T) {
	values := []uint64{0, 1, 2, 7, 0x243, 1<<31 - 1, 1 << 31, 1<<32 - 2, 1<<32 - 1, 1 << 32, 1<<32 | 7, 1<<63 | 2, 1<<64 - 1}
	holds := map[specs.LinuxSeccompOperator]func(v, a, b uint64) bool{
		specs.OpEqualTo:      func(v, a, _ uint64) bool { return v == a },
		specs.OpNotEqual:     func(v, a, _ uint64) bool { return v != a },
		specs.OpLessThan:     func(v, a, _ uint64) bool { return v < a },
		specs.OpLessEqual:    func(v, a, _ uint64) bool { return v <= a },
		specs.OpGreaterThan:  func(v, a, _ uint64) bool { return v > a },
		specs.OpGreaterEqual: func(v, a, _ uint64) bool { return v >= a },
		specs.OpMaskedEqual:  func(v, a, b uint64) bool { return v&a == b },
	}
	for op, is := range holds {
		for _, a := range values {
			if a > low32 {
				continue
			}
			c := specs.LinuxSeccompArg{Index: 1, Op: op, Value: a}
			if op == specs.OpMaskedEqual {
				c.ValueTwo = a & 0x41
			}
			for name, wide := range map[string]bool{"ptrace": true, "socket": false} {
				r, err := regionOf(name, []specs.LinuxSeccompArg{c})
				if err != nil {
					t.Fatal(err)
				}
				for _, v := range values {
					seen := v
					if !wide {
						seen = v & low32
					}
					if got, want := r.has(specs.ArchX86_64, [6]uint64{0, v}), is(seen, a, c.ValueTwo); got != want {
						t.Errorf("%s: %#x %s %#x: %t, want %t", name, v, op, a, got, want)
					}
					if got, want := r.has(specs.ArchX86, [6]uint64{0, v}), is(v&low32, a, c.ValueTwo); got != want {
						t.Errorf("%s on i386: %#x %s %#x: %t, want %t", name, v, op, a, got, want)
					}
				}
			}
		}
	}
}

func TestScalarArgument(t *testing.T) {
	for _, tc := range []struct {
		name  string
		index uint
		want  bool
	}{
		{"openat", 0, true},
		{"openat", 1, false},
		{"openat", 2, true},
		{"openat", 4, false},
		{"connect", 1, false},
		{"socket", 2, true},
		{"clone", 0, true},
		{"getpid", 0, false},
		{"no_such_call", 0, false},
		{"futex", 0, false},
	} {
		if got := ScalarArgument(tc.name, tc.index); got != tc.want {
			t.Errorf("%s %d: %t", tc.name, tc.index, got)
		}
	}
}

func TestPhaseSetCheck(t *testing.T) {
	ab := func(a, b Phase) PhaseSet {
		a.Name, b.Name = "a", "b"
		return PhaseSet{Initial: "a", Phases: []Phase{a, b}}
	}
	arg := func(name string, args ...specs.LinuxSeccompArg) Phase {
		return Phase{Allow: []PhaseRule{{[]string{name}, args}}}
	}
	compare := func(op specs.LinuxSeccompOperator, index uint, v uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: index, Op: op, Value: v}
	}
	eq := func(index uint, v uint64) specs.LinuxSeccompArg { return compare(specs.OpEqualTo, index, v) }
	denied := ab(Phase{}, Phase{})
	denied.MustDeny = []string{"read"}
	both := ab(Phase{Allow: ruled("connect")}, Phase{})
	both.MustDeny = []string{"connect"}
	must := ab(Phase{Network: []string{}}, Phase{})
	must.MustAllow = []string{"connect"}
	for _, tc := range []struct {
		want string // empty: good
		set  PhaseSet
	}{
		{"", ab(Phase{}, Phase{})},
		{"0 phases", PhaseSet{}},
		{"9 phases", PhaseSet{Initial: "a", Phases: make([]Phase, 9)}},
		{`initial phase "x" does not exist`, PhaseSet{Initial: "x", Phases: []Phase{{Name: "a"}}}},
		{"given twice", PhaseSet{Initial: "a", Phases: []Phase{{Name: "a"}, {Name: "a"}}}},
		{"no name of a phase", PhaseSet{Initial: "a b", Phases: []Phase{{Name: "a b"}}}},
		{"meaning of its own", PhaseSet{Initial: "start", Phases: []Phase{{Name: "start"}}}},
		{"b: no phase leads to it", ab(Phase{Irreversible: true}, Phase{})},
		{"b: no phase leads to it", PhaseSet{Initial: "a", Phases: []Phase{{Name: "a", Next: []string{"c"}}, {Name: "b"}, {Name: "c", Next: []string{"a"}}}}},
		{"unknown phase", ab(Phase{Next: []string{"b", "x"}}, Phase{})},
		{"this phase itself", ab(Phase{Next: []string{"b", "a"}}, Phase{})},
		{"listed twice", ab(Phase{Next: []string{"b", "b"}}, Phase{})},
		{"is irreversible, and", ab(Phase{}, Phase{Irreversible: true, Next: []string{"a"}})},
		{`unknown group "@files"`, ab(Phase{Allow: ruled("@files")}, Phase{})},
		{"takes no conditions", ab(arg("@file-read", eq(0, 1)), Phase{})},
		{"reaches other calls", ab(Phase{Allow: ruled("socketcall")}, Phase{})},
		{"argument 1 of openat is no number", ab(arg("openat", eq(1, 0)), Phase{})},
		{"two conditions", ab(arg("socket", eq(0, 1), eq(0, 2)), Phase{})},
		{"more than 32 bits", ab(arg("ptrace", eq(1, 1<<32)), Phase{})},
		{"never equal", ab(arg("socket", masked(0, 1, 2)), Phase{})},
		{"want 0 to 5", ab(arg("socket", eq(6, 0)), Phase{})},
		{"unknown operator", ab(arg("socket", specs.LinuxSeccompArg{}), Phase{})},
		{"write is allowed in every phase", ab(arg("write", eq(0, 1)), Phase{})},
		{"of too many kinds", ab(arg("prctl", compare(specs.OpNotEqual, 1, 1), compare(specs.OpNotEqual, 2, 1)), Phase{})},
		{"no phase can do without it", denied},
		{"connect is allowed, and in mustDeny", both},
		{"connect is allowed, and network is none", must},
		{"@network is allowed, and network is none", ab(Phase{Allow: ruled("@network"), Network: []string{}}, Phase{})},
		{"@file-write is allowed, and no file may be written", ab(Phase{Allow: ruled("@file-write"), WritePaths: []string{}}, Phase{})},
		{"", ab(Phase{Allow: ruled("openat", "@file-read", "socketpair"), WritePaths: []string{}, Network: []string{}}, Phase{})},
	} {
		err := tc.set.Check()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("got %v, want %q", err, tc.want)
		}
	}
}

func TestMay(t *testing.T) {
	s := PhaseSet{Initial: "a", Phases: []Phase{{Name: "a"}, {Name: "b", Next: []string{"a"}}, {Name: "c", Irreversible: true}}}
	var got []string
	for _, from := range []string{"a", "b", "c", "x"} {
		for _, to := range []string{"a", "b", "c", "x"} {
			if s.May(from, to) {
				got = append(got, from+to)
			}
		}
	}
	if want := []string{"ab", "ac", "ba"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

var (
	everyHost = PhaseHost{Notify: true, WaitKillable: true, LSM: true, CgroupConnect: true, Inject: true}
	askHost   = PhaseHost{Notify: true, WaitKillable: true, CgroupConnect: true, Inject: true}
	agentSet  = PhaseSet{Initial: "read_only", Phases: []Phase{
		{Name: "read_only", Allow: ruled("@file-read", "@info")},
		{Name: "write_logs", Allow: ruled("@file-read", "@info", "openat"), WritePaths: []string{"/var/log"}},
		{Name: "network", Allow: ruled("@file-read", "@info", "@network"), Network: []string{"10.0.0.0/8:443"}},
		{Name: "locked", Irreversible: true},
	}}
)

func mustCompile(t *testing.T, s *PhaseSet, host PhaseHost) *PhasePlan {
	t.Helper()
	p, err := CompilePhases(s, host, PhaseOptions{Runtime: "runc"})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestMechanisms(t *testing.T) {
	const writing = "not (arg2 & 0x243 == 0x0)"
	loose := []string{"start", "read_only", "write_logs", "network"}
	for _, tc := range []struct {
		host PhaseHost
		want PhaseCall
	}{
		{askHost, PhaseCall{"read", "any", MechanismStatic, "", append(slices.Clone(loose), "locked")}},
		{askHost, PhaseCall{"openat", writing, MechanismNotify, "", []string{"start", "write_logs"}}},
		{askHost, PhaseCall{"connect", "any", MechanismNotify, "", []string{"network"}}},
		{askHost, PhaseCall{"statx", "any", MechanismRatchet, "", loose}},
		{askHost, PhaseCall{"execve", "any", MechanismNotify, "", []string{"start"}}},
		{askHost, PhaseCall{"setuid", "any", MechanismNotify, "", []string{"start"}}},
		{everyHost, PhaseCall{"openat", writing, MechanismHook, "lsm/file_open", []string{"start", "write_logs"}}},
		{everyHost, PhaseCall{"connect", "any", MechanismHook, "lsm/socket_connect", []string{"network"}}},
		{everyHost, PhaseCall{"sendto", "any", MechanismNotify, "", []string{"network"}}},
		{PhaseHost{}, PhaseCall{"connect", "any", MechanismNone, "", []string{"network"}}},
		{PhaseHost{Notify: true}, PhaseCall{"statx", "any", MechanismNotify, "", loose}}, // no ratchet
	} {
		p := mustCompile(t, &agentSet, tc.host)
		found := false
		for _, got := range p.Calls {
			found = found || cmp.Equal(got, tc.want)
		}
		if !found {
			t.Errorf("%+v: no %+v", tc.host, tc.want)
			for _, got := range p.Calls {
				if got.Name == tc.want.Name {
					t.Logf("%+v", got)
				}
			}
		}
	}
	p := mustCompile(t, &agentSet, askHost)
	asked, allowed := 0, 0
	for _, r := range p.Profile.Syscalls {
		if slices.Contains(r.Names, "openat") && r.Action == specs.ActNotify {
			asked++
		}
		if slices.Contains(r.Names, "openat") && r.Action == specs.ActAllow {
			allowed++
		}
	}
	if asked != 4 || allowed != 1 { // one for each bit of the mask
		t.Errorf("%d rules ask about openat, %d allow it", asked, allowed)
	}
	if !p.Listener || p.Profile.ListenerPath != "" || !slices.Contains(p.Profile.Flags, "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV") {
		t.Errorf("listener %t at %q, flags %v", p.Listener, p.Profile.ListenerPath, p.Profile.Flags)
	}
	for _, r := range p.Ratchets["locked"].Syscalls {
		if r.Action == specs.ActNotify {
			t.Errorf("the ratchet asks about %v", r.Names)
		}
	}
	// An execve that every phase allows is asked about all the same: it ends the start.
	every := PhaseSet{Initial: "a", Phases: []Phase{{Name: "a", Allow: ruled("execve")}}}
	if p := mustCompile(t, &every, askHost); !slices.ContainsFunc(p.Profile.Syscalls, func(r specs.LinuxSyscall) bool {
		return r.Action == specs.ActNotify && slices.Contains(r.Names, "execve")
	}) || !slices.ContainsFunc(p.Calls, func(c PhaseCall) bool {
		return cmp.Equal(c, PhaseCall{"execve", "any", MechanismNotify, "", []string{"start", "a"}})
	}) {
		t.Errorf("execve isn't asked about: %+v", p.Calls)
	}
	// Nothing differs: no listener.
	one := PhaseSet{Initial: "a", Phases: []Phase{{Name: "a", Allow: append(ruled(Floor("")...), names("clone", "openat", "recvfrom"))}}}
	if p := mustCompile(t, &one, askHost); p.Listener || len(p.Gaps) > 0 {
		t.Errorf("listener %t, gaps %v", p.Listener, p.Gaps)
	}
}

func TestGaps(t *testing.T) {
	uring := PhaseSet{Initial: "a", Phases: []Phase{{Name: "a", Allow: ruled("@io-uring")}, {Name: "b"}}}
	for _, tc := range []struct {
		name string
		set  *PhaseSet
		host PhaseHost
		most int
		want []string // PHASES: part of what
	}{
		{"all", &agentSet, everyHost, 0, nil},
		{"no LSM", &agentSet, askHost, 4, []string{
			"network: other addresses can be reached by raw sockets",
			"write_logs: files elsewhere can be opened, too (read anywhere; write /var/log)",
			"read_only network locked: files that were opened for writing in write_logs stay writable",
			"read_only write_logs locked: sockets that were connected in network go on",
		}},
		{"no addresses", &agentSet, PhaseHost{Notify: true, Inject: true}, 4, []string{"network: other addresses can be reached, too (10.0.0.0/8:443)"}},
		{"no listener", &agentSet, PhaseHost{LSM: true, CgroupConnect: true, Inject: true}, 4, []string{
			"read_only write_logs locked: still allowed: getpeername",
			"locked: what begins in it, or is executed in it from outside, is not given its filter",
			"read_only write_logs network locked: still allowed, because container runtimes start with it: ",
		}},
		{"no injection", &agentSet, PhaseHost{Notify: true, LSM: true, CgroupConnect: true}, 1, []string{"locked: it is left if the supervisor says so"}},
		{"rings", &uring, askHost, 2, []string{"b: a ring that was made in a goes on", "a: io_uring opens files and connects whatever"}},
		{"rings with LSM", &uring, everyHost, 1, []string{"b: a ring that was made in a goes on"}},
	} {
		p := mustCompile(t, tc.set, tc.host)
		for _, want := range tc.want {
			if !slices.ContainsFunc(p.Gaps, func(g PhaseGap) bool {
				return strings.HasPrefix(strings.Join(g.Phases, " ")+": "+g.What, want) && g.Why != "" && g.Remedy != ""
			}) {
				t.Errorf("%s: no gap %q in\n%v", tc.name, want, p.Gaps)
			}
		}
		if len(p.Gaps) > tc.most {
			t.Errorf("%s: %v", tc.name, p.Gaps)
		}
	}
}

// TestPhasesAreMonotone: less in a phase's policy is less in that phase, and nothing
// else in others; and Tightens is right.
func TestPhasesAreMonotone(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	pool := []PhaseRule{
		names("openat"), names("connect"), names("execve"), names("fork"),
		names("@file-read"), names("@file-write"), names("@network"), names("@process"),
		{[]string{"openat"}, readingOpen("openat")},
		{[]string{"socket"}, number32(0, afUnix)},
		{[]string{"socket"}, number32(0, afInet)},
		{[]string{"prctl"}, []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpLessEqual, Value: 40}}},
		{[]string{"clone"}, []specs.LinuxSeccompArg{masked(0, 0x10000000, 0)}},
	}
	points := [][6]uint64{{}, {1, 0, 1}, {2, 0, 0x40}, {10, 0, 2}, {15}, {39}, {40}, {41}, {0x10000}, {0x10000000}, {0x11}}
	hosts := []PhaseHost{everyHost, askHost, {}}
	for range 40 {
		set := PhaseSet{Initial: "a"}
		for _, name := range []string{"a", "b", "c"} {
			p := Phase{Name: name, Irreversible: name == "c"}
			for range r.IntN(6) {
				p.Allow = append(p.Allow, pool[r.IntN(len(pool))])
			}
			set.Phases = append(set.Phases, p)
		}
		at := r.IntN(3)
		if len(set.Phases[at].Allow) == 0 {
			continue
		}
		less := set
		less.Phases = slices.Clone(set.Phases)
		drop := r.IntN(len(set.Phases[at].Allow))
		less.Phases[at].Allow = slices.Delete(slices.Clone(set.Phases[at].Allow), drop, drop+1)
		host := hosts[r.IntN(len(hosts))]
		before, after := mustCompile(t, &set, host), mustCompile(t, &less, host)
		tightens := map[[2]string]bool{}
		for _, from := range before.Phases {
			for _, to := range before.Phases {
				tightens[[2]string{from, to}] = before.Tightens(from, to)
			}
		}
		for _, phase := range before.Phases {
			all := slices.Concat(slices.Collect(maps.Keys(before.regions[phase])), slices.Collect(maps.Keys(after.regions[phase])))
			for _, name := range sorted(all) {
				b, a := before.regions[phase][name], after.regions[phase][name]
				if ok, err := a.within(b); err != nil || !ok {
					t.Errorf("%s in %s: %v is not within %v (%v)", name, phase, a, b, err)
				}
				// clone3 and openat2 depend on all phases.
				if ok, _ := b.within(a); !ok && phase != set.Phases[at].Name && flagsInMemory[name] == "" {
					t.Errorf("%s in %s changed, and nothing of the phase did", name, phase)
				}
				for _, other := range before.Phases {
					for _, args := range points {
						if tightens[[2]string{other, phase}] && before.Allows(phase, specs.ArchX86_64, name, args) && !before.Allows(other, specs.ArchX86_64, name, args) {
							t.Errorf("%s to %s tightens, and allows %s %v", other, phase, name, args)
						}
					}
				}
			}
		}
	}
	p := mustCompile(t, &agentSet, askHost)
	if !p.Tightens("write_logs", "read_only") || p.Tightens("read_only", "write_logs") || !p.Tightens("network", "locked") || p.Tightens("network", "write_logs") {
		t.Error("Tightens")
	}
}

func TestPhaseTable(t *testing.T) {
	numbers := map[string]uint32{"connect": 42, "openat": 257, "setuid": 105, "openat2": 437}
	set := agentSet
	set.Phases = slices.Clone(set.Phases)
	set.Phases[2].Allow = append(slices.Clone(set.Phases[2].Allow), names("openat2"))
	p := mustCompile(t, &set, askHost)
	table := func(phase string) *PhaseTable {
		return p.Table(phase, func(abi ABI, name string) (uint32, bool) {
			nr, ok := numbers[name]
			return nr, ok && abi == specs.ArchX86_64
		})
	}
	for _, tc := range []struct {
		phase string
		abi   ABI
		nr    uint32
		args  [6]uint64
		goOn  bool
		errno uint
	}{
		{"read_only", specs.ArchX86_64, 42, [6]uint64{}, false, errnoEPERM},
		{"network", specs.ArchX86_64, 42, [6]uint64{}, true, 0},
		{"network", specs.ArchX86, 42, [6]uint64{}, false, errnoEPERM}, // another ABI's number
		{"read_only", specs.ArchX86_64, 257, [6]uint64{2: 0x80000}, true, 0},
		{"read_only", specs.ArchX86_64, 257, [6]uint64{2: 1}, false, errnoEPERM},
		{"write_logs", specs.ArchX86_64, 257, [6]uint64{2: 1}, true, 0},
		{"start", specs.ArchX86_64, 105, [6]uint64{}, true, 0},
		{"write_logs", specs.ArchX86_64, 105, [6]uint64{}, false, errnoEPERM},
		{"read_only", specs.ArchX86_64, 437, [6]uint64{}, false, errnoENOSYS},
		{"network", specs.ArchX86_64, 437, [6]uint64{}, true, 0},
		{"network", specs.ArchX86_64, 9999, [6]uint64{}, false, errnoEPERM}, // unknown
	} {
		goOn, errno := table(tc.phase).Decide(tc.abi, tc.nr, tc.args)
		if goOn != tc.goOn || errno != tc.errno {
			t.Errorf("%+v: %t, %d", tc, goOn, errno)
		}
	}
	e := table("write_logs").Entries
	if len(e) != len(numbers) || !slices.IsSortedFunc(e, func(a, b PhaseEntry) int { return int(a.Number) - int(b.Number) }) {
		t.Errorf("%+v", e)
	}
}

func TestTightens(t *testing.T) {
	read, all := ruled("@file-read"), ruled("@file-write", "@network")
	for _, tc := range []struct {
		from, to Phase
		want     bool
	}{
		{Phase{Allow: all}, Phase{}, true},
		{Phase{}, Phase{Allow: all}, false},
		{Phase{Allow: all}, Phase{Allow: all}, true},
		{Phase{Allow: read}, Phase{Allow: read, ReadPaths: []string{"/app"}}, true},
		{Phase{Allow: read, ReadPaths: []string{"/app"}}, Phase{Allow: read}, false},
		{Phase{Allow: read, ReadPaths: []string{"/app", "/"}}, Phase{Allow: read, ReadPaths: []string{"/etc/x"}}, true},
		{Phase{Allow: read, ReadPaths: []string{"/app"}}, Phase{Allow: read, ReadPaths: []string{"/app/x", "/app2"}}, false},
		{Phase{Allow: read, ReadPaths: []string{"/app"}}, Phase{}, true}, // which opens nothing
		{Phase{Allow: all, WritePaths: []string{"/a"}}, Phase{Allow: all}, false},
		{Phase{Allow: all, WritePaths: []string{"/a"}}, Phase{Allow: all, WritePaths: []string{"/a"}}, true},
		{Phase{Allow: ruled("open"), WritePaths: []string{"/a"}}, Phase{Allow: ruled("open"), WritePaths: []string{}}, true},
		{Phase{Allow: ruled("open"), WritePaths: []string{"/a"}}, Phase{Allow: []PhaseRule{{[]string{"open"}, readingOpen("open")}}}, true},
		{Phase{Allow: all, Network: []string{"10.0.0.1"}}, Phase{Allow: all}, false},
		{Phase{Allow: all, Network: []string{"10.0.0.1", "10.0.0.2"}}, Phase{Allow: all, Network: []string{"10.0.0.2"}}, true},
		{Phase{Allow: all, Network: []string{"10.0.0.1"}}, Phase{Allow: all, Network: []string{"10.0.0.2"}}, false},
		{Phase{Allow: all, Network: []string{"10.0.0.1"}}, Phase{Allow: read, Network: []string{}}, false}, // files: read isn't within all's calls
		{Phase{Allow: append(ruled("@network"), read...), Network: []string{"10.0.0.1"}}, Phase{Allow: read}, true},
	} {
		tc.from.Name, tc.to.Name = "a", "b"
		p := mustCompile(t, &PhaseSet{Initial: "a", Phases: []Phase{tc.from, tc.to}}, everyHost)
		if got := p.Tightens("a", "b"); got != tc.want {
			t.Errorf("%+v to %+v: %t", tc.from, tc.to, got)
		}
		if p.Tightens("a", "c") || p.Tightens("c", "a") {
			t.Error("a phase that isn't there")
		}
	}
}

// TestNoStart: a policy under which no container starts is told of.
func TestNoStart(t *testing.T) {
	p := mustCompile(t, &PhaseSet{Initial: "a", MustDeny: []string{"execve"}, Phases: []Phase{{Name: "a", Allow: ruled("@file-read")}}}, everyHost)
	if !slices.ContainsFunc(p.Notes, func(n string) bool { return strings.Contains(n, "no container starts: its runtime needs execve") }) {
		t.Errorf("%v", p.Notes)
	}
	if p := mustCompile(t, &agentSet, everyHost); slices.ContainsFunc(p.Notes, func(n string) bool { return strings.Contains(n, "starts") }) {
		t.Errorf("%v", p.Notes)
	}
}

// TestGroupsAreCopies: who changes a group changes nobody else's.
func TestGroupsAreCopies(t *testing.T) {
	g, ok := FindGroup("@file-read")
	if !ok {
		t.Fatal("no @file-read")
	}
	g.Rules[0].Names[0], g.Rules[0].Args[0].Value = "mount", 0
	again, _ := FindGroup("@file-read")
	if again.Rules[0].Names[0] == "mount" || again.Rules[0].Args[0].Value == 0 {
		t.Error("changed")
	}
}
