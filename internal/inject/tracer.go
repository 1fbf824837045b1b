// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// tracer is one pass over the scope. All of it runs on one operating system thread,
// the only one that the kernel lets trace its tracees.
type tracer struct {
	*campaign
	tid       int
	processes map[identity]*process
	tasks     map[int]*task // seized ones, by tid
	children  chan os.Signal
	freezers  freezers
	stopped   time.Time // when the first task was seized
	warned    map[int]bool
	changes   int // of what is traced, that make another look at the scope necessary
	busy      int // tasks of the last look that an [Executing] of this process has

	mu   sync.Mutex
	tids []int // of tasks that were seized; mu's, for reap
}

type process struct {
	identity
	command string
	tasks   map[int]*task
	info    status // of the task that was looked at
	least   int    // filters that each thread has
	unread  bool   // the filters are not known
	present bool
	nothing bool // the filter adds nothing
	apart   bool // the threads' filters differ: each loads its own
	setNNP  bool
}

// task is a thread that is traced. Only a stopped one takes requests.
type task struct {
	p       *process // nil for one that is none of ours, and only to be let go
	tid     int
	running bool // may be running, as far as is known
	dead    bool // has ended, and waits for the rest of its process
	busy    time.Time
	foreign bool // has other registers than its own; remote.go
	saved   unix.PtraceRegs
	mask    uint64
	rseqAt  uintptr
	rseqCS  [8]byte
	gadget  uint64
	mem     *os.File
}

func newTracer(c *campaign) *tracer {
	return &tracer{
		campaign: c, tid: unix.Gettid(),
		processes: map[identity]*process{}, tasks: map[int]*task{}, warned: map[int]bool{},
		children: make(chan os.Signal, 1),
	}
}

func (t *tracer) run(ctx context.Context) (err error) {
	signal.Notify(t.children, unix.SIGCHLD)
	defer signal.Stop(t.children)
	defer func() {
		t.release()
		if !t.stopped.IsZero() {
			t.report.Stopped += time.Since(t.stopped)
		}
	}()
	if err := t.gather(ctx); err != nil {
		return err
	}
	t.doubt = false // what isn't known to have the filter stands, or is named
	if err := t.check(ctx); err != nil {
		return err
	}
	if t.opts.DryRun {
		for _, p := range t.sorted() {
			t.report.Processes = append(t.report.Processes, p.report())
		}
		return nil
	}
	if err := t.load(ctx); err != nil {
		return err
	}
	// Before they run, and fork: what is there now without the filter came from outside.
	t.again, err = t.verify()
	return err
}

func (p *process) report() Process {
	threads := 0
	for _, k := range p.tasks {
		if !k.dead {
			threads++
		}
	}
	return Process{
		PID: p.pid, Command: p.command, Threads: threads, FiltersBefore: p.info.filters, FiltersAfter: p.info.filters,
		Present: p.present, AddsNothing: p.nothing,
	}
}

// sorted gives the processes that live, by pid.
func (t *tracer) sorted() []*process {
	var out []*process
	for _, p := range t.processes {
		if slices.ContainsFunc(slices.Collect(maps.Values(p.tasks)), func(k *task) bool { return !k.dead }) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *process) int { return cmp.Compare(a.pid, b.pid) })
	return out
}

// gather stops every task of the scope that lacks the filter. A stopped task forks
// nothing, so what two looks find alike is all.
func (t *tracer) gather(ctx context.Context) error {
	begun := time.Now()
	if t.scope.Freezer != nil {
		if err := t.seizeFrozen(ctx); err != nil {
			return err
		}
	}
	for ended := -1; ; {
		before := t.changes
		t.report.Scans++
		if err := t.seizeNew(); err != nil {
			return err
		}
		if ended < 0 {
			ended = len(t.scope.ended) // zombies, for all that is known
		}
		if n := len(t.scope.ended) - ended; n > mostEnded {
			return fmt.Errorf("%w, of which %d have ended before they could be stopped: limit them with pids.max, or give the filter to a cgroup", errComeOn, n)
		}
		if err := t.settle(ctx, nil); err != nil {
			return err
		}
		if t.changes == before && t.busy == 0 {
			return nil
		}
		if time.Since(begun) > t.opts.Timeout {
			return t.comeOn()
		}
		if t.busy > 0 {
			t.pause(ctx, tick)
		}
	}
}

// freezeTime bounds the wait for a cgroup to freeze: one waits for a disk, say.
const freezeTime = 5 * time.Second

// seizeFrozen seizes what there is in the cgroup while none of it can fork: each stops
// before it runs on. If it can't be frozen, gather sees to it as to a tree.
func (t *tracer) seizeFrozen(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, freezeTime)
	defer cancel()
	err := t.scope.Freezer.While(short, func() error {
		for {
			before := t.changes
			t.report.Scans++
			if err := t.seizeNew(); err != nil || t.changes == before {
				return err
			}
		}
	})
	var not *cgroup.NotFrozenError
	if errors.As(err, &not) && ctx.Err() == nil {
		return nil
	}
	return err
}

