// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// What BPF programs deny to a container by phase begins when its cgroup is known, before
// its program runs; what the runtime does up to the execve is let alone, and so is what
// it does for an exec. In this order, with what a kill right after a step leaves:
//
//	plan                  → the execve of its program is denied: see ready
//	journal: the tag      → the same
//	bpf Add, under it     → denied, and found again by the tag
//	…                     each switch: the journal's phase, then the programs'; a kill
//	                        between leaves the earlier one until the next process
//	bpf Remove            → nothing is denied; the container's cgroup is empty
//	remove the journal's  → nothing
//
// What no journal knows is removed when its cgroup is empty.

// programs are the BPF programs of phases.
type programs struct {
	a        *Agent
	enforcer *bpf.Enforcer // nil: there are none here
	why      error         // then
}

// programPins is where they are pinned.
func programPins(p *policy.File) string { return p.BPFFS + "-phases" }

// openPrograms adds to a host what its kernel's programs can do.
func openPrograms(a *Agent, h *cgroup.Hierarchy, host *profiles.PhaseHost) programs {
	p := programs{a: a}
	p.why = errors.New("there is no cgroup v2")
	if h != nil {
		p.why = h.RequireV2()
	}
	if p.why == nil {
		p.enforcer, p.why = bpf.OpenEnforcer(programPins(a.policy), bpf.EnforcerOptions{})
	}
	if p.why != nil {
		a.log.WithError(p.why).Warn("no BPF programs for phases: paths, addresses and what was opened in earlier phases are not enforced ('syslatch profile phases' tells what that means)")
		return p
	}
	can(host, p.enforcer)
	for section, err := range p.enforcer.Missing() {
		a.log.WithError(err).WithField("program", section).Debug("no such BPF program for phases")
	}
	return p
}

func (p *programs) Close() error {
	if p.enforcer == nil {
		return nil
	}
	return p.enforcer.Close()
}

// guarded says whether programs have a part in an instance's phases.
func (in *instance) guarded() bool { return in.guard.plan != nil }

// ready keeps a container's program from being executed without the programs: the daemon
// was dead when it was started, or the runtime went on after an error.
func (p *programs) ready(in *instance) error {
	// That the runtime says it runs is no reason: it may say so before the execve.
	if !in.guarded() || in.guard.holds() || in.kept.began() || in.Decision.Failure == policy.FailureRuntimeDefault {
		return nil
	}
	return errors.New("BPF programs for phases don't look at it: syslatchd was not there when it was started, or refused it (create it anew)")
}

// find gives an instance, of which an earlier process left a tag, its programs again.
func (p *programs) find(in *instance, plan *profiles.PhasePlan, now *phaseNow) error {
	if len(plan.Hooks) == 0 {
		return nil
	}
	in.guard.plan, in.guard.counted = plan, now.Counted
	if now.Tag == 0 {
		if in.Ran || now.Began {
			return errors.New("it was started without them (create the container anew)")
		}
		return nil // it has none yet
	}
	if p.enforcer == nil {
		return p.why
	}
	all, err := p.enforcer.Instances()
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Tag == now.Tag {
			in.guard.mu.Lock()
			in.guard.enforcer, in.guard.handle = p.enforcer, e.PhaseHandle
			in.guard.mu.Unlock()
			return nil
		}
	}
	return errors.New("the kernel has no record of it (were the pins removed? create the container anew)")
}

// add puts a container under its plan's hooks: from the execve of its program on, if that
// has not run yet. The instance is taken.
func (p *programs) add(in *instance, pid int) (err error) {
	if !in.guarded() || in.guard.holds() {
		return nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("BPF programs for phases: %w", err)
		}
		in.supervised.Unhooked(err)
	}()
	if p.enforcer == nil {
		return p.why
	}
	opts := bpf.EnforceOptions{}
	if in.Ran {
		var ns unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/mnt", pid), &ns); err != nil {
			return err
		}
		opts.MountNS = uint32(ns.Ino)
	} else {
		if opts, err = startingOf(pid); err != nil {
			return err
		}
		defer opts.Starting.Close()
	}
	// The process has been in the cgroup since before the pidfd was opened: only an end
	// could make it another, and then the container doesn't start.
	path, err := p.a.phases.kernel.Path(in.CgroupID)
	if err != nil {
		return err
	}
	opts.Entered, opts.Partial = true, in.Decision.Phases.Gaps == policy.GapsReport
	opts.Tag = newTag()
	if err := p.a.phases.keepPhase(in, func(now *phaseNow) { now.Tag = opts.Tag }); err != nil {
		return err
	}
	if err := in.guard.add(p.enforcer, in.CgroupID, path, opts); err != nil {
		return err
	}
	if in.Ran {
		if err := in.guard.addBelow(path); err != nil {
			return err
		}
	}
	return p.own(in)
}

