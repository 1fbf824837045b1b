// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/osthread"
	"github.com/syslatch/syslatch/internal/seccomp"
)

const (
	helperEnv = "SYSLATCH_INJECT_HELPER"
	// patience is for guests, which are slow.
	patience = 2 * time.Minute
)

var (
	workDir  string // of this run; anybody may enter it
	injected = sync.OnceValues(buildTarget)
)

func TestMain(m *testing.M) {
	if job := os.Getenv(helperEnv); job != "" {
		help(job)
	}
	var err error
	if workDir, err = os.MkdirTemp("", "inject"); err == nil {
		err = os.Chmod(workDir, 0o755)
	}
	if err != nil {
		panic(err)
	}
	before := openFiles()
	code := m.Run()
	if left := openFiles(); len(left) > len(before) {
		fmt.Fprintln(os.Stderr, "FAIL: leaked descriptors: had", before, "have", left)
		code = 1
	}
	os.RemoveAll(workDir)
	os.Exit(code)
}

// openFiles lists descriptors, without those that the runtime keeps.
func openFiles() (out []string) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasPrefix(to, "anon_inode:") {
			out = append(out, to)
		}
	}
	return out
}

// buildTarget is the path of test/workloads/injected.
func buildTarget() (string, error) {
	if dir := os.Getenv("SYSLATCH_TEST_BIN"); dir != "" {
		return filepath.Join(dir, "injected"), nil
	}
	path := filepath.Join(workDir, "injected")
	out, err := exec.Command("gcc", "-O1", "-static", "-pthread", "-o", path, "../../test/workloads/injected/injected.c").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("gcc: %w\n%s", err, out)
	}
	return path, nil
}

// help is what this test binary does as another process.
func help(job string) {
	word, rest, _ := strings.Cut(job, " ")
	switch word {
	case "apply": // to a process, as whoever this is
		pid, _ := strconv.Atoi(rest)
		// The parent has made a filter of it, which this may not be able to.
		_, err := Filter(context.Background(), Scope{PIDs: []int{pid}}, denyMkdir(), Options{})
		switch {
		case err == nil:
			fmt.Println("ok")
		case errors.Is(err, ErrPermission):
			fmt.Println("permission:", err)
		default:
			fmt.Println("error:", err)
		}
		os.Exit(0)
	case "trace": // a process, until the end of input
		pid, _ := strconv.Atoi(rest)
		err := osthread.Run(func() error {
			if err := seizeCall(pid, 0); err != nil {
				return err
			}
			fmt.Println("ok")
			_, err := io.Copy(io.Discard, os.Stdin)
			return err
		})
		fmt.Println(err)
		os.Exit(0)
	case "go": // a Go program at work
		goTarget()
		os.Exit(0)
	}
	os.Exit(2)
}

// denyMkdir answers EPERM to mkdir and allows the rest, under any ABI.
func denyMkdir() seccomp.Filter {
	return denying(unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM), unix.SYS_MKDIR)
}

func denying(action uint32, calls ...uint32) seccomp.Filter {
	f := seccomp.Filter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}}
	for _, nr := range calls {
		f = append(f,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action})
	}
	return append(f, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("this needs root: another user's processes, cgroups, or filters that are set aside")
	}
}

// needSuspend skips where the kernel doesn't let this process set filters aside.
func needSuspend(t *testing.T) {
	t.Helper()
	needRoot(t)
	if own, err := readStatus(os.Getpid()); err != nil || own.seccomp != 0 {
		t.Skipf("this process has a filter itself (%v), so the kernel doesn't let it set others' aside", err)
	}
}

type target struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	pid    int // of what is injected into
	before status
}

func start(t *testing.T, set func(*exec.Cmd), args ...string) *target {
	t.Helper()
	path, err := injected()
	if err != nil {
		t.Fatal(err)
	}
	return startCommand(t, set, exec.Command(path, args...))
}

func startCommand(t *testing.T, set func(*exec.Cmd), cmd *exec.Cmd) *target {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if set != nil {
		set(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	x := &target{cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		in.Close()
		timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		defer timer.Stop()
		err := cmd.Wait()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() && !t.Failed() {
			t.Errorf("the target was ended by %v", ws.Signal())
		}
	})
	x.pid = x.numbers(t)[0]
	if x.before, err = readStatus(x.pid); err != nil {
		t.Fatal(err)
	}
	return x
}

// numbers reads a line of them.
func (x *target) numbers(t *testing.T) (out []int) {
	t.Helper()
	line, err := x.out.ReadString('\n')
	if err != nil {
		t.Fatalf("target %v: %v (%q)", x.cmd.Args, err, line)
	}
	for _, word := range strings.Fields(line) {
		n, err := strconv.Atoi(word)
		if err != nil {
			t.Fatalf("target %v says %q", x.cmd.Args, line)
		}
		out = append(out, n)
	}
	return out
}

func (x *target) tell(t *testing.T, command string) {
	t.Helper()
	if _, err := io.WriteString(x.in, command+"\n"); err != nil {
		t.Fatal(err)
	}
}

// try has all tasks try mkdir and wants n of them, all answered the same.
func (x *target) try(t *testing.T, n int, want unix.Errno) {
	t.Helper()
	x.tell(t, "try")
	got := x.numbers(t)
	expect := []int{n, 0, 0}
	if want == unix.ENOENT {
		expect = []int{0, n, 0}
	}
	if !slices.Equal(got, expect) {
		t.Errorf("EPERM, ENOENT, other: got %v, want %v", got, expect)
	}
}

// eventually waits for what no event tells.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	pause := time.Millisecond
	for begun := time.Now(); !is(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Since(begun) > patience {
			t.Fatalf("not in %v: %s", patience, what)
		}
		<-time.After(pause)
	}
}

// blocksIn waits until a task waits in a call.
func blocksIn(t *testing.T, tid int, call int) {
	t.Helper()
	eventually(t, fmt.Sprintf("task %d in call %d", tid, call), func() bool {
		text, err := readProc(strconv.Itoa(tid), "syscall")
		st, serr := readStat(tid)
		return err == nil && serr == nil && strings.HasPrefix(text, fmt.Sprint(call)+" ") && st.state != 'R'
	})
}

