// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
)

// errApart: the threads of a process have different filters, so one of them can't load
// one for all.
var errApart = errors.New("threads have different filters")

const (
	signalsAll = ^uint64(0) // the kernel leaves out SIGKILL and SIGSTOP
	pageSize   = 4096
)

// inject has a stopped task load the filter for its process. If p.apart is set all
// threads are stopped, and each loads it.
func (t *tracer) inject(p *process, first *task) (err error) {
	// What it is now, also of those that weren't stopped when the rest was looked at.
	if err := t.examine(p, first); err != nil {
		return err
	}
	done := p.report()
	if p.present {
		t.covered[p.identity] = p.least
		t.loaded = true
		t.report.Processes = append(t.report.Processes, done)
		return nil
	}
	t.freezers.known = nil
	if is, err := t.freezers.frozen(first.tid); err != nil {
		return err
	} else if is {
		return ErrFrozen
	}
	suspended, err := t.begin(first)
	if err != nil {
		return err
	}
	size := uint64(16+8*len(t.filter)+pageSize-1) &^ (pageSize - 1)
	defer func() { err = errors.Join(err, t.end(first)) }()
	at, err := t.call(first, "mmap", unix.SYS_MMAP, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, signalsAll, 0)
	if err != nil {
		return err
	}
	if err := t.write(first, at, program(t.filter, at)); err != nil {
		return fmt.Errorf("write the filter: %w", err)
	}
	if t.written != nil {
		t.written(first.tid, at)
	}
	if p.apart {
		err = t.loadEach(p, first, at, &done)
	} else {
		err = t.loadAll(p, first, at, &done)
	}
	// The filter is in force. Where it doesn't let the memory be freed, that stays, with
	// nothing in it that is a secret.
	v, verr := t.filter.Answer(specs.ArchX86_64, unix.SYS_MUNMAP, [6]uint64{at, size})
	if !errors.Is(err, ErrGone) && (suspended || err != nil || verr == nil && v.LetsPass()) {
		if _, uerr := t.call(first, "munmap", unix.SYS_MUNMAP, at, size); uerr != nil && err == nil && !errors.Is(uerr, ErrGone) {
			t.warn(first, fmt.Sprintf("keeps %d bytes of memory: %v", size, uerr))
		}
	}
	if err != nil {
		return err
	}
	done.SetNoNewPrivs = p.setNNP
	t.report.Processes = append(t.report.Processes, done)
	return nil
}

func (t *tracer) flags() uint64 {
	if t.opts.Log {
		return unix.SECCOMP_FILTER_FLAG_LOG
	}
	return 0
}

// loadAll loads it for all threads, or for none: if the kernel does it, each has all filters
// of the one that loads it.
func (t *tracer) loadAll(p *process, k *task, at uint64, done *Process) error {
	r, err := t.seccomp(p, k, at, unix.SECCOMP_FILTER_FLAG_TSYNC|t.flags())
	if err != nil {
		return err
	}
	if r != 0 {
		return errApart // r is the thread's id
	}
	done.FiltersAfter = done.FiltersBefore + 1
	t.covered[p.identity] = done.FiltersAfter
	t.loaded = true
	return nil
}

// loadEach loads it in one thread after the other, where it isn't yet; all are stopped, but
// those that another traces.
func (t *tracer) loadEach(p *process, first *task, at uint64, done *Process) error {
	done.PerThread = true
	least := 0
	has := func(filters int) {
		if least == 0 || filters < least {
			least = filters
		}
	}
	for _, k := range slices.SortedFunc(maps.Values(p.tasks), func(a, b *task) int { return a.tid - b.tid }) {
		if k.dead {
			continue
		}
		filters, count, err := filtersOf(k.tid)
		if errors.Is(err, ErrGone) {
			continue // others sees to it
		}
		if err == nil && t.among(filters) {
			has(count)
			continue
		}
		if k != first {
			if _, err := t.begin(k); err != nil {
				return err
			}
		}
		_, err = t.seccomp(p, k, at, t.flags())
		if k != first {
			err = errors.Join(err, t.end(k))
		}
		if errors.Is(err, ErrGone) {
			continue
		}
		if err != nil {
			return fmt.Errorf("thread %d: %w", k.tid, err)
		}
		has(count + 1)
		if k == first {
			done.FiltersAfter = count + 1
		}
	}
	if least == 0 {
		return ErrGone
	}
	if err := t.others(p); err != nil {
		return err
	}
	t.covered[p.identity] = least
	return nil
}

