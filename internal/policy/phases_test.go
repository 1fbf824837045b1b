// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
)

const phasesText = `apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {}
  mode: enforce
  mustDeny: [bpf]
  phases:
    initial: read_only
    gaps: report
    read_only:
      allow:
      - "@file-read"
      - stat
      - {names: [ioctl, prctl], args: [{index: 1, op: SCMP_CMP_EQ, value: 0x5401}]}
      - names: [setpriority]
        args:
        - {index: 0, op: SCMP_CMP_MASKED_EQ, value: 0xffffffff, valueTwo: 1}
        - {index: 1, op: SCMP_CMP_LE, value: 5}
      files: {read: [/app, /], write: []}
      network: none
      next: [network]
    network:
      network: [unix, "10.0.0.0/8:443", "[2001:db8::]/32", 192.0.2.1]
      files: {write: [/var/log]}
      limits: {memory: {max: 64Mi}, pids: {max: 16}, oomScoreAdj: 500, unified: {memory.high: 32Mi}}
    any: {network: any}
    locked: {irreversible: true}
`

func TestParsePhases(t *testing.T) {
	got, err := Parse("policy.yaml", []byte(phasesText), Options{KnownCall: knownCall, Phases: true})
	if err != nil {
		t.Fatal(err)
	}
	want := &Phases{Initial: "read_only", Gaps: GapsReport, Phases: []Phase{
		{Line: 10, Phase: profiles.Phase{
			Name: "read_only",
			Allow: []profiles.PhaseRule{
				{Names: []string{"@file-read"}},
				{Names: []string{"stat"}},
				{Names: []string{"ioctl", "prctl"}, Args: []specs.LinuxSeccompArg{{Index: 1, Op: specs.OpEqualTo, Value: 0x5401}}},
				{Names: []string{"setpriority"}, Args: []specs.LinuxSeccompArg{
					{Index: 0, Op: specs.OpMaskedEqual, Value: 0xffffffff, ValueTwo: 1}, {Index: 1, Op: specs.OpLessEqual, Value: 5},
				}},
			},
			ReadPaths: []string{"/app", "/"}, WritePaths: []string{}, Network: []string{}, Next: []string{"network"},
		}},
		{
			Line: 22, Phase: profiles.Phase{
				Name: "network", WritePaths: []string{"/var/log"}, Network: []string{"unix", "10.0.0.0/8:443", "[2001:db8::]/32", "192.0.2.1"},
			},
			Limits: Limits{Memory: Memory{Max: ptr[int64](64 << 20)}, Pids: ptr[int64](16), OOMScoreAdj: ptr(500), Unified: map[string]string{"memory.high": "32Mi"}},
		},
		{Line: 26, Phase: profiles.Phase{Name: "any"}},
		{Line: 27, Phase: profiles.Phase{Name: "locked", Irreversible: true}},
	}}
	if diff := cmp.Diff(want, got.Policies[0].Phases); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	set := got.Policies[0].Set()
	if len(set.Phases) != 4 || set.Initial != "read_only" || !cmp.Equal(set.MustDeny, []string{"bpf"}) {
		t.Errorf("%+v", set)
	}
}

// TestDecidePhases: phases are for enforcing and for recording.
func TestDecidePhases(t *testing.T) {
	f, err := Parse("policy.yaml", []byte(`apiVersion: syslatch.dev/v1
policies:
- name: a
  match: {}
  mode: record
  allowedModes: [audit, enforce]
  annotations: [mode, phase]
  phases: {initial: a, a: {}, b: {}}
`), Options{Phases: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		mode, phase, want string // want: the phase, "" for none, "?" for an error
	}{
		{"", "", "a"}, {"record", "b", "b"}, {"enforce", "b", "b"}, {"enforce", "", "a"}, {"audit", "b", ""}, {"record", "c", "?"},
	} {
		c := Container{Image: "i", Name: "c", Annotations: map[string]string{}}
		if tc.mode != "" {
			c.Annotations[AnnotationMode] = tc.mode
		}
		if tc.phase != "" {
			c.Annotations[AnnotationPhase] = tc.phase
		}
		d, err := f.Decide(c)
		if err != nil {
			d.Phase = "?"
		}
		if d.Phase != tc.want || (d.Phases != nil) != (err == nil && tc.want != "") {
			t.Errorf("%+v: %q, %v, %v", tc, d.Phase, d.Phases, err)
		}
	}
	const audit = "apiVersion: syslatch.dev/v1\npolicies:\n- {name: a, match: {}, mode: audit, phases: {initial: a, a: {}}}\n"
	if _, err := Parse("policy.yaml", []byte(audit), Options{Phases: true}); err == nil || !strings.Contains(err.Error(), "audit knows no phases") {
		t.Errorf("in mode audit: %v", err)
	}
}

// FuzzParsePhases: what parses also compiles, and what names phases never passes a
// caller that doesn't enforce them.
func FuzzParsePhases(f *testing.F) {
	f.Add([]byte(phasesText))
	for _, path := range []string{"testdata/invalid/phases.yaml", "testdata/invalid/phases-together.yaml", "testdata/invalid/phases-unenforced.yaml"} {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse("f.yaml", data, Options{Phases: true})
		if err != nil {
			return
		}
		phases := false
		for i := range file.Policies {
			p := &file.Policies[i]
			if p.Phases == nil {
				continue
			}
			phases = true
			if _, err := profiles.CompilePhases(p.Set(), profiles.PhaseHost{Notify: true}, profiles.PhaseOptions{}); err != nil {
				t.Fatalf("%+v: %v", p.Phases, err)
			}
		}
		if plain, err := Parse("f.yaml", data, Options{}); phases != (err != nil) {
			t.Fatalf("without phases: %v, %v", plain, err)
		}
	})
}

func TestParseDestination(t *testing.T) {
	for text, want := range map[string]struct {
		prefix string
		port   uint16
	}{
		"10.0.0.0/8:443":      {"10.0.0.0/8", 443},
		"192.0.2.1":           {"192.0.2.1/32", 0},
		"192.0.2.1:65535":     {"192.0.2.1/32", 65535},
		"0.0.0.0/0":           {"0.0.0.0/0", 0},
		"[2001:db8::]/32:443": {"2001:db8::/32", 443},
		"[::1]":               {"::1/128", 0},
		"[::1]:80":            {"::1/128", 80},
	} {
		prefix, port, err := ParseDestination(text)
		if err != nil || prefix != netip.MustParsePrefix(want.prefix) || port != want.port {
			t.Errorf("%s: %v, %d, %v", text, prefix, port, err)
		}
	}
	for _, text := range []string{"", "/8", "10.0.0.0/", "10.0.0.0/8:", "10.0.0.0/-1", "10.0.0.0:443/8", "[10.0.0.1]", "::1", "[::1", "[::ffff:1.2.3.4]", "1.2.3", "localhost", "unix:/run", "1.2.3.4:+1", "10.0.0.0/08:1x"} {
		if p, port, err := ParseDestination(text); err == nil {
			t.Errorf("%q: %v, %d", text, p, port)
		}
	}
}
