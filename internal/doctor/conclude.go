// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"slices"
	"strings"
)

// status is a check's; one that isn't in the report, because it didn't answer,
// counts as an error.
func (r *Report) status(name string) Status {
	for _, c := range r.Checks {
		if c.Name == name {
			return c.Status
		}
	}
	return Error
}

// lacking lists those of the named checks that are neither ok nor a warning.
func (r *Report) lacking(names ...string) []string {
	var out []string
	for _, n := range names {
		if s := r.status(n); s != OK && s != Warn {
			out = append(out, n)
		}
	}
	return out
}

// see sends the reader to checks. Where a group of checks didn't answer, there
// is one line with the group's name instead of them.
func (r *Report) see(names ...string) string {
	var there []string
	for _, name := range names {
		known := func(c Check) bool { return c.Name == name }
		if !slices.ContainsFunc(r.Checks, known) {
			name, _, _ = strings.Cut(name, ".")
		}
		if !slices.Contains(there, name) {
			there = append(there, name)
		}
	}
	return "see " + strings.Join(there, ", ")
}

// conclude fills in what is used for each job, from the checks alone.
func (r *Report) conclude() {
	recorder := []string{"kernel", "cgroup", "bpf.btf", "bpf.ringbuf", "bpf.tp_btf", "capability.CAP_BPF", "capability.CAP_PERFMON", "bpf.recorder"}
	pinned := append(append([]string(nil), recorder...), "bpffs")
	filters := []string{"seccomp.libseccomp", "seccomp.actions"}

	commands := r.job("record commands", "tp_btf programs on sys_enter, keyed on the cgroup id (syslatch record)", recorder)
	containers := r.job("record containers", "the same, pinned in bpffs (syslatchd)", pinned)
	gate := r.job("gate", "calls count once the task's seccomp.filter_count rises above its value at the start", append(recorder, filters...))
	if containers.Status == OK && r.status("nri.socket") != OK {
		containers.Status, containers.Uses = Warn, containers.Uses+", once a runtime offers NRI"
		containers.Remedy = r.see("nri.socket")
	}
	enforce := r.job("enforce", "seccomp filters, compiled by libseccomp, loaded by "+r.loaders(), filters)

	// What fails the containers that a profile is set for, or drops the profile.
	var against []string
	for _, name := range []string{"engine.containerd", "nri.validator"} {
		if r.status(name) == Error {
			against = append(against, name)
		}
	}
	if enforce.Status == OK && len(against) > 0 {
		enforce.Status, enforce.Remedy = Warn, r.see(against...)
	}
	if containers.Status == OK && r.status("engine.containerd") == Error {
		containers.Status, containers.Remedy = Warn, r.see("engine.containerd")
	}
	r.Mechanisms = []Mechanism{commands, containers, gate, enforce, r.violations(), r.limits(), r.phases()}
	r.Works = commands.Status != Missing && containers.Status != Missing && enforce.Status != Missing
}

// job is done in one way or not at all.
func (r *Report) job(job, uses string, needs []string) Mechanism {
	if lacking := r.lacking(needs...); len(lacking) > 0 {
		return Mechanism{job, Missing, "nothing", r.see(lacking...)}
	}
	return Mechanism{job, OK, uses, ""}
}

// loaders names what puts filters into processes here.
func (r *Report) loaders() string {
	by := []string{"syslatch run"}
	for _, name := range []string{"runc", "crun"} {
		if len(r.lacking("runtime."+name)) == 0 {
			by = append(by, name)
		}
	}
	return strings.Join(by, ", ")
}

// violations: what this build does, which in audit mode is to compare each
// recording with the version.
func (r *Report) violations() Mechanism {
	m := r.job("violations", "each recording of audit mode is compared with the version, at its end", []string{"bpf.recorder", "bpffs"})
	if m.Status == Missing {
		return m
	}
	if seen, ok := strings.CutPrefix(r.found("seccomp.denials"), "seen by "); ok {
		m.Uses += "; what the filters of phases deny is told at once, by " + seen + " (logDenials)"
	} else {
		m.Uses += "; what filters deny can't be told at once"
		m.Status, m.Remedy = Warn, r.see("seccomp.denials")
	}
	return m
}

func (r *Report) limits() Mechanism {
	switch r.status("cgroup") {
	case OK:
		return Mechanism{"limits", OK, "cgroup v2 files, unified included", ""}
	case Warn:
		return Mechanism{"limits", Warn, "memory, cpu and pids through cgroup v1", r.see("cgroup")}
	case Missing: // v1 only
		return Mechanism{"limits", Warn, "memory, cpu and pids through cgroup v1, not for recorded containers", r.see("cgroup")}
	}
	return Mechanism{"limits", Missing, "nothing", r.see("cgroup")}
}

// phases stand on the supervisor, to which BPF programs add; whether filters can be put on
// processes for irreversible ones, a check of its own says (inject).
func (r *Report) phases() Mechanism {
	var offers, without []string
	for _, f := range []struct{ check, name string }{
		{"bpf.lsm", "BPF LSM"},
		{"bpf.cgroup/connect4", "cgroup/connect4"},
	} {
		if r.status(f.check) == OK {
			offers = append(offers, f.name)
		} else {
			without = append(without, f.check)
		}
	}
	m := Mechanism{"phases", OK, "SCMP_ACT_NOTIFY and a supervisor", ""}
	if len(offers) > 0 {
		m.Uses += "; " + strings.Join(offers, ", ")
	}
	if len(without) > 0 {
		m.Status, m.Remedy = Warn, "for paths, addresses and open files: "+r.see(without...)
	}
	if r.status("seccomp.actions") != OK {
		m.Status, m.Uses, m.Remedy = Missing, "nothing", r.see("seccomp.actions")
	}
	return m
}
