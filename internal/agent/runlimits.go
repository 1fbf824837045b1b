// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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

// newRunLimits makes the command's cgroup, below parent or, with "", this program's own. The
// controllers that it has are those that the one above has enabled for its children; what
// can't be had is among the gaps.
func newRunLimits(p *policy.Policy, parent string) (_ *runLimits, gaps []profiles.PhaseGap, err error) {
	h, err := cgroup.Detect()
	if err != nil {
		return nil, nil, err
	}
	group, err := cgroup.NewIn(parent, "run")
	if err != nil {
		return nil, nil, err
	}
	l := &runLimits{host: kernelHost{h, group.Path()}, group: group, want: map[string][]adjust.Expectation{}}
	l.begin(nil, func(set func() error, done func(error)) bool {
		go func() { done(set()) }()
		return true
	})
	var names []string
	for i := range p.Phases.Phases {
		ph := &p.Phases.Phases[i]
		names = append(names, ph.Name)
		want, err := adjust.PhaseLimits(p.Limits, ph.Limits, adjust.Runtime{CgroupMode: h.Mode.String(), PageSize: os.Getpagesize()})
		if err != nil {
			gaps = append(gaps, profiles.PhaseGap{Phases: []string{ph.Name}, What: "its limits are not set", Why: err.Error(), Remedy: "leave them out of the phase"})
			continue
		}
		var missing []string
		l.want[ph.Name] = slices.DeleteFunc(want, func(e adjust.Expectation) bool {
			if e.Source != adjust.SourceCgroup {
				return false
			}
			_, err := os.Stat(filepath.Join(group.Path(), e.File))
			if e.Controller == "" && err == nil {
				return false
			}
			if !e.Optional {
				missing = append(missing, e.File)
			}
			return true
		})
		if len(missing) > 0 {
			gaps = append(gaps, profiles.PhaseGap{
				Phases: []string{ph.Name}, What: "limits are not set: " + strings.Join(missing, " "),
				Why:    "the command's cgroup, " + group.Path() + ", doesn't have them",
				Remedy: "name a cgroup of v2 by --cgroup-parent that has these controllers in its cgroup.subtree_control, or leave them out of the phase",
			})
		}
	}
	if len(p.Limits.Rlimits) > 0 {
		gaps = append(gaps, profiles.PhaseGap{
			Phases: names, What: "the policy's rlimits are not set",
			Why: "a command that is run without a container engine has those of whoever runs it", Remedy: "leave them out of the policy, and set them by ulimit",
		})
	}
	return l, gaps, nil
}

// any says whether a phase has limits that can be set.
func (l *runLimits) any() bool {
	for _, want := range l.want {
		if len(want) > 0 {
			return true
		}
	}
	return false
}

// process is any of the command's: for oom_score_adj, which all have alike.
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
	// A switch may be under way: its limits come behind these, or these are its.
	err := l.within(ctx, func() error { return l.setNow(ctx, sv.Status().Phase) })
	if err != nil {
		err = fmt.Errorf("limits of the first phase: %w", err)
		l.failed.Store(&err)
	}
	return err
}

// firstLimitsTime bounds what the kernel takes to reclaim memory.
const firstLimitsTime = 10 * time.Second

// oomKills is how many processes memory.max has ended; 0 without one.
func (l *runLimits) oomKills() (n int) {
	data, err := os.ReadFile(filepath.Join(l.group.Path(), "memory.events.local"))
	if err != nil {
		return 0 // the cgroup has no such controller
	}
	for line := range strings.Lines(string(data)) {
		if count, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ = strconv.Atoi(strings.TrimSpace(count))
		}
	}
	return n
}

// set is phase.Instance.Limits.
func (l *runLimits) set(ctx context.Context, name string) error {
	return l.within(ctx, func() error { return l.setNow(ctx, name) })
}

func (l *runLimits) setNow(ctx context.Context, name string) error {
	p, err := l.process()
	if err != nil {
		return err
	}
	defer p.Close()
	// A later process has nothing to put back: the cgroup ends with this one.
	return l.limits.set(ctx, l.host, p, l.want[name], func([]limitValue) error { return nil })
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
