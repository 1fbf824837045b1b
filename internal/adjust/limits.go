// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/policy"
)

// limits fills in resources, oom_score_adj and rlimits.
//
// On cgroup v2, what the OCI spec has no field for, or only one that the
// runtimes convert differently or NRI drops, goes through `unified`, which
// runtimes write last and unchanged (runc's fs2.Manager.Set, crun's
// write_unified_resources). On v1 and hybrid hosts runtimes refuse `unified`
// ("cannot use unified on cgroup v1").
func (b *builder) limits() {
	l := &b.Decision.Limits
	r := &specs.LinuxResources{}
	switch mode := b.Runtime.CgroupMode; mode {
	case CgroupV2:
		b.limitsV2(l, r)
	case CgroupHybrid, CgroupV1:
		b.limitsV1(l, r)
	default:
		if wantsCgroup(l) {
			b.problem("resource limits on a host whose cgroup mode is %q, want v2, hybrid or v1", mode)
		}
	}
	if r.Memory != nil || r.CPU != nil || r.Pids != nil || r.Unified != nil {
		b.plan.Resources = r
	}
	b.oomScoreAdj(l)
	b.rlimits(l)
}

func wantsCgroup(l *policy.Limits) bool {
	return l.Memory != (policy.Memory{}) || l.CPU != (policy.CPU{}) || l.Pids != nil ||
		l.IO.Weight != 0 || len(l.IO.Max) > 0 || len(l.Unified) > 0
}

