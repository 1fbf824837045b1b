// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

const auditAarch64 = unix.AUDIT_ARCH_AARCH64

// numbers are the call numbers that every filter is asked about.
var numbers = func() []uint32 {
	var out []uint32
	for nr := range uint32(1024) {
		out = append(out, nr, nr|x32Bit)
	}
	return append(out, 1<<16, x32Bit-1, 1<<31-1, 1<<31, 1<<31|x32Bit, 1<<32-2, 1<<32-1)
}()

// expected is what a profile says about a call, written without libseccomp's
// compiler and without a look at Compile: the model that filters are held to.
//
// Names with several rules have conditions in each and one action in all: what
// libseccomp makes of others is not the profile's to say.
func expected(p *specs.LinuxSeccomp, d *seccompData, enosysAbove string) uint32 {
	abi, nr, ok := split(d)
	if d.nr == 1<<32-1 && abi == specs.ArchX86_64 && slices.Contains(p.Architectures, specs.ArchX32) && !slices.Contains(p.Architectures, abi) {
		abi = specs.ArchX32 // the only ABI that the entry can have had
	}
	if ok && enosysAbove != "" && abi != specs.ArchX32 && nr < x32Bit && slices.Contains(p.Architectures, abi) {
		if last, known := profiles.LastCall(abi, enosysAbove); known && nr > last {
			return unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		}
	}
	architectures := p.Architectures
	if len(architectures) == 0 {
		architectures = []specs.Arch{specs.ArchX86_64}
	}
	if !ok || !slices.Contains(architectures, abi) {
		return unix.SECCOMP_RET_KILL_THREAD
	}
	name, _ := Name(abi, nr)
	for _, rule := range p.Syscalls {
		if name == "" || !slices.Contains(rule.Names, name) {
			continue
		}
		if matches(rule.Args, abi, d) {
			return verdict(rule.Action, rule.ErrnoRet)
		}
	}
	return verdict(p.DefaultAction, p.DefaultErrnoRet)
}

// split tells the ABI and the number without the x32 bit. Number -1 is what a
// tracer sets to skip a call, and belongs to the ABI of the entry.
func split(d *seccompData) (profiles.ABI, uint32, bool) {
	switch d.arch {
	case unix.AUDIT_ARCH_I386:
		return specs.ArchX86, d.nr, true
	case unix.AUDIT_ARCH_X86_64:
		if d.nr >= x32Bit && d.nr != 1<<32-1 {
			return specs.ArchX32, d.nr - x32Bit, true
		}
		return specs.ArchX86_64, d.nr, true
	}
	return "", 0, false
}

func matches(args []specs.LinuxSeccompArg, abi profiles.ABI, d *seccompData) bool {
	perIndex := map[uint]int{}
	repeated := false
	for _, a := range args {
		perIndex[a.Index]++
		repeated = repeated || perIndex[a.Index] > 1
	}
	held := 0
	for _, a := range args {
		v := d.args[a.Index]
		if abi != specs.ArchX86_64 {
			v &= 1<<32 - 1
		}
		var ok bool
		switch a.Op {
		case specs.OpEqualTo:
			ok = v == a.Value
		case specs.OpNotEqual:
			ok = v != a.Value
		case specs.OpLessThan:
			ok = v < a.Value
		case specs.OpLessEqual:
			ok = v <= a.Value
		case specs.OpGreaterEqual:
			ok = v >= a.Value
		case specs.OpGreaterThan:
			ok = v > a.Value
		case specs.OpMaskedEqual:
			ok = v&a.Value == a.ValueTwo&a.Value // seccomp_rule_add(3): the masked datum
		}
		if ok {
			held++
		}
	}
	if repeated { // as runc: one argument twice means OR
		return held > 0
	}
	return held == len(args)
}

