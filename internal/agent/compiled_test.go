// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// phasedDecision is one of a policy with phases.
func phasedDecision(t testing.TB) *policy.Decision {
	t.Helper()
	const text = `apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {}
  mode: enforce
  workload: w
  architectures: [SCMP_ARCH_X86_64, SCMP_ARCH_X86, SCMP_ARCH_X32]
  phases:
    initial: read_only
    gaps: report
    read_only:
      allow: ["@file-read", "@basic-io", "@info", "@process"]
      network: none
    write_logs:
      allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process"]
      network: none
    network:
      allow: ["@file-read", "@basic-io", "@info", "@process", "@network"]
      next: [read_only]
    locked: {irreversible: true}
`
	path := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := policy.Load(path, policy.Options{KnownCall: seccomp.Known, Phases: true})
	if err != nil {
		t.Fatal(err)
	}
	d, err := file.Decide(policy.Container{ID: "c1", Name: "c"})
	if err != nil {
		t.Fatal(err)
	}
	return &d
}

// TestPlans: what is alike is compiled once, what isn't isn't confused, and what one
// caller does to its filter is not seen by another.
func TestPlans(t *testing.T) {
	var p plans
	of := func(change func(*policy.Decision, *instancePhases)) *compiled {
		t.Helper()
		d, ip := phasedDecision(t), &instancePhases{Host: profiles.PhaseHost{Notify: true}}
		change(d, ip)
		is, err := p.of(d, ip)
		if err != nil {
			t.Fatal(err)
		}
		return is
	}
	first := of(func(*policy.Decision, *instancePhases) {})
	if again := of(func(d *policy.Decision, _ *instancePhases) { d.Phase, d.Workload = "network", "another" }); again != first {
		t.Error("compiled twice")
	}
	for name, change := range map[string]func(*policy.Decision, *instancePhases){
		"host":          func(_ *policy.Decision, ip *instancePhases) { ip.Host.Notify = false },
		"kernel":        func(_ *policy.Decision, ip *instancePhases) { ip.Newer = []string{"cachestat"} },
		"architectures": func(d *policy.Decision, _ *instancePhases) { d.Architectures = d.Architectures[:1] },
		"mustDeny":      func(d *policy.Decision, _ *instancePhases) { d.MustDeny = []string{"getcwd"} },
		"mustAllow":     func(d *policy.Decision, _ *instancePhases) { d.MustAllow = []string{"chroot"} },
		"paths":         func(d *policy.Decision, _ *instancePhases) { d.Phases.Phases[0].ReadPaths = []string{"/etc"} },
		"no paths":      func(d *policy.Decision, _ *instancePhases) { d.Phases.Phases[0].WritePaths = []string{} },
		"next":          func(d *policy.Decision, _ *instancePhases) { d.Phases.Phases[2].Next = []string{"locked"} },
		"initial":       func(d *policy.Decision, _ *instancePhases) { d.Phases.Initial = "network" },
	} {
		if other := of(change); other == first {
			t.Errorf("another %s: the same plan", name)
		}
	}
	before := seccompDigest(first.plan.Profile)
	mine := first.filter("/socket")
	if mine.Profile.ListenerPath != "/socket" {
		t.Errorf("listener at %q", mine.Profile.ListenerPath)
	}
	if seccompDigest(first.plan.Profile) != before {
		t.Error("the shared filter has changed")
	}
	var all sync.WaitGroup // of which some share a plan
	for range 8 {
		d := phasedDecision(t)
		d.MustDeny = []string{"chdir"}
		all.Go(func() {
			is, err := p.of(d, &instancePhases{})
			if err != nil {
				t.Error(err)
				return
			}
			is.tables()
			is.filter("/socket")
			is.plan.Tightens("network", "read_only")
		})
	}
	all.Wait()
}

// TestChecks: what has passed isn't asked about again, and what hasn't is.
func TestChecks(t *testing.T) {
	asked := 0
	bad := errors.New("bad rule")
	c := &checks{check: func(p *specs.LinuxSeccomp) error {
		asked++
		if p.DefaultAction == specs.ActKill {
			return bad
		}
		return nil
	}}
	for range 2 {
		if err := c.do(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno}); err != nil {
			t.Error(err)
		}
		if err := c.do(&specs.LinuxSeccomp{DefaultAction: specs.ActKill}); !errors.Is(err, bad) {
			t.Error(err)
		}
	}
	if asked != 3 {
		t.Errorf("asked %d times, want 3", asked)
	}
}

// BenchmarkCreate is what making a container with phases costs syslatchd, in parts: for
// the first of a policy, and for each.
func BenchmarkCreate(b *testing.B) {
	d := phasedDecision(b)
	ip := &instancePhases{Host: profiles.PhaseHost{Notify: true}, Newer: seccomp.NewerThan(seccomp.KernelRelease())}
	var p plans
	is, err := p.of(d, ip)
	if err != nil {
		b.Fatal(err)
	}
	filter := is.filter("/socket").Profile
	c := &checks{check: seccomp.Check}
	for _, part := range []struct {
		name string
		do   func() error
	}{
		{"first/compile", func() error { _, err := inputOf(d, ip).compile(); return err }},
		{"first/tables", func() error { is, err := inputOf(d, ip).compile(); is.tables(); return err }},
		{"first/check", func() error { return seccomp.Check(filter) }},
		{"each/compile", func() error { _, err := p.of(d, ip); return err }},
		{"each/build", func() error {
			_, err := adjust.Build(adjust.Input{
				Decision: *d, Container: policy.Container{ID: "c1"}, Phases: filter,
				Runtime: adjust.Runtime{Adapter: adjust.AdapterNRI, Engine: "containerd", EngineVersion: "2.4.2"},
			})
			return err
		}},
		{"each/check", func() error { return c.do(filter) }},
	} {
		b.Run(part.name, func(b *testing.B) {
			for b.Loop() {
				if err := part.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
