// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

// beMain makes this test binary be syslatch itself, so that the tests run what
// a user runs: flags, exit codes and the launched child included.
const beMain = "SYSLATCH_TEST_BE_MAIN"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && (os.Args[1] == callerParent || os.Args[1] == callerChild) {
		caller(os.Args[1] == callerParent)
		os.Exit(0)
	}
	if os.Getenv(beMain) != "" {
		main()
	}
	os.Exit(onBPFFS(m))
}

// onBPFFS has a bpffs for what syslatch run pins.
func onBPFFS(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run()
	}
	unmount, err := harness.MountBPFFS()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	status := m.Run()
	if err := unmount(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return status
}

type result struct {
	code           int
	stdout, stderr string
}

func syslatch(t *testing.T, args ...string) result {
	t.Helper()
	return syslatchAs(t, nil, args...)
}

// syslatchAs runs it as another user; nil is this one.
func syslatchAs(t *testing.T, user *syscall.Credential, args ...string) result {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), beMain+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("recording needs root")
	}
}

func TestUsageErrorsExitWith2(t *testing.T) {
	tests := map[string]struct {
		args []string
		want string
	}{
		"unknown command":    {[]string{"recrod"}, `unknown command "recrod" for "syslatch", did you mean record? (see 'syslatch --help')`},
		"unknown subcommand": {[]string{"profile", "lst"}, `unknown command "lst" for "syslatch profile", did you mean list?`},
		"unknown topic":      {[]string{"help", "recrod"}, `unknown command "recrod" for "syslatch", did you mean record?`},
		"unknown flag":       {[]string{"record", "--nope"}, "unknown flag: --nope (see 'syslatch record --help')"},
		"no output":          {[]string{"record", "--", "true"}, "say where to write the profile"},
		"no command":         {[]string{"record", "-o", "x"}, "say which command to run: syslatch record -o FILE -- COMMAND"},
		"empty command":      {[]string{"run", "-p", "x", "--", ""}, "say which command to run"},
		"no profile":         {[]string{"run", "--", "true"}, "say which profile"},
		"no process":         {[]string{"apply", "--allow", "read"}, "say which process: --pid PID"},
		"nothing to apply":   {[]string{"apply", "--pid", "1"}, "say what stays allowed: --allow CALL,@GROUP... or --profile FILE"},
		"apply both":         {[]string{"apply", "--pid", "1", "--allow", "read", "-p", "x"}, "say what stays allowed"},
		"apply's timeout":    {[]string{"apply", "--pid", "1", "--allow", "read", "--timeout", "0s"}, "timeout 0s: want more than 0"},
		"apply's format":     {[]string{"apply", "--pid", "1", "--allow", "read", "-o", "yaml"}, `output "yaml": want text or json`},
		"apply's argument":   {[]string{"apply", "--pid", "1", "--allow", "read", "x"}, "unknown command \"x\""},
		"output format":      {[]string{"version", "-o", "yaml"}, `output "yaml": want text or json`},
		"doctor's format":    {[]string{"doctor", "-o", "yaml"}, `output "yaml": want text or json`},
		"doctor's timeout":   {[]string{"doctor", "--timeout", "0s"}, "timeout 0s: want more than 0"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := syslatch(t, tc.args...)
			if r.code != 2 || !strings.HasPrefix(r.stderr, "syslatch: "+tc.want) || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("got %+v, want exit 2, nothing on stdout and one message with %q", r, tc.want)
			}
		})
	}
}

func TestHelpHasExamples(t *testing.T) {
	for _, args := range [][]string{{}, {"record"}, {"run"}, {"apply"}, {"profile"}, {"profile", "list"}, {"profile", "show"}, {"profile", "path"}, {"profile", "activate"}, {"profile", "suggest"}, {"hook"}, {"hook", "install"}, {"hook", "uninstall"}, {"hook", "status"}, {"doctor"}, {"version"}, {"phase"}, {"phase", "list"}, {"phase", "get"}, {"phase", "set"}, {"phase", "watch"}} {
		r := syslatch(t, append(args, "--help")...)
		if r.code != 0 || !strings.Contains(r.stdout, "Examples:") {
			t.Errorf("%v --help: got exit %d, %q", args, r.code, r.stdout)
		}
	}
}

func TestRecordThenRun(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	profile := filepath.Join(dir, "app.json")
	target := filepath.Join(dir, "made")

	r := syslatch(t, "record", "-o", profile, "--", "/bin/sh", "-c", "ls / >/dev/null; echo hello; exit 3")
	if r.code != 3 || r.stdout != "hello\n" {
		t.Fatalf("record: got %+v, want the command's status 3 and its output", r)
	}
	if !strings.Contains(r.stderr, "calls under SCMP_ARCH_X86_64") {
		t.Errorf("record: no summary in %q", r.stderr)
	}

	r = syslatch(t, "run", "--profile", profile, "--", "/bin/sh", "-c", "ls / >/dev/null; echo hello; exit 3")
	if r.code != 3 || r.stdout != "hello\n" || r.stderr != "" {
		t.Errorf("run of what was recorded: got %+v", r)
	}
	r = syslatch(t, "run", "--profile", profile, "--", "/bin/sh", "-c", "mkdir "+target)
	if r.code == 0 || !strings.Contains(r.stderr, "Operation not permitted") {
		t.Errorf("run of mkdir: got %+v, want EPERM", r)
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("the directory was made")
	}

	r = syslatch(t, "record", "-o", profile, "--append", "--", "/bin/sh", "-c", "mkdir "+target)
	if r.code != 0 {
		t.Fatalf("record --append: %+v", r)
	}
	if err := os.Remove(target); err != nil {
		t.Fatal(err)
	}
	r = syslatch(t, "run", "--profile", profile, "--", "/bin/sh", "-c", "ls / >/dev/null; mkdir "+target+"; echo hello; exit 3")
	if r.code != 3 || r.stdout != "hello\n" {
		t.Errorf("run of both: got %+v", r)
	}
}

