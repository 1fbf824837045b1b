// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"errors"
	"fmt"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/osthread"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// hearWithin is more than a denial takes to be told, and hearEvery how often it is looked
// for.
const (
	hearWithin = 3 * time.Second
	hearEvery  = 10 * time.Millisecond
)

// errUnheard: a source that says nothing looks like one that has nothing to say.
var errUnheard = errors.New("a denial that was made to try it is not told: audit is off, or this process is not in the host's first network namespace or sees other pids (systemd: PrivateNetwork=no)")

// heard makes a denial, and says by an error that the source doesn't tell of it.
func heard(h *cgroup.Hierarchy, s source) (err error) {
	dir, err := h.OfPID(os.Getpid())
	if err != nil {
		return err
	}
	own, err := cgroup.ID(dir)
	if err != nil {
		return err
	}
	if err := s.watch(own, 0); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.forget(own)) }()
	if err := osthread.Run(denyOne); err != nil {
		return fmt.Errorf("make a denial to try it: %w", err)
	}
	deadline, again := time.After(hearWithin), time.NewTicker(hearEvery)
	defer again.Stop()
	for {
		all, _, err := s.read()
		if err != nil {
			return err
		}
		for _, d := range all[own] {
			if d.ABI == specs.ArchX86_64 && d.Number == unix.SYS_GETPPID {
				return nil
			}
		}
		select {
		case <-again.C:
		case <-deadline:
			return errUnheard
		}
	}
}

// denyOne gives its thread a filter, and is denied one call.
func denyOne() error {
	filter, err := seccomp.Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"getppid"}, Action: specs.ActErrno}},
	}, seccomp.Options{})
	if err != nil {
		return err
	}
	if err := seccomp.Load(filter, seccomp.LoadOptions{NoNewPrivs: true, Log: true}); err != nil {
		return err
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); errno != unix.EPERM {
		return errors.New("it was allowed")
	}
	return nil
}
