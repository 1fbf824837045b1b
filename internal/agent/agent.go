// SPDX-License-Identifier: Apache-2.0

// Package agent owns the lifecycles: what happens to a container between the
// runtime's wish to create it and the publication of what it did. The plugin
// (and later the hook) tell it what the runtime does; it asks policy and adjust
// what that means, tracks the container's cgroup in the kernel, and hands the
// recording to the store.
//
// # What survives a kill
//
// The calls are in pinned BPF maps, the instances in the journal below the state
// directory, first-seen events in the journal as they arrive. These are the
// steps of a recorded instance; behind the arrow is what a kill right after one
// leaves, and what the next start makes of it:
//
//	Plan      journal: the instance and its tag → a container that was perhaps never
//	                     made; if it runs, it is attached to late, and that is a loss
//	          bpf Await, under the tag          → a recording, found again by its tag
//	Starting  journal: the cgroup's id          → the same
//	Started   journal: the program runs         → the same
//	Stopped   journal: when it ended            → an end that has begun: New goes on
//	                     with it, as it does from each of the following
//	          bpf Finish                        → nothing is counted any more
//	          store.Add                         → durable; adding the same recording
//	                     again changes nothing
//	          journal: it is in the store       → the rest is tidying up
//	          bpf Release                       → the kernel has forgotten
//	          remove the journal's files        → nothing
//
// Where Starting finds another cgroup than the awaited one, it writes that loss
// into the journal, gives the awaited slot back, and calls bpf Track under the
// same tag: whatever a kill leaves of this, the loss is in the recording. An
// instance that ends without a word (the daemon was dead) is ended by Synchronize.
//
// So a recording is published, or kept with its losses and not published, or, of
// a container whose program was never executed, dropped. The kernel's record may
// vanish (somebody removed the pins): that is a loss, too.
//
// # Deadlines
//
// What may block where no context reaches, a disk that hangs or the lock of
// another process, runs on a goroutine of its own. When the handler's context
// ends first, the handler answers with what it waited for, and what comes of it
// later is undone.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/holder"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

// tracker is the kernel side of recording: *bpf.Recorder.
type tracker interface {
	Await(name string, o bpf.TrackOptions) (bpf.Handle, error)
	Track(cgroupID uint64, o bpf.TrackOptions) (bpf.Handle, error)
	SetPhase(h bpf.Handle, phase uint8) error
	Instances() ([]bpf.Instance, error)
	Finish(bpf.Handle) (*bpf.Snapshot, error)
	Release(bpf.Handle) error
	Events(ctx context.Context, fn func(bpf.Event)) error
}

// versions is the profile store: *store.Store.
type versions interface {
	Active(workload string) (*profiles.Version, error)
	Version(workload string, n int) (*profiles.Version, error)
	Add(ctx context.Context, rec *profiles.Recording, o store.AddOptions) (store.Result, error)
}

// host is what there is to know of processes and cgroups: kernelHost.
type host interface {
	// CgroupOf is the id of the v2 cgroup that a process is in.
	CgroupOf(pid int) (uint64, error)
	// Empty waits until no live process is in a cgroup and below, or ctx ends.
	Empty(ctx context.Context, cgroupID uint64) error
	// CgroupOfUser is CgroupOf for the init of a rootless container, as its user's
	// hook tells: both must be the user's. The error wraps errNoOwnCgroup where
	// the process is, and its cgroup is not the container's alone.
	CgroupOfUser(pid int, user policy.User, hook int) (uint64, error)
	// Read reads an expectation's file for the container whose init is pid. The
	// error wraps cgroup.ErrGone if that has ended.
	Read(pid int, e adjust.Expectation) (string, error)
}

// errClosed answers what comes after Close.
var errClosed = errors.New("syslatchd is stopping")

// Options are what New needs beside the policy.
type Options struct {
	Log *logrus.Entry
	// Check compiles a profile, to refuse it before a runtime does.
	Check func(*specs.LinuxSeccomp) error
	// Holder starts a process that keeps the listeners of containers with phases
	// while no syslatchd runs; nil if there is to be none.
	Holder holder.Start
	// Inside serves the socket of a container with phases; nil if there is to be
	// none.
	Inside ServeInside
}

// Agent is one node's agent. Its methods may be called concurrently.
type Agent struct {
	policy     *policy.File
	log        *logrus.Entry
	check      func(*specs.LinuxSeccomp) error
	store      versions
	journal    *journal
	host       host
	cgroupMode string

	recorder    tracker       // nil if the kernel refused; then recorderErr says why
	recorderErr error         //
	collected   chan struct{} // closed when nobody reads first-seen events any more
	closers     []io.Closer   // in the order in which they were opened
	hooks       *Hooks        // what hooks of the same stateDir left; nil in their own agent
	phases      *phasing      // nil if the policy file has none
	compiler    compiler      // of phases; nil where containers can have none
	// drain, if not nil, fetches an instance's first-seen events, of which there
	// are as many as it is told: nobody collects them.
	drain func(in *instance, want int)

	// blocked holds a token for every request that waits for a disk or a lock.
	blocked chan struct{}

	// mu is never held over I/O. Where an instance's busy is held too, that was
	// taken first.
	mu        sync.Mutex
	instances map[string]*instance     // by container id; guarded by mu
	byHandle  map[bpf.Handle]*instance // those that have a slot; guarded by mu
	closed    bool                     // guarded by mu
	workers   sync.WaitGroup           // added to only with mu held and closed not set
	stop      context.CancelFunc
	stopped   context.Context // ends with Close
}

