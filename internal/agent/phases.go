// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// RunPhasesOptions say what RunPhases runs, and in which phases.
type RunPhasesOptions struct {
	Command []string
	Policy  *policy.Policy // with phases
	Phase   string         // to begin in; empty is the policy's initial one
	Gaps    policy.Gaps    // empty is the policy's
	ID      string         // of the instance; empty is "run-PID"
	Events  string         // path of a file for JSON lines of phase.Event; empty for none
	// Serve, if not nil, lets others switch phases while the command runs. instanceOf is
	// of the command's own processes, as [Agent.InstanceOf].
	Serve      func(s *phase.Supervisor, instanceOf func(pid int) (string, error)) (io.Closer, error)
	Socket     string // that Serve serves on, by which the command may tighten itself
	NoNewPrivs bool
	// CgroupParent is the directory below which the command's cgroup is made; empty is
	// this process's own cgroup.
	CgroupParent string
	Log          *logrus.Entry
	Messages     io.Writer
}

// phaseHost is what phases can be enforced with.
func phaseHost() (profiles.PhaseHost, *seccomp.Support, error) {
	support, err := seccomp.Info()
	if err != nil {
		return profiles.PhaseHost{}, nil, err
	}
	return profiles.PhaseHost{
		Notify: support.Notify != nil && slices.Contains(support.Actions, specs.ActNotify),
		Inject: inject.Able() == nil,
	}, &support, nil
}

// GapsError refuses phases that can't be enforced as they are written.
type GapsError struct {
	Policy string
	Gaps   []profiles.PhaseGap
}

func (e *GapsError) Error() string {
	lines := []string{fmt.Sprintf("policy %s can't be enforced on this host as it is written:", e.Policy)}
	for _, g := range e.Gaps {
		lines = append(lines, "  - "+g.String())
	}
	return strings.Join(append(lines, "leave that out of the policy, or say 'gaps: report' in its phases to run it nevertheless"), "\n")
}

