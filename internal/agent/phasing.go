// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/holder"
	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// phasing is the agent's part in phases: it makes instances for the supervisor out
// of policies and containers, and hands listeners over. It is there only if the
// policy file has phases, or an instance of an earlier process has.
type phasing struct {
	a          *Agent
	supervisor *phase.Supervisor
	kernel     kernelHost
	host       profiles.PhaseHost
	newer      []string
	programs   programs
	denials    denials
	plans      plans
	socket     string // to which runtimes send listeners
	listener   *net.UnixListener

	inside      ServeInside  // nil: there is to be none
	startHolder holder.Start // nil: there is to be none
	mu          sync.Mutex
	holder      *holder.Client                          // guarded by mu; nil while there is none
	kept        map[string]map[string]*seccomp.Listener // guarded by mu: by container and the holder's name
	chains      uint64                                  // guarded by mu: names given

	adopting sync.Mutex           // held while an instance of the hooks begins or ends here
	hooked   map[string]*instance // by id: those of the hooks' journal; guarded by Agent.mu
}

// listenerSocket is where runtimes send listeners.
func listenerSocket(p *policy.File) string { return filepath.Join(p.StateDir, "listener.sock") }

// hasPhases says whether any container may have phases.
func hasPhases(p *policy.File) bool {
	return slices.ContainsFunc(p.Policies, func(p policy.Policy) bool { return p.Phases != nil })
}

// newPhasing looks at the host, and listens.
//
// The socket's directory is root's alone, so whoever connects is a runtime, or root.
func newPhasing(a *Agent, kernel kernelHost, opts Options) (_ *phasing, err error) {
	host, _, err := phaseHost()
	if err != nil {
		return nil, err
	}
	p := &phasing{
		a: a, kernel: kernel, host: host, newer: seccomp.NewerThan(seccomp.KernelRelease()), socket: listenerSocket(a.policy),
		supervisor:  phase.NewSupervisor(phase.Options{Log: a.log, Events: a.phaseEvent}),
		startHolder: opts.Holder, inside: opts.Inside, kept: map[string]map[string]*seccomp.Listener{}, hooked: map[string]*instance{},
	}
	p.programs = openPrograms(a, kernel.Hierarchy, &p.host)
	defer func() {
		if err != nil {
			err = errors.Join(err, p.programs.Close())
		}
	}()
	// The lock of the state directory is ours: nobody listens there any more.
	if err := os.Remove(p.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if p.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: p.socket, Net: "unix"}); err != nil {
		return nil, fmt.Errorf("socket for listeners: %w", err)
	}
	if err := os.Chmod(p.socket, 0o600); err != nil {
		return nil, errors.Join(err, p.listener.Close())
	}
	if logDenials(a.policy) {
		p.host.Denials = p.seeDenials() != nil
	}
	return p, nil
}

// Close ends the supervision of all instances.
func (p *phasing) Close() error {
	err := p.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	err = errors.Join(err, p.closeInside())
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.holder != nil {
		err = errors.Join(err, p.holder.Close())
		p.holder = nil
	}
	return errors.Join(err, p.supervisor.Close(), p.programs.Close(), p.denials.Close())
}

// Phases switches the phases of this agent's instances; nil if the policy file has
// none.
func (a *Agent) Phases() *phase.Supervisor {
	if a.phases == nil {
		return nil
	}
	return a.phases.supervisor
}

// phaseEvent is where events go until there is an audit log.
func (a *Agent) phaseEvent(e phase.Event) {
	log := a.log.WithFields(logrus.Fields{
		"container": e.Instance, "policy": e.Policy, "workload": e.Workload, "phase": e.To, "from": e.From, "generation": e.Generation,
	})
	if e.Origin != "" {
		log = log.WithFields(logrus.Fields{"origin": e.Origin, "by": e.By})
	}
	if e.Call != "" {
		log = log.WithFields(logrus.Fields{"syscall": e.Call, "pid": e.PID, "count": e.Count})
	}
	if e.Message != "" {
		log = log.WithField("reason", e.Message)
	}
	switch e.Kind {
	case phase.Denied, phase.Refused:
		log.WithField("event", e.Kind).Warn("phase event")
	case phase.Failed, phase.Lost:
		log.WithField("event", e.Kind).Error("phase event")
	default:
		log.WithField("event", e.Kind).Info("phase event")
	}
}

// keptPhase is where an instance is, as the journal has it for the next process.
type keptPhase struct {
	mu  sync.Mutex
	now phaseNow // guarded by mu
	// locked: the hook that created the instance has its lock, and waits.
	locked bool // guarded by mu
}

