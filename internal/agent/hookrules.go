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
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// guard is what BPF programs deny to one instance by phase. They are pinned: if this
// process is killed, the instance stays in its phase.
type guard struct {
	plan *profiles.PhasePlan // nil: none has anything to say

	mu       sync.Mutex
	enforcer *bpf.Enforcer   // guarded by mu; nil while the instance is not in it
	handle   bpf.PhaseHandle // guarded by mu
	phase    string          // guarded by mu: what the supervisor has said last

	telling sync.Mutex
	counted map[string]uint64 // guarded by telling: denials that were told, by phase and program
}

// hooks is phase.Instance's.
func (g *guard) hooks() func(string) error {
	if g.plan == nil {
		return nil
	}
	return g.set
}

// holds says whether the instance is under programs.
func (g *guard) holds() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.enforcer != nil
}

// set is phase.Instance's Hooks. Before the instance is there the phase is kept.
func (g *guard) set(phase string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.enforcer != nil {
		if err := g.enforcer.Set(g.handle, g.number(phase)); err != nil {
			return err
		}
	}
	g.phase = phase
	return nil
}

// own lets the instance speak to a socket in every phase, once it is connected.
func (g *guard) own(socket string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.enforcer == nil {
		return nil
	}
	return g.enforcer.Own(g.handle, socket)
}

// number is a phase's, as the programs know it.
func (g *guard) number(phase string) uint8 { return uint8(slices.Index(g.plan.Phases, phase)) }

// add puts a cgroup under the plan's hooks, in the phase that was said last.
func (g *guard) add(e *bpf.Enforcer, id uint64, path string, opts bpf.EnforceOptions) error {
	set := bpf.PhaseSet{}
	for _, name := range g.plan.Phases {
		rules, err := phaseRules(g.plan.HookRules(name))
		if err != nil {
			return fmt.Errorf("phase %s: %w", name, err)
		}
		set[g.number(name)] = rules
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	opts.Dir, opts.Phase = dir, g.number(g.phase)
	h, err := e.Add(id, set, opts)
	if err == nil {
		g.enforcer, g.handle = e, h
	}
	return err
}

// addBelow adds what a container that runs has made below its cgroup. What it makes from
// now on below what is known is known to the kernel.
func (g *guard) addBelow(path string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for again := true; again; {
		again = false
		children, err := cgroup.Children(path)
		if err != nil {
			return err
		}
		for _, dir := range children {
			id, err := cgroup.ID(dir)
			if err == nil {
				err = g.enforcer.AddCgroup(g.handle, id)
			}
			switch {
			case err == nil:
				again = true
			case !errors.Is(err, bpf.ErrTracked) && !errors.Is(err, fs.ErrNotExist):
				return err
			}
		}
	}
	return nil
}

// remove ends it; what is there no more has ended.
func (g *guard) remove() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.enforcer == nil {
		return nil
	}
	err := g.enforcer.Remove(g.handle)
	if errors.Is(err, bpf.ErrUnknown) {
		err = nil
	}
	if err == nil {
		g.enforcer = nil
	}
	return err
}

// tell tells of what was denied to the instance since it was last called, and hands over
// all counts if there was any. An error is the end of the programs.
func (g *guard) tell(sv *phase.Supervised, told func(counted map[string]uint64)) error {
	g.telling.Lock()
	defer g.telling.Unlock()
	g.mu.Lock()
	enforcer, handle := g.enforcer, g.handle
	g.mu.Unlock()
	if enforcer == nil || sv == nil {
		return nil
	}
	all, err := enforcer.Denials(handle)
	if err != nil {
		g.mu.Lock()
		g.enforcer = nil
		g.mu.Unlock()
		return err
	}
	next := map[string]uint64{}
	news := false
	for _, d := range all {
		name := g.plan.Phases[d.Phase]
		key := name + " " + d.Program
		next[key] = d.Count
		if n := d.Count - g.counted[key]; n > 0 {
			sv.Denied(name, d.Program, n)
			news = true
		}
	}
	g.counted = next
	if news {
		told(next)
	}
	return nil
}

