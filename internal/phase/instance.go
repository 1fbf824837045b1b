// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// Listener answers for one chain of filters. [seccomp.Listener] is one.
type Listener interface {
	// Serve answers until the last task of the chain is gone (nil), or ctx ends.
	Serve(ctx context.Context, decide func(*seccomp.Notification) (goOn bool, errno uint)) error
	// Close lets go of this process's descriptor. A listener may also have a method
	// GiveUp, by which nobody else keeps one: Serve has failed, and nobody will answer.
	Close() error
}

// Barrier stops every task of an instance once, and returns when all have been.
// [cgroup.Freezer] is one.
type Barrier interface {
	Barrier(ctx context.Context) error
	// Rejudges says whether every call that was blocked is made again after it.
	Rejudges() bool
}

// Instance is what [Supervisor.Add] is to supervise. What is nil is not there to
// enforce with; what a phase lacks by it has to be among Uncovered.
type Instance struct {
	ID, Name, Workload, Policy string

	Set     *profiles.PhaseSet
	Plan    *profiles.PhasePlan
	Tables  map[string]*profiles.PhaseTable // of Plan, see [Tables]; nil: they are made
	Initial string                          // phase to begin in; empty is Set's
	// Record: the instance is recorded, and its phases are marks of where its calls
	// count. Nothing is enforced, and every phase may follow every other, whoever asks.
	// Hooks tells the recorder.
	Record bool
	// Generation of that, for an instance that an earlier process supervised; 0 for one
	// that begins, with 1.
	Generation uint64

	Barrier Barrier
	// Hooks tells the kernel's programs a phase.
	Hooks func(phase string) error
	// Keep keeps a phase and its generation for a later process, before they are in
	// force. nil: nobody does.
	Keep func(phase string, generation uint64) error
	// Ready is asked before a chain's first execve goes on. Its error denies that: what
	// enforces the phases is not there.
	Ready func() error
	// Began keeps for a later process that the start is over, before the first execve of
	// each chain goes on. Its error denies that: a process that is started after a kill
	// would take the program for a runtime.
	Began func() error
	// Loosens says of which limit a container would have more in a phase than now, by
	// an error. It is asked where the container itself wants the switch.
	Loosens func(ctx context.Context, phase string) error
	// Limits sets what limits a phase has.
	Limits func(ctx context.Context, phase string) error
	// Ratchet puts an irreversible phase's filter on every task.
	Ratchet func(ctx context.Context, phase string) error
	// Enter sees to it that what a task, which comes from outside, is about to execute
	// has that filter. It returns when the execve may go on.
	Enter func(tid int, phase string) error
	// Mark has what filters deny from now on be told as denied in a phase: see
	// [Supervised.Filtered].
	Mark func(phase string)
	// HasBegun: an earlier process saw the first execve.
	HasBegun bool
	// Uncovered is what a phase asks for and nothing enforces here.
	Uncovered func(phase string) []string
}

// Supervised is an instance that has a supervisor.
type Supervised struct {
	in   Instance
	s    *Supervisor
	log  *logrus.Entry
	turn chan struct{} // held by the one switch

	tables map[string]*profiles.PhaseTable // by phase, StartPhase among them; not changed
	now    atomic.Pointer[profiles.PhaseTable]

	ctx     context.Context // of the listeners
	cancel  context.CancelFunc
	serving sync.WaitGroup
	// begun is set before the first execve is decided: from then on there may be programs
	// to put a ratchet on, and before only a runtime.
	begun   atomic.Bool
	denials denials

	mu     sync.Mutex
	status Status            // guarded by mu
	whole  bool              // guarded by mu: the switch to status.Phase was finished, as well as it can be
	broken map[string]string // guarded by mu: what failed for good, by what it concerns
}

// Tables are what is answered in each phase of a plan, StartPhase among them. Instances
// of one plan can share them.
func Tables(plan *profiles.PhasePlan) map[string]*profiles.PhaseTable {
	out := map[string]*profiles.PhaseTable{}
	for _, phase := range append([]string{profiles.StartPhase}, plan.Phases...) {
		out[phase] = plan.Table(phase, seccomp.Number)
	}
	return out
}

