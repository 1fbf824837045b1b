// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

func ptr[T any](v T) *T { return &v }

// startCalls is enough for any runtime's start-up as profiles checks it: what
// an allow-list without any calls is said to lack.
func startCalls() []string {
	return missingForStart(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno})
}

func rule(action specs.LinuxSeccompAction, names ...string) specs.LinuxSyscall {
	return specs.LinuxSyscall{Names: names, Action: action}
}

func when(r specs.LinuxSyscall, index uint, value uint64) specs.LinuxSyscall {
	r.Args = []specs.LinuxSeccompArg{{Index: index, Value: value, Op: specs.OpEqualTo}}
	return r
}

func errnoOf(r specs.LinuxSyscall, errno uint) specs.LinuxSyscall {
	r.ErrnoRet = &errno
	return r
}

// allowing is an allow-list that a container can start with.
func allowing(names ...string) *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls:      []specs.LinuxSyscall{rule(specs.ActAllow, append(startCalls(), names...)...)},
	}
}

func with(p *specs.LinuxSeccomp, rules ...specs.LinuxSyscall) *specs.LinuxSeccomp {
	p.Syscalls = append(p.Syscalls, rules...)
	return p
}

func version(p *specs.LinuxSeccomp) *profiles.Version {
	return &profiles.Version{Manifest: profiles.Manifest{Version: 3, Digest: "sha256:abc"}, Profile: p}
}

func decision(mode policy.Mode) policy.Decision {
	return policy.Decision{Policy: "p", Mode: mode, Workload: "w", ExistingProfile: policy.ExistingKeep, Failure: policy.FailureDeny}
}

// fate is what a profile does with a call: its unconditional rule's action,
// else "arguments" if there are only conditional rules, else the default.
func fate(p *specs.LinuxSeccomp, call string) string {
	conditional := false
	for _, r := range p.Syscalls {
		if !slices.Contains(r.Names, call) {
			continue
		}
		if len(r.Args) == 0 {
			s := string(r.Action)
			if r.ErrnoRet != nil {
				s += fmt.Sprintf("(%d)", *r.ErrnoRet)
			}
			return s
		}
		conditional = true
	}
	if conditional {
		return "arguments"
	}
	return "default " + string(p.DefaultAction)
}

// sureDenial: nothing and nobody can let a call through that meets one of these.
var sureDenial = map[specs.LinuxSeccompAction]bool{
	"SCMP_ACT_ERRNO": true, "SCMP_ACT_KILL": true, "SCMP_ACT_KILL_PROCESS": true, "SCMP_ACT_KILL_THREAD": true, "SCMP_ACT_TRAP": true,
}

// reachable reports whether a call can be made under a profile, with whatever
// arguments, directly or through a multiplexer.
func reachable(p *specs.LinuxSeccomp, call string) bool {
	denied := false
	for _, r := range p.Syscalls {
		for _, name := range r.Names {
			via := slices.Contains(profiles.Multiplexed(name), call)
			switch {
			case (name == call || via) && !sureDenial[r.Action]:
				return true
			case name == call && len(r.Args) == 0:
				denied = true
			}
		}
	}
	return !denied && !sureDenial[p.DefaultAction]
}