func (t *tracer) comeOn() error {
	return fmt.Errorf("%w for %v: limit them with pids.max", errComeOn, t.opts.Timeout)
}

var errComeOn = errors.New("new processes keep coming")

// mostEnded of a tree may be seen that fork and end before they are stopped. One that
// follows the other can outrun any list of /proc, and leaves its parent, which stands,
// more and more to reap.
const mostEnded = 1000

func (t *tracer) seizeNew() error {
	t.busy = 0
	// Before any process has the filter, nothing of the scope runs once all are stopped,
	// so that nothing ends either. What does was forked by one that isn't known, and may
	// have forked another.
	unknown := !t.loaded || t.doubt
	tries := triesLater
	var found func(stat) error
	if unknown {
		tries, found = triesFirst, func(st stat) error {
			if t.filters(st.identity) > 0 {
				return nil
			}
			return t.seizeProcess(st)
		}
	}
	ended := len(t.scope.ended)
	lacking, vanished, err := t.lacking(tries, found)
	if err != nil {
		return err
	}
	// In a tree it may have been anything on the host, if it isn't seen any more.
	if unknown && (vanished && t.scope.Cgroup != "" || len(t.scope.ended) > ended) {
		t.changes++
	}
	for _, st := range lacking {
		if err := t.seizeProcess(st); err != nil {
			return err
		}
	}
	return nil
}

func (t *tracer) seizeProcess(st stat) error {
	if !t.stopped.IsZero() && time.Since(t.stopped) > 2*t.opts.Timeout {
		return t.comeOn()
	}
	tids, err := threadsOf(st.pid)
	if errors.Is(err, ErrGone) {
		t.changes++
		return nil
	}
	if err != nil {
		return err
	}
	for _, tid := range tids {
		if t.tasks[tid] != nil {
			continue
		}
		err := t.seize(st, tid, 1)
		if errors.Is(err, ErrGone) {
			// It may have left a child that the list was too early for. A main thread
			// that ended before the others is nothing new.
			if now, err := readStat(tid); err != nil || !now.dead() || !hasLiveThread(st.pid) {
				t.changes++
			}
			continue
		}
		var traced *TracedError
		if errors.As(err, &traced) && isOurs(traced.Tracer) {
			t.busy++
			continue
		}
		if err = t.leave(st.identity, tid, err); err != nil {
			return err
		}
	}
	return nil
}

// leave is what an error in one task means: with Partial that its process is left out.
func (c *campaign) leave(id identity, tid int, err error) error {
	if err == nil {
		return nil
	}
	err = &TaskError{id.pid, tid, err}
	if c.opts.Partial {
		c.failed[id] = err
		return nil
	}
	return err
}

func (t *tracer) options() int {
	if t.scope.Tree || t.scope.Cgroup != "" {
		return optionsTree
	}
	return optionsThreads
}

func (t *tracer) seize(st stat, tid, try int) error {
	if t.stopped.IsZero() {
		t.stopped = time.Now()
	}
	stop := t.reapMeanwhile(st.pid)
	err := seizeCall(tid, t.options())
	stop()
	if err != nil {
		// A task that ends is EPERM. In an execve that isn't the main thread's, its
		// number is another task's a moment later, and then there is nothing to see. Nor is
		// there where a thread of ours that had it has ended meanwhile, another has it perhaps.
		err = t.whyNot(st, tid, err)
		var traced *TracedError
		letGo := errors.As(err, &traced) && !isOurs(traced.Tracer) && tracerOf(tid) != traced.Tracer
		if (errors.Is(err, ErrPermission) || letGo) && try < tries {
			t.pause(context.Background(), tick)
			return t.seize(st, tid, try+1)
		}
		return err
	}
	// From here on the number can't become another task's.
	k := t.add(nil, tid)
	if now, err := readStat(st.pid); err == nil && now.start == st.start {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", st.pid, tid)); err == nil {
			t.adopt(k, now)
		}
	}
	if _, err := ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0); errors.Is(err, unix.ESRCH) {
		return nil // it ended; wait4 will tell
	} else if err != nil {
		return fmt.Errorf("PTRACE_INTERRUPT: %w", err)
	}
	return nil
}

