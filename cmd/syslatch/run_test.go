// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
)

const runPolicy = `apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {}
  mode: enforce
  phases:
    initial: read_only
    gaps: report
    read_only: {allow: ["@file-read", "@basic-io", "@info", "@process"]}
    write: {allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process"], next: [read_only]}
`

// phased is a shell in phases that runs what it is told, a line after the other, and
// says what came of each.
type phased struct {
	t       *testing.T
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
	dir     string
	cgroup  string // of the shell
	socket  string
	events  string
	waited  bool
	stopped *time.Timer
}

func startPhased(t *testing.T, policy string, flags ...string) *phased {
	t.Helper()
	return startInPhases(t, obeying, append([]string{"run", "--policy", policyFile(t, policy)}, flags...)...)
}

// obeying is a shell that runs what it is told.
var obeying = []string{"/bin/sh", "-c", `echo $$; while read line; do eval "$line"; echo "= $?"; done`}

// startShell has it started by a command of syslatch that switches phases.
func startShell(t *testing.T, command ...string) *phased {
	t.Helper()
	return startInPhases(t, obeying, command...)
}

// startInPhases has a program, which prints its pid first, started by such a command.
func startInPhases(t *testing.T, program []string, command ...string) *phased {
	t.Helper()
	needRoot(t)
	p := &phased{t: t, dir: t.TempDir()}
	p.socket, p.events = filepath.Join(p.dir, "run", "api.sock"), filepath.Join(p.dir, "events")
	p.cmd = exec.Command("/proc/self/exe", slices.Concat(command, []string{"--api-socket", p.socket, "--events", p.events, "--id", "i", "--"}, program)...)
	p.cmd.Env = append(os.Environ(), beMain+"=1")
	p.cmd.Stderr = os.Stderr
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.stopped = time.AfterFunc(2*time.Minute, func() { _ = p.cmd.Process.Kill() })
	t.Cleanup(func() {
		if !p.waited {
			_ = p.cmd.Process.Signal(syscall.SIGTERM)
			_ = p.in.Close()
			_ = p.cmd.Wait()
		}
		p.stopped.Stop()
	})
	line, err := p.out.ReadString('\n')
	pid, perr := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || perr != nil {
		t.Fatalf("got %q, %v", line, err)
	}
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if p.cgroup, err = h.OfPID(pid); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *phased) expect(want string) {
	p.t.Helper()
	line, err := p.out.ReadString('\n')
	if strings.TrimSpace(line) != want {
		p.t.Fatalf("got %q, %v; want %q", line, err, want)
	}
}

// does runs a line of shell, and expects its exit status.
func (p *phased) does(line, status string) {
	p.t.Helper()
	if _, err := io.WriteString(p.in, line+"\n"); err != nil {
		p.t.Fatal(err)
	}
	p.expect("= " + status)
}

func (p *phased) set(phase string, code int) result {
	p.t.Helper()
	r := syslatch(p.t, "phase", "set", "--socket", p.socket, "i", phase)
	if r.code != code {
		p.t.Fatalf("phase set %s: %+v, want exit status %d", phase, r, code)
	}
	return r
}