func (k *keptPhase) began() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.now.Began
}

// executed says whether the container's program may run: its execve was allowed, or was
// about to be.
func (in *instance) executed() bool { return in.Ran || in.kept.began() }

func (k *keptPhase) lock(yes bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.locked = yes
}

// keep changes where an instance is, in the journal first.
func (p *phasing) keepPhase(in *instance, change func(*phaseNow)) error {
	in.kept.mu.Lock()
	defer in.kept.mu.Unlock()
	next := in.kept.now
	change(&next)
	var err error
	if in.hooks != nil && !in.kept.locked {
		err = in.hooks.savePhase(in, next)
	} else {
		err = p.a.journalOf(in).savePhase(in.Container.ID, next)
	}
	if err != nil {
		return fmt.Errorf("keep where the container is: %w", err)
	}
	in.kept.now = next
	return nil
}

// instancePhases is what of an instance's phases is in the journal: all that its plan
// is made of, as the policy file and syslatch may be others by the next start.
type instancePhases struct {
	Host    profiles.PhaseHost `json:"host"`
	Newer   []string           `json:"newer"`
	Runtime adjust.Runtime     `json:"runtime"`
	// Filter is the digest of the filter as it was compiled, without a listener's path.
	Filter string `json:"filter,omitempty"`

	// Record: the container is recorded, and its phases are marks.
	Record bool `json:"record,omitempty"`

	inside bool // the daemon serves sockets inside containers
}

// compiler makes the filter of a decision's phases, or says what can't be enforced, for
// who supervises them.
type compiler interface {
	compile(ctx context.Context, c policy.Container, d *policy.Decision, runtime adjust.Runtime) (*instancePhases, *profiles.PhasePlan, error)
}

func (p *phasing) compile(_ context.Context, _ policy.Container, d *policy.Decision, runtime adjust.Runtime) (*instancePhases, *profiles.PhasePlan, error) {
	ip := &instancePhases{Host: p.host, Newer: p.newer, Runtime: runtime}
	ip.of(d)
	is, err := p.plans.of(d, ip)
	if err != nil {
		return nil, nil, err
	}
	return filterOf(d, ip, is, p.socket)
}

// filterOf: socket is where runtimes send listeners.
func filterOf(d *policy.Decision, ip *instancePhases, is *compiled, socket string) (*instancePhases, *profiles.PhasePlan, error) {
	if ip.Record {
		return ip, is.plan, nil
	}
	gaps := slices.Concat(is.plan.Gaps, limitGapsOf(d, ip.Runtime))
	if len(gaps) > 0 && d.Phases.Gaps != policy.GapsReport {
		return nil, nil, &GapsError{d.Policy, gaps}
	}
	ip.Filter = seccompDigest(is.plan.Profile)
	return ip, is.filter(socket), nil
}

// limitGapsOf are the phases whose limits can't be set.
func limitGapsOf(d *policy.Decision, runtime adjust.Runtime) (gaps []profiles.PhaseGap) {
	for i := range d.Phases.Phases {
		ph := &d.Phases.Phases[i]
		if _, err := adjust.PhaseLimits(d.Limits, ph.Limits, runtime); err != nil {
			gaps = append(gaps, profiles.PhaseGap{Phases: []string{ph.Name}, What: "its limits are not set", Why: err.Error(), Remedy: "leave them out of the phase"})
		}
	}
	return gaps
}

