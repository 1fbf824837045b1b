// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// helperEnv makes the test binary a helper: what it prints on standard output
// is its answer, and it ends with its standard input.
const (
	helperEnv = "SYSLATCH_CGROUP_HELPER"
	dirEnv    = "SYSLATCH_CGROUP_DIR" // where the job "threaded" goes first
)

func TestMain(m *testing.M) {
	if job := os.Getenv(helperEnv); job != "" {
		if err := help(job); err != nil {
			fmt.Fprintln(os.Stderr, "helper:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The poller's descriptors are made once, by the first pipe.
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	r.Close()
	w.Close()
	before := openFiles()
	code := m.Run()
	if left := leaks(before); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "FAIL: leaked:", strings.Join(left, ", "))
		code = 1
	}
	os.Exit(code)
}

// testPrefix begins the names of this run's own cgroups.
var testPrefix = fmt.Sprintf("test-%d-", os.Getpid())

func leaks(before []string) []string {
	var left []string
	for _, f := range openFiles() {
		if !slices.Contains(before, f) {
			left = append(left, f)
		}
	}
	if h, err := Detect(); err == nil {
		for _, dir := range append(slices.Collect(points(h)), h.Unified) {
			found, _ := filepath.Glob(filepath.Join(dir, "*"+testPrefix+"*"))
			left = append(left, found...)
		}
	}
	return left
}

func points(h *Hierarchy) func(func(string) bool) {
	return func(yield func(string) bool) {
		for _, m := range h.v1 {
			if !yield(m.point) {
				return
			}
		}
	}
}

func openFiles() []string {
	var files []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		// The listing's own descriptor is closed by now.
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			files = append(files, e.Name()+" "+target)
		}
	}
	return files
}

// report is what a helper finds out about itself.
type report struct {
	Unified string
	Own     string // OfPID of itself
	OwnID   uint64
	Parent  string // OfPID of the test
	Err     string
	Group   string // a group that it made and ran a process in
}

func help(job string) error {
	var r report
	switch job {
	case "wait": // only be there
		fmt.Println("{}")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	case "vfork": // wait for a child's execve, which comes when standard input ends
		return vfork()
	case "mount": // see the namespace's own root as the only mount
		h, err := Detect()
		if err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		// The kernel refuses the second mount of one file system over its first.
		if err := unix.Unmount(h.Unified, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount cgroup2: %w", err)
		}
		if err := unix.Mount("cgroup2", h.Unified, "cgroup2", 0, ""); err != nil {
			return fmt.Errorf("mount cgroup2: %w", err)
		}
	case "look":
	case "group", "threaded":
		if job == "threaded" {
			move := filepath.Join(os.Getenv(dirEnv), "cgroup.procs")
			if err := os.WriteFile(move, fmt.Append(nil, os.Getpid()), 0); err != nil {
				return err
			}
		}
		g, err := New(testPrefix + "own")
		if err != nil {
			return err
		}
		r.Group = g.Path()
		cmd, stdin, err := g.run("wait")
		if err != nil {
			return errors.Join(err, g.Remove())
		}
		dir, err := readPath(cmd.Process.Pid)
		if err == nil && dir != g.Path() {
			err = fmt.Errorf("the group's process is in %s", dir)
		}
		stdin.Close()
		if err := errors.Join(err, cmd.Wait(), g.Wait(context.Background()), g.Remove()); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown job %q", job)
	}
	h, err := Detect()
	if err != nil {
		return err
	}
	r.Unified = h.Unified
	if r.Own, err = h.OfPID(os.Getpid()); err != nil {
		return err
	}
	if r.OwnID, err = ID(r.Own); err != nil {
		return err
	}
	if r.Parent, err = h.OfPID(os.Getppid()); err != nil {
		r.Err = err.Error()
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func readPath(pid int) (string, error) {
	h, err := Detect()
	if err != nil {
		return "", err
	}
	return h.OfPID(pid)
}

// command is this binary as a helper, to be started in the group.
func (g *Group) command(job string) (*exec.Cmd, *os.File, error) {
	dir, err := g.Open()
	if err != nil {
		return nil, nil, err
	}
	// Not by its path: the directory may be root's alone, and the helper not root.
	cmd := exec.Command("/proc/self/exe")
	// The race detector would have the helper sleep for a second at its exit.
	cmd.Env = append(os.Environ(), helperEnv+"="+job, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return cmd, dir, nil
}

// run starts a helper in the group that waits for its standard input's end.
func (g *Group) run(job string) (*exec.Cmd, io.WriteCloser, error) {
	cmd, dir, err := g.command(job)
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	return cmd, stdin, cmd.Start()
}

// answer runs a helper in the group to its end.
func answer(t *testing.T, g *Group, job string, set func(*exec.Cmd)) report {
	t.Helper()
	cmd, dir, err := g.command(job)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if set != nil {
		set(cmd)
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("helper %s: %v: %s", job, err, stderr.String())
	}
	var r report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	return r
}

func detect(t *testing.T) *Hierarchy {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making cgroups needs root")
	}
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.RequireV2(); err != nil {
		t.Skip(err)
	}
	return h
}

// group is a group below parent, or the mount's root, that is removed with all
// that is in it.
func group(t *testing.T, parent string) *Group {
	t.Helper()
	h := detect(t)
	if parent == "" {
		parent = h.Unified
	}
	g, err := NewIn(parent, testPrefix+"x")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { clean(t, g) })
	return g
}

func clean(t *testing.T, g *Group) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := errors.Join(g.Kill(), g.Wait(ctx), g.Remove()); err != nil {
		t.Error(err)
	}
}

