// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// ratchet puts the filters of irreversible phases on an instance's tasks.
type ratchet struct {
	filters map[string]seccomp.Filter // by phase
	scope   func() (inject.Scope, error)
	logs    bool // what they deny is told
	log     *logrus.Entry
	turn    chan struct{} // held while an injection is under way
}

// newRatchet: scope is the instance's cgroup.
func newRatchet(filters map[string]seccomp.Filter, logs bool, scope func() (inject.Scope, error), log *logrus.Entry) *ratchet {
	return &ratchet{filters: filters, logs: logs, scope: scope, log: log, turn: make(chan struct{}, 1)}
}

func compileRatchets(plan *profiles.PhasePlan) (map[string]seccomp.Filter, error) {
	filters := map[string]seccomp.Filter{}
	for phase, profile := range plan.Ratchets {
		f, err := seccomp.Compile(profile, seccomp.Options{ENOSYSAbove: seccomp.KernelRelease()})
		if err != nil {
			return nil, fmt.Errorf("filter of phase %s: %w", phase, err)
		}
		filters[phase] = f
	}
	return filters, nil
}

const (
	// ratchetTime is for one injection that has no deadline.
	ratchetTime = time.Minute
	// enterTime is from the answer to an execve until it is done.
	enterTime = 30 * time.Second
	// ratchetGrace is what an injection that was told to end may take.
	ratchetGrace = 2 * time.Second
)

// put gives every task of the instance a phase's filter; those that have it are left
// alone. It is phase.Instance.Ratchet.
func (r *ratchet) put(ctx context.Context, phase string) error {
	scope, err := r.scope()
	if err != nil {
		return err
	}
	select {
	case r.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("an earlier injection has not ended: %w", ctx.Err())
	}
	opts := r.options(phase)
	opts.Timeout = ratchetTime
	if deadline, ok := ctx.Deadline(); ok {
		// Before ctx ends, which names no process.
		opts.Timeout = max(time.Until(deadline)*3/4, time.Millisecond)
	}
	type result struct {
		report *inject.Report
		err    error
	}
	done := make(chan result, 1)
	begun := time.Now()
	go func() {
		defer func() { <-r.turn }()
		report, err := inject.Filter(ctx, scope, r.filters[phase], opts)
		done <- result{report, err}
	}()
	var got result
	select {
	case got = <-done:
	case <-ctx.Done():
		// PTRACE_SEIZE waits for a task that is in execve, which may wait for a disk.
		select {
		case got = <-done:
		case <-time.After(ratchetGrace):
			return fmt.Errorf("the injection goes on, and doesn't end within %v: a task may wait for the program that it executes: %w", ratchetGrace, ctx.Err())
		}
	}
	if got.report != nil {
		var given, set int
		for _, p := range got.report.Processes {
			if !p.Present {
				given++
			}
			if p.SetNoNewPrivs {
				set++
			}
		}
		r.log.WithFields(logrus.Fields{
			"phase": phase, "processes": given, "no_new_privs": set, "stopped": got.report.Stopped, "took": time.Since(begun),
		}).Info("the phase's own filter was put on processes")
	}
	if errors.Is(got.err, inject.ErrNobody) {
		return nil
	}
	return got.err
}

// enter is phase.Instance.Enter.
func (r *ratchet) enter(tid int, phase string) error {
	scope, err := r.scope()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), enterTime)
	done, err := inject.Executing(ctx, scope.Cgroup, tid, r.filters[phase], r.options(phase))
	if err != nil {
		cancel()
		return err
	}
	go func() {
		defer cancel()
		if err := <-done; err != nil {
			r.log.WithError(err).WithField("phase", phase).Error("a program that was executed has been killed, as it couldn't be given the phase's own filter")
		}
	}()
	return nil
}

func (r *ratchet) options(phase string) inject.Options {
	return inject.Options{
		Force: true, Partial: true, // what the filter denies, the phase does
		Log: r.logs,
		Waiting: func(message string) {
			r.log.WithFields(logrus.Fields{"phase": phase, "reason": message}).Warn("a process is slow to take the phase's own filter")
		},
	}
}
