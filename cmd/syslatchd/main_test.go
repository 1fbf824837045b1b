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
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
)

// beMain makes this test binary be syslatchd itself; so does a name that a
// runtime's plugin has.
const (
	beMain     = "SYSLATCH_TEST_BE_MAIN"
	pluginName = "10-syslatch"
	// beRuntime makes it NRI's own runtime side, in the directory that it names.
	beRuntime = "SYSLATCH_TEST_BE_RUNTIME"
)

func TestMain(m *testing.M) {
	if os.Getenv(beMain) != "" || filepath.Base(os.Args[0]) == pluginName {
		main()
	}
	if dir := os.Getenv(beRuntime); dir != "" {
		if err := beARuntime(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// beARuntime serves DIR/nri.sock, and starts the plugins of DIR/plugins, until its
// standard input ends. It says when plugins have been started.
func beARuntime(dir string) error {
	r, err := adaptation.New("test", "v1", func(ctx context.Context, sync adaptation.SyncCB) error {
		_, err := sync(ctx, nil, nil)
		return err
	}, func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
		return nil, nil
	}, adaptation.WithSocketPath(filepath.Join(dir, "nri.sock")),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")), adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")))
	if err != nil {
		return err
	}
	if err := r.Start(); err != nil {
		return err
	}
	fmt.Println("ready")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	os.Exit(0) // as a runtime that dies: its plugins are left to themselves
	return nil
}

// startRuntime starts one, and returns what kills it.
func startRuntime(t *testing.T, dir string) (kill func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), beRuntime+"="+dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	kill = func() {
		if !killed {
			killed = true
			_ = cmd.Process.Kill()
			in.Close()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(func() {
		kill()
		if t.Failed() {
			t.Logf("runtime:\n%s", log.String())
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("runtime: %q, %v", line, err)
	}
	return kill
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), beMain+"=1")
	return cmd
}

type result struct {
	code           int
	stdout, stderr string
}

// syslatchd runs it to its end.
func syslatchd(t *testing.T, args ...string) result {
	t.Helper()
	cmd := command(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// config writes a policy file with directories of its own. No recording is
// possible with it: what pins there would be must be on a bpffs.
func config(t *testing.T) (path, dir string) {
	t.Helper()
	dir = t.TempDir()
	path = filepath.Join(dir, "policy.yaml")
	write(t, path, fmt.Sprintf("apiVersion: syslatch.dev/v1\nstore: %[1]s/store\nstateDir: %[1]s/state\nbpffs: %[1]s/bpf\npolicies:\n- {name: all, match: {}, mode: record}\n", dir))
	return path, dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

const withPhases = "apiVersion: syslatch.dev/v1\npolicies:\n- name: a\n  match: {}\n  mode: enforce\n  phases: {initial: a, a: {}}\n"

func TestCheckConfig(t *testing.T) {
	good, dir := config(t)
	two := filepath.Join(dir, "two.yaml")
	write(t, two, "apiVersion: syslatch.dev/v1\npolicies:\n- {name: a, match: {namespaces: [a]}, mode: record}\n- {name: b, match: {}, mode: \"off\"}\n")
	bad := filepath.Join(dir, "bad.yaml")
	write(t, bad, "apiVersion: syslatch.dev/v1\nstore: here\npolicies:\n- name: a\n  match: {}\n  mode: recrod\n  mustAllow: [mkdirr]\n")
	phases := filepath.Join(dir, "phases.yaml")
	write(t, phases, withPhases)
	for name, tc := range map[string]struct {
		path   string
		code   int
		stdout string
		stderr []string
	}{
		"good": {good, 0, good + ": good, 1 policy\n", nil},
		"two":  {two, 0, two + ": good, 2 policies\n", nil},
		// Every error with its line, and what was perhaps meant.
		"bad": {bad, 1, "", []string{
			"syslatchd: " + bad + ":2: store:",
			bad + `:6: policies[0].mode: unknown value "recrod"`, `did you mean "record"?`,
			bad + ":7: policies[0].mustAllow[0]", "mkdirr",
		}},
		"phases":    {phases, 0, phases + ": good, 1 policy\n", nil},
		"missing":   {filepath.Join(dir, "no.yaml"), 1, "", []string{"no.yaml: no such file or directory", "--config"}},
		"directory": {dir, 1, "", []string{"is a directory"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := syslatchd(t, "--check-config", "--config", tc.path)
			if r.code != tc.code || r.stdout != tc.stdout {
				t.Errorf("got %+v, want exit %d and %q", r, tc.code, tc.stdout)
			}
			for _, want := range tc.stderr {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("%q lacks %q", r.stderr, want)
				}
			}
			if tc.stderr == nil && r.stderr != "" {
				t.Errorf("stderr: %q", r.stderr)
			}
		})
	}
}

func TestUsageErrorsExitWith2(t *testing.T) {
	path, _ := config(t)
	for name, args := range map[string][]string{
		"unknown flag": {"--nope"},
		"argument":     {"serve"},
		"no value":     {"--config"},
		"level":        {"--config", path, "--log-level", "loud"},
		"format":       {"--config", path, "--log-format", "xml"},
	} {
		t.Run(name, func(t *testing.T) {
			r := syslatchd(t, args...)
			if r.code != 2 || r.stdout != "" || !strings.HasPrefix(r.stderr, "syslatchd: ") || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("got %+v, want exit 2 and one line", r)
			}
		})
	}
}

// What fails is no misuse of the command line.
func TestFailuresExitWith1(t *testing.T) {
	path, dir := config(t)
	file := filepath.Join(dir, "file")
	write(t, file, "")
	blocked := filepath.Join(dir, "blocked.yaml")
	write(t, blocked, fmt.Sprintf("apiVersion: syslatch.dev/v1\nstore: %[1]s/store\nstateDir: %[1]s/file/state\npolicies: []\n", dir))
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"log file":        {[]string{"--config", path, "--log-file", file + "/log"}, "log file: "},
		"state directory": {[]string{"--config", blocked}, "state directory: "},
		"no policy":       {[]string{"--config", filepath.Join(dir, "no.yaml")}, "--config"},
	} {
		t.Run(name, func(t *testing.T) {
			if r := syslatchd(t, tc.args...); r.code != 1 || !strings.Contains(r.stderr, tc.want) {
				t.Errorf("got %+v, want exit 1 and %q", r, tc.want)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	r := syslatchd(t, "--help")
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("got %+v", r)
	}
	for _, want := range []string{
		"Examples:", "--check-config", "Exit status", "pre-launched", defaultConfig, api.DefaultSocketPath, "completion",
	} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("help lacks %q", want)
		}
	}
	if r := syslatchd(t, "--version"); r.code != 0 || !strings.HasPrefix(r.stdout, "syslatchd ") {
		t.Errorf("--version: %+v", r)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := syslatchd(t, "completion", shell); r.code != 0 || !strings.Contains(r.stdout, "syslatchd") {
			t.Errorf("%s: exit %d, %d bytes", shell, r.code, len(r.stdout))
		}
	}
	for flag, want := range map[string]string{"--log-format": "text\njson\n:4", "--log-level": "debug\ninfo\nwarning\nerror\n:4", "--config": "yaml\nyml\nconf\n:8"} {
		if r := syslatchd(t, "__complete", flag, ""); !strings.HasPrefix(r.stdout, want) {
			t.Errorf("%s: got %q, want %q", flag, r.stdout, want)
		}
	}
}

// daemon is a syslatchd that runs.
type daemon struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines chan map[string]any // of its JSON log; closed at its end
	bad   chan string         // gets lines that are no JSON
}

// start starts one with a JSON log.
func start(t *testing.T, args ...string) *daemon {
	t.Helper()
	d := &daemon{t: t, cmd: command(append(args, "--log-format", "json", "--log-level", "debug")...), lines: make(chan map[string]any, 1000), bad: make(chan string, 100)}
	log, err := d.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.lines)
		for s := bufio.NewScanner(log); s.Scan(); {
			var line map[string]any
			if err := json.Unmarshal(s.Bytes(), &line); err != nil {
				d.bad <- s.Text()
				continue
			}
			d.lines <- line
		}
	}()
	t.Cleanup(func() { d.end(syscall.SIGKILL) })
	return d
}

