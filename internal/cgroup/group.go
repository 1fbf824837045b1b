// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Group is a cgroup that this process made, in the v2 hierarchy. It holds no
// descriptor: Remove is all that it takes to end it.
type Group struct {
	path string
	id   uint64
}

// New makes a group "syslatch-NAME-RANDOM" below the cgroup that this process is
// in. See [NewIn].
func New(name string) (*Group, error) { return NewIn("", name) }

// NewIn makes a group "syslatch-NAME-RANDOM" in the directory parent, or with ""
// below the cgroup that this process is in, so that the limits, programs and
// recordings of that one hold for the group, and its manager's clean-up reaches
// it. The group has no controllers of its own to speak of, so that the
// no-internal-processes rule is not touched: the parent may hold processes.
//
// Where this process's own cgroup can't have such a child, because it is not
// ours to write to or is threaded (processes can't enter below one), the nearest
// ancestor that can is taken. In a delegated subtree (nsdelegate, or a service
// manager's Delegate=) that stays inside of it.
func NewIn(parent, name string) (*Group, error) {
	if strings.ContainsAny(name, "/\n") || len(name) > 200 {
		return nil, fmt.Errorf("cgroup name %q: want at most 200 bytes, no slash and no newline", name)
	}
	h, err := Detect()
	if err != nil {
		return nil, err
	}
	if err := h.RequireV2(); err != nil {
		return nil, err
	}
	var salt [8]byte
	_, _ = rand.Read(salt[:]) // never fails
	name = "syslatch-" + name + "-" + hex.EncodeToString(salt[:])
	if parent != "" {
		return makeGroup(filepath.Join(parent, name))
	}
	own, err := h.OfPID(os.Getpid())
	if err != nil {
		return nil, err
	}
	var errs []error
	for dir := own; ; dir = filepath.Dir(dir) {
		g, err := makeGroup(filepath.Join(dir, name))
		if err == nil {
			return g, nil
		}
		errs = append(errs, err)
		if dir == h.Unified || dir == "/" {
			break
		}
	}
	return nil, fmt.Errorf("make a cgroup (run as root or in a delegated cgroup, with %s mounted writable): %w", h.Unified, errors.Join(errs...))
}

// makeGroup makes a directory that a process can be put into.
func makeGroup(path string) (*Group, error) {
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	fail := func(err error) (*Group, error) { return nil, errors.Join(err, os.Remove(path)) }
	kind, err := os.ReadFile(filepath.Join(path, "cgroup.type"))
	if err != nil {
		return fail(err) // not cgroup v2
	}
	if kind := strings.TrimSpace(string(kind)); kind != "domain" {
		return fail(fmt.Errorf("%s: its type is %q, as its parent is threaded", path, kind))
	}
	id, err := ID(path)
	if err != nil {
		return fail(err)
	}
	return &Group{path, id}, nil
}

// Name is the last part of the path.
func (g *Group) Name() string { return filepath.Base(g.path) }

// Path is the group's directory.
func (g *Group) Path() string { return g.path }

// ID is the group's cgroup id.
func (g *Group) ID() uint64 { return g.id }

// Open opens the directory, for clone3's CLONE_INTO_CGROUP
// (syscall.SysProcAttr.CgroupFD).
func (g *Group) Open() (*os.File, error) {
	return os.OpenFile(g.path, unix.O_DIRECTORY|unix.O_PATH, 0)
}

// Kill sends SIGKILL to every process of the group and below, those that are
// being forked included (cgroup.kill, Linux 5.14; recording needs 6.1, so there
// is no other way for older ones). [Group.Wait] tells when they are gone. A
// group that was removed has nothing to kill.
func (g *Group) Kill() error {
	f, err := os.OpenFile(filepath.Join(g.path, "cgroup.kill"), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString("1")
		err = errors.Join(err, f.Close())
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// Wait is [WaitEmpty] for the group.
func (g *Group) Wait(ctx context.Context) error { return WaitEmpty(ctx, g.path) }

// WaitEmpty returns when no live process is left in the v2 cgroup at path and
// below, or when ctx ends, with its error. Zombies don't count, and a cgroup that
// is gone is empty. What is the case is looked at once also if ctx has ended.
func WaitEmpty(ctx context.Context, path string) error {
	events, err := os.Open(filepath.Join(path, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed, so empty
	}
	if err != nil {
		return err
	}
	defer events.Close()
	// The end of ctx must wake poll: a pipe does.
	wakeR, wakeW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer wakeR.Close()
	stop := context.AfterFunc(ctx, func() { wakeW.Close() })
	defer func() {
		if stop() {
			wakeW.Close()
		}
	}()
	buf := make([]byte, 256)
	for {
		// Reading arms the notification, so no change is missed between read
		// and poll (fs/kernfs/file.c: POLLPRI when the file changed since it
		// was read last).
		n, err := events.ReadAt(buf, 0)
		if errors.Is(err, unix.ENODEV) {
			return nil
		}
		if n == 0 && err != nil {
			return fmt.Errorf("read %s: %w", events.Name(), err)
		}
		if slices.Contains(strings.Split(string(buf[:n]), "\n"), "populated 0") {
			return nil
		}
		fds := []unix.PollFd{
			{Fd: int32(events.Fd()), Events: unix.POLLPRI},
			{Fd: int32(wakeR.Fd()), Events: unix.POLLIN},
		}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll %s: %w", events.Name(), err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// Remove removes the group and those below it, children first. While a live
// process is in one of them the error wraps EBUSY, and that one and its
// ancestors stay. A group that was removed is no error.
func (g *Group) Remove() error {
	children, err := Children(g.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	slices.Reverse(children)
	for _, path := range append(children, g.path) {
		if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.ENOENT) {
			return &fs.PathError{Op: "rmdir", Path: path, Err: err}
		}
	}
	return nil
}
