// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

// trainingPolicy names phases, and says nothing of what they allow.
const trainingPolicy = `
- name: trainee
  match: {}
  mode: record
  failure: deny
  annotations: [phase]
  phases: {initial: idle, idle: {}, look: {next: [idle]}, make: {limits: {pids: {max: 1}}}}
`

// trainee is a container that does what a file of the host says.
type trainee struct {
	e   *env
	c   *harness.Container
	dir string // of the file
}

func (e *env) startTrainee(runtime string) *trainee {
	e.t.Helper()
	tr := &trainee{e: e, dir: e.t.TempDir()}
	tr.write("wait")
	tr.c = mustCreate(e.t, e, harness.PodOptions{Runtime: runtime, Annotations: map[string]string{"phase.syslatch.dev/pod": "look"}}, harness.ContainerOptions{
		Command: []string{"/bin/sh", "-c", `while sleep 0.02; do read todo </ctl/todo; case $todo in
			look) ls / | grep -q bin;; make) mkdir /tmp/made && rmdir /tmp/made;; end) exit 0;;
			esac; echo "$todo $?"; done`},
		Mounts: []*runtimeapi.Mount{{HostPath: tr.dir, ContainerPath: "/ctl", Readonly: true}},
	})
	if err := tr.c.Start(e.ctx); err != nil {
		e.t.Fatal(err)
	}
	return tr
}

// write replaces the file, which is never half there.
func (tr *trainee) write(todo string) {
	tr.e.t.Helper()
	path := filepath.Join(tr.dir, "todo")
	err := os.WriteFile(path+".new", []byte(todo+"\n"), 0o644)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		tr.e.t.Fatal(err)
	}
}

// does has the container do something, with a result, and then wait.
func (tr *trainee) does(todo, result string) {
	tr.e.t.Helper()
	tr.write(todo)
	says(tr.e.t, tr.e, tr.c, todo+" "+result)
	tr.write("wait")
	says(tr.e.t, tr.e, tr.c, "wait 0")
}

// ends waits for the container's end.
func (tr *trainee) ends() {
	tr.e.t.Helper()
	tr.write("end")
	if r, err := tr.c.Wait(tr.e.ctx); err != nil || r.Code != 0 {
		tr.e.t.Errorf("%+v, %v", r, err)
	}
}

// phasesWith are the phases of a recording in which a call was made.
func phasesWith(rec *profiles.Recording, call string) (out []string) {
	for name, calls := range rec.Phases {
		if calls.Has(specs.ArchX86_64, call) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// TestTraining: a container that is recorded is taken through its phases, syslatchd is
// killed meanwhile, and what comes of it enforces the same phases: what was done in one
// is allowed there, and nowhere else.
func TestTraining(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(trainingPolicy)
	workload := ""
	for n, runtime := range []string{harness.Runc11, harness.Runc15} {
		tr := e.startTrainee(runtime)
		tr.does("look", "0")
		st := e.phaseStatus(tr.c.ID)
		if !st.Recorded || st.Phase != "look" || st.State != phase.Holds || len(st.Uncovered) != 1 || !slices.Equal(st.Next, []string{"idle", "make"}) {
			t.Errorf("%+v", st)
		}
		workload = st.Workload
		e.setPhase(tr.c.ID, "make") // where next doesn't lead
		d.kill(syscall.SIGKILL)
		tr.does("make", "0")
		d = e.start(trainingPolicy)
		if st := e.phaseStatus(tr.c.ID); st.Phase != "make" || st.Generation != 2 || !st.Recorded {
			t.Errorf("after a kill: %+v", st)
		}
		e.setPhase(tr.c.ID, "look")
		tr.ends()
		d.waitLog("container ended", tr.c.ID)
		recs, err := e.store().Recordings(workload)
		if err != nil || len(recs) != n+1 || len(recs[n].Blocking()) != 0 || recs[n].Initial != "look" {
			t.Fatalf("%+v, %v", recs, err)
		}
		for call, want := range map[string][]string{
			"mkdir": {"make"}, "getdents64": {"look", "start"}, "rmdir": {"make"}, "setgroups": {"start"}, "capset": {"start"},
			"execve": {"look", "make", "start"}, "exit_group": {"look", "make"},
		} {
			if diff := cmp.Diff(want, phasesWith(recs[n], call)); diff != "" {
				t.Errorf("%s: phases with %s (-want +got):\n%s", runtime, call, diff)
			}
		}
	}
	v, err := e.store().Active(workload)
	if err != nil {
		t.Fatal(err)
	}
	for _, call := range []string{"mkdir", "getdents64", "capset"} {
		if !v.Manifest.Calls.Has(specs.ArchX86_64, call) {
			t.Errorf("the version lacks %s: it is of all phases", call)
		}
	}

	out, err := exec.CommandContext(e.ctx, filepath.Join(programs, "syslatch"), "profile", "suggest", workload, "--store", filepath.Join(e.dir, "store")).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.kill(syscall.SIGTERM)
	fields := strings.Replace(string(out), "initial: look", "initial: look\n  gaps: report", 1)
	d = e.start("\n- name: trained\n  match: {}\n  mode: enforce\n  " + strings.ReplaceAll(strings.TrimSpace(fields), "\n", "\n  ") + "\n")
	tr := e.startTrainee(harness.Runc15)
	tr.does("look", "0")
	tr.does("make", "1")
	e.setPhase(tr.c.ID, "make")
	tr.does("make", "0")
	tr.does("look", "1")
	e.setPhase(tr.c.ID, "look")
	if st := e.phaseStatus(tr.c.ID); st.Recorded || st.Phase != "look" || st.Denied == 0 {
		t.Errorf("%+v", st)
	}
	tr.ends()
	// What it did in the one phase is what was denied in the other.
	if d.waitLog("phase event", `"denied"`, "mkdir", `"from":"look"`); strings.Count(d.log.String(), `"event":"denied"`) > 8 {
		t.Errorf("more was denied:\n%s", out)
	}
}
