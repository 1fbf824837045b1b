// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
)

// numbers returns a phase's calls of an ABI.
func numbers(s *bpf.Snapshot, phase uint8, abi bpf.ABI) []uint16 {
	for _, c := range s.Calls {
		if c.Phase == phase && c.ABI == abi {
			return c.Numbers
		}
	}
	return nil
}

func wantCalls(t *testing.T, s *bpf.Snapshot, want ...bpf.CallSet) {
	t.Helper()
	if diff := cmp.Diff(want, s.Calls); diff != "" {
		t.Errorf("recorded calls (-want +got):\n%s", diff)
	}
}

func x8664(numbers ...uint16) bpf.CallSet {
	slices.Sort(numbers)
	return bpf.CallSet{ABI: bpf.ABIX8664, Numbers: numbers}
}

func filterGate(t *testing.T) bpf.TrackOptions {
	return bpf.TrackOptions{Gate: bpf.GateFilter, BaseFilters: baseFilters(t)}
}

func TestFilterGateRecordsExactly(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	p := start(t, &cg, "caller", script{Calls: steps(call(sysGetgid), pause(), filter, call(sysGetppid), call(sysGetuid), pause(), exit)})
	p.waits()
	s, err := r.Snapshot(h)
	if err != nil {
		t.Fatal(err)
	}
	wantCalls(t, s) // none before the gate, though the whole Go runtime started
	p.release()
	p.waits()
	p.release()
	p.wait()
	s = finish(t, r, h)
	wantCalls(t, s, x8664(sysRead, sysWrite, sysGetuid, sysGetppid, sysExitGroup))
	if (s.Losses != bpf.Losses{}) {
		t.Errorf("losses: %+v", s.Losses)
	}
	if s.RootCgroup != cg.id || s.Handle != h || !s.Finished || !s.GateOpen {
		t.Errorf("instance: %+v", s.Instance)
	}
	if _, err := r.Snapshot(h); !errors.Is(err, bpf.ErrUnknown) {
		t.Errorf("snapshot after untrack: %v", err)
	}
}

func TestInheritedFilterKeepsGateShut(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, bpf.TrackOptions{Gate: bpf.GateFilter, BaseFilters: baseFilters(t) + 1})
	p := start(t, &cg, "caller", script{Inherit: 1, Calls: steps(call(sysGetgid), pause(), filter, call(sysGetuid), exit)})
	p.waits()
	s, err := r.Snapshot(h)
	if err != nil {
		t.Fatal(err)
	}
	wantCalls(t, s)
	p.release()
	p.wait()
	wantCalls(t, finish(t, r, h), x8664(sysGetuid, sysExitGroup))
}

func TestForeignLineageIsALoss(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, bpf.TrackOptions{Gate: bpf.GateFilter, BaseFilters: baseFilters(t) + 1})
	p := start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetuid), exit)})
	p.wait()
	s := finish(t, r, h)
	wantCalls(t, s) // its filter only makes the base full
	if s.Losses.ForeignCalls == 0 || !s.Losses.Evidence() {
		t.Errorf("losses: %+v, want foreign calls", s.Losses)
	}
}

func TestExecGate(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, bpf.TrackOptions{Gate: bpf.GateExec})
	s, err := r.Snapshot(h)
	if err != nil {
		t.Fatal(err)
	}
	if s.GateOpen {
		t.Error("gate is open before the first execve")
	}
	p := start(t, &cg, "caller", script{Calls: steps(call(sysGetgid), exit)})
	p.wait()
	s = finish(t, r, h)
	if !s.GateOpen {
		t.Error("gate is shut after execve")
	}
	got := numbers(s, 0, bpf.ABIX8664)
	for _, want := range []uint16{sysGetgid, sysExitGroup} {
		if !slices.Contains(got, want) {
			t.Errorf("call %d is missing: %v", want, got)
		}
	}
	// execve, and what the child did before it: close_range or fcntl, prctl, dup3
	// of the Go runtime that set it up.
	for _, not := range []uint16{59, 292} {
		if slices.Contains(got, not) {
			t.Errorf("call %d from before the gate was recorded", not)
		}
	}
}

func TestLateAttach(t *testing.T) {
	r, root := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	old := root.child(t, "old")
	p := start(t, &old, "caller", script{Calls: steps(call(sysGetgid), pause(), call(sysGetuid), exit)})
	p.waits()
	h := track(t, r, root, bpf.TrackOptions{Gate: bpf.GateOpen})
	if err := r.AddCgroup(h, old.id); err != nil {
		t.Fatal(err)
	}
	if err := r.AddCgroup(h, old.id); !errors.Is(err, bpf.ErrTracked) {
		t.Errorf("added twice: %v", err)
	}
	p.release()
	p.wait()
	got := numbers(finish(t, r, h), 0, bpf.ABIX8664)
	if !slices.Contains(got, sysGetuid) || !slices.Contains(got, sysExitGroup) || slices.Contains(got, sysGetgid) {
		t.Errorf("recorded %v, want getuid and exit_group, not getgid", got)
	}
	if err := r.AddCgroup(h, old.id); !errors.Is(err, bpf.ErrUnknown) {
		t.Errorf("added to a released instance: %v", err)
	}
}

