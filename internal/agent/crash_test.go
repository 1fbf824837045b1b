// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/profiles"
)

// The daemon is killed before each step of a container's life: of the kernel, the
// journal, the store. Afterwards nothing of it changes anything, as after kill -9;
// a new one starts, and the container's life goes on. However that was, the
// recording is published whole, or is kept with a loss that blocks it, or its
// program was never executed; and nothing is left over.
func TestKilledBeforeEachStep(t *testing.T) {
	for name, life := range map[string]life{
		"awaited": {},
		"late":    {late: true},
	} {
		t.Run(name, func(t *testing.T) {
			whole, lossy := 0, 0
			for n := 1; ; n++ {
				reached := false
				t.Run(fmt.Sprint(n), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						var published bool
						reached, published = life.killedAt(t, n)
						if published {
							whole++
						} else {
							lossy++
						}
					})
				})
				if !reached {
					break
				}
			}
			t.Logf("%d times published, %d times kept with a loss, or not run", whole, lossy)
			if life.late && whole > 0 || !life.late && whole < 5 {
				t.Errorf("published %d times", whole)
			}
		})
	}
}

type life struct {
	late bool // the cgroup gets another name than its path says
}

// killedAt reports whether the life had a step n, and whether a version came out.
func (l life) killedAt(t *testing.T, n int) (reached, published bool) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	killed := func(at int, _ string) error {
		if at >= n {
			reached = true
			return errKilled
		}
		return nil
	}
	w.each(killed)
	c := w.newContainer(1)
	// restart makes a new daemon if the old one was killed meanwhile, which then
	// hears of what is there.
	restart := func(present ...*container) {
		synctest.Wait()
		if !reached {
			return
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		w.each(nil)
		a = w.start()
		a.synchronize(present...)
		reached = false
	}
	wasKilled := false
	step := func(present []*container, event func()) {
		event()
		synctest.Wait()
		wasKilled = wasKilled || reached
		restart(present...)
	}
	planned := false
	step([]*container{c}, func() {
		p, err := a.Plan(t.Context(), c.Container, adjust.Runtime{})
		planned = p != nil && err == nil
	})
	if l.late {
		c.CgroupsPath = "/elsewhere/renamed"
	}
	if planned {
		c.create()
	} else {
		// containerd goes on without a plugin that dies: no filter, nothing counted.
		c.create()
		for _, s := range w.kernel.slots {
			clear(s.calls)
		}
	}
	step([]*container{c}, func() { _ = a.Starting(t.Context(), c.ID, c.pid()) })
	if planned {
		c.exec("mkdir")
	}
	step([]*container{c}, func() { _ = a.Started(t.Context(), c.ID, c.pid()) })
	if planned {
		w.kernel.call(c.cgroup, "rmdir")
	}
	c.exit()
	step(nil, func() { _ = a.Stopped(t.Context(), c.ID) })
	synctest.Wait()
	a.gone(c)
	a.close()
	w.clean()

	recs, files := w.recordings()
	if len(recs) > 1 || files != len(recs) {
		t.Errorf("%d recordings in %d files, want at most one", len(recs), files)
	}
	versions := w.versions()
	switch {
	case len(versions) > 0:
		if len(recs) != 1 || len(recs[0].Losses) != 0 {
			t.Errorf("published with %d recordings, the first of which is %+v", len(recs), recs[0])
		}
		for _, call := range []string{"futex", "openat", "execve", "mkdir", "rmdir"} {
			if !versions[0].Calls.Has(x8664, call) {
				t.Errorf("%s is missing in the version", call)
			}
		}
		if !planned {
			t.Error("a version of a container that was made without us")
		}
	case len(recs) == 1:
		if len(recs[0].Blocking()) == 0 {
			t.Errorf("not published, and no loss says why: %+v", recs[0])
		}
		if planned && !l.late && slices.ContainsFunc(recs[0].Losses, func(l profiles.Loss) bool { return l.Kind != profiles.LossFirstSeen }) {
			t.Errorf("losses %+v of a container that the kernel waited for", recs[0].Losses)
		}
	case planned:
		t.Error("the container ran, and nothing is kept of its recording")
	}
	return wasKilled, len(versions) > 0
}

// The same with errors instead of kills: each step fails once, and the daemon lives
// on. A container whose failure policy is deny is not made then.
func TestEachStepFailsOnce(t *testing.T) {
	for n := 1; ; n++ {
		failed := ""
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, byAnnotation)
				a := w.start()
				w.each(func(at int, step string) error {
					if at == n {
						failed = step
						return errors.New("this one fails")
					}
					return nil
				})
				c := in("strict", w.newContainer(1, "mode.syslatch.dev/pod=record"))
				_, err := a.Plan(t.Context(), c.Container, adjust.Runtime{})
				ran := false
				if err == nil {
					c.create()
					if err = a.Starting(t.Context(), c.ID, c.pid()); err == nil {
						ran = true
						c.exec("mkdir")
						if err := a.Started(t.Context(), c.ID, c.pid()); err != nil {
							t.Fatal(err)
						}
					}
					c.exit()
				}
				synctest.Wait()
				if err := a.Stopped(t.Context(), c.ID); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if in := a.instance(c.ID); in != nil { // the next attempt
					if err := a.endNow(t.Context(), in); err != nil {
						t.Fatal(err)
					}
				}
				a.close()
				w.clean()
				if v := w.versions(); (len(v) == 1 && v[0].Calls.Has(x8664, "mkdir")) != ran {
					t.Errorf("%s failed: versions %+v, ran %t", failed, v, ran)
				}
			})
		})
		if failed == "" {
			break
		}
	}
}
