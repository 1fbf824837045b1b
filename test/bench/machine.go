// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
)

// machine is where and when the run was made.
type machine struct {
	Date      string  `json:"date"`
	Kernel    string  `json:"kernel"`
	CPU       string  `json:"cpu"`
	CPUs      int     `json:"cpus"`
	MemoryMiB int     `json:"memoryMiB"`
	Cgroups   string  `json:"cgroups"`
	Load      float64 `json:"load"`    // average of the minute before the run
	Foreign   int     `json:"foreign"` // BPF tracing links of others at the start
}

func describeMachine() (m machine, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, fmt.Errorf("uname: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("sysinfo: %w", err)
	}
	h, err := cgroup.Detect()
	if err != nil {
		return m, err
	}
	m = machine{
		Date:      time.Now().UTC().Format(time.DateOnly),
		Kernel:    unix.ByteSliceToString(u.Release[:]),
		CPU:       "an unnamed processor",
		CPUs:      runtime.NumCPU(),
		MemoryMiB: int(uint64(info.Totalram) * uint64(info.Unit) >> 20),
		Cgroups:   h.Mode.String(),
	}
	cpus, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(cpus)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			m.CPU = strings.TrimLeft(strings.TrimSpace(name), "\t: ")
			break
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return m, err
	}
	if _, err := fmt.Sscan(string(load), &m.Load); err != nil {
		return m, fmt.Errorf("/proc/loadavg: %w", err)
	}
	return m, nil
}

func (m machine) String() string {
	s := fmt.Sprintf("%s: Linux %s, %d × %s, %.0f GiB, cgroups %s, load average %.2f before the run",
		m.Date, m.Kernel, m.CPUs, m.CPU, float64(m.MemoryMiB)/1024, m.Cgroups, m.Load)
	if m.Foreign > 0 {
		s += fmt.Sprintf(", %d BPF tracing programs of others attached", m.Foreign)
	}
	return s
}
