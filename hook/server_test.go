// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// asUser is set in a process that is a rootless hook: its value is the socket's path.
const asUser = "SYSLATCH_TEST_ROOTLESS"

func TestMain(m *testing.M) {
	socket := os.Getenv(asUser)
	if socket == "" {
		os.Exit(m.Run())
	}
	h, _ := newHook(Remote{Socket: socket, Why: errors.New("rootless can't"), Check: func(profile, own *specs.LinuxSeccomp) error {
		if own == nil || profile.DefaultAction == specs.ActKill {
			return errors.New("libseccomp refuses it")
		}
		return nil
	}})
	var err error
	switch stage := os.Args[1]; stage {
	case StagePrecreate:
		err = h.Precreate(context.Background(), os.Stdin, os.Stdout)
	case StageCreateRuntime:
		err = h.CreateRuntime(context.Background(), os.Stdin)
	case StagePoststart:
		err = h.Poststart(context.Background(), os.Stdin)
	case StagePoststop:
		err = h.Poststop(context.Background(), os.Stdin)
	case "raw": // what is on standard input, as it is
		var conn net.Conn
		if conn, err = net.Dial("unix", socket); err == nil {
			if _, err = io.Copy(conn, os.Stdin); err == nil {
				err = conn.(*net.UnixConn).CloseWrite()
			}
			_, copyErr := io.Copy(os.Stdout, toReset{conn})
			err = errors.Join(err, copyErr)
		}
	case "hold": // connections, until standard input ends
		for range maxOpen {
			if _, dialErr := net.Dial("unix", socket); dialErr != nil {
				err = dialErr
			}
		}
		fmt.Println("holds")
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// The users of these tests, who need no entry in /etc/passwd.
const (
	listed   = 59901
	listed2  = 59902
	unlisted = 59903
)

// serving is a server with an agent for all.
type serving struct {
	t      *testing.T
	socket string
	agent  *fakeAgent
	log    *bytes.Buffer

	mu    sync.Mutex
	users []policy.User // of each request
	pids  []int
}

func serve(t *testing.T, users ...string) *serving {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("other users' processes take root")
	}
	dir, err := os.MkdirTemp("/run", "syslatch-hook-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &serving{t: t, socket: dir + "/hook.sock", agent: &fakeAgent{}, log: &bytes.Buffer{}}
	l, err := Listen(s.socket, dir)
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(s.log) // logrus locks
	server := &Server{Users: users, Log: logrus.NewEntry(log), Agent: func(u policy.User, pid int) Agent {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.users, s.pids = append(s.users, u), append(s.pids, pid)
		if s.agent.panics {
			panic("oh")
		}
		if s.agent.hangs != nil {
			return &fakeAgent{hangs: s.agent.hangs}
		}
		return s.agent
	}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(s.socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket left behind: %v", err)
		}
	})
	return s
}

// hook is a hook of a user.
func (s *serving) hook(uid uint32, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(s.t.Context(), "/proc/self/exe", args...) // its directory is root's alone
	cmd.Env = []string{asUser + "=" + s.socket}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (s *serving) run(uid uint32, stdin string, args ...string) (stdout, stderr string, err error) {
	cmd := s.hook(uid, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// rootlessSpec has annotations, and no file of podman's that root could read.
func rootlessSpec(annotations string) string {
	s := strings.NewReplacer("/var/lib/containers", "/nonexistent", "18446744073709551615", "-1", "1e400", "1").Replace(spec)
	return strings.Replace(s, `"io.container.manager": "libpod"`, `"io.container.manager": "libpod"`+annotations, 1)
}

const (
	asks  = `, "syslatch.dev/mode": "record"`
	other = `, "other": "x"`
)

func TestServer(t *testing.T) {
	s := serve(t, fmt.Sprint(listed))
	s.agent.plan = &adjust.Plan{
		Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActTrap}, OOMScoreAdj: ptr(7),
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: ^uint64(0)}},
		Expect:  []adjust.Expectation{{Stage: adjust.StageRunning}},
	}
	out, stderr, err := s.run(listed, rootlessSpec(asks+other), StagePrecreate)
	if err != nil {
		t.Fatal(err, stderr)
	}
	var got specs.Spec
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err, out)
	}
	if got.Linux.Seccomp.DefaultAction != specs.ActTrap || *got.Process.OOMScoreAdj != 7 || len(got.Hooks.Poststart) != 1 || len(got.Hooks.CreateRuntime) != 1 || got.Annotations[plannedAnnotation] == "" {
		t.Errorf("%s", out)
	}
	want := policy.Container{
		ID: id, CgroupsPath: s.agent.planned.CgroupsPath, Annotations: map[string]string{"syslatch.dev/mode": "record"},
		Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActErrno},
	}
	if diff := cmp.Diff(want, s.agent.planned); diff != "" || want.CgroupsPath == "" {
		t.Errorf("planned (-want +got):\n%s", diff)
	}
	bundle := t.TempDir()
	for dir := bundle; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(bundle+"/config.json", []byte(rootlessSpec(asks)), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, stage := range []string{StageCreateRuntime, StagePoststart, StagePoststop} {
		if _, stderr, err := s.run(listed, `{"id":"abc","pid":7,"bundle":"`+bundle+`"}`, stage); err != nil {
			t.Errorf("%s: %v, %s", stage, err, stderr)
		}
	}
	if got := strings.Join(s.agent.seen, ","); got != "created abc,started abc,stopped abc" {
		t.Errorf("events %s", got)
	}
	if c, _, err := s.agent.facts(); err != nil || c.ID != "abc" || c.Seccomp == nil {
		t.Errorf("facts %+v, %v", c, err)
	}
	for i, u := range s.users {
		if u.UID != listed || u.Name != "" || s.pids[i] <= 0 || s.pids[i] == os.Getpid() {
			t.Errorf("user %+v, pid %d", u, s.pids[i])
		}
	}

	s.agent.plan.Seccomp.DefaultAction = specs.ActKill
	if out, _, err = s.run(listed, rootlessSpec(""), StagePrecreate); err != nil || !strings.Contains(out, "deny") || !strings.Contains(out, "libseccomp refuses it") {
		t.Errorf("bad profile: %v, %s", err, out)
	}

	// An error reaches whoever started the container, by each stage's rules.
	s.agent.err = errors.New("the policy says no")
	out, _, err = s.run(listed, rootlessSpec(""), StagePrecreate)
	if err != nil || !strings.Contains(out, "deny") || !strings.Contains(out, "the policy says no") {
		t.Errorf("precreate: %v, %s", err, out)
	}
	for _, stage := range []string{StageCreateRuntime, StagePoststart, StagePoststop} {
		if _, stderr, err := s.run(listed, `{"id":"abc","pid":7}`, stage); err == nil || !strings.Contains(stderr, "the policy says no") {
			t.Errorf("%s: %v, %q", stage, err, stderr)
		}
	}
	s.agent.panics = true
	if out, _, err = s.run(listed, rootlessSpec(""), StagePrecreate); err != nil || !strings.Contains(out, "internal error: oh") {
		t.Errorf("panic: %v, %s", err, out)
	}
	s.agent.panics = false
	big := rootlessSpec(`, "syslatch.dev/mode": "` + strings.Repeat("x", maxRequest) + `"`)
	if out, _, err = s.run(listed, big, StagePrecreate); err != nil || !strings.Contains(out, fmt.Sprintf("syslatchd takes %d", maxRequest)) {
		t.Errorf("big: %v, %.300s", err, out)
	}
}

