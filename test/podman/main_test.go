// SPDX-License-Identifier: Apache-2.0

// Package podman runs syslatch-hook under a real podman, with runc, and with crun
// where it works (it refuses hybrid cgroups), on the running kernel.
//
// SYSLATCH_TEST_BIN names a directory with syslatch, syslatchd, syslatch-hook and
// the workloads, which are built where it is not set.
package podman

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

var (
	programs  string // directory of the programs
	scratch   string // of this run
	hierarchy *cgroup.Hierarchy
	runtimes  = []string{"/usr/sbin/runc"}
	parent    = fmt.Sprintf("/syslatch-podman-%d", os.Getpid()) // of all cgroups
)

const image = harness.BusyboxImage

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "podman:", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (_ int, err error) {
	if os.Getuid() != 0 {
		fmt.Println("skipped: rootful podman needs root")
		return 0, nil
	}
	if hierarchy, err = cgroup.Detect(); err != nil {
		return 0, err
	}
	if hierarchy.Mode == cgroup.V2 {
		runtimes = append(runtimes, "/usr/bin/crun")
	}
	if scratch, err = os.MkdirTemp("", "syslatch-podman-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	if programs = os.Getenv("SYSLATCH_TEST_BIN"); programs == "" {
		programs = filepath.Join(scratch, "bin")
		if err := build(programs); err != nil {
			return 0, err
		}
	}
	unmount, err := harness.MountBPFFS()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	busybox, err := harness.Busybox(scratch, map[string]string{
		"bin/odd": filepath.Join(programs, "odd"), "bin/odd386": filepath.Join(programs, "odd386"),
		"bin/allcalls": filepath.Join(programs, "allcalls"), "bin/attacks": filepath.Join(programs, "attacks"),
	})
	if err != nil {
		return 0, err
	}
	conf, err := writeConf(filepath.Join(scratch, "load.conf"), runtimes[0], scratch)
	if err != nil {
		return 0, err
	}
	if r, err := podman(context.Background(), conf, "load", "-i", busybox.Archive); err != nil || r.code != 0 {
		return 0, fmt.Errorf("podman load: %+v: %w", r, err)
	}
	code := m.Run()
	return code, removeCgroups()
}

func build(dir string) error {
	for _, b := range []struct {
		env  []string
		args []string
	}{
		{nil, []string{"go", "build", "-o", dir + "/", "../../cmd/syslatch", "../../cmd/syslatchd", "../../cmd/syslatch-hook"}},
		// These run in an image without libraries.
		{[]string{"CGO_ENABLED=0"}, []string{"go", "build", "-o", dir + "/", "../workloads/allcalls", "../workloads/goapp", "./odd"}},
		{[]string{"CGO_ENABLED=0", "GOARCH=386"}, []string{"go", "build", "-o", dir + "/odd386", "./odd"}},
		{nil, []string{"gcc", "-O1", "-static", "-o", dir + "/attacks", "../workloads/attacks/attacks.c"}},
	} {
		cmd := exec.Command(b.args[0], b.args[1:]...)
		cmd.Env = append(os.Environ(), b.env...)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("build: %w", err)
		}
	}
	return nil
}

// removeCgroups removes what podman leaves of our cgroups: the parent, and
// conmon's. One that still holds a process after a while is an error.
func removeCgroups() error {
	var errs []error
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if !strings.Contains(line, " - cgroup") || len(fields) < 5 {
			continue
		}
		root := fields[4] + parent
		children, err := cgroup.Children(root)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, err)
		slices.Reverse(children)
		for _, dir := range append(children, root) {
			if err := removeCgroup(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("left behind: %s: %w", dir, err))
			}
		}
	}
	return errors.Join(errs...)
}

// removeCgroup waits for conmon, which ends a moment after its container is gone: v1
// has no event for it.
func removeCgroup(dir string) error {
	return poll(10*time.Second, func() (bool, error) {
		err := unix.Rmdir(dir)
		return !errors.Is(err, unix.EBUSY), err
	})
}

// poll tries until done, or until the time is up, and returns the last error.
func poll(most time.Duration, try func() (done bool, err error)) error {
	deadline := time.After(most)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		done, err := try()
		if done {
			return err
		}
		select {
		case <-deadline:
			return err
		case <-time.After(pause):
		}
	}
}

// writeConf writes a containers.conf.
func writeConf(path, runtime, hooks string) (string, error) {
	return path, os.WriteFile(path, fmt.Appendf(nil, `[containers]
netns = "none"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
hooks_dir = [%q]
runtime = %q
cgroup_manager = "cgroupfs"
events_logger = "none"
`, hooks, runtime), 0o600)
}

type result struct {
	code           int
	stdout, stderr string
}

// storage is podman's default driver: vfs copies the image for each container.
// It leaves no mount of its own directory. On an overlay there can't be another.
var storage = sync.OnceValue(func() []string {
	var st unix.Statfs_t
	if err := unix.Statfs(scratch, &st); err == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return []string{"--storage-driver", "vfs"}
	}
	return []string{"--storage-driver", "overlay", "--storage-opt", "overlay.skip_mount_home=true"}
})

