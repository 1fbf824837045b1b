// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// StartPhase is, in a plan, the time from the load of the container's filter to the first execve: the
// initial phase, and what the runtime calls meanwhile.
const StartPhase = "start"

// PhaseHost is what phases can be enforced with where a workload runs.
type PhaseHost struct {
	// Notify: the kernel has SCMP_ACT_NOTIFY, and a runtime hands its listener over
	// (linux.seccomp.listenerPath).
	Notify bool `json:"notify"`
	// WaitKillable: kernel, libseccomp and runtime know
	// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV.
	WaitKillable bool `json:"waitKillable"`
	// LSM: BPF programs can be attached to the kernel's security hooks.
	LSM bool `json:"lsm"`
	// CgroupConnect: BPF programs of cgroups can refuse addresses (cgroup/connect4).
	CgroupConnect bool `json:"cgroupConnect"`
	// Inject: another task can be given a filter (ptrace).
	Inject bool `json:"inject"`
	// Denials: what filters deny can be seen, and the runtime knows
	// SECCOMP_FILTER_FLAG_LOG.
	Denials bool `json:"denials"`
}

// PhaseOptions say for which filter phases are compiled.
type PhaseOptions struct {
	// Architectures of the profile; none is SCMP_ARCH_X86_64. Under others every
	// call kills its thread.
	Architectures []ABI
	// Runtime is that of a [StartFloor], empty if any may start the container.
	Runtime string
	// NewerThanKernel are calls that the kernel lacks; see RenderOptions.
	NewerThanKernel []string
	// Log has the kernel's audit log told of what the filter denies.
	Log bool
}

// FlagLog is the flag of a plan's profile that PhaseOptions.Log means.
const FlagLog specs.LinuxSeccompFlag = "SECCOMP_FILTER_FLAG_LOG"

// Logs says whether the kernel's audit log is told of what the plan's filters deny.
func (p *PhasePlan) Logs() bool { return slices.Contains(p.Profile.Flags, FlagLog) }

// FallsBack says whether a denied call is one that programs try for what another does if
// they are answered ENOSYS, as they are: its flags are in memory, or the kernel lacks it. A
// thread of glibc's begins with such a denial.
func (p *PhasePlan) FallsBack(name string) bool {
	return flagsInMemory[name] != "" || slices.Contains(p.newer, name)
}

// Mechanism is how one call, or some of its forms, is allowed in some phases and not
// in others.
type Mechanism string

const (
	// MechanismStatic: alike in every phase, decided by the filter.
	MechanismStatic Mechanism = "static"
	// MechanismHook: the filter allows it, and a BPF program says no by phase.
	MechanismHook Mechanism = "hook"
	// MechanismNotify: the filter asks the supervisor.
	MechanismNotify Mechanism = "notify"
	// MechanismRatchet: allowed until an irreversible phase, whose own filter, put
	// on every task, denies it for good.
	MechanismRatchet Mechanism = "ratchet"
	// MechanismNone: it should differ between phases, and can't here. The filter
	// allows it in all, and Gaps has it.
	MechanismNone Mechanism = "none"
)

// PhaseCall is some forms of one call with what becomes of them.
type PhaseCall struct {
	Name      string    `json:"name"`
	Form      string    `json:"form"` // "any", "arg2 & 0x243 == 0x0"
	Mechanism Mechanism `json:"mechanism"`
	Hook      string    `json:"hook,omitempty"`
	// Phases are those that allow these forms. "start" stands for the time until
	// the first execve.
	Phases []string `json:"phases"`
}

// PhaseHook is a BPF program's part.
type PhaseHook struct {
	Program string `json:"program"` // "lsm/file_open"
	// Calls are those that it decides in place of the supervisor.
	Calls []string `json:"calls,omitempty"`
	// Allows is what the program lets pass, by phase; phases not in it are not its
	// business.
	Allows map[string]string `json:"allows"`

	regions map[string]region // of Calls, by phase, as projected
	project func(name string, args [6]uint64) [6]uint64
}