func context60(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func apply(t *testing.T, s Scope, f seccomp.Filter, o Options) *Report {
	t.Helper()
	o.Timeout = patience
	r, err := Filter(context60(t), s, f, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Processes {
		untouched(t, p.PID)
	}
	return r
}

// untouched wants no tracer and no foreign signal mask left.
func untouched(t *testing.T, pid int) {
	t.Helper()
	tids, err := threadsOf(pid)
	if err != nil {
		return // ended
	}
	for _, tid := range tids {
		if s, err := readStatus(tid); err == nil && s.tracer != 0 {
			t.Errorf("task %d is traced by %d", tid, s.tracer)
		}
		// A libc blocks all signals while it makes a thread.
		eventually(t, "signals let through", func() bool {
			text, err := readProc(strconv.Itoa(tid), "status")
			return err != nil || !strings.Contains(text, "SigBlk:\tfffffffffffbfeff")
		})
	}
}

func hasOneMore(t *testing.T, before status, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		tids, err := threadsOf(pid)
		if err != nil && !errors.Is(err, ErrGone) {
			t.Error(err)
		}
		for _, tid := range tids {
			s, err := readStatus(tid)
			if err != nil || s.dead() {
				continue
			}
			if s.seccomp != 2 || s.filters != before.filters+1 {
				t.Errorf("task %d: mode %d with %d filters, want 2 with %d", tid, s.seccomp, s.filters, before.filters+1)
			}
		}
	}
}

func TestThreads(t *testing.T) {
	for _, n := range []int{0, 1, 100} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			x := start(t, nil, "threads", strconv.Itoa(n))
			x.try(t, n+1, unix.ENOENT)
			r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
			if len(r.Processes) != 1 || r.Processes[0].PID != x.pid || r.Processes[0].Threads != n+1 || r.Processes[0].Command != "injected" {
				t.Errorf("report %+v", r)
			}
			hasOneMore(t, x.before, x.pid)
			x.try(t, n+1, unix.EPERM)
			x.try(t, n+1, unix.EPERM)
			if root := os.Getuid() == 0; r.Processes[0].SetNoNewPrivs == root {
				t.Errorf("no_new_privs was set: %v, as root: %v", !root, root)
			}
			if maps, err := readProc(strconv.Itoa(x.pid), "maps"); err != nil || strings.Count(maps, "\n") > 4*n+40 {
				t.Errorf("memory is left behind, %v:\n%s", err, maps)
			}
		})
	}
}

func TestTree(t *testing.T) {
	x := start(t, nil, "tree", "2", "3")
	r := apply(t, Scope{PIDs: []int{x.pid}, Tree: true}, denyMkdir(), Options{})
	if len(r.Processes) != 13 {
		t.Errorf("%d processes, want 13: %+v", len(r.Processes), r)
	}
	for _, p := range r.Processes {
		hasOneMore(t, x.before, p.PID)
	}
	x.try(t, 13, unix.EPERM)
}

// Without Tree it is one process.
func TestOnlyTheProcess(t *testing.T) {
	x := start(t, nil, "tree", "1", "3")
	apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	x.tell(t, "try")
	if got := x.numbers(t); !slices.Equal(got, []int{1, 3, 0}) {
		t.Errorf("EPERM, ENOENT, other: got %v, want 1 3 0", got)
	}
}

// What a task was blocked in goes on afterwards as if nothing had been.
func TestBlockedCallsGoOn(t *testing.T) {
	for _, tc := range []struct {
		kind       string
		call       int
		want       int
		least, top int // of the milliseconds, where there is a timeout
	}{
		{"read", unix.SYS_READ, 1, 0, 0},
		{"futex", unix.SYS_FUTEX, 0, 0, 0},
		{"poll", unix.SYS_POLL, 1, 0, 0},
		{"poll-timeout", unix.SYS_POLL, 0, 1500, 2900},
		{"nanosleep", unix.SYS_NANOSLEEP, 0, 1500, 2900},
		{"accept", unix.SYS_ACCEPT, 0, 0, 0},
		{"epoll_wait", unix.SYS_EPOLL_WAIT, 1, 0, 0},
		{"wait4", unix.SYS_WAIT4, 7, 0, 0},
		{"sigtimedwait", unix.SYS_RT_SIGTIMEDWAIT, int(unix.SIGUSR1), 0, 0},
		{"ppoll", unix.SYS_PPOLL, 1, 0, 0},
		{"select", unix.SYS_SELECT, 1, 0, 0},
		{"semop", unix.SYS_SEMOP, 0, 0, 0},
	} {
		t.Run(tc.kind, func(t *testing.T) {
			t.Parallel()
			x := start(t, nil, "block", tc.kind)
			// Where libc's name is another number's, that one.
			call := tc.call
			if tc.kind == "select" {
				call = unix.SYS_PSELECT6
			}
			if tc.kind == "semop" {
				call = unix.SYS_SEMTIMEDOP
			}
			eventually(t, "in "+tc.kind, func() bool {
				text, err := readProc(strconv.Itoa(x.pid), "syscall")
				return err == nil && (strings.HasPrefix(text, fmt.Sprint(call)+" ") || strings.HasPrefix(text, fmt.Sprint(tc.call)+" "))
			})
			apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
			hasOneMore(t, x.before, x.pid)
			// A wait for what has happened before the call is made again is another's: futex
			// says EAGAIN.
			eventually(t, "blocked again", func() bool {
				text, err := readProc(strconv.Itoa(x.pid), "syscall")
				return err == nil && !strings.HasPrefix(text, "running")
			})
			x.tell(t, "go")
			got := x.numbers(t)
			if got[0] != tc.want || got[1] != 0 {
				t.Errorf("%s returned %d with errno %d (%v), want %d", tc.kind, got[0], got[1], unix.Errno(got[1]), tc.want)
			}
			if got[2] < tc.least || tc.top > 0 && got[2] > tc.top && !slowMachine() {
				t.Errorf("%s took %d ms, want %d to %d", tc.kind, got[2], tc.least, tc.top)
			}
			if unix.Errno(got[3]) != unix.EPERM {
				t.Errorf("then mkdir: %v, want EPERM", unix.Errno(got[3]))
			}
			if status := x.numbers(t)[0]; status != 0 {
				t.Errorf("the child ended with status %#x", status)
			}
		})
	}
}

