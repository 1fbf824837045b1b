// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// synchronize tells the agent what is there, and of what runs, as the plugin does.
func (a *testAgent) synchronize(present ...*container) {
	a.w.t.Helper()
	var list []policy.Container
	for _, c := range present {
		list = append(list, c.Container)
	}
	if err := a.Synchronize(a.w.t.Context(), list); err != nil {
		a.w.t.Fatal(err)
	}
	for _, c := range present {
		if c.ended == nil {
			continue // created only
		}
		if err := a.Started(a.w.t.Context(), c.ID, c.pid()); err != nil {
			a.w.t.Fatal(err)
		}
	}
	synctest.Wait()
}

// The daemon is dead from here to there in a container's life; what it called
// meanwhile is recorded.
func TestRestart(t *testing.T) {
	const (
		planned = iota
		created
		starting
		executed
		exited
		end
	)
	for _, gap := range []struct{ from, to int }{
		{planned, created},
		{planned, starting},
		{planned, executed},
		{planned, exited},
		{created, executed},
		{created, exited},
		{starting, executed},
		{starting, exited},
		{executed, exited},
		{executed, executed},
	} {
		t.Run("", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, byAnnotation)
				a := w.start()
				c := w.newContainer(1)
				for stage := planned; stage < end; stage++ {
					alive := stage <= gap.from || stage > gap.to
					switch stage {
					case planned:
						a.plan1(c)
					case created:
						c.create()
					case starting:
						if alive {
							a.starting1(c)
						}
					case executed:
						c.exec("mkdir")
						if alive {
							if err := a.Started(t.Context(), c.ID, c.pid()); err != nil {
								t.Fatal(err)
							}
						}
					case exited:
						w.kernel.call(c.cgroup, "rmdir")
						c.exit()
						if alive {
							if err := a.Stopped(t.Context(), c.ID); err != nil {
								t.Fatal(err)
							}
						}
					}
					synctest.Wait()
					if stage == gap.from {
						a.close()
					}
					if stage == gap.to {
						a = w.start()
						w.wantLog(logrus.InfoLevel, "instance picked up", "c1")
						if stage == exited {
							a.synchronize()
						} else {
							a.synchronize(c)
						}
					}
				}
				a.close()
				w.clean()
				w.wantLosses("c1")
				if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") || !v[0].Calls.Has(x8664, "rmdir") {
					t.Errorf("dead from %d to %d: versions %+v, want one with mkdir and rmdir", gap.from, gap.to, v)
				}
				w.wantNoLog(logrus.ErrorLevel, "")
			})
		})
	}
}

// The settings of what was started while the daemon was dead are read back, too.
func TestMissedStartIsVerified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		c := in("limited", w.newContainer(1))
		a.plan1(c)
		a.close()
		c.create()
		c.exec()
		a = w.start()
		defer a.close()
		w.host.read = func(int, adjust.Expectation) (string, error) { return "63", nil }
		a.synchronize(c)
		w.wantLog(logrus.ErrorLevel, "unverified", "pids.max", `got "63"`)
	})
}

// The plan's answer never reached the runtime, which went on without: the
// container's filter is not ours, or there is none. The daemon is back before its
// end, or after.
func TestContainerMadeWithoutTheAnswer(t *testing.T) {
	for name, inTime := range map[string]bool{"before the end": true, "after": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, byAnnotation)
				a := w.start()
				c := w.newContainer(1)
				a.plan1(c)
				a.close()
				c.create()
				w.kernel.slot().calls = map[fakeCalls][]uint16{} // no filter, nothing counted
				w.host.read = func(_ int, e adjust.Expectation) (string, error) { return e.Field + ":\t0", nil }
				if !inTime {
					c.exit()
				}
				a = w.start()
				defer a.close()
				if inTime {
					a.synchronize(c)
					time.Sleep(settleTime)
					synctest.Wait()
					w.wantLog(logrus.ErrorLevel, "read-back failed", "Seccomp")
					c.exit()
					if err := a.Stopped(t.Context(), c.ID); err != nil {
						t.Fatal(err)
					}
				} else {
					a.synchronize()
				}
				synctest.Wait()
				w.wantLosses("c1", profiles.LossNoFilterGate)
			})
		})
	}
}

func TestSynchronizeReportsWhatItDoesNotKnow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		a.synchronize(w.newContainer(1), w.newContainer(2, "mode.syslatch.dev/pod=off"))
		w.wantLog(logrus.ErrorLevel, "created without syslatch", "c1")
		w.wantNoLog(logrus.ErrorLevel, "c2")
		w.refuse("bpf.Instances", errors.New("interrupted"))
		if err := a.Synchronize(t.Context(), nil); err == nil {
			t.Error("a kernel that doesn't answer is no error")
		}
		w.refuse("", nil)
	})
}

