// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
)

// What a call that blocks is after a barrier.
const (
	sameCall    = "the same call again"
	restartCall = "restart_syscall"
	interrupted = "EINTR"
)

// blocking are calls that block, with what becomes of them. fds are a pipe that
// stays empty, a socket that nobody connects or writes to, and an epoll.
var blocking = map[string]struct {
	nr   uintptr
	args func(b *blockers) [6]uintptr
	want string
}{
	"read":            {unix.SYS_READ, func(b *blockers) [6]uintptr { return [6]uintptr{b.pipe, b.mem, 1} }, sameCall},
	"accept":          {unix.SYS_ACCEPT, func(b *blockers) [6]uintptr { return [6]uintptr{b.listening} }, sameCall},
	"recvfrom":        {unix.SYS_RECVFROM, func(b *blockers) [6]uintptr { return [6]uintptr{b.connected, b.mem, 1} }, sameCall},
	"futex":           {unix.SYS_FUTEX, func(b *blockers) [6]uintptr { return [6]uintptr{b.mem, 0, 0, 0, 0, mark} }, sameCall},
	"futex, timeout":  {unix.SYS_FUTEX, func(b *blockers) [6]uintptr { return [6]uintptr{b.mem, 0, 0, b.hour, 0, mark} }, restartCall},
	"poll":            {unix.SYS_POLL, func(b *blockers) [6]uintptr { return [6]uintptr{0, 0, ^uintptr(0)} }, restartCall},
	"select":          {unix.SYS_SELECT, func(*blockers) [6]uintptr { return [6]uintptr{} }, sameCall},
	"epoll_wait":      {unix.SYS_EPOLL_WAIT, func(b *blockers) [6]uintptr { return [6]uintptr{b.epoll, b.mem, 1, ^uintptr(0)} }, interrupted},
	"clock_nanosleep": {unix.SYS_CLOCK_NANOSLEEP, func(b *blockers) [6]uintptr { return [6]uintptr{unix.CLOCK_MONOTONIC, 0, b.hour} }, restartCall},
	"pause":           {unix.SYS_PAUSE, func(*blockers) [6]uintptr { return [6]uintptr{} }, sameCall},
	"wait4":           {unix.SYS_WAIT4, func(b *blockers) [6]uintptr { return [6]uintptr{b.child, 0, unix.WUNTRACED} }, sameCall},
	"flock":           {unix.SYS_FLOCK, func(b *blockers) [6]uintptr { return [6]uintptr{b.file, unix.LOCK_EX} }, sameCall},
}

// mark tells our futex from those of Go's runtime.
const mark = 0x5951

type blockers struct{ pipe, listening, connected, epoll, file, child, mem, hour uintptr }