// slowMachine says that times tell nothing: an emulated one.
func slowMachine() bool {
	data, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && strings.Contains(string(data), "QEMU")
}

func TestStoppedStaysStopped(t *testing.T) {
	x := start(t, nil, "stopped")
	stopped := func() bool { st, err := readStat(x.pid); return err == nil && st.state == 'T' }
	eventually(t, "stopped", stopped)
	apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	eventually(t, "stopped again", stopped)
	tids, err := threadsOf(x.pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		eventually(t, "thread stopped again", func() bool { st, err := readStat(tid); return err == nil && st.state == 'T' })
	}
	hasOneMore(t, x.before, x.pid)
	if err := unix.Kill(x.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	x.numbers(t) // its pid again, from commands
	x.try(t, 4, unix.EPERM)
}

func TestLeaderHasEnded(t *testing.T) {
	x := start(t, nil, "leaderless")
	eventually(t, "leader dead", func() bool { st, err := readStat(x.pid); return err == nil && st.dead() })
	apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	x.try(t, 4, unix.EPERM)
	if Able() != nil {
		return // filters can't be read
	}
	if r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Force: true}); !r.Processes[0].Present {
		t.Errorf("again: %+v, want that all that live have it", r.Processes[0])
	}
}

// A parent in vfork can't be stopped until its child executes something.
func TestVforkParent(t *testing.T) {
	x := start(t, nil, "vfork")
	eventually(t, "in vfork", func() bool {
		st, err := readStat(x.pid)
		text, serr := readProc(strconv.Itoa(x.pid), "task", strconv.Itoa(x.pid), "children")
		return err == nil && serr == nil && st.state == 'D' && text != ""
	})
	child, err := strconv.Atoi(strings.TrimSpace(must(readProc(strconv.Itoa(x.pid), "task", strconv.Itoa(x.pid), "children"))))
	if err != nil {
		t.Fatal(err)
	}
	_, err = Filter(context60(t), Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Timeout: time.Second})
	var stop *StopError
	if !errors.As(err, &stop) || !strings.Contains(err.Error(), "vfork") {
		t.Errorf("got %v, want that it didn't stop, for vfork", err)
	}
	untouched(t, x.pid)
	hasFiltersNow(t, x.before.filters, x.pid, child)
	done := make(chan error, 1)
	go func() {
		_, err := Filter(context60(t), Scope{PIDs: []int{x.pid}, Tree: true}, denyMkdir(), Options{Timeout: patience})
		done <- err
	}()
	// The child is given it first.
	eventually(t, "filter in the child", func() bool { s, err := readStatus(child); return err == nil && s.filters == x.before.filters+1 })
	x.tell(t, "go")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	x.numbers(t)
	hasOneMore(t, x.before, x.pid, child)
	x.try(t, 1, unix.EPERM)
}

func must(s string, err error) string {
	if err != nil {
		panic(err)
	}
	return s
}

func hasFiltersNow(t *testing.T, want int, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if s, err := readStatus(pid); err != nil || s.filters != want {
			t.Errorf("pid %d has %d filters (%v), want %d", pid, s.filters, err, want)
		}
	}
}

// A filter that denies what loads a filter is set aside for the time, be its answer an
// errno or death.
func TestOwnFilter(t *testing.T) {
	needSuspend(t)
	for _, answer := range []string{"errno", "kill"} {
		t.Run(answer, func(t *testing.T) {
			x := start(t, nil, "filtered", answer)
			r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
			if p := r.Processes[0]; p.PerThread || p.FiltersBefore != x.before.filters || p.FiltersAfter != x.before.filters+1 {
				t.Errorf("report %+v, want one more filter", p)
			}
			x.try(t, 1, unix.EPERM)
		})
	}
}

func TestThreadsApart(t *testing.T) {
	x := start(t, nil, "apart")
	r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Force: os.Getuid() != 0})
	if !r.Processes[0].PerThread {
		t.Errorf("report %+v, want each thread by itself", r.Processes[0])
	}
	x.try(t, 4, unix.EPERM)
}

// A thread that has the filter says nothing of one that has as many.
func TestFilterOfOneThread(t *testing.T) {
	needSuspend(t)
	x := start(t, nil, "same")
	x.tell(t, "try")
	if got := x.numbers(t); !slices.Equal(got, []int{1, 1, 0}) {
		t.Fatalf("EPERM, ENOENT, other: got %v, want 1 1 0: the target doesn't make the filter", got)
	}
	r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Force: true})
	if p := r.Processes[0]; p.Present || !p.PerThread || p.FiltersAfter != p.FiltersBefore {
		t.Errorf("report %+v, want that the other thread loaded it", p)
	}
	x.try(t, 2, unix.EPERM)
	if r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Force: true}); !r.Processes[0].Present {
		t.Errorf("again: %+v, want that it is there", r.Processes[0])
	}
}

// Many filters are not read, which takes the kernel long: the filter is loaded.
func TestManyFilters(t *testing.T) {
	needSuspend(t)
	x := start(t, nil, "filters", strconv.Itoa(mostRead), "1")
	for i := range 3 {
		r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Force: true})
		if p := r.Processes[0]; p.Present || p.FiltersAfter != x.before.filters+i+1 {
			t.Errorf("report %+v, want %d filters", p, x.before.filters+i+1)
		}
	}
	x.try(t, 1, unix.EPERM)
}

// A process that has all the filters that the kernel lets it have is named.
func TestNoRoomForFilters(t *testing.T) {
	needRoot(t)
	x, other := start(t, nil, "filters", "7", "4090"), start(t, nil, "threads", "0")
	calls := slices.Repeat([]uint32{unix.SYS_MKDIR}, 2046)
	_, err := Filter(context60(t), Scope{PIDs: []int{x.pid, other.pid}}, denying(unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM), calls...), Options{Partial: true, Force: true})
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d: ", x.pid)) {
		t.Errorf("got %v, want ENOMEM of pid %d", err, x.pid)
	}
	x.try(t, 1, unix.ENOENT)
	other.try(t, 1, unix.EPERM)
}

