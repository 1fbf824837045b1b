// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// agentPhases are those of docs/phases.md, in short: reading, writing, connecting.
func agentPhases() *profiles.PhaseSet {
	rule := func(names ...string) []profiles.PhaseRule { return []profiles.PhaseRule{{Names: names}} }
	return &profiles.PhaseSet{Initial: "read_only", Phases: []profiles.Phase{
		{Name: "read_only", Allow: rule("@file-read", "@process")},
		{Name: "write_logs", Allow: rule("@file-read", "@process", "mkdir", "openat")},
		{Name: "network", Allow: rule("@file-read", "@process", "@network"), Next: []string{"read_only", "write_logs"}},
		{Name: "locked", Allow: rule("read"), Irreversible: true},
	}}
}

// barrier is called once for a switch.
type barrier struct {
	do   func(context.Context) error
	weak bool // doesn't have calls made again
}

func (b *barrier) Rejudges() bool { return !b.weak }

func (b *barrier) Barrier(ctx context.Context) error {
	if b.do == nil {
		return nil
	}
	return b.do(ctx)
}

// fakeListener is asked by its test.
type fakeListener struct {
	calls  chan question
	fail   chan error
	closed chan struct{}
}

type question struct {
	n      seccomp.Notification
	late   bool // the call was taken back before the answer
	answer chan<- bool
}

func newFakeListener() *fakeListener {
	return &fakeListener{make(chan question), make(chan error), make(chan struct{})}
}

