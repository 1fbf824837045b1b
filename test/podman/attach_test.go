// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/syslatch/syslatch/profiles"
)

// A container that runs already, recorded by each of its names.
func TestAttach(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		e.run("web", []string{"-d"}, "sleep", "1000")
		id, pid := e.inspect("web", "{{.Id}}"), e.inspect("web", "{{.State.Pid}}")
		n, err := strconv.Atoi(pid)
		if err != nil {
			t.Fatal(err)
		}
		path, err := hierarchy.OfPID(n)
		if err != nil {
			t.Fatal(err)
		}
		profile, evidence := e.dir+"/p.json", e.dir+"/r.json"
		attach := func(during func(), target ...string) (*profiles.Recording, string) {
			t.Helper()
			cmd := exec.Command(filepath.Join(programs, "syslatch"), append([]string{"record", "-o", profile, "--recording", evidence, "--allow-losses"}, target...)...)
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill()
			lines := bufio.NewReader(stderr)
			if line, err := lines.ReadString('\n'); err != nil || !strings.Contains(line, "recording "+path) {
				t.Fatalf("%v: %q, %v", target, line, err)
			}
			during()
			_ = cmd.Process.Signal(os.Interrupt) // it may have ended with the container
			rest, _ := io.ReadAll(lines)
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v: %v: %s", target, err, rest)
			}
			data, err := os.ReadFile(evidence)
			if err != nil {
				t.Fatal(err)
			}
			rec, err := profiles.DecodeRecording(data)
			if err != nil {
				t.Fatal(err)
			}
			return rec, string(rest)
		}
		for _, target := range [][]string{
			{"--container", id},
			{"--container", id[:12]},
			{"--pid", pid},
			{"--cgroup", path},
			{"--cgroup", strings.TrimPrefix(path, hierarchy.Unified)},
		} {
			rec, says := attach(func() { e.podman("exec", "web", "sh", "-c", "mkdir /x; rmdir /x") }, target...)
			if !rec.All().Has("SCMP_ARCH_X86_64", "mkdir") || rec.All().Has("SCMP_ARCH_X86_64", "setns") {
				t.Errorf("%v: calls %v", target, rec.All())
			}
			if !slices.ContainsFunc(rec.Losses, func(l profiles.Loss) bool { return l.Kind == profiles.LossAttachedLate }) || rec.Gate != profiles.GateOpen || !strings.Contains(says, "attached-late") {
				t.Errorf("%v: losses %v, gate %s, %q", target, rec.Losses, rec.Gate, says)
			}
		}
		// The profile starts a container, though no start was recorded.
		if r := e.run("confined", security(profile), "sh", "-c", "mkdir /x; rmdir /x"); r.code != 0 {
			t.Errorf("confined: %+v", r)
		}
		// The container's end ends it too.
		init, err := strconv.Atoi(pid)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(programs, "syslatch"), "record", "-o", profile, "--allow-losses", "--container", id)
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(stderr)
		if _, err := lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(init, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_, _ = io.ReadAll(lines)
		_ = cmd.Wait() // sleep made no call, so no profile: exit status 125

		for _, c := range []struct {
			args []string
			code int
			says string
		}{
			{[]string{"--container", id}, 2, "--allow-losses"},
			{[]string{"--container", id, "--pid", pid}, 2, "one thing"},
			{[]string{"--container", id, "--", "true"}, 2, "one thing"},
			{[]string{"--container", ""}, 2, "is empty"},
			{[]string{"--allow-losses", "--container", "no-such"}, 125, "no cgroup"},
			{[]string{"--allow-losses", "--cgroup", "/no/such"}, 125, "no such file"},
			{[]string{"--allow-losses", "--pid", "4194303"}, 125, "has ended"},
			{[]string{"--allow-losses", "--pid", strconv.Itoa(os.Getpid())}, 125, "this very command"},
		} {
			out, err := exec.Command(filepath.Join(programs, "syslatch"), append([]string{"record", "-o", profile}, c.args...)...).CombinedOutput()
			if code := exitCode(err); code != c.code || !strings.Contains(string(out), c.says) {
				t.Errorf("%v: exit %d, %s; want %d, %q", c.args, code, out, c.code, c.says)
			}
		}
	})
}

func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}
