// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"strings"
	"testing"

	"github.com/syslatch/syslatch/profiles"
)

func TestPhaseHost(t *testing.T) {
	const both = "1.5.2 at /usr/bin/runc; listenerPath; flags LOG WAIT_KILLABLE_RECV"
	base := func(edit map[string]Check) *Report {
		checks := map[string]Check{
			"seccomp.actions": {Status: OK}, "seccomp.flags": {Status: OK, Found: "LOG TSYNC WAIT_KILLABLE_RECV"},
			"bpf.lsm": {Status: OK}, "bpf.cgroup/connect4": {Status: OK}, "inject": {Status: OK},
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
			map[string]Check{"bpf.lsm": {Status: Warn}, "bpf.cgroup/connect4": {Status: Error}, "inject": {Status: Missing}},
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

func TestCheckInject(t *testing.T) {
	const status, yama = "/proc/self/status", "/proc/sys/kernel/yama/ptrace_scope"
	for name, tc := range map[string]struct {
		edit  func(map[string]string)
		found string // empty: possible
	}{
		"all":       {func(map[string]string) {}, ""},
		"yama":      {func(f map[string]string) { f[yama] = "1\n" }, ""},
		"nobody":    {func(f map[string]string) { f[yama] = "3\n" }, "ptrace_scope is 3"},
		"no admin":  {func(f map[string]string) { f[status] = "CapEff:\t000001ffffdfffff\nSeccomp:\t0\n" }, "CAP_SYS_ADMIN"},
		"no ptrace": {func(f map[string]string) { f[status] = "CapEff:\t000001fffff7ffff\nSeccomp:\t0\n" }, "CAP_SYS_PTRACE"},
		"filtered":  {func(f map[string]string) { f[status] = "CapEff:\t000001ffffffffff\nSeccomp:\t2\n" }, "has a seccomp filter"},
	} {
		m := good()
		tc.edit(m.files)
		c := checkInject(t.Context(), m.host("6.12.0"), Options{})[0]
		if (c.Status == OK) != (tc.found == "") || !strings.Contains(c.Found, tc.found) || (c.Remedy == "") != (c.Status == OK) {
			t.Errorf("%s: %+v, want %q", name, c, tc.found)
		}
	}
}