func newSupervised(s *Supervisor, in Instance) (*Supervised, error) {
	if in.Initial == "" {
		in.Initial = in.Set.Initial
	}
	if !slices.Contains(in.Plan.Phases, in.Initial) {
		return nil, fmt.Errorf("unknown phase %q", in.Initial)
	}
	if in.Plan.Listener && in.Barrier == nil {
		return nil, errors.New("no barrier: calls that are blocked in the kernel at a switch would not be judged again")
	}
	sv := &Supervised{
		in: in, s: s, turn: make(chan struct{}, 1), tables: in.Tables, broken: map[string]string{},
		log: s.opts.Log.WithFields(logrus.Fields{"instance": in.ID, "policy": in.Policy}),
	}
	if sv.tables == nil {
		sv.tables = Tables(in.Plan)
	}
	sv.begun.Store(in.HasBegun || !in.Plan.Listener)
	sv.ctx, sv.cancel = context.WithCancel(context.Background())
	sv.denials.report, sv.denials.stop = sv.reportDenied, make(chan struct{})
	return sv, nil
}

// begin is the first phase, of which no task is yet, or the one to go on with.
func (sv *Supervised) begin() error {
	to := sv.in.Initial
	if sv.in.Hooks != nil {
		if err := sv.in.Hooks(to); err != nil {
			return fmt.Errorf("phase %s: %w", to, err)
		}
	}
	if sv.in.Mark != nil {
		sv.in.Mark(to)
	}
	sv.now.Store(sv.tables[to])
	sv.mu.Lock()
	sv.status = Status{
		ID: sv.in.ID, Name: sv.in.Name, Workload: sv.in.Workload, Policy: sv.in.Policy,
		Phase: to, Generation: max(sv.in.Generation, 1), Since: time.Now().UTC(), Recorded: sv.in.Record,
	}
	sv.whole = sv.in.Generation == 0 // else who was killed may have begun a switch: see Rejudge
	sv.mu.Unlock()
	kind := Begun
	if sv.in.Generation != 0 {
		kind = Resumed
	}
	sv.emit(Event{Kind: kind, To: to})
	return nil
}

// Status is the instance's, as it is now.
func (sv *Supervised) Status() Status {
	sv.mu.Lock()
	defer sv.mu.Unlock()
	st := sv.status
	st.Denied = sv.denials.total.Load()
	st.Next = sv.next(st.Phase)
	st.Uncovered = []string{}
	if sv.in.Record {
		st.Uncovered = append(st.Uncovered, onlyRecorded)
	}
	if sv.in.Barrier != nil && !sv.in.Barrier.Rejudges() && !sv.in.Record {
		st.Uncovered = append(st.Uncovered, notRejudged)
	}
	if sv.in.Uncovered != nil {
		st.Uncovered = append(st.Uncovered, sv.in.Uncovered(st.Phase)...)
	}
	for _, what := range []string{atBarrier, atRecord, atLimits, atRatchet, atListener, atHooks} {
		if why, ok := sv.broken[what]; ok {
			st.Uncovered = append(st.Uncovered, what+": "+why)
		}
	}
	switch {
	case st.State == Ended:
	case len(sv.broken) > 0:
		st.State = Degraded
	case sv.whole:
		st.State = Holds
	default:
		st.State = Switching
	}
	return st
}

// onlyRecorded is what a recorded instance lacks.
const onlyRecorded = "nothing is denied and no limit set: the instance is recorded, and the phase is where its calls count"

// notRejudged is what cgroup v1's freezer lacks.
const notRejudged = "calls that are blocked at a switch may go on as the phase before allowed (the freezer of cgroup v1 doesn't have all of them made again; mount cgroup v2)"

// What may be broken.
const (
	atBarrier  = "calls that were blocked at the switch may go on as the phase before allowed"
	atRecord   = "calls that were blocked at the switch may count in the phase before alone"
	atLimits   = "limits"
	atRatchet  = "tasks without the phase's own filter may be left, for which the phase is not irreversible"
	atListener = "calls that the filter asks about are answered ENOSYS"
	atHooks    = "what BPF programs deny in a phase may not be denied"
)

