// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// asClient is set in a process that sends what it reads to the socket of that path, and
// prints what comes back.
const asClient = "SYSLATCH_TEST_API_CLIENT"

func TestMain(m *testing.M) {
	if socket := os.Getenv(asClient); socket != "" {
		if err := relay(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	fds := openFiles()
	code := m.Run()
	if left := leaks(fds); left != "" {
		fmt.Fprintln(os.Stderr, "FAIL: leaked:", left)
		code = 1
	}
	os.Exit(code)
}

func relay(socket string) error {
	request, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	_, writeErr := c.Write(request) // a server that refuses doesn't read
	if _, err := io.Copy(os.Stdout, c); err != nil && !errors.Is(err, unix.ECONNRESET) {
		return errors.Join(writeErr, err)
	}
	return nil
}

// relayAs is relay in a process of another user.
func relayAs(t *testing.T, uid uint32, socket, request string) (pid int, answer string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{asClient + "=" + socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Stdin = strings.NewReader(request)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	return cmd.Process.Pid, string(out)
}

func openFiles() []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err == nil && !strings.HasPrefix(target, "/proc/") {
			out = append(out, e.Name()+" "+target)
		}
	}
	return out
}

// leaks waits for what is ending: goroutines of connections that were closed.
func leaks(before []string) string {
	deadline := time.Now().Add(5 * time.Second)
	for {
		var stacks bytes.Buffer
		_ = pprof.Lookup("goroutine").WriteTo(&stacks, 1)
		fds := slices.DeleteFunc(openFiles(), func(f string) bool {
			return slices.Contains(before, f) || strings.Contains(f, "anon_inode:") // the runtime's poller
		})
		ours := slices.ContainsFunc(strings.Split(stacks.String(), "\n\n"), func(g string) bool {
			return (strings.Contains(g, "internal/api.") || strings.Contains(g, "net/http.")) && !strings.Contains(g, "api.leaks+")
		})
		if !ours && len(fds) == 0 {
			return ""
		}
		if time.Now().After(deadline) {
			return fmt.Sprintf("%v\n%s", fds, stacks.String())
		}
		runtime.Gosched()
	}
}

// journal is a log to read.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

func (j *journal) entry() *logrus.Entry {
	logger := logrus.New()
	logger.SetOutput(j)
	return logrus.NewEntry(logger)
}

// running is a server of a test.
type running struct {
	t      *testing.T
	socket string
	log    *journal
	cancel context.CancelFunc
	done   chan error
	http   *http.Client
}

// start serves on a socket with mode until the test ends.
func start(t *testing.T, mode os.FileMode, serve func(context.Context, *Listener, *logrus.Entry) error) *running {
	t.Helper()
	dir := t.TempDir()
	r := &running{t: t, socket: filepath.Join(dir, "s"), log: &journal{}, done: make(chan error, 1)}
	l, err := Listen(r.socket, mode)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.http = &http.Client{Transport: checked{t, &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", r.socket) },
	}}}
	go func() { r.done <- serve(ctx, l, r.log.entry()) }()
	t.Cleanup(func() {
		r.http.CloseIdleConnections()
		r.stop()
	})
	return r
}

func (r *running) stop() {
	if r.cancel == nil {
		return
	}
	r.cancel()
	r.cancel = nil
	if err := <-r.done; err != nil {
		r.t.Error(err)
	}
}

type answered struct {
	*http.Response
	body string
}

func (r *running) do(method, path, body string, header ...string) answered {
	r.t.Helper()
	q, err := http.NewRequest(method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		q.Header.Add(header[i], header[i+1])
	}
	res, err := r.http.Do(q)
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return answered{res, string(data)}
}

// raw sends bytes and reads until the server closes.
func (r *running) raw(request string) string {
	r.t.Helper()
	c, err := net.Dial("unix", r.socket)
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, request) // a server that refuses doesn't read all
	data, err := io.ReadAll(c)
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		r.t.Fatal(err)
	}
	return string(data)
}
