// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/profiles"
)

func contains(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("got error %v, want one that contains %q", err, p)
		}
	}
}

// Decision to plan, for every mode and failure policy.
func TestPlan(t *testing.T) {
	annotated := func(c *container, mode string) *container {
		c.Annotations["mode.syslatch.dev/pod"] = mode
		return c
	}
	noRecorder := errors.New("no BTF")
	tests := map[string]struct {
		change  func(*world, *container)
		version bool   // the workload has one
		broken  string // "recorder", "store" or "check"
		record  bool
		profile bool
		none    bool     // no plan
		refused []string // parts of the error
		log     []string // parts of an error in the log
	}{
		"off":                 {change: func(_ *world, c *container) { annotated(c, "off") }, none: true},
		"record":              {record: true, profile: true},
		"enforce":             {change: func(_ *world, c *container) { enforce(c) }, version: true, profile: true},
		"audit":               {change: func(_ *world, c *container) { audit(c) }, version: true, record: true, profile: true},
		"enforce, no version": {change: func(_ *world, c *container) { enforce(c) }, refused: []string{"no profile version", "mode record first", workload}},
		"enforce, no version, lenient": {
			change: func(_ *world, c *container) { in("lenient", enforce(c)) }, none: true,
			log: []string{"container runs without syslatch", "no profile version"},
		},
		"bad annotation": {change: func(_ *world, c *container) { annotated(c, "enforced") }, refused: []string{"annotation", "enforced"}},
		"no workload":    {change: func(_ *world, c *container) { in("strict", enforce(c)).Image = "" }, refused: []string{"no valid workload name"}},
		"no workload, lenient": {
			change: func(_ *world, c *container) { in("lenient", enforce(c)).Image = "" }, none: true,
			log: []string{"runs without syslatch", "no valid workload name"},
		},
		"no recorder":          {broken: "recorder", none: true, log: []string{"runs without syslatch", "can't record", "no BTF"}},
		"no recorder, strict":  {change: func(_ *world, c *container) { in("strict", annotated(c, "record")) }, broken: "recorder", refused: []string{"can't record", "no BTF"}},
		"no recorder, enforce": {change: func(_ *world, c *container) { enforce(c) }, version: true, broken: "recorder", profile: true},
		"refused profile":      {change: func(_ *world, c *container) { enforce(c) }, version: true, broken: "check", refused: []string{"profile of workload " + workload, "bad rule"}},
		"store error":          {change: func(_ *world, c *container) { enforce(c) }, version: true, broken: "store", refused: []string{"input/output error"}},
		"store error, lenient": {
			change: func(_ *world, c *container) { in("lenient", enforce(c)) }, version: true, broken: "store", none: true,
			log: []string{"runs without syslatch", "input/output error"},
		},
		"strange id":      {change: func(_ *world, c *container) { in("strict", annotated(c, "record")).ID = "../c" }, refused: []string{"container id"}},
		"strange id, off": {change: func(_ *world, c *container) { annotated(c, "off").ID = "../c" }, none: true},
		"kernel full": {
			change:  func(w *world, c *container) { w.kernel.capacity = 0; in("strict", annotated(c, "record")) },
			refused: []string{"recorder is full", "0 of them have ended"},
		},
		"kernel full, lenient": {
			change: func(w *world, c *container) { w.kernel.capacity = 0; in("lenient", annotated(c, "record")) }, none: true,
			log: []string{"runs without syslatch", "recorder is full"},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, byAnnotation)
			if tc.version {
				a := w.start()
				c := w.newContainer(1)
				a.run(c)
				a.gone(c)
				a.close()
			}
			var a *testAgent
			if tc.broken == "recorder" {
				a = w.startWith(nil, noRecorder)
			} else {
				a = w.start()
			}
			defer a.close()
			switch tc.broken {
			case "check":
				a.check = func(*specs.LinuxSeccomp) error { return errors.New("bad rule") }
			case "store":
				w.refuse("store.Active", errors.New("input/output error"))
			}
			c := w.newContainer(2)
			if tc.change != nil {
				tc.change(w, c)
			}
			plan, err := a.Plan(t.Context(), c.Container, adjust.Runtime{})
			switch {
			case tc.refused != nil:
				contains(t, err, tc.refused...)
			case err != nil:
				t.Fatal(err)
			case (plan == nil) != tc.none:
				t.Fatalf("got plan %+v, want none: %t", plan, tc.none)
			case plan != nil && (plan.Record != tc.record || (plan.Seccomp != nil) != tc.profile):
				t.Errorf("got %+v, want record %t, profile %t", plan, tc.record, tc.profile)
			}
			if tc.log != nil {
				w.wantLog(logrus.ErrorLevel, tc.log...)
			}
			if plan == nil {
				undone(a, c)
				w.clean()
				return
			}
			files := []string{"c2.json"}
			if tc.record {
				files = []string{"c2.first-seen", "c2.json"}
			}
			if got := w.journalFiles(); !slices.Equal(got, files) {
				t.Errorf("journal: %v, want %v", got, files)
			}
			if _, awaited := w.kernel.awaited["c2"]; awaited != tc.record {
				t.Errorf("the kernel waits for the cgroup: %t, want %t", awaited, tc.record)
			}
		})
	}
}

