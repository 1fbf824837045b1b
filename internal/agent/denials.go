// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"slices"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/monitor"
	"github.com/syslatch/syslatch/internal/policy"
)

// denials tells instances of what their filters deny by themselves, once there is one
// whose filters log that.
type denials struct {
	mu    sync.Mutex
	tried bool             // guarded by mu
	seen  *monitor.Denials // guarded by mu; nil before, and where there is no way
	why   error            // guarded by mu: then
}

// logDenials says whether a policy has filters log what they deny.
func logDenials(p *policy.File) bool {
	return slices.ContainsFunc(p.Policies, func(p policy.Policy) bool { return p.LogDenials })
}

// seeDenials begins to look at denials, or says why there is no way to. Those of the time
// before are nobody's.
func (p *phasing) seeDenials() error {
	d := &p.denials
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.tried {
		return d.why
	}
	d.tried = true
	if d.seen, d.why = monitor.OpenDenials(p.a.log, p.denied); d.why != nil {
		p.a.log.WithError(d.why).Warn("what the filters of phases deny by themselves is not told")
		return d.why
	}
	p.a.log.WithField("by", d.seen.Mechanism()).Info("what the filters of phases deny by themselves is told")
	seen := d.seen
	p.a.spawn("tell of denials by filters", func() { seen.Watch(p.a.stopped) })
	return nil
}

// tellDenials tells of those up to now; last waits for what is on its way.
func (p *phasing) tellDenials(last bool) {
	switch seen := p.denials.get(); {
	case seen == nil:
	case last:
		seen.Flush()
	default:
		seen.Tell()
	}
}

func (d *denials) get() *monitor.Denials {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.seen
}

func (d *denials) Close() error {
	if seen := d.get(); seen != nil {
		return seen.Close()
	}
	return nil
}

// denied tells the instance whose cgroup it is, or is below. Others may have filters that
// log, too.
func (p *phasing) denied(d monitor.Denial) {
	owned := p.owned()
	in := owned[d.Cgroup]
	if in == nil {
		dir, err := p.kernel.Path(d.Cgroup)
		if err != nil {
			return // it ended, and was none of ours
		}
		id, err := aboveDir(p.kernel.Hierarchy, dir, func(id uint64) bool { return owned[id] != nil })
		if err != nil || id == 0 {
			return
		}
		in = owned[id]
	}
	if in.supervised != nil && !in.marked() {
		in.supervised.Filtered(d.ABI, d.Number, d.PID, d.Count, d.Time)
	}
}

// owned is the instances that have phases, by their cgroups.
func (p *phasing) owned() map[uint64]*instance {
	owned := map[uint64]*instance{}
	for _, in := range append(p.a.all(), p.allHooked()...) {
		if id := p.cgroupOf(in); id != 0 && in.Phases != nil {
			owned[id] = in
		}
	}
	return owned
}

// openRunDenials is for the command in a cgroup; nil if its policy doesn't want it.
func openRunDenials(p *policy.Policy, log *logrus.Entry, group *cgroup.Group, found func(monitor.Denial)) (*monitor.Denials, error) {
	if !p.LogDenials {
		return nil, nil
	}
	h, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	return monitor.OpenDenials(log, func(d monitor.Denial) {
		if d.Cgroup != group.ID() {
			dir, err := h.Path(d.Cgroup)
			if err != nil {
				return
			}
			if id, err := aboveDir(h, dir, func(id uint64) bool { return id == group.ID() }); err != nil || id == 0 {
				return
			}
		}
		found(d)
	})
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
