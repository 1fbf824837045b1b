// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// leftover begins the names of what a writer prepares.
const leftover = ".tmp-"

// dir is an open directory of the store. All access goes through one, so that a
// directory that is moved or replaced meanwhile is never half old, half new.
type dir struct {
	s    *Store
	f    *os.File
	name string // below the store's, slash-separated; "." for itself
}

func (d *dir) Close() error { return d.f.Close() }

func (d *dir) path(name string) string { return filepath.Join(d.s.dir, d.name, name) }

func (d *dir) wrap(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: d.path(name), Err: err}
}

// step tells tests what comes next.
func (d *dir) step(op string, names ...string) {
	if d.s.step == nil {
		return
	}
	for _, name := range names {
		op += " " + path.Join(d.name, name)
	}
	d.s.step(op)
}

// open opens name below d, following no link on the way. mode counts with
// O_CREAT only.
func (d *dir) open(name string, flags int, mode uint32) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags) | unix.O_CLOEXEC | unix.O_NOCTTY,
		Mode:    uint64(mode),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	for {
		fd, err := unix.Openat2(int(d.f.Fd()), name, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), d.path(name)), nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ELOOP):
			return nil, corrupt(d.path(name), errors.New("is, or lies behind, a symbolic link, which the store never follows"))
		case errors.Is(err, unix.ENOTDIR):
			return nil, corrupt(d.path(name), err)
		case errors.Is(err, unix.ENOSYS):
			return nil, fmt.Errorf("%w (the profile store needs openat2(2): Linux 5.6, and not denied by a seccomp filter)", d.wrap("openat2", name, err))
		}
		return nil, d.wrap("open", name, err)
	}
}

// sub opens a directory below d.
func (d *dir) sub(name string) (*dir, error) {
	f, err := d.open(name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return &dir{d.s, f, path.Join(d.name, name)}, nil
}

// read reads a file whole. What isn't a regular file of bounded size is corrupt.
func (d *dir) read(name string) ([]byte, error) {
	// O_NONBLOCK: a FIFO that was planted must not stop a reader.
	f, err := d.open(name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, corrupt(d.path(name), fmt.Errorf("is not a regular file (%s)", st.Mode().Type()))
	}
	data, err := io.ReadAll(io.LimitReader(f, profiles.MaxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > profiles.MaxFileSize {
		return nil, corrupt(d.path(name), fmt.Errorf("larger than %d bytes", profiles.MaxFileSize))
	}
	return data, nil
}

// entries lists a directory, sorted, without what isn't the store's. The
// directory is opened anew: reading moves an open one's offset.
func (d *dir) entries() ([]string, error) {
	names, err := d.all()
	return slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, ".") }), err
}

func (d *dir) all() ([]string, error) {
	f, err := d.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// stat does not follow a link either.
func (d *dir) stat(name string) (st unix.Stat_t, err error) {
	err = ignoringEINTR(func() error {
		return unix.Fstatat(int(d.f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	})
	return st, d.wrap("stat", name, err)
}

// mkdir makes a directory that may be there already.
func (d *dir) mkdir(name string, mode uint32) error {
	d.step("mkdir", name)
	err := ignoringEINTR(func() error { return unix.Mkdirat(int(d.f.Fd()), name, mode) })
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return d.wrap("mkdir", name, err)
}

// create makes a new file with data, durable in itself but not yet in its
// directory.
func (d *dir) create(name string, data []byte, mode uint32) (err error) {
	d.step("create", name)
	f, err := d.open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	d.step("write", name)
	if _, err := f.Write(data); err != nil {
		return err
	}
	d.step("fsync", name)
	return f.Sync()
}

// sync makes a directory's names durable.
func (d *dir) sync() error {
	d.step("fsync", ".")
	return d.f.Sync()
}

// rename gives what was prepared its name, durably. flags are renameat2's.
func (d *dir) rename(from, to string, flags uint) error {
	d.step("rename", from, to)
	err := ignoringEINTR(func() error {
		return unix.Renameat2(int(d.f.Fd()), from, int(d.f.Fd()), to, flags)
	})
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w (the file system must support renameat2 with RENAME_NOREPLACE, as ext4, xfs, btrfs, tmpfs and overlayfs do)", d.wrap("rename", to, err))
	case err != nil:
		return d.wrap("rename", to, err)
	}
	return d.sync()
}

// remove removes a file, or a directory and what is in it.
func (d *dir) remove(name string) error {
	d.step("unlink", name)
	err := unix.Unlinkat(int(d.f.Fd()), name, 0)
	if !errors.Is(err, unix.EISDIR) {
		return d.wrap("unlink", name, err)
	}
	sub, err := d.sub(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	names, err := sub.all()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := sub.remove(n); err != nil {
			return err
		}
	}
	d.step("rmdir", name)
	return d.wrap("rmdir", name, unix.Unlinkat(int(d.f.Fd()), name, unix.AT_REMOVEDIR))
}

// removeLeftovers removes what a writer prepared and never finished.
func (d *dir) removeLeftovers() error {
	names, err := d.all()
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, leftover) {
			if err := d.remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// makeDir makes the store's own directory and the missing ones above it, durably.
// The parent is synced even if nothing is missing: who made the directory may
// have been killed before it could.
func makeDir(name string, mode os.FileMode) error {
	parent := filepath.Dir(name)
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(parent, mode); err != nil {
			return err
		}
	}
	if err := os.Mkdir(name, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	p, err := os.Open(parent)
	if errors.Is(err, fs.ErrPermission) {
		return nil // may be entered but not read: made by an administrator, long ago
	}
	if err != nil {
		return err
	}
	defer p.Close()
	// A read-only file system answers EROFS or nothing: there is nothing to sync.
	if err := p.Sync(); err != nil && !errors.Is(err, unix.EROFS) {
		return err
	}
	return nil
}