// New opens the store, the journal and, where the kernel has one, the recorder,
// and goes on with what an earlier process left. A kernel that can't record is
// not an error here: enforcing works without, and a container that is to be
// recorded gets the reason.
func New(p *policy.File, opts Options) (_ *Agent, err error) {
	var closers []io.Closer
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll(closers))
		}
	}()
	lock, err := lockState(p.StateDir)
	if err != nil {
		return nil, err
	}
	closers = append(closers, lock)
	j, err := openJournal(daemonJournal(p))
	if err != nil {
		return nil, err
	}
	s, err := store.Open(p.Store, store.Options{})
	if err != nil {
		return nil, err
	}
	closers = append(closers, s)
	hierarchy, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	a := newAgent(p, opts, s, j, kernelHost{Hierarchy: hierarchy})
	a.cgroupMode = hierarchy.Mode.String()
	recorder, err := openRecorder(hierarchy, p.BPFFS)
	if err != nil {
		a.recorderErr = err
		a.log.WithError(err).Warn("this host can't record; 'syslatch doctor' tells more")
	} else {
		a.recorder = recorder
		closers = append(closers, recorder)
	}
	if a.hooks, err = a.adoptHooks(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	if a.mayHavePhases() {
		if a.phases, err = newPhasing(a, kernelHost{Hierarchy: hierarchy}, opts); err != nil {
			return nil, errors.Join(err, a.Close())
		}
		a.compiler = a.phases
		closers = append(closers, a.phases)
	} else {
		removeIdle(a)
	}
	if err := a.begin(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.closers = closers
	return a, nil
}

// openRecorder refuses a host on which no cgroup would ever be recorded.
func openRecorder(h *cgroup.Hierarchy, bpffs string) (*bpf.Recorder, error) {
	if err := h.RequireV2(); err != nil {
		return nil, err
	}
	return bpf.Open(bpffs, bpf.Options{})
}

// newAgent is an agent without a recorder that has not begun.
func newAgent(p *policy.File, opts Options, s versions, j *journal, h host) *Agent {
	a := &Agent{
		policy: p, log: opts.Log, check: (&checks{check: opts.Check}).do,
		store: s, journal: j, host: h,
		collected: make(chan struct{}),
		blocked:   make(chan struct{}, maxBlocked),
		instances: map[string]*instance{},
		byHandle:  map[bpf.Handle]*instance{},
	}
	a.stopped, a.stop = context.WithCancel(context.Background())
	return a
}

// begin takes over what the journal has and starts the workers.
func (a *Agent) begin() error {
	// Before the events are read: the ring may hold some of these instances.
	if err := a.pickUp(); err != nil {
		return err
	}
	if a.recorder == nil {
		close(a.collected)
	} else {
		a.spawn("read first-seen events", a.collect)
	}
	a.spawn("look after instances", a.sweep)
	if a.phases != nil {
		a.spawn("accept listeners", a.phases.accept)
		a.spawn("count what BPF programs deny", a.phases.programs.watch)
		a.spawn("compile phases", a.phases.prepare)
	}
	a.collectHooks()
	return nil
}

// closeWait bounds the wait for workers that a disk holds up.
const closeWait = 5 * time.Second

// Close stops the workers. Recordings go on in the kernel, and what is not
// published yet waits for the next start. If a worker doesn't end, an error says
// so; then nothing is closed, and the process should exit.
func (a *Agent) Close() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nil
	}
	a.closed = true
	a.mu.Unlock()
	a.stop()
	done := make(chan struct{})
	go func() {
		a.workers.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(closeWait):
		return fmt.Errorf("a worker has not ended within %s (does the disk of %s hang?); nothing is lost, the next start goes on with it", closeWait, a.policy.Store)
	}
	return closeAll(a.closers)
}

func closeAll(closers []io.Closer) error {
	var errs []error
	for _, c := range slices.Backward(closers) {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// spawn runs a worker, unless the agent is closed. A panic ends the worker only:
// a daemon that dies of one container fails open for all others.
func (a *Agent) spawn(what string, work func()) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	a.workers.Go(func() {
		if err := a.safely(what, func() error { work(); return nil }); err != nil {
			a.log.WithError(err).Error("worker ended early")
		}
	})
	return true
}

// safely makes a panic an error.
func (a *Agent) safely(what string, do func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			a.log.WithField("stack", string(debug.Stack())).Error("panic")
			err = fmt.Errorf("%s: internal error: %v (a bug: please report it with the log of syslatchd)", what, r)
		}
	}()
	return do()
}

// maxBlocked bounds the requests that wait for a disk or a lock at once: each
// holds a thread.
const maxBlocked = 64

// within runs what may block where no context reaches, and gives up when ctx
// ends, with an error that says what was waited for. What comes of it later is
// dropped.
func within[T any](ctx context.Context, a *Agent, what string, do func() (T, error)) (T, error) {
	var zero T
	late := func() (T, error) {
		return zero, fmt.Errorf("%s: no answer in time (does a disk hang, or does another process hold a lock?): %w", what, ctx.Err())
	}
	select {
	case a.blocked <- struct{}{}:
	case <-ctx.Done():
		return late()
	}
	type answer struct {
		value T
		err   error
	}
	done := make(chan answer, 1) // buffered: nobody may wait for it any more
	spawned := a.spawn(what, func() {
		defer func() { <-a.blocked }()
		var got answer
		got.err = a.safely(what, func() (err error) {
			got.value, err = do()
			return err
		})
		done <- got
	})
	if !spawned {
		<-a.blocked
		return zero, errClosed
	}
	select {
	case got := <-done:
		return got.value, got.err
	case <-ctx.Done():
		return late()
	}
}
