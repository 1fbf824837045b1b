// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Freezer stops and continues all tasks of a cgroup and of those below it.
//
// In the v2 hierarchy (cgroup.freeze, Linux 5.2) it takes every task out of its
// system call: when it goes on, the call is made again, and seccomp judges it again.
// A parent in vfork(2) and stopped tasks count as frozen where they are.
//
// BUG(cgroup): v1's freezer (since Linux 6.1) leaves tasks that wait in poll, select,
// epoll_wait, futex, nanosleep and a few others where they are, and they go on
// inside of their call.
//
// BUG(cgroup): whoever else freezes and thaws the same cgroup meanwhile, as
// `podman pause` does, works on the same switch: if it freezes the cgroup after
// Barrier has looked, Barrier's thaw undoes that.
type Freezer struct {
	dir          string
	control      string // the switch, and its two positions
	freeze, thaw string
	v2           bool
}

// ErrOwnCgroup means that this process is in the cgroup.
var ErrOwnCgroup = errors.New("this process is in the cgroup, and would be frozen with it")

// NewFreezer is for a directory of the v2 hierarchy, or of v1's freezer. The error
// wraps fs.ErrNotExist if it has no switch: a v2 root, a cgroup that is gone, or
// another v1 controller.
func NewFreezer(dir string) (*Freezer, error) {
	for _, f := range []Freezer{
		{dir, filepath.Join(dir, "cgroup.freeze"), "1", "0", true},
		{dir, filepath.Join(dir, "freezer.state"), "FROZEN", "THAWED", false},
	} {
		switch _, err := os.Lstat(f.control); {
		case err == nil:
			return &f, nil
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
	}
	return nil, fmt.Errorf("no cgroup.freeze and no freezer.state in %s: %w", dir, fs.ErrNotExist)
}

// FreezerOf is for the cgroup that a process is in: of v2, or if that is the root,
// of v1's freezer. That nothing else is in the cgroup is the caller's to know; with
// [ErrOwnCgroup] it refuses one that this process is in.
func (h *Hierarchy) FreezerOf(pid int) (*Freezer, error) {
	p, err := OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	var errs []error
	for _, controller := range []string{"", "freezer"} {
		dir, err := h.DirOf(p, controller)
		if errors.Is(err, ErrGone) {
			return nil, err
		}
		var f *Freezer
		if err == nil {
			f, err = NewFreezer(dir)
		}
		if err == nil {
			err = h.notOurs(dir, controller)
		}
		if err == nil {
			return f, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("no cgroup of pid %d can be frozen (put it into a cgroup of its own): %w", pid, errors.Join(errs...))
}

func (h *Hierarchy) notOurs(dir, controller string) error {
	own, err := h.Dir(os.Getpid(), controller)
	if err != nil {
		return err
	}
	if own == dir || strings.HasPrefix(own, dir+"/") {
		return fmt.Errorf("%s: %w", dir, ErrOwnCgroup)
	}
	return nil
}

// Dir is the directory.
func (f *Freezer) Dir() string { return f.dir }

// Rejudges says whether every call that was blocked is made again after Barrier.
func (f *Freezer) Rejudges() bool { return f.v2 }

// NotFrozenError names the tasks that did not freeze in time.
type NotFrozenError struct {
	Dir   string
	Tasks []Task
	Err   error // of the context
}

// Task is one thread.
type Task struct {
	TID  int
	Comm string // what it calls itself: any bytes
	// State is as in /proc/TID/stat: D waits for something that no signal ends.
	State string
	Wchan string // where in the kernel it sleeps, if that can be read
}

func (e *NotFrozenError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s is not frozen: %v", e.Dir, e.Err)
	const most = 8
	for i, t := range e.Tasks {
		if i == most {
			fmt.Fprintf(&b, ", and %d more", len(e.Tasks)-most)
			break
		}
		sep := ","
		if i == 0 {
			sep = "; waiting for"
		}
		fmt.Fprintf(&b, "%s thread %d %q in state %s", sep, t.TID, t.Comm, t.State)
		if t.Wchan != "" {
			fmt.Fprintf(&b, " (%s)", t.Wchan)
		}
	}
	return b.String()
}

// Unwrap gives the context's error.
func (e *NotFrozenError) Unwrap() error { return e.Err }

// Barrier returns when every task of the cgroup has been stopped at once, outside of
// any system call; see [Freezer] for what is excepted. They go on before it returns,
// also if it fails: with a [NotFrozenError] if ctx ends first. A cgroup that somebody
// else has frozen stays so, and once it is frozen the barrier holds. One that is gone
// has no tasks.
//
// It writes the switch, reads the state until it is frozen, and writes the switch
// back. If this process dies in between, the cgroup stays frozen until somebody
// thaws it ([Freezer.Thaw]); another Barrier takes it for somebody else's.
func (f *Freezer) Barrier(ctx context.Context) (err error) {
	return f.While(ctx, func() error { return nil })
}

// While is Barrier with something that is done while all tasks are stopped, which is not
// done if Barrier would fail. Of a cgroup that is gone nothing is stopped, and it is done
// nevertheless.
func (f *Freezer) While(ctx context.Context, do func() error) (err error) {
	control, err := os.OpenFile(f.control, os.O_RDWR, 0)
	if err != nil {
		if err = gone(err); err == nil {
			err = do()
		}
		return err
	}
	defer control.Close()
	ours := false
	defer func() {
		if !ours {
			return
		}
		if _, thawErr := control.WriteAt([]byte(f.thaw), 0); gone(thawErr) != nil {
			err = errors.Join(err, fmt.Errorf("thaw %s: %w", f.dir, thawErr))
		}
	}()
	if err := gone(f.wait(ctx, control, &ours)); err != nil {
		return err
	}
	return do()
}

// Thaw lets the tasks of the cgroup go on: after a process that died in Barrier.
func (f *Freezer) Thaw() error {
	control, err := os.OpenFile(f.control, os.O_WRONLY, 0)
	if err == nil {
		_, err = control.WriteString(f.thaw)
		err = errors.Join(err, control.Close())
	}
	if gone(err) != nil {
		return fmt.Errorf("thaw %s: %w", f.dir, err)
	}
	return nil
}

// gone takes the end of a cgroup for no error.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// wait freezes and returns when that is done. It sets ours before it writes the
// switch.
func (f *Freezer) wait(ctx context.Context, control *os.File, ours *bool) error {
	// The state of v1 is in the switch, whose reading brings it up to date.
	events, frozen := control, f.freeze
	if f.v2 {
		var err error
		if events, err = os.Open(filepath.Join(f.dir, "cgroup.events")); err != nil {
			return err
		}
		defer events.Close()
		frozen = "frozen 1"
	}
	wakeR, wakeW, err := os.Pipe() // the end of ctx must wake poll
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer wakeR.Close()
	stop := context.AfterFunc(ctx, func() { wakeW.Close() })
	defer func() {
		if stop() {
			wakeW.Close()
		}
	}()
	fds := []unix.PollFd{{Fd: int32(wakeR.Fd()), Events: unix.POLLIN}}
	if f.v2 {
		fds = append(fds, unix.PollFd{Fd: int32(events.Fd()), Events: unix.POLLPRI})
	}
	// The kernel tells of changes of cgroup.events 10 ms apart at the least
	// (CGROUP_FILE_NOTIFY_MIN_INTV), and v1 tells of none: it takes looking, too.
	const shortest, longest = 20 * time.Microsecond, 10 * time.Millisecond
	for pause := shortest; ; pause = min(2*pause, longest) {
		// Each time: somebody may have thawed it meanwhile.
		state, err := readLines(control)
		if err != nil {
			return err
		}
		if slices.Contains(state, f.thaw) {
			*ours = true
			if _, err := control.WriteAt([]byte(f.freeze), 0); err != nil {
				return err
			}
		}
		if state, err = readLines(events); err != nil {
			return err
		}
		if slices.Contains(state, frozen) {
			return nil
		}
		if ctx.Err() != nil {
			return &NotFrozenError{f.dir, f.unfrozen(), context.Cause(ctx)}
		}
		timeout := unix.NsecToTimespec(pause.Nanoseconds())
		if _, err := unix.Ppoll(fds, &timeout, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll: %w", err)
		}
	}
}

func readLines(f *os.File) ([]string, error) {
	buf := make([]byte, 256)
	n, err := f.ReadAt(buf, 0)
	if n == 0 && err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return strings.Split(strings.TrimSpace(string(buf[:n])), "\n"), nil
}

// unfrozen lists the tasks that keep the cgroup from being frozen, as well as can be
// told from outside.
func (f *Freezer) unfrozen() (tasks []Task) {
	list := "cgroup.threads"
	if !f.v2 {
		list = "tasks"
	}
	_ = walk(f.dir, func(dir string) error {
		data, err := os.ReadFile(filepath.Join(dir, list))
		if err != nil {
			return nil // it is gone
		}
		for tid := range strings.FieldsSeq(string(data)) {
			if t, ok := readTask(tid); ok && !t.frozen() {
				tasks = append(tasks, t)
			}
		}
		return nil
	})
	return tasks
}

func readTask(tid string) (t Task, ok bool) {
	stat, err := os.ReadFile(filepath.Join("/proc", tid, "stat"))
	if err != nil {
		return t, false
	}
	t.TID, _ = strconv.Atoi(tid) // the kernel's own
	text := string(stat)
	begin, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if begin < 0 || end < begin {
		return t, false
	}
	t.Comm = text[begin+1 : end]
	t.State, _, _ = strings.Cut(strings.TrimSpace(text[end+1:]), " ")
	if wchan, err := os.ReadFile(filepath.Join("/proc", tid, "wchan")); err == nil && string(wchan) != "0" {
		t.Wchan = string(wchan)
	}
	return t, true
}

// frozen may take a task that sleeps for a frozen one.
func (t Task) frozen() bool {
	switch t.State {
	case "D": // v1's freezer, before Linux 6.1, has them in this state
		return strings.Contains(t.Wchan, "refrigerator")
	case "R":
		return false
	case "S":
		// v2's trap is compiled into get_signal on some kernels.
		return t.Wchan == "" || t.Wchan == "get_signal" || t.Wchan == "do_freezer_trap"
	}
	return true
}