// A user who isn't listed, and anyone where nobody serves, is refused what was asked
// for, and else left alone.
func TestServerUnserved(t *testing.T) {
	s := serve(t, fmt.Sprint(listed))
	gone := &serving{t: t, socket: s.socket + "-none"}
	stale := &serving{t: t, socket: s.socket + "-stale"}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(l.Close(), os.Chmod(stale.socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		at   *serving
		uid  uint32
		says string
	}{
		"not listed":  {s, unlisted, fmt.Sprintf("uid %d is not one of hook.rootless.users", unlisted)},
		"no socket":   {gone, listed, gone.socket + ": connect: no such file or directory"},
		"nobody's":    {stale, listed, stale.socket + ": connect: connection refused"},
		"root itself": {s, 0, "root (uid 0) is not one of hook.rootless.users"},
	} {
		t.Run(name, func(t *testing.T) {
			plain := rootlessSpec("")
			if out, stderr, err := c.at.run(c.uid, plain, StagePrecreate); err != nil || out != plain {
				t.Errorf("left alone: %v, %s, %s", err, stderr, out)
			}
			for _, annotation := range []string{asks, `, "io.containers.trace-syscall": "of:/x"`} {
				out, stderr, err := c.at.run(c.uid, rootlessSpec(annotation), StagePrecreate)
				for _, says := range []string{"deny", "rootless can't", "start it with hook: {rootless: {users: [NAME]}}", c.says} {
					if err != nil || !strings.Contains(out, says) {
						t.Errorf("%s: %v, %s, no %q in %s", annotation, err, stderr, says, out)
					}
				}
			}
			for _, stage := range []string{StageCreateRuntime, StagePoststart, StagePoststop} {
				if _, stderr, err := c.at.run(c.uid, `{"id":"abc","pid":7}`, stage); err != nil {
					t.Errorf("%s: %v, %s", stage, err, stderr)
				}
			}
		})
	}
	if len(s.users) != 0 || len(s.agent.seen) != 0 {
		t.Errorf("served %v, %v", s.users, s.agent.seen)
	}
}

func TestServerByName(t *testing.T) {
	s := serve(t, "nobody")
	if out, stderr, err := s.run(65534, rootlessSpec(asks), StagePrecreate); err != nil || strings.Contains(out, "deny") {
		t.Fatal(err, stderr, out)
	}
	if want := (policy.User{UID: 65534, Name: "nobody"}); len(s.users) != 1 || s.users[0] != want {
		t.Errorf("got %v", s.users)
	}
}

// What is no request is answered with an error, and nothing of it reaches an agent.
func TestServerHostileInput(t *testing.T) {
	s := serve(t, fmt.Sprint(listed))
	for name, c := range map[string]struct{ in, says string }{
		"empty":         {"", "unexpected EOF"},
		"no JSON":       {"GET / HTTP/1.0\r\n\r\n", "invalid character"},
		"truncated":     {`{"stage":"precreate"`, "unexpected EOF"},
		"array":         {`[]`, "is no JSON object"},
		"twice":         {`{"stage":"precreate"}{}`, "something follows"},
		"duplicate":     {`{"pid":1,"pid":2}`, `\"pid\" is repeated`},
		"deep":          {strings.Repeat(`{"a":`, maxDepth+1), "nested deeper"},
		"unknown field": {`{"stage":"precreate","pid":1,"uid":0}`, `unknown field \"uid\"`},
		"user's word":   {`{"stage":"precreate","pid":1,"container":{"id":"a","user":{"uid":0}}}`, `unknown field \"user\"`},
		"wrong type":    {`{"pid":"1"}`, "cannot unmarshal"},
		"another's pid": {`{"stage":"precreate","pid":1,"container":{"id":"a"}}`, "runs in another pid namespace"},
		"huge":          {`{"stage":"` + strings.Repeat("x", 4*maxRequest) + `"}`, fmt.Sprintf("more than %d bytes", maxRequest)},
	} {
		out, stderr, err := s.run(listed, c.in, "raw")
		if name == "huge" {
			err = nil // it isn't read to its end, which the sender may notice
		}
		if err != nil || !strings.Contains(out, c.says) || !strings.Contains(out, `"error":`) {
			t.Errorf("%s: %v, %s, got %.300s", name, err, stderr, out)
		}
	}
	if s.agent.planned.ID != "" || len(s.agent.seen) != 0 {
		t.Errorf("reached the agent: %+v", s.agent)
	}
}

// One user's connections don't keep others' waiting.
func TestServerShares(t *testing.T) {
	s := serve(t, fmt.Sprint(listed), fmt.Sprint(listed2))
	cmd := s.hook(listed, "hold")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	if line, err := io.ReadAll(io.LimitReader(stdout, 6)); err != nil || string(line) != "holds\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if out, stderr, err := s.run(listed2, rootlessSpec(asks), StagePrecreate); err != nil || strings.Contains(out, "deny") {
		t.Errorf("another user: %v, %s, %s", err, stderr, out)
	}
	out, stderr, err := s.run(listed, rootlessSpec(asks), StagePrecreate)
	if err != nil || !strings.Contains(out, fmt.Sprintf("has %d connections already", maxOpen)) {
		t.Errorf("the same user: %v, %s, %s", err, stderr, out)
	}
}

