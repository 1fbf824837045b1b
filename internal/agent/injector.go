// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// InjectCommand is the hidden subcommand by which syslatch runs itself as the process
// that traces what `syslatch run` has started. See [Injecting].
//
// It is a process of its own because the kernel tells of a traced child's stops, and of
// its end, whichever thread of its parent waits: what waits for the command's end would
// take the tracer's stops from it, and the tracer the command's status.
const InjectCommand = "internal-inject"

// injectScope is what such a process is told first, as JSON.
type injectScope struct {
	Cgroup  string                    `json:"cgroup"`
	Filters map[string]seccomp.Filter `json:"filters"` // by phase
	Logs    bool                      `json:"logs"`
}

// injectOrder asks for one injection: of a task that is about to execute something, or
// with 0 of all.
type injectOrder struct {
	ID       int       `json:"id"`
	Phase    string    `json:"phase"`
	TID      int       `json:"tid,omitempty"`
	Deadline time.Time `json:"deadline"`
}

type injectAnswer struct {
	ID    int    `json:"id"`
	Error string `json:"error,omitempty"`
}

// injector has such a process.
type injector struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	thaw func() error

	mu      sync.Mutex
	last    int                          // guarded by mu
	waiting map[int]chan<- *injectAnswer // guarded by mu
	gone    bool                         // guarded by mu: nothing more is answered
}

var errInjectorGone = errors.New("the process that puts a phase's own filter on others has ended (run the command again)")

// startInjector is for the ratchets of a plan; nil where it has none.
func startInjector(plan *profiles.PhasePlan, group *cgroup.Group) (*injector, error) {
	if len(plan.Ratchets) == 0 {
		return nil, nil
	}
	filters, err := compileRatchets(plan)
	if err != nil {
		return nil, err
	}
	freezer, err := cgroup.NewFreezer(group.Path())
	if err != nil {
		return nil, err
	}
	i := &injector{cmd: exec.Command("/proc/self/exe", InjectCommand), thaw: freezer.Thaw, waiting: map[int]chan<- *injectAnswer{}}
	i.cmd.Args[0] = "syslatch"
	i.cmd.Stderr = os.Stderr
	if i.in, err = i.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := i.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := i.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start what puts filters on processes: %w", err)
	}
	if err := json.NewEncoder(i.in).Encode(injectScope{group.Path(), filters, plan.Logs()}); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", errInjectorGone, err), i.end())
	}
	go i.read(out)
	return i, nil
}

func (i *injector) read(from io.Reader) {
	answers := json.NewDecoder(from)
	for {
		var a injectAnswer
		err := answers.Decode(&a)
		i.mu.Lock()
		if err != nil {
			i.gone = true
			why := errInjectorGone
			if len(i.waiting) > 0 {
				why = errors.Join(why, i.thaw()) // killed in the middle, it left the cgroup frozen
			}
			for id, w := range i.waiting {
				w <- &injectAnswer{ID: id, Error: why.Error()}
			}
			clear(i.waiting)
		} else if w := i.waiting[a.ID]; w != nil {
			w <- &a
			delete(i.waiting, a.ID)
		}
		i.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (i *injector) ask(ctx context.Context, phase string, tid int) error {
	answer := make(chan *injectAnswer, 1)
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(ratchetTime)
	}
	i.mu.Lock()
	err := errInjectorGone
	i.last++
	id := i.last
	if !i.gone {
		i.waiting[id] = answer
		err = json.NewEncoder(i.in).Encode(injectOrder{id, phase, tid, deadline})
	}
	i.mu.Unlock()
	defer func() {
		i.mu.Lock()
		delete(i.waiting, id)
		i.mu.Unlock()
	}()
	if err != nil {
		return err
	}
	select {
	case a := <-answer:
		if a.Error != "" {
			return errors.New(a.Error)
		}
		return nil
	case <-time.After(time.Until(deadline) + 2*ratchetGrace):
		return errors.New("the process that puts a phase's own filter on others doesn't answer")
	}
}

// put is phase.Instance.Ratchet, as ratchet.put is.
func (i *injector) put(ctx context.Context, phase string) error { return i.ask(ctx, phase, 0) }

// enter is phase.Instance.Enter.
func (i *injector) enter(tid int, phase string) error {
	ctx, cancel := context.WithTimeout(context.Background(), enterTime)
	defer cancel()
	return i.ask(ctx, phase, tid)
}

// end lets the process end what it has begun. It may be called on nil.
func (i *injector) end() error {
	if i == nil {
		return nil
	}
	return errors.Join(i.in.Close(), i.cmd.Wait())
}

// Injecting is the body of that process, which ends with its input.
func Injecting(in io.Reader, out io.Writer, log *logrus.Entry) error {
	// What the terminal sends is for the command.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	orders := json.NewDecoder(in)
	var s injectScope
	if err := orders.Decode(&s); err != nil {
		return fmt.Errorf("the parent gave up: %w", err)
	}
	r := newRatchet(s.Filters, s.Logs, func() (inject.Scope, error) { return inject.Scope{Cgroup: s.Cgroup}, nil }, log)
	var mu sync.Mutex // out's
	answers := json.NewEncoder(out)
	var under sync.WaitGroup
	defer under.Wait()
	for {
		var o injectOrder
		if err := orders.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		under.Go(func() {
			ctx, cancel := context.WithDeadline(context.Background(), o.Deadline)
			defer cancel()
			var err error
			if o.TID != 0 {
				err = r.enter(o.TID, o.Phase)
			} else {
				err = r.put(ctx, o.Phase)
			}
			a := injectAnswer{ID: o.ID}
			if err != nil {
				a.Error = err.Error()
			}
			mu.Lock()
			defer mu.Unlock()
			_ = answers.Encode(a) // the parent may have been killed
		})
	}
}
