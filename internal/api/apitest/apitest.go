// SPDX-License-Identifier: Apache-2.0

// Package apitest has a supervisor that only keeps words, for tests of the API and of
// those who use it.
package apitest

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/syslatch/syslatch/internal/phase"
)

// Phases are those of every instance. Any of them may follow any other, but for the
// last, which none follows.
var Phases = []string{"read_only", "write_logs", "network", "locked"}

// Time is when everything here happens.
var Time = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

// Instance is a status for a test: in read_only, generation 1.
func Instance(id, name string) phase.Status {
	s := phase.Status{ID: id, Name: name, Workload: "docker.io/library/node/" + name, Policy: "agent", Phase: Phases[0], Generation: 1, Since: Time, State: phase.Holds}
	s.Next = next(s.Phase)
	return s
}

func next(from string) []string {
	if from == Phases[len(Phases)-1] {
		return []string{}
	}
	return slices.DeleteFunc(slices.Clone(Phases), func(p string) bool { return p == from })
}

// Asked is a call of Set.
type Asked struct {
	ID, To  string
	Options phase.SetOptions
}

// Supervisor implements api.Phases and api.Watcher.
type Supervisor struct {
	// OnSet, if not nil, is called by Set before anything else; its error is Set's. It is
	// not to be changed once another process may ask.
	OnSet func(ctx context.Context, a Asked) error

	mu        sync.Mutex
	instances []phase.Status             // guarded by mu
	asked     []Asked                    // guarded by mu
	watchers  map[chan phase.Event]*bool // whether it has lost one; guarded by mu
	watching  *sync.Cond                 // of mu: watchers has changed
}

// New supervises instances.
func New(instances ...phase.Status) *Supervisor {
	s := &Supervisor{instances: instances, watchers: map[chan phase.Event]*bool{}}
	s.watching = sync.NewCond(&s.mu)
	return s
}

// List implements api.Phases.
func (s *Supervisor) List() []phase.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.instances)
}

// Get implements api.Phases.
func (s *Supervisor) Get(id string) (phase.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one, err := s.find(id)
	if err != nil {
		return phase.Status{}, err
	}
	return *one, nil
}

func (s *Supervisor) find(id string) (*phase.Status, error) {
	i := slices.IndexFunc(s.instances, func(o phase.Status) bool { return o.ID == id })
	if i < 0 {
		return nil, phase.ErrUnknown
	}
	return &s.instances[i], nil
}

// Set implements api.Phases.
func (s *Supervisor) Set(ctx context.Context, id, to string, o phase.SetOptions) (phase.Status, error) {
	a := Asked{id, to, o}
	s.mu.Lock()
	s.asked = append(s.asked, a)
	s.mu.Unlock()
	if s.OnSet != nil {
		if err := s.OnSet(ctx, a); err != nil {
			return phase.Status{}, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	one, err := s.find(id)
	switch {
	case err != nil:
		return phase.Status{}, err
	case one.State == phase.Ended:
		return phase.Status{}, phase.ErrEnded
	case !slices.Contains(Phases, to):
		return phase.Status{}, &phase.TransitionError{From: one.Phase, To: to, Why: "unknown phase", Allowed: one.Next}
	case o.Generation != 0 && o.Generation != one.Generation:
		return phase.Status{}, &phase.GenerationError{Want: o.Generation, Is: one.Generation}
	case one.Phase == to && one.State == phase.Holds:
		return *one, nil
	case !slices.Contains(one.Next, to):
		return phase.Status{}, &phase.TransitionError{From: one.Phase, To: to, Why: "the policy doesn't lead there", Allowed: one.Next}
	}
	e := phase.Event{Time: Time, Kind: phase.Switched, Instance: id, Workload: one.Workload, Policy: one.Policy, From: one.Phase, To: to, Origin: o.Origin, By: o.By}
	one.Phase, one.Next = to, next(to)
	one.Generation++
	e.Generation = one.Generation
	s.emit(e)
	return *one, nil
}

// Asked gives the calls of Set.
func (s *Supervisor) Asked() []Asked {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// Watch implements api.Watcher.
func (s *Supervisor) Watch(ctx context.Context) <-chan phase.Event {
	c := make(chan phase.Event, 16)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers[c] = new(bool)
	s.watching.Broadcast()
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, c)
		s.watching.Broadcast()
		close(c)
	})
	return c
}

// AwaitWatchers waits until n watch.
func (s *Supervisor) AwaitWatchers(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.watchers) != n {
		s.watching.Wait()
	}
}

// Emit tells the watchers.
func (s *Supervisor) Emit(e phase.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.emit(e)
}

func (s *Supervisor) emit(e phase.Event) {
	for c, lost := range s.watchers {
		if *lost {
			select {
			case c <- phase.Event{Time: Time, Kind: phase.Lost, Message: "the watcher is too slow, events were dropped"}:
				*lost = false
			default:
			}
		}
		select {
		case c <- e:
		default:
			*lost = true
		}
	}
}

// Begin adds an instance.
func (s *Supervisor) Begin(one phase.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.instances = append(s.instances, one)
	s.emit(phase.Event{Time: Time, Kind: phase.Begun, Instance: one.ID, Workload: one.Workload, Policy: one.Policy, Generation: one.Generation, To: one.Phase})
}

// End ends an instance.
func (s *Supervisor) End(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if one, err := s.find(id); err == nil {
		one.State = phase.Ended
		s.emit(phase.Event{Time: Time, Kind: phase.Over, Instance: id, Workload: one.Workload, Policy: one.Policy, Generation: one.Generation})
	}
}