func (sv *Supervised) next(from string) []string {
	out := []string{}
	for _, to := range sv.in.Plan.Phases {
		if sv.in.Record && from != to || sv.in.Set.May(from, to) {
			out = append(out, to)
		}
	}
	return out
}

func (sv *Supervised) emit(e Event) {
	e.Time, e.Instance, e.Workload, e.Policy = time.Now().UTC(), sv.in.ID, sv.in.Workload, sv.in.Policy
	if e.Generation == 0 {
		sv.mu.Lock()
		e.Generation = sv.status.Generation
		sv.mu.Unlock()
	}
	sv.s.emit(e)
}

// set is [Supervisor.Set] for this instance.
func (sv *Supervised) set(ctx context.Context, to string, o SetOptions) (Status, error) {
	if o.Origin == "" {
		o.Origin = Outside
	}
	if err := ctx.Err(); err != nil {
		return sv.Status(), fmt.Errorf("switch to %s: not begun: %w", to, err)
	}
	select {
	case sv.turn <- struct{}{}:
		defer func() { <-sv.turn }()
	case <-ctx.Done():
		return sv.Status(), fmt.Errorf("another switch of %s is unfinished: %w", sv.in.ID, ctx.Err())
	}
	before := sv.Status()
	from := before.Phase
	if err := sv.may(ctx, before, to, o); err != nil {
		if !errors.Is(err, ErrEnded) {
			sv.emit(Event{Kind: Refused, From: from, To: to, Origin: o.Origin, By: o.By, Message: err.Error()})
		}
		return before, err
	}
	if from == to && (before.State == Holds || o.Origin != Outside) {
		return before, nil // what is degraded is mended from outside
	}
	generation := before.Generation
	if from != to {
		generation++
	}
	if err := sv.prepare(to, generation); err != nil {
		err = fmt.Errorf("switch to %s: nothing has changed: %w", to, err)
		sv.emit(Event{Kind: Refused, From: from, To: to, Origin: o.Origin, By: o.By, Message: err.Error()})
		return before, err
	}
	if sv.in.Mark != nil {
		sv.in.Mark(to)
	}
	sv.now.Store(sv.tables[to])
	sv.mu.Lock()
	if from != to {
		sv.status.Phase, sv.status.Since = to, time.Now().UTC()
	}
	sv.status.Generation, sv.whole = generation, false
	for _, what := range []string{atBarrier, atRecord, atLimits, atRatchet} {
		delete(sv.broken, what)
	}
	sv.mu.Unlock()

	failed := sv.enforce(ctx, to)
	sv.Whole()
	st := sv.Status()
	e := Event{Kind: Switched, From: from, To: to, Origin: o.Origin, By: o.By, Generation: st.Generation}
	if failed != nil {
		e.Kind, e.Message = Failed, failed.Error()
		sv.emit(e)
		return st, &IncompleteError{st, failed}
	}
	sv.emit(e)
	return st, nil
}

// prepare is all that can fail without a change.
func (sv *Supervised) prepare(to string, generation uint64) error {
	if sv.in.Keep != nil {
		if err := sv.in.Keep(to, generation); err != nil {
			return err
		}
	}
	if sv.in.Hooks == nil {
		return nil
	}
	err := sv.in.Hooks(to)
	if err != nil && sv.in.Keep != nil {
		is := sv.Status()
		err = errors.Join(err, sv.in.Keep(is.Phase, is.Generation))
	}
	return err
}

