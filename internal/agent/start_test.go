// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/profiles"
)

func TestStartingOfAnUnknownContainer(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	defer a.close()
	for _, err := range []error{a.Starting(t.Context(), "c1", 1), a.Started(t.Context(), "c1", 1), a.Stopped(t.Context(), "c1")} {
		if err != nil {
			t.Error(err)
		}
	}
}

// The cgroup has another name than the path said: what was called before the start
// is lost, and that is said.
func TestStartingInAnotherCgroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c := w.newContainer(1)
		a.plan1(c)
		c.CgroupsPath = "/elsewhere/c1-renamed" // for create; the agent has the plan's
		c.create()
		a.starting1(c)
		c.exec("mkdir")
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		w.wantLosses("c1", profiles.LossAttachedLate)
		w.wantLog(logrus.ErrorLevel, "no version published", `"c1"`)
		recs, _ := w.recordings()
		if !recs[0].All().Has(x8664, "mkdir") || recs[0].All().Has(x8664, "openat") && !contained(startCalls(), "openat") {
			t.Errorf("recorded %v, want what came after the start", recs[0].All())
		}
		w.clean()
	})
}

func contained(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// A kernel that can't be asked for a moment must not cost the recording that it
// has.
func TestStartingKeepsTheRecordingWhenTheKernelErrs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c := w.newContainer(1)
		a.plan1(c)
		c.create()
		w.refuse("bpf.Instances", errors.New("interrupted"))
		a.starting1(c) // record mode: failure policy runtime-default
		w.wantLog(logrus.ErrorLevel, "runs unrecorded or unverified", "interrupted")
		w.refuse("bpf.Instances", nil)
		c.exec("mkdir")
		if err := a.Started(t.Context(), c.ID, c.pid()); err != nil { // finds the cgroup after all
			t.Fatal(err)
		}
		synctest.Wait()
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		w.wantLosses("c1")
		if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
			t.Errorf("versions %v, want one with mkdir", v)
		}
	})
}

// A runtime under load doesn't always know the pid: an awaited cgroup is recorded
// all the same, and Started finds it.
func TestStartingWithoutAPID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c := w.newContainer(1)
		a.plan1(c)
		in := a.instance(c.ID)
		if err := a.starting(t.Context(), in, 0); err == nil || !strings.Contains(err.Error(), "not awaited") {
			t.Errorf("no cgroup was made yet: %v", err)
		}
		c.create()
		if err := a.starting(t.Context(), in, 0); err != nil {
			t.Error(err)
		}
		c.exec("mkdir")
		if err := a.Started(t.Context(), c.ID, c.pid()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if in.CgroupID == 0 {
			t.Error("Started has not found the cgroup")
		}
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		w.wantLosses("c1")
		if v := w.versions(); len(v) != 1 || !v[0].Calls.Has(x8664, "mkdir") {
			t.Errorf("versions %v, want one with mkdir", v)
		}
	})
}

// What can't be recorded is refused, or runs and is a loss.
func TestStartingThatCantRecord(t *testing.T) {
	for name, tc := range map[string]struct {
		break1 func(*world)
		step   string
		err    error
		want   string
	}{
		"no process":     {break1: func(w *world) { clear(w.host.cgroups) }, want: "file does not exist"},
		"journal":        {step: "journal.save", err: errors.New("no space left on device"), want: "no space left"},
		"full, attached": {step: "bpf.Track", err: fmt.Errorf("%w: all slots are taken", bpf.ErrFull), want: "0 of them have ended"},
	} {
		for _, ns := range []string{"strict", "lenient"} {
			t.Run(name+"/"+ns, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, byAnnotation)
					a := w.start()
					defer a.close()
					c := in(ns, w.newContainer(1, "mode.syslatch.dev/pod=record"))
					if tc.step == "bpf.Track" {
						c.CgroupsPath = ""
					}
					a.plan1(c)
					c.create()
					if tc.break1 != nil {
						tc.break1(w)
					}
					w.refuse(tc.step, tc.err)
					err := a.Starting(t.Context(), c.ID, c.pid())
					if ns == "strict" {
						contains(t, err, tc.want)
					} else {
						if err != nil {
							t.Errorf("got %v, want none: the failure policy is runtime-default", err)
						}
						w.wantLog(logrus.ErrorLevel, "unrecorded or unverified", tc.want)
					}
					if tc.step != "bpf.Track" { // heals
						w.refuse(tc.step, nil)
					}
					if ns == "lenient" {
						c.exec()
						if err := a.Started(t.Context(), c.ID, c.pid()); err != nil {
							t.Fatal(err)
						}
						synctest.Wait()
					}
					c.exit()
					if err := a.Stopped(t.Context(), c.ID); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					recs, _ := w.recordings()
					switch {
					case ns == "strict":
						if len(recs) != 0 {
							t.Errorf("recordings %+v of a container that did not run", recs)
						}
					case tc.step == "bpf.Track":
						w.wantLosses("c1", profiles.LossInterrupted)
					default:
						w.wantLosses("c1")
					}
					w.clean()
				})
			})
		}
	}
}