// reapMeanwhile keeps PTRACE_SEIZE from waiting for ever: if another thread of its
// process is in execve, that one holds the lock that PTRACE_SEIZE takes, and waits
// until threads that it has ended, and that we trace, are reaped by us (kernel/exec,
// de_thread and cred_guard_mutex).
func (t *tracer) reapMeanwhile(pid int) (stop func()) {
	const after = 100 * time.Millisecond
	var mu sync.Mutex // timer's and over's
	var timer *time.Timer
	over := false
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(after, func() {
		t.mu.Lock()
		tids := slices.Clone(t.tids)
		t.mu.Unlock()
		born, _ := threadsOf(pid) // traced from birth, and not known yet
		for _, tid := range append(tids, born...) {
			_ = unix.Waitid(unix.P_PID, tid, nil, unix.WEXITED|unix.WNOHANG|unix.WALL, nil) // those that run on are no error
		}
		mu.Lock()
		defer mu.Unlock()
		if !over {
			timer.Reset(after)
		}
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		timer.Stop()
	}
}

func (t *tracer) add(p *process, tid int) *task {
	k := &task{p: p, tid: tid, running: true, busy: time.Now()}
	t.tasks[tid] = k
	t.changes++
	t.mu.Lock()
	t.tids = append(t.tids, tid)
	t.mu.Unlock()
	return k
}

// adopt makes a traced task one of its process's.
func (t *tracer) adopt(k *task, st stat) {
	p := t.processes[st.identity]
	if p == nil {
		p = &process{identity: st.identity, command: st.command, tasks: map[int]*task{}}
		t.processes[st.identity] = p
	}
	k.p = p
	p.tasks[k.tid] = k
}

// whyNot explains why a task can't be seized.
func (t *tracer) whyNot(st stat, tid int, err error) error {
	if errors.Is(err, unix.ESRCH) {
		return ErrGone
	}
	now, serr := readStat(tid)
	if errors.Is(serr, ErrGone) || serr == nil && now.dead() {
		return ErrGone
	}
	info, serr := readStatus(tid)
	if serr != nil {
		return fmt.Errorf("PTRACE_SEIZE: %w", err)
	}
	if info.tracer == t.tid {
		// Forked by one that is traced, or it has executed a program as another thread.
		t.adopt(t.add(nil, tid), st)
		return nil
	}
	if info.tracer != 0 {
		return traced(info.tracer)
	}
	if info.kernel {
		return ErrKernelThread
	}
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return fmt.Errorf("PTRACE_SEIZE: %w", err)
	}
	return fmt.Errorf("%w: PTRACE_SEIZE: %w (%s)", ErrPermission, err, permission(info))
}

func traced(by int) error {
	st, _ := readStat(by)
	return &TracedError{by, st.command}
}

// permission says what ptrace(2) wants of the tracer.
func permission(of status) string {
	own, err := readStatus(os.Getpid())
	if err == nil && own.uids != of.uids {
		return "it is another user's: run this as root, with CAP_SYS_PTRACE"
	}
	if yama, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil {
		switch strings.TrimSpace(string(yama)) {
		case "1", "2":
			return "kernel.yama.ptrace_scope allows CAP_SYS_PTRACE only: run this as root"
		case "3":
			return "kernel.yama.ptrace_scope is 3, which allows nobody until the next boot"
		}
	}
	return "it has privileges that this process lacks, or a security module says no: CAP_SYS_PTRACE in its user namespace is needed"
}

// gone forgets a task that has ended.
func (t *tracer) gone(k *task) {
	delete(t.tasks, k.tid)
	if k.p != nil {
		delete(k.p.tasks, k.tid)
	}
	k.dead, k.running = true, false
	t.closeMem(k)
}

// look takes what a running task has to tell, and says whether there was something.
func (t *tracer) look(k *task) (bool, error) {
	var ws unix.WaitStatus
	tid, err := unix.Wait4(k.tid, &ws, unix.WNOHANG|unix.WALL, nil)
	switch {
	case errors.Is(err, unix.EINTR):
		return false, nil
	case errors.Is(err, unix.ECHILD):
		t.gone(k)
		return true, nil
	case err != nil:
		return false, fmt.Errorf("wait4: %w", err)
	case tid == 0:
		return false, nil
	case !ws.Stopped():
		t.gone(k)
		return true, nil
	}
	event, sig := int(uint32(ws)>>16), ws.StopSignal()
	deliver := 0
	switch event {
	case eventStop:
		k.running = false
		return true, nil
	case unix.PTRACE_EVENT_FORK, unix.PTRACE_EVENT_VFORK, unix.PTRACE_EVENT_CLONE:
		if tid, err := unix.PtraceGetEventMsg(k.tid); err == nil {
			t.born(int(tid))
		}
	case 0:
		if sig != syscallSt {
			deliver = int(sig) // it stops before it handles the signal
		}
	}
	return true, t.resume(k, unix.PTRACE_CONT, deliver)
}

// born enters a task that was forked by a traced one, and is traced, too.
func (t *tracer) born(tid int) {
	if tid == 0 || t.tasks[tid] != nil {
		return
	}
	k := t.add(nil, tid)
	info, err := readStatus(tid)
	if err != nil {
		return
	}
	st, err := readStat(info.tgid)
	if err != nil {
		return
	}
	if tid == info.tgid {
		if t.options() != optionsTree {
			return // a process of its own, and no business of ours
		}
		t.scope.followed[st.identity] = true
	}
	t.adopt(k, st)
}

// resume lets a stopped task run on. That it may run is noted before it does: what
// stops it next must be waited for, whatever this returns.
func (t *tracer) resume(k *task, request, sig int) error {
	k.running, k.busy = true, time.Now()
	_, err := ptrace(request, k.tid, 0, uintptr(sig))
	if errors.Is(err, unix.ESRCH) {
		return nil // killed meanwhile: wait4 will tell
	}
	if err != nil {
		return fmt.Errorf("ptrace: resume: %w", err)
	}
	return nil
}

