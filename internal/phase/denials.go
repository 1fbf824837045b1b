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

// denials makes events of denied calls: one at once for the first of its kind in a
// phase, and one a second for those that follow.
type denials struct {
	total  atomic.Uint64
	report func(phase string, call profiles.Call, pid int, count uint64)

	mu    sync.Mutex
	since map[denied]uint64 // guarded by mu: denied since they were reported
	timer *time.Timer       // guarded by mu: nil while nothing is to report
}

type denied struct {
	phase string
	abi   profiles.ABI
	nr    uint32
}

const (
	reportEvery = time.Second
	// mostDenied bounds the kinds between two reports; a filter can't ask about more
	// calls than there are.
	mostDenied = 4096
)

// add is on the way of every denied call.
func (d *denials) add(n *seccomp.Notification, phase string) {
	d.total.Add(1)
	key := denied{phase, n.ABI, n.Number}
	d.mu.Lock()
	if d.since == nil {
		d.since = map[denied]uint64{}
	}
	if d.timer == nil {
		d.timer = time.AfterFunc(reportEvery, d.flush)
	}
	count, known := d.since[key]
	switch {
	case known:
		d.since[key] = count + 1
	case len(d.since) < mostDenied:
		d.since[key] = 0
	}
	d.mu.Unlock()
	if !known {
		d.report(phase, profiles.Call{ABI: n.ABI, Number: n.Number}, n.PID, 1)
	}
}

// flush reports what came after the first.
func (d *denials) flush() {
	d.mu.Lock()
	since := d.since
	if d.timer != nil {
		d.timer.Stop()
	}
	d.since, d.timer = nil, nil
	d.mu.Unlock()
	for key, count := range since {
		if count > 0 {
			d.report(key.phase, profiles.Call{ABI: key.abi, Number: key.nr}, 0, count)
		}
	}
}

func (sv *Supervised) reportDenied(phase string, call profiles.Call, pid int, count uint64) {
	name, ok := seccomp.Name(call.ABI, call.Number)
	if !ok {
		name = fmt.Sprint(call.Number)
	}
	sv.emit(Event{Kind: Denied, From: phase, Call: fmt.Sprintf("%s %s", call.ABI, name), PID: pid, Count: count})
}
