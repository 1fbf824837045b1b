// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestRender(t *testing.T) {
	eperm, enosys := uint(1), uint(38)
	allow := func(names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: specs.ActAllow}
	}
	later := func(names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: specs.ActErrno, ErrnoRet: &enosys}
	}
	tests := []struct {
		name     string
		calls    Calls
		o        RenderOptions
		arches   []specs.Arch
		syscalls []specs.LinuxSyscall
	}{
		{"nothing", nil, RenderOptions{}, []specs.Arch{specs.ArchX86_64}, nil},
		{"policy alone", nil, RenderOptions{MustAllow: []string{"write", "read", "write"}}, []specs.Arch{specs.ArchX86_64}, []specs.LinuxSyscall{allow("read", "write")}},
		{
			"union of names over ABIs",
			Calls{specs.ArchX86: {"mmap2", "read"}, specs.ArchX86_64: {"mmap", "read"}},
			RenderOptions{},
			[]specs.Arch{specs.ArchX86, specs.ArchX86_64},
			[]specs.LinuxSyscall{allow("mmap", "mmap2", "read")},
		},
		{"an ABI without calls is none", Calls{specs.ArchX86_64: {"read"}, specs.ArchX86: nil}, RenderOptions{}, []specs.Arch{specs.ArchX86_64}, []specs.LinuxSyscall{allow("read")}},
		{
			"architectures of the policy", x86_64("read"),
			RenderOptions{Architectures: []ABI{specs.ArchX86, specs.ArchX86_64}},
			[]specs.Arch{specs.ArchX86, specs.ArchX86_64},
			[]specs.LinuxSyscall{allow("read")},
		},
		{
			"deny beats allow and evidence", x86_64("read", "write"),
			RenderOptions{MustAllow: []string{"mkdir"}, MustDeny: []string{"mkdir", "write"}},
			[]specs.Arch{specs.ArchX86_64},
			[]specs.LinuxSyscall{allow("read")},
		},
		{
			"newer than the kernel", x86_64("read"),
			RenderOptions{NewerThanKernel: []string{"mseal", "cachestat", "mseal"}},
			[]specs.Arch{specs.ArchX86_64},
			[]specs.LinuxSyscall{allow("read"), later("cachestat", "mseal")},
		},
		{
			"newer but recorded elsewhere, or must be denied", x86_64("cachestat", "read"),
			RenderOptions{NewerThanKernel: []string{"cachestat", "mseal"}, MustDeny: []string{"mseal"}},
			[]specs.Arch{specs.ArchX86_64},
			[]specs.LinuxSyscall{allow("cachestat", "read")},
		},
		{
			"incidental, one recorded, one must be denied", x86_64("mmap", "read"),
			RenderOptions{Incidental: true, MustDeny: append(unconditional(), "mprotect")},
			[]specs.Arch{specs.ArchX86_64},
			[]specs.LinuxSyscall{
				allow("mmap"), later("clone3"),
				{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 0x7e030000, ValueTwo: 0x10000, Op: specs.OpMaskedEqual}}},
			},
		},
		{
			"what reaches a denied call",
			Calls{specs.ArchX86: {"ipc", "socketcall"}, specs.ArchX86_64: {"read"}},
			RenderOptions{MustAllow: []string{"ipc"}, MustDeny: []string{"connect", "shmget"}},
			[]specs.Arch{specs.ArchX86, specs.ArchX86_64},
			[]specs.LinuxSyscall{allow("read")},
		},
		{
			"what reaches other calls",
			Calls{specs.ArchX86: {"ipc", "socketcall"}},
			RenderOptions{MustDeny: []string{"read"}},
			[]specs.Arch{specs.ArchX86},
			[]specs.LinuxSyscall{allow("ipc", "socketcall")},
		},
		{
			"a way that must be denied",
			Calls{specs.ArchX86: {"connect", "read", "socketcall"}},
			RenderOptions{MustDeny: []string{"socketcall"}},
			[]specs.Arch{specs.ArchX86},
			[]specs.LinuxSyscall{allow("connect", "read"), later("socketcall")},
		},
		{
			"clone3 must be denied", x86_64("clone3", "read"),
			RenderOptions{MustDeny: []string{"clone3"}},
			[]specs.Arch{specs.ArchX86_64},
			[]specs.LinuxSyscall{allow("read"), later("clone3")},
		},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			want := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: &eperm, Architectures: tc.arches, Syscalls: tc.syscalls}
			if d := cmp.Diff(want, Render(tc.calls, tc.o)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestRenderLeavesItsOptions(t *testing.T) {
	calls := Calls{specs.ArchX86_64: {"read", "write"}}
	o := RenderOptions{MustAllow: []string{"z", "a"}, MustDeny: []string{"write"}, NewerThanKernel: []string{"y", "write", "b"}, Architectures: []ABI{specs.ArchX86, specs.ArchX32}}
	Render(calls, o)
	if d := cmp.Diff(RenderOptions{MustAllow: []string{"z", "a"}, MustDeny: []string{"write"}, NewerThanKernel: []string{"y", "write", "b"}, Architectures: []ABI{specs.ArchX86, specs.ArchX32}}, o); d != "" {
		t.Error(d)
	}
	if !calls.Equal(x86_64("read", "write")) {
		t.Error(calls)
	}
}

func TestAuditOfDeniesNothing(t *testing.T) {
	errno := uint(13)
	conditional := specs.LinuxSyscall{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 1, Op: specs.OpEqualTo}}}
	for name, p := range map[string]*specs.LinuxSeccomp{
		"rendered": Render(x86_64("read"), RenderOptions{NewerThanKernel: []string{"mseal"}}),
		"a deny list": {DefaultAction: specs.ActAllow, DefaultErrnoRet: &errno, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir"}, Action: specs.ActErrno, ErrnoRet: &errno},
			{Names: []string{"ptrace"}, Action: specs.ActKillProcess},
			{Names: []string{"bpf"}, Action: specs.ActTrap},
		}},
		"conditions": {DefaultAction: specs.ActKill, Syscalls: []specs.LinuxSyscall{conditional}},
	} {
		before, err := EncodeProfile(p)
		if err != nil {
			t.Fatal(err)
		}
		a := AuditOf(p)
		if Denies(a.DefaultAction) {
			t.Errorf("%s: default %s", name, a.DefaultAction)
		}
		for _, rule := range a.Syscalls {
			if Denies(rule.Action) || rule.ErrnoRet != nil {
				t.Errorf("%s: rule %+v", name, rule)
			}
			if rule.Action == a.DefaultAction {
				t.Errorf("%s: rule %+v says nothing, and libseccomp refuses those", name, rule)
			}
		}
		for _, abi := range testABIs {
			if !slices.Contains(a.Architectures, abi) {
				t.Errorf("%s: %s would be killed", name, abi)
			}
		}
		// What the profile allows makes no noise.
		for _, call := range allowed(p).Names() {
			if Denied(a, x86_64(call)).Len() > 0 {
				t.Errorf("%s: %s", name, call)
			}
		}
		if after, err := EncodeProfile(p); err != nil || string(after) != string(before) {
			t.Errorf("%s: AuditOf changed its argument", name)
		}
	}
	if a := AuditOf(Render(x86_64("read"), RenderOptions{})); a.DefaultAction != specs.ActLog || a.DefaultErrnoRet != nil {
		t.Errorf("got %+v", a)
	}
}

