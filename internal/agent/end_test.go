// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/profiles"
)

func TestEndPublishes(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	defer a.close()
	c := w.newContainer(1)
	a.run(c, "mkdir")
	a.gone(c)
	w.clean()
	v := w.versions()
	if len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") || !v[0].Calls.Has(x8664, "execve") || v[0].Runtime != "containerd 2.4.2" {
		t.Fatalf("versions %+v", v)
	}
	if active, err := w.openStore().Active(workload); err != nil || active.Manifest.Version != 1 {
		t.Errorf("active: %v, %v", active, err)
	}
	recs, files := w.recordings()
	if len(recs) != 1 || files != 1 {
		t.Fatalf("%d recordings in %d files", len(recs), files)
	}
	if r := recs[0]; len(r.FirstSeen) != r.All().Len() || len(r.Losses) != 0 || r.Ended.Before(r.Started) || r.Subject.ID != "c1" {
		t.Errorf("%d first-seen events for %d calls, losses %v, from %s to %s of %v", len(r.FirstSeen), r.All().Len(), r.Losses, r.Started, r.Ended, r.Subject)
	}
}

// The order that the package comment gives.
func TestOrderOfALife(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	w.each(nil)
	c := w.newContainer(1)
	a.plan1(c)
	c.create()
	a.starting1(c)
	c.exec()
	a.startedNow(c)
	c.exit()
	if err := a.Stopped(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	a.gone(c)
	a.close()
	changes := slices.DeleteFunc(w.steps, func(s string) bool { return s == "bpf.Instances" })
	want := []string{
		"journal.save", "bpf.Await",
		"journal.save", // Starting
		"journal.save", // Started
		"journal.save", "bpf.Finish", "store.Add", "journal.save", "bpf.Release", "journal.remove",
	}
	if diff := cmp.Diff(want, changes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// startedNow tells of the start and waits until it is noted.
func (a *testAgent) startedNow(c *container) {
	a.w.t.Helper()
	if err := a.started(a.instance(c.ID), c.pid()); err != nil {
		a.w.t.Fatal(err)
	}
}

// A container whose program was never executed is no evidence of what the program
// calls: as a version, the runtime's few calls would be enforced.
func TestNothingIsKeptOfAProgramThatWasNeverExecuted(t *testing.T) {
	for name, stage := range map[string]int{"planned": 0, "created": 1, "starting": 2} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, byAnnotation)
			a := w.start()
			defer a.close()
			c := w.newContainer(1)
			a.plan1(c)
			if stage > 0 {
				c.create()
			}
			if stage > 1 {
				a.starting1(c)
			}
			if stage > 0 {
				c.exit()
			}
			if err := a.Stopped(t.Context(), c.ID); err != nil {
				t.Fatal(err)
			}
			a.gone(c)
			if recs, _ := w.recordings(); len(recs) != 0 || len(w.versions()) != 0 {
				t.Errorf("recordings %v, versions %v, want none", recs, w.versions())
			}
			w.clean()
			w.wantLog(logrus.InfoLevel, "never executed")
		})
	}
}

