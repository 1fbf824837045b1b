// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

const forPhases = `
- name: phased
  match: {users: ["*"]}
  mode: enforce
  workload: w
  phases: {initial: a, gaps: report, a: {}, b: {allow: [mkdir]}}
- name: roots
  match: {}
  mode: enforce
  workload: w
  phases: {initial: a, gaps: report, a: {}, b: {allow: [mkdir]}}
`

// newPhasedWorld is a world whose policies have phases.
func newPhasedWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t, forUsers)
	text := "apiVersion: syslatch.dev/v1\nstore: " + w.dir + "/store\nstateDir: " + w.dir + "/state\nbpffs: /sys/fs/bpf/nowhere\nhook: {rootless: {users: [1000]}}\npolicies:\n" + forPhases
	p, err := policy.Parse("policy.yaml", []byte(text), policy.Options{KnownCall: seccomp.Known, Phases: true})
	if err != nil {
		t.Fatal(err)
	}
	w.policy = p
	return w
}

// servePhases is a daemon that only answers hooks.
func (w *world) servePhases() *phasing {
	w.t.Helper()
	h := w.hooks()
	if err := os.MkdirAll(w.policy.StateDir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	h.a.hooks = h
	p, err := newPhasing(h.a, kernelHost{}, Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	h.a.phases = p
	h.a.closers = append(h.a.closers, p)
	h.a.spawn("accept listeners", p.accept)
	close(h.a.collected)
	w.t.Cleanup(func() {
		if err := h.Close(); err != nil {
			w.t.Error(err)
		}
	})
	return p
}

// asking lets a stage of a hook ask the daemon.
func (w *world) asking(stage func(h *Hooks) error) error {
	return w.hook(func(h *Hooks) error {
		h.supervisor = &supervisor{listenerSocket(w.policy)}
		h.a.compiler = h.supervisor
		return stage(h)
	})
}

func TestHookAsksTheDaemon(t *testing.T) {
	w := newPhasedWorld(t)
	c := w.newContainer(1)
	plan := func() (plan *adjust.Plan, err error) {
		err = w.asking(func(h *Hooks) (err error) {
			plan, err = h.Plan(t.Context(), c.Container, adjust.Runtime{Engine: "podman", Adapter: adjust.AdapterHook})
			return err
		})
		return plan, err
	}
	_, err := plan()
	w.mustNot(err, "policy roots: phases need a running syslatchd")
	if !errors.Is(err, errNoSupervisor) {
		t.Errorf("%v", err)
	}

	p := w.servePhases()
	made, err := plan()
	if err != nil || made.Seccomp == nil || made.Seccomp.ListenerPath != p.socket {
		t.Fatalf("%+v, %v", made, err)
	}
	// What was planned is not created yet.
	s := supervisor{p.socket}
	for id, says := range map[string]string{
		c.ID: "no created instance with phases", "unknown": "no created instance", "a/etc": "not allowed", "": "want 1 to 128",
	} {
		_, err := s.ask(t.Context(), id, specs.StateCreated)
		w.mustNot(err, says)
	}
	if p.hookedInstance(c.ID) != nil || len(p.supervisor.List()) != 0 {
		t.Error("something is supervised")
	}
	// What is left of an earlier run says nothing of this one.
	in, err := p.a.hooks.load(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	j := p.a.hooks.a.journal
	in.CgroupID, in.Container.PID = 7, c.pid()
	if err := errors.Join(j.save(in), j.savePhase(c.ID, phaseNow{Phase: "b", Generation: 2, Began: true})); err != nil {
		t.Fatal(err)
	}
	if err := p.adopt(c.ID); err == nil {
		t.Error("supervised without a cgroup")
	}
	if now, err := j.phase(c.ID); err != nil || now.Phase != "" {
		t.Errorf("an earlier run's phase: %+v, %v", now, err)
	}
	in.CgroupID, in.Container.PID = 0, 0
	if err := j.save(in); err != nil {
		t.Fatal(err)
	}
	// Whose daemon doesn't supervise it doesn't start, whatever the failure policy.
	c.Seccomp = made.Seccomp
	w.policy.Policies[1].Failure = policy.FailureRuntimeDefault
	c.made()
	err = w.asking(func(h *Hooks) error {
		return h.Created(t.Context(), c.ID, c.pid(), func() (policy.Container, adjust.Runtime, error) {
			return c.Container, adjust.Runtime{Engine: "podman", Adapter: adjust.AdapterHook}, nil
		})
	})
	if err == nil { // the fake's pid has no cgroup that could be frozen
		t.Error("created without supervision")
	}
	if left, err := filepath.Glob(filepath.Join(w.dir, "journal", "*")); err != nil || len(left) > 0 {
		t.Errorf("left in the journal: %v, %v", left, err)
	}
	if p.hookedInstance(c.ID) != nil || len(p.supervisor.List()) != 0 {
		t.Error("something is supervised")
	}

	_, err = w.userPrecreate(alice, w.newContainer(2))
	w.mustNot(err, "policy phased has phases, which rootless containers can't have")
}

// TestHookOfAnotherVersion: who listens and doesn't know hooks is no supervisor.
func TestHookOfAnotherVersion(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "listener.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, tc := range []struct {
		answer func(c net.Conn)
		says   string
	}{
		{func(net.Conn) {}, "does not answer hooks"},
		{func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400\r\n")) }, "ask syslatchd: invalid character"},
		{func(c net.Conn) { _ = json.NewEncoder(c).Encode(hookAnswer{Error: "is full"}) }, "syslatchd: is full"},
	} {
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			var state specs.ContainerProcessState
			if json.NewDecoder(c).Decode(&state) == nil && state.State.ID == "x" && state.Metadata == fromHook {
				tc.answer(c)
			}
		}()
		if _, err := (&supervisor{socket}).ask(t.Context(), "x", specs.StateCreating); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v, want %q", err, tc.says)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (&supervisor{socket}).ask(ctx, "x", specs.StateCreating); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestHookMakesTheSameFilter: as the daemon, whose tables are for that one.
func TestHookMakesTheSameFilter(t *testing.T) {
	w := newPhasedWorld(t)
	d, err := w.policy.Decide(policy.Container{ID: "x", Image: "i"})
	if err != nil {
		t.Fatal(err)
	}
	ip := &instancePhases{Host: profiles.PhaseHost{Notify: true}}
	is, err := inputOf(&d, ip).compile()
	if err != nil {
		t.Fatal(err)
	}
	if ip, _, err = filterOf(&d, ip, is, "/socket"); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(&instance{Decision: d, Phases: ip})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ from, to, says string }{
		{"", "", ""},
		{`"sha256:`, `"sha256:0`, "syslatch-hook is of another version"},
		{`"notify":true`, `"notify":false`, "syslatch-hook is of another version"},
	} {
		changed := strings.Replace(string(data), tc.from, tc.to, 1)
		if tc.from != "" && changed == string(data) {
			t.Errorf("no %s in %s", tc.from, data)
		}
		in := &instance{}
		if err := json.Unmarshal([]byte(changed), in); err != nil {
			t.Fatal(err)
		}
		if err := (&phasing{}).sameFilter(in); tc.says == "" && err != nil || tc.says != "" && (err == nil || !strings.Contains(err.Error(), tc.says)) {
			t.Errorf("%s: %v, want %q", tc.to, err, tc.says)
		}
	}
}

// A phase is kept for the run that has it, and for no other of the same container.
func TestHookedPhaseIsKept(t *testing.T) {
	w := newPhasedWorld(t)
	h := w.hooks()
	defer h.Close()
	in := (&instance{Container: policy.Container{ID: "x"}, CgroupID: 7, Phases: &instancePhases{}}).prepare()
	now := phaseNow{Phase: "b", Generation: 2}
	save := func(in *instance, want phaseNow) {
		t.Helper()
		if err := h.savePhase(in, now); err != nil {
			t.Error(err)
		}
		if got, err := h.a.journal.phase("x"); err != nil || got.Phase != want.Phase || got.Generation != want.Generation {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	save(in, phaseNow{}) // it has ended
	if left, err := filepath.Glob(filepath.Join(w.dir, "journal", "*")); err != nil || len(left) > 0 {
		t.Errorf("left in the journal: %v, %v", left, err)
	}
	if err := h.a.journal.save(in); err != nil {
		t.Fatal(err)
	}
	save((&instance{Container: in.Container, CgroupID: 8}).prepare(), phaseNow{})
	save(in, now)
	if err := h.a.journal.remove("x"); err != nil {
		t.Fatal(err)
	}
	save(in, phaseNow{})
}

// What hooks leave that were killed, or gave up, is removed at a start of the daemon, and
// nothing else is.
func TestWhatHooksLeaveIsSwept(t *testing.T) {
	w := newProgramWorld(t)
	if _, err := w.start("c1"); err != nil {
		t.Fatal(err)
	}
	j := w.a.hooks.a.journal
	in := (&instance{Container: policy.Container{ID: "x"}, Planned: time.Now(), hooks: w.a.hooks}).prepare()
	if err := j.save(in); err != nil {
		t.Fatal(err)
	}
	stays := []string{
		insideOf(w.policy, in), insideOf(w.policy, w.a.instance("c1")), filepath.Join(insideParent(w.policy), "of a hook that works"),
		j.path("x", phaseSuffix), j.path("x", frozenSuffix), j.path("y", instanceSuffix+newSuffix),
	}
	goes := []string{
		filepath.Join(insideParent(w.policy), "of a hook that was killed"),
		j.path("y", phaseSuffix), j.path("y", frozenSuffix), j.path("y", phaseSuffix+newSuffix),
	}
	for i, path := range slices.Concat(stays, goes) {
		if filepath.Dir(path) == j.dir {
			if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := makeInside(path); err != nil {
			t.Fatal(err)
		}
		old := time.Now().Add(-planGrace)
		if i == 2 {
			continue
		}
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	w.restart()
	for _, path := range stays {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	for _, path := range goes {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}
