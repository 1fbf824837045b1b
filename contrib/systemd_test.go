// SPDX-License-Identifier: Apache-2.0

package contrib

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/test/harness"
)

// insideSystemd is set for the part of TestUnitUnderSystemd that systemd runs.
const insideSystemd = "SYSLATCH_TEST_INSIDE_SYSTEMD"

// Everything that the test's systemd and its services write to is private to
// them: unit files, programs and sockets in /run, the state in /var, the pins, and
// /tmp, which a booting systemd may empty. Its cgroup is its root, without other
// processes, as systemd wants it for handing out controllers.
const startSystemd = `set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/test/out /run/systemd/system/syslatchd.service.d
cp -r "$TEST_FILES"/. /run/test
mount --bind "$TEST_OUT" /run/test/out
cd /run/test
cp syslatchd.service job.service /run/systemd/system/
cp override.conf /run/systemd/system/syslatchd.service.d/
mount -t tmpfs -o mode=755 tmpfs /var
mkdir /var/lib
mount -t tmpfs tmpfs /tmp
mount -t bpf bpf /sys/fs/bpf
echo 0 >"$TEST_GROUP/cgroup.procs"
exec unshare --cgroup sh -c '
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i container=test PATH="$PATH" /lib/systemd/systemd --unit=job.service --show-status=0'
`

// The unit as it is, but for the program's and the policy's path and the log, and
// for the rest of the system that a service comes after by default.
const override = `[Unit]
DefaultDependencies=no
[Service]
ExecStart=
ExecStart=/run/test/syslatchd --config /run/test/policy.yaml
StandardOutput=append:/run/test/out/syslatchd.log
StandardError=append:/run/test/out/syslatchd.log
`

const jobService = `[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
Environment=%s=1 SYSLATCH_TOOLS=%s TMPDIR=/var/lib HOME=/root
WorkingDirectory=/run/test
ExecStart=/run/test/contrib.test -test.v -test.run ^TestUnitUnderSystemd$
ExecStopPost=/bin/systemctl --no-block exit
StandardOutput=append:/run/test/out/log
StandardError=append:/run/test/out/log
`

