// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// runLimits are what the phases of a command set in its cgroup, and of its processes.
type runLimits struct {
	limits
	host  kernelHost
	group *cgroup.Group
	want  map[string][]adjust.Expectation // by phase

	failed atomic.Pointer[error] // why the first weren't set
}

// newRunLimits makes the command's cgroup, with the controllers that its phases need. What
// can't be had is among the gaps.
func newRunLimits(p *policy.Policy) (_ *runLimits, gaps []profiles.PhaseGap, err error) {
	h, err := cgroup.Detect()
	if err != nil {
		return nil, nil, err
	}
	l := &runLimits{host: kernelHost{h}, want: map[string][]adjust.Expectation{}}
	l.begin(nil, func(set func() error, done func(error)) bool {
		go func() { done(set()) }()
		return true
	})
	gap := func(phase, why, remedy string) {
		gaps = append(gaps, profiles.PhaseGap{Phases: []string{phase}, What: "the phase's limits are not set", Why: why, Remedy: remedy})
	}
	controllers := map[string]bool{}
	var names []string
	for i := range p.Phases.Phases {
		ph := &p.Phases.Phases[i]
		names = append(names, ph.Name)
		want, err := adjust.PhaseLimits(p.Limits, ph.Limits, adjust.Runtime{CgroupMode: h.Mode.String(), PageSize: os.Getpagesize()})
		switch {
		case err != nil:
			gap(ph.Name, err.Error(), "leave them out of the phase")
			continue
		case h.Mode != cgroup.V2 && slices.ContainsFunc(want, inCgroup):
			gap(ph.Name, "a command that is run without a container engine has a cgroup of v2 alone, and this host's controllers are v1's", "boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1), or leave limits out of the phase")
			want = slices.DeleteFunc(want, inCgroup)
		}
		l.want[ph.Name] = want
		for _, e := range want {
			if inCgroup(e) {
				controller, _, _ := strings.Cut(e.File, ".")
				controllers[controller] = true
			}
		}
	}
	if len(p.Limits.Rlimits) > 0 {
		gaps = append(gaps, profiles.PhaseGap{
			Phases: names, What: "the policy's rlimits are not set",
			Why: "a command that is run without a container engine has those of whoever runs it", Remedy: "leave them out of the policy, and set them by ulimit",
		})
	}
	if len(controllers) == 0 {
		l.group, err = cgroup.New("run")
		return l, gaps, err
	}
	l.group, err = cgroup.NewControlled("run", slices.Sorted(maps.Keys(controllers)))
	if errors.Is(err, cgroup.ErrNoController) {
		for name, want := range l.want {
			if slices.ContainsFunc(want, inCgroup) {
				gap(name, err.Error(), "enable it, or leave limits out of the phase")
				l.want[name] = slices.DeleteFunc(want, inCgroup)
			}
		}
		l.group, err = cgroup.New("run")
	}
	return l, gaps, err
}

func inCgroup(e adjust.Expectation) bool { return e.Source == adjust.SourceCgroup }

// process is any of the command's.
func (l *runLimits) process() (*cgroup.Process, error) {
	below, err := cgroup.Children(l.group.Path())
	if err != nil {
		return nil, err
	}
	for _, dir := range append([]string{l.group.Path()}, below...) {
		for _, pid := range procs(dir) {
			if p, err := cgroup.OpenProcess(pid); err == nil {
				return p, nil
			}
		}
	}
	return nil, fmt.Errorf("the command: %w", cgroup.ErrGone)
}

// first sets those that the command begins with. Where the filter asks about its execve
// that is phase.Instance.Ready, with all that it takes to get there done: this program's
// threads would count among pids.
func (l *runLimits) first(sv *phase.Supervised) error {
	ctx, cancel := context.WithTimeout(context.Background(), firstLimitsTime)
	defer cancel()
	name := sv.Status().Phase
	err := l.set(ctx, name)
	if err != nil {
		err = fmt.Errorf("limits of phase %s: %w", name, err)
		l.failed.Store(&err)
	}
	return err
}

// firstLimitsTime bounds what the kernel takes to reclaim memory.
const firstLimitsTime = 10 * time.Second

// set is phase.Instance.Limits.
func (l *runLimits) set(ctx context.Context, name string) error {
	return l.within(ctx, func() error {
		p, err := l.process()
		if err != nil {
			return err
		}
		defer p.Close()
		// A later process has nothing to put back: the cgroup ends with this one.
		return l.limits.set(ctx, l.host, p, l.want[name], func([]limitValue) error { return nil })
	})
}

// loosens is phase.Instance.Loosens.
func (l *runLimits) loosens(ctx context.Context, name string) error {
	return l.within(ctx, func() error {
		p, err := l.process()
		if err != nil {
			return err
		}
		defer p.Close()
		return l.limits.loosens(l.host, p, l.want[name])
	})
}
