// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrGone means that the process has ended.
var ErrGone = errors.New("process has ended")

// Process reads about one process and never about a later one with the same
// pid: it holds the process's directory in /proc, which stays that process's
// and becomes empty when it is reaped. Close it.
type Process struct {
	pid int
	dir *os.File
}

// OpenProcess opens a process, by its id in the pid namespace of the mounted
// /proc. That it is the one meant is the caller's to know, by the cgroup that it
// is in or by its StartTime.
func OpenProcess(pid int) (*Process, error) {
	path := filepath.Join("/proc", strconv.Itoa(pid))
	dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("pid %d: %w: %w", pid, ErrGone, err)
	}
	if err != nil {
		return nil, err
	}
	return &Process{pid, dir}, nil
}

// PID is the process's id.
func (p *Process) PID() int { return p.pid }

// Close lets go of the process.
func (p *Process) Close() error { return p.dir.Close() }

// ReadFile reads a file of the process's directory, such as "status". The error
// wraps ErrGone if the process has ended, and fs.ErrNotExist also if the kernel
// has no such file.
func (p *Process) ReadFile(name string) (string, error) {
	path := filepath.Join(p.dir.Name(), name)
	fd, err := unix.Openat(int(p.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", p.failed("open", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return "", p.failed("read", path, errors.Unwrap(err))
	}
	return string(data), nil
}

// failed tells a process that has ended from a file that never was.
func (p *Process) failed(op, path string, err error) error {
	pathErr := &fs.PathError{Op: op, Path: path, Err: err}
	gone := errors.Is(err, unix.ESRCH) ||
		errors.Is(err, unix.ENOENT) && unix.Faccessat(int(p.dir.Fd()), "stat", unix.F_OK, 0) != nil
	if gone {
		return fmt.Errorf("%w: %w", ErrGone, pathErr)
	}
	return pathErr
}

// ProcStatus is what /proc/PID/status says of a task's confinement.
type ProcStatus struct {
	Seccomp        int // 0 none, 1 strict, 2 filter
	SeccompFilters int // how many, inherited ones included
	NoNewPrivs     bool
	Capabilities   uint64 // effective, bit 1<<CAP_X each
}

// Status reads a process's main thread's confinement.
func Status(pid int) (ProcStatus, error) {
	p, err := OpenProcess(pid)
	if err != nil {
		return ProcStatus{}, err
	}
	defer p.Close()
	return p.Status()
}

// Status reads the main thread's confinement.
func (p *Process) Status() (ProcStatus, error) {
	text, err := p.ReadFile("status")
	if err != nil {
		return ProcStatus{}, err
	}
	s, err := parseStatus(text)
	if err != nil {
		return ProcStatus{}, fmt.Errorf("status of pid %d: %w", p.pid, err)
	}
	return s, nil
}

// parseStatus reads the lines "Key:\tVALUE". The first line is the only one
// whose value the process chooses, and the kernel escapes newlines in it.
func parseStatus(text string) (ProcStatus, error) {
	var s ProcStatus
	var noNewPrivs int
	want := map[string]*int{"Seccomp": &s.Seccomp, "Seccomp_filters": &s.SeccompFilters, "NoNewPrivs": &noNewPrivs}
	capabilities := false
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		if key == "CapEff" {
			var err error
			if s.Capabilities, err = strconv.ParseUint(strings.TrimSpace(value), 16, 64); err != nil {
				return ProcStatus{}, fmt.Errorf("%s: %w", key, err)
			}
			capabilities = true
		}
		to := want[key]
		if to == nil {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 31)
		if err != nil {
			return ProcStatus{}, fmt.Errorf("%s: %w", key, err)
		}
		*to = int(n)
		delete(want, key)
	}
	if len(want) > 0 {
		return ProcStatus{}, errors.New("no Seccomp, Seccomp_filters or NoNewPrivs line: the kernel needs CONFIG_SECCOMP_FILTER and version 5.9")
	}
	if !capabilities {
		return ProcStatus{}, errors.New("no CapEff line: this is not /proc/PID/status")
	}
	s.NoNewPrivs = noNewPrivs == 1
	return s, nil
}