// PhaseGap is something that was asked for and can't be enforced.
type PhaseGap struct {
	Phases []string `json:"phases"` // in which it holds
	What   string   `json:"what"`   // happens nevertheless
	Why    string   `json:"why"`
	Remedy string   `json:"remedy"`
}

func (g PhaseGap) String() string {
	return fmt.Sprintf("%s: %s (%s; %s)", strings.Join(g.Phases, ", "), g.What, g.Why, g.Remedy)
}

// PhasePlan is what a set of phases compiles to. It is a function of its inputs.
//
// What a task can do in a phase is what all that holds for it lets pass: Profile,
// which it gets at its start; in an irreversible phase that phase's Ratchet, too; for
// what Profile answers with SCMP_ACT_NOTIFY the phase's [PhaseTable]; and Hooks. With
// no gaps that is exactly what the phase allows, and the floor.
//
// Whoever enforces it has to refuse a plan with Gaps, unless its policy says that they
// are to be reported: where something can't be enforced the plan allows it.
type PhasePlan struct {
	// Profile is the filter of the container. Its ListenerPath is left to the caller,
	// who needs one if Listener is true.
	Profile  *specs.LinuxSeccomp
	Listener bool
	// Ratchets are the filters of irreversible phases, by name, nil where there is no
	// way to put them on tasks. They have no SCMP_ACT_NOTIFY: there is one listener to
	// a chain of filters.
	Ratchets map[string]*specs.LinuxSeccomp
	Calls    []PhaseCall // sorted by name
	Hooks    []PhaseHook
	Gaps     []PhaseGap
	Notes    []string // what people should know that is no gap
	Phases   []string // in the policy's order

	set      *PhaseSet
	regions  map[string]map[string]region // phase -> call -> allowed
	notified map[string]bool              // calls for which Profile asks
	newer    []string
}

// handsOver is what a runtime's init calls while its listener is handed over, beside
// what [Floor] was measured to have, which was without one: runc 1.5.2 waits for its
// parent with recvfrom.
var handsOver = []string{"recvfrom"}

// beginsPhases are the calls after which [StartPhase] is over.
var beginsPhases = []string{"execve", "execveat"}

// flagsInMemory are calls whose flags a filter can't see, with the call that libc
// takes instead when they are answered ENOSYS. Groups don't have them: they are
// allowed where a phase names them, or every phase allows all of the other one.
var flagsInMemory = map[string]string{"clone3": "clone", "openat2": "openat"}

// fallbackErrno is what a denied call is answered.
func (p *PhasePlan) fallbackErrno(name string) uint {
	if flagsInMemory[name] != "" || strings.HasPrefix(name, "io_uring_") || multiplexers[name] != nil || slices.Contains(p.newer, name) {
		return errnoENOSYS
	}
	return errnoEPERM
}

// maxCallRules bounds the rules for one call; the complement of one number takes 33.
const maxCallRules = 128

// CompilePhases splits what phases allow over the mechanisms that a host has.
func CompilePhases(s *PhaseSet, host PhaseHost, o PhaseOptions) (*PhasePlan, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	p := &PhasePlan{set: s, Ratchets: map[string]*specs.LinuxSeccomp{}, notified: map[string]bool{}, newer: o.NewerThanKernel}
	for i := range s.Phases {
		p.Phases = append(p.Phases, s.Phases[i].Name)
	}
	var err error
	if p.regions, err = s.regions(o.Runtime); err != nil {
		return nil, err
	}
	c := &phaseCompiler{PhasePlan: p, host: host, log: o.Log, architectures: sortedABIs(slices.Clone(o.Architectures))}
	if len(c.architectures) == 0 {
		c.architectures = []ABI{specs.ArchX86_64}
	}
	c.findHooks()
	c.ratchets()
	c.ringGaps()
	c.fileGaps()
	c.networkGaps()
	c.profile()
	c.gaps(o)
	return p, nil
}