func (t *tracer) seccomp(p *process, k *task, at, flags uint64) (uint64, error) {
	load := func() (uint64, error) {
		return t.call(k, "seccomp", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, at)
	}
	r, err := load()
	if errors.Is(err, unix.EACCES) {
		if _, err := t.call(k, "prctl", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return 0, err
		}
		p.setNNP = true
		r, err = load()
	}
	switch {
	case errors.Is(err, unix.ENOMEM):
		return 0, fmt.Errorf("%w: its filters would be too long together, or its memory is used up", err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSYS):
		return 0, fmt.Errorf("%w: a filter that it has may deny this; with CAP_SYS_ADMIN and no filter on this process it would be set aside", err)
	}
	if err == nil && r == 0 {
		t.loaded = true
		err = t.holds(k)
	}
	return r, err
}

// errChanged: who isn't stopped, and may write to the process's memory, did.
var errChanged = errors.New("another process changed the filter while it was loaded")

// holds is errChanged where the filter, which was loaded just now, isn't among a task's last
// ones, as far as they can be read.
func (t *tracer) holds(k *task) error {
	info, err := readStatus(k.tid)
	if err != nil {
		return err
	}
	for i := info.filters - 1; i >= max(0, info.filters-mostRead); i-- {
		f, err := filterOf(k.tid, i)
		if errors.Is(err, errUnreadable) || err == nil && slices.Equal(f, t.filter) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return errChanged
}

// among says whether the filter is one of these.
func (c *campaign) among(filters []seccomp.Filter) bool {
	return slices.ContainsFunc(filters, func(f seccomp.Filter) bool { return slices.Equal(f, c.filter) })
}

// begin readies a stopped task for calls that are not its own. From here until end the
// kernel kills it if this process dies.
func (t *tracer) begin(k *task) (suspended bool, err error) {
	if !stands(k.tid) {
		return false, fmt.Errorf("%w: it stands no more", ErrGone)
	}
	if err := getRegs(k.tid, &k.saved); err != nil {
		return false, err
	}
	if k.mask, err = getSigmask(k.tid); err != nil {
		return false, gone(err)
	}
	if k.gadget, err = t.findSyscall(k); err != nil {
		return false, err
	}
	// In a restartable sequence (rseq(2)) the kernel would forget that it is in one.
	if k.rseqAt = rseqPointer(k.tid); k.rseqAt != 0 {
		b, err := t.read(k, uint64(k.rseqAt), len(k.rseqCS))
		if err != nil {
			k.rseqAt = 0
		} else {
			copy(k.rseqCS[:], b)
		}
	}
	options := t.options() | unix.PTRACE_O_EXITKILL
	_, err = ptrace(unix.PTRACE_SETOPTIONS, k.tid, 0, uintptr(options|unix.PTRACE_O_SUSPEND_SECCOMP))
	suspended = err == nil
	if !suspended {
		if _, err := ptrace(unix.PTRACE_SETOPTIONS, k.tid, 0, uintptr(options)); err != nil {
			return false, gone(err)
		}
	}
	k.foreign = true
	if err := setSigmask(k.tid, signalsAll); err != nil {
		return suspended, errors.Join(gone(err), t.end(k))
	}
	return suspended, nil
}

func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}

