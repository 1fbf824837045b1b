// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/trace"
	"github.com/syslatch/syslatch/profiles"
)

// instance is what the agent knows of one container, from its plan to its end.
// It is kept as one JSON file in the journal, so that a daemon that is killed
// picks its containers up again; the system calls themselves are in the kernel.
//
// One step of an instance's life runs at a time, over its I/O: whoever took the
// instance. Fields that change are written with the instance taken and Agent.mu
// held, so that either will do for reading (see Agent.change).
type instance struct {
	Container policy.Container `json:"container"` // PID changes
	Decision  policy.Decision  `json:"decision"`
	Planned   time.Time        `json:"planned"`
	// Version is the profile version that was injected, 0 for none.
	Version int    `json:"version,omitempty"`
	Digest  string `json:"digest,omitempty"`
	Record  bool   `json:"record,omitempty"`
	// Recording is the recording's head, with the id that makes publishing it
	// twice harmless; nil if nothing is recorded. Its Ended and Losses change.
	Recording *profiles.Recording `json:"recording,omitempty"`
	// Tag is by what the kernel's slot is found again.
	Tag uint64 `json:"tag,omitempty"`
	// BaseFilters is how many seccomp filters the runtime runs under.
	BaseFilters int                  `json:"baseFilters,omitempty"`
	Gate        bpf.Gate             `json:"gate,omitempty"`
	Expect      []adjust.Expectation `json:"expect,omitempty"`
	// Injected is the digest of the seccomp profile that a hook put into the spec;
	// empty if it put none there.
	Injected string `json:"injected,omitempty"`
	// Phases are what the plan of the decision's phases is made of, nil if it has
	// none.
	Phases *instancePhases `json:"phases,omitempty"`
	// Trace is the file that the container's creator wants, nil for none.
	Trace *trace.Request `json:"trace,omitempty"`

	CgroupID uint64 `json:"cgroupID,omitempty"` // changes; 0 until the container starts
	Ran      bool   `json:"ran,omitempty"`      // changes; the runtime said that the program runs
	Kept     bool   `json:"kept,omitempty"`     // changes; what is to be kept of the recording is

	// Of this process only.
	busy     chan struct{} // holds a token while the instance is taken
	pickedUp bool          // from an earlier process
	handle   *bpf.Handle   // changes; nil if the kernel has no slot for it
	hooks    *Hooks        // in whose journal it is; nil for the agent's own
	barrier  barrier
	limits   limits
	kept     keptPhase
	guard    guard
	filtered filtered
	// supervised is set with the first supervisor's word; nil without phases.
	supervised *phase.Supervised
	marking    sync.Mutex // held while the recorder is told the phase
	inside     io.Closer  // changes; serves its own socket, nil if nothing does
	gone       bool       // changes; nothing is left of it, neither here nor in the journal

	// Of this process only; guarded by Agent.mu.
	ended    bool          // its end has begun
	attempt  chan struct{} // closed when the attempt to end that runs now is over; nil if none runs
	failed   error         // of the last attempt
	again    chan struct{} // gets a token to begin the next attempt now
	unlisted bool          // the runtime didn't list it, and its processes run
	verified bool          // its settings have been, or are being, read back
	events   int           // first-seen events that are in the journal
	awaited  int           // how many awaitEvents waits for
	drained  chan struct{} // closed when they are there

	// file guards the journal's file of first-seen events, and forgotten.
	file      sync.Mutex
	forgotten bool // that file is removed, and must not be made again
}

// prepare makes the parts that are not in the journal.
func (in *instance) prepare() *instance {
	in.busy = make(chan struct{}, 1)
	in.again = make(chan struct{}, 1)
	return in
}

// newTag is unique among all instances of all agents that share a kernel.
func newTag() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:])                      // never fails: crypto/rand aborts the program instead
	return binary.NativeEndian.Uint64(b[:]) | 1 // 0 is none
}

// take waits for the instance's turn.
func (in *instance) take(ctx context.Context) error {
	select {
	case in.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("container %s: an earlier step of its life has not ended (does a disk hang?): %w", in.Container.ID, ctx.Err())
	}
}

func (in *instance) put() { <-in.busy }

// change runs write with mu held.
func (a *Agent) change(write func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	write()
}

func (in *instance) trackOptions() bpf.TrackOptions {
	o := bpf.TrackOptions{Gate: in.Gate, BaseFilters: in.BaseFilters, Tag: in.Tag}
	if in.marked() {
		marksOf(in.Decision.Phases).begin(&o, in.phase(), !in.Ran)
	}
	return o
}

func (a *Agent) instance(id string) *instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.instances[id]
}

// all are the instances as they are now.
func (a *Agent) all() []*instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []*instance
	for _, in := range a.instances {
		out = append(out, in)
	}
	return out
}

func (a *Agent) instanceLog(in *instance) *logrus.Entry {
	return a.log.WithFields(logrus.Fields{
		"container": in.Container.ID, "name": in.Container.Name,
		"workload": in.Decision.Workload, "mode": in.Decision.Mode, "policy": in.Decision.Policy,
	})
}

// slots are the kernel's instances.
func (a *Agent) slots() (map[bpf.Handle]bpf.Instance, error) {
	slots := map[bpf.Handle]bpf.Instance{}
	if a.recorder == nil {
		return slots, nil
	}
	all, err := a.recorder.Instances()
	if err != nil {
		return nil, err
	}
	for _, i := range all {
		slots[i.Handle] = i
	}
	return slots, nil
}

// slot is the kernel's side of an instance that is taken, nil if there is none.
func (a *Agent) slot(in *instance) (*bpf.Instance, error) {
	if in.handle == nil {
		return nil, nil
	}
	slots, err := a.slots()
	if err != nil {
		return nil, err
	}
	if s, ok := slots[*in.handle]; ok {
		return &s, nil
	}
	return nil, nil
}

// drop gives a slot back whose recording nobody wants. The instance is taken.
func (a *Agent) drop(in *instance) error {
	if in.handle == nil {
		return nil
	}
	if _, err := a.recorder.Finish(*in.handle); err != nil && !isUnknown(err) {
		return err
	}
	return a.release(in)
}

// release gives back the slot of a finished instance that is taken.
func (a *Agent) release(in *instance) error {
	if in.handle == nil {
		return nil
	}
	if err := a.recorder.Release(*in.handle); err != nil && !isUnknown(err) {
		return err
	}
	a.change(func() {
		delete(a.byHandle, *in.handle)
		in.handle = nil
	})
	return nil
}
