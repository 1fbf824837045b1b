// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/api/apitest"
	"github.com/syslatch/syslatch/internal/phase"
)

// Three instances, two of which begin alike.
func three() *apitest.Supervisor {
	return apitest.New(apitest.Instance("4f2a91", "web"), apitest.Instance("4f77", "db"), apitest.Instance("c0ffee", "agent"))
}

func startServer(t *testing.T, s *apitest.Supervisor, l limits) *running {
	t.Helper()
	return start(t, 0o600, func(ctx context.Context, listener *Listener, log *logrus.Entry) error {
		return (&Server{Phases: s, Events: s, Log: log, limits: l}).Serve(ctx, listener)
	})
}

func TestServer(t *testing.T) {
	s := three()
	s.OnSet = func(ctx context.Context, a apitest.Asked) error {
		status, _ := s.Get(a.ID)
		status.Phase, status.Generation, status.State, status.Uncovered = a.To, 9, phase.Degraded, []string{"task 12 may not be judged again yet"}
		deadline, _ := ctx.Deadline()
		switch a.To {
		case "slow":
			return &phase.IncompleteError{Status: status, Err: context.DeadlineExceeded}
		case "broken":
			return &phase.IncompleteError{Status: status, Err: errors.New("the freezer says no")}
		case "never":
			return fmt.Errorf("wait for another switch: %w", context.DeadlineExceeded)
		case "fails":
			return errors.New("map: EIO")
		case "panics":
			panic("at the disco")
		case "write_logs":
			if left := time.Until(deadline); left <= 0 || left > 2*time.Second {
				t.Errorf("timeout of 2 s: %v are left", left)
			}
		}
		return nil
	}
	r := startServer(t, s, limits{})
	const put, web = http.MethodPut, "/v1/instances/4f2a91/phase"
	for _, tc := range []struct {
		name, method, path, body string
		header                   []string
		status                   int
		want                     string // is in the body
		etag                     string
	}{
		{"list", "GET", "/v1/instances", "", nil, 200, `{"instances":[{"id":"4f2a91","name":"web","workload":"docker.io/library/node/web","policy":"agent","phase":"read_only","generation":1,"since":"2026-11-26T12:00:00Z","state":"holds","next":["write_logs","network","locked"],"uncovered":[],"denied":0},{"id":"4f77"`, ""},
		{"get", "GET", "/v1/instances/c0ffee", "", nil, 200, `{"id":"c0ffee",`, `"1"`},
		{"head", "HEAD", "/v1/instances/c0ffee", "", nil, 200, ``, `"1"`},
		{"beginning", "GET", "/v1/instances/4f2/phase", "", nil, 200, `{"id":"4f2a91",`, `"1"`},
		{"escaped", "GET", "/v1/instances/%63%30ffee", "", nil, 200, `{"id":"c0ffee",`, `"1"`},
		{"name is no id", "GET", "/v1/instances/web", "", nil, 404, `"type":"https://syslatch.dev/problems/no-such-instance","title":"There is no such instance","status":404,"detail":"no such instance: \"web\""`, ""},
		{"ambiguous", "GET", "/v1/instances/4f", "", nil, 409, `"candidates":["4f2a91","4f77"]`, ""},
		{"ambiguous switch", put, "/v1/instances/4f/phase", `{"phase":"locked"}`, nil, 409, `problems/ambiguous-instance`, ""},
		{"no path", "GET", "/v2/instances", "", nil, 404, `problems/no-such-resource`, ""},
		{"no cleaning", "GET", "/v1//instances", "", nil, 404, `problems/no-such-resource`, ""},
		{"no climbing", "GET", "/v1/instances/../instances", "", nil, 404, `problems/no-such-resource`, ""},
		{"escaped slash", "GET", "/v1/instances/a%2fphase", "", nil, 404, `problems/no-such-instance`, ""},
		{"no id", "GET", "/v1/instances/", "", nil, 404, `problems/no-such-resource`, ""},
		{"method", "POST", web, "{}", nil, 405, `"detail":"\"POST\" isn't one of GET, HEAD, PUT"`, ""},
		{"method of events", "HEAD", "/v1/events", "", nil, 405, ``, ""},
		{"query", "GET", "/v1/instances?all=1", "", nil, 400, `unknown query parameter \"all\"`, ""},
		{"bad query", "GET", "/v1/instances?%zz", "", nil, 400, `query: `, ""},
		{"openapi", "GET", "/v1/openapi.yaml", "", nil, 200, "openapi: 3.1.0\n", ""},

		{"no body", put, web, "", nil, 400, `the JSON object is not whole`, ""},
		{"no JSON", put, web, "phase=network", nil, 400, `invalid character 'p'`, ""},
		{"array", put, web, "[]", nil, 400, `want a JSON object`, ""},
		{"two", put, web, `{"phase":"network"}{}`, nil, 400, `there is more behind the JSON object`, ""},
		{"half", put, web, `{"phase":"network"`, nil, 400, `the JSON object is not whole`, ""},
		{"unknown key", put, web, `{"phase":"network","force":true}`, nil, 400, `unknown key \"force\", want phase, generation or timeout`, ""},
		{"other case", put, web, `{"Phase":"network"}`, nil, 400, `unknown key \"Phase\"`, ""},
		{"repeated", put, web, `{"phase":"network","phase":"locked"}`, nil, 400, `key \"phase\" is repeated`, ""},
		{"null", put, web, `{"phase":null}`, nil, 400, `phase: want a string`, ""},
		{"no phase", put, web, `{}`, nil, 400, `say which phase`, ""},
		{"no name", put, web, `{"phase":"\u001b[2J"}`, nil, 400, `is no name of a phase`, ""},
		{"timeout", put, web, `{"phase":"network","timeout":"2h"}`, nil, 400, `timeout: want a duration`, ""},
		{"no timeout", put, web, `{"phase":"network","timeout":"-1s"}`, nil, 400, `timeout: want a duration`, ""},
		{"generation 0", put, web, `{"phase":"network","generation":0}`, nil, 400, `generation: want a number from 1`, ""},
		{"half a generation", put, web, `{"phase":"network","generation":1.5}`, nil, 400, `generation: want a number from 1`, ""},
		{"big", put, web, `{"phase":"` + strings.Repeat("x", maxBody) + `"}`, nil, 400, `the body has more than 65536 bytes`, ""},
		{"If-Match and another", put, web, `{"phase":"network","generation":2}`, []string{"If-Match", `"3"`}, 400, `If-Match says generation 3, the body 2`, ""},
		{"weak", put, web, `{"phase":"network"}`, []string{"If-Match", `W/"3"`}, 400, `If-Match: want one ETag`, ""},
		{"several", put, web, `{"phase":"network"}`, []string{"If-Match", `"3"`, "If-Match", `"4"`}, 400, `If-Match: want one ETag`, ""},

		{"nobody", put, "/v1/instances/dead/phase", `{"phase":"network"}`, nil, 404, `problems/no-such-instance`, ""},
		{"unknown phase", put, web, `{"phase":"netwrok"}`, nil, 409, `"from":"read_only","to":"netwrok","why":"unknown phase","allowed":["write_logs","network","locked"]`, ""},
		{"same phase", put, web, `{"phase":"read_only"}`, nil, 200, `"generation":1`, `"1"`},
		{"generation", put, web, `{"phase":"network","generation":7}`, nil, 412, `"generation":1,"wanted":7`, `"1"`},
		{"If-Match", put, web, `{"phase":"network"}`, []string{"If-Match", `"7"`}, 412, `"generation":1,"wanted":7`, `"1"`},
		{"out of time", put, web, `{"phase":"slow"}`, nil, 504, `"current":{"id":"4f2a91","name":"web","workload":"docker.io/library/node/web","policy":"agent","phase":"slow","generation":9,"since":"2026-11-26T12:00:00Z","state":"degraded","next":["write_logs","network","locked"],"uncovered":["task 12 may not be judged again yet"],"denied":0},"cause":"context deadline exceeded"`, `"9"`},
		{"unfinished", put, web, `{"phase":"broken"}`, nil, 503, `"cause":"the freezer says no"`, `"9"`},
		{"not begun", put, web, `{"phase":"never"}`, nil, 504, `problems/timeout`, ""},
		{"failed", put, web, `{"phase":"fails"}`, nil, 500, `"detail":"map: EIO"`, ""},
		{"panic", put, web, `{"phase":"panics"}`, nil, 500, `internal error (a bug`, ""},
		{"switch", put, "/v1/instances/4f2/phase", ` {"timeout":"2s" , "phase":"write_logs"} `, []string{"If-Match", `"1"`}, 200, `"phase":"write_logs","generation":2`, `"2"`},
		{"switch again", put, web, `{"phase":"network","generation":2}`, []string{"If-Match", "*", "Content-Type", "application/x-www-form-urlencoded"}, 200, `"phase":"network","generation":3`, `"3"`},
	} {
		got := r.do(tc.method, tc.path, tc.body, tc.header...)
		if got.StatusCode != tc.status || !strings.Contains(got.body, tc.want) || got.Header.Get("ETag") != tc.etag {
			t.Errorf("%s: got %s, ETag %s:\n%s\nwant %d and %s", tc.name, got.Status, got.Header.Get("ETag"), got.body, tc.status, tc.want)
		}
		if got.StatusCode >= 400 && got.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: Content-Type %s", tc.name, got.Header.Get("Content-Type"))
		}
		if got.StatusCode == 405 && got.Header.Get("Allow") == "" || got.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: header %v", tc.name, got.Header)
		}
	}
	asked := s.Asked()
	want := apitest.Asked{ID: "4f2a91", To: "network", Options: phase.SetOptions{Origin: phase.Outside, By: fmt.Sprintf("uid %d pid %d", os.Getuid(), os.Getpid()), Generation: 2}}
	if diff := cmp.Diff(want, asked[len(asked)-1]); diff != "" {
		t.Error(diff)
	}
	for _, a := range asked {
		if a.ID != "4f2a91" {
			t.Errorf("%+v was asked for", a)
		}
	}
	if !strings.Contains(r.log.String(), "at the disco") || !strings.Contains(r.log.String(), "map: EIO") {
		t.Errorf("log: %s", r.log)
	}
	if got := r.do("PUT", "/v1/instances/4f77/phase", `{"phase":"locked"}`); got.StatusCode != 200 {
		t.Errorf("%s %s", got.Status, got.body)
	}
	if got := r.do("PUT", "/v1/instances/4f77/phase", `{"phase":"network"}`); got.StatusCode != 409 || !strings.Contains(got.body, `"why":"the policy doesn't lead there","allowed":[]`) {
		t.Errorf("%s %s", got.Status, got.body)
	}
	s.End("c0ffee")
	if got := r.do("PUT", "/v1/instances/c0ffee/phase", `{"phase":"network"}`); got.StatusCode != 410 || !strings.Contains(got.body, "problems/instance-ended") {
		t.Errorf("ended: %s %s", got.Status, got.body)
	}
}

