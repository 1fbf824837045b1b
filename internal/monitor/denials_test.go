// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/osthread"
	"github.com/syslatch/syslatch/internal/rawcalls"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// beCaller makes this test binary a process that is denied calls: "log" by a filter that
// logs it, "quiet" by one that doesn't.
const beCaller = "SYSLATCH_TEST_CALLER"

func TestMain(m *testing.M) {
	if mode := os.Getenv(beCaller); mode != "" {
		if err := call(mode == "log"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const (
	getppid   = unix.SYS_GETPPID
	getppid32 = 64
	x32       = 0x40000000
	unnamed   = 5000 // above what any kernel has
)

func call(log bool) error {
	filter, err := seccomp.Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"getppid"}, Action: specs.ActErrno},
			{Names: []string{"getpgid"}, Action: specs.ActLog},
		},
	}, seccomp.Options{ENOSYSAbove: seccomp.KernelRelease()})
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := seccomp.Load(filter, seccomp.LoadOptions{NoNewPrivs: true, Log: log}); err != nil {
		return err
	}
	calls := []rawcalls.Call{
		{Number: getppid, Times: 3},
		{Number: getppid32, Gate32: 1},
		{Number: getppid | x32},
		{Number: unnamed, Times: 2},
		{Number: unnamed + 1},
		{Number: unix.SYS_GETPID},
		{Number: unix.SYS_GETPGID}, // allowed, and logged
	}
	rawcalls.Run(calls)
	if got := int64(calls[0].Result); got != -int64(unix.EPERM) {
		return fmt.Errorf("getppid: %d, want it denied", got)
	}
	return nil
}

// open opens one way. That of fentry is a must where a program that does nothing can be
// attached so.
func open(t *testing.T, way string) (*cgroup.Hierarchy, source) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range ways {
		if w.name != way {
			continue
		}
		s, err := w.open(h, logrus.NewEntry(logrus.New()))
		if strings.HasPrefix(way, "fentry") {
			features := bpf.Probe("")
			if i := slices.IndexFunc(features, func(f bpf.Feature) bool { return f.Name == "fentry" }); !features[i].OK {
				if err == nil || !errors.Is(err, bpf.ErrUnsupported) {
					t.Errorf("on a kernel without fentry: %v", err)
				}
				t.Skip("this kernel has no fentry programs: test/vm/run has some")
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return h, s
	}
	t.Fatalf("no way %s", way)
	return nil, nil
}

// TestDenials: each way sees what filters deny to a cgroup and below, by processes that end
// at once, in cgroups that do, and nothing else.
func TestDenials(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			_, s := open(t, way.name)
			d := newDenials(way.name, s, logrus.NewEntry(logrus.New()))
			defer d.Close()
			g, err := cgroup.New("test-denials")
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := g.Remove(); err != nil {
					t.Error(err)
				}
			}()
			type kind struct {
				tag    uint32
				abi    specs.Arch
				number uint32
			}
			got, pids := map[kind]uint64{}, map[int]bool{}
			watch := func(tag uint32) {
				t.Helper()
				if err := d.Watch(g.ID(), tag, func(one Denial) {
					got[kind{one.Tag, one.ABI, one.Number}] += one.Count
					pids[one.PID] = true
				}); err != nil {
					t.Fatal(err)
				}
			}
			ours := map[int]bool{}
			call := func(dir, mode string) {
				t.Helper()
				ours[caller(t, dir, mode)] = true
			}
			call(g.Path(), "log") // before it is watched
			tick()
			watch(3)
			tick()
			call(g.Path(), "log")
			call(g.Path(), "quiet")
			below := filepath.Join(g.Path(), "a", "b")
			if err := os.MkdirAll(below, 0o755); err != nil {
				t.Fatal(err)
			}
			call(below, "log")
			for _, dir := range []string{below, filepath.Dir(below)} {
				if err := os.Remove(dir); err != nil {
					t.Fatal(err)
				}
			}
			other, err := cgroup.New("test-denials-other")
			if err != nil {
				t.Fatal(err)
			}
			call(other.Path(), "log")
			if err := other.Remove(); err != nil {
				t.Error(err)
			}
			tick()
			if err := d.Tag(g.ID(), 4); err != nil {
				t.Fatal(err)
			}
			call(g.Path(), "log")
			want := map[kind]uint64{}
			for tag, times := range map[uint32]uint64{3: 2, 4: 1} {
				want[kind{tag, specs.ArchX86_64, getppid}] = 3 * times
				want[kind{tag, specs.ArchX86, getppid32}] = times
				want[kind{tag, specs.ArchX32, getppid}] = times
				want[kind{tag, specs.ArchX86_64, unnamed + 1}] = 3 * times
			}
			// A record may be on its way for longer than Forget waits, on a busy machine.
			again := time.NewTicker(10 * time.Millisecond)
			defer again.Stop()
			for deadline := time.Now().Add(20 * time.Second); !maps.Equal(want, got) && time.Now().Before(deadline); <-again.C {
				d.tell()
			}
			if err := d.Forget(g.ID()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			for pid := range pids {
				if !ours[pid] {
					t.Errorf("told of process %d, which is none of %v", pid, ours)
				}
			}
			// What it had is not told again.
			clear(got)
			watch(5)
			d.tell()
			if len(got) > 0 {
				t.Errorf("told again: %v", got)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			for _, err := range []error{d.Tag(g.ID(), 1), d.Watch(g.ID(), 1, func(Denial) {})} {
				if !errors.Is(err, os.ErrClosed) {
					t.Errorf("closed: %v", err)
				}
			}
			if err := errors.Join(d.Forget(g.ID()), d.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// tick waits until the kernel's coarse clock goes on, by which audit's records are told
// apart.
func tick() {
	for before := auditTime(); auditTime().Equal(before); {
	}
}

// caller runs the process in a cgroup, and is through with it when it returns.
func caller(t *testing.T, dir, mode string) (pid int) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), beCaller+"="+mode)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", mode, err, out)
	}
	return cmd.Process.Pid
}

