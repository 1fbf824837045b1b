// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/internal/store"
)

// Drain is bpf.Recorder's.
func (k *fakeKernel) Drain(fn func(bpf.Event)) error {
	k.mu.Lock()
	events, err := k.ring, k.busy
	if err == nil {
		k.ring, k.busy = nil, bpf.ErrBusy // until it is read
	}
	k.mu.Unlock()
	if err != nil {
		return err
	}
	for _, e := range events {
		fn(e)
	}
	k.mu.Lock()
	k.busy = nil
	k.mu.Unlock()
	return nil
}

// hooks is one run of a hook.
func (w *world) hooks() *Hooks {
	w.t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(w.log)
	j, err := openJournal(filepath.Join(w.dir, "journal"))
	if err != nil {
		w.t.Fatal(err)
	}
	j.step = func(change string) error { return w.step("journal." + change) }
	s, err := store.Open(w.policy.Store, store.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	a := newAgent(w.policy, Options{Log: logrus.NewEntry(logger), Check: seccomp.Check}, &steppedStore{s, w}, j, w.host)
	a.recorder, a.cgroupMode, a.closers = w.kernel, adjust.CgroupV2, []io.Closer{s}
	h := newHooks(a)
	h.ring = w.kernel
	w.host.mu.Lock()
	w.host.cgroups[os.Getpid()] = 1 // the engine's
	w.host.mu.Unlock()
	return h
}

// hook runs one stage in a process of its own.
func (w *world) hook(stage func(h *Hooks) error) error {
	w.t.Helper()
	h := w.hooks()
	err := stage(h)
	if closeErr := h.Close(); closeErr != nil {
		w.t.Error(closeErr)
	}
	return err
}

func (w *world) precreate(c *container) (plan *adjust.Plan, err error) {
	err = w.hook(func(h *Hooks) (err error) {
		plan, err = h.Plan(w.t.Context(), c.Container, adjust.Runtime{Engine: "podman", Adapter: adjust.AdapterHook})
		return err
	})
	if plan != nil && plan.Seccomp != nil {
		c.Seccomp = plan.Seccomp
	}
	return plan, err
}

func (w *world) createRuntime(c *container) error {
	return w.hook(func(h *Hooks) error {
		return h.Created(w.t.Context(), c.ID, c.pid(), func() (policy.Container, adjust.Runtime, error) {
			return c.Container, adjust.Runtime{Engine: "podman", Adapter: adjust.AdapterHook}, nil
		})
	})
}

func (w *world) poststop(c *container) error {
	return w.hook(func(h *Hooks) error { return h.Stopped(w.t.Context(), c.ID) })
}

// made is the runtime's part up to createRuntime: no filter, no call that counts.
func (c *container) made() {
	c.ended = make(chan struct{})
	c.w.host.mu.Lock()
	defer c.w.host.mu.Unlock()
	c.w.host.cgroups[c.pid()] = c.cgroup
	c.w.host.processes[c.cgroup] = c.ended
}

const forHooks = `
- name: hooks
  match: {}
  mode: record
  annotations: [mode, workload]
  allowedModes: [off, record, audit, enforce]
  failure: deny
`

// A hook is killed before each step of a container's life, or the whole engine is
// in the middle of it and no later stage comes. The next container's hook, be it
// once the grace is over, leaves nothing behind and publishes all that ran.
func TestHookKilledBeforeEachStep(t *testing.T) {
	for n := 1; ; n++ {
		reached := false
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { reached = hookKilledAt(t, n) })
		})
		if !reached {
			break
		}
	}
}

func hookKilledAt(t *testing.T, n int) (reached bool) {
	w := newWorld(t, forHooks)
	w.each(func(at int, _ string) error {
		if at >= n {
			reached = true
			return errKilled
		}
		return nil
	})
	c, ran := w.newContainer(1), false
	if _, err := w.precreate(c); err == nil && !reached {
		c.made()
		if err := w.createRuntime(c); err == nil && !reached {
			ran = true
			c.exec("mkdir")
		}
		c.exit()
		if ran {
			_ = w.poststop(c) // or it is lost: the engine is dead, too
		}
	}
	w.each(nil)
	time.Sleep(planGrace + time.Second)
	if err := w.hook(func(h *Hooks) error { h.Collect(t.Context()); return nil }); err != nil {
		t.Fatal(err)
	}
	w.clean()
	recs, files := w.recordings()
	versions := w.versions()
	if ran != (len(versions) == 1) || len(recs) > 1 || files != len(recs) {
		t.Errorf("ran: %t, %d versions, %d recordings in %d files", ran, len(versions), len(recs), files)
	}
	// Events that a killed hook had in hand are a loss that blocks nothing.
	if ran && (!versions[0].Calls.Has(x8664, "mkdir") || len(recs[0].Blocking()) > 0) {
		t.Errorf("calls %v, losses %v", versions[0].Calls, recs[0].Losses)
	}
	return reached
}

