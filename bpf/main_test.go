// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/rawcalls"
)

const (
	helperEnv = "SYSLATCH_TEST_HELPER"
	argEnv    = "SYSLATCH_TEST_ARG" // a file
)

// Set by TestMain, read by all.
var (
	cgroupRoot string // of version 2
	bpffs      string // a mount of this run's own
)

func init() {
	if os.Getenv(helperEnv) != "" {
		runtime.LockOSThread() // to the leader, as a runtime's init is when it executes the program
	}
}

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		if err := helper(mode); err != nil {
			fmt.Fprintln(os.Stderr, "helper:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	if os.Getuid() != 0 {
		return m.Run(), nil
	}
	if cgroupRoot, err = findCgroupRoot(); err != nil {
		return 1, err
	}
	if err := sweep(); err != nil {
		return 1, err
	}
	if bpffs, err = os.MkdirTemp("", fmt.Sprintf("%s%d-", bpffsPrefix, os.Getpid())); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.Remove(bpffs)) }()
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"); err != nil {
		return 1, fmt.Errorf("mount bpffs: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(bpffs, 0)) }()

	// What the runtime opens for itself, once: the poller.
	r, w, err := os.Pipe()
	if err != nil {
		return 1, err
	}
	r.Close()
	w.Close()
	fds, goroutines := openFDs(), runtime.NumGoroutine()
	code = m.Run()

	var leaks []error
	// A profile or a benchmark's timer may end a little later than m.Run.
	if !poll(func() bool { return runtime.NumGoroutine() <= goroutines }) {
		leaks = append(leaks, fmt.Errorf("%d goroutines left, %d before", runtime.NumGoroutine(), goroutines))
	}
	for fd, target := range openFDs() {
		if _, ok := fds[fd]; !ok {
			leaks = append(leaks, fmt.Errorf("leaked fd %s: %s", fd, target))
		}
	}
	left, err := filepath.Glob(filepath.Join(cgroupRoot, fmt.Sprintf("%s%d-*", cgroupPrefix, os.Getpid())))
	leaks = append(leaks, err)
	for _, dir := range left {
		leaks = append(leaks, fmt.Errorf("leaked cgroup %s", dir))
	}
	pins, err := os.ReadDir(bpffs)
	leaks = append(leaks, err)
	for _, p := range pins {
		// The kernel itself pins maps.debug and progs.debug in every bpffs.
		if p.IsDir() {
			leaks = append(leaks, fmt.Errorf("leaked pins in %s", p.Name()))
		}
	}
	return code, errors.Join(leaks...)
}

const (
	bpffsPrefix  = "syslatch-bpffs-"
	cgroupPrefix = "syslatch-test-"
)

// sweep removes what earlier runs left that were killed: their pinned links would
// go on taxing every task of the machine.
func sweep() error {
	dead := func(path, prefix string) bool {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), prefix), "-")
		_, err := os.Stat("/proc/" + pid)
		return errors.Is(err, os.ErrNotExist)
	}
	mounts, err := filepath.Glob(filepath.Join(os.TempDir(), bpffsPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range mounts {
		if !dead(dir, bpffsPrefix) {
			continue
		}
		if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) { // not mounted
			return fmt.Errorf("sweep %s: %w", dir, err)
		}
		if err := os.Remove(dir); err != nil {
			return err
		}
	}
	groups, err := filepath.Glob(filepath.Join(cgroupRoot, cgroupPrefix+"*"))
	if err != nil {
		return err
	}
	for _, top := range groups {
		if !dead(top, cgroupPrefix) {
			continue
		}
		var dirs []string
		if err := filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		}); err != nil {
			return err
		}
		for _, dir := range slices.Backward(dirs) { // children first
			if err := os.Remove(dir); err != nil {
				return fmt.Errorf("sweep: %w", err)
			}
		}
	}
	return nil
}

func openFDs() map[string]string {
	fds := make(map[string]string)
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		// The directory's own is gone by now.
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			fds[e.Name()] = target
		}
	}
	return fds
}

func findCgroupRoot() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.New("cgroup version 2 is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
}

// poll waits for what the kernel does on its own time and has no event for.
func poll(done func() bool) bool {
	pause := time.Millisecond
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); pause = min(2*pause, 50*time.Millisecond) {
		if done() {
			return true
		}
		<-time.After(pause)
	}
	return done()
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("loading BPF programs and making cgroups needs root")
	}
}

