// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"
	"unicode"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// Planner decides what a container is created with.
type Planner interface {
	// Plan returns nil for a container that is to be left alone. An error means
	// that it must not start.
	Plan(ctx context.Context, c policy.Container, runtime adjust.Runtime) (*adjust.Plan, error)
}

// Facts are what the spec of a created container tells.
type Facts = func() (policy.Container, adjust.Runtime, error)

// Lifecycle follows a container from its creation to its end.
type Lifecycle interface {
	// Created: pid is the runtime's init, in the container's cgroup, before its
	// filter. An error means that the container must not start. facts are for
	// one that was never planned.
	Created(ctx context.Context, id string, pid int, facts Facts) error
	// Started: the container's program runs, or ran.
	Started(ctx context.Context, id string, pid int) error
	// Stopped returns when what the container did is published.
	Stopped(ctx context.Context, id string) error
}

// Collector looks after what lost stages left.
type Collector interface {
	// Collect publishes what containers did whose end nobody told.
	Collect(ctx context.Context)
}

// Agent is all that the hook needs of the node's agent.
type Agent interface {
	Planner
	Lifecycle
	Collector
}

// Hook serves one run of the program.
type Hook struct {
	Agent Agent
	Log   *logrus.Entry
	// Self is the path of this program, and Args what it takes behind the stage.
	Self string
	Args []string
}

// Stages, and the one that refuses a container.
const (
	StagePrecreate     = "precreate"
	StageCreateRuntime = "createRuntime"
	StagePoststart     = "poststart"
	StagePoststop      = "poststop"
	StageDeny          = "deny"
)

// timeout bounds a stage: the engine waits meanwhile. What notices that it is over
// has grace to answer, by the failure policy. collectTimeout bounds what a container
// waits for others' sake.
const (
	timeout        = 20 * time.Second
	grace          = 2 * time.Second
	collectTimeout = 5 * time.Second
)

// Precreate reads a spec and writes the one that the runtime is to get. It
// returns an error only if there is no spec to change.
func (h *Hook) Precreate(ctx context.Context, in io.Reader, out io.Writer) error {
	err := h.precreate(in, out, func(d *document) error {
		return guard(ctx, StagePrecreate, timeout, func(ctx context.Context) error { return h.change(ctx, d) })
	})
	// Last: what was lost may be of a workload whose lock somebody holds.
	collectErr := guard(ctx, "collect", collectTimeout, func(ctx context.Context) error {
		h.Agent.Collect(ctx)
		return nil
	})
	if collectErr != nil {
		h.Log.WithError(collectErr).Warn("lost containers not all looked for")
	}
	return err
}

// Refuse is Precreate for a container that can't even be looked at, because of
// err.
func (h *Hook) Refuse(in io.Reader, out io.Writer, err error) error {
	return h.precreate(in, out, func(*document) error { return err })
}

func (h *Hook) precreate(in io.Reader, out io.Writer, change func(*document) error) error {
	data, err := read(in)
	if err != nil {
		return fmt.Errorf("container's spec: %w", err)
	}
	d, err := parse(data)
	if err != nil {
		return fmt.Errorf("container's spec: %w", err)
	}
	if err := change(d); err != nil {
		h.Log.WithError(err).Error("container refused")
		// Anew: what was changed before the failure is of no use.
		var parseErr error
		if d, parseErr = parse(data); parseErr != nil {
			return errors.Join(err, parseErr)
		}
		if denyErr := h.deny(d, err); denyErr != nil {
			return errors.Join(err, denyErr)
		}
	}
	if d.changed {
		if data, err = d.encode(); err != nil {
			return err
		}
	}
	_, err = out.Write(data)
	return err
}

func (h *Hook) change(ctx context.Context, d *document) error {
	c, err := d.container("")
	if err != nil {
		return err
	}
	if c.ID == "" {
		return errors.New("the spec doesn't tell the container's id: neither its cgroup's path nor its files are named as podman does (this stage is for podman)")
	}
	plan, err := h.Agent.Plan(ctx, c, d.runtime())
	if err != nil || plan == nil {
		return err
	}
	if err := d.apply(plan); err != nil {
		return err
	}
	if _, remote := h.Agent.(Remote); remote {
		if err := d.set("annotations/"+plannedAnnotation, "true"); err != nil {
			return err
		}
	}
	// A recording wants to be told that the program ran: it can't tell one that
	// never did from one whose runtime loaded no filter.
	if !plan.Record && len(adjust.At(adjust.StageRunning, plan.Expect)) == 0 {
		return nil
	}
	return d.addHook("poststart", h.again(StagePoststart), false)
}

