// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestAllowOnly(t *testing.T) {
	p, err := AllowOnly([]string{"stat", "@file-read"}, PhaseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if p.DefaultAction != specs.ActErrno || p.DefaultErrnoRet == nil || *p.DefaultErrnoRet != errnoEPERM || !slices.Equal(p.Architectures, []specs.Arch{specs.ArchX86_64}) {
		t.Errorf("default %s, %v, for %v", p.DefaultAction, p.DefaultErrnoRet, p.Architectures)
	}
	action := map[string]specs.LinuxSyscall{}
	for _, r := range p.Syscalls {
		for _, name := range r.Names {
			action[name] = r
		}
	}
	for _, name := range append(WholePhaseFloor(), "stat", "newfstatat", "statx", "readlink") {
		if r := action[name]; r.Action != specs.ActAllow || len(r.Args) > 0 {
			t.Errorf("%s: %+v, want it allowed", name, r)
		}
	}
	for _, name := range []string{"openat", "clone"} {
		if r := action[name]; r.Action != specs.ActAllow || len(r.Args) == 0 {
			t.Errorf("%s: %+v, want it allowed in part", name, r)
		}
	}
	for _, name := range []string{"clone3", "openat2", "io_uring_setup"} {
		if r := action[name]; r.Action != specs.ActErrno || r.ErrnoRet == nil || *r.ErrnoRet != errnoENOSYS {
			t.Errorf("%s: %+v, want ENOSYS", name, r)
		}
	}
	for _, name := range []string{"mkdir", "connect", "execve", "socket"} {
		if r, ok := action[name]; ok {
			t.Errorf("%s: %+v, want no rule", name, r)
		}
	}
	if _, err := AllowOnly(nil, PhaseOptions{}); err != nil {
		t.Errorf("nothing but the floor: %v", err)
	}
	if _, err := AllowOnly([]string{"@file-raed"}, PhaseOptions{}); err == nil || !strings.HasPrefix(err.Error(), `unknown group "@file-raed"`) {
		t.Errorf("an unknown group: %v", err)
	}
}
