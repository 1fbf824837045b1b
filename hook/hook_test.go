// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// fakeAgent answers with what a test gives it.
type fakeAgent struct {
	plan    *adjust.Plan
	err     error
	panics  bool
	hangs   chan struct{} // nil: it doesn't
	planned policy.Container
	facts   Facts
	seen    []string
}

func (a *fakeAgent) Plan(_ context.Context, c policy.Container, _ adjust.Runtime) (*adjust.Plan, error) {
	if a.panics {
		panic("oh")
	}
	if a.hangs != nil {
		<-a.hangs
	}
	a.planned = c
	return a.plan, a.err
}

func (a *fakeAgent) Created(_ context.Context, id string, pid int, facts Facts) error {
	a.seen, a.facts = append(a.seen, "created "+id), facts
	return a.err
}

func (a *fakeAgent) Started(_ context.Context, id string, pid int) error {
	a.seen = append(a.seen, "started "+id)
	return a.err
}

func (a *fakeAgent) Stopped(_ context.Context, id string) error {
	a.seen = append(a.seen, "stopped "+id)
	return a.err
}

func (a *fakeAgent) Collect(context.Context) { a.seen = append(a.seen, "collect") }

func newHook(a Agent) (*Hook, *bytes.Buffer) {
	var log bytes.Buffer
	l := logrus.New()
	l.SetOutput(&log)
	return &Hook{Agent: a, Log: logrus.NewEntry(l), Self: "/usr/bin/syslatch-hook", Args: []string{"--config", "/p.yaml"}}, &log
}

func precreate(t *testing.T, h *Hook) specs.Spec {
	t.Helper()
	var out bytes.Buffer
	in := strings.NewReplacer("18446744073709551615", "-1", "1e400", "1").Replace(spec) // what specs.Spec takes
	if err := h.Precreate(t.Context(), strings.NewReader(in), &out); err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(out.Bytes(), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestPrecreate(t *testing.T) {
	a := &fakeAgent{plan: &adjust.Plan{
		Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActTrap},
		Expect:  []adjust.Expectation{{Stage: adjust.StageRunning}},
	}}
	h, _ := newHook(a)
	s := precreate(t, h)
	if s.Linux.Seccomp.DefaultAction != specs.ActTrap || len(s.Hooks.CreateRuntime) != 1 {
		t.Errorf("%+v", s)
	}
	// Something to read back once the program runs.
	if got := s.Hooks.Poststart; len(got) != 1 || strings.Join(got[0].Args, " ") != "syslatch-hook poststart --config /p.yaml" {
		t.Errorf("poststart %+v", got)
	}
	if a.planned.ID != id || a.planned.Seccomp == nil || a.planned.Annotations["io.container.manager"] != "libpod" {
		t.Errorf("planned %+v", a.planned)
	}
	// The program's start is news to a recording.
	a.plan.Expect, a.plan.Record = nil, true
	if got := precreate(t, h).Hooks.Poststart; len(got) != 1 {
		t.Errorf("recorded: poststart %+v", got)
	}
	a.plan.Record = false
	if got := precreate(t, h).Hooks.Poststart; len(got) != 0 {
		t.Errorf("neither: poststart %+v", got)
	}
	a.plan = nil
	var same bytes.Buffer
	if err := h.Precreate(t.Context(), strings.NewReader(spec), &same); err != nil || same.String() != spec {
		t.Errorf("left alone: %v, %s", err, &same)
	}
	if s := precreate(t, h); s.Linux.Seccomp.DefaultAction != specs.ActErrno || len(s.Hooks.Poststart) != 0 {
		t.Errorf("left alone: %+v", s)
	}
}

// A container that must not start gets a spec that fails with the reason.
func TestPrecreateDenies(t *testing.T) {
	for name, a := range map[string]*fakeAgent{
		"error": {plan: &adjust.Plan{Seccomp: &specs.LinuxSeccomp{}}, err: errors.New("bad\n\x1b[31mred " + strings.Repeat("é", 4000))},
		"panic": {panics: true},
	} {
		h, log := newHook(a)
		s := precreate(t, h)
		first := s.Hooks.CreateRuntime[0]
		if len(s.Hooks.CreateRuntime) != 2 || first.Path != h.Self || strings.Join(first.Args[:5], " ") != "syslatch-hook deny --config /p.yaml --" {
			t.Errorf("%s: %+v", name, s.Hooks)
		}
		prestart := s.Hooks.Prestart //nolint:staticcheck // runtimes from before createRuntime run it
		if len(prestart) != 1 || prestart[0].Path != h.Self || !slices.Equal(prestart[0].Args, first.Args) {
			t.Errorf("%s: prestart %+v", name, prestart)
		}
		message := first.Args[5]
		if len(first.Args) != 6 || len(message) > 2100 || strings.ContainsAny(message, "\n\x1b") || !strings.Contains(message, map[string]string{"error": "bad;", "panic": "internal error: oh"}[name]) {
			t.Errorf("%s: message %q", name, message)
		}
		if s.Linux.Seccomp.DefaultAction != specs.ActErrno {
			t.Errorf("%s: spec was changed", name)
		}
		if !strings.Contains(log.String(), "container refused") {
			t.Errorf("%s: not logged: %s", name, log)
		}
	}
	h, _ := newHook(&fakeAgent{})
	var out bytes.Buffer
	if err := h.Precreate(t.Context(), strings.NewReader("{"), &out); err == nil || out.Len() > 0 {
		t.Errorf("no spec: got %v, %q", err, &out)
	}
	if err := h.Precreate(t.Context(), strings.NewReader("{}"), &out); err != nil || !strings.Contains(out.String(), "container's id") {
		t.Errorf("no id: got %v, %q", err, &out)
	}
}

// What hangs where no deadline reaches it is left behind, and the container refused.
func TestPrecreateHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hangs := make(chan struct{})
		defer close(hangs)
		h, _ := newHook(&fakeAgent{hangs: hangs})
		began := time.Now()
		s := precreate(t, h)
		if took := time.Since(began); took != timeout+grace {
			t.Errorf("took %s", took)
		}
		if got := s.Hooks.CreateRuntime; len(got) != 2 || !strings.Contains(got[0].Args[5], "no answer within 22s") {
			t.Errorf("got %+v", got)
		}
	})
}

