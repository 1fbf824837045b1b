// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// Bounds of a profile, far above what is real: libseccomp's compile time grows
// with the square of the rules, and with the cube of those with two conditions. A
// plugin has some seconds for an answer, and a call into libseccomp can't be
// interrupted.
const (
	maxRules  = 4096
	maxNames  = 2048 // there are some 500 calls
	maxArches = 64
	// libseccomp crashes on 100,000 conditions (its stack), after minutes.
	maxConditions = 2048
	// libseccomp takes less than the kernel's MAX_ERRNO, 4095.
	maxErrno = 4094
)

var actions = map[specs.LinuxSeccompAction]libseccomp.ScmpAction{
	specs.ActKill:        libseccomp.ActKillThread,
	specs.ActKillThread:  libseccomp.ActKillThread,
	specs.ActKillProcess: libseccomp.ActKillProcess,
	specs.ActTrap:        libseccomp.ActTrap,
	specs.ActErrno:       libseccomp.ActErrno,
	specs.ActTrace:       libseccomp.ActTrace,
	specs.ActAllow:       libseccomp.ActAllow,
	specs.ActLog:         libseccomp.ActLog,
	specs.ActNotify:      libseccomp.ActNotify,
}

var operators = map[specs.LinuxSeccompOperator]libseccomp.ScmpCompareOp{
	specs.OpNotEqual:     libseccomp.CompareNotEqual,
	specs.OpLessThan:     libseccomp.CompareLess,
	specs.OpLessEqual:    libseccomp.CompareLessOrEqual,
	specs.OpEqualTo:      libseccomp.CompareEqual,
	specs.OpGreaterEqual: libseccomp.CompareGreaterEqual,
	specs.OpGreaterThan:  libseccomp.CompareGreater,
	specs.OpMaskedEqual:  libseccomp.CompareMaskedEqual,
}

// Options of Compile.
type Options struct {
	// ENOSYSAbove answers ENOSYS to numbers above the last call of the kernel
	// with this release (uname -r), as runc does for numbers above the highest
	// that a profile names: libc then falls back to an older call. Empty leaves
	// them to the profile's default action.
	ENOSYSAbove string
}

// Filter is a classic BPF program for seccomp(2).
type Filter []unix.SockFilter

// AllowAllFilter allows every call of every ABI: it only counts as a filter.
func AllowAllFilter() Filter {
	return Filter{{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}}
}

// ProfileError lists all that is wrong with a profile.
type ProfileError struct{ Problems []error }

func (e *ProfileError) Error() string {
	return fmt.Sprintf("bad seccomp profile: %v", errors.Join(e.Problems...))
}

// Unwrap gives the single problems.
func (e *ProfileError) Unwrap() []error { return e.Problems }

// Check compiles a profile without keeping the result. A *ProfileError names
// everything that is wrong, by position.
func Check(p *specs.LinuxSeccomp) error {
	_, err := Compile(p, Options{})
	return err
}

// Compile makes the filter that a runtime would load for a profile. Unlike
// runtimes, which skip a name that their libseccomp doesn't know, it refuses it:
// a profile that silently allows less than it says is a crash later.
func Compile(p *specs.LinuxSeccomp, opts Options) (Filter, error) {
	problems := lint(p)
	var at map[string][][6]uint64
	if len(problems) == 0 {
		var err error
		if at, err = points(p); err != nil {
			problems = []error{err}
		}
	}
	if len(problems) > 0 {
		return nil, &ProfileError{problems}
	}
	action, _ := actionOf(p.DefaultAction, p.DefaultErrnoRet)
	f, err := libseccomp.NewFilter(action)
	if err != nil {
		return nil, fmt.Errorf("libseccomp: new filter: %w", err)
	}
	defer f.Release()
	if err := addArches(f, p.Architectures); err != nil {
		return nil, err
	}
	for i, rule := range p.Syscalls {
		if err := addRule(f, action, rule); err != nil {
			return nil, fmt.Errorf("syscalls[%d]: %w", i, err)
		}
	}
	raw, err := export(f)
	if err != nil {
		return nil, fmt.Errorf("libseccomp: export: %w", err)
	}
	filter, err := decode(raw)
	if err != nil {
		return nil, err
	}
	if err := verify(p, filter, at); err != nil {
		return nil, err
	}
	if opts.ENOSYSAbove != "" {
		filter = append(enosysStub(p.Architectures, opts.ENOSYSAbove), filter...)
	}
	return filter, nil
}

