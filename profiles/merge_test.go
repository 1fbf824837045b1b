// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func recordingOf(id string, calls Calls) *Recording {
	return &Recording{
		SchemaVersion: 1, ID: id, Workload: "w", Kernel: "6.12.0", Runtime: "r", Gate: GateFilter,
		Phases: map[string]Calls{DefaultPhase: calls},
	}
}

func merge(t *testing.T, parent *Version, rec *Recording, o MergeOptions) (*Version, Delta) {
	t.Helper()
	v, delta, err := Merge(parent, rec, o)
	if err != nil {
		t.Fatal(err)
	}
	return v, delta
}

func mustMerge(t *testing.T, parent *Version, rec *Recording, o MergeOptions) *Version {
	t.Helper()
	v, _ := merge(t, parent, rec, o)
	if v == nil {
		t.Fatal("no new version")
	}
	return v
}

func x86_64(names ...string) Calls { return Calls{specs.ArchX86_64: names} }

func TestMerge(t *testing.T) {
	created := time.Date(2026, 11, 24, 16, 0, 0, 0, time.FixedZone("", 7200))
	v1, d1 := merge(t, nil, recordingOf("one", x86_64("execve", "read")), MergeOptions{Created: created})
	if d := cmp.Diff(Delta{Added: x86_64("execve", "read")}, d1); d != "" {
		t.Error(d)
	}
	data, err := EncodeProfile(v1.Profile)
	if err != nil {
		t.Fatal(err)
	}
	want := Manifest{
		SchemaVersion: 1, Workload: "w", Version: 1, Digest: Digest(data), Created: created.UTC(),
		Calls: x86_64("execve", "read"), Recordings: []string{"one"}, Kernel: "6.12.0", Runtime: "r",
	}
	if d := cmp.Diff(want, v1.Manifest); d != "" {
		t.Error(d)
	}

	if v, delta := merge(t, v1, recordingOf("two", x86_64("read")), MergeOptions{}); v != nil || delta.Added != nil || delta.Removed != nil {
		t.Errorf("nothing is new: got %+v, %+v", v, delta)
	}

	// The same name under another ABI is another call.
	v2, d2 := merge(t, v1, recordingOf("three", Calls{specs.ArchX86: {"read"}}), MergeOptions{})
	if d := cmp.Diff(Delta{Added: Calls{specs.ArchX86: {"read"}}, Removed: Calls{}}, d2); d != "" {
		t.Error(d)
	}
	m := v2.Manifest
	if m.Version != 2 || m.Parent != v1.Manifest.Digest || !slices.Equal(m.Recordings, []string{"one", "three"}) {
		t.Errorf("got %+v", m)
	}
	if !m.Calls.Equal(Calls{specs.ArchX86_64: {"execve", "read"}, specs.ArchX86: {"read"}}) {
		t.Errorf("got %v", m.Calls)
	}
	if lost := Denied(v2.Profile, m.Calls); lost.Len() > 0 {
		t.Errorf("version 2 denies its own evidence %v", lost)
	}
	if d := cmp.Diff(x86_64("execve", "read"), v1.Manifest.Calls); d != "" {
		t.Errorf("merging changed the parent: %s", d)
	}
}

func TestMergePolicyChanges(t *testing.T) {
	v1 := mustMerge(t, nil, recordingOf("one", x86_64("execve", "mkdir", "read")), MergeOptions{})
	v2, delta := merge(t, v1, recordingOf("two", x86_64("read")), MergeOptions{MustDeny: []string{"mkdir"}})
	if v2 == nil {
		t.Fatal("a changed policy makes no version")
	}
	if d := cmp.Diff(Delta{Added: Calls{}, Removed: x86_64("mkdir")}, delta); d != "" {
		t.Error(d)
	}
	if !v2.Manifest.Calls.Has(specs.ArchX86_64, "mkdir") {
		t.Error("the policy took evidence away")
	}
	if !slices.Equal(v2.Manifest.Recordings, []string{"one"}) {
		t.Errorf("a recording that brought nothing is listed: %v", v2.Manifest.Recordings)
	}
	if got := Denied(v2.Profile, x86_64("execve", "mkdir", "read")); !got.Equal(x86_64("mkdir")) {
		t.Errorf("denied: %v", got)
	}
	// The policy gives it back: nothing was lost.
	v3 := mustMerge(t, v2, recordingOf("three", x86_64("read")), MergeOptions{})
	if v3.Manifest.Digest != v1.Manifest.Digest {
		t.Error("without the policy the profile isn't what it was")
	}
}

