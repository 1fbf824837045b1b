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

// worker is the process that makes the calls, in a cgroup of its own, on one
// processor and one thread.
type worker struct {
	cmd   *exec.Cmd
	group *cgroup.Group
	in    io.WriteCloser
	enc   *json.Encoder
	dec   *json.Decoder
}

func startWorker(dir string, cpu int) (_ *worker, err error) {
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
	w.cmd = exec.Command("/proc/self/exe", workerRole, dir, fmt.Sprint(cpu))
	// The runtime's own calls and signals would be measured with the others.
	w.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOGC=off")
	w.cmd.Stderr = os.Stderr
	w.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd()), Pdeathsig: syscall.SIGKILL}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	w.enc, w.dec = json.NewEncoder(w.in), json.NewDecoder(out)
	if err := w.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	return w, nil
}

func (w *worker) run(l load) (t timing, err error) {
	if err := w.enc.Encode(order{l.name, l.rounds}); err != nil {
		return t, fmt.Errorf("worker: %w", err)
	}
	if err := w.dec.Decode(&t); err != nil {
		return t, fmt.Errorf("worker: %w", err)
	}
	if t.Failed != "" {
		return t, fmt.Errorf("worker: %s", t.Failed)
	}
	return t, nil
}

func (w *worker) close() error {
	w.in.Close()
	return errors.Join(w.cmd.Wait(), w.group.Remove())
}

// work is the worker's body: it obeys orders until there are no more.
func work() error {
	if len(os.Args) != 4 {
		return errors.New("want a directory and a processor")
	}
	dir, cpu := os.Args[2], os.Args[3]
	runtime.LockOSThread()
	var n int
	if _, err := fmt.Sscan(cpu, &n); err != nil {
		return fmt.Errorf("processor %q: %w", cpu, err)
	}
	var set unix.CPUSet
	set.Set(n)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to processor %d: %w", n, err)
	}
	bodies := map[string]func(rounds int) error{}
	for _, l := range loads {
		var err error
		if bodies[l.name], err = l.body(dir); err != nil {
			return err
		}
	}
	dec, enc := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := dec.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		t, err := measure(o, bodies[o.Load])
		if err != nil {
			t.Failed = err.Error()
		}
		if err := enc.Encode(t); err != nil {
			return err
		}
	}
}

func measure(o order, body func(rounds int) error) (t timing, err error) {
	// Attaching and detaching changed code that the processor has yet to see.
	if err := body(o.Rounds / 10); err != nil {
		return t, err
	}
	var from, to [2]unix.Timespec
	clocks := func(ts *[2]unix.Timespec) error {
		return errors.Join(unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts[0]), unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts[1]))
	}
	if err := clocks(&from); err != nil {
		return t, err
	}
	if err := body(o.Rounds); err != nil {
		return t, err
	}
	if err := clocks(&to); err != nil {
		return t, err
	}
	calls := 0
	for _, l := range loads {
		if l.name == o.Load {
			calls = len(l.calls) * o.Rounds
		}
	}
	each := func(i int) float64 { return float64(to[i].Nano()-from[i].Nano()) / float64(calls) }
	return timing{CPU: each(0), Wall: each(1)}, nil
}

// body makes a load's calls.
func (l load) body(dir string) (func(rounds int) error, error) {
	if l.name == "getppid" {
		list := []rawcalls.Call{{Number: unix.SYS_GETPPID}}
		return func(rounds int) error {
			list[0].Times = uint64(rounds)
			rawcalls.Run(list)
			return nil
		}, nil
	}
	m, err := newMix(dir)
	if err != nil {
		return nil, err
	}
	return m.run, nil
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
