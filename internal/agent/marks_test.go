// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

// TestMarksWithTheRecorder: with the real recorder, calls count in the phase that was
// acknowledged before they were made, a call that waits in the kernel at a switch counts
// behind it as well, and an agent that is replaced goes on in the same phase.
func TestMarksWithTheRecorder(t *testing.T) {
	pins, dir := bpffs(t), t.TempDir()
	p, err := policy.Parse("policy.yaml", []byte(fmt.Sprintf(`apiVersion: syslatch.dev/v1
store: %s/store
stateDir: %s/state
bpffs: %s
policies:
- name: all
  match: {}
  mode: record
  failure: deny
  phases: {initial: look, look: {next: [make]}, make: {limits: {pids: {max: 1}}}, idle: {irreversible: true}, cut: {}}
`, dir, dir, pins)), policy.Options{Phases: true})
	if err != nil {
		t.Fatal(err)
	}
	log := &logtest.Hook{}
	a := open(t, p, log)
	defer func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}()
	parent := newGroup(t)
	c := policy.Container{ID: "c1", Name: "app", Image: "docker.io/library/app:1", CgroupsPath: filepath.Join(parent.Path(), filepath.Base(parent.Path())+"-ctr")}
	plan, err := a.Plan(t.Context(), c, adjust.Runtime{Engine: "test", PID: os.Getpid(), Adapter: adjust.AdapterHook})
	if err != nil || !plan.Record || plan.Seccomp.ListenerPath != "" || plan.Seccomp.DefaultAction != specs.ActAllow {
		t.Fatalf("%+v, %v", plan, err)
	}
	if err := os.Mkdir(c.CgroupsPath, 0o755); err != nil {
		t.Fatal(err)
	}
	group, err := os.Open(c.CgroupsPath)
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	goR, goW := pipe(t)
	_, repW := pipe(t)
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	made := filepath.Join(dir, "made")
	cmd := exec.Command("/proc/self/exe", LaunchCommand, "--", "/bin/sh", "sh", "-c", "echo; while read cmd; do $cmd "+made+"; echo; done")
	cmd.ExtraFiles = []*os.File{goR, repW}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = inR, outW, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	goR.Close()
	repW.Close()
	outW.Close()
	answers := bufio.NewScanner(outR)
	works := func() {
		t.Helper()
		if !answers.Scan() {
			t.Fatalf("the container has ended: %v", answers.Err())
		}
	}
	does := func(command string) {
		t.Helper()
		if _, err := fmt.Fprintln(inW, command); err != nil {
			t.Fatal(err)
		}
		works()
	}
	switches := func(to string, generation uint64) {
		t.Helper()
		st, err := a.Phases().Set(t.Context(), c.ID, to, phase.SetOptions{})
		if err != nil || st.Phase != to || st.State != phase.Holds || st.Generation != generation || !st.Recorded || len(st.Next) != 3 {
			t.Fatalf("%+v, %v", st, err)
		}
	}
	if err := a.Starting(t.Context(), c.ID, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := json.NewEncoder(goW).Encode(launchOrder{Filter: seccomp.AllowAllFilter()}); err != nil {
		t.Fatal(err)
	}
	works()
	switches("make", 2)
	does("mkdir")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = open(t, p, log)
	if st, err := a.Phases().Get(c.ID); err != nil || st.Phase != "make" || st.Generation != 2 || !st.Recorded {
		t.Fatalf("after a restart: %+v, %v", st, err)
	}
	does("touch -c")
	switches("look", 3)
	does("ls")
	until := func(what string, is func() bool) {
		t.Helper()
		deadline, tick := time.After(time.Minute), time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for !is() {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("never %s", what)
			}
		}
	}
	// It waits for a command, in a read that is called in this phase.
	until("in a read of its standard input", func() bool {
		at, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", cmd.Process.Pid))
		return err == nil && strings.HasPrefix(string(at), "0 0x0 ")
	})
	switches("idle", 4)
	counted := func(number uint8) func() bool {
		return func() bool {
			s, err := a.recorder.(*bpf.Recorder).Snapshot(*a.instance(c.ID).handle)
			return err != nil || slices.ContainsFunc(s.Calls, func(c bpf.CallSet) bool { return c.Phase == number })
		}
	}
	until("counted behind the switch", counted(2))
	// A kill in a switch, behind the journal and before the barrier.
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.journal.savePhase(c.ID, phaseNow{Phase: "cut", Generation: 5}); err != nil {
		t.Fatal(err)
	}
	a = open(t, p, log)
	until("counted behind the switch that was cut off", counted(3))
	// One in the barrier, with a journal that can't be read: it is recorded on, and runs.
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	frozen := filepath.Join(c.CgroupsPath, "cgroup.freeze")
	for path, text := range map[string]string{frozen: "1", a.journal.path(c.ID, frozenSuffix): "", a.journal.path(c.ID, phaseSuffix): "{"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a = open(t, p, log)
	if text, err := os.ReadFile(frozen); err != nil || string(text) != "0\n" {
		t.Errorf("after a kill in the barrier: frozen %q, %v", text, err)
	}
	if _, err := a.Phases().Get(c.ID); err == nil {
		t.Error("picked up in a phase that nobody knows")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if err := a.Synchronize(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if in := a.instance(c.ID); in != nil {
		if err := a.endNow(t.Context(), in); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Phases().Get(c.ID); err == nil {
		t.Error("it has ended, and is in a phase")
	}
	s, err := store.Open(p.Store, store.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	recs, err := s.Recordings("docker.io/library/app/app")
	if err != nil || len(recs) != 1 || len(recs[0].Losses) != 0 {
		t.Fatalf("%+v, %v", recs, err)
	}
	rec := recs[0]
	in := func(call string) (phases []string) {
		for name, calls := range rec.Phases {
			if calls.Has(x8664, call) {
				phases = append(phases, name)
			}
		}
		slices.Sort(phases)
		return phases
	}
	for call, want := range map[string][]string{
		"mkdir": {"make"}, "utimensat": {"make"}, "getdents64": {"look"},
		"execve": {"look", "make", "start"}, "brk": {"look", "make"}, "read": {"cut", "idle", "look", "make"},
	} {
		if diff := cmp.Diff(want, in(call)); diff != "" {
			t.Errorf("phases with %s: %s", call, diff)
		}
	}
	if diff := cmp.Diff([]string{"read"}, slices.DeleteFunc(rec.Phases["idle"].Names(), func(n string) bool { return n == "restart_syscall" })); diff != "" {
		t.Errorf("in idle: %s", diff)
	}
	if got := rec.Phases[profiles.StartPhase].Names(); !slices.Equal(got, []string{"execve"}) {
		t.Errorf("at the start: %v", got)
	}
	v, err := s.Active("docker.io/library/app/app")
	if err != nil || !v.Manifest.Calls.Has(x8664, "mkdir") || !v.Manifest.Calls.Has(x8664, "getdents64") {
		t.Errorf("the version is no union: %+v, %v", v, err)
	}
	suggested, err := profiles.SuggestPhases(recs, profiles.SuggestOptions{})
	if err != nil || suggested.Initial != "look" || len(suggested.Phases) != 4 {
		t.Errorf("%+v, %v", suggested, err)
	}
	if _, err := a.Phases().Set(t.Context(), c.ID, "look", phase.SetOptions{}); err == nil {
		t.Error("switched what has ended")
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// TestMarks: with as many phases as the recorder keeps, the start counts
// for the first.
func TestMarks(t *testing.T) {
	m := marks{"a", "b"}
	var o bpf.TrackOptions
	m.begin(&o, "b", true)
	if o.Phase != 1 || o.Start == nil || *o.Start != 2 || !cmp.Equal(m.names(), map[uint8]string{0: "a", 1: "b", 2: "start"}) {
		t.Errorf("%+v, %v", o, m.names())
	}
	o = bpf.TrackOptions{}
	m.begin(&o, "b", false)
	if o.Start != nil {
		t.Error("a start behind the first execve")
	}
	for len(m) < bpf.Phases {
		m = append(m, fmt.Sprint("p", len(m)))
	}
	m.begin(&o, "p7", true)
	if o.Phase != 7 || o.Start != nil || len(m.names()) != bpf.Phases {
		t.Errorf("%+v, %v", o, m.names())
	}
	if _, err := m.number("c"); err == nil {
		t.Error("a phase that isn't there has a number")
	}
}

// TestMarksAreToldAgain: what the journal says before the recorder knows is told to the
// recorder when the slot is there, and by the next process.
func TestMarksAreToldAgain(t *testing.T) {
	w := newPhasedWorld(t)
	for i := range w.policy.Policies {
		w.policy.Policies[i].Mode = policy.ModeRecord
	}
	a := w.start()
	defer a.close()
	c := w.newContainer(1)
	d, err := w.policy.Decide(c.Container)
	if err != nil || d.Phases == nil {
		t.Fatalf("%+v, %v", d, err)
	}
	in := (&instance{Container: c.Container, Decision: d, Phases: &instancePhases{Record: true}}).prepare()
	in.record(profiles.GateFilter, adjust.Runtime{})
	in.kept.now.Phase = "b"
	if err := a.mark(in); err != nil { // not tracked yet
		t.Fatal(err)
	}
	c.made()
	in.CgroupID = c.cgroup
	if err := a.mark(in); err == nil || !strings.Contains(err.Error(), "no record of the container") {
		t.Errorf("without a slot: %v", err)
	}
	if err := a.trackLate(in); err != nil {
		t.Fatal(err)
	}
	if s := w.kernel.slot(); s.Phase != 1 || s.start == nil || *s.start != 2 {
		t.Errorf("%+v", s)
	}
	w.kernel.slot().Phase = 0 // killed between journal and recorder
	if err := a.mark(in); err != nil || w.kernel.slot().Phase != 1 {
		t.Errorf("%v, phase %d", err, w.kernel.slot().Phase)
	}
	if _, err := w.kernel.Finish(*in.handle); err != nil {
		t.Fatal(err)
	}
	if err := a.mark(in); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("after the end: %v", err)
	}
	if err := a.release(in); err != nil {
		t.Fatal(err)
	}
}

// TestHookRecordsWithoutADaemon: where nobody can switch phases, a container is recorded
// as one whose policy has none.
func TestHookRecordsWithoutADaemon(t *testing.T) {
	w := newPhasedWorld(t)
	for i := range w.policy.Policies {
		w.policy.Policies[i].Mode = policy.ModeRecord
	}
	c := w.newContainer(1)
	runtime := adjust.Runtime{Engine: "podman", Adapter: adjust.AdapterHook}
	planned := func() *instance {
		t.Helper()
		err := w.asking(func(h *Hooks) error {
			plan, err := h.Plan(t.Context(), c.Container, runtime)
			if err == nil && (plan == nil || !plan.Record || plan.Mounts != nil) {
				t.Errorf("%+v", plan)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		in, err := w.hooks().a.journal.instance(c.ID)
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	if in := planned(); in.marked() || in.Decision.Phases != nil || !cmp.Equal(in.phaseNames(), map[uint8]string{0: profiles.DefaultPhase}) {
		t.Errorf("without a daemon: %+v", in)
	}
	p := w.servePhases()
	if in := planned(); !in.marked() || in.Decision.Phase != "a" || in.phaseNames()[2] != profiles.StartPhase {
		t.Errorf("with one: %+v", in)
	}
	// A daemon that can't supervise it leaves it unrecorded, if the policy lets it run.
	c.made()
	facts := func() (policy.Container, adjust.Runtime, error) {
		c.Container.Seccomp = profiles.AllowAll()
		return c.Container, runtime, nil
	}
	w.policy.Policies[1].Failure = policy.FailureRuntimeDefault
	if planned(); p.hookedInstance(c.ID) != nil {
		t.Fatal("supervised before it is created")
	}
	if err := w.asking(func(h *Hooks) error { return h.Created(t.Context(), c.ID, c.pid(), facts) }); err != nil {
		t.Errorf("with failure runtime-default: %v", err)
	}
	if ids, err := w.hooks().a.journal.ids(); err != nil || len(ids) != 0 {
		t.Errorf("left behind: %v, %v", ids, err)
	}
	planned()
	w.policy.Policies[1].Failure = policy.FailureDeny
	planned()
	if err := w.asking(func(h *Hooks) error { return h.Created(t.Context(), c.ID, c.pid(), facts) }); err == nil {
		t.Error("with failure deny it starts unsupervised")
	}
}

// TestThaw: a container that a killed process left in a barrier runs, though its phases
// can't be picked up.
func TestThaw(t *testing.T) {
	for name, mode := range map[string]policy.Mode{"recorded": policy.ModeRecord, "enforced": policy.ModeEnforce} {
		t.Run(name, func(t *testing.T) {
			g := newGroup(t)
			d := phasedDecision(t)
			d.Mode = mode
			in := (&instance{Decision: *d, CgroupID: g.ID(), Ran: true, Phases: &instancePhases{}}).prepare()
			in.Phases.of(d)
			in.Container.ID = "c1"
			a := &Agent{journal: newJournal(t), log: logrus.NewEntry(logrus.New())}
			a.phases = &phasing{a: a, kernel: detect(t), supervisor: phase.NewSupervisor(phase.Options{Log: a.log})}
			frozen := filepath.Join(g.Path(), "cgroup.freeze")
			for path, text := range map[string]string{frozen: "1", a.journal.path("c1", frozenSuffix): "", a.journal.path("c1", phaseSuffix): "{"} {
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			a.pickUpPhases(in, nil)
			if text, err := os.ReadFile(frozen); err != nil || string(text) != "0\n" {
				t.Errorf("frozen: %q, %v", text, err)
			}
		})
	}
}
