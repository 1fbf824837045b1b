// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/phase"
)

// Server serves root, and the user that it runs as.
type Server struct {
	Phases Phases
	Events Watcher
	Log    *logrus.Entry
	// InstanceOf is the instance that a client's process, which may have ended, is part
	// of, "" if it is none's: it may tighten that one, as by [Inside], and switch no
	// other. It doesn't wait. nil: nobody is.
	InstanceOf func(pid int) (string, error)

	limits limits // zero: outsideLimits
}

const eventsPattern = "/v1/events"

// server is a Server that runs.
type server struct {
	*Server
	limits  limits
	streams chan struct{} // a token for each stream
}

// Serve answers until ctx ends; then streams end at once, a switch that was begun is
// waited for, for a while, and the socket is removed.
func (s *Server) Serve(ctx context.Context, l *Listener) error {
	run := &server{Server: s, limits: s.limits}
	if run.limits == (limits{}) {
		run.limits = outsideLimits()
	}
	run.streams = make(chan struct{}, run.limits.streams)
	return serve(ctx, l, &handler{routes: run.routes(), limits: run.limits, log: s.Log}, run.admit())
}

func (s *server) routes() []route {
	return []route{
		{"/v1/instances", methods{http.MethodGet: s.list}},
		{"/v1/instances/{id}", methods{http.MethodGet: s.get}},
		{"/v1/instances/{id}/phase", methods{http.MethodGet: s.get, http.MethodPut: s.set}},
		{eventsPattern, methods{http.MethodGet: s.events}},
		{"/v1/openapi.yaml", methods{http.MethodGet: s.openAPI}},
	}
}

// admit lets root and this process's user in. The socket's mode does so already: this
// holds if somebody has changed that, or has passed a descriptor on.
//
// An instance's processes may be among them. What they are is asked now, while the one
// that connected is there as a rule; if it has ended, its pid may be another's, or
// nobody's, who is not let in.
func (s *server) admit() func(*peer) *Problem {
	own, told := os.Geteuid(), newBucket(1, 10, time.Now)
	return func(p *peer) *Problem {
		log := s.Log.WithFields(logrus.Fields{"uid": p.uid, "pid": p.pid})
		if p.uid != 0 && int64(p.uid) != int64(own) {
			if told.take() { // the log isn't theirs to fill
				log.Warn("connection refused: neither root nor the daemon's user")
			}
			return newProblem(http.StatusForbidden, TypeForbidden, fmt.Sprintf("uid %d may not switch phases: run it as root", p.uid))
		}
		if s.InstanceOf == nil || p.pid == 0 { // of a pid namespace above: no instance's
			return nil
		}
		var err error
		if p.instance, err = s.InstanceOf(int(p.pid)); err != nil {
			if told.take() {
				log.WithError(err).Warn("connection refused: it can't be told whether a container's process has made it")
			}
			return newProblem(http.StatusForbidden, TypeForbidden, "it can't be told whether a container's process connects (it has to be there until it is answered)")
		}
		return nil
	}
}

// find is the instance with an ID, or the only one whose ID begins so. Names are no
// IDs: whoever makes a container chooses its name.
func (s *server) find(id string) (phase.Status, error) {
	status, err := s.Phases.Get(id)
	if !errors.Is(err, phase.ErrUnknown) {
		return whole(status), err
	}
	var found []phase.Status
	for _, one := range s.Phases.List() {
		if strings.HasPrefix(one.ID, id) {
			found = append(found, one)
		}
	}
	switch len(found) {
	case 0:
		return phase.Status{}, fmt.Errorf("%w: %.70q", phase.ErrUnknown, id)
	case 1:
		return whole(found[0]), nil
	}
	p := newProblem(http.StatusConflict, TypeAmbiguous, "")
	for _, one := range found {
		p.Candidates = append(p.Candidates, one.ID)
	}
	slices.Sort(p.Candidates)
	p.Candidates = p.Candidates[:min(len(p.Candidates), 20)]
	p.Detail = fmt.Sprintf("%d instances begin with %.70q, say more of it: %s", len(found), id, strings.Join(p.Candidates, ", "))
	return phase.Status{}, p
}

func (s *server) list(_ context.Context, c *call) error {
	if err := query(c.r); err != nil {
		return err
	}
	all := List{Instances: []phase.Status{}}
	for _, one := range s.Phases.List() {
		all.Instances = append(all.Instances, whole(one))
	}
	slices.SortFunc(all.Instances, func(a, b phase.Status) int { return strings.Compare(a.ID, b.ID) })
	writeJSON(c.w, http.StatusOK, "application/json", all)
	return nil
}

func (s *server) get(_ context.Context, c *call) error {
	if err := query(c.r); err != nil {
		return err
	}
	status, err := s.find(c.id)
	if err != nil {
		return err
	}
	answer(c.w, status)
	return nil
}

func answer(w http.ResponseWriter, status phase.Status) {
	w.Header().Set("ETag", etag(status.Generation))
	writeJSON(w, http.StatusOK, "application/json", whole(status))
}