// undone waits for the undoing of a plan, where there is one.
func undone(a *testAgent, c *container) {
	if a.instance(c.ID) != nil {
		a.gone(c)
	}
}

// The next container waits for what the one before it brings, and gets it.
func TestPlanWaitsForPublication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		first := w.newContainer(1)
		a.run(first)
		a.gone(first)
		goOn := w.hold("store.Add")
		second := w.newContainer(2)
		a.run(second, "mkdir")
		synctest.Wait()

		began := time.Now()
		err := a.planError(enforce(w.newContainer(3)))
		contains(t, err, "workload "+workload, "container c2", "still being published", "lock")
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("got %v after %s, want the deadline's error after 1s", err, time.Since(began))
		}
		// What is recorded needs no version, and other workloads don't wait.
		a.plan1(w.newContainer(4))
		other := w.newContainer(5)
		other.Name = "other"
		contains(t, a.planError(enforce(other)), "no profile version")

		time.AfterFunc(500*time.Millisecond, func() { close(goOn) })
		if p := a.plan1(enforce(w.newContainer(6))); p.Version != 2 {
			t.Errorf("got version %d, want 2", p.Version)
		}
	})
}

// A publication that fails keeps no container from running under the version that
// there is; one without any is told why.
func TestPlanAfterFailedPublication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		full := errors.New("no space left on device")
		w.refuse("store.Add", full)
		first := w.newContainer(1)
		a.run(first)
		synctest.Wait()
		contains(t, a.planError(enforce(w.newContainer(2))), "no profile version", "container c1", "not published yet", full.Error())

		w.refuse("store.Add", nil) // each Plan tries at once
		if p := a.plan1(enforce(w.newContainer(3))); p.Version != 1 {
			t.Errorf("got version %d, want 1", p.Version)
		}
		w.refuse("store.Add", full)
		second := w.newContainer(4)
		a.run(second, "mkdir")
		synctest.Wait()
		if p := a.plan1(enforce(w.newContainer(5))); p.Version != 1 {
			t.Errorf("got version %d, want 1", p.Version)
		}
		w.wantLog(logrus.WarnLevel, "not published yet", "version before it", "c4", full.Error())
	})
}

// A disk that hangs: the handler's own deadline answers, says what was waited
// for, and nothing is left half planned, whatever comes later.
func TestPlanOnAHangingDisk(t *testing.T) {
	for step, tc := range map[string]struct {
		mode string
		want string
	}{
		"store.Active": {"enforce", "read the active version of workload " + workload},
		"journal.save": {"record", "enter the container into"},
		"bpf.Await":    {"record", "/sys/fs/bpf/nowhere"},
	} {
		for _, ns := range []string{"strict", "lenient"} {
			t.Run(step+"/"+ns, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, byAnnotation)
					a := w.start()
					defer a.close()
					first := w.newContainer(1)
					a.run(first)
					a.gone(first)
					goOn := w.hold(step)
					c := in(ns, w.newContainer(2, "mode.syslatch.dev/pod="+tc.mode))
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					began := time.Now()
					plan, err := a.Plan(ctx, c.Container, adjust.Runtime{})
					if took := time.Since(began); took != time.Second || plan != nil {
						t.Errorf("got %v after %s, want nothing after 1s", plan, took)
					}
					if ns == "strict" {
						contains(t, err, tc.want, "no answer in time")
					} else {
						w.wantLog(logrus.ErrorLevel, "runs without syslatch", tc.want, "no answer in time")
					}
					close(goOn)
					synctest.Wait()
					if a.instance(c.ID) != nil {
						t.Error("the instance is still there")
					}
					w.clean()
				})
			})
		}
	}
}

