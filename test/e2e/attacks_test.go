// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/test/harness"
)

// attackerPhases: "open" has what attacks are made of, and changes no files; all of it
// is done in "write_logs" without an attack.
const attackerPhases = `
  phases:
    initial: open
    gaps: report
    open:
      allow: ["@file-read", "@basic-io", "@info", "@process", "@network", "@debug", "@sandbox", memfd_create, unshare]
    write_logs:
      allow: ["@file-read", "@file-write", "@basic-io", "@info", "@process"]
      network: none
    read_only:
      allow: ["@file-read", "@basic-io", "@info", "@process"]
      network: none
`

const attackPolicies = `
- name: attacker
  match: {containers: [attacker]}
  mode: enforce
  architectures: [SCMP_ARCH_X86_64]` + attackerPhases + `
- name: compat
  match: {containers: [compat]}
  mode: enforce
  architectures: [SCMP_ARCH_X86_64, SCMP_ARCH_X86, SCMP_ARCH_X32]` + attackerPhases

// attackResults are what comes of the attacks of test/workloads/attacks: without
// phases, and in each.
var attackResults = []struct {
	name                               string
	control, open, writeLogs, readOnly string
}{
	{"mkdir", "done", "EPERM", "done", "EPERM"},
	{"open", "done", "EPERM", "done", "EPERM"},
	{"connect", "done", "done", "EPERM", "EPERM"},
	// A ring isn't made, so that nothing is done by it.
	{"io_uring_open", "done", "not tried: ENOSYS", "not tried: ENOSYS", "not tried: ENOSYS"},
	{"io_uring_connect", "done", "not tried: ENOSYS", "not tried: ENOSYS", "not tried: ENOSYS"},
	// Other ABIs: where the policy doesn't list them (and below, where it does).
	{"int80_open", "done", "SIGSYS", "SIGSYS", "SIGSYS"},
	{"int80_mkdir", "done", "SIGSYS", "SIGSYS", "SIGSYS"},
	{"int80_connect", "done", "SIGSYS", "SIGSYS", "SIGSYS"},
	{"int80_socketcall", "done", "SIGSYS", "SIGSYS", "SIGSYS"},
	{"x32_mkdir", "ENOSYS", "SIGSYS", "SIGSYS", "SIGSYS"},
	{"x32_open", "ENOSYS", "SIGSYS", "SIGSYS", "SIGSYS"},
	// Flags in memory.
	{"openat2", "done", "ENOSYS", "ENOSYS", "ENOSYS"},
	{"clone3_user", "done", "ENOSYS", "ENOSYS", "ENOSYS"},
	{"clone_user", "done", "EPERM", "EPERM", "EPERM"},
	// Filters of one's own loosen nothing: there can be one listener, and the filter
	// that denies most decides.
	{"own_listener", "done", "not tried: EBUSY", "not tried: EPERM", "not tried: EPERM"},
	{"own_notify", "ENOSYS", "ENOSYS", "ENOSYS", "ENOSYS"},
	{"own_allow", "done", "EPERM", "done", "EPERM"},
	{"user_dispatch", "done", "EPERM", "done", "EPERM"},
	// What a tracer makes of a call is judged.
	{"ptrace_number", "done", "EPERM", "not tried: EPERM", "not tried: EPERM"},
	{"ptrace_event", "done", "EPERM", "not tried: EPERM", "not tried: EPERM"},
	{"write_memory", "done", "done", "EPERM", "EPERM"},
	{"write_proc_mem", "done", "EPERM", "done", "EPERM"},
	{"take_descriptor", "done", "done", "EPERM", "EPERM"},
	// Another program is in the same phase.
	{"exec_by_descriptor", "done", "EPERM", "done", "EPERM"},
	{"exec_memory", "done", "EPERM", "not tried: EPERM", "not tried: EPERM"},
	{"mount_in_namespace", "done", "EPERM", "not tried: EPERM", "not tried: EPERM"},
	{"enter_namespace", "done", "EPERM", "not tried: EPERM", "not tried: EPERM"},
	// What the runtime mounts read-only.
	{"leave_cgroup", "EROFS", "EPERM", "EROFS", "EPERM"},
	{"replace_socket", "ENOENT", "EPERM", "EROFS", "EPERM"},
}

