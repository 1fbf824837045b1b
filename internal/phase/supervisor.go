// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// Options of a [Supervisor].
type Options struct {
	Log *logrus.Entry
	// Events gets every event, those of one instance in their order. It is called
	// while the instance waits, and must not call back. nil: nobody wants them.
	Events func(Event)
	// Deadline of a switch whose context has none; 0 is 5 s.
	Deadline time.Duration
}

// Supervisor has the instances of one daemon, or of one run.
type Supervisor struct {
	opts Options

	mu        sync.Mutex
	instances map[string]*Supervised // guarded by mu
	watchers  map[*watcher]struct{}  // guarded by mu
}

// NewSupervisor has no instances yet.
func NewSupervisor(o Options) *Supervisor {
	o.Deadline = cmp.Or(o.Deadline, 5*time.Second)
	if o.Events == nil {
		o.Events = func(Event) {}
	}
	return &Supervisor{opts: o, instances: map[string]*Supervised{}, watchers: map[*watcher]struct{}{}}
}

// idFormat is that of names in URLs, and of containers' ids.
var idFormat = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// Add begins to supervise an instance, in its first phase. Its hooks are told that
// phase; of its filter it can have no task yet.
func (s *Supervisor) Add(in Instance) (*Supervised, error) {
	if !idFormat.MatchString(in.ID) {
		return nil, fmt.Errorf("instance %.100q: an id has at most 128 letters, digits and _ . -, the first of them a letter or digit", in.ID)
	}
	sv, err := newSupervised(s, in)
	if err != nil {
		return nil, fmt.Errorf("instance %s: %w", in.ID, err)
	}
	s.mu.Lock()
	if s.instances[in.ID] != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("instance %s is supervised already", in.ID)
	}
	s.instances[in.ID] = sv
	s.mu.Unlock()
	if err := sv.begin(); err != nil {
		s.mu.Lock()
		delete(s.instances, in.ID)
		s.mu.Unlock()
		return nil, fmt.Errorf("instance %s: %w", in.ID, err)
	}
	return sv, nil
}

// End forgets an instance that has no task any more, and waits until its listeners
// have been let go of. One that is unknown has ended already.
func (s *Supervisor) End(id string) {
	s.mu.Lock()
	sv := s.instances[id]
	delete(s.instances, id)
	s.mu.Unlock()
	if sv != nil {
		sv.end()
	}
}

// List is sorted by id.
func (s *Supervisor) List() []Status {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.instances))
	s.mu.Unlock()
	out := make([]Status, len(all))
	for i, sv := range all {
		out[i] = sv.Status()
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Get is one instance's status, or [ErrUnknown].
func (s *Supervisor) Get(id string) (Status, error) {
	sv, err := s.find(id)
	if err != nil {
		return Status{}, err
	}
	return sv.Status(), nil
}

// Serve is [Supervised.Serve] for the instance with an id, or [ErrUnknown].
func (s *Supervisor) Serve(id string, l Listener) error {
	sv, err := s.find(id)
	if err == nil {
		sv.Serve(l)
	}
	return err
}

func (s *Supervisor) find(id string) (*Supervised, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sv := s.instances[id]; sv != nil {
		return sv, nil
	}
	return nil, fmt.Errorf("%w: %q", ErrUnknown, id)
}

// Set switches an instance to a phase, and returns when the phase holds for every
// task: see the package's comment. The phase that holds already is no switch, and no
// error.
//
// Its errors are [ErrUnknown], [ErrEnded], a [*TransitionError], a [*GenerationError],
// an [*IncompleteError], what kept hooks from being told, and the context's while
// another switch of the instance is unfinished; nothing has changed but with an
// [*IncompleteError].
func (s *Supervisor) Set(ctx context.Context, id, to string, o SetOptions) (Status, error) {
	sv, err := s.find(id)
	if err != nil {
		return Status{}, err
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.opts.Deadline)
		defer cancel()
	}
	return sv.set(ctx, to, o)
}

// Limit sets the limits of the phase in force, as a switch to it does: for an instance
// that begins.
func (s *Supervisor) Limit(ctx context.Context, id string) error {
	sv, err := s.find(id)
	if err == nil {
		err = sv.limit(ctx)
	}
	return err
}

// watched is how many events a watcher may lag behind.
const watched = 256

type watcher struct {
	events chan Event
	lost   uint64 // guarded by Supervisor.mu
}

// Watch gives events from now on, until ctx ends; then the channel is closed. A reader
// that is more than 256 events behind misses some: an event of the kind Lost with no
// instance says how many, before the next.
func (s *Supervisor) Watch(ctx context.Context) <-chan Event {
	w := &watcher{events: make(chan Event, watched)}
	s.mu.Lock()
	s.watchers[w] = struct{}{}
	s.mu.Unlock()
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, w)
		close(w.events)
	})
	return w.events
}

func (s *Supervisor) emit(e Event) {
	s.opts.Events(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watchers {
		if w.lost > 0 {
			missed := Event{Time: e.Time, Kind: Lost, Count: w.lost, Message: "this watcher was too slow: events are missing here"}
			select {
			case w.events <- missed:
				w.lost = 0
			default:
			}
		}
		select {
		case w.events <- e:
		default:
			w.lost++
		}
	}
}

// Close stops to serve. The instances go on: what they ask about waits for the next
// supervisor, or is answered ENOSYS by the kernel if nobody else has their listeners.
func (s *Supervisor) Close() error {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.instances))
	clear(s.instances)
	s.mu.Unlock()
	for _, sv := range all {
		sv.stop()
	}
	return nil
}

// isOver says whether an error is a context's.
func isOver(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}