// pause waits until a tracee may have stopped, or for a moment: signals of several
// may become one.
func (t *tracer) pause(ctx context.Context, most time.Duration) {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-t.children:
	case <-timer.C:
	case <-ctx.Done():
	}
}

const (
	spins = 100
	tries = 10

	triesFirst, triesLater = 20, 3 // to list a scope while nothing in it ends
	tick                   = 10 * time.Millisecond
	stuckIf                = 300 * time.Millisecond // in state D all along
	slowIf                 = 5 * time.Second
)

// settle waits until all tasks are stopped, or with enough until that is true. Tasks
// that don't stop because they are in an uninterruptible wait, such as a parent's for
// its vfork child, are left pending: they stop before they run on.
func (t *tracer) settle(ctx context.Context, enough func() bool) error {
	begun, examined := time.Now(), time.Now()
	waits := map[*task]time.Time{} // since when a task is in state D
	for i := 0; ; i++ {
		progress, running := false, 0
		for _, k := range slices.Collect(maps.Values(t.tasks)) {
			if !k.running || k.dead {
				continue
			}
			p, err := t.look(k)
			if err != nil {
				return &TaskError{pidOf(k), k.tid, err}
			}
			progress = progress || p
			if k.running {
				running++
			}
		}
		if running == 0 && !t.allStand() {
			continue
		}
		if running == 0 || enough != nil && enough() {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if progress {
			clear(waits)
			continue
		}
		if i < spins {
			_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			continue
		}
		t.pause(ctx, tick)
		if time.Since(examined) < 2*tick {
			continue
		}
		examined = time.Now()
		stuck := 0
		for _, k := range t.tasks {
			if k.dead {
				// Not if that was by an execve of another thread, which has its number then.
				if st, err := readStat(k.tid); err == nil && !st.dead() {
					k.dead, k.running = false, true
				}
			}
			if !k.running || k.dead {
				continue
			}
			st, err := readStat(k.tid)
			switch {
			case err != nil:
				continue // wait4 will tell
			case st.dead():
				// The main thread of a process with others, which is only reaped with
				// the last of them.
				k.dead, k.running = true, false
				continue
			case st.state != 'D':
				delete(waits, k)
			case waits[k].IsZero():
				waits[k] = time.Now()
			case time.Since(waits[k]) > stuckIf:
				stuck++
			}
			// A thread that executed a program has its process's number since: the request
			// with its own number did not reach it, or it isn't traced at all.
			if _, err := ptrace(unix.PTRACE_INTERRUPT, k.tid, 0, 0); errors.Is(err, unix.ESRCH) {
				t.gone(k)
				t.changes++
				continue
			}
			after := time.Since(begun)
			if after > slowIf {
				t.warn(k, fmt.Sprintf("takes long to stop (state %c)", st.state))
			}
			if after > t.opts.Timeout {
				return t.stopError(k, after)
			}
			if after > stuckIf {
				if is, err := t.freezers.frozen(k.tid); err == nil && is {
					return &TaskError{pidOf(k), k.tid, ErrFrozen}
				}
			}
		}
		if enough == nil && stuck > 0 && stuck == running {
			return nil
		}
	}
}

// allStand says whether all tasks that are taken to be stopped are. One isn't that was
// killed since, by another thread's execve for instance, which goes on with its number.
func (t *tracer) allStand() bool {
	all := true
	for _, k := range t.tasks {
		if !k.running && !k.dead && !stands(k.tid) {
			k.running, all = true, false
		}
	}
	return all
}

func pidOf(k *task) int {
	if k.p == nil {
		return k.tid
	}
	return k.p.pid
}

func (t *tracer) warn(k *task, message string) {
	if t.opts.Waiting != nil && !t.warned[k.tid] {
		t.warned[k.tid] = true
		t.opts.Waiting(fmt.Sprintf("pid %d %s", pidOf(k), message))
	}
}

func (t *tracer) stopError(k *task, after time.Duration) error {
	e := &StopError{State: "unknown", After: after}
	if s, err := readStatus(k.tid); err == nil {
		e.State = s.state
	}
	switch {
	case strings.HasPrefix(e.State, "D"):
		e.Hint = ": it waits for a device, or for a child of vfork that has executed nothing yet"
	case strings.HasPrefix(e.State, "R"):
		e.Hint = ": it wants to run and may not, its cgroup's cpu.max or the machine's load may be why"
	}
	return &TaskError{pidOf(k), k.tid, e}
}

// restarts says, by the value that a stopped call returned, whether the kernel will
// make it again (include/linux/errno.h).
func restarts(rax uint64) (waits, any bool) {
	switch int64(rax) {
	case -512, -514, -516: // ERESTARTSYS, ERESTARTNOHAND, ERESTART_RESTARTBLOCK
		return true, true
	case -513: // ERESTARTNOINTR: it was about to do it
		return false, true
	}
	return false, false
}

// interrupted are calls that return EINTR when their task is stopped, although no
// signal was for them. Those without a timeout (a negative one, or a null pointer, in
// the argument) can be made again.
var interrupted = map[uint64]func(*unix.PtraceRegs) bool{
	unix.SYS_EPOLL_WAIT:      func(r *unix.PtraceRegs) bool { return int32(r.R10) < 0 },
	unix.SYS_EPOLL_PWAIT:     func(r *unix.PtraceRegs) bool { return int32(r.R10) < 0 },
	unix.SYS_EPOLL_PWAIT2:    func(r *unix.PtraceRegs) bool { return r.R10 == 0 },
	unix.SYS_RT_SIGTIMEDWAIT: func(r *unix.PtraceRegs) bool { return r.Rdx == 0 },
	unix.SYS_SEMOP:           func(*unix.PtraceRegs) bool { return true },
	unix.SYS_SEMTIMEDOP:      func(r *unix.PtraceRegs) bool { return r.R10 == 0 },
}

// inCall gives the registers with which a stopped task will make its call again, and
// whether it waits in one.
func inCall(regs unix.PtraceRegs) (_ unix.PtraceRegs, waits, again bool) {
	if int64(regs.Orig_rax) < 0 {
		return regs, false, false
	}
	if int64(regs.Rax) == -int64(unix.EINTR) {
		if endless := interrupted[regs.Orig_rax]; endless != nil && endless(&regs) {
			noHandler := int64(-514) // EINTR if a signal's handler comes first, as it was to be
			regs.Rax = uint64(noHandler)
			return regs, true, true
		}
	}
	waits, again = restarts(regs.Rax)
	return regs, waits, again
}

// essential are the calls without which a process ends at once, or can't, by name.
func essential(info status, threads int) map[string]uint32 {
	calls := map[string]uint32{"exit_group": unix.SYS_EXIT_GROUP}
	if threads > 1 {
		calls["exit"], calls["futex"] = unix.SYS_EXIT, unix.SYS_FUTEX
	}
	// A libc with threads has handlers for its first two real-time signals, which it
	// hardly ever sends.
	const internal = 1<<(32-1) | 1<<(33-1)
	if info.caught&^internal != 0 {
		calls["rt_sigreturn"] = unix.SYS_RT_SIGRETURN
	}
	return calls
}

// check looks at all tasks before any of them is given the filter.
func (t *tracer) check(ctx context.Context) error {
	var refusals []Refusal
	adding := 0
	processes := t.sorted()
	for i, p := range processes {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("looked at %d of %d processes: %w", i, len(processes), err)
		}
		rs, err := t.checkProcess(p)
		if errors.Is(err, ErrGone) || err != nil && t.opts.Partial {
			continue // where it stays so, load tells
		}
		if err != nil {
			return err
		}
		refusals = append(refusals, rs...)
		if !p.present && !p.nothing {
			adding++
		}
	}
	if adding == 0 && !t.loaded {
		for _, p := range processes {
			why := "its filters already deny all that this one does"
			if p.present {
				why = "it has this filter already"
			}
			refusals = append(refusals, Refusal{PID: p.pid, TID: p.pid, Why: why})
		}
	}
	t.report.Refusals = append(t.report.Refusals, refusals...)
	// Where others have it, one that comes late is given it, too.
	if len(refusals) > 0 && !t.opts.Force && !t.opts.DryRun && !t.loaded {
		return &RefusedError{refusals}
	}
	return nil
}

