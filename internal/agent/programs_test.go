// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// reached are phases of which a program of cgroups tells one from the other, as the
// kernel of each test machine has it.
const reached = `
- name: all
  match: {}
  mode: enforce
  workload: w
  phases: {initial: a, gaps: report, a: {allow: ["@network"], network: ["10.0.0.0/8"]}, b: {allow: ["@network"]}}
`

// programWorld is a daemon with the real programs, and containers that are processes in
// cgroups.
type programWorld struct {
	t      *testing.T
	policy *policy.File
	log    *logtest.Hook
	a      *Agent
}

func newProgramWorld(t *testing.T) *programWorld {
	t.Helper()
	pins, dir := bpffs(t), t.TempDir()
	p, err := policy.Parse("policy.yaml", fmt.Appendf(nil, "apiVersion: syslatch.dev/v1\nstore: %s/store\nstateDir: %s/state\nbpffs: %s\npolicies:%s", dir, dir, pins, reached),
		policy.Options{KnownCall: seccomp.Known, Phases: true})
	if err != nil {
		t.Fatal(err)
	}
	w := &programWorld{t: t, policy: p, log: &logtest.Hook{}}
	w.restart()
	t.Cleanup(w.close)
	return w
}

func (w *programWorld) close() {
	w.t.Helper()
	if err := w.a.Close(); err != nil {
		w.t.Error(err)
	}
}

func (w *programWorld) restart() {
	w.t.Helper()
	if w.a != nil {
		w.close()
	}
	w.a = open(w.t, w.policy, w.log)
}

// start makes a container of a process, and gives what ends that.
func (w *programWorld) start(id string) (stop func(), err error) {
	w.t.Helper()
	g := newGroup(w.t)
	if _, err := w.a.Plan(w.t.Context(), policy.Container{ID: id, Name: id, Image: "app:1", CgroupsPath: g.Path()}, adjust.Runtime{Engine: "test", PID: os.Getpid()}); err != nil {
		w.t.Fatal(err)
	}
	pid, stop := occupy(w.t, g)
	return stop, w.a.Starting(w.t.Context(), id, pid)
}

// inForce lists what the kernel has.
func (w *programWorld) inForce() []bpf.Enforced {
	w.t.Helper()
	all, err := w.a.phases.programs.enforcer.Instances()
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

// status is an instance's, when it has been judged again.
func (w *programWorld) status(id string) phase.Status {
	w.t.Helper()
	deadline, tick := time.After(time.Minute), time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		st, err := w.a.Phases().Get(id)
		if err != nil {
			w.t.Fatal(err)
		}
		if st.State != phase.Switching {
			return st
		}
		select {
		case <-tick.C:
		case <-deadline:
			w.t.Fatalf("%+v", st)
		}
	}
}

// The programs are told each phase, keep it while nobody runs, and follow the journal
// where a kill came between the two.
func TestProgramsFollowThePhase(t *testing.T) {
	w := newProgramWorld(t)
	if !w.a.phases.host.CgroupConnect {
		t.Fatalf("this kernel has no programs of cgroups: %v", w.a.phases.programs.enforcer.Missing())
	}
	stop, err := w.start("c1")
	if err != nil {
		t.Fatal(err)
	}
	is := func(number uint8, name string) {
		t.Helper()
		if all := w.inForce(); len(all) != 1 || all[0].Phase != number || all[0].Tag == 0 {
			t.Errorf("in force: %+v, want phase %d", all, number)
		}
		if st := w.status("c1"); st.Phase != name || st.State != phase.Holds {
			t.Errorf("%+v, want %s", st, name)
		}
	}
	is(0, "a")
	if _, err := w.a.Phases().Set(t.Context(), "c1", "b", phase.SetOptions{}); err != nil {
		t.Fatal(err)
	}
	is(1, "b")
	w.restart()
	is(1, "b")
	w.close()
	now, err := w.a.journal.phase("c1")
	if err != nil {
		t.Fatal(err)
	}
	now.Phase = "a"
	if err := w.a.journal.savePhase("c1", now); err != nil {
		t.Fatal(err)
	}
	w.restart()
	is(0, "a")

	stop()
	if err := w.a.endNow(t.Context(), w.a.instance("c1")); err != nil {
		t.Fatal(err)
	}
	if all := w.inForce(); len(all) != 0 {
		t.Errorf("left: %+v", all)
	}
}

// oneExecve is a chain that calls execve once; its answer arrives never.
type oneExecve struct{ goesOn chan bool }

