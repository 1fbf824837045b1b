// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/policy"
)

func cgroupFile(controller, file, want string, rule Rule) Expectation {
	return Expectation{Stage: StageCreated, Source: SourceCgroup, Controller: controller, File: file, Want: want, Rule: rule}
}

func optional(e Expectation) Expectation { e.Optional = true; return e }

func paged(e Expectation, size int) Expectation { e.PageSize = size; return e }

// TestUnifiedReadsBack: what the kernel prints for what was written (6.18 and its
// sources) is no mismatch, and something else is one.
func TestUnifiedReadsBack(t *testing.T) {
	for _, tt := range []struct{ file, written, printed, other string }{
		{"cpu.max", "50000", "50000 100000", "max 100000"},
		{"cpu.max", "max", "max 100000", "50000 100000"},
		{"cpu.max", "50000 20000", "50000 20000", "50000 100000"},
		{"io.weight", "200", "default 200", "default 100"},
		{"io.bfq.weight", "default 200", "default 200\n8:0 100", "default 100"},
		{"hugetlb.2MB.max", "3M", "2097152", "0"},
		{"hugetlb.1GB.rsvd.max", "max", "max", "1073741824"},
		{"cpuset.cpus", "0,1,2,7", "0-2,7", "0-2"},
		{"cpuset.mems", "0", "0", ""},
		{"cpuset.cpus.partition", "member", "member", "root"},
		{"cpu.uclamp.min", "50", "50.00", "0.00"},
		{"cpu.uclamp.max", "100", "max", "99.00"},
		{"cpu.uclamp.max", "12.5", "12.50", "max"},
		{"memory.swap.max", "64M", "67108864", "0"},
		{"memory.oom.group", "1", "1", "0"},
		{"rdma.max", "mlx4_0 hca_handle=2", "mlx4_0 hca_handle=2 hca_object=max", "mlx4_0 hca_handle=max hca_object=max"},
	} {
		d := decision(policy.ModeRecord)
		d.Limits = policy.Limits{Memory: policy.Memory{Max: ptr[int64](1 << 30)}, Unified: map[string]string{tt.file: tt.written}}
		plan, err := Build(Input{Decision: d, Runtime: Runtime{CgroupMode: CgroupV2}})
		if err != nil {
			t.Fatal(err)
		}
		for printed, want := range map[string]int{tt.printed: 0, tt.other: 1} {
			n := 0
			got := Verify(At(StageCreated, plan.Expect), func(e Expectation) (string, error) {
				if e.File != tt.file {
					return e.Want, nil
				}
				n++
				return printed, nil
			})
			if len(got) != want || n != 1 {
				t.Errorf("%s: %q written, %q printed: %d mismatches of %d, want %d of 1: %v", tt.file, tt.written, printed, len(got), n, want, got)
			}
		}
	}
}

