// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"cmp"
	"errors"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

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

// Looser says whether a container would have more by an expectation than by what its file
// holds now. Where it can't tell it says yes.
func (e *Expectation) Looser(content string) bool {
	now, ok := e.selectField(content)
	if !ok {
		return true
	}
	if e.met(now) {
		return false
	}
	switch e.File {
	case "memory.max", "memory.high", "memory.swap.max", "memory.low", "memory.min", "pids.max", "cpu.weight",
		"memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "cpu.cfs_quota_us", "cpu.shares":
		is, ok1 := measure(now)
		want, ok2 := measure(e.Want)
		return !ok1 || !ok2 || want > is
	case "cpu.max":
		is, ok1 := share(now)
		want, ok2 := share(e.Want)
		return !ok1 || !ok2 || want > is
	case "oom_score_adj": // the higher, the sooner it is killed
		is, err1 := strconv.Atoi(now)
		want, err2 := strconv.Atoi(e.Want)
		return err1 != nil || err2 != nil || want < is
	}
	return true
}

// measure reads a number, or no limit as v1 and v2 write it.
func measure(s string) (uint64, bool) {
	if s == "max" || s == "-1" {
		return math.MaxUint64, true
	}
	return memparse(s)
}

// share reads "QUOTA PERIOD" of cpu.max. The kernel's period is 100 ms if there is none.
func share(s string) (float64, bool) {
	words := strings.Fields(s)
	if len(words) == 1 {
		words = append(words, "100000")
	}
	if len(words) != 2 {
		return 0, false
	}
	quota, ok := measure(words[0])
	period, err := strconv.ParseUint(words[1], 10, 64)
	if !ok || err != nil || period == 0 {
		return 0, false
	}
	if quota == math.MaxUint64 {
		return math.Inf(1), true
	}
	return float64(quota) / float64(period), true
}
