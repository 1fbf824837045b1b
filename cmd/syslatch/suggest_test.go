// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

// trainingRun is what a shell does in each phase; DIR and PORT stand for where.
var trainingRun = []struct{ phase, line string }{
	{"look", "test -z \"$(ls DIR)\""},
	{"look", "wc -c </etc/hostname | grep -q ."},
	{"make", "mkdir DIR/a && echo 1 >DIR/a/b"},
	{"make", "(sleep 0.01; touch DIR/late) & wait"},
	{"talk", "bash -c 'exec 3<>/dev/tcp/127.0.0.1/PORT && read -t 10 -u 3 x; test \"$x\" = hello'"},
	{"look", "ls -l DIR/a | grep -q b"},
	{"make", "rm -r DIR/a DIR/late"},
}

func (p *phased) train(port int, more string) {
	p.t.Helper()
	in := trainingRun[0].phase
	for _, step := range trainingRun {
		if step.phase != in {
			p.set(step.phase, 0)
			in = step.phase
		}
		p.does(strings.NewReplacer("DIR", p.dir+"/files", "PORT", fmt.Sprint(port)).Replace(step.line), "0")
		if in == "make" && more != "" {
			p.does(strings.ReplaceAll(more, "DIR", p.dir+"/files"), "0")
			more = ""
		}
	}
}

