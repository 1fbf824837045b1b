// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/profiles"
)

// What a container did is in the store when `podman run` returns; enforced, it
// runs as before, and what it didn't do is denied.
func TestRecordThenEnforce(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		if r := e.run("web", mode("record"), "ls", "/"); r.code != 0 || !strings.Contains(r.stdout, "bin\n") {
			t.Fatalf("record: %+v", r)
		}
		v := e.version("web", 1)
		e.idle()
		if !has(v, "execve") || !has(v, "getdents64") || has(v, "mkdir") || has(v, "pivot_root") {
			t.Errorf("calls: %v", v.Manifest.Calls)
		}
		if want := "podman " + filepath.Base(runtime); v.Manifest.Runtime != want {
			t.Errorf("runtime %q, want %q", v.Manifest.Runtime, want)
		}
		recs, err := e.store().Recordings("web")
		if err != nil || len(recs) != 1 {
			t.Fatalf("%d recordings, %v", len(recs), err)
		}
		rec := recs[0]
		if len(rec.Losses) != 0 || rec.Gate != profiles.GateFilter || rec.Subject.Name != "web" || rec.Subject.Image != image {
			t.Errorf("recording: losses %v, gate %s, subject %+v", rec.Losses, rec.Gate, rec.Subject)
		}
		if want := e.inspect("web", "{{.ImageDigest}}"); want == "" || rec.Subject.ImageDigest != want {
			t.Errorf("image digest %q, want %q", rec.Subject.ImageDigest, want)
		}
		if got, want := len(rec.FirstSeen), rec.All().Len(); got != want {
			t.Errorf("%d first-seen events for %d calls", got, want)
		}

		if r := e.run("web", mode("enforce"), "ls", "/"); r.code != 0 || !strings.Contains(r.stdout, "bin\n") {
			t.Errorf("enforce: %+v", r)
		}
		if r := e.run("web", mode("enforce"), "mkdir", "/x"); r.code == 0 || !strings.Contains(r.stderr, "Operation not permitted") {
			t.Errorf("enforce mkdir: %+v", r)
		}
		// A container can't call itself a pod's sandbox, which is left alone.
		forged := append(mode("enforce"), "--annotation", "io.kubernetes.cri-o.ContainerType=sandbox", "--annotation", "io.container.manager=cri-o")
		if r := e.run("web", forged, "mkdir", "/x"); r.code == 0 {
			t.Errorf("enforce mkdir, as a sandbox: %+v", r)
		}
		e.idle()
		// The second recording of the same adds nothing; mkdir makes version 2.
		e.run("web", mode("record"), "ls", "/")
		if r := e.run("web", mode("record"), "mkdir", "/x"); r.code != 0 {
			t.Errorf("record mkdir: %+v", r)
		}
		if v := e.version("web", 2); !has(v, "mkdir") || !has(v, "getdents64") {
			t.Errorf("version 2: %v", v.Manifest.Calls)
		}
		if r := e.run("web", mode("enforce"), "mkdir", "/x"); r.code != 0 {
			t.Errorf("enforce version 2: %+v", r)
		}
		// The workload by annotation, where policy allows it.
		if r := e.run("other", append(mode("enforce"), "--annotation", "syslatch.dev/workload=web"), "mkdir", "/x"); r.code != 0 {
			t.Errorf("workload by annotation: %+v", r)
		}
		e.idle()
	})
}

// Audit denies nothing.
func TestAudit(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		e.run("web", mode("record"), "true")
		if r := e.run("web", mode("audit"), "mkdir", "/x"); r.code != 0 {
			t.Errorf("audit: %+v", r)
		}
		if vs, err := e.store().Versions("web"); err != nil || len(vs) != 1 {
			t.Errorf("versions: %v, %v", vs, err)
		}
		e.idle()
	})
}

const limits = `
- name: limited
  match: {containers: [limited]}
  mode: record
  workload: "{container}"
  failure: deny
  limits:
    memory: {max: 64Mi}
    cpu: {max: "50%"}
    pids: {max: 77}
    oomScoreAdj: 500
    rlimits:
    - {type: RLIMIT_NOFILE, soft: 100, hard: 200}
`