// On a v1-only host there are no cgroup ids: what is enforced needs none, and what
// is to be recorded is refused when it is planned.
func TestHostWithoutCgroupV2(t *testing.T) {
	if r, err := openRecorder(&cgroup.Hierarchy{Mode: cgroup.V1}, t.TempDir()); !errors.Is(err, cgroup.ErrNoV2) {
		t.Errorf("got recorder %v, %v", r, err)
	}
	w := newWorld(t, byAnnotation)
	a := w.start()
	first := w.newContainer(1)
	a.run(first)
	a.gone(first)
	a.close()
	a = w.startWith(nil, cgroup.ErrNoV2)
	defer a.close()
	w.host.noV2 = true
	contains(t, a.planError(in("strict", w.newContainer(2, "mode.syslatch.dev/pod=record"))), "can't record", "no cgroup v2 hierarchy")
	c := in("strict", w.newContainer(3))
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
	w.clean()
}

// A mismatch refuses the start, or is an error in the log.
func TestLimitsAreReadBackAtTheStart(t *testing.T) {
	for ns, refused := range map[string]bool{"limited": true, "limited-lenient": false} {
		t.Run(ns, func(t *testing.T) {
			w := newWorld(t, byAnnotation)
			if !refused {
				w.policy.Policies[3].Failure = "runtime-default"
			}
			a := w.start()
			defer a.close()
			c := in("limited", w.newContainer(1))
			a.plan1(c)
			c.create()
			w.host.read = func(int, adjust.Expectation) (string, error) { return "63", nil }
			err := a.Starting(t.Context(), c.ID, c.pid())
			if refused {
				contains(t, err, "pids.max", `got "63", want "64"`, "another plugin")
			} else {
				if err != nil {
					t.Error(err)
				}
				w.wantLog(logrus.ErrorLevel, "unverified", "pids.max")
			}
		})
	}
}

func TestSettingsAreReadBackOnceTheProgramRuns(t *testing.T) {
	for name, tc := range map[string]struct {
		read func(reads int, e adjust.Expectation) (string, error)
		want string // of the error in the log; "" for none
		took time.Duration
	}{
		"good": {read: func(_ int, e adjust.Expectation) (string, error) { return e.Field + ":\t" + e.Want, nil }},
		"settles": {read: func(n int, e adjust.Expectation) (string, error) {
			if n < 10 {
				return e.Field + ":\t0", nil
			}
			return e.Field + ":\t" + e.Want, nil
		}},
		"mismatch": {
			read: func(_ int, e adjust.Expectation) (string, error) { return e.Field + ":\t0", nil },
			want: `Seccomp: got "0", want "2"`, took: settleTime,
		},
		"ended": {read: func(int, adjust.Expectation) (string, error) { return "", fmt.Errorf("pid 7: %w", cgroup.ErrGone) }},
		// The file is missing and the process is there: that is no end.
		"missing": {read: func(int, adjust.Expectation) (string, error) { return "", fs.ErrNotExist }, want: "file does not exist", took: settleTime},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, byAnnotation)
				a := w.start()
				defer a.close()
				c := w.newContainer(1)
				a.plan1(c)
				c.create()
				a.starting1(c)
				reads := 0
				w.host.read = func(_ int, e adjust.Expectation) (string, error) {
					reads++
					return tc.read(reads, e)
				}
				c.exec()
				if err := a.Started(t.Context(), c.ID, c.pid()); err != nil {
					t.Fatal(err)
				}
				time.Sleep(settleTime - time.Millisecond)
				synctest.Wait()
				if tc.took > 0 {
					w.wantNoLog(logrus.ErrorLevel, "read-back failed")
				}
				time.Sleep(time.Millisecond)
				synctest.Wait()
				if tc.want != "" {
					w.wantLog(logrus.ErrorLevel, "read-back failed", tc.want)
				} else {
					w.wantNoLog(logrus.ErrorLevel, "read-back failed")
					w.wantLog(logrus.DebugLevel, "settings read back", "c1")
				}
				before := reads
				if err := a.Started(t.Context(), c.ID, c.pid()); err != nil { // as after a reconnection
					t.Fatal(err)
				}
				synctest.Wait()
				if reads != before {
					t.Errorf("read back again: %d reads more", reads-before)
				}
			})
		})
	}
}

// A start that comes after the end changes nothing, and a disk that hangs in the
// end holds the handler no longer than its deadline.
func TestStartingAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, byAnnotation)
		a := w.start()
		defer a.close()
		c := in("strict", w.newContainer(1, "mode.syslatch.dev/pod=record"))
		a.plan1(c)
		c.create()
		a.starting1(c)
		c.exec()
		goOn := w.hold("store.Add")
		c.exit()
		if err := a.Stopped(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := a.Starting(ctx, c.ID, c.pid())
		contains(t, err, "container c1", "earlier step", "hang")
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline's error", err)
		}
		var late error
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			late = a.Starting(context.Background(), c.ID, c.pid())
		}()
		synctest.Wait()
		close(goOn)
		<-ended
		contains(t, late, "stopped")
		synctest.Wait()
		w.clean() // no file is made anew
	})
}