func TestLimits(t *testing.T) {
	mib := func(n int64) *int64 { return ptr(n << 20) }
	max := ptr(policy.Unlimited)
	memory := func(limit, swap int64) *specs.LinuxResources {
		return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &swap}}
	}
	unified := func(pairs ...string) *specs.LinuxResources {
		r := &specs.LinuxResources{Unified: map[string]string{}}
		for i := 0; i < len(pairs); i += 2 {
			r.Unified[pairs[i]] = pairs[i+1]
		}
		return r
	}
	cpuOf := func(c specs.LinuxCPU) *specs.LinuxResources { return &specs.LinuxResources{CPU: &c} }

	v2, hybrid, v1 := Runtime{CgroupMode: CgroupV2}, Runtime{CgroupMode: CgroupHybrid}, Runtime{CgroupMode: CgroupV1}
	hook := Runtime{CgroupMode: CgroupHybrid, Adapter: AdapterHook}
	for _, tt := range []struct {
		name     string
		limits   policy.Limits
		runtime  Runtime
		want     *specs.LinuxResources
		expect   []Expectation
		problems []string // each is an error under deny, a warning under runtime-default
	}{
		{"none", policy.Limits{}, v2, nil, nil, nil},
		{
			"memory.max on v2",
			policy.Limits{Memory: policy.Memory{Max: mib(64)}},
			v2, memory(64<<20, 64<<20),
			[]Expectation{cgroupFile("", "memory.max", "67108864", RuleBytes), optional(cgroupFile("", "memory.swap.max", "0", RuleBytes))},
			nil,
		},
		{
			"unlimited memory.max on v2",
			policy.Limits{Memory: policy.Memory{Max: max}},
			v2, memory(-1, -1),
			[]Expectation{cgroupFile("", "memory.max", "max", RuleBytes), optional(cgroupFile("", "memory.swap.max", "max", RuleBytes))},
			nil,
		},
		{
			"all memory on v2",
			policy.Limits{Memory: policy.Memory{Max: mib(64), High: mib(32), SwapMax: mib(8), Low: mib(2), Min: mib(1)}},
			v2,
			&specs.LinuxResources{Memory: memory(64<<20, 64<<20).Memory, Unified: map[string]string{"memory.high": "33554432", "memory.swap.max": "8388608", "memory.low": "2097152", "memory.min": "1048576"}},
			[]Expectation{
				cgroupFile("", "memory.max", "67108864", RuleBytes), cgroupFile("", "memory.swap.max", "8388608", RuleBytes), cgroupFile("", "memory.high", "33554432", RuleBytes),
				cgroupFile("", "memory.low", "2097152", RuleBytes), cgroupFile("", "memory.min", "1048576", RuleBytes),
			},
			nil,
		},
		{
			"swap off on v2",
			policy.Limits{Memory: policy.Memory{SwapMax: ptr[int64](0)}},
			v2, unified("memory.swap.max", "0"),
			[]Expectation{optional(cgroupFile("", "memory.swap.max", "0", RuleBytes))},
			nil,
		},
		{
			"memory.max on hybrid",
			policy.Limits{Memory: policy.Memory{Max: mib(64)}},
			hybrid, memory(64<<20, 64<<20),
			[]Expectation{cgroupFile("memory", "memory.limit_in_bytes", "67108864", RuleBytes), optional(cgroupFile("memory", "memory.memsw.limit_in_bytes", "67108864", RuleBytes))},
			nil,
		},
		{
			"swap off on v1",
			policy.Limits{Memory: policy.Memory{Max: mib(64), SwapMax: ptr[int64](0)}},
			v1, memory(64<<20, 64<<20),
			[]Expectation{cgroupFile("memory", "memory.limit_in_bytes", "67108864", RuleBytes), optional(cgroupFile("memory", "memory.memsw.limit_in_bytes", "67108864", RuleBytes))},
			nil,
		},
		{
			"swap through NRI on hybrid",
			policy.Limits{Memory: policy.Memory{Max: mib(64), SwapMax: mib(8)}},
			hybrid, memory(64<<20, 64<<20),
			[]Expectation{cgroupFile("memory", "memory.limit_in_bytes", "67108864", RuleBytes), optional(cgroupFile("memory", "memory.memsw.limit_in_bytes", "67108864", RuleBytes))},
			[]string{"memory.swapMax other than 0"},
		},
		{
			"swap through the hook on hybrid",
			policy.Limits{Memory: policy.Memory{Max: mib(64), SwapMax: mib(8)}},
			hook, memory(64<<20, 72<<20),
			[]Expectation{cgroupFile("memory", "memory.limit_in_bytes", "67108864", RuleBytes), optional(cgroupFile("memory", "memory.memsw.limit_in_bytes", "75497472", RuleBytes))},
			nil,
		},
		{
			"unlimited swap through the hook on hybrid",
			policy.Limits{Memory: policy.Memory{Max: mib(64), SwapMax: max}},
			hook, memory(64<<20, -1),
			[]Expectation{cgroupFile("memory", "memory.limit_in_bytes", "67108864", RuleBytes), optional(cgroupFile("memory", "memory.memsw.limit_in_bytes", "max", RuleBytes))},
			nil,
		},
		{
			"swap sum overflows",
			policy.Limits{Memory: policy.Memory{Max: ptr[int64](math.MaxInt64 - 1), SwapMax: mib(8)}},
			hook, memory(math.MaxInt64-1, -1),
			[]Expectation{cgroupFile("memory", "memory.limit_in_bytes", "9223372036854775806", RuleBytes), optional(cgroupFile("memory", "memory.memsw.limit_in_bytes", "max", RuleBytes))},
			nil,
		},
		{"what v1 lacks", policy.Limits{
			Memory: policy.Memory{High: mib(1), Low: mib(1), Min: mib(1), SwapMax: mib(1)}, IO: policy.IO{Weight: 5, Max: []policy.IOMax{{Device: "8:0", RBPS: 1}}},
			Unified: map[string]string{"a.b": "1", "a.c": "1"},
		}, hybrid, nil, nil, []string{"memory.swapMax without memory.max", "memory.high: needs cgroup v2, and this host is hybrid", "memory.low", "memory.min", "io.weight", "io.max", "unified a.b", "unified a.c"}},

		{
			"cpu on v2",
			policy.Limits{CPU: policy.CPU{Quota: 50000, Period: 100000, Weight: 200}},
			v2,
			&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr[int64](50000), Period: ptr[uint64](100000)}, Unified: map[string]string{"cpu.weight": "200"}},
			[]Expectation{cgroupFile("", "cpu.max", "50000 100000", RuleEqual), cgroupFile("", "cpu.weight", "200", RuleEqual)},
			nil,
		},
		{
			"unlimited cpu on v2",
			policy.Limits{CPU: policy.CPU{Quota: -1, Period: 100000}},
			v2, cpuOf(specs.LinuxCPU{Quota: ptr[int64](-1), Period: ptr[uint64](100000)}),
			[]Expectation{cgroupFile("", "cpu.max", "max 100000", RuleEqual)},
			nil,
		},
		{
			"cpu on hybrid",
			policy.Limits{CPU: policy.CPU{Quota: 50000, Period: 100000, Weight: 100}},
			hybrid,
			cpuOf(specs.LinuxCPU{Quota: ptr[int64](50000), Period: ptr[uint64](100000), Shares: ptr[uint64](1024)}),
			[]Expectation{cgroupFile("cpu", "cpu.cfs_quota_us", "50000", RuleEqual), cgroupFile("cpu", "cpu.cfs_period_us", "100000", RuleEqual), cgroupFile("cpu", "cpu.shares", "1024", RuleEqual)},
			nil,
		},
		{"pids on v2", policy.Limits{Pids: ptr[int64](10)}, v2, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr[int64](10)}}, []Expectation{cgroupFile("", "pids.max", "10", RuleEqual)}, nil},
		{"unlimited pids on v1", policy.Limits{Pids: max}, v1, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr[int64](-1)}}, []Expectation{cgroupFile("pids", "pids.max", "max", RuleEqual)}, nil},
		{
			"io on v2",
			policy.Limits{IO: policy.IO{Weight: 50, Max: []policy.IOMax{{Device: "8:0", RBPS: 1 << 20, WIOPS: policy.Unlimited}, {Device: "8:16", WBPS: 5}}}},
			v2,
			unified("io.weight", "default 50", "io.max", "8:0 rbps=1048576 wiops=max\n8:16 wbps=5"),
			[]Expectation{cgroupFile("", "io.weight", "default 50", RuleWords), cgroupFile("", "io.max", "8:0 rbps=1048576 wiops=max\n8:16 wbps=5", RuleWords)},
			nil,
		},
		{
			"unified on v2",
			policy.Limits{Unified: map[string]string{"memory.oom.group": "1", "memory.high": "1M", "hugetlb.2MB.max": "2097152", "io.latency": "8:0 target=5", "cpuset.cpus": "0-1"}},
			v2,
			unified("memory.oom.group", "1", "memory.high", "1M", "hugetlb.2MB.max", "2097152", "io.latency", "8:0 target=5", "cpuset.cpus", "0-1"),
			[]Expectation{
				cgroupFile("", "cpuset.cpus", "0-1", RuleList), paged(cgroupFile("", "hugetlb.2MB.max", "2097152", RuleBytes), 2<<20), cgroupFile("", "io.latency", "8:0 target=5", RuleWords),
				cgroupFile("", "memory.high", "1M", RuleBytes), cgroupFile("", "memory.oom.group", "1", RuleEqual),
			},
			nil,
		},
		{"runtime without unified", policy.Limits{Memory: policy.Memory{High: mib(1)}, CPU: policy.CPU{Weight: 5}}, Runtime{CgroupMode: CgroupV2, NoUnified: true}, nil, nil, []string{"memory.high: the OCI runtime doesn't know", "cpu.weight"}},
		{"unknown cgroup mode", policy.Limits{Pids: ptr[int64](10)}, Runtime{}, nil, nil, []string{`cgroup mode is ""`}},
		{"unknown cgroup mode, no limits", policy.Limits{OOMScoreAdj: ptr(5)}, Runtime{}, nil, []Expectation{{Stage: StageCreated, Source: SourceProc, File: "oom_score_adj", Want: "5", Rule: RuleEqual}}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := decision(policy.ModeRecord)
			d.Limits = tt.limits
			in := Input{Decision: d, Runtime: tt.runtime, Container: policy.Container{SeccompUnknown: true}}

			if _, err := Build(in); len(tt.problems) > 0 {
				if !errors.Is(err, ErrNotApplicable) {
					t.Errorf("under deny: got %v, want ErrNotApplicable", err)
				}
				for _, p := range tt.problems {
					if !strings.Contains(fmt.Sprint(err), p) {
						t.Errorf("under deny: got %v, want %q in it", err, p)
					}
				}
			} else if err != nil {
				t.Errorf("under deny: %v", err)
			}

			in.Decision.Failure = policy.FailureRuntimeDefault
			plan, err := Build(in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, plan.Resources); diff != "" {
				t.Errorf("resources (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.expect, plan.Expect); diff != "" {
				t.Errorf("expectations (-want +got):\n%s", diff)
			}
			if len(plan.Warnings) != len(tt.problems) {
				t.Fatalf("warnings: got %q, want %d", plan.Warnings, len(tt.problems))
			}
			for i, p := range tt.problems {
				if !strings.Contains(plan.Warnings[i], "not applied: ") || !strings.Contains(plan.Warnings[i], p) {
					t.Errorf("warning %d: got %q, want %q in it", i, plan.Warnings[i], p)
				}
			}
		})
	}
}

