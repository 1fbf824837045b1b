// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// trained is a recording with calls of x86_64, each with the values of the argument by
// which it is split, by phase. It began in the first of them.
func trained(id string, phases ...any) *Recording {
	rec := &Recording{SchemaVersion: 1, ID: id, Workload: "w", Ended: time.Unix(1, 0).UTC(), Phases: map[string]Calls{}}
	for i := 0; i < len(phases); i += 2 {
		phase, calls := phases[i].(string), Calls{}
		for _, call := range strings.Fields(phases[i+1].(string)) {
			name, values, split := strings.Cut(call, ":")
			calls[specs.ArchX86_64] = append(calls[specs.ArchX86_64], name)
			if split {
				a := Argument{Call: Call{ABI: specs.ArchX86_64, Name: name}, Phase: phase, Index: int(looked[name].index), Mask: 1<<64 - 1}
				for value := range strings.SplitSeq(values, ",") {
					var v uint64
					if _, err := fmt.Sscanf(value, "%v", &v); err != nil {
						a.AnyValue = true
						continue
					}
					a.Values = append(a.Values, v)
				}
				rec.Arguments = append(rec.Arguments, a)
			}
		}
		rec.Phases[phase] = Union(calls)
		if rec.Initial == "" && phase != StartPhase && phase != DefaultPhase {
			rec.Initial = phase
		}
	}
	return rec
}

// lines are rules as one would write them down.
func lines(rules []PhaseRule) (out []string) {
	for _, r := range rules {
		text := strings.Join(r.Names, " ")
		if len(r.Args) > 0 {
			text += " where " + r.Form()
		}
		out = append(out, text)
	}
	return out
}

