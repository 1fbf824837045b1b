// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/internal/trace"
	"github.com/syslatch/syslatch/profiles"
)

// Hooks is the agent without a daemon: each stage of a container's life is a
// process of its own, which finds in the journal what the one before it left, and
// in pinned maps what the kernel has counted. Its journal is a directory beside
// the daemon's, in the same format.
//
// Any number of processes may work on one journal. Whoever changes or ends an
// instance holds its lock.
//
// # What a lost stage leaves
//
//   - before createRuntime: a file in the journal, which [Hooks.Collect] removes
//     after a while. The kernel knows nothing yet.
//   - between Track and createRuntime's end: a slot, found by its tag.
//   - before poststop (podman or conmon were killed): the instance; Collect, which
//     precreate and the daemon run, publishes it when its cgroup is empty.
//   - within poststop: what an end of the daemon's leaves, see the package comment.
type Hooks struct {
	a    *Agent
	open func() (*bpf.Recorder, error) // nil: it is open
	ring ring                          // nil until the recorder is open
	// daemons is the journal of the daemon, if this is none: whoever reads the ring
	// takes the events of all.
	daemons *journal
	// supervisor is the daemon that supervises phases; nil if this is it.
	supervisor *supervisor

	mu      sync.Mutex           // guards what follows
	handles map[bpf.Handle]place // no journal for a handle that is none of ours
}

// ring is how events are read without waiting for more: *bpf.Recorder.
type ring interface {
	Drain(fn func(bpf.Event)) error
}

// OpenHooks opens the store and the hooks' journal; the recorder when it is
// needed. Unlike New it takes the state directory for nobody.
func OpenHooks(p *policy.File, opts Options) (_ *Hooks, err error) {
	s, err := store.Open(p.Store, store.Options{})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	hierarchy, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	j, err := openJournal(hooksJournal(p))
	if err != nil {
		return nil, err
	}
	h := newHooks(newAgent(p, opts, s, j, kernelHost{Hierarchy: hierarchy}))
	h.daemons = &journal{dir: daemonJournal(p)}
	h.supervisor = &supervisor{listenerSocket(p)}
	h.a.compiler = h.supervisor
	h.a.cgroupMode = hierarchy.Mode.String()
	h.a.closers = []io.Closer{s}
	h.open = func() (*bpf.Recorder, error) { return bpf.Open(p.BPFFS, bpf.Options{}) }
	return h, nil
}

func hooksJournal(p *policy.File) string  { return filepath.Join(p.StateDir, "hooks") }
func daemonJournal(p *policy.File) string { return filepath.Join(p.StateDir, "instances") }

// adoptHooks is the hooks' side of a daemon, which publishes what they lost, and
// serves rootless ones, and supervises what has phases. It only looks where there is
// any of that.
func (a *Agent) adoptHooks() (*Hooks, error) {
	ring, ok := a.recorder.(ring)
	if !ok && len(a.policy.Hook.Rootless.Users) == 0 && !a.mayHavePhases() {
		return nil, nil
	}
	j, err := openJournal(hooksJournal(a.policy))
	if err != nil {
		return nil, err
	}
	h := newHooks(newAgent(a.policy, Options{Log: a.log, Check: a.check}, a.store, j, a.host))
	h.a.recorder, h.a.recorderErr, h.a.cgroupMode, h.ring = a.recorder, a.recorderErr, a.cgroupMode, ring
	h.a.stopped = a.stopped
	return h, nil
}

func newHooks(a *Agent) *Hooks {
	h := &Hooks{a: a, handles: map[bpf.Handle]place{}}
	a.drain = h.drain
	return h
}

// collectHooks lets a daemon publish what hooks lost.
func (a *Agent) collectHooks() {
	if a.hooks != nil {
		a.spawn("publish what hooks left", func() { a.hooks.Collect(a.stopped) })
	}
}

// HostRoot says why this process can't record: it isn't the host's root. In a user
// namespace root is another, and rootless podman runs hooks in one.
func HostRoot() error {
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return err
	}
	// "0 0 4294967295": every id is itself.
	if os.Geteuid() != 0 || !slices.Equal(strings.Fields(string(ids)), []string{"0", "0", "4294967295"}) {
		return errors.New("rootless containers are not served here: recording takes the host's root (CAP_BPF, CAP_PERFMON), and so does the profile store")
	}
	return nil
}