func TestProcess(t *testing.T) {
	weak := Runtime{CgroupMode: CgroupV2, NoSysResource: true, OOMScoreAdj: -5, HardLimits: map[string]uint64{"RLIMIT_NOFILE": 1024}}
	limits := policy.Limits{OOMScoreAdj: ptr(-6), Rlimits: []policy.Rlimit{{Type: "RLIMIT_NOFILE", Soft: 5, Hard: 2048}, {Type: "RLIMIT_CORE", Soft: 0, Hard: math.MaxUint64}}}
	build := func(r Runtime, l policy.Limits, failure policy.Failure) (*Plan, error) {
		d := decision(policy.ModeRecord)
		d.Limits, d.Failure = l, failure
		return Build(Input{Decision: d, Runtime: r, Container: policy.Container{SeccompUnknown: true}})
	}
	if _, err := build(weak, limits, policy.FailureDeny); !errors.Is(err, ErrNotApplicable) || !strings.Contains(err.Error(), "oomScoreAdj -6") || !strings.Contains(err.Error(), "RLIMIT_NOFILE") {
		t.Errorf("under deny: got %v, want ErrNotApplicable naming oomScoreAdj and RLIMIT_NOFILE", err)
	}
	core := specs.POSIXRlimit{Type: "RLIMIT_CORE", Soft: 0, Hard: math.MaxUint64}
	plan, err := build(weak, limits, policy.FailureRuntimeDefault)
	if err != nil {
		t.Fatal(err)
	}
	if plan.OOMScoreAdj != nil || len(plan.Warnings) != 2 || cmp.Diff([]specs.POSIXRlimit{core}, plan.Rlimits) != "" {
		t.Errorf("under runtime-default: got oom %v, rlimits %v, warnings %q", plan.OOMScoreAdj, plan.Rlimits, plan.Warnings)
	}
	for _, tt := range []struct {
		adapter string
		stage   Stage
	}{{AdapterNRI, StageCreated}, {AdapterHook, StageRunning}} {
		plan, err := build(Runtime{CgroupMode: CgroupV2, Adapter: tt.adapter}, limits, policy.FailureDeny)
		if err != nil {
			t.Fatal(err)
		}
		if plan.OOMScoreAdj == nil || *plan.OOMScoreAdj != -6 {
			t.Errorf("oom_score_adj: got %v, want -6", plan.OOMScoreAdj)
		}
		if diff := cmp.Diff([]specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 5, Hard: 2048}, core}, plan.Rlimits); diff != "" {
			t.Errorf("rlimits (-want +got):\n%s", diff)
		}
		want := []Expectation{
			{Stage: tt.stage, Source: SourceProc, File: "oom_score_adj", Want: "-6", Rule: RuleEqual},
			{Stage: tt.stage, Source: SourceProc, File: "limits", Field: "Max open files", Want: "5 2048", Rule: RuleEqual},
			{Stage: tt.stage, Source: SourceProc, File: "limits", Field: "Max core file size", Want: "0 unlimited", Rule: RuleEqual},
		}
		if diff := cmp.Diff(want, plan.Expect); diff != "" {
			t.Errorf("expectations (-want +got):\n%s", diff)
		}
	}
	// Equal to the runtime's own takes no capability.
	if _, err := build(weak, policy.Limits{OOMScoreAdj: ptr(-5), Rlimits: []policy.Rlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 1024}}}, policy.FailureDeny); err != nil {
		t.Errorf("the runtime's own values: %v", err)
	}
}