func (l oneExecve) Serve(ctx context.Context, decide func(*seccomp.Notification) (bool, uint)) error {
	nr, _ := seccomp.Number(specs.ArchX86_64, "execve")
	goOn, _ := decide(&seccomp.Notification{ABI: specs.ArchX86_64, Number: nr})
	l.goesOn <- goOn
	<-ctx.Done()
	return ctx.Err()
}

func (oneExecve) Close() error { return nil }

// The journal has that the start is over before the execve goes on. A daemon that is
// killed in between leaves a container that is past it.
func TestBeganIsKeptFirst(t *testing.T) {
	w := newProgramWorld(t)
	if _, err := w.start("c1"); err != nil {
		t.Fatal(err)
	}
	in := w.a.instance("c1")
	execve := func() bool {
		t.Helper()
		l := oneExecve{make(chan bool, 1)}
		in.supervised.Serve(l)
		return <-l.goesOn
	}
	began := func() bool {
		t.Helper()
		now, err := w.a.journal.phase("c1")
		if err != nil {
			t.Fatal(err)
		}
		return now.Began
	}
	inTheWay := w.a.journal.path("c1", phaseSuffix+newSuffix)
	if err := os.Mkdir(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	if execve() || began() || in.executed() {
		t.Error("executed, and the journal doesn't have it")
	}
	if err := os.Remove(inTheWay); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if !execve() || !began() {
		t.Error("the execve is not kept before its answer")
	}
	w.restart()
	if st := w.status("c1"); w.a.instance("c1").Ran || st.State != phase.Degraded || !strings.Contains(strings.Join(st.Uncovered, "\n"), "what held the container's listeners") {
		t.Errorf("without what held its listener: %+v", st)
	}
}

// Without the programs' part a container doesn't start; one that loses it is degraded.
func TestProgramsAreMissed(t *testing.T) {
	w := newProgramWorld(t)
	lost := func(id, why string) {
		t.Helper()
		if st := w.status(id); st.State != phase.Degraded || !strings.Contains(strings.Join(st.Uncovered, "\n"), "BPF programs") || !strings.Contains(strings.Join(st.Uncovered, "\n"), why) {
			t.Errorf("%+v, want degraded by %q", st, why)
		}
	}
	if _, err := w.start("c1"); err != nil {
		t.Fatal(err)
	}
	if err := bpf.RemoveEnforcer(programPins(w.policy)); err != nil {
		t.Fatal(err)
	}
	w.a.phases.programs.count(w.a.instance("c1"))
	lost("c1", "pins are gone")
	if _, err := w.start("c2"); err == nil || !strings.Contains(err.Error(), "when it is restarted") {
		t.Errorf("started without: %v", err)
	}
	w.restart()
	lost("c1", "the kernel has no record of it")
	if _, err := w.start("c3"); err != nil {
		t.Errorf("with new pins: %v", err)
	}
	// What was never told is not executed.
	ready := w.a.phases.programs.ready
	if c2, c3 := w.a.instance("c2"), w.a.instance("c3"); c2 == nil || ready(c2) == nil || ready(c3) != nil {
		t.Errorf("ready: c2 %v, c3 %v", c2, ready(c3))
	}
	// Nor does a later process find it.
	plan := w.a.instance("c3").guard.plan
	for _, tc := range []struct {
		ran, began, lost bool
	}{{false, false, false}, {true, false, true}, {false, true, true}} {
		if err := w.a.phases.programs.find(&instance{Ran: tc.ran}, plan, &phaseNow{Began: tc.began}); (err != nil) != tc.lost {
			t.Errorf("%+v: %v", tc, err)
		}
	}
	// What runs goes on where there are none at all.
	w.close()
	w.policy.BPFFS = t.TempDir() + "/syslatch"
	w.restart()
	lost("c3", "not on a bpffs")
	if w.a.phases.host.LSM || w.a.phases.host.CgroupConnect {
		t.Errorf("host: %+v", w.a.phases.host)
	}
	w.policy.BPFFS = filepath.Dir(w.policy.BPFFS)
}

// A runtime may go on where a start was refused, and say that the program runs before it
// does: it is not executed, and what it lacks is told.
func TestProgramsOfARefusedStart(t *testing.T) {
	w := newProgramWorld(t)
	score := 500
	w.policy.Policies[0].Phases.Phases[0].Limits.OOMScoreAdj = &score
	g := newGroup(t)
	if _, err := w.a.Plan(t.Context(), policy.Container{ID: "c1", Name: "c1", Image: "app:1", CgroupsPath: g.Path()}, adjust.Runtime{Engine: "test", PID: os.Getpid()}); err != nil {
		t.Fatal(err)
	}
	in := w.a.instance("c1")
	pid, _ := occupy(t, g)
	inTheWay := w.a.journal.path("c1", instanceSuffix+newSuffix) // which is not removed, as it is full
	lacks := func(start func() error) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(inTheWay, "full"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := start(); err == nil || !strings.Contains(err.Error(), "is a directory") {
			t.Errorf("%v", err)
		}
		if st := w.status("c1"); st.State != phase.Degraded || len(st.Uncovered) < 2 ||
			!strings.HasPrefix(st.Uncovered[len(st.Uncovered)-2], "limits: ") || !strings.HasPrefix(st.Uncovered[len(st.Uncovered)-1], "what BPF programs deny") {
			t.Errorf("%+v", st)
		}
		if w.a.phases.programs.ready(in) == nil {
			t.Error("executed without its programs")
		}
		if err := os.RemoveAll(inTheWay); err != nil {
			t.Fatal(err)
		}
	}
	lacks(func() error { return w.a.Starting(t.Context(), "c1", pid) })
	events := w.a.Phases().Watch(t.Context())
	in.supervised.Unhooked(nil)
	lacks(func() error { return w.a.started(in, pid) })
	select {
	case e := <-events:
		if e.Kind != phase.Lost || e.Instance != "c1" {
			t.Errorf("%+v", e)
		}
	default:
		t.Error("no event tells of it")
	}
	if err := w.a.started(in, pid); err != nil {
		t.Fatal(err)
	}
	if st := w.status("c1"); st.State != phase.Holds || w.a.phases.programs.ready(in) != nil {
		t.Errorf("%+v", st)
	}
	if got, err := w.a.host.Read(pid, adjust.Expectation{Source: adjust.SourceProc, File: "oom_score_adj"}); err != nil || got != "500" {
		t.Errorf("oom_score_adj is %s, %v", got, err)
	}
}

// One that is attached to late may have made cgroups of its own.
func TestProgramsFindWhatIsBelow(t *testing.T) {
	w := newProgramWorld(t)
	g := newGroup(t)
	if _, err := w.a.Plan(t.Context(), policy.Container{ID: "c1", Name: "c1", Image: "app:1", CgroupsPath: g.Path()}, adjust.Runtime{Engine: "test", PID: os.Getpid()}); err != nil {
		t.Fatal(err)
	}
	pid, _ := occupy(t, g)
	below := filepath.Join(g.Path(), "a", "b")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = os.Remove(below), os.Remove(filepath.Dir(below)) })
	in := w.a.instance("c1")
	in.Ran = true
	if err := w.a.Starting(t.Context(), "c1", pid); err != nil {
		t.Fatal(err)
	}
	id, err := cgroup.ID(below)
	if err != nil {
		t.Fatal(err)
	}
	if err := in.guard.enforcer.AddCgroup(in.guard.handle, id); !errors.Is(err, bpf.ErrTracked) {
		t.Errorf("below: %v, want that it is known", err)
	}
}

