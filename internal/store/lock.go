// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// turn is the workload's queue within this process: a channel that holds one
// token. It is never removed; there are as many as there are workloads.
func (s *Store) turn(w string) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.turns[w] == nil {
		s.turns[w] = make(chan struct{}, 1)
	}
	return s.turns[w]
}

// lock makes and opens the workload's directory and takes its lock, or gives up
// when ctx ends. Closing the directory drops the lock; then unlock lets the next
// of this process in.
func (s *Store) lock(ctx context.Context, workload string) (w *dir, unlock func(), err error) {
	name := encodeName(workload)
	if err := ctx.Err(); err != nil {
		return nil, nil, fmt.Errorf("workload %s: %w", label(workload), err)
	}
	turn := s.turn(name)
	select {
	case turn <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, s.lockedError(ctx, workload)
	}
	next := func() { <-turn }
	for {
		w, err := s.flock(ctx, workload, next)
		if err != nil {
			return nil, nil, err
		}
		same, err := w.inPlace()
		if same && err == nil {
			return w, func() { w.Close(); next() }, nil
		}
		w.Close()
		if err == nil && ctx.Err() != nil {
			err = fmt.Errorf("workload %s: its directory keeps being replaced: %w", label(workload), ctx.Err())
		}
		if err != nil {
			next()
			return nil, nil, err
		}
	}
}

// flock opens the directory and locks it. When it fails it has called next or
// will do so itself once the kernel lets go of the waiter.
func (s *Store) flock(ctx context.Context, workload string, next func()) (*dir, error) {
	name := encodeName(workload)
	if err := s.root.mkdir(name, s.mode(0o750)); err != nil {
		next()
		return nil, err
	}
	w, err := s.root.sub(name)
	if err != nil {
		next()
		return nil, err
	}
	s.root.step("flock", name)
	fd := int(w.f.Fd())
	err = ignoringEINTR(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		got := make(chan error, 1)
		s.waiters.Add(1)
		go func() {
			defer s.waiters.Done()
			got <- ignoringEINTR(func() error { return unix.Flock(fd, unix.LOCK_EX) })
		}()
		select {
		case err = <-got:
		case <-ctx.Done():
			err := s.lockedError(ctx, workload)
			s.waiters.Add(1)
			go func() {
				defer s.waiters.Done()
				<-got
				w.Close()
				next()
			}()
			return nil, err
		}
	}
	if err != nil {
		w.Close()
		next()
		return nil, fmt.Errorf("lock workload %s: %w", label(workload), w.wrap("flock", ".", err))
	}
	return w, nil
}

// inPlace tells whether the workload's directory is still the one that is open:
// it may have been moved away while this process waited for its lock.
func (d *dir) inPlace() (bool, error) {
	here, err := d.stat(".")
	if err != nil {
		return false, err
	}
	there, err := d.s.root.stat(d.name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return here.Dev == there.Dev && here.Ino == there.Ino, err
}

func (s *Store) lockedError(ctx context.Context, workload string) error {
	return fmt.Errorf("workload %s: %w by %s: %w", label(workload), ErrLocked, s.holder(encodeName(workload)), ctx.Err())
}

// holder says who holds a workload's lock: /proc/locks names the process that
// took it, by its pid here, if it has one here. Nothing is written for this, so
// nothing can be stale.
func (s *Store) holder(w string) string {
	const unknown = "an unknown process (see lslocks)"
	st, err := s.root.stat(w)
	if err != nil {
		return unknown
	}
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	f, err := os.Open("/proc/locks")
	if err != nil {
		return unknown
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// 7: FLOCK  ADVISORY  WRITE 4242 fe:00:131099 0 EOF, a waiter's with "->"
		x := strings.Fields(lines.Text())
		if len(x) < 6 || x[1] != "FLOCK" || x[5] != want {
			continue
		}
		if x[4] == fmt.Sprint(os.Getpid()) {
			return "this process"
		}
		comm, err := os.ReadFile("/proc/" + x[4] + "/comm")
		if err != nil {
			return "pid " + x[4]
		}
		return fmt.Sprintf("pid %s (%s)", x[4], strings.TrimSpace(string(comm)))
	}
	return unknown
}
