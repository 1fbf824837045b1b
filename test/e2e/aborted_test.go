// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"strings"
	"testing"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/test/harness"
)

// A container whose program can't be executed has made calls under its filter by
// then, the runtime's. They must not become a version: nothing could run under it.
func TestFailedStartMakesNoVersion(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	broken := harness.ContainerOptions{Command: []string{"/no/such/program"}}
	if onCRIO() {
		// The creation fails, in runc, and no event tells plugins.
		if why := createError(t, e, mode("record"), broken); !strings.Contains(why, "no such file") {
			t.Error(why)
		}
		e.run(mode("record"), sh("true"))
		if v := e.waitVersion(d, busyboxWorkload, 1); !v.Manifest.Calls.Has(x8664, "execve") {
			t.Errorf("version 1 without execve: %v", v.Manifest.Calls)
		}
		return
	}
	c := mustCreate(t, e, mode("record"), broken)
	if err := c.Start(e.ctx); err == nil {
		t.Fatal("the start of nothing did not fail")
	}
	if err := c.Remove(e.ctx); err != nil {
		t.Fatal(err)
	}
	d.waitLog("container ended", c.ID)
	if v, err := e.store().Versions(busyboxWorkload); !errors.Is(err, store.ErrNoVersion) {
		t.Errorf("got versions %+v, %v, want none", v, err)
	}
	r, err := bpf.Open(e.bpffs, bpf.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if st, err := r.Stats(); err != nil || st.Instances+st.Finished != 0 || st.Attached {
		t.Errorf("stats %+v, %v: want nothing tracked or attached", st, err)
	}
	e.run(mode("record"), sh("true"))
	if v := e.waitVersion(d, busyboxWorkload, 1); !v.Manifest.Calls.Has(x8664, "execve") {
		t.Errorf("version 1 without execve: %v", v.Manifest.Calls)
	}
}