// What is found is looked at until ctx ends.
func TestContextEndsWhileChecking(t *testing.T) {
	x := start(t, nil, "threads", "0")
	s, err := openScope(Scope{PIDs: []int{x.pid}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	c := newCampaign(s, denyMkdir(), Options{Timeout: patience})
	err = osthread.Run(func() error {
		k := newTracer(c)
		defer k.release()
		if err := k.gather(context60(t)); err != nil {
			return err
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		return k.check(ended)
	})
	c.letGo()
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "0 of 1 processes") {
		t.Errorf("got %v, want that it was ended", err)
	}
	untouched(t, x.pid)
	x.try(t, 1, unix.ENOENT)
}

// threadWith gives a thread that isn't the main one.
func threadWith(t *testing.T, pid int, is func(status) bool) int {
	t.Helper()
	tids, err := threadsOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		if s, err := readStatus(tid); tid != pid && err == nil && is(s) {
			return tid
		}
	}
	t.Fatalf("no such thread of %d", pid)
	return 0
}

// A thread that another traces isn't stopped. Where it has filters of its own no other can
// load one for it, and it is named.
func TestThreadTracedByAnother(t *testing.T) {
	needSuspend(t)
	x := start(t, nil, "apart")
	apart := threadWith(t, x.pid, func(s status) bool { return s.filters > x.before.filters })
	got, tracer, in := asHelper(t, fmt.Sprint("trace ", apart), nil)
	if got != "ok" {
		t.Fatal(got)
	}
	for range 2 {
		_, err := Filter(context60(t), Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Partial: true, Force: true})
		var traced *TracedError
		if !errors.As(err, &traced) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d: thread %d: is being traced", x.pid, apart)) {
			t.Errorf("got %v, want that thread %d of %d is traced", err, apart, x.pid)
		}
		// The others have it, once.
		x.tell(t, "try")
		if got := x.numbers(t); !slices.Equal(got, []int{3, 1, 0}) {
			t.Errorf("EPERM, ENOENT, other: got %v, want 3 1 0", got)
		}
		hasFiltersNow(t, x.before.filters+1, x.pid)
	}
	in.Close()
	if err := tracer.Wait(); err != nil {
		t.Error(err)
	}
	apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Partial: true, Force: true})
	x.try(t, 4, unix.EPERM)
	hasFiltersNow(t, x.before.filters+1, x.pid)
}

