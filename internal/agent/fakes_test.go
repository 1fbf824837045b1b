// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

const x8664 = profiles.ABI("SCMP_ARCH_X86_64")

// world is what outlives an agent: a kernel, a journal and a store. The kernel is
// a fake, the others are real. Every change of any of them is a step, which a
// test can count, refuse, hold up, or make the last one.
type world struct {
	t      *testing.T
	kernel *fakeKernel
	host   *fakeHost
	dir    string
	log    *logtest.Hook
	policy *policy.File

	mu    sync.Mutex
	steps []string
	// onStep is called before each step, without mu. An error refuses it.
	onStep func(n int, step string) error
}

var errKilled = errors.New("the daemon was killed")

func newWorld(t *testing.T, policies string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), log: &logtest.Hook{}}
	w.kernel = &fakeKernel{w: w, slots: map[bpf.Handle]*fakeSlot{}, awaited: map[string]bpf.Handle{}, capacity: 8}
	w.host = &fakeHost{cgroups: map[int]uint64{}, processes: map[uint64]chan struct{}{}, users: map[int]uint32{}}
	p, err := policy.Parse("policy.yaml", []byte(fmt.Sprintf(
		"apiVersion: syslatch.dev/v1\nstore: %s/store\nstateDir: %s/state\nbpffs: /sys/fs/bpf/nowhere\nhook: {rootless: {users: [1000, 1001]}}\npolicies:\n%s", w.dir, w.dir, policies)),
		policy.Options{KnownCall: seccomp.Known})
	if err != nil {
		t.Fatal(err)
	}
	w.policy = p
	return w
}

func (w *world) step(name string) error {
	w.mu.Lock()
	w.steps = append(w.steps, name)
	n, on := len(w.steps), w.onStep
	w.mu.Unlock()
	if on == nil {
		return nil
	}
	return on(n, name)
}

