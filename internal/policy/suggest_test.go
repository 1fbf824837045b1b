// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
)

// TestSuggestedPhases: what is suggested is read as it was meant, whatever its phases
// are called and whoever wrote the recordings.
func TestSuggestedPhases(t *testing.T) {
	s := &profiles.Suggestion{
		Workload: "w\npolicies: []", Initial: "true",
		Phases: []profiles.SuggestedPhase{
			{Name: "true", Allow: []profiles.PhaseRule{
				{Names: []string{"getdents64"}},
				{Names: []string{"openat"}, Args: []specs.LinuxSeccompArg{{Index: 2, Op: specs.OpMaskedEqual, Value: 0x243}}},
				{Names: []string{"socket"}, Args: []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpEqualTo, Value: 16}}},
			}},
			{Name: "on", Allow: []profiles.PhaseRule{{Names: []string{"mkdir"}}}},
			{Name: "idle", Allow: []profiles.PhaseRule{}},
		},
		Architectures: []profiles.ABI{"SCMP_ARCH_X86", "SCMP_ARCH_X86_64"},
		Recordings: []profiles.SuggestedRecording{
			{ID: "1\nstore: /", Kernel: "6.12", Phases: []string{"on", "true"}, Losses: []profiles.Loss{{Kind: "first-seen-events"}}},
			{ID: "2", LeftOut: "it was not recorded by phase"},
		},
		Notes: []string{"clone3: is answered ENOSYS"},
	}
	data, err := SuggestedPhases(s)
	if err != nil {
		t.Fatal(err)
	}
	const want = `# Made by 'syslatch profile suggest' of what w?policies: [] did in each phase.
# recording 1?store: /, kernel 6.12: on true, with losses (first-seen-events)
# recording 2 left out: it was not recorded by phase
# clone3: is answered ENOSYS
architectures: [SCMP_ARCH_X86, SCMP_ARCH_X86_64]
phases:
  initial: "true"
  "true":
    allow:
      - getdents64
      - {names: [openat], args: [{index: 2, op: SCMP_CMP_MASKED_EQ, value: 0x243, valueTwo: 0x0}]}
      - {names: [socket], args: [{index: 0, op: SCMP_CMP_EQ, value: 0x10}]}
  "on":
    allow:
      - mkdir
  idle: {}
`
	if diff := cmp.Diff(want, string(data)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	file := "apiVersion: syslatch.dev/v1\npolicies:\n- name: a\n  match: {}\n  mode: enforce\n  " +
		strings.ReplaceAll(strings.TrimSpace(string(data)), "\n", "\n  ") + "\n"
	f, err := Parse("f.yaml", []byte(file), Options{Phases: true})
	if err != nil {
		t.Fatalf("%v in\n%s", err, file)
	}
	set, meant := f.Policies[0].Set(), s.Set()
	meant.Phases[2].Allow = nil
	if diff := cmp.Diff(meant, set); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