// Close lets go of the kernel's objects. Recordings go on.
func (h *Hooks) Close() error { return h.a.Close() }

// openRecorder opens the recorder if that is put off. Without one, whoever needs
// it says why there is none.
func (h *Hooks) openRecorder() {
	if h.open == nil {
		return
	}
	r, err := h.open()
	h.open = nil
	if err != nil {
		h.a.recorderErr = err
		return
	}
	h.a.recorder, h.ring = r, r
	h.a.closers = append(h.a.closers, r)
}

// Plan decides what a container is created with, and remembers the decision for
// its later stages. It returns nil for a container that is to be left alone. An
// error is the failure policy's deny.
func (h *Hooks) Plan(ctx context.Context, c policy.Container, runtime adjust.Runtime) (*adjust.Plan, error) {
	if err := validID(c.ID); err != nil {
		return nil, err
	}
	return h.planned(ctx, c, runtime)
}

func (h *Hooks) planned(ctx context.Context, c policy.Container, runtime adjust.Runtime) (*adjust.Plan, error) {
	unlock, err := h.lock(ctx, c.ID)
	if err != nil {
		return nil, h.settleUndecided(c, err)
	}
	defer unlock()
	in, plan, err := h.plan(ctx, c, runtime)
	if err == nil && in != nil {
		in.Injected = seccompDigest(plan.Seccomp)
		err = h.a.journal.save(in)
	}
	if err != nil {
		return nil, h.settle(in, err)
	}
	return plan, nil
}

// settle turns an error into what the failure policy makes of it.
func (h *Hooks) settle(in *instance, err error) error {
	if err == nil || in == nil || in.Decision.Failure != policy.FailureRuntimeDefault {
		return err
	}
	h.a.instanceLog(in).WithError(err).Error("container runs without syslatch: its failure policy is runtime-default")
	return nil
}

// settleUndecided is settle where nothing is known yet but the container.
func (h *Hooks) settleUndecided(c policy.Container, err error) error {
	d, decideErr := h.a.policy.Decide(c)
	if decideErr == nil && d.Mode == policy.ModeOff {
		return nil
	}
	return h.settle(&instance{Container: c, Decision: d}, err)
}

// plan returns no instance for a container that is to be left alone. With an
// error, the instance has the decision. Its lock is held.
func (h *Hooks) plan(ctx context.Context, c policy.Container, runtime adjust.Runtime) (*instance, *adjust.Plan, error) {
	log := h.a.log.WithField("container", c.ID)
	d, err := h.a.policy.Decide(c)
	for _, reason := range d.Reasons {
		log.WithField("policy", d.Policy).Info(reason)
	}
	in := &instance{Container: c, Decision: d}
	if err != nil {
		return in, nil, err
	}
	request, err := h.traceOf(c)
	if err != nil {
		// Whoever asks for a file and can't have it is told.
		in.Decision.Failure = policy.FailureDeny
		return in, nil, err
	}
	if c.User != nil && d.Policy == "" && c.Asks() {
		in.Decision.Failure = policy.FailureDeny
		return in, nil, fmt.Errorf("no policy of syslatchd's is for this rootless container of %s (the host's admin gives one match: {users: [NAME]})", c.User)
	}
	traceOnly := request != nil && d.Mode == policy.ModeOff
	if traceOnly {
		d = policy.Decision{Mode: policy.ModeRecord, Workload: traceWorkload, ExistingProfile: policy.ExistingKeep, Failure: policy.FailureDeny}
		in.Decision = d
	}
	if d.Mode == policy.ModeOff {
		return nil, nil, nil
	}
	// One that was started before under this id, and whose end was lost.
	switch earlier, err := h.load(c.ID); {
	case err != nil:
		return in, nil, err
	case earlier != nil:
		if err := h.end(earlier); err != nil {
			return in, nil, err
		}
	}
	if d.Mode == policy.ModeEnforce || d.Mode == policy.ModeAudit {
		h.publishEnded(ctx, d.Workload)
	}
	if d.Mode != policy.ModeEnforce || request != nil {
		h.openRecorder()
	}
	plan, planned, err := h.a.build(ctx, c, d, runtime)
	if err != nil {
		return in, nil, err
	}
	in = planned
	in.hooks, in.Trace = h, request
	if in.Phases != nil && in.Phases.inside {
		dir := insideOf(h.a.policy, in)
		if err := makeInside(dir); err != nil {
			return in, nil, err
		}
		plan.Mounts = mountsOf(dir)
	}
	if request != nil && !plan.Record { // enforce: traced within the profile
		if h.a.recorder == nil {
			return in, nil, fmt.Errorf("this host can't record: %w", h.a.recorderErr)
		}
		plan.Record, plan.Gate = true, profiles.GateFilter
		in.record(plan.Gate, runtime)
	}
	if traceOnly {
		in.Decision.Workload, in.Recording.Workload = "", ""
	}
	for _, w := range plan.Warnings {
		h.a.instanceLog(in).Warn(w)
	}
	// A plan that comes too late is not applied.
	return in, plan, ctx.Err()
}

