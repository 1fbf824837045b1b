// SPDX-License-Identifier: Apache-2.0

// Package e2e runs syslatchd against a real containerd with NRI, real runc
// (1.1 and 1.5) and the running kernel.
//
// SYSLATCH_TOOLS names the directory with containerd, ctr, its shim and runc
// 1.5; SYSLATCH_TEST_BIN one with syslatch, syslatchd and the workloads, which
// are built where it is not set.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

var (
	programs string         // directory of syslatch, syslatchd and workloads
	scratch  string         // of this run
	busybox  *harness.Image // with the workloads in /bin
)

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (_ int, err error) {
	if os.Getuid() != 0 {
		fmt.Println("skipped: containerd needs root")
		return 0, nil
	}
	if scratch, err = os.MkdirTemp("", fmt.Sprintf("syslatch-e2e-%d-", os.Getpid())); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	if programs = os.Getenv("SYSLATCH_TEST_BIN"); programs == "" {
		programs = filepath.Join(scratch, "bin")
		if err := build(programs); err != nil {
			return 0, err
		}
	}
	extra := map[string]string{}
	for _, name := range []string{"allcalls", "attacks"} {
		extra["bin/"+name] = filepath.Join(programs, name)
	}
	busybox, err = harness.Busybox(scratch, extra)
	if err != nil {
		return 0, err
	}
	before, err := leftovers()
	if err != nil {
		return 0, err
	}
	code := m.Run()
	if err := closeShared(); err != nil {
		return code, err
	}
	after, err := leftovers()
	if err != nil {
		return code, err
	}
	for _, x := range after {
		if !slices.Contains(before, x) {
			fmt.Fprintln(os.Stderr, "left behind:", x)
			code = 1
		}
	}
	return code, nil
}

func build(dir string) error {
	for _, b := range []struct {
		env  []string
		args []string
	}{
		{nil, []string{"go", "build", "-o", dir + "/", "../../cmd/syslatch", "../../cmd/syslatchd"}},
		// Workloads run in an image without libraries.
		{[]string{"CGO_ENABLED=0"}, []string{"go", "build", "-o", dir + "/", "../workloads/allcalls", "../workloads/goapp"}},
		{nil, []string{"gcc", "-O1", "-static", "-o", dir + "/attacks", "../workloads/attacks/attacks.c"}},
	} {
		cmd := exec.Command(b.args[0], b.args[1:]...)
		cmd.Env = append(os.Environ(), b.env...)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("build: %w", err)
		}
	}
	return nil
}

// leftovers lists what a test must not leave: cgroups, mounts, pins and
// processes of this run. Another run may be beside.
func leftovers() (out []string, err error) {
	ours := func(s string) bool {
		return strings.Contains(s, "/"+harness.Prefix()) || strings.Contains(s, fmt.Sprintf("/syslatch-e2e-%d-", os.Getpid()))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.SplitSeq(string(mounts), "\n") {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if ours(f[4]) {
			out = append(out, "mount "+f[4])
		}
		if strings.Contains(line, " - cgroup") {
			found, err := filepath.Glob(f[4] + "/" + harness.Prefix() + "*")
			if err != nil {
				return nil, err
			}
			out = append(out, found...)
		}
	}
	pins, err := filepath.Glob(fmt.Sprintf("/sys/fs/bpf/syslatch-e2e-%d*", os.Getpid()))
	if err != nil {
		return nil, err
	}
	out = append(out, pins...)
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	for _, c := range comms {
		name, err1 := os.ReadFile(c)
		args, err2 := os.ReadFile(filepath.Join(filepath.Dir(c), "cmdline"))
		if err1 != nil || err2 != nil {
			continue // it has ended; without arguments it has, too, and waits for its parent
		}
		if ours(string(args)) {
			out = append(out, filepath.Dir(c)+" "+strings.TrimSpace(string(name)))
		}
	}
	return out, nil
}

// env is a host with a syslatchd and its directories.
type env struct {
	*harness.Host
	t       *testing.T
	ctx     context.Context
	dir     string
	bpffs   string
	daemons []*daemon
}

// testTimeout bounds one test; the guest is some ten times slower.
const testTimeout = 5 * time.Minute

func newEnv(t *testing.T, o harness.Options) *env {
	t.Helper()
	var err error
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	e := &env{t: t, ctx: ctx, dir: t.TempDir()}
	mountBPFFS(t)
	e.bpffs = fmt.Sprintf("/sys/fs/bpf/syslatch-e2e-%d", os.Getpid())
	t.Cleanup(func() {
		if err := errors.Join(bpf.Remove(e.bpffs), bpf.RemoveEnforcer(e.bpffs+"-phases")); err != nil {
			t.Errorf("remove pins: %v", err)
		}
	})
	if !reflect.DeepEqual(o, harness.Options{}) {
		h, err := startHost(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
		e.Host = h
	} else if e.Host, err = sharedHost(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("containerd:\n%s", e.LogTail(60))
		}
		if e.Host != shared {
			return
		}
		err := e.RemovePods()
		if err != nil {
			t.Errorf("remove pods: %v", err)
		}
		if err != nil || t.Failed() {
			if err := closeShared(); err != nil { // what is wrong with it, if anything is, ends here
				t.Errorf("close: %v", err)
			}
		}
	})
	return e
}

