// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// inherited is a socket that this process was started with.
func inherited(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "inherited")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

func sizeOf(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

// pair is a connection, and its other end for a child or for raw use.
func pair(t *testing.T) (*net.UnixConn, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := inherited(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	other := os.NewFile(uintptr(fds[1]), "other end")
	t.Cleanup(func() { conn.Close(); other.Close() })
	return conn, other
}

// run is a supervised program.
type supervised struct {
	*exec.Cmd
	conn           *net.UnixConn
	stdout, stderr bytes.Buffer
}

func startSupervised(t *testing.T, f Filter, env []string, args ...string) *supervised {
	t.Helper()
	s := &supervised{}
	conn, other := pair(t)
	s.conn = conn
	var in bytes.Buffer
	if err := binary.Write(&in, binary.NativeEndian, []unix.SockFilter(f)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	s.Cmd = exec.CommandContext(ctx, "/proc/self/exe", args...)
	s.Env = append(append(os.Environ(), helperEnv+"=handover", "STATUS=126"), env...)
	s.Stdin, s.Stdout, s.Stderr, s.ExtraFiles = &in, &s.stdout, &s.stderr, []*os.File{other}
	if err := s.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	other.Close()
	t.Cleanup(func() {
		cancel()
		if s.ProcessState == nil {
			_ = s.Wait()
		}
	})
	return s
}

// take receives the listener as a supervisor does.
func (s *supervised) take(t *testing.T) (specs.ContainerProcessState, *Listener) {
	t.Helper()
	state, file, err := ReceiveListener(s.conn)
	if err != nil {
		_ = s.Wait()
		t.Fatalf("%v; the program said %s", err, &s.stderr)
	}
	l, err := NewListener(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return state, l
}

// busyboxNeeds is what a static busybox calls to echo; all else is denied.
var busyboxNeeds = []string{
	"arch_prctl", "brk", "exit_group", "fstat", "getrandom", "getuid", "mprotect", "newfstatat", "prctl", "prlimit64", "readlink",
	"readlinkat", "rseq", "rt_sigaction", "set_robust_list", "set_tid_address", "uname", "write",
}

func tightFilter(t *testing.T, allow ...string) Filter {
	t.Helper()
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"execve", "getppid"}, Action: specs.ActNotify}},
	}
	if len(allow) > 0 {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: allow, Action: specs.ActAllow})
	}
	f, err := Compile(p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestHandover(t *testing.T) {
	f := tightFilter(t, busyboxNeeds...)
	for name, env := range map[string][]string{
		"":              nil,
		"one processor": {"GOMAXPROCS=1"},
		"storm":         {"STORM=1"},
		"killable":      {"WAIT_KILLABLE=1"},
		"long state":    {"LONG=1000000"}, // does not fit into the socket at once
		"race detector": {"GORACE=atexit_sleep_ms=0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			runs := 10
			if name == "" {
				runs = 50
			}
			for range runs {
				s := startSupervised(t, f, append(env, "METADATA=m"), "/bin/busybox", "echo", "hello")
				state, l := s.take(t)
				if state.State.ID != "a run" || state.Pid != s.Process.Pid || state.Metadata[0] != 'm' {
					t.Errorf("state: %.100v", state)
				}
				var seen []Notification
				done := serve(t.Context(), l, func(n *Notification) (bool, uint) {
					seen = append(seen, *n)
					return true, 0
				})
				if err := s.Wait(); err != nil || s.stdout.String() != "hello\n" {
					t.Fatalf("%v: %q %s", err, &s.stdout, &s.stderr)
				}
				if err := within(t, done, "the end of Serve"); err != nil {
					t.Error(err)
				}
				// The only call that is asked about is the execve.
				if len(seen) != 1 || seen[0].Number != unix.SYS_EXECVE || seen[0].PID == 0 {
					t.Errorf("notifications: %+v", seen)
				}
				l.Close()
				s.conn.Close()
			}
		})
	}
}

// TestHandoverAlone: the execve is the only call, under a filter that denies all
// others, so that the program does nothing but die.
func TestHandoverAlone(t *testing.T) {
	f := tightFilter(t)
	for range 20 {
		s := startSupervised(t, f, nil, "/bin/busybox", "echo")
		_, l := s.take(t)
		calls := 0
		done := serve(t.Context(), l, func(*Notification) (bool, uint) { calls++; return true, 0 })
		err := s.Wait()
		if s.ProcessState.ExitCode() == 126 || err == nil {
			t.Fatalf("%v: %s", err, &s.stderr)
		}
		if err := within(t, done, "the end of Serve"); err != nil || calls != 1 {
			t.Errorf("%d calls, %v", calls, err)
		}
		l.Close()
		s.conn.Close()
	}
}

// TestHandoverFails: the execve fails and says why; nothing waits for ever.
func TestHandoverFails(t *testing.T) {
	f := tightFilter(t, "write", "exit_group")
	answer := func(goOn bool) func(*testing.T, *supervised) {
		return func(t *testing.T, s *supervised) {
			_, l := s.take(t)
			serve(t.Context(), l, func(*Notification) (bool, uint) { return goOn, uint(unix.EPERM) })
		}
	}
	for _, tc := range []struct {
		name, path string
		filter     Filter
		supervise  func(*testing.T, *supervised)
		want       string
	}{
		{"refused", "/bin/true", f, answer(false), "syslatch: execute /bin/true: operation not permitted (does its supervisor allow execve?)\n"},
		{"missing", "/nonexistent", f, answer(true), "syslatch: execute /nonexistent: no such file or directory\n"},
		{"gone before", "/bin/true", f, func(_ *testing.T, s *supervised) { s.conn.Close() }, "syslatch: execute /bin/true: function not implemented (its supervisor is gone)\n"},
		{"gone after", "/bin/true", f, func(t *testing.T, s *supervised) {
			_, l := s.take(t)
			l.Close()
		}, "syslatch: execute /bin/true: function not implemented (its supervisor is gone)\n"},
		{"no notification", "/bin/true", AllowAllFilter(), func(*testing.T, *supervised) {}, "handover: the filter does not notify of execve\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := startSupervised(t, tc.filter, nil, tc.path)
			tc.supervise(t, s)
			err := s.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || s.stderr.String() != tc.want {
				t.Errorf("%v: %q, want %q", err, &s.stderr, tc.want)
			}
		})
	}
}

