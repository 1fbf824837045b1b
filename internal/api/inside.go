// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"net/http"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/phase"
)

// Inside serves one instance on a socket of its own: GET and PUT of /v1/phase. Whoever
// Admit lets in may ask, no instance can be named, and [Phases] is told that the wish is
// phase.Inside's, which may only tighten.
//
// The socket's directory is mounted into the container, read-only: the socket itself
// would be that of a server that has ended, once the next one has made its own.
//
// A phase may deny connect(2): a workload that is to tighten itself out of such a phase
// connects before and keeps the connection. So idle connections are kept.
type Inside struct {
	ID     string
	Phases Phases
	Log    *logrus.Entry
	// Admit says no to the process that connected, which may have ended; nil: to none.
	// It doesn't wait.
	Admit func(pid int) error

	limits limits // zero: insideLimits
	now    func() time.Time
}

// The workload can use these up; it harms nobody else.
func insideLimits() limits {
	l := outsideLimits()
	l.connections, l.streams = 8, 0
	l.idle = 100 * 365 * 24 * time.Hour // zero would be that of reading
	l.grace = time.Second
	return l
}

// Each request may become an entry of the audit log.
const insideRate, insideBurst = 5, 20

// Serve answers until ctx ends, and removes the socket.
func (in *Inside) Serve(ctx context.Context, l *Listener) error {
	limits, now := in.limits, in.now
	if limits.connections == 0 {
		limits = insideLimits()
	}
	if now == nil {
		now = time.Now
	}
	rate := newBucket(insideRate, insideBurst, now)
	h := &handler{
		routes: in.routes(), limits: limits, log: in.Log.WithField("container", in.ID), tell: tellInside,
		allow: func() *Problem {
			if rate.take() {
				return nil
			}
			return newProblem(http.StatusTooManyRequests, TypeBusy, "too many requests, wait a second")
		},
	}
	return serve(ctx, l, h, in.admit(now))
}

// admit keeps out who only sees the socket: where containers share a pid namespace, that
// of another is at /proc/PID/root.
func (in *Inside) admit(now func() time.Time) func(*peer) *Problem {
	if in.Admit == nil {
		return nil
	}
	told := newBucket(1, 10, now)
	return func(p *peer) *Problem {
		err := in.Admit(int(p.pid))
		if err == nil {
			return nil
		}
		if told.take() { // the log isn't theirs to fill
			in.Log.WithError(err).WithFields(logrus.Fields{"container": in.ID, "uid": p.uid, "pid": p.pid}).Warn("connection refused: not a process of the container")
		}
		return newProblem(http.StatusForbidden, TypeForbidden, "only processes of the container may ask here")
	}
}

func (in *Inside) routes() []route {
	return []route{{"/v1/phase", methods{http.MethodGet: in.get, http.MethodPut: in.set}}}
}

func (in *Inside) get(_ context.Context, c *call) error {
	if err := query(c.r); err != nil {
		return err
	}
	status, err := in.Phases.Get(in.ID)
	if err != nil {
		return err
	}
	answerInside(c.w, status)
	return nil
}

func (in *Inside) set(ctx context.Context, c *call) error {
	if err := query(c.r); err != nil {
		return err
	}
	data, err := readBody(c.w, c.r)
	if err != nil {
		return err
	}
	request, err := decodeInside(data)
	if err != nil {
		return badRequest(err.Error())
	}
	if err := c.extend(DefaultTimeout); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, DefaultTimeout)
	defer cancel()
	status, err := in.Phases.Set(ctx, in.ID, request.Phase, phase.SetOptions{Origin: phase.Inside, By: c.peer.String()})
	if err != nil {
		return err
	}
	answerInside(c.w, status)
	return nil
}

func answerInside(w http.ResponseWriter, status phase.Status) {
	w.Header().Set("ETag", etag(status.Generation))
	writeJSON(w, http.StatusOK, "application/json", insideStatus(status))
}

// insideProblem has less of what is not enforced, and of what goes on outside.
type insideProblem struct {
	*Problem
	Current *InsideStatus `json:"current,omitempty"`
	Cause   string        `json:"cause,omitempty"`
}

func tellInside(p *Problem) any {
	told := insideProblem{Problem: p}
	switch p.Type {
	case TypeInternal:
		copied := *p
		copied.Detail = "the switch failed; the daemon's log has the cause"
		told.Problem = &copied
	case TypeIncomplete:
		copied := *p
		copied.Detail = copied.Title
		told.Problem = &copied
		if p.Current != nil {
			current := insideStatus(*p.Current)
			told.Current = &current
		}
	}
	return told
}
