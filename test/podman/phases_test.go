// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/test/harness"
)

// phased are the phases of containers that first read, and then write.
const phased = `
- name: plain
  match: {containers: [plain]}
  mode: "off"
- name: agent
  match: {}
  mode: enforce
  existingProfile: replace
  annotations: [mode, phase]
  allowedModes: [off, record, enforce]
  phases:
    initial: read_only
    gaps: report
    read_only:
      allow: ["@file-read", "@basic-io", "@info", "@process"]
    write_logs:
      allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process"]
      limits: {oomScoreAdj: 600}
      next: [read_only, locked]
    network:
      allow: ["@file-read", "@basic-io", "@info", "@process", "@network"]
      next: [read_only, write_logs]
    locked: {irreversible: true}
`

// daemon is a syslatchd, which logs to a file.
type daemon struct {
	e   *env
	cmd *exec.Cmd
	log string
}

// startDaemon starts syslatchd, with no more capabilities than the systemd unit and its
// drop-ins leave it (phases.conf, and those named), and waits until it serves phases.
func (e *env) startDaemon(dropIns ...string) *daemon {
	e.t.Helper()
	f, err := os.CreateTemp(e.dir, "syslatchd-")
	if err != nil {
		e.t.Fatal(err)
	}
	defer f.Close()
	bounding := "-all"
	for _, name := range append(dropIns, "syslatchd.service", "phases.conf") {
		text, err := os.ReadFile("../../contrib/systemd/" + name)
		if err != nil {
			e.t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if names, ok := strings.CutPrefix(line, "CapabilityBoundingSet="); ok {
				bounding += strings.ToLower(strings.ReplaceAll(" "+strings.TrimSpace(names), " CAP_", ",+"))
			}
		}
	}
	d := &daemon{e: e, log: f.Name(), cmd: exec.Command("setpriv", "--bounding-set="+bounding, "--inh-caps=-all", "--no-new-privs",
		filepath.Join(programs, "syslatchd"), "--config", e.policy, "--nri-socket", e.dir+"/none.sock", "--log-format", "json")}
	d.cmd.Stdout, d.cmd.Stderr = f, f
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		d.kill(syscall.SIGTERM)
		if e.t.Failed() {
			e.t.Logf("syslatchd:\n%s", d.text())
		}
	})
	d.wait("serving phases")
	return d
}

func (d *daemon) text() string {
	text, err := os.ReadFile(d.log)
	if err != nil {
		d.e.t.Fatal(err)
	}
	return string(text)
}

// wait waits for a line that has all that is wanted.
func (d *daemon) wait(want ...string) {
	d.e.t.Helper()
	d.e.wait(fmt.Sprintf("%q in syslatchd's log", want), func() bool {
		for line := range strings.Lines(d.text()) {
			has := 0
			for _, w := range want {
				if strings.Contains(line, w) {
					has++
				}
			}
			if has == len(want) {
				return true
			}
		}
		return false
	})
}

// kill ends it and waits; harmless if it has ended.
func (d *daemon) kill(sig syscall.Signal) {
	if d.cmd.ProcessState != nil {
		return
	}
	_ = d.cmd.Process.Signal(sig)
	_ = d.cmd.Wait()
}

// phase runs `syslatch phase`.
func (e *env) phase(args ...string) string {
	e.t.Helper()
	return e.must(e.phaseCommand(args...).CombinedOutput())
}

// phaseFails wants an exit status of `syslatch phase`, and what it says.
func (e *env) phaseFails(code int, says string, args ...string) {
	e.t.Helper()
	cmd := e.phaseCommand(args...)
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != code || !strings.Contains(string(out), says) {
		e.t.Errorf("phase %q: %v: %s; want exit status %d, %q", args, err, out, code, says)
	}
}

func (e *env) phaseCommand(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(e.ctx, filepath.Join(programs, "syslatch"), append([]string{"phase"}, args...)...)
	cmd.Env = append(os.Environ(), "SYSLATCH_SOCKET="+e.dir+"/state/api.sock")
	return cmd
}

