// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"github.com/syslatch/syslatch/internal/phase"
)

// Problem is an error on the wire (RFC 9457, application/problem+json), and the client's
// error of it: errors.As and errors.Is find the one of package phase that it was.
type Problem struct {
	// Type tells problems apart. It is a name, with nothing to fetch behind it.
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"` // of HTTP
	Detail string `json:"detail"`

	// Of a refused transition.
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
	Why  string `json:"why,omitempty"`
	// Allowed are the phases that may follow, if any.
	Allowed []string `json:"allowed,omitzero"`

	// Generation is the instance's, Wanted the one that was asked for.
	Generation uint64 `json:"generation,omitempty"`
	Wanted     uint64 `json:"wanted,omitempty"`

	// Candidates are the IDs that begin with what was asked for.
	Candidates []string `json:"candidates,omitempty"`

	// Current is what holds after a switch that is not finished, and Cause what stopped
	// it. Inside, Current is less: see InsideStatus.
	Current *phase.Status `json:"current,omitempty"`
	Cause   string        `json:"cause,omitempty"`
}

// Types of problems.
const (
	typePrefix = "https://syslatch.dev/problems/"

	TypeBadRequest = typePrefix + "bad-request"
	TypeForbidden  = typePrefix + "forbidden"
	TypeNoResource = typePrefix + "no-such-resource"
	TypeNoInstance = typePrefix + "no-such-instance"
	TypeAmbiguous  = typePrefix + "ambiguous-instance"
	TypeMethod     = typePrefix + "method-not-allowed"
	TypeTransition = typePrefix + "transition-refused"
	TypeGeneration = typePrefix + "other-generation"
	TypeEnded      = typePrefix + "instance-ended"
	TypeIncomplete = typePrefix + "switch-incomplete"
	TypeTimeout    = typePrefix + "timeout"
	TypeBusy       = typePrefix + "busy"
	TypeInternal   = typePrefix + "internal-error"
)

var titles = map[string]string{
	TypeBadRequest: "The request makes no sense",
	TypeForbidden:  "Who asks may not",
	TypeNoResource: "There is no such resource",
	TypeNoInstance: "There is no such instance",
	TypeAmbiguous:  "Several instances have IDs that begin so",
	TypeMethod:     "The resource has no such method",
	TypeTransition: "The policy refuses this switch",
	TypeGeneration: "The phase was switched meanwhile",
	TypeEnded:      "The instance has ended",
	TypeIncomplete: "The phase is in force for new calls, and does not hold for every task yet",
	TypeTimeout:    "Time ran out before anything was changed",
	TypeBusy:       "Too much at once",
	TypeInternal:   "The server failed",
}

func newProblem(status int, kind, detail string) *Problem {
	return &Problem{Type: kind, Title: titles[kind], Status: status, Detail: detail}
}

func badRequest(detail string) *Problem {
	return newProblem(http.StatusBadRequest, TypeBadRequest, detail)
}

// problemOf is how an error is told.
func problemOf(err error) *Problem {
	var (
		p          *Problem
		transition *phase.TransitionError
		generation *phase.GenerationError
		incomplete *phase.IncompleteError
	)
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &incomplete): // before what it wraps
		p = newProblem(http.StatusServiceUnavailable, TypeIncomplete, err.Error())
		if errors.Is(incomplete.Err, context.DeadlineExceeded) {
			p.Status = http.StatusGatewayTimeout
		}
		current := whole(incomplete.Status)
		p.Current, p.Generation = &current, current.Generation
		if incomplete.Err != nil {
			p.Cause = incomplete.Err.Error()
		}
	case errors.As(err, &transition):
		p = newProblem(http.StatusConflict, TypeTransition, err.Error())
		p.From, p.To, p.Why, p.Allowed = transition.From, transition.To, transition.Why, append([]string{}, transition.Allowed...)
	case errors.As(err, &generation):
		p = newProblem(http.StatusPreconditionFailed, TypeGeneration, err.Error())
		p.Generation, p.Wanted = generation.Is, generation.Want
	case errors.Is(err, phase.ErrUnknown):
		p = newProblem(http.StatusNotFound, TypeNoInstance, err.Error())
	case errors.Is(err, phase.ErrEnded):
		p = newProblem(http.StatusGone, TypeEnded, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		p = newProblem(http.StatusGatewayTimeout, TypeTimeout, err.Error())
	case errors.Is(err, context.Canceled):
		p = newProblem(http.StatusServiceUnavailable, TypeBusy, "the daemon is stopping")
	default:
		p = newProblem(http.StatusInternalServerError, TypeInternal, err.Error())
	}
	return p
}

func (p *Problem) Error() string { return p.Detail }

// Unwrap gives the error of package phase, if it was one.
func (p *Problem) Unwrap() error {
	switch p.Type {
	case TypeTransition:
		return &phase.TransitionError{From: p.From, To: p.To, Why: p.Why, Allowed: p.Allowed}
	case TypeGeneration:
		return &phase.GenerationError{Want: p.Wanted, Is: p.Generation}
	case TypeIncomplete:
		e := &phase.IncompleteError{Err: cause{p}}
		if p.Current != nil {
			e.Status = *p.Current
		}
		return e
	case TypeNoInstance:
		return phase.ErrUnknown
	case TypeEnded:
		return phase.ErrEnded
	case TypeTimeout:
		return context.DeadlineExceeded
	}
	return nil
}

// cause is what stopped a switch at the other end.
type cause struct{ p *Problem }

func (c cause) Error() string { return c.p.Cause }

func (c cause) Is(target error) bool {
	return target == context.DeadlineExceeded && c.p.Status == http.StatusGatewayTimeout
}

func (p *Problem) write(w http.ResponseWriter, body any) {
	if p.Generation != 0 {
		w.Header().Set("ETag", etag(p.Generation))
	}
	if p.Status == http.StatusTooManyRequests || p.Type == TypeBusy {
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, p.Status, "application/problem+json", body)
}

func etag(generation uint64) string { return strconv.Quote(strconv.FormatUint(generation, 10)) }

func writeJSON(w http.ResponseWriter, status int, contentType string, v any) {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // the peer is gone
}
