// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

const nginx = "docker.io/library/nginx/web"

// newStore is a store with two versions of nginx, the second active, and one of
// demo/app.
func newStore(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i, r := range []struct {
		workload string
		calls    []string
	}{{nginx, []string{"execve", "read"}}, {nginx, []string{"execve", "write"}}, {"demo/app", []string{"execve"}}} {
		at := time.Date(2026, 11, 24, 12, i, 0, 0, time.UTC)
		_, err := s.Add(t.Context(), &profiles.Recording{
			SchemaVersion: 1, ID: at.Format("20060102T150405.000000000Z") + "-00000000", Workload: r.workload,
			Started: at, Ended: at, Kernel: "6.12.0", Gate: profiles.GateFilter,
			Phases: map[string]profiles.Calls{profiles.DefaultPhase: {specs.ArchX86_64: r.calls}},
		}, store.AddOptions{Activate: true, Merge: profiles.MergeOptions{Created: at}})
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestProfileCommands(t *testing.T) {
	dir := newStore(t)
	tests := map[string]struct {
		args           []string
		code           int
		stdout, stderr string // parts
	}{
		"list":                {[]string{"list"}, 0, nginx + "  2         2       2 ", ""},
		"list JSON":           {[]string{"list", "-o", "json"}, 0, `"workload": "demo/app",`, ""},
		"versions":            {[]string{"list", nginx}, 0, "2        *       3 x86_64", ""},
		"versions JSON":       {[]string{"list", nginx, "-o", "json"}, 0, `"active": true`, ""},
		"show":                {[]string{"show", nginx}, 0, "SCMP_ARCH_X86_64, 3 calls recorded:\nexecve read write\n", ""},
		"show 1":              {[]string{"show", nginx, "v1"}, 0, "2 calls recorded:\nexecve read\n", ""},
		"show JSON":           {[]string{"show", nginx, "newest", "-o", "json"}, 0, `"defaultAction": "SCMP_ACT_ERRNO",`, ""},
		"path":                {[]string{"path", nginx}, 0, dir + "/docker.io%2Flibrary%2Fnginx%2Fweb/versions/000002/profile.json\n", ""},
		"path JSON":           {[]string{"path", nginx, "1", "-o", "json"}, 0, `"version": 1`, ""},
		"unknown workload":    {[]string{"show", "nginx"}, 1, "", "'syslatch profile list' shows what there is"},
		"unknown version":     {[]string{"show", nginx, "3"}, 1, "", "version 3: no such profile version (the newest is 2)"},
		"leaves the store":    {[]string{"path", "../../etc"}, 1, "", "no such profile version"},
		"no workload":         {[]string{"show"}, 2, "", "say which workload ('syslatch profile list' shows them)"},
		"too many":            {[]string{"path", "a", "1", "2"}, 2, "", "3 arguments, want at most 2"},
		"bad version":         {[]string{"show", nginx, "newer"}, 2, "", "want a number from 1, active or newest"},
		"output":              {[]string{"show", nginx, "-o", "yaml"}, 2, "", `output "yaml": want text or json`},
		"activate nothing":    {[]string{"activate", nginx}, 2, "", "say which version"},
		"activate what is":    {[]string{"activate", nginx, "active"}, 2, "", "that is active already"},
		"activate what isn't": {[]string{"activate", nginx, "7"}, 1, "", "the newest is 2"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"profile", tc.args[0], "--store", dir}, tc.args[1:]...)
			r := syslatch(t, args...)
			if r.code != tc.code || !strings.Contains(r.stdout, tc.stdout) || !strings.Contains(r.stderr, tc.stderr) {
				t.Errorf("got %+v, want %+v", r, tc)
			}
			if tc.code == 0 && r.stderr != "" || tc.code != 0 && (r.stdout != "" || !strings.HasPrefix(r.stderr, "syslatch: ")) {
				t.Errorf("got %+v, want one of the streams", r)
			}
			if tc.code == 0 && slices.Contains(tc.args, "json") && !json.Valid([]byte(r.stdout)) {
				t.Errorf("not JSON: %s", r.stdout)
			}
		})
	}
}

func TestProfileActivate(t *testing.T) {
	dir := newStore(t)
	for _, tc := range []struct{ which, want string }{{"1", "000001"}, {"newest", "000002"}, {"v1", "000001"}} {
		if r := syslatch(t, "profile", "activate", "--store", dir, nginx, tc.which); r.code != 0 || !strings.Contains(r.stdout, "is active\n") {
			t.Fatalf("%+v", r)
		}
		if r := syslatch(t, "profile", "path", "--store", dir, nginx); !strings.Contains(r.stdout, "/"+tc.want+"/") {
			t.Errorf("after activate %s: %+v", tc.which, r)
		}
	}
	// With none active, the message says how to get on.
	if err := os.Remove(filepath.Join(dir, "demo%2Fapp", "active")); err != nil {
		t.Fatal(err)
	}
	r := syslatch(t, "profile", "show", "--store", dir, "demo/app")
	if r.code != 1 || !strings.Contains(r.stderr, `none of its 1 versions is active ('newest' names the newest`) {
		t.Errorf("got %+v", r)
	}
}

