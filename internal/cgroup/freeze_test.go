// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func freezer(t *testing.T, dir string) *Freezer {
	t.Helper()
	f, err := NewFreezer(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// holds calls Barrier, and wants the switch as it was.
func holds(t *testing.T, f *Freezer) {
	t.Helper()
	before := read(t, f.control)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := f.Barrier(ctx); err != nil {
		t.Error(err)
	}
	before = strings.Replace(before, "FREEZING", "FROZEN", 1) // by the time that Barrier returns
	if after := read(t, f.control); after != before {
		t.Errorf("%s: %q, before it was %q", f.control, after, before)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// start runs a command in the group.
func (g *Group) start(t *testing.T, argv ...string) *exec.Cmd {
	t.Helper()
	dir, err := g.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = g.Kill()
		_ = cmd.Wait() // killed
	})
	return cmd
}

func TestBarrierTasks(t *testing.T) {
	g := group(t, "")
	f := freezer(t, g.Path())
	if !f.Rejudges() || f.Dir() != g.Path() {
		t.Errorf("%+v", f)
	}
	holds(t, f) // of no tasks
	occupy(t, g)
	holds(t, f)

	child := &Group{path: mkdir(t, filepath.Join(g.Path(), "child"))}
	occupy(t, child)
	holds(t, f)

	// A stopped task stays stopped.
	stopped := g.start(t, "/bin/sleep", "3600")
	if err := stopped.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(stopped.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("%v, %v", status, err)
	}
	holds(t, f)
	if p := stat(t, stopped.Process.Pid); p.State != "T" {
		t.Errorf("the stopped task is in state %s", p.State)
	}

	// Tasks that come and go, and one that runs.
	g.start(t, "/bin/sh", "-c", "while :; do /bin/true; done")
	g.start(t, "/bin/sh", "-c", "while :; do :; done")
	for range 20 {
		holds(t, f)
	}
}

func stat(t *testing.T, pid int) Task {
	t.Helper()
	k, ok := readTask(strconv.Itoa(pid))
	if !ok {
		t.Fatalf("no stat of %d", pid)
	}
	return k
}

// TestBarrierVfork: a parent that waits in vfork for its child's execve counts as
// frozen where it is.
func TestBarrierVfork(t *testing.T) {
	g := group(t, "")
	cmd, dir, err := g.command("vfork")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close() // the child ends, then the parent
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	// Written by the child.
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	holds(t, freezer(t, g.Path()))
}

// TestBarrierOthers: a cgroup that somebody else froze stays so, and a barrier that
// meets a thaw freezes again.
func TestBarrierOthers(t *testing.T) {
	g := group(t, "")
	f := freezer(t, g.Path())
	occupy(t, g)
	write(t, f.control, "1")
	holds(t, f)
	write(t, f.control, "0")

	// By an ancestor.
	child := &Group{path: mkdir(t, filepath.Join(g.Path(), "child"))}
	occupy(t, child)
	write(t, f.control, "1")
	holds(t, freezer(t, child.path))
	write(t, f.control, "0")

	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.WriteFile(f.control, []byte("0"), 0)
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for range 20 {
		if err := f.Barrier(ctx); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-done
	if got := read(t, f.control); got != "0" {
		t.Errorf("left %q", got)
	}
}

func TestBarrierGone(t *testing.T) {
	g := group(t, "")
	f := freezer(t, g.Path())
	cmd, in := occupy(t, g)
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	holds(t, f) // of zombies, or none
	if err := errors.Join(g.Wait(t.Context()), g.Remove()); err != nil {
		t.Fatal(err)
	}
	if err := f.Barrier(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := NewFreezer(g.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestFreezerOf(t *testing.T) {
	h := detect(t)
	g := group(t, "")
	cmd, _ := occupy(t, g)
	f, err := h.FreezerOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if f.Dir() != g.Path() {
		t.Errorf("%s, want %s", f.Dir(), g.Path())
	}
	// This process can't freeze itself, wherever it is.
	if f, err := h.FreezerOf(os.Getpid()); err == nil {
		t.Errorf("own: %s", f.Dir())
	}
	if _, err := NewFreezer(h.Unified); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("root: %v", err)
	}
	own, err := h.OfPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.notOurs(own, ""); !errors.Is(err, ErrOwnCgroup) {
		t.Error(err)
	}
	if err := h.notOurs(h.Unified, ""); !errors.Is(err, ErrOwnCgroup) {
		t.Error(err)
	}
	if err := h.notOurs(g.Path(), ""); err != nil {
		t.Error(err)
	}
	ended := exec.Command("/bin/true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.FreezerOf(ended.Process.Pid); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
}

// TestFreezerV1 is the fallback: a process in the root of v2, and in a directory of
// v1's freezer.
func TestFreezerV1(t *testing.T) {
	h := detect(t)
	if h.v1["freezer"].point == "" {
		t.Skip("no v1 freezer here")
	}
	own, err := h.Dir(os.Getpid(), "freezer")
	if err != nil {
		t.Fatal(err)
	}
	dir := mkdir(t, filepath.Join(own, "syslatch-"+testPrefix+"v1"))
	defer func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	}()
	root := &Group{path: h.Unified}
	cmd, in, err := root.run("wait")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	write(t, filepath.Join(dir, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid))
	f, err := h.FreezerOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if f.Dir() != dir || f.Rejudges() {
		t.Errorf("%+v", f)
	}
	holds(t, f)
	write(t, f.control, "FROZEN")
	holds(t, f)
	write(t, f.control, "THAWED")
}

func TestNotFrozenError(t *testing.T) {
	e := &NotFrozenError{Dir: "/g", Err: context.DeadlineExceeded}
	for i := range 10 {
		e.Tasks = append(e.Tasks, Task{TID: i, Comm: "a\n", State: "D", Wchan: "here"})
	}
	e.Tasks[1].Wchan = ""
	got := e.Error()
	if !strings.HasPrefix(got, `/g is not frozen: context deadline exceeded; waiting for thread 0 "a\n" in state D (here), thread 1 "a\n" in state D, thread 2`) || !strings.HasSuffix(got, ", and 2 more") {
		t.Error(got)
	}
}

// vfork waits for a child that shares no memory with it, so that it can be one of
// Go's: it says that it is there, and ends with standard input.
func vfork() error {
	pid, errno := vforkAndWait([]byte{'\n'})
	if errno != 0 {
		return errno
	}
	_, err := unix.Wait4(pid, nil, 0, nil)
	return err
}

//go:nosplit
//go:norace
func vforkAndWait(buf []byte) (pid int, errno unix.Errno) {
	p := uintptr(unsafe.Pointer(&buf[0]))
	r, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_VFORK|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || r != 0 {
		return int(r), errno
	}
	unix.RawSyscall(unix.SYS_WRITE, 1, p, 1)
	unix.RawSyscall(unix.SYS_READ, 0, p, 1)
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}
