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

// TestPhasesNeedADaemon: a container with phases is refused where nobody supervises it,
// and others of the same policy file aren't.
func TestPhasesNeedADaemon(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "policy.yaml")
	id := strings.Repeat("0a", 32)
	spec := `{"ociVersion":"1.0.2","process":{"args":["true"],"cwd":"/"},"root":{"path":"/"},` +
		`"annotations":{"io.container.manager":"libpod"},"linux":{"cgroupsPath":"/libpod_parent/libpod-` + id + `"}}`
	for _, tc := range []struct {
		policies string // before one for all
		want     string // part of the deny hook's arguments, "" for none
	}{
		{"- {name: b, match: {images: [nginx]}, mode: enforce, workload: w, phases: {initial: a, a: {}}}\n", ""},
		{"- {name: b, match: {}, mode: record, workload: w, phases: {initial: a, a: {}}, allowedModes: [record, enforce], annotations: [mode], existingProfile: replace, failure: runtime-default}\n", ""},
		{"- {name: b, match: {}, mode: enforce, workload: w, phases: {initial: a, a: {}}}\n", "phases of policy b: phases need a running syslatchd (systemctl start syslatchd"},
	} {
		text := "apiVersion: syslatch.dev/v1\nstore: " + dir + "/store\nstateDir: " + dir + "/state\nbpffs: " + dir + "/bpf\npolicies:\n" + tc.policies
		if strings.Contains(tc.policies, "nginx") { // the first that matches counts, and none may follow one for all
			text += "- {name: rest, match: {}, mode: \"off\"}\n"
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
		if !strings.Contains(said, tc.want) || tc.want == "" && said != "" {
			t.Errorf("%s: hooks say %q, want %q", tc.policies, said, tc.want)
		}
	}
}