// endedUnseen is a context that has ended since it was last waited for.
type endedUnseen struct{ context.Context }

func (endedUnseen) Err() error { return context.DeadlineExceeded }

// A plan that is ready at the moment its context ends is not applied either: the
// runtime may have another answer by then.
func TestPlanAtTheDeadline(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	defer a.close()
	c := in("strict", w.newContainer(1, "mode.syslatch.dev/pod=record"))
	if p, err := a.Plan(endedUnseen{t.Context()}, c.Container, adjust.Runtime{}); p != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, %v, want the context's error", p, err)
	}
	undone(a, c)
	w.clean()
}

// The disk may hang for long: what waits for it is bounded.
func TestHangingRequestsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		goOn := w.hold("store.Active")
		for i := range maxBlocked + 10 {
			a.planError(enforce(w.newContainer(i)))
		}
		if n := w.count("store.Active"); n != maxBlocked {
			t.Errorf("%d requests hang, want %d", n, maxBlocked)
		}
		close(goOn)
		synctest.Wait()
		contains(t, a.planError(enforce(w.newContainer(100))), "no profile version")
	})
}

// A container that is planned under an id that is known already: the earlier one's
// end was never told.
func TestPlanOfAKnownID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c := w.newContainer(1)
		a.plan1(c)
		a.plan1(c) // was never made
		w.kernel.slot()

		c.create()
		a.starting1(c)
		c.exec("mkdir")
		c.exit()
		again := w.newContainer(1)
		again.cgroup++
		a.plan1(again)
		if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
			t.Errorf("versions %v, want the first container's", v)
		}
		again.create()
		a.starting1(again)
		again.exec("rmdir")
		again.exit()

		w.refuse("store.Add", errors.New("no space left on device"))
		contains(t, a.planError(in("strict", w.newContainer(1, "mode.syslatch.dev/pod=record"))),
			"an earlier container c1", "not published yet", "no space left")
		w.refuse("store.Add", nil)
		last := w.newContainer(1)
		last.cgroup += 2
		a.plan1(last)
		if v := w.versions(); len(v) != 2 || !v[1].Calls.Has(x8664, "rmdir") {
			t.Errorf("versions %v, want the second container's, too", v)
		}
	})
}

// A creation that failed after its plan, of which no event told, must not stand in
// the way of the next try with the same cgroup.
func TestPlanOfAnAwaitedCgroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		failed := w.newContainer(1)
		a.plan1(failed)
		again := w.newContainer(2)
		again.CgroupsPath = failed.CgroupsPath
		a.plan1(again)
		if a.instance("c1") != nil {
			t.Error("the container that was never made is still there")
		}
		// Another path with the same last part is another container.
		namesake := w.newContainer(3)
		namesake.CgroupsPath = "/others/c1"
		a.plan1(namesake)
		w.wantLog(logrus.WarnLevel, "another container waits for a cgroup of this name", "c3")
		for _, c := range []*container{again, namesake} {
			c.create()
			a.starting1(c)
			c.exec()
			c.exit()
			if err := a.Stopped(t.Context(), c.ID); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		w.wantLosses("c2")
		w.wantLosses("c3", profiles.LossAttachedLate)
		w.clean()
	})
}

// Await knows names of up to bpf.MaxName bytes; a container with a longer one
// is attached to late rather than not recorded.
func TestPlanWithoutANameToAwait(t *testing.T) {
	for name, path := range map[string]string{"none": "", "root": "/", "long": "/pods/" + strings.Repeat("x", bpf.MaxName+1)} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, byAnnotation)
			a := w.start()
			defer a.close()
			c := in("strict", w.newContainer(1, "mode.syslatch.dev/pod=record"))
			c.CgroupsPath = path
			a.run(c)
			a.gone(c)
			w.wantLosses("c1", profiles.LossAttachedLate)
			w.clean()
		})
	}
}

// The runtime gives up on a creation while it is planned.
func TestStoppedWhilePlanned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		goOn := w.hold("bpf.Await")
		time.AfterFunc(time.Millisecond, func() {
			if err := a.Stopped(context.Background(), "c1"); err != nil {
				t.Error(err)
			}
			close(goOn)
		})
		contains(t, a.planError(in("strict", w.newContainer(1, "mode.syslatch.dev/pod=record"))), "stopped")
		synctest.Wait()
		w.clean()
	})
}