// Where it has the filters that the others have, one of these loads it for it. What it
// forked until then, and gave a filter that is another, is no heir.
func TestThreadTracedByAnotherForks(t *testing.T) {
	needSuspend(t)
	x := start(t, nil, "heir")
	got, tracer, in := asHelper(t, fmt.Sprint("trace ", threadWith(t, x.pid, func(status) bool { return true })), nil)
	if got != "ok" {
		t.Fatal(got)
	}
	s, err := openScope(Scope{PIDs: []int{x.pid}, Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	c := newCampaign(s, denyMkdir(), Options{Timeout: patience, Partial: true, Force: true})
	c.written = func(int, uint64) {
		c.written = nil
		x.tell(t, "fork")
		x.numbers(t)
	}
	r, err := c.run(context60(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Processes) != 2 || r.Processes[0].PID != x.pid {
		t.Errorf("report %+v, want both", r)
	}
	x.try(t, 2, unix.EPERM)
	hasFiltersNow(t, x.before.filters+1, x.pid)
	in.Close()
	if err := tracer.Wait(); err != nil {
		t.Error(err)
	}
}

func asNobody(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

func TestUnprivilegedTarget(t *testing.T) {
	needRoot(t)
	for name, args := range map[string][]string{"without": {"threads", "2"}, "with": {"-n", "threads", "2"}} {
		t.Run(name+" no_new_privs", func(t *testing.T) {
			x := start(t, asNobody, args...)
			r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
			if got := r.Processes[0].SetNoNewPrivs; got != (name == "without") {
				t.Errorf("no_new_privs was set: %v", got)
			}
			if s, err := readStatus(x.pid); err != nil || !s.noNewPrivs {
				t.Errorf("no_new_privs: %v, %v", s.noNewPrivs, err)
			}
			x.try(t, 3, unix.EPERM)
		})
	}
}

// asHelper runs this binary as a helper and gives what it prints first.
func asHelper(t *testing.T, job string, set func(*exec.Cmd)) (string, *exec.Cmd, io.Closer) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+job)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if set != nil {
		set(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // also of one that was waited for
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("helper %s: %v (%q)", job, err, line)
	}
	return strings.TrimSpace(line), cmd, in
}

func TestUnprivilegedTracer(t *testing.T) {
	needRoot(t)
	t.Run("own process", func(t *testing.T) {
		x := start(t, asNobody, "threads", "2")
		got, _, _ := asHelper(t, fmt.Sprint("apply ", x.pid), asNobody)
		if yama, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil && strings.TrimSpace(string(yama)) != "0" {
			if !strings.HasPrefix(got, "permission: ") || !strings.Contains(got, "yama") {
				t.Errorf("got %q, want what yama says", got)
			}
			return
		}
		if got != "ok" {
			t.Errorf("got %q", got)
		}
		x.try(t, 3, unix.EPERM)
	})
	t.Run("root's process", func(t *testing.T) {
		x := start(t, nil, "threads", "2")
		got, _, _ := asHelper(t, fmt.Sprint("apply ", x.pid), asNobody)
		if !strings.HasPrefix(got, "permission: ") || !strings.Contains(got, "as root") {
			t.Errorf("got %q, want that it may not", got)
		}
		x.try(t, 3, unix.ENOENT)
	})
	t.Run("a filter that can't be set aside", func(t *testing.T) {
		if _, err := os.Stat("/proc/sys/kernel/yama/ptrace_scope"); err == nil {
			t.Skip("yama lets no user trace what isn't its child")
		}
		x := start(t, asNobody, "filtered", "kill")
		got, _, _ := asHelper(t, fmt.Sprint("apply ", x.pid), asNobody)
		if !strings.Contains(got, "refused") || !strings.Contains(got, "may kill it") {
			t.Errorf("got %q, want a refusal", got)
		}
	})
}

func TestTracedByAnother(t *testing.T) {
	x := start(t, nil, "threads", "0")
	got, tracer, in := asHelper(t, fmt.Sprint("trace ", x.pid), nil)
	if got != "ok" {
		t.Fatal(got)
	}
	_, err := Filter(context60(t), Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	var traced *TracedError
	if !errors.As(err, &traced) {
		t.Fatalf("got %v, want that it is traced", err)
	}
	if st, err := readStatus(traced.Tracer); err != nil || st.tgid != tracer.Process.Pid {
		t.Errorf("tracer %d, want a thread of %d", traced.Tracer, tracer.Process.Pid)
	}
	in.Close()
	if err := tracer.Wait(); err != nil {
		t.Error(err)
	}
	apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	x.try(t, 1, unix.EPERM)
}

func TestErrors(t *testing.T) {
	ended := exec.Command("/bin/true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		scope Scope
		want  error
	}{
		"nothing":       {Scope{}, nil},
		"ended":         {Scope{PIDs: []int{ended.Process.Pid}}, ErrGone},
		"self":          {Scope{PIDs: []int{os.Getpid()}}, ErrSelf},
		"kernel thread": {Scope{PIDs: []int{2}}, ErrKernelThread},
		"no cgroup":     {Scope{Cgroup: "/nothing/here"}, os.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := readStat(2); name == "kernel thread" && (err != nil || s.command != "kthreadd") {
				t.Skip("pid 2 is no kernel thread: this is another pid namespace")
			}
			r, err := Filter(context60(t), tc.scope, denyMkdir(), Options{})
			if err == nil || r != nil || tc.want != nil && !errors.Is(err, tc.want) {
				t.Errorf("got %v, %v; want %v", r, err, tc.want)
			}
		})
	}
	if _, err := Filter(context60(t), Scope{PIDs: []int{1}}, nil, Options{}); err == nil {
		t.Error("an empty filter was taken")
	}
}

// With Partial one that can't be reached doesn't keep the others from it, and is named.
func TestPartial(t *testing.T) {
	needRoot(t)
	g := newGroup(t)
	x, other := start(t, into(t, g), "threads", "1"), start(t, into(t, g), "threads", "0")
	got, tracer, in := asHelper(t, fmt.Sprint("trace ", other.pid), nil)
	if got != "ok" {
		t.Fatal(got)
	}
	_, err := Filter(context60(t), Scope{Cgroup: g.Path()}, denyMkdir(), Options{})
	var traced *TracedError
	var incomplete *IncompleteError
	if !errors.As(err, &traced) || errors.As(err, &incomplete) {
		t.Errorf("all or none: %v", err)
	}
	hasFiltersNow(t, x.before.filters, x.pid, other.pid)
	r, err := Filter(context60(t), Scope{Cgroup: g.Path()}, denyMkdir(), Options{Partial: true})
	if !errors.As(err, &traced) || !errors.As(err, &incomplete) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d: is being traced", other.pid)) {
		t.Errorf("got %v, want that it is incomplete for pid %d", err, other.pid)
	}
	if len(r.Processes) != 1 || r.Processes[0].PID != x.pid {
		t.Errorf("report %+v", r)
	}
	hasOneMore(t, x.before, x.pid)
	hasFiltersNow(t, other.before.filters, other.pid)
	in.Close()
	if err := tracer.Wait(); err != nil {
		t.Error(err)
	}
	r, err = Filter(context60(t), Scope{Cgroup: g.Path()}, denyMkdir(), Options{Partial: true, Force: true})
	if err != nil || len(r.Processes) != 2 {
		t.Errorf("again: %+v, %v", r, err)
	}
	for _, x := range []*target{x, other} {
		hasOneMore(t, x.before, x.pid)
		untouched(t, x.pid)
	}
}

// Who isn't stopped may write to the memory that the filter is loaded from.
func TestFilterChangedMeanwhile(t *testing.T) {
	needRoot(t)
	if err := Able(); err != nil {
		t.Fatal(err) // root without a filter can
	}
	for _, threads := range []string{"0", "2"} {
		x := start(t, nil, "threads", threads)
		s, err := openScope(Scope{PIDs: []int{x.pid}})
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		c := newCampaign(s, denyMkdir(), Options{Timeout: patience})
		c.written = func(_ int, at uint64) {
			allow := program(seccomp.AllowAllFilter(), at)
			local := []unix.Iovec{{Base: &allow[0], Len: uint64(len(allow))}}
			if _, err := unix.ProcessVMWritev(x.pid, local, []unix.RemoteIovec{{Base: uintptr(at), Len: len(allow)}}, 0); err != nil {
				t.Error(err)
			}
		}
		err = osthread.Run(func() error { return newTracer(c).run(context60(t)) })
		c.letGo()
		if !errors.Is(err, errChanged) || !c.loaded || len(c.covered) != 0 {
			t.Errorf("%s threads: %v, loaded %v, covered %v", threads, err, c.loaded, c.covered)
		}
		untouched(t, x.pid)
	}
}

func TestSelfInTree(t *testing.T) {
	// Of the helper's tree this is a part: of ours, the helper is.
	_, err := Filter(context60(t), Scope{PIDs: []int{os.Getppid()}, Tree: true}, denyMkdir(), Options{DryRun: true})
	if !errors.Is(err, ErrSelf) {
		t.Errorf("got %v, want ErrSelf", err)
	}
}

func TestZombie(t *testing.T) {
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	eventually(t, "zombie", func() bool { st, err := readStat(cmd.Process.Pid); return err == nil && st.dead() })
	_, err := Filter(context60(t), Scope{PIDs: []int{cmd.Process.Pid}}, denyMkdir(), Options{})
	if !errors.Is(err, ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
}

func TestFrozen(t *testing.T) {
	needRoot(t)
	g := newGroup(t)
	if _, err := Filter(context60(t), Scope{Cgroup: g.Path()}, denyMkdir(), Options{}); !errors.Is(err, ErrNobody) {
		t.Errorf("an empty cgroup: got %v, want ErrNobody", err)
	}
	x := start(t, into(t, g), "threads", "2")
	freeze := func(s string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(g.Path(), "cgroup.freeze"), []byte(s), 0); err != nil {
			t.Fatal(err)
		}
		eventually(t, "frozen "+s, func() bool {
			data, err := os.ReadFile(filepath.Join(g.Path(), "cgroup.events"))
			return err == nil && strings.Contains(string(data), "frozen "+s)
		})
	}
	freeze("1")
	_, err := Filter(context60(t), Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	if !errors.Is(err, ErrFrozen) {
		t.Errorf("got %v, want ErrFrozen", err)
	}
	freeze("0")
	x.try(t, 3, unix.ENOENT)
	r := apply(t, Scope{Cgroup: g.Path()}, denyMkdir(), Options{})
	if len(r.Processes) != 1 {
		t.Errorf("%+v", r)
	}
	x.try(t, 3, unix.EPERM)
}

func newGroup(t *testing.T) *cgroup.Group {
	t.Helper()
	g, err := cgroup.New("inject-test")
	if err != nil {
		t.Fatal(err)
	}
	cleanGroup(t, g)
	return g
}

func cleanGroup(t *testing.T, g *cgroup.Group) {
	t.Helper()
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(g.Path(), "cgroup.freeze"), []byte("0"), 0)
		if err := g.Kill(); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := errors.Join(g.Wait(ctx), g.Remove()); err != nil {
			t.Error(err)
		}
	})
}