// logs waits for a message.
func (d *daemon) logs(message string) map[string]any {
	d.t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		select {
		case line, ok := <-d.lines:
			if !ok {
				d.t.Fatalf("it ended and never logged %q", message)
			}
			if strings.Contains(fmt.Sprint(line["msg"]), message) {
				return line
			}
		case <-timeout:
			d.t.Fatalf("it never logged %q", message)
		}
	}
}

// end sends a signal and returns the exit status.
func (d *daemon) end(s syscall.Signal) int {
	d.t.Helper()
	if d.cmd.ProcessState != nil {
		return d.cmd.ProcessState.ExitCode()
	}
	_ = d.cmd.Process.Signal(s) // it may have ended
	for range d.lines {
	}
	_ = d.cmd.Wait() // its status is looked at
	return d.cmd.ProcessState.ExitCode()
}

// A signal ends it with 0, before there is a runtime and afterwards, and its log is
// JSON, line by line.
func TestSignalsEndIt(t *testing.T) {
	for name, tc := range map[string]struct {
		signal  syscall.Signal
		runtime bool
	}{
		"SIGTERM, no runtime": {syscall.SIGTERM, false},
		"SIGINT, no runtime":  {syscall.SIGINT, false},
		"SIGTERM, connected":  {syscall.SIGTERM, true},
	} {
		t.Run(name, func(t *testing.T) {
			path, dir := config(t)
			socket := filepath.Join(dir, "nri.sock")
			if tc.runtime {
				startRuntime(t, dir)
			}
			d := start(t, "--config", path, "--nri-socket", socket)
			if line := d.logs("this host can't record"); !strings.Contains(fmt.Sprint(line["error"]), "bpffs") || line["level"] != "warning" || line["time"] == nil {
				t.Errorf("log line %v", line)
			}
			if line := d.logs("started"); line["policies"] != 1.0 || line["config"] != path {
				t.Errorf("log line %v", line)
			}
			if tc.runtime {
				d.logs("synchronized")
			} else {
				d.logs("not connected to the runtime")
			}
			if code := d.end(tc.signal); code != 0 {
				t.Errorf("exit status %d, want 0", code)
			}
			select {
			case line := <-d.bad:
				t.Errorf("no JSON: %q", line)
			default:
			}
		})
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	path, dir := config(t)
	socket := filepath.Join(dir, "nri.sock")
	d := start(t, "--config", path, "--nri-socket", socket)
	d.logs("started")
	r := syslatchd(t, "--config", path, "--nri-socket", socket)
	if r.code != 1 {
		t.Errorf("exit status %d, want 1", r.code)
	}
	for _, want := range []string{dir + "/state", "another syslatchd", "stop it", "stateDir"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("%q lacks %q", r.stderr, want)
		}
	}
	// After kill -9 nothing stands in the way of the next.
	d.end(syscall.SIGKILL)
	start(t, "--config", path, "--nri-socket", socket).logs("started")
}