func TestPlanAfterClose(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	c := in("strict", w.newContainer(1, "mode.syslatch.dev/pod=record"))
	a.plan1(c)
	c.create()
	a.close()
	a.close() // again is harmless
	contains(t, a.planError(in("strict", w.newContainer(2, "mode.syslatch.dev/pod=record"))), "stopping")
	contains(t, a.planError(in("strict", w.newContainer(3))), "stopping")
	for _, event := range []error{a.Started(t.Context(), c.ID, c.pid()), a.Stopped(t.Context(), c.ID)} {
		if event != nil {
			t.Error(event)
		}
	}
	if w.count("store.Add") != 0 {
		t.Error("a closed agent publishes")
	}
	// The next one goes on with it.
	b := w.start()
	defer b.close()
	b.starting1(c)
	c.exec()
	c.exit()
	if err := b.Stopped(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	b.gone(c)
	if v := w.versions(); len(v) != 1 {
		t.Errorf("versions %v, want one", v)
	}
}

// What a panic breaks is one request.
func TestPanicsAreErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		explode := func(step string) {
			w.each(func(_ int, s string) error {
				if s == step {
					panic("nil map")
				}
				return nil
			})
		}
		explode("store.Active")
		contains(t, a.planError(enforce(w.newContainer(1))), "internal error: nil map", "report")
		explode("bpf.Await")
		contains(t, a.planError(in("strict", w.newContainer(2, "mode.syslatch.dev/pod=record"))), "internal error: nil map")
		synctest.Wait()
		w.clean()

		explode("store.Add")
		c := w.newContainer(3)
		a.run(c)
		synctest.Wait()
		w.wantLog(logrus.ErrorLevel, "not published yet", "internal error: nil map")
		w.each(nil)
		time.Sleep(retryFirst)
		synctest.Wait()
		if v := w.versions(); len(v) != 1 {
			t.Errorf("versions %v, want the retry's", v)
		}
		explode("bpf.Instances")
		time.Sleep(sweepEvery)
		synctest.Wait()
		w.wantLog(logrus.ErrorLevel, "not looked after", "internal error: nil map")
		w.each(nil)
	})
}

// Many containers at once, for the race detector.
func TestManyContainersAtOnce(t *testing.T) {
	w := newWorld(t, byAnnotation)
	w.kernel.capacity = 1000
	a := w.start()
	const n = 40
	done := make(chan error, n)
	for i := range n {
		go func() {
			c := w.newContainer(i)
			if _, err := a.Plan(context.Background(), c.Container, adjust.Runtime{}); err != nil {
				done <- err
				return
			}
			c.create()
			err := a.Starting(context.Background(), c.ID, c.pid())
			c.exec()
			for range 2 {
				err = errors.Join(err, a.Started(context.Background(), c.ID, c.pid()))
			}
			c.exit()
			for range 3 {
				err = errors.Join(err, a.Stopped(context.Background(), c.ID))
			}
			_ = a.Starting(context.Background(), c.ID, c.pid()) // too late, or not known
			if i%4 == 0 {
				err = errors.Join(err, a.Synchronize(context.Background(), nil), a.sweepOnce())
			}
			done <- err
		}()
	}
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for i := range n {
		if in := a.instance(fmt.Sprintf("c%d", i)); in != nil {
			if err := a.endNow(t.Context(), in); err != nil {
				t.Error(err)
			}
		}
	}
	a.close()
	w.clean()
	if recs, files := w.recordings(); len(recs) != n || files != n {
		t.Errorf("%d recordings in %d files, want %d", len(recs), files, n)
	}
}

func TestCgroupName(t *testing.T) {
	for path, want := range map[string]string{
		"":                             "",
		"/":                            "",
		"/kubepods/pod1/c1":            "c1",
		"kubepods/../c1":               "c1",
		"kubepods-pod1.slice:cri:c1":   "cri-c1.scope",
		"system.slice::c1":             "c1.scope",
		"a.slice:cri:kubepods-b.slice": "kubepods-b.slice",
		filepath.Join("/a", "b") + "/": "b",
	} {
		if got := cgroupName(path); got != want {
			t.Errorf("%q: got %q, want %q", path, got, want)
		}
	}
}
