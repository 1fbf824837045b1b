// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// vforkCommand makes this binary a parent that waits for a child of vfork for ever, by a
// thread that has a filter of its own, so that no other can load one for it.
const vforkCommand = "internal-test-vfork"

func waitInVfork() {
	runtime.LockOSThread()
	allow := seccomp.Filter{{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}}
	program := unix.SockFprog{Len: uint16(len(allow)), Filter: &allow[0]}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		panic(errno)
	}
	if pid, _, _ := syscall.RawSyscall6(unix.SYS_CLONE, unix.CLONE_VFORK|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0); pid == 0 {
		for {
			_, _, _ = syscall.RawSyscall(unix.SYS_PAUSE, 0, 0, 0)
		}
	}
}

// A task that can't be stopped is named before the time that the switch has is over, and
// the others have the filter.
func TestRatchetNamesWhatDoesNotStop(t *testing.T) {
	g := newGroup(t)
	if err := inject.Able(); err != nil {
		t.Fatal(err) // root without a filter can
	}
	other, _ := occupy(t, g)
	dir, err := g.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe", vforkCommand)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Kill(); _ = cmd.Wait() })
	filters := func(pid int) int {
		s, err := cgroup.Status(pid)
		if err != nil {
			t.Fatal(err)
		}
		return s.SeccompFilters
	}
	waits := func() bool {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", cmd.Process.Pid))
		return slices.ContainsFunc(tasks, func(dir string) bool {
			// It may be in that state for a moment at its start, too.
			status, err := os.ReadFile(dir + "/status")
			call, err2 := os.ReadFile(dir + "/syscall")
			return err == nil && err2 == nil && strings.Contains(string(status), "State:\tD") && strings.HasPrefix(string(call), fmt.Sprint(unix.SYS_CLONE, " "))
		})
	}
	for !waits() {
		time.Sleep(time.Millisecond)
	}
	before := filters(other)
	log := logrus.New()
	log.Out = io.Discard
	r := newRatchet(map[string]seccomp.Filter{"locked": seccomp.AllowAllFilter()}, false, func() (inject.Scope, error) { return inject.Scope{Cgroup: g.Path()}, nil }, logrus.NewEntry(log))
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
	defer cancel()
	err = r.put(ctx, "locked")
	var stop *inject.StopError
	if !errors.As(err, &stop) || !strings.Contains(err.Error(), fmt.Sprint("pid ", cmd.Process.Pid)) {
		t.Errorf("got %v, want that pid %d did not stop", err, cmd.Process.Pid)
	}
	if n := filters(other); n != before+1 {
		t.Errorf("the other has %d filters, want %d", n, before+1)
	}
}

// The process that traces for a run may be killed while the cgroup is frozen.
func TestInjectorEndsWhileFrozen(t *testing.T) {
	g := newGroup(t)
	occupy(t, g)
	freezer, err := cgroup.NewFreezer(g.Path())
	if err != nil {
		t.Fatal(err)
	}
	answer := make(chan *injectAnswer, 1)
	i := &injector{thaw: freezer.Thaw, waiting: map[int]chan<- *injectAnswer{1: answer}}
	var state []byte
	if err := freezer.While(t.Context(), func() (err error) {
		i.read(strings.NewReader("")) // it has ended
		state, err = os.ReadFile(filepath.Join(g.Path(), "cgroup.freeze"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(state)) != "0" {
		t.Errorf("the cgroup is left frozen: %s", state)
	}
	if a := <-answer; !strings.Contains(a.Error, errInjectorGone.Error()) {
		t.Errorf("answer %+v", a)
	}
}