// traceWorkload stands for a workload where only a trace is wanted.
const traceWorkload = "trace"

func (h *Hooks) traceOf(c policy.Container) (*trace.Request, error) {
	value, ok := c.Annotations[policy.AnnotationTrace]
	if !ok {
		return nil, nil
	}
	switch hook := h.a.policy.Hook; {
	case hook.TraceSyscall == policy.TraceIgnore:
		h.a.log.WithField("container", c.ID).Info("annotation " + policy.AnnotationTrace + " ignored: the policy has traceSyscall: ignore")
		return nil, nil
	case c.User != nil:
		return nil, fmt.Errorf("%w is not served to rootless containers: it is the host's root that would write the file (record with --annotation syslatch.dev/mode=record)", trace.ErrAnnotation)
	case hook.TraceSyscall == policy.TraceServe:
		r, err := trace.Parse(value)
		if err == nil {
			err = r.Prepare(hook.TraceDirectories)
		}
		return &r, err
	}
	return nil, fmt.Errorf("%w is not served here: the policy file must have hook: {traceSyscall: serve, traceDirectories: [DIRECTORY]}, or traceSyscall: ignore", trace.ErrAnnotation)
}

// Created tracks the container's cgroup, in which the runtime's init is, and
// reads back the limits. facts are asked of a container that was never planned.
func (h *Hooks) Created(ctx context.Context, id string, pid int, facts func() (policy.Container, adjust.Runtime, error)) error {
	if err := validID(id); err != nil {
		return err
	}
	return h.createdBy(ctx, id, pid, os.Getpid(), facts)
}

// createdBy is Created as told by a process of the engine's, the hook.
func (h *Hooks) createdBy(ctx context.Context, id string, pid, hook int, facts func() (policy.Container, adjust.Runtime, error)) error {
	unlock, err := h.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	in, err := h.load(id)
	// One that has begun is an earlier run's, whose end failed: to go on with it
	// would make one recording of two runs. This one was not planned.
	if err == nil && (in == nil || in.begun()) {
		in, err = h.unplanned(ctx, facts)
	}
	if err != nil || in == nil {
		return h.settle(in, err)
	}
	err = injected(in, facts)
	if err == nil {
		err = h.created(in, pid, hook)
	}
	if err != nil {
		// Nothing is left behind of a container that doesn't start, or that
		// syslatch leaves alone.
		return h.settle(in, errors.Join(err, h.discard(in)))
	}
	if err := h.a.verifyCreated(in, pid); err != nil {
		if in.Decision.Failure != policy.FailureRuntimeDefault {
			return errors.Join(err, h.discard(in))
		}
		h.a.instanceLog(in).WithError(err).Error("container runs unverified: its failure policy is runtime-default")
	}
	if err := h.supervise(ctx, in, specs.StateCreated); err != nil {
		err = errors.Join(err, h.discard(in))
		if in.marked() {
			return h.settle(in, err)
		}
		return err // whatever the failure policy: its filter would ask nobody
	}
	return nil
}

// injected says whether the profile that was put into the spec is still there: other
// precreate hooks follow ours.
func injected(in *instance, facts func() (policy.Container, adjust.Runtime, error)) error {
	if in.Injected == "" {
		return nil
	}
	c, _, err := facts()
	if err == nil && seccompDigest(c.Seccomp) != in.Injected {
		err = errors.New("its seccomp profile is not the one that was injected: another precreate hook replaced it (let syslatch's hook be the last)")
	}
	return err
}

// seccompDigest is empty for no profile.
func seccompDigest(p *specs.LinuxSeccomp) string {
	if p == nil {
		return ""
	}
	data, _ := json.Marshal(p) // strings and numbers only
	return profiles.Digest(data)
}

