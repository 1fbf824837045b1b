// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// output is a file that a command's end writes, opened before the command runs:
// a recording may take an hour, and what runs meanwhile may be anything.
//
// A file is replaced by rename below its directory's descriptor, so that it is
// old or new, never half, and a link that the command puts in its place is
// replaced, not followed:
//
//	openat DIR                       → nothing
//	create, unlink DIR/.NAME.RANDOM  → an empty file of that name, if killed between
//	   (the command runs)
//	create, write, fsync the same    → that file, and the old NAME
//	rename to NAME; fsync DIR        → the new NAME
//
// Links that are there before are followed, as by any tool that is told to
// write to one. What is no regular file (/dev/stdout, a pipe) is written to.
type output struct {
	path   string // as given
	stdout io.Writer
	device *os.File // what is no regular file
	// A file, if neither of these is set:
	dir  *os.Root
	name string // below dir
	perm fs.FileMode
	old  fs.FileInfo // of the file that was there; nil for none
}

// openOutput opens path, or stdout for "-". Files are made with perm, less the
// umask; one that exists keeps its owner and permissions.
func openOutput(path string, stdout io.Writer, perm fs.FileMode) (_ *output, err error) {
	if path == "-" {
		return &output{path: "standard output", stdout: stdout}, nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	o := &output{path: path, perm: perm}
	real := path
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(path); err == nil {
			return nil, errors.New("is a link to nothing (remove it, or make what it names)")
		}
	case err != nil:
		return nil, err
	case st.IsDir():
		return nil, errors.New("is a directory (name a file in it)")
	case !st.Mode().IsRegular():
		// Its own descriptor: no offset is shared with the command.
		if o.device, err = os.OpenFile(path, os.O_WRONLY|unix.O_NOCTTY, 0); err != nil {
			return nil, err
		}
		return o, nil
	default:
		o.old = st
		if real, err = filepath.EvalSymlinks(path); err != nil {
			return nil, err
		}
	}
	dir := filepath.Dir(real)
	if o.dir, err = os.OpenRoot(dir); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("no directory %s (make it first)", dir)
		}
		return nil, err
	}
	o.name = filepath.Base(real)
	// Only an attempt tells: permissions, a read-only mount, quotas, /proc.
	f, err := o.temporary()
	if err == nil {
		err = errors.Join(f.Close(), o.dir.Remove(o.base(f)))
	}
	if err != nil {
		_ = o.dir.Close()
		return nil, err
	}
	return o, nil
}

func (o *output) temporary() (*os.File, error) {
	var salt [8]byte
	_, _ = rand.Read(salt[:]) // never fails: crypto/rand aborts the program instead
	return o.dir.OpenFile("."+o.name+"."+hex.EncodeToString(salt[:]), os.O_WRONLY|os.O_CREATE|os.O_EXCL, o.perm)
}

func (o *output) base(f *os.File) string { return filepath.Base(f.Name()) }

// write writes data, once. Where that fails, the data is kept in the directory
// for temporary files, and the error says where.
func (o *output) write(data []byte) error {
	err := o.replace(data)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("write %s: %w", o.path, err)
	f, rescue := os.CreateTemp("", "syslatch-*-"+filepath.Base(o.path))
	if rescue != nil {
		return err
	}
	_, rescue = f.Write(data)
	if rescue = errors.Join(rescue, f.Close()); rescue != nil {
		_ = os.Remove(f.Name())
		return err
	}
	return fmt.Errorf("%w (what was to be written is in %s)", err, f.Name())
}

func (o *output) replace(data []byte) (err error) {
	switch {
	case o.stdout != nil:
		_, err := o.stdout.Write(data)
		return err
	case o.device != nil:
		_, err := o.device.Write(data)
		return err
	}
	f, err := o.temporary()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = o.dir.Remove(o.base(f))
		}
	}()
	_, err = f.Write(data)
	if err == nil && o.old != nil {
		err = like(f, o.old)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := o.dir.Rename(o.base(f), o.name); err != nil {
		return err
	}
	d, err := o.dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// like gives a file the owner and permissions of another: what sudo replaces
// must stay its owner's. An owner that this process may not give is left.
func like(f *os.File, old fs.FileInfo) error {
	st := old.Sys().(*syscall.Stat_t) // os.Stat's, on Linux
	if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return f.Chmod(old.Mode().Perm())
}

// close closes what openOutput opened. Nothing is left to be told by then: write
// has synced.
func (o *output) close() {
	if o.dir != nil {
		_ = o.dir.Close()
	}
	if o.device != nil {
		_ = o.device.Close()
	}
}
