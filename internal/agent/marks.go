// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// The phases of a container that is recorded are marks: the supervisor switches them as
// it does others, with the barrier and the journal, and in place of what enforces it
// tells the recorder where calls count from now on. What a runtime calls until the
// container's program is executed counts for profiles.StartPhase, if there are fewer
// phases than the recorder keeps, and else for the first.
//
// The journal comes first, so that after a kill the recorder may be behind it, in a
// switch that was not acknowledged: who goes on tells it the journal's phase, and runs
// the barrier again.

// marks are the names of phases by the recorder's numbers.
type marks []string

func marksOf(ps *policy.Phases) (m marks) {
	for i := range ps.Phases {
		m = append(m, ps.Phases[i].Name)
	}
	return m
}

func (m marks) number(name string) (uint8, error) {
	i := slices.Index(m, name)
	if i < 0 || i >= bpf.Phases {
		return 0, fmt.Errorf("phase %q has no place in the recording", name)
	}
	return uint8(i), nil
}

// names are for fill.
func (m marks) names() map[uint8]string {
	out := map[uint8]string{}
	for i, name := range m {
		out[uint8(i)] = name
	}
	if len(m) < bpf.Phases {
		out[uint8(len(m))] = profiles.StartPhase
	}
	return out
}

// begin has a recording begin in a phase. fresh: no program has been executed.
func (m marks) begin(o *bpf.TrackOptions, name string, fresh bool) {
	o.Phase, _ = m.number(name) // of the policy, which has 8 at most
	if fresh && len(m) < bpf.Phases {
		o.Start = new(uint8(len(m)))
	}
}

// marked says whether an instance's phases are marks.
func (in *instance) marked() bool { return in.Phases != nil && in.Phases.Record }

// phaseNames are those of an instance's recording.
func (in *instance) phaseNames() map[uint8]string {
	if !in.marked() {
		return map[uint8]string{0: profiles.DefaultPhase}
	}
	return marksOf(in.Decision.Phases).names()
}

// phase is the one that an instance is in, or begins in.
func (in *instance) phase() string {
	in.kept.mu.Lock()
	defer in.kept.mu.Unlock()
	if in.kept.now.Phase != "" {
		return in.kept.now.Phase
	}
	return in.Decision.Phase
}

// planMarks is for a container that is to be recorded under a policy with phases. It
// returns nil where nobody can switch them: then all counts for one.
func (a *Agent) planMarks(ctx context.Context, c policy.Container, d *policy.Decision, runtime adjust.Runtime) (*instancePhases, error) {
	log := a.log.WithField("container", c.ID)
	if a.compiler == nil || c.User != nil {
		log.Info("recorded as one phase: rootless containers have no others")
		return nil, nil
	}
	ip, _, err := a.compiler.compile(ctx, c, d, runtime)
	if errors.Is(err, errNoSupervisor) {
		log.WithError(err).Warn("recorded as one phase: nobody can switch the policy's")
		return nil, nil
	}
	return ip, err
}

// of has a recorded container's phases be marks: nothing of them is enforced.
func (ip *instancePhases) of(d *policy.Decision) {
	if d.Mode == policy.ModeRecord {
		ip.Record, ip.Host = true, profiles.PhaseHost{}
	}
}

// superviseMarks is supervise for an instance that is recorded.
func (p *phasing) superviseMarks(in *instance, is *compiled, now phaseNow) (*phase.Supervised, error) {
	in.kept.now = now
	in.barrier.note = p.a.journalOf(in).path(in.Container.ID, frozenSuffix)
	return p.supervisor.Add(phase.Instance{
		ID: in.Container.ID, Name: in.Container.Name, Workload: in.Decision.Workload, Policy: in.Decision.Policy,
		Set: is.set, Plan: is.plan, Tables: is.tables(), Initial: now.Phase, Generation: now.Generation, Record: true,
		Barrier: &in.barrier,
		Keep: func(name string, generation uint64) error {
			return p.keepPhase(in, func(now *phaseNow) { now.Phase, now.Generation = name, generation })
		},
		Hooks: func(string) error { return p.a.mark(in) },
	})
}

// mark tells the recorder the phase that an instance is in. One that is not tracked yet
// will be, in that phase.
func (a *Agent) mark(in *instance) error {
	in.marking.Lock()
	defer in.marking.Unlock()
	number, err := marksOf(in.Decision.Phases).number(in.phase())
	if err != nil {
		return err
	}
	slots, err := a.slots()
	if err != nil {
		return err
	}
	for handle, slot := range slots {
		switch {
		case slot.Tag != in.Tag:
		case slot.Finished:
			return errors.New("the recording has ended")
		default:
			return a.recorder.SetPhase(handle, number)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if in.CgroupID != 0 {
		return errors.New("the kernel has no record of the container (were the pins removed?)")
	}
	return nil
}

// pickUpMarks goes on with the phases of a recording that an earlier process left.
func (a *Agent) pickUpMarks(in *instance) {
	log := a.instanceLog(in)
	a.unfreeze(in)
	now, err := a.journalOf(in).phase(in.Container.ID)
	if now.Phase == "" {
		now.Phase = in.Decision.Phase
	}
	now.Generation = max(now.Generation, 1) // it goes on
	var sv *phase.Supervised
	if err == nil {
		sv, err = a.phases.supervise(in, now)
	}
	if err != nil {
		log.WithError(err).Error("phases not picked up: the container is recorded on, in the phase that it is in")
		return
	}
	if err := a.phases.serveInside(in); err != nil {
		log.WithError(err).Error("the container can't switch its phase by itself")
	}
	if in.unstarted() {
		sv.Whole()
		return
	}
	a.rejudge(in, sv, "calls that were blocked at the earlier syslatchd's last switch may count in the phase before alone (switch the container's phase to try again)")
}