func (t *tracer) checkProcess(p *process) (refusals []Refusal, err error) {
	threads, stopped := 0, 0
	var first *task
	waiting := map[string]bool{}
	for _, k := range slices.SortedFunc(maps.Values(p.tasks), func(a, b *task) int { return cmp.Compare(a.tid, b.tid) }) {
		if k.dead {
			continue
		}
		threads++
		if k.running {
			continue
		}
		stopped++
		var regs unix.PtraceRegs
		if err := getRegs(k.tid, &regs); errors.Is(err, ErrGone) {
			continue // killed meanwhile
		} else if err != nil {
			return nil, &TaskError{p.pid, k.tid, err}
		}
		if first == nil {
			first = k
		}
		regs, waits, again := inCall(regs)
		if !again {
			continue
		}
		rs, err := t.judge(p, k, regs, waits)
		if err != nil {
			return nil, err
		}
		for _, r := range rs {
			if !waiting[r.Why] { // a hundred threads in one call are one reason
				refusals = append(refusals, r)
			}
			waiting[r.Why] = true
		}
	}
	if first == nil {
		if threads == 0 {
			return nil, ErrGone
		}
		return nil, nil // all in uninterruptible waits: looked at when they stop
	}
	if is, err := t.freezers.frozen(p.pid); err != nil {
		return nil, err
	} else if is {
		return nil, &TaskError{p.pid, p.pid, ErrFrozen}
	}
	if err := t.examine(p, first); err != nil {
		return nil, err
	}
	calls := essential(p.info, threads)
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		verdicts, err := t.filter.Answers(specs.ArchX86_64, calls[name])
		if err != nil {
			return nil, err
		}
		for _, v := range verdicts {
			if !v.LetsPass() {
				refusals = append(refusals, Refusal{p.pid, p.pid, name, fmt.Sprintf("the filter denies %s (%v), without which it ends at once or never", name, v)})
				break
			}
		}
	}
	if p.unread && p.info.filters > t.ownFilters() && !t.canSuspend(first) {
		refusals = append(refusals, Refusal{PID: p.pid, TID: p.pid, Why: "it has a filter already, which may kill it for the calls that load another: run this as root, with CAP_SYS_ADMIN and no filter of its own"})
	}
	return refusals, nil
}