func TestMergeRefusesLosses(t *testing.T) {
	rec := recordingOf("lossy", x86_64("execve"))
	rec.Losses = []Loss{{Kind: LossFirstSeen, Count: 2}, {Kind: LossAttachedLate, Count: 1, Detail: "after a restart"}}
	v, delta, err := Merge(nil, rec, MergeOptions{})
	var lossy *LossyError
	if v != nil || delta.Added != nil || !errors.As(err, &lossy) {
		t.Fatalf("got %v, %v, %v", v, delta, err)
	}
	if d := cmp.Diff(&LossyError{"lossy", rec.Losses[1:]}, lossy); d != "" {
		t.Error(d)
	}
	for _, want := range []string{"lossy", "attached-late", "after a restart", "explicitly"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q doesn't say %q", err, want)
		}
	}
	v = mustMerge(t, nil, rec, MergeOptions{AllowLosses: true})
	if d := cmp.Diff(rec.Losses[1:], v.Manifest.Losses); d != "" {
		t.Error(d)
	}
	rec.Losses = rec.Losses[:1]
	if v := mustMerge(t, nil, rec, MergeOptions{}); v.Manifest.Losses != nil {
		t.Errorf("lost first-seen events count as lost calls: %v", v.Manifest.Losses)
	}
}

func TestMergeRefusesAnotherWorkload(t *testing.T) {
	v1 := mustMerge(t, nil, recordingOf("one", x86_64("read")), MergeOptions{})
	rec := recordingOf("two", x86_64("write"))
	rec.Workload = "another"
	if v, _, err := Merge(v1, rec, MergeOptions{}); v != nil || err == nil || !strings.Contains(err.Error(), `"another"`) {
		t.Errorf("got %v, %v", v, err)
	}
}

func TestMergeOfNothing(t *testing.T) {
	if v, delta := merge(t, nil, recordingOf("empty", Calls{}), MergeOptions{MustAllow: []string{"read"}}); v != nil || delta.Added != nil {
		t.Errorf("a first version without a call: %+v, %+v", v, delta)
	}
}

// TestMergeBetweenKernels: nodes with two kernels must not make versions without
// end, and a call that is recorded is allowed wherever it is new.
func TestMergeBetweenKernels(t *testing.T) {
	older := MergeOptions{NewerThanKernel: []string{"fchmodat2", "mseal"}}
	newer := MergeOptions{NewerThanKernel: []string{"mseal"}}
	v1 := mustMerge(t, nil, recordingOf("old", x86_64("read")), older)
	if v, _ := merge(t, v1, recordingOf("new", x86_64("read")), newer); v != nil {
		t.Errorf("a newer kernel alone made version %+v", v.Manifest)
	}
	v2 := mustMerge(t, v1, recordingOf("new", x86_64("fchmodat2")), newer)
	if got := fallbacks(v2.Profile); !slices.Equal(got, []string{"mseal"}) {
		t.Errorf("ENOSYS for %q", got)
	}
	if v, _ := merge(t, v2, recordingOf("old", x86_64("read")), older); v != nil {
		t.Errorf("back on the older kernel: %+v", v.Manifest)
	}
}

func TestMergeFromExecve(t *testing.T) {
	rec := recordingOf("one", x86_64("exit_group"))
	rec.Gate = GateExec
	v1 := mustMerge(t, nil, rec, MergeOptions{})
	if missing := MissingForStart(v1.Profile, "", false); missing != nil {
		t.Errorf("the profile of a recording that began at the execve lacks %q", missing)
	}
	if !v1.Manifest.Calls.Equal(x86_64("exit_group")) || !slices.Equal(v1.Manifest.Floor, Floor("")) {
		t.Errorf("the floor counts as evidence: %v", v1.Manifest.Calls)
	}
	// It stays when a better recording follows: never silently smaller.
	v2 := mustMerge(t, v1, recordingOf("two", x86_64("execve")), MergeOptions{})
	if removed := Diff(v1.Profile, v2.Profile).Removed; removed.Len() > 0 {
		t.Errorf("lost %v", removed)
	}
}

