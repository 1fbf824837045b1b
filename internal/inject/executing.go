// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/osthread"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// Executing gives a filter to a process whose task tid waits to execute a program, by
// an answer that the caller has yet to give: the program has it before its first
// instruction, and whatever that task calls until then is not judged by it.
//
// It returns when the task is traced, which is when it may go on. What became of it
// comes through the channel, which is closed then. A process that can't be given the
// filter is killed. If it executes nothing until ctx ends it is given the filter where
// it is. A task that isn't in the cgroup dir, or below, is let go: its number was
// another's, [ErrGone].
//
// A task that a [Filter] of this process has stopped already is left to that one: nil,
// and a closed channel.
//
// The system calls in order: PTRACE_SEIZE with PTRACE_O_TRACEEXEC; wait4; at the stop for
// the execve PTRACE_SETOPTIONS with PTRACE_O_EXITKILL and PTRACE_INTERRUPT, and then as
// in Filter. If this process dies before that stop, the program runs without the filter.
func Executing(ctx context.Context, dir string, tid int, filter seccomp.Filter, opts Options) (<-chan error, error) {
	if opts.Timeout == 0 {
		opts.Timeout = defaultTimeout
	}
	opts.Force = true // there is no call that it waits in, and nobody to ask
	info, err := readStatus(tid)
	if err != nil {
		return nil, &TaskError{tid, tid, err}
	}
	traced, done := make(chan error, 1), make(chan error, 1)
	go func() {
		defer close(done)
		err := osthread.Run(func() error {
			s := &scope{Scope: Scope{PIDs: []int{info.tgid}}, followed: map[identity]bool{}}
			return newTracer(newCampaign(s, filter, opts)).executing(ctx, dir, info.tgid, tid, traced)
		})
		if err != nil {
			done <- &TaskError{info.tgid, tid, err}
		}
	}()
	if err := <-traced; err != nil {
		return nil, &TaskError{info.tgid, tid, err}
	}
	return done, nil
}

// executing tells traced once; an error that it was told is not returned.
func (t *tracer) executing(ctx context.Context, dir string, pid, tid int, traced chan<- error) error {
	signal.Notify(t.children, unix.SIGCHLD)
	defer signal.Stop(t.children)
	st, err := readStat(pid)
	for try := 1; err == nil; try++ {
		if err = seizeCall(tid, optionsExec); !errors.Is(err, unix.EPERM) {
			break
		}
		// Whoever of us has it stops it, and gives it the filter.
		tracer := tracerOf(tid)
		if isOurs(tracer) {
			traced <- nil
			return nil
		}
		if try == tries || tracer != 0 && tracerOf(tid) != 0 {
			break
		}
		t.pause(ctx, tick) // it has just been let go
		err = nil
	}
	if err != nil {
		err = t.whyNot(st, tid, err)
	}
	var k *task
	if err == nil {
		// From here on the number can't become another task's.
		k = t.add(nil, tid)
		t.adopt(k, st)
		err = isIn(dir, st)
	}
	traced <- err
	if err != nil {
		return nil //nolint:nilerr // it was told, and the end of this thread lets the task go
	}
	defer t.closeMem(k)
	if err = t.executed(ctx, k, pid); err != nil {
		// One of them does: the first where it stands, which takes no CAP_KILL.
		_, killed := ptrace(unix.PTRACE_SETOPTIONS, k.tid, 0, unix.PTRACE_O_EXITKILL)
		if e := unix.Kill(pid, unix.SIGKILL); killed != nil && e != nil {
			err = errors.Join(err, fmt.Errorf("and it can't be killed: %w", e))
		}
	}
	return err
}

// executed gives the filter to what a traced task executes.
func (t *tracer) executed(ctx context.Context, k *task, pid int) error {
	for {
		stands, err := t.awaitExec(ctx, k, pid)
		if err != nil || !stands {
			return err
		}
		err = t.inject(k.p, k)
		switch {
		case errors.Is(err, ErrGone) && !stillThere(pid):
			return nil
		case errors.Is(err, ErrFrozen) && ctx.Err() == nil:
			t.pause(ctx, tick)
			continue
		case err != nil:
			return err
		}
		break
	}
	if want := t.covered[k.p.identity]; !hasFilters(pid, want) {
		return fmt.Errorf("not all of its threads have %d filters, as they should", want)
	}
	t.detach(k)
	return nil
}

