// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// supervisor answers notifications by a plan's tables, as simply as can be.
type supervisor struct {
	plan   *profiles.PhasePlan
	tables map[string]*profiles.PhaseTable

	mu    sync.Mutex
	phase string          // guarded by mu
	asked map[string]bool // guarded by mu: "PHASE CALL" that went on
}

func newSupervisor(plan *profiles.PhasePlan) *supervisor {
	s := &supervisor{plan: plan, tables: map[string]*profiles.PhaseTable{}, phase: profiles.StartPhase, asked: map[string]bool{}}
	for _, phase := range append([]string{profiles.StartPhase}, plan.Phases...) {
		s.tables[phase] = plan.Table(phase, seccomp.Number)
	}
	return s
}

func (s *supervisor) set(phase string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.phase = phase
}

// take accepts the listener of one container.
func (s *supervisor) take(l *net.UnixListener) (*os.File, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	state, rights := make([]byte, 1<<16), make([]byte, 1<<10)
	_, n, _, _, err := c.ReadMsgUnix(state, rights)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("%d control messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("%d descriptors: %w", len(fds), err)
	}
	return os.NewFile(uintptr(fds[0]), "listener"), nil
}

// struct seccomp_notif and struct seccomp_notif_resp of linux/seccomp.h.
type (
	notification struct {
		id         uint64
		pid, flags uint32
		nr, arch   uint32
		ip         uint64
		args       [6]uint64
	}
	response struct {
		id    uint64
		val   int64
		errno int32
		flags uint32
	}
)

const (
	notifRecv     = 0xc0502100 // SECCOMP_IOCTL_NOTIF_RECV
	notifSend     = 0xc0182101 // SECCOMP_IOCTL_NOTIF_SEND
	notifContinue = 1
)

// serve answers until the last task of the filter is gone.
func (s *supervisor) serve(listener *os.File) error {
	fd := listener.Fd()
	for {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return err
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			return nil // POLLHUP
		}
		var n notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, notifRecv, uintptr(unsafe.Pointer(&n))); errno != 0 {
			if errno == unix.ENOENT || errno == unix.EINTR {
				continue // a signal took the call back
			}
			return errno
		}
		if err := s.answer(fd, &n); err != nil {
			return err
		}
	}
}

func (s *supervisor) answer(fd uintptr, n *notification) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := response{id: n.id}
	abi := profiles.ABI(specs.ArchX86_64)
	if n.arch != unix.AUDIT_ARCH_X86_64 {
		abi = specs.ArchX86
	}
	goOn, errno := s.tables[s.phase].Decide(abi, n.nr, n.args)
	if r.flags = notifContinue; !goOn {
		r.flags, r.errno = 0, -int32(errno)
	}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, fd, notifSend, uintptr(unsafe.Pointer(&r)))
	if e == unix.ENOENT {
		return nil // taken back meanwhile: it is made again, or not
	}
	if e != 0 {
		return e
	}
	name, _ := seccomp.Name(abi, n.nr)
	if goOn {
		s.asked[s.phase+" "+name] = true
	}
	if goOn && s.phase == profiles.StartPhase && strings.HasPrefix(name, "execve") {
		s.phase = s.plan.Phases[0]
	}
	return nil
}

// phaseScript says what it can do each time that it reads a line. Nobody listens where
// it connects to, and in a guest without a network there is no way there. It opens no
// /dev/null: that is an open for writing, too.
const phaseScript = `
while read phase; do
	(echo x >/dev/shm/$phase) && w=yes || w=no
	mkdir /dev/shm/d-$phase && m=yes || m=no
	case $(ls /) in *bin*) r=yes;; *) r=no;; esac
	case $(nc -w 1 127.0.0.1 9 2>&1) in *permitted*) c=no;; ?*) c=yes;; *) c=no;; esac
	echo $phase write=$w mkdir=$m read=$r connect=$c
done`