func TestABIsAndOddNumbers(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	const i386Getpid, x32 = 20, 0x40000000
	p := start(t, &cg, "caller", script{Calls: steps(filter,
		call32(i386Getpid), call32(x32|i386Getpid),
		call(x32|sysGetpid), call(x32|1023), call(x32|1024),
		call(1023), call(1024), call(0xffffffffffffffff), call(0x80000000),
		exit)})
	p.wait()
	s := finish(t, r, h)
	wantCalls(t, s,
		x8664(1023, sysExitGroup),
		bpf.CallSet{ABI: bpf.ABII386, Numbers: []uint16{i386Getpid}},
		bpf.CallSet{ABI: bpf.ABIX32, Numbers: []uint16{sysGetpid, 1023}})
	want := []bpf.OddCall{
		{ABI: bpf.ABIX8664, Number: 1024},
		{ABI: bpf.ABIX8664, Number: 0x80000000},
		{ABI: bpf.ABIX8664, Number: 0xffffffff},
		{ABI: bpf.ABII386, Number: x32 | i386Getpid}, // no flag there
		{ABI: bpf.ABIX32, Number: 1024},
	}
	if diff := cmp.Diff(want, s.OddCalls); diff != "" {
		t.Errorf("odd calls (-want +got):\n%s", diff)
	}
	if s.Losses.OddCalls != 0 {
		t.Errorf("losses: %+v", s.Losses)
	}
}

func TestOddNumbersOverflow(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	calls := []step{filter}
	for i := range uint64(40) {
		calls = append(calls, call(2000+i), call(2000+i))
	}
	start(t, &cg, "caller", script{Calls: append(calls, exit)}).wait()
	s := finish(t, r, h)
	if len(s.OddCalls) != 32 || s.Losses.OddCalls != 16 || !s.Losses.Evidence() {
		t.Errorf("%d odd calls kept and %d lost, want 32 and 16", len(s.OddCalls), s.Losses.OddCalls)
	}
}

func TestNestedCgroups(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	// Made by the process itself, two levels at a time.
	nested := filepath.Join(cg.path, "inner")
	inner := cg.child(t, "middle")
	p := start(t, &inner, "caller", script{Nested: filepath.Join(inner.path, "leaf"), Calls: steps(filter, call(sysGetuid), pause(), exit)})
	p.waits()
	if got := cgroups(t, r, h); got != 3 {
		t.Errorf("%d cgroups are tracked, want root, middle and leaf", got)
	}
	p.release()
	p.wait()
	if err := os.Remove(filepath.Join(inner.path, "leaf")); err != nil {
		t.Fatal(err)
	}
	// The kernel releases a cgroup after rmdir has returned.
	if !poll(func() bool { return cgroups(t, r, h) == 2 }) {
		t.Errorf("%d cgroups are tracked after a removal, want 2", cgroups(t, r, h))
	}
	if err := os.Mkdir(nested, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := cgroups(t, r, h); got != 3 {
		t.Errorf("%d cgroups are tracked after another was made, want 3", got)
	}
	st, err := r.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if st.Cgroups != 3 || st.Instances != 1 {
		t.Errorf("stats: %+v", st)
	}
	if err := os.Remove(nested); err != nil {
		t.Fatal(err)
	}
	s := finish(t, r, h)
	wantCalls(t, s, x8664(sysRead, sysWrite, sysGetuid, sysExitGroup))
	if s.Cgroups != 0 {
		t.Errorf("%d cgroups left", s.Cgroups)
	}
}

func cgroups(t *testing.T, r *bpf.Recorder, h bpf.Handle) int {
	t.Helper()
	all, err := r.Instances()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.Handle == h {
			return i.Cgroups
		}
	}
	t.Fatalf("%s is not listed", h)
	return 0
}

func TestFullCgroupMapIsALoss(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{Cgroups: 2}), newCgroup(t)
	h := track(t, r, cg, bpf.TrackOptions{Gate: bpf.GateOpen})
	for i := range 4 {
		cg.child(t, fmt.Sprint("child", i))
	}
	if _, err := r.Track(newCgroup(t).id, bpf.TrackOptions{}); !errors.Is(err, bpf.ErrFull) {
		t.Errorf("track beyond the map's size: %v, want ErrFull", err)
	}
	if err := r.AddCgroup(h, newCgroup(t).id); !errors.Is(err, bpf.ErrFull) {
		t.Errorf("add beyond the map's size: %v, want ErrFull", err)
	}
	st, err := r.Stats()
	if err != nil {
		t.Fatal(err)
	}
	s := finish(t, r, h)
	// The root and one child have room.
	if s.Losses.Cgroups != 3 || st.Errors["cgroup_insert"] != s.Losses.Cgroups || !s.Losses.Evidence() {
		t.Errorf("losses %+v, errors %v, want children lost and counted alike", s.Losses, st.Errors)
	}
}