// hold compiles p and asks filter and model about every number of every ABI,
// with each of the argument vectors. It returns the distinct answers.
func hold(t *testing.T, p *specs.LinuxSeccomp, opts Options, vectors ...[6]uint64) map[uint32]int {
	t.Helper()
	f, err := Compile(p, opts)
	if err != nil {
		t.Fatalf("compile: %v", err)
	}
	if len(vectors) == 0 {
		vectors = [][6]uint64{{}}
	}
	answers := map[uint32]int{}
	for _, arch := range []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, auditAarch64, 0} {
		for _, nr := range numbers {
			for _, args := range vectors {
				d := seccompData{nr: nr, arch: arch, ip: 1<<63 | 4096, args: args}
				got, err := run(f, &d)
				if err != nil {
					t.Fatal(err)
				}
				answers[got]++
				if want := expected(p, &d, opts.ENOSYSAbove); got != want {
					abi, n, _ := split(&d)
					name, _ := Name(abi, n)
					t.Fatalf("arch %#x nr %#x (%s) args %#x: filter %#x, profile %#x\n%s", arch, nr, name, args, got, want, describe(p))
				}
			}
		}
	}
	return answers
}

func describe(p *specs.LinuxSeccomp) string {
	if p == nil {
		return "none"
	}
	data, err := profiles.EncodeProfile(p)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

func errno(e unix.Errno) *uint { n := uint(e); return &n }

var allABIs = []specs.Arch{specs.ArchX86, specs.ArchX86_64, specs.ArchX32}

func TestFilterIsProfile(t *testing.T) {
	allow := func(names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: specs.ActAllow}
	}
	tests := []struct {
		name string
		p    specs.LinuxSeccomp
		opts Options
	}{
		{"allow all", *profiles.AllowAll(), Options{}},
		{"deny all", specs.LinuxSeccomp{DefaultAction: specs.ActErrno}, Options{}},
		{"default errno", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: errno(unix.ENOSYS), Syscalls: []specs.LinuxSyscall{allow("read")}}, Options{}},
		{"largest errno", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: errno(maxErrno), Architectures: allABIs}, Options{}},
		{"native only", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs[1:2], Syscalls: []specs.LinuxSyscall{allow("read", "openat", "mmap")}}, Options{}},
		{"i386 only", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs[:1], Syscalls: []specs.LinuxSyscall{allow("read", "mmap2", "openat")}}, Options{}},
		{"x32 only", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs[2:], Syscalls: []specs.LinuxSyscall{allow("read", "execve", "ioctl")}}, Options{}},
		{"three", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs, Syscalls: []specs.LinuxSyscall{allow("read", "mmap2", "execve", "arch_prctl", "clock_gettime64")}}, Options{}},
		{"deny list", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: allABIs, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: errno(unix.EACCES)},
			{Names: []string{"ptrace"}, Action: specs.ActKillProcess},
		}}, Options{}},
		{"every action", specs.LinuxSeccomp{DefaultAction: specs.ActLog, Architectures: allABIs, Syscalls: []specs.LinuxSyscall{
			allow("read"),
			{Names: []string{"write"}, Action: specs.ActErrno, ErrnoRet: errno(0)},
			{Names: []string{"open"}, Action: specs.ActTrace, ErrnoRet: errno(7)},
			{Names: []string{"close"}, Action: specs.ActTrap},
			{Names: []string{"connect", "unshare"}[1:], Action: specs.ActNotify},
			{Names: []string{"fork"}, Action: specs.ActKill},
			{Names: []string{"vfork"}, Action: specs.ActKillThread},
			{Names: []string{"stat"}, Action: specs.ActKillProcess},
		}}, Options{}},
		{"rule equal to the default", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno}, allow("write")}}, Options{}},
		{"rendered", *profiles.Render(profiles.Calls{specs.ArchX86_64: {"read", "write"}, specs.ArchX86: {"mmap2"}},
			profiles.RenderOptions{MustAllow: []string{"openat"}, MustDeny: []string{"write"}, NewerThanKernel: NewerThan("6.1.0")}), Options{}},
		{"audit", *profiles.AuditOf(profiles.Render(profiles.Calls{specs.ArchX86_64: {"read"}}, profiles.RenderOptions{NewerThanKernel: NewerThan("6.1.0")})), Options{}},
		{"stub", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs, Syscalls: []specs.LinuxSyscall{allow("read")}}, Options{ENOSYSAbove: "6.1.0-32-cloud-amd64"}},
		{"stub, native only", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs[1:2], Syscalls: []specs.LinuxSyscall{allow("read")}}, Options{ENOSYSAbove: "6.18.5"}},
		{"stub before an allowing default", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: allABIs[:2]}, Options{ENOSYSAbove: "5.10.0"}},
		{"stub for a release that nobody knows", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs}, Options{ENOSYSAbove: "7.99"}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) { hold(t, &tc.p, tc.opts) })
	}
}

