// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

func TestMain(m *testing.M) {
	// This binary is also the process that launch starts.
	if len(os.Args) > 3 && os.Args[1] == LaunchCommand {
		fmt.Fprintln(os.Stderr, Launched(os.Args[3], os.Args[4:]))
		os.Exit(1)
	}
	if len(os.Args) == 2 && os.Args[1] == vforkCommand {
		waitInVfork()
	}
	os.Exit(m.Run())
}

// bpffs mounts one for a test.
func bpffs(t *testing.T) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(bpf.Remove(filepath.Join(dir, "syslatch")), bpf.RemoveEnforcer(filepath.Join(dir, "syslatch-phases")), unix.Unmount(dir, 0)); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "syslatch")
}

func open(t *testing.T, p *policy.File, log *logtest.Hook) *Agent {
	t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(log)
	a, err := New(p, Options{Log: logrus.NewEntry(logger), Check: seccomp.Check})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A life with the real recorder and a real process, and a daemon that is replaced
// in the middle of it: everything but the runtime.
func TestWithTheRecorder(t *testing.T) {
	pins, dir := bpffs(t), t.TempDir()
	p, err := policy.Parse("policy.yaml", []byte(fmt.Sprintf(
		"apiVersion: syslatch.dev/v1\nstore: %s/store\nstateDir: %s/state\nbpffs: %s\npolicies:\n- {name: all, match: {}, mode: record, failure: deny}\n", dir, dir, pins)), policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	log := &logtest.Hook{}
	fds := openFDs(t)
	a := open(t, p, log)
	parent := newGroup(t)
	name := filepath.Base(parent.Path()) + "-ctr"
	c := policy.Container{ID: "c1", Name: "app", Image: "docker.io/library/app:1", CgroupsPath: filepath.Join(parent.Path(), name)}
	plan, err := a.Plan(t.Context(), c, adjust.Runtime{Engine: "test", PID: os.Getpid()})
	if err != nil || !plan.Record || plan.Gate != profiles.GateFilter {
		t.Fatalf("%+v, %v", plan, err)
	}

	// The runtime's part: make the cgroup, put a process into it that waits.
	if err := os.Mkdir(c.CgroupsPath, 0o755); err != nil {
		t.Fatal(err)
	}
	group, err := os.Open(c.CgroupsPath)
	if err != nil {
		t.Fatal(err)
	}
	goR, goW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	repR, repW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	made := filepath.Join(dir, "made")
	cmd := exec.Command("/proc/self/exe", LaunchCommand, "--", "/bin/mkdir", "mkdir", made)
	cmd.ExtraFiles = []*os.File{goR, repW}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	goR.Close()
	repW.Close()
	if err := a.Starting(t.Context(), c.ID, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}

	a = open(t, p, log)
	defer func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := json.NewEncoder(goW).Encode(launchOrder{Filter: seccomp.AllowAllFilter()}); err != nil {
		t.Fatal(err)
	}
	goW.Close()
	repR.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := group.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Synchronize(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if in := a.instance(c.ID); in != nil {
		if err := a.endNow(t.Context(), in); err != nil {
			t.Fatal(err)
		}
	}
	s, err := store.Open(p.Store, store.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	v, err := s.Active("docker.io/library/app/app")
	if err != nil {
		for _, e := range log.AllEntries() {
			t.Log(e.Message, e.Data)
		}
		t.Fatal(err)
	}
	for _, call := range []string{"execve", "mkdir", "exit_group"} {
		if !v.Manifest.Calls.Has(x8664, call) {
			t.Errorf("%s is missing in %v", call, v.Manifest.Calls)
		}
	}
	// What ran before the filter, Go's start among it, is not in.
	if v.Manifest.Calls.Has(x8664, "seccomp") || v.Manifest.Calls.Has(x8664, "epoll_create1") {
		t.Errorf("calls of before the filter in %v", v.Manifest.Calls)
	}
	recs, err := s.Recordings("docker.io/library/app/app")
	if err != nil || len(recs) != 1 || len(recs[0].Losses) != 0 || len(recs[0].FirstSeen) != recs[0].All().Len() {
		t.Errorf("recordings %+v, %v, want one without losses", recs, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// The next container gets it; what is never made leaves nothing.
	c2 := c
	c2.ID, c2.CgroupsPath = "c2", c.CgroupsPath+"-2"
	if _, err := a.Plan(t.Context(), c2, adjust.Runtime{}); err != nil {
		t.Fatal(err)
	}
	if err := a.endNow(t.Context(), a.instance("c2")); err != nil {
		t.Fatal(err)
	}
	r := a.recorder.(*bpf.Recorder)
	if st, err := r.Stats(); err != nil || st.Instances+st.Finished != 0 || st.Attached {
		t.Errorf("stats %+v, %v: want nothing tracked, nothing attached", st, err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if left := slices.DeleteFunc(openFDs(t), func(fd string) bool { return slices.Contains(fds, fd) }); len(left) > 0 {
		t.Errorf("open after Close: %v", left)
	}
}

// openFDs lists what is open, by what it is.
func openFDs(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasPrefix(target, "/proc/") {
			out = append(out, e.Name()+" "+target)
		}
	}
	return out
}

// A second agent on one state directory is refused; one with its own is not.
func TestNewRefusesASecondAgent(t *testing.T) {
	dir := t.TempDir()
	file := func(state string) *policy.File {
		return &policy.File{Store: dir + "/store", StateDir: dir + "/" + state, BPFFS: dir + "/no-bpffs"}
	}
	log := &logtest.Hook{}
	a := open(t, file("a"), log)
	defer a.Close()
	if a.recorder != nil || len(log.AllEntries()) == 0 || !strings.Contains(log.AllEntries()[0].Message, "syslatch doctor") {
		t.Errorf("on a host that can't record: recorder %v, log %v", a.recorder, log.AllEntries())
	}
	_, err := New(file("a"), Options{Log: logrus.NewEntry(logrus.New()), Check: seccomp.Check})
	contains(t, err, "another syslatchd")
	b := open(t, file("b"), log)
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := a.Started(context.Background(), "x", 1); err != nil {
		t.Error(err)
	}
}
