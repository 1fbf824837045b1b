// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"
)

var suffixes = map[string]int64{
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}

// parseBytes reads a quantity as Kubernetes writes them, in whole bytes:
// 67108864, 64Mi, 1.5Gi, 500M.
func parseBytes(s string) (int64, error) {
	split := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if split < 0 {
		split = len(s)
	}
	number, suffix := s[:split], s[split:]
	unit, ok := suffixes[suffix]
	value, isNumber := decimal(number)
	switch {
	case !isNumber:
		return 0, fmt.Errorf("%s is not a quantity, want a number of bytes such as 67108864, 64Mi or 1.5Gi", quote(s))
	case suffix == "m":
		return 0, fmt.Errorf(`%s means thousandths of a byte (did you mean "%sMi"?)`, quote(s), number)
	case !ok:
		hint := ""
		for unit := range suffixes {
			if unit != "" && (strings.EqualFold(unit, suffix) || strings.EqualFold(unit+"B", suffix)) {
				hint = fmt.Sprintf(` (did you mean "%s%s"?)`, number, unit)
			}
		}
		return 0, fmt.Errorf("%s has unit %s, want one of k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei or none%s", quote(s), quote(suffix), hint)
	}
	value.Mul(value, new(big.Rat).SetInt64(unit))
	if !value.IsInt() {
		return 0, fmt.Errorf("%s is not a whole number of bytes", quote(s))
	}
	if !value.Num().IsInt64() {
		return 0, fmt.Errorf("%s is more than 2^63-1 bytes", quote(s))
	}
	return value.Num().Int64(), nil
}

// decimal reads digits with at most one point between them.
func decimal(s string) (*big.Rat, bool) {
	if len(s) == 0 || len(s) > 32 || s[0] == '.' || s[len(s)-1] == '.' || strings.Trim(s, "0123456789.") != "" {
		return nil, false
	}
	return new(big.Rat).SetString(s)
}

// The kernel's bounds of cpu.max, in microseconds (kernel/sched/core.c).
const (
	minCPUPeriod     = 1000
	maxCPUPeriod     = 1000000
	defaultCPUPeriod = 100000
	minCPUQuota      = 1000
)

// parseCPU reads "50%" of one CPU, cores ("1.5"), millicores ("250m"), "QUOTA
// PERIOD" in microseconds, or "max".
func parseCPU(s string) (quota int64, period uint64, err error) {
	const want = `want "50%" of one CPU, cores such as "1.5", millicores such as "250m", "QUOTA PERIOD" in microseconds, or "max"`
	period = defaultCPUPeriod
	if s == "max" {
		return Unlimited, period, nil
	}
	if fields := strings.Fields(s); len(fields) == 2 {
		if period, err = strconv.ParseUint(fields[1], 10, 32); err != nil || period < minCPUPeriod || period > maxCPUPeriod {
			return 0, 0, fmt.Errorf("period %s, want %d to %d microseconds", quote(fields[1]), minCPUPeriod, maxCPUPeriod)
		}
		if fields[0] == "max" {
			return Unlimited, period, nil
		}
		if quota, err = strconv.ParseInt(fields[0], 10, 64); err != nil || quota < minCPUQuota || quota > math.MaxInt32 {
			return 0, 0, fmt.Errorf("quota %s, want %d to %d microseconds", quote(fields[0]), minCPUQuota, math.MaxInt32)
		}
		return quota, period, nil
	}
	number, unit := s, int64(defaultCPUPeriod)
	if n, ok := strings.CutSuffix(s, "%"); ok {
		number, unit = n, defaultCPUPeriod/100
	} else if n, ok := strings.CutSuffix(s, "m"); ok {
		number, unit = n, defaultCPUPeriod/1000
	}
	value, ok := decimal(number)
	if !ok {
		return 0, 0, fmt.Errorf("%s is no amount of CPU, %s", quote(s), want)
	}
	value.Mul(value, new(big.Rat).SetInt64(unit))
	if !value.IsInt() || !value.Num().IsInt64() {
		return 0, 0, fmt.Errorf("%s is not a whole number of microseconds per %d", quote(s), defaultCPUPeriod)
	}
	if quota = value.Num().Int64(); quota < minCPUQuota || quota > math.MaxInt32 {
		return 0, 0, fmt.Errorf("%s is %d microseconds per %d, want %d to %d", quote(s), quota, defaultCPUPeriod, minCPUQuota, math.MaxInt32)
	}
	return quota, period, nil
}

// rlimitTypes are those of getrlimit(2); the OCI spec takes no others.
var rlimitTypes = []string{
	"RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS",
	"RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_NOFILE", "RLIMIT_NPROC",
	"RLIMIT_RSS", "RLIMIT_RTPRIO", "RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_STACK",
}

// checkUnified refuses keys that are no resource limit: cgroup.procs would move
// processes, cgroup.kill end them.
func checkUnified(key, value string) error {
	controller, parameter, ok := strings.Cut(key, ".")
	if !ok || controller == "" || parameter == "" || strings.Trim(key, "abcdefghijklmnopqrstuvwxyz0123456789._MKGB") != "" {
		return fmt.Errorf("%s is not the name of a cgroup v2 file, want CONTROLLER.PARAMETER such as memory.high", quote(key))
	}
	if controller == "cgroup" && parameter != "max.depth" && parameter != "max.descendants" {
		return fmt.Errorf("%s is not a resource limit; of cgroup.*, only cgroup.max.depth and cgroup.max.descendants are", quote(key))
	}
	if value == "" || len(value) > 4096 {
		return fmt.Errorf("value has %d bytes, want 1 to 4096", len(value))
	}
	for _, r := range value {
		if r != '\n' && (r < ' ' || r > '~') {
			return fmt.Errorf("value %s: character %q is not allowed", quote(value), r)
		}
	}
	return nil
}
