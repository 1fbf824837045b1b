// SPDX-License-Identifier: Apache-2.0

// Package workloads describes real programs: how to run each in the image of
// package images, how to load it, and what it answers. Loads are bounded, and a
// workload's answers are the same on every run, so that a run under enforcement
// can be held against the recorded one.
package workloads

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Paths in the container: the folder of this package, and that of the built
// programs. The runner mounts them.
const (
	Scripts  = "/workloads"
	Programs = "/programs"
)

// Ports on 127.0.0.1, the host's own: pods are on its network. They lie below
// the range from which the kernel hands out ports.
const (
	nginxPort = "18080"
	redisPort = "18379"
)

// Side runs a program of the image in a container that isn't recorded or
// confined, and returns its output.
type Side func(command ...string) (string, error)

// Workload is a program and its load.
type Workload struct {
	Name    string
	Command []string
	// Load waits until the program serves, loads it, and returns its answers. Nil
	// for a program that ends by itself: what it has printed are its answers.
	Load func(ctx context.Context, side Side) (answers string, err error)
}

// All are the workloads.
var All = []Workload{
	{Name: "sh", Command: []string{"/bin/sh", Scripts + "/app.sh"}},
	{Name: "goapp", Command: []string{Programs + "/goapp"}},
	{Name: "python", Command: []string{"/usr/bin/python3", Scripts + "/app.py"}},
	{Name: "node", Command: []string{"/usr/bin/node", Scripts + "/app.js"}},
	{Name: "nginx", Command: []string{"/usr/sbin/nginx", "-c", Scripts + "/nginx.conf"}, Load: loadNginx},
	{Name: "redis", Command: []string{
		"/usr/bin/redis-server", "--bind", "127.0.0.1", "--port", redisPort, "--dir", "/tmp",
		// Every write is synced: with "everysec" the first sync comes with time,
		// not with the load.
		"--appendonly", "yes", "--appendfsync", "always",
	}, Load: loadRedis},
}

// Engine runs containers of the workloads' image, on the host's network, with
// Scripts and Programs mounted.
type Engine interface {
	// Start starts a container in a mode of syslatch's.
	Start(ctx context.Context, mode, name string, command ...string) (Container, error)
}

// Container is a container that was started.
type Container interface {
	// Wait waits for its end; output is what it printed.
	Wait(ctx context.Context) (code int, output string, err error)
	// Stop sends SIGTERM, and SIGKILL if that doesn't end it.
	Stop(ctx context.Context) error
	Remove(ctx context.Context) error
}

// Run runs a container to its end.
func Run(ctx context.Context, e Engine, mode, name string, command ...string) (code int, output string, err error) {
	c, err := e.Start(ctx, mode, name, command...)
	if err != nil {
		return 0, "", err
	}
	// ctx may have ended.
	defer func() { err = errors.Join(err, c.Remove(context.WithoutCancel(ctx))) }()
	return c.Wait(ctx)
}

// Answers runs the workload with its load in a mode. That it ended otherwise than
// it should is an error.
func (w Workload) Answers(ctx context.Context, e Engine, mode string) (answers string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	if w.Load == nil {
		code, output, err := Run(ctx, e, mode, w.Name, w.Command...)
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d: %s", code, output)
		}
		return output, err
	}
	c, err := e.Start(ctx, mode, w.Name, w.Command...)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, c.Remove(context.WithoutCancel(ctx))) }()
	// A program that ends during its load can't answer: don't wait for it.
	loading, ended := context.WithCancelCause(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		if code, output, err := c.Wait(loading); err == nil {
			ended(fmt.Errorf("ended with code %d: %s", code, output))
		}
	})
	answers, err = w.Load(loading, func(command ...string) (string, error) {
		code, output, err := Run(ctx, e, "off", "side", command...)
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d", code)
		}
		return output, err
	})
	if err != nil {
		err = errors.Join(err, context.Cause(loading))
	}
	ended(nil)
	watch.Wait()
	if err != nil {
		return "", err
	}
	if err := c.Stop(ctx); err != nil {
		return "", fmt.Errorf("stop: %w", err)
	}
	code, output, err := c.Wait(ctx)
	if err == nil && code != 0 && code != 128+int(syscall.SIGTERM) {
		err = fmt.Errorf("stopped, it ended with code %d: %s", code, output)
	}
	return answers, err
}

// dial waits for a port to accept.
func dial(ctx context.Context, port string) (net.Conn, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:"+port)
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("nothing listens on port %s: %w", port, err)
		case <-tick.C:
		}
	}
}