// TestFilterAnswersEveryKind guards the test above against a model and a filter
// that agree on nothing but one answer.
func TestFilterAnswersEveryKind(t *testing.T) {
	p := profiles.Render(profiles.Calls{specs.ArchX86_64: {"read"}}, profiles.RenderOptions{NewerThanKernel: NewerThan("6.1.0")})
	got := hold(t, p, Options{ENOSYSAbove: "6.18.5"})
	for _, want := range []uint32{
		unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM),
		unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS), unix.SECCOMP_RET_KILL_THREAD,
	} {
		if got[want] == 0 {
			t.Errorf("no call is answered %#x: %v", want, got)
		}
	}
	if got[unix.SECCOMP_RET_ALLOW] != 1 {
		t.Errorf("%d calls allowed, want read alone", got[unix.SECCOMP_RET_ALLOW])
	}
}

func TestFilterConditions(t *testing.T) {
	ops := []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual}
	edges := []uint64{0, 1, 2, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<32 + 1, 1<<33 + 2, 1 << 63, 1<<64 - 1}
	for _, op := range ops {
		for _, v := range edges {
			p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs[1:2]}
			arg := specs.LinuxSeccompArg{Index: 3, Op: op, Value: v}
			if op == specs.OpMaskedEqual {
				arg.ValueTwo = v & 0x5_5555_5555
			}
			p.Syscalls = []specs.LinuxSyscall{{Names: []string{"getppid"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg}}}
			f, err := Compile(p, Options{})
			if err != nil {
				t.Fatalf("%s %#x: %v", op, v, err)
			}
			for _, x := range append(edges, arg.ValueTwo) {
				d := seccompData{nr: unix.SYS_GETPPID, arch: unix.AUDIT_ARCH_X86_64}
				d.args[3] = x
				got, err := run(f, &d)
				if want := expected(p, &d, ""); err != nil || got != want {
					t.Errorf("%#x %s %#x/%#x: filter %#x (%v), profile %#x", x, op, v, arg.ValueTwo, got, err, want)
				}
			}
		}
	}
}

// TestFilterIncidental: what is allowed without evidence makes threads and not
// processes, and maps no code.
func TestFilterIncidental(t *testing.T) {
	p := profiles.Render(profiles.Calls{specs.ArchX86_64: {"execve"}}, profiles.RenderOptions{Incidental: true})
	const fork, thread = uint64(unix.SIGCHLD), uint64(unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SETTLS)
	const anonymous = uint64(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS)
	hold(t, p, Options{}, [6]uint64{thread, 0, unix.PROT_READ | unix.PROT_WRITE, anonymous}, [6]uint64{fork, 0, unix.PROT_EXEC, 1<<32 | unix.MAP_SHARED},
		[6]uint64{1<<32 | fork, 0, 1<<32 | unix.PROT_EXEC, anonymous}, [6]uint64{1<<32 | thread, 0, 1 << 32, 1<<32 | anonymous})
	f, err := Compile(p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		nr   uint32
		args [6]uint64
		want uint32
	}{
		{"thread", unix.SYS_CLONE, [6]uint64{thread}, unix.SECCOMP_RET_ALLOW},
		{"fork", unix.SYS_CLONE, [6]uint64{fork}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"thread, flags that the kernel cuts off", unix.SYS_CLONE, [6]uint64{1<<63 | thread}, unix.SECCOMP_RET_ALLOW},
		{"thread with a network of its own", unix.SYS_CLONE, [6]uint64{thread | unix.CLONE_NEWNET}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"fork, a bit that the kernel cuts off", unix.SYS_CLONE, [6]uint64{unix.CLONE_THREAD<<32 | fork}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"vfork", unix.SYS_VFORK, [6]uint64{}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"clone3", unix.SYS_CLONE3, [6]uint64{}, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{"data", unix.SYS_MMAP, [6]uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE, anonymous}, unix.SECCOMP_RET_ALLOW},
		{"reserved", unix.SYS_MMAP, [6]uint64{0, 4096, unix.PROT_NONE, anonymous | unix.MAP_FIXED}, unix.SECCOMP_RET_ALLOW},
		{"a file", unix.SYS_MMAP, [6]uint64{0, 4096, unix.PROT_READ, unix.MAP_PRIVATE, 3}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"code", unix.SYS_MMAP, [6]uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC, anonymous}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"guard", unix.SYS_MPROTECT, [6]uint64{0, 4096, unix.PROT_NONE}, unix.SECCOMP_RET_ALLOW},
		{"data to code", unix.SYS_MPROTECT, [6]uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"a signal of the scheduler", unix.SYS_TGKILL, [6]uint64{}, unix.SECCOMP_RET_ALLOW},
		{"any other", unix.SYS_MKDIR, [6]uint64{}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
	} {
		got, err := run(f, &seccompData{nr: tc.nr, arch: unix.AUDIT_ARCH_X86_64, args: tc.args})
		if err != nil || got != tc.want {
			t.Errorf("%s: %#x (%v), want %#x", tc.name, got, err, tc.want)
		}
	}
}