func TestLimits(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", limits)
		e.run("limited", []string{"-d"}, "sleep", "1000")
		pid, err := strconv.Atoi(e.inspect("limited", "{{.State.Pid}}"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range [][4]string{
			{"memory", "memory.max", "memory.limit_in_bytes", "67108864"},
			{"pids", "pids.max", "pids.max", "77"},
		} {
			if got, path, err := hierarchy.ReadController(pid, f[0], f[1], f[2]); err != nil || got != f[3] {
				t.Errorf("%s: %q, %v, want %s", path, got, err, f[3])
			}
		}
		if got, path, err := hierarchy.ReadController(pid, "cpu", "cpu.max", "cpu.cfs_quota_us"); err != nil || !strings.HasPrefix(got, "50000") {
			t.Errorf("%s: %q, %v", path, got, err)
		}
		p, err := cgroup.OpenProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if got, err := p.OOMScoreAdj(); err != nil || got != 500 {
			t.Errorf("oom_score_adj %d, %v", got, err)
		}
		if got, err := p.Limits(); err != nil || got["RLIMIT_NOFILE"] != (cgroup.Limit{Soft: 100, Hard: 200}) || got["RLIMIT_NPROC"].Hard != 1024 {
			t.Errorf("rlimits %v, %v", got, err)
		}
		e.podman("rm", "-f", "-t", "0", "limited")
		e.version("limited", 1)
		e.idle()

		// Another hook, run after ours, takes the limit back: a mismatch.
		spoil := e.dir + "/spoil"
		if err := os.WriteFile(spoil, []byte("#!/bin/sh\nexec sed 's/\"limit\":77/\"limit\":78/'\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(e.dir+"/hooks.d/z.json", fmt.Appendf(nil, `{"version":"1.0.0","hook":{"path":%q},"when":{"always":true},"stages":["precreate"]}`, spoil), 0o644); err != nil {
			t.Fatal(err)
		}
		if r := e.run("limited", nil, "true"); r.code == 0 || !strings.Contains(r.stderr, `pids.max: got "78", want "77"`) {
			t.Errorf("changed limit: %+v", r)
		}
		e.idle()
	})
}

// What an exec'd program calls is recorded; what the runtime calls to bring it in
// is not.
func TestExec(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		e.run("web", append(mode("record"), "-d"), "sleep", "1000")
		e.podman("exec", "web", "mkdir", "/x")
		e.podman("rm", "-f", "-t", "0", "web")
		v := e.version("web", 1)
		if !has(v, "mkdir") || !has(v, "execve") {
			t.Errorf("calls of the exec'd program are missing: %v", v.Manifest.Calls)
		}
		for _, helper := range []string{"setns", "unshare", "mount", "clone"} {
			if has(v, helper) {
				t.Errorf("%s of the runtime's helper was recorded", helper)
			}
		}
		if recs, err := e.store().Recordings("web"); err != nil || len(recs) != 1 || len(recs[0].Losses) > 0 {
			t.Errorf("recordings: %+v, %v", recs, err)
		}
		e.idle()
	})
}

// Each start of a restarted container is an instance of its own.
func TestRestartPolicy(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		e.run("web", append(mode("record"), "-d", "--restart", "on-failure:2"), "sh", "-c", "exit 3")
		e.wait("three recordings", func() bool {
			sums, err := e.store().Workloads()
			return err == nil && len(sums) == 1 && sums[0].Observations == 3
		})
		e.version("web", 1)
		e.podman("rm", "-f", "-t", "0", "web")
		e.idle()
	})
}

