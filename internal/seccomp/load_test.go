// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// The tests of loading run this test binary again: a filter can't be taken back.
const helperEnv = "SYSLATCH_SECCOMP_HELPER"

// probes are calls without effect, by x86_64 number with the x32 bit where set.
var probes = []uint32{
	unix.SYS_GETPPID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID, unix.SYS_GETPGRP, unix.SYS_GETPGID,
	unix.SYS_UMASK | 1<<31, unix.SYS_TIMES, unix.SYS_SYSINFO, unix.SYS_MKDIR, unix.SYS_MKDIRAT, unix.SYS_RMDIR, unix.SYS_PTRACE,
	unix.SYS_FCHMODAT2, 469, 470, 471, 500, 1000, 1 << 20,
	unix.SYS_GETPPID | x32Bit, 520 | x32Bit, 470 | x32Bit,
}

// ask makes each probe with arguments that no call takes.
func ask() []uint32 {
	answers := make([]uint32, len(probes))
	for i, nr := range probes {
		const bad = ^uintptr(0)
		_, _, errno := unix.RawSyscall6(uintptr(nr), bad, bad, bad, bad, bad, bad)
		answers[i] = uint32(errno)
	}
	return answers
}

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		if err := helper(mode, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// helper reads a filter from standard input. "ask" loads it on one thread and
// answers what each probe got before and after; "threads" loads it on all and
// answers what another thread gets; "exec" executes its arguments under it,
// "storm" does so under a storm of signals. "receive" and "block" are for other
// tests and read none.
func helper(mode string, args []string) error {
	switch mode {
	case "receive": // one call, of which nothing becomes
		var n notif
		for {
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, 3, unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
			switch errno {
			case 0:
				return nil
			case unix.EINTR, unix.ENOENT: // a signal of Go's came, here or there
			default:
				return errno
			}
		}
	case "block": // for TestBarrier
		return block(os.Getenv("CALL"))
	}
	raw, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	f, err := decode(raw)
	if err != nil {
		return err
	}
	switch mode {
	case "ask":
		runtime.LockOSThread()
		before := ask()
		if err := Load(f, LoadOptions{NoNewPrivs: true, Log: true}); err != nil {
			return err
		}
		after := ask()
		done := make(chan error)
		go func() { // a thread without the filter writes
			done <- binary.Write(os.Stdout, binary.NativeEndian, append(before, after...))
		}()
		return <-done
	case "threads":
		asked, answer := make(chan bool), make(chan []uint32)
		go func() {
			runtime.LockOSThread()
			<-asked
			answer <- ask()
		}()
		runtime.LockOSThread()
		before := ask()
		if err := Load(f, LoadOptions{NoNewPrivs: true, AllThreads: true}); err != nil {
			return err
		}
		asked <- true
		return binary.Write(os.Stdout, binary.NativeEndian, append(before, <-answer...))
	case "exec":
		return LoadAndExec(f, ExecOptions{NoNewPrivs: true, ExitOnFailure: 126}, args[0], args, []string{"GREETING=hello"})
	case "handover": // exec, with the listener sent over descriptor 3
		conn, err := inherited(3)
		if err != nil {
			return err
		}
		h := &Handover{Conn: conn, State: specs.ContainerProcessState{Metadata: os.Getenv("METADATA"), State: specs.State{ID: "a run"}}}
		h.WaitKillable = os.Getenv("WAIT_KILLABLE") != ""
		h.State.Metadata += strings.Repeat("x", sizeOf(os.Getenv("LONG")))
		status, _ := strconv.Atoi(os.Getenv("STATUS"))
		if os.Getenv("STORM") != "" {
			runtime.LockOSThread()
			storm()
		}
		return LoadAndExec(f, ExecOptions{NoNewPrivs: true, ExitOnFailure: status, Handover: h}, args[0], args, nil)
	case "storm": // exec, while another thread sends signals to this one
		runtime.LockOSThread()
		storm()
		return LoadAndExec(f, ExecOptions{NoNewPrivs: true, ExitOnFailure: 126}, args[0], args, nil)
	case "refused":
		// Without CAP_SYS_ADMIN the kernel wants no_new_privs.
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		runtime.LockOSThread()
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			return err
		}
		for _, err := range []error{
			Load(f, LoadOptions{}),
			LoadAndExec(f, ExecOptions{}, "/bin/true", []string{"true"}, nil),
		} {
			if !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "no_new_privs") {
				return fmt.Errorf("loaded without privilege, or another error: %w", err)
			}
		}
		return nil
	}
	return fmt.Errorf("no helper %q", mode)
}

// storm sends signals to the calling thread, until the execve ends the sender.
func storm() {
	pid, tid := os.Getpid(), unix.Gettid()
	go func() {
		for unix.Tgkill(pid, tid, unix.SIGURG) == nil {
		}
	}()
}

