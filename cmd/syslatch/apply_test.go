// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/syslatch/syslatch/internal/agent"
	"github.com/syslatch/syslatch/internal/cgroup"
)

// shell is a sh that has answered, and answers what it is told.
type shell struct {
	pid int
	in  io.WriteCloser
	out *bufio.Reader
}

func newShell(t *testing.T, user *syscall.Credential) *shell {
	t.Helper()
	cmd := exec.Command("/bin/sh")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("sh: %v", err)
		}
	})
	s := &shell{cmd.Process.Pid, in, bufio.NewReader(out)}
	if got := s.ask(t, "echo ready"); got != "ready" {
		t.Fatalf("sh says %q", got)
	}
	return s
}

func (s *shell) ask(t *testing.T, command string) string {
	t.Helper()
	if _, err := fmt.Fprintf(s.in, "{ %s; } 2>&1\n", command); err != nil {
		t.Fatal(err)
	}
	line, err := s.out.ReadString('\n')
	if err != nil {
		t.Fatalf("%s: %v (%q)", command, err, line)
	}
	return strings.TrimSpace(line)
}

func TestApply(t *testing.T) {
	needRoot(t)
	s := newShell(t, nil)
	file := filepath.Join(t.TempDir(), "file")
	write := "if command : >" + file + "; then echo written; fi"
	before, err := cgroup.Status(s.pid)
	if err != nil {
		t.Fatal(err)
	}

	r := syslatch(t, "apply", "--pid", strconv.Itoa(s.pid), "--allow", "@file-read,@basic-io,stat", "--dry-run", "-o", "json")
	var report agent.ApplyReport
	if err := json.Unmarshal([]byte(r.stdout), &report); r.code != 0 || err != nil || !report.DryRun || report.PID != s.pid || len(report.Processes) != 1 {
		t.Fatalf("dry run: %+v, %v", r, err)
	}
	if now, err := cgroup.Status(s.pid); err != nil || now != before {
		t.Errorf("the dry run changed %+v to %+v, %v", before, now, err)
	}
	if got := s.ask(t, write); got != "written" {
		t.Errorf("before: %q", got)
	}

	r = syslatch(t, "apply", "--pid", strconv.Itoa(s.pid), "--allow", "@file-read,@basic-io,stat")
	want := fmt.Sprintf("%d  sh       1        %d -> %d   -", s.pid, before.SeccompFilters, before.SeccompFilters+1)
	if lines := strings.Split(r.stdout, "\n"); r.code != 0 || r.stderr != "" || len(lines) != 3 || strings.Join(strings.Fields(lines[1]), " ") != strings.Join(strings.Fields(want), " ") {
		t.Errorf("got %+v, want %q", r, want)
	}
	if got := s.ask(t, write); !strings.Contains(got, "not permitted") {
		t.Errorf("writing: %q", got)
	}
	if got := s.ask(t, "read x </etc/passwd && echo read"); got != "read" {
		t.Errorf("reading: %q", got)
	}
}

func TestApplyTree(t *testing.T) {
	needRoot(t)
	parent := newShell(t, nil)
	child := parent.ask(t, "sleep 300 & echo $!")
	t.Cleanup(func() {
		pid, err := strconv.Atoi(child)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	})
	r := syslatch(t, "apply", "--pid", strconv.Itoa(parent.pid), "--tree", "--allow", "@process,@file-read,@basic-io", "-o", "json")
	var report agent.ApplyReport
	if err := json.Unmarshal([]byte(r.stdout), &report); r.code != 0 || err != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	var pids []string
	for _, p := range report.Processes {
		pids = append(pids, strconv.Itoa(p.PID))
	}
	slices.Sort(pids)
	want := []string{strconv.Itoa(parent.pid), child}
	slices.Sort(want)
	if !slices.Equal(pids, want) {
		t.Errorf("processes %v, want %v", pids, want)
	}
}

func TestApplyRefuses(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	at := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s := newShell(t, nil)
	pid := strconv.Itoa(s.pid)
	gone := exec.Command("/bin/true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"unknown call":    {[]string{"--pid", pid, "--allow", "frobnicate"}, `unknown call "frobnicate"`},
		"unknown group":   {[]string{"--pid", pid, "--allow", "@frob"}, `unknown group "@frob" ('syslatch profile groups' lists them)`},
		"no profile":      {[]string{"--pid", pid, "-p", filepath.Join(dir, "none")}, "no such file"},
		"asks":            {[]string{"--pid", pid, "-p", at("notify", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}`)}, "asks a supervisor"},
		"blocked in read": {[]string{"--pid", pid, "-p", at("read", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_KILL_PROCESS"}]}`)}, "it is in read, which the filter denies (the process is killed)"},
		"can't exit":      {[]string{"--pid", pid, "-p", at("exit", `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`)}, "the filter denies exit_group (EPERM)"},
		"ended":           {[]string{"--pid", strconv.Itoa(gone.Process.Pid), "--allow", "read"}, "no such process"},
		"init":            {[]string{"--pid", "1", "--allow", "read"}, "pid 1 is init"},
		"itself":          {[]string{"--pid", strconv.Itoa(os.Getpid()), "--tree", "--allow", "read"}, "run it from elsewhere"},
	} {
		t.Run(name, func(t *testing.T) {
			r := syslatch(t, append([]string{"apply"}, tc.args...)...)
			if r.code != 1 || r.stdout != "" || !strings.HasPrefix(r.stderr, "syslatch: ") || !strings.Contains(r.stderr, tc.want) || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("got %+v, want exit 1 and %q", r, tc.want)
			}
		})
	}
	r := syslatch(t, "apply", "--pid", pid, "-p", filepath.Join(dir, "read"), "--dry-run")
	if r.code != 1 || !strings.Contains(r.stdout, "would be refused: pid "+pid+": it is in read") || r.stderr != "" {
		t.Errorf("dry run of what is refused: %+v", r)
	}
	if got := s.ask(t, "echo alive"); got != "alive" {
		t.Errorf("sh says %q", got)
	}
}

func TestApplyAsAnotherUser(t *testing.T) {
	needRoot(t)
	s := newShell(t, nil)
	r := syslatchAs(t, &syscall.Credential{Uid: 65534, Gid: 65534}, "apply", "--pid", strconv.Itoa(s.pid), "--allow", "read")
	if r.code != 1 || !strings.Contains(r.stderr, "may not be traced") || !strings.Contains(r.stderr, "root") {
		t.Errorf("got %+v", r)
	}
}

func TestApplyCompletes(t *testing.T) {
	s := newShell(t, nil)
	r := syslatch(t, "__complete", "apply", "--pid", strconv.Itoa(s.pid))
	if !strings.HasPrefix(r.stdout, strconv.Itoa(s.pid)+"\t/bin/sh\n") {
		t.Errorf("got %+v, want the shell", r)
	}
	r = syslatch(t, "__complete", "apply", "--allow", "read,@file-r")
	if !strings.HasPrefix(r.stdout, "read,@file-read\t") {
		t.Errorf("got %+v, want the group", r)
	}
}