func TestSeccomp(t *testing.T) {
	const (
		allow, log, errno, errno1 = "SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "default SCMP_ACT_ERRNO", "SCMP_ACT_ERRNO(1)"
		dflAllow, dflLog          = "default SCMP_ACT_ALLOW", "default SCMP_ACT_LOG"
	)
	own := func() *specs.LinuxSeccomp { // in the manner of docker's default
		return with(allowing("open", "ptrace"),
			when(rule(specs.ActAllow, "clone", "personality"), 0, 7),
			errnoOf(rule(specs.ActErrno, "clone3"), 38))
	}
	type fates map[string]string
	for _, tt := range []struct {
		name     string
		mode     policy.Mode
		d        func(*policy.Decision)
		own      *specs.LinuxSeccomp
		unknown  bool
		version  *specs.LinuxSeccomp
		want     fates // nil: no profile is injected
		gate     profiles.Gate
		says     string // in a note or warning
		record   bool
		versions int
	}{
		{name: "record unconfined", mode: policy.ModeRecord, want: fates{"open": dflAllow}, gate: profiles.GateFilter, record: true, says: "allows everything"},
		{name: "record unconfined, must-deny", mode: policy.ModeRecord, d: func(d *policy.Decision) { d.MustDeny = []string{"bpf"} }, want: fates{"open": dflAllow, "bpf": errno1}, gate: profiles.GateFilter, record: true},
		{name: "record keeps", mode: policy.ModeRecord, own: own(), gate: profiles.GateFilter, record: true, says: "is kept"},
		{
			name: "record keeps, must-deny", mode: policy.ModeRecord, own: own(), d: func(d *policy.Decision) { d.MustDeny = []string{"ptrace", "clone", "bpf"} },
			want: fates{"open": allow, "ptrace": errno, "clone": errno, "bpf": errno, "personality": "arguments", "clone3": "SCMP_ACT_ERRNO(38)"}, gate: profiles.GateFilter, record: true,
		},
		{name: "record replaces", mode: policy.ModeRecord, own: own(), d: func(d *policy.Decision) { d.ExistingProfile = policy.ExistingReplace }, want: fates{"mount": dflAllow}, gate: profiles.GateFilter, record: true},
		{name: "record, profile not shown", mode: policy.ModeRecord, unknown: true, gate: profiles.GateExec, record: true, says: "from the first execve"},
		{name: "record, profile not shown, replaced", mode: policy.ModeRecord, unknown: true, d: func(d *policy.Decision) { d.ExistingProfile = policy.ExistingReplace }, want: fates{"mount": dflAllow}, gate: profiles.GateFilter, record: true},

		{name: "audit", mode: policy.ModeAudit, version: allowing("open"), want: fates{"open": allow, "mount": dflLog}, gate: profiles.GateFilter, record: true, versions: 3},
		{
			name: "audit, lists", mode: policy.ModeAudit, version: allowing("open"), d: func(d *policy.Decision) { d.MustAllow, d.MustDeny = []string{"mount"}, []string{"open", "bpf"} },
			want: fates{"open": errno1, "bpf": errno1, "mount": allow, "ptrace": dflLog}, gate: profiles.GateFilter, record: true, versions: 3,
		},
		{
			name: "audit within own", mode: policy.ModeAudit, own: own(), version: allowing("open", "clone", "mount"),
			want: fates{"open": allow, "ptrace": log, "clone": "arguments", "personality": "arguments", "clone3": "SCMP_ACT_ERRNO(38)", "mount": errno}, gate: profiles.GateFilter, record: true, says: "stays in force", versions: 3,
		},
		{
			name: "audit within an own that allows by default", mode: policy.ModeAudit, own: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{rule(specs.ActKillProcess, "mount"), when(rule(specs.ActErrno, "clone"), 0, 1)}},
			version: allowing("open", "clone", "mount"), want: fates{"open": allow, "mount": "SCMP_ACT_KILL_PROCESS", "clone": "arguments", "ptrace": dflLog}, gate: profiles.GateFilter, record: true, versions: 3,
		},

		{name: "enforce", mode: policy.ModeEnforce, version: allowing("open"), want: fates{"open": allow, "mount": errno}, versions: 3},
		{
			name: "enforce, lists", mode: policy.ModeEnforce, version: with(allowing("open"), errnoOf(rule(specs.ActErrno, "clone3"), 38), when(rule(specs.ActAllow, "ioctl", "fcntl"), 1, 2)),
			d: func(d *policy.Decision) {
				d.MustAllow, d.MustDeny = []string{"clone3", "ioctl"}, []string{"open", "fcntl"}
			},
			want: fates{"open": errno, "fcntl": errno, "clone3": allow, "ioctl": allow}, versions: 3,
		},
		{name: "must-deny wins over must-allow", mode: policy.ModeEnforce, version: allowing("open"), d: func(d *policy.Decision) { d.MustAllow, d.MustDeny = []string{"open"}, []string{"open"} }, want: fates{"open": errno}, versions: 3},
		{
			name: "enforce inherits", mode: policy.ModeEnforce, own: own(), version: allowing("open", "clone", "mount", "personality"), d: func(d *policy.Decision) { d.MustAllow = []string{"personality"} },
			want: fates{"open": allow, "clone": "arguments", "personality": allow, "clone3": "SCMP_ACT_ERRNO(38)", "mount": errno, "ptrace": errno}, says: "version 3 allows what the container's own seccomp profile denies, and what stays denied: mount (", versions: 3,
		},
		{
			name: "enforce within own: what it leaves to others", mode: policy.ModeEnforce, version: allowing("open", "mount", "clone3", "bpf", "ioctl"),
			own:  with(allowing("open"), rule(specs.ActNotify, "mount"), rule(specs.ActTrace, "bpf"), rule(specs.ActLog, "ioctl"), errnoOf(rule(specs.ActErrno, "clone3"), 38)),
			want: fates{"open": allow, "mount": errno, "bpf": errno, "ioctl": allow, "clone3": "SCMP_ACT_ERRNO(38)"}, says: "stays denied: bpf, clone3, mount", versions: 3,
		},
		{
			name: "enforce within own: first unconditional rule counts", mode: policy.ModeEnforce, version: allowing("open", "mount", "bpf"),
			own:  with(allowing("open"), rule(specs.ActErrno, "mount"), when(rule(specs.ActKill, "mount", "bpf"), 0, 1), rule(specs.ActAllow, "mount", "bpf")),
			want: fates{"open": allow, "mount": allow, "bpf": allow}, versions: 3,
		}, // ERRNO says nothing beside the same default
		{
			name: "enforce within own: conditions of both", mode: policy.ModeEnforce, version: with(allowing(), when(rule(specs.ActAllow, "ioctl", "fcntl", "socket"), 1, 2)),
			own:  with(allowing(), when(rule(specs.ActAllow, "ioctl"), 0, 7), when(rule(specs.ActAllow, "fcntl"), 1, 3)),
			want: fates{"ioctl": "arguments", "fcntl": errno, "socket": errno}, says: "stays denied: fcntl, socket", versions: 3,
		},
		{name: "enforce within own: its ABIs", mode: policy.ModeEnforce, version: func() *specs.LinuxSeccomp {
			p := allowing("open")
			p.Architectures = []specs.Arch{specs.ArchX86, specs.ArchX86_64}
			return p
		}(), own: allowing("open"), want: fates{"open": allow}, says: "stays denied: SCMP_ARCH_X86 (", versions: 3},
		{
			name: "audit within an own that says nothing in rules", mode: policy.ModeAudit, own: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{rule(specs.ActAllow, "mount", "clone", "open"), rule(specs.ActErrno, "mount"), when(rule(specs.ActErrno, "clone"), 0, 1)}},
			version: allowing("open", "clone", "mount"), want: fates{"open": allow, "mount": "SCMP_ACT_ERRNO", "clone": "arguments", "ptrace": dflLog}, gate: profiles.GateFilter, record: true, versions: 3,
		},
		{
			name: "multiplexer that nothing mentions", mode: policy.ModeRecord, d: func(d *policy.Decision) { d.MustDeny = []string{"shmget", "connect"} },
			want: fates{"shmget": errno1, "connect": errno1, "ipc": errno1, "socketcall": dflAllow}, gate: profiles.GateFilter, record: true, says: "ipc is denied too",
		},
		{
			name: "clone3 must be denied", mode: policy.ModeRecord, d: func(d *policy.Decision) { d.MustDeny = []string{"clone3", "bpf"} },
			want: fates{"clone3": "SCMP_ACT_ERRNO(38)", "bpf": errno1}, gate: profiles.GateFilter, record: true,
		},
		{
			name: "clone3 must be denied, and was allowed", mode: policy.ModeEnforce, version: allowing("clone3"), d: func(d *policy.Decision) { d.MustDeny = []string{"clone3"} },
			want: fates{"clone3": "SCMP_ACT_ERRNO(38)"}, versions: 3,
		},
		{
			name: "clone3 must be denied, and is", mode: policy.ModeEnforce, version: allowing(), d: func(d *policy.Decision) { d.MustDeny = []string{"clone3"} },
			want: fates{"clone3": errno}, versions: 3,
		},
		{name: "enforce replaces", mode: policy.ModeEnforce, own: own(), version: allowing("clone"), d: func(d *policy.Decision) { d.ExistingProfile = policy.ExistingReplace }, want: fates{"clone": allow, "clone3": errno}, versions: 3},
		{name: "enforce, profile not shown", mode: policy.ModeEnforce, unknown: true, version: allowing("clone"), want: fates{"clone": allow}, says: "replaces it whole", versions: 3},
		{
			name: "multiplexer", mode: policy.ModeEnforce, version: allowing("socketcall", "socket", "ipc", "shmat"), d: func(d *policy.Decision) { d.MustDeny = []string{"socket"} },
			want: fates{"socketcall": errno, "socket": errno, "ipc": allow, "shmat": allow}, says: "socketcall is denied too", versions: 3,
		},
		{
			name: "multiplexer under audit", mode: policy.ModeAudit, version: allowing("socketcall"), d: func(d *policy.Decision) { d.MustDeny = []string{"connect"} },
			want: fates{"socketcall": errno1, "connect": errno1}, gate: profiles.GateFilter, record: true, versions: 3,
		},
		{
			name: "stricter denial stays", mode: policy.ModeEnforce, version: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{rule(specs.ActKillProcess, "bpf"), when(rule(specs.ActKillProcess, "ptrace"), 0, 1)}},
			d: func(d *policy.Decision) { d.MustDeny = []string{"bpf", "ptrace"} }, want: fates{"bpf": "SCMP_ACT_KILL_PROCESS", "ptrace": errno1}, versions: 3,
		},
		{
			name: "must-deny of what the runtime calls at random", mode: policy.ModeEnforce, version: allowing("open"), d: func(d *policy.Decision) { d.MustDeny = []string{"open", "tgkill"} },
			want: fates{"open": errno, "tgkill": errno}, says: "mustDeny holds tgkill: ", versions: 3,
		},
		{name: "default errno", mode: policy.ModeEnforce, version: func() *specs.LinuxSeccomp { p := allowing(); p.DefaultErrnoRet = ptr[uint](38); return p }(), want: fates{}, says: "instead of errno 38", versions: 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := Input{Decision: decision(tt.mode), Runtime: Runtime{CgroupMode: CgroupV2, BaseFilters: 1}}
			in.Container.Seccomp, in.Container.SeccompUnknown = tt.own, tt.unknown
			if tt.d != nil {
				tt.d(&in.Decision)
			}
			if tt.version != nil {
				in.Version = version(tt.version)
			}
			before, _ := json.Marshal(in)
			plan, err := Build(in)
			if err != nil {
				t.Fatal(err)
			}
			if after, _ := json.Marshal(in); string(before) != string(after) {
				t.Errorf("Build changed its input:\n%s\n%s", before, after)
			}
			if (plan.Seccomp != nil) != (tt.want != nil) {
				t.Fatalf("injected profile: got %+v, want one: %v", plan.Seccomp, tt.want != nil)
			}
			for call, want := range tt.want {
				if got := fate(plan.Seccomp, call); got != want {
					t.Errorf("%s: got %s, want %s", call, got, want)
				}
			}
			if plan.Gate != tt.gate || plan.Record != tt.record || plan.Version != tt.versions || (plan.Digest != "") != (tt.versions > 0) {
				t.Errorf("got gate %q, record %v, version %d %s; want %q, %v, %d", plan.Gate, plan.Record, plan.Version, plan.Digest, tt.gate, tt.record, tt.versions)
			}
			if text := strings.Join(append(plan.Notes, plan.Warnings...), "\n"); !strings.Contains(text, tt.says) {
				t.Errorf("notes and warnings are %q, want %q in them", text, tt.says)
			}
			filter := []Expectation(nil)
			if tt.want != nil || tt.own != nil {
				filter = []Expectation{
					{Stage: StageRunning, Source: SourceProc, File: "status", Field: "Seccomp", Want: "2", Rule: RuleEqual},
					{Stage: StageRunning, Source: SourceProc, File: "status", Field: "Seccomp_filters", Want: "2", Rule: RuleAtLeast},
				}
			}
			if diff := cmp.Diff(filter, plan.Expect); diff != "" {
				t.Errorf("expectations (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSeccompErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   Input
		want error
		says string
	}{
		{"enforce without a version", Input{Decision: decision(policy.ModeEnforce)}, ErrNoVersion, "run it in mode record first"},
		{"audit without a version", Input{Decision: decision(policy.ModeAudit)}, ErrNoVersion, "w, mode audit"},
		{"version without a profile", Input{Decision: decision(policy.ModeEnforce), Version: &profiles.Version{}}, ErrNoVersion, ""},
		{"audit of a profile not shown", Input{Decision: decision(policy.ModeAudit), Version: version(allowing()), Container: policy.Container{SeccompUnknown: true}}, ErrNotApplicable, "existingProfile: replace"},
		{"must-deny in a profile not shown", Input{Decision: func() policy.Decision { d := decision(policy.ModeRecord); d.MustDeny = []string{"bpf"}; return d }(), Container: policy.Container{SeccompUnknown: true}}, ErrNotApplicable, "mustDeny (bpf)"},
		{
			"own profile that an allow-list can't say",
			Input{Decision: decision(policy.ModeEnforce), Version: version(allowing("clone", "socket", "open")), Container: policy.Container{Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{when(rule(specs.ActErrno, "socket", "clone", "bpf"), 0, 38)}}}},
			nil, "version 3 of workload w: the container's own seccomp profile denies clone, socket with some arguments only",
		},
		{"version that allows by default", Input{Decision: decision(policy.ModeEnforce), Version: version(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow}), Container: policy.Container{Seccomp: allowing()}}, nil, "existingProfile: replace"},
		{"unknown mode", Input{Decision: decision("strict")}, nil, `unknown mode "strict"`},
		{"no workload", Input{Decision: policy.Decision{Mode: policy.ModeRecord}}, nil, "names no workload"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := Build(tt.in)
			if err == nil || plan != nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, %v, want error %v saying %q", plan, err, tt.want, tt.says)
			}
		})
	}
}

