// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

func newJournal(t testing.TB) *journal {
	t.Helper()
	j, err := openJournal(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func (j *journal) write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(j.dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (j *journal) names(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestJournalKeepsInstances(t *testing.T) {
	j := newJournal(t)
	now := time.Date(2026, 11, 25, 1, 2, 3, 4, time.UTC)
	limit := int64(64)
	want := &instance{
		Container: policy.Container{ID: "c1", Name: "app", PodLabels: map[string]string{"a": "b"}, CgroupsPath: "/c1", PID: 7},
		Decision:  policy.Decision{Mode: policy.ModeRecord, Workload: "w", Failure: policy.FailureDeny, Limits: policy.Limits{Pids: &limit}},
		Planned:   now, Version: 3, Digest: "sha256:00", Record: true, Tag: 1<<64 - 1,
		Recording:   &profiles.Recording{SchemaVersion: 1, ID: "r", Started: now, Ended: now, Losses: []profiles.Loss{{Kind: profiles.LossAttachedLate, Count: 1}}},
		BaseFilters: 2, Gate: bpf.GateExec, CgroupID: 1<<64 - 1, Ran: true, Kept: true,
		Expect: []adjust.Expectation{{Stage: adjust.StageRunning, File: "status", Want: "2"}},
	}
	for range 2 { // replaced
		if err := j.save(want); err != nil {
			t.Fatal(err)
		}
	}
	got, problems := j.load()
	if problems != nil || len(got) != 1 {
		t.Fatalf("got %v, problems %v", got, problems)
	}
	if diff := cmp.Diff(want, got[0], cmpopts.IgnoreUnexported(instance{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := errors.Join(j.remove("c1"), j.remove("c1")); err != nil {
		t.Error(err)
	}
	if names := j.names(t); names != nil {
		t.Errorf("left: %v", names)
	}
}

// What a killed writer left goes; what can't be read stays, with what belongs to
// it, and is reported with what to do.
func TestJournalLoadsAroundDamage(t *testing.T) {
	j := newJournal(t)
	if err := j.save(&instance{Container: policy.Container{ID: "good"}, Record: true, Recording: &profiles.Recording{}}); err != nil {
		t.Fatal(err)
	}
	if err := j.appendEvent("good", bpf.Event{Number: 1}); err != nil {
		t.Fatal(err)
	}
	j.write(t, "torn.json", `{"container":{"id":"to`)
	j.write(t, "torn.first-seen", "{}\n")
	j.write(t, "alien.json", `{"container":{"id":"other"}}`)
	j.write(t, "bare.json", `{"container":{"id":"bare"},"record":true}`)
	j.write(t, "killed.json.new", "{")
	j.write(t, "orphan.first-seen", "{}\n")
	got, problems := j.load()
	if len(got) != 1 || got[0].Container.ID != "good" || got[0].events != 1 {
		t.Errorf("got %+v", got)
	}
	if len(problems) != 3 {
		t.Errorf("problems: %v", problems)
	}
	for _, p := range problems {
		if !strings.Contains(p.Error(), "remove the file to forget") {
			t.Errorf("%v: no remedy", p)
		}
	}
	want := []string{"alien.json", "bare.json", "good.first-seen", "good.json", "torn.first-seen", "torn.json"}
	if got := j.names(t); !slices.Equal(got, want) {
		t.Errorf("left %v, want %v", got, want)
	}
}

// A line that a full disk tore costs itself, not what comes after.
func TestJournalEventsAroundDamage(t *testing.T) {
	j := newJournal(t)
	event := func(n uint32) bpf.Event {
		return bpf.Event{Handle: bpf.Handle{Slot: 1, Generation: 2}, Since: time.Second, Number: n, Comm: "a\nb\"", Exe: "\xff"}
	}
	if err := j.save(&instance{Container: policy.Container{ID: "c1"}, Record: true}); err != nil {
		t.Fatal(err)
	}
	if err := j.appendEvent("c1", event(1)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(j.path("c1", firstSeenSuffix), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("\n{\"Slot\":1,\"Num"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := j.appendEvent("c1", event(2)); err != nil {
		t.Fatal(err)
	}
	got, err := j.events("c1")
	if err == nil {
		t.Error("the torn line is not reported")
	}
	if len(got) != 2 || got[0].Number != 1 || got[1].Number != 2 || got[0].Comm != "a\nb\"" || got[0].Since != time.Second {
		t.Errorf("got %+v", got)
	}
	if none, err := j.events("c2"); none != nil || err != nil {
		t.Errorf("got %v, %v for a container without events", none, err)
	}
	// An event that comes after the end must not make the file anew.
	if err := errors.Join(j.remove("c1"), j.appendEvent("c1", event(3))); err != nil {
		t.Error(err)
	}
	if names := j.names(t); names != nil {
		t.Errorf("left %v", names)
	}
}

// A save that fails leaves the old file, and nothing beside it.
func TestJournalSaveThatFails(t *testing.T) {
	j := newJournal(t)
	in := &instance{Container: policy.Container{ID: "c1"}}
	if err := os.Mkdir(j.path("c1", instanceSuffix), 0o700); err != nil { // rename fails
		t.Fatal(err)
	}
	if err := j.save(in); err == nil {
		t.Fatal("no error")
	}
	if names := j.names(t); !slices.Equal(names, []string{"c1.json"}) {
		t.Errorf("left %v", names)
	}
}

func TestValidID(t *testing.T) {
	for id, valid := range map[string]bool{
		"0123456789abcdef": true, "a.b_c-D": true, strings.Repeat("x", 128): true,
		"": false, ".": false, "..": false, ".hidden": false, "a/b": false, "a\x00b": false, "a b": false, "ä": false,
		strings.Repeat("x", 129): false,
	} {
		if err := validID(id); (err == nil) != valid {
			t.Errorf("%q: got %v, want valid %t", id, err, valid)
		}
	}
}

// Two daemons on one state directory would publish each other's recordings.
func TestStateDirectoryIsLocked(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	first, err := lockState(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = lockState(dir)
	contains(t, err, dir, "another syslatchd", "stateDir", "bpffs")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := lockState(dir)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// Whatever is in the files, loading them neither panics nor makes an instance that
// the rest can't bear.
func FuzzJournalLoad(f *testing.F) {
	f.Add([]byte(`{"container":{"id":"c1"},"record":true,"recording":{"id":"r"},"tag":3}`), []byte("{}\n\n{\"Number\":1}\n"))
	f.Add([]byte(`{"container":{"id":"c1"},"record":true}`), []byte("x"))
	f.Add([]byte(`null`), []byte(nil))
	f.Fuzz(func(t *testing.T, instance, events []byte) {
		if bytes.Contains(events, []byte{0}) {
			t.Skip("one shape of garbage is enough")
		}
		j := newJournal(t)
		j.write(t, "c1.json", string(instance))
		j.write(t, "c1.first-seen", string(events))
		got, _ := j.load()
		for _, in := range got {
			if in.Container.ID != "c1" || in.Record && in.Recording == nil {
				t.Errorf("got %+v", in)
			}
		}
	})
}
