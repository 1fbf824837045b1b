// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/rawcalls"
)

// workerRole is this program's first argument when it is the process that makes
// the calls.
const workerRole = "internal-worker"

// order asks the worker for a number of rounds of one load.
type order struct {
	Load   string `json:"load"`
	Rounds int    `json:"rounds"`
}

// timing is its answer: nanoseconds for each call. CPU is the thread's own time,
// which leaves out what others did on the processor meanwhile.
type timing struct {
	CPU  float64 `json:"cpu"`
	Wall float64 `json:"wall"`

	// Failed is why there is no timing.
	Failed string `json:"failed,omitempty"`
}

// load is a sequence of system calls.
type load struct {
	name   string
	calls  []string // of one round, for the report
	rounds int      // that take some 20 ms
}

var loads = []load{
	{"getppid", []string{"getppid"}, 150_000},
	{"mix", []string{"openat", "fstat", "read", "pread64", "lseek", "write", "mmap", "munmap", "fcntl", "futex", "poll", "close"}, 5_000},
}

// helper is this program as another process, which measures what it is told.
type helper struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	enc *json.Encoder
	dec *json.Decoder
}

// startHelper starts one of the roles; set, if not nil, completes the command.
func startHelper(set func(*exec.Cmd), role string, args ...string) (*helper, error) {
	h := &helper{cmd: exec.Command("/proc/self/exe", append([]string{role}, args...)...)}
	// The runtime's own calls and signals would be measured with the others.
	h.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOGC=off")
	h.cmd.Stderr = os.Stderr
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if set != nil {
		set(h.cmd)
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	h.enc, h.dec = json.NewEncoder(h.in), json.NewDecoder(out)
	if err := h.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	return h, nil
}

func (h *helper) run(name string, rounds int) (t timing, err error) {
	if err := h.enc.Encode(order{name, rounds}); err != nil {
		return t, fmt.Errorf("%s: %w", h.cmd.Args[1], err)
	}
	if err := h.dec.Decode(&t); err != nil {
		return t, fmt.Errorf("%s: %w", h.cmd.Args[1], err)
	}
	if t.Failed != "" {
		return t, fmt.Errorf("%s: %s: %s", h.cmd.Args[1], name, t.Failed)
	}
	return t, nil
}

func (h *helper) close() error {
	h.in.Close()
	return h.cmd.Wait()
}

// worker is the process that makes the calls, in a cgroup of its own.
type worker struct {
	*helper
	group *cgroup.Group
}

// startWorker starts a role in a cgroup; flags are clone(2)'s.
func startWorker(flags uintptr, role string, args ...string) (_ *worker, err error) {
	w := &worker{}
	if w.group, err = cgroup.New("bench"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.group.Remove())
		}
	}()
	fd, err := w.group.Open()
	if err != nil {
		return nil, err
	}
	defer fd.Close()
	w.helper, err = startHelper(func(cmd *exec.Cmd) {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(fd.Fd())
		cmd.SysProcAttr.Cloneflags = flags
	}, role, args...)
	return w, err
}

func (w *worker) close() error { return errors.Join(w.helper.close(), w.group.Remove()) }

// pin keeps the calling thread on one processor, the last: others may be busier.
func pin() error {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(runtime.NumCPU() - 1)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to a processor: %w", err)
	}
	return nil
}

// work is the worker's body.
func work() error {
	if len(os.Args) != 3 {
		return errors.New("want a directory")
	}
	if err := pin(); err != nil {
		return err
	}
	m, err := newMix(os.Args[2])
	if err != nil {
		return err
	}
	return obey(map[string]body{
		loads[0].name: getppid(0),
		loads[1].name: {len(loads[1].calls), func(rounds int, w *stopwatch) error {
			return w.timed(func() error { return m.run(rounds) })
		}},
	})
}

// body makes the calls of a load, and has timed what is measured of it.
type body struct {
	calls int // in a round
	run   func(rounds int, w *stopwatch) error
}

// getppid calls that, with one result: 0, or what it is denied with.
func getppid(want unix.Errno) body {
	list := []rawcalls.Call{{Number: unix.SYS_GETPPID}}
	return body{1, func(rounds int, w *stopwatch) error {
		list[0].Times = uint64(rounds)
		return w.timed(func() error {
			rawcalls.Run(list)
			return result(&list[0], want)
		})
	}}
}