// occupy puts a process into the group, which stays until killed or told to
// end by its standard input.
func occupy(t *testing.T, g *Group) (*exec.Cmd, io.WriteCloser) {
	t.Helper()
	cmd, stdin, err := g.run("wait")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	return cmd, stdin
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

func TestIDAndPath(t *testing.T) {
	h := detect(t)
	g := group(t, "")
	child := mkdir(t, filepath.Join(g.Path(), "a b"))
	deep := mkdir(t, filepath.Join(child, "c"))
	for _, dir := range []string{h.Unified, g.Path(), child, deep} {
		id, err := ID(dir)
		if err != nil {
			t.Fatal(err)
		}
		// What the package comment says of 64-bit kernels.
		if ino, err := inode(dir); err != nil || ino != id {
			t.Errorf("%s: id %d, inode %d, %v", dir, id, ino, err)
		}
		for how, path := range map[string]func(uint64) (string, error){
			"handle": h.pathByHandle, "walk": h.pathByWalk, "either": h.Path,
		} {
			if got, err := path(id); err != nil || got != dir {
				t.Errorf("by %s: path of %d = %q, %v, want %q", how, id, got, err, dir)
			}
		}
	}
	if id, err := ID(g.Path()); err != nil || id != g.ID() {
		t.Errorf("ID = %d, %v, want the group's %d", id, err, g.ID())
	}
	children, err := Children(g.Path())
	if diff := cmp.Diff([]string{child, deep}, children); err != nil || diff != "" {
		t.Error(err, diff)
	}

	id, err := ID(deep)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(deep); err != nil {
		t.Fatal(err)
	}
	file, err := inode(filepath.Join(child, "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	for what, id := range map[string]uint64{"removed cgroup": id, "file": file, "no node": 1 << 60} {
		if got, err := h.Path(id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: path %q, %v, want fs.ErrNotExist", what, got, err)
		}
	}
	if id, err := ID("/proc"); err == nil {
		t.Errorf("/proc has cgroup id %d", id)
	}
	if _, err := ID(deep); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("id of a removed cgroup: %v", err)
	}
}

func TestProcessInGroup(t *testing.T) {
	h := detect(t)
	g := group(t, "")
	cmd, stdin := occupy(t, g)
	pid := cmd.Process.Pid
	if got, err := h.OfPID(pid); err != nil || got != g.Path() {
		t.Errorf("OfPID = %q, %v, want %q", got, err, g.Path())
	}
	p, err := OpenProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()

	own, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.OOMScoreAdj(); err != nil || fmt.Sprintln(got) != string(own) {
		t.Errorf("oom_score_adj = %d, %v, want as ours, %s", got, err, own)
	}
	status, err := p.Status()
	if base, baseErr := Status(os.Getpid()); err != nil || baseErr != nil || status != base {
		t.Errorf("status = %+v, %v, want as ours, %+v, %v", status, err, base, baseErr)
	}
	// Set from here: a Go program raises some of its own as it starts.
	for name, resource := range map[string]int{"RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_NICE": unix.RLIMIT_NICE} {
		var is unix.Rlimit
		if err := unix.Prlimit(pid, resource, nil, &is); err != nil {
			t.Fatal(err)
		}
		is.Cur = is.Max / 2
		if err := unix.Prlimit(pid, resource, &is, nil); err != nil {
			t.Fatal(err)
		}
		limits, err := p.Limits()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := limits[name], (Limit{is.Cur, is.Max}); got != want {
			t.Errorf("%s = %v, want %v", name, got, want)
		}
	}
	limits, err := p.Limits()
	if err != nil {
		t.Fatal(err)
	}
	if len(limits) != len(limitNames) {
		t.Errorf("%d limits are read, this kernel has %d", len(limits), len(limitNames))
	}
	start, err := p.StartTime()
	if err != nil || start == 0 {
		t.Errorf("start time %d, %v", start, err)
	}
	if _, err := p.ReadFile("no such file"); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrGone) {
		t.Errorf("a file that isn't there, of a live process: %v", err)
	}

	// A zombie in a cgroup that is removed.
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(g.Wait(t.Context()), g.Remove()); err != nil {
		t.Fatal(err)
	}
	if got, err := h.OfPID(pid); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "was removed") {
		t.Errorf("zombie: OfPID = %q, %v, want fs.ErrNotExist", got, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	// Reaped: nothing more is read, not even if the pid is used again.
	if _, err := p.Status(); !errors.Is(err, ErrGone) {
		t.Errorf("reaped: %v, want ErrGone", err)
	}
	if _, err := OpenProcess(pid); !errors.Is(err, ErrGone) {
		t.Errorf("open a reaped process: %v, want ErrGone", err)
	}
}

// The mount begins above the namespace's root: the names between come from the
// lists of members.
func TestNamespaceUnderHostMount(t *testing.T) {
	h := detect(t)
	g := group(t, "")
	r := answer(t, g, "look", func(c *exec.Cmd) { c.SysProcAttr.Cloneflags = unix.CLONE_NEWCGROUP })
	own, err := h.OfPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(report{Unified: h.Unified, Own: g.Path(), OwnID: g.ID(), Parent: own}, r); diff != "" {
		t.Error(diff)
	}
}

// The namespace's root is all that is mounted: a container with a cgroup
// namespace of its own.
func TestNamespaceWithOwnMount(t *testing.T) {
	h := detect(t)
	g := group(t, "")
	r := answer(t, g, "mount", func(c *exec.Cmd) { c.SysProcAttr.Cloneflags = unix.CLONE_NEWCGROUP | unix.CLONE_NEWNS })
	if r.Own != h.Unified || r.OwnID != g.ID() {
		t.Errorf("own cgroup %s with id %d, want %s with %d", r.Own, r.OwnID, h.Unified, g.ID())
	}
	if !strings.Contains(r.Err, "outside of this process's cgroup namespace") {
		t.Errorf("a process outside of the namespace is in %q, %q", r.Parent, r.Err)
	}
}

func TestWait(t *testing.T) {
	g := group(t, "")
	if err := g.Wait(t.Context()); err != nil {
		t.Fatalf("group without a process: %v", err)
	}
	// A process two levels down counts, and one that outlives another.
	deep := mkdir(t, filepath.Join(mkdir(t, filepath.Join(g.Path(), "a")), "b"))
	_, first := occupy(t, g)
	second, secondIn := occupy(t, &Group{path: deep})

	if err := g.Remove(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Remove with processes: %v, want EBUSY", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- g.Wait(ctx) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with an ended context: %v", err)
	}

	go func() { done <- g.Wait(t.Context()) }()
	first.Close()
	select {
	case err := <-done:
		t.Fatalf("Wait returned %v while pid %d lives", err, second.Process.Pid)
	case <-becomes(t, filepath.Join(g.Path(), "cgroup.procs"), ""):
	}
	secondIn.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(g.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", g.Path(), err)
	}
	// All of them are fine with a group that isn't there any more.
	if err := errors.Join(g.Kill(), g.Wait(t.Context()), g.Remove()); err != nil {
		t.Error(err)
	}
}