func (s *server) set(ctx context.Context, c *call) error {
	if err := query(c.r); err != nil {
		return err
	}
	data, err := readBody(c.w, c.r)
	if err != nil {
		return err
	}
	request, timeout, err := decodeSet(data)
	if err != nil {
		return badRequest(err.Error())
	}
	generation, err := ifMatch(c.r.Header)
	if err != nil {
		return err
	}
	if request.Generation != nil {
		if generation != 0 && generation != *request.Generation {
			return badRequest(fmt.Sprintf("If-Match says generation %d, the body %d", generation, *request.Generation))
		}
		generation = *request.Generation
	}
	status, err := s.find(c.id)
	if err != nil {
		return err
	}
	origin := phase.Outside
	if c.peer.instance != "" {
		if origin = phase.Inside; c.peer.instance != status.ID {
			return newProblem(http.StatusForbidden, TypeForbidden, fmt.Sprintf("processes of instance %.70q may switch no other", c.peer.instance))
		}
	}
	if err := c.extend(timeout); err != nil {
		return err
	}
	// A client that is gone doesn't end what it began: a switch that is half done is
	// worse than one that nobody waits for.
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	status, err = s.Phases.Set(ctx, status.ID, request.Phase, phase.SetOptions{Origin: origin, By: c.peer.String(), Generation: generation})
	if err != nil {
		return err
	}
	answer(c.w, status)
	return nil
}

func (s *server) openAPI(_ context.Context, c *call) error {
	c.w.Header().Set("Content-Type", "application/yaml")
	_, _ = c.w.Write(openAPI) // the peer is gone
	return nil
}

// query refuses parameters that mean nothing, so that a misspelt one isn't ignored.
func query(r *http.Request, known ...string) error {
	values, err := parseQuery(r)
	if err != nil {
		return err
	}
	for key, v := range values {
		if !slices.Contains(known, key) {
			return badRequest(fmt.Sprintf("unknown query parameter %.40q", key))
		}
		if len(v) > 1 {
			return badRequest(fmt.Sprintf("query parameter %.40q is repeated", key))
		}
	}
	return nil
}

// events streams what happens, beginning with its header: who has that and asks for the
// list then has missed nothing. With ?instance= it ends with that instance.
func (s *server) events(_ context.Context, c *call) error {
	if err := query(c.r, "instance"); err != nil {
		return err
	}
	id, one := c.r.URL.Query().Get("instance"), c.r.URL.Query().Has("instance")
	if one && id == "" {
		return badRequest("instance: say which")
	}
	format, err := accepted(c.r.Header)
	if err != nil {
		return err
	}
	select {
	case s.streams <- struct{}{}:
		defer func() { <-s.streams }()
	default:
		return newProblem(http.StatusServiceUnavailable, TypeBusy, fmt.Sprintf("%d watch already, the most that may", cap(s.streams)))
	}
	ctx, cancel := context.WithCancel(c.r.Context())
	defer cancel()
	events := s.Events.Watch(ctx) // before find: its end isn't to be missed
	only := phase.Status{}
	if one {
		if only, err = s.find(id); err != nil {
			return err
		}
	}
	control := http.NewResponseController(c.w)
	// ReadTimeout goes on while net/http waits for the client to go away.
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	c.w.Header().Set("Content-Type", format)
	c.w.WriteHeader(http.StatusOK)
	if err := control.Flush(); err != nil {
		return nil // the peer is gone
	}
	for only.State != phase.Ended {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-events:
			if !ok {
				return nil
			}
			// An event of no instance says that some were dropped.
			if only.ID != "" && e.Instance != "" && e.Instance != only.ID {
				continue
			}
			if c.extend(0) != nil || writeEvent(c.w, format, e) != nil || control.Flush() != nil {
				return nil
			}
			if only.ID != "" && e.Kind == phase.Over && e.Instance == only.ID {
				return nil
			}
		}
	}
	return nil
}

const (
	formatLines  = "application/x-ndjson"
	formatEvents = "text/event-stream"
)

// accepted is the format that a client asks for first.
func accepted(header http.Header) (string, error) {
	accept := strings.Join(header.Values("Accept"), ",")
	if accept == "" {
		return formatLines, nil
	}
	for part := range strings.SplitSeq(accept, ",") {
		kind, params, err := mime.ParseMediaType(part)
		if err != nil || params["q"] == "0" {
			continue
		}
		switch kind {
		case formatEvents:
			return formatEvents, nil
		case formatLines, "application/*", "*/*":
			return formatLines, nil
		}
	}
	return "", newProblem(http.StatusNotAcceptable, TypeBadRequest, "events are "+formatLines+" or "+formatEvents)
}

func writeEvent(w http.ResponseWriter, format string, e phase.Event) error {
	before, after := "", ""
	if format == formatEvents {
		before, after = "event: "+string(e.Kind)+"\ndata: ", "\n"
	}
	var line bytes.Buffer
	line.WriteString(before)
	encoder := json.NewEncoder(&line) // ends it with a newline
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(e); err != nil {
		return err
	}
	line.WriteString(after)
	_, err := w.Write(line.Bytes())
	return err
}