// watch tells of denials to a run until stop is called, which tells of the last.
func (g *guard) watch(sv *phase.Supervised) (stop func()) {
	tell := func() {
		if err := g.tell(sv, func(map[string]uint64) {}); err != nil {
			sv.Unhooked(err)
		}
	}
	return during(func(ctx context.Context) {
		tick := time.NewTicker(countEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				tell()
				return
			case <-tick.C:
				tell()
			}
		}
	})
}

// can adds to a host what the programs of its kernel can do.
func can(host *profiles.PhaseHost, e *bpf.Enforcer) {
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
}

// startingOf are the options for a process that waits to become an instance's program.
func startingOf(pid int) (o bpf.EnforceOptions, err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return o, fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	o.Starting = os.NewFile(uintptr(fd), "pidfd")
	p, err := cgroup.OpenProcess(pid)
	if err != nil {
		return o, errors.Join(err, o.Starting.Close())
	}
	defer p.Close()
	text, err := p.ReadFile("status")
	if err != nil {
		return o, errors.Join(err, o.Starting.Close())
	}
	// Whoever made it has as many filters as it had at first, or less: it may have
	// loaded its own by now.
	_, parent, _ := strings.Cut(text, "\nPPid:")
	parent, _, _ = strings.Cut(parent, "\n")
	if ppid, err := strconv.Atoi(strings.TrimSpace(parent)); err == nil && ppid > 0 {
		if s, err := cgroup.Status(ppid); err == nil {
			o.StartFilters = uint32(s.SeccompFilters)
		}
	}
	return o, nil
}

// runPins begins the name of each run's directory of pins; its cgroup's id follows.
const runPins = "/sys/fs/bpf/syslatch-run-"

// runEnforcer has the BPF programs of phases for one run.
type runEnforcer struct {
	*bpf.Enforcer
	dir string
	// alive is the cgroup's directory, locked while this process lives.
	alive *os.File
}

// openEnforcer adds to a host what its kernel's programs can do for a run's cgroup.
// Where there are none the error says why, and the host is without.
func openEnforcer(host *profiles.PhaseHost, group *cgroup.Group) (*runEnforcer, error) {
	removeStalePins()
	alive, err := lockRun(group.Path())
	if err != nil {
		return nil, err
	}
	dir := runPins + strconv.FormatUint(group.ID(), 10)
	e, err := bpf.OpenEnforcer(dir, bpf.EnforcerOptions{Instances: 1, Cgroups: 1024})
	if err != nil {
		return nil, errors.Join(err, removePins(dir), alive.Close())
	}
	can(host, e)
	return &runEnforcer{e, dir, alive}, nil
}

// lockRun says by an error that the run which made a cgroup lives.
func lockRun(cgroup string) (*os.File, error) {
	f, err := os.Open(cgroup)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", cgroup, err), f.Close())
	}
	return f, nil
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
		if isStale(h, id) {
			_ = bpf.RemoveEnforcer(dir) // or by the next run
		}
	}
}

// isStale says whether nothing is left of a run, by its cgroup's id.
func isStale(h *cgroup.Hierarchy, id uint64) bool {
	path, err := h.Path(id)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	// Before its command is there a cgroup is empty, too.
	alive, err := lockRun(path)
	if err != nil {
		return false
	}
	defer alive.Close()
	now, cancel := context.WithCancel(context.Background())
	cancel()
	return cgroup.WaitEmpty(now, path) == nil // a look
}

// enforce puts a command's cgroup under a plan's hooks, from its execve on. With gaps,
// programs that the kernel lacks are done without.
func (e *runEnforcer) enforce(g *guard, pid int, group *cgroup.Group, gaps bool) error {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/mnt", &ns); err != nil { // the command's, too
		return fmt.Errorf("mount namespace: %w", err)
	}
	opts, err := startingOf(pid)
	if err != nil {
		return err
	}
	defer opts.Starting.Close()
	// What is missing is among the gaps, and these are meant.
	opts.MountNS, opts.Partial = uint32(ns.Ino), gaps
	return g.add(e.Enforcer, group.ID(), group.Path(), opts)
}

// end lets go of everything.
func (e *runEnforcer) end() error {
	if e == nil {
		return nil
	}
	return errors.Join(e.Close(), bpf.RemoveEnforcer(e.dir), e.alive.Close())
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
