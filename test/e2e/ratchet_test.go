// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/test/harness"
)

// Only locked denies stat and mkdir: until then they are no supervisor's business.
const ratchetPolicy = `
- name: agent
  match: {}
  mode: enforce
  limits: {pids: {max: 60}}
  phases:
    initial: work
    gaps: report
    work: {allow: ["@file-read", "@basic-io", "@process", mkdir, alarm]}
    other: {allow: ["@file-read", "@basic-io", "@process", "@network", mkdir, alarm], next: [work]}
    locked: {allow: ["@basic-io", "@process", alarm], irreversible: true}
`

// filtersOf counts the tasks of a container by their number of filters.
func filtersOf(t *testing.T, pid int) map[int]int {
	t.Helper()
	out := map[int]int{}
	for line := range strings.Lines(fileOf(t, pid, "pids", "cgroup.procs", "cgroup.procs")) {
		tasks, _ := filepath.Glob("/proc/" + strings.TrimSpace(line) + "/task/*/status") // the pattern is good
		for _, path := range tasks {
			data, err := os.ReadFile(path)
			_, text, ok := strings.Cut(string(data), "\nSeccomp_filters:\t")
			text, _, _ = strings.Cut(text, "\n")
			n, nerr := strconv.Atoi(text)
			if err != nil || strings.Contains(string(data), "\nState:\tZ") {
				continue // it has ended
			}
			if !ok || nerr != nil {
				t.Fatalf("%s:\n%s", path, data)
			}
			out[n]++
		}
	}
	return out
}

// TestRatchet: an irreversible phase is enforced by the kernel alone, for what runs in a
// container and for what is executed in it later, whether a syslatchd runs or not.
func TestRatchet(t *testing.T) {
	e := newEnv(t, harness.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute) // in a guest
	t.Cleanup(cancel)
	e.ctx = ctx
	d := e.start(ratchetPolicy)
	const script = `loop() { while sleep 0.05; do if [ -e /bin ]; then echo $1 in; else echo $1 out; fi; done; }; loop b & loop a`
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		t.Run(runtime, func(t *testing.T) {
			c := mustCreate(t, e, harness.PodOptions{Runtime: runtime}, sh(script))
			if err := c.Start(e.ctx); err != nil {
				t.Fatal(err)
			}
			both := func(want string) {
				t.Helper()
				from := strings.Count(c.Log(), "\n")
				if err := c.WaitLog(e.ctx, func(log string) bool {
					lines := strings.Split(log, "\n")
					now := "\n" + strings.Join(lines[min(from, len(lines)):], "\n")
					return strings.Contains(now, "\na "+want+"\n") && strings.Contains(now, "\nb "+want+"\n")
				}); err != nil {
					t.Fatalf("never both %s: %v\n%.500s", want, err, c.Log())
				}
			}
			execs := func(want string) {
				t.Helper()
				r, err := c.Exec(e.ctx, "/bin/sh", "-c", "[ -e /bin ] && echo in || echo out")
				if err != nil || r.Log != want+"\n" {
					t.Errorf("an exec: %+v, %v; want %s", r, err, want)
				}
			}
			both("in")
			execs("in")
			pid := pidOf(t, e, c)
			base := filtersOf(t, pid)
			if len(base) != 1 {
				t.Fatalf("filters: %v", base)
			}
			oneMore := func(when string) {
				t.Helper()
				now := filtersOf(t, pid)
				for n := range base {
					if len(now) != 1 || now[n+1] < 2 {
						t.Errorf("%s: filters %v before, %v now", when, base, now)
					}
				}
			}
			e.setPhase(c.ID, "locked")
			oneMore("locked")
			both("out")
			execs("out")
			oneMore("after an exec")
			if st := e.phaseStatus(c.ID); st.State != phase.Holds || len(st.Uncovered) > 0 && strings.Contains(fmt.Sprint(st.Uncovered), "supervisor says so") {
				t.Errorf("%+v", st)
			}
			if out, code := e.phase("set", c.ID, "work"); code != 3 {
				t.Errorf("out of it: exit status %d: %s", code, out)
			}
			d.kill(syscall.SIGKILL)
			oneMore("without a syslatchd")
			d = e.start(ratchetPolicy)
			d.waitLog("the phase's own filter was put on processes", `"processes":0`, c.ID)
			both("out")
			execs("out")
			oneMore("with another")
			if err := c.Stop(e.ctx, 0); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRatchetStorm: a fork bomb, which has all the processes that it may have, slips none
// past an irreversible phase.
func TestRatchetStorm(t *testing.T) {
	dir := os.Getenv("SYSLATCH_TEST_BIN")
	if dir == "" {
		dir = t.TempDir()
		if out, err := exec.Command("gcc", "-O1", "-static", "-pthread", "-o", dir+"/injected", "../workloads/injected/injected.c").CombinedOutput(); err != nil {
			t.Fatalf("gcc: %v\n%s", err, out)
		}
	}
	e := newEnv(t, harness.Options{})
	e.start(ratchetPolicy)
	c := mustCreate(t, e, harness.PodOptions{}, harness.ContainerOptions{
		Command: []string{"/w/injected", "bomb", "signals"},
		Mounts:  []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/w", Readonly: true}},
	})
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitLog(e.ctx, func(log string) bool { return log != "" }); err != nil {
		t.Fatal(err)
	}
	pid := pidOf(t, e, c)
	// tell sends it a signal, and gives what it counts.
	tell := func(sig syscall.Signal) (forks, eperm, other int) {
		t.Helper()
		from := strings.Count(c.Log(), "\n")
		if err := unix.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		if err := c.WaitLog(e.ctx, func(log string) bool { return strings.Count(log, "\n") > from }); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(c.Log()), "\n")
		if _, err := fmt.Sscan(lines[len(lines)-1], &forks, &eperm, &other); err != nil {
			t.Fatalf("%v: %s", err, c.Log())
		}
		return forks, eperm, other
	}
	var before int
	for tasks := 0; tasks < 30 || before < 200; {
		tasks = 0
		for _, n := range filtersOf(t, pid) {
			tasks += n
		}
		before, _, _ = tell(syscall.SIGUSR2)
	}
	base := filtersOf(t, pid)
	if out, code := e.phase("set", c.ID, "locked", "--timeout", "60s"); code != 0 {
		t.Fatalf("phase set: exit status %d: %s", code, out)
	}
	tell(syscall.SIGUSR1)
	for eperm, other := 0, 0; eperm < 200 && other == 0; {
		if _, eperm, other = tell(syscall.SIGUSR2); other > 0 {
			t.Errorf("%d tries were denied and %d not", eperm, other)
		}
		if now := filtersOf(t, pid); len(now) != 1 || len(base) != 1 {
			t.Errorf("filters: %v before, %v now", base, now)
			break
		}
	}
	if err := c.Stop(e.ctx, 0); err != nil {
		t.Error(err)
	}
}
