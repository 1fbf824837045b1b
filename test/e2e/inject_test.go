// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

// fileOf reads a controller's file of a container's own cgroup.
func fileOf(t *testing.T, pid int, controller, v1, v2 string) string {
	t.Helper()
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	name := v1
	if h.Mode == cgroup.V2 {
		controller, name = "", v2
	}
	dir, err := h.Dir(pid, controller)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func pidOf(t *testing.T, e *env, c *harness.Container) int {
	t.Helper()
	r, err := e.Runtime.ContainerStatus(e.ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	info := r.GetInfo()["info"]
	if _, after, ok := strings.Cut(info, `"pid":`); ok {
		fmt.Sscanf(after, "%d", &pid)
	}
	if pid == 0 {
		t.Fatalf("no pid in %s", info)
	}
	return pid
}

func TestLimitsAreInForceAndReadBack(t *testing.T) {
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		t.Run(runtime, func(t *testing.T) {
			e := newEnv(t, harness.Options{})
			d := e.start(`
- name: limited
  match: {}
  mode: record
  failure: deny
  limits:
    memory: {max: 64Mi}
    cpu: {max: "50000 100000", weight: 50}
    pids: {max: 33}
    oomScoreAdj: 500
    rlimits: [{type: RLIMIT_NOFILE, soft: 100, hard: 200}]
`)
			co := sh("ulimit -n; ulimit -Hn; echo up; sleep 1000")
			c := mustCreate(t, e, harness.PodOptions{Runtime: runtime}, co)
			if err := c.Start(e.ctx); err != nil {
				t.Fatal(err)
			}
			if err := c.WaitLog(e.ctx, func(log string) bool { return strings.Contains(log, "up") }); err != nil {
				t.Fatal(err)
			}
			if log := c.Log(); !strings.HasPrefix(log, "100\n200\n") {
				t.Errorf("rlimits: %q", log)
			}
			pid := pidOf(t, e, c)
			if got := fileOf(t, pid, "memory", "memory.limit_in_bytes", "memory.max"); got != "67108864" {
				t.Errorf("memory: %s", got)
			}
			if got := fileOf(t, pid, "pids", "pids.max", "pids.max"); got != "33" {
				t.Errorf("pids: %s", got)
			}
			if got := fileOf(t, pid, "cpu", "cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "50000") {
				t.Errorf("cpu: %s", got)
			}
			adj, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
			if err != nil || strings.TrimSpace(string(adj)) != "500" {
				t.Errorf("oom_score_adj: %s, %v", adj, err)
			}
			d.waitLog("settings read back", c.ID)
		})
	}
}

// A limit that this host can't apply is refused by name under deny, and named
// under runtime-default, never dropped in silence.
func TestLimitThatCantBeApplied(t *testing.T) {
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	e := newEnv(t, harness.Options{})
	d := e.start(`
- name: strict
  match: {namespaces: [strict]}
  mode: record
  failure: deny
  limits: {memory: {max: 64Mi, high: 32Mi}}
- name: lenient
  match: {namespaces: [lenient]}
  mode: record
  limits: {memory: {max: 64Mi, high: 32Mi}}
`)
	if h.Mode == cgroup.V2 {
		c := mustCreate(t, e, harness.PodOptions{Namespace: "strict"}, sh("echo up; sleep 1000"))
		if err := c.Start(e.ctx); err != nil {
			t.Fatal(err)
		}
		if got := fileOf(t, pidOf(t, e, c), "", "", "memory.high"); got != "33554432" {
			t.Errorf("memory.high: %s", got)
		}
		return
	}
	if why := createError(t, e, harness.PodOptions{Namespace: "strict"}, sh("true")); !strings.Contains(why, "memory.high") {
		t.Errorf("refusal %q doesn't name memory.high", why)
	}
	if r := e.run(harness.PodOptions{Namespace: "lenient"}, sh("echo runs")); r.Log != "runs\n" {
		t.Errorf("%+v", r)
	}
	d.waitLog("not applied", "memory.high")
}

// A pod's own RuntimeDefault stays in force while it is recorded, and recording
// works under it.
func TestRuntimeDefaultIsKeptWhileRecording(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	co := sh("unshare -U true || echo refused")
	co.Confined, co.Seccomp = true, runtimeapi.SecurityProfile_RuntimeDefault
	if r := e.run(mode("record"), co); !strings.Contains(r.Log, "refused") {
		t.Errorf("RuntimeDefault was not in force: %+v", r)
	}
	v := e.waitVersion(d, busyboxWorkload, 1)
	if len(v.Manifest.Losses) != 0 || !v.Manifest.Calls.Has(x8664, "execve") {
		t.Errorf("version 1: %+v", v.Manifest)
	}
	if v.Manifest.Calls.Has(x8664, "unshare") {
		t.Error("a denied attempt has widened the profile")
	}
	// Unconfined, the same call works: the test above could fail.
	if r := e.run(mode("off"), sh("unshare -U true && echo done")); !strings.Contains(r.Log, "done") {
		t.Errorf("this host lets nobody make user namespaces, so that nothing was shown: %+v", r)
	}
}

// A version's file is what a kubelet's localhostProfile takes, and such a profile
// stays in force while its container is recorded.
func TestVersionAsLocalhostProfile(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	const script = "mkdir /tmp/x || echo refused; ls / >/dev/null"
	e.run(mode("record"), sh("ls /tmp/x || echo refused; ls / >/dev/null"))
	e.waitVersion(d, busyboxWorkload, 1)
	path, err := e.store().Path(busyboxWorkload, 1)
	if err != nil {
		t.Fatal(err)
	}
	co := sh(script)
	co.Confined, co.Seccomp, co.SeccompRef = true, runtimeapi.SecurityProfile_Localhost, path
	for _, m := range []string{"off", "record"} {
		if r := e.run(mode(m), co); r.Code != 0 || !strings.Contains(r.Log, "Operation not permitted") || !strings.Contains(r.Log, "refused") {
			t.Errorf("mode %s under version 1 as the pod's own profile: %+v", m, r)
		}
	}
	if onCRIO() {
		// What CRI-O doesn't show is recorded from the execve on: there is the floor.
		if v := e.waitVersion(d, busyboxWorkload, 2); v.Manifest.Calls.Has(x8664, "mkdir") {
			t.Errorf("a denied attempt has widened the profile: %+v", v.Manifest)
		}
	} else {
		d.waitLog("nothing new in this recording")
		if vs, err := e.store().Versions(busyboxWorkload); err != nil || len(vs) != 1 {
			t.Errorf("versions %v, %v: a denied attempt has widened the profile", vs, err)
		}
	}
	if r := e.run(mode("off"), sh(script)); strings.Contains(r.Log, "refused") {
		t.Errorf("without a profile: %+v", r)
	}
}

// containerd's RuntimeDefault names calls that libseccomp here doesn't know. What
// is made from it is injected all the same.
func TestMustDenyHoldsWithinRuntimeDefault(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(`
- name: all
  match: {}
  mode: record
  annotations: [mode]
  allowedModes: [record, audit, enforce]
  failure: deny
  mustDeny: [mkdir, mkdirat]
`)
	co := sh("mkdir /tmp/x || echo refused; unshare -U true || echo confined")
	co.Confined, co.Seccomp = true, runtimeapi.SecurityProfile_RuntimeDefault
	if onCRIO() {
		if why := createError(t, e, mode("record"), co); !strings.Contains(why, "seccomp profile that cri-o doesn't show to plugins") {
			t.Error(why)
		}
		return
	}
	for _, m := range []string{"record", "audit", "enforce"} {
		if r := e.run(mode(m), co); !strings.Contains(r.Log, "refused") || !strings.Contains(r.Log, "confined") {
			t.Errorf("%s: %+v", m, r)
		}
		e.waitVersion(d, busyboxWorkload, 1)
	}
}

func TestMustDenyHoldsInEveryMode(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(`
- name: all
  match: {}
  mode: record
  annotations: [mode]
  allowedModes: [record, audit, enforce]
  mustDeny: [mkdir, mkdirat]
  mustAllow: [chmod]
`)
	const script = "mkdir /tmp/x || echo refused; ls / >/dev/null"
	if r := e.run(mode("record"), sh(script)); !strings.Contains(r.Log, "refused") {
		t.Errorf("record: %+v", r)
	}
	v := e.waitVersion(d, busyboxWorkload, 1)
	if profiles.Denied(v.Profile, profiles.Calls{x8664: {"mkdir"}}).Len() == 0 {
		t.Errorf("version 1 allows mkdir")
	}
	if r := e.run(mode("enforce"), sh(script+"; chmod 700 /tmp && echo allowed")); !strings.Contains(r.Log, "refused") || !strings.Contains(r.Log, "allowed") {
		t.Errorf("enforce: %+v", r)
	}
	if r := e.run(mode("audit"), sh(script)); !strings.Contains(r.Log, "refused") {
		t.Errorf("audit: %+v", r)
	}
}

func TestAuditDeniesNothingAndTells(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	const work = "ls / >/dev/null; echo done"
	e.run(mode("record"), sh(work))
	e.waitVersion(d, busyboxWorkload, 1)
	if r := e.run(mode("audit"), sh(work)); r.Log != "done\n" {
		t.Errorf("%+v", r)
	}
	d.waitLog("the version would have denied nothing")
	if r := e.run(mode("audit"), sh("mkdir /tmp/x && echo made; "+work)); r.Log != "made\ndone\n" {
		t.Errorf("%+v", r)
	}
	d.waitLog("the version would have denied calls", "mkdir")
	if vs, err := e.store().Versions(busyboxWorkload); err != nil || len(vs) != 1 {
		t.Errorf("a dry run has made a version: %v, %v", vs, err)
	}
}

// What an exec'd program calls belongs to the recording, and the runtime's
// helper that brings it in doesn't.
func TestExecIntoRecordedAndEnforced(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	// Ends by itself: a container that is killed may not yet have called all
	// that the next one will.
	const script = "while sleep 0.1; do [ ! -e /tmp/by-exec ] || break; done"
	c := mustCreate(t, e, mode("record"), sh(script))
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	mkdir := func() {
		t.Helper()
		if r, err := c.Exec(e.ctx, "/bin/mkdir", "/tmp/by-exec"); err != nil || r.Code != 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		if r, err := c.Wait(e.ctx); err != nil || r.Code != 0 {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	mkdir()
	v := e.waitVersion(d, busyboxWorkload, 1)
	if !v.Manifest.Calls.Has(x8664, "mkdir") {
		t.Errorf("mkdir of the exec'd program is missing: %v", v.Manifest.Calls)
	}
	for _, helper := range []string{"setns", "unshare", "mount", "pivot_root", "seccomp"} {
		if v.Manifest.Calls.Has(x8664, helper) {
			t.Errorf("%s is the runtime's own, before its filter", helper)
		}
	}
	c = mustCreate(t, e, mode("enforce"), sh(script))
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Exec(e.ctx, "/bin/ln", "-s", "a", "/tmp/l"); err != nil || r.Code == 0 {
		t.Errorf("symlink by exec under a version without: %+v, %v", r, err)
	}
	mkdir() // the same exec, under its version
}

func TestPrivilegedContainerIsRecorded(t *testing.T) {
	if onCRIO() && !sysResource(t) {
		t.Skip("CRI-O gives privileged containers all capabilities, and this machine lacks CAP_SYS_RESOURCE; the guest has it")
	}
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	co := sh("mount -t tmpfs none /tmp && echo mounted")
	co.Privileged = true
	po := mode("record")
	if r, err := privileged(e, po, co); err != nil || !strings.Contains(r.Log, "mounted") {
		t.Fatalf("%+v, %v", r, err)
	}
	if v := e.waitVersion(d, busyboxWorkload, 1); !v.Manifest.Calls.Has(x8664, "mount") {
		t.Errorf("mount is missing in %v", v.Manifest.Calls)
	}
}

func privileged(e *env, po harness.PodOptions, co harness.ContainerOptions) (harness.Result, error) {
	po.Privileged = true
	return e.Host.Run(e.ctx, po, co)
}

func TestHostileNamesAndAnnotations(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(`
- name: chosen
  match: {namespaces: [chosen]}
  mode: record
  failure: deny
  annotations: [workload]
- name: rest
  match: {}
  mode: record
`)
	workload := func(v string) harness.PodOptions {
		return harness.PodOptions{Namespace: "chosen", Annotations: map[string]string{"workload.syslatch.dev/container.app": v}}
	}
	for _, bad := range []string{"../../etc/passwd", "a/../../b", "a\nb", "", strings.Repeat("x", 2000), "a//b", "\x7f"} {
		if why := createError(t, e, workload(bad), sh("true")); !strings.Contains(why, "workload") {
			t.Errorf("%.20q: refusal %q", bad, why)
		}
	}
	e.run(workload("team/agent.v1+ä"), sh("true"))
	e.waitVersion(d, "team/agent.v1+ä", 1)
	// Not permitted: reported, and not followed.
	e.run(harness.PodOptions{Annotations: map[string]string{"workload.syslatch.dev/pod": "mine", "mode.syslatch.dev": "off"}}, sh("true"))
	e.waitVersion(d, busyboxWorkload, 1)
	d.waitLog("annotation mode.syslatch.dev ignored")
	names, err := os.ReadDir(e.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if n.Name() != "store" && n.Name() != "state" && n.Name() != "policy.yaml" {
			t.Errorf("unexpected %s", n.Name())
		}
	}
}

// Many containers at once: each gets exactly its own calls.
func TestConcurrentContainers(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(`
- name: all
  match: {}
  mode: record
  failure: deny
  workload: "{container}"
`)
	pod, err := e.NewPod(e.ctx, harness.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	own := []string{"mkdir /tmp/x", "ln -s a /tmp/l", "chmod 700 /tmp", "touch /tmp/f; mv /tmp/f /tmp/g"}
	calls := []string{"mkdir", "symlink", "chmod", "rename"}
	const n = 20
	containers := make([]*harness.Container, n)
	for i := range n {
		co := sh(own[i%len(own)])
		co.Name = fmt.Sprintf("c%d", i)
		if containers[i], err = pod.Create(e.ctx, co); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for _, c := range containers {
		wg.Go(func() {
			if err := c.Start(e.ctx); err != nil {
				t.Error(err)
				return
			}
			if r, err := c.Wait(e.ctx); err != nil || r.Code != 0 {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
	wg.Wait()
	for i := range n {
		v := e.waitVersion(d, fmt.Sprintf("c%d", i), 1)
		for j, call := range calls {
			if got, want := v.Manifest.Calls.Has(x8664, call), j == i%len(own); got != want {
				t.Errorf("container %d, %s: recorded %t, want %t", i, call, got, want)
			}
		}
		if len(v.Manifest.Losses) != 0 {
			t.Errorf("container %d: losses %v", i, v.Manifest.Losses)
		}
	}
}