// phaseStatus is an instance's; one that a new daemon has picked up has been judged again.
func (e *env) phaseStatus(id string) (st phase.Status) {
	e.t.Helper()
	e.wait(id+" is not switching", func() bool {
		st = decode[phase.Status](e.t, e.phase("get", id, "-o", "json"))
		return st.State != phase.Switching
	})
	return st
}

// supervised lists the instances that there are.
func (e *env) supervised() []phase.Status {
	e.t.Helper()
	type list struct {
		Instances []phase.Status `json:"instances"`
	}
	return decode[list](e.t, e.phase("list", "-o", "json")).Instances
}

// shell is a container's program that does what it is told, a line at a time.
type shell struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	n   int
}

// shell attaches to one that `podman run --interactive` or `podman start` starts.
func (e *env) shell(args ...string) *shell {
	e.t.Helper()
	s := &shell{t: e.t, cmd: command(e.ctx, e.conf, args...)}
	var stderr strings.Builder
	s.cmd.Stderr = &stderr
	in, err := s.cmd.StdinPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	s.in, s.out = in, bufio.NewReader(out)
	e.t.Cleanup(func() {
		s.in.Close()
		if s.cmd.ProcessState == nil {
			_ = s.cmd.Wait()
		}
		if e.t.Failed() {
			e.t.Logf("podman %q: %s", args, stderr.String())
		}
	})
	return s
}

// status is that of a command.
func (s *shell) status(line string) string {
	s.t.Helper()
	if _, err := io.WriteString(s.in, line+"; echo $?\n"); err != nil {
		s.t.Fatal(err)
	}
	answer, err := s.out.ReadString('\n')
	if err != nil {
		s.t.Fatalf("%s: %q, %v", line, answer, err)
	}
	return strings.TrimSpace(answer)
}

// makes wants to see whether a directory can be made.
func (s *shell) makes(want bool) {
	s.t.Helper()
	s.n++
	if got := s.status(fmt.Sprintf("mkdir /tmp/%d", s.n)); (got == "0") != want {
		s.t.Errorf("mkdir: exit status %s, want it to succeed: %v", got, want)
	}
}

// end has the shell end, and waits for podman.
func (s *shell) end() {
	s.t.Helper()
	s.in.Close()
	var exit *exec.ExitError // the shell's status is that of its last command
	if err := s.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		s.t.Error(err)
	}
}

// A container tightens itself, by what it was started with and by what podman exec
// brings in.
func TestPhaseFromInside(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", phased)
		e.startDaemon()
		s := e.shell(runArgs("agent", []string{"--interactive", "--annotation", "syslatch.dev/phase=network"}, "sh")...)
		defer s.end()
		if got := s.status(`attacks ask write_logs | grep -q '"409"'`); got != "0" {
			t.Errorf("loosened itself, or wasn't answered: exit status %s", got)
		}
		if got := e.podman("exec", "agent", "attacks", "ask", "read_only"); !strings.Contains(got, `"200"`) {
			t.Errorf("an exec doesn't tighten: %s", got)
		}
		if got := s.status(`attacks ask read_only | grep -q EPERM`); got != "0" {
			t.Errorf("connects in read_only: exit status %s", got)
		}
	})
}