// kill kills a process that a test's podman started.
func kill(t *testing.T, pid string) {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil || n <= 1 {
		t.Fatalf("pid %q", pid)
	}
	if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// When conmon is killed nobody runs poststop: the next container's hook does its
// work, or the daemon at its start.
func TestLostPoststop(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		lose := func(name string) {
			e.run(name, append(mode("record"), "-d"), "sh", "-c", "mkdir /x; exec sleep 1000")
			cgroupID := e.cgroupOf(name)
			e.wait("mkdir in the container", func() bool {
				_, err := os.Stat(filepath.Join(e.podman("mount", name), "x"))
				return err == nil
			})
			conmon, init := e.inspect(name, "{{.State.ConmonPid}}"), e.inspect(name, "{{.State.Pid}}")
			kill(t, conmon)
			kill(t, init)
			e.wait("an empty cgroup", func() bool {
				path, err := hierarchy.Path(cgroupID)
				if err != nil {
					return true
				}
				events, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
				return err != nil || strings.Contains(string(events), "populated 0")
			})
		}
		lose("lost")
		if _, err := e.store().Version("lost", 1); err == nil {
			t.Fatal("published although nobody told")
		}
		e.run("next", mode("record"), "true")
		if v := e.version("lost", 1); !has(v, "mkdir") {
			t.Errorf("calls: %v", v.Manifest.Calls)
		}
		e.idle()

		lose("lost2")
		log := e.daemon()
		e.wait("the daemon's word", func() bool { return strings.Contains(log(), "version published") })
		if v := e.version("lost2", 1); !has(v, "mkdir") {
			t.Errorf("calls: %v", v.Manifest.Calls)
		}
		recs, err := e.store().Recordings("lost2")
		if err != nil || len(recs) != 1 || len(recs[0].FirstSeen) != recs[0].All().Len() {
			t.Errorf("recordings: %+v, %v", recs, err)
		}
		e.wait("the daemon's end of it", func() bool { return strings.Contains(log(), "container ended") })
		e.idle()
	})
}

func (e *env) cgroupOf(name string) uint64 {
	e.t.Helper()
	pid, err := strconv.Atoi(e.inspect(name, "{{.State.Pid}}"))
	if err != nil {
		e.t.Fatal(err)
	}
	path, err := hierarchy.OfPID(pid)
	if err != nil {
		e.t.Fatal(err)
	}
	id, err := cgroup.ID(path)
	if err != nil {
		e.t.Fatal(err)
	}
	return id
}

// daemon starts a syslatchd on the same policy file, with no runtime to talk to,
// and returns what it logs.
func (e *env) daemon() (log func() string) {
	e.t.Helper()
	path := filepath.Join(e.t.TempDir(), "log")
	cmd := exec.Command(filepath.Join(programs, "syslatchd"), "--config", e.policy, "--nri-socket", e.dir+"/none.sock", "--log-file", path)
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	return func() string {
		data, _ := os.ReadFile(path)
		return string(data)
	}
}

// With a daemon running, which reads all first-seen events, the hooks' instances
// get theirs.
func TestBesideDaemon(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		log := e.daemon()
		e.wait("the daemon", func() bool { return strings.Contains(log(), "not connected") })
		for i := range 3 {
			e.run("web", mode("record"), "ls", "/")
			recs, err := e.store().Recordings("web")
			if err != nil || len(recs) != i+1 {
				t.Fatalf("%d recordings, %v", len(recs), err)
			}
			if rec := recs[i]; len(rec.FirstSeen) != rec.All().Len() {
				t.Errorf("%d first-seen events for %d calls", len(rec.FirstSeen), rec.All().Len())
			}
		}
		e.idle()
	})
}

// podman's own end is not the container's: conmon has poststop run.
func TestKilledPodman(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		cmd := command(e.ctx, e.conf, runArgs("web", mode("record"), "sh", "-c", "mkdir /x; exec sleep 1000")...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		e.wait("a running container", func() bool {
			r, err := podman(e.ctx, e.conf, "inspect", "-f", "{{.State.Status}}", "web")
			return err == nil && strings.TrimSpace(r.stdout) == "running"
		})
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		init := e.inspect("web", "{{.State.Pid}}")
		if _, err := e.store().Version("web", 1); err == nil {
			t.Error("published while it runs")
		}
		kill(t, init)
		e.wait("the version", func() bool { _, err := e.store().Version("web", 1); return err == nil })
		e.podman("rm", "-f", "-t", "0", "web")
		e.idle()
	})
}