// may says why a switch may not be.
func (sv *Supervised) may(ctx context.Context, is Status, to string, o SetOptions) error {
	from := is.Phase
	refuse := func(why string) error { return &TransitionError{from, to, why, sv.next(from)} }
	switch {
	case is.State == Ended:
		return fmt.Errorf("%s: %w", sv.in.ID, ErrEnded)
	case !slices.Contains(sv.in.Plan.Phases, to):
		return refuse("unknown phase")
	case o.Generation != 0 && o.Generation != is.Generation:
		return &GenerationError{Want: o.Generation, Is: is.Generation}
	case from == to, sv.in.Record:
		return nil
	case !sv.in.Set.May(from, to):
		return refuse("the policy doesn't lead there")
	case o.Origin != Outside && !sv.in.Plan.Tightens(from, to):
		return refuse("from inside only a phase that allows nothing more can follow")
	}
	if o.Origin != Outside && sv.in.Loosens != nil {
		if err := sv.in.Loosens(ctx, to); err != nil {
			return refuse("from inside no limit can be loosened: " + err.Error())
		}
	}
	return nil
}

// fails notes what is broken, or is not any more.
func (sv *Supervised) fails(what string, err error) error {
	sv.mu.Lock()
	defer sv.mu.Unlock()
	if err == nil {
		delete(sv.broken, what)
	} else {
		sv.broken[what] = err.Error()
	}
	return err
}