func TestEvents(t *testing.T) {
	a := &fakeAgent{}
	h, log := newHook(a)
	bundle := t.TempDir()
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(spec), 0o600); err != nil {
		t.Fatal(err)
	}
	state := func() io.Reader {
		return strings.NewReader(`{"id":"abc","pid":7,"bundle":"` + bundle + `","future":1}`)
	}
	for _, err := range []error{h.CreateRuntime(t.Context(), state()), h.Poststart(t.Context(), state()), h.Poststop(t.Context(), state())} {
		if err != nil {
			t.Error(err)
		}
	}
	if got := strings.Join(a.seen, ","); got != "created abc,started abc,stopped abc" {
		t.Errorf("events %s", got)
	}
	if c, r, err := a.facts(); err != nil || c.ID != "abc" || c.CgroupsPath == "" || r.Adapter != adjust.AdapterHook || r.Engine != "podman" {
		t.Errorf("facts %+v, %+v, %v", c, r, err)
	}
	for _, bad := range []string{"", "[]", "{}", `{"id":"a"}`, `{"id":"a","pid":-1}`, `{"id":"a","id":"b","pid":1}`, `{"id":1}`} {
		if err := h.CreateRuntime(t.Context(), strings.NewReader(bad)); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
	a.err = errors.New("full disk")
	if err := h.Poststop(t.Context(), state()); err == nil || !strings.Contains(log.String(), "full disk") {
		t.Errorf("poststop: %v, %s", err, log)
	}
}

// crun shows a hook's path and status only; podman shows crun's standard error if
// its log is no JSON.
func TestTellCrun(t *testing.T) {
	if path := logFile([]string{"crun", "--log-format=json", "--log", "/a/log", "create"}); path != "/a/log" {
		t.Errorf("got %q", path)
	}
	log := filepath.Join(t.TempDir(), "oci-log")
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, told := range map[string]bool{"crun": true, "runc": false} {
		if err := os.Truncate(log, 0); err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd := exec.Command("/bin/sh", "-c", "echo; read line", "sh", "--log="+log)
		cmd.Args[0] = name
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Up to its first word, /proc may not have its arguments.
		if _, err := stdout.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if err := tellCrun(cmd.Process.Pid, "why"); err != nil {
			t.Error(err)
		}
		stdin.Close()
		_ = cmd.Wait()
		data, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(data) == "why\n" && stderr.String() == "why\n"; got != told {
			t.Errorf("%s: log %q, stderr %q", name, data, &stderr)
		}
	}
}

// Only where the engine is CRI-O, at the stage that it has, is a mark on a pod's
// sandbox more than the container's own word.
func TestSandbox(t *testing.T) {
	const mark = `"io.kubernetes.cri-o.ContainerType":"sandbox"`
	asked := errors.New("asked")
	h, _ := newHook(&fakeAgent{err: asked})
	if err := h.CreateRuntime(t.Context(), strings.NewReader(`{"id":"a","pid":1,"annotations":{`+mark+`}}`)); err != nil {
		t.Errorf("createRuntime of a sandbox: %v", err)
	}
	forged := `{"id":"a","pid":1,"annotations":{` + mark + `,"io.container.manager":"libpod"}}`
	if err := h.CreateRuntime(t.Context(), strings.NewReader(forged)); !errors.Is(err, asked) {
		t.Errorf("createRuntime of podman's container: %v, want it planned", err)
	}
	id := strings.Repeat("a", 64)
	d, err := parse([]byte(`{"linux":{"cgroupsPath":"/libpod_parent/libpod-` + id + `"},"annotations":{` + mark + `,"io.container.manager":"libpod"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.change(t.Context(), d); !errors.Is(err, asked) {
		t.Errorf("precreate of podman's container: %v, want it planned", err)
	}
	// CRI-O has no precreate: whoever says so there is not believed, and refused.
	if d, err = parse([]byte(`{"annotations":{` + mark + `}}`)); err != nil {
		t.Fatal(err)
	}
	if err := h.change(t.Context(), d); err == nil {
		t.Error("precreate left a container alone that calls itself a sandbox")
	}
}

func TestUnserved(t *testing.T) {
	u := Unserved{errors.New("rootless")}
	for key, refused := range map[string]bool{
		"syslatch.dev/mode": true, "mode.syslatch.dev/pod": true, "io.containers.trace-syscall": true,
		"io.container.manager": false, "notsyslatch.dev/mode": false,
	} {
		if _, err := u.Plan(t.Context(), policy.Container{Annotations: map[string]string{key: "x"}}, adjust.Runtime{}); (err != nil) != refused {
			t.Errorf("%s: %v", key, err)
		}
	}
}