// amount spells a limit the way cgroup v2 does.
func amount(n int64) string {
	if n == policy.Unlimited {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

func (b *builder) expectCgroup(controller, file, want string, rule Rule) {
	e := Expectation{Stage: StageCreated, Source: SourceCgroup, Controller: controller, File: file, Want: want, Rule: rule}
	if rule == RuleBytes {
		e.PageSize = b.Runtime.PageSize
	}
	// A kernel without swap accounting has no such file, and runtimes pass over
	// its absence when swap is to be off or unlimited.
	e.Optional = file == "memory.swap.max" && (want == "0" || want == "max") || file == "memory.memsw.limit_in_bytes"
	b.expect(e)
}

func (b *builder) limitsV2(l *policy.Limits, r *specs.LinuxResources) {
	unified := map[string]string{}
	put := func(key, text string) bool {
		if b.Runtime.NoUnified {
			b.problem("%s: the OCI runtime doesn't know linux.resources.unified (runc 1.0.0-rc93, crun 0.17 and later do)", key)
			return false
		}
		unified[key] = text
		return true
	}
	set := func(key, text string, rule Rule) {
		if put(key, text) {
			b.expectCgroup("", key, text, rule)
		}
	}
	if l.Memory.Max != nil {
		b.memoryMax(l, r)
		b.expectCgroup("", "memory.max", amount(*l.Memory.Max), RuleBytes)
		if _, raw := l.Unified["memory.swap.max"]; l.Memory.SwapMax == nil && !raw {
			swap := "0"
			if *l.Memory.Max == policy.Unlimited {
				swap = "max"
			}
			b.expectCgroup("", "memory.swap.max", swap, RuleBytes)
		}
	}
	for _, m := range []struct {
		file  string
		value *int64
	}{
		{"memory.swap.max", l.Memory.SwapMax},
		{"memory.high", l.Memory.High},
		{"memory.low", l.Memory.Low},
		{"memory.min", l.Memory.Min},
	} {
		if m.value != nil {
			set(m.file, amount(*m.value), RuleBytes)
		}
	}
	if l.CPU.Quota != 0 {
		b.cpuMax(l, r)
		b.expectCgroup("", "cpu.max", fmt.Sprintf("%s %d", amount(l.CPU.Quota), l.CPU.Period), RuleEqual)
	}
	if l.CPU.Weight != 0 {
		set("cpu.weight", strconv.FormatUint(l.CPU.Weight, 10), RuleEqual)
	}
	if l.Pids != nil {
		b.pidsMax(l, r)
		b.expectCgroup("", "pids.max", amount(*l.Pids), RuleEqual)
	}
	if l.IO.Weight != 0 {
		set("io.weight", fmt.Sprintf("default %d", l.IO.Weight), RuleWords)
	}
	if len(l.IO.Max) > 0 {
		set("io.max", ioMax(l.IO.Max), RuleWords)
	}
	for _, key := range slices.Sorted(maps.Keys(l.Unified)) {
		if put(key, l.Unified[key]) {
			b.expectUnified(key, l.Unified[key])
		}
	}
	if len(unified) > 0 {
		r.Unified = unified
	}
}

// expectUnified expects what the kernel prints for a file that the policy gives
// raw, which is not always what was written.
func (b *builder) expectUnified(key, text string) {
	rule, page := RuleEqual, 0
	controller, parameter, _ := strings.Cut(key, ".")
	_, number := memparse(text)
	switch {
	case controller == "memory" && (number || text == "max"):
		switch parameter {
		case "min", "low", "high", "max", "swap.high", "swap.max", "zswap.max":
			rule = RuleBytes
		}
	case controller == "hugetlb" && strings.HasSuffix(parameter, "max"):
		// In whole pages of the file's own size (mm/hugetlb_cgroup.c): "2MB.max".
		size, _, _ := strings.Cut(parameter, ".")
		if n, ok := memparse(strings.TrimSuffix(size, "B")); ok && n <= 1<<40 {
			page = int(n)
		}
		rule = RuleBytes
	case controller == "cpuset" && (strings.HasPrefix(parameter, "cpus") || parameter == "mems") && parameter != "cpus.partition":
		rule = RuleList
	case key == "cpu.max": // the period may be left out, and stays then
		rule = RuleWords
	case key == "cpu.uclamp.min" || key == "cpu.uclamp.max":
		if percent, err := strconv.ParseFloat(text, 64); err == nil {
			if text = strconv.FormatFloat(percent, 'f', 2, 64); text == "100.00" {
				text = "max"
			}
		}
	case strings.HasSuffix(key, ".weight") && controller == "io":
		if number {
			text = "default " + text
		}
		rule = RuleWords
	case controller == "io" || controller == "rdma" || controller == "misc":
		rule = RuleWords
	}
	b.expectCgroup("", key, text, rule)
	if page > 0 {
		b.plan.Expect[len(b.plan.Expect)-1].PageSize = page
	}
}

func ioMax(devices []policy.IOMax) string {
	lines := make([]string, len(devices))
	for i, d := range devices {
		words := []string{d.Device}
		for _, f := range []struct {
			key   string
			value int64
		}{{"rbps", d.RBPS}, {"wbps", d.WBPS}, {"riops", d.RIOPS}, {"wiops", d.WIOPS}} {
			if f.value != 0 {
				words = append(words, f.key+"="+amount(f.value))
			}
		}
		lines[i] = strings.Join(words, " ")
	}
	return strings.Join(lines, "\n")
}

func (b *builder) limitsV1(l *policy.Limits, r *specs.LinuxResources) {
	if l.Memory.Max != nil {
		limit := *l.Memory.Max
		b.memoryMax(l, r)
		b.expectCgroup("memory", "memory.limit_in_bytes", amount(limit), RuleBytes)
		if r.Memory.Swap != nil {
			b.expectCgroup("memory", "memory.memsw.limit_in_bytes", amount(*r.Memory.Swap), RuleBytes)
		}
	} else if l.Memory.SwapMax != nil {
		b.problem("memory.swapMax without memory.max: cgroup v1 can only bound their sum (give max too)")
	}
	for _, m := range []struct {
		field string
		given bool
	}{
		{"memory.high", l.Memory.High != nil},
		{"memory.low", l.Memory.Low != nil},
		{"memory.min", l.Memory.Min != nil},
		{"io.weight", l.IO.Weight != 0},
		{"io.max", len(l.IO.Max) > 0},
	} {
		if m.given {
			b.problem("%s: %s", m.field, b.needsV2())
		}
	}
	for _, key := range slices.Sorted(maps.Keys(l.Unified)) {
		b.problem("unified %s: %s", key, b.needsV2())
	}
	if l.CPU.Quota != 0 {
		b.cpuMax(l, r)
		b.expectCgroup("cpu", "cpu.cfs_quota_us", strconv.FormatInt(l.CPU.Quota, 10), RuleEqual)
		b.expectCgroup("cpu", "cpu.cfs_period_us", strconv.FormatUint(l.CPU.Period, 10), RuleEqual)
	}
	if l.CPU.Weight != 0 {
		shares := WeightToShares(l.CPU.Weight)
		cpu(r).Shares = &shares
		b.expectCgroup("cpu", "cpu.shares", strconv.FormatUint(shares, 10), RuleEqual)
	}
	if l.Pids != nil {
		b.pidsMax(l, r)
		b.expectCgroup("pids", "pids.max", amount(*l.Pids), RuleEqual)
	}
}

func (b *builder) needsV2() string {
	return fmt.Sprintf("needs cgroup v2, and this host is %s (boot it with systemd.unified_cgroup_hierarchy=1)", b.Runtime.CgroupMode)
}

// memoryMax sets memory, and swap with it: NRI's generator makes
// memory.swap equal to the limit, which is no swap at all, so that is what a
// policy without swapMax means with every adapter.
func (b *builder) memoryMax(l *policy.Limits, r *specs.LinuxResources) {
	limit := *l.Memory.Max
	total := limit
	r.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &total}
	swap := l.Memory.SwapMax
	if swap == nil || b.Runtime.CgroupMode == CgroupV2 || limit == policy.Unlimited && *swap == policy.Unlimited {
		return // on v2, unified has the last word on swap
	}
	switch {
	case limit == policy.Unlimited:
		b.problem("memory.swapMax with unlimited memory.max: cgroup v1 can only bound their sum")
	case *swap == 0:
	case b.Runtime.Adapter == AdapterNRI:
		b.problem("memory.swapMax other than 0: NRI sets memory.memsw.limit_in_bytes equal to memory.max on this host's cgroup v1 (use 0, or cgroup v2)")
	case *swap == policy.Unlimited || limit > math.MaxInt64-*swap:
		total = policy.Unlimited
	default:
		total = limit + *swap
	}
}

func cpu(r *specs.LinuxResources) *specs.LinuxCPU {
	if r.CPU == nil {
		r.CPU = &specs.LinuxCPU{}
	}
	return r.CPU
}

func (b *builder) cpuMax(l *policy.Limits, r *specs.LinuxResources) {
	quota, period := l.CPU.Quota, l.CPU.Period
	cpu(r).Quota, cpu(r).Period = &quota, &period
}

func (b *builder) pidsMax(l *policy.Limits, r *specs.LinuxResources) {
	limit := *l.Pids
	r.Pids = &specs.LinuxPids{Limit: &limit}
}

func (b *builder) oomScoreAdj(l *policy.Limits) {
	if l.OOMScoreAdj == nil {
		return
	}
	want := *l.OOMScoreAdj
	if b.Runtime.NoSysResource && want < b.Runtime.OOMScoreAdj {
		b.problem("oomScoreAdj %d: lower than the runtime's own %d, which takes CAP_SYS_RESOURCE, and the runtime lacks it", want, b.Runtime.OOMScoreAdj)
		return
	}
	b.plan.OOMScoreAdj = &want
	b.expect(Expectation{Stage: b.procStage(), Source: SourceProc, File: "oom_score_adj", Want: strconv.Itoa(want), Rule: RuleEqual})
}

// limitsFields are the names of rlimits in /proc/PID/limits (fs/proc/base.c).
var limitsFields = map[string]string{
	"RLIMIT_CPU": "Max cpu time", "RLIMIT_FSIZE": "Max file size", "RLIMIT_DATA": "Max data size",
	"RLIMIT_STACK": "Max stack size", "RLIMIT_CORE": "Max core file size", "RLIMIT_RSS": "Max resident set",
	"RLIMIT_NPROC": "Max processes", "RLIMIT_NOFILE": "Max open files", "RLIMIT_MEMLOCK": "Max locked memory",
	"RLIMIT_AS": "Max address space", "RLIMIT_LOCKS": "Max file locks", "RLIMIT_SIGPENDING": "Max pending signals",
	"RLIMIT_MSGQUEUE": "Max msgqueue size", "RLIMIT_NICE": "Max nice priority",
	"RLIMIT_RTPRIO": "Max realtime priority", "RLIMIT_RTTIME": "Max realtime timeout",
}

func (b *builder) rlimits(l *policy.Limits) {
	spell := func(n uint64) string {
		if n == math.MaxUint64 {
			return "unlimited"
		}
		return strconv.FormatUint(n, 10)
	}
	for _, r := range l.Rlimits {
		field, ok := limitsFields[r.Type]
		if !ok {
			b.problem("rlimit %q: no such limit", r.Type)
			continue
		}
		if own, known := b.Runtime.HardLimits[r.Type]; known && b.Runtime.NoSysResource && r.Hard > own {
			b.problem("%s: hard limit %s is above the runtime's own %s, which takes CAP_SYS_RESOURCE, and the runtime lacks it", r.Type, spell(r.Hard), spell(own))
			continue
		}
		b.plan.Rlimits = append(b.plan.Rlimits, specs.POSIXRlimit{Type: r.Type, Soft: r.Soft, Hard: r.Hard})
		b.expect(Expectation{
			Stage: b.procStage(), Source: SourceProc, File: "limits", Field: field,
			Want: spell(r.Soft) + " " + spell(r.Hard), Rule: RuleEqual,
		})
	}
}

// procStage is when the settings of a process can be read: before its program
// runs, which may change them, where the runtime has set them by then. At the
// createRuntime hook it hasn't.
func (b *builder) procStage() Stage {
	if b.Runtime.Adapter == AdapterHook {
		return StageRunning
	}
	return StageCreated
}

// SharesToWeight converts cgroup v1's cpu.shares (2 to 262144, default 1024) to
// v2's cpu.weight (1 to 10000, default 100) as runc 1.3.2 and later do:
// ConvertCPUSharesToCgroupV2Value of github.com/opencontainers/cgroups, a
// quadratic function of log2(shares) that fits least, most and default. 0 means
// not set, on both sides.
func SharesToWeight(shares uint64) uint64 {
	switch {
	case shares == 0:
		return 0
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612.0-7.0/34.0)))
}

// WeightToShares is the inverse of [SharesToWeight]: the most shares that it
// takes to this weight. Where shares are coarser than weights (below 1024
// shares not every weight has any), it is the shares of the next weight below.
func WeightToShares(weight uint64) uint64 {
	switch {
	case weight == 0:
		return 0
	case weight <= 1:
		return 2
	case weight >= 10000:
		return 262144
	}
	// l*l + 125*l - 612*(log10(weight) + 7/34) = 0
	c := 612 * (math.Log10(float64(weight)) + 7.0/34.0)
	shares := uint64(math.Exp2((math.Sqrt(125*125+4*c) - 125) / 2))
	// Floating point may put an exact value (1024 shares, weight 100) on either
	// side.
	for SharesToWeight(shares+1) <= weight {
		shares++
	}
	for shares > 2 && SharesToWeight(shares) > weight {
		shares--
	}
	return shares
}