// TestOldContainerd: an engine that would drop the profile in silence gets none.
func TestOldContainerd(t *testing.T) {
	for version, old := range map[string]bool{
		"1.7.27": true, "v2.0.5": true, "2.1.4": true, "2.2.0": false, "2.2.0-rc.1": false, "v2.4.2": false, "3.0.0": false, "": false, "unknown": false,
	} {
		in := Input{Decision: decision(policy.ModeEnforce), Version: profileVersion(), Runtime: Runtime{Engine: "containerd", EngineVersion: version}}
		if _, err := Build(in); errors.Is(err, ErrNotApplicable) != old || err != nil && !strings.Contains(err.Error(), "2.2 or later") {
			t.Errorf("containerd %q: %v", version, err)
		}
		in.Decision.Mode = policy.ModeRecord
		if _, err := Build(in); errors.Is(err, ErrNotApplicable) != old {
			t.Errorf("containerd %q, record: %v", version, err)
		}
		in.Runtime.Adapter = AdapterHook
		if _, err := Build(in); err != nil {
			t.Errorf("hook: %v", err)
		}
	}
}

// NRI knows profiles since 0.10, and CRI-O 1.34.0 has an older one.
func TestOldCRIO(t *testing.T) {
	for v, old := range map[string]bool{"1.34.0": true, "v1.28.3": true, "1.36.1": false, "1.40.0": false, "": false} {
		in := Input{Decision: decision(policy.ModeEnforce), Version: profileVersion(), Runtime: Runtime{Engine: "cri-o", EngineVersion: v}}
		if _, err := Build(in); errors.Is(err, ErrNotApplicable) != old || err != nil && !strings.Contains(err.Error(), "1.36 or later") {
			t.Errorf("CRI-O %q: %v", v, err)
		}
	}
}

