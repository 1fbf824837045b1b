// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// hearWithin is more than a denial takes to be told.
const hearWithin = time.Second

// errUnheard: a source that says nothing looks like one that has nothing to say.
var errUnheard = errors.New("a denial that was made to try it is not told: audit is off, or this process is not in the host's first network namespace or sees other pids (systemd: PrivateNetwork=no)")

// heard makes a denial, and says by an error that the source doesn't tell of it.
func heard(h *cgroup.Hierarchy, s source) error {
	dir, err := h.OfPID(os.Getpid())
	if err != nil {
		return err
	}
	own, err := cgroup.ID(dir)
	if err != nil {
		return err
	}
	done := make(chan error)
	go denyOne(done)
	if err := <-done; err != nil {
		return fmt.Errorf("make a denial to try it: %w", err)
	}
	for deadline := time.Now().Add(hearWithin); ; {
		all, _, err := s.read(true)
		if err != nil {
			return err
		}
		for _, d := range all {
			if d.Cgroup == own && d.ABI == specs.ArchX86_64 && d.Number == unix.SYS_GETPPID {
				return nil
			}
		}
		if time.Now().After(deadline) {
			return errUnheard
		}
	}
}

// denyOne gives its thread a filter, is denied one call, and ends the thread.
func denyOne(done chan<- error) {
	runtime.LockOSThread() // for good
	if unix.Gettid() == os.Getpid() {
		go denyOne(done) // elsewhere: the first thread would stay
		return
	}
	filter, err := seccomp.Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"getppid"}, Action: specs.ActErrno}},
	}, seccomp.Options{})
	if err == nil {
		err = seccomp.Load(filter, seccomp.LoadOptions{NoNewPrivs: true, Log: true})
	}
	if err == nil {
		if _, _, errno := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); errno != unix.EPERM {
			err = errors.New("it was allowed")
		}
	}
	done <- err
}
