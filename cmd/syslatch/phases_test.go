// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

const agentPolicy = `apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {podLabels: {app: agent}}
  mode: enforce
  phases:
    initial: read_only
    read_only:
      allow: ["@file-read", "@basic-io", "@info"]
      network: none
    write_logs:
      allow: ["@file-read", "@basic-io", "@info", openat, mkdir, fsync]
      files: {write: [/var/log/agent]}
      limits: {memory: {max: 64Mi}}
    network:
      allow: ["@file-read", "@basic-io", "@info", "@network"]
      network: ["10.0.0.0/8:443"]
      next: [read_only]
    locked: {irreversible: true}
- name: naive
  match: {podLabels: {app: naive}}
  mode: enforce
  phases:
    initial: a
    a: {allow: [read, close, stat, getdents64, mmap]}
- name: plain
  match: {}
  mode: record
`

func policyFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProfilePhases(t *testing.T) {
	path := policyFile(t, agentPolicy)
	for _, tc := range []struct {
		name string
		args []string
		want []string
		not  []string
	}{
		{"asked", []string{"--assume", "notify,cgroup-connect,inject"}, []string{
			"policy agent, initial phase read_only",
			"host has notify cgroup-connect inject (assumed)",
			"write_logs  read_only network locked   write /var/log/agent",
			`{"memory":{"max":67108864}}`,
			"Asked of the supervisor (SCMP_ACT_NOTIFY):",
			"  in write_logs:\n    fsync mkdir mkdirat\n",
			"  in start, write_logs, where not (arg2 & 0x243 == 0x0):\n    openat\n",
			"By the filter, until an irreversible phase denies it",
			"so that a libc takes another: clone3 io_uring_enter io_uring_register io_uring_setup openat2",
			"cgroup/connect4",
			"- read_only, network, locked: files that were opened for writing in write_logs stay writable\n  why: a filter sees no paths",
			"note: files that were mapped shared",
		}, []string{"lsm/", "All of it"}},
		{"hooked", []string{"--assume", "all"}, []string{
			"  in start, write_logs, where not (arg2 & 0x243 == 0x0) (lsm/file_open):\n    openat\n",
			"lsm/file_permission", "- write_logs: files elsewhere can be changed, too, by mkdir mkdirat\n",
		}, []string{"can be opened, too", "All of it"}},
		{"whole", []string{"--policy", "naive", "--assume", "all"}, []string{"All of it can be enforced here."}, []string{"Can't be enforced"}},
		{"nothing", []string{"--assume", "none"}, []string{
			"host has nothing", "Allowed in every phase, because it can't be enforced here:", "remedy: give syslatchd CAP_SYS_PTRACE",
		}, []string{"Asked of the supervisor"}},
		{"one phase", []string{"--assume", "notify,inject", "--phase", "network"}, []string{
			"phase    network\nnext     read_only\ntighter  read_only\n", "Allowed (notify):\naccept accept4 bind connect",
			"Denied here, and allowed in another phase (notify):\nfsync mkdir mkdirat",
			"- network: other addresses can be reached, too (10.0.0.0/8:443)",
		}, []string{"write_logs: files elsewhere"}},
		{"locked", []string{"--assume", "all", "--phase", "locked"}, []string{
			"none, it is irreversible", "Denied here, and allowed in another phase (ratchet):\naccess",
		}, nil},
	} {
		r := syslatch(t, append([]string{"profile", "phases", path, "--policy", "agent"}, tc.args...)...)
		if r.code != 0 || r.stderr != "" {
			t.Fatalf("%s: %+v", tc.name, r)
		}
		for _, want := range tc.want {
			if !strings.Contains(r.stdout, want) {
				t.Errorf("%s: no %q in\n%s", tc.name, want, r.stdout)
			}
		}
		for _, not := range tc.not {
			if strings.Contains(r.stdout, not) {
				t.Errorf("%s: %q in\n%s", tc.name, not, r.stdout)
			}
		}
	}
}