// supervise adds an instance to the supervisor, where an earlier process left it.
func (p *phasing) supervise(in *instance, now phaseNow) (*phase.Supervised, error) {
	is, err := p.plans.of(&in.Decision, in.Phases)
	if err != nil {
		return nil, err
	}
	if in.marked() {
		return p.superviseMarks(in, is, now)
	}
	var mark func(string)
	if is.plan.Logs() {
		if seen := p.seeDenials(); seen != nil {
			in.filtered.seen, in.filtered.plan, in.filtered.log = seen, is.plan, p.a.instanceLog(in)
			mark = in.filtered.mark
		}
	}
	lost := p.programs.find(in, is.plan, &now)
	in.limits.begin(now.Original, p.a.setsLimits)
	in.kept.now = now
	in.barrier.note = p.a.journalOf(in).path(in.Container.ID, frozenSuffix)
	c := &in.Container
	filters, err := is.ratchets()
	if err != nil {
		return nil, fmt.Errorf("policy %s: %w", in.Decision.Policy, err)
	}
	ratchet := newRatchet(filters, is.plan.Logs(), in.barrier.scope, p.a.instanceLog(in))
	in.supervised, err = p.supervisor.Add(phase.Instance{
		ID: c.ID, Name: c.Name, Workload: in.Decision.Workload, Policy: in.Decision.Policy,
		Set: is.set, Plan: is.plan, Tables: is.tables(), Initial: now.Phase, Generation: now.Generation,
		Barrier: &in.barrier, Hooks: in.guard.hooks(),
		Keep: func(name string, generation uint64) error {
			return p.keepPhase(in, func(now *phaseNow) { now.Phase, now.Generation = name, generation })
		},
		Ready: func() error { return p.programs.ready(in) },
		Began: func() error {
			if in.kept.began() {
				return nil
			}
			return p.keepPhase(in, func(now *phaseNow) { now.Began = true })
		},
		Loosens:   func(ctx context.Context, name string) error { return p.loosens(ctx, in, name) },
		Limits:    func(ctx context.Context, name string) error { return p.setLimits(ctx, in, name) },
		Ratchet:   ratchet.put,
		Enter:     ratchet.enter,
		Mark:      mark,
		HasBegun:  in.executed(),
		Uncovered: uncovered(slices.Concat(is.plan.Gaps, limitGapsOf(&in.Decision, in.Phases.Runtime))),
	})
	if err == nil && lost != nil {
		in.supervised.Unhooked(lost)
	}
	return in.supervised, err
}

// uncovered names the gaps of a phase.
func uncovered(gaps []profiles.PhaseGap) func(string) []string {
	return func(name string) (out []string) {
		for _, g := range gaps {
			if slices.Contains(g.Phases, name) {
				out = append(out, g.What+" ("+g.Why+")")
			}
		}
		return out
	}
}

// barrier is that of a container, whose cgroup is known from its start on. While it
// runs there is a note in the journal, so that the next process thaws what this one,
// killed in the middle, has left frozen.
type barrier struct {
	note string // path

	mu      sync.Mutex
	freezer *cgroup.Freezer // guarded by mu
}

var errNoCgroup = errors.New("the container's cgroup is not known yet (try again once it runs)")

func (b *barrier) set(f *cgroup.Freezer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.freezer = f
}

// Barrier is phase.Barrier's.
func (b *barrier) Barrier(ctx context.Context) error {
	return b.While(ctx, func() error { return nil })
}

// Rejudges is phase.Barrier's.
func (b *barrier) Rejudges() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.freezer == nil || b.freezer.Rejudges()
}

// scope is what a ratchet is put on.
func (b *barrier) scope() (inject.Scope, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.freezer == nil {
		return inject.Scope{}, errNoCgroup
	}
	return inject.Scope{Cgroup: b.freezer.Dir(), Freezer: b}, nil
}

// While is inject.Freezer's.
func (b *barrier) While(ctx context.Context, do func() error) error {
	b.mu.Lock()
	f := b.freezer
	b.mu.Unlock()
	if f == nil {
		return errNoCgroup
	}
	if err := os.WriteFile(b.note, nil, 0o600); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return errors.Join(f.While(ctx, do), os.Remove(b.note))
}

// thaw is for a barrier that an earlier process began and didn't end.
func (b *barrier) thaw() error {
	if _, err := os.Stat(b.note); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	b.mu.Lock()
	f := b.freezer
	b.mu.Unlock()
	if f == nil {
		return errNoCgroup
	}
	return errors.Join(f.Thaw(), os.Remove(b.note))
}

// attached tells an instance's cgroup. The instance is taken.
func (p *phasing) attached(in *instance, pid int) error {
	if p == nil || in.Phases == nil {
		return nil
	}
	// One that is starting can't have moved.
	if id, err := p.kernel.CgroupOf(pid); err == nil && id != in.CgroupID {
		return fmt.Errorf("phases: process %d is in another cgroup (%d) than the container's (%d)", pid, id, in.CgroupID)
	} else if err != nil && !errors.Is(err, cgroup.ErrNoV2) {
		return fmt.Errorf("phases: %w", err)
	}
	if err := p.found(in, pid); err != nil {
		return err
	}
	return p.programs.add(in, pid)
}

// unattached tells what a container lacks whose attach failed, if its runtime goes on all
// the same. The instance is taken.
func (p *phasing) unattached(in *instance, why error) {
	if p == nil || in.supervised == nil {
		return
	}
	if in.guarded() && !in.guard.holds() {
		in.supervised.Unhooked(why)
	}
	if slices.ContainsFunc(in.Decision.Phases.Phases, func(ph policy.Phase) bool { return !ph.Limits.None() }) {
		in.supervised.Unlimited(why)
	}
}

