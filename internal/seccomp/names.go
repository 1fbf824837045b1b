// SPDX-License-Identifier: Apache-2.0

// Package seccomp is syslatch's use of libseccomp, and the only cgo: names of
// system calls by ABI, checking and compiling profiles, and loading filters.
//
//	err := seccomp.Check(profile)                              // all that is wrong with it
//	filter, err := seccomp.Compile(profile, seccomp.Options{}) // classic BPF
//	err = seccomp.LoadAndExec(filter, seccomp.ExecOptions{}, path, argv, env)
package seccomp

import (
	"slices"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// arches are libseccomp's values of the runtime-spec's architectures.
var arches = map[specs.Arch]libseccomp.ScmpArch{
	specs.ArchX86:         libseccomp.ArchX86,
	specs.ArchX86_64:      libseccomp.ArchAMD64,
	specs.ArchX32:         libseccomp.ArchX32,
	specs.ArchARM:         libseccomp.ArchARM,
	specs.ArchAARCH64:     libseccomp.ArchARM64,
	specs.ArchMIPS:        libseccomp.ArchMIPS,
	specs.ArchMIPS64:      libseccomp.ArchMIPS64,
	specs.ArchMIPS64N32:   libseccomp.ArchMIPS64N32,
	specs.ArchMIPSEL:      libseccomp.ArchMIPSEL,
	specs.ArchMIPSEL64:    libseccomp.ArchMIPSEL64,
	specs.ArchMIPSEL64N32: libseccomp.ArchMIPSEL64N32,
	specs.ArchPPC:         libseccomp.ArchPPC,
	specs.ArchPPC64:       libseccomp.ArchPPC64,
	specs.ArchPPC64LE:     libseccomp.ArchPPC64LE,
	specs.ArchS390:        libseccomp.ArchS390,
	specs.ArchS390X:       libseccomp.ArchS390X,
	specs.ArchRISCV64:     libseccomp.ArchRISCV64,
}

const x32Bit = 0x40000000 // __X32_SYSCALL_BIT

// Name is libseccomp's name of a call number under an ABI. x32 numbers carry no
// x32 bit.
func Name(abi profiles.ABI, nr uint32) (string, bool) {
	arch, ok := arches[abi]
	if !ok || nr >= x32Bit {
		return "", false
	}
	if abi == specs.ArchX32 {
		nr |= x32Bit
	}
	name, err := libseccomp.ScmpSyscall(nr).GetNameByArch(arch)
	return name, err == nil
}

// Number is the number of a call under an ABI, without the x32 bit: the inverse
// of Name. Calls that the ABI doesn't have are unknown.
//
// i386 has two ways to sockets and System V IPC: numbers of their own (connect is
// 362, since Linux 4.3) and the multiplexers socketcall (102) and ipc (117), each
// a call in its own right here, as the kernel's entry sees it. libseccomp stands
// pseudo numbers (below 0) for the names and makes one rule into two: a profile
// that allows connect allows it both ways on i386, and one that allows socketcall,
// as a recording of it does, allows all that is behind it. accept, semop and
// others have no number of their own there, and are unknown.
func Number(abi profiles.ABI, name string) (uint32, bool) {
	arch, ok := arches[abi]
	if !ok || strings.ContainsRune(name, 0) {
		return 0, false
	}
	nr, err := libseccomp.GetSyscallFromNameByArch(name, arch)
	switch {
	case err != nil:
		return 0, false
	case nr < 0:
		nr, ok := multiplexedNumbers()[multiplexedCall{abi, name}]
		return nr, ok
	case abi == specs.ArchX32:
		return uint32(nr) &^ x32Bit, true
	}
	return uint32(nr), true
}

type multiplexedCall struct {
	abi  profiles.ABI
	name string
}

// multiplexedNumbers are the real numbers of calls for which libseccomp answers
// with a pseudo number, although it names them when asked the other way round.
var multiplexedNumbers = sync.OnceValue(func() map[multiplexedCall]uint32 {
	out := map[multiplexedCall]uint32{}
	for nr := range uint32(512) {
		name, ok := Name(specs.ArchX86, nr)
		if !ok {
			continue
		}
		if n, err := libseccomp.GetSyscallFromNameByArch(name, libseccomp.ArchX86); err == nil && n < 0 {
			out[multiplexedCall{specs.ArchX86, name}] = nr
		}
	}
	return out
})

// Known says whether libseccomp knows a call of that name under any ABI.
func Known(name string) bool {
	if name == "" || strings.ContainsRune(name, 0) {
		return false
	}
	// Names that only other ABIs have resolve to a negative pseudo number.
	_, err := libseccomp.GetSyscallFromName(name)
	return err == nil
}

// WithoutUnknown is p without the names that own has, too, and that libseccomp
// here doesn't know: for checking what is made from a container's own profile.
// Engines list every call that they have heard of (containerd 2.4.2 has 12 that
// libseccomp 2.5.4 lacks), and runtimes skip what their libseccomp doesn't know.
// It may be another libseccomp, so what is injected keeps the names. own may be
// nil.
func WithoutUnknown(p, own *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	if own == nil {
		return p
	}
	unknown := map[string]bool{}
	for _, rule := range own.Syscalls {
		for _, name := range rule.Names {
			if !Known(name) {
				unknown[name] = true
			}
		}
	}
	out := *p
	out.Syscalls = nil
	for _, rule := range p.Syscalls {
		names := slices.DeleteFunc(slices.Clone(rule.Names), func(name string) bool { return unknown[name] })
		if len(names) == 0 && len(rule.Names) > 0 {
			continue
		}
		rule.Names = names
		out.Syscalls = append(out.Syscalls, rule)
	}
	return &out
}

// KernelRelease is uname -r, such as "6.1.0-32-cloud-amd64".
func KernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "" // can't fail with a valid pointer
	}
	return unix.ByteSliceToString(u.Release[:])
}

// newerCache keeps NewerThan's answers: a host has one kernel.
var newerCache sync.Map // release -> []string

// NewerThan lists, sorted, the x86 call names that libseccomp knows and the
// kernel of that release (uname -r) does not have yet. It is empty for a
// release that profiles.LastCall doesn't know.
func NewerThan(release string) []string {
	if names, ok := newerCache.Load(release); ok {
		return slices.Clone(names.([]string))
	}
	var names []string
	for _, abi := range []profiles.ABI{specs.ArchX86_64, specs.ArchX86} {
		last, ok := profiles.LastCall(abi, release)
		if !ok {
			continue
		}
		for nr := last + 1; nr < 512; nr++ {
			if name, ok := Name(abi, nr); ok {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	newerCache.Store(release, names)
	return slices.Clone(names)
}
