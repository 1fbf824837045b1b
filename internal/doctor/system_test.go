// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
)

// On the host that the test runs on, the report says what can be seen without
// it.
func TestThisHost(t *testing.T) {
	h := System()
	r := Examine(t.Context(), h, Options{Timeout: time.Minute})
	wellFormed(t, r)
	var text bytes.Buffer
	if err := r.WriteText(&text, false); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + text.String())
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if h.Release != strings.TrimSpace(string(release)) {
		t.Errorf("release %q, want %q", h.Release, release)
	}
	for _, c := range r.Checks {
		if c.Status == Error && strings.Contains(c.Found, "panicked") {
			t.Errorf("%+v", c)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("the rest needs root: as another user, nothing can be loaded")
	}
	hierarchy, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(hierarchy.Unified, "syslatch-probe-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	var st unix.Statfs_t
	mounted := unix.Statfs(defaultBPFFS, &st) == nil && st.Type == unix.BPF_FS_MAGIC
	if got := r.status("bpffs") == OK; got != mounted {
		t.Errorf("bpffs is said to be mounted: %v, and is: %v", got, mounted)
	}
	// The project's tests run on kernels that can record.
	for _, name := range []string{"kernel", "bpf.btf", "bpf.ringbuf", "bpf.tp_btf", "bpf.recorder", "seccomp.actions"} {
		if s := r.status(name); s != OK {
			t.Errorf("%s is %s on this kernel", name, s)
		}
	}
	if r.Mechanisms[0].Status != OK || r.Works != mounted {
		t.Errorf("works = %v with bpffs mounted: %v; %+v", r.Works, mounted, r.Mechanisms)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"tool": 0o755, "data": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\nexit 3\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	if got, err := find("tool"); err != nil || got != filepath.Join(dir, "tool") {
		t.Errorf("find = %q, %v", got, err)
	}
	if got, err := find("data"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that can't be executed is found: %q, %v", got, err)
	}
	// The shell is in the places that are searched without PATH.
	if got, err := find("sh"); err != nil || !filepath.IsAbs(got) {
		t.Errorf("find(sh) = %q, %v", got, err)
	}
	t.Chdir(dir)
	t.Setenv("PATH", ".:")
	if got, err := find("tool"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("found in the current directory: %q, %v", got, err)
	}
}

func TestRun(t *testing.T) {
	out, err := run(t.Context(), "/bin/sh", "-c", "echo out; echo bad >&2; exit 3")
	if out != "out\n" || err == nil || !strings.Contains(err.Error(), "exit status 3: bad") {
		t.Errorf("%q, %v", out, err)
	}
	// A program that hangs gets half of the time, and takes its children along.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	pid := filepath.Join(t.TempDir(), "pid")
	_, err = run(ctx, "/bin/sh", "-c", "sleep 600 & echo $! >"+pid+"; wait")
	if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		t.Errorf("%v, with %v of the time left", err, ctx.Err())
	}
	text, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(child, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000); n != 1 {
		t.Errorf("child %d is still there: %v", child, errors.Join(err, unix.Kill(child, unix.SIGKILL)))
	}
}

func TestDial(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := System().Dial(t.Context(), path); err != nil {
		t.Error(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if err := System().Dial(t.Context(), path); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a socket that nobody listens on: %v", err)
	}
}