// lint finds what can be found without libseccomp's compiler.
func lint(p *specs.LinuxSeccomp) (problems []error) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if p == nil {
		return []error{errors.New("no profile")}
	}
	if _, err := actionOf(p.DefaultAction, p.DefaultErrnoRet); err != nil {
		bad("defaultAction: %w", err)
	}
	if p.DefaultAction == specs.ActNotify {
		bad("defaultAction: SCMP_ACT_NOTIFY can't be the default (init would hang on its own listener)")
	}
	if len(p.Architectures) > maxArches {
		bad("%d architectures: more than %d", len(p.Architectures), maxArches)
		return problems
	}
	for i, a := range p.Architectures {
		if _, ok := arches[a]; !ok {
			bad("architectures[%d]: unknown architecture %q", i, a)
		}
	}
	names, conditions := 0, 0
	for _, rule := range p.Syscalls {
		names += len(rule.Names)
		conditions += len(rule.Names) * len(rule.Args)
	}
	if conditions > maxConditions {
		bad("%d conditions (each counted for each name): more than %d", conditions, maxConditions)
		return problems
	}
	if len(p.Syscalls) > maxRules || names > maxNames {
		bad("%d rules with %d names: more than %d or %d", len(p.Syscalls), names, maxRules, maxNames)
		return problems
	}
	for i, rule := range p.Syscalls {
		if _, err := actionOf(rule.Action, rule.ErrnoRet); err != nil {
			bad("syscalls[%d].action: %w", i, err)
		}
		if len(rule.Names) == 0 {
			bad("syscalls[%d].names: empty", i)
		}
		for j, name := range rule.Names {
			if !Known(name) {
				bad("syscalls[%d].names[%d]: libseccomp %s doesn't know %q (a newer libseccomp may)", i, j, libraryVersion(), name)
			}
		}
		for j, arg := range rule.Args {
			if arg.Index > 5 {
				bad("syscalls[%d].args[%d].index: %d, want 0 to 5", i, j, arg.Index)
			}
			if _, ok := operators[arg.Op]; !ok {
				bad("syscalls[%d].args[%d].op: unknown operator %q", i, j, arg.Op)
			}
		}
	}
	if len(problems) == 0 {
		problems = endless(p)
	}
	return problems
}

func actionOf(a specs.LinuxSeccompAction, errno *uint) (libseccomp.ScmpAction, error) {
	action, ok := actions[a]
	if !ok {
		return libseccomp.ActInvalid, fmt.Errorf("unknown action %q", a)
	}
	if a != specs.ActErrno && a != specs.ActTrace {
		return action, nil
	}
	code := uint(unix.EPERM) // the runtime-spec's default
	if errno != nil {
		code = *errno
	}
	if code > maxErrno {
		return action, fmt.Errorf("errno %d, want at most %d", code, maxErrno)
	}
	return action.SetReturnCode(int16(code)), nil
}

// addArches makes the filter's architectures exactly those listed; none means
// the native one, as runtimes have it.
func addArches(f *libseccomp.ScmpFilter, list []specs.Arch) error {
	native, err := libseccomp.GetNativeArch()
	if err != nil {
		return fmt.Errorf("libseccomp: native architecture: %w", err)
	}
	keepNative := len(list) == 0
	for _, a := range list {
		arch := arches[a]
		keepNative = keepNative || arch == native
		if err := f.AddArch(arch); err != nil {
			return fmt.Errorf("libseccomp: architecture %s: %w", a, err)
		}
	}
	if !keepNative {
		if err := f.RemoveArch(native); err != nil {
			return fmt.Errorf("libseccomp: remove native architecture: %w", err)
		}
	}
	return nil
}

