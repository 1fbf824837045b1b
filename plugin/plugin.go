// SPDX-License-Identifier: Apache-2.0

// Package plugin is the NRI adapter: the runtime's events in, container
// adjustments out. It decides nothing itself; a [Planner] and a [Lifecycle],
// which the node's agent implements, do.
//
// # Failing
//
// A runtime drops a plugin that misses its deadline and goes on without it,
// which would fail open (containerd 2.4 ignores NRI's FailRequest). Every
// handler therefore runs under a deadline of its own, shorter than the
// runtime's, and with panics caught; both become errors, and an error from
// CreateContainer fails the creation. What an error means for a container with
// failure policy runtime-default is the Planner's business: it returns a nil
// plan then, not an error. Its context ends shortly before the deadline, for it to
// do so in time. A plan that is ready only behind the deadline is taken back with
// Stopped.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// Planner decides what a container is created with.
type Planner interface {
	// Plan returns nil for a container that is to be left alone. An error
	// fails the creation.
	Plan(ctx context.Context, c policy.Container, runtime adjust.Runtime) (*adjust.Plan, error)
}

// Lifecycle follows a planned container from its start to its end. Ids of
// containers that were never planned are ignored.
type Lifecycle interface {
	// Starting: pid is the runtime's init, which waits to execute the
	// container's program. An error fails the start on containerd; CRI-O only
	// warns.
	Starting(ctx context.Context, id string, pid int) error
	// Started: the container's program runs, or ran. After a (re)connection it is
	// also told of containers that were seen to start, and of those that were not.
	Started(ctx context.Context, id string, pid int) error
	// Stopped: every process of the container is gone.
	Stopped(ctx context.Context, id string) error
}

// Syncer brings the agent in line with what runs, after a (re)connection.
type Syncer interface {
	Synchronize(ctx context.Context, running []policy.Container) error
}

// Agent is all that the plugin needs of the node's agent.
type Agent interface {
	Planner
	Lifecycle
	Syncer
}

// Options are optional; their zero values are usable.
type Options struct {
	Socket string // of the runtime's NRI service; default /var/run/nri/nri.sock
	Name   string // default "syslatch"
	Index  string // two digits; default "10"
	// Timeout bounds a handler. It is lowered to three quarters of what the
	// runtime announces. Default 1.5 s.
	Timeout time.Duration
	// Configure receives the configuration that the runtime has for a
	// pre-launched plugin (NN-name.conf, else name.conf in plugin_config_path),
	// before any other event.
	Configure func(ctx context.Context, config string) (Agent, error)
}

const defaultTimeout = 1500 * time.Millisecond

// Plugin is a connection to one runtime.
type Plugin struct {
	stub stub.Stub
	log  *logrus.Entry
	opts Options
	// agent is set once, by New or in Configure, before any other handler runs.
	agent   atomic.Pointer[Agent]
	timeout atomic.Int64 // nanoseconds
	runtime atomic.Pointer[adjust.Runtime]
	peer    atomic.Int32 // pid of the runtime
	conn    atomic.Pointer[net.Conn]
	// configured is closed when the runtime has configured the plugin.
	configured     chan struct{}
	configuredOnce sync.Once
	configureWait  time.Duration
}

// New makes a plugin that serves agent. agent may be nil if
// [Options.Configure] is given, which then provides it.
func New(agent Agent, log *logrus.Entry, opts Options) (*Plugin, error) {
	p := &Plugin{log: log, opts: opts, configured: make(chan struct{}), configureWait: configureWait}
	if agent != nil {
		p.agent.Store(&agent)
	} else if opts.Configure == nil {
		return nil, errors.New("plugin: neither an agent nor a Configure function")
	}
	if opts.Socket == "" {
		opts.Socket = api.DefaultSocketPath
	}
	if opts.Timeout <= 0 {
		p.opts.Timeout = defaultTimeout
	}
	p.timeout.Store(int64(p.opts.Timeout))
	p.runtime.Store(&adjust.Runtime{})

	so := []stub.Option{
		stub.WithLogger(nriLogger{log}),
		// Ignored by containerd 2.4.2; runtimes that know it fail a request
		// that we could not answer, instead of going on without us.
		stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: true}),
	}
	if os.Getenv(api.PluginSocketEnvVar) != "" {
		p.peer.Store(int32(os.Getppid())) // pre-launched: the runtime is our parent
	} else {
		so = append(so, stub.WithSocketPath(opts.Socket), stub.WithDialer(p.dial))
	}
	if opts.Name != "" {
		so = append(so, stub.WithPluginName(opts.Name))
	}
	if opts.Index != "" {
		so = append(so, stub.WithPluginIdx(opts.Index))
	}
	var err error
	if p.stub, err = stub.New((*handlers)(p), so...); err != nil {
		return nil, fmt.Errorf("nri stub: %w", err)
	}
	return p, nil
}