// Several hooks that end the same container at once publish it once.
func TestHooksAtOnce(t *testing.T) {
	w := newWorld(t, forHooks)
	var containers []*container
	for i := range 4 {
		c := w.newContainer(i, "syslatch.dev/workload="+workload)
		containers = append(containers, c)
		if _, err := w.precreate(c); err != nil {
			t.Fatal(err)
		}
		c.made()
		if err := w.createRuntime(c); err != nil {
			t.Fatal(err)
		}
		c.exec("mkdir")
		c.exit()
	}
	var wg sync.WaitGroup
	for _, c := range containers {
		for range 3 {
			wg.Go(func() {
				if err := w.poststop(c); err != nil {
					t.Error(err)
				}
				// poststop has returned, so it is published, whoever did it.
				if _, err := os.Stat(filepath.Join(w.dir, "journal", c.ID+".json")); err == nil {
					t.Errorf("%s is still there", c.ID)
				}
			})
			wg.Go(func() { _ = w.hook(func(h *Hooks) error { h.Collect(t.Context()); return nil }) })
		}
	}
	wg.Wait()
	w.clean()
	recs, files := w.recordings()
	if len(recs) != 4 || files != 4 || len(w.versions()) != 1 {
		t.Errorf("%d recordings in %d files, %d versions", len(recs), files, len(w.versions()))
	}
	for _, rec := range recs {
		if len(rec.FirstSeen) != rec.All().Len() || len(rec.Losses) > 0 {
			t.Errorf("%d first-seen events for %d calls, losses %v", len(rec.FirstSeen), rec.All().Len(), rec.Losses)
		}
	}
}

// A daemon in the same state directory reads the events, and ends what was lost.
func TestDaemonServesHooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, forHooks)
		a := w.start()
		synctest.Wait() // it reads the events
		h := w.hooks()
		defer h.Close()
		a.hooks = newHooks(newAgent(w.policy, Options{Log: a.log, Check: a.check}, a.store, h.a.journal, a.host))
		a.hooks.a.recorder, a.hooks.ring = w.kernel, w.kernel
		w.kernel.mu.Lock()
		w.kernel.busy = bpf.ErrBusy // for hooks: the daemon has it
		w.kernel.mu.Unlock()
		c := w.newContainer(1)
		if _, err := w.precreate(c); err != nil {
			t.Fatal(err)
		}
		c.made()
		if err := w.createRuntime(c); err != nil {
			t.Fatal(err)
		}
		c.exec("mkdir")
		synctest.Wait()
		// It runs: neither ended nor taken for a stranger's.
		if err := a.Synchronize(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if w.kernel.slot().Finished || !a.hooks.owns(w.kernel.slot().Tag) {
			t.Error("the daemon ended a container that runs, or doesn't know whose it is")
		}
		c.exit()
		time.Sleep(sweepEvery) // its poststop is lost
		synctest.Wait()
		a.close()
		w.clean()
		if recs, _ := w.recordings(); len(recs) != 1 || len(recs[0].FirstSeen) != recs[0].All().Len() {
			t.Errorf("recordings %+v", recs)
		}
	})
}

// While the daemon is away, a hook reads the events of its instances, too: they
// are kept for it.
func TestHookReadsTheDaemonsEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		c := w.newContainer(1)
		a.plan1(c)
		c.create()
		a.starting1(c)
		a.close()
		c.exec("mkdir")
		h := w.hooks()
		h.daemons = h.a.journal
		var err error
		if h.a.journal, err = openJournal(filepath.Join(w.dir, "hooks")); err != nil {
			t.Fatal(err)
		}
		h.drain(&instance{Container: policy.Container{ID: "other"}}, 1)
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		w.kernel.mu.Lock()
		left := len(w.kernel.ring)
		w.kernel.mu.Unlock()
		if left > 0 {
			t.Errorf("%d events are still in the ring", left)
		}
		a = w.start()
		a.synchronize(c)
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		a.close()
		w.clean()
		w.wantLosses("c1")
		if recs, _ := w.recordings(); len(recs) != 1 || len(recs[0].FirstSeen) != recs[0].All().Len() {
			t.Errorf("recordings %+v", recs)
		}
	})
}

