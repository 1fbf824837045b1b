// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

func isUnknown(err error) bool { return errors.Is(err, bpf.ErrUnknown) }

// Plan decides what a container is created with, and remembers the decision for
// its start. It returns nil for a container that no policy touches, and for one
// whose failure policy is runtime-default when something failed. An error is
// the failure policy's deny. When ctx ends Plan answers, and nothing is left of
// what it began.
func (a *Agent) Plan(ctx context.Context, c policy.Container, runtime adjust.Runtime) (*adjust.Plan, error) {
	log := a.log.WithField("container", c.ID)
	decision, err := a.policy.Decide(c)
	for _, reason := range decision.Reasons {
		log.WithField("policy", decision.Policy).Info(reason)
	}
	if err == nil && decision.Mode == policy.ModeOff {
		return nil, nil
	}
	log = log.WithFields(logrus.Fields{"policy": decision.Policy, "workload": decision.Workload, "mode": decision.Mode})
	var plan *adjust.Plan
	if err == nil {
		plan, err = a.plan(ctx, c, decision, runtime)
	}
	var gaps *GapsError
	if err != nil {
		if decision.Failure == policy.FailureRuntimeDefault && !errors.As(err, &gaps) {
			log.WithError(err).Error("container runs without syslatch: its failure policy is runtime-default")
			return nil, nil
		}
		return nil, err
	}
	for _, w := range plan.Warnings {
		log.Warn(w)
	}
	log.WithFields(logrus.Fields{"version": plan.Version, "digest": plan.Digest, "record": plan.Record}).Info("container planned")
	return plan, nil
}

func (a *Agent) plan(ctx context.Context, c policy.Container, d policy.Decision, runtime adjust.Runtime) (*adjust.Plan, error) {
	plan, in, err := a.build(ctx, c, d, runtime)
	if err != nil {
		return nil, err
	}
	if err := a.enter(ctx, in); err != nil {
		return nil, err
	}
	if in.Phases != nil {
		if err := a.beginPhases(ctx, in); err != nil {
			a.change(func() { a.end(in) })
			return nil, err
		}
		plan.Mounts = a.phases.mounts(in)
	}
	return plan, nil
}

// beginPhases supervises an instance that is known.
func (a *Agent) beginPhases(ctx context.Context, in *instance) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer in.put()
	if a.hasEnded(in) {
		return errStopped
	}
	if _, err := a.phases.supervise(in, phaseNow{Phase: in.Decision.Phase}); err != nil {
		return err
	}
	return a.phases.serveInside(in)
}