// judge says what becomes of the call that a task will make again.
func (t *tracer) judge(p *process, k *task, regs unix.PtraceRegs, waits bool) ([]Refusal, error) {
	nr := uint32(regs.Orig_rax)
	args := [6]uint64{regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9}
	name, ok := seccomp.Name(specs.ArchX86_64, nr)
	if !ok {
		name = fmt.Sprintf("call %d", nr)
	}
	abi := specs.ArchX86_64
	if code, err := t.read(k, regs.Rip-2, 2); err == nil && code[0] == 0xcd && code[1] == 0x80 { // int $0x80
		abi = specs.ArchX86
		args = [6]uint64{uint64(uint32(regs.Rbx)), uint64(uint32(regs.Rcx)), uint64(uint32(regs.Rdx)), uint64(uint32(regs.Rsi)), uint64(uint32(regs.Rdi)), uint64(uint32(regs.Rbp))}
		name, _ = seccomp.Name(abi, nr)
	}
	t.closeMem(k) // there may be many of them
	v, err := t.filter.Answer(abi, nr, args)
	if err != nil {
		return nil, err
	}
	var out []Refusal
	if !v.LetsPass() && (waits || v.Kills()) {
		out = append(out, Refusal{p.pid, k.tid, name, fmt.Sprintf("it is in %s, which the filter denies (%v)", name, v)})
	}
	if int64(regs.Rax) == -516 {
		v, err := t.filter.Answer(specs.ArchX86_64, unix.SYS_RESTART_SYSCALL, args)
		if err != nil {
			return nil, err
		}
		if !v.LetsPass() {
			out = append(out, Refusal{p.pid, k.tid, "restart_syscall", fmt.Sprintf("it is in %s and goes on there with restart_syscall, which the filter denies (%v)", name, v)})
		}
	}
	return out, nil
}

// examine learns what filters a process has. What it says of all threads was read of each:
// of others with as many filters, these may be others.
func (t *tracer) examine(p *process, k *task) (err error) {
	if p.info, err = readStatus(k.tid); err != nil {
		return err
	}
	if p.info.seccomp == 1 {
		return &TaskError{p.pid, k.tid, errors.New("is in seccomp's strict mode, which takes no filter")}
	}
	p.unread, p.present, p.nothing, p.least = false, true, true, p.info.filters
	look := func(of *task) {
		if of.running {
			p.present, p.nothing = false, false
			return
		}
		filters, count, err := filtersOf(of.tid)
		if err != nil {
			p.unread, p.present, p.nothing = !errors.Is(err, ErrGone), false, false
			return
		}
		present, nothing := t.compare(filters)
		p.present, p.nothing, p.least = p.present && present, p.nothing && nothing, min(p.least, count)
	}
	look(k)
	for _, other := range p.tasks {
		if !p.present && !p.nothing {
			return nil
		}
		if other != k && !other.dead {
			look(other)
		}
	}
	if t.others(p) != nil {
		p.present, p.nothing = false, false
	}
	return nil
}

// errNotStopped: nobody traces it, and it runs.
var errNotStopped = errors.New("isn't stopped")

// others is an error unless the threads of a process that live are all among its tasks,
// and stand: those of others may have other filters, and start more. Lists of threads that come
// and go have gaps, so the kernel's own count decides, which is one moment's: what stands
// before and after it was in it.
func (t *tracer) others(p *process) error {
	tids, err := threadsOf(p.pid)
	if err != nil {
		return err
	}
	var ended []int // of which the main thread's is there as long as the process
	for _, tid := range tids {
		if k := p.tasks[tid]; k != nil && !k.dead {
			continue
		}
		st, err := readStat(tid)
		switch {
		case errors.Is(err, ErrGone):
		case err != nil:
			return err
		case st.dead():
			ended = append(ended, tid)
		default:
			err := errNotStopped
			if by := tracerOf(tid); by != 0 {
				err = traced(by)
			}
			return fmt.Errorf("thread %d: %w", tid, err)
		}
	}
	info, err := readStatus(p.pid)
	if err != nil {
		return err
	}
	standing := 0
	for _, k := range p.tasks {
		if k.dead {
			continue
		}
		if _, stopped := stopOf(k.tid); k.running || !stopped {
			return fmt.Errorf("%w: it stands no more", ErrGone)
		}
		standing++
	}
	for _, tid := range ended {
		if st, err := readStat(tid); err != nil || !st.dead() {
			standing--
		}
	}
	if info.threads != standing+len(ended) {
		return fmt.Errorf("a thread %w", errNotStopped)
	}
	return nil
}