// call has a task make one call, and gives what it returned.
func (t *tracer) call(k *task, name string, nr uint64, args ...uint64) (uint64, error) {
	regs := k.saved
	regs.Rip, regs.Rax, regs.Orig_rax = k.gadget, nr, signalsAll // no call is to be made again
	for i, to := range []*uint64{&regs.Rdi, &regs.Rsi, &regs.Rdx, &regs.R10, &regs.R8, &regs.R9} {
		*to = 0
		if i < len(args) {
			*to = args[i]
		}
	}
	if err := unix.PtraceSetRegs(k.tid, &regs); err != nil {
		return 0, gone(err)
	}
	for _, at := range []string{"entry", "return"} {
		if err := t.resume(k, unix.PTRACE_SYSCALL, 0); err != nil {
			return 0, err
		}
		if err := t.await(k, unix.PTRACE_SYSCALL, name); err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		if err := getRegs(k.tid, &regs); err != nil {
			return 0, err
		}
		if at == "entry" && (regs.Orig_rax != nr || int64(regs.Rax) != -int64(unix.ENOSYS)) {
			return 0, fmt.Errorf("%s: stopped with call %d at its entry", name, int64(regs.Orig_rax))
		}
	}
	if r := int64(regs.Rax); r < 0 && r >= -4095 {
		return 0, fmt.Errorf("%s in the process: %w", name, unix.Errno(-r))
	}
	return regs.Rax, nil
}

// await waits until a task with foreign registers stops at a call's entry or return,
// or with PTRACE_CONT where it was interrupted. There is no end to its patience: such
// a task can't be let go.
func (t *tracer) await(k *task, request int, doing string) error {
	begun := time.Now()
	for i := 0; ; i++ {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(k.tid, &ws, unix.WNOHANG|unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD) || err == nil && tid != 0 && !ws.Stopped():
			k.foreign = false
			t.gone(k)
			return ErrGone
		case err != nil:
			return fmt.Errorf("wait4: %w", err)
		case tid == 0:
			if i < 10*spins {
				_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
				continue
			}
			if time.Since(begun) > slowIf {
				t.warn(k, "is slow, while it does what loads the filter ("+doing+"): if this process is killed now, that one is killed, too")
			}
			t.pause(context.Background(), tick)
			continue
		}
		k.running = false
		event, sig := int(uint32(ws)>>16), ws.StopSignal()
		switch {
		case event == eventStop && request == unix.PTRACE_CONT, event == 0 && sig == syscallSt && request == unix.PTRACE_SYSCALL:
			return nil
		case event == 0 && sig != syscallSt && sig != unix.SIGSTOP:
			// All signals are blocked, so the kernel forced this one.
			return fmt.Errorf("raised %s: a filter that it has may deny this", unix.SignalName(sig))
		}
		// A stop of its process, which lasts on, and of which this task is let out.
		deliver := 0
		if event == 0 && sig == unix.SIGSTOP {
			deliver = int(sig)
		}
		if err := t.resume(k, request, deliver); err != nil {
			return err
		}
	}
}

// end gives a task its registers back and leaves it stopped where it was: in the
// kernel's signal handling, which makes its call again if one was interrupted.
func (t *tracer) end(k *task) error {
	if !k.foreign {
		return nil
	}
	return t.restore(k)
}

