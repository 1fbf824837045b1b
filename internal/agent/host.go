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
	"strings"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
)

// kernelHost is the host that this process runs on.
type kernelHost struct {
	*cgroup.Hierarchy
	only string // if not empty, the one cgroup whose files are read and written
}

func (h kernelHost) DirOf(p *cgroup.Process, controller string) (string, error) {
	if h.only != "" {
		return h.only, nil
	}
	return h.Hierarchy.DirOf(p, controller)
}

func (h kernelHost) CgroupOf(pid int) (uint64, error) {
	path, err := h.OfPID(pid)
	if err != nil {
		return 0, err
	}
	return cgroup.ID(path)
}

// errNoOwnCgroup: a rootless container's processes can't be told from others.
var errNoOwnCgroup = errors.New("the container has no cgroup of its own (on cgroup v2, start it without --cgroups=disabled, below a cgroup that is delegated to the user; with cgroup v1 controllers, podman gives rootless containers none)")

// CgroupOfUser takes the kernel's word alone: for the process that of its user
// namespace's map; for the cgroup, who made its directory, and who is in it. What
// the user's processes do meanwhile doesn't matter: no others can be moved into a
// cgroup by them, but from below one that is theirs anyway.
func (h kernelHost) CgroupOfUser(pid int, user policy.User, hook int) (uint64, error) {
	p, err := cgroup.OpenProcess(pid)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	ids, err := namespaceOf(p, user)
	if err != nil {
		return 0, err
	}
	dir, err := h.DirOf(p, "")
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errNoOwnCgroup, err)
	}
	hookDir, err := h.OfPID(hook)
	if err != nil {
		return 0, err
	}
	if hookDir == dir || strings.HasPrefix(hookDir, dir+"/") {
		return 0, fmt.Errorf("%w: the hook runs in %s, too", errNoOwnCgroup, dir)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: dir, Err: err}
	}
	if !ids.has(st.Uid) { // crun gives it to the container's root, which may be a subordinate id
		return 0, fmt.Errorf("%w: %s is of uid %d, not of %s", errNoOwnCgroup, dir, st.Uid, user)
	}
	id, err := cgroup.ID(dir)
	if err != nil {
		return 0, err
	}
	below, err := cgroup.Children(dir)
	if err != nil {
		return 0, err
	}
	for _, d := range append(below, dir) {
		for _, member := range procs(d) {
			if err := isOf(member, user); err != nil && !errors.Is(err, cgroup.ErrGone) {
				return 0, fmt.Errorf("%w: %s: %w", errNoOwnCgroup, d, err)
			}
		}
	}
	return id, nil
}

func isOf(pid int, user policy.User) error {
	p, err := cgroup.OpenProcess(pid)
	if err != nil {
		return err
	}
	defer p.Close()
	_, err = namespaceOf(p, user)
	return err
}

// namespaceOf is the map of a process's user namespace, which must be the user's: the
// user is in it, and the host's root isn't. Who may map an id is the kernel's to say:
// the user, newuidmap by /etc/subuid, or root.
func namespaceOf(p *cgroup.Process, user policy.User) (idMap, error) {
	text, err := p.ReadFile("uid_map")
	if err != nil {
		return nil, err
	}
	ids, err := parseIDMap(text)
	if err != nil {
		return nil, fmt.Errorf("uid_map of pid %d: %w", p.PID(), err)
	}
	if ids.has(0) || !ids.has(user.UID) {
		return nil, fmt.Errorf("process %d is not of a rootless container of %s: its user namespace isn't that user's (--userns=auto and nomap leave the user out)", p.PID(), user)
	}
	return ids, nil
}

// idMap is /proc/PID/uid_map (user_namespaces(7)): ranges of ids inside, of those
// that this process sees them as, and how many.
type idMap [][3]uint32

func parseIDMap(text string) (idMap, error) {
	var m idMap
	for line := range strings.Lines(text) {
		var r [3]uint32
		if n, err := fmt.Sscan(line, &r[0], &r[1], &r[2]); err != nil || n != len(r) {
			return nil, fmt.Errorf("line %.80q: want three numbers", line)
		}
		m = append(m, r)
	}
	return m, nil
}

// has says whether an id of ours is mapped.
func (m idMap) has(id uint32) bool {
	return slices.ContainsFunc(m, func(r [3]uint32) bool { return id >= r[1] && uint64(id) < uint64(r[1])+uint64(r[2]) })
}

func (h kernelHost) Empty(ctx context.Context, cgroupID uint64) error {
	path, err := h.Path(cgroupID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed, so empty
	}
	if err != nil {
		return err
	}
	return cgroup.WaitEmpty(ctx, path)
}

// Read holds the process while it reads, so that a file that is not there is told
// from a process that has ended.
func (h kernelHost) Read(pid int, e adjust.Expectation) (string, error) {
	p, err := cgroup.OpenProcess(pid)
	if err != nil {
		return "", err
	}
	defer p.Close()
	return h.readOf(p, e)
}

func (h kernelHost) readOf(p *cgroup.Process, e adjust.Expectation) (content string, err error) {
	switch e.Source {
	case adjust.SourceProc:
		content, err = p.ReadFile(e.File)
	case adjust.SourceCgroup:
		var dir string
		if dir, err = h.DirOf(p, e.Controller); err == nil {
			var data []byte
			data, err = os.ReadFile(filepath.Join(dir, e.File))
			content = string(data)
		}
	default:
		return "", fmt.Errorf("unknown source %q", e.Source)
	}
	return strings.TrimSpace(content), err
}