// compare says of a task's filters whether the filter is among them, and whether it adds
// nothing to them, which nobody asks with Force.
func (c *campaign) compare(filters []seccomp.Filter) (present, nothing bool) {
	present = c.among(filters)
	if c.opts.Force && !c.opts.DryRun {
		return present, false
	}
	// Tasks stand meanwhile, and most have the same.
	h := sha256.New()
	for _, f := range filters {
		h.Write(program(f, 0))
	}
	key := [sha256.Size]byte(h.Sum(nil))
	nothing, known := c.nothing[key]
	if !known {
		_, adds, err := c.filter.Adds(filters)
		nothing = err == nil && !adds
		c.nothing[key] = nothing
	}
	return present, nothing
}

func (t *tracer) ownFilters() int {
	s, err := readStatus(t.tid)
	if err != nil {
		return 0
	}
	return s.filters
}

// canSuspend says whether a stopped task's filters can be set aside.
func (t *tracer) canSuspend(k *task) bool {
	_, err := ptrace(unix.PTRACE_SETOPTIONS, k.tid, 0, uintptr(t.options()|unix.PTRACE_O_SUSPEND_SECCOMP))
	if err != nil {
		return false
	}
	_, err = ptrace(unix.PTRACE_SETOPTIONS, k.tid, 0, uintptr(t.options()))
	return err == nil
}

// load gives each process the filter. Until all have it they stand, if they can: one that
// runs takes the processor from those that are to load it. Those of which no task is
// stopped are waited for.
func (t *tracer) load(ctx context.Context) error {
	pending := t.sorted()
	var loaded []*process // that stand
	begun := time.Now()
	ready := func(p *process) (k *task, live bool) {
		all := true
		for _, other := range slices.SortedFunc(maps.Values(p.tasks), func(a, b *task) int { return cmp.Compare(a.tid, b.tid) }) {
			if other.dead {
				continue
			}
			live = true
			if other.running {
				all = false
			} else if k == nil {
				k = other
			}
		}
		if p.apart && !all {
			return nil, live
		}
		return k, live
	}
	for {
		var left []*process
		for _, p := range pending {
			if err := ctx.Err(); err != nil {
				return err
			}
			k, live := ready(p)
			if !live {
				continue
			}
			if k == nil {
				left = append(left, p)
				continue
			}
			err := t.inject(p, k)
			switch {
			case errors.Is(err, errApart):
				p.apart = true
				left = append(left, p)
				continue
			case errors.Is(err, ErrGone):
				// Killed while it stood, by an execve for instance, which gives its number
				// to the thread that made it.
				k.running = !k.dead
				if _, live := ready(p); live {
					left = append(left, p)
				}
				continue
			case err != nil:
				if err := t.leave(p.identity, k.tid, err); err != nil {
					return err
				}
				continue
			}
			t.reached(p.identity)
			loaded = append(loaded, p)
		}
		if len(left) == 0 {
			return nil // release lets them go
		}
		// What is waited for may wait for one of them.
		for _, p := range loaded {
			for _, k := range slices.Collect(maps.Values(p.tasks)) {
				if !k.running && !k.dead {
					t.detach(k)
				}
			}
		}
		loaded = nil
		if after := time.Since(begun); after > t.opts.Timeout {
			for _, k := range left[0].tasks {
				if k.running {
					return t.stopError(k, after)
				}
			}
		}
		pending = left
		if err := t.settle(ctx, func() bool {
			return slices.ContainsFunc(left, func(p *process) bool { k, live := ready(p); return k != nil || !live })
		}); err != nil {
			return err
		}
	}
}

// detach lets a stopped task go on where it was.
func (t *tracer) detach(k *task) {
	var regs unix.PtraceRegs
	if err := getRegs(k.tid, &regs); err == nil {
		if again, _, _ := inCall(regs); again.Rax != regs.Rax {
			_ = unix.PtraceSetRegs(k.tid, &again) // it was killed, or gets EINTR
		}
	}
	_, err := ptrace(unix.PTRACE_DETACH, k.tid, 0, 0)
	if err == nil {
		t.gone(k)
		return
	}
	k.running = true // killed meanwhile: wait4 tells
}

