// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// supervisorSource is a supervisor in C, which gcc compiles.
//
//go:embed supervisor/supervisor.c
var supervisorSource string

// Roles of this program as a process of its own.
const (
	callerRole  = "internal-caller"
	sleeperRole = "internal-sleepers"
)

// asked are the ways in which getppid is judged, in the order of the report.
var asked = []struct {
	name, title string
	rounds      int // that take some 20 ms
	supervise   func(*bench, context.Context, *caller, *os.File) error
}{
	{"bare", "no filter", 150_000, nil},
	{"static", "allowed by the filter", 100_000, nil},
	{"c", "asked, by a supervisor in C", 4_000, (*bench).superviseByC},
	{"go", "asked, by syslatch", 4_000, (*bench).superviseByGo},
}

// phasesPart compares what a call costs that a phase gates with one that it
// doesn't, and how long the tasks of an instance are held at a switch.
func (b *bench) phasesPart(ctx context.Context) (err error) {
	times := make([][]float64, len(asked))
	callers := make([]*caller, len(asked))
	defer func() {
		for _, c := range callers {
			if c != nil {
				err = errors.Join(err, c.close())
			}
		}
	}()
	for i, a := range asked {
		var listener *os.File
		if callers[i], listener, err = startCaller(a.name); err != nil {
			return err
		}
		if a.supervise != nil {
			if err := a.supervise(b, ctx, callers[i], listener); err != nil {
				return err
			}
		}
	}
	for n := range b.opts.rounds {
		for i := range asked {
			if err := ctx.Err(); err != nil {
				return err
			}
			at := (i + n) % len(asked)
			t, err := callers[at].run(asked[at].rounds)
			if err != nil {
				return err
			}
			// One that waits for another process is to be measured by the clock.
			if asked[at].supervise == nil {
				t.Wall = t.CPU
			}
			times[at] = append(times[at], t.Wall)
		}
		b.progress("phases", n+1, b.opts.rounds)
	}
	t := table{head: []string{"getppid", "ns a call", "ratio to no filter", "to C", "quartiles"}}
	for i, a := range asked {
		toBare, toC := paired(times[i], times[0], ratio), paired(times[i], times[2], ratio)
		b.report.metric(median(times[i]), "ns", "phases", a.name, "time")
		b.report.metric(median(toBare), "ratio", "phases", a.name, "ratio")
		row := []string{a.title, fmt.Sprintf("%.0f", median(times[i])), fmt.Sprintf("×%.2f", median(toBare)), "", ""}
		if a.supervise != nil {
			row[3] = fmt.Sprintf("×%.2f", median(toC))
		}
		if a.name == "go" {
			b.report.metric(median(toC), "ratio", "phases", a.name, "to-c")
			row[4] = fmt.Sprintf("%.2f–%.2f", quantile(toC, 0.25), quantile(toC, 0.75))
			b.report.goal("a call that the supervisor is asked about", "×%.2f of a supervisor in C", median(toC), 1.5)
		}
		t.rows = append(t.rows, row)
	}
	barriers, err := b.barriers(ctx)
	if err != nil {
		return err
	}
	b.report.add(section{
		title:  "Phases",
		tables: []table{t, barriers},
		notes: []string{
			fmt.Sprintf("Medians of %d rounds in which all took turns; the first two rows by the caller's processor time, the others by the clock. Both supervisors let every call go on, and use SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP where the kernel has it (6.6).", b.opts.rounds),
			fmt.Sprintf("%d times: from the write of the switch until all tasks have been stopped outside of their calls and go on again. The tasks are %d processes of %d threads, which wait in read.", b.opts.creates, sleeperProcesses, sleeperThreads),
		},
	})
	return nil
}

// caller is a process that calls getppid on one thread.
type caller struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	enc    *json.Encoder
	dec    *json.Decoder
	served func() error // ends with the process
}

// startCaller starts one that is judged in a way of asked; its listener, if that has
// one, is still to be served.
func startCaller(way string) (_ *caller, listener *os.File, err error) {
	c := &caller{served: func() error { return nil }}
	c.cmd = exec.Command("/proc/self/exe", callerRole, way)
	c.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOGC=off")
	c.cmd.Stderr = os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	defer ours.Close()
	defer theirs.Close()
	c.cmd.ExtraFiles = []*os.File{theirs}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, nil, err
	}
	c.enc, c.dec = json.NewEncoder(c.in), json.NewDecoder(out)
	if err := c.cmd.Start(); err != nil {
		return nil, nil, err
	}
	theirs.Close()
	if way == "bare" || way == "static" {
		return c, nil, nil
	}
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, c.close())
	}
	defer conn.Close()
	if _, listener, err = seccomp.ReceiveListener(conn.(*net.UnixConn)); err != nil {
		return nil, nil, errors.Join(err, c.close())
	}
	return c, listener, nil
}

func (c *caller) run(rounds int) (t timing, err error) {
	if err := c.enc.Encode(order{loads[0].name, rounds}); err != nil {
		return t, fmt.Errorf("caller: %w", err)
	}
	if err := c.dec.Decode(&t); err != nil {
		return t, fmt.Errorf("caller: %w", err)
	}
	return t, nil
}

