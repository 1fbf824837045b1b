// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/seccomp"
)

const (
	sleeperProcesses = 10
	sleeperThreads   = 10
	// setsAtOnce is how many phases are set between two looks at the clock.
	setsAtOnce = 10_000
	// mostRatchets bounds how often one is put on a crowd, which is a new one each time.
	mostRatchets = 30
)

// switches measures what a switch of phases is made of.
func (b *bench) switches(ctx context.Context, e *bpf.Enforcer) (t table, ratchets int, err error) {
	const tasks = sleeperProcesses * sleeperThreads
	t = table{head: []string{fmt.Sprintf("at a switch, for %d tasks", tasks), "p50", "p99", "most"}}
	row := func(title, unit string, v []float64, name ...string) (p99 float64) {
		cells := []string{title + ", " + unit}
		for _, q := range []struct {
			name string
			of   float64
		}{{"p50", 0.5}, {"p99", 0.99}, {"most", 1}} {
			b.report.metric(quantile(v, q.of), unit, append(append([]string{"phases"}, name...), q.name)...)
			cells = append(cells, fmt.Sprintf("%.2f", quantile(v, q.of)))
		}
		t.rows = append(t.rows, cells)
		return quantile(v, 0.99)
	}
	crowd, err := startSleepers(ctx)
	if err != nil {
		return t, 0, err
	}
	defer func() { err = errors.Join(err, crowd.close(ctx)) }()
	supervised, err := b.startCommand(ctx)
	if err != nil {
		return t, 0, err
	}
	defer func() { err = errors.Join(err, supervised.close()) }()
	took, err := crowd.switched(ctx, e, supervised, b.opts.creates)
	if err != nil {
		return t, 0, err
	}
	row("the phase of the BPF programs is set", "ns", took.sets, "set")
	p99 := row("barrier (cgroup.freeze)", "ms", took.barriers, "barrier")
	b.report.goal(fmt.Sprintf("barrier for %d tasks, p99", tasks), "%.1f ms", p99, 5)
	p99 = row("switch, as acknowledged over the API", "ms", took.switches, "switch")
	b.report.goal(fmt.Sprintf("switch for %d tasks acknowledged over the API, p99", tasks), "%.1f ms", p99, 5)

	var all, each []float64
	for n := range min(b.opts.creates, mostRatchets) {
		took, err := ratchetCrowd(ctx)
		if err != nil {
			return t, 0, err
		}
		all, each = append(all, took), append(each, took/sleeperProcesses)
		b.progress("ratchets", n+1, min(b.opts.creates, mostRatchets))
	}
	row(fmt.Sprintf("a ratchet is put on all %d processes", sleeperProcesses), "ms", all, "ratchet", "all")
	row("the same, for each process", "ms", each, "ratchet", "process")
	return t, len(all), nil
}

// sleepers are processes whose threads wait, in a cgroup of their own.
type sleepers struct {
	group *cgroup.Group
	hold  *os.File // its end ends them
	all   []*exec.Cmd
}

func startSleepers(ctx context.Context) (_ *sleepers, err error) {
	s := &sleepers{}
	if s.group, err = cgroup.New("bench"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close(ctx))
		}
	}()
	dir, err := s.group.Open()
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	s.hold = w
	return s, s.start(sleeperProcesses, r, sleeperRole, &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL})
}

// start starts n processes of a role, and returns when all their threads wait in read of
// in.
func (s *sleepers) start(n int, in *os.File, role string, attr *syscall.SysProcAttr) error {
	var ready []io.Reader
	for range n {
		cmd := exec.Command("/proc/self/exe", role)
		cmd.Stdin, cmd.Stderr, cmd.SysProcAttr = in, os.Stderr, attr
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		s.all, ready = append(s.all, cmd), append(ready, out)
	}
	for _, out := range ready {
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
			return fmt.Errorf("%s: %w", role, err)
		}
	}
	return nil
}

func (s *sleepers) end() error {
	var errs []error
	if s.hold != nil {
		errs = append(errs, s.hold.Close())
	}
	for _, cmd := range s.all {
		errs = append(errs, cmd.Wait())
	}
	return errors.Join(errs...)
}

func (s *sleepers) close(ctx context.Context) error {
	return errors.Join(s.end(), s.group.Wait(ctx), s.group.Remove())
}

// sleep is the body of a process whose threads wait in read, under a filter of its own.
func sleep() error {
	first, _, err := filters(false)
	if err != nil {
		return err
	}
	if err := seccomp.Load(first, seccomp.LoadOptions{AllThreads: true}); err != nil {
		return err
	}
	return sleepOn()
}

// sleepOn has all threads wait in read, and says when they are about to.
func sleepOn() error {
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

// switchTimes are those of the write that the programs read, in nanoseconds, and of the
// barrier and a whole switch, in milliseconds.
type switchTimes struct{ sets, barriers, switches []float64 }

// switched times the first two parts of a switch, and whole ones of a command, in turns.
func (s *sleepers) switched(ctx context.Context, e *bpf.Enforcer, c *command, times int) (took switchTimes, err error) {
	h, err := e.Add(s.group.ID(), bpf.PhaseSet{0: bpf.AnyPhase(), 1: bpf.AnyPhase()}, bpf.EnforceOptions{})
	if err != nil {
		return took, err
	}
	defer func() { err = errors.Join(err, e.Remove(h)) }()
	f, err := cgroup.NewFreezer(s.group.Path())
	if err != nil {
		return took, err
	}
	for range times {
		begin := time.Now()
		for n := range setsAtOnce {
			if err := e.Set(h, uint8(n%2)); err != nil {
				return took, err
			}
		}
		took.sets = append(took.sets, float64(time.Since(begin).Nanoseconds())/setsAtOnce)
		begin = time.Now()
		if err := f.Barrier(ctx); err != nil {
			return took, err
		}
		took.barriers = append(took.barriers, ms(time.Since(begin)))
		one, err := c.switched(ctx)
		if err != nil {
			return took, err
		}
		took.switches = append(took.switches, one)
	}
	return took, nil
}

// ratchetCrowd puts the last phase's filter on a new crowd, and says how many
// milliseconds that took.
func ratchetCrowd(ctx context.Context) (took float64, err error) {
	_, ratchet, err := filters(false)
	if err != nil {
		return 0, err
	}
	crowd, err := startSleepers(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, crowd.close(ctx)) }()
	begin := time.Now()
	report, err := inject.Filter(ctx, inject.Scope{Cgroup: crowd.group.Path()}, ratchet, inject.Options{Force: true})
	if err != nil {
		return 0, err
	}
	took = ms(time.Since(begin))
	for _, p := range report.Processes {
		if p.Present || p.FiltersAfter != p.FiltersBefore+1 {
			return 0, fmt.Errorf("pid %d has %d filters, and had %d", p.PID, p.FiltersAfter, p.FiltersBefore)
		}
	}
	if n := len(report.Processes); n != sleeperProcesses {
		return 0, fmt.Errorf("%d processes were given the filter, want %d", n, sleeperProcesses)
	}
	return took, nil
}
