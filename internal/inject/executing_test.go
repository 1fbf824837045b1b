// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bufio"
	"context"
	"errors"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// late is a target that executes something when it is told, and the task that will.
func late(t *testing.T, set func(*exec.Cmd), which string) (x *target, tid int) {
	t.Helper()
	cmd := exec.Command(must(injected()), "late", which)
	if set != nil {
		set(cmd)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // one of them is killed
	})
	x = &target{cmd: cmd, in: in, out: bufio.NewReader(out)}
	n := x.numbers(t)
	x.pid = n[0]
	if x.before, err = readStatus(x.pid); err != nil {
		t.Fatal(err)
	}
	return x, n[1]
}

// What a task executes has the filter before its first instruction.
func TestExecuting(t *testing.T) {
	needRoot(t)
	for _, which := range []string{"first", "thread"} {
		t.Run(which, func(t *testing.T) {
			g := newGroup(t)
			x, tid := late(t, into(t, g), which)
			done, err := Executing(context60(t), g.Path(), tid, denyMkdir(), Options{Timeout: patience})
			if err != nil {
				t.Fatal(err)
			}
			hasFiltersNow(t, x.before.filters, x.pid)
			x.tell(t, "go")
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if pid := x.numbers(t)[0]; pid != x.pid { // of what was executed
				t.Errorf("pid %d, want %d", pid, x.pid)
			}
			untouched(t, x.pid)
			hasOneMore(t, x.before, x.pid)
			x.try(t, 1, unix.EPERM)
		})
	}
}

// A filter of the whole cgroup waits for what executes, and both may have a task.
func TestExecutingMeanwhile(t *testing.T) {
	needRoot(t)
	g := newGroup(t)
	x, tid := late(t, into(t, g), "first")
	other := start(t, into(t, g), "threads", "1")
	done, err := Executing(context60(t), g.Path(), tid, denyMkdir(), Options{Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	filtered := make(chan error, 1)
	go func() {
		_, err := Filter(context60(t), Scope{Cgroup: g.Path()}, denyMkdir(), Options{Force: true, Timeout: patience})
		filtered <- err
	}()
	eventually(t, "the other stands", func() bool { s, err := readStatus(other.pid); return err == nil && s.tracer != 0 })
	again, err := Executing(context60(t), g.Path(), tid, denyMkdir(), Options{Timeout: patience})
	if err != nil {
		t.Errorf("again: %v", err)
	} else if err := <-again; err != nil {
		t.Errorf("again: %v", err)
	}
	x.tell(t, "go")
	if err := errors.Join(<-done, <-filtered); err != nil {
		t.Fatal(err)
	}
	x.numbers(t)
	for _, x := range []*target{x, other} {
		untouched(t, x.pid)
		hasOneMore(t, x.before, x.pid)
	}
	x.try(t, 1, unix.EPERM)
	other.try(t, 2, unix.EPERM)
}

// One that executes nothing is given the filter where it is; one of another cgroup is
// let go.
func TestExecutingNothing(t *testing.T) {
	needRoot(t)
	g, empty := newGroup(t), newGroup(t)
	x, tid := late(t, into(t, g), "first")
	ctx, cancel := context.WithCancel(context60(t))
	if _, err := Executing(ctx, empty.Path(), tid, denyMkdir(), Options{Timeout: patience}); !errors.Is(err, ErrGone) {
		t.Errorf("another cgroup: got %v, want ErrGone", err)
	}
	eventually(t, "let go", func() bool { s, err := readStatus(x.pid); return err == nil && s.tracer == 0 })
	done, err := Executing(ctx, g.Path(), tid, denyMkdir(), Options{Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	hasOneMore(t, x.before, x.pid)
	untouched(t, x.pid)
	x.tell(t, "go")
	x.numbers(t)
	x.try(t, 1, unix.EPERM)
}