// runHelper runs this binary under a filter.
func runHelper(t *testing.T, f Filter, mode string, args ...string) (stdout, stderr []byte, status int) {
	t.Helper()
	var in, out, errs bytes.Buffer
	if err := binary.Write(&in, binary.NativeEndian, []unix.SockFilter(f)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperEnv+"="+mode)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.Bytes(), errs.Bytes(), cmd.ProcessState.ExitCode()
}

// TestKernelAnswersAsFilter: what the interpreter of these tests makes of a
// filter is what the kernel makes of it.
func TestKernelAnswersAsFilter(t *testing.T) {
	open := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: allABIs, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"getppid", "mkdir"}, Action: specs.ActErrno, ErrnoRet: errno(unix.EACCES)},
		{Names: []string{"getuid"}, Action: specs.ActErrno, ErrnoRet: errno(0)},
		{Names: []string{"getgid"}, Action: specs.ActErrno, ErrnoRet: errno(maxErrno)},
		{Names: []string{"geteuid"}, Action: specs.ActLog},
		{Names: []string{"mkdirat"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 1<<64 - 1, Op: specs.OpEqualTo}}},
		{Names: []string{"rmdir"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 1<<64 - 1, Op: specs.OpNotEqual}}},
	}}
	// A Go program's own calls, beside what is asked.
	goCalls := []string{
		"read", "write", "futex", "nanosleep", "clock_nanosleep", "epoll_pwait", "epoll_ctl", "sched_yield", "rt_sigreturn",
		"rt_sigprocmask", "sigaltstack", "mmap", "munmap", "madvise", "clone", "clone3", "gettid", "getpid", "tgkill", "exit_group", "close", "fcntl", "eventfd2",
		"mprotect", "set_robust_list", "rseq", "rt_sigaction", "prctl", "sched_getaffinity", "restart_syscall", "brk", "getrandom",
	} // starting a thread
	closed := profiles.Render(profiles.Calls{specs.ArchX86_64: goCalls}, profiles.RenderOptions{
		MustAllow: []string{"getppid", "times"}, Architectures: allABIs, NewerThanKernel: NewerThan("6.1.0"),
	})
	for name, tc := range map[string]struct {
		p    *specs.LinuxSeccomp
		opts Options
	}{
		"deny list":             {open, Options{}},
		"allow list":            {closed, Options{}},
		"allow list and ENOSYS": {closed, Options{ENOSYSAbove: KernelRelease()}},
		"allow all":             {profiles.AllowAll(), Options{}},
		"dry run":               {profiles.AuditOf(closed), Options{}},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := Compile(tc.p, tc.opts)
			if err != nil {
				t.Fatal(err)
			}
			for _, mode := range []string{"ask", "threads"} {
				out, errs, status := runHelper(t, f, mode)
				answers := make([]uint32, 2*len(probes))
				if err := binary.Read(bytes.NewReader(out), binary.NativeEndian, answers); err != nil || status != 0 {
					t.Fatalf("%s: status %d, %v: %s", mode, status, err, errs)
				}
				seen := map[uint32]bool{}
				for i, nr := range probes {
					const bad = 1<<64 - 1
					ret, err := run(f, &seccompData{nr: nr, arch: unix.AUDIT_ARCH_X86_64, args: [6]uint64{bad, bad, bad, bad, bad, bad}})
					if err != nil {
						t.Fatal(err)
					}
					seen[ret] = true
					want := answers[i] // as before the filter
					switch ret & unix.SECCOMP_RET_ACTION_FULL {
					case unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_LOG:
					case unix.SECCOMP_RET_ERRNO:
						want = ret & unix.SECCOMP_RET_DATA
					default:
						t.Fatalf("call %#x would be answered %#x", nr, ret)
					}
					if got := answers[len(probes)+i]; got != want {
						t.Errorf("%s: call %#x: errno %d, want %d (filter %#x)", mode, nr, got, want, ret)
					}
				}
				if name != "allow all" && len(seen) < 2 {
					t.Errorf("only one answer: %v", seen)
				}
			}
		})
	}
}

// exitProgram is a static program whose only call is exit_group(7).
func exitProgram(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "exit")
	gcc := exec.Command("gcc", "-x", "assembler", "-nostdlib", "-static", "-o", program, "-")
	gcc.Stdin = strings.NewReader(".globl _start\n_start:\tmov $231, %eax\n\tmov $7, %edi\n\tsyscall\n")
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s (cgo needs a C compiler, so this can't be)", err, out)
	}
	return program
}

