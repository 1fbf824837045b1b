// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/syslatch/syslatch/bpf"
)

// busyTime bounds the wait for another reader of the ring.
const busyTime = time.Second

// drainTime bounds the wait for an ended instance's last first-seen events.
const drainTime = 2 * time.Second

// collect moves first-seen events from the kernel's ring into the journal.
func (a *Agent) collect() {
	defer close(a.collected)
	var err error
	for deadline := time.Now().Add(busyTime); ; {
		err = a.recorder.Events(a.stopped, a.collectOne)
		if !errors.Is(err, bpf.ErrBusy) || time.Now().After(deadline) || a.stopped.Err() != nil {
			break
		}
		select { // a hook reads what is there, and goes
		case <-time.After(busyTime / 20):
		case <-a.stopped.Done():
		}
	}
	switch {
	case err == nil || a.stopped.Err() != nil:
	case errors.Is(err, bpf.ErrBusy):
		a.log.WithError(err).WithField("bpffs", a.policy.BPFFS).
			Error("first-seen events are not read, calls are counted (if another syslatchd shares the bpffs directory, give each its own)")
	default:
		a.log.WithError(err).Error("first-seen events are not read any more, calls are counted (restart syslatchd)")
	}
}

func (a *Agent) collectOne(e bpf.Event) {
	a.mu.Lock()
	in := a.byHandle[e.Handle]
	a.mu.Unlock()
	if in == nil {
		a.hooks.keepEvent(e) // or of an instance that has ended, or of another process's
		return
	}
	in.file.Lock()
	if in.forgotten {
		in.file.Unlock()
		return
	}
	err := a.journal.appendEvent(in.Container.ID, e)
	in.file.Unlock()
	if err != nil {
		// What is missing in the end stands in the recording.
		a.instanceLog(in).WithError(err).Error("first-seen event lost")
	}
	a.mu.Lock()
	in.events++
	if in.drained != nil && in.events >= in.awaited {
		close(in.drained)
		in.drained = nil
	}
	a.mu.Unlock()
}

// awaitEvents waits until as many first-seen events have come as the finished
// snapshot says there are, so that none is still in the ring.
func (a *Agent) awaitEvents(in *instance, snapshot *bpf.Snapshot) {
	want := eventCount(snapshot)
	if a.drain != nil {
		a.drain(in, want)
		return
	}
	a.mu.Lock()
	if in.events >= want {
		a.mu.Unlock()
		return
	}
	drained := make(chan struct{})
	in.awaited, in.drained = want, drained
	a.mu.Unlock()
	timeout := time.NewTimer(drainTime)
	defer timeout.Stop()
	select {
	case <-drained:
	case <-timeout.C:
	case <-a.collected:
	case <-a.stopped.Done():
	}
}

// eventCount is how many first-seen events a finished snapshot's calls made.
func eventCount(snapshot *bpf.Snapshot) int {
	n := len(snapshot.OddCalls) - int(snapshot.Losses.Events)
	for _, set := range snapshot.Calls {
		n += len(set.Numbers)
	}
	return n
}

// collector keeps one instance's first-seen events in memory.
type collector struct {
	stop    context.CancelFunc
	stopped chan struct{}

	mu     sync.Mutex
	events []bpf.Event
	more   chan struct{} // gets a token when events has grown
}

func collectEvents(recorder *bpf.Recorder, handle bpf.Handle) *collector {
	ctx, stop := context.WithCancel(context.Background())
	c := &collector{stop: stop, stopped: make(chan struct{}), more: make(chan struct{}, 1)}
	go func() {
		defer close(c.stopped)
		// An error leaves the events incomplete, which is not the calls' loss.
		_ = recorder.Events(ctx, func(e bpf.Event) {
			if e.Handle != handle {
				return
			}
			c.mu.Lock()
			c.events = append(c.events, e)
			c.mu.Unlock()
			select {
			case c.more <- struct{}{}:
			default:
			}
		})
	}()
	return c
}

// take waits for as many events as the snapshot has, and ends the collector.
func (c *collector) take(snapshot *bpf.Snapshot) []bpf.Event {
	want := eventCount(snapshot)
	timeout := time.NewTimer(drainTime)
	defer timeout.Stop()
	for waiting := true; waiting; {
		c.mu.Lock()
		waiting = len(c.events) < want
		c.mu.Unlock()
		if !waiting {
			break
		}
		select {
		case <-c.more:
		case <-timeout.C:
			waiting = false
		case <-c.stopped:
			waiting = false
		}
	}
	c.stop()
	<-c.stopped
	return c.events
}