// As many instances as there may be, and calls in every one of them, before and
// after one more was refused.
func TestCapacity(t *testing.T) {
	// The ring has room for all events: a reader beside would have to keep up.
	r := open(t, pinDir(t), bpf.Options{RingBytes: 1 << 20})
	opts := filterGate(t)
	var handles []bpf.Handle
	const all = bpf.DefaultInstances
	// One process visits all. Its way on is a write, which is the last call in each
	// but the last; the command of an ioctl tells them apart.
	visitor := script{Calls: steps(filter)}
	for i := range all {
		cg := newCgroup(t)
		handles = append(handles, track(t, r, cg, opts))
		visitor.Visits = append(visitor.Visits, filepath.Join(cg.path, "cgroup.procs"))
		visitor.Calls = append(visitor.Calls, step{Visit: i + 1}, call(sysIoctl, ^uint64(0), 10000+uint64(i)))
		if i == all/2 {
			visitor.Calls = append(visitor.Calls, pause()...)
		}
	}
	visitor.Calls = append(visitor.Calls, exit)
	p := start(t, nil, "caller", visitor)
	p.waits()
	more := newCgroup(t)
	if _, err := r.Track(more.id, opts); !errors.Is(err, bpf.ErrFull) || !strings.Contains(err.Error(), fmt.Sprint(all)) {
		t.Errorf("instance %d: %v, want ErrFull with the limit", all+1, err)
	}
	if _, err := r.Await("one-more", opts); !errors.Is(err, bpf.ErrFull) {
		t.Errorf("awaited instance %d: %v, want ErrFull", all+1, err)
	}
	p.release()
	p.wait()

	made := make(map[bpf.Handle]int)
	total := 0
	for i, h := range handles {
		s, err := r.Snapshot(h)
		if err != nil {
			t.Fatal(err)
		}
		want := []uint16{sysWrite, sysIoctl}
		switch i {
		case all / 2:
			want = append(want, sysRead)
		case all - 1:
			want = []uint16{sysIoctl, sysExitGroup}
		}
		wantCalls(t, s, x8664(want...))
		args := []bpf.ArgSet{{Number: sysIoctl, Arg: 1, Mask: 0xffffffff, Values: []uint64{10000 + uint64(i)}}}
		if diff := cmp.Diff(args, s.Args); diff != "" {
			t.Errorf("instance %d: arguments (-want +got):\n%s", i, diff)
		}
		if (s.Losses != bpf.Losses{}) {
			t.Fatalf("instance %d: losses %+v", i, s.Losses)
		}
		made[h] = len(want)
		total += len(want)
	}
	events := make(map[bpf.Handle]int)
	for _, e := range collect(t, r, func(all []bpf.Event) bool { return len(all) == total }) {
		events[e.Handle]++
	}
	if diff := cmp.Diff(made, events); diff != "" {
		t.Errorf("events of each instance (-want +got):\n%s", diff)
	}
	// One goes, one comes, and knows nothing of the one before.
	finish(t, r, handles[511])
	h := track(t, r, more, opts)
	if h.Slot != 511 || h.Generation != handles[511].Generation+1 {
		t.Errorf("handle %s, want a later generation of slot 511", h)
	}
	s, err := r.Snapshot(h)
	if err != nil {
		t.Fatal(err)
	}
	wantCalls(t, s)
	st, err := r.Stats()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d instances: %d bytes of kernel memory, %d each", st.Instances, st.Memory, st.Memory/uint64(st.Instances))
}

// collect reads events until the given function has had enough. One that is lost
// never comes: that fails the test, and doesn't hang it.
func collect(t *testing.T, r *bpf.Recorder, until func([]bpf.Event) bool) []bpf.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var all []bpf.Event
	enough := false
	if err := r.Events(ctx, func(e bpf.Event) {
		all = append(all, e)
		if until(all) {
			enough = true
			cancel()
		}
	}); err != nil {
		t.Fatal(err)
	}
	if !enough {
		t.Fatalf("%d events came, and then none", len(all))
	}
	return all
}

func TestEvents(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	opts := filterGate(t)
	opts.Phase = 3
	h := track(t, r, cg, opts)
	p := start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetuid), call32(20), call(sysGetuid), call(5000), exit)})
	pid := p.cmd.Process.Pid
	p.wait()
	all := collect(t, r, func(all []bpf.Event) bool { return all[len(all)-1].Number == sysExitGroup })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	base := filepath.Base(exe)
	last := all[0].Since
	for i, e := range all {
		if e.Since < last || e.Since <= 0 {
			t.Errorf("event %d came at %v, the one before at %v", i, e.Since, last)
		}
		last = e.Since
		if e.PID == 0 {
			t.Errorf("event %d has no thread id", i)
		}
		all[i].Since, all[i].PID = 0, 0
	}
	event := func(abi bpf.ABI, nr uint32) bpf.Event {
		return bpf.Event{Handle: h, Cgroup: cg.id, Phase: 3, ABI: abi, Number: nr, TGID: pid, Comm: base[:min(15, len(base))], Exe: base}
	}
	want := []bpf.Event{event(bpf.ABIX8664, sysGetuid), event(bpf.ABII386, 20), event(bpf.ABIX8664, 5000), event(bpf.ABIX8664, sysExitGroup)}
	if diff := cmp.Diff(want, all); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	finish(t, r, h)
}

