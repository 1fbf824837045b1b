// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
)

// settleTime bounds the wait for a started container's own settings: between
// the runtime's word that it started and its execve, init still sets limits and
// loads the filter, and no event says when it is through.
const settleTime = 2 * time.Second

// verifyCreated reads back what holds as soon as the cgroup is there. All
// mismatches come in one error.
func (a *Agent) verifyCreated(in *instance, pid int) error {
	return mismatchError(adjust.Verify(adjust.At(adjust.StageCreated, in.Expect), a.reader(pid)))
}

// verifyRunning reads back what holds once the container's program runs, again
// and again until it does or settleTime is over. A container that has ended in
// the meantime is no mismatch.
func (a *Agent) verifyRunning(ctx context.Context, in *instance, pid int) error {
	expect := adjust.At(adjust.StageRunning, in.Expect)
	if len(expect) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for wait := 2 * time.Millisecond; ; wait *= 2 {
		mismatches := adjust.Verify(expect, a.reader(pid))
		if len(mismatches) == 0 {
			return nil
		}
		for _, m := range mismatches {
			if errors.Is(m.Err, cgroup.ErrGone) {
				a.instanceLog(in).Debug("container ended before its settings were read back")
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return mismatchError(mismatches)
		case <-time.After(wait):
		}
	}
}

func mismatchError(mismatches []adjust.Mismatch) error {
	if len(mismatches) == 0 {
		return nil
	}
	errs := make([]error, len(mismatches))
	for i := range mismatches {
		errs[i] = mismatches[i]
	}
	return fmt.Errorf("injected settings are not in force (did another plugin or the runtime change them?): %w", errors.Join(errs...))
}

// reader reads expectations for the container whose init is pid.
func (a *Agent) reader(pid int) func(adjust.Expectation) (string, error) {
	return func(e adjust.Expectation) (string, error) { return a.host.Read(pid, e) }
}
