// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"cmp"
	"errors"
	"maps"
	"slices"

	"github.com/syslatch/syslatch/internal/policy"
)

// PhaseLimits are the cgroup files that a phase's limits come to on a host, by what
// they hold when the phase is in force: what is in Want is written to them, and read
// back by the same rules as after a start. The phase's limits go before the policy's.
// oom_score_adj is among them, with SourceProc. The error wraps [ErrNotApplicable] and
// names every limit that can't be set here.
func PhaseLimits(base, phase policy.Limits, runtime Runtime) ([]Expectation, error) {
	b := &builder{Input: Input{Decision: policy.Decision{Failure: policy.FailureDeny, Limits: over(base, phase)}, Runtime: runtime}, plan: &Plan{}}
	b.limits()
	if len(b.problems) > 0 {
		return nil, errors.Join(b.problems...)
	}
	return slices.DeleteFunc(b.plan.Expect, func(e Expectation) bool { return e.Source == SourceProc && e.File != "oom_score_adj" }), nil
}

// over is a phase's limits, and the policy's where it has none.
func over(base, phase policy.Limits) policy.Limits {
	out := base
	out.Rlimits = nil // they are set once, at the start
	for _, m := range []struct{ to, from **int64 }{
		{&out.Memory.Max, &phase.Memory.Max},
		{&out.Memory.High, &phase.Memory.High},
		{&out.Memory.SwapMax, &phase.Memory.SwapMax},
		{&out.Memory.Low, &phase.Memory.Low},
		{&out.Memory.Min, &phase.Memory.Min},
		{&out.Pids, &phase.Pids},
	} {
		if *m.from != nil {
			*m.to = *m.from
		}
	}
	if phase.CPU.Quota != 0 {
		out.CPU.Quota, out.CPU.Period = phase.CPU.Quota, phase.CPU.Period
	}
	out.CPU.Weight = cmp.Or(phase.CPU.Weight, out.CPU.Weight)
	out.IO.Weight = cmp.Or(phase.IO.Weight, out.IO.Weight)
	if len(phase.IO.Max) > 0 {
		out.IO.Max = phase.IO.Max
	}
	if len(phase.Unified) > 0 {
		out.Unified = maps.Clone(base.Unified)
		if out.Unified == nil {
			out.Unified = map[string]string{}
		}
		maps.Copy(out.Unified, phase.Unified)
	}
	if phase.OOMScoreAdj != nil {
		out.OOMScoreAdj = phase.OOMScoreAdj
	}
	return out
}