func into(t *testing.T, g *cgroup.Group) func(*exec.Cmd) {
	dir, err := g.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
}

// limited is a cgroup that n processes can be in, and what starts one there.
func limited(t *testing.T, n int) (*cgroup.Group, []string) {
	t.Helper()
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	g, err := cgroup.NewIn(h.Unified, "inject-test")
	if err != nil {
		t.Fatal(err)
	}
	cleanGroup(t, g)
	dir, procs := g.Path(), []string{g.Path()}
	if own, err := h.Dir(os.Getpid(), "pids"); err == nil {
		dir = filepath.Join(own, g.Name())
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := errors.Join(g.Kill(), g.Wait(ctx), os.Remove(dir)); err != nil {
				t.Error(err)
			}
		})
		procs = append(procs, dir)
	}
	if err := os.WriteFile(filepath.Join(dir, "pids.max"), []byte(strconv.Itoa(n)), 0); err != nil {
		t.Fatal(err)
	}
	argv := []string{"sh", "-ec", `while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"`, "sh"}
	return g, append(append(argv, procs...), "--")
}

// A storm is what forks and ends all the time. A bomb is one that has all the processes
// that it may have, and hides from tracers.
func TestStorm(t *testing.T) {
	needRoot(t)
	const most = 100
	for _, tc := range []struct {
		name  string
		start func(*testing.T) (*target, *cgroup.Group)
		scope func(*target, *cgroup.Group) Scope
	}{
		{"tree", func(t *testing.T) (*target, *cgroup.Group) {
			if slowMachine() {
				// Emulated processors take turns, and a process that forks and ends within
				// one turn is not caught: Filter gives up, with nothing loaded.
				t.Skip("emulated processors: processes live for less than a turn")
			}
			g := newGroup(t)
			return start(t, into(t, g), "storm"), g
		}, func(x *target, _ *cgroup.Group) Scope { return Scope{PIDs: []int{x.pid}, Tree: true} }},
		{"cgroup", func(t *testing.T) (*target, *cgroup.Group) {
			g := newGroup(t)
			return start(t, into(t, g), "storm"), g
		}, func(_ *target, g *cgroup.Group) Scope { return Scope{Cgroup: g.Path()} }},
		{"bomb", func(t *testing.T) (*target, *cgroup.Group) {
			g, into := limited(t, most)
			argv := append(into, must(injected()), "bomb")
			x := startCommand(t, nil, exec.Command(argv[0], argv[1:]...))
			eventually(t, "many processes", func() bool {
				pids, err := processesIn(g.Path())
				return err == nil && len(pids) > most/2
			})
			return x, g
		}, func(_ *target, g *cgroup.Group) Scope { return Scope{Cgroup: g.Path()} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const storm = 200
			x, g := tc.start(t)
			stats := func() (forks, eperm, other int) {
				t.Helper()
				x.tell(t, "stats")
				n := x.numbers(t)
				return n[0], n[1], n[2]
			}
			eventually(t, "a storm", func() bool { forks, _, _ := stats(); return forks >= storm })
			before, _, _ := stats()
			begun := time.Now()
			r, err := Filter(context60(t), tc.scope(x, g), denyMkdir(), Options{Timeout: patience})
			// A tree may outrun the list of its processes. That is told, with nothing loaded.
			for tries := 1; tries < 20 && tc.name == "tree" && errors.Is(err, errComeOn); tries++ {
				r, err = Filter(context60(t), tc.scope(x, g), denyMkdir(), Options{Timeout: patience})
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range r.Processes {
				untouched(t, p.PID)
			}
			took := time.Since(begun)
			pids, err := processesIn(g.Path())
			if err != nil || len(pids) == 0 {
				t.Fatalf("processes: %v, %v", pids, err)
			}
			for _, pid := range pids {
				hasOneMore(t, x.before, pid)
			}
			x.tell(t, "mark")
			during := x.numbers(t)[0] - before
			eventually(t, "a storm with the filter", func() bool {
				forks, eperm, other := stats()
				return eperm >= storm && forks-before >= storm/2 || other > 0
			})
			_, eperm, other := stats()
			if other > 0 {
				t.Errorf("%d tries were denied and %d not", eperm, other)
			}
			t.Logf("%d processes were injected into, in %d scans and %v, %v of which they stood; %d forks before, %d during, %d tries denied", len(r.Processes), r.Scans, took, r.Stopped, before, during, eperm)
		})
	}
}

// A process may execute another program at any moment, and be a thread that takes the
// main one's id with it.
func TestExecMeanwhile(t *testing.T) {
	for range 5 {
		x := startCommand(t, func(cmd *exec.Cmd) { cmd.Env = append(os.Environ(), "EXECS=0") }, exec.Command(must(injected()), "exec"))
		_ = x
	}
	path := must(injected())
	for i := range 8 {
		cmd := exec.Command(path, "exec")
		cmd.Env = append(os.Environ(), fmt.Sprint("EXECS=", 20+i))
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		before, err := readStatus(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "executed", func() bool {
			st, err := readStat(cmd.Process.Pid)
			return err == nil && (st.command == "injected" || st.command == "exe")
		})
		apply(t, Scope{PIDs: []int{cmd.Process.Pid}}, denyMkdir(), Options{})
		x := &target{cmd: cmd, in: in, out: bufio.NewReader(out), pid: cmd.Process.Pid}
		x.numbers(t)
		hasOneMore(t, before, x.pid)
		x.try(t, 1, unix.EPERM)
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

func TestRefusals(t *testing.T) {
	const (
		eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		kill  = unix.SECCOMP_RET_KILL_PROCESS
	)
	for name, tc := range map[string]struct {
		kind   string
		call   int
		filter seccomp.Filter
		want   string
	}{
		"blocked, errno":       {"accept", unix.SYS_ACCEPT, denying(eperm, unix.SYS_ACCEPT), "it is in accept, which the filter denies (EPERM)"},
		"blocked, kill":        {"epoll_wait", unix.SYS_EPOLL_WAIT, denying(kill, unix.SYS_EPOLL_WAIT), "it is in epoll_wait, which the filter denies (the process is killed)"},
		"restart":              {"poll-timeout", unix.SYS_POLL, denying(eperm, unix.SYS_RESTART_SYSCALL), "restart_syscall"},
		"essential":            {"read", unix.SYS_READ, denying(eperm, unix.SYS_EXIT_GROUP), "the filter denies exit_group"},
		"essential, signals":   {"read", unix.SYS_READ, denying(eperm, unix.SYS_RT_SIGRETURN), "the filter denies rt_sigreturn"},
		"nothing to deny":      {"read", unix.SYS_READ, seccomp.AllowAllFilter(), "already deny all"},
		"other calls are well": {"read", unix.SYS_READ, denying(kill, unix.SYS_ACCEPT, unix.SYS_MKDIR), ""},
	} {
		t.Run(name, func(t *testing.T) {
			x := start(t, nil, "block", tc.kind)
			blocksIn(t, x.pid, tc.call)
			r, err := Filter(context60(t), Scope{PIDs: []int{x.pid}}, tc.filter, Options{DryRun: true})
			if err != nil {
				t.Fatal(err)
			}
			if tc.want == "" {
				if len(r.Refusals) > 0 || len(r.Processes) != 1 {
					t.Errorf("dry run: %+v", r)
				}
			} else {
				if len(r.Refusals) == 0 || !strings.Contains(r.Refusals[0].Why, tc.want) {
					t.Errorf("dry run: %+v, want %q", r, tc.want)
				}
				_, err := Filter(context60(t), Scope{PIDs: []int{x.pid}}, tc.filter, Options{})
				var refused *RefusedError
				if !errors.As(err, &refused) || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got %v, want %q", err, tc.want)
				}
			}
			hasFiltersNow(t, x.before.filters, x.pid)
			untouched(t, x.pid)
			x.tell(t, "go")
			if got := x.numbers(t); got[1] != 0 {
				t.Errorf("%s: %v", tc.kind, unix.Errno(got[1]))
			}
			x.numbers(t)
		})
	}
}

// Force does it, and the call is judged anew.
func TestForce(t *testing.T) {
	x := start(t, nil, "block", "accept")
	blocksIn(t, x.pid, unix.SYS_ACCEPT)
	f := denying(unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM), unix.SYS_ACCEPT, unix.SYS_MKDIR)
	r := apply(t, Scope{PIDs: []int{x.pid}}, f, Options{Force: true})
	if len(r.Refusals) != 1 {
		t.Errorf("report %+v", r)
	}
	if got := x.numbers(t); unix.Errno(got[1]) != unix.EPERM || unix.Errno(got[3]) != unix.EPERM {
		t.Errorf("accept: %v, mkdir: %v, want EPERM of both", unix.Errno(got[1]), unix.Errno(got[3]))
	}
	x.tell(t, "go")
}

func TestAgain(t *testing.T) {
	needSuspend(t)
	x := start(t, nil, "threads", "3")
	apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	_, err := Filter(context60(t), Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{})
	if err == nil || !strings.Contains(err.Error(), "it has this filter already") {
		t.Errorf("the same: got %v", err)
	}
	wider := denying(unix.SECCOMP_RET_ERRNO|uint32(unix.EACCES), unix.SYS_MKDIR)
	_, err = Filter(context60(t), Scope{PIDs: []int{x.pid}}, wider, Options{})
	if err == nil || !strings.Contains(err.Error(), "already deny all that this one does") {
		t.Errorf("no tighter: got %v", err)
	}
	hasOneMore(t, x.before, x.pid)
	if r := apply(t, Scope{PIDs: []int{x.pid}}, denyMkdir(), Options{Force: true}); !r.Processes[0].Present {
		t.Errorf("forced, the same: %+v", r)
	}
	hasOneMore(t, x.before, x.pid)
	apply(t, Scope{PIDs: []int{x.pid}}, wider, Options{Force: true})
	if s, err := readStatus(x.pid); err != nil || s.filters != x.before.filters+2 {
		t.Errorf("forced: %d filters, %v", s.filters, err)
	}
	// Of filters that deny alike the last one's errno counts.
	x.tell(t, "try")
	if got := x.numbers(t); !slices.Equal(got, []int{0, 0, 4}) {
		t.Errorf("EPERM, ENOENT, other: got %v, want four times EACCES", got)
	}
}

func TestI386(t *testing.T) {
	if os.Getenv("SYSLATCH_TEST_BIN") != "" {
		t.Skip("the guest has no compiler")
	}
	path, source := filepath.Join(workDir, "i386"), filepath.Join(workDir, "i386.c")
	code := `void _start(void) { for (;;) { int r; char c; __asm__ volatile("int $0x80" : "=a"(r) : "0"(3), "b"(0), "c"(&c), "d"(1) : "memory");
		if (r <= 0) __asm__ volatile("int $0x80" :: "a"(1), "b"(0)); } }`
	if err := os.WriteFile(source, []byte(code), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-m32", "-O1", "-ffreestanding", "-fno-pic", "-no-pie", "-nostdlib", "-static", "-o", path, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc -m32: %v\n%s", err, out)
	}
	cmd := exec.Command(path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "executed", func() bool {
		st, err := readStat(cmd.Process.Pid)
		return err == nil && st.command == "i386" && st.state == 'S'
	})
	_, err = Filter(context60(t), Scope{PIDs: []int{cmd.Process.Pid}}, denyMkdir(), Options{})
	if !errors.Is(err, ErrABI) {
		t.Errorf("got %v, want ErrABI", err)
	}
	untouched(t, cmd.Process.Pid)
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("it didn't survive that: %v", err)
	}
}

