// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/profiles"
)

// freezer is a barrier that fails when it is told to.
type freezer struct{ fails atomic.Pointer[error] }

func (*freezer) Rejudges() bool { return true }

func (f *freezer) Barrier(ctx context.Context) error {
	fails := f.fails.Load()
	if fails == nil {
		return nil
	}
	if errors.Is(*fails, context.DeadlineExceeded) {
		<-ctx.Done()
		return ctx.Err()
	}
	return *fails
}

// The real supervisor behind both sockets: without a kernel, as what it enforces with is
// handed to it.
func TestWithTheSupervisor(t *testing.T) {
	rule := func(names ...string) []profiles.PhaseRule { return []profiles.PhaseRule{{Names: names}} }
	set := &profiles.PhaseSet{Initial: "read_only", Phases: []profiles.Phase{
		{Name: "read_only", Allow: rule("@file-read")},
		{Name: "network", Allow: rule("@file-read", "@network")},
		{Name: "locked", Allow: rule("read"), Irreversible: true},
	}}
	plan, err := profiles.CompilePhases(set, profiles.PhaseHost{Notify: true, Inject: true}, profiles.PhaseOptions{Architectures: []specs.Arch{specs.ArchX86_64}})
	if err != nil {
		t.Fatal(err)
	}
	log := &journal{}
	s := phase.NewSupervisor(phase.Options{Log: log.entry()})
	defer s.Close()
	barrier := &freezer{}
	if _, err := s.Add(phase.Instance{ID: "c0ffee", Policy: "agent", Set: set, Plan: plan, Barrier: barrier}); err != nil {
		t.Fatal(err)
	}
	outside := start(t, 0o600, func(ctx context.Context, l *Listener, log *logrus.Entry) error {
		return (&Server{Phases: s, Events: s, Log: log}).Serve(ctx, l)
	})
	inside := start(t, 0o666, func(ctx context.Context, l *Listener, log *logrus.Entry) error {
		return (&Inside{ID: "c0ffee", Phases: s, Log: log}).Serve(ctx, l)
	})
	c := NewClient(outside.socket)
	defer c.Close()
	events, err := c.Watch(t.Context(), "c0ffee")
	if err != nil {
		t.Fatal(err)
	}

	tighten := func(to string, status int, want string) {
		t.Helper()
		if got := inside.do("PUT", "/v1/phase", `{"phase":"`+to+`"}`); got.StatusCode != status || !strings.Contains(got.body, want) {
			t.Errorf("to %s from inside: %s %s", to, got.Status, got.body)
		}
	}
	tighten("network", 409, "from inside only")
	got, err := c.Set(t.Context(), "c0f", "network", SetOptions{Generation: 1})
	if err != nil || got.Phase != "network" || got.Generation != 2 || got.State != phase.Holds {
		t.Errorf("%+v, %v", got, err)
	}
	tighten("read_only", 200, `"phase":"read_only","generation":3`)
	tighten("network", 409, "from inside only")

	failure := errors.New("frozen stays 0")
	for _, fails := range []error{failure, context.DeadlineExceeded} {
		barrier.fails.Store(&fails)
		before, err := c.Get(t.Context(), "c0ffee")
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Set(t.Context(), "c0ffee", "network", SetOptions{Timeout: 50 * time.Millisecond})
		var incomplete *phase.IncompleteError
		if !errors.As(err, &incomplete) || incomplete.Status.State != phase.Degraded || incomplete.Status.Phase != "network" ||
			incomplete.Status.Generation != before.Generation+1 || len(incomplete.Status.Uncovered) == 0 ||
			errors.Is(err, context.DeadlineExceeded) != errors.Is(fails, context.DeadlineExceeded) {
			t.Errorf("%v: got %+v", fails, err)
		}
		barrier.fails.Store(nil)
		// The same again finishes it.
		if got, err = c.Set(t.Context(), "c0ffee", "network", SetOptions{Generation: before.Generation + 1}); err != nil || got.State != phase.Holds {
			t.Errorf("again: %+v, %v", got, err)
		}
		if _, err = c.Set(t.Context(), "c0ffee", "read_only", SetOptions{}); err != nil {
			t.Error(err)
		}
	}

	tighten("locked", 200, `"next":[]`)
	tighten("read_only", 409, `"allowed":[]`)
	var transition *phase.TransitionError
	if _, err := c.Set(t.Context(), "c0ffee", "read_only", SetOptions{}); !errors.As(err, &transition) || len(transition.Allowed) != 0 {
		t.Error(err)
	}
	s.End("c0ffee")
	if got := inside.do("GET", "/v1/phase", ""); got.StatusCode != 404 && got.StatusCode != 410 {
		t.Errorf("%s: %s", got.Status, got.body)
	}

	var kinds []string
	us := fmt.Sprintf("uid %d pid %d", os.Getuid(), os.Getpid())
	for e, err := range events {
		kinds = append(kinds, fmt.Sprintf("%s %s %s", e.Kind, e.Origin, e.To))
		if err != nil || e.Kind != phase.Over && e.By != us {
			t.Errorf("%+v, %v", e, err)
		}
	}
	want := []string{
		"refused inside network", "switched outside network", "switched inside read_only", "refused inside network",
		"failed outside network", "switched outside network", "switched outside read_only",
		"failed outside network", "switched outside network", "switched outside read_only",
		"switched inside locked", "refused inside read_only", "refused outside read_only", "ended  ",
	}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Error(diff)
	}
}
