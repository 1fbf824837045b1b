// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ErrNoInitial means that the recordings don't agree, or tell, in which phase they began.
var ErrNoInitial = errors.New("no initial phase")

// SuggestOptions of [SuggestPhases].
type SuggestOptions struct {
	// Initial is the phase to begin in; empty is the one in which the recordings began.
	Initial string
	// AllowLosses also takes recordings that may lack calls.
	AllowLosses bool
}

// Suggestion is what recordings by phase come to as phases of a policy.
type Suggestion struct {
	Workload string           `json:"workload"`
	Initial  string           `json:"initial"`
	Phases   []SuggestedPhase `json:"phases"` // the initial one first, then by name
	// Architectures are those of the recordings, if they aren't SCMP_ARCH_X86_64
	// alone, which a policy has without saying so.
	Architectures []ABI                `json:"architectures,omitempty"`
	Recordings    []SuggestedRecording `json:"recordings"` // oldest first
	Notes         []string             `json:"notes"`
}

// SuggestedPhase allows what was called in it, beside the floor.
type SuggestedPhase struct {
	Name  string      `json:"name"`
	Allow []PhaseRule `json:"allow"`
}

// SuggestedRecording is one that was looked at.
type SuggestedRecording struct {
	ID      string    `json:"id"`
	Ended   time.Time `json:"ended"`
	Kernel  string    `json:"kernel"`
	Runtime string    `json:"runtime,omitempty"`
	Phases  []string  `json:"phases"` // in which something was called
	Losses  []Loss    `json:"losses,omitempty"`
	// LeftOut says why nothing was taken from it; empty if something was.
	LeftOut string `json:"leftOut,omitempty"`
}

// Set is the suggestion as phases that can be compiled.
func (s *Suggestion) Set() *PhaseSet {
	set := &PhaseSet{Initial: s.Initial}
	for _, p := range s.Phases {
		set.Phases = append(set.Phases, Phase{Name: p.Name, Allow: p.Allow})
	}
	return set
}

// SuggestPhases unites what recordings of a workload show, phase by phase. Each phase
// allows exactly the calls that were made in it, with these exceptions: the floor is in
// every phase and isn't repeated; where the recordings tell, opens allow no more than
// reading if nothing else was done, processes are made in no new namespace,
// and socket, ioctl and prctl the values that were seen; the program's start is a part
// of no phase, unless runtimes that were measured don't call it there. What the flags
// of a call in memory were isn't known: Notes says what became of those.
//
// Recordings that were not made by phase are left out, and so are those that may lack
// calls, unless AllowLosses. That none is left is an error: of the first recording that
// was left out for its losses, a *[LossyError]. Without an initial phase the error
// wraps [ErrNoInitial].
func SuggestPhases(recordings []*Recording, o SuggestOptions) (*Suggestion, error) {
	s := &Suggestion{Initial: o.Initial, Notes: []string{}, Recordings: []SuggestedRecording{}}
	b := suggesting{Suggestion: s, phases: map[string]evidence{}, start: evidence{}, notes: map[string][]string{}}
	began := map[string]bool{}
	abis := map[ABI]bool{}
	var lossy error
	taken := false
	for _, rec := range recordings {
		line := SuggestedRecording{ID: rec.ID, Ended: rec.Ended, Kernel: rec.Kernel, Runtime: rec.Runtime, Phases: rec.named(), Losses: rec.Losses}
		if s.Workload == "" {
			s.Workload = rec.Workload
		}
		switch losses := rec.Blocking(); {
		case rec.Workload != s.Workload:
			return nil, fmt.Errorf("recording %q is of workload %q, not of %q: one policy's phases are made of one workload's", rec.ID, rec.Workload, s.Workload)
		case len(line.Phases) == 0:
			line.LeftOut = "it was not recorded by phase"
		case len(losses) > 0 && !o.AllowLosses:
			err := &LossyError{rec.ID, losses}
			line.LeftOut = err.Error()
			if lossy == nil {
				lossy = err
			}
		default:
			taken = true
			if err := b.take(rec); err != nil {
				return nil, err
			}
			began[rec.Initial] = true
			for _, abi := range rec.All().ABIs() {
				abis[abi] = true
			}
		}
		s.Recordings = append(s.Recordings, line)
	}
	switch {
	case !taken && lossy != nil:
		return nil, lossy
	case !taken:
		return nil, fmt.Errorf("none of %d recordings was made by phase: let the policy have phases while it records, or say 'syslatch record --phases'", len(recordings))
	}
	if err := b.begins(began); err != nil {
		return nil, err
	}
	if !abis[specs.ArchX86_64] || len(abis) > 1 {
		s.Architectures = sortedABIs(slices.Collect(maps.Keys(abis)))
	}
	b.addStart()
	b.rules(true)
	err := s.Set().Check()
	if err != nil {
		b.rules(false) // values of too many kinds can't be told apart
		err = s.Set().Check()
	}
	for _, text := range slices.Sorted(maps.Keys(b.notes)) {
		s.Notes = append(s.Notes, fmt.Sprintf("%s: %s", strings.Join(sorted(b.notes[text]), " "), text))
	}
	return s, err
}

