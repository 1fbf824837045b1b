// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// patience bounds what should take no time: guests are slow.
const patience = 2 * time.Minute

// task is a thread of this process with a filter that asks about getppid, getpgrp
// and getuid, which Go doesn't call.
type task struct {
	tid  int
	work chan func()
	gone chan struct{}
}

func asking(t *testing.T) Filter {
	t.Helper()
	f, err := Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX32, specs.ArchX86},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"getppid", "getpgrp", "getuid"}, Action: specs.ActNotify}},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// newTask starts a thread with a listener.
func newTask(t *testing.T, opts LoadOptions) (*task, *Listener) {
	t.Helper()
	f := asking(t)
	k := &task{work: make(chan func()), gone: make(chan struct{})}
	loaded := make(chan error)
	var file *os.File
	var body func()
	body = func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		if k.tid = unix.Gettid(); k.tid == os.Getpid() {
			defer runtime.UnlockOSThread()
			done := make(chan struct{})
			go func() { defer close(done); body() }() // the first thread never ends
			<-done
			return
		}
		defer close(k.gone)
		var err error
		file, err = LoadListener(f, opts)
		loaded <- err
		if err != nil {
			return
		}
		for do := range k.work {
			do()
		}
	}
	go body()
	if err := <-loaded; err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close() // what waits gets ENOSYS
		k.end()
	})
	return k, l
}

// end ends the thread.
func (k *task) end() {
	if k.work != nil {
		close(k.work)
		k.work = nil
	}
	<-k.gone
}

// call makes a call on the thread. It blocks, so it is no RawSyscall.
func (k *task) call(nr uintptr, args ...uintptr) <-chan unix.Errno {
	var a [3]uintptr
	copy(a[:], args)
	out := make(chan unix.Errno, 1)
	k.work <- func() {
		_, _, errno := unix.Syscall(nr, a[0], a[1], a[2])
		out <- errno
	}
	return out
}

func within[T any](t *testing.T, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("%s: not within %s", what, patience)
	}
	return v
}

func serve(ctx context.Context, l *Listener, decide func(*Notification) (bool, uint)) <-chan error {
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx, decide) }()
	return done
}

func TestServe(t *testing.T) {
	k, l := newTask(t, LoadOptions{NoNewPrivs: true})
	var seen []Notification
	done := serve(t.Context(), l, func(n *Notification) (bool, uint) {
		seen = append(seen, *n)
		if valid, err := l.Valid(n.ID); !valid || err != nil {
			t.Errorf("call %d is valid: %v, %v", n.ID, valid, err)
		}
		switch n.Args[0] {
		case 1:
			return false, uint(unix.EACCES)
		case 2, 3:
			return false, uint(n.Args[0]-2) * 5000 // no errno
		}
		return true, uint(unix.EACCES)
	})
	want := []unix.Errno{0, unix.EACCES, unix.EPERM, unix.EPERM}
	for i, errno := range want {
		if got := within(t, k.call(unix.SYS_GETPPID, uintptr(i)), "a call"); got != errno {
			t.Errorf("call %d: got %v, want %v", i, got, errno)
		}
	}
	if got := within(t, k.call(unix.SYS_GETPPID|x32Bit, 1), "an x32 call"); got != unix.EACCES {
		t.Errorf("x32: got %v", got)
	}
	k.end()
	if err := within(t, done, "the end of Serve"); err != nil {
		t.Error(err)
	}
	if len(seen) != len(want)+1 {
		t.Fatalf("%d notifications: %+v", len(seen), seen)
	}
	for i, n := range seen {
		abi, arg := specs.ArchX86_64, uint64(i)
		if i == len(want) {
			abi, arg = specs.ArchX32, 1
		}
		if n.PID != k.tid || n.ABI != abi || n.Number != unix.SYS_GETPPID || n.Args != [6]uint64{arg} || n.IP == 0 || n.ID != seen[0].ID+uint64(i) {
			t.Errorf("notification %d: %+v, of thread %d", i, n, k.tid)
		}
		if valid, err := l.Valid(n.ID); valid || err != nil {
			t.Errorf("answered call %d is valid: %v, %v", i, valid, err)
		}
	}
}