func TestModeOff(t *testing.T) {
	d := decision(policy.ModeOff)
	d.Limits.Pids = ptr[int64](5)
	plan, err := Build(Input{Decision: d})
	if err != nil || plan.Resources != nil || plan.Seccomp != nil || plan.Record || plan.Expect != nil {
		t.Errorf("mode off: got %+v, %v, want a plan that does nothing", plan, err)
	}
}

// TestWeights checks the conversion against the values that runc's own test
// has, and that a weight survives the way to shares and back as well as shares
// can carry it.
func TestWeights(t *testing.T) {
	for shares, want := range map[uint64]uint64{0: 0, 1: 1, 2: 1, 1024: 100, 262144: 10000, 1 << 20: 10000} {
		if got := SharesToWeight(shares); got != want {
			t.Errorf("SharesToWeight(%d) = %d, want %d", shares, got, want)
		}
	}
	for weight, want := range map[uint64]uint64{0: 0, 1: 2, 100: 1024, 10000: 262144, 20000: 262144} {
		if got := WeightToShares(weight); got != want {
			t.Errorf("WeightToShares(%d) = %d, want %d", weight, got, want)
		}
	}
	before := uint64(0)
	for weight := uint64(1); weight <= 10000; weight++ {
		shares := WeightToShares(weight)
		if shares < 2 || shares > 262144 || shares < before {
			t.Fatalf("WeightToShares(%d) = %d, after %d", weight, shares, before)
		}
		before = shares
		if back := SharesToWeight(shares); back > weight || shares < 262144 && SharesToWeight(shares+1) <= weight {
			t.Fatalf("weight %d: %d shares are weight %d, %d would be %d", weight, shares, back, shares+1, SharesToWeight(shares+1))
		}
	}
}