func (p *phased) wait() int {
	p.t.Helper()
	p.waited = true
	_ = p.in.Close()
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

// TestRunInPhases: a running shell may write while the phase says so, what it starts
// too, and its exit status is the command's.
func TestRunInPhases(t *testing.T) {
	p := startPhased(t, runPolicy)
	file := filepath.Join(p.dir, "file")
	p.does("mkdir "+p.dir+"/a 2>&-", "1")
	p.does("test -d "+p.dir+"/a", "1")
	p.set("write", 0)
	p.does("mkdir "+p.dir+"/a", "0")
	p.does("echo 1 > "+file, "0")
	p.set("read_only", 0)
	p.does("mkdir "+p.dir+"/b 2>&-", "1")
	p.does("cat "+file+" >&-; true", "0")
	if r := p.set("nowhere", 3); !strings.Contains(r.stderr, "unknown phase") {
		t.Errorf("%+v", r)
	}
	if r := syslatch(t, "phase", "list", "--socket", p.socket, "-o", "json"); r.code != 0 || !strings.Contains(r.stdout, `"read_only"`) {
		t.Errorf("%+v", r)
	}
}

// A command is of the same user as who supervises it, and sees its socket: there it may
// tighten itself, and no more.
func TestRunInPhasesCannotLoosen(t *testing.T) {
	p := startPhased(t, strings.NewReplacer("initial: read_only", "initial: talk", "    write:", `    talk: {allow: ["@file-read", "@basic-io", "@info", "@process", "@network", "@signal", "@timer", "@sched", "@memory"]}
    write:`).Replace(runPolicy))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	set := func(phase string) string { return exe + " phase set --socket " + p.socket + " i " + phase + " >&2" }
	p.does(set("write"), "3")
	p.does("mkdir "+p.dir+"/a 2>&-", "1")
	p.does(set("read_only"), "0")
	p.does(set("talk"), "1") // can't connect any more
	p.set("write", 0)
	p.does("mkdir "+p.dir+"/a", "0")
}

// TestRunLimits: each phase's limits are set, before the command begins, and what a phase
// doesn't limit is as it was; from inside none gets looser. Controllers take cgroup v2.
func TestRunLimits(t *testing.T) {
	const calls = `["@file-read", "@basic-io", "@file-write", "@info", "@process", "@network", "@signal", "@timer", "@sched", "@memory"]`
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	p := startPhased(t, strings.NewReplacer("ALLOW", calls).Replace(`apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {}
  mode: enforce
  limits: {memory: {max: 512Mi}}
  phases:
    initial: begin
    gaps: report
    begin: {allow: ALLOW, limits: {oomScoreAdj: 300, pids: {max: 70}, cpu: {max: "50%"}}}
    small: {allow: ALLOW, limits: {oomScoreAdj: 500, pids: {max: 60}, memory: {max: 256Mi}}}
    free: {allow: ALLOW}
`), "--cgroup-parent", h.Unified)
	before, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	has := func(phase, score, pids, memory, cpu string) {
		t.Helper()
		p.does(fmt.Sprintf(`[ "$(cat /proc/self/oom_score_adj)" = %s ]`, score), "0")
		if h.Mode != cgroup.V2 {
			if r := syslatch(t, "phase", "get", "--socket", p.socket, "i"); phase != "free" && !strings.Contains(r.stdout, "limits are not set") {
				t.Errorf("no gap: %+v", r)
			}
			return
		}
		for file, want := range map[string]string{"pids.max": pids, "memory.max": memory, "cpu.max": cpu} {
			if got, err := os.ReadFile(filepath.Join(p.cgroup, file)); err != nil || strings.TrimSpace(string(got)) != want {
				t.Errorf("%s: %s is %q, %v; want %q", phase, file, got, err, want)
			}
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	fromInside := func(phase string) string {
		return exe + " phase set --socket " + p.socket + " i " + phase + " >&2"
	}
	has("begin", "300", "70", "536870912", "50000 100000")
	p.set("small", 0)
	has("small", "500", "60", "268435456", "max 100000")
	p.does(fromInside("free"), "3")
	has("small", "500", "60", "268435456", "max 100000")
	p.set("free", 0)
	has("free", strings.TrimSpace(string(before)), "max", "536870912", "max 100000")
	p.does(fromInside("small"), "0")
	has("small", "500", "60", "268435456", "max 100000")
	// Wherever the command's processes are by now, the limits are its own cgroup's.
	below := p.cgroup + "/below"
	p.does("mkdir "+below+" && echo $$ >"+below+"/cgroup.procs", "0")
	p.set("begin", 0)
	has("begin", "300", "70", "536870912", "50000 100000")
}

// TestRunOutOfMemory: a memory.max that has no room for what begins there says so.
func TestRunOutOfMemory(t *testing.T) {
	needRoot(t)
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if h.Mode != cgroup.V2 {
		t.Skip("this host's controllers are cgroup v1's: test/vm/run has v2's")
	}
	file := policyFile(t, strings.Replace(runPolicy, "  phases:\n", "  limits: {memory: {max: 1Mi}}\n  phases:\n", 1))
	r := syslatch(t, "run", "--policy", file, "--cgroup-parent", h.Unified, "--", "/bin/true")
	if r.code == 0 || !strings.Contains(r.stderr, "memory.max") && !strings.Contains(r.stderr, "limits of the first phase") {
		t.Errorf("%+v", r)
	}
}

func TestRunInPhasesEnds(t *testing.T) {
	p := startPhased(t, runPolicy, "--phase", "write")
	p.does("mkdir "+p.dir+"/a", "0")
	if _, err := io.WriteString(p.in, "exit 7\n"); err != nil {
		t.Fatal(err)
	}
	if code := p.wait(); code != 7 {
		t.Errorf("exit status %d, want 7", code)
	}
	data, err := os.ReadFile(p.events)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for line := range strings.Lines(string(data)) {
		var e phase.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Instance != "i" || e.Policy != "agent" {
			t.Errorf("%s: %v", line, err)
		}
		kinds = append(kinds, string(e.Kind))
	}
	if len(kinds) < 2 || kinds[0] != "begun" || kinds[len(kinds)-1] != "ended" {
		t.Errorf("events: %v", kinds)
	}
	if _, err := os.Stat(p.socket); err == nil {
		t.Error("the socket was left")
	}
	if _, err := os.Stat(p.cgroup); err == nil {
		t.Error("the cgroup was left")
	}
}

// TestRunInPhasesFailsClosed: without its supervisor, a command can't do what differs
// between phases.
func TestRunInPhasesFailsClosed(t *testing.T) {
	p := startPhased(t, runPolicy, "--phase", "write")
	p.does("mkdir "+p.dir+"/a", "0")
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.cmd.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	p.waited = true
	p.does("mkdir "+p.dir+"/b 2>&-", "126") // no execve, either
	if _, err := os.Stat(p.dir + "/b"); err == nil {
		t.Error("it wrote without a supervisor")
	}
	p.abandoned()
}

// abandoned ends a shell whose syslatch was killed: the end of its input ends it, and
// nobody is left to remove its cgroup.
func (p *phased) abandoned() {
	p.t.Helper()
	_ = p.in.Close()
	if _, err := p.out.ReadString('\n'); err != io.EOF {
		p.t.Error(err)
	}
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	if err := errors.Join(cgroup.WaitEmpty(ctx, p.cgroup), os.Remove(p.cgroup)); err != nil {
		p.t.Error(err)
	}
}

// TestRunRefusesGaps: what can't be enforced as it is written keeps the command from
// running, unless that is meant.
func TestRunRefusesGaps(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	file, mark := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "ran")
	policy := strings.Replace(runPolicy, "    gaps: report\n", "", 1)
	policy = strings.Replace(policy, "  phases:\n", "  limits: {rlimits: [{type: RLIMIT_CORE, soft: 0, hard: 0}]}\n  phases:\n", 1)
	if err := os.WriteFile(file, []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	r := syslatch(t, "run", "--policy", file, "--phase", "write", "--", "/usr/bin/touch", mark)
	if r.code != 125 || !strings.Contains(r.stderr, "can't be enforced on this host as it is written") || !strings.Contains(r.stderr, "rlimits are not set") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(mark); err == nil {
		t.Fatal("it ran")
	}
	r = syslatch(t, "run", "--policy", file, "--phase", "write", "--gaps", "report", "--", "/usr/bin/touch", mark)
	if r.code != 0 || !strings.Contains(r.stderr, "not enforced: read_only, write: the policy's rlimits are not set") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(mark); err != nil {
		t.Error(err)
	}
	for name, args := range map[string][]string{
		"125 no such policy": {"--policy", file, "--policy-name", "other"},
		"125 no file":        {"--policy", dir + "/none"},
		"2 no such phase":    {"--policy", file, "--phase", "other"},
		"2 both":             {"--policy", file, "--profile", file},
		"2 gaps":             {"--policy", file, "--gaps", "maybe"},
		"2 for policies":     {"--profile", file, "--phase", "write"},
	} {
		r := syslatch(t, append(append([]string{"run"}, args...), "--", "/bin/true")...)
		if want, _, _ := strings.Cut(name, " "); r.code != map[string]int{"2": 2, "125": 125}[want] || r.stderr == "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestRunTellsOfPrograms: what BPF programs deny is an event, also if the command ends at
// once. Those of cgroups are there on every kernel.
func TestRunTellsOfPrograms(t *testing.T) {
	needRoot(t)
	p := startPhased(t, `apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {}
  mode: enforce
  phases:
    initial: call
    gaps: report
    call: {allow: ["@file-read", "@basic-io", "@info", "@process", "@network"], network: ["127.0.0.1:9"]}
    quiet: {allow: ["@file-read", "@basic-io", "@info", "@process"], network: none}
`)
	p.does(`bash -c 'exec 3<>/dev/tcp/127.0.0.1/10' 2>&1 | grep -q "not permitted"`, "0")
	p.wait()
	data, err := os.ReadFile(p.events)
	if err != nil || !regexp.MustCompile(`"kind":"denied".*"from":"call".*"call":"(cgroup/connect4|lsm/socket_connect)".*"count":1`).Match(data) {
		t.Errorf("events: %s, %v", data, err)
	}
}

// tick waits until the kernel's coarse clock goes on.
func tick() {
	now := func() (ts unix.Timespec) {
		_ = unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts) // it is always there
		return ts
	}
	for before := now(); now() == before; {
	}
}

// TestRunTellsOfFilters: so is what the filters deny by themselves, that of an irreversible
// phase too, of processes that end at once.
func TestRunTellsOfFilters(t *testing.T) {
	policy := strings.Replace(irreversiblePolicy, "  phases:\n", "  logDenials: true\n  phases:\n", 1)
	p := startPhased(t, policy)
	p.does("unshare -n true", "1")
	tick() // or audit's clock has the same time for both
	p.set("write", 0)
	p.set("locked", 0)
	p.does("cd /", "2") // dash's
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	told := func(want string) int {
		data, err := os.ReadFile(p.events)
		if err != nil {
			t.Fatal(err)
		}
		return len(regexp.MustCompile(want).FindAll(data, -1))
	}
	for _, want := range []string{
		`"from":"work","call":"SCMP_ARCH_X86_64 unshare","pid":[0-9]+,"count":1}`,
		`"from":"locked","call":"SCMP_ARCH_X86_64 chdir","pid":[0-9]+,"count":1}`,
	} {
		for deadline := time.Now().Add(20 * time.Second); told(want) == 0 && time.Now().Before(deadline); <-again.C {
		}
		if n := told(want); n != 1 {
			data, _ := os.ReadFile(p.events)
			t.Errorf("%d events %s, want one, in %s", n, want, data)
		}
	}
	p.wait()
	// Before the policy says so, nothing is told of them.
	p = startPhased(t, irreversiblePolicy)
	p.does("unshare -n true", "1")
	p.wait()
	if data, err := os.ReadFile(p.events); err != nil || bytes.Contains(data, []byte("unshare")) {
		t.Errorf("events: %s, %v", data, err)
	}
}

const hooksPolicy = `apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {}
  mode: enforce
  phases:
    initial: write
    read_only: {allow: ["@file-read", "@basic-io", "@info", "@process"]}
    write: {allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process"], files: {write: [DIR/in, /dev/null]}}
`

// TestRunHooks: where there is BPF LSM, a phase's paths hold, a file that is open for
// writing isn't written in a phase that writes none, and both after a kill, too.
func TestRunHooks(t *testing.T) {
	needRoot(t)
	e, err := bpf.OpenEnforcer("", bpf.EnforcerOptions{NoPin: true, Instances: 1})
	if err != nil {
		t.Fatal(err)
	}
	missing := e.Missing()["lsm/file_open"]
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if missing != nil {
		if !errors.Is(missing, bpf.ErrUnsupported) {
			t.Fatal(missing)
		}
		t.Skipf("this kernel has no BPF LSM (test/vm/run has it): %v", missing)
	}
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/in", 0o755); err != nil {
		t.Fatal(err)
	}
	// mkdir and its like name paths that nothing looks at: a gap.
	p := startPhased(t, strings.ReplaceAll(hooksPolicy, "DIR", dir), "--gaps", "report")
	p.does("echo 1 > "+dir+"/in/a", "0")
	p.does("true > "+dir+"/out 2>/dev/null", "2")
	p.does("exec 5>"+dir+"/in/kept", "0")
	p.does("echo 1 >&5", "0")
	p.set("read_only", 0)
	p.does("echo 2 >&5 2>/dev/null", "2") // the redirection of errors
	p.does("echo 2 >&5", "1")
	p.does("true > "+dir+"/in/b", "2")
	p.set("write", 0)
	p.does("echo 3 >&5", "0")
	p.set("read_only", 0)
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.cmd.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	p.waited = true
	p.does("echo 4 >&5", "1")
	p.does("true > "+dir+"/in/c", "2")
	p.abandoned()
	data, err := os.ReadFile(dir + "/in/kept")
	if err != nil || string(data) != "1\n3\n" {
		t.Errorf("the file has %q, %v", data, err)
	}
	// The next run removes what the killed one left.
	next := startPhased(t, runPolicy)
	if left, err := filepath.Glob("/sys/fs/bpf/syslatch-run-*"); err != nil || len(left) > 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	next.wait()
}