// A container's phase changes while it runs, both ways, also for what podman exec
// brings in; a syslatchd that is killed leaves it as it is; and each run begins anew.
func TestPhases(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", phased)
		d := e.startDaemon()
		s := e.shell(runArgs("agent", []string{"--interactive", "--network", "host"}, "sh")...)
		s.makes(false)
		id, pid := e.idAndPID("agent")
		execs := 0
		inExec := func(want bool) {
			t.Helper()
			execs++
			r, err := podman(e.ctx, e.conf, "exec", "agent", "sh", "-c", fmt.Sprintf("echo runs; mkdir /tmp/exec%d", execs))
			if err != nil || r.stdout != "runs\n" || (r.code == 0) != want || !want && !strings.Contains(r.stderr, "Operation not permitted") {
				t.Errorf("exec mkdir: %+v, %v, want it to succeed: %v", r, err, want)
			}
		}
		holds := func(name string, generation uint64) {
			t.Helper()
			st := e.phaseStatus(id)
			if st.Phase != name || st.Generation != generation || st.State != phase.Holds || st.Name != "agent" {
				t.Errorf("%+v, want %s, generation %d", st, name, generation)
			}
		}
		server, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		go func() {
			for conn, err := server.Accept(); err == nil; conn, err = server.Accept() {
				conn.Close()
			}
		}()
		connects := func(want bool) {
			t.Helper()
			if got := s.status("nc " + strings.Replace(server.Addr().String(), ":", " ", 1) + " </dev/null"); (got == "0") != want {
				t.Errorf("connect: exit status %s, want it to succeed: %v", got, want)
			}
		}
		holds("read_only", 1)
		inExec(false)
		connects(false)
		e.phase("set", id, "network")
		connects(true)
		s.makes(false)
		if got := s.status("test -S /run/syslatch/phase.sock"); got != "0" {
			t.Errorf("the container has no socket of its own: exit status %s", got)
		}
		e.phase("set", id[:12], "write_logs")
		s.makes(true)
		connects(false)
		inExec(true)
		// What is open for writing is a BPF program's matter.
		kept := func(want bool) {
			t.Helper()
			if got := s.status("echo >&5"); (got == "0") != want {
				t.Errorf("writing to what was opened: exit status %s, want it to succeed: %v", got, want)
			}
		}
		lsm := harness.BPFLSM()
		if got := s.status("exec 5>/tmp/kept"); got != "0" {
			t.Errorf("open: exit status %s", got)
		}
		kept(true)
		if got := e.oomScore(pid); got != 600 {
			t.Errorf("oom_score_adj is %d", got)
		}
		e.phase("set", id, "read_only")
		s.makes(false)
		kept(!lsm)
		inExec(false)
		if lsm {
			d.wait("phase event", `"denied"`, "lsm/file_permission", id)
		}
		if got := e.oomScore(pid); got == 600 {
			t.Error("oom_score_adj is not what it was")
		}
		d.wait("phase event", `"denied"`, "SCMP_ARCH_X86_64", id)

		d.kill(syscall.SIGKILL)
		d = e.startDaemon()
		holds("read_only", 4)
		s.makes(false)
		kept(!lsm)
		e.phase("set", id, "write_logs")
		d.kill(syscall.SIGKILL)
		d = e.startDaemon()
		holds("write_logs", 5)
		s.makes(true)
		kept(true)
		inExec(true)
		s.end()
		d.wait("phase event", `"ended"`, id)
		e.idle()

		s = e.shell("start", "--attach", "--interactive", "agent")
		s.makes(false)
		holds("read_only", 1)
		s.end()
		d.wait("phase event", `"ended"`, id)

		e.wait("an end of all instances", func() bool { return len(e.supervised()) == 0 })
		e.idle()
		if left, err := filepath.Glob(e.dir + "/state/inside/*"); err != nil || len(left) > 0 {
			t.Errorf("sockets of containers are left: %v, %v", left, err)
		}
		if strings.Contains(d.text(), "is not removed") {
			t.Error("a container's socket could not be removed")
		}
	})
}

