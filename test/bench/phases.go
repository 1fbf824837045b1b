// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// supervisorSource is a supervisor in C, which gcc compiles.
//
//go:embed supervisor/supervisor.c
var supervisorSource string

// Roles of this program as a process of its own.
const (
	callerRole          = "internal-caller"
	supervisorRole      = "internal-supervisor"
	sleeperRole         = "internal-sleepers"
	filteredSleeperRole = "internal-filtered-sleepers" // their filter is of who started them
	crowdRole           = "internal-crowd"
	connectorRole       = "internal-connector"
)

// asked are the ways in which getppid is judged, in the order of the report.
var asked = []struct {
	way
	name, title string
	rounds      int // that take some 20 ms
	supervise   func(*bench, context.Context, *caller, *os.File) error
}{
	{way{}, "bare", "no filter", 150_000, nil},
	{way{filter: true, always: true}, "static", "allowed in every phase, by one filter", 100_000, (*bench).superviseByGo},
	{way{filter: true}, "c", "differs between phases: asked, by a supervisor in C", 4_000, (*bench).superviseByC},
	{way{filter: true}, "libseccomp-golang", "differs between phases: asked, by a supervisor with libseccomp-golang", 1_000, (*bench).superviseByLibseccomp},
	{way{filter: true}, "go", "differs between phases: asked, by syslatch", 4_000, (*bench).superviseByGo},
	{way{filter: true, always: true, ratchet: true}, "ratchet-allowed", "after a ratchet: allowed in every phase, by both filters", 100_000, (*bench).superviseByGo},
	{way{filter: true, ratchet: true}, "ratchet-denied", "after a ratchet: denied by its filter (EPERM), asked before", 100_000, (*bench).superviseByGo},
}

// way is how a caller's getppid is judged.
type way struct {
	filter  bool // there is one
	always  bool // it allows getppid in every phase, and doesn't ask
	ratchet bool // another one is injected, that of the last phase
}

// waits says whether each call waits for another process.
func (w way) waits() bool { return w.filter && !w.always && !w.ratchet }

// Loads of a caller.
const (
	allowedLoad = "getppid"
	deniedLoad  = "getppid, denied"
)

func (w way) load() string {
	if w.ratchet && !w.always {
		return deniedLoad
	}
	return allowedLoad
}

// filters are an instance's, as syslatchd makes them of phases: its first, and that of
// the phase which it can't leave. Two phases before that differ.
func filters(getppidAlways bool) (first, ratchet seccomp.Filter, err error) {
	var always []profiles.PhaseRule
	differs := []string{"mkdir"}
	if getppidAlways {
		always = []profiles.PhaseRule{{Names: []string{"getppid"}}}
	} else {
		differs = append(differs, "getppid")
	}
	plan, err := profiles.CompilePhases(&profiles.PhaseSet{
		Initial: "wide", MustAllow: []string{"sendmsg"}, // hands the listener over
		Phases: []profiles.Phase{
			{Name: "wide", Allow: append(always, profiles.PhaseRule{Names: differs})},
			{Name: "narrow", Allow: always},
			{Name: "last", Allow: always, Irreversible: true},
		},
	}, profiles.PhaseHost{Notify: true, Inject: true}, profiles.PhaseOptions{})
	if err != nil {
		return nil, nil, err
	}
	opts := seccomp.Options{ENOSYSAbove: seccomp.KernelRelease()}
	if first, err = seccomp.Compile(plan.Profile, opts); err != nil {
		return nil, nil, err
	}
	ratchet, err = seccomp.Compile(plan.Ratchets["last"], opts)
	return first, ratchet, err
}