// build makes the plan and its instance, which nothing knows of yet.
func (a *Agent) build(ctx context.Context, c policy.Container, d policy.Decision, runtime adjust.Runtime) (*adjust.Plan, *instance, error) {
	if err := validKey(c.ID); err != nil {
		return nil, nil, err
	}
	var version *profiles.Version
	if d.Phases == nil && (d.Mode == policy.ModeEnforce || d.Mode == policy.ModeAudit) {
		if err := a.awaitPublication(ctx, d.Workload); err != nil {
			return nil, nil, err
		}
		var err error
		version, err = within(ctx, a, fmt.Sprintf("read the active version of workload %s from %s", d.Workload, a.policy.Store),
			func() (*profiles.Version, error) { return a.store.Active(d.Workload) })
		if err != nil && !errors.Is(err, store.ErrNoVersion) {
			return nil, nil, err
		}
	}
	runtime, err := a.describe(runtime)
	if err != nil {
		return nil, nil, err
	}
	var phases *instancePhases
	if d.Phases != nil && d.Mode == policy.ModeRecord {
		if phases, err = a.planMarks(ctx, c, &d, runtime); err != nil {
			return nil, nil, err
		}
		if phases == nil {
			d.Phases, d.Phase = nil, ""
		}
	}
	input := adjust.Input{Decision: d, Container: c, Version: version, Runtime: runtime}
	if d.Phases != nil && phases == nil {
		if a.compiler == nil || c.User != nil {
			return nil, nil, fmt.Errorf("%w: policy %s has phases, which rootless containers can't have (match them by a policy without phases)", adjust.ErrNotApplicable, d.Policy)
		}
		var compiled *profiles.PhasePlan
		if phases, compiled, err = a.compiler.compile(ctx, c, &d, runtime); err != nil {
			return nil, nil, err
		}
		input.Phases = compiled.Profile
	}
	plan, err := adjust.Build(input)
	if errors.Is(err, adjust.ErrNoVersion) {
		if id, why := a.unpublished(d.Workload); why != nil {
			err = fmt.Errorf("%w; the recording of container %s is kept and not published yet: %w", err, id, why)
		}
	}
	if err != nil {
		return nil, nil, err
	}
	if plan.Record && a.recorder == nil {
		return nil, nil, fmt.Errorf("this host can't record: %w", a.recorderErr)
	}
	if plan.Seccomp != nil && c.User == nil { // a user's own is for the hook to check
		if err := a.check(seccomp.WithoutUnknown(plan.Seccomp, c.Seccomp)); err != nil {
			return nil, nil, fmt.Errorf("profile of workload %s: %w", d.Workload, err)
		}
	}
	in := (&instance{
		Container: c, Decision: d, Planned: time.Now().UTC(),
		Record: plan.Record, Expect: plan.Expect,
		Version: plan.Version, Digest: plan.Digest, Phases: phases,
	}).prepare()
	if plan.Record {
		in.record(plan.Gate, runtime)
	}
	return plan, in, nil
}

// record lets an instance that nothing knows of yet be recorded.
func (in *instance) record(gate profiles.Gate, runtime adjust.Runtime) {
	in.Record = true
	in.Tag = newTag()
	in.Recording = newRecording(subject(in.Container), in.Decision.Workload, engine(runtime), gate)
	in.Gate, in.BaseFilters = gates[gate], runtime.BaseFilters
}

// enter makes an instance known here, in the journal and, where it is to be
// recorded, in the kernel. Recording begins before the container's cgroup exists:
// when the runtime next tells of the container, its init has loaded the filter
// and made calls under it.
func (a *Agent) enter(ctx context.Context, in *instance) error {
	if err := a.replace(ctx, in); err != nil {
		return err
	}
	_, err := within(ctx, a, "enter the container into "+a.policy.StateDir+" and "+a.policy.BPFFS, func() (struct{}, error) {
		return struct{}{}, a.await(ctx, in)
	})
	switch {
	case err == nil && ctx.Err() != nil:
		// The runtime has, or gets, another answer: what comes too late is not
		// applied.
		err = fmt.Errorf("planned too late: %w", ctx.Err())
	case err == nil && a.hasEnded(in):
		err = errStopped
	}
	if err != nil {
		// It waits for await to return, should that have hung.
		a.change(func() { a.end(in) })
	}
	return err
}

// replace puts an instance into the place of its id. One that is there from an
// earlier container, whose end nobody told, is ended first.
func (a *Agent) replace(ctx context.Context, in *instance) error {
	id := in.Container.ID
	for {
		a.mu.Lock()
		old := a.instances[id]
		if old == nil {
			if a.closed {
				a.mu.Unlock()
				return errClosed
			}
			a.instances[id] = in
			a.mu.Unlock()
			return nil
		}
		a.mu.Unlock()
		if err := a.endNow(ctx, old); err != nil {
			return fmt.Errorf("an earlier container %s: %w", id, err)
		}
	}
}

// errStopped answers a step that comes after the end.
var errStopped = errors.New("the runtime has said that the container is stopped")