// TestPhases: runtimes start a container under a plan's filter and hand its listener
// over, and a supervisor that answers by the plan's tables lets it do in each phase
// what the phase allows, looser and tighter, in one process.
func TestPhases(t *testing.T) {
	always := profiles.PhaseRule{Names: []string{"@file-read", "@basic-io", "@info", "@process"}}
	set := &profiles.PhaseSet{Initial: "read_only", Phases: []profiles.Phase{
		{Name: "read_only", Allow: []profiles.PhaseRule{always}, Network: []string{}},
		{Name: "write_logs", Allow: []profiles.PhaseRule{always, {Names: []string{"openat", "mkdir"}}}},
		{Name: "network", Allow: []profiles.PhaseRule{always, {Names: []string{"@network"}}}},
		{Name: "closed"}, // the floor alone: with it, nothing else is alike in all phases
	}}
	steps := []struct{ phase, want string }{
		{"read_only", "write=no mkdir=no read=yes connect=no"},
		{"write_logs", "write=yes mkdir=yes read=yes connect=no"},
		{"network", "write=no mkdir=no read=yes connect=yes"},
		{"read_only", "write=no mkdir=no read=yes connect=no"},
		{"write_logs", "write=yes mkdir=no read=yes connect=no"}, // it is there
	}
	forEachRuntime(t, func(t *testing.T, b *bundle) {
		runtime, _, _ := strings.Cut(b.rt.name, "-")
		plan, err := profiles.CompilePhases(set, profiles.PhaseHost{Notify: true}, profiles.PhaseOptions{Runtime: runtime})
		if err != nil {
			t.Fatal(err)
		}
		socket := filepath.Join(b.dir, "listener")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		plan.Profile.ListenerPath = socket
		b.configure(plan.Profile, "")
		b.busybox(phaseScript)

		s := newSupervisor(plan)
		served := make(chan error, 1)
		go func() {
			listener, err := s.take(l)
			if err == nil {
				err = s.serve(listener)
				err = errors.Join(err, listener.Close())
			}
			served <- err
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 2*runTimeout)
		defer cancel()
		args := b.run()
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Cancel = func() error {
			b.remove(b.id) // it has the pipes, too
			return cmd.Process.Kill()
		}
		cmd.WaitDelay = runTimeout
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var problem strings.Builder
		cmd.Stderr = &problem
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		ask := func(line string) string {
			if _, err := io.WriteString(in, line+"\n"); err != nil {
				t.Fatal(err)
			}
			if !lines.Scan() {
				t.Fatalf("no answer to %s: %v %s", line, lines.Err(), &problem)
			}
			return lines.Text()
		}
		for i, step := range steps {
			if i > 0 {
				s.set(step.phase) // the first comes with the execve
			}
			if got, want := ask(step.phase), step.phase+" "+step.want; got != want {
				t.Errorf("step %d: got %q, want %q", i, got, want)
			}
		}
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, &problem)
		}
		// The listener hangs up with the container's end; if none came, there is none.
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		for _, want := range []string{"start execve", "write_logs openat", "write_logs mkdir", "network connect"} {
			if !s.asked[want] {
				t.Errorf("nobody asked: %s", want)
			}
		}
	})
}

// busybox makes the configured container run a script by busybox's shell.
func (b *bundle) busybox(script string) {
	b.t.Helper()
	bin := filepath.Join(b.dir, "rootfs", "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		b.t.Fatal(err)
	}
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		b.t.Fatalf("%v: apt-get install busybox-static", err)
	}
	if err := os.WriteFile(filepath.Join(bin, "busybox"), data, 0o755); err != nil {
		b.t.Fatal(err)
	}
	for _, name := range []string{"sh", "ls", "mkdir", "nc"} {
		if err := os.Symlink("busybox", filepath.Join(bin, name)); err != nil {
			b.t.Fatal(err)
		}
	}
	file := filepath.Join(b.dir, "config.json")
	if data, err = os.ReadFile(file); err != nil {
		b.t.Fatal(err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		b.t.Fatal(err)
	}
	spec.Process.Args, spec.Process.Env = []string{"/bin/sh", "-c", script}, []string{"PATH=/bin"}
	if data, err = json.Marshal(&spec); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		b.t.Fatal(err)
	}
}