// named are the phases that a recording has calls of, but for those that no policy
// names.
func (r *Recording) named() []string {
	out := []string{}
	for phase, calls := range r.Phases {
		if phase != DefaultPhase && phase != StartPhase && calls.Len() > 0 {
			out = append(out, phase)
		}
	}
	slices.Sort(out)
	return out
}

// evidence is what was called in a phase, by name.
type evidence map[string]*values

// values are those of the one argument of a call that is looked at.
type values struct {
	any  bool // or they were not kept
	seen map[uint64]bool
}

func (e evidence) of(name string) *values {
	if e[name] == nil {
		e[name] = &values{seen: map[uint64]bool{}}
	}
	return e[name]
}

// looked are the arguments by which a call is split, and which of their bits decide.
var looked = map[string]struct {
	index uint
	bits  uint64
}{
	"open":   {openArgument["open"], openWrites},
	"openat": {openArgument["openat"], openWrites},
	"clone":  {0, cloneThread | cloneNamespaces},
	"socket": {0, low32},
	"ioctl":  {1, low32},
	"prctl":  {0, low32},
}

// mostValues of one call in one phase become conditions.
const mostValues = 8

type suggesting struct {
	*Suggestion
	phases map[string]evidence
	start  evidence
	notes  map[string][]string // calls, by what is to be said of them
}

// callName is what calls are named. Recordings are files, which anybody can write, and
// "@process" would be a group.
var callName = regexp.MustCompile(`^[a-z0-9_]+$`)

func (b *suggesting) take(rec *Recording) error {
	for phase, calls := range rec.Phases {
		into := b.phases[phase]
		switch {
		case phase == StartPhase:
			into = b.start
		case phase == DefaultPhase || calls.Len() == 0:
			continue
		case into == nil:
			into = evidence{}
			b.phases[phase] = into
		}
		for abi, names := range calls {
			for _, name := range names {
				if !callName.MatchString(name) {
					return fmt.Errorf("recording %q: %q is no system call", rec.ID, name)
				}
				into.of(name).add(rec, phase, abi, name)
			}
		}
	}
	return nil
}

func (v *values) add(rec *Recording, phase string, abi ABI, name string) {
	l, ok := looked[name]
	if !ok {
		return
	}
	i := slices.IndexFunc(rec.Arguments, func(a Argument) bool {
		return a.Phase == phase && a.ABI == abi && a.Name == name && a.Index == int(l.index)
	})
	if i < 0 || rec.Arguments[i].AnyValue || len(rec.Arguments[i].Values) == 0 || rec.Arguments[i].Mask&l.bits != l.bits {
		v.any = true
		return
	}
	for _, value := range rec.Arguments[i].Values {
		v.seen[value&l.bits] = true
	}
}

func (v *values) join(other *values) {
	v.any = v.any || other.any
	maps.Copy(v.seen, other.seen)
}

// all says whether every value was kept, and holds.
func (v *values) all(holds func(uint64) bool) bool {
	for value := range v.seen {
		if !holds(value) {
			return false
		}
	}
	return !v.any
}

func (b *suggesting) begins(began map[string]bool) error {
	names := slices.Sorted(maps.Keys(b.phases))
	switch began := slices.Sorted(maps.Keys(began)); {
	case b.Initial != "" && b.phases[b.Initial] == nil:
		return fmt.Errorf("nothing was recorded in phase %q: want one of %s", b.Initial, strings.Join(names, ", "))
	case b.Initial != "":
	case len(began) == 1 && began[0] != "":
		b.Initial = began[0]
		if b.phases[b.Initial] == nil {
			b.phases[b.Initial] = evidence{} // it was switched before it called anything
		}
	case slices.Contains(began, ""):
		return fmt.Errorf("%w: the recordings don't tell in which of %s they began", ErrNoInitial, strings.Join(names, ", "))
	default:
		return fmt.Errorf("%w: the recordings began in %s", ErrNoInitial, strings.Join(began, " and in "))
	}
	return nil
}