func (c *caller) close() error {
	c.in.Close()
	return errors.Join(c.cmd.Wait(), c.served())
}

// call is the caller's body.
func call() error {
	if len(os.Args) != 3 {
		return errors.New("want a way of being judged")
	}
	runtime.LockOSThread()
	// All on one processor: others may be busier. A supervisor comes along where the
	// kernel wakes it there.
	var set unix.CPUSet
	set.Set(runtime.NumCPU() - 1)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return err
	}
	way, action := os.Args[2], specs.ActNotify
	if way == "static" {
		action = specs.ActAllow
	}
	f, err := seccomp.Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"getppid"}, Action: action},
			{Names: []string{"mkdir"}, Action: specs.ActErrno}, // so that there is a filter in any case
		},
	}, seccomp.Options{})
	if err != nil {
		return err
	}
	switch way {
	case "bare":
	case "static":
		err = seccomp.Load(f, seccomp.LoadOptions{})
	default:
		var listener *os.File
		if listener, err = seccomp.LoadListener(f, seccomp.LoadOptions{}); err == nil {
			err = errors.Join(unix.Sendmsg(3, []byte(`{"fds":["seccompFd"]}`), unix.UnixRights(int(listener.Fd())), nil, 0), listener.Close())
		}
	}
	if err != nil {
		return err
	}
	dec, enc := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	body, err := loads[0].body("") // getppid
	if err != nil {
		return err
	}
	for {
		var o order
		if err := dec.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		t, err := measure(o, body)
		if err != nil {
			return err
		}
		if err := enc.Encode(t); err != nil {
			return err
		}
	}
}

// superviseByC compiles the supervisor and starts it.
func (b *bench) superviseByC(ctx context.Context, c *caller, listener *os.File) error {
	defer listener.Close()
	program := filepath.Join(b.dir, "supervisor")
	gcc := exec.CommandContext(ctx, "gcc", "-O2", "-o", program, "-x", "c", "-")
	gcc.Stdin = strings.NewReader(supervisorSource)
	if out, err := gcc.CombinedOutput(); err != nil {
		return fmt.Errorf("gcc (apt-get install gcc): %w: %s", err, out)
	}
	cmd := exec.Command(program)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{listener}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	c.served = func() error {
		// Before Linux 6.11 nothing tells it that its caller is gone.
		err := cmd.Process.Kill()
		_ = cmd.Wait() // killed
		return err
	}
	return nil
}

func (b *bench) superviseByGo(ctx context.Context, c *caller, listener *os.File) error {
	l, err := seccomp.NewListener(listener)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		done <- errors.Join(l.Serve(ctx, func(*seccomp.Notification) (bool, uint) { return true, 0 }), l.Close())
	}()
	c.served = func() error { return <-done }
	return nil
}

const (
	sleeperProcesses = 10
	sleeperThreads   = 10
)

// sleep is the body of a process whose threads wait in read.
func sleep() error {
	ready := make(chan struct{})
	for range sleeperThreads - 1 {
		go func() {
			runtime.LockOSThread()
			ready <- struct{}{}
			_, _ = unix.Read(0, make([]byte, 1))
		}()
	}
	for range sleeperThreads - 1 {
		<-ready
	}
	if _, err := os.Stdout.Write([]byte("\n")); err != nil {
		return err
	}
	_, err := unix.Read(0, make([]byte, 1))
	return err
}

// barriers measures for each hierarchy that can freeze.
func (b *bench) barriers(ctx context.Context) (t table, err error) {
	t = table{head: []string{fmt.Sprintf("barrier for %d tasks", sleeperProcesses*sleeperThreads), "p50, ms", "p99", "most"}}
	group, err := cgroup.New("bench")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, group.Wait(ctx), group.Remove()) }()
	dir, err := group.Open()
	if err != nil {
		return t, err
	}
	defer dir.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return t, err
	}
	defer r.Close()
	var all []*exec.Cmd
	defer func() {
		w.Close()
		for _, cmd := range all {
			err = errors.Join(err, cmd.Wait())
		}
	}()
	for range sleeperProcesses {
		cmd := exec.Command("/proc/self/exe", sleeperRole)
		cmd.Stdin, cmd.Stderr = r, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return t, err
		}
		if err := cmd.Start(); err != nil {
			return t, err
		}
		all = append(all, cmd)
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
			return t, err
		}
	}
	f, err := cgroup.NewFreezer(group.Path())
	if err != nil {
		return t, err
	}
	var times []float64
	for range b.opts.creates {
		begin := time.Now()
		if err := f.Barrier(ctx); err != nil {
			return t, err
		}
		times = append(times, ms(time.Since(begin)))
	}
	p50, p99 := median(times), quantile(times, 0.99)
	b.report.metric(p50, "ms", "phases", "barrier", "p50")
	b.report.metric(p99, "ms", "phases", "barrier", "p99")
	b.report.goal(fmt.Sprintf("barrier for %d tasks, p99", sleeperProcesses*sleeperThreads), "%.1f ms", p99, 5)
	t.rows = append(t.rows, []string{"cgroup.freeze", fmt.Sprintf("%.2f", p50), fmt.Sprintf("%.2f", p99), fmt.Sprintf("%.2f", quantile(times, 1))})
	return t, nil
}