func TestVerify(t *testing.T) {
	const status = "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t3\n"
	const limits = "Limit                     Soft Limit           Hard Limit           Units     \n" +
		"Max cpu time              unlimited            unlimited            seconds   \n" +
		"Max open files            1024                 4096                 files     \n"
	proc := func(file, field, want string, rule Rule) Expectation {
		return Expectation{Source: SourceProc, File: file, Field: field, Want: want, Rule: rule}
	}
	bytes := func(want string) Expectation { return cgroupFile("", "memory.max", want, RuleBytes) }
	words := func(want string) Expectation { return cgroupFile("", "io.max", want, RuleWords) }
	for _, tt := range []struct {
		name    string
		e       Expectation
		content string
		met     bool
	}{
		{"equal", cgroupFile("", "cpu.max", "50000 100000", RuleEqual), "50000 100000\n", true},
		{"not equal", cgroupFile("", "cpu.max", "50000 100000", RuleEqual), "max 100000\n", false},
		{"longer", cgroupFile("", "cpu.max", "50000", RuleEqual), "50000 100000\n", false},
		{"bytes", bytes("67108864"), "67108864\n", true},
		{"bytes, rounded down", bytes("67108865"), "67108864\n", true},
		{"bytes, one page less", bytes("67108864"), "67104768\n", false},
		{"bytes, rounded up", bytes("67108865"), "67112960\n", false},
		{"bytes, suffix", bytes("64M"), "67108864\n", true},
		{"bytes, max", bytes("max"), "max\n", true},
		{"bytes, max on v1", bytes("max"), "9223372036854771712\n", true},
		{"bytes, max wanted", bytes("max"), "67108864\n", false},
		{"bytes, max found", bytes("67108864"), "max\n", false},
		{"bytes, nothing", bytes("67108864"), "\n", false},
		{"bytes, overflow", bytes("67108864"), "99999999999E\n", false},
		{"bytes, 64 KiB pages", Expectation{File: "memory.max", Want: "100000", Rule: RuleBytes, PageSize: 65536}, "65536", true},
		{"field", proc("status", "Seccomp", "2", RuleEqual), status, true},
		{"field, wrong", proc("status", "Seccomp", "1", RuleEqual), status, false},
		{"field, missing", proc("status", "Seccomp", "2", RuleEqual), "Name:\tx\nSeccomp_filters:\t2\n", false},
		{"field, longer name first", proc("status", "Seccomp", "2", RuleEqual), "Seccomp_filters:\t3\nSeccomp:\t2\n", true},
		{"field, cut off", proc("status", "Seccomp", "2", RuleEqual), "Seccomp", false},
		{"at least, equal", proc("status", "Seccomp_filters", "3", RuleAtLeast), status, true},
		{"at least, more", proc("status", "Seccomp_filters", "2", RuleAtLeast), status, true},
		{"at least, fewer", proc("status", "Seccomp_filters", "4", RuleAtLeast), status, false},
		{"at least, no number", proc("status", "Name", "4", RuleAtLeast), status, false},
		{"rlimit", proc("limits", "Max open files", "1024 4096", RuleEqual), limits, true},
		{"rlimit, other", proc("limits", "Max open files", "1024 1024", RuleEqual), limits, false},
		{"rlimit, unlimited", proc("limits", "Max cpu time", "unlimited unlimited", RuleEqual), limits, true},
		{"words", words("8:0 rbps=5 wiops=max"), "8:0 rbps=5 wbps=max riops=max wiops=max\n", true},
		{"words, wrong", words("8:0 rbps=5"), "8:0 rbps=6 wbps=max riops=max wiops=max\n", false},
		{"words, other device", words("8:0 rbps=5"), "8:16 rbps=5 wbps=max riops=max wiops=max\n", false},
		{"words, no device but unlimited", words("8:0 rbps=max"), "", true},
		{"words, two lines", words("8:0 rbps=5\n8:16 wbps=6"), "8:16 rbps=max wbps=6\n8:0 rbps=5 wbps=max\n", true},
		{"words, second wrong", words("8:0 rbps=5\n8:16 wbps=6"), "8:16 rbps=max wbps=7\n8:0 rbps=5 wbps=max\n", false},
		{"weight", cgroupFile("", "io.weight", "default 50", RuleWords), "default 50\n8:0 70\n", true},
		{"unknown rule", cgroupFile("", "x", "1", "exactly"), "1", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Verify([]Expectation{tt.e}, func(Expectation) (string, error) { return tt.content, nil })
			if (len(got) == 0) != tt.met {
				t.Fatalf("got %v, want met %v", got, tt.met)
			}
			if len(got) > 0 && (!strings.Contains(got[0].Error(), tt.e.File) || !strings.Contains(got[0].Error(), tt.e.Want) && !strings.Contains(got[0].Error(), fmt.Sprintf("%q", tt.e.Want))) {
				t.Errorf("message %q names neither file nor value", got[0].Error())
			}
		})
	}

	gone := &fs.PathError{Op: "open", Path: "x", Err: fs.ErrNotExist}
	for _, tt := range []struct {
		optional bool
		err      error
		met      bool
	}{{true, gone, true}, {false, gone, false}, {true, os.ErrPermission, false}} {
		e := bytes("0")
		e.Optional = tt.optional
		got := Verify([]Expectation{e}, func(Expectation) (string, error) { return "", tt.err })
		if (len(got) == 0) != tt.met {
			t.Errorf("optional %v, %v: got %v, want met %v", tt.optional, tt.err, got, tt.met)
		}
		if len(got) > 0 && !errors.Is(got[0], tt.err) {
			t.Errorf("mismatch %v hides %v", got[0], tt.err)
		}
	}
}

