// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// What the interpreter answers to a call is among what Answers says that it may,
// for every number of every ABI and at the edges of every condition.
func TestAnswersHoldsEveryAnswer(t *testing.T) {
	var rules []specs.LinuxSyscall
	for _, g := range profiles.Groups() {
		for _, r := range g.Rules {
			rules = append(rules, specs.LinuxSyscall{Names: r.Names, Action: specs.ActAllow, Args: r.Args})
		}
	}
	rules = append(rules[:10:10], specs.LinuxSyscall{Names: []string{"prctl"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpGreaterThan, Value: 1 << 33}}})
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86}, Syscalls: rules}
	f, err := Compile(p, Options{ENOSYSAbove: "6.12"})
	if err != nil {
		t.Fatal(err)
	}
	at, err := points(p)
	if err != nil {
		t.Fatal(err)
	}
	several := 0
	for abi, numbers := range numbersOf() {
		for _, n := range append(slices.Clone(numbers), number{unnamed, ""}) {
			nr := n.nr
			if abi == specs.ArchX32 {
				nr |= x32Bit
			}
			all, err := f.Answers(abi, nr)
			if err != nil {
				t.Fatal(err)
			}
			if len(all) > 1 {
				several++
			}
			for _, args := range append(at[n.name], [6]uint64{}) {
				got, err := f.Answer(abi, nr, args)
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Contains(all, got) {
					t.Errorf("%s %s with %#x: answer %v is not among %v", abi, n.name, args, got, all)
				}
			}
		}
	}
	if several == 0 || several > 20 {
		t.Errorf("%d calls may be answered in more than one way, want the few with conditions", several)
	}
}

func TestAdds(t *testing.T) {
	compile := func(byDefault specs.LinuxSeccompAction, rules ...specs.LinuxSyscall) Filter {
		t.Helper()
		f, err := Compile(&specs.LinuxSeccomp{DefaultAction: byDefault, Syscalls: rules}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	rule := func(action specs.LinuxSeccompAction, names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: action}
	}
	half := rule(specs.ActErrno, "mkdir")
	half.Args = []specs.LinuxSeccompArg{{Index: 1, Op: specs.OpEqualTo, Value: 7}}
	var (
		readWrite = compile(specs.ActErrno, rule(specs.ActAllow, "read", "write"))
		read      = compile(specs.ActErrno, rule(specs.ActAllow, "read"))
		noMkdir   = compile(specs.ActAllow, rule(specs.ActKillProcess, "mkdir"))
		noRmdir   = compile(specs.ActAllow, rule(specs.ActErrno, "rmdir"))
		neither   = compile(specs.ActAllow, rule(specs.ActErrno, "rmdir", "mkdir"))
		some      = compile(specs.ActAllow, half)
	)
	tests := map[string]struct {
		f       Filter
		present []Filter
		want    string
	}{
		"none present":         {noMkdir, nil, "mkdir"},
		"the same":             {read, []Filter{read}, ""},
		"wider":                {readWrite, []Filter{read}, ""},
		"tighter":              {read, []Filter{readWrite}, "write"},
		"allows all":           {AllowAllFilter(), nil, ""},
		"two do it together":   {neither, []Filter{noMkdir, noRmdir}, ""},
		"one of two is needed": {neither, []Filter{noRmdir}, "mkdir"},
		"some arguments":       {some, []Filter{noMkdir}, ""},
		"only some arguments":  {noMkdir, []Filter{some}, "mkdir"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, adds, err := tc.f.Adds(tc.present)
			if err != nil || got != tc.want || adds != (tc.want != "") {
				t.Errorf("got %q, %v, %v; want %q", got, adds, err, tc.want)
			}
		})
	}
}

func TestVerdictString(t *testing.T) {
	for v, want := range map[Verdict]string{
		unix.SECCOMP_RET_ALLOW:                             "allowed",
		unix.SECCOMP_RET_ERRNO | Verdict(unix.EPERM):       "EPERM",
		unix.SECCOMP_RET_KILL_PROCESS:                      "the process is killed",
		unix.SECCOMP_RET_KILL_THREAD:                       "the thread is killed",
		unix.SECCOMP_RET_TRAP | 3:                          "SIGSYS",
		unix.SECCOMP_RET_ERRNO | unix.SECCOMP_RET_DATA&999: "errno 999",
	} {
		if got := v.String(); got != want {
			t.Errorf("%#x: got %q, want %q", uint32(v), got, want)
		}
	}
}