// addStart gives the initial phase what was called at the start and isn't allowed there
// anyway.
func (b *suggesting) addStart() {
	allowed := map[string]bool{}
	for _, name := range append(Floor(""), handsOver...) {
		for _, n := range same(name) {
			allowed[n] = true
		}
	}
	for name, v := range b.start {
		if !allowed[name] && flagsInMemory[name] == "" {
			b.phases[b.Initial].of(name).join(v)
		}
	}
}

// rules makes what phases allow, with or without values as conditions.
func (b *suggesting) rules(exact bool) {
	b.Suggestion.Phases = nil
	names := slices.Sorted(maps.Keys(b.phases))
	slices.SortStableFunc(names, func(x, y string) int {
		first := func(n string) int {
			if n == b.Initial {
				return 0
			}
			return 1
		}
		return first(x) - first(y)
	})
	for _, name := range names {
		b.Suggestion.Phases = append(b.Suggestion.Phases, SuggestedPhase{Name: name, Allow: b.allow(b.phases[name], exact)})
	}
}

// What there is to say of calls.
const (
	noteClone3 = "is answered ENOSYS, so that a libc takes clone, which is allowed in no new namespace; fork and vfork are for what it may have made beside threads"
	noteMemory = "is allowed in every form, as its flags are in memory, where nothing sees them"
	noteRing   = "opens files and connects past every filter"
	noteShared = "can't be allowed in phases, and is answered ENOSYS: a libc takes the calls that it reaches, if it knows them"
)

func (b *suggesting) note(text, name string) {
	if !slices.Contains(b.notes[text], name) {
		b.notes[text] = append(b.notes[text], name)
	}
}

func (b *suggesting) allow(e evidence, exact bool) []PhaseRule {
	rules := []PhaseRule{}
	reads := true
	for name := range openArgument {
		reads = reads && (e[name] == nil || e[name].all(func(v uint64) bool { return v == 0 }))
	}
	all := slices.Sorted(maps.Keys(e))
	opened, forked := false, false
	for _, name := range all {
		switch {
		case inPhaseFloor(name):
		case multiplexers[name] != nil:
			b.note(noteShared, name)
		case slices.Contains(makesProcesses, name):
			if name == "clone3" {
				b.note(noteClone3, name)
			}
			if !forked {
				rules = append(rules, processes(e)...)
			}
			forked = true
		case openArgument[name] != 0 && reads:
			if !opened { // one libc opens with the one, another with the other
				for _, n := range slices.Sorted(maps.Keys(openArgument)) {
					rules = append(rules, PhaseRule{[]string{n}, readingOpen(n)})
				}
			}
			opened = true
		case exact && looked[name].bits == low32 && !e[name].any && len(e[name].seen) <= mostValues:
			for _, value := range slices.Sorted(maps.Keys(e[name].seen)) {
				rules = append(rules, PhaseRule{[]string{name}, []specs.LinuxSeccompArg{{Index: looked[name].index, Value: value, Op: specs.OpEqualTo}}})
			}
		default:
			switch {
			case flagsInMemory[name] != "":
				b.note(noteMemory, name)
			case strings.HasPrefix(name, "io_uring_"):
				b.note(noteRing, name)
			}
			rules = append(rules, names(name))
		}
	}
	slices.SortStableFunc(rules, func(a, b PhaseRule) int { return strings.Compare(a.Names[0], b.Names[0]) })
	return rules
}

// makesProcesses are calls of which a libc, or a shell, takes the one or the other.
var makesProcesses = []string{"clone", "clone3", "fork", "vfork"}

// processes is how a phase has to allow them. Threads are in the floor; fork is clone as
// well, in no new namespace.
func processes(e evidence) (rules []PhaseRule) {
	v := e["clone"]
	if v == nil {
		v = &values{}
	}
	threads := v.all(func(flags uint64) bool { return flags&(cloneThread|cloneNamespaces) == cloneThread })
	if !v.all(func(flags uint64) bool { return flags&cloneNamespaces == 0 }) {
		rules = append(rules, names("clone"))
	}
	if !threads || e["clone3"] != nil || e["fork"] != nil || e["vfork"] != nil {
		rules = append(rules, names("fork"), names("vfork"))
	}
	return rules
}