// An engine without precreate.
func TestHooksUnplanned(t *testing.T) {
	for name, c := range map[string]struct {
		mode    string
		seccomp bool
		says    string // in the error; empty: it is recorded
		gate    bpf.Gate
	}{
		"own profile": {"record", true, "", bpf.GateFilter},
		"unconfined":  {"record", false, "", bpf.GateExec},
		"enforce":     {"enforce", true, "the engine did not run the precreate hook", 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, forHooks)
			first := w.newContainer(0)
			if _, err := w.precreate(first); err != nil {
				t.Fatal(err)
			}
			first.made()
			if err := w.createRuntime(first); err != nil {
				t.Fatal(err)
			}
			first.exec()
			first.exit()
			if err := w.poststop(first); err != nil {
				t.Fatal(err)
			}
			box := w.newContainer(1, "syslatch.dev/mode="+c.mode)
			if c.seccomp {
				box.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
			}
			box.made()
			err := w.createRuntime(box)
			if c.says != "" {
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, want %q", err, c.says)
				}
				w.clean()
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := w.kernel.slot().Gate; got != c.gate {
				t.Errorf("gate %v, want %v", got, c.gate)
			}
			box.exec()
			box.exit()
			if err := w.poststop(box); err != nil {
				t.Fatal(err)
			}
			w.clean()
			if recs, _ := w.recordings(); len(recs) != 2 {
				t.Errorf("%d recordings", len(recs))
			}
		})
	}
}

// What a hook can't do under deny leaves nothing, and under runtime-default lets
// the container run.
func TestHooksFail(t *testing.T) {
	for _, failure := range []string{"deny", "runtime-default"} {
		w := newWorld(t, strings.Replace(forHooks, "failure: deny", "failure: "+failure, 1))
		deny := failure == "deny"
		c := w.newContainer(1)
		w.refuse("bpf.Track", errors.New("no room"))
		if _, err := w.precreate(c); err != nil {
			t.Fatal(err)
		}
		c.made()
		if err := w.createRuntime(c); (err != nil) != deny {
			t.Errorf("%s: %v", failure, err)
		}
		w.clean()

		w.refuse("journal.save", errors.New("no space left"))
		c = w.newContainer(2)
		if plan, err := w.precreate(c); (err != nil) != deny || plan != nil {
			t.Errorf("%s: plan %v, %v", failure, plan, err)
		}
		w.each(nil)
		w.clean()

		// The engine's own cgroup is not a container's.
		c = w.newContainer(3)
		if _, err := w.precreate(c); err != nil {
			t.Fatal(err)
		}
		c.made()
		w.host.mu.Lock()
		w.host.cgroups[c.pid()] = 1
		w.host.mu.Unlock()
		if err := w.createRuntime(c); (err != nil) != deny || deny && !strings.Contains(err.Error(), "no cgroup of its own") {
			t.Errorf("%s: %v", failure, err)
		}
		w.clean()

		// Another precreate hook comes behind ours.
		c = w.newContainer(4)
		if _, err := w.precreate(c); err != nil {
			t.Fatal(err)
		}
		c.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, DefaultErrnoRet: new(uint)}
		c.made()
		if err := w.createRuntime(c); (err != nil) != deny || deny && !strings.Contains(err.Error(), "another precreate hook replaced it") {
			t.Errorf("%s: %v", failure, err)
		}
		w.clean()
	}
}

// A container that is enforced gets what an ended one of its workload did, although
// that one's poststop hasn't come yet. One that runs is left alone.
func TestHooksPublishBeforeEnforcing(t *testing.T) {
	w := newWorld(t, forHooks)
	ended, runs := w.newContainer(1), w.newContainer(2)
	for _, c := range []*container{ended, runs} {
		if _, err := w.precreate(c); err != nil {
			t.Fatal(err)
		}
		c.made()
		if err := w.createRuntime(c); err != nil {
			t.Fatal(err)
		}
		c.exec("mkdir")
	}
	ended.exit()
	next := w.newContainer(3, "syslatch.dev/mode=enforce")
	if plan, err := w.precreate(next); err != nil || plan == nil || plan.Version != 1 {
		t.Errorf("plan %+v, %v", plan, err)
	}
	if recs, _ := w.recordings(); len(recs) != 1 {
		t.Errorf("%d recordings, want the ended one's", len(recs))
	}
	// It can't be published now: the version before it does.
	runs.exit()
	w.refuse("store.Add", errors.New("no space left"))
	if plan, err := w.precreate(w.newContainer(4, "syslatch.dev/mode=enforce")); err != nil || plan == nil || plan.Version != 1 {
		t.Errorf("plan %+v, %v", plan, err)
	}
	w.wantLog(logrus.WarnLevel, "not published yet", "no space left")
}

