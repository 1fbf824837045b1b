// SPDX-License-Identifier: Apache-2.0

// Package inject gives running processes a seccomp filter, from outside: seccomp(2)
// has no call for that, so with ptrace(2) each process is made to load it itself.
//
//	report, err := inject.Filter(ctx, inject.Scope{PIDs: []int{4711}, Tree: true}, filter, inject.Options{})
//
// All tasks of the scope are stopped, and with each that is stopped what it may have
// forked, until nothing is found that runs. A cgroup is frozen for that moment, so that
// however fast its tasks fork and end, all are found at once. Then one task of each
// process loads the filter for all threads (SECCOMP_FILTER_FLAG_TSYNC), and every task goes
// on where it was. A call in which a task was blocked is made again and is judged by the
// filter, as after any stop.
//
// That a process has the filter is known by what is read of it, not by how many filters its
// threads have, which they may choose: either TSYNC gave all threads the filters of the one
// that loaded it, and it is among these; or it is among those of each thread, while all
// threads stand. What such a process forks has it, too. Where filters can't be read (that
// takes CAP_SYS_ADMIN) it is that the kernel loaded one.
//
// The system calls in order, for one process: PTRACE_SEIZE and PTRACE_INTERRUPT of
// each thread; wait4; in one of them, with all signals blocked, mmap, seccomp (prctl
// with PR_SET_NO_NEW_PRIVS before it where the process lacks CAP_SYS_ADMIN) and munmap;
// PTRACE_DETACH. If this process dies while a task has foreign registers, the kernel
// kills that task (PTRACE_O_EXITKILL), rather than let it run wild. If it dies at any
// other point, the task goes on as it was, with the filter or without it.
//
// [RefusedError] is what was refused before anything was loaded; [TracedError],
// [ErrPermission], [ErrFrozen], [ErrABI] and [ErrGone] say why a process can't be
// reached; [IncompleteError] is when some have the filter, for good, and some don't.
//
// Only x86_64. A process must not have syscall user dispatch on (prctl(2)).
//
// BUG(inject): programs that leave the scope are not followed: a daemon that was
// orphaned before (its parent is init), a process that moves to another cgroup. Those
// that are forked while this runs are followed wherever they go.
//
// BUG(inject): no other thread may wait for a child of this process that is in the scope
// (wait4(2), also with its pid): it would take the child's stops from the tracer, and
// the tracer may take its exit status.
//
// BUG(inject): epoll_wait and some other calls with a timeout fail with EINTR when a
// task is stopped, as with SIGSTOP and SIGCONT; those without a timeout are made again.
package inject

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/osthread"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// Scope says which processes get the filter.
type Scope struct {
	// PIDs in this process's pid namespace.
	PIDs []int
	// Tree takes their descendants, too.
	Tree bool
	// Cgroup is a cgroup's directory: every process in it and below.
	Cgroup string
	// Freezer is that of Cgroup; nil is the directory's own, if it has one.
	Freezer Freezer
}

// Freezer keeps all tasks of a cgroup from running while something is done.
// [cgroup.Freezer] is one.
type Freezer interface {
	While(ctx context.Context, do func() error) error
}

// Options of Filter.
type Options struct {
	// Force loads what is refused otherwise, see [RefusedError].
	Force bool
	// Partial goes on without processes that can't be reached: the others have the filter
	// then, and there is an [IncompleteError].
	Partial bool
	// DryRun stops and looks, and loads nothing.
	DryRun bool
	// Log lets the kernel's audit log have what is denied.
	Log bool
	// Timeout is how long a task may take to stop; 0 is a minute. One that uses up its
	// cgroup's cpu.max, or waits for a disk, takes long.
	Timeout time.Duration
	// Waiting, if not nil, is told when a task takes long. It is called from another
	// goroutine than Filter was.
	Waiting func(message string)
}