// TestServeEnds: by a context, by Close, and not for two at once; what waits
// meanwhile is served by the next.
func TestServeEnds(t *testing.T) {
	k, l := newTask(t, LoadOptions{NoNewPrivs: true})
	allow := func(*Notification) (bool, uint) { return true, 0 }
	ctx, cancel := context.WithCancelCause(t.Context())
	called := make(chan bool, 1)
	done := serve(ctx, l, func(*Notification) (bool, uint) { called <- true; return true, 0 })
	if got := within(t, k.call(unix.SYS_GETUID), "a call"); got != 0 {
		t.Error(got)
	}
	within(t, called, "decide")
	if err := l.Serve(t.Context(), allow); !errors.Is(err, ErrServing) {
		t.Errorf("a second Serve: %v", err)
	}
	cause := errors.New("cause")
	cancel(cause)
	if err := within(t, done, "the end of Serve"); !errors.Is(err, cause) {
		t.Error(err)
	}
	answer := k.call(unix.SYS_GETUID)
	done = serve(t.Context(), l, allow)
	if got := within(t, answer, "a call"); got != 0 {
		t.Error(got)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := within(t, done, "the end of Serve"); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if got := within(t, k.call(unix.SYS_GETUID), "a call"); got != unix.ENOSYS {
		t.Errorf("without a listener: %v", got)
	}
	if err := l.Serve(t.Context(), allow); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Serve of a closed listener: %v", err)
	}
}

// TestServePanics: the call of a decision that panics, or whose goroutine ends, is
// denied, and the next Serve goes on.
func TestServePanics(t *testing.T) {
	k, l := newTask(t, LoadOptions{NoNewPrivs: true})
	for _, value := range []any{"oops", nil} {
		done := make(chan error, 1)
		go func() {
			err := errors.New("Goexit")
			defer func() { done <- err }()
			err = l.Serve(context.Background(), func(*Notification) (bool, uint) {
				if value == nil {
					runtime.Goexit()
				}
				panic(value)
			})
		}()
		if got := within(t, k.call(unix.SYS_GETUID), "a call"); got != unix.EPERM {
			t.Error(got)
		}
		err := within(t, done, "the end of Serve")
		var p *PanicError
		if errors.As(err, &p) != (value != nil) || p != nil && (p.Value != value || len(p.Stack) == 0) {
			t.Errorf("%v: %v", value, err)
		}
	}
	serve(t.Context(), l, func(*Notification) (bool, uint) { return true, 0 })
	if got := within(t, k.call(unix.SYS_GETUID), "a call"); got != 0 {
		t.Error(got)
	}
}

// TestServeSignals: a call that a signal takes back before its answer is made and
// asked about again; only with WaitKillable it waits.
func TestServeSignals(t *testing.T) {
	for _, killable := range []bool{false, true} {
		t.Run(map[bool]string{false: "", true: "killable"}[killable], func(t *testing.T) {
			k, l := newTask(t, LoadOptions{NoNewPrivs: true, WaitKillable: killable})
			var ids []uint64
			done := serve(t.Context(), l, func(n *Notification) (bool, uint) {
				ids = append(ids, n.ID)
				if len(ids) > 1 {
					return true, 0
				}
				if err := unix.Tgkill(os.Getpid(), k.tid, unix.SIGURG); err != nil {
					t.Error(err)
				}
				for valid := true; valid && !killable; {
					var err error
					if valid, err = l.Valid(n.ID); err != nil {
						t.Error(err)
					}
				}
				return true, 0
			})
			if got := within(t, k.call(unix.SYS_GETPGRP), "a call"); got != 0 {
				t.Error(got)
			}
			k.end()
			if err := within(t, done, "the end of Serve"); err != nil {
				t.Error(err)
			}
			if want := 2; killable == (len(ids) == want) || !killable && ids[1] != ids[0]+1 {
				t.Errorf("asked about %v", ids)
			}
		})
	}
}

// receiveAndDie runs a process that receives one call and ends.
func receiveAndDie(t *testing.T, listener *os.File) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"=receive", "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{listener}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
}

func TestNewListenerRefuses(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := NewListener(r); !errors.Is(err, ErrNoListener) {
		t.Error(err)
	}
	if _, err := r.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the file is open: %v", err)
	}
	if _, err := LoadListener(AllowAllFilter(), LoadOptions{AllThreads: true}); err == nil {
		t.Error("a listener for all threads")
	}
}

func TestEntry(t *testing.T) {
	for _, tc := range []struct {
		arch, nr uint32
		abi      specs.Arch
		number   uint32
		known    bool
	}{
		{unix.AUDIT_ARCH_X86_64, 59, specs.ArchX86_64, 59, true},
		{unix.AUDIT_ARCH_X86_64, 520 | x32Bit, specs.ArchX32, 520, true},
		{unix.AUDIT_ARCH_I386, 11, specs.ArchX86, 11, true},
		{unix.AUDIT_ARCH_AARCH64, 11, "", 0, false},
	} {
		if abi, number, known := CallOf(tc.arch, tc.nr); abi != tc.abi || number != tc.number || known != tc.known {
			t.Errorf("%#x %d: %s %d %v", tc.arch, tc.nr, abi, number, known)
		}
	}
}