// Phases that differ in limits alone have no listener, and are switched as well. What
// runs as another user than root takes a drop-in of its own.
func TestPhasesOfLimits(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		high, idle := "", []string{"700", "536870912", "150000", fmt.Sprint(adjust.WeightToShares(50))}
		files := [][3]string{{"memory", "memory.max", "memory.limit_in_bytes"}, {"cpu", "cpu.max", "cpu.cfs_quota_us"}, {"cpu", "cpu.weight", "cpu.shares"}}
		if hierarchy.Mode == cgroup.V2 {
			high, idle = ", high: 256Mi", []string{"700", "536870912", "150000 100000", "50", "268435456"}
			files = append(files, [3]string{"memory", "memory.high"})
		}
		e := newEnv(t, runtime, "", fmt.Sprintf(`
- name: limits
  match: {}
  mode: enforce
  existingProfile: replace
  phases:
    initial: busy
    gaps: report
    busy: {allow: ["@file-read", "@info", "@process"], limits: {oomScoreAdj: 300, memory: {max: 384Mi}}}
    idle: {allow: ["@file-read", "@info", "@process"], limits: {oomScoreAdj: 700, memory: {max: 512Mi%s}, cpu: {max: "150%%", weight: 50}}}
    low: {allow: ["@file-read", "@info", "@process"], limits: {oomScoreAdj: -100}}
`, high))
		d := e.startDaemon("oom-score.conf")
		if r := e.run("agent", []string{"--detach", "--user", "65534"}, "sleep", "1000"); r.code != 0 {
			t.Fatalf("%+v", r)
		}
		id, pid := e.idAndPID("agent")
		limits := func() []string {
			t.Helper()
			all := []string{fmt.Sprint(e.oomScore(pid))}
			for _, f := range files {
				content, _, err := hierarchy.ReadController(pid, f[0], f[1], f[2])
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, content)
			}
			return all
		}
		has := func(want []string) {
			t.Helper()
			if diff := cmp.Diff(want, limits()); diff != "" {
				t.Errorf("limits: %s", diff)
			}
		}
		busy := limits()
		if busy[0] != "300" || busy[1] != "402653184" {
			t.Errorf("at the start: %q", busy)
		}
		e.phase("set", id, "idle")
		has(idle)
		d.kill(syscall.SIGKILL)
		d = e.startDaemon()
		if st := e.phaseStatus(id); st.Phase != "idle" || st.State != phase.Holds {
			t.Errorf("%+v", st)
		}
		e.phaseFails(4, "CAP_DAC_OVERRIDE for a process that isn't root's (contrib/systemd/oom-score.conf)", "set", id, "busy")
		has(append([]string{"700"}, busy[1:]...)) // all that can be is set
		d.kill(syscall.SIGTERM)
		d = e.startDaemon("oom-score.conf")
		e.phase("set", id, "busy")
		has(busy)
		own, err := cgroup.Status(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if own.Capabilities&(1<<unix.CAP_SYS_RESOURCE) != 0 { // it is a gap, if not
			e.phase("set", id, "low")
			if got := e.oomScore(pid); got != -100 {
				t.Errorf("oom_score_adj is %d", got)
			}
		}
		e.podman("rm", "--force", "--time", "0", "agent")
		d.wait("phase event", `"ended"`, id)
		e.idle()
	})
}

// idAndPID are a container's, and its first process's.
func (e *env) idAndPID(name string) (id string, pid int) {
	e.t.Helper()
	if _, err := fmt.Sscan(e.inspect(name, "{{.Id}} {{.State.Pid}}"), &id, &pid); err != nil {
		e.t.Fatal(err)
	}
	return id, pid
}

func (e *env) oomScore(pid int) int {
	e.t.Helper()
	p, err := cgroup.OpenProcess(pid)
	if err != nil {
		e.t.Fatal(err)
	}
	defer p.Close()
	n, err := p.OOMScoreAdj()
	if err != nil {
		e.t.Fatal(err)
	}
	return n
}