// TestFilterSocketcall: on i386 a name of the socket family is one of two
// ways into the kernel, and libseccomp must let both pass and no other.
func TestFilterSocketcall(t *testing.T) {
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, Architectures: allABIs[:2],
		Syscalls: []specs.LinuxSyscall{{Names: []string{"connect"}, Action: specs.ActAllow}},
	}
	f, err := Compile(p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	const sysSocketcall, sysConnect, subConnect = 102, 362, 3
	for sub := range uint64(22) {
		got, err := run(f, &seccompData{nr: sysSocketcall, arch: unix.AUDIT_ARCH_I386, args: [6]uint64{sub}})
		if allowed := got == unix.SECCOMP_RET_ALLOW; err != nil || allowed != (sub == subConnect) {
			t.Errorf("socketcall(%d): %#x, %v", sub, got, err)
		}
	}
	if got, err := run(f, &seccompData{nr: sysConnect, arch: unix.AUDIT_ARCH_I386}); got != unix.SECCOMP_RET_ALLOW {
		t.Errorf("connect by its own number: %#x, %v", got, err)
	}
}

// multiplexed are names that on i386 are also reached through socketcall and
// ipc, and those two themselves: TestFilterSocketcall has them.
func multiplexed(name string) bool {
	for _, part := range []string{"sock", "send", "recv", "sem", "shm", "msg"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	return slices.Contains([]string{"bind", "connect", "listen", "accept", "accept4", "getpeername", "shutdown", "ipc"}, name)
}

func TestFilterIsRandomProfile(t *testing.T) {
	var names []string
	for _, abi := range allABIs {
		for nr := range uint32(512) {
			if name, ok := Name(abi, nr); ok && !multiplexed(name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	actions := []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActLog, specs.ActTrap, specs.ActKillProcess, specs.ActTrace}
	ops := []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual}
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			p := &specs.LinuxSeccomp{DefaultAction: actions[r.IntN(3)]}
			if p.DefaultAction == specs.ActErrno && r.IntN(2) == 0 {
				p.DefaultErrnoRet = errno(unix.Errno(r.IntN(maxErrno + 1)))
			}
			for _, abi := range allABIs {
				if r.IntN(2) == 0 {
					p.Architectures = append(p.Architectures, abi)
				}
			}
			value := func() uint64 { return uint64(r.IntN(6)) << (r.IntN(4) * 8) }
			shuffled := slices.Clone(names)
			r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
			for range 1 + r.IntN(8) {
				n := 1 + r.IntN(40)
				rule := specs.LinuxSyscall{Names: shuffled[:n], Action: actions[r.IntN(len(actions))]}
				shuffled = shuffled[n:]
				if rule.Action == specs.ActErrno || rule.Action == specs.ActTrace {
					rule.ErrnoRet = errno(unix.Errno(r.IntN(200)))
				}
				alternatives := 1
				if r.IntN(3) == 0 {
					alternatives = 1 + r.IntN(3)
					rule.Names = rule.Names[:1+r.IntN(min(4, len(rule.Names)))]
				}
				for range alternatives {
					one := rule
					one.Args = nil
					if len(rule.Names) <= 4 {
						n := 1 + r.IntN(3)
						if alternatives > 1 {
							n = 1 // see TestOverlappingRules
						}
						for _, index := range r.Perm(6)[:n] {
							one.Args = append(one.Args, specs.LinuxSeccompArg{Index: uint(index), Value: value(), ValueTwo: value(), Op: ops[r.IntN(len(ops))]})
						}
						if r.IntN(4) == 0 {
							one.Args = append(one.Args, specs.LinuxSeccompArg{Index: one.Args[0].Index, Value: value(), Op: specs.OpEqualTo})
						}
					}
					p.Syscalls = append(p.Syscalls, one)
					if one.Args == nil {
						break
					}
				}
			}
			opts := Options{}
			if r.IntN(2) == 0 {
				opts.ENOSYSAbove = []string{"5.10.0", "6.1.0", "6.12.3", "6.18.0"}[r.IntN(4)]
			}
			var vectors [][6]uint64
			for range 6 {
				vectors = append(vectors, [6]uint64{value(), value(), value(), value(), value(), value()})
			}
			hold(t, p, opts, vectors...)
		})
	}
}

