// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/phase"
)

// ErrNobody is wrapped where nobody listens at the socket.
var ErrNobody = errors.New("nobody listens there")

// Bounds of what a client takes from a server.
const (
	maxAnswer = 16 << 20
	maxEvent  = 1 << 20
)

// Client is a server's other side. Its errors are a *[Problem] where the server
// answered.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient doesn't connect yet.
func NewClient(socket string) *Client {
	return &Client{socket: socket, http: &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", socket)
			},
			MaxIdleConns:    4,
			IdleConnTimeout: 10 * time.Second, // less than the server's
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close closes connections that are kept for the next request.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// List gives all instances, by ID.
func (c *Client) List(ctx context.Context) ([]phase.Status, error) {
	var all List
	err := c.do(ctx, http.MethodGet, "/v1/instances", nil, &all)
	return all.Instances, err
}

// Get takes an ID, or the beginning of one.
func (c *Client) Get(ctx context.Context, id string) (s phase.Status, err error) {
	path, err := instancePath(id)
	if err != nil {
		return s, err
	}
	return s, c.do(ctx, http.MethodGet, path, nil, &s)
}

// SetOptions of a switch.
type SetOptions struct {
	// Generation, if not 0, has to be the instance's.
	Generation uint64
	// Timeout is the server's, for the switch; 0 is DefaultTimeout.
	Timeout time.Duration
}

// Set returns when the phase holds for every task, or Timeout is over. If ctx ends
// earlier, the switch goes on.
func (c *Client) Set(ctx context.Context, id, to string, o SetOptions) (s phase.Status, err error) {
	path, err := instancePath(id)
	if err != nil {
		return s, err
	}
	request := SetRequest{Phase: to}
	if o.Generation != 0 {
		request.Generation = &o.Generation
	}
	timeout := DefaultTimeout
	if o.Timeout != 0 {
		timeout, request.Timeout = o.Timeout, o.Timeout.String()
	}
	// A server that doesn't answer in time is told as what it is.
	ctx, cancel := context.WithTimeoutCause(ctx, timeout+5*time.Second, errors.New("the daemon doesn't answer, what it was asked for may still happen"))
	defer cancel()
	return s, c.do(ctx, http.MethodPut, path+"/phase", request, &s)
}

// Watch returns when it misses nothing from now on, for one instance until it ends or,
// if id is empty, for all. The events have to be read, or ctx ended; a watcher that is
// too slow gets an event of kind lost. They end without an error when the server stops.
func (c *Client) Watch(ctx context.Context, id string) (iter.Seq2[phase.Event, error], error) {
	path := eventsPattern
	if id != "" {
		path += "?" + url.Values{"instance": {id}}.Encode()
	}
	ctx, cancel := context.WithCancel(ctx)
	res, err := c.request(ctx, http.MethodGet, path, nil)
	if err != nil {
		cancel()
		return nil, err
	}
	return func(yield func(phase.Event, error) bool) {
		defer cancel()
		defer res.Body.Close()
		lines := bufio.NewScanner(res.Body)
		lines.Buffer(nil, maxEvent)
		for lines.Scan() {
			var e phase.Event
			err := json.Unmarshal(lines.Bytes(), &e)
			if err != nil {
				err = c.wrap(fmt.Errorf("event: %w", err))
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(phase.Event{}, c.wrap(err))
		}
	}, nil
}

func instancePath(id string) (string, error) {
	if id == "" || id == "." || id == ".." {
		return "", badRequest(fmt.Sprintf("%q is no instance", id))
	}
	return "/v1/instances/" + url.PathEscape(id), nil
}

func (c *Client) wrap(err error) error { return fmt.Errorf("socket %s: %w", c.socket, err) }

func (c *Client) do(ctx context.Context, method, path string, body, into any) error {
	res, err := c.request(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err == nil {
		err = json.Unmarshal(data, into)
	}
	if err != nil {
		return c.wrap(fmt.Errorf("answer: %w", err))
	}
	return nil
}

// request returns an answer that is good.
func (c *Client) request(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var reader io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		reader = bytes.NewReader(data)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://syslatch"+path, reader)
	if err != nil {
		return nil, err
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(r)
	if err != nil {
		var wrapped *url.Error // of a URL that is nowhere
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
			err = fmt.Errorf("%w: %w", ErrNobody, err)
		}
		if why := context.Cause(ctx); why != nil && !errors.Is(err, why) {
			err = fmt.Errorf("%w: %w", why, err)
		}
		return nil, c.wrap(err)
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	return nil, readProblem(res)
}

func readProblem(res *http.Response) error {
	data, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil && len(data) == 0 {
		return err
	}
	kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type")) // none is another
	p := &Problem{}
	if kind == "application/problem+json" && json.Unmarshal(data, p) == nil && p.Type != "" {
		p.Status = res.StatusCode
		return p
	}
	detail := strings.TrimSpace(string(data[:min(len(data), 200)]))
	return &Problem{Type: "about:blank", Title: http.StatusText(res.StatusCode), Status: res.StatusCode, Detail: fmt.Sprintf("the server answered %s: %.200q", res.Status, detail)}
}
