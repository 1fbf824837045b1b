// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

func TestNameAndNumber(t *testing.T) {
	tests := []struct {
		abi  profiles.ABI
		nr   uint32
		name string
	}{
		{specs.ArchX86_64, 0, "read"},
		{specs.ArchX86_64, 59, "execve"},
		{specs.ArchX86_64, 435, "clone3"},
		{specs.ArchX86, 3, "read"},
		{specs.ArchX86, 11, "execve"},
		{specs.ArchX86, 192, "mmap2"},
		{specs.ArchX86, 102, "socketcall"},
		{specs.ArchX86, 117, "ipc"},
		{specs.ArchX86, 359, "socket"},
		{specs.ArchX86, 362, "connect"},
		{specs.ArchX86, 393, "semget"},
		{specs.ArchX32, 0, "read"},
		{specs.ArchX32, 520, "execve"},
		{specs.ArchX32, 514, "ioctl"},
		{specs.ArchAARCH64, 63, "read"},
	}
	for _, tc := range tests {
		if name, ok := Name(tc.abi, tc.nr); !ok || name != tc.name {
			t.Errorf("%s %d: %q %t, want %s", tc.abi, tc.nr, name, ok, tc.name)
		}
		if nr, ok := Number(tc.abi, tc.name); !ok || nr != tc.nr {
			t.Errorf("%s %s: %d %t, want %d", tc.abi, tc.name, nr, ok, tc.nr)
		}
	}
	for _, nr := range []uint32{1023, x32Bit, x32Bit + 1, 1 << 31, 1<<32 - 1, 1<<32 - 101} {
		for _, abi := range allABIs {
			if name, ok := Name(abi, nr); ok {
				t.Errorf("%s %#x is %q", abi, nr, name)
			}
		}
	}
	for _, tc := range []multiplexedCall{
		{specs.ArchX86_64, "mmap2"},
		{specs.ArchX86_64, "socketcall"},
		{specs.ArchX86, "arm_fadvise64_64"},
		{specs.ArchX86, "accept"},
		{specs.ArchX86, "semop"}, // behind socketcall and ipc only
		{specs.ArchX86_64, ""},
		{specs.ArchX86_64, "re\x00ad"},
		{specs.ArchX86_64, "read\x00"},
		{specs.ArchX86_64, "READ"},
		{"SCMP_ARCH_VAX", "read"},
	} {
		if nr, ok := Number(tc.abi, tc.name); ok {
			t.Errorf("%s %q: %d", tc.abi, tc.name, nr)
		}
	}
	if name, ok := Name("SCMP_ARCH_VAX", 0); ok {
		t.Error(name)
	}
}

// TestNumberInvertsName over all numbers: a call that is recorded by number and
// rendered by name is the same call again.
func TestNumberInvertsName(t *testing.T) {
	for _, abi := range allABIs {
		names := 0
		for nr := range uint32(1024) {
			name, ok := Name(abi, nr)
			if !ok {
				continue
			}
			names++
			if !Known(name) {
				t.Errorf("%s %d: %s is not known", abi, nr, name)
			}
			if got, ok := Number(abi, name); !ok || got != nr {
				t.Errorf("%s %d is %s, which is %d %t", abi, nr, name, got, ok)
			}
		}
		if names < 300 {
			t.Errorf("%s: %d names", abi, names)
		}
	}
}

func TestKnown(t *testing.T) {
	for _, name := range []string{"read", "mmap2", "socketcall", "arm_fadvise64_64", "riscv_flush_icache", "accept"} {
		if !Known(name) {
			t.Errorf("%s is not known", name)
		}
	}
	for _, name := range []string{"", "raed", "read ", "READ", "read\x00", "\xff"} {
		if Known(name) {
			t.Errorf("%q is known", name)
		}
	}
}

func TestNewerThan(t *testing.T) {
	got := NewerThan("6.1.0-32-cloud-amd64")
	if !slices.IsSorted(got) || !slices.Contains(got, "cachestat") || slices.Contains(got, "futex_waitv") {
		t.Errorf("newer than 6.1: %q", got)
	}
	if older := NewerThan("5.10.0"); !slices.Contains(older, "futex_waitv") || len(older) <= len(got) {
		t.Errorf("newer than 5.10: %q", older)
	}
	for _, release := range []string{"", "7.99", "4.19.0", "x"} {
		if got := NewerThan(release); len(got) != 0 {
			t.Errorf("newer than %q: %q", release, got)
		}
	}
	got[0] = "changed"
	if again := NewerThan("6.1.0-32-cloud-amd64"); again[0] == "changed" {
		t.Error("a caller changed the next one's answer")
	}
}

// TestLastCallOfThisKernel holds profiles' table to the kernel that runs: the
// last number is a call, those above it are none.
func TestLastCallOfThisKernel(t *testing.T) {
	release := KernelRelease()
	last, ok := profiles.LastCall(specs.ArchX86_64, release)
	if !ok {
		t.Fatalf("the table doesn't know %s: extend it", release)
	}
	const bad = ^uintptr(0) // no pointer, descriptor, address or length
	if _, _, errno := unix.RawSyscall6(uintptr(last), bad, bad, bad, bad, bad, bad); errno == unix.ENOSYS {
		t.Errorf("%s has no call %d", release, last)
	}
	for nr := last + 1; nr < last+20; nr++ {
		if _, _, errno := unix.RawSyscall6(uintptr(nr), bad, bad, bad, bad, bad, bad); errno != unix.ENOSYS {
			t.Errorf("%s has a call %d (%v)", release, nr, errno)
		}
	}
}