// found is attached for a container that has run for a while: its init may have moved,
// or ended.
func (p *phasing) found(in *instance, pid int) error {
	f, err := p.freezer(in, pid)
	if err != nil {
		return fmt.Errorf("phases: %w", err)
	}
	in.barrier.set(f)
	in.filtered.begin(in.CgroupID, in.supervised)
	return in.barrier.thaw()
}

// freezer is that of the container's cgroup, whatever process has its init's pid by now.
func (p *phasing) freezer(in *instance, pid int) (*cgroup.Freezer, error) {
	if in.CgroupID == 0 {
		return p.kernel.FreezerOf(pid) // cgroup v1 alone
	}
	path, err := p.kernel.Path(in.CgroupID)
	if err != nil {
		return nil, err
	}
	return cgroup.NewFreezer(path)
}

// begin sets the limits of the phase that an instance begins in. They come after those
// of the policy, which are in the spec: a phase without any gets these back. The
// instance is taken.
func (p *phasing) begin(in *instance) error {
	if p == nil || in.Phases == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(p.a.stopped, handOver)
	defer cancel()
	if err := p.supervisor.Limit(ctx, in.Container.ID); err != nil {
		return fmt.Errorf("limits of phase %s: %w", in.Decision.Phase, err)
	}
	return nil
}

// setLimits sets what limits a phase has, and reads them back.
func (p *phasing) setLimits(ctx context.Context, in *instance, name string) error {
	return in.limits.within(ctx, func() error { return p.setLimitsNow(ctx, in, name) })
}

func (p *phasing) setLimitsNow(ctx context.Context, in *instance, name string) error {
	want, err := limitsIn(in, name)
	if err != nil {
		return nil //nolint:nilerr // it is among the gaps
	}
	p.a.mu.Lock()
	pid, ran := in.Container.PID, in.Ran
	p.a.mu.Unlock()
	if in.hooks != nil && !ran {
		// crun has yet to set the spec's own: see Hooks.Started.
		want = slices.DeleteFunc(want, func(e adjust.Expectation) bool { return e.Source == adjust.SourceProc })
	}
	process, err := p.processOf(in, pid)
	if err != nil {
		return err
	}
	defer process.Close()
	return in.limits.set(ctx, p.kernel, process, want, func(original []limitValue) error {
		return p.keepPhase(in, func(now *phaseNow) { now.Original = original })
	})
}

// limitsIn are the limits that an instance has in a phase.
func limitsIn(in *instance, name string) ([]adjust.Expectation, error) {
	i := slices.IndexFunc(in.Decision.Phases.Phases, func(ph policy.Phase) bool { return ph.Name == name })
	return adjust.PhaseLimits(in.Decision.Limits, in.Decision.Phases.Phases[i].Limits, in.Phases.Runtime)
}

// loosens says of which limit an instance would have more in a phase than now.
func (p *phasing) loosens(ctx context.Context, in *instance, name string) error {
	want, err := limitsIn(in, name)
	if err != nil {
		return nil //nolint:nilerr // none is set then
	}
	p.a.mu.Lock()
	pid := in.Container.PID
	p.a.mu.Unlock()
	return in.limits.within(ctx, func() error {
		process, err := p.processOf(in, pid)
		if err != nil {
			return err
		}
		defer process.Close()
		return in.limits.loosens(p.kernel, process, want)
	})
}

// processOf is a container's first process, as it is now: another may get its pid at any
// time. It says no to one that isn't in the container's cgroup: a container that may write
// to the hierarchy can have moved it, and the pid of one that has ended may be another's.
func (p *phasing) processOf(in *instance, pid int) (*cgroup.Process, error) {
	process, err := cgroup.OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	dir, err := p.kernel.DirOf(process, "")
	if errors.Is(err, cgroup.ErrNoV2) && in.CgroupID == 0 {
		return process, nil
	}
	var id uint64
	if err == nil {
		id, err = cgroup.ID(dir)
	}
	if err == nil && id != in.CgroupID {
		err = fmt.Errorf("process %d is not in the container's cgroup any more", pid)
	}
	if err != nil {
		return nil, errors.Join(err, process.Close())
	}
	return process, nil
}

// accept hands listeners to instances until the socket is closed.
func (p *phasing) accept() {
	defer context.AfterFunc(p.a.stopped, func() { p.listener.Close() })()
	for {
		conn, err := p.listener.AcceptUnix()
		if p.a.stopped.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.a.log.WithError(err).Error("a listener can't be accepted, it is tried again: containers with phases wait with their start")
			select {
			case <-time.After(acceptPause):
			case <-p.a.stopped.Done():
			}
			continue
		}
		p.a.spawn("take a listener", func() {
			defer conn.Close()
			if err := p.take(conn); err != nil {
				p.a.log.WithError(err).Error("listener not taken: what its filter asks about is denied")
			}
		})
	}
}

