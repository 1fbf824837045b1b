// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// limits bound what clients can hold.
type limits struct {
	connections int
	streams     int
	header      time.Duration // until a request's header is there
	read        time.Duration // and its body
	write       time.Duration // of an answer, and of each event of a stream
	idle        time.Duration // between requests
	grace       time.Duration // for what is being answered when the server stops
	linger      time.Duration // for a client to read an answer and close, before it is closed here; 0: none
}

func outsideLimits() limits {
	return limits{
		connections: 128, streams: 64,
		header: 5 * time.Second, read: 10 * time.Second, write: 10 * time.Second, idle: 30 * time.Second, grace: 10 * time.Second,
		linger: 10 * time.Second,
	}
}

const maxHeader = 16 << 10

// A route is a resource. Its patterns have {id} for one segment of the path.
type route struct {
	pattern string
	methods methods
}

// methods answer. Their ctx ends when a server that stops has waited for long enough;
// the request's own ends as soon as its client is gone.
type methods map[string]func(context.Context, *call) error

// call is a request that is being answered.
type call struct {
	w     http.ResponseWriter
	r     *http.Request
	id    string // the path's
	peer  peer
	write time.Duration // limits.write
}

// extend gives an answer time from now on.
func (c *call) extend(more time.Duration) error {
	return http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(more + c.write))
}

// handler answers by routes.
type handler struct {
	routes []route
	limits limits
	log    *logrus.Entry
	// busy has a token for each request that is being answered.
	busy chan struct{}
	// allow says no to a request before it is looked at; nil: never.
	allow func() *Problem
	// tell is what a client gets to see of a problem; nil: all.
	tell func(*Problem) any
}

// serve is an http.Handler's, of a server that gives up when ctx ends.
func (h *handler) serve(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	select {
	case h.busy <- struct{}{}:
	case <-ctx.Done():
		panic(http.ErrAbortHandler) // no answer, not an empty one
	}
	defer func() { <-h.busy }()
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	who, _ := r.Context().Value(peerKey{}).(peer)
	c := &call{w: w, r: r, peer: who, write: h.limits.write}
	err := c.extend(0)
	if err == nil {
		err = h.answer(ctx, c)
	}
	if err != nil {
		h.fail(w, err)
	}
}

func (h *handler) answer(ctx context.Context, c *call) (err error) {
	defer func() {
		if r := recover(); r != nil {
			h.log.WithFields(logrus.Fields{"panic": r, "stack": string(debug.Stack())}).Error("request panicked (a bug: please report it)")
			err = errors.New("internal error (a bug: the daemon's log has it, please report it)")
		}
	}()
	if h.allow != nil {
		if p := h.allow(); p != nil {
			return p
		}
	}
	for _, route := range h.routes {
		id, ok := match(route.pattern, c.r.URL)
		if !ok {
			continue
		}
		method := c.r.Method
		if method == http.MethodHead && route.pattern != eventsPattern {
			method = http.MethodGet // net/http leaves the body out
		}
		do := route.methods[method]
		if do == nil {
			c.w.Header().Set("Allow", allowed(route))
			return newProblem(http.StatusMethodNotAllowed, TypeMethod, fmt.Sprintf("%.20q isn't one of %s", c.r.Method, allowed(route)))
		}
		c.id = id
		return do(ctx, c)
	}
	return newProblem(http.StatusNotFound, TypeNoResource, "there is nothing at this path (openapi.yaml describes what there is)")
}

func allowed(r route) string {
	var names []string
	for method := range r.methods {
		names = append(names, method)
		if method == http.MethodGet && r.pattern != eventsPattern {
			names = append(names, http.MethodHead)
		}
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

func (h *handler) fail(w http.ResponseWriter, err error) {
	p := problemOf(err)
	if p.Type == TypeInternal {
		h.log.WithError(err).Error("request failed")
	}
	var body any = p
	if h.tell != nil {
		body = h.tell(p)
	}
	p.write(w, body)
}

// match compares segment by segment, so that an escaped slash is part of an id, and no
// path means another.
func match(pattern string, u *url.URL) (id string, ok bool) {
	want, got := strings.Split(pattern, "/"), strings.Split(u.EscapedPath(), "/")
	if len(want) != len(got) {
		return "", false
	}
	for i, segment := range want {
		if segment == "{id}" {
			unescaped, err := url.PathUnescape(got[i])
			if err != nil || unescaped == "" {
				return "", false
			}
			id = unescaped
		} else if segment != got[i] {
			return "", false
		}
	}
	return id, true
}

// serve answers until ctx ends. It returns when all that was asked is answered, or what
// hangs has been given up.
func serve(ctx context.Context, l *Listener, h *handler, admit func(*peer) *Problem) error {
	stop, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	h.busy = make(chan struct{}, h.limits.connections)
	g := guard(l, h.limits, admit)
	defer g.Close()
	fresh := connections{open: map[net.Conn]struct{}{}}
	errorLog := h.log.WriterLevel(logrus.DebugLevel)
	defer errorLog.Close()
	s := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.serve(stop, w, r) }),
		ReadHeaderTimeout: h.limits.header,
		ReadTimeout:       h.limits.read,
		IdleTimeout:       h.limits.idle,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx }, // streams end with it
		ConnContext:       withPeer,
		ConnState:         fresh.state,
		ErrorLog:          log.New(errorLog, "", 0), //nolint:forbidigo // net/http takes no other

		DisableGeneralOptionsHandler: true,
	}
	stopped := make(chan error, 1)
	unwatch := context.AfterFunc(ctx, func() {
		// Shutdown takes a connection on which nothing was asked yet for a busy one.
		fresh.close()
		wait, cancelWait := context.WithTimeout(context.WithoutCancel(ctx), h.limits.grace)
		defer cancelWait()
		stopped <- s.Shutdown(wait)
	})
	err := s.Serve(g)
	if unwatch() {
		return errors.Join(err, s.Close()) // the listener failed
	}
	err = <-stopped
	cancel()
	if err != nil { // grace is over
		err = s.Close()
	}
	// What is answered still has been told to give up.
	wait := time.NewTimer(h.limits.grace)
	defer wait.Stop()
	for range cap(h.busy) {
		select {
		case h.busy <- struct{}{}:
		case <-wait.C:
			return errors.Join(err, errors.New("a request could not be ended"))
		}
	}
	return err
}

// connections are those on which nothing was read yet.
type connections struct {
	mu      sync.Mutex
	open    map[net.Conn]struct{} // guarded by mu
	closing bool                  // guarded by mu
}

func (c *connections) state(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s != http.StateNew {
		delete(c.open, conn)
		return
	}
	c.open[conn] = struct{}{}
	if c.closing {
		_ = conn.Close()
	}
}

func (c *connections) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing = true
	for conn := range c.open {
		_ = conn.Close() // net/http closes it again
	}
}