func TestProfilePhasesJSON(t *testing.T) {
	r := syslatch(t, "profile", "phases", policyFile(t, agentPolicy), "--policy", "agent", "--assume", "notify,inject", "-o", "json")
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	var v struct {
		Schema, Initial string
		Host            profiles.PhaseHost
		Phases          []struct {
			Name        string
			Next        []string
			TightenedBy []string
			WritePaths  []string
			Table       profiles.PhaseTable
			Ratchet     *specs.LinuxSeccomp
		}
		Gaps    []profiles.PhaseGap
		Hooks   []profiles.PhaseHook
		Start   *profiles.PhaseTable
		Profile json.RawMessage
	}
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil {
		t.Fatal(err)
	}
	if v.Schema != "syslatch.dev/phases/v1" || v.Initial != "read_only" || len(v.Phases) != 4 || len(v.Gaps) == 0 || v.Hooks == nil || !v.Host.Notify || v.Host.LSM {
		t.Errorf("%+v", v)
	}
	// A runtime takes the profile, once it has a listener's path.
	p, err := profiles.DecodeProfile(v.Profile)
	if err == nil {
		err = seccomp.Check(p)
	}
	if err != nil {
		t.Error(err)
	}
	connect := slices.IndexFunc(v.Phases[2].Table.Entries, func(e profiles.PhaseEntry) bool { return e.Name == "connect" })
	if connect < 0 || v.Phases[2].Table.Entries[connect].Number != 42 || v.Phases[2].Table.Entries[connect].Allow != "any" {
		t.Errorf("connect in network: %+v", v.Phases[2].Table)
	}
	if !slices.Contains(v.Phases[0].TightenedBy, "locked") || v.Phases[0].Ratchet != nil || v.Phases[3].Ratchet == nil || v.Start == nil {
		t.Errorf("%+v", v.Phases)
	}
}

// On the host as it is: whatever it offers, that is shown.
func TestProfilePhasesHere(t *testing.T) {
	r := syslatch(t, "profile", "phases", policyFile(t, agentPolicy), "--policy", "naive", "-o", "json")
	var v struct {
		Checks []struct{ Name string }
		Calls  []profiles.PhaseCall
	}
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || r.code != 0 {
		t.Fatalf("%v: %+v", err, r)
	}
	if len(v.Checks) == 0 {
		t.Error("no checks")
	}
	for _, name := range []string{"stat", "newfstatat", "statx", "getdents64", "write", "exit_group"} {
		if !slices.ContainsFunc(v.Calls, func(c profiles.PhaseCall) bool { return c.Name == name && slices.Contains(c.Phases, "a") }) {
			t.Errorf("naive phase lacks %s", name)
		}
	}
	r = syslatch(t, "profile", "phases", policyFile(t, agentPolicy), "--policy", "naive")
	if !strings.Contains(r.stdout, "a program with shared libraries doesn't start in it") {
		t.Errorf("%+v", r)
	}
}

// TestNaivePhaseRuns: under the sets that one writes first programs start, and are
// denied the rest. What a supervisor would be asked about is denied here, but for the
// execve that ends the start.
func TestNaivePhaseRuns(t *testing.T) {
	needRoot(t)
	for allow, works := range map[string]bool{
		"read, close, stat, openat, getdents64, mmap": true,
		"\"@file-read\"": true,
		"read, close":    false, // no shared library can be opened
	} {
		path := policyFile(t, "apiVersion: syslatch.dev/v1\npolicies:\n- name: p\n  match: {}\n  mode: enforce\n"+
			"  phases:\n    initial: a\n    a: {allow: ["+allow+"], files: {write: []}}\n")
		r := syslatch(t, "profile", "phases", path, "--assume", "notify", "-o", "json")
		var v struct{ Profile *specs.LinuxSeccomp }
		if err := json.Unmarshal([]byte(r.stdout), &v); err != nil {
			t.Fatalf("%v: %+v", err, r)
		}
		v.Profile.Syscalls = slices.DeleteFunc(v.Profile.Syscalls, func(s specs.LinuxSyscall) bool { return s.Action == specs.ActNotify })
		v.Profile.Syscalls = append(v.Profile.Syscalls, specs.LinuxSyscall{Names: []string{"execve"}, Action: specs.ActAllow})
		data, err := profiles.EncodeProfile(v.Profile)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		profile := filepath.Join(dir, "profile.json")
		if err := os.WriteFile(profile, data, 0o600); err != nil {
			t.Fatal(err)
		}
		r = syslatch(t, "run", "--profile", profile, "--", "ls", dir)
		if works != (r.code == 0 && r.stdout == "profile.json\n") {
			t.Errorf("%s: %+v", allow, r)
		}
		r = syslatch(t, "run", "--profile", profile, "--", "cp", profile, dir+"/copy")
		if _, err := os.Stat(dir + "/copy"); r.code == 0 || err == nil || works && !strings.Contains(r.stderr, "Operation not permitted") {
			t.Errorf("%s: a file was written, or not denied: %+v", allow, r)
		}
		if err := os.Remove(profile); err != nil {
			t.Error(err)
		}
	}
}