// Report is what was done.
type Report struct {
	Processes []Process `json:"processes"` // in the order of loading
	// Scans is how often the scope was listed until nothing was new.
	Scans int `json:"scans"`
	// Stopped is for how long the first task stood, in nanoseconds.
	Stopped time.Duration `json:"stoppedNs"`
	// Refusals are those that Force overrode, or that a dry run met.
	Refusals []Refusal `json:"refusals,omitempty"`
}

// Process is one that has the filter, or in a dry run would get it.
type Process struct {
	PID     int    `json:"pid"`
	Command string `json:"command"` // comm
	Threads int    `json:"threads"`
	// FiltersBefore and FiltersAfter are Seccomp_filters of /proc/PID/status, of the
	// thread that loaded it.
	FiltersBefore int `json:"filtersBefore"`
	FiltersAfter  int `json:"filtersAfter"`
	// SetNoNewPrivs: it was needed, so programs with a set-user-ID bit or file
	// capabilities give it nothing from now on.
	SetNoNewPrivs bool `json:"setNoNewPrivs"`
	// PerThread: a thread had filters of its own, so each thread that lacked it loaded it by
	// itself.
	PerThread bool `json:"perThread"`
	// Present: each thread had this very filter already, and wasn't given it again. One
	// that has more than 64 filters is: they aren't read.
	Present bool `json:"present"`
	// AddsNothing: the filters that each thread had deny all that this one does. False also
	// where they can't be read, which takes CAP_SYS_ADMIN, or are more than 64, and with
	// Force.
	AddsNothing bool `json:"addsNothing"`
}

// Refusal is one reason not to load a filter.
type Refusal struct {
	PID  int    `json:"pid"`
	TID  int    `json:"tid"`
	Call string `json:"call,omitempty"`
	Why  string `json:"why"`
}

func (r Refusal) String() string {
	who := fmt.Sprintf("pid %d", r.PID)
	if r.TID != r.PID {
		who += fmt.Sprintf(", thread %d", r.TID)
	}
	return who + ": " + r.Why
}

// RefusedError is a refusal: nothing was loaded, because it would end a process at once, or be of
// no use. Options.Force does it nevertheless.
type RefusedError struct{ Refusals []Refusal }

func (e *RefusedError) Error() string {
	const most = 5
	var lines []string
	for i, r := range e.Refusals {
		if i == most {
			lines = append(lines, fmt.Sprintf("and %d more", len(e.Refusals)-most))
			break
		}
		lines = append(lines, r.String())
	}
	return "refused: " + strings.Join(lines, "; ")
}

// Errors that callers decide on.
var (
	// ErrGone: the process has ended.
	ErrGone = cgroup.ErrGone
	// ErrNobody: the scope has no process, or none any more. It comes with ErrGone.
	ErrNobody = errors.New("no process is left that could have the filter")
	// ErrPermission: the kernel doesn't let this process trace that one.
	ErrPermission = errors.New("may not be traced")
	// ErrFrozen: its cgroup is frozen, so it can't run what loads the filter.
	ErrFrozen = errors.New("is in a frozen cgroup: thaw it first")
	// ErrABI: it runs 32-bit code.
	ErrABI = errors.New("runs 32-bit code, and filters are injected into x86_64 only")
	// ErrKernelThread: it isn't a program.
	ErrKernelThread = errors.New("is a kernel thread")
	// ErrSelf: a process can't trace itself.
	ErrSelf = errors.New("is this process itself")
)

// TaskError is what stood in the way in one task.
type TaskError struct {
	PID, TID int
	Err      error
}

func (e *TaskError) Error() string {
	if e.TID == e.PID || e.TID == 0 {
		return fmt.Sprintf("pid %d: %v", e.PID, e.Err)
	}
	return fmt.Sprintf("pid %d, thread %d: %v", e.PID, e.TID, e.Err)
}

// Unwrap gives the reason.
func (e *TaskError) Unwrap() error { return e.Err }

// TracedError says that another process traces it, and there can be one only.
type TracedError struct {
	Tracer  int
	Command string
}