// RunPhases runs a command in the phases of a policy, in a cgroup of its own, and
// supervises it until it and all that it left have ended. It returns the command's
// exit status in the shell's form.
//
// The supervisor is this process: if it is killed, what the command's filter asks
// about is answered ENOSYS, and denied thereby.
func RunPhases(opts RunPhasesOptions) (status int, err error) {
	signals, stop := catchSignals()
	defer stop()
	path, err := lookCommand(opts.Command[0])
	if err != nil {
		return 0, err
	}
	host, support, err := phaseHost()
	if err != nil {
		return 0, err
	}
	limits, gaps, err := newRunLimits(opts.Policy, opts.CgroupParent)
	if err != nil {
		return 0, err
	}
	group := limits.group
	defer func() {
		_ = group.Kill() // what is left was started in this group
		_ = group.Wait(context.Background())
		_ = group.Remove()
	}()
	seen, notSeen := openRunDenials(opts.Policy, opts.Log)
	defer func() { err = errors.Join(err, seen.Close()) }()
	host.Denials = seen != nil
	programs, noPrograms := openEnforcer(&host, group)
	if noPrograms != nil {
		noPrograms = fmt.Errorf("no BPF programs for phases: %w", noPrograms)
	}
	defer func() {
		_ = group.Kill() // nothing is to run without them
		err = errors.Join(err, programs.end())
	}()
	plan, err := profiles.CompilePhases(opts.Policy.Set(), host, profiles.PhaseOptions{
		Architectures: opts.Policy.Architectures, NewerThanKernel: seccomp.NewerThan(seccomp.KernelRelease()),
		Log: opts.Policy.LogDenials,
	})
	if err != nil {
		return 0, fmt.Errorf("policy %s: %w", opts.Policy.Name, err)
	}
	gaps = append(slices.Clone(plan.Gaps), gaps...)
	for _, err := range []error{noPrograms, notSeen} {
		if err != nil && len(plan.Gaps) > 0 { // which say what that means
			fmt.Fprintf(opts.Messages, "syslatch: %v\n", err)
		}
	}
	if mode := opts.Gaps; len(gaps) > 0 && (mode == policy.GapsDeny || mode == "" && opts.Policy.Phases.Gaps == policy.GapsDeny) {
		return 0, &GapsError{opts.Policy.Name, gaps}
	}
	for _, g := range gaps {
		fmt.Fprintf(opts.Messages, "syslatch: not enforced: %s\n", g)
	}
	effective, err := capabilities()
	if err != nil {
		return 0, err
	}
	filter, err := seccomp.Compile(plan.Profile, seccomp.Options{ENOSYSAbove: seccomp.KernelRelease()})
	if err != nil {
		return 0, fmt.Errorf("policy %s: %w", opts.Policy.Name, err)
	}
	events, err := openEvents(opts.Events)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, events.close()) }()

	freezer, err := cgroup.NewFreezer(group.Path())
	if err != nil {
		return 0, err
	}
	injector, err := startInjector(plan, group)
	if err != nil {
		return 0, fmt.Errorf("policy %s: %w", opts.Policy.Name, err)
	}
	defer func() { err = errors.Join(err, injector.end()) }()
	supervisor := phase.NewSupervisor(phase.Options{Log: opts.Log, Events: events.add})
	defer supervisor.Close()
	instance := phase.Instance{
		ID: opts.ID, Name: filepath.Base(path), Policy: opts.Policy.Name, Set: opts.Policy.Set(), Plan: plan, Initial: opts.Phase,
		Barrier: freezer, Uncovered: uncovered(gaps),
	}
	filters := &filtered{seen: seen, plan: plan, log: opts.Log}
	if seen != nil {
		instance.Mark = filters.mark
	}
	var supervised *phase.Supervised
	if limits.any() {
		instance.Limits, instance.Loosens = limits.set, limits.loosens
		instance.Ready = func() error { return limits.first(supervised) }
	}
	if injector != nil {
		instance.Ratchet, instance.Enter = injector.put, injector.enter
	}
	if instance.ID == "" {
		instance.ID = fmt.Sprintf("run-%d", os.Getpid())
	}
	guarded := &guard{}
	if len(plan.Hooks) > 0 {
		guarded.plan = plan
	}
	instance.Hooks = guarded.hooks()
	if supervised, err = supervisor.Add(instance); err != nil {
		return 0, err
	}
	defer supervisor.End(instance.ID)
	filters.begin(group.ID(), supervised)
	defer filters.end()
	defer during(seen.Run)()
	if opts.Serve != nil {
		hierarchy, serveErr := cgroup.Detect()
		if serveErr != nil {
			return 0, serveErr
		}
		server, serveErr := opts.Serve(supervisor, func(pid int) (string, error) {
			if id, err := hierarchy.Above(pid, func(id uint64) bool { return id == group.ID() }); id == 0 {
				return "", err
			}
			return instance.ID, nil
		})
		if serveErr != nil {
			return 0, serveErr
		}
		defer func() { err = errors.Join(err, server.Close()) }()
	}

	var ours *net.UnixConn
	var theirs *os.File
	if plan.Listener {
		if ours, theirs, err = socketpair(); err != nil {
			return 0, err
		}
		defer ours.Close()
	}
	child, err := launch(group, path, opts.Command, os.Stdout, theirs)
	if theirs != nil {
		theirs.Close()
	}
	if err != nil {
		return 0, err
	}
	if limits.any() && !plan.Listener {
		if err := limits.first(supervised); err != nil {
			child.abandon()
			return 0, err
		}
	}
	if len(plan.Hooks) > 0 {
		if err := programs.enforce(guarded, child.cmd.Process.Pid, group, len(gaps) > 0); err != nil {
			child.abandon()
			return 0, err
		}
		if opts.Serve != nil {
			if err := guarded.own(opts.Socket); err != nil {
				child.abandon()
				return 0, err
			}
		}
		defer guarded.watch(supervised)()
	}
	// The execve waits for the supervisor's answer, so the listener comes first.
	received := make(chan error, 1)
	go func() { received <- takeListener(ours, supervised) }()
	failed := child.proceed(launchOrder{
		Filter: filter, NoNewPrivs: opts.NoNewPrivs || effective&(1<<unix.CAP_SYS_ADMIN) == 0, Listener: plan.Listener, WaitKillable: slices.Contains(support.Flags, "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"),
		Log: plan.Logs(),
	})
	if ours != nil {
		// The launched process is the command now, or has ended: nothing more comes.
		_ = ours.SetReadDeadline(time.Now())
	}
	if err := <-received; failed == nil {
		failed = err
	}
	if err := limits.failed.Load(); err != nil {
		failed = *err // so the execve was denied
	}
	if failed != nil {
		_ = group.Kill()
		_ = child.cmd.Wait()
		return 0, failed
	}
	status, err = waitAll(filepath.Base(path), "supervising", child.cmd, group, signals, opts.Messages)
	if n := limits.oomKills(); n > 0 {
		fmt.Fprintf(opts.Messages, "syslatch: the kernel killed %d of the command's processes, as memory.max had no room for them\n", n)
	}
	return status, err
}

// takeListener hands the listener that the launched process sends to the supervisor.
func takeListener(conn *net.UnixConn, to *phase.Supervised) error {
	if conn == nil {
		return nil
	}
	_, f, err := seccomp.ReceiveListener(conn)
	if err != nil {
		return err
	}
	l, err := seccomp.NewListener(f)
	if err != nil {
		return err
	}
	to.Serve(l)
	return nil
}

// socketpair is one end for this process, and one for a child.
func socketpair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "listener's socket"), os.NewFile(uintptr(fds[1]), "listener's socket")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return conn.(*net.UnixConn), theirs, nil
}

// events writes phase events as JSON lines.
type events struct {
	mu     sync.Mutex
	file   *os.File // guarded by mu; nil: nobody wants them
	failed error    // guarded by mu: the first
}

// openEvents makes a file, or appends to one that is there.
func openEvents(path string) (*events, error) {
	if path == "" {
		return &events{}, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOCTTY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("events: %w", err)
	}
	return &events{file: f}, nil
}

func (e *events) add(event phase.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.file == nil {
		return
	}
	data, err := json.Marshal(event)
	if err == nil {
		_, err = e.file.Write(append(data, '\n'))
	}
	if err != nil && e.failed == nil {
		e.failed = fmt.Errorf("events: some are missing: %w", err)
	}
}

func (e *events) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.file == nil {
		return nil
	}
	err := errors.Join(e.failed, e.file.Close())
	e.file = nil
	return err
}
