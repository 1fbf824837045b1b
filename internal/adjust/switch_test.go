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

// TestLooser: from inside, limits go one way.
func TestLooser(t *testing.T) {
	for _, tc := range []struct {
		file, now, want string
		rule            Rule
		looser          bool
	}{
		{"memory.max", "67108864\n", "64M", RuleBytes, false},
		{"memory.max", "67108864", "67108865", RuleBytes, false}, // the same page
		{"memory.max", "67108864", "128M", RuleBytes, true},
		{"memory.max", "max", "128M", RuleBytes, false},
		{"memory.max", "67108864", "max", RuleBytes, true},
		{"memory.limit_in_bytes", "9223372036854771712", "67108864", RuleBytes, false},
		{"memory.limit_in_bytes", "67108864", "-1", RuleBytes, true},
		{"memory.low", "0", "4096", RuleBytes, true}, // a guarantee
		{"pids.max", "77", "76", RuleEqual, false},
		{"pids.max", "77", "78", RuleEqual, true},
		{"pids.max", "77", "max", RuleEqual, true},
		{"cpu.max", "max 100000", "50000 100000", RuleEqual, false},
		{"cpu.max", "50000 100000", "10000 20000", RuleEqual, false}, // another period, the same share
		{"cpu.max", "50000 100000", "20000 20000", RuleEqual, true},
		{"cpu.max", "50000 100000", "max 100000", RuleEqual, true},
		{"cpu.max", "50000 100000", "50000", RuleEqual, false},
		{"cpu.max", "50000 100000", "50000 0", RuleEqual, true},
		{"cpu.weight", "100", "50", RuleEqual, false},
		{"cpu.weight", "100", "200", RuleEqual, true},
		{"cpu.cfs_quota_us", "-1", "50000", RuleEqual, false},
		{"cpu.cfs_period_us", "100000", "200000", RuleEqual, true}, // of what quota?
		{"oom_score_adj", "0", "500", RuleEqual, false},
		{"oom_score_adj", "500", "0", RuleEqual, true},
		{"io.max", "8:0 rbps=1", "8:0 rbps=2", RuleWords, true},
		{"io.max", "8:0 rbps=1 wbps=max", "8:0 rbps=1", RuleWords, false},
		{"hugetlb.2MB.max", "0", "0", RuleEqual, false},
		{"hugetlb.2MB.max", "4", "0", RuleEqual, true}, // it isn't known what that means
		{"pids.max", "?", "5", RuleEqual, true},
	} {
		e := Expectation{File: tc.file, Want: tc.want, Rule: tc.rule}
		if got := e.Looser(tc.now); got != tc.looser {
			t.Errorf("%s from %q to %q: looser is %v", tc.file, tc.now, tc.want, got)
		}
	}
}