// An irreversible phase is a filter on all that runs in a container, and on what podman
// exec brings in. Until then nobody is asked about mkdir, so nothing else denies it.
func TestRatchet(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", `
- name: agent
  match: {}
  mode: enforce
  existingProfile: replace
  annotations: [phase]
  phases:
    initial: work
    gaps: report
    work: {allow: ["@file-read", "@basic-io", "@process", mkdir]}
    locked: {allow: ["@basic-io", "@process"], irreversible: true}
`)
		e.startDaemon("ratchet.conf")
		s := e.shell(runArgs("agent", []string{"--interactive"}, "sh")...)
		s.makes(true)
		if got := s.status("{ sleep 1000 & }"); got != "0" {
			t.Errorf("a second process: exit status %s", got)
		}
		id, pid := e.idAndPID("agent")
		filters := func() (all []int) {
			t.Helper()
			procs, _, err := hierarchy.ReadController(pid, "pids", "cgroup.procs", "cgroup.procs")
			if err != nil {
				t.Fatal(err)
			}
			for of := range strings.FieldsSeq(procs) {
				n, err := strconv.Atoi(of)
				if err != nil {
					t.Fatal(err)
				}
				st, err := cgroup.Status(n)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, st.SeccompFilters)
			}
			return all
		}
		before := filters()
		e.phase("set", id, "locked", "--timeout", "30s")
		s.makes(false)
		if now := filters(); len(before) != 2 || !slices.Equal(now, []int{before[0] + 1, before[1] + 1}) {
			t.Errorf("filters: %v before, %v now", before, now)
		}
		if st := e.phaseStatus(id); st.State != phase.Holds || strings.Contains(fmt.Sprint(st.Uncovered), "supervisor says so") {
			t.Errorf("%+v", st)
		}
		const makes = "mkdir /tmp/x && echo made; echo done"
		denied := func(r result, err error) {
			t.Helper()
			if err != nil || r.stdout != "done\n" || !strings.Contains(r.stderr, "Operation not permitted") {
				t.Errorf("mkdir: %+v, %v", r, err)
			}
		}
		denied(podman(e.ctx, e.conf, "exec", "agent", "sh", "-c", makes))
		e.phaseFails(3, "locked", "set", id, "work")
		s.makes(false)
		s.end()
		denied(e.run("begun", []string{"--annotation", "syslatch.dev/phase=locked"}, "sh", "-c", makes), nil)
		e.wait("an end of all instances", func() bool { return len(e.supervised()) == 0 })
		e.idle()
	})
}

// TestFilterDenials: what filters deny by themselves is an event where the policy says so
// and the runtime knows the flag, which an old runc says that it doesn't.
func TestFilterDenials(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", `
- name: agent
  match: {}
  mode: enforce
  existingProfile: replace
  logDenials: true
  phases:
    initial: work
    gaps: report
    work: {allow: ["@file-read", "@basic-io", "@process", mkdir]}
    locked: {allow: ["@basic-io", "@process"], irreversible: true}
`)
		d := e.startDaemon("ratchet.conf", "log-denials.conf")
		if strings.HasSuffix(runtime, "runc") {
			if got := e.run("old", nil, "true"); got.code == 0 || !strings.Contains(got.stderr, "seccomp flags") {
				t.Errorf("%+v", got)
			}
			return
		}
		s := e.shell(runArgs("agent", []string{"--interactive"}, "sh")...)
		denied := func(what, from, call string) {
			t.Helper()
			if got := s.status(what); got == "0" {
				t.Errorf("%s: not denied", what)
			}
			d.wait("phase event", `"denied"`, `"from":"`+from+`"`, "SCMP_ARCH_X86_64 "+call)
		}
		denied("unshare -n true", "work", "unshare")
		id, _ := e.idAndPID("agent")
		e.phase("set", id, "locked", "--timeout", "30s")
		denied("mkdir /tmp/x", "locked", "mkdir")
		s.end()
		e.wait("an end of all instances", func() bool { return len(e.supervised()) == 0 })
		e.idle()
	})
}

// A container with phases starts in the one that it is to start in, and only where
// somebody supervises it; what has ended costs nothing.
func TestPhaseAtCreate(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", phased)
		run := func(options ...string) result {
			t.Helper()
			e.name++
			return e.run(fmt.Sprintf("agent%d", e.name), options, "sh", "-c", "mkdir /tmp/x && echo made; echo done")
		}
		refused := func(r result, says ...string) {
			t.Helper()
			for _, s := range append(says, "syslatch: ") {
				if r.code == 0 || r.stdout != "" || !strings.Contains(r.stderr, s) {
					t.Errorf("%+v, want %q", r, s)
				}
			}
		}
		refused(run(), "policy agent: phases need a running syslatchd (systemctl start syslatchd")
		d := e.startDaemon()
		if r := run(); r.stdout != "done\n" || !strings.Contains(r.stderr, "Operation not permitted") {
			t.Errorf("initial phase: %+v", r)
		}
		if r := run("--annotation", "syslatch.dev/phase=write_logs"); r.stdout != "made\ndone\n" {
			t.Errorf("by annotation: %+v", r)
		}
		// One whose program isn't there is created, and ends without poststop: its
		// journal is the next container's to clear.
		if r := e.run("none", nil, "/no/such/program"); r.code != 127 {
			t.Errorf("%+v", r)
		}
		e.wait("an end of all instances", func() bool { return len(e.supervised()) == 0 })
		if hierarchy.Mode == cgroup.V2 && filepath.Base(runtime) == "crun" { // runc can't
			r, err := podman(e.ctx, e.conf, "run", "--entrypoint", "[]", "--cgroups", "disabled", "--name", "disabled", image, "true")
			if err != nil {
				t.Fatal(err)
			}
			refused(r, "no cgroup of its own")
		}
		if runtime != runtimes[0] {
			return // the rest is not the runtime's
		}

		if r := run("--annotation", "phase.syslatch.dev=write_logs"); r.stdout != "made\ndone\n" {
			t.Errorf("by annotation: %+v", r)
		}
		refused(run("--annotation", "syslatch.dev/phase=loose"), `value "loose"`, "read_only, write_logs, network or locked")
		if r := run(mode("record")...); r.stdout != "made\ndone\n" {
			t.Errorf("in mode record: %+v", r)
		}
		// Polls of ends, and listeners, are closed.
		open := func() int {
			t.Helper()
			fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			return len(fds)
		}
		e.wait("an end of all instances", func() bool { return len(e.supervised()) == 0 })
		before := open()
		for range 2 {
			run()
		}
		e.wait("an end of all instances", func() bool { return len(e.supervised()) == 0 })
		e.wait("closed descriptors", func() bool { return open() <= before })
		e.idle()

		e.write("", strings.Replace(phased, "existingProfile: replace", "existingProfile: keep", 1))
		refused(run(), "set existingProfile: replace if that is meant")
		if r := run("--security-opt", "seccomp=unconfined"); r.stdout != "done\n" {
			t.Errorf("without a profile of podman's: %+v", r)
		}
		e.write("", strings.Replace(phased, "gaps: report", "gaps: deny", 1))
		why := "stay writable"
		if harness.BPFLSM() {
			why = "CAP_SYS_PTRACE"
		}
		refused(run(), "can't be enforced on this host", why)
		d.kill(syscall.SIGTERM)
		refused(run(), "phases need a running syslatchd")
		if r := e.run("plain", nil, "mkdir", "/x"); r.code != 0 {
			t.Errorf("without phases: %+v", r)
		}
		e.idle()
	})
}

// A rootless container has no phases, and is not started without.
func TestPhasesAreNotForRootless(t *testing.T) {
	r := newRootless(t, runtimes[0])
	r.write(fmt.Sprintf("hook: {rootless: {users: [%s], socket: %s}}\n", servedUser, r.socket),
		strings.NewReplacer("match: {}", `match: {users: ["*"]}`, "match: {containers", `match: {users: ["*"], containers`).Replace(phased))
	r.load()
	r.start()
	r.refused(r.userRun("agent", []string{"--annotation", "syslatch.dev/phase=read_only"}, "true"), "rootless containers can't have")
	if got := r.userRun("plain", nil, "true"); got.code != 0 {
		t.Errorf("left alone: %+v", got)
	}
	r.idle()
}