// dial connects to the runtime and notes who it is: its filters are what its
// children inherit.
func (p *Plugin) dial(path string) (net.Conn, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || credErr != nil {
		return nil, errors.Join(err, credErr, conn.Close())
	}
	// unix(7): 0 is a process that has no id in this pid namespace. Then the pids
	// of containers that it tells are other processes here.
	if cred.Pid == 0 {
		return nil, errors.Join(fmt.Errorf("%s: the runtime is in another pid namespace: run syslatchd in the host's (hostPID: true in a pod)", path), conn.Close())
	}
	p.peer.Store(cred.Pid)
	p.conn.Store(&conn)
	return conn, nil
}

// configureWait bounds the wait for the runtime's Configure: longer than any
// runtime's time-out for a registration (5 s).
const configureWait = 30 * time.Second

// Run registers with the runtime and serves until ctx ends or the connection is
// lost; the caller decides whether to run it again.
func (p *Plugin) Run(ctx context.Context) error {
	// The stub waits for Configure without a look at ctx or the connection.
	ended := make(chan error, 1)
	go func() { ended <- p.stub.Run(ctx) }()
	wait := time.NewTimer(p.configureWait)
	defer wait.Stop()
	select {
	case err := <-ended:
		return runError(err)
	case <-ctx.Done():
		return ctx.Err()
	case <-wait.C:
		if conn := p.conn.Load(); conn != nil {
			_ = (*conn).Close() // of no use to anybody
		}
		return fmt.Errorf("the runtime did not configure the plugin within %s", p.configureWait)
	case <-p.configured:
	}
	select {
	case err := <-ended:
		return runError(err)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func runError(err error) error {
	if err == nil {
		err = errors.New("connection to the runtime closed")
	}
	return err
}

// guard runs one handler under the deadline, with its panic turned into an
// error. The handler's goroutine may outlive the deadline: it sees its context
// end. If it has a value all the same, which nobody gets, that goes to late.
func guard[T any](p *Plugin, ctx context.Context, what string, handle func(context.Context) (T, error), late func(T)) (T, error) {
	began := time.Now()
	timeout := time.Duration(p.timeout.Load())
	// The handler's own context ends a little earlier, so that a handler that
	// minds it can say what it was waiting for.
	ctx, cancel := context.WithTimeout(ctx, timeout-timeout/10)
	defer cancel()
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	type answer struct {
		value T
		err   error
	}
	done := make(chan answer, 1) // buffered: nobody may wait for it any more
	var settled atomic.Bool      // by the answer, or by the deadline
	go func() {
		var a answer
		a.err = p.safely(what, func() (err error) {
			a.value, err = handle(ctx)
			return err
		})
		if settled.CompareAndSwap(false, true) {
			done <- a
		} else if a.err == nil && late != nil {
			// Its error is in the log.
			_ = p.safely(what, func() error { late(a.value); return nil })
		}
	}()
	answered := func(a answer) (T, error) {
		p.log.WithFields(logrus.Fields{"event": what, "duration": time.Since(began)}).Debug("event handled")
		if a.err != nil {
			var zero T
			return zero, fmt.Errorf("syslatch: %s: %w", what, a.err)
		}
		return a.value, nil
	}
	select {
	case a := <-done:
		return answered(a)
	case <-deadline.C:
		if !settled.CompareAndSwap(false, true) {
			return answered(<-done)
		}
		var zero T
		return zero, fmt.Errorf("syslatch: %s: no answer within %s: %w (is a disk slow? see the log of syslatchd)", what, timeout, context.DeadlineExceeded)
	}
}

// safely makes a panic an error.
func (p *Plugin) safely(what string, do func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			p.log.WithField("stack", string(debug.Stack())).Error("handler panicked")
			err = fmt.Errorf("%s: internal error: %v (a bug: please report it with the log of syslatchd)", what, r)
		}
	}()
	return do()
}

// handlers keeps NRI's interface off Plugin's own method set.
type handlers Plugin

func (h *handlers) p() *Plugin { return (*Plugin)(h) }

// Configure implements stub.ConfigureInterface.
func (h *handlers) Configure(ctx context.Context, config, runtime, version string) (api.EventMask, error) {
	p := h.p()
	p.runtime.Store(&adjust.Runtime{
		Engine: runtime, EngineVersion: version, PID: int(p.peer.Load()),
		NoErrno: !takesErrno(p.stub.RuntimeNRIVersion()),
	})
	if p.agent.Load() == nil {
		var agent Agent
		err := p.safely("configure", func() (err error) {
			agent, err = p.opts.Configure(ctx, config)
			return err
		})
		if err != nil {
			p.log.WithError(err).Error("configuration refused")
			return 0, fmt.Errorf("syslatch: %w", err)
		}
		p.agent.Store(&agent)
	}
	if limit := p.stub.RequestTimeout() * 3 / 4; limit > 0 && limit < p.opts.Timeout {
		p.timeout.Store(int64(limit))
	}
	p.configuredOnce.Do(func() { close(p.configured) })
	p.log.WithFields(logrus.Fields{"runtime": runtime, "version": version}).Info("connected to runtime")
	return 0, nil // all events that we have handlers for
}

