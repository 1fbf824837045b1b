// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/syslatch/syslatch/internal/policy"
)

func number[T any](n T) *T { return &n }

// TestPhaseLimits: a phase's limits go before the policy's, which hold where it has
// none; rlimits are no phase's business, and neither argument is changed.
func TestPhaseLimits(t *testing.T) {
	base := policy.Limits{
		Memory: policy.Memory{Max: number[int64](1 << 30)}, Pids: number[int64](100), Unified: map[string]string{"cpu.idle": "1"},
		Rlimits: []policy.Rlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 2}},
	}
	phase := policy.Limits{Memory: policy.Memory{Max: number[int64](64 << 20)}, OOMScoreAdj: number(500), Unified: map[string]string{"memory.high": "32M"}}
	values := func(base, phase policy.Limits, mode string) map[string]string {
		t.Helper()
		got, err := PhaseLimits(base, phase, Runtime{CgroupMode: mode})
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, e := range got {
			out[e.Controller+" "+e.File] = e.Want
		}
		return out
	}
	want := map[string]string{
		" memory.max": "67108864", " memory.swap.max": "0", " pids.max": "100", " cpu.idle": "1", " memory.high": "32M", " oom_score_adj": "500",
	}
	if diff := cmp.Diff(want, values(base, phase, CgroupV2)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if len(base.Unified) != 1 || *base.Memory.Max != 1<<30 || len(base.Rlimits) != 1 {
		t.Errorf("the policy's limits have changed: %+v", base)
	}
	want = map[string]string{" memory.max": "1073741824", " memory.swap.max": "0", " pids.max": "100", " cpu.idle": "1"}
	if diff := cmp.Diff(want, values(base, policy.Limits{}, CgroupV2)); diff != "" {
		t.Errorf("without limits of the phase (-want +got):\n%s", diff)
	}
	want = map[string]string{"pids pids.max": "max"}
	if diff := cmp.Diff(want, values(policy.Limits{}, policy.Limits{Pids: number(policy.Unlimited)}, CgroupHybrid)); diff != "" {
		t.Errorf("hybrid (-want +got):\n%s", diff)
	}
	if _, err := PhaseLimits(policy.Limits{}, phase, Runtime{CgroupMode: CgroupHybrid}); !errors.Is(err, ErrNotApplicable) {
		t.Errorf("unified on a hybrid host: %v", err)
	}
}