// What the runtime doesn't list goes on as long as its processes run: the runtime
// may be another one, or have lost its state.
func TestUnlistedContainerThatRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c, back := w.newContainer(1), w.newContainer(2)
		for _, c := range []*container{c, back} {
			a.plan1(c)
			c.create()
			a.starting1(c)
			c.exec()
		}
		a.synchronize()
		w.wantLog(logrus.WarnLevel, "doesn't list this container", "c1")
		a.synchronize(back)
		w.kernel.call(c.cgroup, "mkdir")
		c.exit()
		back.exit() // and nobody tells, but this one is listed
		time.Sleep(sweepEvery)
		synctest.Wait()
		w.wantLosses("c1")
		if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
			t.Errorf("versions %v, want one with mkdir", v)
		}
		if a.instance("c2") == nil {
			t.Error("c2 was ended, though the runtime lists it")
		}
	})
}

// A container that was planned and never made gives its slot back in time, with no
// event and no further plan; one that is made after that is recorded late.
func TestNeverMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c, enforced := w.newContainer(1), w.newContainer(3)
		a.plan1(c)
		time.Sleep(planGrace - time.Second)
		w.kernel.slot()
		time.Sleep(sweepEvery + time.Second)
		synctest.Wait()
		w.kernel.mu.Lock()
		n, waits := len(w.kernel.slots), len(w.kernel.awaited)
		w.kernel.mu.Unlock()
		if n != 0 || waits != 0 {
			t.Errorf("%d slots, %d names that are awaited after the grace", n, waits)
		}
		// The same cgroup again, under another id.
		again := w.newContainer(2)
		again.CgroupsPath = c.CgroupsPath
		a.plan1(again)
		if err := a.Stopped(t.Context(), again.ID); err != nil {
			t.Fatal(err)
		}
		a.gone(again)

		c.create()
		a.starting1(c)
		c.exec()
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		a.gone(c)
		w.wantLosses("c1", profiles.LossAttachedLate)

		// What holds nothing in the kernel is remembered for longer: it is to be
		// read back when it starts.
		a.plan1(w.newContainer(4))
		a.run(in("lossy", w.newContainer(5)))
		synctest.Wait()
		a.plan1(enforce(enforced))
		time.Sleep(forgetAfter - time.Minute)
		if a.instance("c3") == nil || a.instance("c4") == nil {
			t.Error("forgotten too early")
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if a.instance("c3") != nil || a.instance("c4") != nil {
			t.Error("remembered for ever")
		}
		w.clean()
	})
}

// A container that waits for its start keeps its recording; one whose cgroup was
// removed again is over.
func TestCreatedAndNotStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c, failed := w.newContainer(1), w.newContainer(2)
		for _, c := range []*container{c, failed} {
			a.plan1(c)
			c.create()
		}
		failed.exit()
		time.Sleep(10 * planGrace)
		synctest.Wait()
		if a.instance("c2") != nil {
			t.Error("c2 is not gone")
		}
		a.starting1(c)
		c.exec()
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		w.wantLosses("c1")
		if recs, _ := w.recordings(); len(recs) != 1 {
			t.Errorf("%d recordings, want that of c1 only", len(recs))
		}
		w.clean()
	})
}

// The recorder is full of containers that were never made: the next one must get in
// after the grace, though its own plan failed.
func TestFullRecorderHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		w.kernel.capacity = 2
		a := w.start()
		defer a.close()
		for i := range 2 {
			a.plan1(w.newContainer(i))
		}
		strict := func(n int) *container { return in("strict", w.newContainer(n, "mode.syslatch.dev/pod=record")) }
		contains(t, a.planError(strict(2)), "recorder is full")
		time.Sleep(planGrace + sweepEvery)
		synctest.Wait()
		a.plan1(strict(3))
	})
}

// What another process records in the same maps is left alone, and said.
func TestStrangeSlotIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		if _, err := w.kernel.Await("theirs", bpf.TrackOptions{Tag: 7}); err != nil {
			t.Fatal(err)
		}
		a := w.start()
		defer a.close()
		a.synchronize()
		time.Sleep(forgetAfter)
		synctest.Wait()
		w.kernel.slot()
		w.wantLog(logrus.WarnLevel, "left alone", "/sys/fs/bpf/nowhere")
	})
}

// After an upgrade the kernel's maps may be of another layout: what they hold can't
// be read, and must not break what comes.
func TestPickedUpWithoutARecorder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		c, waits, limited := w.newContainer(1), w.newContainer(2), enforce(w.newContainer(3))
		a.run(w.newContainer(4))
		synctest.Wait()
		a.plan1(c)
		c.create()
		a.starting1(c)
		c.exec()
		a.plan1(waits)
		a.close()
		b := w.startWith(nil, bpf.ErrLayout)
		defer b.close()
		b.synchronize(c, waits)
		b.plan1(limited)
		time.Sleep(planGrace + sweepEvery)
		waits.create()
		b.starting1(waits) // runtime-default
		w.wantLog(logrus.ErrorLevel, "unrecorded or unverified", "c2", "incompatible version")
		c.exit()
		if err := b.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		w.wantLog(logrus.ErrorLevel, "kept for another try", "c1", "incompatible version")
		if b.instance("c1") == nil {
			t.Error("c1 is forgotten, though its recording is there")
		}
		w.wantNoLog(logrus.ErrorLevel, "panic")
	})
}
