// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// A container with phases that a hook plans is supervised by the daemon. They speak
// over the socket for listeners, on which a hook sends what a runtime does, a container's
// state, with no descriptor:
//
//   - precreate asks, under the status "creating", what phases are enforced with. That
//     there is an answer also says that somebody will take the listener.
//   - createRuntime tells, under "created", that the instance is in the journal with its
//     cgroup. When the answer is there, it is supervised. The runtime's init has not
//     loaded its filter by then, so its listener comes later.
//   - poststart tells, under "running", that what the runtime sets at last is set: the
//     phase's oom_score_adj can be.
//
// The daemon only reads an instance of the hooks' journal; beside it, it keeps the phase.
// It lets go of the instance when its cgroup is empty: no hook tells of that, and a
// poststop that never comes costs nothing. A daemon that is started anew finds in the
// journal what it is to go on with.

// fromHook is the metadata of a state that a hook sends.
const fromHook = "syslatch-hook"

// hookAnswer is what the daemon says to a hook.
type hookAnswer struct {
	Error string             `json:"error,omitempty"`
	Host  profiles.PhaseHost `json:"host"`
	Newer []string           `json:"newer"`
	// Inside says that containers get a socket of their own.
	Inside bool `json:"inside"`
}

// askTime bounds a question; the daemon may be starting.
const askTime = 10 * time.Second

// errNoSupervisor: a container with phases has to wait for one.
var errNoSupervisor = errors.New("phases need a running syslatchd (systemctl start syslatchd; one that was started before its policy file had phases has to be restarted)")

// supervisor is the daemon, as hooks see it.
type supervisor struct{ socket string }

// ask sends a container's state, and returns what the daemon makes of it.
func (s *supervisor) ask(ctx context.Context, id string, status specs.ContainerState) (answer hookAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", s.socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return answer, errNoSupervisor
	}
	if err != nil {
		return answer, fmt.Errorf("ask syslatchd: %w", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return answer, err
		}
	}
	err = json.NewEncoder(conn).Encode(specs.ContainerProcessState{
		Version: specs.Version, Fds: []string{}, Pid: os.Getpid(), Metadata: fromHook,
		State: specs.State{Version: specs.Version, ID: id, Status: status},
	})
	if err == nil {
		err = json.NewDecoder(io.LimitReader(conn, 1<<20)).Decode(&answer)
	}
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return answer, errors.New("syslatchd does not answer hooks: it has ended meanwhile, or is of another version (systemctl restart syslatchd)")
	case err != nil:
		return answer, fmt.Errorf("ask syslatchd: %w", err)
	case answer.Error != "":
		return answer, fmt.Errorf("syslatchd: %s", answer.Error)
	}
	return answer, nil
}

// compile is for the host as the daemon sees it.
func (s *supervisor) compile(ctx context.Context, c policy.Container, d *policy.Decision, runtime adjust.Runtime) (*instancePhases, *profiles.PhasePlan, error) {
	answer, err := s.ask(ctx, c.ID, specs.StateCreating)
	if err != nil {
		return nil, nil, fmt.Errorf("phases of policy %s: %w", d.Policy, err)
	}
	ip := &instancePhases{Host: answer.Host, Newer: answer.Newer, Runtime: runtime, inside: answer.Inside}
	ip.of(d)
	is, err := inputOf(d, ip).compile()
	if err != nil {
		return nil, nil, err
	}
	return filterOf(d, ip, is, s.socket)
}

// supervise tells the daemon of an instance that is in the journal with its cgroup. Its
// lock is held where it is created.
func (h *Hooks) supervise(ctx context.Context, in *instance, status specs.ContainerState) error {
	if in.Phases == nil {
		return nil
	}
	_, err := h.supervisor.ask(ctx, in.Container.ID, status)
	return err
}