// block makes one of the calls on a thread with a filter that asks about all of
// them, and exits with the call's errno. Descriptor 3 is where the listener goes.
func block(name string) error {
	var b blockers
	var p [2]int
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err = errors.Join(err, unix.Pipe(p[:])); err != nil {
		return err
	}
	listening, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	epoll, err2 := unix.EpollCreate1(0)
	if err := errors.Join(err2, unix.Bind(listening, &unix.SockaddrUnix{Name: ""}), unix.Listen(listening, 1)); err != nil {
		return err
	}
	b.pipe, b.listening, b.connected, b.epoll = uintptr(p[0]), uintptr(listening), uintptr(pair[0]), uintptr(epoll)
	path := filepath.Join(os.Getenv("DIR"), "lock")
	for _, fd := range []*uintptr{&b.file, new(uintptr)} { // the second locks it
		n, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600)
		if err != nil {
			return err
		}
		*fd = uintptr(n)
		if fd != &b.file {
			if err := unix.Flock(n, unix.LOCK_EX); err != nil {
				return err
			}
		}
	}
	child := exec.Command("/bin/cat") // waits for its input's end
	in, err := child.StdinPipe()
	if err = errors.Join(err, child.Start()); err != nil {
		return err
	}
	defer in.Close()
	b.child = uintptr(child.Process.Pid)
	memory, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	b.mem = uintptr(unsafe.Pointer(&memory[0]))
	hour := (*unix.Timespec)(unsafe.Pointer(&memory[64]))
	hour.Sec = 3600
	b.hour = uintptr(unsafe.Pointer(hour))

	rules := []specs.LinuxSyscall{{Names: []string{"restart_syscall"}, Action: specs.ActNotify}}
	for _, c := range blocking {
		rule := specs.LinuxSyscall{Action: specs.ActNotify}
		n, _ := Name(specs.ArchX86_64, uint32(c.nr))
		rule.Names = []string{n}
		if n == "futex" {
			rule.Args = []specs.LinuxSeccompArg{{Index: 5, Value: mark, Op: specs.OpEqualTo}}
		}
		rules = append(rules, rule)
	}
	f, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64}, Syscalls: rules}, Options{})
	if err != nil {
		return err
	}
	call := blocking[name]
	args := call.args(&b)
	failed := make(chan error)
	go func() {
		runtime.LockOSThread()
		listener, err := LoadListener(f, LoadOptions{NoNewPrivs: true, WaitKillable: os.Getenv("WAIT_KILLABLE") != ""})
		if err == nil {
			err = errors.Join(unix.Sendmsg(3, []byte(`{"fds":["seccompFd"]}`), unix.UnixRights(int(listener.Fd())), nil, 0), listener.Close())
		}
		if err != nil {
			failed <- err
			return
		}
		_, _, errno := unix.Syscall6(call.nr, args[0], args[1], args[2], args[3], args[4], args[5])
		os.Exit(int(errno))
	}()
	return <-failed
}

// startBlocked runs block in a group of its own, and serves it: the numbers of the
// calls that it makes come through the channel.
func startBlocked(t *testing.T, call string, env ...string) (*cgroup.Group, *exec.Cmd, *Listener) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making cgroups needs root")
	}
	g, err := cgroup.New("test")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := g.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	conn, other := pair(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), helperEnv+"=block", "CALL="+call, "DIR="+t.TempDir(), "GORACE=atexit_sleep_ms=0"), env...)
	cmd.Stderr, cmd.ExtraFiles = os.Stderr, []*os.File{other}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(errors.Join(err, g.Remove()))
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		err := g.Kill()
		if cmd.ProcessState == nil {
			_ = cmd.Wait() // killed
		}
		if err := errors.Join(err, g.Wait(ctx), g.Remove()); err != nil {
			t.Error(err)
		}
	})
	other.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	_, file, err := ReceiveListener(conn)
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return g, cmd, l
}

// asks serves a listener and lets all go on.
func asks(ctx context.Context, l *Listener) <-chan uint32 {
	calls := make(chan uint32, 64)
	serve(ctx, l, func(n *Notification) (bool, uint) {
		calls <- n.Number
		return true, 0
	})
	return calls
}

// TestBarrier: after a freeze by cgroup v2 the filter judges calls again that were
// blocked; those that a restart_syscall takes up where they were, too, but by that
// name, and epoll_wait returns to its caller.
func TestBarrier(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(blocking)) {
		t.Run(name, func(t *testing.T) {
			call := blocking[name]
			g, cmd, l := startBlocked(t, name)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			calls := asks(ctx, l)
			if got := within(t, calls, "the call"); got != uint32(call.nr) {
				t.Fatalf("call %d, want %d", got, call.nr)
			}
			f, err := cgroup.NewFreezer(g.Path())
			if err != nil {
				t.Fatal(err)
			}
			const barriers = 3
			for range barriers {
				if err := f.Barrier(ctx); err != nil {
					t.Fatal(err)
				}
				switch call.want {
				case interrupted:
					if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != int(unix.EINTR) {
						t.Errorf("%s: %v, want %v", name, cmd.ProcessState, unix.EINTR)
					}
					return
				case sameCall:
					if got := within(t, calls, "the call again"); got != uint32(call.nr) {
						t.Errorf("call %d, want %d", got, call.nr)
					}
				case restartCall:
					// A freeze between the answer and the wait makes it the same call.
					if got := within(t, calls, "restart_syscall"); got != unix.SYS_RESTART_SYSCALL && got != uint32(call.nr) {
						t.Errorf("call %d, want %d", got, unix.SYS_RESTART_SYSCALL)
					}
				}
			}
		})
	}
}