func TestProfileStoresThatCantBeRead(t *testing.T) {
	empty := t.TempDir()
	private := newStore(t)
	tests := map[string]struct {
		dir            string
		nobody         bool
		code           int
		stdout, stderr string
	}{
		"absent":     {"/no/such/store", false, 1, "", "no such file or directory (syslatchd makes it when it first starts; --store names another)"},
		"a file":     {"/etc/passwd", false, 1, "", "not a directory"},
		"empty":      {empty, false, 0, "WORKLOAD  VERSIONS", "syslatch: nothing has been recorded into " + empty + " yet\n"},
		"unreadable": {private, true, 1, "", "permission denied (run it with sudo, or as a member of the directory's group)"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			args := []string{"profile", "list", "--store", tc.dir}
			var r result
			if tc.nobody {
				needRoot(t)
				r = syslatchAs(t, &syscall.Credential{Uid: 65534, Gid: 65534}, args...)
			} else {
				r = syslatch(t, args...)
			}
			if r.code != tc.code || !strings.HasPrefix(r.stdout, tc.stdout) || !strings.Contains(r.stderr, tc.stderr) {
				t.Errorf("got %+v, want %+v", r, tc)
			}
		})
	}
	if r := syslatch(t, "profile", "list", "--store", empty, "-o", "json"); r.stdout != "[]\n" {
		t.Errorf("empty as JSON: %+v", r)
	}
	if _, err := os.Stat("/no/such/store"); err == nil {
		t.Error("reading made the store")
	}
}

// One corrupt workload hides no other.
func TestProfileListOfACorruptStore(t *testing.T) {
	dir := newStore(t)
	if err := os.WriteFile(filepath.Join(dir, "demo%2Fapp", "active"), []byte("9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"text", "json"} {
		r := syslatch(t, "profile", "list", "--store", dir, "-o", format)
		if r.code != 1 || !strings.Contains(r.stdout, nginx) || !strings.Contains(r.stderr, "demo%2Fapp/active") {
			t.Errorf("list as %s: %+v", format, r)
		}
	}
	r := syslatch(t, "profile", "list", "--store", dir, "demo/app")
	if r.code != 1 || !strings.Contains(r.stdout, "1                1 x86_64") || !strings.Contains(r.stderr, "demo%2Fapp/active") {
		t.Errorf("versions: %+v", r)
	}
	if r := syslatch(t, "profile", "activate", "--store", dir, "demo/app", "1"); r.code != 0 {
		t.Errorf("activate doesn't repair: %+v", r)
	}

	file := filepath.Join(dir, "demo%2Fapp", "versions", "000001", "profile.json")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(data, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"show", "path"} {
		r := syslatch(t, "profile", command, "--store", dir, "demo/app")
		if r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, file) {
			t.Errorf("%s of a changed version: %+v", command, r)
		}
	}
}

func TestCompletions(t *testing.T) {
	dir := newStore(t)
	bin := t.TempDir()
	for name, mode := range map[string]os.FileMode{"frobnicate": 0o755, "frob.txt": 0o644} {
		if err := os.WriteFile(filepath.Join(bin, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":/no/such/directory")
	policies := policyFile(t, agentPolicy)
	tests := map[string]struct {
		args []string
		want []string
	}{
		"policy":           {[]string{"profile", "phases", policies, "--policy", ""}, []string{"agent", "naive"}},
		"phase":            {[]string{"profile", "phases", policies, "--policy", "agent", "--phase", ""}, []string{"read_only", "write_logs", "network", "locked"}},
		"phase of a run":   {[]string{"run", "--policy", policies, "--policy-name", "naive", "--phase", ""}, []string{"a"}},
		"workload":         {[]string{"profile", "show", "--store", dir, ""}, []string{"demo/app", nginx}},
		"workload's start": {[]string{"profile", "list", "--store", dir, "do"}, []string{nginx}},
		"version":          {[]string{"profile", "path", "--store", dir, nginx, ""}, []string{"active", "newest", "1", "2"}},
		"no version":       {[]string{"profile", "list", "--store", dir, nginx, ""}, nil},
		"no store":         {[]string{"profile", "path", "--store", "/none", ""}, nil},
		"format":           {[]string{"doctor", "-o", ""}, []string{"text", "json"}},
		"program":          {[]string{"record", "-o", "x", "frob"}, []string{"frobnicate"}},
		"program after --": {[]string{"run", "-p", "x", "--", "frob"}, []string{"frobnicate"}},
		"argument":         {[]string{"run", "-p", "x", "--", "frobnicate", "fr"}, nil},
		"help's topic":     {[]string{"help", "prof"}, []string{"profile"}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := syslatch(t, append([]string{"__complete"}, tc.args...)...)
			var got []string
			for line := range strings.Lines(r.stdout) {
				if !strings.HasPrefix(line, ":") {
					got = append(got, strings.TrimSpace(strings.Split(line, "\t")[0]))
				}
			}
			if r.code != 0 || !slices.Equal(got, tc.want) {
				t.Errorf("got %+v, want %v", r, tc.want)
			}
		})
	}
}
