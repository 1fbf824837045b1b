// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/test/harness"
)

// programPolicy are phases that differ in what only BPF programs see.
const programPolicy = `
- name: agent
  match: {}
  mode: enforce
  annotations: [phase]
  phases:
    initial: read_only
    gaps: report
    read_only:
      allow: ["@file-read", "@basic-io", "@info", "@process"]
    write_logs:
      allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process"]
      files: {write: [/tmp/logs, /dev/null]}
    network:
      allow: ["@file-read", "@basic-io", "@info", "@process", "@network"]
      network: ["127.0.0.1/32:PORT"]
    few_files:
      allow: ["@file-read", "@basic-io", "@info", "@process"]
      files: {read: [/bin, /tmp/logs]}
    bare: {allow: [execve, dup2]}
`

// listen takes connections, and closes them, until the test's end.
func listen(t *testing.T) (port int) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// enforced lists what the kernel enforces of this environment.
func (e *env) enforced() []bpf.Enforced {
	e.t.Helper()
	x, err := bpf.OpenEnforcer(e.bpffs+"-phases", bpf.EnforcerOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	defer x.Close()
	all, err := x.Instances()
	if err != nil {
		e.t.Fatal(err)
	}
	return all
}

// TestPhasePrograms: paths, addresses and what was opened in an earlier phase, in a
// container and in what is executed in it, also while no syslatchd runs.
func TestPhasePrograms(t *testing.T) {
	e := newEnv(t, harness.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute) // in a guest
	t.Cleanup(cancel)
	e.ctx = ctx
	port, other := listen(t), listen(t)
	policy := strings.ReplaceAll(programPolicy, "PORT", fmt.Sprint(port))
	d := e.start(policy)
	lsm := harness.BPFLSM()
	// Nothing in the loop asks the supervisor.
	const script = `mkdir /tmp/logs; mkfifo /tmp/logs/fifo; exec 5>/tmp/logs/kept 6<>/tmp/logs/fifo 2>/dev/null
while :; do if echo >&5; then echo kept written; else echo kept denied; fi; read -t 0.2 x <&6; done`
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		t.Run(runtime, func(t *testing.T) {
			c := mustCreate(t, e, harness.PodOptions{Runtime: runtime, Annotations: map[string]string{"phase.syslatch.dev/pod": "write_logs"}}, sh(script))
			if err := c.Start(e.ctx); err != nil {
				t.Fatal(err)
			}
			kept := func(want string) {
				t.Helper()
				from := strings.Count(c.Log(), "\n")
				if err := c.WaitLog(e.ctx, func(log string) bool {
					lines := strings.Split(strings.TrimSpace(log), "\n")
					return len(lines) > from+2 && lines[len(lines)-1] == "kept "+want
				}); err != nil {
					t.Fatalf("not %s: %v\n%.200s", want, err, c.Log())
				}
			}
			// does executes something in the container, and wants it to succeed or not.
			does := func(ok bool, script string) {
				t.Helper()
				r, err := c.Exec(e.ctx, "/bin/sh", "-c", script)
				if err != nil || (r.Code == 0) != ok || !ok && !strings.Contains(r.Log, "Operation not permitted") {
					t.Errorf("%s: %+v, %v, want it to succeed: %v", script, r, err, ok)
				}
			}
			connect := func(port int) string { return fmt.Sprintf("nc -w 5 127.0.0.1 %d", port) }
			keptAfter := map[bool]string{true: "denied", false: "written"}[lsm]
			kept("written")
			does(true, ": >/tmp/logs/1")
			does(!lsm, ": >/tmp/elsewhere")
			does(!lsm, ": >>/proc/self/comm")
			does(false, connect(port))

			e.setPhase(c.ID, "read_only")
			kept(keptAfter)
			does(true, "cat /tmp/logs/1")
			does(false, ": >/tmp/logs/2")

			e.setPhase(c.ID, "network")
			kept(keptAfter)
			does(true, connect(port))
			does(false, connect(other)) // by a program of the cgroup's on any host

			// What a runtime opens before its execve is not the phase's business.
			e.setPhase(c.ID, "bare")
			if r, err := c.Exec(e.ctx, "/bin/busybox", "echo", "runs"); err != nil || r.Log != "runs\n" {
				t.Errorf("an exec in a phase that opens nothing: %+v, %v", r, err)
			}
			if r, err := c.Exec(e.ctx, "/bin/busybox", "cat", "/tmp/logs/1"); err != nil || r.Code == 0 {
				t.Errorf("a phase that opens nothing: %+v, %v", r, err)
			}

			e.setPhase(c.ID, "few_files")
			kept(keptAfter)
			does(true, "cat /tmp/logs/1")
			does(!lsm, "cat /etc/hosts")
			does(!lsm, "cat /proc/self/comm")
			does(false, ": >/tmp/logs/3")

			d.kill(syscall.SIGKILL)
			kept(keptAfter)
			d = e.start(policy)
			kept(keptAfter)
			if st := e.phaseStatus(c.ID); st.Phase != "few_files" || st.State != phase.Holds {
				t.Errorf("%+v", st)
			}
			e.setPhase(c.ID, "write_logs")
			kept("written")
			does(!lsm, ": >/tmp/elsewhere2")
			d.kill(syscall.SIGKILL)
			kept("written")
			d = e.start(policy)
			does(!lsm, ": >/tmp/elsewhere3")
			e.setPhase(c.ID, "network")
			kept(keptAfter)
			does(false, connect(other))
			program := "cgroup/connect4"
			if lsm { // which is asked first
				program = "lsm/socket_connect"
			}
			d.waitLog("phase event", `"denied"`, program, c.ID)
			if err := c.Stop(e.ctx, 0); err != nil {
				t.Error(err)
			}
			d.waitLog("phase event", `"ended"`, c.ID)
			d.waitLog("container ended", c.ID)
			if left := e.enforced(); len(left) != 0 {
				t.Errorf("left: %+v", left)
			}
		})
	}
	// One that ends while nobody looks, and one whose pins are taken away.
	c := mustCreate(t, e, harness.PodOptions{}, sh("sleep 1000"))
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	if all := e.enforced(); len(all) != 1 {
		t.Errorf("%+v", all)
	}
	d.kill(syscall.SIGKILL)
	if err := c.Stop(e.ctx, 0); err != nil {
		t.Error(err)
	}
	d = e.start(policy)
	d.waitLog("container ended", c.ID)
	if left := e.enforced(); len(left) != 0 {
		t.Errorf("left: %+v", left)
	}
	c = mustCreate(t, e, harness.PodOptions{}, sh("sleep 1000"))
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	if err := bpf.RemoveEnforcer(e.bpffs + "-phases"); err != nil {
		t.Fatal(err)
	}
	d.waitLog("phase event", `"lost"`, "pins are gone", c.ID)
	if st := e.phaseStatus(c.ID); st.State != phase.Degraded || !strings.Contains(strings.Join(st.Uncovered, "\n"), "BPF programs") {
		t.Errorf("%+v", st)
	}
}