// In the host's pid namespace a child outlives init, until the runtime kills it;
// its calls are the container's.
func TestChildOutlivesInit(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		r := e.run("web", append(mode("record"), "--pid", "host"), "sh", "-c",
			"mkfifo /f; (mkdir /x; echo >/f; exec sleep 1000) & read line </f; exit 7")
		if r.code != 7 {
			t.Errorf("%+v", r)
		}
		if v := e.version("web", 1); !has(v, "mkdir") {
			t.Errorf("calls: %v", v.Manifest.Calls)
		}
		e.idle()
	})
}

func TestOddCalls(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		// podman's own profile denies io_uring.
		free := append(mode("record"), "--security-opt", "seccomp=unconfined")
		for _, c := range []struct {
			program, says string
			abi           profiles.ABI
		}{
			{"odd", "amd64 false\n", "SCMP_ARCH_X86_64"},
			{"odd386", "386 false\n", "SCMP_ARCH_X86"},
		} {
			if r := e.run(c.program, free, c.program); r.code != 0 || r.stdout != c.says {
				t.Fatalf("%s: %+v", c.program, r)
			}
			v := e.version(c.program, 1)
			if !slices.Contains(v.Manifest.Calls[c.abi], "io_uring_setup") {
				t.Errorf("%s: calls of %s: %v", c.program, c.abi, v.Manifest.Calls[c.abi])
			}
			if r := e.run(c.program, mode("enforce"), c.program); r.code != 0 {
				t.Errorf("enforce %s: %+v", c.program, r)
			}
		}
		// A profile without the 32-bit ABI is no way around.
		e.run("plain", free, "ls", "/bin/odd386")
		if r := e.run("plain", mode("enforce"), "/bin/odd386"); r.code == 0 {
			t.Errorf("32-bit program under a 64-bit profile: %+v", r)
		}
		e.idle()
	})
}

// Cgroups where podman puts them with other options.
func TestCgroups(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		t.Run("no conmon cgroup", func(t *testing.T) {
			if r := e.run("web", append(mode("record"), "--cgroups", "no-conmon"), "mkdir", "/x"); r.code != 0 {
				t.Errorf("%+v", r)
			}
			if v := e.version("web", 1); !has(v, "mkdir") {
				t.Errorf("calls: %v", v.Manifest.Calls)
			}
		})
		if hierarchy.Mode != cgroup.V2 {
			t.Log("not tried: split and disabled need cgroup v2")
			return
		}
		t.Run("nested", func(t *testing.T) {
			nest := "mount -o remount,rw /sys/fs/cgroup; mkdir /sys/fs/cgroup/a /sys/fs/cgroup/a/b; (echo 0 >/sys/fs/cgroup/a/b/cgroup.procs; chmod 700 /tmp); rmdir /sys/fs/cgroup/a/b /sys/fs/cgroup/a"
			if r := e.run("nested", append(mode("record"), "--privileged", "--cgroupns", "private"), "sh", "-c", nest); r.code != 0 {
				t.Errorf("%+v", r)
			}
			if v := e.version("nested", 1); !has(v, "chmod") {
				t.Errorf("calls: %v", v.Manifest.Calls)
			}
		})
		t.Run("split", func(t *testing.T) {
			r, err := podman(e.ctx, e.conf, append(append([]string{"run", "--entrypoint", "[]", "--cgroups", "split", "--name", "split"}, mode("record")...), image, "mkdir", "/x")...)
			if err != nil || r.code != 0 {
				t.Errorf("%+v, %v", r, err)
			}
			if v := e.version("split", 1); !has(v, "mkdir") {
				t.Errorf("calls: %v", v.Manifest.Calls)
			}
		})
		if filepath.Base(runtime) == "crun" { // runc can't
			t.Run("disabled", func(t *testing.T) {
				e.write("", strings.Replace(byAnnotation, "match: {}", "match: {}\n  failure: deny", 1))
				r, err := podman(e.ctx, e.conf, append(append([]string{"run", "--entrypoint", "[]", "--cgroups", "disabled", "--name", "disabled"}, mode("record")...), image, "true")...)
				if err != nil || r.code == 0 || !strings.Contains(r.stderr, "no cgroup of its own") {
					t.Errorf("%+v, %v", r, err)
				}
			})
		}
		e.idle()
	})
}