func TestSuggestPhases(t *testing.T) {
	s, err := SuggestPhases([]*Recording{
		trained("1",
			StartPhase, "execve setuid capset openat2 futex mount",
			"write", "openat:0x241,0 mkdir newfstatat read write clone:0x1200011 futex",
			"read", "openat:0,0x80000 getdents64 newfstatat clone:0x3d0f00 ioctl:0x5401,0x5413 socket:2,1",
		),
		trained("2", "write", "fsync clone3", "read", "openat:0 ioctl:0x5401 io_uring_setup", "idle", "nanosleep"),
	}, SuggestOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	var order []string
	for _, p := range s.Phases {
		order = append(order, p.Name)
		got[p.Name] = lines(p.Allow)
	}
	if want := []string{"write", "idle", "read"}; s.Initial != "write" || !slices.Equal(order, want) {
		t.Errorf("initial %s, phases %v, want %v", s.Initial, order, want)
	}
	if diff := cmp.Diff(map[string][]string{
		// mount was called at the start, and by no runtime that was measured.
		"write": {"fork", "fsync", "mkdir", "mount", "newfstatat", "openat", "vfork"},
		"read": {
			"getdents64", "io_uring_setup", "ioctl where int arg1 == 0x5401", "ioctl where int arg1 == 0x5413", "newfstatat",
			"open where arg1 & 0x243 == 0x0", "openat where arg2 & 0x243 == 0x0", "socket where int arg0 == 0x1", "socket where int arg0 == 0x2",
		},
		"idle": nil,
	}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if want := []string{"clone3: " + noteClone3, "io_uring_setup: " + noteRing}; !slices.Equal(s.Notes, want) {
		t.Errorf("notes %q", s.Notes)
	}
	if s.Architectures != nil || len(s.Recordings) != 2 || s.Workload != "w" {
		t.Errorf("%+v", s)
	}
}

func TestSuggestUnknownValues(t *testing.T) {
	many := "ioctl:0"
	for i := range mostValues {
		many += fmt.Sprint(",", i+1)
	}
	for calls, want := range map[string][]string{
		"openat:0,any":              {"openat"},
		"openat":                    {"openat"}, // a recording of an older layout
		"open:0x40 openat:0":        {"open", "openat"},
		"clone:0x20000":             {"clone", "fork", "vfork"},
		"clone:any":                 {"clone", "fork", "vfork"},
		"clone:0x10f00 clone3":      {"fork", "vfork"},
		"clone:0x10f00":             nil,
		"vfork":                     {"fork", "vfork"},
		"socket:any":                {"socket"},
		many:                        {"ioctl"},
		"openat2:0":                 {"openat2"},
		"socketcall ipc getdents64": {"getdents64"},
		"read write fcntl":          nil,
	} {
		s, err := SuggestPhases([]*Recording{trained("1", "a", calls)}, SuggestOptions{})
		if err != nil {
			t.Errorf("%s: %v", calls, err)
			continue
		}
		if diff := cmp.Diff(want, lines(s.Phases[0].Allow)); diff != "" {
			t.Errorf("%s: %s", calls, diff)
		}
	}
}

func TestSuggestRefuses(t *testing.T) {
	good := trained("good", "a", "mkdir", "b", "rmdir")
	lossy := trained("lossy", "a", "mount", "b", "rmdir")
	lossy.Losses = []Loss{{Kind: LossAttachedLate, Count: 1}}
	plain := trained("plain", DefaultPhase, "mount")
	other := trained("other", "a", "mkdir")
	other.Workload = "x"
	backwards := trained("backwards", "b", "rmdir", "a", "mkdir")
	blind := trained("blind", "a", "mkdir", "b", "rmdir")
	blind.Initial = ""
	silent := trained("silent", "a", "mkdir")
	silent.Initial = "b"
	many := trained("many")
	for i := range MaxPhases + 1 {
		many.Phases[fmt.Sprint("p", i)] = Calls{specs.ArchX86_64: {"mkdir"}}
	}
	for name, tc := range map[string]struct {
		recs []*Recording
		o    SuggestOptions
		want string // of the error, or empty
	}{
		"good":         {[]*Recording{good}, SuggestOptions{}, ""},
		"nothing":      {nil, SuggestOptions{}, "none of 0 recordings"},
		"plain":        {[]*Recording{plain}, SuggestOptions{}, "none of 1 recordings was made by phase"},
		"two kinds":    {[]*Recording{plain, good}, SuggestOptions{}, ""},
		"lossy alone":  {[]*Recording{plain, lossy}, SuggestOptions{}, "may lack calls: attached-late"},
		"one lossy":    {[]*Recording{lossy, good}, SuggestOptions{}, ""},
		"forced":       {[]*Recording{lossy}, SuggestOptions{AllowLosses: true}, ""},
		"other":        {[]*Recording{good, other}, SuggestOptions{}, `is of workload "x", not of "w"`},
		"began apart":  {[]*Recording{good, backwards}, SuggestOptions{}, "began in a and in b"},
		"chosen":       {[]*Recording{good, backwards}, SuggestOptions{Initial: "b"}, ""},
		"no such":      {[]*Recording{good}, SuggestOptions{Initial: "c"}, `nothing was recorded in phase "c": want one of a, b`},
		"blind":        {[]*Recording{blind}, SuggestOptions{}, "don't tell in which of a, b they began"},
		"blind chosen": {[]*Recording{blind}, SuggestOptions{Initial: "a"}, ""},
		"silent":       {[]*Recording{silent}, SuggestOptions{}, ""},
		"many phases":  {[]*Recording{many}, SuggestOptions{Initial: "p0"}, "9 phases, want 1 to 8"},
		"group":        {[]*Recording{trained("1", "a", "mkdir @process")}, SuggestOptions{}, `"@process" is no system call`},
		"group, start": {[]*Recording{trained("1", StartPhase, "@process", "a", "mkdir")}, SuggestOptions{Initial: "a"}, `"@process" is no system call`},
		"bad name":     {[]*Recording{trained("1", "a b", "mkdir")}, SuggestOptions{}, "no name of a phase"},
	} {
		s, err := SuggestPhases(tc.recs, tc.o)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
		if err == nil && name == "silent" && (s.Phases[0].Name != "b" || len(s.Phases[0].Allow) != 0) {
			t.Errorf("%s: %+v", name, s.Phases)
		}
		if err != nil || name != "one lossy" && name != "forced" {
			continue
		}
		if mount := slices.Contains(lines(s.Phases[0].Allow), "mount"); mount != (name == "forced") {
			t.Errorf("%s: mount %v", name, mount)
		}
		if (s.Recordings[0].LeftOut == "") != (name == "forced") {
			t.Errorf("%s: %+v", name, s.Recordings)
		}
	}
	var loss *LossyError
	if _, err := SuggestPhases([]*Recording{lossy}, SuggestOptions{}); !errors.As(err, &loss) || loss.Recording != "lossy" {
		t.Errorf("%v", err)
	}
}

// TestSuggestionAllowsWhatWasDone: phases made of recordings compile, and allow in each
// phase every call with every value that was recorded in it, and no name that was
// recorded in none, nor means the same as one that was.
func TestSuggestionAllowsWhatWasDone(t *testing.T) {
	var pool []string
	for _, g := range Groups() {
		pool = append(pool, g.Calls()...)
	}
	pool = sorted(append(pool, WholePhaseFloor()...))
	pool = without(pool, []string{"clone3"}) // answered ENOSYS
	r := rand.New(rand.NewPCG(1, 2))
	values := map[string]func() uint64{
		"open":   func() uint64 { return r.Uint64() & 0o20003103 },
		"openat": func() uint64 { return r.Uint64() & 0o20003103 },
		"clone":  func() uint64 { return r.Uint64() & low32 },
		"socket": func() uint64 { return r.Uint64() & 0x1f },
		"ioctl":  func() uint64 { return r.Uint64() & low32 },
		"prctl":  func() uint64 { return r.Uint64() & 0x3f },
	}
	for range 60 {
		var recs []*Recording
		for i := range 1 + r.IntN(3) {
			var phases []any
			for _, phase := range []string{"a", "b", "c", "d"}[:1+r.IntN(4)] {
				var text []string
				for range r.IntN(40) {
					name := pool[r.IntN(len(pool))]
					if r.IntN(3) == 0 {
						name = []string{"open", "openat", "clone", "socket", "ioctl", "prctl"}[r.IntN(6)]
					}
					if values[name] != nil && !slices.ContainsFunc(text, func(s string) bool { return strings.HasPrefix(s, name+":") }) {
						var list []string
						for range 1 + r.IntN(12) {
							list = append(list, fmt.Sprint(values[name]()&[]uint64{0, low32}[r.IntN(2)]))
						}
						name += ":" + strings.Join(list, ",")
					}
					text = append(text, name)
				}
				phases = append(phases, phase, strings.Join(append(text, "mkdir"), " "))
			}
			recs = append(recs, trained(fmt.Sprint(i), phases...))
		}
		s, err := SuggestPhases(recs, SuggestOptions{Initial: "a"})
		if err != nil {
			t.Fatal(err)
		}
		plan, err := CompilePhases(s.Set(), PhaseHost{Notify: true, LSM: true}, PhaseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		called := map[string][]string{}
		for _, rec := range recs {
			for phase, calls := range rec.Phases {
				for _, name := range calls[specs.ArchX86_64] {
					called[phase] = append(called[phase], same(name)...)
					list := []uint64{0}
					for _, a := range rec.Arguments {
						if a.Phase == phase && a.Name == name {
							list = a.Values
						}
					}
					for _, v := range list {
						var args [6]uint64
						args[looked[name].index] = v
						if !plan.Allows(phase, specs.ArchX86_64, name, args) {
							t.Fatalf("phase %s denies %s of %#x, which was recorded: %v", phase, name, v, lines(s.Phases[0].Allow))
						}
					}
				}
			}
		}
		for phase, names := range called {
			for name := range plan.regions[phase] {
				if !slices.Contains(names, name) && !inPhaseFloor(name) && !slices.Contains(makesProcesses, name) && name != "open" && name != "openat" && flagsInMemory[name] == "" {
					t.Fatalf("phase %s allows %s, which was not recorded", phase, name)
				}
			}
		}
	}
}