func TestEventsHaveOneReader(t *testing.T) {
	dir := pinDir(t)
	r, other, cg := open(t, dir, bpf.Options{}), open(t, dir, bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	start(t, &cg, "caller", script{Calls: steps(filter, exit)}).wait()
	var busy error
	collect(t, r, func([]bpf.Event) bool {
		busy = other.Events(t.Context(), func(bpf.Event) {})
		return true
	})
	if !errors.Is(busy, bpf.ErrBusy) {
		t.Errorf("second reader: %v, want ErrBusy", busy)
	}
	finish(t, r, h)
}

func TestFullRingLosesNoCall(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{RingBytes: 4096}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	calls := []step{filter}
	want := []uint16{sysExitGroup}
	for i := range uint64(200) {
		calls = append(calls, call(600+i)) // there are none such: ENOSYS
		want = append(want, uint16(600+i))
	}
	start(t, &cg, "caller", script{Calls: append(calls, exit)}).wait()
	s := finish(t, r, h)
	wantCalls(t, s, x8664(want...))
	if s.Losses.Events == 0 || s.Losses.Evidence() {
		t.Fatalf("losses: %+v, want events alone", s.Losses)
	}
	kept := uint64(len(want)) - s.Losses.Events
	if got := uint64(len(collect(t, r, func(all []bpf.Event) bool { return uint64(len(all)) == kept }))); got != kept {
		t.Errorf("%d events in the ring, want %d", got, kept)
	}
	st, err := r.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if st.Errors["ring_reserve"] != s.Losses.Events {
		t.Errorf("%d failed reserves, %d events lost", st.Errors["ring_reserve"], s.Losses.Events)
	}
}

func TestPhases(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	p := start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetuid), pause(), call(sysGetgid), call(16, ^uint64(0), 7), pause(), call(sysGetuid), exit)})
	p.waits()
	if err := r.SetPhase(h, 1); err != nil {
		t.Fatal(err)
	}
	p.release()
	p.waits()
	if err := r.SetPhase(h, 7); err != nil {
		t.Fatal(err)
	}
	p.release()
	p.wait()
	if err := r.SetPhase(h, 8); err == nil {
		t.Error("phase 8 was taken")
	}
	s := finish(t, r, h)
	// The read of the first pause was entered before the switch, or after: the
	// test's own switch doesn't wait for it.
	for i, c := range s.Calls {
		s.Calls[i].Numbers = slices.DeleteFunc(c.Numbers, func(n uint16) bool { return n == sysRead })
	}
	wantCalls(t, s,
		bpf.CallSet{Phase: 0, Numbers: []uint16{sysWrite, sysGetuid}},
		bpf.CallSet{Phase: 1, Numbers: []uint16{sysWrite, 16, sysGetgid}},
		bpf.CallSet{Phase: 7, Numbers: []uint16{sysGetuid, sysExitGroup}})
	if diff := cmp.Diff([]bpf.ArgSet{{Phase: 1, Number: 16, Arg: 1, Mask: 0xffffffff, Values: []uint64{7}}}, s.Args); diff != "" {
		t.Errorf("arguments (-want +got):\n%s", diff)
	}
	if s.Phase != 7 {
		t.Errorf("phase %d, want 7", s.Phase)
	}
}

// TestStart: until the execve of a task that has loaded its filter, calls count apart,
// whatever the phase is by then.
func TestStart(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	opts := filterGate(t)
	opts.Phase, opts.Start = 2, new(uint8(5))
	h := track(t, r, cg, opts)
	starting := func(want bool) {
		t.Helper()
		all, err := r.Instances()
		if err != nil {
			t.Fatal(err)
		}
		if len(all) != 1 || all[0].Starting != want {
			t.Errorf("%+v, want starting %v", all, want)
		}
	}
	// It is executed in the cgroup, too, and has no filter of its own then.
	start(t, &cg, "caller", script{Calls: steps(call(sysGetgid), exit)}).wait()
	starting(true)
	if err := r.SetPhase(h, 3); err != nil {
		t.Fatal(err)
	}
	starting(true)
	start(t, &cg, "caller", script{Inherit: 1, Calls: steps(call(sysGetppid), exit)}).wait()
	starting(false)
	s := finish(t, r, h)
	has := map[uint8]map[uint16]bool{}
	for _, c := range s.Calls {
		has[c.Phase] = map[uint16]bool{}
		for _, n := range c.Numbers {
			has[c.Phase][n] = true
		}
	}
	const execve = 59
	if len(has) != 2 || !has[5][execve] || has[5][sysGetppid] || !has[3][sysGetppid] || has[3][execve] {
		t.Errorf("calls: %+v", s.Calls)
	}
	if s.Phase != 3 {
		t.Errorf("phase %d, want 3", s.Phase)
	}
	opts.Start = new(uint8(bpf.Phases))
	if _, err := r.Track(newCgroup(t).id, opts); err == nil {
		t.Error("a start in phase 8 was taken")
	}
}

func TestArguments(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	const bad = ^uint64(0)
	calls := steps(filter,
		call(41, 16, 3|0x80000, 0), call(41, 1, 1|0x800, 99), // socket
		call(257, bad, 0, 0x80000|0x8000), call(257, bad, 0, 0x80000|1|0x40|0x200), // openat
		call(16, bad, 0xffffffff80045430),                                     // ioctl, as musl extends it
		call(272, 1<<35|4),                                                    // unshare: a long that no word holds
		call(157, 0x5001),                                                     // prctl
		call32(221, 0xffffffff, 9),                                            // fcntl64 of i386
		call32(102, 77, 0),                                                    // socketcall
		call32(117, 1<<16|88),                                                 // ipc, version 1
		call(0x40000000|514, bad, 0x1234),                                     // ioctl of x32
		call(9, 0, 0, 5, 0x4022), call(9, 0, 0, 1, 2), call(9, 0, 0, 5, 0x22), // mmap of nothing
		call(54, bad, 1, 2), // setsockopt
	)
	for i := range uint64(40) {
		calls = append(calls, call(72, bad, 5000+i)) // fcntl
	}
	for i := range uint64(32) {
		calls = append(calls, call(28, 0, 0, 5000+i)) // madvise
	}
	p := start(t, &cg, "caller", script{Calls: append(calls, exit)})
	p.wait()
	s := finish(t, r, h)
	full := make([]uint64, 32)
	for i := range full {
		full[i] = 5000 + uint64(i)
	}
	const integer, long = 0xffffffff, ^uint64(0)
	want := []bpf.ArgSet{
		{Number: 9, Arg: 2, Mask: long, Values: []uint64{1, 5}},
		{Number: 9, Arg: 3, Mask: 0x3f, Values: []uint64{2, 0x22}},
		{Number: 16, Arg: 1, Mask: integer, Values: []uint64{0x80045430}},
		{Number: 28, Arg: 2, Mask: integer, Values: full},
		{Number: 41, Arg: 0, Mask: integer, Values: []uint64{1, 16}},
		{Number: 41, Arg: 1, Mask: 15, Values: []uint64{1, 3}},
		{Number: 54, Arg: 1, Mask: integer, Values: []uint64{1}},
		{Number: 54, Arg: 2, Mask: integer, Values: []uint64{2}},
		{Number: 72, Arg: 1, Mask: integer, Any: true},
		{Number: 157, Arg: 0, Mask: integer, Values: []uint64{0x5001}},
		{Number: 257, Arg: 2, Mask: 0o20003103, Values: []uint64{0, 0o1101}},
		{Number: 272, Arg: 0, Mask: long, Any: true},
		{ABI: bpf.ABII386, Number: 102, Arg: 0, Mask: integer, Values: []uint64{77}},
		{ABI: bpf.ABII386, Number: 117, Arg: 0, Mask: 0xffff, Values: []uint64{88}},
		{ABI: bpf.ABII386, Number: 221, Arg: 1, Mask: integer, Values: []uint64{9}},
		{ABI: bpf.ABIX32, Number: 514, Arg: 1, Mask: integer, Values: []uint64{0x1234}},
	}
	if diff := cmp.Diff(want, s.Args); diff != "" {
		t.Errorf("arguments (-want +got):\n%s", diff)
	}
	if (s.Losses != bpf.Losses{}) {
		t.Errorf("losses: %+v", s.Losses)
	}
}