// A Go program has stacks of a few kilobytes, and computes all the time.
func TestGoProgram(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"=go")
	x := startCommand(t, nil, cmd)
	for i := range 5 {
		f := denyMkdir()
		f = append(seccomp.Filter{{Code: unix.BPF_LD | unix.BPF_IMM, K: uint32(i)}}, f...) // each another
		for range 1000 {
			f = append(seccomp.Filter{{Code: unix.BPF_LD | unix.BPF_IMM, K: uint32(i)}}, f...)
		}
		begun := time.Now()
		r := apply(t, Scope{PIDs: []int{x.pid}}, f, Options{Force: true})
		t.Logf("%d threads stood for %v, %v in all", r.Processes[0].Threads, r.Stopped, time.Since(begun))
	}
	x.try(t, 1, unix.EPERM)
}

// goTarget computes sums on growing stacks, and ends where one is wrong.
func goTarget() {
	var sum func(n int, pad [8]int) int
	sum = func(n int, pad [8]int) int {
		if n == 0 {
			return pad[0]
		}
		pad[n%8]++
		return sum(n-1, pad) + 1
	}
	for range 8 {
		go func() {
			for {
				want := 125
				if got := sum(1000, [8]int{}); got != 1000+want {
					fmt.Fprintln(os.Stderr, "wrong sum", got)
					os.Exit(3)
				}
				done := make(chan bool)
				go func() { sum(50, [8]int{}); close(done) }()
				<-done
			}
		}()
	}
	fmt.Println(os.Getpid())
	in := bufio.NewReader(os.Stdin)
	for {
		if _, err := in.ReadString('\n'); err != nil {
			return
		}
		// syscall.Mkdir is mkdirat. The path is no pointer: EFAULT comes after a filter.
		_, _, errno := unix.Syscall(unix.SYS_MKDIR, 0, 0, 0)
		switch errno {
		case unix.EPERM:
			fmt.Println("1 0 0")
		case unix.EFAULT:
			fmt.Println("0 1 0")
		default:
			fmt.Println("0 0 1")
		}
	}
}