// TestBarrierWaits: a call that a supervisor has received, under WAIT_KILLABLE_RECV,
// can't be frozen before it is answered. The barrier says who keeps it waiting.
func TestBarrierWaits(t *testing.T) {
	g, cmd, l := startBlocked(t, "pause", "WAIT_KILLABLE=1")
	received, answer := make(chan Notification), make(chan bool)
	done := serve(t.Context(), l, func(n *Notification) (bool, uint) {
		received <- *n
		return <-answer, uint(unix.EACCES)
	})
	n := within(t, received, "the call")
	f, err := cgroup.NewFreezer(g.Path())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var late *cgroup.NotFrozenError
	if err := f.Barrier(ctx); !errors.As(err, &late) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a barrier: %v", err)
	}
	if i := slices.IndexFunc(late.Tasks, func(k cgroup.Task) bool { return k.TID == n.PID }); i < 0 || late.Tasks[i].State != "D" {
		t.Errorf("thread %d is not in %v", n.PID, late)
	}
	t.Log(late)
	if state, err := os.ReadFile(filepath.Join(g.Path(), "cgroup.freeze")); err != nil || strings.TrimSpace(string(state)) != "0" {
		t.Errorf("after the barrier: %q, %v", state, err)
	}
	// With the answer it holds. The task is frozen on its way back.
	barrier := make(chan error)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		barrier <- f.Barrier(ctx)
	}()
	answer <- false
	if err := within(t, barrier, "the barrier"); err != nil {
		t.Error(err)
	}
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != int(unix.EACCES) {
		t.Errorf("%v, want %v", cmd.ProcessState, unix.EACCES)
	}
	if err := within(t, done, "the end of Serve"); err != nil {
		t.Error(err)
	}
}

// TestBarrierFrees: without WAIT_KILLABLE_RECV a barrier has the calls made again
// that a supervisor received and died with.
func TestBarrierFrees(t *testing.T) {
	g, _, l := startBlocked(t, "pause")
	file, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	receiveAndDie(t, file)
	file.Close()
	calls := asks(t.Context(), l)
	f, err := cgroup.NewFreezer(g.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Barrier(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := within(t, calls, "the call"); got != unix.SYS_PAUSE {
		t.Errorf("call %d", got)
	}
}

// TestBarrierV1: the freezer of v1 leaves some calls where they are.
func TestBarrierV1(t *testing.T) {
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(h.V1Controllers(), "freezer") {
		t.Skip("no v1 freezer here")
	}
	for _, name := range []string{"read", "pause", "poll", "futex"} {
		t.Run(name, func(t *testing.T) {
			_, cmd, l := startBlocked(t, name)
			calls := asks(t.Context(), l)
			within(t, calls, "the call")
			own, err := h.Dir(os.Getpid(), "freezer")
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(own, fmt.Sprintf("syslatch-test-%d", os.Getpid()))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			move := func(dir string) {
				if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
					t.Error(err)
				}
			}
			defer func() {
				move(own)
				if err := os.Remove(dir); err != nil {
					t.Error(err)
				}
			}()
			move(dir)
			f, err := cgroup.NewFreezer(dir)
			if err != nil {
				t.Fatal(err)
			}
			if f.Rejudges() {
				t.Error("Rejudges")
			}
			if err := f.Barrier(t.Context()); err != nil {
				t.Error(err)
			}
			if name == "read" || name == "pause" {
				if got := within(t, calls, "the call again"); got != uint32(blocking[name].nr) {
					t.Errorf("call %d", got)
				}
			}
		})
	}
}