// More values than an instance has room for: every one is kept, or its set says
// any, and the loss is counted.
func TestArgumentsOverflow(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	const bad = ^uint64(0)
	calls := []step{filter}
	made := make(map[string]bool)
	add := func(s step, arg int, v uint64) {
		s.Args[arg] = v
		calls = append(calls, s)
		made[fmt.Sprintf("%d/%d/%d/%d", s.Gate32, s.Number, arg, v)] = true
	}
	// Three whole sets, before the room ends.
	for v := uint64(70000); v < 70032; v++ {
		add(call(16, bad), 1, v)
		add(call(72, bad), 1, v)
		add(call(157), 0, v)
	}
	for v := uint64(70000); v < 70032; v++ {
		for _, c := range []struct {
			step
			arg int
		}{
			{call(28, 1), 2},
			{call(250), 0},
			{call(321), 0},
			{call(317), 0},
			{call(308, bad), 1},
			{call(41, 0, 1), 0},
			{call(54, bad), 1},
			{call(101, 0, bad), 0},
			{call32(54, bad), 1},
			{call32(55, bad), 1},
			{call32(221, bad), 1},
			{call32(172), 0},
			{call32(219, 1), 2},
			{call32(288), 0},
			{call32(357), 0},
			{call32(354), 0},
			{call32(102), 0},
			{call32(359, 0, 1), 0},
			{call32(366, bad), 1},
		} {
			add(c.step, c.arg, v)
		}
	}
	start(t, &cg, "caller", script{Calls: append(calls, exit)}).wait()
	s := finish(t, r, h)
	kept, anySets := 0, 0
	for key := range made {
		var gate, nr, arg, v uint64
		if _, err := fmt.Sscanf(key, "%d/%d/%d/%d", &gate, &nr, &arg, &v); err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(s.Args, func(a bpf.ArgSet) bool {
			return uint64(a.ABI) == gate && uint64(a.Number) == nr && uint64(a.Arg) == arg
		})
		switch {
		case i >= 0 && s.Args[i].Any:
			anySets++
		case i >= 0 && slices.Contains(s.Args[i].Values, v):
			kept++
		default:
			t.Errorf("value %s is neither kept nor any", key)
		}
	}
	if s.Losses.Args == 0 || anySets == 0 || kept < 96 {
		t.Errorf("losses %+v with %d of %d values kept, want some lost", s.Losses, kept, len(made))
	}
	t.Logf("%d values made, %d kept, %d lost", len(made), kept, s.Losses.Args)
}

func TestKilledRecorderLosesNothing(t *testing.T) {
	dir, cg := pinDir(t), newCgroup(t)
	rec := start(t, nil, "recorder", recorderArg{Dir: dir, Cgroups: []uint64{cg.id}, Base: baseFilters(t)})
	var handles []bpf.Handle
	rec.line(&handles)
	p := start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetppid), pause(), call(sysGetuid), pause(), call(sysGetgid), pause(), exit)})
	p.waits()
	rec.kill()
	p.release()
	p.waits() // getuid was called while nobody was there

	r := open(t, dir, bpf.Options{})
	all, err := r.Instances()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || all[0].Handle != handles[0] || all[0].RootCgroup != cg.id || all[0].Finished {
		t.Fatalf("instances after the kill: %+v", all)
	}
	p.release()
	p.waits()
	s, err := r.Finish(handles[0])
	if err != nil {
		t.Fatal(err)
	}
	want := x8664(sysRead, sysWrite, sysGetppid, sysGetuid, sysGetgid)
	wantCalls(t, s, want)
	// And the events that nobody read.
	n := 0
	collect(t, r, func(all []bpf.Event) bool { n = len(all); return n == len(want.Numbers) })

	// Killed after Finish, before the snapshot was stored: it is there again.
	r2 := open(t, dir, bpf.Options{})
	p.release() // exit_group comes after the end
	p.wait()
	if all, err = r2.Instances(); err != nil || len(all) != 1 || !all[0].Finished {
		t.Fatalf("instances after finish: %+v, %v", all, err)
	}
	if _, err := r2.Track(cg.id, bpf.TrackOptions{}); err != nil {
		t.Errorf("tracking the finished cgroup again: %v", err)
	}
	if s, err = r2.Finish(handles[0]); err != nil {
		t.Fatal(err)
	}
	wantCalls(t, s, want)
	if err := r2.Release(handles[0]); err != nil {
		t.Error(err)
	}
	if err := r2.Release(handles[0]); !errors.Is(err, bpf.ErrUnknown) {
		t.Errorf("released twice: %v", err)
	}
}