// shared is the runtime of all tests that ask for no other: to start one takes longer
// than most tests. nil until the first asks for it. Tests are not parallel.
var shared *harness.Host

func sharedHost(ctx context.Context) (_ *harness.Host, err error) {
	if shared == nil {
		shared, err = startHost(ctx, harness.Options{})
	}
	return shared, err
}

func closeShared() error {
	if shared == nil {
		return nil
	}
	h := shared
	shared = nil
	return h.Close()
}

func startHost(ctx context.Context, o harness.Options) (*harness.Host, error) {
	h, err := harness.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := h.Import(ctx, busybox); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func mountBPFFS(t *testing.T) {
	t.Helper()
	unmount, err := harness.MountBPFFS()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
}

// policyFile is a policy file with this environment's directories.
func (e *env) policyFile(policies string) string {
	return fmt.Sprintf("apiVersion: syslatch.dev/v1\nstore: %s/store\nstateDir: %s/state\nbpffs: %s\nnri: {requestTimeout: 5s}\npolicies:\n%s",
		e.dir, e.dir, e.bpffs, policies)
}

// daemon is a syslatchd.
type daemon struct {
	t   *testing.T
	cmd *exec.Cmd
	log *lockedBuffer
}

// lockedBuffer is written by the process's copier and read by the test.
type lockedBuffer struct {
	mu      sync.Mutex
	b       bytes.Buffer
	written chan struct{} // guarded by mu: closed by the next write; nil if nobody waits
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.written != nil {
		close(l.written)
		l.written = nil
	}
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// From gives what was written from an offset on, and a channel that is closed when
// there is more.
func (l *lockedBuffer) From(offset int) (text string, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.written == nil {
		l.written = make(chan struct{})
	}
	return string(l.b.Bytes()[offset:]), l.written
}

// start starts syslatchd with policies and waits until containerd knows it.
func (e *env) start(policies string) *daemon {
	e.t.Helper()
	return e.startFrom(filepath.Join(programs, "syslatchd"), policies)
}

// startFrom is start with the syslatchd at a path.
func (e *env) startFrom(program, policies string) *daemon {
	e.t.Helper()
	path := filepath.Join(e.dir, "policy.yaml")
	if err := os.WriteFile(path, []byte(e.policyFile(policies)), 0o600); err != nil {
		e.t.Fatal(err)
	}
	d := &daemon{t: e.t, log: &lockedBuffer{}}
	d.cmd = exec.Command(program, "--config", path, "--nri-socket", e.NRISocket, "--log-level", "debug", "--log-format", "json")
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.daemons = append(e.daemons, d)
	e.t.Cleanup(func() {
		d.kill(syscall.SIGTERM)
		if e.t.Failed() {
			e.t.Logf("syslatchd:\n%s", d.log)
		}
	})
	d.waitLog("synchronized")
	return d
}

// kill ends the daemon and waits; harmless if it has ended.
func (d *daemon) kill(sig syscall.Signal) {
	d.t.Helper()
	if d.cmd.ProcessState != nil {
		return
	}
	_ = d.cmd.Process.Signal(sig)
	_ = d.cmd.Wait()
}

// waitLog waits for a message, and returns its fields.
func (d *daemon) waitLog(message string, match ...string) map[string]any {
	d.t.Helper()
	deadline := time.After(90 * time.Second)
	for offset := 0; ; {
		text, more := d.log.From(offset)
		whole := strings.LastIndexByte(text, '\n') + 1
		for line := range strings.Lines(text[:whole]) {
			var fields map[string]any
			if !strings.Contains(line, message) || json.Unmarshal([]byte(line), &fields) != nil || !strings.Contains(fmt.Sprint(fields["msg"]), message) {
				continue
			}
			if !slices.ContainsFunc(match, func(m string) bool { return !strings.Contains(line, m) }) {
				return fields
			}
		}
		offset += whole
		select {
		case <-deadline:
			d.t.Fatalf("syslatchd never logged %q %v:\n%s", message, match, d.log)
		case <-more:
		}
	}
}

func (e *env) store() *store.Store {
	e.t.Helper()
	s, err := store.Open(filepath.Join(e.dir, "store"), store.Options{ReadOnly: true})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { s.Close() })
	return s
}

// waitVersion waits until a workload has a version, and reads it.
func (e *env) waitVersion(d *daemon, workload string, n int) *profiles.Version {
	e.t.Helper()
	d.waitLog("version published", fmt.Sprintf(`"version":%d`, n), fmt.Sprintf(`"workload":%q`, workload))
	v, err := e.store().Version(workload, n)
	if err != nil {
		e.t.Fatal(err)
	}
	return v
}

// run runs a container in a pod of its own.
func (e *env) run(p harness.PodOptions, c harness.ContainerOptions) harness.Result {
	e.t.Helper()
	r, err := e.Host.Run(e.ctx, p, c)
	if err != nil {
		e.t.Fatal(err)
	}
	return r
}

func sh(script string) harness.ContainerOptions {
	return harness.ContainerOptions{Command: []string{"/bin/sh", "-c", script}}
}
