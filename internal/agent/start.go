// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// Starting learns the container's cgroup while its init waits in the runtime, and
// reads back the limits that are in force by now.
func (a *Agent) Starting(ctx context.Context, id string, pid int) error {
	in := a.instance(id)
	if in == nil {
		return nil
	}
	err := a.starting(ctx, in, pid)
	if err != nil && in.Decision.Failure == policy.FailureRuntimeDefault {
		a.instanceLog(in).WithError(err).Error("container runs unrecorded or unverified: its failure policy is runtime-default")
		return nil
	}
	return err
}

func (a *Agent) starting(ctx context.Context, in *instance, pid int) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer in.put()
	if a.hasEnded(in) {
		return errStopped
	}
	if pid <= 0 {
		return a.startingUnseen(in)
	}
	return a.attachAndBegin(in, pid)
}

// attachAndBegin reads the policy's limits back before a phase's are set.
func (a *Agent) attachAndBegin(in *instance, pid int) error {
	if err := a.attach(in, pid); err != nil {
		a.phases.unattached(in, err)
		return err
	}
	return errors.Join(a.verifyCreated(in, pid), a.phases.begin(in))
}

// startingUnseen is for a start of which the runtime doesn't tell the pid, as
// containerd 2.4.2 where it can't ask its shim in time. What is injected is in the
// spec, and a cgroup that was awaited is being recorded: Started sees to the rest.
func (a *Agent) startingUnseen(in *instance) error {
	if in.guarded() {
		return errors.New("the runtime doesn't tell the container's pid: BPF programs can't enforce its phases (create it again)")
	}
	if in.Record {
		slot, err := a.slot(in)
		if err != nil {
			return err
		}
		if slot == nil || slot.RootCgroup == 0 {
			return errors.New("the runtime doesn't tell the container's pid, and its cgroup was not awaited: it can't be recorded (create it again)")
		}
	}
	a.instanceLog(in).Warn("the runtime doesn't tell the container's pid yet: limits are read back once it runs")
	return nil
}

// attach notes an instance's cgroup, and sees to it that it is recorded. The
// instance is taken.
//
// What was not awaited, or was made under another name than its path said, is
// recorded from now on; what was called up to now is lost. The loss is in the
// journal before the kernel is told: with Track's slot alone, a kill would leave
// a recording that looks whole.
func (a *Agent) attach(in *instance, pid int) error {
	cgroupID, err := a.host.CgroupOf(pid)
	if errors.Is(err, cgroup.ErrNoV2) && !in.Record {
		err = nil // enforcing needs no id
	}
	if err != nil {
		return err
	}
	late := ""
	if in.Record {
		if a.recorder == nil {
			return fmt.Errorf("record container %s: %w", in.Container.Name, a.recorderErr)
		}
		slot, err := a.slot(in)
		switch path := in.Container.CgroupsPath; {
		case err != nil:
			return err
		case slot == nil:
			late = "nothing waited for the container's cgroup any more when it was made"
		case slot.RootCgroup != cgroupID:
			late = fmt.Sprintf("the container's cgroup was not made under the name %q that its path %q has", cgroupName(path), path)
		}
	}
	before := in.Recording
	a.change(func() {
		in.CgroupID = cgroupID
		in.Container.PID = pid
		if late != "" {
			rec := *before
			rec.Losses = append(slices.Clone(rec.Losses), profiles.Loss{Kind: profiles.LossAttachedLate, Count: 1, Detail: late})
			in.Recording = &rec
		}
	})
	err = a.journal.save(in)
	if err == nil {
		err = a.phases.attached(in, pid)
	}
	if err == nil && late != "" {
		err = a.trackLate(in)
	}
	if err != nil {
		// As if nothing was known: if the container runs all the same, Started
		// tries again.
		a.change(func() { in.CgroupID, in.Recording = 0, before })
	}
	return err
}

func (a *Agent) trackLate(in *instance) error {
	if err := a.drop(in); err != nil {
		return err
	}
	handle, err := a.recorder.Track(in.CgroupID, in.trackOptions())
	if err != nil {
		return fmt.Errorf("record container %s: %w%s", in.Container.Name, err, a.whyFull(err))
	}
	a.change(func() {
		in.handle = &handle
		a.byHandle[handle] = in
	})
	if in.marked() {
		return a.mark(in) // it may have been switched meanwhile
	}
	return nil
}

// Started notes that the container's program runs, and reads back what was
// injected. It is also how the agent learns of a start that it missed.
func (a *Agent) Started(_ context.Context, id string, pid int) error {
	a.mu.Lock()
	in := a.instances[id]
	if in == nil || in.verified {
		a.mu.Unlock()
		return nil
	}
	in.verified = true
	a.mu.Unlock()
	a.spawn("read settings back", func() {
		log := a.instanceLog(in)
		if err := a.started(in, pid); err != nil {
			log.WithError(err).Error("container runs unrecorded or unverified")
		}
		if err := a.verifyRunning(a.stopped, in, pid); err != nil {
			log.WithError(err).Error("read-back failed")
		} else {
			log.WithField("settings", len(in.Expect)).Debug("settings read back")
		}
	})
	return nil
}

func (a *Agent) started(in *instance, pid int) error {
	if err := in.take(a.stopped); err != nil {
		return err
	}
	defer in.put()
	if in.gone {
		return nil // it was quick
	}
	a.change(func() { in.Ran = true })
	err := a.journal.save(in)
	if in.CgroupID != 0 || a.hasEnded(in) {
		return err
	}
	return errors.Join(err, a.attachAndBegin(in, pid))
}
