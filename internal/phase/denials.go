// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// denials makes events of denied calls: the first of its kind in a phase at once, and
// those that follow once a second. Who reports is a goroutine of its own, one at a time:
// a log that hangs must not keep a call waiting.
type denials struct {
	total  atomic.Uint64
	report func(phase string, call profiles.Call, pid int, count uint64)

	mu        sync.Mutex
	pending   map[denied]*denial // guarded by mu: not reported yet
	reporting bool               // guarded by mu: a goroutine does
	stop      chan struct{}      // closed by flush
	done      sync.WaitGroup     // the goroutine
}

type denied struct {
	phase string
	abi   profiles.ABI
	nr    uint32
}

type denial struct {
	pid   int // of the first
	count uint64
}

const (
	reportEvery = time.Second
	// mostDenied bounds the kinds between two reports; a filter can't ask about more
	// calls than there are.
	mostDenied = 4096
)

// add is on the way of every denied call that the supervisor is asked about.
func (d *denials) add(key denied, pid int, count uint64) {
	d.total.Add(count)
	d.mu.Lock()
	defer d.mu.Unlock()
	if x := d.pending[key]; x != nil {
		x.count += count
		return
	}
	if d.pending == nil {
		d.pending = map[denied]*denial{}
	}
	if len(d.pending) < mostDenied {
		d.pending[key] = &denial{pid, count}
	}
	if !d.reporting {
		d.reporting = true
		d.done.Go(d.run)
	}
}

// run reports until nothing has come for a second.
func (d *denials) run() {
	for {
		if !d.take() {
			d.mu.Lock()
			if len(d.pending) == 0 {
				d.reporting = false
				d.mu.Unlock()
				return
			}
			d.mu.Unlock()
		}
		select {
		case <-d.stop:
		case <-time.After(reportEvery):
		}
	}
}

// take reports what is pending.
func (d *denials) take() bool {
	d.mu.Lock()
	pending := d.pending
	d.pending = nil
	d.mu.Unlock()
	for key, x := range pending {
		d.report(key.phase, profiles.Call{ABI: key.abi, Number: key.nr}, x.pid, x.count)
	}
	return len(pending) > 0
}

// flush reports the rest; nothing is added any more.
func (d *denials) flush() {
	close(d.stop)
	d.done.Wait()
	d.take()
}

func (sv *Supervised) reportDenied(phase string, call profiles.Call, pid int, count uint64) {
	name, ok := seccomp.Name(call.ABI, call.Number)
	if !ok {
		name = fmt.Sprint(call.Number)
	}
	sv.emit(Event{Kind: Denied, From: phase, Call: fmt.Sprintf("%s %s", call.ABI, name), PID: pid, Count: count})
}

// Filtered tells of calls that the instance's filters denied by themselves. The phase is the
// one of that time, as audit has it, to a tick of the kernel's; the present one if it is zero.
func (sv *Supervised) Filtered(abi profiles.ABI, number uint32, pid int, count uint64, at time.Time) {
	if name, ok := seccomp.Name(abi, number); ok && sv.in.Plan.FallsBack(name) {
		return
	}
	sv.mu.Lock()
	phase, ended := sv.status.Phase, sv.status.State == Ended
	if !at.IsZero() {
		for _, p := range slices.Backward(sv.past) {
			if !at.Before(p.until) {
				break
			}
			phase = p.phase
		}
	}
	sv.mu.Unlock()
	if !ended {
		sv.denials.add(denied{phase, abi, number}, pid, count)
	}
}

// past is an earlier phase.
type past struct {
	phase string
	until time.Time // by auditTime
}

// auditTime is by the clock of audit's records, which stands for up to 10 ms, and is written
// there in milliseconds.
func auditTime() time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
		return time.Now() // it is always there
	}
	return time.Unix(now.Unix()).Truncate(time.Millisecond)
}

// mostPast is how many are kept, for denials that are told late.
const mostPast = 32

// Denied tells of what one of the kernel's programs denied in a phase.
func (sv *Supervised) Denied(phase, program string, count uint64) {
	sv.denials.total.Add(count)
	sv.emit(Event{Kind: Denied, From: phase, Call: program, Count: count})
}