func (l *fakeListener) Serve(ctx context.Context, decide func(*seccomp.Notification) (bool, uint)) error {
	for {
		select {
		case q := <-l.calls:
			goOn, _ := decide(&q.n)
			if q.n.Accepted != nil && !q.late {
				q.n.Accepted()
			}
			q.answer <- goOn
		case err := <-l.fail:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *fakeListener) Close() error {
	close(l.closed)
	return nil
}

func (l *fakeListener) ask(t *testing.T, name string, late bool, args ...uint64) bool {
	t.Helper()
	nr, ok := seccomp.Number(specs.ArchX86_64, name)
	if !ok {
		t.Fatalf("no call %s", name)
	}
	n := seccomp.Notification{ABI: specs.ArchX86_64, Number: nr, PID: 7}
	copy(n.Args[:], args)
	answer := make(chan bool)
	l.calls <- question{n, late, answer}
	return <-answer
}

type fixture struct {
	*Supervisor
	*Supervised
	barrier barrier
	hooks   []string
	hookErr error
	limits  func(context.Context, string) error
	ratchet func(context.Context, string) error
	enter   func(int, string) error

	mu     sync.Mutex
	events []Event // guarded by mu
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{}
	log := logrus.New()
	log.SetOutput(io.Discard)
	f.Supervisor = NewSupervisor(Options{Log: logrus.NewEntry(log), Events: func(e Event) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.events = append(f.events, e)
	}})
	set := agentPhases()
	plan, err := profiles.CompilePhases(set, profiles.PhaseHost{Notify: true, Inject: true}, profiles.PhaseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f.Supervised, err = f.Add(Instance{
		ID: "i", Policy: "agent", Set: set, Plan: plan, Barrier: &f.barrier,
		Hooks: func(phase string) error {
			if f.hookErr != nil {
				return f.hookErr
			}
			f.hooks = append(f.hooks, phase)
			return nil
		},
		Limits: func(ctx context.Context, phase string) error {
			if f.limits == nil {
				return nil
			}
			return f.limits(ctx, phase)
		},
		Ratchet: func(ctx context.Context, phase string) error {
			if f.ratchet == nil {
				return nil
			}
			return f.ratchet(ctx, phase)
		},
		Enter: func(tid int, phase string) error {
			if f.enter == nil {
				return nil
			}
			return f.enter(tid, phase)
		},
		Uncovered: func(phase string) []string { return []string{"gap of " + phase} },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fixture) kinds() (out []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.events {
		out = append(out, strings.TrimSpace(string(e.Kind)+" "+e.To))
	}
	return out
}

func (f *fixture) to(t *testing.T, phase string, o SetOptions) (Status, error) {
	t.Helper()
	return f.Set(t.Context(), "i", phase, o)
}

func TestSwitch(t *testing.T) {
	f := newFixture(t)
	l := newFakeListener()
	f.Supervised.Serve(l)
	const write = unix.O_WRONLY
	if !l.ask(t, "execve", false) {
		t.Fatal("execve at the start was denied")
	}
	if l.ask(t, "mkdir", false) || l.ask(t, "openat", false, 0, 0, write) || l.ask(t, "connect", false) {
		t.Error("read_only lets something pass")
	}
	st, err := f.to(t, "write_logs", SetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := Status{
		ID: "i", Policy: "agent", Phase: "write_logs", Generation: 2, State: Holds, Since: st.Since,
		Next: []string{"read_only", "network", "locked"}, Uncovered: []string{"gap of write_logs"}, Denied: 3,
	}
	if diff := cmp.Diff(want, st); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	f.in.Barrier.(*barrier).weak = true
	if st := f.Status(); !slices.Equal(st.Uncovered, []string{notRejudged, "gap of write_logs"}) {
		t.Errorf("where calls are not made again: %q", st.Uncovered)
	}
	if !l.ask(t, "mkdir", false) || !l.ask(t, "openat", false, 0, 0, write) || l.ask(t, "connect", false) {
		t.Error("write_logs is not in force")
	}
	if _, err := f.to(t, "network", SetOptions{}); err != nil {
		t.Fatal(err)
	}
	if l.ask(t, "mkdir", false) || !l.ask(t, "connect", false) {
		t.Error("network is not in force")
	}
	if again, err := f.to(t, "network", SetOptions{}); err != nil || again.Generation != 3 {
		t.Errorf("the same phase again: generation %d, %v", again.Generation, err)
	}
	if diff := cmp.Diff([]string{"read_only", "write_logs", "network"}, f.hooks); diff != "" {
		t.Errorf("hooks (-want +got):\n%s", diff)
	}
	f.End("i")
	<-l.closed
	if _, err := f.Get("i"); !errors.Is(err, ErrUnknown) {
		t.Errorf("after the end: %v", err)
	}
	if got := f.kinds(); got[0] != "begun read_only" || !slices.Contains(got, "denied") || got[len(got)-1] != "ended" {
		t.Errorf("events: %v", got)
	}
}

// TestStart: what a runtime calls is allowed until the first execve whose answer was
// accepted, in whatever phase.
func TestStart(t *testing.T) {
	f := newFixture(t)
	l := newFakeListener()
	f.Supervised.Serve(l)
	if !l.ask(t, "setuid", false) {
		t.Error("setuid at the start was denied")
	}
	if !l.ask(t, "execve", true) || !l.ask(t, "setuid", false) {
		t.Error("the start ended with an execve that was taken back")
	}
	if !l.ask(t, "execve", false) || l.ask(t, "setuid", false) {
		t.Error("the start goes on behind the execve")
	}
	exec := newFakeListener() // a second chain, of an exec
	f.Supervised.Serve(exec)
	if !exec.ask(t, "setuid", false) || l.ask(t, "setuid", false) {
		t.Error("each chain has a start of its own")
	}
}

// Nothing is executed before what enforces is there.
func TestReady(t *testing.T) {
	f := newFixture(t)
	l := newFakeListener()
	missing := errors.New("no programs")
	f.in.Ready = func() error { return missing }
	f.Supervised.Serve(l)
	if l.ask(t, "execve", false) || !l.ask(t, "setuid", false) {
		t.Error("executed before it is ready, or the start has ended by that")
	}
	missing = nil
	if !l.ask(t, "execve", false) || l.ask(t, "setuid", false) {
		t.Error("not executed")
	}
}

// A later process knows of an execve before it goes on: one that can't be kept doesn't.
func TestBegan(t *testing.T) {
	f := newFixture(t)
	l := newFakeListener()
	var asked int
	full := errors.New("disk full")
	f.in.Began = func() error { asked++; return full }
	f.enter = func(int, string) error { t.Error("traced, and is not executed"); return nil }
	if _, err := f.to(t, "locked", SetOptions{}); err != nil {
		t.Fatal(err)
	}
	f.Supervised.Serve(l)
	if l.ask(t, "execve", false) || !l.ask(t, "setuid", false) || asked != 1 {
		t.Errorf("executed, and not kept, or the start has ended by that; asked %d times", asked)
	}
	full, f.enter = nil, nil
	// It is kept before the answer, so also of one that is taken back.
	if !l.ask(t, "execve", true) || asked != 2 || !l.ask(t, "execve", false) || l.ask(t, "setuid", false) {
		t.Errorf("asked %d times", asked)
	}
}

// What the kernel's programs deny counts, and that they are gone is said, once.
func TestPrograms(t *testing.T) {
	f := newFixture(t)
	f.Denied("read_only", "lsm/file_open", 3)
	if st := f.Status(); st.Denied != 3 || st.State != Holds {
		t.Errorf("%+v", st)
	}
	f.mu.Lock()
	if e := f.events[len(f.events)-1]; e.Kind != Denied || e.From != "read_only" || e.Call != "lsm/file_open" || e.Count != 3 || e.PID != 0 {
		t.Errorf("%+v", e)
	}
	f.mu.Unlock()
	for range 2 {
		f.Unhooked(errors.New("no pins"))
	}
	want := []string{"gap of read_only", "what BPF programs deny in a phase may not be denied: no pins"}
	if st := f.Status(); st.State != Degraded || !slices.Equal(st.Uncovered, want) {
		t.Errorf("%+v", st)
	}
	if st, err := f.to(t, "network", SetOptions{}); err != nil || st.State != Degraded {
		t.Errorf("a switch mends it: %+v, %v", st, err)
	}
	f.Unhooked(nil)
	if st := f.Status(); st.State != Holds {
		t.Errorf("%+v", st)
	}
	if got := f.kinds(); !slices.Equal(got, []string{"begun read_only", "denied", "lost", "switched network"}) {
		t.Errorf("events: %v", got)
	}
}

func TestRefused(t *testing.T) {
	f := newFixture(t)
	for _, tc := range []struct {
		to   string
		o    SetOptions
		want any
		text string
	}{
		{"nowhere", SetOptions{}, new(*TransitionError), "unknown phase (possible from here: write_logs, network, locked)"},
		{"", SetOptions{}, new(*TransitionError), "unknown phase"},
		{"start", SetOptions{}, new(*TransitionError), "unknown phase"},
		{"write_logs", SetOptions{Origin: Inside}, new(*TransitionError), "allows nothing more"},
		{"write_logs", SetOptions{Origin: "?"}, new(*TransitionError), "allows nothing more"},
		{"write_logs", SetOptions{Generation: 9}, new(*GenerationError), "generation is 1, not 9"},
	} {
		st, err := f.to(t, tc.to, tc.o)
		if err == nil || !errors.As(err, tc.want) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%q %+v: %v, want %q", tc.to, tc.o, err, tc.text)
		}
		if st.Phase != "read_only" || st.Generation != 1 || f.now.Load().Phase != "read_only" {
			t.Errorf("%q: something has changed: %+v", tc.to, st)
		}
	}
	if got := f.kinds(); len(got) != 7 || got[6] != "refused write_logs" {
		t.Errorf("events: %v", got)
	}
	f.hookErr = errors.New("no such map")
	if st, err := f.to(t, "network", SetOptions{}); err == nil || st.Phase != "read_only" || f.now.Load().Phase != "read_only" {
		t.Errorf("hooks failed: %+v, %v", st, err)
	}
	f.hookErr = nil
	f.in.Loosens = func(_ context.Context, to string) error { return errors.New("pids.max of " + to) }
	var refused *TransitionError
	if _, err := f.to(t, "locked", SetOptions{Origin: Inside}); !errors.As(err, &refused) || !strings.Contains(err.Error(), "no limit can be loosened: pids.max of locked") {
		t.Errorf("with looser limits, from inside: %v", err)
	}
	f.in.Loosens = nil
	if _, err := f.to(t, "locked", SetOptions{Origin: Inside, Generation: 1}); err != nil {
		t.Errorf("tighter from inside: %v", err)
	}
	if st, err := f.to(t, "read_only", SetOptions{}); err == nil || st.Phase != "locked" {
		t.Errorf("left what is irreversible: %+v", st)
	}
	if _, err := f.Set(t.Context(), "j", "locked", SetOptions{}); !errors.Is(err, ErrUnknown) {
		t.Errorf("another instance: %v", err)
	}
}

// TestRecorded: of an instance that is recorded phases are marks, which follow each other
// as whoever asks likes, from inside as well.
func TestRecorded(t *testing.T) {
	f := newFixture(t)
	in := f.Supervised.in
	in.ID, in.Record, in.Uncovered, in.Limits, in.Ratchet = "r", true, nil, nil, nil
	var stopped, kept int
	in.Barrier = &barrier{do: func(context.Context) error { stopped++; return nil }}
	in.Keep = func(string, uint64) error { kept++; return nil }
	f.hooks = nil
	sv, err := f.Add(in)
	if err != nil {
		t.Fatal(err)
	}
	for i, to := range []struct {
		phase  string
		origin Origin
	}{{"locked", Outside}, {"network", Inside}, {"locked", Inside}, {"read_only", Outside}, {"write_logs", Outside}} {
		st, err := f.Set(t.Context(), "r", to.phase, SetOptions{Origin: to.origin})
		if err != nil || st.Phase != to.phase || st.State != Holds || !st.Recorded || len(st.Next) != 3 || !slices.Equal(st.Uncovered, []string{onlyRecorded}) {
			t.Errorf("%+v, %v", st, err)
		}
		if want := i + 1; stopped != want || kept != want {
			t.Errorf("%s: %d barriers, kept %d times, want %d", to.phase, stopped, kept, want)
		}
	}
	if want := []string{"read_only", "locked", "network", "locked", "read_only", "write_logs"}; !slices.Equal(f.hooks, want) {
		t.Errorf("the recorder was told %v, want %v", f.hooks, want)
	}
	var refused *TransitionError
	if _, err := f.Set(t.Context(), "r", "nowhere", SetOptions{}); !errors.As(err, &refused) || len(refused.Allowed) != 3 {
		t.Errorf("an unknown phase: %v", err)
	}
	f.hookErr = errors.New("the recording has ended")
	if st, err := f.Set(t.Context(), "r", "network", SetOptions{}); err == nil || st.Phase != "write_logs" {
		t.Errorf("the recorder refuses: %+v, %v", st, err)
	}
	f.hookErr = nil
	sv.in.Barrier = &barrier{do: func(context.Context) error { return errors.New("out of order") }}
	if st, err := f.Set(t.Context(), "r", "network", SetOptions{}); err == nil || st.State != Degraded || st.Uncovered[1] != atRecord+": out of order" {
		t.Errorf("without a barrier: %+v, %v", st, err)
	}
}

// TestIncomplete: what fails behind the table leaves the new phase in force for new
// calls and says what may not hold; asking again does the rest.
func TestIncomplete(t *testing.T) {
	for _, tc := range []struct {
		name, to, what string
		broken         func(*fixture, error)
	}{
		{"barrier", "network", atBarrier, func(f *fixture, err error) { f.barrier.do = func(context.Context) error { return err } }},
		{"limits", "network", atLimits, func(f *fixture, err error) { f.limits = func(context.Context, string) error { return err } }},
		{"ratchet", "locked", atRatchet, func(f *fixture, err error) { f.ratchet = func(context.Context, string) error { return err } }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t)
			l := newFakeListener()
			f.Supervised.Serve(l)
			if !l.ask(t, "execve", false) {
				t.Fatal("nothing begins")
			}
			tc.broken(f, errors.New("out of order"))
			st, err := f.to(t, tc.to, SetOptions{})
			var incomplete *IncompleteError
			if !errors.As(err, &incomplete) || !strings.Contains(err.Error(), "out of order") {
				t.Fatalf("%v", err)
			}
			if st.Phase != tc.to || st.State != Degraded || !slices.Contains(st.Uncovered, tc.what+": out of order") {
				t.Errorf("%+v", st)
			}
			if got, _ := f.Get("i"); !cmp.Equal(got, st) || f.now.Load().Phase != tc.to {
				t.Errorf("%+v", got)
			}
			tc.broken(f, nil)
			st, err = f.to(t, tc.to, SetOptions{})
			if err != nil || st.State != Holds || st.Generation != 2 || len(st.Uncovered) != 1 {
				t.Errorf("again: %+v, %v", st, err)
			}
			if got := f.kinds(); !slices.Equal(got, []string{"begun read_only", "failed " + tc.to, "switched " + tc.to}) {
				t.Errorf("events: %v", got)
			}
		})
	}
}

// TestRatchet: before the first execve there is only a runtime, which has a lot to do; from
// then on a ratchet is put on all, and on what a runtime executes later before it runs.
func TestRatchet(t *testing.T) {
	f := newFixture(t)
	var put, entered []string
	f.ratchet = func(_ context.Context, phase string) error { put = append(put, phase); return nil }
	var refuse error
	f.enter = func(tid int, phase string) error {
		entered = append(entered, fmt.Sprint(phase, " ", tid))
		return refuse
	}
	first := newFakeListener()
	f.Supervised.Serve(first)
	first.ask(t, "capset", false)
	if st, err := f.to(t, "locked", SetOptions{}); err != nil || st.State != Holds || len(put) > 0 {
		t.Fatalf("before the first execve: %+v, %v; on %v", st, err, put)
	}
	if !first.ask(t, "execve", true) || !first.ask(t, "execve", false) || first.ask(t, "execve", false) {
		t.Error("want one execve, that of the start, and no other in this phase")
	}
	if want := []string{"locked 7", "locked 7"}; !slices.Equal(entered, want) {
		t.Errorf("entered %v, want %v", entered, want)
	}
	if err := f.Rejudge(t.Context()); err != nil || !slices.Equal(put, []string{"locked"}) {
		t.Errorf("afterwards: %v; on %v", err, put)
	}
	refuse = errors.New("is being traced")
	later := newFakeListener()
	f.Supervised.Serve(later)
	if later.ask(t, "execve", false) {
		t.Error("an execve went on that can't have the ratchet")
	}
	refuse = nil
	if !later.ask(t, "execve", false) || len(entered) != 4 {
		t.Errorf("the next: entered %v", entered)
	}
}

// TestNoRatchet: in a phase without one nobody enters anything.
func TestNoRatchet(t *testing.T) {
	f := newFixture(t)
	f.enter = func(int, string) error { return errors.New("not asked for") }
	f.ratchet = func(context.Context, string) error { return errors.New("not asked for") }
	l := newFakeListener()
	f.Supervised.Serve(l)
	if !l.ask(t, "execve", false) {
		t.Error("the execve of the start is denied")
	}
	if st, err := f.to(t, "network", SetOptions{}); err != nil || st.State != Holds {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestLimit: an instance that begins gets its phase's limits, which is no switch.
func TestLimit(t *testing.T) {
	f := newFixture(t)
	var set []string
	failed := errors.New("out of order")
	f.limits = func(_ context.Context, name string) error {
		set = append(set, name)
		return failed
	}
	if err := f.Limit(t.Context(), "i"); !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	if st, _ := f.Get("i"); st.State != Degraded || !slices.Contains(st.Uncovered, atLimits+": out of order") {
		t.Errorf("%+v", st)
	}
	failed = nil
	err := f.Limit(t.Context(), "i")
	if st, _ := f.Get("i"); err != nil || st.State != Holds || st.Generation != 1 || !slices.Equal(set, []string{"read_only", "read_only"}) {
		t.Errorf("%+v, %v; set %v", st, err, set)
	}
	f.turn <- struct{}{} // a switch is unfinished
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Limit(ctx, "i"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	<-f.turn
	if err := f.Limit(t.Context(), "j"); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v", err)
	}
	if got := f.kinds(); !slices.Equal(got, []string{"begun read_only"}) {
		t.Errorf("events: %v", got)
	}
}

// TestOneAtATime: a second switch waits for the first, and no longer than its
// deadline.
func TestOneAtATime(t *testing.T) {
	f := newFixture(t)
	begun, release := make(chan bool), make(chan bool)
	f.barrier.do = func(context.Context) error {
		begun <- true
		<-release
		return nil
	}
	first := make(chan error)
	go func() {
		_, err := f.Set(context.Background(), "i", "network", SetOptions{})
		first <- err
	}()
	<-begun
	if st, _ := f.Get("i"); st.State != Switching || st.Phase != "network" {
		t.Errorf("meanwhile: %+v", st)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := f.Set(ctx, "i", "read_only", SetOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second: %v", err)
	}
	release <- true
	if err := <-first; err != nil {
		t.Error(err)
	}
	go func() {
		<-begun
		release <- true
	}()
	if st, err := f.to(t, "read_only", SetOptions{Generation: 2}); err != nil || st.Generation != 3 {
		t.Errorf("after the first: %+v, %v", st, err)
	}
}

func TestListenerLost(t *testing.T) {
	f := newFixture(t)
	l := newFakeListener()
	f.Supervised.Serve(l)
	l.fail <- errors.New("gone")
	<-l.closed
	f.serving.Wait()
	st, err := f.Get("i")
	if err != nil || st.State != Degraded || !slices.Contains(st.Uncovered, atListener+": gone") {
		t.Errorf("%+v, %v", st, err)
	}
	if st, err = f.to(t, "network", SetOptions{}); err != nil || st.State != Degraded || st.Phase != "network" {
		t.Errorf("a switch: %+v, %v", st, err)
	}
	if got := f.kinds(); !slices.Equal(got, []string{"begun read_only", "lost", "switched network"}) {
		t.Errorf("events: %v", got)
	}
	over := newFakeListener()
	f.Supervised.Serve(over)
	over.fail <- nil // the last task of the chain is gone
	<-over.closed
}

func TestDenialsAreAggregated(t *testing.T) {
	f := newFixture(t)
	l := newFakeListener()
	f.Supervised.Serve(l)
	for range 100 {
		l.ask(t, "mkdir", false)
	}
	st, err := f.Get("i")
	if err != nil || st.Denied != 100 {
		t.Errorf("status says %d, %v", st.Denied, err)
	}
	f.End("i")
	f.mu.Lock()
	defer f.mu.Unlock()
	total := uint64(0)
	for _, e := range f.events[1 : len(f.events)-1] {
		if e.Kind != Denied || e.Call != "SCMP_ARCH_X86_64 mkdir" || e.From != "read_only" {
			t.Errorf("%+v", e)
		}
		total += e.Count
	}
	if first := f.events[1]; total != 100 || first.PID != 7 || len(f.events) > 20 {
		t.Errorf("%d denials in %d events, the first %+v", total, len(f.events), first)
	}
}

// TestFiltered: denials that nobody was asked about are told, but for those that programs
// make to try a call; what a task thinks of makes no flood of them, nor takes the place of
// what the supervisor denied.
func TestFiltered(t *testing.T) {
	f := newFixture(t)
	number := func(name string) uint32 {
		n, ok := seccomp.Number(specs.ArchX86_64, name)
		if !ok {
			t.Fatalf("no call %s", name)
		}
		return n
	}
	l := newFakeListener()
	f.Supervised.Serve(l)
	f.Filtered("read_only", specs.ArchX86_64, number("mount"), 7, 2)
	f.Filtered("read_only", specs.ArchX86_64, number("clone3"), 7, 5)
	f.Filtered("write_logs", specs.ArchX32, 4711, 8, 3)
	const many = 10_000
	for n := range uint32(many) {
		f.Filtered("read_only", specs.ArchX86_64, 500+n, 7, 1)
	}
	l.ask(t, "mkdir", false)
	if st, err := f.Get("i"); err != nil || st.Denied != many+6 {
		t.Errorf("status says %d, %v", st.Denied, err)
	}
	f.End("i")
	f.Filtered("read_only", specs.ArchX86_64, number("mount"), 7, 100)
	got := map[string]uint64{}
	total := uint64(0)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.events {
		if e.Kind == Denied {
			got[e.From+" "+e.Call] += e.Count
			total += e.Count
		}
	}
	for call, want := range map[string]uint64{"read_only SCMP_ARCH_X86_64 mount": 2, "write_logs SCMP_ARCH_X32 4711": 3, "read_only SCMP_ARCH_X86_64 mkdir": 1} {
		if got[call] != want {
			t.Errorf("%s: %d, want %d", call, got[call], want)
		}
	}
	if total != many+6 || got["read_only others"] < many/2 || len(f.events) > 1000 || f.events[len(f.events)-1].Kind != Over {
		t.Errorf("%d denials in %d events, others: %d; the last event is %+v", total, len(f.events), got["read_only others"], f.events[len(f.events)-1])
	}
}

// TestFilteredEnds: what is told while an instance ends is told before that, or not at all.
func TestFilteredEnds(t *testing.T) {
	for range 200 {
		f := newFixture(t)
		var tellers sync.WaitGroup
		for n := range uint32(2) {
			tellers.Go(func() {
				for range 100 {
					f.Filtered("read_only", specs.ArchX86_64, 100+n, 7, 1)
				}
			})
		}
		f.End("i")
		tellers.Wait()
		f.mu.Lock()
		if last := f.events[len(f.events)-1]; last.Kind != Over {
			t.Fatalf("the last event is %+v", last)
		}
		f.mu.Unlock()
	}
}

func TestWatch(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	events := f.Watch(ctx)
	if _, err := f.to(t, "network", SetOptions{By: "uid 0 pid 1"}); err != nil {
		t.Fatal(err)
	}
	if e := <-events; e.Kind != Switched || e.From != "read_only" || e.To != "network" || e.Generation != 2 || e.By != "uid 0 pid 1" || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	for range watched + 10 {
		_, _ = f.to(t, "nowhere", SetOptions{})
	}
	for range watched {
		<-events
	}
	_, _ = f.to(t, "nowhere", SetOptions{})
	if e := <-events; e.Kind != Lost || e.Count != 10 {
		t.Errorf("after a pause: %+v", e)
	}
	<-events
	cancel()
	if e, ok := <-events; ok {
		t.Errorf("after the end: %+v", e)
	}
}

// TestResume: an instance that an earlier process supervised doesn't begin again, and its
// phase holds when it has been made to once more: who was killed may have begun a switch.
func TestResume(t *testing.T) {
	f := newFixture(t)
	var put int
	failed := errors.New("out of order")
	resume := func(id string) *Supervised {
		t.Helper()
		in := f.Supervised.in
		in.ID, in.Initial, in.Generation, in.HasBegun = id, "locked", 3, true
		in.Ratchet = func(context.Context, string) error { put++; return failed }
		sv, err := f.Add(in)
		if err != nil {
			t.Fatal(err)
		}
		return sv
	}
	is := func(sv *Supervised, want State) {
		t.Helper()
		if st := sv.Status(); st.Phase != "locked" || st.Generation != 3 || st.State != want {
			t.Errorf("%+v, want that it is %s", st, want)
		}
	}
	sv := resume("k")
	is(sv, Switching)
	if err := sv.Rejudge(t.Context()); !errors.Is(err, failed) || put != 1 {
		t.Errorf("%v; put %d times", err, put)
	}
	is(sv, Degraded)
	failed = nil
	if err := sv.Rejudge(t.Context()); err != nil || put != 2 {
		t.Errorf("%v; put %d times", err, put)
	}
	is(sv, Holds)

	// A switch to the same phase doesn't rely on what comes later.
	sv = resume("l")
	if _, err := f.Set(t.Context(), "l", "locked", SetOptions{}); err != nil || put != 3 {
		t.Errorf("%v; put %d times", err, put)
	}
	is(sv, Holds)

	sv = resume("m")
	sv.Whole() // it has no task
	is(sv, Holds)

	sv = resume("n")
	sv.turn <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := sv.Rejudge(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	<-sv.turn
	is(sv, Degraded)
	if _, err := f.Set(t.Context(), "n", "locked", SetOptions{}); err != nil || put != 4 {
		t.Errorf("%v; put %d times", err, put)
	}
	is(sv, Holds)
	if got := f.kinds()[:2]; !slices.Equal(got, []string{"begun read_only", "resumed locked"}) {
		t.Errorf("events: %v", got)
	}
}

func TestAddRefuses(t *testing.T) {
	f := newFixture(t)
	in := f.Supervised.in
	if _, err := f.Add(in); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("twice: %v", err)
	}
	for _, id := range []string{"", "..", "a/b", "a b", "\x1b[2J"} {
		in.ID = id
		if _, err := f.Add(in); err == nil || !strings.Contains(err.Error(), "an id has") {
			t.Errorf("id %q: %v", id, err)
		}
	}
	in.ID, in.Initial = "k", "start"
	if _, err := f.Add(in); err == nil || !strings.Contains(err.Error(), "unknown phase") {
		t.Errorf("initial: %v", err)
	}
	in.Initial, in.Barrier = "", nil
	if _, err := f.Add(in); err == nil || !strings.Contains(err.Error(), "barrier") {
		t.Errorf("without a barrier: %v", err)
	}
	in.Barrier = &barrier{}
	f.hookErr = errors.New("full")
	if _, err := f.Add(in); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("hooks: %v", err)
	}
	if _, err := f.Get("k"); !errors.Is(err, ErrUnknown) || len(f.List()) != 1 {
		t.Errorf("what was refused is there: %v", err)
	}
}