// runtime is what a spec tells of the runtime; the hook's own process, which it
// stands for, has the same filters, limits and capabilities.
func (d *document) runtime() adjust.Runtime {
	return adjust.Runtime{Engine: engineOf(d.view.Annotations), PID: os.Getpid(), Adapter: adjust.AdapterHook}
}

// deny makes a spec that no runtime starts, and whose failure says why. Runtimes
// from before runtime-spec 1.0.2 know prestart only, which others run too.
func (h *Hook) deny(d *document, why error) error {
	deny := h.again(StageDeny, oneLine(why.Error()))
	return errors.Join(d.addHook("prestart", deny, true), d.addHook("createRuntime", deny, true))
}

func (h *Hook) again(stage string, args ...string) specs.Hook {
	all := append([]string{filepath.Base(h.Self), stage}, h.Args...)
	if len(args) > 0 {
		all = append(append(all, "--"), args...)
	}
	return specs.Hook{Path: h.Self, Args: all}
}

// oneLine makes a message fit for an argument and for a terminal: what a
// container's creator wrote into it was quoted, and is bounded here.
func oneLine(s string) string {
	const most = 2000
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ReplaceAll(s, "\n", "; "))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

// CreateRuntime reads a state. An error fails the creation.
func (h *Hook) CreateRuntime(ctx context.Context, in io.Reader) error {
	state, err := readState(in)
	if err != nil {
		return err
	}
	if state.Pid <= 0 {
		return fmt.Errorf("container's state: pid %d", state.Pid)
	}
	if isSandbox(state.Annotations) {
		return nil
	}
	return guard(ctx, StageCreateRuntime, timeout, func(ctx context.Context) error {
		return h.Agent.Created(ctx, state.ID, state.Pid, func() (policy.Container, adjust.Runtime, error) { return facts(state) })
	})
}

// facts reads the spec in a container's bundle.
func facts(state *specs.State) (policy.Container, adjust.Runtime, error) {
	fail := func(err error) (policy.Container, adjust.Runtime, error) {
		return policy.Container{}, adjust.Runtime{}, fmt.Errorf("container's spec: %w", err)
	}
	f, err := os.Open(filepath.Join(state.Bundle, "config.json"))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	data, err := read(f)
	if err != nil {
		return fail(err)
	}
	d, err := parse(data)
	if err != nil {
		return fail(err)
	}
	c, err := d.container(state.ID)
	return c, d.runtime(), err
}

// Poststart reads a state. Nothing that goes wrong here ends the container.
func (h *Hook) Poststart(ctx context.Context, in io.Reader) error {
	return h.event(ctx, StagePoststart, in, func(ctx context.Context, s *specs.State) error {
		return h.Agent.Started(ctx, s.ID, s.Pid)
	})
}

// Poststop reads a state. What could not be published is left for the next run.
func (h *Hook) Poststop(ctx context.Context, in io.Reader) error {
	return h.event(ctx, StagePoststop, in, func(ctx context.Context, s *specs.State) error {
		return h.Agent.Stopped(ctx, s.ID)
	})
}

func (h *Hook) event(ctx context.Context, stage string, in io.Reader, handle func(context.Context, *specs.State) error) error {
	state, err := readState(in)
	if err != nil {
		return err
	}
	err = guard(ctx, stage, timeout, func(ctx context.Context) error { return handle(ctx, state) })
	if err != nil {
		h.Log.WithField("container", state.ID).WithError(err).Error(stage + " failed")
	}
	return err
}

func readState(in io.Reader) (*specs.State, error) {
	data, err := read(in)
	if err == nil {
		err = checkJSON(data)
	}
	var state specs.State
	if err == nil {
		err = json.Unmarshal(data, &state)
	}
	if err == nil && state.ID == "" {
		err = errors.New("has no id")
	}
	if err != nil {
		return nil, fmt.Errorf("container's state: %w", err)
	}
	return &state, nil
}

// guard runs a step under a deadline, with a panic turned into an error. A step
// that hangs in the kernel (a disk, a lock) is left behind: the engine is answered.
func guard(ctx context.Context, step string, limit time.Duration, handle func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		var err error
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("%s: internal error: %v (a bug: please report it) %s", step, r, debug.Stack())
			}
			done <- err
		}()
		err = handle(ctx)
	}()
	answer := time.NewTimer(limit + grace)
	defer answer.Stop()
	select {
	case err := <-done:
		return err
	case <-answer.C:
		return fmt.Errorf("%s: no answer within %s (does a disk hang, or does another process hold the container's lock?)", step, limit+grace)
	}
}