// answerHook answers a hook.
func (p *phasing) answerHook(conn *net.UnixConn, state *specs.State) error {
	answer := hookAnswer{Host: p.host, Newer: p.newer, Inside: p.inside != nil}
	var err error
	switch log := p.a.log.WithField("container", state.ID); state.Status {
	case specs.StateCreated:
		if err = p.adopt(state.ID); err != nil {
			log.WithError(err).Error("container of a hook is not supervised, and doesn't start")
		}
	case specs.StateRunning:
		if err = p.running(state.ID); err != nil {
			log.WithError(err).Error("container of a hook runs without its phase's oom_score_adj")
		}
	}
	if err != nil {
		answer.Error = err.Error()
	}
	if err := conn.SetDeadline(time.Now().Add(handOver)); err != nil {
		return err
	}
	return json.NewEncoder(conn).Encode(answer)
}

// hookedInstance is nil if there is none. It may be called on nil.
func (p *phasing) hookedInstance(id string) *instance {
	if p == nil {
		return nil
	}
	p.a.mu.Lock()
	defer p.a.mu.Unlock()
	return p.hooked[id]
}

// sameRun says whether two readings of a journal are of one run of a container.
func (in *instance) sameRun(other *instance) bool {
	return in.Planned.Equal(other.Planned) && in.CgroupID == other.CgroupID
}

// adopt supervises a created instance of the hooks' journal.
func (p *phasing) adopt(id string) error {
	if err := validID(id); err != nil {
		return err
	}
	in, err := p.a.hooks.load(id)
	switch {
	case err != nil:
		return err
	case in == nil || in.Phases == nil || in.CgroupID == 0 || in.Container.PID <= 0:
		return fmt.Errorf("container %s: the hooks' journal has no created instance with phases (has syslatchd the same stateDir as the hook?)", id)
	}
	if err := p.sameFilter(in); err != nil {
		return err
	}
	p.adopting.Lock()
	defer p.adopting.Unlock()
	if old := p.hookedInstance(id); old != nil {
		if _, err := p.supervisor.Get(id); err == nil && old.sameRun(in) {
			return nil
		}
		p.letGo(old)
	}
	// Of an earlier run, which a hook may have removed while it was written.
	if err := p.a.journalOf(in).forgetPhase(id); err != nil {
		return err
	}
	if _, err := p.supervise(in, phaseNow{Phase: in.Decision.Phase}); err != nil {
		return err
	}
	p.a.change(func() { p.hooked[id] = in })
	in.kept.lock(true)
	defer in.kept.lock(false)
	if err = p.serveInside(in); err == nil {
		err = p.attached(in, in.Container.PID)
	}
	if err == nil {
		err = p.begin(in)
	}
	if err != nil {
		p.letGo(in)
		return err
	}
	p.watch(in)
	p.a.instanceLog(in).WithField("phase", in.Decision.Phase).Info("container of a hook is supervised")
	return nil
}

// sameFilter says whether this process compiles an instance's phases as its hook did:
// after an upgrade the hook may be newer than the daemon, and the tables of the one are
// not for the filter of the other.
func (p *phasing) sameFilter(in *instance) error {
	if in.marked() {
		return nil
	}
	is, err := p.plans.of(&in.Decision, in.Phases)
	if err == nil && seccompDigest(is.plan.Profile) != in.Phases.Filter {
		err = errors.New("syslatch-hook is of another version, which makes another filter of the same phases (systemctl restart syslatchd)")
	}
	return err
}

// running sets the limits that wait for the container's program to run.
func (p *phasing) running(id string) error {
	p.adopting.Lock()
	defer p.adopting.Unlock()
	in := p.hookedInstance(id)
	if in == nil {
		return nil // it was quick
	}
	p.a.change(func() { in.Ran = true })
	ctx, cancel := context.WithTimeout(p.a.stopped, handOver)
	defer cancel()
	if err := p.supervisor.Limit(ctx, id); err != nil && !errors.Is(err, cgroup.ErrGone) {
		return err
	}
	return nil
}

// journalOf is where an instance is kept.
func (a *Agent) journalOf(in *instance) *journal {
	if in.hooks != nil {
		return in.hooks.a.journal
	}
	return a.journal
}