func recordRun(t *testing.T, recording string, flags ...string) *phased {
	t.Helper()
	dir := t.TempDir()
	p := startShell(t, append([]string{"record", "-o", filepath.Join(dir, "profile.json"), "-q", "--recording", recording}, flags...)...)
	if err := os.Mkdir(p.dir+"/files", 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestTraining: what a command does in each phase while it is recorded becomes the
// phases of a policy, in which it may do that again, and not what it did in another.
func TestTraining(t *testing.T) {
	needRoot(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // until it is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("hello\n"))
			c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	dir := t.TempDir()
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	p := recordRun(t, first, "--phases", "look,make,talk")
	p.train(port, "")
	if code := p.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	p = recordRun(t, second, "--phases", "make,look,talk", "--phase", "look")
	p.train(port, "ln -s x DIR/link")
	p.wait()
	r := syslatch(t, "profile", "suggest", "--from", first)
	if r.code != 0 || r.stderr != "" || strings.Contains(r.stdout, "symlinkat") {
		t.Fatalf("%+v", r)
	}
	r = syslatch(t, "profile", "suggest", "--from", first, "--from", second)
	if r.code != 0 || r.stderr != "" || !strings.Contains(r.stdout, "symlinkat") || !strings.Contains(r.stdout, "connect\n") {
		t.Fatalf("%+v", r)
	}
	policy := "apiVersion: syslatch.dev/v1\npolicies:\n- name: trained\n  match: {}\n  mode: enforce\n  " + strings.ReplaceAll(strings.TrimSpace(r.stdout), "\n", "\n  ") + "\n"
	if r := syslatch(t, "profile", "phases", policyFile(t, policy), "--assume", "all"); r.code != 0 || !strings.Contains(r.stdout, "initial phase look") {
		t.Fatalf("%+v\n%s", r, policy)
	}

	p = startPhased(t, policy, "--gaps", "report")
	if err := os.Mkdir(p.dir+"/files", 0o755); err != nil {
		t.Fatal(err)
	}
	p.train(port, "ln -s x DIR/link")
	status := func() (st phase.Status) {
		r := syslatch(t, "phase", "get", "i", "--socket", p.socket, "-o", "json")
		if err := json.Unmarshal([]byte(r.stdout), &st); err != nil {
			t.Fatalf("%v: %+v", err, r)
		}
		return st
	}
	if st := status(); st.Denied != 0 || st.Recorded || st.Phase != "make" {
		t.Errorf("a run that does what the recorded ones did: %+v", st)
	}
	p.set("look", 0)
	// Nor did it close standard error: what is denied says so.
	p.does("(true >"+p.dir+"/files/x)", "2") // it only opened for reading there
	p.does("mkdir "+p.dir+"/files/x", "1")
	p.set("talk", 0)
	p.does("mkdir "+p.dir+"/files/x", "1")
	p.set("make", 0)
	p.does("bash -c 'exec 3<>/dev/tcp/127.0.0.1/"+fmt.Sprint(port)+"' 2>&-", "1")
	p.does("mkdir "+p.dir+"/files/x", "0")
	p.wait()
}

// TestRecordBegins: in the phase that is named, or the policy's, which needn't be its
// first.
func TestRecordBegins(t *testing.T) {
	needRoot(t)
	path := policyFile(t, strings.Replace(runPolicy, "initial: read_only", "initial: write", 1))
	for want, flags := range map[string][]string{
		"write":     {"--policy", path},
		"read_only": {"--policy", path, "--phase", "read_only"},
		"a":         {"--phases", "a,b"},
		"b":         {"--phases", "a,b", "--phase", "b"},
	} {
		file := filepath.Join(t.TempDir(), "r")
		if r := syslatch(t, slices.Concat([]string{"record", "-q", "-o", file + ".json", "--recording", file}, flags, []string{"--", "true"})...); r.code != 0 {
			t.Fatalf("%v: %+v", flags, r)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		rec, err := profiles.DecodeRecording(data)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Initial != want || !rec.Phases[want].Has(specs.ArchX86_64, "exit_group") {
			t.Errorf("%v: began in %s: %v", flags, rec.Initial, rec.Phases)
		}
	}
}

// TestRecordByPhase: the recording keeps phases apart, the start apart from them, and
// the profile has the calls of all.
func TestRecordByPhase(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "r")
	p := startShell(t, "record", "-o", filepath.Join(dir, "p"), "-q", "--recording", path, "--policy", policyFile(t, runPolicy))
	r := syslatch(t, "phase", "list", "--socket", p.socket, "-o", "json")
	if r.code != 0 || !strings.Contains(r.stdout, `"recorded": true`) || !strings.Contains(r.stdout, `"policy": "agent"`) {
		t.Errorf("%+v", r)
	}
	p.does("true", "0")
	p.set("write", 0)
	p.does("mkdir "+p.dir+"/a", "0") // in read_only it could as well: nothing is denied
	p.set("write", 0)
	p.set("nowhere", 3)
	p.set("read_only", 0)
	p.does("rmdir "+p.dir+"/a", "0")
	p.wait()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := profiles.DecodeRecording(data)
	if err != nil {
		t.Fatal(err)
	}
	for call, want := range map[string][]string{"mkdir": {"write"}, "rmdir": {"read_only"}, "execve": {"read_only", "start", "write"}} {
		var got []string
		for name, calls := range rec.Phases {
			if calls.Has(specs.ArchX86_64, call) {
				got = append(got, name)
			}
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s in %v, want %v", call, got, want)
		}
	}
	if data, err = os.ReadFile(filepath.Join(dir, "p")); err != nil || !strings.Contains(string(data), `"mkdir"`) || !strings.Contains(string(data), `"rmdir"`) {
		t.Errorf("the profile is no union: %v\n%s", err, data)
	}
	events, err := os.ReadFile(p.events)
	if err != nil || strings.Count(string(events), `"kind":"switched"`) != 2 || !strings.Contains(string(events), `"kind":"ended"`) {
		t.Errorf("events: %v\n%s", err, events)
	}
	if _, err := os.Stat(p.socket); err == nil {
		t.Error("the socket was left")
	}
}

func TestRecordByPhaseRefuses(t *testing.T) {
	policy, plain := policyFile(t, runPolicy), policyFile(t, "apiVersion: syslatch.dev/v1\npolicies: []\n")
	out := filepath.Join(t.TempDir(), "p")
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--phases", "a"}, 2, "--recording FILE"},
		{[]string{"--phases", "a", "--policy", policy, "--recording", "r"}, 2, "exclude each other"},
		{[]string{"--phase", "a", "--recording", "r"}, 2, "say which phases"},
		{[]string{"--api-socket", "s"}, 2, "say which phases"},
		{[]string{"--phases", "", "--recording", "r"}, 2, "--phases: 0 phases"},
		{[]string{"--phases", "a,a", "--recording", "r"}, 2, "given twice"},
		{[]string{"--phases", "start", "--recording", "r"}, 2, "a meaning of its own"},
		{[]string{"--phases", "a,b,c,d,e,f,g,h,i", "--recording", "r"}, 2, "9 phases, want 1 to 8"},
		{[]string{"--phases", "a,b", "--phase", "c", "--recording", "r"}, 2, "want one of a, b"},
		{[]string{"--policy", "", "--recording", "r"}, 2, "--policy is empty"},
		{[]string{"--policy", plain, "--recording", "r"}, 125, "no policy has phases"},
		{[]string{"--policy", policy, "--policy-name", "x", "--recording", "r"}, 125, `no policy "x"`},
	} {
		r := syslatch(t, append(append([]string{"record", "-o", out}, tc.args...), "--", "/bin/true")...)
		if r.code != tc.code || !strings.Contains(r.stderr, tc.want) {
			t.Errorf("%v: %+v, want %d and %q", tc.args, r, tc.code, tc.want)
		}
	}
	if r := syslatch(t, "record", "-o", out, "--pid", "1", "--phases", "a"); r.code != 2 || !strings.Contains(r.stderr, "of a command's recording") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("something was recorded")
	}
}

// TestProfileSuggest reads a store and files.
func TestProfileSuggest(t *testing.T) {
	dir := t.TempDir()
	s, err := store.Open(dir+"/store", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1e9, 0).UTC()
	add := func(id string, losses []profiles.Loss, phases map[string]profiles.Calls) string {
		t.Helper()
		rec := &profiles.Recording{SchemaVersion: 1, ID: id, Workload: "w", Started: at, Ended: at, Kernel: "6.12", Gate: profiles.GateFilter, Phases: phases, Losses: losses}
		if _, err := s.Add(context.Background(), rec, store.AddOptions{Merge: profiles.MergeOptions{AllowLosses: true, Created: at}}); err != nil {
			t.Fatal(err)
		}
		data, err := profiles.EncodeRecording(rec)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, id)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	of := func(names ...string) profiles.Calls { return profiles.Calls{specs.ArchX86_64: names} }
	late := []profiles.Loss{{Kind: profiles.LossAttachedLate, Count: 1}}
	good := add("1", nil, map[string]profiles.Calls{"a": of("mkdir"), "b": of("rmdir")})
	lossy := add("2", late, map[string]profiles.Calls{"a": of("mount")})
	plain := add("3", nil, map[string]profiles.Calls{"default": of("chroot")})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	in := []string{"w", "--store", dir + "/store"}
	for _, tc := range []struct {
		args []string
		code int
		want []string
		not  string
	}{
		{append(in, "--initial", "b"), 0, []string{"  initial: b\n  b:\n    allow:\n      - rmdir\n  a:\n    allow:\n      - mkdir\n", "recording 2 left out: recording 2 may lack calls: attached-late (1)", "recording 3 left out: it was not recorded by phase"}, "mount"},
		{append(in, "--initial", "a", "--allow-losses"), 0, []string{"      - mkdir\n      - mount\n", "# recording 2, kernel 6.12: a, with losses (attached-late)"}, "chroot"},
		{in, 1, []string{"don't tell in which of a, b they began (say --initial PHASE)"}, ""},
		{append(in, "--initial", "c"), 1, []string{`nothing was recorded in phase "c": want one of a, b`}, ""},
		{append(in, "--initial", "a", "--from", plain, "-o", "json"), 0, []string{`"schema": "syslatch.dev/suggestion/v1"`, `"leftOut": "it was not recorded by phase"`, `"notes": []`}, "mount\""},
		{[]string{"--from", good, "--initial", "a"}, 0, []string{"mkdir"}, ""},
		{[]string{"--from", good, "--from", lossy, "--initial", "a"}, 1, []string{"may lack calls: attached-late"}, "mkdir"},
		{[]string{"--from", plain}, 1, []string{"none of 1 recordings was made by phase"}, ""},
		{[]string{"--from", dir}, 1, []string{"is a directory"}, ""},
		{[]string{"--from", dir + "/none"}, 1, []string{"no such file"}, ""},
		{[]string{"--from", policyFile(t, "x")}, 1, []string{"'syslatch record --recording' makes them"}, ""},
		{[]string{"v", "--store", dir + "/store"}, 1, []string{`workload "v" has no recordings`}, ""},
		{nil, 2, []string{"say which workload"}, ""},
		{[]string{"a", "b"}, 2, []string{"want one: WORKLOAD"}, ""},
		{append(in, "-o", "yaml"), 2, []string{"yaml"}, ""},
	} {
		r := syslatch(t, append([]string{"profile", "suggest"}, tc.args...)...)
		all := r.stdout + r.stderr
		if r.code != tc.code || tc.not != "" && strings.Contains(r.stdout, tc.not) || (r.code != 0) != (r.stdout == "") {
			t.Errorf("%v: %+v, want %d without %q", tc.args, r, tc.code, tc.not)
		}
		for _, want := range tc.want {
			if !strings.Contains(all, want) {
				t.Errorf("%v: no %q in\n%s", tc.args, want, all)
			}
		}
	}
	if r := syslatch(t, append([]string{"__complete", "profile", "suggest"}, append(in, "--initial", "")...)...); !strings.HasPrefix(r.stdout, "a\nb\n") {
		t.Errorf("completion: %+v", r)
	}
	if r := syslatch(t, "__complete", "record", "--policy", policyFile(t, runPolicy), "--phase", ""); !strings.HasPrefix(r.stdout, "read_only\nwrite\n") {
		t.Errorf("completion: %+v", r)
	}
}