func TestReceiveListenerRefuses(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for name, tc := range map[string]struct {
		text string
		fds  int
		want string
	}{
		"nothing":       {"", 0, "unexpected EOF"},
		"garbage":       {"GET / HTTP/1.1\r\n", 1, "invalid character"},
		"half":          {`{"fds":["seccompFd"`, 1, "unexpected EOF"},
		"no fd":         {`{"fds":["seccompFd"]}`, 0, "0 descriptors, and names for 1"},
		"more fds":      {`{"fds":["seccompFd"]}`, 2, "2 descriptors, and names for 1"},
		"other name":    {`{"fds":["other"],"metadata":"m"}`, 1, "no descriptor is named seccompFd"},
		"no names":      {`{"metadata":"m"}`, 0, "no descriptor is named seccompFd"},
		"twice":         {`{"fds":["seccompFd","seccompFd"]}`, 2, "two descriptors"},
		"two states":    {`{"fds":["seccompFd"]}{}`, 1, "2 bytes after the state"},
		"wrong type":    {`{"fds":"seccompFd"}`, 1, "cannot unmarshal"},
		"not an object": {`[]`, 1, "cannot unmarshal"},
		"too long":      {`{"metadata":"` + strings.Repeat("x", maxState), 1, "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			before := countFiles(t)
			conn, other := pair(t)
			sent := make(chan bool)
			go func() {
				defer close(sent)
				fds := make([]int, tc.fds)
				for i := range fds {
					fds[i] = int(null.Fd())
				}
				var rights []byte
				if len(fds) > 0 {
					rights = unix.UnixRights(fds...)
				}
				if n, err := unix.SendmsgN(int(other.Fd()), []byte(tc.text), rights, nil, 0); err == nil && n < len(tc.text) {
					_, _ = io.WriteString(other, tc.text[n:])
				}
				other.Close()
			}()
			state, f, err := ReceiveListener(conn)
			if err == nil || !strings.Contains(err.Error(), tc.want) || f != nil {
				t.Errorf("got %v, %v; want %q", f, err, tc.want)
			}
			if whole := name == "no names" || name == "other name"; errors.Is(err, ErrNoDescriptor) != whole || whole && state.Metadata != "m" {
				t.Errorf("a whole state without a listener: %+v, %v", state, err)
			}
			conn.Close()
			<-sent
			if got := countFiles(t); got > before {
				t.Errorf("%d descriptors are left open", got-before)
			}
		})
	}
}

// TestReceiveListenerInTime: whoever connects and sends nothing is waited for as long as
// the deadline says.
func TestReceiveListenerInTime(t *testing.T) {
	conn, other := pair(t)
	defer conn.Close()
	defer other.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, f, err := ReceiveListener(conn); !errors.Is(err, os.ErrDeadlineExceeded) || f != nil {
		t.Errorf("got %v, %v", f, err)
	}
}

// TestReceiveListenerPicks: by name; the others are closed; pieces are put together.
func TestReceiveListenerPicks(t *testing.T) {
	var ends [2]*os.File
	var err error
	if ends[0], ends[1], err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	defer ends[0].Close()
	defer ends[1].Close()
	before := countFiles(t)
	conn, other := pair(t)
	text := `{"ociVersion":"1.0.2","fds":["x","seccompFd"],"pid":7,"state":{"id":"c1"}}` + "\n"
	for i, part := range []string{text[:20], text[20:]} {
		if err := unix.Sendmsg(int(other.Fd()), []byte(part), unix.UnixRights(int(ends[i].Fd())), nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	state, f, err := ReceiveListener(conn)
	if err != nil {
		t.Fatal(err)
	}
	if state.Pid != 7 || state.State.ID != "c1" {
		t.Errorf("%+v", state)
	}
	var want, got unix.Stat_t
	if err := errors.Join(unix.Fstat(int(ends[1].Fd()), &want), unix.Fstat(int(f.Fd()), &got)); err != nil || want.Ino != got.Ino {
		t.Errorf("the other descriptor: %v", err)
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
	if _, err := NewListener(f); !errors.Is(err, ErrNoListener) { // closes it
		t.Errorf("NewListener of a pipe: %v", err)
	}
	conn.Close()
	other.Close()
	if got := countFiles(t); got != before {
		t.Errorf("%d descriptors, %d before", got, before)
	}
}

func countFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func FuzzDecodeState(f *testing.F) {
	for _, s := range []string{"", "{}", `{"fds":["seccompFd"]}`, `{"fds":["a"]}x`, "[", "null"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var whole, part specs.ContainerProcessState
		complete, err := decodeState(text, &whole)
		if complete && err != nil {
			t.Fatal("both")
		}
		for i := range text { // what may become whole is no error before it is
			if _, bad := decodeState(text[:i], &part); bad != nil && complete && !strings.Contains(fmt.Sprint(bad), "after") {
				t.Fatalf("%q of %q: %v", text[:i], text, bad)
			}
		}
	})
}