// An answer comes when Set returns, and who asked may be gone by then.
func TestSetIsFinishedWithoutItsClient(t *testing.T) {
	s := three()
	begun, release, finished := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	s.OnSet = func(ctx context.Context, _ apitest.Asked) error {
		close(begun)
		<-release
		finished <- ctx.Err()
		return nil
	}
	r := startServer(t, s, limits{})
	ctx, cancel := context.WithCancel(t.Context())
	c := NewClient(r.socket)
	defer c.Close()
	failed := make(chan error)
	go func() {
		_, err := c.Set(ctx, "c0ffee", "network", SetOptions{})
		failed <- err
	}()
	<-begun
	select {
	case err := <-failed:
		t.Fatal("answered before Set returned:", err)
	default:
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(release)
	if err := <-finished; err != nil {
		t.Error("the switch was given up:", err)
	}
}

// A server that stops waits for a switch that was begun, but not for ever; a connection
// on which nothing was asked doesn't hold it up.
func TestStop(t *testing.T) {
	for name, hangs := range map[string]bool{"finishes": false, "hangs": true} {
		t.Run(name, func(t *testing.T) {
			s := three()
			l := outsideLimits()
			l.grace = time.Minute
			if hangs {
				l.grace = 50 * time.Millisecond
			}
			begun, release := make(chan struct{}), make(chan struct{})
			s.OnSet = func(ctx context.Context, _ apitest.Asked) error {
				close(begun)
				if hangs {
					<-ctx.Done()
					return ctx.Err()
				}
				<-release
				return nil
			}
			r := startServer(t, s, l)
			idle, err := net.Dial("unix", r.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer idle.Close()
			c := NewClient(r.socket)
			defer c.Close()
			set := make(chan error, 1)
			go func() {
				_, err := c.Set(t.Context(), "c0ffee", "network", SetOptions{Timeout: time.Minute})
				set <- err
			}()
			<-begun
			r.cancel()
			if _, err := io.ReadAll(idle); err != nil { // it is closed at once
				t.Error(err)
			}
			close(release)
			if err := <-set; (err != nil) != hangs {
				t.Errorf("the switch: %v", err)
			}
			r.stop()
			if _, err := os.Lstat(r.socket); !errors.Is(err, os.ErrNotExist) {
				t.Error("the socket is still there:", err)
			}
		})
	}
}

func TestClientHasTheErrorsOfPhase(t *testing.T) {
	s := three()
	r := startServer(t, s, limits{})
	c := NewClient(r.socket)
	defer c.Close()
	status := apitest.Instance("c0ffee", "agent")
	status.Uncovered = []string{"task 12"}
	var next error
	s.OnSet = func(context.Context, apitest.Asked) error { return next }
	for _, want := range []error{
		&phase.TransitionError{From: "a", To: "b", Why: "the policy doesn't lead there", Allowed: []string{"c"}},
		&phase.TransitionError{From: "a", To: "b", Why: "a is irreversible", Allowed: []string{}},
		&phase.GenerationError{Want: 3, Is: 1 << 60},
		&phase.IncompleteError{Status: status, Err: errors.New("frozen stays 0")},
		&phase.IncompleteError{Status: status, Err: fmt.Errorf("freeze: %w", context.DeadlineExceeded)},
		phase.ErrEnded, phase.ErrUnknown,
		fmt.Errorf("wait: %w", context.DeadlineExceeded),
	} {
		next = want
		_, err := c.Set(t.Context(), "c0ffee", "network", SetOptions{})
		if err == nil || err.Error() != want.Error() {
			t.Errorf("got %v, want %v", err, want)
			continue
		}
		var transition, wantTransition *phase.TransitionError
		if errors.As(want, &wantTransition) && (!errors.As(err, &transition) || !cmp.Equal(transition, wantTransition)) {
			t.Errorf("got %+v, want %+v", transition, wantTransition)
		}
		var generation, wantGeneration *phase.GenerationError
		if errors.As(want, &wantGeneration) && (!errors.As(err, &generation) || *generation != *wantGeneration) {
			t.Errorf("got %+v, want %+v", generation, wantGeneration)
		}
		var incomplete, wantIncomplete *phase.IncompleteError
		if errors.As(want, &wantIncomplete) && (!errors.As(err, &incomplete) || !cmp.Equal(incomplete.Status, wantIncomplete.Status) || incomplete.Error() != want.Error()) {
			t.Errorf("got %+v, want %+v", incomplete, wantIncomplete)
		}
		for _, sentinel := range []error{phase.ErrEnded, phase.ErrUnknown, context.DeadlineExceeded} {
			if errors.Is(err, sentinel) != errors.Is(want, sentinel) {
				t.Errorf("%v: is it %v?", err, sentinel)
			}
		}
	}
	next = nil
	got, err := c.Set(t.Context(), "c0f", "network", SetOptions{Generation: 1, Timeout: time.Second})
	if err != nil || got.Phase != "network" || got.Generation != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	if all, err := c.List(t.Context()); err != nil || len(all) != 3 || !cmp.Equal(all[2], got) {
		t.Errorf("%+v, %v", all, err)
	}
	if one, err := c.Get(t.Context(), "c0"); err != nil || !cmp.Equal(one, got) {
		t.Errorf("%+v, %v", one, err)
	}
	var p *Problem
	if _, err := c.Get(t.Context(), "4"); !errors.As(err, &p) || p.Type != TypeAmbiguous || len(p.Candidates) != 2 {
		t.Error(err)
	}
	for _, id := range []string{"", ".", ".."} {
		if _, err := c.Get(t.Context(), id); !errors.As(err, &p) || p.Type != TypeBadRequest {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"a/b", "a%b", "a b?x=1", "\x00"} {
		if _, err := c.Get(t.Context(), id); !errors.Is(err, phase.ErrUnknown) {
			t.Errorf("%q: %v", id, err)
		}
	}
	r.http.CloseIdleConnections()
	c.Close()
	r.stop()
	if _, err := c.List(t.Context()); !errors.Is(err, ErrNobody) || !strings.Contains(err.Error(), r.socket) {
		t.Error(err)
	}
}

func TestWatch(t *testing.T) {
	s := three()
	r := startServer(t, s, limits{})
	c := NewClient(r.socket)
	defer c.Close()
	all, err := c.Watch(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	one, err := c.Watch(t.Context(), "c0f")
	if err != nil {
		t.Fatal(err)
	}
	s.Emit(phase.Event{Time: apitest.Time, Kind: phase.Lost, Message: "dropped"})
	if _, err := c.Set(t.Context(), "4f77", "network", SetOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Set(t.Context(), "c0ffee", "network", SetOptions{}); err != nil {
		t.Fatal(err)
	}
	s.End("c0ffee")
	var got []string
	for e, err := range one { // ends with the instance
		got = append(got, fmt.Sprintf("%s %s %s %v", e.Kind, e.Instance, e.To, err))
	}
	if diff := cmp.Diff([]string{"lost   <nil>", "switched c0ffee network <nil>", "ended c0ffee  <nil>"}, got); diff != "" {
		t.Error(diff)
	}
	got = nil
	for e, err := range all {
		got = append(got, fmt.Sprintf("%s %s %s %v", e.Kind, e.Instance, e.To, err))
		if e.Kind == phase.Over {
			break // closes the connection
		}
	}
	if diff := cmp.Diff([]string{"lost   <nil>", "switched 4f77 network <nil>", "switched c0ffee network <nil>", "ended c0ffee  <nil>"}, got); diff != "" {
		t.Error(diff)
	}
	s.AwaitWatchers(0) // the server has seen that the client is gone
	if ended, err := c.Watch(t.Context(), "c0ffee"); err != nil {
		t.Error(err)
	} else {
		for e, err := range ended {
			t.Errorf("of what has ended: %+v, %v", e, err)
		}
	}
	if _, err := c.Watch(t.Context(), "dead"); !errors.Is(err, phase.ErrUnknown) {
		t.Error(err)
	}
	// A server that stops ends its streams.
	all, err = c.Watch(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	r.cancel()
	for e, err := range all {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestWatchEndsWithItsContext(t *testing.T) {
	s := three()
	r := startServer(t, s, limits{})
	c := NewClient(r.socket)
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	events, err := c.Watch(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	n := 0
	for _, err := range events {
		n++
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	if n != 1 {
		t.Errorf("%d errors", n)
	}
	s.AwaitWatchers(0)
}

func TestStreamFormats(t *testing.T) {
	s := three()
	r := startServer(t, s, limits{})
	for _, tc := range []struct{ accept, kind, want string }{
		{"", formatLines, `{"time":"2026-11-26T12:00:00Z","kind":"lost","instance":"","policy":"","generation":0,"message":"a < b"}` + "\n"},
		{"*/*", formatLines, `{"time":`},
		{"text/html, text/event-stream;q=0.9", formatEvents, "event: lost\ndata: {"},
		{"text/event-stream;q=0, application/*", formatLines, `{"time":`},
	} {
		q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://x/v1/events", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		if tc.accept != "" {
			q.Header.Set("Accept", tc.accept)
		}
		res, err := r.http.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		s.Emit(phase.Event{Time: apitest.Time, Kind: phase.Lost, Message: "a < b"})
		buffer := make([]byte, len(tc.want))
		if _, err := io.ReadFull(res.Body, buffer); err != nil || string(buffer) != tc.want || res.Header.Get("Content-Type") != tc.kind {
			t.Errorf("%s: %s, %q, %v", tc.accept, res.Header.Get("Content-Type"), buffer, err)
		}
		res.Body.Close()
		s.AwaitWatchers(0)
	}
	if got := r.do("GET", "/v1/events", "", "Accept", "text/html"); got.StatusCode != 406 {
		t.Error(got.Status)
	}
	for _, query := range []string{"?instance=", "?instance=a&instance=b", "?instnace=a"} {
		if got := r.do("GET", "/v1/events"+query, ""); got.StatusCode != 400 {
			t.Errorf("%s: %s", query, got.Status)
		}
	}
}

// A stream outlives the time that requests have, takes no more than its share, and is
// ended if its reader doesn't read.
func TestStreamBounds(t *testing.T) {
	s := three()
	l := outsideLimits()
	l.read, l.write, l.streams = 50*time.Millisecond, 200*time.Millisecond, 2
	r := startServer(t, s, l)
	c := NewClient(r.socket)
	defer c.Close()
	before := time.Now()
	stuck, err := c.Watch(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	reads, err := c.Watch(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var p *Problem
	if _, err := c.Watch(t.Context(), ""); !errors.As(err, &p) || p.Status != 503 || p.Type != TypeBusy {
		t.Error(err)
	}
	s.AwaitWatchers(2)
	// Events go on until the server has given the stuck one up, which is behind l.read.
	stop := make(chan struct{})
	go func() {
		s.AwaitWatchers(1)
		close(stop)
	}()
	var emitting sync.WaitGroup
	emitting.Go(func() {
		for {
			select {
			case <-stop:
				s.Emit(phase.Event{Time: apitest.Time, Kind: phase.Over})
				return
			default:
				s.Emit(phase.Event{Time: apitest.Time, Kind: phase.Denied, Message: strings.Repeat("x", 4096)})
			}
		}
	})
	for e, err := range reads {
		if err != nil {
			t.Error(err)
		}
		select {
		case <-stop:
		default:
			continue
		}
		if e.Kind == phase.Over || e.Kind == phase.Lost {
			break
		}
	}
	emitting.Wait()
	if time.Since(before) < l.write {
		t.Error("the stuck stream was ended too early")
	}
	n := 0
	for range stuck {
		n++
	}
	if n == 0 {
		t.Error("the stuck stream had nothing")
	}
	s.AwaitWatchers(0)
}

func TestOthersAreTurnedAway(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root has other users")
	}
	s := three()
	r := startServer(t, s, limits{})
	// The mode keeps them out: that is taken away for the test.
	if err := openUp(r.socket); err != nil {
		t.Fatal(err)
	}
	request := "PUT /v1/instances/c0ffee/phase HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n{\"phase\":\"network\"}"
	pid, got := relayAs(t, 65534, r.socket, request)
	if !strings.HasPrefix(got, "HTTP/1.1 403 Forbidden\r\n") || !strings.Contains(got, "\r\nContent-Type: application/problem+json\r\n") || !strings.Contains(got, `"detail":"uid 65534 may not switch phases: run it as root"`) {
		t.Errorf("got %s", got)
	}
	res, err := http.ReadResponse(bufio.NewReader(strings.NewReader(got)), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var p Problem
	if err := json.NewDecoder(res.Body).Decode(&p); err != nil || p.Type != TypeForbidden || res.ContentLength <= 0 {
		t.Errorf("%+v, %v", p, err)
	}
	if log := r.log.String(); !strings.Contains(log, "connection refused") || !strings.Contains(log, fmt.Sprint("pid=", pid)) || !strings.Contains(log, "uid=65534") {
		t.Errorf("log: %s", log)
	}
	if len(s.Asked()) > 0 {
		t.Error("it was switched")
	}
	if _, got := relayAs(t, 0, r.socket, "GET /v1/instances HTTP/1.0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.0 200 OK\r\n") {
		t.Errorf("root: %s", got)
	}
	pid, got = relayAs(t, 0, r.socket, strings.Replace(request, "Host: x\r\n", "Host: x\r\nConnection: close\r\n", 1))
	if asked := s.Asked(); !strings.Contains(got, `"phase":"network"`) || len(asked) != 1 || asked[0].Options.By != fmt.Sprintf("uid 0 pid %d", pid) {
		t.Errorf("%s: %+v", got, asked)
	}
}

// Root may run in a container, and its processes connect here: they tighten their own
// instance, and switch no other.
func TestInstancesOwnProcesses(t *testing.T) {
	s := three()
	type owner struct {
		instance string
		err      error
	}
	owners := make(chan owner, 1)
	r := start(t, 0o600, func(ctx context.Context, l *Listener, log *logrus.Entry) error {
		return (&Server{Phases: s, Events: s, Log: log, InstanceOf: func(int) (string, error) {
			o := <-owners
			return o.instance, o.err
		}}).Serve(ctx, l)
	})
	for _, tc := range []struct {
		owner  owner
		status string
		origin phase.Origin // of the wish that is passed on, if one is
	}{
		{owner{"c0ffee", nil}, "200", phase.Inside},
		{owner{"4f77", nil}, "403", ""},
		{owner{"", nil}, "200", phase.Outside},
		{owner{"", errors.New("secret cgroup")}, "403", ""},
	} {
		owners <- tc.owner
		before := len(s.Asked())
		got := r.raw("PUT /v1/instances/c0ffee/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 19\r\n\r\n{\"phase\":\"network\"}")
		if !strings.HasPrefix(got, "HTTP/1.1 "+tc.status+" ") || strings.Contains(got, "secret") {
			t.Errorf("%+v: %s", tc.owner, got)
		}
		asked := s.Asked()[before:]
		if len(asked) > 1 || (len(asked) == 1) != (tc.origin != "") || len(asked) == 1 && asked[0].Options.Origin != tc.origin {
			t.Errorf("%+v: passed on %+v", tc.owner, asked)
		}
	}
	if !strings.Contains(r.log.String(), "secret cgroup") {
		t.Errorf("log: %s", r.log)
	}
}

func TestGarbage(t *testing.T) {
	l := outsideLimits()
	l.header, l.read, l.idle = 100*time.Millisecond, 200*time.Millisecond, 100*time.Millisecond
	s := three()
	r := startServer(t, s, l)
	const put = "PUT /v1/instances/c0ffee/phase HTTP/1.1\r\nHost: x\r\n"
	for name, tc := range map[string]struct{ request, want string }{
		"noise":          {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "HTTP/1.1 400 "},
		"no host":        {"GET /v1/instances HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "},
		"http/2":         {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1 404 "},
		"long headers":   {"GET /v1/instances HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", "HTTP/1.1 431 "},
		"star":           {"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 404 "},
		"connect":        {"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\nConnection: close\r\n\r\n", "HTTP/1.1 404 "},
		"two lengths":    {put + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", "HTTP/1.1 400 "},
		"huge":           {put + "Connection: close\r\nContent-Length: 99999999\r\n\r\n" + strings.Repeat(" ", 1<<20), "HTTP/1.1 400 "},
		"huge in chunks": {put + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("4000\r\n"+strings.Repeat(" ", 0x4000)+"\r\n", 8), "HTTP/1.1 400 "},
		"slow line":      {"GET /v1/inst", "HTTP/1.1 400 "},
		"slow headers":   {"GET /v1/instances HTTP/1.1\r\nHost: x\r\nX", "HTTP/1.1 400 "},
		"silent":         {"", ""},
		"slow body":      {put + "Connection: close\r\nContent-Length: 19\r\n\r\n{\"phase\"", "HTTP/1.1 400 "},
		"idle":           {"GET /v1/instances HTTP/1.1\r\nHost: x\r\n\r\nGET", "HTTP/1.1 200 "},
	} {
		t.Run(name, func(t *testing.T) {
			// The server ends each of these connections by itself.
			if got := r.raw(tc.request); !strings.HasPrefix(got, tc.want) || tc.want == "" && got != "" {
				t.Errorf("got %.200q, want %q", got, tc.want)
			}
		})
	}
	if asked := s.Asked(); len(asked) > 0 {
		t.Errorf("%+v", asked)
	}
	if got := r.do("GET", "/v1/instances", ""); got.StatusCode != 200 {
		t.Error(got.Status)
	}
}

// Of a thousand that connect at once, so many are served as there may be; all are in
// the end.
func TestManyConnections(t *testing.T) {
	const clients = 1000
	l := outsideLimits()
	l.connections = 16
	s := three()
	var at, most atomic.Int32
	full := make(chan struct{})
	s.OnSet = func(context.Context, apitest.Asked) error {
		n := at.Add(1)
		defer at.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		if n == 16 {
			select {
			case <-full:
			default:
				close(full)
			}
		}
		<-full // so that the first sixteen are there together
		return phase.ErrEnded
	}
	r := startServer(t, s, l)
	var served atomic.Int32
	var all sync.WaitGroup
	for range clients {
		c, err := net.Dial("unix", r.socket)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			defer c.Close()
			_, err := io.WriteString(c, "PUT /v1/instances/c0ffee/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 19\r\n\r\n{\"phase\":\"network\"}")
			data, readErr := io.ReadAll(c)
			if err != nil || readErr != nil || !strings.HasPrefix(string(data), "HTTP/1.1 410 ") {
				t.Errorf("%v, %v: %.100q", err, readErr, data)
				return
			}
			served.Add(1)
		})
	}
	all.Wait()
	if served.Load() != clients || most.Load() != 16 {
		t.Errorf("%d were served, %d at once", served.Load(), most.Load())
	}
}

func TestAnswersOfStrangers(t *testing.T) {
	for name, tc := range map[string]struct{ answer, want string }{
		"text":    {"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nlong", `the server answered 431 Request Header Fields Too Large: "long"`},
		"noise":   {"SSH-2.0-OpenSSH\r\n", "malformed HTTP"},
		"nothing": {"", "EOF"},
		"no JSON": {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "answer: json: cannot unmarshal"},
		"other":   {"HTTP/1.1 301 Moved Permanently\r\nLocation: http://example.com/\r\nContent-Length: 0\r\n\r\n", "the server answered 301"},
		"problem": {"HTTP/1.1 403 Forbidden\r\nContent-Type: application/problem+json\r\nContent-Length: 2\r\n\r\n{}", "the server answered 403 Forbidden"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := Listen(t.TempDir()+"/s", 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					_, _ = io.WriteString(c, tc.answer)
				}
			}()
			c := NewClient(l.path)
			defer c.Close()
			if _, err := c.List(t.Context()); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			<-done
		})
	}
}

func FuzzDecodeSet(f *testing.F) {
	for _, seed := range []string{`{"phase":"network"}`, `{"phase":"network","generation":3,"timeout":"5s"}`, `{"phase":"a","phase":"b"}`, `{"phase":null}`, `[{}]`, `{"generation":1e3,"phase":"x"}`, "{\"phase\":\"\xff\"}", `{"phase":"a"} x`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, timeout, err := decodeSet(data)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\x1b\n") || len(err.Error()) > 400 {
				t.Errorf("error %q", err)
			}
			return
		}
		if timeout <= 0 || timeout > MaxTimeout || !phaseName.MatchString(got.Phase) || got.Generation != nil && *got.Generation == 0 {
			t.Fatalf("%q gave %+v, %v", data, got, timeout)
		}
		// What is taken means what any other decoder makes of it, and nothing else.
		var other SetRequest
		if err := json.Unmarshal(data, &other); err != nil || !cmp.Equal(got, other) {
			t.Fatalf("%q gave %+v, and %+v (%v) in encoding/json", data, got, other, err)
		}
		encoded, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		if again, _, err := decodeSet(encoded); err != nil || !cmp.Equal(got, again) {
			t.Fatalf("%s: %+v, %v", encoded, again, err)
		}
	})
}