func loadNginx(ctx context.Context, _ Side) (string, error) {
	c, err := dial(ctx, nginxPort)
	if err != nil {
		return "", err
	}
	c.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
	defer client.CloseIdleConnections()
	upload := strings.Repeat("x", 64<<10)
	requests := []struct{ method, path, body string }{
		{"GET", "/text", ""},
		{"GET", "/sort", ""}, // a file, by sendfile
		{"GET", "/absent", ""},
		{"HEAD", "/sort", ""},
		{"GET", "/proxy/sort", ""},
		{"POST", "/upload", upload},
	}
	answers := make([]string, len(requests))
	for i, q := range requests {
		// 40 times each, 8 at once; all answers of a request must be equal.
		var mu sync.Mutex
		var all sync.WaitGroup
		var failed error
		for range 8 {
			all.Go(func() {
				for range 5 {
					got, err := ask(ctx, client, q.method, q.path, q.body)
					mu.Lock()
					switch {
					case err != nil:
						failed = err
					case answers[i] == "":
						answers[i] = got
					case answers[i] != got:
						failed = fmt.Errorf("%s %s: %s, then %s", q.method, q.path, answers[i], got)
					}
					mu.Unlock()
				}
			})
		}
		all.Wait()
		if failed != nil {
			return "", failed
		}
	}
	return strings.Join(answers, "\n"), nil
}

func ask(ctx context.Context, client *http.Client, method, path, body string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://127.0.0.1:"+nginxPort+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	a, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer a.Body.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, a.Body)
	return fmt.Sprintf("%s %s: %d, %d bytes, %.8x", method, path, a.StatusCode, n, sum.Sum(nil)), err
}

func loadRedis(ctx context.Context, side Side) (string, error) {
	c, err := dial(ctx, redisPort)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return "", err
		}
	}
	in := bufio.NewReader(c)
	out, err := side("/usr/bin/redis-benchmark", "-h", "127.0.0.1", "-p", redisPort,
		"-q", "-n", "1000", "-c", "20", "-r", "100", "-t", "set,get,incr,lpush,lpop,sadd,hset,zadd,mset")
	if err != nil {
		return "", fmt.Errorf("redis-benchmark: %w\n%s", err, out)
	}
	if n := strings.Count(out, "requests per second"); n != 9 {
		return "", fmt.Errorf("redis-benchmark has %d results, want 9:\n%s", n, out)
	}
	var answers []string
	for _, command := range []string{
		"FLUSHALL", "SET a 41", "INCR a", "GET a", "RPUSH l x y z", "LLEN l", "DBSIZE",
		`EVAL "return redis.call('get','a')" 0`, "SAVE", "BGSAVE",
	} {
		a, err := redis(c, in, command)
		if err != nil {
			return "", fmt.Errorf("%s: %w", command, err)
		}
		answers = append(answers, command+" -> "+a)
	}
	// The child that saves must have ended well, and so must the one that
	// rewrites the log, which can't run beside it.
	for _, wait := range []struct{ before, until, ok string }{
		{"", "rdb_bgsave_in_progress:0", "rdb_last_bgsave_status:ok"},
		{"BGREWRITEAOF", "aof_rewrite_in_progress:0", "aof_last_bgrewrite_status:ok"},
	} {
		if wait.before != "" {
			if _, err := redis(c, in, wait.before); err != nil {
				return "", fmt.Errorf("%s: %w", wait.before, err)
			}
		}
		tick := time.NewTicker(20 * time.Millisecond)
		for {
			info, err := redis(c, in, "INFO persistence")
			if err != nil {
				tick.Stop()
				return "", err
			}
			if strings.Contains(info, wait.until) && strings.Contains(info, "aof_rewrite_scheduled:0") {
				answers = append(answers, fmt.Sprint(wait.ok, " ", strings.Contains(info, wait.ok)))
				break
			}
			<-tick.C
		}
		tick.Stop()
	}
	return strings.Join(answers, "\n"), nil
}

// redis sends an inline command and reads a status, a number or a string.
func redis(c net.Conn, in *bufio.Reader, command string) (string, error) {
	if _, err := fmt.Fprintf(c, "%s\r\n", command); err != nil {
		return "", err
	}
	line, err := in.ReadBytes('\n')
	if err != nil {
		return "", err
	}
	line = bytes.TrimRight(line, "\r\n")
	if bytes.HasPrefix(line, []byte("-")) {
		return "", fmt.Errorf("redis answers %s", line)
	}
	if len(line) == 0 || line[0] != '$' {
		return string(line), nil
	}
	var n int
	if _, err := fmt.Sscan(string(line[1:]), &n); err != nil || n < 0 {
		return string(line), err
	}
	data := make([]byte, n+2)
	_, err = io.ReadFull(in, data)
	return string(data[:n]), err
}
