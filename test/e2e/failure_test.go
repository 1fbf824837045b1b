// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

func mustCreate(t *testing.T, e *env, p harness.PodOptions, c harness.ContainerOptions) *harness.Container {
	t.Helper()
	pod, err := e.NewPod(e.ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	ctr, err := pod.Create(e.ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	return ctr
}

// createError creates a container that must be refused, and returns why.
func createError(t *testing.T, e *env, p harness.PodOptions, c harness.ContainerOptions) string {
	t.Helper()
	pod, err := e.NewPod(e.ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pod.Create(e.ctx, c); err != nil {
		return err.Error()
	}
	t.Fatal("the creation was not refused")
	return ""
}

// kill -9 of the daemon in the middle of a recording loses not one call: not
// those made before, nor those made while it is dead.
func TestKilledDaemonLosesNoCall(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	co := sh("echo before; read x </t/fifo; mkdir /tmp/while-dead; ln -s a /tmp/l; echo dead; read x </t/fifo; rmdir /tmp/while-dead; echo after")
	co.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/t"}}
	c := mustCreate(t, e, mode("record"), co)
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	said := func(word string) {
		t.Helper()
		if err := c.WaitLog(e.ctx, func(log string) bool { return strings.Contains(log, word) }); err != nil {
			t.Fatal(err)
		}
	}
	said("before")
	d.kill(syscall.SIGKILL)
	if err := os.WriteFile(fifo, []byte("go\n"), 0); err != nil { // opens when the reader is there
		t.Fatal(err)
	}
	said("dead")
	d = e.start(byAnnotation)
	d.waitLog("instance picked up", c.ID)
	if err := os.WriteFile(fifo, []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Wait(e.ctx); err != nil || r.Code != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	v := e.waitVersion(d, busyboxWorkload, 1)
	for _, call := range []string{"execve", "mkdir", "symlink", "rmdir", "exit_group"} {
		if !v.Manifest.Calls.Has(x8664, call) {
			t.Errorf("%s is missing in %v", call, v.Manifest.Calls)
		}
	}
	if len(v.Manifest.Losses) != 0 {
		t.Errorf("losses: %v", v.Manifest.Losses)
	}
	recs, err := e.store().Recordings(busyboxWorkload)
	if err != nil || len(recs) != 1 {
		t.Fatalf("recordings: %v, %v", recs, err)
	}
	// The one event that the killed daemon had in its hands may be lost, and then that is
	// said.
	lost := uint64(0)
	for _, l := range recs[0].Losses {
		if l.Kind == profiles.LossFirstSeen {
			lost = l.Count
		}
	}
	if got, n := len(recs[0].FirstSeen), recs[0].All().Len(); got+int(lost) != n || lost > 1 {
		t.Errorf("%d first-seen events for %d calls, and %d that are said to be lost", got, n, lost)
	}
}

// A container that ends while the daemon is dead is published when it is back.
func TestEndWhileDaemonIsDead(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	co := sh("echo ready; read x </t/fifo; mkdir /tmp/x")
	co.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/t"}}
	c := mustCreate(t, e, mode("record"), co)
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitLog(e.ctx, func(log string) bool { return strings.Contains(log, "ready") }); err != nil {
		t.Fatal(err)
	}
	d.kill(syscall.SIGKILL)
	if err := os.WriteFile(filepath.Join(dir, "fifo"), []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(e.ctx); err != nil {
		t.Fatal(err)
	}
	d = e.start(byAnnotation)
	if v := e.waitVersion(d, busyboxWorkload, 1); !v.Manifest.Calls.Has(x8664, "mkdir") {
		t.Errorf("mkdir is missing in %v", v.Manifest.Calls)
	}
	// Nothing is left in the kernel.
	r, err := bpf.Open(e.bpffs, bpf.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	d.waitLog("container ended", c.ID)
	if st, err := r.Stats(); err != nil || st.Instances+st.Finished != 0 || st.Attached {
		t.Errorf("stats %+v, %v: want nothing tracked or attached", st, err)
	}
}

func TestEnforceWithoutVersion(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(`
- name: strict
  match: {namespaces: [strict]}
  mode: enforce
- name: lenient
  match: {namespaces: [lenient]}
  mode: enforce
  failure: runtime-default
`)
	why := createError(t, e, harness.PodOptions{Namespace: "strict"}, sh("true"))
	for _, want := range []string{"no profile version", busyboxWorkload, "record"} {
		if !strings.Contains(why, want) {
			t.Errorf("refusal %q doesn't say %q", why, want)
		}
	}
	if r := e.run(harness.PodOptions{Namespace: "lenient"}, sh("echo runs")); r.Log != "runs\n" {
		t.Errorf("%+v", r)
	}
	d.waitLog("container runs without syslatch", "no profile version")
}

func TestCorruptStoreFailsClosed(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	e.run(mode("record"), sh("true"))
	e.waitVersion(d, busyboxWorkload, 1)
	path, err := e.store().Path(busyboxWorkload, 1)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data[:len(data)/2], 0); err != nil {
		t.Fatal(err)
	}
	if why := createError(t, e, mode("enforce"), sh("true")); !strings.Contains(why, "corrupt") || !strings.Contains(why, "profile.json") {
		t.Errorf("refusal %q doesn't name the file", why)
	}
}

// The store's lock is held by somebody else: a recording isn't lost, it waits.
func TestLockedStore(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	e.run(mode("record"), sh("true"))
	e.waitVersion(d, busyboxWorkload, 1)
	path, err := e.store().Path(busyboxWorkload, 1)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := os.Open(filepath.Join(path, "../../..")) // writers lock the workload's directory
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	e.run(mode("record"), sh("mkdir /tmp/x"))
	// The next creation waits for the publication, and is refused in time
	// rather than run under a version that is about to be replaced.
	if why := createError(t, e, mode("enforce"), sh("true")); !strings.Contains(why, "published") {
		t.Errorf("refusal %q doesn't say what it waits for", why)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if v := e.waitVersion(d, busyboxWorkload, 2); !v.Manifest.Calls.Has(x8664, "mkdir") {
		t.Errorf("version 2: %v", v.Manifest.Calls)
	}
}

// The pins are removed under the daemon: a recording can't be made, and a policy
// that insists on it refuses the container with the reason.
func TestMissingKernelObject(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(`
- name: insist
  match: {namespaces: [insist]}
  mode: record
  failure: deny
- name: rest
  match: {}
  mode: record
`)
	if err := bpf.Remove(e.bpffs); err != nil {
		t.Fatal(err)
	}
	if why := createError(t, e, harness.PodOptions{Namespace: "insist"}, sh("true")); !strings.Contains(why, "record") {
		t.Errorf("refusal %q", why)
	}
	if r := e.run(harness.PodOptions{}, sh("echo runs")); r.Log != "runs\n" {
		t.Errorf("%+v", r)
	}
	d.waitLog("container runs without syslatch")
}

// What happens while the plugin is dead is containerd's choice: it goes on
// without, unless required_plugins says no.
func TestDeadPlugin(t *testing.T) {
	for name, required := range map[string][]string{"not required": nil, "required": {"syslatch"}} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, harness.Options{RequiredPlugins: required})
			d := e.start(byAnnotation)
			if r := e.run(mode("record"), sh("echo alive")); r.Log != "alive\n" {
				t.Fatalf("%+v", r)
			}
			e.waitVersion(d, busyboxWorkload, 1)
			d.kill(syscall.SIGKILL)
			if required != nil {
				if why := createError(t, e, mode("enforce"), sh("mkdir /tmp/x")); !strings.Contains(why, "syslatch") {
					t.Errorf("refusal %q doesn't name the plugin", why)
				}
			} else if r := e.run(mode("enforce"), sh("mkdir /tmp/x && echo made")); r.Log != "made\n" {
				t.Errorf("without the plugin: %+v, want an unconfined run, as documented", r)
			}
			e.start(byAnnotation)
			if r := e.run(mode("enforce"), sh("mkdir /tmp/x && echo made")); strings.Contains(r.Log, "made") {
				t.Errorf("with the plugin back: %+v", r)
			}
		})
	}
}

func TestContainerdRestart(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(byAnnotation)
	if err := e.Restart(e.ctx); err != nil {
		t.Fatal(err)
	}
	d.waitLog("not connected to the runtime")
	d.waitLog("connected to runtime")
	// The second synchronization is the reconnection's.
	if err := untilRecorded(e, d); err != nil {
		t.Fatal(err)
	}
}

// untilRecorded runs recorded containers until one is seen: containerd may be
// up before the daemon has connected again.
func untilRecorded(e *env, d *daemon) error {
	for range 20 {
		e.run(mode("record"), sh("true"))
		if strings.Contains(d.log.String(), "container planned") {
			e.waitVersion(d, busyboxWorkload, 1)
			return nil
		}
	}
	return errors.New("no container was seen after the restart")
}

func TestPrelaunchedPlugin(t *testing.T) {
	dir := t.TempDir()
	mountBPFFS(t)
	pins := fmt.Sprintf("/sys/fs/bpf/syslatch-e2e-%d-prelaunched", os.Getpid())
	t.Cleanup(func() {
		if err := bpf.Remove(pins); err != nil {
			t.Error(err)
		}
	})
	policy := "apiVersion: syslatch.dev/v1\nstore: " + dir + "/store\nstateDir: " + dir + "/state\nbpffs: " + pins + "\npolicies:" + byAnnotation
	e := newEnv(t, harness.Options{
		PrelaunchedPlugin: filepath.Join(programs, "syslatchd"),
		PrelaunchedConfig: policy,
	})
	e.dir = dir
	if r := e.run(mode("record"), sh("ls / >/dev/null; echo hello")); r.Log != "hello\n" {
		t.Fatalf("%+v", r)
	}
	// Enforcing waits for the publication by itself.
	if r := e.run(mode("enforce"), sh("mkdir /tmp/x; echo hello")); !strings.Contains(r.Log, "Operation not permitted") || !strings.Contains(r.Log, "hello\n") {
		t.Errorf("%+v", r)
	}
	log, err := os.ReadFile(filepath.Join(dir, "state/syslatchd.log"))
	if err != nil || !strings.Contains(string(log), "version published") {
		t.Errorf("log: %v\n%s", err, log)
	}
}
