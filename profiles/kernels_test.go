// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestLastCall(t *testing.T) {
	tests := []struct {
		release      string
		x86_64, i386 uint32
	}{
		{"5.9.0", 439, 439},
		{"5.10.0-32-amd64", 440, 440},
		{"5.13.19", 446, 446},
		{"5.14.0-570.el9.x86_64", 447, 447},
		{"6.1.0-32-cloud-amd64", 450, 450},
		{"6.4", 450, 450},
		{"6.6.100", 453, 452},
		{"6.7.0", 456, 456},
		{"6.12.43+deb13-amd64", 462, 462},
		{"6.16.1", 467, 467},
		{"6.18.44-fc", 469, 469},
		{"6.18.0-rc3", 469, 469},
	}
	for _, tc := range tests {
		for abi, want := range map[ABI]uint32{specs.ArchX86_64: tc.x86_64, specs.ArchX32: tc.x86_64, specs.ArchX86: tc.i386} {
			if got, ok := LastCall(abi, tc.release); !ok || got != want {
				t.Errorf("%s %s: got %d %t, want %d", tc.release, abi, got, ok, want)
			}
		}
	}
	for _, release := range []string{"", "x", "6", "6.", "5.8.18", "4.19.0", "6.19.0", "7.0", "-6.18", "99999999999999999999.1"} {
		if got, ok := LastCall(specs.ArchX86_64, release); ok {
			t.Errorf("%q: got %d", release, got)
		}
	}
	if got, ok := LastCall(specs.ArchAARCH64, "6.12"); ok {
		t.Errorf("aarch64: got %d", got)
	}
}

func TestLastCallsRise(t *testing.T) {
	for i, k := range lastCalls[1:] {
		before := lastCalls[i]
		if k.major < before.major || k.major == before.major && k.minor <= before.minor {
			t.Errorf("%d.%d follows %d.%d", k.major, k.minor, before.major, before.minor)
		}
		if k.x86_64 <= before.x86_64 || k.i386 < before.i386 || k.i386 > k.x86_64 {
			t.Errorf("%d.%d: %d and %d follow %d and %d", k.major, k.minor, k.x86_64, k.i386, before.x86_64, before.i386)
		}
	}
}