// isIn is ErrGone where a process isn't in a cgroup.
func isIn(dir string, st stat) error {
	all, _, err := (&scope{Scope: Scope{Cgroup: dir}}).list(1, nil)
	if err == nil && all[st.pid].identity != st.identity {
		err = fmt.Errorf("%w: another has its number, in another cgroup", ErrGone)
	}
	return err
}

// awaitExec waits until a task has executed a program and stands before its first
// instruction, or has ended: false.
func (t *tracer) awaitExec(ctx context.Context, k *task, pid int) (stands bool, err error) {
	begun := time.Now()
	asked := false // that it stop where it is
	for k.running {
		progress := false
		// A thread that executes a program has its process's number then.
		for _, tid := range slices.Compact([]int{k.tid, pid}) {
			var ws unix.WaitStatus
			got, err := unix.Wait4(tid, &ws, unix.WNOHANG|unix.WALL, nil)
			switch {
			case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECHILD) && tid == pid && k.tid != pid, err == nil && got == 0:
				continue
			case errors.Is(err, unix.ECHILD) && k.tid != pid && stillThere(pid):
				continue // it may have become that
			case errors.Is(err, unix.ECHILD):
				t.gone(k)
				return false, nil
			case err != nil:
				return false, fmt.Errorf("wait4: %w", err)
			case !ws.Stopped():
				if tid == k.tid && tid != pid && stillThere(pid) {
					progress = true
					continue
				}
				t.gone(k)
				return false, nil
			}
			progress = true
			deliver := 0
			switch event, sig := int(uint32(ws)>>16), ws.StopSignal(); event {
			case eventStop:
				if asked {
					k.running = false
					return true, nil
				}
			case unix.PTRACE_EVENT_EXEC:
				if k.tid != pid {
					delete(t.tasks, k.tid)
					delete(k.p.tasks, k.tid)
					k.tid = pid
					t.tasks[pid], k.p.tasks[pid] = k, k
				}
				_, err := ptrace(unix.PTRACE_SETOPTIONS, k.tid, 0, optionsExec|unix.PTRACE_O_EXITKILL)
				if err == nil {
					_, err = ptrace(unix.PTRACE_INTERRUPT, k.tid, 0, 0)
				}
				if err != nil && !errors.Is(err, unix.ESRCH) { // killed: wait4 will tell
					return false, fmt.Errorf("ptrace: at an execve: %w", err)
				}
				asked = true
			case 0:
				deliver = int(sig)
			}
			if err := t.resume(k, unix.PTRACE_CONT, deliver); err != nil {
				return false, err
			}
		}
		if progress {
			continue
		}
		if ctx.Err() != nil && !asked {
			if _, err := ptrace(unix.PTRACE_INTERRUPT, k.tid, 0, 0); err == nil {
				asked, begun = true, time.Now()
			}
		}
		if asked && time.Since(begun) > t.opts.Timeout {
			return false, t.stopError(k, time.Since(begun))
		}
		if !asked {
			begun = time.Now()
			t.pause(ctx, tick)
		} else {
			t.pause(context.Background(), tick)
		}
	}
	return true, nil
}

func stillThere(tid int) bool {
	st, err := readStat(tid)
	return err == nil && !st.dead()
}

// tracerOf is 0 where there is none.
func tracerOf(tid int) int {
	info, err := readStatus(tid)
	if err != nil {
		return 0
	}
	return info.tracer
}

// isOurs says whether a tracer is a thread of this process.
func isOurs(tracer int) bool {
	if tracer == 0 {
		return false
	}
	_, err := os.Stat("/proc/self/task/" + strconv.Itoa(tracer))
	return err == nil
}