// An awaited cgroup, and children of it and of a tracked one, that are made while
// no process has the recorder open.
func TestCgroupsMadeWhileRecorderIsDead(t *testing.T) {
	dir, parent := pinDir(t), newCgroup(t)
	tracked := parent.child(t, "tracked")
	rec := start(t, nil, "recorder", recorderArg{Dir: dir, Cgroups: []uint64{tracked.id}, Names: []string{"made-later"}, Base: baseFilters(t)})
	var handles []bpf.Handle
	rec.line(&handles)
	rec.kill()
	child, awaited := tracked.child(t, "child"), parent.child(t, "made-later")
	grandchild := awaited.child(t, "child")
	start(t, &child, "caller", script{Calls: steps(filter, call(sysGetuid), exit)}).wait()
	start(t, &awaited, "caller", script{Calls: steps(filter, call(sysGetgid), exit)}).wait()
	start(t, &grandchild, "caller", script{Calls: steps(filter, call(sysGetppid), exit)}).wait()

	r := open(t, dir, bpf.Options{})
	all, err := r.Instances()
	if err != nil || len(all) != 2 || all[0].Cgroups != 2 || all[1].Cgroups != 2 || all[1].RootCgroup != awaited.id {
		t.Errorf("instances after the kill: %+v, %v", all, err)
	}
	wantCalls(t, finish(t, r, handles[0]), x8664(sysGetuid, sysExitGroup))
	wantCalls(t, finish(t, r, handles[1]), x8664(sysGetgid, sysGetppid, sysExitGroup))
}

// With its cgroups gone an instance keeps what it has, and another cgroup in the
// same place is none of its.
func TestRemovedCgroup(t *testing.T) {
	r, parent := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	path := filepath.Join(parent.path, "root")
	remove := func() {
		t.Helper()
		if !poll(func() bool { err := os.Remove(path); return err == nil || errors.Is(err, os.ErrNotExist) }) {
			t.Fatalf("can't remove %s", path)
		}
	}
	cg := mkdir(t, path)
	h := track(t, r, cg, filterGate(t))
	start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetuid), exit)}).wait()
	remove()
	if !poll(func() bool { return cgroups(t, r, h) == 0 }) {
		t.Errorf("%d cgroups are tracked after the removal of the only one", cgroups(t, r, h))
	}
	again := mkdir(t, path)
	start(t, &again, "caller", script{Calls: steps(filter, call(sysGetgid), exit)}).wait()
	s := finish(t, r, h)
	wantCalls(t, s, x8664(sysGetuid, sysExitGroup))
	if s.RootCgroup != cg.id || again.id == cg.id {
		t.Errorf("root cgroup %d; the first was %d, the second %d", s.RootCgroup, cg.id, again.id)
	}
}

// What bpftool lists is plainly ours: programs, and every map that they use.
func TestKernelNames(t *testing.T) {
	dir := pinDir(t)
	open(t, dir, bpf.Options{})
	names := make(map[string]bool)
	for name, p := range pinnedPrograms(t, dir) {
		defer p.Close()
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Name != name {
			t.Errorf("program %s is %q to the kernel", name, info.Name)
		}
		ids, ok := info.MapIDs()
		if !ok {
			t.Fatal("the kernel doesn't tell a program's maps")
		}
		for _, id := range ids {
			m, err := ebpf.NewMapFromID(id)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			info, err := m.Info()
			if err != nil {
				t.Fatal(err)
			}
			names[info.Name] = true
		}
	}
	if len(names) != 8 {
		t.Errorf("%d names of maps, want 8 different ones: %v", len(names), names)
	}
	for name := range names {
		if !strings.HasPrefix(name, "syslatch_") {
			t.Errorf("map %q doesn't say whose it is", name)
		}
	}
}

// pinnedPrograms opens them, for the caller to close.
func pinnedPrograms(t *testing.T, dir string) map[string]*ebpf.Program {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(dir, "layout-*", "syslatch_*"))
	if err != nil || len(pins) != 5 {
		t.Fatalf("pinned programs: %v, %v", pins, err)
	}
	all := make(map[string]*ebpf.Program)
	for _, pin := range pins {
		p, err := ebpf.LoadPinnedProgram(pin, nil)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(pin)] = p
	}
	return all
}

// attachedLinks counts the kernel's links of the pinned programs.
func attachedLinks(t *testing.T, dir string) int {
	t.Helper()
	ids := make(map[ebpf.ProgramID]bool)
	for _, p := range pinnedPrograms(t, dir) {
		defer p.Close()
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		ids[id] = true
	}
	for {
		n, err := countLinks(ids)
		if err == nil {
			return n
		}
		// Somebody else's link that is just being made (bpf_link_by_id).
		if !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
	}
}

// countLinks counts the host's links that are of the given programs.
func countLinks(programs map[ebpf.ProgramID]bool) (n int, err error) {
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		info, err := it.Link.Info()
		if err != nil {
			return 0, err
		}
		if programs[info.Program] {
			n++
		}
	}
	return n, it.Err()
}