// own lets the container speak to its own socket in every phase, once it is connected.
func (p *programs) own(in *instance) error {
	if in.inside == nil {
		return nil
	}
	return in.guard.own(filepath.Join(insideOf(p.a.policy, in), insideSocket))
}

// remove ends what is denied to a container that has ended. Where any of its processes is
// left when ctx ends it goes on, and sweep removes it.
func (p *programs) remove(ctx context.Context, in *instance) {
	if !in.guard.holds() {
		return
	}
	err := p.a.host.Empty(ctx, in.CgroupID)
	if err == nil {
		err = in.guard.remove()
	}
	if err != nil {
		p.a.instanceLog(in).WithError(err).Warn("BPF programs go on to look at what is left of the container")
	}
}

// sweep removes what no instance is of, if nothing is left of it, and tells of the rest
// at a start.
func (p *programs) sweep(start bool) {
	if p.enforcer == nil {
		return
	}
	all, err := p.enforcer.Instances()
	if err != nil {
		p.a.log.WithError(err).Error("BPF programs for phases are not looked after")
		return
	}
	known := map[bpf.PhaseHandle]bool{}
	for _, in := range append(p.a.all(), p.a.phases.allHooked()...) {
		in.guard.mu.Lock()
		if in.guard.enforcer != nil {
			known[in.guard.handle] = true
		}
		in.guard.mu.Unlock()
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	for _, e := range all {
		if known[e.PhaseHandle] {
			continue
		}
		log := p.a.log.WithField("cgroup_id", e.Cgroup)
		switch err := p.a.host.Empty(now, e.Cgroup); {
		case err == nil:
			if err := p.enforcer.Remove(e.PhaseHandle); err != nil && !errors.Is(err, bpf.ErrUnknown) {
				log.WithError(err).Error("BPF programs for phases are not taken off a cgroup that is empty")
			}
		case start:
			log.WithField("bpffs", programPins(p.a.policy)).
				Warn("BPF programs look at a container that this journal doesn't know, by the phase that it was in: they are left alone (they are another process's that shares the directory; if there is none, stop syslatchd and remove the directory)")
		}
	}
}

// countEvery is how often denials are looked for.
const countEvery = time.Second

// watch tells of denials, and of programs that somebody took away.
func (p *programs) watch() {
	if p.enforcer == nil {
		return
	}
	tick := time.NewTicker(countEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.a.stopped.Done():
			return
		case <-tick.C:
			for _, in := range append(p.a.all(), p.a.phases.allHooked()...) {
				p.count(in)
			}
		}
	}
}

// count tells of what was denied to an instance since it was last called. What is told is
// in the journal behind that: a kill makes it be told again, and not lost.
func (p *programs) count(in *instance) {
	err := in.guard.tell(in.supervised, func(counted map[string]uint64) {
		if err := p.a.phases.keepPhase(in, func(now *phaseNow) { now.Counted = counted }); err != nil {
			p.a.instanceLog(in).WithError(err).Warn("denials by BPF programs may be told again by the next syslatchd")
		}
	})
	if err != nil {
		in.supervised.Unhooked(fmt.Errorf("%w (create the container anew)", err))
	}
}

// removeIdle is for a policy file that has no phases any more: programs that look at
// nothing are not to be in the way.
func removeIdle(a *Agent) {
	dir := programPins(a.policy)
	if _, err := os.Stat(dir); err != nil {
		return
	}
	e, err := bpf.OpenEnforcer(dir, bpf.EnforcerOptions{})
	if err != nil {
		a.log.WithError(err).Warn("what an earlier syslatchd has left of BPF programs for phases can't be looked at")
		return
	}
	defer e.Close()
	p := programs{a: a, enforcer: e}
	p.sweep(true)
	if all, err := e.Instances(); err == nil && len(all) == 0 {
		if err := bpf.RemoveEnforcer(dir); err != nil {
			a.log.WithError(err).Warn("pins of BPF programs for phases are left")
		}
	}
}