// phasesPart compares what a call costs that a phase gates with one that it doesn't, says
// what a switch is made of, and what the programs that look at addresses add to a connect.
func (b *bench) phasesPart(ctx context.Context) (err error) {
	t, err := b.asks(ctx)
	if err != nil {
		return err
	}
	// Without pins nothing is left whatever ends this process.
	e, err := bpf.OpenEnforcer("", bpf.EnforcerOptions{NoPin: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	switches, ratchets, err := b.switches(ctx, e)
	if err != nil {
		return err
	}
	b.report.add(section{
		title:  "Phases",
		tables: []table{t, switches},
		notes: []string{
			fmt.Sprintf("Medians of %d rounds in which all took turns; those that are asked about by the clock, the others by the caller's processor time. Filters are those that syslatch makes of three phases. A ratchet is the filter of a phase that can't be left, injected into the caller while the supervisor holds its listener. All supervisors let every call go on. Those in C and of syslatch use SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP where the kernel has it (6.6); libseccomp-golang, here NotifReceive and NotifRespond, has no function for it.", b.opts.rounds),
			fmt.Sprintf("The tasks are %d processes of %d threads, which wait in read under a filter of phases. The barrier, %d times: from the write of the switch until all have been stopped outside of their calls and go on again. The switch, as often, in turn with the barrier: such a crowd, as a command of `syslatch run`, goes back and forth between two phases that differ in mkdir, which the supervisor is asked about. From the request (PUT, on a connection that is kept) until the answer that the phase holds for every task. A ratchet, put on %d such crowds: until each process has it, as read from /proc, and goes on. The programs' phase: the mean of %d writes, %d times.",
				sleeperProcesses, sleeperThreads, b.opts.creates, ratchets, setsAtOnce, b.opts.creates),
		},
	})
	return b.connects(ctx, e)
}

// asks measures getppid in each way.
func (b *bench) asks(ctx context.Context) (t table, err error) {
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
		if callers[i], listener, err = startCaller(a.way); err != nil {
			return t, err
		}
		if a.supervise != nil {
			if err := a.supervise(b, ctx, callers[i], listener); err != nil {
				return t, err
			}
		}
		if a.ratchet {
			if err := callers[i].tighten(ctx, a.always); err != nil {
				return t, err
			}
		}
	}
	for n := range b.opts.rounds {
		for i := range asked {
			if err := ctx.Err(); err != nil {
				return t, err
			}
			at := (i + n) % len(asked)
			got, err := callers[at].run(asked[at].load(), asked[at].rounds)
			if err != nil {
				return t, err
			}
			one := got.CPU
			if asked[at].waits() {
				one = got.Wall
			}
			times[at] = append(times[at], one)
		}
		b.progress("phases", n+1, b.opts.rounds)
	}
	t = table{head: []string{"getppid", "ns a call", "ratio to no filter", "quartiles", "to C", "quartiles"}}
	quartiles := func(v []float64) string { return fmt.Sprintf("%.2f–%.2f", quantile(v, 0.25), quantile(v, 0.75)) }
	for i, a := range asked {
		toBare, toC := paired(times[i], times[0], ratio), paired(times[i], times[2], ratio)
		b.report.metric(median(times[i]), "ns", "phases", a.name, "time")
		b.report.metric(median(toBare), "ratio", "phases", a.name, "ratio")
		row := []string{a.title, fmt.Sprintf("%.0f", median(times[i])), fmt.Sprintf("×%.2f", median(toBare)), "", "", ""}
		if a.filter {
			row[3] = quartiles(toBare)
		}
		if a.name == "c" {
			row[4] = "×1.00"
		}
		if a.waits() && a.name != "c" {
			b.report.metric(median(toC), "ratio", "phases", a.name, "to-c")
			row[4], row[5] = fmt.Sprintf("×%.2f", median(toC)), quartiles(toC)
		}
		if a.name == "go" {
			b.report.goal("a call that the supervisor is asked about", "×%.2f of a supervisor in C", median(toC), 1.5)
		}
		t.rows = append(t.rows, row)
	}
	return t, nil
}

// caller is a process that calls getppid on one thread.
type caller struct {
	*helper
	served func() error // ends with the process
}

// startCaller starts one; its listener, if it has a filter, is still to be served.
func startCaller(w way) (_ *caller, listener *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	defer ours.Close()
	defer theirs.Close()
	c := &caller{served: func() error { return nil }}
	c.helper, err = startHelper(func(cmd *exec.Cmd) {
		cmd.ExtraFiles = []*os.File{theirs}
	}, callerRole, strconv.FormatBool(w.filter), strconv.FormatBool(w.always))
	if err != nil {
		return nil, nil, err
	}
	if !w.filter {
		return c, nil, nil
	}
	theirs.Close()
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

// tighten puts the last phase's filter on a caller that is allowed to call yet.
func (c *caller) tighten(ctx context.Context, always bool) error {
	if _, err := c.run(allowedLoad, 10); err != nil {
		return err
	}
	_, ratchet, err := filters(always)
	if err != nil {
		return err
	}
	_, err = inject.Filter(ctx, inject.Scope{PIDs: []int{c.cmd.Process.Pid}}, ratchet, inject.Options{Force: true})
	return err
}

func (c *caller) close() error { return errors.Join(c.helper.close(), c.served()) }

// call is the caller's body.
func call() error {
	if len(os.Args) != 4 {
		return errors.New("want whether there is a filter, and whether it always allows")
	}
	// A supervisor comes along where the kernel wakes it on this processor.
	if err := pin(); err != nil {
		return err
	}
	if os.Args[2] == "true" {
		first, _, err := filters(os.Args[3] == "true")
		if err != nil {
			return err
		}
		listener, err := seccomp.LoadListener(first, seccomp.LoadOptions{})
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Sendmsg(3, []byte(`{"fds":["seccompFd"]}`), unix.UnixRights(int(listener.Fd())), nil, 0), listener.Close()); err != nil {
			return err
		}
	}
	return obey(map[string]body{allowedLoad: getppid(0), deniedLoad: getppid(unix.EPERM)})
}

// superviseByC compiles the supervisor and starts it.
func (b *bench) superviseByC(ctx context.Context, c *caller, listener *os.File) error {
	program := filepath.Join(b.dir, "supervisor")
	gcc := exec.CommandContext(ctx, "gcc", "-O2", "-o", program, "-x", "c", "-")
	gcc.Stdin = strings.NewReader(supervisorSource)
	if out, err := gcc.CombinedOutput(); err != nil {
		return errors.Join(fmt.Errorf("gcc (apt-get install gcc): %w: %s", err, out), listener.Close())
	}
	return c.superviseBy(listener, program)
}

func (b *bench) superviseByLibseccomp(_ context.Context, c *caller, listener *os.File) error {
	return c.superviseBy(listener, "/proc/self/exe", supervisorRole)
}

// superviseBy starts a program, which has the listener as descriptor 3.
func (c *caller) superviseBy(listener *os.File, program string, args ...string) error {
	defer listener.Close()
	cmd := exec.Command(program, args...)
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

// supervise is the body of a supervisor with libseccomp-golang's functions, which does as
// the one in C does.
func supervise() error {
	const fd = 3
	for {
		n, err := libseccomp.NotifReceive(fd)
		if errors.Is(err, unix.ENOENT) {
			continue
		} else if err != nil {
			return fmt.Errorf("NotifReceive: %w", err)
		}
		r := libseccomp.ScmpNotifResp{ID: n.ID, Flags: libseccomp.NotifRespFlagContinue}
		if err := libseccomp.NotifRespond(fd, &r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("NotifRespond: %w", err)
		}
	}
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
