// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// helperCommand is this binary in mode "exec", behind a prefix.
func helperCommand(t *testing.T, p *specs.LinuxSeccomp, prefix []string, args ...string) *exec.Cmd {
	t.Helper()
	f, err := Compile(p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var in bytes.Buffer
	if err := binary.Write(&in, binary.NativeEndian, []unix.SockFilter(f)); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	argv := slices.Concat(prefix, []string{self}, args)
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), helperEnv+"=exec")
	cmd.Stdin = &in
	return cmd
}

func denying(names ...string) *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: allABIs,
		Syscalls: []specs.LinuxSyscall{{Names: names, Action: specs.ActErrno}},
	}
}

// TestLoadAndExecNofile: Go raises the soft limit of open files at its start, and
// the program must not inherit that.
func TestLoadAndExecNofile(t *testing.T) {
	cmd := helperCommand(t, denying("mkdir"), []string{"/bin/sh", "-c", `ulimit -Sn 111; ulimit -Hn 333; exec "$0" "$@"`},
		"/bin/sh", "-c", "ulimit -Sn; ulimit -Hn")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "111\n333\n" {
		t.Errorf("soft and hard limit %q, %v; want 111 and 333", out, err)
	}
}

// TestLoadAndExecEnds: whatever the filter denies, a failed execve ends the
// process; it neither lives on nor spins.
func TestLoadAndExecEnds(t *testing.T) {
	for _, tc := range []struct {
		name   string
		p      *specs.LinuxSeccomp
		status int // -1: by a signal
		said   bool
	}{
		{"execve denied", denying("execve"), 126, true},
		{"write denied too", denying("execve", "write"), 126, false},
		{"exit_group denied too", denying("execve", "exit_group"), -1, true},
		{"exits denied too", denying("execve", "exit_group", "exit"), -1, true},
		{"all denied", &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}, -1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := helperCommand(t, tc.p, nil, "/bin/true")
			var errs bytes.Buffer
			cmd.Stderr = &errs
			timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
			err := cmd.Run()
			if !timer.Stop() {
				t.Fatal("lives on")
			}
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != tc.status {
				t.Errorf("%v, want status %d", err, tc.status)
			}
			const message = "syslatch: execute /bin/true: operation not permitted (does the profile allow execve?)\n"
			if strings.HasPrefix(errs.String(), message) != tc.said {
				t.Errorf("stderr %q", errs.String())
			}
		})
	}
}

// TestLoadAndExecTraced: strace sees the execve as the first call after the load,
// while garbage is collected as often as can be. Go's scheduler may send the thread
// a SIGURG in between, which is no call and has no handler by then.
func TestLoadAndExecTraced(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal("strace is needed (apt-get install strace)")
	}
	for round := range 3 {
		log := filepath.Join(t.TempDir(), fmt.Sprint(round))
		cmd := helperCommand(t, denying("mkdir"), []string{strace, "-f", "-qq", "-o", log}, "/bin/true")
		cmd.Env = append(cmd.Env, "GOGC=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		data, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(data), "\n")
		load := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, " seccomp(SECCOMP_SET_MODE_FILTER, 0,") })
		if load < 0 {
			t.Fatalf("no filter was loaded:\n%s", data)
		}
		thread, _, _ := strings.Cut(lines[load], " ")
		next := slices.IndexFunc(lines[load+1:], func(l string) bool {
			return strings.HasPrefix(l, thread+" ") && !strings.Contains(l, "<... seccomp resumed>") && !strings.Contains(l, "--- SIGURG ")
		})
		if next < 0 || !strings.Contains(lines[load+1+next], ` execve("/bin/true"`) {
			t.Errorf("round %d: after the load comes %q, want the execve", round, lines[load+1+max(next, 0)])
		}
	}
}