func TestAttachedOnlyWhileTracking(t *testing.T) {
	dir := pinDir(t)
	r, other := open(t, dir, bpf.Options{}), open(t, dir, bpf.Options{})
	attached := func(want bool) {
		t.Helper()
		n := 0
		if want {
			n = 5
		}
		// The kernel frees a link after its pin's removal has returned.
		if !poll(func() bool { return attachedLinks(t, dir) == n }) {
			t.Errorf("%d links, want %d", attachedLinks(t, dir), n)
		}
		for _, r := range []*bpf.Recorder{r, other} {
			if st, err := r.Stats(); err != nil || st.Attached != want {
				t.Errorf("attached: %v (%v), want %v", st.Attached, err, want)
			}
		}
	}
	attached(false)
	h1 := track(t, r, newCgroup(t), bpf.TrackOptions{})
	attached(true)
	h2 := track(t, other, newCgroup(t), bpf.TrackOptions{})
	finish(t, r, h1)
	attached(true)
	finish(t, other, h2)
	attached(false)
	h3 := track(t, r, newCgroup(t), bpf.TrackOptions{})
	attached(true)
	finish(t, r, h3)
	attached(false)
}

func TestManyProcessesTrack(t *testing.T) {
	dir := pinDir(t)
	const processes, each = 8, 5
	var recs []*process
	want := make(map[uint64]bool)
	for range processes {
		var ids []uint64
		for range each {
			cg := newCgroup(t)
			ids = append(ids, cg.id)
			want[cg.id] = true
		}
		recs = append(recs, start(t, nil, "recorder", recorderArg{Dir: dir, Cgroups: ids, Gate: bpf.GateOpen}))
	}
	slots := make(map[uint32]bool)
	for _, p := range recs {
		var handles []bpf.Handle
		p.line(&handles)
		for _, h := range handles {
			slots[h.Slot] = true
		}
	}
	r := open(t, dir, bpf.Options{})
	all, err := r.Instances()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		delete(want, i.RootCgroup)
	}
	if len(slots) != processes*each || len(all) != processes*each || len(want) != 0 {
		t.Errorf("%d slots, %d instances, %d cgroups missing; want %d", len(slots), len(all), len(want), processes*each)
	}
	for _, p := range recs {
		p.release()
	}
	for _, p := range recs {
		p.wait()
	}
	if !poll(func() bool { return attachedLinks(t, dir) == 0 }) {
		t.Errorf("%d links left", attachedLinks(t, dir))
	}
}