// letGo ends the supervision of an instance. p.adopting is held.
func (p *phasing) letGo(in *instance) {
	now, cancel := context.WithCancel(p.a.stopped)
	cancel()
	p.end(now, in)
	if err := p.endInside(in); err != nil {
		p.a.instanceLog(in).WithError(err).Error("socket of a container that has ended is not removed")
	}
	p.a.change(func() { delete(p.hooked, in.Container.ID) })
}

// watch waits for the last process of an instance.
func (p *phasing) watch(in *instance) {
	p.a.spawn("wait for the end of container "+in.Container.ID, func() {
		if err := p.over(p.a.stopped, in); err != nil && p.a.stopped.Err() == nil {
			p.a.instanceLog(in).WithError(err).Warn("the end of the container is not waited for, but looked for from time to time")
		}
	})
}

// over lets go of an instance when, and if before ctx ends, its cgroup is empty.
func (p *phasing) over(ctx context.Context, in *instance) error {
	if err := p.a.host.Empty(ctx, in.CgroupID); err != nil {
		return err
	}
	p.adopting.Lock()
	defer p.adopting.Unlock()
	if p.hookedInstance(in.Container.ID) == in {
		p.letGo(in)
	}
	return nil
}

// checkHooked lets go of instances whose end was not seen. It may be called on nil.
func (p *phasing) checkHooked() {
	if p == nil {
		return
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	for _, in := range p.allHooked() {
		_ = p.over(now, in) // it runs, or watch has told
	}
}

func (p *phasing) allHooked() (all []*instance) {
	if p == nil {
		return nil
	}
	p.a.change(func() { all = slices.Collect(maps.Values(p.hooked)) })
	return all
}

// sweepHooked removes what hooks left that were killed, or gave up, and that no instance
// has. Nothing is supervised yet.
func (a *Agent) sweepHooked() {
	if a.hooks == nil {
		return
	}
	if err := errors.Join(a.hooks.a.journal.sweepPhases(), a.sweepInside()); err != nil {
		a.log.WithError(err).Warn("what hooks left of containers with phases is not removed, but looked for at the next start")
	}
}

// pickUpHooked goes on with what an earlier process supervised for hooks.
func (a *Agent) pickUpHooked(held map[string]map[string]*os.File) {
	if a.phases == nil {
		return
	}
	ids, err := a.hooks.a.journal.ids()
	if err != nil {
		a.log.WithError(err).Error("containers of hooks are not looked for: what their filters ask about is denied")
	}
	for _, id := range ids {
		in, err := a.hooks.load(id)
		if err != nil {
			a.log.WithField("container", id).WithError(err).Error("instance not picked up")
			continue
		}
		if in == nil || in.Phases == nil || in.CgroupID == 0 || !a.hooks.alive(in) {
			continue
		}
		a.change(func() { a.phases.hooked[id] = in })
		a.instanceLog(in).Info("instance picked up")
		a.pickUpPhases(in, held[id])
		delete(held, id)
		a.phases.watch(in)
	}
}

// phaseLockTime bounds the wait for a hook that works on an instance.
const phaseLockTime = 5 * time.Second

// savePhase keeps where an instance is, unless a hook has ended it.
func (h *Hooks) savePhase(in *instance, now phaseNow) error {
	ctx, cancel := context.WithTimeout(h.a.stopped, phaseLockTime)
	defer cancel()
	is, unlock, err := h.claim(ctx, in.Container.ID)
	if err != nil || is == nil {
		return err
	}
	defer unlock()
	if !is.sameRun(in) {
		return nil
	}
	return h.a.journal.savePhase(in.Container.ID, now)
}

// mayHavePhases says whether any container has phases, or may have.
func (a *Agent) mayHavePhases() bool {
	hooks := &journal{dir: hooksJournal(a.policy)}
	return hasPhases(a.policy) || a.journal.hasPhases() || hooks.hasPhases()
}
