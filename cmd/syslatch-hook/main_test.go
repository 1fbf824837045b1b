// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/policy"
)

// TestPhasesAreRefused: a container whose policy file has phases doesn't start, since
// nothing here enforces them.
func TestPhasesAreRefused(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "policy.yaml")
	text := "apiVersion: syslatch.dev/v1\nstore: " + dir + "/store\nstateDir: " + dir + "/state\nbpffs: " + dir + "/bpf\npolicies:\n- name: a\n  match: {}\n  mode: \"off\"\n"
	spec := `{"ociVersion":"1.0.2","process":{"args":["true"],"cwd":"/"},"root":{"path":"/"},"linux":{}}`
	for _, tc := range []struct {
		phases string
		want   string // part of the deny hook's arguments
	}{
		// Without phases the file is good, and this spec is refused for another reason.
		{"", "doesn't tell the container's id"},
		{"- {name: b, match: {}, mode: enforce, phases: {initial: a, a: {}}}\n", "are not enforced by this program"},
	} {
		if tc.phases != "" { // the first matches all: put the other before it
			text = strings.Replace(text, "policies:\n", "policies:\n"+strings.Replace(tc.phases, "match: {}", "match: {images: [nginx]}", 1), 1)
		}
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := serve(t.Context(), "precreate", config, policy.DefaultRootlessSocket, strings.NewReader(spec), &out); err != nil {
			t.Fatal(err)
		}
		var got specs.Spec
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatalf("%v: %s", err, out.Bytes())
		}
		var said string
		if got.Hooks != nil {
			for _, h := range got.Hooks.CreateRuntime {
				said += strings.Join(h.Args, " ")
			}
		}
		if !strings.Contains(said, tc.want) {
			t.Errorf("hooks say %q, want %q", said, tc.want)
		}
	}
}