// begun says whether an instance has been created, or its end has begun.
func (in *instance) begun() bool {
	return in.CgroupID != 0 || in.Kept || in.Recording != nil && !in.Recording.Ended.IsZero()
}

// unplanned is for an engine that has no precreate, or hasn't run it: what can be
// done is done with what the container comes with.
func (h *Hooks) unplanned(ctx context.Context, facts func() (policy.Container, adjust.Runtime, error)) (*instance, error) {
	c, runtime, err := facts()
	if err != nil {
		return nil, err
	}
	in, plan, err := h.plan(ctx, c, runtime)
	if err != nil || in == nil {
		return in, err
	}
	remedy := "the engine did not run the precreate hook: podman does, where hooks_dir has 'syslatch hook install' in it"
	if runtime.Engine == "cri-o" {
		remedy = "CRI-O has no precreate hook: use syslatchd, its NRI plugin"
	}
	switch {
	case in.Decision.Mode != policy.ModeRecord && plan.Seccomp != nil:
		return in, fmt.Errorf("mode %s: profile not injected (%s)", in.Decision.Mode, remedy)
	case plan.Resources != nil || plan.OOMScoreAdj != nil || len(plan.Rlimits) > 0:
		return in, fmt.Errorf("limits not applied (%s)", remedy)
	case plan.Seccomp != nil && c.Seccomp == nil:
		// No filter will be loaded that could open the gate.
		in.Recording.Gate, in.Gate = profiles.GateExec, bpf.GateExec
	}
	in.Expect = nil
	return in, nil
}

func (h *Hooks) created(in *instance, pid, hook int) error {
	id, err := h.cgroupOf(in, pid, hook)
	if err != nil {
		return err
	}
	if in.Record || in.Phases != nil {
		own, err := h.a.host.CgroupOf(hook)
		if err != nil {
			return err
		}
		if id == own {
			return errors.New("the container has no cgroup of its own, but one that the engine is in, too: it can't be told apart (start it without --cgroups=disabled)")
		}
	}
	in.CgroupID = id
	in.Container.PID = pid
	if !in.Record {
		return h.a.journal.save(in)
	}
	// The runtime's init is a child of a process like the hook: it has the same
	// filters, until it loads its own.
	base, err := cgroup.Status(hook)
	if err != nil {
		return err
	}
	in.BaseFilters = base.SeccompFilters
	in.Recording.Started = time.Now().UTC()
	if runtime := parentName(); runtime != "" && in.Container.User == nil {
		in.Recording.Runtime = strings.TrimSpace(in.Recording.Runtime + " " + runtime)
	}
	h.openRecorder()
	if h.a.recorder == nil {
		return fmt.Errorf("this host can't record: %w", h.a.recorderErr)
	}
	// The tag first: a kill right after Track finds its way back to the slot by
	// it. All of this is before the first call that counts.
	if err := h.a.journal.save(in); err != nil {
		return err
	}
	handle, err := h.a.recorder.Track(in.CgroupID, in.trackOptions())
	if err != nil {
		return fmt.Errorf("record container %s: %w", in.Container.Name, err)
	}
	in.handle = &handle
	return nil
}

// cgroupOf is the container's cgroup. A rootless one that isn't recorded needs none
// of its own: 0 then.
func (h *Hooks) cgroupOf(in *instance, pid, hook int) (uint64, error) {
	user := in.Container.User
	if user == nil {
		return h.a.host.CgroupOf(pid)
	}
	id, err := h.a.host.CgroupOfUser(pid, *user, hook)
	if errors.Is(err, errNoOwnCgroup) && !in.Record {
		return 0, nil
	}
	return id, err
}

// parentName is the OCI runtime that runs this hook: "runc", "crun". crun's
// executable is a sealed copy without a name, so its arguments are asked.
func parentName() string {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", os.Getppid()))
	name, _, ok := strings.Cut(string(cmdline), "\x00")
	if err != nil || !ok {
		return ""
	}
	return filepath.Base(name)
}

// discard undoes created.
func (h *Hooks) discard(in *instance) error {
	if err := errors.Join(h.a.drop(in), h.a.removeInside(in)); err != nil {
		return err
	}
	return h.a.journal.remove(in.Container.ID)
}

// Started notes that the container's program runs, and reads back what only holds
// then.
func (h *Hooks) Started(ctx context.Context, id string, pid int) error {
	if err := validID(id); err != nil {
		return err
	}
	in, err := h.ran(ctx, id)
	if err != nil || in == nil {
		return err
	}
	// A phase's oom_score_adj comes after the policy's.
	return errors.Join(h.a.verifyRunning(ctx, in, pid), h.supervise(ctx, in, specs.StateRunning))
}

