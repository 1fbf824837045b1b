// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/syslatch/syslatch/bpf"
)

// What a task in an awaited cgroup calls counts from the directory's making on,
// with no word to the recorder in between.
func TestAwaitedCgroup(t *testing.T) {
	r, parent := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h, err := r.Await("awaited", filterGate(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Await("awaited", filterGate(t)); !errors.Is(err, bpf.ErrTracked) {
		t.Errorf("second wait for the same name: %v, want ErrTracked", err)
	}
	mkdir(t, filepath.Join(parent.path, "another")) // is not
	cg := mkdir(t, filepath.Join(parent.path, "awaited"))
	p := start(t, &cg, "caller", script{Calls: steps(call(sysGetgid), filter, call(sysGetuid), exit)})
	p.wait()
	child := cg.child(t, "nested")
	p = start(t, &child, "caller", script{Calls: steps(filter, call(sysGetppid), exit)})
	p.wait()
	all, err := r.Instances()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || all[0].RootCgroup != cg.id || all[0].Handle != h {
		t.Errorf("instances %+v, want root cgroup %d", all, cg.id)
	}
	wantCalls(t, finish(t, r, h), x8664(sysGetuid, sysGetppid, sysExitGroup))
}

func TestAwaitEndsWithFinish(t *testing.T) {
	r, parent := open(t, pinDir(t), bpf.Options{}), newCgroup(t)
	h, err := r.Await("never", filterGate(t))
	if err != nil {
		t.Fatal(err)
	}
	s := finish(t, r, h)
	if s.RootCgroup != 0 || len(s.Calls) != 0 {
		t.Errorf("got %+v of a cgroup that was never made", s)
	}
	// Another instance, so that the programs are attached.
	again, err := r.Await("other", filterGate(t))
	if err != nil {
		t.Fatal(err)
	}
	cg := mkdir(t, filepath.Join(parent.path, "never"))
	p := start(t, &cg, "caller", script{Calls: steps(filter, call(sysGetuid), exit)})
	p.wait()
	wantCalls(t, finish(t, r, again))
}

func TestAwaitRefusesWhatIsNoName(t *testing.T) {
	r := open(t, pinDir(t), bpf.Options{})
	for _, name := range []string{"", "a/b", "a\x00b", strings.Repeat("x", bpf.MaxName+1)} {
		if h, err := r.Await(name, bpf.TrackOptions{Gate: bpf.GateOpen}); err == nil {
			t.Errorf("%.20q: accepted as %s", name, h)
		}
	}
	h, err := r.Await(strings.Repeat("x", bpf.MaxName), bpf.TrackOptions{Gate: bpf.GateOpen})
	if err != nil {
		t.Fatalf("the longest name: %v", err)
	}
	finish(t, r, h)
}