func addRule(f *libseccomp.ScmpFilter, byDefault libseccomp.ScmpAction, rule specs.LinuxSyscall) error {
	action, _ := actionOf(rule.Action, rule.ErrnoRet)
	if action == byDefault {
		return nil // libseccomp refuses a rule that changes nothing (EACCES)
	}
	var conditions []libseccomp.ScmpCondition
	for _, arg := range rule.Args {
		values := []uint64{arg.Value}
		if arg.Op == specs.OpMaskedEqual {
			values = []uint64{arg.Value, arg.ValueTwo}
		}
		c, err := libseccomp.MakeCondition(arg.Index, operators[arg.Op], values...)
		if err != nil {
			return fmt.Errorf("condition on argument %d: %w", arg.Index, err)
		}
		conditions = append(conditions, c)
	}
	split := repeats(rule.Args)
	for _, name := range rule.Names {
		nr, err := libseccomp.GetSyscallFromName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		sets := [][]libseccomp.ScmpCondition{conditions}
		if split {
			sets = nil
			for _, c := range conditions {
				sets = append(sets, []libseccomp.ScmpCondition{c})
			}
		}
		for _, set := range sets {
			if len(set) == 0 {
				err = f.AddRule(nr, action)
			} else {
				err = f.AddRuleConditional(nr, action, set)
			}
			if err != nil {
				return fmt.Errorf("libseccomp: rule for %s: %w", name, err)
			}
		}
	}
	return nil
}

// export goes through a memfd: libseccomp 2.5 has no export to memory.
func export(f *libseccomp.ScmpFilter) ([]byte, error) {
	fd, err := unix.MemfdCreate("syslatch-filter", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), "filter")
	defer file.Close()
	if err := f.ExportBPF(file); err != nil {
		return nil, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(file)
}

// decode reads an array of struct sock_filter in host byte order, which on
// every ABI that we record is little-endian.
func decode(raw []byte) (Filter, error) {
	const size = 8
	if len(raw) == 0 || len(raw)%size != 0 {
		return nil, fmt.Errorf("libseccomp: exported filter of %d bytes", len(raw))
	}
	if n := len(raw) / size; n > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("filter of %d instructions, the kernel takes %d: make the profile smaller", n, unix.BPF_MAXINSNS)
	}
	f := make(Filter, 0, len(raw)/size)
	for i := 0; i < len(raw); i += size {
		f = append(f, unix.SockFilter{
			Code: binary.NativeEndian.Uint16(raw[i:]),
			Jt:   raw[i+2], Jf: raw[i+3],
			K: binary.NativeEndian.Uint32(raw[i+4:]),
		})
	}
	return f, nil
}

// auditArch are the values of seccomp_data.arch (linux/audit.h) that two ABIs
// may share: x32 is x86_64 with a bit in the number.
var auditArch = map[specs.Arch]uint32{
	specs.ArchX86_64: unix.AUDIT_ARCH_X86_64,
	specs.ArchX86:    unix.AUDIT_ARCH_I386,
}

// enosysStub answers ENOSYS to numbers above the kernel's last, and passes the
// rest on to what follows it. Only for architectures that the filter lists: the
// others stay with its answer to a bad architecture.
func enosysStub(list []specs.Arch, release string) Filter {
	const offsetNr, offsetArch = 0, 4 // struct seccomp_data
	var stub Filter
	for _, a := range list {
		audit, ok := auditArch[a]
		last, known := profiles.LastCall(a, release)
		if !ok || !known {
			continue
		}
		top := uint32(x32Bit - 1) // x32 numbers are not x86_64's
		stub = append(stub,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offsetArch},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: audit, Jf: 4},
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offsetNr},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, K: top, Jt: 2},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, K: last, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		)
	}
	return stub
}
