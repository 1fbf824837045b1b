// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/policy"
)

const (
	// planGrace is how long the kernel waits for a planned container's cgroup. A
	// creation can fail after us, and not every failure is told; meanwhile the
	// programs are attached, at the cost of every task of the host. One that is
	// made later all the same is attached to late.
	planGrace = 2 * time.Minute
	// forgetAfter is how long a planned container is remembered that nobody
	// started and nobody removed.
	forgetAfter = 24 * time.Hour
	sweepEvery  = planGrace / 4
)

// pickUp takes over what an earlier process of this agent left in the journal.
func (a *Agent) pickUp() error {
	known, problems := a.journal.load()
	for _, err := range problems {
		a.log.WithError(err).Error("instance not picked up")
	}
	slots, err := a.slots()
	if err != nil {
		return err
	}
	byTag := map[uint64]bpf.Handle{}
	for h, s := range slots {
		byTag[s.Tag] = h
	}
	a.mu.Lock()
	for _, in := range known {
		in.prepare().pickedUp = true
		a.instances[in.Container.ID] = in
		if h, ok := byTag[in.Tag]; ok && in.Tag != 0 {
			in.handle = &h
			a.byHandle[h] = in
		}
		if in.Kept || in.Recording != nil && !in.Recording.Ended.IsZero() {
			a.end(in) // it had begun
		}
	}
	var strange []bpf.Instance
	for h, s := range slots {
		if a.byHandle[h] == nil && !a.hooks.owns(s.Tag) {
			strange = append(strange, s)
		}
	}
	a.mu.Unlock()
	a.sweepHooked()
	held, err := a.phases.held()
	if err != nil {
		return err
	}
	for _, in := range known {
		a.instanceLog(in).Info("instance picked up")
		a.pickUpPhases(in, held[in.Container.ID])
		delete(held, in.Container.ID)
	}
	a.pickUpHooked(held)
	for _, files := range held {
		a.phases.release(files)
	}
	if a.phases != nil {
		a.phases.programs.sweep(true)
	}
	for _, s := range strange {
		a.log.WithFields(logrus.Fields{"cgroup_id": s.RootCgroup, "slot": s.Handle, "bpffs": a.policy.BPFFS}).
			Warn("the kernel records something that this journal doesn't know: it is left alone (it is another process's that shares the bpffs directory; if there is none, stop syslatchd and remove that directory)")
	}
	return nil
}

// Synchronize brings the agent in line with the containers that exist: ends
// those that ended unseen, and reports those that run without it.
func (a *Agent) Synchronize(_ context.Context, running []policy.Container) error {
	slots, err := a.slots()
	if err != nil {
		return err
	}
	listed := map[string]bool{}
	for _, c := range running {
		listed[c.ID] = true
	}
	known, ended := a.all(), 0
	for _, in := range known {
		if listed[in.Container.ID] {
			a.change(func() { in.unlisted = false })
			continue
		}
		if a.hasEnded(in) {
			continue
		}
		a.change(func() { in.unlisted = true })
		if a.overUnlisted(in, slots) {
			ended++
		}
	}
	for _, c := range running {
		if a.instance(c.ID) != nil {
			continue
		}
		if d, err := a.policy.Decide(c); err != nil || d.Mode != policy.ModeOff {
			a.log.WithFields(logrus.Fields{"container": c.ID, "policy": d.Policy, "mode": d.Mode}).
				Error("container was created without syslatch: it is neither recorded nor confined until it is created anew")
		}
	}
	a.log.WithFields(logrus.Fields{"running": len(running), "known": len(known), "ended": ended}).Info("synchronized")
	return nil
}

// overUnlisted ends an instance that the runtime doesn't list, if it is over. A
// runtime may be another than before, or have lost its own state: then the
// container's processes go on, and so does their recording.
func (a *Agent) overUnlisted(in *instance, slots map[bpf.Handle]bpf.Instance) bool {
	a.mu.Lock()
	cgroupID := in.CgroupID
	if in.handle != nil && cgroupID == 0 {
		cgroupID = slots[*in.handle].RootCgroup
	}
	a.mu.Unlock()
	if cgroupID == 0 && time.Since(in.Planned) < planGrace {
		return false // it was planned a moment ago, and may not be listed yet
	}
	if cgroupID != 0 {
		now, cancel := context.WithCancel(context.Background())
		cancel()
		if err := a.host.Empty(now, cgroupID); err != nil {
			a.instanceLog(in).WithField("cgroup_id", cgroupID).Warn("the runtime doesn't list this container, but its processes run: its recording goes on until they end")
			return false
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.end(in)
	return true
}

// sweep looks after instances of which no event comes.
func (a *Agent) sweep() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-a.stopped.Done():
			return
		case <-tick.C:
			if err := a.safely("look after instances", a.sweepOnce); err != nil {
				a.log.WithError(err).Error("instances not looked after; tried again later")
			}
			a.phases.checkHolder()
			a.phases.checkHooked()
			if a.phases != nil {
				a.phases.programs.sweep(false)
			}
			a.collectHooks()
		}
	}
}

func (a *Agent) sweepOnce() error {
	slots, err := a.slots()
	if err != nil {
		return err
	}
	var errs []error
	for _, in := range a.all() {
		a.mu.Lock()
		ended, unlisted, cgroupID, started := in.ended, in.unlisted, in.CgroupID, in.Ran || in.Container.PID > 0
		var slot *bpf.Instance
		if in.handle != nil {
			if s, ok := slots[*in.handle]; ok {
				slot = &s
			}
		}
		a.mu.Unlock()
		age := time.Since(in.Planned)
		switch {
		case ended:
		case unlisted:
			a.overUnlisted(in, slots)
		case cgroupID != 0 || age < planGrace:
		case slot != nil && slot.RootCgroup != 0 && slot.Cgroups > 0:
			// Created, and waiting to be started.
		case slot != nil && slot.RootCgroup != 0, age > forgetAfter && !started:
			// Its cgroup was removed again, or it is not worth waiting for.
			a.change(func() { a.end(in) })
		case slot != nil:
			errs = append(errs, a.suspend(in))
		}
	}
	return errors.Join(errs...)
}

// suspend gives back the slot of a container that was planned and not made.
func (a *Agent) suspend(in *instance) error {
	if err := in.take(a.stopped); err != nil {
		return err
	}
	defer in.put()
	if in.CgroupID != 0 || a.hasEnded(in) {
		return nil
	}
	if err := a.drop(in); err != nil {
		return err
	}
	a.instanceLog(in).WithField("after", planGrace).Info("container not made yet: it is no longer waited for, and would be recorded from its start on only")
	return nil
}
