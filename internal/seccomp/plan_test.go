// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"math/rand/v2"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// planned are the calls of random profiles: multiplexers, what they reach, what
// has conditions in real profiles.
var planned = []string{"clone", "clone3", "socketcall", "socket", "connect", "ipc", "shmget", "semop", "personality", "mount"}

func randomPlanned(r *rand.Rand, actions ...specs.LinuxSeccompAction) *specs.LinuxSeccomp {
	p := &specs.LinuxSeccomp{DefaultAction: actions[r.IntN(len(actions))], Architectures: allABIs[r.IntN(2) : 2+r.IntN(2)]}
	for range r.IntN(7) {
		s := specs.LinuxSyscall{Action: actions[r.IntN(len(actions))]}
		for range 1 + r.IntN(3) {
			s.Names = append(s.Names, planned[r.IntN(len(planned))])
		}
		if r.IntN(2) == 0 {
			s.Args = []specs.LinuxSeccompArg{{
				Index: uint(r.IntN(2)), Value: uint64(r.IntN(4)), ValueTwo: uint64(r.IntN(4)),
				Op: []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpMaskedEqual, specs.OpMaskedEqual, specs.OpLessThan}[r.IntN(5)],
			}}
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	// A container must be able to start; what is allowed so is not asked about.
	start := []string{"exit_group"}
	for _, f := range profiles.StartFloors() {
		start = append(start, f.Needed...)
	}
	p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: start, Action: specs.ActAllow})
	return p
}

// grants asks a filter about each of the calls that planned names, by every
// number that reaches one, and calls back with what passes.
func grants(t *testing.T, f Filter, each func(abi profiles.ABI, name string, d seccompData) bool) {
	t.Helper()
	ask := func(abi profiles.ABI, name string, nr uint32, first uint64) {
		for _, second := range []uint64{0, 1, 2, 3} {
			d := seccompData{nr: nr, arch: auditArch[abi], args: [6]uint64{first, second}}
			if abi == specs.ArchX32 {
				d.nr, d.arch = nr|x32Bit, unix.AUDIT_ARCH_X86_64
			}
			got, err := run(f, &d)
			if err != nil {
				t.Fatal(err)
			}
			if (got == unix.SECCOMP_RET_ALLOW || got == unix.SECCOMP_RET_LOG) && !each(abi, name, d) {
				return
			}
		}
	}
	for _, abi := range allABIs {
		for nr := range uint32(512) {
			name, ok := Name(abi, nr)
			if !ok || !contains(planned, name) || profiles.Multiplexed(name) != nil {
				continue
			}
			for _, first := range []uint64{0, 1, 2, 3, 1 << 32, 1<<32 | 1} {
				ask(abi, name, nr, first)
			}
		}
	}
	for _, way := range []struct {
		nr    uint32
		first uint64
		name  string
	}{ // uapi/linux/net.h and ipc.h; the kernel takes ipc's version off
		{102, 1, "socket"}, {102, 3, "connect"}, {117, 1, "semop"}, {117, 23, "shmget"}, {117, 1<<16 | 1, "semop"}, {117, 7<<16 | 23, "shmget"},
	} {
		ask(specs.ArchX86, way.name, way.nr, way.first)
	}
}

func contains(all []string, one string) bool {
	for _, s := range all {
		if s == one {
			return true
		}
	}
	return false
}

// TestFilterOfPlan compiles what adjust makes of a version, the container's own
// profile and a policy, and holds the filters to the laws: no call of mustDeny
// passes, by whatever number; within the container's own profile nothing passes
// that its filter denies, and under enforce nothing that the version's denies.
func TestFilterOfPlan(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	modes := []policy.Mode{policy.ModeRecord, policy.ModeAudit, policy.ModeEnforce}
	held := map[policy.Mode]int{}
	for range 1500 {
		d := policy.Decision{Policy: "p", Workload: "w", Mode: modes[r.IntN(3)], ExistingProfile: policy.ExistingKeep, Failure: policy.FailureDeny}
		for range r.IntN(3) {
			d.MustDeny = append(d.MustDeny, planned[r.IntN(len(planned))])
		}
		// What Merge makes allows and denies; an own profile can hold anything.
		version := randomPlanned(r, specs.ActAllow, specs.ActErrno)
		version.DefaultAction = specs.ActErrno
		in := adjust.Input{Decision: d, Version: &profiles.Version{Manifest: profiles.Manifest{Version: 1, Digest: "sha256:1"}, Profile: version}}
		if r.IntN(3) > 0 {
			in.Container.Seccomp = randomPlanned(r, specs.ActAllow, specs.ActAllow, specs.ActErrno, specs.ActLog, specs.ActKill, specs.ActNotify)
			if in.Container.Seccomp.DefaultAction == specs.ActNotify {
				in.Container.Seccomp.DefaultAction = specs.ActTrap
			}
		}
		plan, err := adjust.Build(in)
		if err != nil || plan.Seccomp == nil {
			continue
		}
		compile := func(p *specs.LinuxSeccomp) Filter {
			if p == nil || err != nil {
				return nil
			}
			var f Filter
			f, err = Compile(p, Options{})
			return f
		}
		filter, own, of := compile(plan.Seccomp), compile(in.Container.Seccomp), compile(version)
		if err != nil {
			continue // rules that libseccomp refuses beside each other
		}
		held[d.Mode]++
		grants(t, filter, func(abi profiles.ABI, name string, data seccompData) bool {
			denied := func(f Filter) bool {
				got, err := run(f, &data)
				if err != nil {
					t.Fatal(err)
				}
				return got != unix.SECCOMP_RET_ALLOW && got != unix.SECCOMP_RET_LOG
			}
			var by string
			switch {
			case contains(d.MustDeny, name), contains(d.MustDeny, "socketcall") && abi == specs.ArchX86 && data.nr == 102, contains(d.MustDeny, "ipc") && abi == specs.ArchX86 && data.nr == 117:
				by = "mustDeny"
			case own != nil && denied(own):
				by = "the container's own profile"
			case d.Mode == policy.ModeEnforce && denied(of):
				by = "the version"
			default:
				return true
			}
			t.Fatalf("%s: %s under %s (nr %d, arguments %#x) is denied by %s and passes\nmustDeny %q\nown %s\nversion %s\nplan %s", d.Mode, name, abi, data.nr, data.args, by,
				d.MustDeny, describe(in.Container.Seccomp), describe(version), describe(plan.Seccomp))
			return false
		})
	}
	for _, mode := range modes {
		if held[mode] < 100 {
			t.Errorf("mode %s: only %d filters compared", mode, held[mode])
		}
	}
}