func TestLogFile(t *testing.T) {
	path, dir := config(t)
	log := filepath.Join(dir, "logs", "syslatchd.log")
	for n := 1; n <= 2; n++ { // appended to
		d := start(t, "--config", path, "--nri-socket", filepath.Join(dir, "nri.sock"), "--log-file", log)
		var text []byte
		if !poll(func() bool {
			text, _ = os.ReadFile(log)
			return strings.Count(string(text), `"msg":"started"`) == n
		}) {
			t.Fatalf("never started; log: %s", text)
		}
		if code := d.end(syscall.SIGTERM); code != 0 {
			t.Errorf("exit status %d", code)
		}
		for line := range d.lines {
			t.Errorf("on standard error: %v", line)
		}
	}
	st, err := os.Stat(log)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: want mode 0600, as workloads' names are in it", st.Mode(), err)
	}
}

// poll waits for what another process does to a file.
func poll(done func() bool) bool {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); <-tick.C {
		if done() {
			return true
		}
	}
	return done()
}

// The runtime starts it, with nothing in the environment and no terminal. It ends
// with the runtime, and says so.
func TestPrelaunched(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		config string // "" for the policy file
		log    []string
	}{
		"good": {"", []string{"level=info msg=started", "policies=1", "connected to runtime", "msg=synchronized"}},
		"bad":  {"apiVersion: v1\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			path, dir := config(t)
			if err := errors.Join(os.Mkdir(filepath.Join(dir, "plugins"), 0o755), os.Mkdir(filepath.Join(dir, "conf.d"), 0o755)); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(exe, filepath.Join(dir, "plugins", pluginName)); err != nil {
				t.Fatal(err)
			}
			conf := filepath.Join(dir, "conf.d", pluginName+".conf")
			if tc.config != "" {
				write(t, conf, tc.config)
			} else if err := os.Rename(path, conf); err != nil {
				t.Fatal(err)
			}
			kill := startRuntime(t, dir)
			log := filepath.Join(dir, "state", "syslatchd.log")
			if tc.log == nil {
				if _, err := os.Stat(log); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("a log in the state directory of a policy that was refused: %v", err)
				}
				return
			}
			wants := func(parts ...string) {
				t.Helper()
				var text []byte
				if !poll(func() bool {
					text, _ = os.ReadFile(log)
					return !slices.ContainsFunc(parts, func(s string) bool { return !strings.Contains(string(text), s) })
				}) {
					t.Errorf("the log lacks one of %q:\n%s", parts, text)
				}
			}
			wants(tc.log...)
			kill()
			wants("level=error", "containers created from now on are not covered")
		})
	}
}

// Killed and started anew, the runtime is found again.
func TestReconnects(t *testing.T) {
	path, dir := config(t)
	socket := filepath.Join(dir, "nri.sock")
	d := start(t, "--config", path, "--nri-socket", socket)
	d.logs("not connected to the runtime")
	for range 2 {
		kill := startRuntime(t, dir)
		d.logs("synchronized")
		kill()
		d.logs("not connected to the runtime")
	}
	if code := d.end(syscall.SIGTERM); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// newLog is what the daemon's options make; the rest is seen from outside.
func TestNewLog(t *testing.T) {
	log, err := newLog(options{logLevel: "warning", logFormat: "json"})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	log.Logger.SetOutput(io.MultiWriter(&out))
	log.Info("not this")
	log.WithField("container", "c1\n").Warn("this")
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line["container"] != "c1\n" || line["msg"] != "this" {
		t.Errorf("got %s, %v", out.Bytes(), err)
	}
}