// TestMergeIncidental: what the Go runtime in a container runtime happens to call
// is allowed without evidence, and makes no versions when it is seen.
func TestMergeIncidental(t *testing.T) {
	o := MergeOptions{Incidental: true}
	v1 := mustMerge(t, nil, recordingOf("one", x86_64("close", "execve", "futex", "mmap")), o)
	for _, name := range Incidental() {
		if Denied(v1.Profile, x86_64(name)).Len() > 0 {
			t.Errorf("%s is denied", name)
		}
	}
	// What denied ends a start, however rarely (brk: a crash in malloc), and what
	// only seems to belong to it.
	if got := Denied(v1.Profile, x86_64("brk", "clock_gettime", "epoll_create1", "epoll_pwait", "eventfd2", "fork")); !got.Equal(x86_64("epoll_create1", "eventfd2", "fork")) {
		t.Errorf("denied: %v", got)
	}
	// Those that would let a program do more are bound, unless they were recorded.
	if got := MayDeny(v1.Profile, x86_64(Incidental()...)); !got.Equal(x86_64("clone", "mprotect")) {
		t.Errorf("under conditions: %v", got)
	}
	if got := fallbacks(v1.Profile); !slices.Equal(got, []string{"clone3"}) {
		t.Errorf("ENOSYS for %q", got)
	}
	if slices.Contains(v1.Manifest.Incidental, "futex") || !slices.Contains(v1.Manifest.Incidental, "tgkill") || !slices.Contains(v1.Manifest.Incidental, "clone") {
		t.Errorf("the manifest says %q are without evidence", v1.Manifest.Incidental)
	}
	if v, delta := merge(t, v1, recordingOf("two", x86_64("execve", "tgkill", "nanosleep")), o); v != nil || delta.Added != nil {
		t.Errorf("calls that are allowed already made version %+v", v.Manifest)
	}
	// A whole clone is more than what is allowed.
	v2, delta := merge(t, v1, recordingOf("three", x86_64("clone", "tgkill")), o)
	if v2 == nil || !delta.Added.Equal(x86_64("clone", "tgkill")) || MayDeny(v2.Profile, x86_64("clone")).Len() > 0 {
		t.Errorf("clone was recorded: %+v", delta)
	}
	// A policy has the last word, over both kinds.
	o.MustDeny = []string{"clone", "clone3", "futex", "tgkill"}
	v3 := mustMerge(t, v2, recordingOf("four", x86_64("execve")), o)
	if got := Denied(v3.Profile, x86_64(o.MustDeny...)); !got.Equal(x86_64(o.MustDeny...)) {
		t.Errorf("of what must be denied, %v is", got)
	}
	if got := fallbacks(v3.Profile); !slices.Equal(got, []string{"clone3"}) {
		t.Errorf("ENOSYS for %q", got)
	}
	for _, name := range o.MustDeny {
		if slices.Contains(v3.Manifest.Incidental, name) {
			t.Errorf("the manifest says that %s is allowed", name)
		}
	}
}