func command(ctx context.Context, conf string, args ...string) *exec.Cmd {
	all := append([]string{"--root", scratch + "/root", "--runroot", scratch + "/run", "--tmpdir", scratch + "/tmp"}, storage()...)
	cmd := exec.CommandContext(ctx, "podman", append(all, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+conf)
	cmd.WaitDelay = 5 * time.Second // conmon inherits the pipes
	return cmd
}

func podman(ctx context.Context, conf string, args ...string) (result, error) {
	cmd := command(ctx, conf, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}, err
}

// env is one installation of the hook.
type env struct {
	t                       *testing.T
	ctx                     context.Context
	runtime                 string
	dir, conf, policy, pins string
	name                    int // of containers, counted
}

// byAnnotation lets whoever starts a container choose.
const byAnnotation = `
- name: podman
  match: {}
  mode: "off"
  workload: "{container}"
  annotations: [mode, workload]
  allowedModes: [off, record, audit, enforce]
`

// newEnv installs the hook with policies and, above them, more fields.
func newEnv(t *testing.T, runtime, more, policies string) *env {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	e := &env{t: t, ctx: ctx, runtime: runtime, dir: t.TempDir(), pins: fmt.Sprintf("/sys/fs/bpf/syslatch-podman-%d", os.Getpid())}
	e.policy = e.dir + "/policy.yaml"
	e.write(more, policies)
	e.must(exec.CommandContext(ctx, filepath.Join(programs, "syslatch"), "hook", "install", "--dir", e.dir+"/hooks.d", "--config", e.policy, "--hook", filepath.Join(programs, "syslatch-hook")).CombinedOutput())
	var err error
	if e.conf, err = writeConf(e.dir+"/containers.conf", runtime, e.dir+"/hooks.d"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Without the hook: what a test breaks must not keep its containers.
		// One whose conmon was killed takes podman two attempts.
		var r result
		for range 2 {
			if r, err = podman(context.Background(), scratch+"/load.conf", "rm", "-a", "-f", "-t", "0"); err == nil && r.code == 0 {
				break
			}
		}
		if err != nil || r.code != 0 {
			t.Errorf("rm: %+v, %v", r, err)
		}
		if err := errors.Join(bpf.Remove(e.pins), bpf.RemoveEnforcer(e.pins+"-phases")); err != nil {
			t.Error(err)
		}
	})
	return e
}

// extend gives a test more time than most need.
func (e *env) extend(most time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	e.t.Cleanup(cancel)
	e.ctx = ctx
}

func (e *env) write(more, policies string) {
	e.t.Helper()
	text := fmt.Sprintf("apiVersion: syslatch.dev/v1\nstore: %s/store\nstateDir: %s/state\nbpffs: %s\n%spolicies:%s", e.dir, e.dir, e.pins, more, policies)
	if err := os.WriteFile(e.policy, []byte(text), 0o600); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) must(output []byte, err error) string {
	e.t.Helper()
	if err != nil {
		e.t.Fatalf("%v: %s", err, output)
	}
	return string(output)
}

// run runs a container to its end. options come before the image.
func (e *env) run(name string, options []string, argv ...string) result {
	e.t.Helper()
	r, err := podman(e.ctx, e.conf, runArgs(name, options, argv...)...)
	if err != nil {
		e.t.Fatal(err)
	}
	return r
}

// runArgs: a name must not look like an id. --replace takes it for the beginning
// of one, too, and removes another container.
func runArgs(name string, options []string, argv ...string) []string {
	args := append([]string{"run", "--entrypoint", "[]", "--cgroup-parent", parent, "--name", name, "--replace"}, options...)
	return append(append(args, image), argv...)
}

func (e *env) podman(args ...string) string {
	e.t.Helper()
	r, err := podman(e.ctx, e.conf, args...)
	if err != nil || r.code != 0 {
		e.t.Fatalf("podman %v: %+v, %v", args, r, err)
	}
	return strings.TrimSpace(r.stdout)
}

func mode(m string) []string { return []string{"--annotation", "syslatch.dev/mode=" + m} }

func (e *env) store() *store.Store {
	e.t.Helper()
	s, err := store.Open(e.dir+"/store", store.Options{ReadOnly: true})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { s.Close() })
	return s
}

// version reads a version that must be there now.
func (e *env) version(workload string, n int) *profiles.Version {
	e.t.Helper()
	v, err := e.store().Version(workload, n)
	if err != nil {
		e.t.Fatal(err)
	}
	return v
}

func has(v *profiles.Version, name string) bool {
	return slices.Contains(v.Manifest.Calls["SCMP_ARCH_X86_64"], name)
}

// idle checks that nothing is left: no instance in the journal or in the kernel,
// and no program attached.
func (e *env) idle() {
	e.t.Helper()
	left, err := filepath.Glob(e.dir + "/state/hooks/*")
	if err != nil || len(left) > 0 {
		e.t.Errorf("journal: %v, %v", left, err)
	}
	if _, err := os.Stat(e.pins); errors.Is(err, fs.ErrNotExist) {
		return // nothing was ever recorded
	}
	if st := e.stats(); st.Instances != 0 || st.Finished != 0 || st.Cgroups != 0 || st.Attached {
		e.t.Errorf("left in the kernel: %+v", st)
	}
}

// stats is what the kernel records now.
func (e *env) stats() bpf.Stats {
	e.t.Helper()
	r, err := bpf.Open(e.pins, bpf.Options{})
	if err != nil {
		e.t.Fatal(err)
	}
	defer r.Close()
	st, err := r.Stats()
	if err != nil {
		e.t.Fatal(err)
	}
	return st
}

// each runs a test with each runtime.
func each(t *testing.T, test func(t *testing.T, runtime string)) {
	for _, r := range runtimes {
		t.Run(filepath.Base(r), func(t *testing.T) { test(t, r) })
	}
}

// wait waits for a condition that no event tells of.
func (e *env) wait(what string, condition func() bool) {
	e.t.Helper()
	err := poll(time.Minute, func() (bool, error) {
		if condition() {
			return true, nil
		}
		return false, errors.New("never: " + what)
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) inspect(name, format string) string { return e.podman("inspect", "-f", format, name) }

// decode reads JSON that podman prints.
func decode[T any](t *testing.T, data string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		t.Fatalf("%v: %s", err, data)
	}
	return v
}