// ran returns no instance if it was quick, and is gone.
func (h *Hooks) ran(ctx context.Context, id string) (*instance, error) {
	in, unlock, err := h.claim(ctx, id)
	if err != nil || in == nil {
		return nil, err
	}
	defer unlock()
	in.Ran = true
	return in, h.a.journal.save(in)
}

// Stopped ends an instance: when it returns nil, its recording is in the store.
func (h *Hooks) Stopped(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	return h.stopped(ctx, id)
}

func (h *Hooks) stopped(ctx context.Context, id string) error {
	in, unlock, err := h.claim(ctx, id)
	if err != nil || in == nil {
		return err
	}
	defer unlock()
	return h.end(in)
}

// end publishes what an instance did. Its lock is held.
func (h *Hooks) end(in *instance) error {
	if in.Record {
		h.openRecorder()
		if err := h.findSlot(in); err != nil {
			return err
		}
	}
	return h.a.safely("end of container "+in.Container.ID, func() error { return h.a.finish(in) })
}

// findSlot finds the kernel's side of an instance.
func (h *Hooks) findSlot(in *instance) error {
	slots, err := h.a.slots()
	if err != nil {
		return err
	}
	for handle, s := range slots {
		if s.Tag == in.Tag && in.Tag != 0 {
			in.handle = &handle
		}
	}
	return nil
}

// publishTime bounds the wait for what others publish, within a stage's deadline.
const publishTime = 10 * time.Second

// publishEnded publishes the instances of a workload that have ended, or waits until
// their poststop has: podman waits for that one for 20 s only, and a container that
// is created behind it is to get the version that came of it. What fails is not
// waited for, as with a daemon.
func (h *Hooks) publishEnded(ctx context.Context, workload string) {
	ctx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	ids, err := h.a.journal.ids()
	for _, id := range ids {
		in, loadErr := h.load(id)
		if loadErr != nil || in == nil || !in.publishes() || in.Decision.Workload != workload || h.alive(in) {
			continue // what can't be read is reported by its end
		}
		_, endErr := within(ctx, h.a, "publish the recording of container "+id, func() (struct{}, error) { return struct{}{}, h.collect(ctx, id) })
		err = errors.Join(err, endErr)
	}
	if err != nil {
		h.a.log.WithField("workload", workload).WithError(err).
			Warn("a recording of this workload is not published yet: the container gets the version before it")
	}
}