func TestAt(t *testing.T) {
	a, b := Expectation{Stage: StageCreated, File: "a"}, Expectation{Stage: StageRunning, File: "b"}
	if diff := cmp.Diff([]Expectation{b}, At(StageRunning, []Expectation{a, b})); diff != "" {
		t.Errorf("At (-want +got):\n%s", diff)
	}
}

// TestVerifyThisProcess reads the real files: their formats are the kernel's.
func TestVerifyThisProcess(t *testing.T) {
	read := func(e Expectation) (string, error) {
		data, err := os.ReadFile("/proc/self/" + e.File)
		return string(data), err
	}
	adj, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	good := []Expectation{
		{Source: SourceProc, File: "oom_score_adj", Want: strings.TrimSpace(string(adj)), Rule: RuleEqual},
		{Source: SourceProc, File: "status", Field: "Seccomp_filters", Want: "0", Rule: RuleAtLeast},
	}
	if got := Verify(good, read); len(got) > 0 {
		t.Errorf("got %v, want none", got)
	}
	// Every limit has its line, under the name that limitsFields gives it.
	for name, field := range limitsFields {
		got := Verify([]Expectation{{Source: SourceProc, File: "limits", Field: field, Want: "-7 -7", Rule: RuleEqual}}, read)
		if len(got) != 1 || got[0].Err != nil || len(strings.Fields(got[0].Got)) != 2 {
			t.Errorf("%s: got %v, want a line with two values", name, got)
		}
	}
}

