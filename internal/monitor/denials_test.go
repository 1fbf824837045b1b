// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
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

// TestDenials: both ways see what filters deny, of a process that ends at once, and nothing
// else.
func TestDenials(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	quiet := logrus.NewEntry(logrus.New())
	one := func(abi specs.Arch, number uint32, count uint64) Denial {
		return Denial{ABI: abi, Number: number, Count: count}
	}
	named := []Denial{one(specs.ArchX32, getppid, 1), one(specs.ArchX86, getppid32, 1), one(specs.ArchX86_64, getppid, 3)}
	for name, way := range map[string]struct {
		open func() (source, error)
		want []Denial
	}{
		"fentry": {func() (source, error) { return openCounts(h, quiet) }, append(named, one(specs.ArchX86_64, unnamed+1, 3))},
		"audit netlink": {
			func() (source, error) { return openRecords(h, quiet) },
			append(named, one(specs.ArchX86_64, unnamed, 2), one(specs.ArchX86_64, unnamed+1, 1)),
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := way.open()
			if name == "fentry" && errors.Is(err, bpf.ErrUnsupported) {
				t.Logf("not here: %v", err) // the guests have it
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			var got []Denial
			d := &Denials{source: s, log: quiet, found: func(one Denial) { got = append(got, one) }}
			for _, mode := range []string{"log", "quiet", "log"} {
				begun := time.Now()
				group, pid := caller(t, mode)
				got = nil
				d.Flush()
				var own []Denial
				for _, one := range got {
					if one.Cgroup != group {
						continue // the host has others
					}
					if one.PID != pid {
						t.Errorf("%s: %+v, want pid %d", mode, one, pid)
					}
					if name != "fentry" && (one.Time.Before(begun.Add(-coarse)) || one.Time.After(time.Now())) {
						t.Errorf("%s: %+v, want it since %v", mode, one, begun)
					}
					one.Cgroup, one.PID, one.Time = 0, 0, time.Time{}
					same := func(o Denial) bool { return o.ABI == one.ABI && o.Number == one.Number }
					if i := slices.IndexFunc(own, same); i >= 0 { // at other times
						own[i].Count += one.Count
						continue
					}
					own = append(own, one)
				}
				slices.SortFunc(own, func(a, b Denial) int {
					return strings.Compare(fmt.Sprint(a.ABI, a.Number), fmt.Sprint(b.ABI, b.Number))
				})
				want := way.want
				if mode == "quiet" {
					want = nil
				}
				if diff := cmp.Diff(want, own); diff != "" {
					t.Errorf("%s: (-want +got):\n%s", mode, diff)
				}
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			d.Flush()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// caller runs the process in a cgroup of its own, which is gone when it returns.
func caller(t *testing.T, mode string) (group uint64, pid int) {
	t.Helper()
	g, err := cgroup.New("test-denials")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
	}()
	dir, err := g.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), beCaller+"="+mode)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", mode, err, out)
	}
	return g.ID(), cmd.Process.Pid
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

func TestParseRecord(t *testing.T) {
	const good = `audit(1795753792.362:9): auid=4294967295 uid=0 gid=0 ses=4294967295 subj=docker-default (enforce) pid=18672 comm="unshare" exe="/usr/bin/unshare" sig=0 arch=c000003e syscall=302 compat=0 ip=0x7f9146c2a7f0 code=0x50000`
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

// TestHeard: audit tells the first network namespace alone. In another nothing would ever
// be told, and nothing say so.
func TestHeard(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		s, err := openRecords(h, logrus.NewEntry(logrus.New()))
		if err == nil {
			err = errors.Join(heard(h, s), s.Close())
		}
		done <- err
	}()
	if err := <-done; !errors.Is(err, errUnheard) {
		t.Errorf("in another network namespace: %v", err)
	}
	s, err := openRecords(h, logrus.NewEntry(logrus.New()))
	if err == nil {
		err = errors.Join(heard(h, s), s.Close())
	}
	if err != nil {
		t.Error(err)
	}
}