// regions is what each phase allows, by call, StartPhase among them.
func (s *PhaseSet) regions(runtime string) (map[string]map[string]region, error) {
	out := map[string]map[string]region{}
	for i := range s.Phases {
		p := &s.Phases[i]
		calls, err := p.regions(s)
		if err != nil {
			return nil, &PhaseError{p.Name, err}
		}
		out[p.Name] = calls
	}
	for name, other := range flagsInMemory {
		all := !slices.Contains(s.MustDeny, name)
		for _, calls := range out {
			all = all && calls[other].any()
		}
		for _, calls := range out {
			if all {
				calls[name] = anything
			}
		}
	}
	start := maps.Clone(out[s.Initial])
	for _, name := range append(Floor(runtime), handsOver...) {
		// crun falls back from openat2, as libc does from clone3.
		if flagsInMemory[name] == "" && !slices.Contains(s.MustDeny, name) {
			for _, n := range same(name) {
				start[n] = anything
			}
		}
	}
	// creat is one way to openat: lsm/file_open can't tell them apart.
	for i := range s.Phases {
		if start["openat"].any() && len(out[s.Phases[i].Name]["creat"]) > 0 {
			start["creat"] = anything
		}
	}
	out[StartPhase] = start
	return out, nil
}

func (p *Phase) regions(s *PhaseSet) (map[string]region, error) {
	out := map[string]region{}
	add := func(rules ...PhaseRule) error {
		for _, r := range rules {
			for _, name := range r.Names {
				values, err := regionOf(name, r.Args)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				out[name] = out[name].or(values)
			}
		}
		return nil
	}
	rules := []PhaseRule{names(WholePhaseFloor()...), threads}
	for _, r := range append(slices.Clone(p.Allow), names(s.MustAllow...)) {
		for _, name := range r.Names {
			switch g := findGroup(name); {
			case g != nil:
				rules = append(rules, g.Rules...)
			case len(r.Args) > 0:
				rules = append(rules, PhaseRule{[]string{name}, r.Args})
			case name == "fork" || name == "vfork":
				rules = append(rules, names(name), forks) // glibc makes it of clone
			default:
				rules = append(rules, names(same(name)...))
			}
		}
	}
	if err := add(rules...); err != nil {
		return nil, err
	}
	if p.WritePaths != nil && len(p.WritePaths) == 0 {
		for name := range openArgument {
			reading, err := regionOf(name, readingOpen(name))
			if err == nil {
				out[name], err = out[name].and(reading)
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	if len(p.Network) > 0 {
		var families region
		for _, family := range p.families() {
			r, err := regionOf("socket", number32(0, family))
			if err != nil {
				return nil, err
			}
			families = families.or(r)
		}
		var err error
		if out["socket"], err = out["socket"].and(families); err != nil {
			return nil, fmt.Errorf("socket: %w", err)
		}
	}
	for _, name := range s.MustDeny {
		delete(out, name)
	}
	maps.DeleteFunc(out, func(_ string, r region) bool { return len(r) == 0 })
	return out, nil
}

// families are those of the sockets that reach a phase's destinations.
func (p *Phase) families() []uint64 {
	var out []uint64
	for _, d := range p.Network {
		family := uint64(afInet)
		switch {
		case d == "unix":
			family = afUnix
		case strings.HasPrefix(d, "["):
			family = afInet6
		}
		if !slices.Contains(out, family) {
			out = append(out, family)
		}
	}
	return out
}

// Allows says whether a phase allows a call, the floor included, before what paths
// and destinations leave of it.
func (p *PhasePlan) Allows(phase string, abi ABI, name string, args [6]uint64) bool {
	return p.regions[phase][name].has(abi, args)
}

// Tightens says whether one phase allows all that another does, calls, paths and
// destinations: a switch from it to the other is one that a workload could be let make
// by itself, if limits don't forbid it, which are not compared here. Of destinations only
// the text is: where it isn't sure it says no.
func (p *PhasePlan) Tightens(from, to string) bool {
	a, b := p.phase(from), p.phase(to)
	if a == nil || b == nil {
		return false
	}
	for name, r := range p.regions[to] {
		if ok, err := r.within(p.regions[from][name]); err != nil || !ok {
			return false
		}
	}
	calls := func(list ...string) bool {
		return slices.ContainsFunc(list, func(name string) bool { return len(p.regions[to][name]) > 0 })
	}
	switch {
	case calls("open", "openat", "openat2", "io_uring_setup") && !inside(b.ReadPaths, a.ReadPaths):
		return false
	case (p.writes(to) || len(p.changes(to)) > 0 || calls("io_uring_setup")) && !inside(b.WritePaths, a.WritePaths):
		return false
	case a.Network == nil, !calls(networkCalls...) && !calls("io_uring_setup"):
		return true
	}
	return b.Network != nil && len(without(slices.Clone(b.Network), a.Network)) == 0
}

// inside says whether all paths of a list are in trees, nil being everywhere.
func inside(list, trees []string) bool {
	return trees == nil || list != nil && !slices.ContainsFunc(list, func(path string) bool {
		return !slices.ContainsFunc(trees, func(tree string) bool {
			return path == tree || strings.HasPrefix(path, strings.TrimSuffix(tree, "/")+"/")
		})
	})
}

func (p *PhasePlan) phase(name string) *Phase {
	i := slices.IndexFunc(p.set.Phases, func(p Phase) bool { return p.Name == name })
	if i < 0 {
		return nil
	}
	return &p.set.Phases[i]
}

// HookAllows says whether the programs of Hooks let a call pass that they decide.
func (p *PhasePlan) HookAllows(phase string, abi ABI, name string, args [6]uint64) bool {
	for _, h := range p.Hooks {
		if slices.Contains(h.Calls, name) && !h.regions[phase].has(abi, h.project(name, args)) {
			return false
		}
	}
	return true
}

// PhaseTable is what a supervisor answers in one phase: by number and register values
// alone, because memory may change after it was looked at.
type PhaseTable struct {
	Phase   string       `json:"phase"`
	Entries []PhaseEntry `json:"entries"` // sorted by ABI and number

	index map[Call]int // without names
}

// PhaseEntry is one call that the filter asks about.
type PhaseEntry struct {
	Call
	Allow string `json:"allow"` // the forms that go on: "any", "none", ...
	Errno uint   `json:"errno"` // the answer to others

	region region
}

// Table makes a phase's table, or that of "start", the time until the first execve.
// number resolves names under an ABI.
func (p *PhasePlan) Table(phase string, number func(ABI, string) (uint32, bool)) *PhaseTable {
	t := &PhaseTable{Phase: phase, Entries: []PhaseEntry{}, index: map[Call]int{}}
	for _, abi := range Architectures(p.Profile) {
		for name := range p.notified {
			if nr, ok := number(abi, name); ok {
				r := p.regions[phase][name]
				t.Entries = append(t.Entries, PhaseEntry{Call{abi, nr, name}, r.String(), p.fallbackErrno(name), r})
			}
		}
	}
	slices.SortFunc(t.Entries, func(a, b PhaseEntry) int {
		if c := strings.Compare(string(a.ABI), string(b.ABI)); c != 0 {
			return c
		}
		return int(a.Number) - int(b.Number)
	})
	for i, e := range t.Entries {
		t.index[Call{ABI: e.ABI, Number: e.Number}] = i
	}
	return t
}

// Decide answers a notification: go on, or an errno. What isn't in the table is
// denied. For SCMP_ARCH_X32 the number carries no x32 bit.
func (t *PhaseTable) Decide(abi ABI, nr uint32, args [6]uint64) (goOn bool, errno uint) {
	i, ok := t.index[Call{ABI: abi, Number: nr}]
	if !ok {
		return false, errnoEPERM
	}
	if e := &t.Entries[i]; !e.region.has(abi, args) {
		return false, e.Errno
	}
	return true, 0
}
