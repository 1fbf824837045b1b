// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
	"github.com/syslatch/syslatch/test/images"
)

// onCRIO says that SYSLATCH_CRIO has all tests of this package run on CRI-O.
func onCRIO() bool { return os.Getenv("SYSLATCH_CRIO") != "" }

func needCRIO(t *testing.T) {
	t.Helper()
	if !onCRIO() {
		t.Skip("this is about CRI-O: 'make crio' builds that, which takes minutes, and runs all tests of this package on it")
	}
}

// sysResource says whether CAP_SYS_RESOURCE is there, which a root in a container
// often lacks.
func sysResource(t *testing.T) bool {
	t.Helper()
	s, err := cgroup.Status(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return s.Capabilities&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// What CRI-O tells of a container: whether it is unconfined, so that recording is
// exact; the digests of its image; and no more of RuntimeDefault than that there
// is one.
func TestCRIOFacts(t *testing.T) {
	needCRIO(t)
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	run := func(name string, confined bool) {
		t.Helper()
		co := sh("ls / >/dev/null; echo done")
		co.Name, co.Confined, co.Seccomp = name, confined, runtimeapi.SecurityProfile_RuntimeDefault
		for _, m := range []string{"record", "enforce"} {
			po := mode(m)
			// CRI-O's own go over these.
			for key, value := range map[string]string{
				"io.kubernetes.cri-o.ImageName": "syslatch.test/forged:1", "io.kubernetes.cri-o.ImageRepoDigests": "syslatch.test/forged@sha256:0",
				"io.kubernetes.container.name": "forged", "io.kubernetes.cri-o.ContainerType": "sandbox",
			} {
				po.Annotations[key] = value
			}
			if r := e.run(po, co); r.Log != "done\n" {
				t.Fatalf("%s, %s: %+v", name, m, r)
			}
			e.waitVersion(d, "syslatch.test/busybox/"+name, 1)
		}
	}
	run("unconfined", false)
	run("confined", true)
	d.waitLog("doesn't show the container's own seccomp profile", "syslatch.test/busybox/confined")
	for line := range strings.SplitSeq(d.log.String(), "\n") {
		if strings.Contains(line, "own seccomp profile") && strings.Contains(line, "busybox/unconfined") {
			t.Errorf("an unconfined container has no profile: %s", line)
		}
	}
	for name, gate := range map[string]profiles.Gate{"unconfined": profiles.GateFilter, "confined": profiles.GateExec} {
		recs, err := e.store().Recordings("syslatch.test/busybox/" + name)
		if err != nil || len(recs) != 1 {
			t.Fatalf("%s: %v, %v", name, recs, err)
		}
		if r := recs[0]; r.Gate != gate || len(r.Subject.ImageDigest) != len("sha256:")+64 || r.Subject.Namespace != "default" || r.Subject.Pod == "" {
			t.Errorf("%s: gate %s, subject %+v", name, r.Gate, r.Subject)
		}
	}
}

// A version has clone3 answered ENOSYS, so that glibc falls back to clone, whose
// flags a filter sees. NRI 0.11 of CRI-O 1.36.1 crashes on a rule that says so.
func TestCRIOThreads(t *testing.T) {
	needCRIO(t)
	e := newEnv(t, harness.Options{})
	image, err := images.Workloads(e.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Import(e.ctx, image); err != nil {
		t.Fatal(err)
	}
	d := e.start(byAnnotation)
	python := func(script string) harness.ContainerOptions {
		return harness.ContainerOptions{Image: images.WorkloadsImage, Command: []string{"/usr/bin/python3", "-c", "import threading; " + script}}
	}
	if r := e.run(mode("record"), python("print(1)")); r.Log != "1\n" {
		t.Fatalf("%+v", r)
	}
	if v := e.waitVersion(d, "syslatch.test/workloads/app", 1); v.Manifest.Calls.Has(x8664, "clone3") {
		t.Fatalf("one thread called clone3: %v", v.Manifest.Calls)
	}
	if r := e.run(mode("enforce"), python("t = threading.Thread(target=print, args=[2]); t.start(); t.join()")); r.Log != "2\n" {
		t.Errorf("a thread under version 1: %+v", r)
	}
}

// crioHook is a CRI-O that runs the hook.
func crioHook(t *testing.T, policies string) *env {
	t.Helper()
	needCRIO(t)
	e := newEnv(t, harness.Options{})
	path := filepath.Join(e.dir, "policy.yaml")
	if err := os.WriteFile(path, []byte(e.policyFile(policies)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(e.ctx, filepath.Join(programs, "syslatch"), "hook", "install", "--engine", "crio",
		"--dir", e.HooksDir(), "--config", path, "--hook", filepath.Join(programs, "syslatch-hook")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := e.Restart(e.ctx); err != nil {
		t.Fatal(err)
	}
	return e
}

// Through the hook, CRI-O's containers are recorded as they come, and nothing else
// is done with them: whoever asks for more is told.
func TestCRIOHook(t *testing.T) {
	needCRIO(t)
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		t.Run(runtime, func(t *testing.T) {
			e := crioHook(t, `
- name: limits
  match: {containers: [limited]}
  mode: record
  failure: deny
  limits: {pids: {max: 33}}
- name: lenient
  match: {containers: [lenient]}
  mode: enforce
  failure: runtime-default`+byAnnotation)
			po := mode("record")
			po.Annotations["io.kubernetes.cri-o.ContainerType"] = "sandbox" // CRI-O's own goes over it
			// With a sandbox container, where CRI-O can lower its oom_score_adj.
			po.Runtime, po.SharedPID = runtime, sysResource(t)
			pod, err := e.NewPod(e.ctx, po)
			if err != nil {
				t.Fatal(err)
			}
			for name, confined := range map[string]bool{"unconfined": false, "confined": true} {
				co := sh("mkdir /tmp/x; echo done")
				co.Name, co.Confined, co.Seccomp = name, confined, runtimeapi.SecurityProfile_RuntimeDefault
				if r, err := pod.Run(e.ctx, co); err != nil || r.Log != "done\n" {
					t.Fatalf("%s: %+v, %v", name, r, err)
				}
				// It has been removed.
				v, err := e.store().Version("syslatch.test/busybox/"+name, 1)
				if err != nil {
					t.Fatal(err)
				}
				if !v.Manifest.Calls.Has(x8664, "mkdir") || v.Manifest.Calls.Has(x8664, "unshare") || len(v.Manifest.Losses) != 0 {
					t.Errorf("%s: %+v", name, v.Manifest)
				}
			}
			if err := pod.Remove(e.ctx); err != nil {
				t.Error(err)
			}
			if all, err := e.store().Workloads(); err != nil || len(all) != 2 {
				t.Errorf("workloads %+v, %v: the sandbox must be left alone", all, err)
			}
			refused := sh("echo runs")
			refused.Name = "unconfined"
			p := mode("enforce")
			p.Runtime = runtime
			if why := createError(t, e, p, refused); !strings.Contains(why, "syslatch") || !strings.Contains(why, "mode enforce: profile not injected") || !strings.Contains(why, "use syslatchd") {
				t.Errorf("enforce: %s", why)
			}
			refused.Name = "limited"
			if why := createError(t, e, p, refused); !strings.Contains(why, "limits not applied") {
				t.Errorf("limits: %s", why)
			}
			lenient := sh("echo runs")
			lenient.Name = "lenient"
			if r := e.run(p, lenient); r.Log != "runs\n" {
				t.Errorf("runtime-default: %+v", r)
			}
			if left, err := filepath.Glob(e.dir + "/state/hooks/*"); err != nil || len(left) > 0 {
				t.Errorf("journal: %v, %v", left, err)
			}
		})
	}
}

// CRI-O knows no precreate. One in a directory that it reads ends it, or, where
// that is written while it runs, is not taken: so the installer keeps it away.
func TestCRIORefusesPrecreate(t *testing.T) {
	needCRIO(t)
	e := newEnv(t, harness.Options{})
	out, err := exec.CommandContext(e.ctx, filepath.Join(programs, "syslatch"), "hook", "install",
		"--dir", e.HooksDir(), "--config", filepath.Join(e.dir, "policy.yaml"), "--hook", filepath.Join(programs, "syslatch-hook")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := e.Restart(e.ctx); err == nil {
		t.Error("CRI-O starts with a precreate hook: the installer need not keep it away")
	} else if log := e.LogTail(5); !strings.Contains(log, "unknown stage") {
		t.Errorf("%v: %s", err, log)
	}
	if err := os.RemoveAll(e.HooksDir()); err != nil {
		t.Fatal(err)
	}
	if err := e.Restart(e.ctx); err != nil {
		t.Fatal(err)
	}
}

// The annotation of oci-seccomp-bpf-hook, in CRI-O's form for one container.
func TestCRIOTrace(t *testing.T) {
	needCRIO(t)
	e := crioHook(t, "\n- name: none\n  match: {}\n  mode: \"off\"\n")
	dir := filepath.Join(e.dir, "traces")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	policy := strings.Replace(e.policyFile("\n- name: none\n  match: {}\n  mode: \"off\"\n"), "policies:", fmt.Sprintf("hook: {traceSyscall: serve, traceDirectories: [%s]}\npolicies:", dir), 1)
	if err := os.WriteFile(filepath.Join(e.dir, "policy.yaml"), []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "app.json")
	po := harness.PodOptions{Annotations: map[string]string{"io.containers.trace-syscall/app": "of:" + file}}
	if r := e.run(po, sh("mkdir /tmp/x; echo done")); r.Log != "done\n" {
		t.Fatalf("%+v", r)
	}
	data, err := os.ReadFile(file)
	if err != nil || !strings.Contains(string(data), `"mkdir"`) {
		t.Errorf("%v: %s", err, data)
	}
}