// FuzzMerge holds the laws of versions over a chain of recordings.
func FuzzMerge(f *testing.F) {
	f.Add([]byte{1, 2}, []byte{3}, []byte{16, 2}, byte(0))
	f.Add([]byte{}, []byte{0, 200}, []byte{}, byte(255))
	f.Fuzz(func(t *testing.T, x, y, z []byte, policy byte) {
		var o MergeOptions
		if policy&1 != 0 {
			o.MustAllow = []string{"mkdir", "close"}
		}
		if policy&2 != 0 {
			o.MustDeny = []string{"futex", "close"}
		}
		if policy&4 != 0 {
			o.Architectures = []ABI{specs.ArchX32}
		}
		if policy&8 != 0 {
			o.NewerThanKernel = []string{"clone3", "futex", "mseal"}
		}
		o.Incidental = policy&16 != 0
		var head *Version
		var seen Calls
		for i, data := range [][]byte{x, y, z, x} {
			rec := recordingOf(string(rune('a'+i)), callsFrom(data))
			next, delta, err := Merge(head, rec, o)
			if err != nil {
				t.Fatal(err)
			}
			before := seen
			seen = Union(seen, rec.All())
			if next == nil {
				if delta.Added != nil || delta.Removed != nil {
					t.Errorf("no version, but %+v", delta)
				}
				lost := seen.Minus(before)
				if o.Incidental && head != nil { // what the profile allows already needs no version
					lost = MayDeny(head.Profile, lost)
				}
				for _, name := range lost.Names() {
					if !slices.Contains(o.MustDeny, name) {
						t.Fatalf("%s was lost", name)
					}
				}
				if !o.Incidental && !seen.Equal(before) {
					t.Fatalf("%v was lost", seen.Minus(before))
				}
				seen = before
				continue
			}
			if !next.Manifest.Calls.Equal(seen) {
				t.Errorf("evidence %v, want %v", next.Manifest.Calls, seen)
			}
			if !delta.Added.Equal(seen.Minus(before)) {
				t.Errorf("added %v, want %v", delta.Added, seen.Minus(before))
			}
			// What is denied of the evidence is what must be.
			denied := Denied(next.Profile, seen)
			for _, name := range denied.Names() {
				if !slices.Contains(o.MustDeny, name) {
					t.Errorf("%s is evidence and denied", name)
				}
			}
			for _, name := range o.MustDeny {
				if Denied(next.Profile, Calls{specs.ArchX86_64: {name}}).Len() == 0 {
					t.Errorf("%s is allowed, and must not be", name)
				}
			}
			if len(next.Profile.Architectures) == 0 {
				t.Error("no architecture")
			}
			if head != nil && (next.Manifest.Version != head.Manifest.Version+1 || next.Manifest.Parent != head.Manifest.Digest) {
				t.Errorf("%+v follows %+v", next.Manifest, head.Manifest)
			}
			roundTrip(t, &next.Manifest, EncodeManifest, DecodeManifest)
			roundTrip(t, next.Profile, EncodeProfile, DecodeProfile)
			head = next
			if again, _, err := Merge(head, rec, o); again != nil || err != nil {
				t.Errorf("the same recording again: %v, %v", again, err)
			}
		}
		if head == nil {
			return
		}
		// The order of recordings doesn't matter to what comes out.
		var reverse *Version
		for i, data := range [][]byte{z, y, x} {
			if next, _, err := Merge(reverse, recordingOf(string(rune('k'+i)), callsFrom(data)), o); err != nil {
				t.Fatal(err)
			} else if next != nil {
				reverse = next
			}
		}
		if reverse.Manifest.Digest != head.Manifest.Digest {
			t.Error("another order, another profile")
		}
		if o.Incidental {
			return // conditions can't be adopted
		}
		// A profile without its manifest unites to the same.
		adopted, err := Adopt(head.Profile)
		if err != nil {
			t.Fatal(err)
		}
		if lost := Denied(head.Profile, seen); !seen.Minus(lost).Minus(adopted.Manifest.Calls).Equal(Calls{}) {
			t.Errorf("adopting loses %v", seen.Minus(lost).Minus(adopted.Manifest.Calls))
		}
	})
}

func TestAdopt(t *testing.T) {
	allow := func(names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: specs.ActAllow}
	}
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{allow("read"), allow("close", "write")}}
	v, err := Adopt(p)
	if err != nil || !v.Manifest.Calls.Equal(x86_64("close", "read", "write")) || v.Manifest.Version != 0 {
		t.Fatalf("got %+v, %v", v, err)
	}
	next := mustMerge(t, v, recordingOf("one", x86_64("mkdir")), MergeOptions{})
	if lost := Denied(next.Profile, x86_64("close", "mkdir", "read", "write")); lost.Len() > 0 {
		t.Errorf("lost %v", lost)
	}
	if next.Manifest.Version != 1 || next.Manifest.Workload != "w" {
		t.Errorf("got %+v", next.Manifest)
	}

	for name, bad := range map[string]*specs.LinuxSeccomp{
		"allows by default":       AllowAll(),
		"logs by default":         {DefaultAction: specs.ActLog},
		"under conditions":        {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{}}}}},
		"logs and allows":         {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActLog}}},
		"asks a listener":         {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActNotify}}},
		"asks, under a condition": {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActNotify, Args: []specs.LinuxSeccompArg{{}}}}},
	} {
		if v, err := Adopt(bad); err == nil {
			t.Errorf("%s: adopted as %+v", name, v.Manifest)
		}
	}
}