// takesErrno says of an NRI version whether a runtime that uses it survives a seccomp
// rule with an errno. Those that don't tell their version are older than 0.12, or
// built in a way that doesn't let them.
func takesErrno(nri string) bool {
	var major, minor int
	n, _ := fmt.Sscanf(strings.TrimPrefix(nri, "v"), "%d.%d", &major, &minor)
	return n == 2 && (major > 0 || minor >= 12)
}

// Synchronize implements stub.SynchronizeInterface.
func (h *handlers) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	p := h.p()
	byID := make(map[string]*api.PodSandbox, len(pods))
	for _, pod := range pods {
		byID[pod.GetId()] = pod
	}
	var present []policy.Container
	var started []*api.Container
	for _, c := range containers {
		switch c.GetState() {
		case api.ContainerState_CONTAINER_RUNNING, api.ContainerState_CONTAINER_PAUSED:
			started = append(started, c)
		case api.ContainerState_CONTAINER_CREATED:
		default:
			continue
		}
		present = append(present, fromNRI(p.runtime.Load().Engine, byID[c.GetPodSandboxId()], c))
	}
	_, err := guard(p, ctx, "synchronize", func(ctx context.Context) (struct{}, error) {
		agent := *p.agent.Load()
		errs := []error{agent.Synchronize(ctx, present)}
		for _, c := range started { // perhaps unseen
			errs = append(errs, agent.Started(ctx, c.GetId(), int(c.GetPid())))
		}
		return struct{}{}, errors.Join(errs...)
	}, nil)
	return nil, err
}

// CreateContainer implements stub.CreateContainerInterface.
func (h *handlers) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p := h.p()
	adjustment, err := guard(p, ctx, "create container "+c.GetName(), func(ctx context.Context) (*api.ContainerAdjustment, error) {
		plan, err := (*p.agent.Load()).Plan(ctx, fromNRI(p.runtime.Load().Engine, pod, c), *p.runtime.Load())
		if err != nil || plan == nil {
			return nil, err
		}
		return toNRI(plan), nil
	}, func(*api.ContainerAdjustment) {
		// The runtime has an error for an answer, and may not tell of the end.
		if err := (*p.agent.Load()).Stopped(context.Background(), c.GetId()); err != nil {
			p.log.WithField("container", c.GetId()).WithError(err).Error("late plan not undone")
		}
	})
	if err != nil {
		p.log.WithField("container", c.GetId()).WithError(err).Error("create refused")
	}
	return adjustment, nil, err
}

// StartContainer implements stub.StartContainerInterface.
func (h *handlers) StartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return h.event(ctx, "start container", c, func(ctx context.Context, a Agent) error {
		return a.Starting(ctx, c.GetId(), int(c.GetPid()))
	})
}

// PostStartContainer implements stub.PostStartContainerInterface.
func (h *handlers) PostStartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return h.event(ctx, "container started", c, func(ctx context.Context, a Agent) error {
		return a.Started(ctx, c.GetId(), int(c.GetPid()))
	})
}

// StopContainer implements stub.StopContainerInterface.
func (h *handlers) StopContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, h.event(ctx, "stop container", c, func(ctx context.Context, a Agent) error {
		return a.Stopped(ctx, c.GetId())
	})
}

// RemoveContainer implements stub.RemoveContainerInterface. It is the end of
// a container that was created and never started.
func (h *handlers) RemoveContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return h.event(ctx, "remove container", c, func(ctx context.Context, a Agent) error {
		return a.Stopped(ctx, c.GetId())
	})
}

func (h *handlers) event(ctx context.Context, what string, c *api.Container, handle func(context.Context, Agent) error) error {
	p := h.p()
	_, err := guard(p, ctx, what+" "+c.GetName(), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, handle(ctx, *p.agent.Load())
	}, nil)
	if err != nil {
		p.log.WithField("container", c.GetId()).WithError(err).Error("event failed")
	}
	return err
}

// nriLogger passes the stub's own messages on, at debug level but for errors:
// what matters of them is logged by us with its container.
type nriLogger struct{ log *logrus.Entry }

func (l nriLogger) Debugf(_ context.Context, format string, args ...any) {
	l.log.Debugf(format, args...)
}

func (l nriLogger) Infof(_ context.Context, format string, args ...any) {
	l.log.Debugf(format, args...)
}

func (l nriLogger) Warnf(_ context.Context, format string, args ...any) { l.log.Warnf(format, args...) }

func (l nriLogger) Errorf(_ context.Context, format string, args ...any) {
	l.log.Errorf(format, args...)
}
