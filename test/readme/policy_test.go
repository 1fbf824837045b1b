// SPDX-License-Identifier: Apache-2.0

package readme

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
)

func parse(place, text string) error {
	phases := place == "phases" || place == "A phase" // of docs/phases.md
	_, err := policy.Parse("p.yaml", []byte(text), policy.Options{KnownCall: seccomp.Known, Phases: phases})
	return err
}

// within puts fields into a place of a policy file that is good without them,
// in place of those of the same name.
func within(place, fields string) string {
	key, _, _ := strings.Cut(fields, ":")
	lines := func(indent string, defaults ...string) (out string) {
		for _, d := range append(defaults, fields) {
			if d == fields || !strings.HasPrefix(d, key+":") {
				out += indent + d + "\n"
			}
		}
		return out
	}
	const version, policies = "apiVersion: syslatch.dev/v1", "policies: []"
	policy := version + "\npolicies:\n- \n"
	switch place {
	case "The file":
		return lines("", version, policies)
	case "nri", "hook":
		return version + "\n" + policies + "\n" + place + ":\n" + lines("  ")
	case "policies[]":
		return policy + lines("  ", "name: p", "match: {}", "mode: record")
	case "phases":
		return policy + "  name: p\n  mode: enforce\n  match: {}\n  phases:\n" + lines("    ", "initial: a", "a: {}")
	case "A phase":
		return policy + "  name: p\n  mode: enforce\n  match: {}\n  phases:\n    initial: a\n    a:\n" + lines("      ")
	case "match", "limits":
		return policy + "  name: p\n  mode: record\n" + map[bool]string{true: "  match: {}\n"}[place == "limits"] + "  " + place + ":\n" + lines("    ")
	}
	return ""
}

// Every field is in docs/policy.md or docs/phases.md, and what it says is refused is, with the
// error that it says.
func TestPolicyReference(t *testing.T) {
	var data []byte
	for _, file := range []string{"docs/policy.md", "docs/phases.md"} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, text...)
	}
	row := regexp.MustCompile("^\\| `([^`]+)` \\| .* \\| `([^`]+)` \\((.*)\\) \\|$")
	place, rows := "", 0
	documented := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if h, ok := strings.CutPrefix(line, "## "); ok {
			place = h
		}
		if !strings.HasPrefix(line, "| `") || within(place, "") == "" { // of no field
			continue
		}
		m := row.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("no row with something that is refused: %s", line)
			continue
		}
		rows++
		field, bad, message := m[1], m[2], m[3]
		documented[field] = true
		text := within(place, bad)
		if err := parse(place, text); err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: got %v, want %q, of\n%s", bad, err, message, text)
		}
	}
	if rows < 30 {
		t.Fatalf("%d rows", rows)
	}

	// The decoder names the fields that it knows.
	known := regexp.MustCompile(`nonsense: unknown field, want (.*)`)
	for _, at := range []struct{ place, prefix, fields string }{
		{"The file", "", "nonsense: 1"},
		{"nri", "nri.", "nonsense: 1"},
		{"hook", "hook.", "nonsense: 1"},
		{"hook", "hook.rootless.", "rootless: {nonsense: 1}"},
		{"policies[]", "", "nonsense: 1"},
		{"match", "match.", "nonsense: 1"},
		{"limits", "limits.", "nonsense: 1"},
		{"limits", "limits.memory.", "memory: {nonsense: 1}"},
		{"limits", "limits.cpu.", "cpu: {nonsense: 1}"},
		{"limits", "limits.pids.", "pids: {nonsense: 1}"},
		{"limits", "limits.io.", "io: {nonsense: 1}"},
		{"limits", "limits.io.max[].", `io: {max: [{device: "8:0", rbps: 1, nonsense: 1}]}`},
		{"limits", "limits.rlimits[].", "rlimits: [{type: RLIMIT_CORE, soft: 1, hard: 1, nonsense: 1}]"},
		{"A phase", "PHASE.", "nonsense: 1"},
		{"A phase", "PHASE.files.", "files: {nonsense: 1}"},
		{"A phase", "PHASE.allow[].", "allow: [{names: [socket], args: [{index: 0, op: SCMP_CMP_EQ, value: 1}], nonsense: 1}]"},
		{"A phase", "PHASE.allow[].args[].", "allow: [{names: [socket], args: [{index: 0, op: SCMP_CMP_EQ, value: 1, nonsense: 1}]}]"},
	} {
		m := known.FindStringSubmatch(fmt.Sprint(parse(at.place, within(at.place, at.fields))))
		if m == nil {
			t.Fatalf("%+v: %v", at, parse(at.place, within(at.place, at.fields)))
		}
		for _, field := range strings.Fields(strings.NewReplacer(",", "", " or ", " ").Replace(m[1])) {
			found := false
			for d := range documented {
				found = found || d == at.prefix+field || strings.HasPrefix(d, at.prefix+field+".") || strings.HasPrefix(d, at.prefix+field+"[]")
			}
			if !found {
				t.Errorf("the reference lacks %s%s", at.prefix, field)
			}
		}
	}
}
