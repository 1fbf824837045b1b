// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/syslatch/syslatch/internal/api/apitest"
	"github.com/syslatch/syslatch/internal/phase"
)

// The examples of contrib work, in each of their languages.
func TestContrib(t *testing.T) {
	s := three()
	s.OnSet = func(_ context.Context, a apitest.Asked) error {
		status, _ := s.Get(a.ID)
		status.Uncovered = []string{"pid 12"}
		switch a.To {
		case "stuck":
			return &phase.IncompleteError{Status: status, Err: context.DeadlineExceeded}
		case "raced":
			return &phase.GenerationError{Want: a.Options.Generation, Is: 9}
		}
		return nil
	}
	r := startServer(t, s, limits{})
	for _, language := range [][]string{{"python3", "../../contrib/phases/switch.py"}, {"node", "../../contrib/phases/switch.mjs"}} {
		t.Run(language[0], func(t *testing.T) {
			if _, err := exec.LookPath(language[0]); err != nil {
				t.Fatalf("%v (make deps installs it)", err)
			}
			if _, err := os.ReadFile(language[1]); err != nil { // so that the test cache sees a change
				t.Fatal(err)
			}
			run := func(socket string, args ...string) (int, string, string) {
				cmd := exec.CommandContext(t.Context(), language[0], append(language[1:], args...)...)
				cmd.Env = append(os.Environ(), "SYSLATCH_SOCKET="+socket, "PYTHONDONTWRITEBYTECODE=1")
				var stdout, stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = &stdout, &stderr
				_ = cmd.Run() // its exit status is compared
				return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
			}
			id := "4f2a91"
			if language[0] == "node" {
				id = "4f77"
			}
			for _, tc := range []struct {
				socket         string
				args           []string
				code           int
				stdout, stderr string
			}{
				{r.socket, []string{id[:3], "network"}, 0, "network: holds, generation 2\n", ""},
				{r.socket, []string{id, "network"}, 0, "network: holds, generation 2\n", ""},
				{r.socket, []string{id, "read_only"}, 0, "read_only: holds, generation 3\n", ""},
				{r.socket, []string{id, "nowhere"}, 3, "", "unknown phase (possible from here: write_logs, network, locked)"},
				{r.socket, []string{id, "raced"}, 3, "", "generation is 9, not 3"},
				{r.socket, []string{id, "stuck"}, 4, "", "does not hold for every task: context deadline exceeded (pid 12)"},
				{r.socket, []string{"../4f", "network"}, 1, "", "no such instance"},
				{r.socket, []string{"4f", "network"}, 1, "", "2 instances begin with"},
				{r.socket + ".not", []string{id, "network"}, 1, "", r.socket + ".not"},
				{r.socket, []string{id}, 1, "", "switch."},
			} {
				code, stdout, stderr := run(tc.socket, tc.args...)
				if code != tc.code || stdout != tc.stdout || !strings.Contains(stderr, tc.stderr) || (stderr == "") != (code == 0) {
					t.Errorf("%v: exit %d, %q, %q; want %+v", tc.args, code, stdout, stderr, tc)
				}
			}
		})
	}
	for _, a := range s.Asked() {
		if a.Options.Generation == 0 || a.Options.Origin != phase.Outside {
			t.Errorf("%+v", a)
		}
	}
}