// limit is [Supervisor.Limit] for this instance.
func (sv *Supervised) limit(ctx context.Context) error {
	if sv.in.Limits == nil {
		return nil
	}
	select {
	case sv.turn <- struct{}{}:
		defer func() { <-sv.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return sv.fails(atLimits, sv.in.Limits(ctx, sv.Status().Phase))
}

// enforce makes a phase that new calls are judged by hold for all.
func (sv *Supervised) enforce(ctx context.Context, to string) error {
	var errs []error
	if sv.in.Barrier != nil {
		errs = append(errs, sv.fails(sv.atBarrier(), sv.in.Barrier.Barrier(ctx)))
	}
	if sv.in.Limits != nil {
		errs = append(errs, sv.fails(atLimits, sv.in.Limits(ctx, to)))
	}
	if sv.in.Ratchet != nil && sv.in.Plan.Ratchets[to] != nil && sv.begun.Load() {
		errs = append(errs, sv.fails(atRatchet, sv.in.Ratchet(ctx, to)))
	}
	return errors.Join(errs...)
}

func (sv *Supervised) atBarrier() string {
	if sv.in.Record {
		return atRecord
	}
	return atBarrier
}

// Asks says whether the instance's filter asks about anything.
func (sv *Supervised) Asks() bool { return sv.in.Plan.Listener }

// Lose says that a part of what the instance's filter asks about is not answered any
// more, and why.
func (sv *Supervised) Lose(why error) {
	sv.mu.Lock()
	sv.broken[atListener] = why.Error()
	phase := sv.status.Phase
	sv.mu.Unlock()
	sv.log.WithError(why).WithField("phase", phase).Error("the listener of an instance is lost: what its filter asks about is denied (ENOSYS)")
	sv.emit(Event{Kind: Lost, From: phase, Message: atListener + ": " + why.Error()})
}

// Unhooked says that the kernel's programs don't do their part, and why; nil that they
// do.
func (sv *Supervised) Unhooked(why error) { sv.lacks(atHooks, why) }

// Unlimited says that the limits of the phase in force are not set, and why.
func (sv *Supervised) Unlimited(why error) { sv.lacks(atLimits, why) }

func (sv *Supervised) lacks(what string, why error) {
	sv.mu.Lock()
	_, was := sv.broken[what]
	delete(sv.broken, what)
	if why != nil {
		sv.broken[what] = why.Error()
	}
	phase := sv.status.Phase
	sv.mu.Unlock()
	if why == nil || was {
		return
	}
	sv.log.WithError(why).WithFields(logrus.Fields{"phase": phase, "lacks": what}).Error("an instance has lost a part of what enforces its phases")
	sv.emit(Event{Kind: Lost, From: phase, Message: what + ": " + why.Error()})
}

// Rejudge makes the phase hold for every task once more, as a switch does: for an
// instance that an earlier process supervised, which is Switching until then. Calls that
// it received and did not answer are made again, and asked about again.
func (sv *Supervised) Rejudge(ctx context.Context) error {
	select {
	case sv.turn <- struct{}{}:
		defer func() { <-sv.turn }()
	case <-ctx.Done():
		return sv.fails(sv.atBarrier(), fmt.Errorf("another switch is unfinished: %w", ctx.Err()))
	}
	err := sv.enforce(ctx, sv.Status().Phase)
	sv.Whole()
	return err
}

// Whole says that there is nothing to rejudge, as no task of the instance is yet.
func (sv *Supervised) Whole() {
	sv.mu.Lock()
	defer sv.mu.Unlock()
	sv.whole = true
}

// Serve answers what a chain of the instance's filters asks about, in the background
// and until its last task is gone. The listener is closed then. The chain is at its
// start: what a runtime calls is allowed until its first execve.
func (sv *Supervised) Serve(l Listener) { sv.serve(l, true) }

// Resume is Serve for a chain that is past its start.
func (sv *Supervised) Resume(l Listener) {
	sv.begun.Store(true)
	sv.serve(l, false)
}

func (sv *Supervised) serve(l Listener, starting bool) {
	c := &chain{sv: sv, starting: starting}
	sv.serving.Go(func() {
		err := l.Serve(sv.ctx, c.decide)
		if cerr := l.Close(); err == nil {
			err = cerr
		}
		if err == nil || sv.ctx.Err() != nil && isOver(err) {
			return
		}
		if g, ok := l.(interface{ GiveUp() }); ok {
			g.GiveUp()
		}
		sv.Lose(err)
	})
}

// stop lets go of the listeners.
func (sv *Supervised) stop() {
	sv.cancel()
	sv.serving.Wait()
	sv.denials.flush()
}

// endTime bounds the wait for a switch.
const endTime = 10 * time.Second

func (sv *Supervised) end() {
	select { // a switch that has begun
	case sv.turn <- struct{}{}:
		defer func() { <-sv.turn }()
	case <-time.After(endTime):
	}
	sv.stop()
	sv.mu.Lock()
	sv.status.State = Ended
	sv.mu.Unlock()
	sv.emit(Event{Kind: Over})
}

// chain answers for one chain of filters; decide is called by one goroutine.
type chain struct {
	sv       *Supervised
	starting bool // no execve has been allowed yet
}

// decide by number and register values alone: what pointers point at may change after
// it was looked at.
func (c *chain) decide(n *seccomp.Notification) (goOn bool, errno uint) {
	begins := false
	if c.starting {
		name, _ := seccomp.Name(n.ABI, n.Number)
		begins = name == "execve" || name == "execveat"
	}
	if begins {
		c.sv.begun.Store(true) // so that either this sees a switch, or that sees this
	}
	t := c.sv.now.Load()
	goOn, errno = t.Decide(n.ABI, n.Number, n.Args)
	if c.starting {
		if !goOn {
			goOn, _ = c.sv.tables[profiles.StartPhase].Decide(n.ABI, n.Number, n.Args)
		}
		if begins && goOn {
			if err := c.begin(n.PID, t.Phase); err != nil {
				c.sv.log.WithError(err).WithField("phase", t.Phase).Error("a program is not executed")
				goOn, errno = false, uint(unix.EPERM)
			}
		}
		if begins && goOn {
			// An answer that comes too late, because of a signal, has the call made again.
			n.Accepted = func() { c.starting = false }
		}
	}
	if !goOn {
		c.sv.denials.add(denied{t.Phase, n.ABI, n.Number, false}, n.PID, 1)
	}
	return goOn, errno
}

// begin says why a task may not execute what will be the first program of its chain.
func (c *chain) begin(tid int, phase string) error {
	in := &c.sv.in
	if in.Ready != nil {
		if err := in.Ready(); err != nil {
			return err
		}
	}
	if in.Began != nil {
		if err := in.Began(); err != nil {
			return err
		}
	}
	if in.Enter == nil || in.Plan.Ratchets[phase] == nil {
		return nil
	}
	if err := in.Enter(tid, phase); err != nil {
		return fmt.Errorf("it can't be given the phase's own filter: %w", err)
	}
	return nil
}