// TestOverlappingRules: whatever libseccomp makes of several rules with
// conditions for one call, Compile returns, and either with a filter that is
// the profile or with an error.
func TestOverlappingRules(t *testing.T) {
	ops := []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual}
	r := rand.New(rand.NewPCG(3, 14))
	var wrong, alike, right int
	for range 2000 {
		p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs[1:2]}
		for range 2 + r.IntN(2) {
			rule := specs.LinuxSyscall{Names: []string{"getppid"}, Action: specs.ActAllow}
			for _, i := range r.Perm(3)[:1+r.IntN(3)] {
				rule.Args = append(rule.Args, specs.LinuxSeccompArg{Index: uint(i), Op: ops[r.IntN(len(ops))], Value: r.Uint64N(4), ValueTwo: r.Uint64N(4)})
			}
			p.Syscalls = append(p.Syscalls, rule)
		}
		f, err := Compile(p, Options{})
		var problem *ProfileError
		switch {
		case errors.As(err, &problem):
			alike++
			continue
		case err != nil:
			wrong++
			continue
		}
		right++
		for i := range uint64(125) {
			d := seccompData{nr: unix.SYS_GETPPID, arch: unix.AUDIT_ARCH_X86_64, args: [6]uint64{i % 5, i / 5 % 5, i / 25}}
			if got, err := run(f, &d); err != nil || got != expected(p, &d, "") {
				t.Fatalf("arguments %v: filter %#x, %v\n%s", d.args, got, err, describe(p))
			}
		}
	}
	t.Logf("libseccomp %s: %d right, %d wrong and refused, %d that it would hang on", libraryVersion(), right, wrong, alike)
	if right == 0 || alike == 0 {
		t.Error("the test has lost its subject")
	}
}