// OOMScoreAdj reads oom_score_adj, -1000 to 1000.
func (p *Process) OOMScoreAdj() (int, error) {
	text, err := p.ReadFile("oom_score_adj")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(text))
}

// Unlimited is a Limit's value without one (RLIM_INFINITY).
const Unlimited = math.MaxUint64

// Limit is a resource limit of a process, in the units of setrlimit(2).
type Limit struct{ Soft, Hard uint64 }

// limitNames are the lines of /proc/PID/limits (fs/proc/base.c).
var limitNames = map[string]string{
	"Max cpu time": "RLIMIT_CPU", "Max file size": "RLIMIT_FSIZE", "Max data size": "RLIMIT_DATA",
	"Max stack size": "RLIMIT_STACK", "Max core file size": "RLIMIT_CORE", "Max resident set": "RLIMIT_RSS",
	"Max processes": "RLIMIT_NPROC", "Max open files": "RLIMIT_NOFILE", "Max locked memory": "RLIMIT_MEMLOCK",
	"Max address space": "RLIMIT_AS", "Max file locks": "RLIMIT_LOCKS", "Max pending signals": "RLIMIT_SIGPENDING",
	"Max msgqueue size": "RLIMIT_MSGQUEUE", "Max nice priority": "RLIMIT_NICE",
	"Max realtime priority": "RLIMIT_RTPRIO", "Max realtime timeout": "RLIMIT_RTTIME",
}

// Limits reads the resource limits, by the names of the runtime spec
// ("RLIMIT_NOFILE").
func (p *Process) Limits() (map[string]Limit, error) {
	text, err := p.ReadFile("limits")
	if err != nil {
		return nil, err
	}
	limits, err := parseLimits(text)
	if err != nil {
		return nil, fmt.Errorf("limits of pid %d: %w", p.pid, err)
	}
	return limits, nil
}

// parseLimits reads the lines "NAME IN WORDS  SOFT  HARD  [UNIT]". Names that
// are not known, as the header's, are passed over.
func parseLimits(text string) (map[string]Limit, error) {
	limits := map[string]Limit{}
	for line := range strings.Lines(text) {
		// The kernel pads the name to 25 columns and puts a space after it.
		const column = 26
		if len(line) < column {
			continue
		}
		name, ok := limitNames[strings.TrimSpace(line[:column])]
		if !ok {
			continue
		}
		var values [2]uint64
		words := strings.Fields(line[column:])
		if len(words) < len(values) {
			return nil, fmt.Errorf("%s: no soft and hard value in %q", name, line)
		}
		for i := range values {
			if words[i] == "unlimited" {
				values[i] = Unlimited
				continue
			}
			var err error
			if values[i], err = strconv.ParseUint(words[i], 10, 64); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		limits[name] = Limit{values[0], values[1]}
	}
	if len(limits) == 0 {
		return nil, errors.New("no known limit in the text")
	}
	return limits, nil
}

// StartTime is when the process started, in clock ticks since boot: together
// with the pid it names a process for good, also across restarts of ours.
func (p *Process) StartTime() (uint64, error) {
	text, err := p.ReadFile("stat")
	if err != nil {
		return 0, err
	}
	t, err := parseStartTime(text)
	if err != nil {
		return 0, fmt.Errorf("stat of pid %d: %w", p.pid, err)
	}
	return t, nil
}

// parseStartTime takes field 22 of /proc/PID/stat. The second, the command's
// name in parentheses, may hold spaces and parentheses itself.
func parseStartTime(text string) (uint64, error) {
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	const index = 22 - 3
	if len(fields) <= index {
		return 0, fmt.Errorf("%d fields after the name, want more than %d", len(fields), index)
	}
	return strconv.ParseUint(fields[index], 10, 64)
}