func TestProfilePhasesRefuses(t *testing.T) {
	good := policyFile(t, agentPolicy)
	plain := policyFile(t, "apiVersion: syslatch.dev/v1\npolicies:\n- {name: p, match: {}, mode: record}\n")
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{}, 2, "say which policy file"},
		{[]string{good}, 2, "say --policy with one of agent, naive"},
		{[]string{good, "--policy", "agnet"}, 1, `no policy "agnet"; with phases: agent, naive`},
		{[]string{good, "--policy", "plain"}, 1, `policy "plain" has no phases`},
		{[]string{plain}, 1, "no policy has phases"},
		{[]string{good, "--policy", "agent", "--assume", "all", "--phase", "x"}, 2, "want read_only, write_logs, network, locked"},
		{[]string{good, "--assume", "lsm,magic"}, 2, "--assume"},
		{[]string{good, "--assume", "all,lsm"}, 2, "--assume"},
		{[]string{good, "--runtime", "youki"}, 2, "want runc or crun"},
		{[]string{good, "-o", "yaml"}, 2, "yaml"},
		{[]string{policyFile(t, strings.Replace(agentPolicy, "fsync", "fsnyc", 1))}, 1, `:12: policies[0].phases.write_logs.allow[5]: unknown system call "fsnyc"`},
		{[]string{good + ".none"}, 1, "no such file"},
	} {
		r := syslatch(t, append([]string{"profile", "phases"}, tc.args...)...)
		if r.code != tc.code || !strings.Contains(r.stderr, tc.want) || r.stdout != "" {
			t.Errorf("%v: %+v, want %d and %q", tc.args, r, tc.code, tc.want)
		}
	}
}

func TestProfileGroups(t *testing.T) {
	r := syslatch(t, "profile", "groups")
	for _, want := range []string{"@file-read ", "@file-write ", "@network ", "@process ", "@io-uring ", "@floor "} {
		if r.code != 0 || !strings.Contains(r.stdout, want) {
			t.Errorf("no %s: %+v", want, r)
		}
	}
	for _, name := range []string{"@file-read", "file-read"} {
		if r := syslatch(t, "profile", "groups", name); r.code != 0 || !strings.Contains(r.stdout, "openat where arg2 & 0x243 == 0x0") || !strings.Contains(r.stdout, " statx") {
			t.Errorf("%s: %+v", name, r)
		}
	}
	r = syslatch(t, "profile", "groups", "-o", "json")
	var all []profiles.Group
	if err := json.Unmarshal([]byte(r.stdout), &all); err != nil || len(all) < 20 {
		t.Errorf("%d groups, %v", len(all), err)
	}
	if r := syslatch(t, "profile", "groups", "@floor", "-o", "json"); r.code != 0 || !strings.Contains(r.stdout, `"exit_group"`) {
		t.Errorf("%+v", r)
	}
	if r := syslatch(t, "profile", "groups", "@nothing"); r.code != 1 || !strings.Contains(r.stderr, `no group "@nothing"`) {
		t.Errorf("%+v", r)
	}
}