// Collect publishes instances whose poststop never came. What fails is left for
// the next time, and logged.
func (h *Hooks) Collect(ctx context.Context) {
	ids, err := h.a.journal.ids()
	if err != nil {
		h.a.log.WithError(err).Error("lost containers not looked for")
		return
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	// A hook that is killed before it has an instance leaves a lock.
	locks, _ := h.a.journal.list(lockSuffix) // what it fails for, ids did
	for _, id := range locks {
		if slices.Contains(ids, id) {
			continue
		}
		if unlock, err := h.lock(now, id); err == nil {
			unlock()
		}
	}
	for _, id := range ids {
		if ctx.Err() != nil {
			return
		}
		if err := h.collect(now, id); err != nil && !errors.Is(err, context.Canceled) { // else another process is at it
			h.a.log.WithField("container", id).WithError(err).Error("recording not published yet, kept for another try")
		}
	}
}

// collect publishes an instance that has ended. ctx bounds the wait for another
// process that is at it.
func (h *Hooks) collect(ctx context.Context, id string) error {
	in, unlock, err := h.claim(ctx, id)
	if err != nil || in == nil {
		return err
	}
	defer unlock()
	if h.alive(in) {
		return nil
	}
	if in.CgroupID != 0 {
		h.a.instanceLog(in).Info("the container has ended, and its poststop has not come (yet, or the engine was killed)")
	}
	return h.end(in)
}

// alive says whether a container runs, or may yet be created.
func (h *Hooks) alive(in *instance) bool {
	if in.CgroupID == 0 {
		return time.Since(in.Planned) < planGrace
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	return h.a.host.Empty(now, in.CgroupID) != nil
}

// drain moves first-seen events from the ring to the journal until want of the
// instance's are there. Another process that reads them puts them there too.
func (h *Hooks) drain(in *instance, want int) {
	id := in.Container.ID
	for deadline := time.Now().Add(drainTime / 2); ; {
		err := h.ring.Drain(h.keepEvent)
		events, _ := h.a.journal.events(id) // finish reports what is wrong with them
		if len(events) >= want || !errors.Is(err, bpf.ErrBusy) || time.Now().After(deadline) {
			if err != nil && len(events) < want {
				h.a.instanceLog(in).WithError(err).Warn("first-seen events not read")
			}
			return
		}
		time.Sleep(5 * time.Millisecond) //nolint:forbidigo // no event tells that the other reader is through
	}
}

// keepEvent keeps the event of an instance of the hooks, or of a daemon that is away.
// It may be called on nil.
func (h *Hooks) keepEvent(e bpf.Event) {
	if h == nil {
		return
	}
	h.mu.Lock()
	to, known := h.handles[e.Handle]
	if !known {
		h.handles = h.byHandle()
		to = h.handles[e.Handle]
		// Stays unknown: a tag is in the journal before its first event.
		h.handles[e.Handle] = to
	}
	h.mu.Unlock()
	if to.journal == nil {
		return
	}
	if err := to.journal.appendEvent(to.id, e); err != nil {
		h.a.log.WithField("container", to.id).WithError(err).Error("first-seen event lost")
	}
}

// place is where an instance's events are kept.
type place struct {
	journal *journal
	id      string // container's
}

// byHandle finds the places of all instances that the kernel records.
func (h *Hooks) byHandle() map[bpf.Handle]place {
	out := map[bpf.Handle]place{}
	slots, err := h.a.slots()
	if err != nil {
		return out
	}
	for _, j := range []*journal{h.a.journal, h.daemons} {
		if j == nil {
			continue
		}
		tags := j.tags()
		for handle, s := range slots {
			if id := tags[s.Tag]; id != "" {
				out[handle] = place{j, id}
			}
		}
	}
	return out
}

// owns says whether a tag is of a hooks' instance. It may be called on nil.
func (h *Hooks) owns(tag uint64) bool { return h != nil && h.a.journal.tags()[tag] != "" }

// load reads an instance, nil if there is none.
func (h *Hooks) load(id string) (*instance, error) {
	in, err := h.a.journal.instance(id)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("journal %s: %w (remove the file to forget this instance)", h.a.journal.path(id, instanceSuffix), err)
	}
	in.hooks = h
	return in.prepare(), nil
}

// ids lists the instances. Unlike load it leaves the directory as it is, in which
// other processes write.
func (j *journal) ids() ([]string, error) { return j.list(instanceSuffix) }

// list lists the ids that have a file with a suffix.
func (j *journal) list(suffix string) ([]string, error) {
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), suffix); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

const lockSuffix = ".lock"

// claim locks an instance and reads it. It returns nil if there is none. ctx bounds
// the wait for another process that has it.
func (h *Hooks) claim(ctx context.Context, id string) (*instance, func(), error) {
	if _, err := os.Stat(h.a.journal.path(id, instanceSuffix)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	unlock, err := h.lock(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	in, err := h.load(id)
	if err != nil || in == nil {
		unlock()
		return nil, nil, err
	}
	return in, unlock, nil
}

// lock keeps others from what has an id, be there an instance or not. The lock is a
// file beside the instance's, and goes with it.
func (h *Hooks) lock(ctx context.Context, id string) (unlock func(), err error) {
	j := h.a.journal
	path := j.path(id, lockSuffix)
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
		if err := lockFile(ctx, f); err != nil {
			f.Close()
			return nil, fmt.Errorf("journal: lock %s: %w", path, err)
		}
		mine, err1 := f.Stat()
		now, err2 := os.Stat(path)
		if err1 != nil || err2 != nil || !os.SameFile(mine, now) {
			f.Close() // it went with its instance
			continue
		}
		return func() {
			if _, err := os.Stat(j.path(id, instanceSuffix)); errors.Is(err, fs.ErrNotExist) {
				_ = os.Remove(path) // else the next one finds it, and no instance
			}
			f.Close()
		}, nil
	}
}

// lockFile waits until no other process has the lock, or ctx ends.
func lockFile(ctx context.Context, f *os.File) error {
	tick := time.NewTicker(2 * time.Millisecond) // flock(2) can't be waited for with a deadline
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("another process works on this container: %w", ctx.Err())
		}
	}
}