func (e *TracedError) Error() string {
	return fmt.Sprintf("is being traced by pid %d (%s): a process has one tracer", e.Tracer, e.Command)
}

// StopError says that a task didn't stop in time. It is as it was.
type StopError struct {
	State string // of /proc/PID/status
	Hint  string
	After time.Duration
}

func (e *StopError) Error() string {
	return fmt.Sprintf("did not stop in %v (state %s)%s", e.After.Round(time.Millisecond), e.State, e.Hint)
}

// IncompleteError says that the processes of Report have the filter, which can't be taken
// back; others don't.
type IncompleteError struct {
	Report *Report
	Err    error
}

func (e *IncompleteError) Error() string {
	return fmt.Sprintf("%d processes have the filter now, and not all that should: %v", len(e.Report.Processes), e.Err)
}

// Unwrap gives what stopped it.
func (e *IncompleteError) Unwrap() error { return e.Err }

const defaultTimeout = time.Minute

// Filter loads a filter in every task of the scope. It returns when each has it, or an
// error; if that is none of an [IncompleteError], no task was given the filter. When it
// returns no task is traced.
//
// The end of ctx ends it between two processes. It doesn't while a task has foreign
// registers: until these are restored, which is a matter of that task being given the
// processor, Filter doesn't return.
func Filter(ctx context.Context, scope Scope, filter seccomp.Filter, opts Options) (*Report, error) {
	if len(filter) == 0 || len(filter) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("filter of %d instructions, want 1 to %d", len(filter), unix.BPF_MAXINSNS)
	}
	if opts.Timeout == 0 {
		opts.Timeout = defaultTimeout
	}
	s, err := openScope(scope)
	if err != nil {
		return nil, err
	}
	defer s.close()
	return newCampaign(s, filter, opts).run(ctx)
}

func newCampaign(s *scope, filter seccomp.Filter, opts Options) *campaign {
	return &campaign{
		scope: s, filter: filter, opts: opts, report: &Report{},
		covered: map[identity]int{}, heirs: map[identity]int{}, failed: map[identity]error{},
		nothing: map[[sha256.Size]byte]bool{},
	}
}

// run makes passes until one finds that all is done.
func (c *campaign) run(ctx context.Context) (*Report, error) {
	deadline := time.Now().Add(c.opts.Timeout)
	for {
		// The kernel lets go of every tracee that is left: ptrace goes by thread.
		err := osthread.Run(func() error { return newTracer(c).run(ctx) })
		c.letGo()
		if err == nil && c.opts.DryRun {
			return c.report, nil
		}
		switch {
		case err == nil && !c.again && len(c.failed) > 0:
			err = errors.Join(slices.Collect(maps.Values(c.failed))...)
		case err == nil && !c.again:
			return c.report, nil
		case err == nil && time.Now().After(deadline):
			err = fmt.Errorf("new processes without the filter keep coming for %v", c.opts.Timeout)
		case err == nil:
			err = ctx.Err()
		}
		if err != nil && c.loaded {
			return c.report, &IncompleteError{c.report, err}
		}
		if err != nil {
			return nil, err
		}
	}
}

// campaign is what is known beyond one pass.
type campaign struct {
	scope  *scope
	filter seccomp.Filter
	opts   Options
	report *Report
	// covered are processes of which each thread was seen to have the filter, with the
	// filters that each has at least.
	covered map[identity]int
	// heirs are others that were forked by those, by their number of filters.
	heirs map[identity]int
	// doubt: what ran without the filter may have forked what looks like an heir.
	doubt bool
	// nothing says, by the digest of a task's filters, that the filter adds nothing to them.
	nothing map[[sha256.Size]byte]bool
	loaded  bool // in any process
	again   bool // there is a process without the filter
	// failed are those that Partial goes on without.
	failed map[identity]error
	// written is told that a task has the filter in its memory, and has yet to load it; a
	// test's.
	written func(tid int, at uint64)
	left    []int // tasks that the end of a tracer's thread lets go
	tracers []int
}
