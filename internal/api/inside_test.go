// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/api/apitest"
	"github.com/syslatch/syslatch/internal/phase"
)

// clock is a test's to move.
type clock struct {
	mu sync.Mutex
	at time.Time // guarded by mu
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func startInside(t *testing.T, s *apitest.Supervisor, now func() time.Time, l limits) *running {
	t.Helper()
	return start(t, 0o666, func(ctx context.Context, listener *Listener, log *logrus.Entry) error {
		return (&Inside{ID: "c0ffee", Phases: s, Log: log, now: now, limits: l}).Serve(ctx, listener)
	})
}

func TestInside(t *testing.T) {
	s := three()
	s.OnSet = func(_ context.Context, a apitest.Asked) error {
		status, _ := s.Get(a.ID)
		status.Uncovered = []string{"open files stay writable"}
		switch a.To {
		case "network":
			return &phase.TransitionError{From: "read_only", To: "network", Why: "it allows more, which is not for the workload to decide", Allowed: []string{"locked"}}
		case "slow":
			return &phase.IncompleteError{Status: status, Err: errors.New("secret cause")}
		case "fails":
			return errors.New("secret path")
		}
		return nil
	}
	at := &clock{at: apitest.Time}
	r := startInside(t, s, at.now, limits{})
	const put, path = "PUT", "/v1/phase"
	for _, tc := range []struct {
		name, method, path, body string
		status                   int
		want                     string
	}{
		{"get", "GET", path, "", 200, `{"phase":"read_only","generation":1,"since":"2026-11-26T12:00:00Z","state":"holds","next":["write_logs","network","locked"]}`},
		{"loosen", put, path, `{"phase":"network"}`, 409, `"allowed":["locked"]`},
		{"tighten", put, path, `{"phase":"locked"}`, 200, `{"phase":"locked","generation":2,`},
		{"incomplete", put, path, `{"phase":"slow"}`, 503, `"detail":"The phase is in force for new calls, and does not hold for every task yet","generation":2,"current":{"phase":"locked"`},
		{"fails", put, path, `{"phase":"fails"}`, 500, `"detail":"the switch failed; the daemon's log has the cause"`},
		{"another", put, path, `{"phase":"network","id":"4f77"}`, 400, `unknown key \"id\", want phase`},
		{"timeout", put, path, `{"phase":"network","timeout":"1ns"}`, 400, `unknown key \"timeout\"`},
		{"query", put, path + "?id=4f77", `{"phase":"network"}`, 400, `unknown query parameter`},
		{"list", "GET", "/v1/instances", "", 404, `no-such-resource`},
		{"other instance", put, "/v1/instances/4f77/phase", `{"phase":"network"}`, 404, `no-such-resource`},
		{"events", "GET", "/v1/events", "", 404, `no-such-resource`},
		{"climb", "GET", "/v1/phase/../instances", "", 404, `no-such-resource`},
		{"method", "DELETE", path, "", 405, `method-not-allowed`},
	} {
		got := r.do(tc.method, tc.path, tc.body)
		if got.StatusCode != tc.status || !strings.Contains(got.body, tc.want) {
			t.Errorf("%s: got %s:\n%s\nwant %d and %s", tc.name, got.Status, got.body, tc.status, tc.want)
		}
		for _, secret := range []string{"secret", "uncovered", "open files", "workload", "policy\":"} {
			if strings.Contains(strings.ReplaceAll(got.body, "for the workload to decide", ""), secret) {
				t.Errorf("%s tells of %q: %s", tc.name, secret, got.body)
			}
		}
	}
	for _, a := range s.Asked() {
		want := phase.SetOptions{Origin: phase.Inside, By: fmt.Sprintf("uid %d pid %d", os.Getuid(), os.Getpid())}
		if a.ID != "c0ffee" || a.Options != want {
			t.Errorf("asked for %+v", a)
		}
	}
	if !strings.Contains(r.log.String(), "secret path") || !strings.Contains(r.log.String(), "container=c0ffee") {
		t.Errorf("log: %s", r.log)
	}
}

func TestInsideServesAnyUserInIt(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root has other users")
	}
	s := three()
	r := startInside(t, s, nil, limits{})
	if err := openUp(r.socket); err != nil {
		t.Fatal(err)
	}
	pid, got := relayAs(t, 65534, r.socket, "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 18\r\n\r\n{\"phase\":\"locked\"}")
	asked := s.Asked()
	if !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") || len(asked) != 1 || asked[0].Options.By != fmt.Sprintf("uid 65534 pid %d", pid) {
		t.Errorf("%s\n%+v", got, asked)
	}
}

