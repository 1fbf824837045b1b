// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
)

// insideDir is where a container with phases finds its own socket, phase.sock, by
// which it may tighten itself. The directory is mounted, and not the socket: the one
// that a restarted syslatchd makes is seen, too.
const insideDir = "/run/syslatch"

const insideSocket = "phase.sock"

// ServeInside serves one instance's own socket until what it returns is closed. admit
// says no to the process that connected.
type ServeInside func(s *phase.Supervisor, id, socket string, admit func(pid int) error) (io.Closer, error)

// insideOf is a directory of this host for one container, short enough for a socket's
// path. A container of the hooks' has one for each run: the daemon and a hook may be
// through with the last one at any time.
func insideOf(p *policy.File, in *instance) string {
	key := in.Container.ID
	if in.hooks != nil {
		key += " " + strconv.FormatInt(in.Planned.UnixNano(), 10)
	}
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(insideParent(p), hex.EncodeToString(sum[:8]))
}

func insideParent(p *policy.File) string { return filepath.Join(p.StateDir, "inside") }

// makeInside makes an instance's directory. The container's users are many, so it is
// open to all who can reach it: those of the container, and root.
func makeInside(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("socket of the container: %w", err)
	}
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, os.ErrExist) {
		err = nil // an earlier process's
	}
	if err == nil {
		err = os.Chmod(dir, 0o755) //nolint:gosec // whatever the umask says
	}
	if err != nil {
		return fmt.Errorf("socket of the container: %w", err)
	}
	return nil
}

// serveInside makes an instance's socket.
func (p *phasing) serveInside(in *instance) error {
	if p.inside == nil {
		return nil
	}
	dir := insideOf(p.a.policy, in)
	if err := makeInside(dir); err != nil {
		return err
	}
	server, err := p.inside(p.supervisor, in.Container.ID, filepath.Join(dir, insideSocket), func(pid int) error { return p.belongs(in, pid) })
	if err != nil {
		return fmt.Errorf("socket of the container: %w", err)
	}
	p.a.change(func() { in.inside = server })
	return p.programs.own(in)
}

// belongs says no to a process that isn't in an instance's cgroup, or below it.
//
// BUG(phases): with cgroup v1 alone there are no ids to tell: all are let in. They can
// tighten the instance.
func (p *phasing) belongs(in *instance, pid int) error {
	own := p.cgroupOf(in)
	id, err := p.kernel.Above(pid, func(id uint64) bool { return id == own })
	switch {
	case errors.Is(err, cgroup.ErrNoV2):
		return nil
	case err != nil:
		return err
	case own == 0:
		return errNoCgroup
	case id == 0:
		return fmt.Errorf("process %d is in another cgroup", pid)
	}
	return nil
}

// cgroupOf is an instance's cgroup's id, 0 before it has one.
func (p *phasing) cgroupOf(in *instance) uint64 {
	p.a.mu.Lock()
	defer p.a.mu.Unlock()
	return in.CgroupID
}

// InstanceOf is the instance whose process pid is, "" if it is none's. For it that
// instance's phases are to be switched by itself, and those of others not at all.
func (a *Agent) InstanceOf(pid int) (string, error) {
	owned := map[uint64]string{}
	for _, in := range append(a.all(), a.phases.allHooked()...) {
		if id := a.phases.cgroupOf(in); id != 0 && in.Phases != nil {
			owned[id] = in.Container.ID
		}
	}
	id, err := a.phases.kernel.Above(pid, func(id uint64) bool { return owned[id] != "" })
	if errors.Is(err, cgroup.ErrNoV2) {
		err = nil
	}
	return owned[id], err
}

// mounts are those of an instance whose socket is served.
func (p *phasing) mounts(in *instance) []specs.Mount {
	if in.inside == nil {
		return nil
	}
	return mountsOf(insideOf(p.a.policy, in))
}

func mountsOf(dir string) []specs.Mount {
	return []specs.Mount{{
		Destination: insideDir, Type: "bind", Source: dir,
		Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"},
	}}
}

// endInside removes an instance's socket.
func (p *phasing) endInside(in *instance) error {
	if in.inside != nil {
		if err := in.inside.Close(); err != nil {
			return err
		}
		p.a.change(func() { in.inside = nil })
	}
	return os.RemoveAll(insideOf(p.a.policy, in))
}

// removeInside removes what a hook made for an instance, be it served or not.
func (a *Agent) removeInside(in *instance) error {
	if in.hooks == nil || in.Phases == nil {
		return nil
	}
	return os.RemoveAll(insideOf(a.policy, in))
}

// sweepInside removes the directories that no instance has, as a hook that was killed, or
// failed, leaves them. One that works now has made its own a moment ago.
func (a *Agent) sweepInside() error {
	all, err := os.ReadDir(insideParent(a.policy))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	known := map[string]bool{}
	own, err := a.journal.ids()
	if err != nil {
		return err
	}
	for _, id := range own {
		known[insideOf(a.policy, &instance{Container: policy.Container{ID: id}})] = true
	}
	hooked, err := a.hooks.a.journal.ids()
	if err != nil {
		return err
	}
	for _, id := range hooked {
		in, err := a.hooks.load(id)
		if err != nil {
			return err // its directory can't be told
		}
		if in != nil {
			known[insideOf(a.policy, in)] = true
		}
	}
	for _, e := range all {
		dir := filepath.Join(insideParent(a.policy), e.Name())
		info, err := e.Info()
		if err != nil || known[dir] || time.Since(info.ModTime()) < planGrace {
			continue // it is removed just now, or is somebody's
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// closeInside stops serving all sockets, and leaves their directories to the next
// process.
func (p *phasing) closeInside() (err error) {
	for _, in := range append(p.a.all(), p.allHooked()...) {
		if in.inside != nil {
			err = errors.Join(err, in.inside.Close())
		}
	}
	return err
}
