// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
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
	p.a.phases = p
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
		in := &instance{CgroupID: tc.in, Phases: &instancePhases{}, Container: policy.Container{ID: "c1"}}
		p.a.instances = map[string]*instance{"c1": in}
		if err := p.belongs(in, pid); (err == nil) != tc.want {
			t.Errorf("%s: %v", tc.name, err)
		}
		if id, err := p.a.InstanceOf(pid); err != nil || (id == "c1") != tc.want {
			t.Errorf("%s: instance %q, %v", tc.name, id, err)
		}
		stop()
		if err := p.belongs(in, pid); err == nil {
			t.Errorf("%s, ended: let in", tc.name)
		}
		if id, err := p.a.InstanceOf(pid); err == nil {
			t.Errorf("%s, ended: instance %q", tc.name, id)
		}
	}
	if err := p.belongs(&instance{CgroupID: g.ID()}, os.Getpid()); err == nil {
		t.Errorf("this process passes for one of %s", filepath.Base(g.Path()))
	}
}
