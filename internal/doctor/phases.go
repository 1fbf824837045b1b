// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"slices"
	"strings"

	"github.com/syslatch/syslatch/profiles"
)

// PhaseHost is what a report says of the means to enforce phases, and the checks that
// it says so by. runtime is the OCI runtime that starts the containers, "runc" or
// "crun"; empty is either.
//
// BUG(doctor): SCMP_ACT_NOTIFY among a runtime's actions is taken for its handing the
// listener over, which all do that have it.
func (r *Report) PhaseHost(runtime string) (profiles.PhaseHost, []Check) {
	runtimes := []string{"runc", "crun"}
	if runtime != "" {
		runtimes = []string{runtime}
	}
	h := profiles.PhaseHost{
		LSM:           r.status("bpf.lsm") == OK,
		CgroupConnect: r.status("bpf.cgroup/connect4") == OK,
		Inject:        r.status("inject") == OK,
	}
	names := []string{"seccomp.actions", "seccomp.flags", "seccomp.denials", "bpf.lsm", "bpf.cgroup/connect4", "inject"}
	kernel := strings.Fields(r.found("seccomp.flags"))
	for _, name := range runtimes {
		name = "runtime." + name
		names = append(names, name)
		if s := r.status(name); s != OK && s != Warn {
			continue
		}
		_, about, ok := strings.Cut(r.found(name), "; listenerPath; flags ")
		if !ok || r.status("seccomp.actions") != OK {
			continue
		}
		// In parentheses where it is only known.
		knows := func(flag string) bool {
			return slices.Contains(kernel, flag) && slices.Contains(strings.Fields(about), flag)
		}
		h.Notify = true
		h.WaitKillable = h.WaitKillable || knows("WAIT_KILLABLE_RECV")
		h.Denials = h.Denials || r.status("seccomp.denials") == OK && knows("LOG")
	}
	checks := slices.Clone(r.Checks)
	return h, slices.DeleteFunc(checks, func(c Check) bool { return !slices.Contains(names, c.Name) })
}

func (r *Report) found(name string) string {
	for _, c := range r.Checks {
		if c.Name == name {
			return c.Found
		}
	}
	return ""
}
