// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/profiles"
)

// gates are the recorder's words for a recording's.
var gates = map[profiles.Gate]bpf.Gate{
	profiles.GateFilter: bpf.GateFilter,
	profiles.GateExec:   bpf.GateExec,
	profiles.GateOpen:   bpf.GateOpen,
}

// cgroupName is the name that a container's cgroup directory will have, from
// linux.cgroupsPath: the last part of a path, or with the systemd driver, whose
// form is "slice:prefix:name", the scope unit's name (runc,
// libcontainer/cgroups/systemd; crun alike). It is "" if there is none.
func cgroupName(cgroupsPath string) string {
	if parts := strings.Split(cgroupsPath, ":"); len(parts) == 3 {
		name := parts[2]
		if strings.HasSuffix(name, ".slice") {
			return name
		}
		if parts[1] != "" {
			name = parts[1] + "-" + name
		}
		return name + ".scope"
	}
	if name := path.Base(path.Clean("/" + cgroupsPath)); name != "/" {
		return name
	}
	return ""
}

// rlimits that /proc/PID/limits names otherwise than setrlimit(2).
var limitNames = map[string]string{
	"Max cpu time": "RLIMIT_CPU", "Max file size": "RLIMIT_FSIZE", "Max data size": "RLIMIT_DATA",
	"Max stack size": "RLIMIT_STACK", "Max core file size": "RLIMIT_CORE", "Max resident set": "RLIMIT_RSS",
	"Max processes": "RLIMIT_NPROC", "Max open files": "RLIMIT_NOFILE", "Max locked memory": "RLIMIT_MEMLOCK",
	"Max address space": "RLIMIT_AS", "Max file locks": "RLIMIT_LOCKS", "Max pending signals": "RLIMIT_SIGPENDING",
	"Max msgqueue size": "RLIMIT_MSGQUEUE", "Max nice priority": "RLIMIT_NICE",
	"Max realtime priority": "RLIMIT_RTPRIO", "Max realtime timeout": "RLIMIT_RTTIME",
}

// describe completes what the adapter knows of the runtime with what /proc
// tells.
func (a *Agent) describe(r adjust.Runtime) (adjust.Runtime, error) {
	r.CgroupMode = a.cgroupMode
	r.PageSize = os.Getpagesize()
	if r.PID == 0 {
		return r, nil
	}
	s, err := cgroup.Status(r.PID)
	if err != nil {
		return r, fmt.Errorf("runtime: %w", err)
	}
	r.BaseFilters = s.SeccompFilters
	r.NoSysResource = r.NoSysResource || s.Capabilities&(1<<unix.CAP_SYS_RESOURCE) == 0
	proc := "/proc/" + strconv.Itoa(r.PID)
	adj, err := os.ReadFile(proc + "/oom_score_adj")
	if err != nil {
		return r, fmt.Errorf("runtime: %w", err)
	}
	if r.OOMScoreAdj, err = strconv.Atoi(strings.TrimSpace(string(adj))); err != nil {
		return r, fmt.Errorf("runtime: oom_score_adj: %w", err)
	}
	limits, err := os.ReadFile(proc + "/limits")
	if err != nil {
		return r, fmt.Errorf("runtime: %w", err)
	}
	r.HardLimits = hardLimits(string(limits))
	return r, nil
}

// hardLimits reads the hard column of /proc/PID/limits (proc(5)): names are
// padded to 26 columns, "Max open files            1024                 4096  files".
func hardLimits(text string) map[string]uint64 {
	out := map[string]uint64{}
	for line := range strings.SplitSeq(text, "\n") {
		for prefix, name := range limitNames {
			rest, ok := strings.CutPrefix(line, prefix)
			if !ok {
				continue
			}
			fields := strings.Fields(rest)
			if len(fields) < 2 {
				continue
			}
			if fields[1] == "unlimited" {
				out[name] = ^uint64(0)
			} else if n, err := strconv.ParseUint(fields[1], 10, 64); err == nil {
				out[name] = n
			}
		}
	}
	return out
}
