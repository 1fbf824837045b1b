// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/syslatch/syslatch/internal/cgroup"
)

func TestBelongs(t *testing.T) {
	g, other := newGroup(t), newGroup(t)
	below, err := cgroup.NewIn(g.Path(), "below")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := below.Remove(); err != nil {
			t.Error(err)
		}
	})
	p := &phasing{a: &Agent{}, kernel: detect(t)}
	for _, tc := range []struct {
		name string
		in   uint64 // the instance's cgroup
		of   *cgroup.Group
		want bool
	}{
		{"its own", g.ID(), g, true},
		{"below", g.ID(), below, true},
		{"above", below.ID(), g, false},
		{"another's", g.ID(), other, false},
		{"of one that hasn't started", 0, g, false},
	} {
		pid, stop := occupy(t, tc.of)
		if err := p.belongs(&instance{CgroupID: tc.in}, pid); (err == nil) != tc.want {
			t.Errorf("%s: %v", tc.name, err)
		}
		stop()
		if err := p.belongs(&instance{CgroupID: tc.in}, pid); err == nil {
			t.Errorf("%s, ended: let in", tc.name)
		}
	}
	if err := p.belongs(&instance{CgroupID: g.ID()}, os.Getpid()); err == nil {
		t.Errorf("this process passes for one of %s", filepath.Base(g.Path()))
	}
}
