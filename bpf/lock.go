// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// dirLock is an exclusive flock on a directory. The kernel releases it when its
// holder dies.
type dirLock struct {
	file *os.File
}

// lockDir makes dir if need be and returns it locked.
func lockDir(dir string) (*dirLock, error) {
	for {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		f, err := os.Open(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		l := &dirLock{file: f}
		if err := l.lock(); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		// Whoever had the lock may have removed the directory: then this one is
		// another than the name's.
		mine, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if now, err := os.Stat(dir); err == nil && os.SameFile(mine, now) {
			return l, nil
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
}

func (l *dirLock) lock() error {
	for {
		err := unix.Flock(int(l.file.Fd()), unix.LOCK_EX)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", l.file.Name(), err)
		}
	}
}

// unlock can't fail on an open file, and closing it unlocks too.
func (l *dirLock) unlock() { _ = unix.Flock(int(l.file.Fd()), unix.LOCK_UN) }

func (l *dirLock) close() error { return l.file.Close() }