// An engine that crashes on errnos gets none, and nothing is allowed for it.
func TestNoErrno(t *testing.T) {
	denying := func(names ...string) *specs.LinuxSeccomp {
		return with(allowing(names...),
			errnoOf(rule(specs.ActErrno, "clone3"), 38), errnoOf(rule(specs.ActErrno, "mount"), 1), errnoOf(rule(specs.ActErrno, "bpf"), 13))
	}
	for name, tt := range map[string]struct {
		profile *specs.LinuxSeccomp
		clone3  string
		warns   string
	}{
		"ENOSYS by the lack of a tracer": {denying("open"), "SCMP_ACT_TRACE", "not the errno of their rules: bpf ("},
		"who may ptrace is one":          {denying("ptrace"), "SCMP_ACT_ERRNO", "not the errno of their rules: clone3, bpf ("},
		"or with some arguments": {
			with(denying("open"), when(rule(specs.ActAllow, "ptrace"), 0, 0)), "SCMP_ACT_ERRNO", "not the errno of their rules: clone3, bpf (",
		},
	} {
		t.Run(name, func(t *testing.T) {
			plan, err := Build(Input{
				Decision: decision(policy.ModeEnforce), Version: version(tt.profile),
				Runtime: Runtime{Engine: "cri-o", EngineVersion: "1.36.1", NoErrno: true},
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range plan.Seccomp.Syscalls {
				if r.ErrnoRet != nil {
					t.Errorf("rule %v has errno %d", r.Names, *r.ErrnoRet)
				}
			}
			for call, want := range map[string]string{"clone3": tt.clone3, "mount": "SCMP_ACT_ERRNO", "bpf": "SCMP_ACT_ERRNO"} {
				if got := fate(plan.Seccomp, call); got != want {
					t.Errorf("%s: %s, want %s", call, got, want)
				}
			}
			if !slices.ContainsFunc(plan.Warnings, func(w string) bool { return strings.Contains(w, tt.warns) }) {
				t.Errorf("warnings %q, want %q", plan.Warnings, tt.warns)
			}
		})
	}
}

func profileVersion() *profiles.Version { return version(allowing("open")) }

func TestMissingCalls(t *testing.T) {
	if len(startCalls()) == 0 {
		t.Fatal("profiles.MissingForStart accepts a profile that allows nothing")
	}
	lost := startCalls()[0]
	check := func(name string, in Input, version int) {
		t.Run(name, func(t *testing.T) {
			_, err := Build(in)
			var missing *MissingCallsError
			if !errors.As(err, &missing) {
				t.Fatalf("got %v, want a MissingCallsError", err)
			}
			if !slices.Contains(missing.Calls, lost) || missing.Version != version || !strings.Contains(err.Error(), lost) {
				t.Errorf("got %+v (%v), want %s of version %d", missing, err, lost, version)
			}
		})
	}
	denying := func(mode policy.Mode) policy.Decision {
		d := decision(mode)
		d.MustDeny = []string{lost}
		return d
	}
	check("version", Input{Decision: decision(policy.ModeEnforce), Version: version(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno})}, 3)
	check("must-deny", Input{Decision: denying(policy.ModeEnforce), Version: version(allowing())}, 3)
	check("must-deny under audit", Input{Decision: denying(policy.ModeAudit), Version: version(allowing())}, 3)
	check("must-deny while recording", Input{Decision: denying(policy.ModeRecord)}, 0)
	check("must-deny in own", Input{Decision: denying(policy.ModeRecord), Container: policy.Container{Seccomp: allowing()}}, 0)

	// What the container's own profile lacks by itself is not ours to refuse.
	d := decision(policy.ModeRecord)
	d.MustDeny = []string{"bpf"}
	bare := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{rule(specs.ActAllow, "bpf", "open")}}
	if _, err := Build(Input{Decision: d, Container: policy.Container{Seccomp: bare}}); err != nil {
		t.Errorf("own profile that lacks calls by itself: %v", err)
	}
}

