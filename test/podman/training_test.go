// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/profiles"
)

const training = `
- name: trainee
  match: {}
  mode: record
  failure: deny
  workload: "{container}"
  existingProfile: replace
  phases: {initial: look, look: {limits: {oomScoreAdj: 600}}, make: {irreversible: true}}
`

// A container that is recorded is taken through its phases by a syslatchd that is killed
// meanwhile; where there is none, it is recorded as one without.
func TestTraining(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", training)
		recorded := func(name string, n int) *profiles.Recording {
			t.Helper()
			recs, err := e.store().Recordings(name)
			if err != nil || len(recs) != n || len(recs[n-1].Blocking()) != 0 {
				t.Fatalf("%+v, %v", recs, err)
			}
			return recs[n-1]
		}
		published := func() {
			t.Helper()
			e.wait("published by poststop", func() bool {
				left, err := filepath.Glob(e.dir + "/state/hooks/*")
				return err == nil && len(left) == 0
			})
			e.wait("let go of by syslatchd", func() bool { return len(e.supervised()) == 0 })
			e.idle()
		}
		if r := e.run("alone", nil, "mkdir", "/x"); r.code != 0 {
			t.Fatalf("%+v", r)
		}
		if rec := recorded("alone", 1); len(rec.Phases) != 1 || rec.Phases[profiles.DefaultPhase] == nil {
			t.Errorf("without a syslatchd: %+v", rec.Phases)
		}

		d := e.startDaemon()
		s := e.shell(runArgs("agent", []string{"--interactive"}, "sh")...)
		if got := s.status("test -S /run/syslatch/phase.sock"); got != "0" {
			t.Errorf("the container has no socket of its own: exit status %s", got)
		}
		id, pid := e.idAndPID("agent")
		if got := e.oomScore(pid); got == 600 {
			t.Error("a phase's limits are set while it is recorded")
		}
		e.phase("set", id, "make")
		s.makes(true)
		d.kill(syscall.SIGKILL)
		s.makes(true)
		e.startDaemon()
		if st := e.phaseStatus(id); st.Phase != "make" || st.Generation != 2 || st.State != phase.Holds || !st.Recorded {
			t.Errorf("after a kill: %+v", st)
		}
		e.phase("set", id, "look") // it is irreversible where it is enforced
		if got := s.status("rmdir /tmp/1"); got != "0" {
			t.Errorf("rmdir: exit status %s", got)
		}
		s.end()
		published()
		rec := recorded("agent", 1)
		for call, want := range map[string][]string{
			"mkdir": {"make"}, "rmdir": {"look"}, "execve": {"start"},
		} {
			var got []string
			for name, calls := range rec.Phases {
				if calls.Has(specs.ArchX86_64, call) {
					got = append(got, name)
				}
			}
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("phases with %s (-want +got):\n%s", call, diff)
			}
		}
		if start := rec.Phases[profiles.StartPhase].Names(); len(start) < 3 { // what the runtime called
			t.Errorf("at the start: %v", start)
		}
		// Each run begins anew.
		s = e.shell("start", "--attach", "--interactive", "agent")
		if got := s.status("mkdir /tmp/again"); got != "0" {
			t.Errorf("mkdir: exit status %s", got)
		}
		if st := e.phaseStatus(id); st.Phase != "look" || st.Generation != 1 {
			t.Errorf("the second run: %+v", st)
		}
		s.end()
		published()
		if rec := recorded("agent", 2); rec.Phases["make"] != nil || !rec.Phases["look"].Has(specs.ArchX86_64, "mkdir") {
			t.Errorf("the second run: %+v", rec.Phases)
		}
	})
}

// A rootless container is recorded, and has no phases.
func TestTrainingIsNotForRootless(t *testing.T) {
	r := newRootless(t, runtimes[0])
	r.write(fmt.Sprintf("hook: {rootless: {users: [%s], socket: %s}}\n", servedUser, r.socket),
		strings.Replace(training, "match: {}", `match: {users: ["*"]}`, 1))
	r.load()
	r.start()
	if hierarchy.Mode != cgroup.V2 {
		r.refused(r.userRun("agent", nil, "true"), "the container has no cgroup of its own")
		return
	}
	if got := r.userRun("agent", nil, "true"); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	r.idle()
	recs, err := r.store().Recordings(r.workload("agent"))
	if err != nil || len(recs) != 1 || recs[0].Phases[profiles.DefaultPhase] == nil {
		t.Errorf("%+v, %v", recs, err)
	}
}
