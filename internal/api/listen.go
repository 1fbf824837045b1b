// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listener is a unix socket at a path that is this process's alone until Close.
type Listener struct {
	*net.UnixListener
	path  string
	inode inode    // of the socket, so that nobody else's is removed
	lock  *os.File // flock of path+".lock"
	close func() error
}

type inode struct{ dev, ino uint64 }

// Listen makes a socket with mode, and its directory with 0700 if that isn't there. The
// directory and those above must be root's or this user's, so that nobody else can
// answer in this process's place. What a killed process left at path is replaced; what
// another listens at, and what is no socket, is left alone.
//
// System calls, and what a crash behind each leaves: mkdir; open and flock of PATH.lock,
// which the kernel gives up with the process (the file stays: removing it would let two
// hold it); connect, unlink of what nobody listens at; socket; fchmod before bind, so
// that there is no moment at which the socket is there with the umask's mode; bind;
// listen (a socket that refuses, which the next Listen replaces).
func Listen(path string, mode fs.FileMode) (*Listener, error) { return listen(path, mode, true) }

// listen takes no lock in a directory that a container sees: who may read a file may
// lock it, and keep the next process from listening.
func listen(path string, mode fs.FileMode, locked bool) (_ *Listener, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("socket %s: %w", path, err)
		}
	}()
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	for at := dir; ; at = filepath.Dir(at) {
		if err := checkDirectory(at, at == dir); err != nil {
			return nil, err
		}
		if at == "/" {
			break
		}
	}
	var lock *os.File
	if locked {
		if lock, err = lockFile(path + ".lock"); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				lock.Close()
			}
		}()
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// unix_bind_bsd in net/unix/af_unix.c takes the mode of the socket's inode, less
		// the umask. Whoever may write to a socket may connect.
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), uint32(mode.Perm())) })
		return errors.Join(err, chmodErr)
	}}
	listener, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	l := &Listener{UnixListener: listener.(*net.UnixListener), path: path, lock: lock}
	l.SetUnlinkOnClose(false) // Close looks whose it is
	l.close = sync.OnceValue(l.closeOnce)
	// The umask may have taken away what mode has; it can't have added to it.
	err = os.Chmod(path, mode.Perm())
	if err == nil {
		l.inode, err = lstat(path)
	}
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return l, nil
}

// Close stops listening and removes the socket. Further calls do nothing.
func (l *Listener) Close() error { return l.close() }

func (l *Listener) closeOnce() error {
	var err error
	// Under the lock, nobody who asks for it has replaced the socket meanwhile.
	if is, statErr := lstat(l.path); statErr == nil && is == l.inode {
		err = os.Remove(l.path)
	}
	err = errors.Join(err, l.UnixListener.Close())
	if l.lock != nil {
		err = errors.Join(err, l.lock.Close())
	}
	return err
}

func lstat(path string) (inode, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return inode{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return inode{st.Dev, st.Ino}, nil
}

// checkDirectory: in a directory with the sticky bit others can't replace what is ours,
// but they can take a name that is free.
func checkDirectory(path string, last bool) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	ours := st.Uid == 0 || int64(st.Uid) == int64(os.Geteuid())
	writable := st.Mode&0o022 != 0 && (last || st.Mode&unix.S_ISVTX == 0)
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is no directory (name the directory itself, not a link to it)", path)
	case !ours || writable:
		return fmt.Errorf("others can write to %s (chown it to root, chmod go-w; or use a socket in a directory of your own)", path)
	}
	return nil
}

// lockFile is held until it is closed, or the process ends.
func lockFile(path string) (*os.File, error) {
	// O_NONBLOCK: in a directory that somebody else could write to, it may be a FIFO.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("%s is no file (move it away)", path)
	}
	if err == nil {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errInUse
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

var errInUse = errors.New("another process listens there (give each its own socket)")

// removeStale removes a socket that nobody listens at: what a killed process leaves.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return errors.New("something else is there, which is left alone (move it away)")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		conn.Close()
		return errInUse
	case !errors.Is(err, unix.ECONNREFUSED):
		return err
	}
	return os.Remove(path)
}