// One that ran, and in whose recording no execve is, was not recorded: its runtime
// loaded no filter.
func TestRanWithoutAFilter(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	defer a.close()
	c := w.newContainer(1)
	a.plan1(c)
	c.create()
	a.starting1(c)
	a.startedNow(c)
	c.exit()
	if err := a.Stopped(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	a.gone(c)
	w.wantLosses("c1", profiles.LossNoFilterGate)
	w.wantLog(logrus.ErrorLevel, "no version published", "no-filter-gate")
	if v := w.versions(); len(v) != 0 {
		t.Errorf("versions %v, want none", v)
	}
}

// The exec gate says itself whether the program was executed.
func TestExecGate(t *testing.T) {
	for _, executed := range []bool{true, false} {
		w := newWorld(t, byAnnotation)
		a := w.start()
		c := w.newContainer(1)
		c.SeccompUnknown = true // CRI-O
		a.plan1(c)
		if s := w.kernel.slot(); s.Gate != bpf.GateExec {
			t.Errorf("gate %s, want exec", s.Gate)
		}
		c.create()
		a.starting1(c)
		if executed {
			w.kernel.slot().gateOpen = true
			w.kernel.call(c.cgroup, "mkdir", "exit_group") // the execve itself is not counted
		}
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		a.gone(c)
		if v := w.versions(); (len(v) == 1) != executed {
			t.Errorf("executed %t: versions %+v", executed, v)
		}
		a.close()
	}
}

// A publication that fails is tried again, ever more rarely, by one goroutine, and
// with the same content each time.
func TestPublicationIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		// A version that can't be read: found when the recording has been written.
		broken := filepath.Join(w.policy.Store, "docker.io%2Flibrary%2Fapp%2Fapp", "versions", "000001")
		if err := os.MkdirAll(broken, 0o750); err != nil {
			t.Fatal(err)
		}
		c := w.newContainer(1)
		a.plan1(c)
		c.create()
		a.starting1(c)
		c.exec("mkdir")
		w.each(nil)
		began := time.Now()
		var at []time.Duration
		c.exit()
		for range 3 { // StopContainer, RemoveContainer, and a synchronization
			if err := a.Stopped(t.Context(), c.ID); err != nil {
				t.Fatal(err)
			}
		}
		for n := 0; n < 8; {
			synctest.Wait()
			if got := w.count("store.Add"); got > n {
				n = got
				at = append(at, time.Since(began).Round(time.Second))
				if err := a.Stopped(t.Context(), c.ID); err != nil { // changes nothing
					t.Fatal(err)
				}
			}
			time.Sleep(time.Second)
		}
		want := []time.Duration{0, 15, 45, 105, 225, 465, 705, 945}
		for i := range want {
			want[i] *= time.Second
		}
		if diff := cmp.Diff(want, at); diff != "" {
			t.Errorf("attempts (-want +got):\n%s", diff)
		}
		w.wantLog(logrus.ErrorLevel, "not published yet", "retry_in=15s", "corrupt")
		w.wantLog(logrus.ErrorLevel, "not published yet", "retry_in=4m0s")
		if in := a.instance(c.ID); in == nil || in.handle == nil {
			t.Fatal("the instance is forgotten")
		}

		w.each(nil)
		if err := os.Remove(broken); err != nil {
			t.Fatal(err)
		}
		time.Sleep(retryMost)
		synctest.Wait()
		w.clean()
		if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
			t.Errorf("versions %v, want one with mkdir", v)
		}
		if recs, files := w.recordings(); len(recs) != 1 || files != 1 {
			t.Errorf("%d recordings in %d files, want one: each attempt must write the same", len(recs), files)
		}
	})
}

// Every loss after which calls may be missing keeps a version from being made; the
// others don't.
func TestLosses(t *testing.T) {
	for name, tc := range map[string]struct {
		lose    func(*fakeSlot)
		kind    profiles.LossKind
		publish bool
	}{
		"cgroup map full": {func(s *fakeSlot) { s.losses.Cgroups = 1 }, profiles.LossCgroupMapFull, false},
		"foreign lineage": {func(s *fakeSlot) { s.losses.ForeignCalls = 1 }, profiles.LossForeignLineage, false},
		"odd number":      {func(s *fakeSlot) { s.odd = []bpf.OddCall{{Number: 4000}} }, profiles.LossOutOfRange, false},
		"odd numbers":     {func(s *fakeSlot) { s.losses.OddCalls = 1 }, profiles.LossOutOfRange, false},
		"unresolved": {func(s *fakeSlot) {
			s.calls[fakeCalls{abi: bpf.ABIX8664}] = append(s.calls[fakeCalls{abi: bpf.ABIX8664}], 1000)
		}, profiles.LossUnresolved, false},
		"first seen": {func(s *fakeSlot) { s.losses.Events = 1 }, profiles.LossFirstSeen, true},
		"arguments":  {func(s *fakeSlot) { s.losses.Args = 1 }, profiles.LossArguments, true},
	} {
		for _, ns := range []string{"default", "lossy"} {
			t.Run(name+"/"+ns, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, byAnnotation)
					a := w.start()
					defer a.close()
					c := in(ns, w.newContainer(1))
					a.plan1(c)
					c.create()
					a.starting1(c)
					c.exec()
					s := w.kernel.slot()
					w.kernel.mu.Lock()
					tc.lose(s)
					switch name {
					case "first seen": // one call's event is not in the ring
						s.calls[fakeCalls{abi: bpf.ABIX8664}] = append(s.calls[fakeCalls{abi: bpf.ABIX8664}], 83)
					case "odd number", "unresolved":
						w.kernel.event(bpf.Event{Handle: s.Handle, Number: 4000})
					}
					w.kernel.mu.Unlock()
					c.exit()
					if err := a.Stopped(t.Context(), c.ID); err != nil {
						t.Fatal(err)
					}
					time.Sleep(drainTime)
					synctest.Wait()
					w.wantLosses("c1", tc.kind)
					w.wantLog(logrus.WarnLevel, "recording lost something", string(tc.kind))
					publish := tc.publish || ns == "lossy"
					if v := w.versions(); (len(v) == 1) != publish {
						t.Errorf("versions %+v, want one: %t", v, publish)
					}
					if !publish {
						w.wantLog(logrus.ErrorLevel, "no version published", "allowLosses", string(tc.kind))
					}
					w.clean()
				})
			})
		}
	}
}