// TestLoadAndExecCallsNothingElse: under a filter that kills the process for any
// other call, only an execve lies between its load and the new program.
func TestLoadAndExecCallsNothingElse(t *testing.T) {
	program := exitProgram(t)
	f, err := Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActKillProcess, Architectures: allABIs[1:2],
		Syscalls: []specs.LinuxSyscall{{Names: []string{"execve", "exit_group"}, Action: specs.ActAllow}},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"exec", "storm"} { // signals: the Go scheduler sends them, too
		for range 20 {
			if out, errs, status := runHelper(t, f, mode, program); status != 7 || len(out)+len(errs) > 0 {
				t.Fatalf("%s: status %d: %s%s", mode, status, out, errs)
			}
		}
	}
}

func TestLoadAndExecHandsOverArguments(t *testing.T) {
	out, errs, status := runHelper(t, AllowAllFilter(), "exec", "/bin/sh", "-c", `echo "$GREETING $1"; grep -E '^(NoNewPrivs|Seccomp|Seccomp_filters):' /proc/self/status; env | grep -c `+helperEnv, "sh", "world")
	want := "hello world\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t"
	if !strings.HasPrefix(string(out), want) || !strings.HasSuffix(string(out), "\n0\n") || status != 1 { // grep -c found none
		t.Errorf("status %d: %q %s", status, out, errs)
	}
}

func TestLoadAndExecFails(t *testing.T) {
	noExec := &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: allABIs,
		Syscalls: []specs.LinuxSyscall{{Names: []string{"execve"}, Action: specs.ActErrno}},
	}
	tight := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, Architectures: allABIs,
		Syscalls: []specs.LinuxSyscall{{Names: []string{"execve", "write", "exit_group"}, Action: specs.ActAllow}},
	}
	for _, tc := range []struct {
		name string
		p    *specs.LinuxSeccomp
		path string
		want string
	}{
		{"denied", noExec, "/bin/true", "syslatch: execute /bin/true: operation not permitted (does the profile allow execve?)\n"},
		{"missing, under a tight filter", tight, "/nonexistent", "syslatch: execute /nonexistent: no such file or directory\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, err := Compile(tc.p, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if _, errs, status := runHelper(t, f, "exec", tc.path); status != 126 || string(errs) != tc.want {
				t.Errorf("status %d, %q, want 126, %q", status, errs, tc.want)
			}
		})
	}
	for name, err := range map[string]error{
		"no filter":         LoadAndExec(nil, ExecOptions{}, "/bin/true", []string{"true"}, nil),
		"long filter":       LoadAndExec(make(Filter, unix.BPF_MAXINSNS+1), ExecOptions{}, "/bin/true", []string{"true"}, nil),
		"NUL in path":       LoadAndExec(AllowAllFilter(), ExecOptions{}, "/bin/\x00true", []string{"true"}, nil),
		"NUL in argument":   LoadAndExec(AllowAllFilter(), ExecOptions{}, "/bin/true", []string{"\x00"}, nil),
		"NUL in env":        LoadAndExec(AllowAllFilter(), ExecOptions{}, "/bin/true", []string{"true"}, []string{"\x00"}),
		"load no filter":    Load(nil, LoadOptions{}),
		"load long filter":  Load(make(Filter, unix.BPF_MAXINSNS+1), LoadOptions{}),
		"load a bad filter": Load(Filter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 3}}, LoadOptions{}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestLoadNeedsPrivilege(t *testing.T) {
	if _, errs, status := runHelper(t, AllowAllFilter(), "refused"); status != 0 {
		t.Errorf("status %d: %s", status, errs)
	}
}

// TestCompileConcurrently: libseccomp isn't documented as safe for threads; the
// filters that threads compile at once are those that one compiles alone.
func TestCompileConcurrently(t *testing.T) {
	var compiled []Filter
	var list []*specs.LinuxSeccomp
	for i := range 8 {
		var names []string
		for nr := range uint32(400) {
			if name, ok := Name(specs.ArchX86_64, nr); ok && int(nr)%8 != i {
				names = append(names, name)
			}
		}
		p := profiles.Render(profiles.Calls{specs.ArchX86_64: names}, profiles.RenderOptions{Architectures: allABIs[:1+i%3]})
		f, err := Compile(p, Options{})
		if err != nil {
			t.Fatal(err)
		}
		list, compiled = append(list, p), append(compiled, f)
	}
	var wg sync.WaitGroup
	for i := range list {
		wg.Go(func() {
			for range 5 {
				f, err := Compile(list[i], Options{})
				if err != nil || !equalFilters(f, compiled[i]) {
					t.Errorf("profile %d: %d instructions, want %d: %v", i, len(f), len(compiled[i]), err)
				}
				for nr := range uint32(400) {
					if name, ok := Name(specs.ArchX86, nr); ok {
						if got, ok := Number(specs.ArchX86, name); !ok || got != nr {
							t.Errorf("%s: %d, want %d", name, got, nr)
						}
					}
				}
				if s, err := Info(); err != nil || s.Library == "" {
					t.Errorf("info: %+v, %v", s, err)
				}
			}
		})
	}
	wg.Wait()
}

func equalFilters(a, b Filter) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