// each sets what is called before each step.
func (w *world) each(on func(n int, step string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.steps, w.onStep = nil, on
}

func (w *world) count(step string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.steps {
		if s == step {
			n++
		}
	}
	return n
}

// refuse makes a step fail as long as err is not nil.
func (w *world) refuse(step string, err error) {
	w.each(func(_ int, s string) error {
		if s == step {
			return err
		}
		return nil
	})
}

// hold makes a step wait until the channel that is returned is closed. In a
// synctest bubble the step's goroutine counts as blocked.
func (w *world) hold(step string) (goOn chan struct{}) {
	goOn = make(chan struct{})
	w.each(func(_ int, s string) error {
		if s == step {
			<-goOn
		}
		return nil
	})
	return goOn
}

// testAgent is an agent in a world.
type testAgent struct {
	*Agent
	w *world
}

// start starts an agent, as a daemon does.
func (w *world) start() *testAgent {
	w.t.Helper()
	return w.startWith(w.kernel, nil)
}

func (w *world) startWith(recorder tracker, recorderErr error) *testAgent {
	w.t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.DebugLevel)
	logger.AddHook(w.log)
	j, err := openJournal(filepath.Join(w.dir, "journal"))
	if err != nil {
		w.t.Fatal(err)
	}
	j.step = func(change string) error { return w.step("journal." + change) }
	s, err := store.Open(w.policy.Store, store.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	a := newAgent(w.policy, Options{Log: logrus.NewEntry(logger), Check: seccomp.Check}, &steppedStore{s, w}, j, w.host)
	a.recorder, a.recorderErr = recorder, recorderErr
	a.cgroupMode = adjust.CgroupV2
	if err := a.begin(); err != nil {
		w.t.Fatal(err)
	}
	return &testAgent{a, w}
}

// close closes the agent; a test that kills it does not care how.
func (a *testAgent) close() {
	a.w.t.Helper()
	if err := a.Close(); err != nil {
		a.w.t.Error(err)
	}
}

// steppedStore is the real store, whose calls are steps.
type steppedStore struct {
	*store.Store
	w *world
}

func (s *steppedStore) Active(workload string) (*profiles.Version, error) {
	if err := s.w.step("store.Active"); err != nil {
		return nil, err
	}
	return s.Store.Active(workload)
}

func (s *steppedStore) Version(workload string, n int) (*profiles.Version, error) {
	if err := s.w.step("store.Version"); err != nil {
		return nil, err
	}
	return s.Store.Version(workload, n)
}

func (s *steppedStore) Add(ctx context.Context, rec *profiles.Recording, o store.AddOptions) (store.Result, error) {
	if err := s.w.step("store.Add"); err != nil {
		return store.Result{}, err
	}
	return s.Store.Add(ctx, rec, o)
}

// fakeHost is processes that a test makes.
type fakeHost struct {
	mu        sync.Mutex
	cgroups   map[int]uint64           // by pid
	processes map[uint64]chan struct{} // of a cgroup: closed when they have ended
	read      func(pid int, e adjust.Expectation) (string, error)
	users     map[int]uint32 // who owns a rootless container's process
	noV2      bool           // as on a v1-only host
}

func (h *fakeHost) CgroupOf(pid int) (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.noV2 {
		return 0, cgroup.ErrNoV2
	}
	if id, ok := h.cgroups[pid]; ok {
		return id, nil
	}
	return 0, fmt.Errorf("pid %d: %w", pid, fs.ErrNotExist)
}

// CgroupOfUser knows the users of processes from users. One that CgroupOf doesn't
// know shares its cgroup.
func (h *fakeHost) CgroupOfUser(pid int, user policy.User, _ int) (uint64, error) {
	h.mu.Lock()
	uid, ok := h.users[pid]
	h.mu.Unlock()
	if !ok || uid != user.UID {
		return 0, fmt.Errorf("process %d is not of a rootless container of %s", pid, user)
	}
	if id, err := h.CgroupOf(pid); err == nil {
		return id, nil
	}
	return 0, errNoOwnCgroup
}

func (h *fakeHost) Empty(ctx context.Context, id uint64) error {
	h.mu.Lock()
	ended := h.processes[id]
	h.mu.Unlock()
	if ended == nil {
		return nil
	}
	select {
	case <-ended:
		return nil
	default:
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *fakeHost) Read(pid int, e adjust.Expectation) (string, error) {
	h.mu.Lock()
	read := h.read
	h.mu.Unlock()
	if read != nil {
		return read(pid, e)
	}
	if e.Field != "" {
		return e.Field + ":\t" + e.Want, nil
	}
	return e.Want, nil
}

// fakeKernel is bpf.Recorder with cgroups and calls that a test makes.
type fakeKernel struct {
	w *world

	mu       sync.Mutex
	slots    map[bpf.Handle]*fakeSlot
	awaited  map[string]bpf.Handle
	next     uint32
	capacity int
	ring     []bpf.Event
	reader   chan struct{} // wakes Events
	deaf     bool          // Events reads nothing
	busy     error         // what Events returns at once
}

type fakeSlot struct {
	bpf.Instance
	gateOpen bool
	start    *uint8
	calls    map[fakeCalls][]uint16
	odd      []bpf.OddCall
	losses   bpf.Losses
}

type fakeCalls struct {
	phase uint8
	abi   bpf.ABI
}

func (k *fakeKernel) add(root uint64, o bpf.TrackOptions) (bpf.Handle, error) {
	if len(k.slots) >= k.capacity {
		return bpf.Handle{}, fmt.Errorf("%w: all %d slots are taken", bpf.ErrFull, k.capacity)
	}
	k.next++
	h := bpf.Handle{Slot: k.next % 8, Generation: k.next}
	k.slots[h] = &fakeSlot{
		Instance: bpf.Instance{Handle: h, RootCgroup: root, Gate: o.Gate, BaseFilters: o.BaseFilters, Phase: o.Phase, Tag: o.Tag},
		start:    o.Start,
		calls:    map[fakeCalls][]uint16{},
	}
	if root != 0 {
		k.slots[h].Cgroups = 1
	}
	return h, nil
}

func (k *fakeKernel) Await(name string, o bpf.TrackOptions) (bpf.Handle, error) {
	if err := k.w.step("bpf.Await"); err != nil {
		return bpf.Handle{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.awaited[name]; ok {
		return bpf.Handle{}, fmt.Errorf("await %s: %w", name, bpf.ErrTracked)
	}
	h, err := k.add(0, o)
	if err == nil {
		k.awaited[name] = h
	}
	return h, err
}

func (k *fakeKernel) Track(id uint64, o bpf.TrackOptions) (bpf.Handle, error) {
	if err := k.w.step("bpf.Track"); err != nil {
		return bpf.Handle{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.slots {
		if s.RootCgroup == id && !s.Finished {
			return bpf.Handle{}, fmt.Errorf("track %d: %w", id, bpf.ErrTracked)
		}
	}
	return k.add(id, o)
}

func (k *fakeKernel) Instances() ([]bpf.Instance, error) {
	if err := k.w.step("bpf.Instances"); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []bpf.Instance
	for _, s := range k.slots {
		out = append(out, s.Instance)
	}
	return out, nil
}

func (k *fakeKernel) Finish(h bpf.Handle) (*bpf.Snapshot, error) {
	if err := k.w.step("bpf.Finish"); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.slots[h]
	if s == nil {
		return nil, fmt.Errorf("%s: %w", h, bpf.ErrUnknown)
	}
	s.Finished, s.Cgroups = true, 0
	maps.DeleteFunc(k.awaited, func(_ string, a bpf.Handle) bool { return a == h })
	snapshot := &bpf.Snapshot{Instance: s.Instance, GateOpen: s.gateOpen || s.Gate != bpf.GateExec, OddCalls: slices.Clone(s.odd), Losses: s.losses}
	for at, numbers := range s.calls {
		numbers = slices.Clone(numbers)
		slices.Sort(numbers)
		snapshot.Calls = append(snapshot.Calls, bpf.CallSet{Phase: at.phase, ABI: at.abi, Numbers: numbers})
	}
	return snapshot, nil
}

func (k *fakeKernel) SetPhase(h bpf.Handle, phase uint8) error {
	if err := k.w.step("bpf.SetPhase"); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.slots[h]
	switch {
	case s == nil:
		return fmt.Errorf("%s: %w", h, bpf.ErrUnknown)
	case s.Finished:
		return fmt.Errorf("%s: %w", h, bpf.ErrFinished)
	}
	s.Phase = phase
	return nil
}

func (k *fakeKernel) Release(h bpf.Handle) error {
	if err := k.w.step("bpf.Release"); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.slots[h]
	switch {
	case s == nil:
		return fmt.Errorf("%s: %w", h, bpf.ErrUnknown)
	case !s.Finished:
		return fmt.Errorf("%s: release: finish it first", h)
	}
	delete(k.slots, h)
	return nil
}

func (k *fakeKernel) Events(ctx context.Context, fn func(bpf.Event)) error {
	k.mu.Lock()
	if k.busy != nil {
		defer k.mu.Unlock()
		return k.busy
	}
	wake := make(chan struct{}, 1)
	k.reader = wake
	k.mu.Unlock()
	for {
		k.mu.Lock()
		var e *bpf.Event
		if len(k.ring) > 0 && !k.deaf && ctx.Err() == nil {
			e = &k.ring[0]
			k.ring = k.ring[1:]
		}
		k.mu.Unlock()
		if e != nil {
			fn(*e)
			continue
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return nil
		}
	}
}

func (k *fakeKernel) event(e bpf.Event) {
	k.ring = append(k.ring, e)
	if k.reader != nil {
		select {
		case k.reader <- struct{}{}:
		default:
		}
	}
}

// mkdir makes a cgroup.
func (k *fakeKernel) mkdir(name string, id uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if h, ok := k.awaited[name]; ok {
		delete(k.awaited, name)
		k.slots[h].RootCgroup, k.slots[h].Cgroups = id, 1
	}
}

// rmdir removes a cgroup.
func (k *fakeKernel) rmdir(id uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.slots {
		if s.RootCgroup == id {
			s.Cgroups = 0
		}
	}
}

// call makes system calls by name in a cgroup.
func (k *fakeKernel) call(id uint64, names ...string) {
	k.w.t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.slots {
		if s.RootCgroup != id || s.Finished {
			continue
		}
		for _, name := range names {
			at := fakeCalls{s.Phase, bpf.ABIX8664}
			if s.start != nil {
				at.phase = *s.start
			}
			if name == "execve" {
				s.gateOpen, s.start = true, nil
			}
			nr, ok := seccomp.Number(x8664, name)
			if !ok {
				k.w.t.Fatalf("no call %s", name)
			}
			if slices.Contains(s.calls[at], uint16(nr)) {
				continue
			}
			s.calls[at] = append(s.calls[at], uint16(nr))
			k.event(bpf.Event{Handle: s.Handle, Cgroup: id, Phase: at.phase, Number: nr, Comm: "app"})
		}
	}
}

// slot is the only slot that there is.
func (k *fakeKernel) slot() *fakeSlot {
	k.w.t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.slots) != 1 {
		k.w.t.Fatalf("%d slots, want 1", len(k.slots))
	}
	for _, s := range k.slots {
		return s
	}
	return nil
}

// startCalls are what a container calls at least: its runtime under the filter,
// the execve, and its end.
func startCalls() []string { return append(profiles.Floor("runc"), "execve", "exit_group") }

// container is one that a test takes through its life.
type container struct {
	policy.Container
	w      *world
	cgroup uint64
	ended  chan struct{}
}

// newContainer has everything that a runtime would tell; n tells containers
// apart.
func (w *world) newContainer(n int, annotations ...string) *container {
	c := &container{w: w, cgroup: uint64(1000 + n)}
	c.Container = policy.Container{
		ID: fmt.Sprintf("c%d", n), Name: "app", Namespace: "default", Image: "docker.io/library/app:1",
		CgroupsPath: fmt.Sprintf("/pods/c%d", n), PID: 0, Annotations: map[string]string{},
	}
	for _, a := range annotations {
		key, value, _ := strings.Cut(a, "=")
		c.Annotations[key] = value
	}
	return c
}

const workload = "docker.io/library/app/app"

func (c *container) pid() int { return int(c.cgroup) * 10 }

// create is the runtime's part of a start up to NRI's StartContainer: the cgroup
// is made, and init waits in it, having made calls under the filter.
func (c *container) create() {
	c.ended = make(chan struct{})
	c.w.host.mu.Lock()
	c.w.host.cgroups[c.pid()] = c.cgroup
	c.w.host.processes[c.cgroup] = c.ended
	c.w.host.mu.Unlock()
	c.w.kernel.mkdir(filepath.Base(c.CgroupsPath), c.cgroup)
	c.w.kernel.call(c.cgroup, "futex", "openat")
}

// exec executes the container's program, which makes these calls, too.
func (c *container) exec(names ...string) {
	c.w.kernel.call(c.cgroup, append(startCalls(), names...)...)
}

// exit ends the container's processes and removes the cgroup.
func (c *container) exit() {
	close(c.ended)
	c.w.kernel.rmdir(c.cgroup)
}

// plan plans and must succeed.
func (a *testAgent) plan1(c *container) *adjust.Plan {
	a.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	p, err := a.Plan(ctx, c.Container, adjust.Runtime{Engine: "containerd", EngineVersion: "2.4.2"})
	if err != nil || p == nil {
		a.w.t.Fatalf("plan of %s: %v, %v", c.ID, p, err)
	}
	return p
}

// planError plans and must be refused.
func (a *testAgent) planError(c *container) error {
	a.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	p, err := a.Plan(ctx, c.Container, adjust.Runtime{})
	if err == nil {
		a.w.t.Fatalf("plan of %s: got %+v, want it to be refused", c.ID, p)
	}
	return err
}

func (a *testAgent) starting1(c *container) {
	a.w.t.Helper()
	if err := a.Starting(context.Background(), c.ID, c.pid()); err != nil {
		a.w.t.Fatalf("starting %s: %v", c.ID, err)
	}
}

// run takes a container through its whole life, but for the end of its end.
func (a *testAgent) run(c *container, calls ...string) {
	a.w.t.Helper()
	a.plan1(c)
	c.create()
	a.starting1(c)
	c.exec(calls...)
	if err := a.Started(context.Background(), c.ID, c.pid()); err != nil {
		a.w.t.Fatal(err)
	}
	c.exit()
	if err := a.Stopped(context.Background(), c.ID); err != nil {
		a.w.t.Fatal(err)
	}
}

// gone waits until nothing is left of a container.
func (a *testAgent) gone(c *container) {
	a.w.t.Helper()
	in := a.instance(c.ID)
	if in == nil {
		return
	}
	a.mu.Lock()
	if !in.ended {
		a.mu.Unlock()
		a.w.t.Fatalf("nobody ends %s", c.ID)
	}
	attempt := in.attempt
	a.mu.Unlock()
	if attempt != nil {
		<-attempt
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !in.gone {
		a.w.t.Fatalf("%s is not gone: %v", c.ID, in.failed)
	}
}

// clean fails if something is left in the kernel or in the journal.
func (w *world) clean() {
	w.t.Helper()
	w.kernel.mu.Lock()
	defer w.kernel.mu.Unlock()
	for h, s := range w.kernel.slots {
		w.t.Errorf("%s is left in the kernel: %+v", h, s.Instance)
	}
	for name := range w.kernel.awaited {
		w.t.Errorf("the kernel still waits for %s", name)
	}
	if files := w.journalFiles(); len(files) > 0 {
		w.t.Errorf("left in the journal: %v", files)
	}
}

func (w *world) journalFiles() []string {
	w.t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.dir, "journal"))
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (w *world) openStore() *store.Store {
	w.t.Helper()
	s, err := store.Open(w.policy.Store, store.Options{ReadOnly: true})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	return s
}

// versions are the workload's.
func (w *world) versions() []profiles.Manifest {
	w.t.Helper()
	all, err := w.openStore().Versions(workload)
	if err != nil && !errors.Is(err, store.ErrNoVersion) {
		w.t.Fatal(err)
	}
	return all
}

// recordings are the workload's evidence, and in how many files it is.
func (w *world) recordings() (recs []*profiles.Recording, files int) {
	w.t.Helper()
	recs, err := w.openStore().Recordings(workload)
	if err != nil {
		w.t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(w.policy.Store, "*", "recordings", "*"))
	if err != nil {
		w.t.Fatal(err)
	}
	return recs, len(found)
}

// wantLosses finds a container's recording and wants these losses of it.
func (w *world) wantLosses(id string, want ...profiles.LossKind) {
	w.t.Helper()
	recs, _ := w.recordings()
	for _, r := range recs {
		if r.Subject.ID != id {
			continue
		}
		var got []profiles.LossKind
		for _, l := range r.Losses {
			got = append(got, l.Kind)
		}
		if !slices.Equal(got, want) {
			w.t.Errorf("%s: losses %+v, want %v", id, r.Losses, want)
		}
		return
	}
	w.t.Errorf("no recording of %s", id)
}

// logged says whether an entry of at least a level has all of these parts.
func (w *world) logged(level logrus.Level, parts ...string) bool {
	for _, e := range w.log.AllEntries() {
		text := e.Message
		for k, v := range e.Data {
			text += fmt.Sprintf(" %s=%v", k, v)
		}
		if e.Level <= level && !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(text, p) }) {
			return true
		}
	}
	return false
}

func (w *world) wantLog(level logrus.Level, parts ...string) {
	w.t.Helper()
	if w.logged(level, parts...) {
		return
	}
	w.t.Errorf("no entry of level %s or worse has %q; there is:", level, parts)
	for _, e := range w.log.AllEntries() {
		w.t.Logf("%s %s %v", e.Level, e.Message, e.Data)
	}
}

func (w *world) wantNoLog(level logrus.Level, parts ...string) {
	w.t.Helper()
	if w.logged(level, parts...) {
		w.t.Errorf("an entry of level %s or worse has %q", level, parts)
	}
}

// byAnnotation lets a container choose its mode, with the default failure
// policies; strict is the same with deny, lenient with runtime-default.
const byAnnotation = `
- name: strict
  match: {namespaces: [strict]}
  mode: enforce
  annotations: [mode]
  allowedModes: ["off", record, audit, enforce]
  failure: deny
- name: lenient
  match: {namespaces: [lenient]}
  mode: enforce
  annotations: [mode]
  allowedModes: ["off", record, audit, enforce]
  failure: runtime-default
- name: lossy
  match: {namespaces: [lossy]}
  mode: record
  allowLosses: true
- name: limited
  match: {namespaces: [limited]}
  mode: record
  limits: {pids: {max: 64}}
  failure: deny
- name: all
  match: {}
  mode: record
  annotations: [mode]
  allowedModes: ["off", record, audit, enforce]
`

func enforce(c *container) *container { c.Annotations["mode.syslatch.dev/pod"] = "enforce"; return c }
func audit(c *container) *container   { c.Annotations["mode.syslatch.dev/pod"] = "audit"; return c }
func in(ns string, c *container) *container {
	c.Namespace = ns
	return c
}