func TestThreadsFirstSeenOnce(t *testing.T) {
	dir := pinDir(t)
	r, cg := open(t, dir, bpf.Options{}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	calls := steps(filter, pause())
	for i := range uint64(300) {
		calls = append(calls, call(700+i), call(16, ^uint64(0), i%30))
	}
	p := start(t, &cg, "caller", script{Threads: 8, Calls: calls})
	for range 8 {
		p.waits()
	}
	for range 8 {
		p.release()
	}
	p.wait()
	s := finish(t, r, h)
	got := numbers(s, 0, bpf.ABIX8664)
	for i := range uint16(300) {
		if !slices.Contains(got, 700+i) {
			t.Errorf("call %d is missing", 700+i)
		}
	}
	events := collect(t, r, func(all []bpf.Event) bool { return len(all) == len(got) })
	seen := make(map[uint32]bool)
	for _, e := range events {
		if seen[e.Number] {
			t.Errorf("call %d was reported twice", e.Number)
		}
		seen[e.Number] = true
		if !slices.Contains(got, uint16(e.Number)) {
			t.Errorf("call %d was reported, not recorded", e.Number)
		}
	}
	i := slices.IndexFunc(s.Args, func(a bpf.ArgSet) bool { return a.Number == 16 })
	if i < 0 || len(s.Args[i].Values) < 30 || s.Args[i].Any {
		t.Errorf("ioctl commands: %+v, want 30 values", s.Args)
	}
	// A program that the kernel takes to be running on the processor already is
	// passed over, and that would be a call unseen.
	for name, p := range pinnedPrograms(t, dir) {
		defer p.Close()
		stats, err := p.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if stats.RecursionMisses != 0 {
			t.Errorf("%s was passed over %d times", name, stats.RecursionMisses)
		}
	}
}

// Finish and Track by many at once, with tasks that never stop calling.
func TestChurn(t *testing.T) {
	r, cg := open(t, pinDir(t), bpf.Options{Instances: 8}), newCgroup(t)
	busy := call(sysGetuid)
	busy.Times = 1 << 40
	p := start(t, &cg, "caller", script{Threads: 2, Calls: steps(filter, pause(), busy)})
	p.waits()
	p.waits()
	p.release()
	p.release()
	for range 10 {
		h := track(t, r, cg, filterGate(t))
		if !poll(func() bool {
			s, err := r.Snapshot(h)
			return err == nil && slices.Contains(numbers(s, 0, bpf.ABIX8664), sysGetuid)
		}) {
			t.Fatal("busy tasks are not recorded")
		}
		// Taken by another in between, the slot must not show these tasks' calls.
		var wg sync.WaitGroup
		wg.Go(func() {
			s, err := r.Untrack(h)
			if err != nil {
				t.Error(err)
				return
			}
			// In the first round a thread may still enter the read of its pause.
			got := slices.DeleteFunc(numbers(s, 0, bpf.ABIX8664), func(n uint16) bool { return n == sysRead })
			if !slices.Equal(got, []uint16{sysGetuid}) {
				t.Errorf("recorded %v, want getuid", got)
			}
		})
		other, opts := newCgroup(t), filterGate(t)
		wg.Go(func() {
			h, err := r.Track(other.id, opts)
			if err != nil {
				t.Error(err)
				return
			}
			s, err := r.Untrack(h)
			if err != nil {
				t.Error(err)
				return
			}
			wantCalls(t, s)
		})
		wg.Wait()
	}
	p.kill()
}

func TestCrashesAreUndone(t *testing.T) {
	dir := pinDir(t)
	r, cg, other := open(t, dir, bpf.Options{}), newCgroup(t), newCgroup(t)
	if err := r.CrashInTrack(cg.id); err != nil {
		t.Fatal(err)
	}
	cg.child(t, "joined")
	h := track(t, r, other, bpf.TrackOptions{Gate: bpf.GateOpen})
	other.child(t, "joined")
	start(t, &other, "caller", script{Calls: steps(call(sysGetuid), exit)}).wait()
	if err := r.CrashInFinish(h); err != nil {
		t.Fatal(err)
	}
	if n := attachedLinks(t, dir); n != 5 {
		t.Fatalf("%d links before the restart, want 5", n)
	}

	again := open(t, dir, bpf.Options{})
	all, err := again.Instances()
	if err != nil || len(all) != 1 || all[0].Handle != h || !all[0].Finished || all[0].Cgroups != 0 {
		t.Errorf("instances: %+v, %v", all, err)
	}
	st, err := again.Stats()
	if err != nil || st.Cgroups != 0 || st.Attached {
		t.Errorf("stats: %+v, %v", st, err)
	}
	if got := numbers(finish(t, again, h), 0, bpf.ABIX8664); !slices.Contains(got, sysGetuid) {
		t.Errorf("recorded %v, want getuid", got)
	}
	for _, cg := range []cgroup{cg, other} {
		finish(t, again, track(t, again, cg, bpf.TrackOptions{}))
	}
}

func TestNoPin(t *testing.T) {
	r, cg := open(t, "", bpf.Options{NoPin: true, Instances: 1}), newCgroup(t)
	h := track(t, r, cg, filterGate(t))
	if _, err := r.Track(cg.id, bpf.TrackOptions{}); !errors.Is(err, bpf.ErrTracked) {
		t.Errorf("tracked twice: %v", err)
	}
	if _, err := r.Track(newCgroup(t).id, bpf.TrackOptions{}); !errors.Is(err, bpf.ErrFull) {
		t.Errorf("second of one: %v", err)
	}
	start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetuid), exit)}).wait()
	collect(t, r, func(all []bpf.Event) bool { return len(all) == 2 })
	wantCalls(t, finish(t, r, h), x8664(sysGetuid, sysExitGroup))
	st, err := r.Stats()
	if err != nil || st.Attached {
		t.Errorf("stats: %+v, %v", st, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Instances(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after close: %v", err)
	}
}

// A kernel without emulated vsyscalls has no such tracepoint.
func TestKernelLacksVsyscalls(t *testing.T) {
	defer bpf.LackVsyscalls()()
	for name, open := range map[string]func() *bpf.Recorder{
		"private": func() *bpf.Recorder { return open(t, "", bpf.Options{NoPin: true}) },
		"pinned":  func() *bpf.Recorder { return open(t, pinDir(t), bpf.Options{}) },
	} {
		r, cg := open(), newCgroup(t)
		h := track(t, r, cg, filterGate(t))
		start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetuid), exit)}).wait()
		if s := finish(t, r, h); len(s.Calls) != 1 {
			t.Errorf("%s: recorded %+v", name, s.Calls)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	needRoot(t)
	if _, err := bpf.Open(t.TempDir()+"/x", bpf.Options{}); !errors.Is(err, bpf.ErrUnsupported) || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("no bpffs: %v", err)
	}
	for _, o := range []bpf.Options{{Instances: -1}, {Cgroups: -1}, {RingBytes: 5000}} {
		if _, err := bpf.Open(pinDir(t), o); err == nil {
			t.Errorf("options %+v were taken", o)
		}
	}
	dir := pinDir(t)
	if err := os.MkdirAll(filepath.Join(dir, "layout-999"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := bpf.Open(dir, bpf.Options{}); !errors.Is(err, bpf.ErrLayout) || !strings.Contains(err.Error(), "rm -r "+dir) {
		t.Errorf("other layout: %v", err)
	}
	if err := bpf.Remove(dir); err != nil {
		t.Fatal(err)
	}
	// A crash in the middle of making the pins.
	if err := os.MkdirAll(filepath.Join(dir, "new", "links"), 0o700); err != nil {
		t.Fatal(err)
	}
	r := open(t, dir, bpf.Options{})
	if err := bpf.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Track(1, bpf.TrackOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("tracked without pins: %v", err)
	}
	for _, o := range []bpf.TrackOptions{{Phase: 8}, {Gate: 3}, {BaseFilters: -1}} {
		if _, err := r.Track(1, o); err == nil {
			t.Errorf("options %+v were taken", o)
		}
	}
}

func TestProbe(t *testing.T) {
	needRoot(t)
	ok := make(map[string]bool)
	for _, f := range bpf.Probe(cgroupRoot) {
		t.Logf("%s: %v %v", f.Name, f.OK, f.Err)
		ok[f.Name] = f.OK
		if f.OK != (f.Err == nil) {
			t.Errorf("%s: OK is %v, error %v", f.Name, f.OK, f.Err)
		}
	}
	for _, name := range []string{"btf", "ringbuf", "tp_btf", "raw_tp", "cgroup/connect4"} {
		if !ok[name] {
			t.Errorf("%s doesn't work, and recording needs a kernel where it does", name)
		}
	}
}
