// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"testing"

	"github.com/syslatch/syslatch/profiles"
)

func TestPhaseHost(t *testing.T) {
	const both = "1.5.2 at /usr/bin/runc; listenerPath; flags LOG WAIT_KILLABLE_RECV"
	base := func(edit map[string]Check) *Report {
		checks := map[string]Check{
			"seccomp.actions": {Status: OK}, "seccomp.flags": {Status: OK, Found: "LOG TSYNC WAIT_KILLABLE_RECV"},
			"bpf.lsm": {Status: OK}, "bpf.cgroup/connect4": {Status: OK}, "capability.CAP_SYS_PTRACE": {Status: OK},
			"runtime.runc": {Status: OK, Found: both}, "runtime.crun": {Status: Missing, Found: "not installed"}, "kernel": {Status: OK},
		}
		for name, c := range edit {
			checks[name] = c
		}
		r := &Report{}
		for name, c := range checks {
			c.Name = name
			r.Checks = append(r.Checks, c)
		}
		return r
	}
	all := profiles.PhaseHost{Notify: true, WaitKillable: true, LSM: true, CgroupConnect: true, Inject: true}
	with := func(edit func(*profiles.PhaseHost)) profiles.PhaseHost {
		h := all
		edit(&h)
		return h
	}
	noListener := with(func(h *profiles.PhaseHost) { h.Notify, h.WaitKillable = false, false })
	noWait := with(func(h *profiles.PhaseHost) { h.WaitKillable = false })
	for name, tc := range map[string]struct {
		edit    map[string]Check
		runtime string
		want    profiles.PhaseHost
	}{
		"all":                   {nil, "", all},
		"runc":                  {nil, "runc", all},
		"crun":                  {nil, "crun", noListener},
		"no kernel":             {map[string]Check{"seccomp.actions": {Status: Warn}}, "", noListener},
		"runtime without":       {map[string]Check{"runtime.runc": {Status: Warn, Found: "1.0 at /x; no listenerPath; flags none"}}, "", noListener},
		"runtime can't tell":    {map[string]Check{"runtime.runc": {Status: Warn, Found: "1.0 at /x; doesn't tell its features: no"}}, "", noListener},
		"older libseccomp":      {map[string]Check{"runtime.runc": {Status: OK, Found: "1.5.2 at /x; listenerPath; flags LOG (WAIT_KILLABLE_RECV)"}}, "", noWait},
		"older kernel":          {map[string]Check{"seccomp.flags": {Status: Warn, Found: "LOG TSYNC"}}, "", noWait},
		"crun alone has flags":  {map[string]Check{"runtime.runc": {Status: OK, Found: "1.1.5 at /x; listenerPath; flags none"}, "runtime.crun": {Status: OK, Found: both}}, "", all},
		"runc asked, crun good": {map[string]Check{"runtime.runc": {Status: OK, Found: "1.1.5 at /x; listenerPath; flags none"}, "runtime.crun": {Status: OK, Found: both}}, "runc", noWait},
		"no BPF": {
			map[string]Check{"bpf.lsm": {Status: Warn}, "bpf.cgroup/connect4": {Status: Error}, "capability.CAP_SYS_PTRACE": {Status: Missing}},
			"",
			profiles.PhaseHost{Notify: true, WaitKillable: true},
		},
	} {
		got, checks := base(tc.edit).PhaseHost(tc.runtime)
		if got != tc.want {
			t.Errorf("%s: got %+v, want %+v", name, got, tc.want)
		}
		for _, c := range checks {
			if c.Name == "kernel" {
				t.Errorf("%s: %s has no part in it", name, c.Name)
			}
		}
	}
	if got, _ := (&Report{}).PhaseHost(""); got != (profiles.PhaseHost{}) {
		t.Errorf("an empty report: %+v", got)
	}
}