// result is an error if a call ended otherwise than it should.
func result(c *rawcalls.Call, want unix.Errno) error {
	got := unix.Errno(0)
	if r := int64(c.Result); r < 0 {
		got = unix.Errno(-r)
	}
	if got != want {
		return fmt.Errorf("call %d: %w, want %w", c.Number, got, want)
	}
	return nil
}

// obey measures what standard input says, until that ends.
func obey(bodies map[string]body) error {
	dec, enc := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := dec.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		t, err := bodies[o.Load].measure(o.Rounds)
		if err != nil {
			t.Failed = err.Error()
		}
		if err := enc.Encode(t); err != nil {
			return err
		}
	}
}

func (b body) measure(rounds int) (timing, error) {
	// Attaching and detaching changed code that the processor has yet to see.
	if err := b.run(max(rounds/10, 1), &stopwatch{}); err != nil {
		return timing{}, err
	}
	var w stopwatch
	if err := b.run(rounds, &w); err != nil {
		return timing{}, err
	}
	each := func(sum int64) float64 { return float64(sum) / float64(rounds*b.calls) }
	return timing{CPU: each(w.cpu), Wall: each(w.wall)}, nil
}

// stopwatch has the nanoseconds of this thread's processor time and of the clock.
type stopwatch struct{ cpu, wall int64 }

// timed adds what do takes.
func (w *stopwatch) timed(do func() error) error {
	var from, to [2]unix.Timespec
	clocks := func(ts *[2]unix.Timespec) error {
		return errors.Join(unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts[0]), unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts[1]))
	}
	if err := clocks(&from); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	if err := clocks(&to); err != nil {
		return err
	}
	w.cpu += to[0].Nano() - from[0].Nano()
	w.wall += to[1].Nano() - from[1].Nano()
	return nil
}

// mix is what programs do with files and memory all day, on a tmpfs, so that no
// device is measured.
type mix struct {
	path   *byte
	buffer [4096]byte
	stat   unix.Stat_t
	poll   unix.PollFd
	word   uint32 // nobody waits for this futex
	list   []rawcalls.Call
}

func newMix(dir string) (*mix, error) {
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		return nil, err
	}
	m := &mix{}
	var err error
	if m.path, err = unix.BytePtrFromString(path); err != nil {
		return nil, err
	}
	// The list can't use results. A descriptor is the lowest that is free, and
	// memory is mapped where this has been.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	const size = 16384
	area, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(unix.Close(fd), unix.MunmapPtr(area, size)); err != nil {
		return nil, err
	}
	m.poll = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	call := func(nr uint64, args ...uint64) {
		c := rawcalls.Call{Number: nr}
		copy(c.Args[:], args)
		m.list = append(m.list, c)
	}
	ptr := func(p unsafe.Pointer) uint64 { return uint64(uintptr(p)) }
	const cwd = 1<<64 + unix.AT_FDCWD
	f, buffer := uint64(fd), ptr(unsafe.Pointer(&m.buffer))
	call(unix.SYS_OPENAT, cwd, ptr(unsafe.Pointer(m.path)), unix.O_RDWR|unix.O_CLOEXEC)
	call(unix.SYS_FSTAT, f, ptr(unsafe.Pointer(&m.stat)))
	call(unix.SYS_READ, f, buffer, 4096)
	call(unix.SYS_PREAD64, f, buffer, 512, 1024)
	call(unix.SYS_LSEEK, f, 0, unix.SEEK_SET)
	call(unix.SYS_WRITE, f, buffer, 512)
	call(unix.SYS_MMAP, ptr(area), size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_FIXED, 1<<64-1)
	call(unix.SYS_MUNMAP, ptr(area), size)
	call(unix.SYS_FCNTL, f, unix.F_GETFL)
	call(unix.SYS_FUTEX, ptr(unsafe.Pointer(&m.word)), 1|128 /* FUTEX_WAKE, private */, 1)
	call(unix.SYS_POLL, ptr(unsafe.Pointer(&m.poll)), 1)
	call(unix.SYS_CLOSE, f)
	return m, nil
}

func (m *mix) run(rounds int) error {
	for range rounds {
		rawcalls.Run(m.list)
	}
	for i, c := range m.list {
		if r := int64(c.Result); r < 0 {
			return fmt.Errorf("%s: %w", loads[1].calls[i], unix.Errno(-r))
		}
	}
	return nil
}
