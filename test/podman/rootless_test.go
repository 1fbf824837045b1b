// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/test/harness"
)

// The accounts of these tests are on every Debian. Without subordinate ids podman
// maps the user alone into its user namespace.
const (
	servedUser = "nobody"
	otherUser  = "games" // who isn't served
)

// rootless is syslatchd, and a user with podman.
type rootless struct {
	*env
	uid, gid int
	socket   string
	parent   string   // of the user's containers' cgroups; "" where there can be none
	self     *os.File // the cgroup that the user's own processes are in, likewise
	daemon   *exec.Cmd
}

// byUser lets the served users choose.
const byUser = `
- name: rootless
  match: {users: ["*"]}
  mode: "off"
  workload: "{container}"
  annotations: [mode, workload]
  allowedModes: [off, record, audit, enforce]
  failure: deny
  limits: {rlimits: [{type: RLIMIT_CORE, soft: 0, hard: 0}]%s}
- name: roots
  match: {}
  mode: record
`

func newRootless(t *testing.T, runtime string) *rootless {
	t.Helper()
	account, err := user.Lookup(servedUser)
	if err != nil {
		t.Fatal(err)
	}
	r := &rootless{}
	if r.uid, err = strconv.Atoi(account.Uid); err != nil {
		t.Fatal(err)
	}
	if r.gid, err = strconv.Atoi(account.Gid); err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir, whose parent lets no others through.
	dir, err := os.MkdirTemp("", "syslatch-rootless-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	r.env = &env{t: t, ctx: ctx, runtime: runtime, dir: dir, policy: dir + "/policy.yaml", pins: fmt.Sprintf("/sys/fs/bpf/syslatch-rootless-%d", os.Getpid())}
	r.socket = dir + "/state/hook.sock"
	limits := ""
	if hierarchy.Mode == cgroup.V2 {
		limits = ", pids: {max: 77}"
	}
	r.serves(servedUser, limits)
	// The tests' own directory need not let others through, either.
	hook := dir + "/syslatch-hook"
	r.must(exec.Command("install", "-m", "755", filepath.Join(programs, "syslatch-hook"), hook).CombinedOutput())
	r.must(exec.Command(filepath.Join(programs, "syslatch"), "hook", "install", "--dir", dir+"/hooks.d", "--config", r.policy, "--hook", hook, "--rootless-socket", r.socket).CombinedOutput())
	if r.conf, err = writeConf(dir+"/containers.conf", runtime, dir+"/hooks.d"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(r.conf, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"home", "run"} {
		if err := errors.Join(os.Mkdir(dir+"/"+name, 0o700), os.Chown(dir+"/"+name, r.uid, r.gid)); err != nil {
			t.Fatal(err)
		}
	}
	if hierarchy.Mode == cgroup.V2 {
		r.delegate()
	}
	t.Cleanup(func() {
		if err := errors.Join(bpf.Remove(r.pins), bpf.RemoveEnforcer(r.pins+"-phases")); err != nil {
			t.Error(err)
		}
	})
	return r
}

// serves writes a policy file by which a user is served, with more limits.
func (r *rootless) serves(name, limits string) {
	r.t.Helper()
	r.write(fmt.Sprintf("hook: {rootless: {users: [%s], socket: %s}}\n", name, r.socket), fmt.Sprintf(byUser, limits))
}

// delegate gives the user a cgroup, as systemd does (user@.service, Delegate=).
func (r *rootless) delegate() {
	t := r.t
	t.Helper()
	r.parent = fmt.Sprintf("/syslatch-rootless-%d", os.Getpid())
	top := hierarchy.Unified + r.parent
	if err := os.Mkdir(top, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		children, err := cgroup.Children(top)
		if err != nil {
			t.Error(err)
		}
		slices.Reverse(children)
		for _, dir := range append(children, top) {
			if err := removeCgroup(dir); err != nil {
				t.Errorf("left behind: %s: %v", dir, err)
			}
		}
	})
	err := errors.Join(os.WriteFile(top+"/cgroup.subtree_control", []byte("+pids"), 0), os.Mkdir(top+"/self", 0o755))
	for _, name := range []string{"", "cgroup.procs", "cgroup.subtree_control", "self", "self/cgroup.procs"} {
		err = errors.Join(err, os.Chown(filepath.Join(top, name), r.uid, r.gid))
	}
	if err != nil {
		t.Fatal(err)
	}
	if r.self, err = os.Open(top + "/self"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.self.Close() })
}