// becomes is closed when a file of a cgroup reads as want, where there is no
// event for it.
func becomes(t *testing.T, path, want string) <-chan struct{} {
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		for t.Context().Err() == nil {
			if data, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(data)) == want {
				return
			}
		}
	}()
	return seen
}

func TestKill(t *testing.T) {
	g := group(t, "")
	deep := mkdir(t, filepath.Join(g.Path(), "a"))
	var all []*exec.Cmd
	for _, where := range []*Group{g, {path: deep}} {
		cmd, _ := occupy(t, where)
		all = append(all, cmd)
	}
	if err := errors.Join(g.Kill(), g.Wait(t.Context()), g.Remove()); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range all {
		_ = cmd.Wait() // the signal is its error
		if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != unix.SIGKILL {
			t.Errorf("pid %d: %v, want killed", cmd.Process.Pid, cmd.ProcessState)
		}
	}
}

func TestNewNames(t *testing.T) {
	h := detect(t)
	for _, name := range []string{"../x", "a\nb", strings.Repeat("x", 201)} {
		if g, err := NewIn(h.Unified, name); err == nil {
			t.Errorf("name %q makes %s", name, g.Path())
			clean(t, g)
		}
	}
	if g, err := NewIn(t.TempDir(), testPrefix+"x"); err == nil {
		t.Errorf("%s, which is no cgroup, becomes a group", g.Path())
	}
	a, b := group(t, ""), group(t, "")
	if a.Name() == b.Name() || !strings.HasPrefix(a.Name(), "syslatch-"+testPrefix+"x-") || a.Path() != filepath.Join(h.Unified, a.Name()) {
		t.Errorf("names %q and %q", a.Name(), b.Name())
	}
}

