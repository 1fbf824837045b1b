// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
)

func TestCheckListsEverything(t *testing.T) {
	p := &specs.LinuxSeccomp{
		DefaultAction:   "SCMP_ACT_DENY",
		DefaultErrnoRet: errno(1),
		Architectures:   []specs.Arch{specs.ArchX86_64, "SCMP_ARCH_VAX"},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "raed"}, Action: specs.ActAllow},
			{Names: []string{"write"}, Action: "allow"},
			{Names: []string{"open"}, Action: specs.ActErrno, ErrnoRet: errno(4095)},
			{Action: specs.ActAllow},
			{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Op: specs.OpEqualTo}, {Index: 6, Op: specs.OpEqualTo}, {Index: 1, Op: "SCMP_CMP_XX"},
			}},
		},
	}
	err := Check(p)
	var problems *ProfileError
	if !errors.As(err, &problems) {
		t.Fatalf("got %v", err)
	}
	want := []string{
		`defaultAction: unknown action "SCMP_ACT_DENY"`,
		`architectures[1]: unknown architecture "SCMP_ARCH_VAX"`,
		`syscalls[0].names[1]: libseccomp `,
		`syscalls[1].action: unknown action "allow"`,
		`syscalls[2].action: errno 4095`,
		`syscalls[3].names: empty`,
		`syscalls[4].args[1].index: 6`,
		`syscalls[4].args[2].op: unknown operator "SCMP_CMP_XX"`,
	}
	if len(problems.Problems) != len(want) {
		t.Errorf("%d problems, want %d: %v", len(problems.Problems), len(want), err)
	}
	for i, w := range want {
		if i < len(problems.Problems) && !strings.HasPrefix(problems.Problems[i].Error(), w) {
			t.Errorf("problem %d: %q, want %q", i, problems.Problems[i], w)
		}
	}
	if !strings.Contains(err.Error(), `"raed" (a newer libseccomp may)`) {
		t.Errorf("no remedy: %v", err)
	}
	if f, err := Compile(p, Options{}); f != nil || err == nil {
		t.Error("compiled")
	}
}

func TestCheckRefuses(t *testing.T) {
	many := make([]specs.LinuxSyscall, maxRules+1)
	for i := range many {
		many[i] = specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActAllow}
	}
	names := make([]string, maxNames+1)
	for i := range names {
		names[i] = fmt.Sprint("call", i)
	}
	conditions := make([]specs.LinuxSeccompArg, 100000)
	for i := range conditions {
		conditions[i] = specs.LinuxSeccompArg{Index: 0, Value: uint64(i), Op: specs.OpEqualTo}
	}
	// libseccomp would take 43 s for pairs, and all of the calls 75 s to verify.
	pairs := make([]specs.LinuxSyscall, maxConditions/2)
	for i := range pairs {
		pairs[i] = specs.LinuxSyscall{Names: []string{"ioctl"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
			{Index: 0, Value: uint64(i), Op: specs.OpEqualTo}, {Index: 1, Value: uint64(7 * i), Op: specs.OpEqualTo},
		}}
	}
	var calls []specs.LinuxSyscall
	for _, n := range numbersOf()[specs.ArchX86_64][:200] {
		for i := range uint64(3) {
			calls = append(calls, specs.LinuxSyscall{Names: []string{n.name}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: 100 * i, Op: specs.OpEqualTo}, {Index: 1, Value: 100*i + 20, Op: specs.OpEqualTo}, {Index: 2, Value: 100*i + 40, Op: specs.OpEqualTo},
			}})
		}
	}
	for name, p := range map[string]*specs.LinuxSeccomp{
		"many pairs":         {DefaultAction: specs.ActErrno, Architectures: allABIs, Syscalls: pairs},
		"many calls":         {DefaultAction: specs.ActErrno, Architectures: allABIs, Syscalls: calls},
		"many architectures": {DefaultAction: specs.ActErrno, Architectures: slices.Repeat(allABIs[:1], maxArches+1)},
		"nothing":            nil,
		"empty":              {},
		"many rules":         {DefaultAction: specs.ActErrno, Syscalls: many},
		"many names":         {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: names, Action: specs.ActAllow}}},
		"many conditions":    {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"socket"}, Action: specs.ActAllow, Args: conditions}}},
		"NUL in a name":      {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read\x00"}, Action: specs.ActAllow}}},
		"NOTIFY by default":  {DefaultAction: specs.ActNotify},
		"errno by default":   {DefaultAction: specs.ActErrno, DefaultErrnoRet: errno(1 << 20)},
		"no longer a filter": {DefaultAction: specs.ActErrno, Architectures: allABIs, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"socket"}, Action: specs.ActAllow, Args: conditions[:4096]},
		}},
	} {
		if err := Check(p); err == nil {
			t.Errorf("%s: no error", name)
		} else if len(err.Error()) > 1<<20 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
}

func TestCheckAccepts(t *testing.T) {
	var all []string
	for nr := range uint32(512) {
		for _, abi := range allABIs {
			if name, ok := Name(abi, nr); ok {
				all = append(all, name)
			}
		}
	}
	for name, p := range map[string]*specs.LinuxSeccomp{
		"allow all": profiles.AllowAll(),
		"everything recorded on all ABIs": profiles.Render(profiles.Calls{specs.ArchX86_64: all, specs.ArchX86: all, specs.ArchX32: all},
			profiles.RenderOptions{}),
		"nothing recorded": profiles.Render(nil, profiles.RenderOptions{}),
		"the floor":        profiles.Render(profiles.Calls{specs.ArchX86_64: profiles.Floor("")}, profiles.RenderOptions{NewerThanKernel: NewerThan("5.10")}),
	} {
		if err := Check(p); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := Check(profiles.AuditOf(p)); err != nil {
			t.Errorf("dry run of %s: %v", name, err)
		}
	}
	// The floor's names are libseccomp's.
	for _, name := range profiles.Floor("") {
		if _, ok := Number(specs.ArchX86_64, name); !ok {
			t.Errorf("floor: %s is no call", name)
		}
	}
}

// TestWithoutUnknown: what a container's own profile has heard of, and libseccomp
// here hasn't, is no reason to refuse what is made from it.
func TestWithoutUnknown(t *testing.T) {
	allow := func(names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: specs.ActAllow}
	}
	profile := func(rules ...specs.LinuxSyscall) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: allABIs, Syscalls: rules}
	}
	own := profile(allow("read", "call_of_2030"), allow("call_of_2031"))
	made := profile(allow("read", "call_of_2030"), allow("call_of_2031"), allow("write"))
	if err := Check(WithoutUnknown(made, own)); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(profile(allow("read"), allow("write")), WithoutUnknown(made, own)); diff != "" {
		t.Error(diff)
	}
	if err := Check(WithoutUnknown(profile(allow("call_of_2032")), own)); err == nil {
		t.Error("a name of the version's passed")
	}
	if err := Check(WithoutUnknown(profile(allow("call_of_2030")), nil)); err == nil {
		t.Error("a name passed without a profile of the container's own")
	}
	if len(made.Syscalls) != 3 || len(made.Syscalls[0].Names) != 2 {
		t.Errorf("changed its argument: %+v", made)
	}
}