func TestDenied(t *testing.T) {
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64}, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"read"}, Action: specs.ActAllow},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Op: specs.OpEqualTo}}},
		{Names: []string{"mount"}, Action: specs.ActNotify},
		{Names: []string{"mseal"}, Action: specs.ActErrno},
	}}
	calls := Calls{specs.ArchX86_64: {"mkdir", "mount", "mseal", "read", "socket"}, specs.ArchX86: {"read"}}
	want := Calls{specs.ArchX86_64: {"mkdir", "mseal"}, specs.ArchX86: {"read"}}
	if d := cmp.Diff(want, Denied(p, calls)); d != "" {
		t.Error(d)
	}
	open := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"mkdir"}, Action: specs.ActErrno},
		{Names: []string{"socket"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: specs.OpEqualTo}}},
	}}
	if d := cmp.Diff(x86_64("mkdir"), Denied(open, x86_64("mkdir", "read", "socket"))); d != "" {
		t.Error(d)
	}
}

func TestDiff(t *testing.T) {
	a := Render(Calls{specs.ArchX86_64: {"read", "write"}}, RenderOptions{})
	b := Render(Calls{specs.ArchX86_64: {"mkdir", "read"}, specs.ArchX86: {"read"}}, RenderOptions{})
	want := Delta{
		Added:   Calls{specs.ArchX86_64: {"mkdir"}, specs.ArchX86: {"mkdir", "read"}},
		Removed: Calls{specs.ArchX86_64: {"write"}},
	}
	if d := cmp.Diff(want, Diff(a, b)); d != "" {
		t.Error(d)
	}
	if d := Diff(a, a); d.Added.Len() != 0 || d.Removed.Len() != 0 {
		t.Errorf("differs from itself: %+v", d)
	}
}

func TestMayDeny(t *testing.T) {
	ifArg := []specs.LinuxSeccompArg{{Index: 0, Value: 1, Op: specs.OpEqualTo}}
	tests := []struct {
		name  string
		dflt  specs.LinuxSeccompAction
		rules []specs.LinuxSyscall
		want  bool
	}{
		{"no rule", specs.ActErrno, nil, true},
		{"no rule, allowed by default", specs.ActAllow, nil, false},
		{"allowed", specs.ActErrno, []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}}, false},
		{"allowed sometimes", specs.ActErrno, []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: ifArg}}, true},
		{"logged sometimes, allowed by default", specs.ActAllow, []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActLog, Args: ifArg}}, false},
		{"denied sometimes", specs.ActAllow, []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno, Args: ifArg}}, true},
		{"denied", specs.ActAllow, []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno}}, true},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			p := &specs.LinuxSeccomp{DefaultAction: tc.dflt, Syscalls: tc.rules}
			if got := MayDeny(p, x86_64("read")).Len() > 0; got != tc.want {
				t.Errorf("got %t, want %t", got, tc.want)
			}
		})
	}
}

