// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestDoctorOutput(t *testing.T) {
	r := syslatch(t, "doctor", "-o", "json")
	var report struct {
		Schema string
		Works  bool
		Checks []struct{ Name, Status, Found, Remedy string }
	}
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		t.Fatalf("%v: %+v", err, r)
	}
	if want := map[bool]int{true: 0, false: 1}[report.Works]; r.code != want || r.stderr != "" {
		t.Errorf("works is %t: got exit %d, %q", report.Works, r.code, r.stderr)
	}
	for _, c := range report.Checks {
		if c.Found == "" || (c.Remedy == "") != (c.Status == "ok") {
			t.Errorf("%+v: want what was found, and a remedy unless it is ok", c)
		}
	}
	if r := syslatch(t, "doctor"); strings.Contains(r.stdout, "\x1b") || !strings.Contains(r.stdout, "\nSTATUS   JOB ") {
		t.Errorf("to a pipe: %+v", r)
	}
}

func TestDoctorColours(t *testing.T) {
	for name, tc := range map[string]struct {
		env  string
		want bool
	}{
		"terminal": {"TERM=xterm", true},
		"NO_COLOR": {"NO_COLOR=1", false},
		"dumb":     {"TERM=dumb", false},
	} {
		t.Run(name, func(t *testing.T) {
			pty, tty := openPTY(t)
			s := &session{t: t, lines: bufio.NewScanner(pty)}
			s.cmd = exec.Command("/proc/self/exe", "doctor")
			s.cmd.Env = []string{beMain + "=1", "PATH=" + os.Getenv("PATH"), "TERM=xterm", tc.env}
			s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = tty, tty, tty
			s.run()
			if err := tty.Close(); err != nil { // at the end, reading fails
				t.Fatal(err)
			}
			s.end()
			text := strings.Join(s.seen, "\n")
			if !strings.Contains(text, "kernel") || strings.Contains(text, "\x1b[32mok") != tc.want {
				t.Errorf("got %q", text)
			}
		})
	}
}
