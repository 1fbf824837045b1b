// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

const busyboxWorkload = "syslatch.test/busybox/app"

// byAnnotation lets pods choose their mode.
const byAnnotation = `
- name: all
  match: {}
  mode: record
  annotations: [mode]
  allowedModes: [off, record, audit, enforce]
`

func mode(m string) harness.PodOptions {
	return harness.PodOptions{Annotations: map[string]string{"mode.syslatch.dev/pod": m}}
}

var x8664 = profiles.ABI("SCMP_ARCH_X86_64")

// The main job: record, publish, enforce, deny, widen.
func TestRecordPublishEnforce(t *testing.T) {
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		for _, noNewPrivs := range []bool{false, true} {
			name := runtime
			if noNewPrivs {
				name += " no_new_privs"
			}
			t.Run(name, func(t *testing.T) {
				e := newEnv(t, harness.Options{})
				d := e.start(byAnnotation)
				run := func(m, script string) harness.Result {
					p, c := mode(m), sh(script)
					p.Runtime, c.NoNewPrivs = runtime, noNewPrivs
					return e.run(p, c)
				}
				const work = "ls / | wc -l; echo done"

				if r := run("record", work); r.Code != 0 || !strings.HasSuffix(r.Log, "done\n") {
					t.Fatalf("recorded run: %+v", r)
				}
				v1 := e.waitVersion(d, busyboxWorkload, 1)
				if len(v1.Manifest.Losses) != 0 || v1.Manifest.Calls.Has(x8664, "mkdir") {
					t.Errorf("version 1: %+v", v1.Manifest)
				}

				if r := run("enforce", work); r.Code != 0 || !strings.HasSuffix(r.Log, "done\n") {
					t.Fatalf("same run under version 1: %+v", r)
				}
				if r := run("enforce", "mkdir /tmp/x; "+work); !strings.Contains(r.Log, "Operation not permitted") || !strings.Contains(r.Log, "done\n") {
					t.Errorf("mkdir under version 1: %+v", r)
				}

				if r := run("record", "mkdir /tmp/x; "+work); r.Code != 0 {
					t.Fatalf("second recorded run: %+v", r)
				}
				v2 := e.waitVersion(d, busyboxWorkload, 2)
				if !v2.Manifest.Calls.Has(x8664, "mkdir") {
					t.Errorf("version 2 has no mkdir: %v", v2.Manifest.Calls)
				}
				if lost := v1.Manifest.Calls.Minus(v2.Manifest.Calls); lost.Len() != 0 {
					t.Errorf("version 2 lost %v", lost)
				}
				if v2.Manifest.Parent != v1.Manifest.Digest {
					t.Errorf("version 2's parent is %s, want %s", v2.Manifest.Parent, v1.Manifest.Digest)
				}
				if r := run("enforce", "mkdir /tmp/x && echo made; "+work); !strings.Contains(r.Log, "made") {
					t.Errorf("mkdir under version 2: %+v", r)
				}
			})
		}
	}
}

// atMost is how many containers a test starts: so many, or the number in
// SYSLATCH_TEST_CONTAINERS, where each takes ten seconds.
func atMost(t *testing.T, most int) int {
	t.Helper()
	text := os.Getenv("SYSLATCH_TEST_CONTAINERS")
	if text == "" {
		return most
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 3 {
		t.Fatalf("SYSLATCH_TEST_CONTAINERS=%s: want 3 or more", text)
	}
	return n
}

// One recorded start is enough for every later one, though the runtime, a Go
// program, makes calls of its own that differ from start to start.
func TestEveryStartSurvivesItsVersion(t *testing.T) {
	for _, runtime := range []string{harness.Runc11, harness.Runc15} {
		t.Run(runtime, func(t *testing.T) {
			e := newEnv(t, harness.Options{})
			d := e.start(byAnnotation)
			po := mode("record")
			po.Runtime = runtime
			e.run(po, sh("echo ran"))
			v := e.waitVersion(d, busyboxWorkload, 1)
			if len(v.Manifest.Incidental) == 0 {
				t.Errorf("manifest: %+v", v.Manifest)
			}
			po = mode("enforce")
			po.Runtime = runtime
			pod, err := e.NewPod(e.ctx, po)
			if err != nil {
				t.Fatal(err)
			}
			// Without what is allowed beside the recording, a few of 30 failed.
			for i := range atMost(t, 30) {
				if r, err := pod.Run(e.ctx, sh("echo ran")); err != nil || r.Code != 0 || r.Log != "ran\n" {
					t.Fatalf("start %d: %+v, %v", i, r, err)
				}
			}
		})
	}
}
