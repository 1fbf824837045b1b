// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// enforcer has the BPF programs of phases for one run. They are pinned: if this process
// is killed, the command stays in its phase.
type enforcer struct {
	*bpf.Enforcer
	dir     string
	numbers map[string]uint8
	handle  bpf.PhaseHandle
}

// runPins begins the name of each run's directory of pins; its cgroup's id follows.
const runPins = "/sys/fs/bpf/syslatch-run-"

// openEnforcer adds to a host what its kernel's programs can do for a run's cgroup.
// Where there are none the error says why, and the host is without.
func openEnforcer(host *profiles.PhaseHost, group *cgroup.Group) (*enforcer, error) {
	removeStalePins()
	dir := runPins + strconv.FormatUint(group.ID(), 10)
	e, err := bpf.OpenEnforcer(dir, bpf.EnforcerOptions{Instances: 1, Cgroups: 1024})
	if err != nil {
		return nil, errors.Join(err, removePins(dir))
	}
	missing := func(prefix string) bool {
		for section := range e.Missing() {
			// Before Linux 6.2 there is lsm/path_truncate in its place.
			if strings.HasPrefix(section, prefix) && section != "lsm/file_truncate" {
				return true
			}
		}
		return false
	}
	host.LSM, host.CgroupConnect = !missing("lsm/"), !missing("cgroup/")
	return &enforcer{Enforcer: e, dir: dir}, nil
}

// removePins is for a directory that may not be there, or not be on a bpffs.
func removePins(dir string) error {
	if _, err := os.Stat(dir); err != nil {
		return nil //nolint:nilerr // nothing to remove
	}
	return bpf.RemoveEnforcer(dir)
}

// removeStalePins removes what killed runs left whose commands have ended.
func removeStalePins() {
	dirs, _ := filepath.Glob(runPins + "*") // the pattern is good
	h, err := cgroup.Detect()
	if err != nil {
		return
	}
	for _, dir := range dirs {
		id, err := strconv.ParseUint(strings.TrimPrefix(dir, runPins), 10, 64)
		if err != nil {
			continue
		}
		path, err := h.Path(id)
		if err == nil {
			now, cancel := context.WithCancel(context.Background())
			cancel()
			err = cgroup.WaitEmpty(now, path) // a look
		} else if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if err == nil {
			_ = bpf.RemoveEnforcer(dir) // or by the next run
		}
	}
}

// enforce puts a command's cgroup under a plan's hooks: in the phase from, but for
// execve, which the command itself takes. [beginning] ends that. With gaps, programs that
// the kernel lacks are done without.
func (e *enforcer) enforce(plan *profiles.PhasePlan, from string, group *cgroup.Group, gaps bool) error {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/mnt", &ns); err != nil { // the command's, too
		return fmt.Errorf("mount namespace: %w", err)
	}
	set := bpf.PhaseSet{}
	numbers := map[string]uint8{}
	for i, name := range plan.Phases {
		rules, err := phaseRules(plan.HookRules(name))
		if err != nil {
			return fmt.Errorf("phase %s: %w", name, err)
		}
		numbers[name] = uint8(i)
		set[uint8(i)] = rules
		if name == from {
			rules.Exec = true
			set[bpf.StartPhase] = rules
		}
	}
	dir, err := os.Open(group.Path())
	if err != nil {
		return err
	}
	defer dir.Close()
	// What is missing is among the gaps, and these are meant.
	e.handle, err = e.Add(group.ID(), set, bpf.EnforceOptions{Phase: bpf.StartPhase, Dir: dir, MountNS: uint32(ns.Ino), Partial: gaps})
	if err == nil {
		e.numbers = numbers
	}
	return err
}

// beginning is the time until a command's execve, in which its programs are in the
// phase that it begins in, with the execve. Afterwards they follow the supervisor.
type beginning struct {
	programs *enforcer

	mu    sync.Mutex
	phase string // guarded by mu: what the supervisor has said last
	ended bool   // guarded by mu
}

// set is phase.Instance's Hooks.
func (b *beginning) set(phase string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		if err := b.programs.Set(b.programs.handle, b.programs.numbers[phase]); err != nil {
			return err
		}
	}
	b.phase = phase
	return nil
}

// barrierTime bounds the barrier behind a command's execve.
const barrierTime = 10 * time.Second

// over ends the beginning, for every task.
func (b *beginning) over(barrier *cgroup.Freezer) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.programs.Set(b.programs.handle, b.programs.numbers[b.phase]); err != nil {
		return err
	}
	b.ended = true
	ctx, cancel := context.WithTimeout(context.Background(), barrierTime)
	defer cancel()
	return barrier.Barrier(ctx)
}

// end lets go of everything.
func (e *enforcer) end() error {
	if e == nil {
		return nil
	}
	var err error
	if e.numbers != nil {
		err = e.Remove(e.handle)
	}
	return errors.Join(err, e.Close(), bpf.RemoveEnforcer(e.dir))
}

// phaseRules are a plan's rules in the words of package bpf.
func phaseRules(h profiles.HookRules) (bpf.PhaseRules, error) {
	r := bpf.PhaseRules{
		OpenRead: h.OpenRead, OpenWrite: h.OpenWrite, ReadTrees: h.ReadPaths, WriteTrees: h.WritePaths,
		ReadFiles: true, WriteFiles: h.WriteFiles, Exec: h.Exec,
		Families: bpf.FamilySet(h.Families), Send: bpf.FamilySet(h.Send), Receive: bpf.FamilySet(h.Receive),
		Connect: h.Connect, Bind: h.Bind, Listen: h.Listen, Accept: h.Accept,
	}
	if h.Network == nil {
		return r, nil
	}
	r.Destinations = &bpf.Destinations{Unix: slices.Contains(h.Network, "unix")}
	for _, text := range h.Network {
		if text == "unix" {
			continue
		}
		prefix, port, err := policy.ParseDestination(text)
		if err != nil {
			return r, err
		}
		r.Destinations.Prefixes = append(r.Destinations.Prefixes, bpf.Destination{Prefix: prefix, Port: port})
	}
	return r, nil
}