// A group is made below the process's own cgroup, which holds that process, and
// takes processes.
func TestNewBelowOwn(t *testing.T) {
	outer := group(t, "")
	r := answer(t, outer, "group", nil)
	if filepath.Dir(r.Group) != outer.Path() {
		t.Errorf("group %s, want it in %s", r.Group, outer.Path())
	}
}

// The same with a parent whose controllers are on for its children: the
// no-internal-processes rule lets processes into leaves only, and the group
// must be one.
func TestNewWithControllers(t *testing.T) {
	detect(t)
	outer := group(t, "")
	available, err := os.ReadFile(filepath.Join(outer.Path(), "cgroup.controllers"))
	if err != nil {
		t.Fatal(err)
	}
	controllers := strings.Fields(string(available))
	// A threaded controller alone doesn't bring the rule with it.
	controllers = slices.DeleteFunc(controllers, func(c string) bool {
		return slices.Contains([]string{"cpu", "cpuset", "perf_event", "pids"}, c)
	})
	if len(controllers) == 0 {
		t.Skipf("no domain controller is on v2 here (cgroup.controllers: %q): that is so on a hybrid host", available)
	}
	write(t, filepath.Join(outer.Path(), "cgroup.subtree_control"), "+"+controllers[0])
	g := group(t, outer.Path())
	r := answer(t, g, "group", nil)
	if filepath.Dir(r.Group) != g.Path() {
		t.Errorf("group %s, want it in %s", r.Group, g.Path())
	}
}

// In a delegated subtree an unprivileged process makes its group inside of it.
func TestNewDelegated(t *testing.T) {
	detect(t)
	outer := group(t, "")
	const nobody = 65534
	for _, file := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
		if err := os.Chown(filepath.Join(outer.Path(), file), nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	r := answer(t, outer, "group", func(c *exec.Cmd) {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	})
	if filepath.Dir(r.Group) != outer.Path() {
		t.Errorf("group %s, want it in %s", r.Group, outer.Path())
	}
}

// A threaded cgroup's children can't be entered by processes: the group is made
// above.
func TestNewInThreaded(t *testing.T) {
	outer := group(t, "")
	domain := mkdir(t, filepath.Join(outer.Path(), "domain"))
	threaded := mkdir(t, filepath.Join(domain, "threaded"))
	write(t, filepath.Join(threaded, "cgroup.type"), "threaded")
	if g, err := NewIn(threaded, testPrefix+"x"); err == nil || !strings.Contains(err.Error(), "threaded") {
		t.Errorf("a group in a threaded cgroup: %v, %v", g, err)
	}
	r := answer(t, &Group{path: domain}, "threaded", func(c *exec.Cmd) { c.Env = append(c.Env, dirEnv+"="+threaded) })
	if r.Own != threaded || filepath.Dir(r.Group) != outer.Path() {
		t.Errorf("in %s: group %s, want it in %s", r.Own, r.Group, outer.Path())
	}
}

func TestReadController(t *testing.T) {
	h := detect(t)
	g := group(t, "")
	cmd, _ := occupy(t, g)
	pid := cmd.Process.Pid
	dir := g.Path()
	if h.Mode == Hybrid {
		dir = mkdir(t, filepath.Join(h.v1["pids"].point, g.Name()))
		write(t, filepath.Join(dir, "cgroup.procs"), fmt.Sprint(pid))
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
	} else {
		write(t, filepath.Join(h.Unified, "cgroup.subtree_control"), "+pids")
	}
	file := filepath.Join(dir, "pids.max")
	write(t, file, "37")
	// The other mode's file has another name, to see which one is taken.
	v1, v2 := "pids.max", "no.such.file"
	if h.Mode == V2 {
		v1, v2 = v2, v1
	}
	value, path, err := h.ReadController(pid, "pids", v2, v1)
	if err != nil || value != "37" || path != file {
		t.Errorf("%q from %q, %v, want 37 from %q", value, path, err, file)
	}
	if _, path, err := h.ReadController(pid, "pids", v1, v2); !errors.Is(err, fs.ErrNotExist) || path == "" {
		t.Errorf("a file that isn't there: path %q, %v", path, err)
	}
	if h.Mode != Hybrid {
		return
	}
	dirs, err := h.V1Dirs(pid)
	if err != nil {
		t.Fatal(err)
	}
	if dirs["pids"] != dir || len(dirs) != len(h.v1) {
		t.Errorf("v1 directories %v, want %d with pids at %s", dirs, len(h.v1), dir)
	}
	for c, dir := range dirs {
		members, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil || !slices.Contains(strings.Fields(string(members)), fmt.Sprint(pid)) {
			t.Errorf("%s: %s doesn't list pid %d (%v)", c, dir, pid, err)
		}
	}
}
