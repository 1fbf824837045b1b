// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"slices"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/monitor"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// denials sees what filters deny by themselves, once there is an instance whose filters
// log that.
type denials struct {
	mu    sync.Mutex
	tried bool             // guarded by mu
	seen  *monitor.Denials // guarded by mu; nil before, and where there is no way
}

// logDenials says whether a policy has filters log what they deny.
func logDenials(p *policy.File) bool {
	return slices.ContainsFunc(p.Policies, func(p policy.Policy) bool { return p.LogDenials })
}

// seeDenials begins to, at the first call; nil if there is no way.
func (p *phasing) seeDenials() *monitor.Denials {
	d := &p.denials
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.tried {
		return d.seen
	}
	d.tried = true
	seen, err := monitor.OpenDenials(p.a.log)
	if err != nil {
		p.a.log.WithError(err).Warn("what the filters of phases deny by themselves is not told")
		return nil
	}
	p.a.log.WithField("by", seen.Mechanism()).Info("what the filters of phases deny by themselves is told")
	d.seen = seen
	p.a.spawn("tell of denials by filters", func() { seen.Run(p.a.stopped) })
	return seen
}

func (d *denials) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.seen.Close()
}

// filtered has an instance told what its filters deny by themselves. What is before mu is
// set before the first call.
type filtered struct {
	seen *monitor.Denials // nil: they don't log it, or nobody sees that
	plan *profiles.PhasePlan
	log  *logrus.Entry

	mu     sync.Mutex
	cgroup uint64 // guarded by mu; 0 before it is known
	phase  string // guarded by mu: what was said last
}

// mark is phase.Instance's.
func (f *filtered) mark(phase string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.phase = phase
	if f.cgroup != 0 {
		f.failed(f.seen.Tag(f.cgroup, f.number(phase)))
	}
}

// number is a phase's, as a tag.
func (f *filtered) number(phase string) uint32 { return uint32(slices.Index(f.plan.Phases, phase)) }

func (f *filtered) failed(err error) {
	if err != nil {
		f.log.WithError(err).Error("what the container's filters deny by themselves is not told")
	}
}

// begin is called when the instance's cgroup is known.
func (f *filtered) begin(cgroup uint64, sv *phase.Supervised) {
	if f.seen == nil || cgroup == 0 || sv == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cgroup == cgroup {
		return
	}
	f.cgroup = cgroup
	f.failed(f.seen.Watch(cgroup, f.number(f.phase), func(d monitor.Denial) {
		sv.Filtered(f.plan.Phases[d.Tag], d.ABI, d.Number, d.PID, d.Count)
	}))
}

// end tells of the last.
func (f *filtered) end() {
	f.mu.Lock()
	cgroup := f.cgroup
	f.cgroup = 0
	f.mu.Unlock()
	if cgroup != 0 {
		f.failed(f.seen.Forget(cgroup))
	}
}

// openRunDenials is for a command; nil if its policy doesn't want it.
func openRunDenials(p *policy.Policy, log *logrus.Entry) (*monitor.Denials, error) {
	if !p.LogDenials {
		return nil, nil
	}
	return monitor.OpenDenials(log)
}

// during runs work until the function that it returns is called, which waits for its end.
func during(work func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		work(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}