// First-seen events that are not written down in time are counted as lost, and are
// not waited for longer than drainTime, nor at all if nobody reads them.
func TestMissingFirstSeenEvents(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*fakeKernel)
		wait   time.Duration
		log    string
	}{
		"ring not read": {func(k *fakeKernel) { k.deaf = true }, drainTime, ""},
		"another reads": {func(k *fakeKernel) { k.busy = bpf.ErrBusy }, busyTime + busyTime/20, "give each its own"},
		"reader ended":  {func(k *fakeKernel) { k.busy = errors.New("epoll: bad file") }, 0, "restart syslatchd"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, byAnnotation)
				tc.change(w.kernel)
				a := w.start()
				defer a.close()
				began := time.Now()
				c := w.newContainer(1)
				a.run(c)
				a.gone(c)
				if took := time.Since(began); took != tc.wait {
					t.Errorf("took %s, want %s", took, tc.wait)
				}
				w.wantLosses("c1", profiles.LossFirstSeen)
				recs, _ := w.recordings()
				if n := int(recs[0].Losses[0].Count); n != recs[0].All().Len() {
					t.Errorf("%d events lost of %d", n, recs[0].All().Len())
				}
				if tc.log != "" {
					w.wantLog(logrus.ErrorLevel, "first-seen events are not read", tc.log)
				}
				if v := w.versions(); len(v) != 1 {
					t.Errorf("versions %v, want one all the same", v)
				}
			})
		})
	}
}

// An event that comes after the end must not make the journal's file anew.
func TestLateEventLeavesNoFile(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	defer a.close()
	c := w.newContainer(1)
	a.plan1(c)
	in := a.instance(c.ID)
	h := *in.handle
	if err := a.Stopped(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	a.gone(c)
	a.mu.Lock()
	a.byHandle[h] = in // looked up just before
	a.mu.Unlock()
	a.collectOne(bpf.Event{Handle: h})
	w.clean()
}

func TestAudit(t *testing.T) {
	for name, tc := range map[string]struct {
		calls []string
		lose  bool
		step  error
		want  string
		level logrus.Level
		not   string
	}{
		"nothing":        {want: "would have denied nothing", level: logrus.InfoLevel},
		"denied":         {calls: []string{"mkdir"}, want: "would have denied calls", level: logrus.WarnLevel, not: "denied nothing"},
		"denied, lossy":  {calls: []string{"mkdir"}, lose: true, want: "would have denied calls", level: logrus.WarnLevel, not: "denied nothing"},
		"nothing, lossy": {lose: true, want: "dry run not judged", level: logrus.WarnLevel, not: "denied nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, byAnnotation)
				a := w.start()
				defer a.close()
				first := w.newContainer(1)
				a.run(first)
				a.gone(first)
				c := audit(w.newContainer(2))
				a.plan1(c)
				c.create()
				a.starting1(c)
				c.exec(tc.calls...)
				if tc.lose {
					w.kernel.slot().losses.ForeignCalls = 1
				}
				c.exit()
				if err := a.Stopped(t.Context(), c.ID); err != nil {
					t.Fatal(err)
				}
				a.gone(c)
				w.wantLog(tc.level, tc.want, "version=1", "c2")
				if tc.not != "" {
					w.wantNoLog(logrus.DebugLevel, tc.not)
				}
				if v := w.versions(); len(v) != 1 {
					t.Errorf("versions %v: a dry run makes none", v)
				}
				w.clean()
			})
		})
	}
}

// A version that can't be read is tried again; one that was removed never comes
// back, and its instance must not hold a slot for ever.
func TestAuditOfALostVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		first := w.newContainer(1)
		a.run(first)
		a.gone(first)
		c := audit(w.newContainer(2))
		w.refuse("store.Version", errors.New("input/output error"))
		a.run(c)
		synctest.Wait()
		w.wantLog(logrus.ErrorLevel, "kept for another try", "input/output error")
		w.refuse("store.Version", nil)
		dirs, err := filepath.Glob(filepath.Join(w.policy.Store, "*"))
		if err != nil || len(dirs) != 1 {
			t.Fatalf("%v, %v", dirs, err)
		}
		if err := os.RemoveAll(dirs[0]); err != nil { // as the store's own advice about corruption
			t.Fatal(err)
		}
		time.Sleep(retryFirst)
		synctest.Wait()
		w.wantLog(logrus.ErrorLevel, "dry run not judged", "removed", "no such profile version")
		if a.instance("c2") != nil {
			t.Error("c2 is not gone")
		}
	})
}