func TestRecordWritesEvidence(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "recording.json")
	r := syslatch(t, "record", "-o", "-", "--recording", path, "--", "/bin/sh", "-c", "mkdir "+dir+"/x; true >/dev/tcp 2>&1; exit 0")
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	var profile specs.LinuxSeccomp
	if err := json.Unmarshal([]byte(r.stdout), &profile); err != nil {
		t.Fatalf("standard output is no profile: %v", err)
	}
	if !slices.Equal(profile.Architectures, []specs.Arch{"SCMP_ARCH_X86_64"}) {
		t.Errorf("architectures %v, want those that were used", profile.Architectures)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := profiles.DecodeRecording(data)
	if err != nil {
		t.Fatal(err)
	}
	if rec.Gate != profiles.GateFilter || len(rec.Losses) != 0 {
		t.Errorf("gate %s, losses %v", rec.Gate, rec.Losses)
	}
	n := 0
	for _, names := range rec.All() {
		n += len(names)
	}
	if len(rec.FirstSeen) != n {
		t.Errorf("%d first-seen events for %d calls", len(rec.FirstSeen), n)
	}
	i := slices.IndexFunc(rec.FirstSeen, func(f profiles.FirstSeen) bool { return f.Name == "mkdir" })
	if i < 0 || rec.FirstSeen[i].Comm != "mkdir" || rec.FirstSeen[i].Exe != "mkdir" || rec.FirstSeen[i].After <= 0 {
		t.Errorf("mkdir's first-seen event: %+v", rec.FirstSeen)
	}
	if first := rec.FirstSeen[0]; first.Name != "execve" {
		t.Errorf("first call %+v, want the execve: nothing of the launcher's own", first)
	}
}

func TestExitStatusOfWhatCantRun(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, []byte("\x7fELFnot"), 0o755); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(dir, "broken.json")
	if err := os.WriteFile(broken, []byte(`{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [`), 0o644); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(dir, "good.json")
	if r := syslatch(t, "record", "-o", good, "--", "/bin/echo", "x"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	out := filepath.Join(dir, "out.json")
	tests := map[string]struct {
		args []string
		want int
	}{
		"record: not found":      {[]string{"record", "-o", out, "--", "no-such-command-here"}, 127},
		"record: no file":        {[]string{"record", "-o", out, "--", dir + "/none"}, 127},
		"record: not executable": {[]string{"record", "-o", out, "--", plain}, 126},
		"record: no program":     {[]string{"record", "-o", out, "--", garbage}, 126},
		"record: killed":         {[]string{"record", "-o", filepath.Join(dir, "k.json"), "--", "/bin/sh", "-c", "kill -9 $$"}, 137},
		"run: not found":         {[]string{"run", "-p", good, "--", "no-such-command-here"}, 127},
		"run: no program":        {[]string{"run", "-p", good, "--", garbage}, 126},
		"run: broken profile":    {[]string{"run", "-p", broken, "--", "true"}, 125},
		"run: no profile":        {[]string{"run", "-p", dir + "/none.json", "--", "true"}, 125},
		"record: unwritable":     {[]string{"record", "-o", dir + "/none/out.json", "--", "true"}, 125},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := syslatch(t, tc.args...)
			if r.code != tc.want {
				t.Errorf("got %+v, want exit %d", r, tc.want)
			}
			if tc.want != 137 && !strings.HasPrefix(r.stderr, "syslatch: ") {
				t.Errorf("no message: %+v", r)
			}
		})
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a profile was written of a command that never ran")
	}
}

func TestRecordWaitsForBackgroundProcesses(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	out := filepath.Join(dir, "p.json")
	fifo := filepath.Join(dir, "fifo")
	// The child outlives the command: it makes its mkdir after the shell's end.
	r := syslatch(t, "record", "-o", out, "--", "/bin/sh", "-c", "mkfifo "+fifo+"; (read x <"+fifo+"; mkdir "+dir+"/late) & (: >"+fifo+") & exit 0")
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(data, []byte(`"mkdir"`)) {
		t.Errorf("mkdir of the background process is missing: %s", data)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := syslatch(t, "completion", shell); r.code != 0 || !strings.Contains(r.stdout, "syslatch") {
			t.Errorf("%s: %+v", shell, r)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"--version"}} {
		if r := syslatch(t, args...); r.code != 0 || !strings.HasPrefix(r.stdout, "syslatch ") || strings.Count(r.stdout, "\n") != 1 {
			t.Errorf("%v: %+v", args, r)
		}
	}
	r := syslatch(t, "version", "-o", "json")
	var v struct{ Version, Go string }
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || v.Version == "" || v.Go == "" {
		t.Errorf("%+v: %v", r, err)
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{nil, {"help"}, {"profile"}, {"help", "profile", "show"}} {
		if r := syslatch(t, args...); r.code != 0 || !strings.Contains(r.stdout, "Usage:") || r.stderr != "" {
			t.Errorf("%v: %+v", args, r)
		}
	}
}