// Signals that come while a task is stopped are not lost, and not delivered to foreign
// registers.
func TestSignalsMeanwhile(t *testing.T) {
	x := start(t, nil, "threads", "4")
	stop := make(chan struct{})
	sent := make(chan int, 1)
	go func() {
		n := 0
		// A stop comes before the next instruction, so without a pause it would run none.
		tick := time.NewTicker(500 * time.Microsecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				sent <- n
				return
			case <-tick.C:
				_ = unix.Kill(x.pid, unix.SIGSTOP)
				_ = unix.Kill(x.pid, unix.SIGCONT)
				n++
			}
		}
	}()
	for i := range 20 {
		f := append(seccomp.Filter{{Code: unix.BPF_LD | unix.BPF_IMM, K: uint32(i)}}, denyMkdir()...)
		apply(t, Scope{PIDs: []int{x.pid}}, f, Options{Force: true})
	}
	close(stop)
	if n := <-sent; n == 0 {
		t.Error("no signal was sent")
	}
	if err := unix.Kill(x.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	x.try(t, 5, unix.EPERM)
}

// The floor and a profile are enough for what a shell and a thread do afterwards.
func TestProfileFilter(t *testing.T) {
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{
		Names: []string{"read", "write", "lseek", "futex", "exit", "exit_group", "rt_sigreturn", "restart_syscall", "munmap"}, Action: specs.ActAllow,
	}}}
	f, err := seccomp.Compile(p, seccomp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	x := start(t, nil, "threads", "5")
	apply(t, Scope{PIDs: []int{x.pid}}, f, Options{})
	x.try(t, 6, unix.EPERM)
}

func TestExecutable(t *testing.T) {
	for name, tc := range map[string]struct {
		maps string
		want []region
	}{
		"empty": {"", nil},
		"vdso first": {
			"400000-401000 r--p 0 0:0 1 /bin/x\n401000-402000 r-xp 0 0:0 1 /bin/x y\n7fff000-7fff100 r-xp 0 0:0 0 [vdso]\nffffffffff600000-ffffffffff601000 --xp 0 0:0 0 [vsyscall]\n",
			[]region{{0x7fff000, 0x7fff100}, {0x401000, 0x402000}},
		},
		"odd": {"zzz\n1-2\n5-4 r-xp 0 0:0 0\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := executable(tc.maps); !slices.Equal(got, tc.want) {
				t.Errorf("got %x, want %x", got, tc.want)
			}
		})
	}
}

func TestParseStat(t *testing.T) {
	const rest = " S 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1"
	st, err := parseStat("12 (a) b\n(c)" + rest)
	if err != nil || st.pid != 12 || st.parent != 7 || st.start != 4242 || st.state != 'S' || st.command != "a) b\n(c" {
		t.Errorf("got %+v, %v", st, err)
	}
	for _, bad := range []string{"", "1", "1 (x", "1 (x) S", "x (x)" + rest, ") ("} {
		if _, err := parseStat(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