func FuzzBuild(f *testing.F) {
	seed := func(in Input) {
		data, err := json.Marshal(in)
		if err != nil {
			f.Fatal(err)
		}
		own, err := json.Marshal(in.Container.Seccomp)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, own)
	}
	d := decision(policy.ModeEnforce)
	d.MustDeny = []string{"bpf"}
	d.Limits = policy.Limits{
		Memory: policy.Memory{Max: ptr[int64](1 << 20), High: ptr[int64](5)}, CPU: policy.CPU{Quota: -1, Weight: 7}, Pids: ptr[int64](-1),
		IO: policy.IO{Weight: 1, Max: []policy.IOMax{{Device: "x"}}}, Unified: map[string]string{"memory": ""}, OOMScoreAdj: ptr(-1000), Rlimits: []policy.Rlimit{{Type: "RLIMIT_X"}},
	}
	for _, mode := range []policy.Mode{policy.ModeRecord, policy.ModeAudit, policy.ModeEnforce} {
		d.Mode = mode
		for _, r := range []Runtime{{CgroupMode: CgroupV2}, {CgroupMode: CgroupHybrid, Adapter: AdapterHook}} {
			seed(Input{Decision: d, Version: version(allowing("open")), Runtime: r, Container: policy.Container{Seccomp: allowing("bpf")}})
		}
	}
	f.Fuzz(func(t *testing.T, data, own []byte) {
		var in Input
		if json.Unmarshal(data, &in) != nil {
			return
		}
		if json.Unmarshal(own, &in.Container.Seccomp) != nil {
			in.Container.Seccomp = nil
		}
		plan, err := Build(in)
		if (plan == nil) == (err == nil) {
			t.Fatalf("got plan %v and error %v", plan, err)
		}
		if err != nil {
			return
		}
		if plan.Seccomp != nil {
			for _, call := range in.Decision.MustDeny {
				if reachable(plan.Seccomp, call) {
					t.Fatalf("%q is reachable", call)
				}
			}
		}
		Verify(plan.Expect, func(e Expectation) (string, error) { return e.Want, nil })
		data, err = json.Marshal(plan.Expect)
		if err != nil {
			t.Fatal(err)
		}
		var back []Expectation
		if err := json.Unmarshal(data, &back); err != nil {
			t.Fatal(err)
		}
	})
}
