// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
)

// needRoot is for tests that make cgroups.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making cgroups needs root")
	}
}

func detect(t *testing.T) kernelHost {
	t.Helper()
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	return kernelHost{Hierarchy: h}
}

// newGroup is a cgroup that is removed with what runs in it.
func newGroup(t *testing.T) *cgroup.Group {
	t.Helper()
	needRoot(t)
	g, err := cgroup.New("agent-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(g.Kill(), g.Wait(context.Background()), g.Remove()); err != nil {
			t.Error(err)
		}
	})
	return g
}

// occupy starts a process in a group that ends when stop is called.
func occupy(t *testing.T, g *cgroup.Group) (pid int, stop func()) {
	t.Helper()
	dir, err := g.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func() {
		if !ended {
			ended = true
			in.Close()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(stop)
	return cmd.Process.Pid, stop
}

func TestHostCgroups(t *testing.T) {
	h, g := detect(t), newGroup(t)
	now, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Empty(now, g.ID()); err != nil {
		t.Errorf("an empty cgroup, asked without waiting: %v", err)
	}
	pid, stop := occupy(t, g)
	if id, err := h.CgroupOf(pid); err != nil || id != g.ID() {
		t.Errorf("got cgroup %d, %v, want %d", id, err, g.ID())
	}
	if err := h.Empty(now, g.ID()); !errors.Is(err, context.Canceled) {
		t.Errorf("a cgroup with a process, asked without waiting: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- h.Empty(t.Context(), g.ID()) }()
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the end of the last process goes unnoticed")
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := h.Empty(t.Context(), g.ID()); err != nil {
		t.Errorf("a cgroup that was removed: %v", err)
	}
	if _, err := h.CgroupOf(pid); !errors.Is(err, cgroup.ErrGone) {
		t.Errorf("cgroup of a process that has ended: %v", err)
	}
}

func TestHostReads(t *testing.T) {
	h, g := detect(t), newGroup(t)
	pid, stop := occupy(t, g)
	status := adjust.Expectation{Source: adjust.SourceProc, File: "status"}
	kind := adjust.Expectation{Source: adjust.SourceCgroup, File: "cgroup.type"}
	missing := adjust.Expectation{Source: adjust.SourceCgroup, File: "no.such"}
	if got, err := h.Read(pid, status); err != nil || !strings.Contains(got, "Pid:\t"+strconv.Itoa(pid)+"\n") {
		t.Errorf("status: %v, %.60q", err, got)
	}
	if got, err := h.Read(pid, kind); err != nil || got != "domain" {
		t.Errorf("cgroup.type: %q, %v", got, err)
	}
	if _, err := h.Read(pid, missing); !errors.Is(err, os.ErrNotExist) || errors.Is(err, cgroup.ErrGone) {
		t.Errorf("a file that is not there: %v, want that, and not that the process has ended", err)
	}
	if _, err := h.Read(pid, adjust.Expectation{Source: "etc"}); err == nil {
		t.Error("an unknown source is no error")
	}
	stop()
	for _, e := range []adjust.Expectation{status, kind, missing} {
		if _, err := h.Read(pid, e); !errors.Is(err, cgroup.ErrGone) {
			t.Errorf("%s of a process that has ended: %v", e.File, err)
		}
	}
}

func TestDescribe(t *testing.T) {
	w := newWorld(t, byAnnotation)
	a := w.start()
	defer a.close()
	r, err := a.describe(adjust.Runtime{Engine: "containerd"})
	if err != nil || r.CgroupMode != adjust.CgroupV2 || r.PageSize != os.Getpagesize() || r.HardLimits != nil {
		t.Errorf("without a pid: %+v, %v", r, err)
	}
	r, err = a.describe(adjust.Runtime{PID: os.Getpid()})
	if err != nil || len(r.HardLimits) < 10 {
		t.Errorf("with one: %+v, %v", r, err)
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || r.HardLimits["RLIMIT_NOFILE"] != limit.Max {
		t.Errorf("RLIMIT_NOFILE: got %d, %v, want %d", r.HardLimits["RLIMIT_NOFILE"], err, limit.Max)
	}
	if _, err := a.describe(adjust.Runtime{PID: 1 << 30}); !errors.Is(err, cgroup.ErrGone) {
		t.Errorf("of no process: %v", err)
	}
}

func TestHardLimits(t *testing.T) {
	const text = `Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max open files            1024                 4096                 files
Max realtime timeout      unlimited            7                    us
Max nonsense              1                    2                    x
Max processes             5
`
	got := hardLimits(text)
	if len(got) != 3 || got["RLIMIT_CPU"] != ^uint64(0) || got["RLIMIT_NOFILE"] != 4096 || got["RLIMIT_RTTIME"] != 7 {
		t.Errorf("got %v", got)
	}
}