// compatResults are those that differ where i386 and x32 are listed. x32 is in hardly
// any kernel: what is let through is ENOSYS, and what isn't is EPERM.
var compatResults = map[string][3]string{
	"int80_open":       {"EPERM", "done", "EPERM"},
	"int80_mkdir":      {"EPERM", "done", "EPERM"},
	"int80_connect":    {"done", "EPERM", "EPERM"},
	"int80_socketcall": {"ENOSYS", "ENOSYS", "ENOSYS"},
	"x32_mkdir":        {"EPERM", "ENOSYS", "EPERM"},
	"x32_open":         {"EPERM", "ENOSYS", "EPERM"},
}

// attackPhases are in the order in which the attackers go through them.
var attackPhases = []string{"open", "write_logs", "read_only"}

// forgeries are what an own socket answers to wishes that loosen, or mean another.
var forgeries = map[string]string{
	"loosen":             "409",
	"other_by_path":      "404",
	"other_by_uri":       "404",
	"other_by_climbing":  "404",
	"other_by_escapes":   "404",
	"other_by_host":      "409", // names nothing: its own
	"other_by_authority": "409",
	"other_by_query":     "400",
	"other_in_body":      "400",
	"origin_in_body":     "400",
	"phase_twice":        "400",
	"two_bodies":         "400",
	"no_phase":           "400",
	"start_phase":        "409",
	"if_match":           "409",
	"forwarded":          "409",
	"method_override":    "200", // a GET
	"unknown_method":     "405",
	"connect":            "404",
	"events":             "404",
	"upgrade":            "409",
	"http10":             "409",
	"http09":             "400",
	"http2":              "404",
	"pipelined":          "409 409",
	"chunked":            "409",
	"chunk_too_long":     "400",
	"smuggled":           "400 409",
	"two_lengths":        "400",
	"nul_bytes":          "400",
	"giant_header":       "431",
	"giant_body":         "400",
}

type attackResult struct{ Phase, Attack, Result string }

// attackLines are the results in what the program printed, by phase and attack.
func attackLines(t *testing.T, text string) map[string]map[string]string {
	t.Helper()
	all := map[string]map[string]string{}
	for line := range strings.Lines(text) {
		var r attackResult
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if all[r.Phase] == nil {
			all[r.Phase] = map[string]string{}
		}
		all[r.Phase][r.Attack] = r.Result
	}
	return all
}