// What no journal knows is taken off empty cgroups, and left alone otherwise.
func TestProgramsOfNobody(t *testing.T) {
	w := newProgramWorld(t)
	empty, full := newGroup(t), newGroup(t)
	_, stop := occupy(t, full)
	defer stop()
	for _, g := range []*cgroup.Group{empty, full} {
		if _, err := w.a.phases.programs.enforcer.Add(g.ID(), bpf.PhaseSet{0: bpf.AnyPhase()}, bpf.EnforceOptions{Tag: newTag()}); err != nil {
			t.Fatal(err)
		}
	}
	w.restart()
	if all := w.inForce(); len(all) != 1 || all[0].Cgroup != full.ID() {
		t.Errorf("left: %+v, want that of %d", all, full.ID())
	}
	if last := w.log.LastEntry(); last == nil || !strings.Contains(last.Message, "doesn't know") || last.Data["cgroup_id"] != full.ID() {
		t.Errorf("%+v", last)
	}
	// Nor is there anything to do with a policy without phases, but this.
	w.close()
	text := strings.Split(reached, "  phases:")[0]
	p, err := policy.Parse("policy.yaml", fmt.Appendf(nil, "apiVersion: syslatch.dev/v1\nstore: %s\nstateDir: %s\nbpffs: %s\npolicies:%s", w.policy.Store, w.policy.StateDir, w.policy.BPFFS, text), policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	with := w.policy
	w.policy = p
	w.restart()
	if _, err := os.Stat(programPins(p)); err != nil {
		t.Errorf("taken off a container that runs: %v", err)
	}
	stop()
	w.restart()
	if _, err := os.Stat(programPins(p)); err == nil {
		t.Error("pins of nothing are left")
	}
	w.policy = with
	w.restart() // for the end
}