// command runs as the user.
func (r *rootless) command(name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(r.ctx, name, args...)
	cmd.Dir = r.dir + "/home"
	cmd.Env = []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + r.dir + "/home", "XDG_RUNTIME_DIR=" + r.dir + "/run", "CONTAINERS_CONF=" + r.conf,
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(r.uid), Gid: uint32(r.gid)}}
	if r.self != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(r.self.Fd())
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (r *rootless) do(cmd *exec.Cmd) result {
	r.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

func (r *rootless) userPodman(args ...string) *exec.Cmd {
	return r.command("podman", append([]string{
		"--log-level", "error", "--root", r.dir + "/home/root", "--runroot", r.dir + "/run/root", "--storage-driver", "vfs",
	}, args...)...)
}

// load gives the user the image, and takes the user's processes away in the end.
func (r *rootless) load() {
	t := r.t
	t.Helper()
	busybox, err := harness.Busybox(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := os.Open(busybox.Archive)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	t.Cleanup(func() {
		// podman keeps a process that holds its user namespace.
		if data, err := os.ReadFile(r.dir + "/run/libpod/tmp/pause.pid"); err == nil {
			pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
			if err != nil {
				t.Fatal(err)
			}
			end(t, pid)
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	cmd := r.userPodman("load")
	cmd.Stdin = archive
	if got := r.do(cmd); got.code != 0 {
		t.Fatalf("load: %+v", got)
	}
	t.Cleanup(func() {
		// Without the hook: what a test breaks must not keep its containers.
		if _, err := writeConf(r.conf, r.runtime, r.dir+"/none"); err != nil {
			t.Error(err)
		}
		if got := r.do(r.userPodman("rm", "-a", "-f", "-t", "0")); got.code != 0 {
			t.Errorf("rm: %+v", got)
		}
	})
}

// end kills a process and waits until it is gone.
func end(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Error(err)
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 10_000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 || err != nil {
			t.Errorf("process %d has not ended: %v", pid, err)
		}
		return
	}
}

// userRun runs a container as the user.
func (r *rootless) userRun(name string, options []string, argv ...string) result {
	r.t.Helper()
	return r.do(r.userPodman(r.runArgs(name, options, argv...)...))
}

func (r *rootless) runArgs(name string, options []string, argv ...string) []string {
	args := []string{"run", "--entrypoint", "[]", "--name", name, "--replace", "--rm"}
	if r.parent != "" && !slices.Contains(options, "--cgroups=disabled") {
		args = append(args, "--cgroup-parent", r.parent+"/pods")
	}
	return append(append(append(args, options...), image), argv...)
}

// start starts syslatchd, and stop ends it.
func (r *rootless) start() {
	t := r.t
	t.Helper()
	// With no more capabilities than the systemd unit leaves it.
	cmd := exec.Command("setpriv", "--bounding-set=-all,+bpf,+perfmon", "--inh-caps=-all", "--no-new-privs",
		filepath.Join(programs, "syslatchd"), "--config", r.policy, "--nri-socket", r.dir+"/none.sock")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.daemon = cmd
	t.Cleanup(func() { r.stop(syscall.SIGTERM) })
	ready, all := make(chan bool, 1), &bytes.Buffer{}
	go func() {
		lines := bufio.NewScanner(log)
		for lines.Scan() {
			if strings.Contains(lines.Text(), "serving rootless podman") {
				ready <- true
			}
			all.WriteString(lines.Text() + "\n")
		}
		ready <- false
	}()
	if !<-ready {
		t.Fatalf("syslatchd: %s", all)
	}
}

func (r *rootless) stop(signal os.Signal) {
	r.t.Helper()
	cmd := r.daemon
	if cmd == nil {
		return
	}
	r.daemon = nil
	if err := cmd.Process.Signal(signal); err != nil {
		r.t.Error(err)
	}
	if err := cmd.Wait(); err != nil && signal == syscall.SIGTERM {
		r.t.Errorf("syslatchd: %v", err)
	}
}

func (r *rootless) workload(name string) string { return fmt.Sprintf("user@%d/%s", r.uid, name) }

func (r *rootless) refused(got result, says ...string) {
	r.t.Helper()
	if got.code == 0 {
		r.t.Errorf("started: %+v", got)
	}
	for _, s := range append(says, "syslatch: ") {
		if !strings.Contains(got.stderr, s) {
			r.t.Errorf("no %q in %q", s, got.stderr)
		}
	}
}

// What is missing is said on the user's terminal; who asks for nothing is left alone.
func TestRootlessUnserved(t *testing.T) {
	r := newRootless(t, runtimes[0])
	r.load()
	remedy := "start it with hook: {rootless: {users: [NAME]}} in its policy file"
	r.refused(r.userRun("web", mode("record"), "true"), "rootless containers are not served here", remedy, r.socket+": connect: ")
	if got := r.userRun("web", nil, "true"); got.code != 0 {
		t.Errorf("left alone: %+v", got)
	}
	r.serves(otherUser, "")
	r.start()
	r.refused(r.userRun("web", mode("record"), "true"), remedy, fmt.Sprintf("nobody (uid %d) is not one of hook.rootless.users", r.uid))
	if got := r.userRun("web", nil, "true"); got.code != 0 {
		t.Errorf("left alone: %+v", got)
	}
	r.idle()
}

// A user's containers are recorded, confined and limited through the daemon; where
// they have no cgroup of their own they are not recorded, and that is said.
func TestRootless(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		r := newRootless(t, runtime)
		r.load()
		r.start()
		defer r.idle()
		r.refused(r.userRun("web", mode("enforce"), "true"), "has no profile version: "+r.workload("web"), "run it in mode record first")
		if hierarchy.Mode != cgroup.V2 {
			r.refused(r.userRun("web", mode("record"), "true"), "the container has no cgroup of its own", "with cgroup v1 controllers, podman gives rootless containers none")
			return
		}
		if got := r.userRun("web", mode("record"), "cat", "/proc/self/limits", "/sys/fs/cgroup/pids.max"); got.code != 0 || !strings.HasSuffix(got.stdout, "\n77\n") {
			t.Fatalf("%+v", got)
		}
		// It is there when podman returns, under the user's name for it alone.
		v := r.version(r.workload("web"), 1)
		if !has(v, "openat") || has(v, "mkdir") {
			t.Errorf("calls %v", v.Manifest.Calls)
		}
		if _, err := r.store().Version("web", 1); !errors.Is(err, store.ErrNoVersion) {
			t.Errorf("root's workload: %v", err)
		}
		if got := r.userRun("web", mode("enforce"), "cat", "/proc/self/status"); got.code != 0 || !strings.Contains(got.stdout, "Seccomp:\t2") {
			t.Errorf("%+v", got)
		}
		if got := r.userRun("web", mode("enforce"), "mkdir", "/x"); got.code == 0 || !strings.Contains(got.stderr, "Operation not permitted") {
			t.Errorf("%+v", got)
		}
		if !strings.HasSuffix(runtime, "crun") {
			return // the rest is not the runtime's; and runc takes no --cgroups=disabled
		}
		if got := r.userRun("plain", nil, "mkdir", "/x"); got.code != 0 {
			t.Errorf("left alone: %+v", got)
		}
		r.refused(r.userRun("web", append(mode("record"), "--annotation", "syslatch.dev/workload=user@0/web"), "true"), "user@ begins the workloads of rootless containers")
		r.refused(r.userRun("web", []string{"--annotation", "io.containers.trace-syscall=of:" + r.dir + "/x"}, "true"), "not served to rootless containers")
		r.refused(r.userRun("web", append(mode("record"), "--cgroups=disabled"), "true"), "the container has no cgroup of its own")
		// To enforce takes none, unless there are limits for it.
		without := append(mode("enforce"), "--cgroups=disabled")
		r.refused(r.userRun("web", without, "cat", "/proc/self/status"), "injected settings are not in force", "pids.max")
		r.stop(syscall.SIGTERM)
		r.serves(servedUser, "")
		r.start()
		if got := r.userRun("web", without, "cat", "/proc/self/status"); got.code != 0 || !strings.Contains(got.stdout, "Seccomp:\t2") {
			t.Errorf("%+v", got)
		}
	})
}

// What a container calls while the daemon is dead is in its recording.
func TestRootlessDaemonDies(t *testing.T) {
	if hierarchy.Mode != cgroup.V2 {
		t.Skip("rootless containers have no cgroups beside v1 controllers")
	}
	r := newRootless(t, "/usr/bin/crun")
	r.load()
	r.start()
	cmd := r.userPodman(r.runArgs("web", append(mode("record"), "-i"), "sh", "-c", "echo runs; read line; mkdir /x")...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "runs\n" {
		t.Errorf("%q, %v", line, err)
	}
	r.stop(syscall.SIGKILL)
	if _, err := stdin.Write([]byte("\n")); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	r.start() // the dead one's socket is replaced
	r.wait("the version", func() bool {
		_, err := r.store().Version(r.workload("web"), 1)
		return err == nil
	})
	if v := r.version(r.workload("web"), 1); !has(v, "mkdir") || len(v.Manifest.Calls) != 1 {
		t.Errorf("calls %v", v.Manifest.Calls)
	}
	r.wait("the journal's end", func() bool {
		left, _ := filepath.Glob(r.dir + "/state/hooks/*")
		return len(left) == 0
	})
	r.idle()
}

// A user can't have another's processes recorded: the hook is asked by hand.
func TestRootlessForged(t *testing.T) {
	r := newRootless(t, runtimes[0])
	r.start()
	id := strings.Repeat("a", 64)
	spec := `{"annotations":{"io.container.manager":"libpod","syslatch.dev/mode":"record","syslatch.dev/workload":"web"},"linux":{"cgroupsPath":"/libpod-` + id + `"}}`
	hook := func(stage, stdin string) result {
		t.Helper()
		cmd := r.command("unshare", "--user", "--map-root-user", r.dir+"/syslatch-hook", stage, "--config", r.policy, "--rootless-socket", r.socket)
		cmd.Stdin = strings.NewReader(stdin)
		return r.do(cmd)
	}
	type planned struct {
		Linux struct {
			Seccomp any `json:"seccomp"`
		} `json:"linux"`
	}
	bundle := r.dir + "/home/bundle"
	if err := os.Mkdir(bundle, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, pid := range map[string]int{"init": 1, "the daemon": r.daemon.Process.Pid, "root's": os.Getpid()} {
		got := hook("precreate", spec)
		if got.code != 0 || decode[planned](t, got.stdout).Linux.Seccomp == nil {
			t.Fatalf("%+v", got)
		}
		if err := os.WriteFile(bundle+"/config.json", []byte(got.stdout), 0o644); err != nil {
			t.Fatal(err)
		}
		r.refused(hook("createRuntime", fmt.Sprintf(`{"id":%q,"pid":%d,"bundle":%q}`, id, pid, bundle)),
			fmt.Sprintf("process %d is not of a rootless container of nobody (uid %d)", pid, r.uid))
		if t.Failed() {
			t.Fatal(name)
		}
	}
	r.idle()
}