// acceptPause is between two attempts to accept.
const acceptPause = time.Second

// handOver bounds the wait for what somebody sends who is about to. crun is not: it
// connects before the createRuntime hooks, which may take handOverLate.
const (
	handOver     = 5 * time.Second
	handOverLate = time.Minute
)

func (p *phasing) take(conn *net.UnixConn) error {
	if err := conn.SetDeadline(time.Now().Add(handOverLate)); err != nil {
		return err
	}
	defer context.AfterFunc(p.a.stopped, func() { _ = conn.SetDeadline(time.Now().Add(handOver)) })()
	state, f, err := seccomp.ReceiveListener(conn)
	if errors.Is(err, seccomp.ErrNoDescriptor) && state.Metadata == fromHook {
		return p.answerHook(conn, &state.State)
	}
	if err != nil {
		return err
	}
	l, err := seccomp.NewListener(f)
	if err != nil {
		return err
	}
	// Of an exec, too: the runtime gives the container's id.
	id := state.State.ID
	if _, err := p.supervisor.Get(id); err != nil {
		return errors.Join(err, l.Close())
	}
	c, err := p.enter(id, l)
	if err != nil {
		return errors.Join(fmt.Errorf("container %s: %w", id, err), l.Close())
	}
	if err := p.supervisor.Serve(id, c); err != nil {
		c.GiveUp() // it has ended meanwhile
		return errors.Join(err, l.Close())
	}
	p.keep(c)
	return nil
}

// pickUpPhases goes on with the phases of an instance that an earlier process left,
// and of which the holder kept listeners.
func (a *Agent) pickUpPhases(in *instance, held map[string]*os.File) {
	if in.Phases == nil || a.hasEnded(in) || a.phases == nil {
		return
	}
	if in.marked() {
		a.pickUpMarks(in)
		return
	}
	log := a.instanceLog(in)
	now, unknown := a.journalOf(in).phase(in.Container.ID)
	if now.Phase == "" {
		now.Phase = in.Decision.Phase
	}
	now.Generation = max(now.Generation, 1) // it goes on
	sv, err := a.phases.supervise(in, now)
	if err != nil || unknown != nil {
		// Served, it might do more than it may.
		a.phases.release(held)
		err = errors.Join(err, unknown)
		log.WithError(err).Error("phases not picked up: what the container's filter asks about is denied (create it anew)")
		if sv != nil {
			sv.Lose(err)
		}
		a.unfreeze(in) // to end, it has to run
		return
	}
	a.unfreeze(in)
	n := a.phases.resume(in, sv, held)
	if err := a.phases.serveInside(in); err != nil {
		log.WithError(err).Error("the container can't tighten itself")
	}
	if n == 0 && in.executed() && sv.Asks() {
		sv.Lose(errors.New("syslatchd was restarted, and what held the container's listeners had ended, too (create the container anew)"))
		return
	}
	if in.unstarted() {
		sv.Whole()
		return
	}
	a.rejudge(in, sv, "calls that the earlier syslatchd had received may wait (switch the container's phase to try again)")
}

// unstarted says whether an instance has no task yet. With cgroup v1 alone none has an id.
func (in *instance) unstarted() bool { return in.CgroupID == 0 && in.Container.PID <= 0 }

// unfreeze finds the cgroup of an instance that an earlier process left, in a barrier
// maybe.
func (a *Agent) unfreeze(in *instance) {
	if in.unstarted() {
		return
	}
	in.barrier.note = a.journalOf(in).path(in.Container.ID, frozenSuffix)
	if err := a.phases.found(in, in.Container.PID); err != nil {
		a.instanceLog(in).WithError(err).Error("the container's cgroup can't be found: switches of its phase can't be finished")
	}
}

// rejudge finishes a switch that an earlier process may have begun.
func (a *Agent) rejudge(in *instance, sv *phase.Supervised, otherwise string) {
	a.spawn("judge calls again", func() {
		ctx, cancel := context.WithTimeout(a.stopped, rejudgeTime)
		defer cancel()
		if err := sv.Rejudge(ctx); err != nil {
			a.instanceLog(in).WithError(err).Error(otherwise)
		}
	})
}

// rejudgeTime bounds the barrier at a start.
const rejudgeTime = 30 * time.Second
