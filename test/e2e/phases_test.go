// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/test/harness"
	"github.com/syslatch/syslatch/test/images"
	"github.com/syslatch/syslatch/test/workloads"
)

// agentPolicy are the phases of an agent that reads, writes, and talks.
const agentPolicy = `
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
      limits: {pids: {max: 77}, oomScoreAdj: 600}
    network:
      allow: ["@file-read", "@basic-io", "@info", "@process", "@network"]
      next: [read_only]
    locked: {irreversible: true}
`

// phase runs `syslatch phase` and gives its exit status.
func (e *env) phase(args ...string) (stdout string, code int) {
	e.t.Helper()
	return e.syslatch(append([]string{"phase"}, args...)...)
}

func (e *env) syslatch(args ...string) (stdout string, code int) {
	e.t.Helper()
	cmd := exec.CommandContext(e.ctx, filepath.Join(programs, "syslatch"), args...)
	cmd.Env = append(cmd.Environ(), "SYSLATCH_SOCKET="+filepath.Join(e.dir, "state", "api.sock"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		e.t.Fatal(err)
	}
	if errs.Len() > 0 {
		e.t.Logf("syslatch %v: %s", args, errs.String())
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

func (e *env) setPhase(id, to string) {
	e.t.Helper()
	if out, code := e.phase("set", id, to); code != 0 {
		e.t.Fatalf("phase set %s: exit status %d: %s", to, code, out)
	}
}

// phaseStatus is an instance's; one that a new daemon has picked up has been judged again.
func (e *env) phaseStatus(id string) (st phase.Status) {
	e.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for st.State = phase.Switching; st.State == phase.Switching; <-tick.C {
		out, code := e.phase("get", id, "-o", "json")
		if err := json.Unmarshal([]byte(out), &st); err != nil || code != 0 {
			e.t.Fatalf("phase get: exit status %d, %v: %s", code, err, out)
		}
	}
	return st
}

// startAgent starts agent.mjs, which connects to port.
func (e *env) startAgent(p harness.PodOptions, port int) *harness.Container {
	e.t.Helper()
	scripts, err := filepath.Abs("../workloads")
	if err != nil {
		e.t.Fatal(err)
	}
	c := mustCreate(e.t, e, p, harness.ContainerOptions{
		Image:   images.WorkloadsImage,
		Command: []string{"/usr/bin/node", workloads.Scripts + "/agent.mjs", "/tmp/agent.log", fmt.Sprint(port)},
		Mounts:  []*runtimeapi.Mount{{HostPath: scripts, ContainerPath: workloads.Scripts, Readonly: true}},
	})
	if err := c.Start(e.ctx); err != nil {
		e.t.Fatal(err)
	}
	return c
}

// says waits until the last line of a container's log is what is wanted.
func says(t *testing.T, e *env, c *harness.Container, want string) {
	t.Helper()
	if err := c.WaitLog(e.ctx, func(log string) bool {
		lines := strings.Split(strings.TrimSpace(log), "\n")
		return lines[len(lines)-1] == want
	}); err != nil {
		t.Fatalf("never said %q: %v\n%s", want, err, c.Log())
	}
}

// TestPhases is what phases are for: an agent that runs on while what it may do
// changes, both ways.
func TestPhases(t *testing.T) {
	image, err := images.Workloads(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e := newEnv(t, harness.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute) // the image is large
	t.Cleanup(cancel)
	e.ctx = ctx
	if err := e.Import(e.ctx, image); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // until it is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	d := e.start(agentPolicy)
	kept := "ok"
	if harness.BPFLSM() {
		kept = "EPERM"
	}
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		t.Run(runtime, func(t *testing.T) {
			c := e.startAgent(harness.PodOptions{Runtime: runtime}, l.Addr().(*net.TCPAddr).Port)
			says(t, e, c, "read=ok write=EPERM kept=none connect=EPERM")
			inPhase := func(want string) {
				t.Helper()
				r, err := c.Exec(e.ctx, "/bin/mkdir", fmt.Sprintf("/tmp/%d", e.phaseStatus(c.ID).Generation))
				if err != nil || (r.Code == 0) != (want == "made") {
					t.Errorf("an exec: %+v, %v; want %s", r, err, want)
				}
			}
			inPhase("denied")

			e.setPhase(c.ID, "write_logs")
			says(t, e, c, "read=ok write=ok kept=ok connect=EPERM")
			inPhase("made")
			pid := pidOf(t, e, c)
			if got := fileOf(t, pid, "pids", "pids.max", "pids.max"); got != "77" {
				t.Errorf("pids.max is %s", got)
			}

			e.setPhase(c.ID[:20], "network")
			says(t, e, c, "read=ok write=EPERM kept="+kept+" connect=ok")
			inPhase("denied")
			e.setPhase(c.ID, "read_only")
			says(t, e, c, "read=ok write=EPERM kept="+kept+" connect=EPERM")
			inPhase("denied")
			e.setPhase(c.ID, "network")
			says(t, e, c, "read=ok write=EPERM kept="+kept+" connect=ok")
			if got := fileOf(t, pid, "pids", "pids.max", "pids.max"); got != "max" {
				t.Errorf("pids.max is %s again", got)
			}

			if out, code := e.phase("set", c.ID, "write_logs"); code != 3 {
				t.Errorf("a transition that the policy doesn't have: exit status %d: %s", code, out)
			}
			// From inside it may only tighten itself.
			r, err := c.Exec(e.ctx, "/usr/bin/node", workloads.Scripts+"/inside.mjs", "write_logs", "nowhere", "read_only")
			if want := "write_logs: 409\nnowhere: 409\nread_only: 200\n"; err != nil || r.Log != want {
				t.Errorf("from inside: %+v, %v; want %q", r, err, want)
			}
			d.waitLog("phase event", `"switched"`, `"origin":"inside"`, c.ID)
			says(t, e, c, "read=ok write=EPERM kept="+kept+" connect=EPERM")
			st := e.phaseStatus(c.ID)
			if st.State != phase.Holds || st.Generation != 6 || st.Denied == 0 || strings.Contains(strings.Join(st.Uncovered, "\n"), "stay writable") == harness.BPFLSM() {
				t.Errorf("%+v", st)
			}
			d.waitLog("phase event", `"denied"`, "SCMP_ARCH_X86_64", c.ID)
			if harness.BPFLSM() {
				d.waitLog("phase event", `"denied"`, "lsm/file_open", c.ID)
				d.waitLog("phase event", `"denied"`, "lsm/file_permission", c.ID)
			}
			if out, code := e.phase("list"); code != 0 || !strings.Contains(out, "read_only") {
				t.Errorf("list: exit status %d: %s", code, out)
			}
			// A ratchet doesn't break Node, all of whose threads have it.
			base := filtersOf(t, pid)
			e.setPhase(c.ID, "locked")
			says(t, e, c, "read=EPERM write=EPERM kept="+kept+" connect=EPERM")
			for n, threads := range base {
				if now := filtersOf(t, pid); len(base) != 1 || now[n+1] != threads || threads < 2 {
					t.Errorf("filters %v before, %v in locked", base, now)
				}
			}
			if err := c.Stop(e.ctx, 0); err != nil {
				t.Error(err)
			}
			d.waitLog("phase event", `"ended"`, c.ID)
			if _, code := e.phase("get", c.ID); code == 0 {
				t.Error("the container has ended, and has a phase")
			}
		})
	}
}

// TestPhaseAtCreate: policy or annotation say in which phase a container begins, and
// what can't be enforced keeps it from starting unless the policy says otherwise.
func TestPhaseAtCreate(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(agentPolicy)
	const script = "mkdir /tmp/x && echo made; echo done"
	in := func(name string) harness.PodOptions {
		return harness.PodOptions{Annotations: map[string]string{"phase.syslatch.dev/container.app": name}}
	}
	if r := e.run(harness.PodOptions{}, sh(script)); r.Code != 0 || strings.Contains(r.Log, "made") || !strings.Contains(r.Log, "Operation not permitted") {
		t.Errorf("initial phase: %+v", r)
	}
	if r := e.run(in("write_logs"), sh(script+"; cat /proc/self/oom_score_adj")); r.Code != 0 || r.Log != "made\ndone\n600\n" {
		t.Errorf("write_logs by annotation: %+v", r)
	}
	if msg := createError(t, e, in("loose"), sh(script)); !strings.Contains(msg, "loose") || !strings.Contains(msg, "read_only, write_logs, network or locked") {
		t.Errorf("an unknown phase: %s", msg)
	}
	own := sh(script)
	own.Confined, own.Seccomp = true, runtimeapi.SecurityProfile_RuntimeDefault
	if !onCRIO() {
		if msg := createError(t, e, harness.PodOptions{}, own); !strings.Contains(msg, "existingProfile: replace") {
			t.Errorf("beside RuntimeDefault: %s", msg)
		}
	}
	d.kill(15)
	e.start(strings.Replace(agentPolicy, "gaps: report", "gaps: deny", 1))
	if harness.BPFLSM() { // there are none
		if r := e.run(harness.PodOptions{}, sh(script)); r.Code != 0 || strings.Contains(r.Log, "made") {
			t.Errorf("without gaps: %+v", r)
		}
	} else if msg := createError(t, e, harness.PodOptions{}, sh(script)); !strings.Contains(msg, "can't be enforced on this host") || !strings.Contains(msg, "stay writable") {
		t.Errorf("with gaps: %s", msg)
	}
}

// blockingPolicy: what waits in accept is denied it by the second phase, and what waits in
// read is not.
const blockingPolicy = `
- name: agent
  match: {}
  mode: enforce
  phases:
    initial: serving
    gaps: report
    serving: {allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process", "@network"]}
    quiet: {allow: ["@file-read", "@basic-io", "@info", "@process"], network: none}
`

// TestPhaseBlockedCalls: a call that has blocked before a switch, and that the new phase
// doesn't allow, fails; one that it allows goes on.
func TestPhaseBlockedCalls(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(blockingPolicy)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	co := sh(`exec 3<>/t/fifo 2>&1; (head -n 1 <&3; echo head $?) & nc -l; echo nc $?; wait`)
	co.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/t"}}
	c := mustCreate(t, e, harness.PodOptions{}, co)
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	pid := pidOf(t, e, c)
	// waits lists where its processes wait in the kernel, by pid: to have called accept is
	// not enough, as the supervisor may still be asked.
	waits := func() map[string]string {
		out := map[string]string{}
		for p := range strings.FieldsSeq(fileOf(t, pid, "pids", "cgroup.procs", "cgroup.procs")) {
			data, _ := os.ReadFile("/proc/" + p + "/wchan") // it may have ended
			out[p] = string(data)
		}
		return out
	}
	in := func(function string) (pid string) {
		t.Helper()
		if err := c.WaitLog(e.ctx, func(string) bool {
			for p, where := range waits() {
				if strings.Contains(where, function) {
					pid = p
				}
			}
			return pid != ""
		}); err != nil {
			t.Fatalf("none waits in %s: %v", function, waits())
		}
		return pid
	}
	in("inet_csk_")
	reader := in("pipe_read")

	e.setPhase(c.ID, "quiet")
	says(t, e, c, "nc 1")
	if log := c.Log(); log != "nc: accept: Operation not permitted\nnc 1\n" {
		t.Errorf("what was in accept says %q", log)
	}
	d.waitLog("phase event", `"denied"`, "accept", c.ID)
	if now := in("pipe_read"); now != reader {
		t.Errorf("%s was in read, and now %s is", reader, now)
	}
	if err := os.WriteFile(fifo, []byte("goes on\n"), 0); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Wait(e.ctx); err != nil || r.Code != 0 || !strings.HasSuffix(r.Log, "\nnc 1\ngoes on\nhead 0\n") {
		t.Errorf("what was in read: %+v, %v", r, err)
	}
}

// TestPhasesOutliveTheDaemon: a syslatchd that is killed, or that another takes the place
// of, costs a container with phases time, and nothing else, as long as the holder of its
// listener lives; without that, what differs between phases is denied.
func TestPhasesOutliveTheDaemon(t *testing.T) {
	e := newEnv(t, harness.Options{})
	upgraded := filepath.Join(t.TempDir(), "syslatchd")
	data, err := os.ReadFile(filepath.Join(programs, "syslatchd"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(upgraded, data, 0o755); err != nil {
		t.Fatal(err)
	}
	d := e.start(agentPolicy)
	// Every round asks the supervisor, and ends with a line. Without a supervisor a
	// fork fails, and ends the subshell.
	const script = `(i=0; while sleep 0.02; do i=$((i+1)); if mkdir /tmp/$i; then echo $i made; else echo $i denied; fi; done); echo broken; while :; do :; done`
	type end struct {
		phase  string
		signal syscall.Signal // SIGTERM: the next is the upgraded one
	}
	for _, test := range []struct {
		runtime string
		ends    []end
	}{
		{harness.Runc11, []end{{"write_logs", syscall.SIGKILL}, {"read_only", syscall.SIGTERM}}},
		{harness.Runc15, []end{{"write_logs", syscall.SIGTERM}, {"read_only", syscall.SIGKILL}}},
	} {
		t.Run(test.runtime, func(t *testing.T) {
			c := mustCreate(t, e, harness.PodOptions{Runtime: test.runtime, Annotations: map[string]string{"phase.syslatch.dev/pod": "write_logs"}}, sh(script))
			if err := c.Start(e.ctx); err != nil {
				t.Fatal(err)
			}
			lines := func() int { return strings.Count(c.Log(), "\n") }
			goesOn := func(with string) {
				t.Helper()
				from := lines()
				if err := c.WaitLog(e.ctx, func(log string) bool {
					all := strings.Split(strings.TrimSpace(log), "\n")
					return len(all) > from+5 && strings.HasSuffix(all[len(all)-1], with)
				}); err != nil {
					t.Fatalf("doesn't go on, %s: %v\n%.300s", with, err, c.Log())
				}
			}
			goesOn("made")
			for _, end := range test.ends {
				e.setPhase(c.ID, end.phase)
				want := map[string]string{"write_logs": "made", "read_only": "denied"}[end.phase]
				goesOn(want)
				d.kill(end.signal)
				waits := pidOf(t, e, c)
				if end.signal == syscall.SIGTERM {
					d = e.startFrom(upgraded, agentPolicy)
				} else {
					d = e.start(agentPolicy)
				}
				goesOn(want)
				d.waitLog("phase event", `"resumed"`, c.ID)
				if strings.Contains(d.log.String(), `"begun"`) {
					t.Error("the container has begun once more")
				}
				if st := e.phaseStatus(c.ID); st.Phase != end.phase || st.State != phase.Holds {
					t.Errorf("after %v: %+v", end.signal, st)
				}
				if pid := pidOf(t, e, c); pid != waits {
					t.Errorf("pid was %d, is %d", waits, pid)
				}
			}
			// Nothing was answered twice, and nothing denied that the phase allows.
			denied := false
			round := 0
			for line := range strings.Lines(c.Log()) {
				if strings.HasPrefix(line, "mkdir: ") {
					continue // why not
				}
				round++
				word, ok := strings.CutPrefix(strings.TrimSpace(line), fmt.Sprintf("%d ", round))
				switch {
				case !ok, word == "made" && denied, word != "made" && word != "denied":
					t.Fatalf("round %d is %q", round, line)
				case word == "denied":
					denied = true // and not made again
				}
			}

			holder := e.holder()
			d.kill(syscall.SIGKILL)
			if err := syscall.Kill(holder, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			// What the fork's failure says may come before or behind it.
			if err := c.WaitLog(e.ctx, func(log string) bool { return strings.Contains(log, "\nbroken\n") }); err != nil {
				t.Fatalf("goes on without a supervisor: %v\n%s", err, c.Log())
			}
			d = e.start(agentPolicy)
			if st := e.phaseStatus(c.ID); st.State != phase.Degraded || !strings.Contains(strings.Join(st.Uncovered, "\n"), "ENOSYS") {
				t.Errorf("without a holder: %+v", st)
			}
			if out, code := e.syslatch("verify", c.ID); code != 4 || !strings.Contains(out, "degraded") {
				t.Errorf("verify: exit status %d: %s", code, out)
			}
			if err := c.Stop(e.ctx, 0); err != nil { // it keeps a processor busy
				t.Error(err)
			}
		})
	}
}

// TestManyListeners: containers of both runtimes, whose listeners one holder keeps, outlive
// a syslatchd that is killed, every one, and every one is switched.
func TestManyListeners(t *testing.T) {
	e := newEnv(t, harness.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute) // on a busy machine
	t.Cleanup(cancel)
	e.ctx = ctx
	d := e.start(agentPolicy)
	all := make([]*harness.Container, atMost(t, 50)) // 200 pass, too, in minutes; TestManyInstances of internal/agent has as many
	each := func(do func(i int) error) {             // a few at a time
		t.Helper()
		var wg sync.WaitGroup
		next := make(chan int)
		for range 4 {
			wg.Go(func() {
				for i := range next {
					if err := do(i); err != nil {
						t.Errorf("container %d: %v", i, err)
					}
				}
			})
		}
		for i := range all {
			next <- i
		}
		close(next)
		wg.Wait()
	}
	var pods []*harness.Pod // two, as each takes a shim
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		pod, err := e.NewPod(e.ctx, harness.PodOptions{Runtime: runtime})
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	dir := t.TempDir()
	tell := make([]*os.File, len(all)) // open for reading, too: there is always a writer, and a reader
	// One after another, as pods are removed, takes too long.
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		each(func(i int) error {
			if tell[i] != nil { // whose end would end all at once
				defer tell[i].Close()
			}
			if all[i] == nil {
				return nil
			}
			return all[i].Stop(ctx, 0)
		})
	})
	each(func(i int) (err error) {
		fifo := filepath.Join(dir, fmt.Sprint(i))
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			return err
		}
		if tell[i], err = os.OpenFile(fifo, os.O_RDWR, 0); err != nil {
			return err
		}
		co := sh(fmt.Sprintf("exec 2>&1; while read x; do if mkdir /tmp/$x; then echo $x made; else echo $x denied; fi; done </t/%d", i))
		co.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/t"}}
		if all[i], err = pods[i%len(pods)].Create(e.ctx, co); err != nil {
			return err
		}
		return all[i].Start(e.ctx)
	})
	if t.Failed() {
		return
	}
	hold := func(name string) {
		t.Helper()
		var list struct{ Instances []phase.Status }
		var out string
		holds := 0
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for switching := len(all); switching > 0; <-tick.C { // a restarted syslatchd judges them again
			var code int
			out, code = e.phase("list", "-o", "json")
			if err := json.Unmarshal([]byte(out), &list); err != nil || code != 0 {
				t.Fatalf("list: exit status %d, %v: %s", code, err, out)
			}
			holds, switching = 0, 0
			for _, st := range list.Instances {
				switch {
				case st.State == phase.Switching:
					switching++
				case st.Phase == name && st.State == phase.Holds:
					holds++
				}
			}
		}
		if holds != len(all) || len(list.Instances) != len(all) {
			t.Errorf("%d of %d hold in %s, want %d:\n%.2000s", holds, len(list.Instances), name, len(all), out)
		}
	}
	// are tells some of them, of each runtime, to make a call that the supervisor is asked.
	are := func(word, want string) {
		t.Helper()
		for _, i := range []int{0, len(all)/2 | 1, len(all) - 1} {
			if _, err := tell[i].WriteString(word + "\n"); err != nil {
				t.Fatal(err)
			}
			says(t, e, all[i], word+" "+want)
		}
	}
	hold("read_only")
	d.kill(syscall.SIGKILL)
	e.start(agentPolicy)
	hold("read_only")
	if out, code := e.syslatch("verify"); code != 0 {
		t.Errorf("verify: exit status %d: %s", code, out)
	}
	are("a", "denied")
	each(func(i int) error {
		if out, code := e.phase("set", all[i].ID, "write_logs"); code != 0 {
			return fmt.Errorf("phase set: exit status %d: %s", code, out)
		}
		return nil
	})
	hold("write_logs")
	are("b", "made")
}

// holder is the process that keeps this environment's listeners.
func (e *env) holder() int {
	e.t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		e.t.Fatal(err)
	}
	want := "syslatchd\x00internal-holder\x00" + filepath.Join(e.dir, "state") + "\x00"
	for _, path := range found {
		if data, err := os.ReadFile(path); err == nil && string(data) == want {
			pid, err := strconv.Atoi(strings.Split(path, "/")[2])
			if err != nil {
				e.t.Fatal(err)
			}
			return pid
		}
	}
	e.t.Fatal("no holder")
	return 0
}