// TestOpenDenials: this host has one of the ways.
func TestOpenDenials(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if how, err := Try(); err != nil || how != "fentry/audit_seccomp" && how != "audit netlink" {
		t.Errorf("%q, %v", how, err)
	}
}

// TestHeard: audit tells the first network namespace alone. In another nothing would ever
// be told, and nothing say so.
func TestHeard(t *testing.T) {
	h, s := open(t, "audit netlink")
	if err := errors.Join(heard(h, s), s.Close()); err != nil {
		t.Error(err)
	}
	err := osthread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		_, s := open(t, "audit netlink")
		return errors.Join(heard(h, s), s.Close())
	})
	if !errors.Is(err, errUnheard) {
		t.Errorf("in another network namespace: %v", err)
	}
}

// TestForeignMessages: others than the kernel may send to the socket, and neither make
// denials nor end it.
func TestForeignMessages(t *testing.T) {
	h, s := open(t, "audit netlink")
	defer s.Close()
	own, err := h.OfPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	id, err := cgroup.ID(own)
	if err == nil {
		err = s.watch(id, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	conn, err := s.(*records).socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var to unix.Sockaddr
	if err := conn.Control(func(fd uintptr) { to, err = unix.Getsockname(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	port := to.(*unix.SockaddrNetlink).Pid
	from, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_AUDIT)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(from)
	record := strings.Replace(goodRecord, "pid=18672", fmt.Sprintf("pid=%d", os.Getpid()), 1)
	for _, m := range []struct{ typ, flags uint16 }{{auditSeccomp, 0}, {unix.NLMSG_ERROR, 0}, {auditSeccomp, unix.NLM_F_MULTI}, {unix.NLMSG_DONE, 0}} {
		message := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(record)))
		message = binary.NativeEndian.AppendUint16(message, m.typ)
		message = binary.NativeEndian.AppendUint16(message, m.flags)
		message = append(append(message, make([]byte, 8)...), record...)
		if err := unix.Sendto(from, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: port}); err != nil {
			t.Fatal(err)
		}
	}
	s.settle()
	if all, lost, err := s.read(); err != nil || len(all) > 0 || lost > 0 {
		t.Errorf("%v, %d lost, %v", all, lost, err)
	}
	if err := heard(h, s); err != nil {
		t.Error(err)
	}
}

const goodRecord = `audit(1795753792.362:9): auid=4294967295 uid=0 gid=0 ses=4294967295 subj=docker-default (enforce) pid=18672 comm="unshare" exe="/usr/bin/unshare" sig=0 arch=c000003e syscall=302 compat=0 ip=0x7f9146c2a7f0 code=0x50000`

func TestParseRecord(t *testing.T) {
	const good = goodRecord
	at := time.UnixMilli(1795753792362)
	for name, tc := range map[string]struct {
		text string
		want record
		ok   bool
	}{
		"good":            {good, record{at, 18672, 0xc000003e, 302, 0x50000}, true},
		"its end":         {good + "\x00\n", record{at, 18672, 0xc000003e, 302, 0x50000}, true},
		"a negative call": {strings.Replace(good, "syscall=302", "syscall=-1", 1), record{at, 18672, 0xc000003e, 0xffffffff, 0x50000}, true},
		"a comm like a field": {
			strings.Replace(good, `comm="unshare"`, `comm="pid=1"`, 1), record{at, 18672, 0xc000003e, 302, 0x50000}, true,
		},
		"a killed one": {strings.Replace(good, "code=0x50000", "code=0x80000000", 1), record{at, 18672, 0xc000003e, 302, 0x80000000}, true},
		"no pid":       {strings.Replace(good, "pid=18672", "", 1), record{}, false},
		"a bad pid":    {strings.Replace(good, "pid=18672", "pid=-2", 1), record{}, false},
		"a bad arch":   {strings.Replace(good, "c000003e", "x", 1), record{}, false},
		"a bad time":   {strings.Replace(good, ".362", "", 1), record{}, false},
		"nothing":      {"", record{}, false},
	} {
		if got, ok := parseRecord(tc.text); ok != tc.ok || ok && got != tc.want {
			t.Errorf("%s: %+v, %v; want %+v, %v", name, got, ok, tc.want, tc.ok)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add(goodRecord)
	f.Add("audit(1.2:3): pid=1 arch=c000003e syscall=-1 code=0x0")
	f.Fuzz(func(t *testing.T, text string) {
		if r, ok := parseRecord(text); ok && (r.pid < 0 || r.time.IsZero()) {
			t.Errorf("%+v", r)
		}
	})
}

// TestTake: a message of any length that fits is one, or is lost, and harms nothing.
func TestTake(t *testing.T) {
	r := &records{tags: map[uint64][]tagged{}, pending: map[recorded]*Denial{}, cgroups: map[int]uint64{}}
	buf := make([]byte, mostRecord)
	binary.NativeEndian.PutUint32(buf, mostRecord)
	binary.NativeEndian.PutUint16(buf[4:], auditSeccomp)
	for n := range mostRecord + 1 {
		r.take(buf, n)
	}
	if r.lost == 0 || len(r.pending) > 0 {
		t.Errorf("%d lost, %d pending", r.lost, len(r.pending))
	}
}
