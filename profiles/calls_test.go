// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var testABIs = []ABI{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}

// callsFrom makes any set of calls out of fuzzed bytes: each names an ABI and a
// call. The result is neither sorted nor free of repeats.
func callsFrom(data []byte) Calls {
	names := []string{"read", "write", "openat", "close", "mmap", "mmap2", "execve", "mkdir", "futex", "clone3", "socketcall", "getppid"}
	out := Calls{}
	for _, b := range data {
		abi := testABIs[int(b>>4)%len(testABIs)]
		out[abi] = append(out[abi], names[int(b&15)%len(names)])
	}
	return out
}

func FuzzUnion(f *testing.F) {
	f.Add([]byte{1, 2, 3}, []byte{3, 17}, []byte{})
	f.Add([]byte{255, 0, 0}, []byte{16}, []byte{32, 33})
	f.Fuzz(func(t *testing.T, x, y, z []byte) {
		a, b, c := callsFrom(x), callsFrom(y), callsFrom(z)
		whole := Union(a, b, c)
		same := func(law string, got Calls) {
			t.Helper()
			if d := cmp.Diff(whole, got); d != "" {
				t.Errorf("%s (-whole +got):\n%s", law, d)
			}
		}
		same("commutes", Union(c, b, a))
		same("associates left", Union(Union(a, b), c))
		same("associates right", Union(a, Union(b, c)))
		same("idempotent", Union(whole, whole))
		same("neutral", Union(whole, nil, Calls{}, Calls{specs.ArchX86: nil}))
		for abi, names := range whole {
			if len(names) == 0 || !slices.IsSorted(names) || len(slices.Compact(slices.Clone(names))) != len(names) {
				t.Errorf("%s: %q is empty, not sorted or repeats", abi, names)
			}
		}
		for _, part := range []Calls{a, b, c} {
			for abi, names := range part {
				for _, name := range names {
					if !whole.Has(abi, name) {
						t.Errorf("%s %s was lost", abi, name)
					}
				}
			}
			if lost := part.Minus(whole); lost.Len() != 0 {
				t.Errorf("minus finds %v", lost)
			}
		}
		if got := Union(whole.Minus(Union(a)), a); !got.Equal(whole) {
			t.Errorf("what minus took and a don't make the whole: %v", got)
		}
		if n := whole.Len(); n > len(x)+len(y)+len(z) || n < len(whole.Names()) {
			t.Errorf("%d calls with %d names out of %d", n, len(whole.Names()), len(x)+len(y)+len(z))
		}
	})
}

func TestUnionSharesNothing(t *testing.T) {
	a := Calls{specs.ArchX86: {"read", "write"}}
	u := Union(a)
	u[specs.ArchX86][0] = "changed"
	if a[specs.ArchX86][0] != "read" {
		t.Error("a change of the union changed its part")
	}
}

func TestCallsKeepABIsApart(t *testing.T) {
	c := Union(Calls{specs.ArchX86_64: {"read"}}, Calls{specs.ArchX86: {"mmap2"}})
	if c.Has(specs.ArchX86, "read") || c.Has(specs.ArchX86_64, "mmap2") {
		t.Errorf("a call moved to another ABI: %v", c)
	}
	if got, want := c.ABIs(), []ABI{specs.ArchX86, specs.ArchX86_64}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if c.Equal(Calls{specs.ArchX86_64: {"mmap2"}, specs.ArchX86: {"read"}}) {
		t.Error("equal although the ABIs differ")
	}
}

func TestRecordingAll(t *testing.T) {
	r := &Recording{Phases: map[string]Calls{
		"start": {specs.ArchX86_64: {"execve", "read"}},
		"work":  {specs.ArchX86_64: {"read", "write"}, specs.ArchX32: {"close"}},
	}}
	want := Calls{specs.ArchX86_64: {"execve", "read", "write"}, specs.ArchX32: {"close"}}
	if d := cmp.Diff(want, r.All()); d != "" {
		t.Error(d)
	}
}

func TestBlocking(t *testing.T) {
	r := &Recording{Losses: []Loss{
		{Kind: LossFirstSeen, Count: 3},
		{Kind: LossArguments, Count: 1},
		{Kind: LossAttachedLate, Count: 1},
		{Kind: "of-a-later-version", Count: 1},
	}}
	want := []Loss{{Kind: LossAttachedLate, Count: 1}, {Kind: "of-a-later-version", Count: 1}}
	if d := cmp.Diff(want, r.Blocking()); d != "" {
		t.Error(d)
	}
}

func TestUnseen(t *testing.T) {
	run := func(names ...string) *Recording {
		return &Recording{Phases: map[string]Calls{DefaultPhase: {specs.ArchX86_64: names}}}
	}
	tests := []struct {
		name string
		runs []*Recording
		want float64
	}{
		{"nothing", nil, 1},
		{"one run", []*Recording{run("read", "write")}, 1},
		{"two equal runs", []*Recording{run("read"), run("read")}, 0},
		{"one call of four sightings is single", []*Recording{run("read"), run("read"), run("read", "write")}, 0.25},
		{"the same name under another ABI is another call", []*Recording{
			run("read"), {Phases: map[string]Calls{DefaultPhase: {specs.ArchX86: {"read"}}}},
		}, 1},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			if got := Unseen(tc.runs); got != tc.want {
				t.Errorf("got %g, want %g", got, tc.want)
			}
		})
	}
}

// TestUnseenPredicts holds the estimate against runs drawn from known chances:
// it estimates the share of the next run's sightings that are new.
func TestUnseenPredicts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	chances := map[string]float64{}
	for i := range 200 {
		chances[string(rune('a'+i%26))+string(rune('a'+i/26))] = 1 / float64(1+i)
	}
	draw := func() *Recording {
		var names []string
		for name, p := range chances {
			if r.Float64() < p {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return &Recording{Phases: map[string]Calls{DefaultPhase: {specs.ArchX86_64: names}}}
	}
	var estimated, real float64
	const rounds, runs = 300, 20
	for range rounds {
		var recordings []*Recording
		var seen []Calls
		for range runs {
			rec := draw()
			recordings, seen = append(recordings, rec), append(seen, rec.All())
		}
		next := draw().All()
		estimated += Unseen(recordings)
		real += float64(next.Minus(Union(seen...)).Len()) / float64(next.Len())
	}
	// Good and Turing divide by sightings, so the estimate is of a share.
	if ratio := estimated / real; ratio < 0.8 || ratio > 1.25 {
		t.Errorf("estimated %.4f, really %.4f", estimated/rounds, real/rounds)
	}
}