func TestInsideKeepsOthersOut(t *testing.T) {
	s := three()
	asked := make(chan int, 10)
	r := start(t, 0o666, func(ctx context.Context, l *Listener, log *logrus.Entry) error {
		return (&Inside{ID: "c0ffee", Phases: s, Log: log, Admit: func(pid int) error {
			asked <- pid
			if len(asked) > 1 {
				return errors.New("secret cgroup")
			}
			return nil
		}}).Serve(ctx, l)
	})
	// A client's process is known by its connection, so each has one.
	const request = "PUT /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 18\r\n\r\n{\"phase\":\"locked\"}"
	own := uint32(os.Getuid())
	first, got := relayAs(t, own, r.socket, request)
	if !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") {
		t.Errorf("of the container: %s", got)
	}
	second, got := relayAs(t, own, r.socket, request)
	if !strings.HasPrefix(got, "HTTP/1.1 403 Forbidden\r\n") || !strings.Contains(got, "only processes of the container") || strings.Contains(got, "secret") {
		t.Errorf("of another: %s", got)
	}
	if a, b := <-asked, <-asked; a != first || b != second {
		t.Errorf("asked about %d and %d, want %d and %d", a, b, first, second)
	}
	if n := len(s.Asked()); n != 1 {
		t.Errorf("%d wishes were passed on", n)
	}
	if !strings.Contains(r.log.String(), "secret cgroup") {
		t.Errorf("log: %s", r.log)
	}
}

func TestInsideIsRateLimited(t *testing.T) {
	at := &clock{at: apitest.Time}
	r := startInside(t, three(), at.now, limits{})
	served := func(n int) (ok int) {
		for range n {
			switch got := r.do("GET", "/v1/phase", ""); {
			case got.StatusCode == 200:
				ok++
			case got.StatusCode != 429 || got.Header.Get("Retry-After") != "1" || !strings.Contains(got.body, "problems/busy"):
				t.Errorf("%s: %s", got.Status, got.body)
			}
		}
		return ok
	}
	got := []int{served(30)}
	at.move(time.Second)
	got = append(got, served(10))
	at.move(time.Hour)
	got = append(got, served(30))
	if diff := cmp.Diff([]int{insideBurst, insideRate, insideBurst}, got); diff != "" {
		t.Error(diff)
	}
}

// A workload that takes all of its connections waits for itself; one that it keeps
// for later is kept.
func TestInsideConnections(t *testing.T) {
	l := insideLimits()
	if l.idle < 24*time.Hour {
		t.Error("a workload can't keep its connection")
	}
	l.header = 100 * time.Millisecond
	r := startInside(t, three(), nil, l)
	for range 3 * l.connections {
		c, err := net.Dial("unix", r.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if got := r.do("GET", "/v1/phase", ""); got.StatusCode != 200 {
		t.Error(got.Status)
	}
}

// A client's phase may let it read from this socket alone, which the kernel knows as
// long as its other end is open: so that is closed after the client's.
func TestInsideClosesLast(t *testing.T) {
	r := startInside(t, three(), nil, limits{})
	c, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /v1/phase HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 200 OK\r\n") {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Errorf("closed before its client has: %v", err)
	}
}
