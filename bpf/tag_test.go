// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"testing"

	"github.com/syslatch/syslatch/bpf"
)

// A process that was killed before it wrote down its handles finds its instances
// by their tags.
func TestTagsOutliveTheProcess(t *testing.T) {
	dir, cg := pinDir(t), newCgroup(t)
	r := open(t, dir, bpf.Options{})
	tracked := track(t, r, cg, bpf.TrackOptions{Gate: bpf.GateOpen, Tag: 1})
	awaited, err := r.Await("tagged", bpf.TrackOptions{Gate: bpf.GateOpen, Tag: 1<<64 - 1})
	if err != nil {
		t.Fatal(err)
	}
	again := open(t, dir, bpf.Options{})
	tags := func() map[uint64]bpf.Handle {
		t.Helper()
		all, err := again.Instances()
		if err != nil {
			t.Fatal(err)
		}
		out := map[uint64]bpf.Handle{}
		for _, i := range all {
			out[i.Tag] = i.Handle
		}
		return out
	}
	if got := tags(); len(got) != 2 || got[1] != tracked || got[1<<64-1] != awaited {
		t.Errorf("tags %v, want %v and %v", got, tracked, awaited)
	}
	finish(t, again, tracked)
	reused := track(t, again, cg, bpf.TrackOptions{Gate: bpf.GateOpen})
	if got := tags(); len(got) != 2 || got[0] != reused || reused.Slot != tracked.Slot {
		t.Errorf("tags %v after %v was used again without one as %v", got, tracked, reused)
	}
	finish(t, again, reused)
	finish(t, again, awaited)
}