// TestAttacks runs test/workloads/attacks in containers with phases, and beside them in
// one without, where the same attacks succeed.
func TestAttacks(t *testing.T) {
	e := newEnv(t, harness.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 3*testTimeout) // a guest takes minutes
	t.Cleanup(cancel)
	e.ctx = ctx
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // nobody accepts: the backlog does
	d := e.start(attackPolicies)
	pod, err := e.NewPod(e.ctx, harness.PodOptions{SharedPID: true})
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(e.dir, "state")
	begin := func(name string, phases ...string) *harness.Container {
		t.Helper()
		o := harness.ContainerOptions{Name: name, SharedPID: true, Command: append([]string{
			"/bin/attacks", "run", "/tmp", fmt.Sprint(l.Addr().(*net.TCPAddr).Port),
		}, phases...)}
		if name == "control" {
			o.Mounts = []*runtimeapi.Mount{{HostPath: state, ContainerPath: "/mnt"}}
		}
		c, err := pod.Create(e.ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(e.ctx); err != nil {
			t.Fatal(err)
		}
		return c
	}
	through := func(c *harness.Container, name string) {
		t.Helper()
		if err := c.WaitLog(e.ctx, func(log string) bool {
			return strings.Contains(log, fmt.Sprintf("{\"phase\":%q,\"attack\":\"end\"", name))
		}); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	control := begin("control", "control")
	attacker, compat := begin("attacker", attackPhases...), begin("compat", attackPhases...)
	both := []*harness.Container{attacker, compat}
	through(control, "control")
	for _, c := range both {
		through(c, "open")
	}

	// unchanged says whether both are where they were: nobody has switched them.
	before := map[string]phase.Status{}
	for _, c := range both {
		before[c.ID] = e.phaseStatus(c.ID)
	}
	unchanged := func(after string) {
		t.Helper()
		for _, c := range both {
			if was, is := before[c.ID], e.phaseStatus(c.ID); is.Phase != was.Phase || is.Generation != was.Generation || is.State != phase.Holds {
				t.Errorf("after %s: %+v, was %+v", after, is, was)
			}
		}
	}
	attack := func(c *harness.Container, want map[string]string, args ...string) {
		t.Helper()
		r, err := c.Exec(e.ctx, append([]string{"/bin/attacks"}, args...)...)
		if err != nil || r.Code != 0 {
			t.Fatalf("%v: %+v, %v", args, r, err)
		}
		if diff := cmp.Diff(want, attackLines(t, r.Log)[""]); diff != "" {
			t.Errorf("%v (-want +got):\n%s", args, diff)
		}
		unchanged(args[0])
	}
	attack(attacker, forgeries, "forge", compat.ID)
	d.waitLog("phase event", `"refused"`, `"origin":"inside"`, attacker.ID)
	// Another's socket is in reach where containers share a pid namespace.
	attack(attacker, map[string]string{"write_logs": "403", "read_only": "403"}, "peer", "write_logs", "read_only")
	d.waitLog("connection refused: not a process of the container", compat.ID)

	// The daemon's socket, which was mounted by mistake; then with its mode undone, too.
	const other, root = "other_user", "root_of_namespace"
	attack(control, map[string]string{other: "EACCES", root: "EACCES"}, "api", "/mnt/api.sock", compat.ID)
	for path, mode := range map[string]os.FileMode{state: 0o755, filepath.Join(state, "api.sock"): 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	attack(control, map[string]string{other: "403", root: "403"}, "api", "/mnt/api.sock", compat.ID)
	d.waitLog("connection refused: neither root nor the daemon's user")

	// The next phases, and all of it served on.
	for _, name := range attackPhases[1:] {
		for _, c := range both {
			e.setPhase(c.ID, name)
			through(c, name)
			st := e.phaseStatus(c.ID)
			if st.Phase != name || st.State != phase.Holds || st.Generation != before[c.ID].Generation+1 {
				t.Errorf("%+v", st)
			}
			before[c.ID] = st
		}
		unchanged(name)
	}

	want := map[string]map[string]string{}
	for _, a := range attackResults {
		for i, r := range []string{a.control, a.open, a.writeLogs, a.readOnly} {
			name := slices.Concat([]string{"control"}, attackPhases)[i]
			if want[name] == nil {
				want[name] = map[string]string{"end": ""}
			}
			want[name][a.name] = r
		}
	}
	compare := func(c *harness.Container, want map[string]map[string]string) {
		t.Helper()
		if diff := cmp.Diff(want, attackLines(t, c.Log())); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	compare(control, map[string]map[string]string{"control": want["control"]})
	delete(want, "control")
	for i, name := range attackPhases {
		want[name]["kept_connection"] = []string{"409", "200", "409"}[i] // "write_logs" is asked for
	}
	// With BPF LSM the filter lets opens pass, and others answer before the hook does:
	// a read-only mount, and a kernel without x32.
	reading := []string{"open", "read_only"}
	if harness.BPFLSM() {
		for _, name := range reading {
			want[name]["leave_cgroup"] = "EROFS"
		}
	}
	compare(attacker, want)
	for i, name := range attackPhases {
		want[name] = maps.Clone(want[name])
		for attack, results := range compatResults {
			want[name][attack] = results[i]
		}
		if harness.BPFLSM() && slices.Contains(reading, name) {
			want[name]["x32_open"] = "ENOSYS"
		}
	}
	compare(compat, want)
}