// The runtime tells of an end while the last processes are being killed: what they
// call still counts.
func TestEndWaitsForTheLastProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c := w.newContainer(1)
		a.plan1(c)
		c.create()
		a.starting1(c)
		c.exec()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		w.kernel.call(c.cgroup, "mkdir")
		c.exit()
		synctest.Wait()
		if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
			t.Errorf("versions %v, want one with mkdir", v)
		}

		forever := w.newContainer(2)
		a.plan1(forever)
		forever.create()
		a.starting1(forever)
		forever.exec("rmdir")
		if err := a.Stopped(t.Context(), forever.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(emptyTime)
		synctest.Wait()
		w.wantLosses("c2", profiles.LossInterrupted)
		if v := w.versions(); len(v) != 1 {
			t.Errorf("versions %v, want none of a recording that was cut off", v)
		}
	})
}

// The kernel's record is gone: an error and a loss, never silence.
func TestLostRecord(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	defer a.close()
	c := w.newContainer(1)
	a.plan1(c)
	c.create()
	a.starting1(c)
	c.exec()
	w.kernel.mu.Lock()
	clear(w.kernel.slots) // as rm -r of the pins and a restart
	w.kernel.mu.Unlock()
	c.exit()
	if err := a.Stopped(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	a.gone(c)
	w.wantLosses("c1", profiles.LossInterrupted)
	w.wantLog(logrus.ErrorLevel, "no version published", "kernel has no record")
	w.clean()
}

// Closing waits for no lock of others, and not for ever for a disk; what was being
// published is published by the next start.
func TestCloseWhilePublishing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		goOn := w.hold("store.Add")
		c := w.newContainer(1)
		a.run(c, "mkdir")
		synctest.Wait()
		began := time.Now()
		contains(t, a.Close(), "has not ended", "nothing is lost", w.policy.Store)
		if took := time.Since(began); took != closeWait {
			t.Errorf("took %s, want %s", took, closeWait)
		}
		close(goOn)
		synctest.Wait()

		w.each(nil)
		b := w.start()
		synctest.Wait() // without a synchronization: its end had begun
		b.close()
		w.clean()
		if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
			t.Errorf("versions %v, want one with mkdir", v)
		}
		if recs, files := w.recordings(); len(recs) != 1 || files != 1 {
			t.Errorf("%d recordings in %d files, want one", len(recs), files)
		}
	})
}

// Somebody else's command holds the store's lock: closing doesn't wait for it.
func TestCloseWhileTheStoreIsLocked(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	first := w.newContainer(1)
	a.run(first)
	a.gone(first)
	path, err := w.openStore().Path(workload, 1)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := os.Open(filepath.Join(path, "../../.."))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	adding := make(chan struct{}, 1)
	w.each(func(_ int, step string) error {
		if step == "store.Add" {
			adding <- struct{}{}
		}
		return nil
	})
	second := w.newContainer(2)
	a.run(second, "mkdir")
	<-adding
	a.close() // fails when it takes closeWait
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	b := w.start()
	b.gone(second)
	b.close()
	if v := w.versions(); len(v) != 2 {
		t.Errorf("versions %v, want two", v)
	}
	w.clean()
}

// Many Plans of one workload while its publication fails: each waits for an
// attempt, and there is one at a time.
func TestPlansShareAnAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		w.refuse("store.Add", errors.New("no space left on device"))
		a.run(w.newContainer(1))
		synctest.Wait()
		goOn := w.hold("store.Add")
		answers := make(chan error, 20)
		for i := range 20 {
			go func() {
				_, err := a.Plan(context.Background(), enforce(w.newContainer(10+i)).Container, adjust.Runtime{})
				answers <- err
			}()
		}
		synctest.Wait()
		if n := w.count("store.Add"); n != 1 {
			t.Errorf("%d attempts at once, want 1", n)
		}
		close(goOn)
		for range 20 {
			if err := <-answers; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestEventCount(t *testing.T) {
	got := eventCount(&bpf.Snapshot{
		Calls:    []bpf.CallSet{{Numbers: []uint16{1, 2}}, {ABI: bpf.ABII386, Numbers: []uint16{1}}},
		OddCalls: []bpf.OddCall{{Number: 4000}},
		Losses:   bpf.Losses{Events: 2, OddCalls: 7},
	})
	if got != 2 {
		t.Errorf("got %d, want 2: 4 calls, of which the ring lost 2", got)
	}
}