// await enters an instance into the journal and lets the kernel wait for its
// cgroup.
func (a *Agent) await(ctx context.Context, in *instance) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer in.put()
	if a.hasEnded(in) {
		return errStopped
	}
	if err := errors.Join(a.journal.forgetPhase(in.Container.ID), a.journal.save(in)); err != nil {
		return err
	}
	// Without a name to wait for, Starting attaches late.
	name := cgroupName(in.Container.CgroupsPath)
	if !in.Record || name == "" || len(name) > bpf.MaxName {
		return nil
	}
	handle, err := a.recorder.Await(name, in.trackOptions())
	if errors.Is(err, bpf.ErrTracked) {
		other, lookErr := a.awaiting(name)
		if lookErr != nil {
			return errors.Join(err, lookErr)
		}
		if other == nil || other.Container.CgroupsPath != in.Container.CgroupsPath {
			a.instanceLog(in).WithError(err).Warn("another container waits for a cgroup of this name: this one's recording will begin late")
			return nil
		}
		// Two containers have no cgroup in common: the creation of the other one
		// failed, and this is the next try.
		if err := a.endNow(ctx, other); err != nil {
			return fmt.Errorf("container %s has the same cgroup: %w", other.Container.ID, err)
		}
		handle, err = a.recorder.Await(name, in.trackOptions())
	}
	if err != nil {
		return fmt.Errorf("record container %s: %w%s", in.Container.Name, err, a.whyFull(err))
	}
	a.change(func() {
		in.handle = &handle
		a.byHandle[handle] = in
	})
	return nil
}

// awaiting is the instance that waits for a cgroup of the given name, nil if it is
// none of ours.
func (a *Agent) awaiting(name string) (*instance, error) {
	slots, err := a.slots()
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for h, in := range a.byHandle {
		if s := slots[h]; s.RootCgroup == 0 && !s.Finished && cgroupName(in.Container.CgroupsPath) == name {
			return in, nil
		}
	}
	return nil, nil
}

// whyFull adds to a recorder that is full who holds it.
func (a *Agent) whyFull(err error) string {
	if !errors.Is(err, bpf.ErrFull) {
		return ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for _, in := range a.instances {
		if in.ended && in.handle != nil {
			n++
		}
	}
	return fmt.Sprintf(" (%d of them have ended and are not published yet; the log says why)", n)
}

// awaitPublication waits until every ended instance of the workload has been
// published, so that a container that is created right after another one ended
// gets the version that came out of it. An attempt that fails is not waited for:
// what the older version allows is less, and a full disk must not keep
// containers from running.
func (a *Agent) awaitPublication(ctx context.Context, workload string) error {
	type pending struct {
		in      *instance
		attempt <-chan struct{}
	}
	var wait []pending
	a.mu.Lock()
	for _, in := range a.instances {
		if in.ended && in.publishes() && in.Decision.Workload == workload {
			wait = append(wait, pending{in, a.end(in)})
		}
	}
	a.mu.Unlock()
	for _, p := range wait {
		select {
		case <-p.attempt:
		case <-ctx.Done():
			return fmt.Errorf("workload %s: the recording of container %s is still being published (does its disk hang, or does another process hold its lock? see the log of syslatchd): %w",
				workload, p.in.Container.ID, ctx.Err())
		}
	}
	if id, why := a.unpublished(workload); why != nil {
		a.log.WithFields(logrus.Fields{"workload": workload, "unpublished": id}).WithError(why).
			Warn("a recording of this workload is not published yet: the container gets the version before it")
	}
	return nil
}

// publishes says whether a version may come out of an instance.
func (in *instance) publishes() bool { return in.Record && in.Decision.Mode == policy.ModeRecord }

// unpublished is an ended instance of a workload whose publication failed, and
// why.
func (a *Agent) unpublished(workload string) (id string, why error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, in := range a.instances {
		if in.ended && in.publishes() && in.Decision.Workload == workload && in.failed != nil {
			return in.Container.ID, in.failed
		}
	}
	return "", nil
}

func subject(c policy.Container) profiles.Subject {
	return profiles.Subject{
		ID: c.ID, Name: c.Name, Namespace: c.Namespace, Pod: c.Pod,
		Image: c.Image, ImageDigest: c.ImageDigest,
	}
}

// engine is "containerd 2.4.2".
func engine(r adjust.Runtime) string { return strings.TrimSpace(r.Engine + " " + r.EngineVersion) }