func TestArchitectures(t *testing.T) {
	d := decision(policy.ModeEnforce)
	d.Architectures = []specs.Arch{specs.ArchX86, specs.ArchX86_64}
	plan, err := Build(Input{Decision: d, Version: version(allowing())})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]specs.Arch{specs.ArchX86_64, specs.ArchX86}, plan.Seccomp.Architectures); diff != "" {
		t.Errorf("architectures (-want +got):\n%s", diff)
	}
}

// names for random profiles: multiplexers, what they reach, and others.
var names = []string{"open", "read", "bpf", "clone", "clone3", "socketcall", "socket", "connect", "ipc", "shmat", "semop", "mount", "ioctl"}

var actions = []specs.LinuxSeccompAction{
	specs.ActAllow, specs.ActAllow, specs.ActErrno, specs.ActLog, specs.ActTrap, specs.ActKillProcess,
	specs.ActKillThread, specs.ActKill, specs.ActTrace, specs.ActNotify, "SCMP_ACT_FUTURE", "",
}

func randomProfile(r *rand.Rand) *specs.LinuxSeccomp {
	p := &specs.LinuxSeccomp{DefaultAction: actions[r.IntN(len(actions))]}
	for range r.IntN(8) {
		s := specs.LinuxSyscall{Action: actions[r.IntN(len(actions))]}
		for range r.IntN(5) {
			s.Names = append(s.Names, names[r.IntN(len(names))])
		}
		if r.IntN(3) == 0 {
			s = when(s, 0, uint64(r.IntN(3)))
		}
		if r.IntN(2) == 0 {
			s.ErrnoRet = ptr(uint(r.IntN(40)))
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	if r.IntN(2) == 0 { // else MissingForStart refuses nearly all of them
		p.Syscalls = append(p.Syscalls, rule(specs.ActAllow, startCalls()...))
	}
	return p
}

func randomCalls(r *rand.Rand) []string {
	var calls []string
	for range r.IntN(5) {
		calls = append(calls, names[r.IntN(len(names))])
	}
	return calls
}

// TestMustDenyLaw: whatever the mode, the version and the container's own
// profile, no injected profile lets a must-deny call through; and under enforce
// nothing is allowed that neither the version nor must-allow allows.
func TestMustDenyLaw(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	injected := map[policy.Mode]int{}
	for range 50000 {
		mode := []policy.Mode{policy.ModeRecord, policy.ModeAudit, policy.ModeEnforce}[r.IntN(3)]
		d := decision(mode)
		d.MustDeny, d.MustAllow = randomCalls(r), randomCalls(r)
		if r.IntN(2) == 0 {
			d.ExistingProfile = policy.ExistingReplace
		}
		in := Input{Decision: d, Version: version(randomProfile(r))}
		if r.IntN(2) == 0 {
			in.Container.Seccomp = randomProfile(r)
		}
		plan, err := Build(in)
		var missing *MissingCallsError
		if errors.As(err, &missing) || err != nil && strings.Contains(err.Error(), "own seccomp profile") {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if plan.Seccomp == nil {
			if len(d.MustDeny) > 0 {
				t.Fatalf("must-deny %v without an injected profile: %+v", d.MustDeny, in)
			}
			continue
		}
		injected[mode]++
		for _, call := range d.MustDeny {
			if reachable(plan.Seccomp, call) {
				show, _ := json.MarshalIndent(plan.Seccomp, "", " ")
				t.Fatalf("%s is in must-deny %v and reachable in mode %s:\n%s", call, d.MustDeny, mode, show)
			}
		}
		if mode != policy.ModeEnforce {
			continue
		}
		for _, call := range names {
			if reachable(plan.Seccomp, call) && !reachable(in.Version.Profile, call) && !slices.Contains(d.MustAllow, call) &&
				!slices.ContainsFunc(d.MustAllow, func(m string) bool { return slices.Contains(profiles.Multiplexed(m), call) }) {
				show, _ := json.MarshalIndent(plan.Seccomp, "", " ")
				t.Fatalf("%s is reachable, but not by the version or must-allow %v:\n%s", call, d.MustAllow, show)
			}
		}
	}
	for _, mode := range []policy.Mode{policy.ModeRecord, policy.ModeAudit, policy.ModeEnforce} {
		if injected[mode] < 2000 {
			t.Errorf("mode %s injected only %d profiles: the law was hardly tested", mode, injected[mode])
		}
	}
}

// TestAuditLaw: a dry run under a container's own profile never lets a call
// through that the own profile denies.
func TestAuditLaw(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	n := 0
	for range 20000 {
		in := Input{Decision: decision(policy.ModeAudit), Version: version(randomProfile(r)), Container: policy.Container{Seccomp: randomProfile(r)}}
		plan, err := Build(in)
		if err != nil {
			continue
		}
		n++
		for _, call := range names {
			if reachable(plan.Seccomp, call) && !reachable(in.Container.Seccomp, call) {
				show, _ := json.MarshalIndent([]any{in.Container.Seccomp, in.Version.Profile, plan.Seccomp}, "", " ")
				t.Fatalf("%s is reachable under audit, and not under the own profile:\n%s", call, show)
			}
		}
	}
	if n < 2000 {
		t.Errorf("only %d plans: the law was hardly tested", n)
	}
}
