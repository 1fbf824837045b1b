// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestFloorIsMeasured(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range StartFloors() {
		key := f.Runtime + " " + f.Version
		if f.NoNewPrivs {
			key += " nnp"
		}
		if seen[key] {
			t.Errorf("%s stands twice", key)
		}
		seen[key] = true
		if f.Version == "" || f.Kernel == "" {
			t.Errorf("%s: version or kernel is missing", key)
		}
		for _, list := range [][]string{f.Called, f.Needed} {
			if !slices.IsSorted(list) || len(slices.Compact(slices.Clone(list))) != len(list) {
				t.Errorf("%s: %q is not a sorted set", key, list)
			}
			if !slices.Contains(list, "execve") {
				t.Errorf("%s: %q has no execve", key, list)
			}
		}
		for _, name := range f.Needed {
			if !slices.Contains(f.Called, name) {
				t.Errorf("%s: %s is needed but was not called", key, name)
			}
		}
	}
	for _, want := range []string{"runc 1.1.5+ds1", "runc 1.1.5+ds1 nnp", "runc 1.5.2", "runc 1.5.2 nnp", "crun 1.8.1", "crun 1.8.1 nnp"} {
		if !seen[want] {
			t.Errorf("%s is not measured", want)
		}
	}
}

func TestFloor(t *testing.T) {
	all, runc, crun := Floor(""), Floor("runc"), Floor("crun")
	for _, f := range StartFloors() {
		for _, name := range f.Called {
			if !slices.Contains(all, name) || !slices.Contains(Floor(f.Runtime), name) {
				t.Errorf("%s of %s %s is in no floor", name, f.Runtime, f.Version)
			}
		}
	}
	if slices.Contains(runc, "setresuid") || !slices.Contains(crun, "setresuid") {
		t.Errorf("runc's and crun's floors are mixed: %q, %q", runc, crun)
	}
	if got := Floor("youki"); got != nil {
		t.Errorf("a floor that nobody measured: %q", got)
	}
}

func TestMissingForStart(t *testing.T) {
	x86_64 := func(names ...string) *specs.LinuxSeccomp {
		return Render(Calls{specs.ArchX86_64: names}, RenderOptions{})
	}
	except := func(name string) *specs.LinuxSeccomp {
		return Render(Calls{specs.ArchX86_64: Floor("")}, RenderOptions{MustDeny: []string{name}})
	}
	tests := []struct {
		name    string
		p       *specs.LinuxSeccomp
		runtime string
		nnp     bool
		want    []string
	}{
		{"the floor itself", x86_64(Floor("")...), "", false, nil},
		{"the floor itself, runc", x86_64(Floor("runc")...), "runc", false, nil},
		{"the floor itself, crun", x86_64(Floor("crun")...), "crun", false, nil},
		{"all", AllowAll(), "", false, nil},
		{"dry run", AuditOf(x86_64("read")), "runc", false, nil},
		{"any runtime needs execve", except("execve"), "", true, []string{"execve"}},
		{"any runtime, privileges to give up", except("capset"), "", false, []string{"capset"}},
		{"not with no_new_privs", except("capset"), "", true, nil},
		{"runc's alone", except("fstatfs"), "runc", true, []string{"fstatfs"}},
		{"not any runtime's", except("fstatfs"), "", true, nil},
		{"of one version alone", except("statx"), "runc", true, nil},
		{"a runtime that nobody measured", except("execve"), "youki", true, []string{"execve"}},
		{"nothing allowed", x86_64(), "", true, []string{"execve"}},
		{"another architecture's", Render(Calls{specs.ArchX86: Floor("")}, RenderOptions{}), "", true, []string{"execve"}},
		{"under a condition", &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"execve"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Op: specs.OpNotEqual}}},
		}}, "", true, nil},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			if got := MissingForStart(tc.p, tc.runtime, tc.nnp); !slices.Equal(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