// TestMayDenyOf: a dry run whose threads are made as the profile allows it would
// have been denied nothing.
func TestMayDenyOf(t *testing.T) {
	const all, thread, fork = ^uint64(0), uint64(0x3d0f00), uint64(17)
	p := Render(x86_64("execve", "read"), RenderOptions{Incidental: true})
	clone := func(abi ABI, phase string, mask uint64, values ...uint64) Argument {
		return Argument{Call: Call{ABI: abi, Number: 56, Name: "clone"}, Phase: phase, Mask: mask, Values: values}
	}
	any := clone(specs.ArchX86_64, DefaultPhase, all, thread)
	any.AnyValue = true
	second := clone(specs.ArchX86_64, DefaultPhase, all, thread)
	second.Index = 1
	for name, tc := range map[string]struct {
		phases map[string]Calls
		args   []Argument
		want   Calls
	}{
		"threads":             {nil, []Argument{clone(specs.ArchX86_64, DefaultPhase, all, thread, thread|0x1000000)}, nil},
		"a thread and a fork": {nil, []Argument{clone(specs.ArchX86_64, DefaultPhase, all, fork, thread)}, x86_64("clone")},
		"a new namespace":     {nil, []Argument{clone(specs.ArchX86_64, DefaultPhase, all, thread|0x20000)}, x86_64("clone")},
		"not kept":            {nil, nil, x86_64("clone")},
		"kept in part":        {nil, []Argument{clone(specs.ArchX86_64, DefaultPhase, 0xff, 0)}, x86_64("clone")},
		"more than was kept":  {nil, []Argument{any}, x86_64("clone")},
		"no value":            {nil, []Argument{clone(specs.ArchX86_64, DefaultPhase, all)}, x86_64("clone")},
		"of another argument": {nil, []Argument{second}, x86_64("clone")},
		"in one phase": {
			map[string]Calls{"a": x86_64("clone"), "b": x86_64("clone", "read")},
			[]Argument{clone(specs.ArchX86_64, "a", all, thread)},
			x86_64("clone"),
		},
		"in both phases": {
			map[string]Calls{"a": x86_64("clone"), "b": x86_64("clone", "mkdir")},
			[]Argument{clone(specs.ArchX86_64, "a", all, thread), clone(specs.ArchX86_64, "b", all, thread)},
			x86_64("mkdir"),
		},
		"an ABI that isn't listed": {
			map[string]Calls{DefaultPhase: {specs.ArchX32: {"clone"}}},
			[]Argument{clone(specs.ArchX32, DefaultPhase, all, thread)},
			Calls{specs.ArchX32: {"clone"}},
		},
	} {
		rec := recordingOf("r", x86_64("clone", "execve"))
		rec.Arguments = tc.args
		if tc.phases != nil {
			rec.Phases = tc.phases
		}
		if got := MayDenyOf(p, rec); !got.Equal(tc.want) {
			t.Errorf("%s: got %v, want %v", name, got, tc.want)
		}
	}
	mmap := func(prot, flags uint64) []Argument {
		call := Call{ABI: specs.ArchX86_64, Number: 9, Name: "mmap"}
		return []Argument{
			{Call: call, Phase: DefaultPhase, Index: 2, Mask: all, Values: []uint64{prot}},
			{Call: call, Phase: DefaultPhase, Index: 3, Mask: 0x3f, Values: []uint64{flags}},
		}
	}
	for name, tc := range map[string]struct {
		args []Argument
		want Calls
	}{
		"memory":            {mmap(3, 0x22), nil},
		"a file":            {mmap(3, 0x2), x86_64("mmap")},
		"executable memory": {mmap(7, 0x22), x86_64("mmap")},
		"flags not kept":    {mmap(3, 0x22)[:1], x86_64("mmap")},
	} {
		rec := recordingOf("r", x86_64("execve", "mmap"))
		rec.Arguments = tc.args
		if got := MayDenyOf(p, rec); !got.Equal(tc.want) {
			t.Errorf("mmap of %s: got %v, want %v", name, got, tc.want)
		}
	}
	both := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Value: thread, Op: specs.OpEqualTo}}},
		{Names: []string{"clone"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 1, Op: specs.OpEqualTo}}},
	}}
	rec := recordingOf("r", x86_64("clone"))
	rec.Arguments = []Argument{clone(specs.ArchX86_64, DefaultPhase, all, thread)}
	if got := MayDenyOf(both, rec); !got.Equal(x86_64("clone")) {
		t.Errorf("allowed and denied under conditions: %v", got)
	}
}