// A stage that hangs keeps its place, and no more than its user's.
func TestServerStageHangs(t *testing.T) {
	s := serve(t, fmt.Sprint(listed), fmt.Sprint(listed2))
	hangs := make(chan struct{})
	s.agent.hangs = hangs
	var hooks []*exec.Cmd
	for range maxServed {
		cmd := s.hook(listed, StagePrecreate)
		cmd.Stdin = strings.NewReader(rootlessSpec(asks))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		hooks = append(hooks, cmd)
	}
	deadline := time.Now().Add(time.Minute)
	served := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.users)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for served() < maxServed {
		if time.Now().After(deadline) {
			t.Fatalf("%d served", served())
		}
		<-tick.C
	}
	// Stopped doesn't hang in this agent.
	if _, stderr, err := s.run(listed2, `{"id":"abc","pid":7}`, StagePoststop); err != nil {
		t.Errorf("another user: %v, %s", err, stderr)
	}
	close(hangs)
	for _, cmd := range hooks {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

func TestListen(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("directories must be root's")
	}
	top, err := os.MkdirTemp("/run", "syslatch-hook-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(top)
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	mkdir := func(name string, mode os.FileMode, uid int) string {
		t.Helper()
		dir := filepath.Join(top, name)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, mode), os.Chown(dir, uid, 0)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	good := mkdir("good", 0o711, 0)
	mkdir("others/below", 0o755, 0)
	mkdir("others", 0o777, 0)
	mkdir("sticky/below", 0o755, 0)
	mkdir("sticky", 0o777|os.ModeSticky, 0)
	mkdir("user", 0o755, listed)
	mkdir("shut", 0o700, 0)
	if err := errors.Join(os.Symlink(good, top+"/link"), os.WriteFile(good+"/file", []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, says := range map[string]string{
		"good/s": "", "sticky/below/s": "",
		"others/s": "others than root can write", "others/below/s": "others than root can write", "sticky/s": "others than root can write",
		"user/s": "others than root can write", "shut/s": "chmod o+x", "link/s": "name the directory itself", "none/s": "no such file",
		"good/file": "something else is there",
	} {
		l, err := Listen(filepath.Join(top, name), "/run/none")
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want %q", name, err, says)
		}
		if err == nil {
			l.Close()
		}
	}
	if data, err := os.ReadFile(good + "/file"); err != nil || string(data) != "x" {
		t.Errorf("file: %q, %v", data, err)
	}

	// Our own directory is opened; a socket that somebody listens at is left alone,
	// and one that nobody does is replaced.
	own := top + "/shut"
	path := own + "/s"
	first, err := Listen(path, own)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(own); err != nil || st.Mode().Perm() != 0o711 {
		t.Errorf("own directory: %v, %v", st.Mode(), err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o666 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	if _, err := Listen(path, own); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("second: %v", err)
	}
	first.SetUnlinkOnClose(false)
	first.Close()
	second, err := Listen(path, own)
	if err != nil {
		t.Fatal("stale:", err)
	}
	second.Close()
}

// A daemon that planned a container and is gone by createRuntime fails it; one that
// it left alone starts.
func TestRemoteIsGone(t *testing.T) {
	h, _ := newHook(Remote{Socket: t.TempDir() + "/none", Why: errors.New("rootless can't")})
	for annotation, says := range map[string]string{plannedAnnotation: "start the container again", "other": ""} {
		bundle := t.TempDir()
		spec := strings.Replace(spec, `"io.container.manager"`, `"`+annotation+`": "true", "io.container.manager"`, 1)
		if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(spec), 0o600); err != nil {
			t.Fatal(err)
		}
		err := h.CreateRuntime(t.Context(), strings.NewReader(`{"id":"abc","pid":7,"bundle":"`+bundle+`"}`))
		if (err != nil) != (says != "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", annotation, err, says)
		}
	}
}