func (t *tracer) restore(k *task) error {
	if k.dead {
		k.foreign = false
		return nil
	}
	if k.running {
		if err := t.await(k, unix.PTRACE_SYSCALL, "end"); err != nil && k.running {
			return err
		}
	}
	if k.dead {
		return nil
	}
	if k.rseqAt != 0 {
		if err := t.write(k, uint64(k.rseqAt), k.rseqCS[:]); err != nil {
			t.warn(k, fmt.Sprintf("may have left a restartable sequence: %v", err))
		}
	}
	if err := unix.PtraceSetRegs(k.tid, &k.saved); err != nil {
		return t.lost(k, err)
	}
	// Interrupted, it passes the kernel's signal handling before it runs, whoever lets
	// it go.
	if _, err := ptrace(unix.PTRACE_INTERRUPT, k.tid, 0, 0); err != nil {
		return t.lost(k, err)
	}
	if err := setSigmask(k.tid, k.mask); err != nil {
		return t.lost(k, err)
	}
	if _, err := ptrace(unix.PTRACE_SETOPTIONS, k.tid, 0, uintptr(t.options())); err != nil {
		return t.lost(k, err)
	}
	k.foreign = false
	if err := t.resume(k, unix.PTRACE_CONT, 0); err != nil {
		return err
	}
	return t.await(k, unix.PTRACE_CONT, "end")
}

// lost is the end of a task that was killed while it was stopped.
func (t *tracer) lost(k *task, err error) error {
	if errors.Is(err, unix.ESRCH) {
		k.foreign, k.running = false, true // wait4 tells
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return fmt.Errorf("registers of thread %d can't be restored, it is killed when this process ends: %w", k.tid, err)
}

func (t *tracer) closeMem(k *task) {
	if k.mem != nil {
		k.mem.Close()
		k.mem = nil
	}
}

func (t *tracer) memory(k *task) (*os.File, error) {
	if k.mem == nil {
		f, err := os.OpenFile(memPath(k.tid), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		k.mem = f
	}
	return k.mem, nil
}

func (t *tracer) read(k *task, at uint64, size int) ([]byte, error) {
	b := make([]byte, size)
	f, err := t.memory(k)
	if err == nil {
		_, err = f.ReadAt(b, int64(at))
	}
	if err != nil {
		_, err = unix.PtracePeekData(k.tid, uintptr(at), b)
	}
	return b, err
}

func (t *tracer) write(k *task, at uint64, b []byte) error {
	f, err := t.memory(k)
	if err == nil {
		_, err = f.WriteAt(b, int64(at))
	}
	if err != nil {
		_, err = unix.PtracePokeData(k.tid, uintptr(at), b)
	}
	return err
}

// syscallCode is the instruction.
var syscallCode = []byte{0x0f, 0x05}

// findSyscall is the address of a syscall instruction that a task can execute.
func (t *tracer) findSyscall(k *task) (uint64, error) {
	if int64(k.saved.Orig_rax) >= 0 {
		if b, err := t.read(k, k.saved.Rip-2, 2); err == nil && bytes.Equal(b, syscallCode) {
			return k.saved.Rip - 2, nil
		}
	}
	text, err := readProc(strconv.Itoa(k.tid), "maps")
	if err != nil {
		return 0, err
	}
	regions := executable(text)
	if len(regions) == 0 {
		// Such as that of a process that has ended.
		return 0, fmt.Errorf("%w: no memory that could be executed", ErrGone)
	}
	for _, r := range regions {
		const chunk = 1 << 20
		for at := r.from; at < r.to; at += chunk - 1 { // the instruction may lie across
			b, err := t.read(k, at, int(min(r.to-at, chunk)))
			if err != nil {
				break
			}
			if i := bytes.Index(b, syscallCode); i >= 0 {
				return at + uint64(i), nil
			}
		}
	}
	return 0, errors.New("has no syscall instruction in its memory")
}

type region struct{ from, to uint64 }

// executable reads /proc/PID/maps, what is likely to hold a system call first.
func executable(text string) []region {
	var first, rest []region
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 5 || len(fields[1]) < 3 || fields[1][2] != 'x' {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		a, err := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		name := fields[len(fields)-1]
		if err != nil || err2 != nil || a >= b || name == "[vsyscall]" { // not to be executed
			continue
		}
		if name == "[vdso]" {
			first = append(first, region{a, b})
		} else {
			rest = append(rest, region{a, b})
		}
	}
	return append(first, rest...)
}