// TestFewRules: with hardly a rule for x86_64 beside x32, libseccomp 2.5.4 makes
// filters that compare what they haven't loaded. Compile returns a filter that is
// the profile, or an error.
func TestFewRules(t *testing.T) {
	var names []string
	for _, n := range slices.Concat(numbersOf()[specs.ArchX86_64], numbersOf()[specs.ArchX86]) {
		if !multiplexed(n.name) {
			names = append(names, n.name)
		}
	}
	names = append(names, "waitpid", "mmap2") // which only i386 has
	r := rand.New(rand.NewPCG(11, 5))
	var right, wrong int
	for range 600 {
		p := &specs.LinuxSeccomp{DefaultAction: []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno}[r.IntN(2)], Architectures: allABIs[r.IntN(2):]}
		for i := range 1 + r.IntN(3) {
			rule := specs.LinuxSyscall{Names: []string{names[r.IntN(len(names))]}, Action: specs.ActKillProcess}
			if i == 0 {
				rule.Args = []specs.LinuxSeccompArg{{Index: 1, Value: 1, ValueTwo: 1, Op: specs.OpMaskedEqual}}
			}
			p.Syscalls = append(p.Syscalls, rule)
		}
		if _, err := Compile(p, Options{}); err != nil {
			wrong++
			continue
		}
		right++
		hold(t, p, Options{}, [6]uint64{}, [6]uint64{1, 1})
	}
	t.Logf("libseccomp %s: %d right, %d wrong and refused", libraryVersion(), right, wrong)
	if right == 0 {
		t.Error("the test has lost its subject")
	}
	// A pod's own profile, less what a policy denies.
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: allABIs, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"clone"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: unix.CLONE_NEWUSER, ValueTwo: unix.CLONE_NEWUSER, Op: specs.OpMaskedEqual}}},
		{Names: []string{"socketcall"}, Action: specs.ActErrno},
	}}
	if f, err := Compile(p, Options{}); err == nil {
		d := seccompData{nr: unix.SYS_CLONE, arch: unix.AUDIT_ARCH_X86_64, args: [6]uint64{unix.CLONE_NEWUSER}}
		if got, err := run(f, &d); err != nil || got == unix.SECCOMP_RET_ALLOW {
			t.Errorf("clone(CLONE_NEWUSER) is answered %#x, %v", got, err)
		}
	}
}

// TestOverlapsAccepted: rules that share arguments are no reason to refuse a
// profile when libseccomp gets them right. These are containers-common's, and
// what a policy of address families and types looks like.
func TestOverlapsAccepted(t *testing.T) {
	const netlink, audit = 16, 9
	cond := func(index uint, op specs.LinuxSeccompOperator, value uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: index, Op: op, Value: value}
	}
	rule := func(a specs.LinuxSeccompAction, e *uint, args ...specs.LinuxSeccompArg) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: []string{"socket"}, Action: a, ErrnoRet: e, Args: args}
	}
	common := []specs.LinuxSyscall{
		rule(specs.ActErrno, errno(unix.EINVAL), cond(0, specs.OpEqualTo, netlink), cond(2, specs.OpEqualTo, audit)),
		rule(specs.ActAllow, nil, cond(2, specs.OpNotEqual, audit)),
		rule(specs.ActAllow, nil, cond(0, specs.OpNotEqual, netlink)),
		rule(specs.ActAllow, nil, cond(2, specs.OpNotEqual, audit)),
	}
	families := []specs.LinuxSyscall{
		rule(specs.ActAllow, nil, cond(0, specs.OpEqualTo, 2), cond(1, specs.OpEqualTo, 1)),
		rule(specs.ActAllow, nil, cond(0, specs.OpEqualTo, 2), cond(1, specs.OpEqualTo, 2)),
		rule(specs.ActAllow, nil, cond(0, specs.OpEqualTo, 10), cond(1, specs.OpEqualTo, 1)),
	}
	for name, rules := range map[string][]specs.LinuxSyscall{"containers-common": common, "families": families} {
		p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs[1:2], Syscalls: rules}
		if err := Check(p); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// With i386 runc 1.1.5 fails in the same way: behind socketcall there are no
	// arguments to tell the rules apart by.
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs, Syscalls: common}
	if err := Check(p); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("containers-common with i386: %v, want EEXIST", err)
	}
}

// TestEndlessRules are refused before libseccomp is asked, which never answers.
func TestEndlessRules(t *testing.T) {
	rule := func(first specs.LinuxSeccompOperator, second uint) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
			{Index: second, Value: 2, Op: specs.OpEqualTo}, {Index: 0, Value: 1, ValueTwo: uint64(second), Op: first},
		}}
	}
	for _, op := range []specs.LinuxSeccompOperator{specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterEqual, specs.OpGreaterThan} {
		p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{rule(op, 1), rule(op, 2)}}
		want := "bad seccomp profile: syscalls[1]: read: shares the condition on argument 0 with syscalls[0], and each has one on a higher argument: libseccomp " + libraryVersion() + " would not return from that; use rules with one condition each"
		if err := Check(p); err == nil || err.Error() != want {
			t.Errorf("%s: %v\nwant %s", op, err, want)
		}
	}
}