// TestUnitUnderSystemd starts syslatchd by its unit, under a systemd of its own,
// with all that the unit takes away: it records, publishes, enforces, and is
// there again after a kill.
func TestUnitUnderSystemd(t *testing.T) {
	if os.Getenv(insideSystemd) != "" {
		testInside(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if h.Mode != cgroup.V2 {
		t.Skipf("this host's cgroups are %s: a second systemd needs v2 alone (test/vm/run has it)", h.Mode)
	}
	bin, dir := programs(t), t.TempDir()
	files := filepath.Join(dir, "files")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	for _, d := range []string{files, out} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, source := range map[string]string{
		"syslatchd": filepath.Join(bin, "syslatchd"), "syslatch-hook": filepath.Join(bin, "syslatch-hook"), "syslatch": filepath.Join(bin, "syslatch"), "contrib.test": self,
		"syslatchd.service": "systemd/syslatchd.service", "phases.conf": "systemd/phases.conf", "ratchet.conf": "systemd/ratchet.conf",
		"oom-score.conf": "systemd/oom-score.conf",
	} {
		if out, err := exec.Command("cp", source, filepath.Join(files, name)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for name, text := range map[string]string{
		"override.conf": override,
		"job.service":   fmt.Sprintf(jobService, insideSystemd, tools(t)),
	} {
		if err := os.WriteFile(filepath.Join(files, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Next to the root's children: below them controllers may be missing.
	group, err := cgroup.NewIn(h.Unified, "contrib")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := group.Kill(); err != nil {
			t.Error(err)
		}
		if err := group.Wait(context.Background()); err != nil {
			t.Error(err)
		}
		if err := group.Remove(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", startSystemd)
	cmd.Env = append(os.Environ(), "TEST_FILES="+files, "TEST_OUT="+out, "TEST_GROUP="+group.Path())
	cmd.WaitDelay = time.Second
	said, err := cmd.CombinedOutput()
	inside, _ := os.ReadFile(filepath.Join(out, "log")) // none where it got that far only
	if !strings.Contains(string(inside), "--- PASS: TestUnitUnderSystemd") {
		t.Errorf("systemd: %v\n%s\ninside:\n%s", err, said, inside)
	}
}

const daemonLog = "out/syslatchd.log"

const insidePolicy = `apiVersion: syslatch.dev/v1
nri: {socket: %s, requestTimeout: 7s}
hook: {rootless: {users: [nobody]}}
policies:
- name: rootless
  match: {users: [nobody]}
  workload: app # the hook is asked about no real container, which had a name
  mode: record
- name: agent
  match: {namespaces: [agents]}
  mode: enforce
  logDenials: true
  phases:
    initial: read_only
    gaps: report
    read_only: {allow: ["@file-read", "@basic-io", "@info", "@process"]}
    write: {allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process"], limits: {pids: {max: 44}}}
    scored: {allow: ["@file-read", "@basic-io", "@info", "@process"], limits: {oomScoreAdj: 500}}
    locked: {allow: ["@basic-io", "@process"], irreversible: true}
- name: all
  match: {namespaces: [demo]}
  mode: record
  annotations: [mode]
  allowedModes: [record, audit, enforce]
  failure: deny
  limits:
    memory: {max: 64Mi, high: 32Mi}
    pids: {max: 50}
    rlimits: [{type: RLIMIT_NOFILE, soft: 100, hard: 100}]
`

func testInside(t *testing.T) {
	defer func() {
		if t.Failed() {
			log, _ := os.ReadFile(daemonLog)
			t.Logf("syslatchd's log:\n%s\n%s", log, systemctl(t, "status", "--no-pager", "--full", "syslatchd"))
		}
	}()
	ctx := t.Context()
	// systemd has moved itself and this service out of the root by now.
	for _, c := range []string{"+cpu", "+memory", "+pids", "+io"} {
		if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte(c), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h, err := harness.Start(ctx, harness.Options{RequiredPlugins: []string{"syslatch"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	image, err := harness.Busybox(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Import(ctx, image); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("policy.yaml", fmt.Appendf(nil, insidePolicy, h.NRISocket), 0o600); err != nil {
		t.Fatal(err)
	}
	systemctl(t, "start", "syslatchd")
	awaitLog(t, "msg=synchronized", 1)

	status, err := os.ReadFile("/proc/" + mainPID(t) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CapEff:\t000000c000000000", "CapBnd:\t000000c000000000", "NoNewPrivs:\t1"} { // CAP_PERFMON, CAP_BPF
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}

	run := func(mode, script, want string) {
		t.Helper()
		r, err := h.Run(ctx,
			harness.PodOptions{Namespace: "demo", Runtime: harness.Runc15, Annotations: map[string]string{"mode.syslatch.dev/pod": mode}},
			harness.ContainerOptions{Command: []string{"/bin/sh", "-c", script}})
		if err != nil || !strings.Contains(r.Log, want) {
			t.Fatalf("%s %q: %v, %q, want %q", mode, script, err, r.Log, want)
		}
	}
	run("record", "ls /; echo done", "done")
	awaitLog(t, `msg="version published"`, 1)
	run("enforce", "mkdir /x; ls /; echo done", "Operation not permitted")
	run("audit", "mkdir /x; echo done", "done")
	awaitLog(t, "dry run: the version would have denied calls", 1)

	rootless(t)
	before := mainPID(t)
	systemctl(t, "kill", "--signal=KILL", "syslatchd")
	awaitLog(t, "msg=synchronized", 2)
	rootless(t) // at a new socket
	if now := mainPID(t); now == before || now == "0" {
		t.Errorf("pid %s after the kill of %s", now, before)
	}
	run("record", "mkdir /x; ls /; echo done", "done")
	awaitLog(t, `msg="version published"`, 2)
	run("enforce", "mkdir /x && echo made", "made")

	log, err := os.ReadFile(daemonLog)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "level=error") || strings.Contains(line, "level=warning") && !strings.Contains(line, "dry run") {
			t.Errorf("syslatchd says %s", line)
		}
	}
	phases(t, h)
}

// phases: with the drop-in, a container's phase is switched, and outlives a killed
// syslatchd. With others, an irreversible one is a filter of its own, and what isn't
// root's gets an oom_score_adj.
func phases(t *testing.T, h *harness.Host) {
	t.Helper()
	ctx := t.Context()
	started := 2
	dropIn := func(names ...string) {
		t.Helper()
		if out, err := exec.Command("cp", append(names, "/run/systemd/system/syslatchd.service.d/")...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		systemctl(t, "daemon-reload")
		systemctl(t, "restart", "syslatchd")
		started++
		awaitLog(t, "msg=synchronized", started)
	}
	create := func() *harness.Container {
		t.Helper()
		pod, err := h.NewPod(ctx, harness.PodOptions{Namespace: "agents", Runtime: harness.Runc15})
		if err != nil {
			t.Fatal(err)
		}
		c, err := pod.Create(ctx, harness.ContainerOptions{User: 65534, Command: []string{
			"/bin/sh", "-c",
			"unshare -n true; i=0; while sleep 0.1; do i=$((i+1)); if mkdir /dev/shm/$i; then echo made; else echo denied; fi; done",
		}})
		if err == nil {
			err = c.Start(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	says := func(c *harness.Container, want string) {
		t.Helper()
		from := len(c.Log())
		if err := c.WaitLog(ctx, func(log string) bool { return len(log) > from+3*len(want) && strings.HasSuffix(log, want+"\n") }); err != nil {
			t.Fatalf("never said %q: %v\n%s", want, err, c.Log())
		}
	}
	set := func(c *harness.Container, phase string) {
		t.Helper()
		if out, err := exec.Command("./syslatch", "phase", "set", c.ID, phase, "--timeout", "30s").CombinedOutput(); err != nil {
			t.Fatalf("phase set %s: %v: %s", phase, err, out)
		}
	}
	// gap is that an irreversible phase is the supervisor's alone.
	gap := func(c *harness.Container) bool {
		t.Helper()
		out, err := exec.Command("./syslatch", "phase", "get", c.ID, "-o", "json").CombinedOutput()
		if err != nil || !strings.Contains(string(out), `"locked"`) {
			t.Fatalf("phase get: %v: %s", err, out)
		}
		return strings.Contains(string(out), "it is left if the supervisor says so")
	}
	dropIn("phases.conf")
	c := create()
	says(c, "denied")
	awaitLog(t, "SCMP_ARCH_X86_64 unshare", 1)
	set(c, "write")
	says(c, "made")
	systemctl(t, "kill", "--kill-who=main", "--signal=KILL", "syslatchd")
	started++
	awaitLog(t, "msg=synchronized", started)
	says(c, "made")
	if out, err := exec.Command("./syslatch", "phase", "set", c.ID, "scored", "--timeout", "30s").CombinedOutput(); err == nil || !strings.Contains(string(out), "oom-score.conf") {
		t.Errorf("oomScoreAdj without its drop-in: %v: %s", err, out)
	}
	set(c, "read_only")
	says(c, "denied")
	set(c, "locked")
	says(c, "denied")
	if !gap(c) {
		t.Error("without ratchet.conf: no gap is told")
	}
	if err := c.Stop(ctx, 0); err != nil {
		t.Error(err)
	}
	dropIn("ratchet.conf", "oom-score.conf")
	c = create()
	says(c, "denied")
	set(c, "scored")
	set(c, "locked")
	says(c, "denied")
	if gap(c) {
		t.Error("with ratchet.conf: still a gap")
	}
	awaitLog(t, "the phase's own filter was put on processes", 1)
	if err := c.Stop(ctx, 0); err != nil {
		t.Error(err)
	}
	if log, err := os.ReadFile(daemonLog); err != nil || strings.Contains(string(log), "no BPF programs for phases") {
		t.Errorf("the unit keeps BPF programs away: %v\n%s", err, log)
	}
	for _, program := range []string{"conn4", "open"} { // of a cgroup's, and of BPF LSM's
		if found, err := filepath.Glob("/sys/fs/bpf/syslatch-phases/layout-*/syslatch_" + program); err != nil || len(found) != 1 {
			t.Errorf("the unit loads no program %s: %v, %v", program, found, err)
		}
	}
}

// rootless asks at the socket that the unit lets users through to, as nobody.
func rootless(t *testing.T) {
	t.Helper()
	account, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--user", "--map-root-user", "/run/test/syslatch-hook", "precreate")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	cmd.Stdin = strings.NewReader(`{"annotations":{"io.container.manager":"libpod"},"linux":{"cgroupsPath":"/libpod-` + strings.Repeat("a", 64) + `"}}`)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), `"seccomp":`) {
		t.Errorf("rootless hook: %v, %s", err, out)
	}
}

func systemctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	if err != nil && args[0] != "status" {
		t.Fatalf("systemctl %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func mainPID(t *testing.T) string {
	t.Helper()
	pid := systemctl(t, "show", "--property=MainPID", "--value", "syslatchd")
	if _, err := strconv.Atoi(pid); err != nil {
		t.Fatalf("MainPID %q", pid)
	}
	return pid
}

// awaitLog waits until syslatchd's log has text for the nth time.
func awaitLog(t *testing.T, text string, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		log, _ := os.ReadFile(daemonLog) // not there yet
		if strings.Count(string(log), text) >= n {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%q is not %d times in the log:\n%s", text, n, log)
		case <-tick.C:
		}
	}
}