// pinDir is a directory for pins, removed with what it holds.
func pinDir(t testing.TB) string {
	t.Helper()
	needRoot(t)
	dir := filepath.Join(bpffs, strings.ReplaceAll(t.Name(), "/", "_"))
	t.Cleanup(func() {
		if err := bpf.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func open(t testing.TB, dir string, opts bpf.Options) *bpf.Recorder {
	t.Helper()
	needRoot(t)
	r, err := bpf.Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func track(t testing.TB, r *bpf.Recorder, cg cgroup, opts bpf.TrackOptions) bpf.Handle {
	t.Helper()
	h, err := r.Track(cg.id, opts)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func finish(t testing.TB, r *bpf.Recorder, h bpf.Handle) *bpf.Snapshot {
	t.Helper()
	s, err := r.Untrack(h)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// cgroup is a directory of version 2.
type cgroup struct {
	path string
	id   uint64
}

var cgroupCount struct {
	sync.Mutex
	n int
}

func newCgroup(t testing.TB) cgroup {
	t.Helper()
	needRoot(t)
	cgroupCount.Lock()
	cgroupCount.n++
	n := cgroupCount.n
	cgroupCount.Unlock()
	return mkdir(t, filepath.Join(cgroupRoot, fmt.Sprintf("%s%d-%d", cgroupPrefix, os.Getpid(), n)))
}

func (c cgroup) child(t testing.TB, name string) cgroup {
	t.Helper()
	return mkdir(t, filepath.Join(c.path, name))
}

func mkdir(t testing.TB, path string) cgroup {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// No process is in it but after a failure.
		_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
		if !poll(func() bool {
			err := os.Remove(path)
			return err == nil || errors.Is(err, os.ErrNotExist)
		}) {
			t.Errorf("can't remove %s", path)
		}
	})
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return cgroup{path: path, id: st.Ino}
}

// baseFilters is what a child of this process starts with.
func baseFilters(t testing.TB) int {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "Seccomp_filters:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no Seccomp_filters in /proc/self/status")
	return 0
}

// script is what a caller process does.
type script struct {
	// Inherit is filters that are loaded before the process executes itself anew
	// and goes on with the rest.
	Inherit int
	Threads int // that each make the calls; 0: one
	// Nested is a child cgroup to make and move to before any call.
	Nested string
	// Visits are files cgroup.procs to open for writing before any call.
	Visits []string
	Calls  []step
}

type step struct {
	rawcalls.Call
	Filter bool // load an allow-all filter instead
	Buffer int  // 1 + the argument that is to point to a small buffer
	Visit  int  // 1 + the index in Visits: move to that cgroup, by one write
}

// Numbers of x86_64.
const (
	sysRead      = 0
	sysWrite     = 1
	sysIoctl     = 16
	sysGetpid    = 39
	sysExit      = 60
	sysGetuid    = 102
	sysGetgid    = 104
	sysGeteuid   = 107
	sysGetppid   = 110
	sysPrctl     = 157
	sysExitGroup = 231
	sysSeccomp   = 317
)

func call(nr uint64, args ...uint64) step {
	s := step{Call: rawcalls.Call{Number: nr}}
	copy(s.Args[:], args)
	return s
}

func call32(nr uint64, args ...uint64) step {
	s := call(nr, args...)
	s.Gate32 = 1
	return s
}

var (
	filter = step{Filter: true}
	exit   = call(sysExitGroup, 0)
)

// pause tells the test that the process is here, and waits for it.
func pause() []step {
	w := call(sysWrite, 4, 0, 1)
	w.Buffer = 2
	r := call(sysRead, 3, 0, 1)
	r.Buffer = 2
	return []step{w, r}
}

func steps(parts ...any) []step {
	var all []step
	for _, p := range parts {
		switch p := p.(type) {
		case step:
			all = append(all, p)
		case []step:
			all = append(all, p...)
		}
	}
	return all
}

// process is a helper process: this binary in another role.
type process struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    *os.File // a byte lets it go on
	out   *os.File // a byte, or a line, says that it waits
	lines *bufio.Reader
	done  bool
}

// start runs a helper within a cgroup, or in the test's own if that is nil.
func start(t testing.TB, cg *cgroup, mode string, arg any) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	input, err := json.Marshal(arg)
	if err != nil {
		t.Fatal(err)
	}
	// The kernel has no room for a long list of calls in an environment.
	file := filepath.Join(t.TempDir(), "arg")
	if err := os.WriteFile(file, input, 0o600); err != nil {
		t.Fatal(err)
	}
	theirIn, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	// The runtime's signals would make calls in the middle of a list.
	cmd.Env = append(os.Environ(), helperEnv+"="+mode, argEnv+"="+file, "GODEBUG=asyncpreemptoff=1", "GOGC=off",
		"GOMAXPROCS=32") // a thread in a raw call keeps its P
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirIn, theirOut}
	if cg != nil {
		dir, err := os.Open(cg.path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	err = cmd.Start()
	theirIn.Close()
	theirOut.Close()
	p := &process{t: t, cmd: cmd, in: in, out: out, lines: bufio.NewReader(out)}
	t.Cleanup(func() {
		if err == nil && !p.done {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		in.Close()
		out.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// waits returns when the process is at a pause.
func (p *process) waits() {
	p.t.Helper()
	if _, err := p.lines.ReadByte(); err != nil {
		p.t.Fatalf("helper ended early: %v", err)
	}
}

// release lets the process go on.
func (p *process) release() {
	p.t.Helper()
	if _, err := p.in.Write([]byte{'.'}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *process) wait() {
	p.t.Helper()
	p.done = true
	if err := p.cmd.Wait(); err != nil {
		p.t.Fatalf("helper: %v", err)
	}
}

func (p *process) kill() {
	p.t.Helper()
	p.done = true
	if err := p.cmd.Process.Kill(); err != nil {
		p.t.Fatal(err)
	}
	_ = p.cmd.Wait() // the signal is its error
}

// line reads JSON that the helper wrote.
func (p *process) line(to any) {
	p.t.Helper()
	line, err := p.lines.ReadBytes('\n')
	if err != nil {
		p.t.Fatalf("helper ended early: %v", err)
	}
	if err := json.Unmarshal(line, to); err != nil {
		p.t.Fatal(err)
	}
}

func helper(mode string) error {
	arg, err := os.ReadFile(os.Getenv(argEnv))
	if err != nil {
		return err
	}
	in, out := os.NewFile(3, "in"), os.NewFile(4, "out")
	switch mode {
	case "caller":
		var s script
		if err := json.Unmarshal(arg, &s); err != nil {
			return err
		}
		return s.run()
	case "recorder":
		var a recorderArg
		if err := json.Unmarshal(arg, &a); err != nil {
			return err
		}
		return a.run(in, out)
	case "bench":
		return benchCaller(in, out)
	case "few capabilities":
		return fewCapabilities(out)
	case "phased":
		return phased(in, out)
	}
	return fmt.Errorf("unknown mode %s", mode)
}

// recorderArg is what another recording process does: track and await all, wait,
// and finish all.
type recorderArg struct {
	Dir     string
	Cgroups []uint64
	Names   []string // to await
	Gate    bpf.Gate
	Base    int
}

func (a recorderArg) run(in io.Reader, out io.Writer) error {
	r, err := bpf.Open(a.Dir, bpf.Options{})
	if err != nil {
		return err
	}
	defer r.Close()
	var handles []bpf.Handle
	for _, id := range a.Cgroups {
		h, err := r.Track(id, bpf.TrackOptions{Gate: a.Gate, BaseFilters: a.Base})
		if err != nil {
			return err
		}
		handles = append(handles, h)
	}
	for _, name := range a.Names {
		h, err := r.Await(name, bpf.TrackOptions{Gate: a.Gate, BaseFilters: a.Base})
		if err != nil {
			return err
		}
		handles = append(handles, h)
	}
	if err := json.NewEncoder(out).Encode(handles); err != nil {
		return err
	}
	if _, err := in.Read(make([]byte, 1)); err != nil {
		return err
	}
	for _, h := range handles {
		if _, err := r.Untrack(h); err != nil {
			return err
		}
	}
	return nil
}

func allowAll() *unix.SockFprog {
	return &unix.SockFprog{Len: 1, Filter: &unix.SockFilter{
		Code: unix.BPF_RET | unix.BPF_K, K: 0x7fff0000, // SECCOMP_RET_ALLOW
	}}
}

func (s script) run() error {
	runtime.LockOSThread() // for good: what follows depends on this thread's filters
	prog := allowAll()
	if s.Inherit > 0 {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
		for range s.Inherit {
			if _, _, errno := unix.RawSyscall(sysSeccomp, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(prog))); errno != 0 {
				return errno
			}
		}
		s.Inherit = 0
		arg, err := json.Marshal(s)
		if err != nil {
			return err
		}
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		if err := os.WriteFile(os.Getenv(argEnv), arg, 0o600); err != nil {
			return err
		}
		return unix.Exec(exe, []string{exe}, os.Environ())
	}
	if s.Nested != "" {
		if err := os.Mkdir(s.Nested, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(s.Nested, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	var visits []*os.File
	for _, path := range s.Visits {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		visits = append(visits, f) // open until the end
	}
	if s.Threads == 0 {
		s.work(prog, visits)
		return nil
	}
	var wg sync.WaitGroup
	for range s.Threads {
		wg.Go(func() {
			runtime.LockOSThread()
			s.work(prog, visits)
		})
	}
	wg.Wait()
	return nil
}

func (s script) work(prog *unix.SockFprog, visits []*os.File) {
	buffer, self := new([8]byte), &[1]byte{'0'}
	var calls []rawcalls.Call
	for _, st := range s.Calls {
		if st.Filter {
			nnp := call(sysPrctl, unix.PR_SET_NO_NEW_PRIVS, 1)
			load := call(sysSeccomp, unix.SECCOMP_SET_MODE_FILTER, 0, uint64(uintptr(unsafe.Pointer(prog))))
			calls = append(calls, nnp.Call, load.Call)
			continue
		}
		if st.Visit > 0 {
			to := call(sysWrite, uint64(visits[st.Visit-1].Fd()), uint64(uintptr(unsafe.Pointer(self))), 1)
			calls = append(calls, to.Call)
			continue
		}
		if st.Buffer > 0 {
			st.Args[st.Buffer-1] = uint64(uintptr(unsafe.Pointer(buffer)))
		}
		calls = append(calls, st.Call)
	}
	rawcalls.Run(calls)
	runtime.KeepAlive(buffer)
	runtime.KeepAlive(self)
	runtime.KeepAlive(visits)
	runtime.KeepAlive(prog)
}
