// SPDX-License-Identifier: Apache-2.0

// Package api is how an orchestrator switches phases: HTTP and JSON over a unix socket,
// both ends. It owns the socket, who may speak there, and the form of questions and
// answers; what a switch is, and whether it may be, is decided by whom it asks
// ([Phases]). openapi.yaml describes it for those who write a client in another language.
//
// The daemon's side:
//
//	l, err := api.Listen(api.DefaultSocket, 0o600)
//	s := &api.Server{Phases: supervisor, Events: supervisor, Log: log}
//	err = s.Serve(ctx, l) // until ctx ends
//
// The other side; its errors are those of package phase:
//
//	c := api.NewClient(api.DefaultSocket)
//	status, err := c.Set(ctx, "4f2a", "network", api.SetOptions{Timeout: time.Second})
//	var incomplete *phase.IncompleteError
//	if errors.As(err, &incomplete) { … incomplete.Status.Uncovered … }
//
// A workload has a socket of its own, on which it can tighten itself and knows nobody
// else ([Inside]):
//
//	l, err := api.Listen("/run/syslatch/inside/"+id+"/phase.sock", 0o666)
//	err = (&api.Inside{ID: id, Phases: supervisor, Log: log}).Serve(ctx, l)
//
// Errors of Listen and Serve are about the socket. What goes wrong with one request is
// told to its client ([Problem]), and logged only if it is our fault or an intruder's.
package api

import (
	"context"
	_ "embed"
	"time"

	"github.com/syslatch/syslatch/internal/phase"
)

// DefaultSocket is where the daemon serves.
const DefaultSocket = "/run/syslatch/api.sock"

// Bounds of the time that one switch may take.
const (
	DefaultTimeout = 5 * time.Second
	MaxTimeout     = time.Minute
)

//go:embed openapi.yaml
var openAPI []byte

// Phases is who supervises the instances.
type Phases interface {
	List() []phase.Status
	// Get wants an instance's whole ID.
	Get(id string) (phase.Status, error)
	// Set returns when the phase holds, or ctx has ended. Where it holds already nothing
	// changes; a switch to it that wasn't finished is tried again. An error other than
	// *phase.IncompleteError means that nothing has changed.
	Set(ctx context.Context, id, to string, o phase.SetOptions) (phase.Status, error)
}

// Watcher tells what happens, from the call on.
type Watcher interface {
	// Watch never waits for its reader: what the channel has no room for is dropped,
	// and an event of kind lost says so. The channel is closed when ctx ends.
	Watch(ctx context.Context) <-chan phase.Event
}

// List is what GET /v1/instances answers.
type List struct {
	Instances []phase.Status `json:"instances"` // by ID
}

// SetRequest is the body of PUT /v1/instances/{id}/phase.
type SetRequest struct {
	Phase string `json:"phase"`
	// Generation, if it is there, has to be the instance's, from 1. It can be said as
	// If-Match instead.
	Generation *uint64 `json:"generation,omitempty"`
	// Timeout is a duration such as "500ms", up to MaxTimeout; DefaultTimeout if it
	// isn't there.
	Timeout string `json:"timeout,omitempty"`
}

// InsideRequest is the body of PUT /v1/phase on an instance's own socket.
type InsideRequest struct {
	Phase string `json:"phase"`
}

// InsideStatus is what a workload learns of itself: not what isn't enforced.
type InsideStatus struct {
	Phase      string      `json:"phase"`
	Generation uint64      `json:"generation"`
	Since      time.Time   `json:"since"`
	State      phase.State `json:"state"`
	Next       []string    `json:"next"` // from outside; from inside only the tighter of them
}

func insideStatus(s phase.Status) InsideStatus {
	return InsideStatus{Phase: s.Phase, Generation: s.Generation, Since: s.Since, State: s.State, Next: whole(s).Next}
}

// whole has no null where the API promises a list.
func whole(s phase.Status) phase.Status {
	if s.Next == nil {
		s.Next = []string{}
	}
	if s.Uncovered == nil {
		s.Uncovered = []string{}
	}
	return s
}