// A store that hangs is waited for no longer than publishTime.
func TestHooksPublishHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, forHooks)
		for n := range 2 {
			c := w.newContainer(n)
			if _, err := w.precreate(c); err != nil {
				t.Fatal(err)
			}
			c.made()
			if err := w.createRuntime(c); err != nil {
				t.Fatal(err)
			}
			c.exec("mkdir")
			c.exit()
			if n == 0 {
				if err := w.poststop(c); err != nil {
					t.Fatal(err)
				}
			}
		}
		goOn := w.hold("store.Add")
		h, began := w.hooks(), time.Now()
		plan, err := h.Plan(t.Context(), w.newContainer(2, "syslatch.dev/mode=enforce").Container, adjust.Runtime{Adapter: adjust.AdapterHook})
		if took := time.Since(began); err != nil || plan == nil || plan.Version != 1 || took != publishTime {
			t.Errorf("plan %+v, %v, after %s", plan, err, took)
		}
		close(goOn)
		synctest.Wait()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A recording that can't be published stays, and the next run tries again.
func TestHooksPublishLater(t *testing.T) {
	w := newWorld(t, forHooks)
	c := w.newContainer(1)
	if _, err := w.precreate(c); err != nil {
		t.Fatal(err)
	}
	c.made()
	if err := w.createRuntime(c); err != nil {
		t.Fatal(err)
	}
	c.exec("mkdir")
	c.exit()
	w.refuse("store.Add", errors.New("no space left"))
	if err := w.poststop(c); err == nil {
		t.Error("poststop: no error")
	}
	w.each(nil)
	// The same container again: its last run's version is there by then.
	if plan, err := w.precreate(c); err != nil || plan == nil {
		t.Fatal(plan, err)
	}
	if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
		t.Errorf("versions %+v", v)
	}
	if _, err := w.precreate(&container{w: w, Container: policy.Container{ID: "../x"}}); err == nil {
		t.Error("hostile id")
	}
	if err := w.hook(func(h *Hooks) error { return h.Stopped(context.Background(), "../x") }); err == nil {
		t.Error("hostile id")
	}
}

// A container is restarted under its id while its last run can't be published: the
// two don't become one recording, and no slot is lost.
func TestHooksRestartUnpublished(t *testing.T) {
	for _, failure := range []string{"deny", "runtime-default"} {
		t.Run(failure, func(t *testing.T) {
			w := newWorld(t, strings.Replace(forHooks, "failure: deny", "failure: "+failure, 1))
			deny := failure == "deny"
			c := w.newContainer(1)
			if _, err := w.precreate(c); err != nil {
				t.Fatal(err)
			}
			c.made()
			if err := w.createRuntime(c); err != nil {
				t.Fatal(err)
			}
			c.exec("mkdir")
			c.exit()
			w.refuse("store.Add", errors.New("no space left"))
			if err := w.poststop(c); err == nil {
				t.Fatal("poststop: no error")
			}

			again := w.newContainer(2)
			again.ID = c.ID
			if plan, err := w.precreate(again); plan != nil || (err != nil) != deny {
				t.Errorf("precreate: %v, %v", plan, err)
			}
			again.made()
			if err := w.createRuntime(again); (err != nil) != deny {
				t.Errorf("createRuntime: %v", err)
			}
			again.exec("rmdir")
			again.exit()
			w.each(nil)
			if err := w.poststop(again); err != nil {
				t.Fatal(err)
			}
			w.clean()
			recs, _ := w.recordings()
			if len(recs) != 1 || !recs[0].All().Has(x8664, "mkdir") || recs[0].All().Has(x8664, "rmdir") {
				t.Errorf("%d recordings, want the first run's: %+v", len(recs), recs)
			}
		})
	}
}
