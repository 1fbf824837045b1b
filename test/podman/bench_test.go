// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
)

var podmanID = regexp.MustCompile(`libpod-[0-9a-f]{64}`)

// BenchmarkStages measures what podman waits for: each stage as a process of its
// own, for a container that is recorded, enforced, or left alone. SYSLATCH_PEER
// names an oci-seccomp-bpf-hook to measure beside it.
//
//	go test -run '^$' -bench Stages -benchtime 40x ./test/podman
func BenchmarkStages(b *testing.B) {
	e := &env{dir: b.TempDir(), pins: fmt.Sprintf("/sys/fs/bpf/syslatch-podman-%d", os.Getpid())}
	e.policy = e.dir + "/policy.yaml"
	policies := strings.Replace(byAnnotation, `"{container}"`, "bench", 1)
	if err := os.WriteFile(e.policy, fmt.Appendf(nil, "apiVersion: syslatch.dev/v1\nstore: %s/store\nstateDir: %s/state\nbpffs: %s\npolicies:%s", e.dir, e.dir, e.pins, policies), 0o600); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(e.pins) })
	conf, err := writeConf(e.dir+"/containers.conf", runtimes[0], e.dir+"/hooks.d")
	if err != nil {
		b.Fatal(err)
	}
	// podman's own spec, by a hook that keeps it; and a version to enforce.
	if err := os.Mkdir(e.dir+"/hooks.d", 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(e.dir+"/keep", fmt.Appendf(nil, "#!/bin/sh\nexec tee %s/spec.json\n", e.dir), 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(e.dir+"/hooks.d/keep.json", fmt.Appendf(nil, `{"version":"1.0.0","hook":{"path":"%s/keep"},"when":{"always":true},"stages":["precreate"]}`, e.dir), 0o644); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.Command(filepath.Join(programs, "syslatch"), "hook", "install", "--dir", e.dir+"/hooks.d", "--config", e.policy, "--hook", filepath.Join(programs, "syslatch-hook")).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	if r, err := podman(b.Context(), conf, runArgs("bench", append(mode("record"), "--rm"), "true")...); err != nil || r.code != 0 {
		b.Fatalf("%+v, %v", r, err)
	}
	spec, err := os.ReadFile(e.dir + "/spec.json")
	if err != nil {
		b.Fatal(err)
	}

	for _, m := range []string{"off", "record", "enforce"} {
		b.Run(m, func(b *testing.B) {
			times := map[string][]time.Duration{}
			run := func(stage string, in []byte) []byte {
				cmd := exec.Command(filepath.Join(programs, "syslatch-hook"), stage, "--config", e.policy)
				cmd.Stdin = bytes.NewReader(in)
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				began := time.Now()
				out, err := cmd.Output()
				times[stage] = append(times[stage], time.Since(began))
				if err != nil || bytes.Contains(out, []byte(`"deny"`)) {
					b.Fatalf("%s: %v: %s %s", stage, err, &stderr, out)
				}
				return out
			}
			spec := bytes.Replace(spec, []byte(`"syslatch.dev/mode":"record"`), []byte(`"syslatch.dev/mode":"`+m+`"`), 1)
			for i := range b.N {
				id := fmt.Sprintf("%064x", i+1)
				own := podmanID.ReplaceAll(spec, []byte("libpod-"+id))
				if err := os.WriteFile(e.dir+"/config.json", run("precreate", own), 0o600); err != nil {
					b.Fatal(err)
				}
				pid, end := sleeper(b)
				state := fmt.Appendf(nil, `{"ociVersion":"1.0.2","id":%q,"pid":%d,"status":"creating","bundle":%q}`, id, pid, e.dir)
				run("createRuntime", state)
				end()
				run("poststop", fmt.Appendf(nil, `{"ociVersion":"1.0.2","id":%q,"status":"stopped","bundle":%q}`, id, e.dir))
			}
			report(b, times)
		})
	}

	peer := os.Getenv("SYSLATCH_PEER")
	if peer == "" {
		return
	}
	b.Run("peer", func(b *testing.B) {
		times := map[string][]time.Duration{}
		for range b.N {
			pid, end := sleeper(b)
			cmd := exec.Command(peer, "-s")
			cmd.Dir = b.TempDir() // it writes a file there
			cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"ociVersion":"1.0.2","id":"a","pid":%d,"status":"creating","annotations":{"io.containers.trace-syscall":"of:%s/peer.json"}}`, pid, e.dir))
			began := time.Now()
			out, err := cmd.CombinedOutput()
			times["prestart"] = append(times["prestart"], time.Since(began))
			end()
			if err != nil {
				b.Logf("peer failed after %s: %v: %s", time.Since(began), err, out)
				break
			}
		}
		report(b, times)
	})
}

// sleeper is a process in a cgroup of its own, as a runtime's init is.
func sleeper(b *testing.B) (pid int, end func()) {
	b.Helper()
	group, err := cgroup.NewIn(hierarchy.Unified, "bench")
	if err != nil {
		b.Fatal(err)
	}
	dir, err := group.Open()
	if err != nil {
		b.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	return cmd.Process.Pid, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := group.Remove(); err != nil {
			b.Error(err)
		}
	}
}

func report(b *testing.B, times map[string][]time.Duration) {
	b.ReportMetric(0, "ns/op")
	for stage, all := range times {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2])/1e6, stage+"-p50-ms")
		b.ReportMetric(float64(all[len(all)*9/10])/1e6, stage+"-p90-ms")
	}
}