// release lets all tasks go. One that doesn't stop is let go by the end of this thread.
func (t *tracer) release() {
	const patience = 5 * time.Second
	for _, k := range slices.Collect(maps.Values(t.tasks)) {
		if k.foreign {
			t.restore(k)
		}
	}
	begun := time.Now()
	for i := 0; ; i++ {
		running := 0
		for _, k := range slices.Collect(maps.Values(t.tasks)) {
			if k.running && !k.dead {
				if _, err := t.look(k); err != nil {
					continue
				}
			}
			if k.dead {
				continue
			}
			if !k.running {
				t.detach(k)
			}
			if k.running && time.Since(begun) > 2*tick {
				if _, err := ptrace(unix.PTRACE_INTERRUPT, k.tid, 0, 0); errors.Is(err, unix.ESRCH) {
					t.gone(k) // see settle
					continue
				}
			}
			// To be let go while it is about to stop would interrupt its call.
			if k.running && time.Since(begun) > stuckIf {
				if st, err := readStat(k.tid); err == nil && (st.state == 'D' || st.dead()) {
					continue
				}
			}
			if k.running {
				running++
			}
		}
		if running == 0 || time.Since(begun) > patience {
			break
		}
		if i < spins {
			_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		} else {
			t.pause(context.Background(), tick)
		}
	}
	for _, k := range t.tasks {
		t.closeMem(k)
		t.left = append(t.left, k.tid)
	}
	t.tracers = append(t.tracers, t.tid)
}

// filters is how many each thread of a process has at least, 0 if it isn't known to have
// the filter.
func (c *campaign) filters(id identity) int { return max(c.covered[id], c.heirs[id]) }

// reached forgets that a process could not be given the filter. It ran meanwhile, and what it
// forked may look like an heir: it may have other filters, and another parent.
func (c *campaign) reached(id identity) {
	if c.failed[id] != nil {
		delete(c.failed, id)
		c.doubt = true
	}
}

// lacking lists the processes of the scope that lack the filter. One that isn't known
// has it if it was forked by one that has it: then each of its threads has at least as
// many filters. One whose parent isn't known is asked for the most that any has. With doubt
// there are no such heirs.
func (c *campaign) lacking(tries int, found func(stat) error) (_ []stat, vanished bool, err error) {
	all, vanished, err := c.scope.list(tries, found)
	if err != nil {
		return nil, false, err
	}
	most := 0
	for _, n := range c.covered {
		most = max(most, n)
	}
	var out []stat
	pids := slices.Sorted(maps.Keys(all))
	for again := true; again; {
		again = false
		out = out[:0]
		for _, pid := range pids {
			st := all[pid]
			if c.filters(st.identity) > 0 {
				continue
			}
			want := most
			if parent, ok := all[st.parent]; ok {
				want = c.filters(parent.identity)
			}
			if want == 0 || c.doubt || !hasFilters(pid, want) {
				out = append(out, st)
				continue
			}
			c.heirs[st.identity] = want
			again = true // its children may follow
		}
	}
	return out, vanished, nil
}

// hasFilters says whether each live thread has that many filters at least.
func hasFilters(pid, want int) bool {
	tids, err := threadsOf(pid)
	if err != nil {
		return errors.Is(err, ErrGone)
	}
	for _, tid := range tids {
		s, err := readStatus(tid)
		if errors.Is(err, ErrGone) || err == nil && s.dead() {
			continue
		}
		if err != nil || s.seccomp != 2 || s.filters < want {
			return false
		}
	}
	return true
}

// verify reads of every task of the scope whether it has the filter. Another pass is
// needed where there is a process without.
func (c *campaign) verify() (again bool, err error) {
	for _, id := range slices.Concat(slices.Collect(maps.Keys(c.covered)), slices.Collect(maps.Keys(c.heirs))) {
		want := c.filters(id)
		st, err := readStat(id.pid)
		if errors.Is(err, ErrGone) || err == nil && st.start != id.start {
			continue
		}
		if err != nil {
			return false, err
		}
		if !hasFilters(id.pid, want) {
			if now, err := readStat(id.pid); err != nil || now.start != id.start {
				continue
			}
			return false, &TaskError{id.pid, id.pid, fmt.Errorf("not all of its threads have %d filters, as they should", want)}
		}
	}
	// One that is gone before its filters were read was forked by one that has them: when
	// these were loaded there was no other.
	lacking, _, err := c.lacking(triesLater, nil)
	for id := range c.failed {
		if st, err := readStat(id.pid); err != nil || st.identity != id {
			c.reached(id) // it has ended
		}
	}
	if c.doubt {
		clear(c.heirs)
		return err == nil, err
	}
	lacking = slices.DeleteFunc(lacking, func(st stat) bool { return c.failed[st.identity] != nil })
	if err != nil || len(lacking) > 0 {
		return err == nil, err
	}
	if len(c.covered) == 0 && len(c.failed) == 0 {
		return false, fmt.Errorf("%w: %w", ErrNobody, ErrGone)
	}
	return false, nil
}

// letGo waits until the kernel has no tracer of ours for a task.
func (c *campaign) letGo() {
	for _, tid := range c.left {
		for {
			s, err := readStatus(tid)
			if err != nil || !slices.Contains(c.tracers, s.tracer) {
				break
			}
			<-time.After(time.Millisecond) // a thread's end can't be waited for
		}
	}
	c.left, c.tracers = nil, nil
}

func memPath(tid int) string { return filepath.Join("/proc", fmt.Sprint(tid), "mem") }
