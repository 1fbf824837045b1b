// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/net/multiplex"
	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/adjust"
)

// dialEnv makes this test binary dial the socket that it names, and print what
// comes of it.
const dialEnv = "SYSLATCH_TEST_DIAL"

func TestMain(m *testing.M) {
	if path := os.Getenv(dialEnv); path != "" {
		p := &Plugin{}
		conn, err := p.dial(path)
		if err == nil {
			err = fmt.Errorf("connected to pid %d", p.peer.Load())
			conn.Close()
		}
		fmt.Println(err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// deafRuntime lets plugins register, and never configures them.
type deafRuntime struct{ registered chan struct{} }

func (r deafRuntime) RegisterPlugin(context.Context, *api.RegisterPluginRequest) (*api.Empty, error) {
	r.registered <- struct{}{}
	return &api.Empty{}, nil
}

func (r deafRuntime) UpdateContainers(context.Context, *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	return nil, errors.New("not here")
}

// serveDeaf serves one plugin at a socket, until the test ends.
func serveDeaf(t *testing.T) (path string, registered <-chan struct{}) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	r := deafRuntime{make(chan struct{}, 1)}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterRuntimeService(server, r)
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		server.Close()
		<-done
	})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		mux := multiplex.Multiplex(conn)
		defer mux.Close()
		listener, err := mux.Listen(multiplex.RuntimeServiceConn)
		if err != nil {
			t.Error(err)
			return
		}
		_ = server.Serve(context.Background(), listener) // ends when it is closed
	}()
	return path, r.registered
}

func runPlugin(t *testing.T, ctx context.Context, path string, wait time.Duration) <-chan error {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	agent := &fakeAgent{do: func(context.Context) (*adjust.Plan, error) { return nil, nil }}
	p, err := New(agent, logrus.NewEntry(log), Options{Socket: path, Name: "syslatch", Index: "10"})
	if err != nil {
		t.Fatal(err)
	}
	p.configureWait = wait
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	return ended
}

// waitsForConfigure returns when the stub has the answer to its registration: only
// its goroutine's stack tells.
func waitsForConfigure(t *testing.T) {
	t.Helper()
	waiting := regexp.MustCompile(`goroutine \d+ \[chan receive\]:\n\S*stub\.\(\*stub\)\.Start\(`)
	stacks := make([]byte, 1<<20)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); !waiting.Match(stacks[:runtime.Stack(stacks, true)]); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("the stub doesn't wait to be configured; does it still do so?")
		}
	}
}

// A runtime that dies, or is stopped, right after the registration must not make
// a daemon that can't be stopped.
func TestRunEndsWhileUnconfigured(t *testing.T) {
	path, registered := serveDeaf(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := runPlugin(t, ctx, path, time.Hour)
	<-registered
	waitsForConfigure(t)
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want the context's error", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Run outlives its context")
	}
}

// Nor one that waits for ever, connected to nothing.
func TestRunGivesUpUnconfigured(t *testing.T) {
	path, registered := serveDeaf(t)
	ended := runPlugin(t, t.Context(), path, 50*time.Millisecond)
	<-registered
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "did not configure") {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Run waits for ever")
	}
}

// In another pid namespace than the runtime's, the pids that it tells would be
// other processes.
func TestDialRefusesAnotherPIDNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a pid namespace needs root")
	}
	path := filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, tc := range map[string]struct {
		flags uintptr
		want  string
	}{
		"same":  {0, fmt.Sprintf("connected to pid %d", os.Getpid())},
		"other": {syscall.CLONE_NEWPID, "hostPID: true"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), dialEnv+"="+path)
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: tc.flags}
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), tc.want) {
				t.Errorf("got %q, %v, want %q", out, err, tc.want)
			}
		})
	}
}
