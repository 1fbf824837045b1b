// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

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
	filtered  int                // guarded by mu: of pending, those of filters
	reporting bool               // guarded by mu: a goroutine does
	closed    bool               // guarded by mu: nothing is added any more
	stop      chan struct{}      // closed by flush
	done      sync.WaitGroup     // the goroutine
}

type denied struct {
	phase  string
	abi    profiles.ABI // empty: of several calls, see mostFiltered
	nr     uint32
	filter bool // by a filter itself
}

type denial struct {
	pid   int // of the first
	count uint64
}

const (
	reportEvery = time.Second
	// mostDenied bounds the kinds between two reports that the supervisor denied; a filter
	// can't ask about more calls than there are. A filter denies whatever a task thinks of:
	// what is more than mostFiltered kinds is one.
	mostDenied   = 4096
	mostFiltered = 64
)

// add is on the way of every denied call that the supervisor is asked about.
func (d *denials) add(key denied, pid int, count uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	d.total.Add(count)
	if key.filter && d.pending[key] == nil {
		if d.filtered++; d.filtered > mostFiltered {
			key.abi, key.nr = "", 0
		}
	}
	if x := d.pending[key]; x != nil {
		x.count += count
		return
	}
	if d.pending == nil {
		d.pending = map[denied]*denial{}
	}
	if len(d.pending) < mostDenied+2*mostFiltered {
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
	d.pending, d.filtered = nil, 0
	d.mu.Unlock()
	for key, x := range pending {
		d.report(key.phase, profiles.Call{ABI: key.abi, Number: key.nr}, x.pid, x.count)
	}
	return len(pending) > 0
}

// flush reports the rest; nothing is added any more.
func (d *denials) flush() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	close(d.stop)
	d.done.Wait()
	d.take()
}

// otherCalls are what filters denied beside what is told of each.
const otherCalls = "others"

func (sv *Supervised) reportDenied(phase string, call profiles.Call, pid int, count uint64) {
	what := otherCalls
	if call.ABI != "" {
		name, ok := seccomp.Name(call.ABI, call.Number)
		if !ok {
			name = fmt.Sprint(call.Number)
		}
		what = fmt.Sprintf("%s %s", call.ABI, name)
	}
	sv.emit(Event{Kind: Denied, From: phase, Call: what, PID: pid, Count: count})
}

// Filtered tells of calls that the instance's filters denied by themselves in a phase.
func (sv *Supervised) Filtered(phase string, abi profiles.ABI, number uint32, pid int, count uint64) {
	if name, ok := seccomp.Name(abi, number); ok && sv.in.Plan.FallsBack(name) {
		return
	}
	sv.denials.add(denied{phase, abi, number, true}, pid, count)
}

// Denied tells of what one of the kernel's programs denied in a phase.
func (sv *Supervised) Denied(phase, program string, count uint64) {
	sv.denials.total.Add(count)
	sv.emit(Event{Kind: Denied, From: phase, Call: program, Count: count})
}
