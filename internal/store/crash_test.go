// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/syslatch/syslatch/profiles"
)

// TestKill kills a writer at each of its steps and checks what it leaves, and
// what a machine that loses its power after the next Add could lose.
func TestKill(t *testing.T) {
	for _, c := range []struct {
		name  string
		base  func(*testing.T, *Store) // what was acknowledged before
		id    string
		calls []string
		head  int
		least int // steps, so that a hook that is never called can't pass
	}{
		{"first", func(*testing.T, *Store) {}, "r1", []string{"read"}, 1, 30},
		{"next", func(t *testing.T, s *Store) {
			add(t, s, recording("w", "r1", "read"), activate)
		}, "r2", []string{"mkdir"}, 2, 25},
		{"nothing new", func(t *testing.T, s *Store) {
			add(t, s, recording("w", "r1", "read"), activate)
			add(t, s, recording("w", "r2", "read", "write"), AddOptions{})
		}, "r3", []string{"read"}, 2, 12},
		{"again", func(t *testing.T, s *Store) {
			add(t, s, recording("w", "r1", "read"), activate)
		}, "r1", []string{"read"}, 1, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := 1
			for ; killed(t, n, c.base, c.id, c.calls, c.head); n++ {
			}
			t.Logf("killed at each of %d steps", n-1)
			if n <= c.least {
				t.Errorf("only %d steps, want at least %d", n-1, c.least)
			}
		})
	}
}

// killed kills at step n, and tells whether there was one.
func killed(t *testing.T, n int, base func(*testing.T, *Store), id string, calls []string, head int) bool {
	t.Helper()
	dir := t.TempDir()
	s := open(t, dir, Options{})
	var log powerLog
	s.step = log.step
	base(t, s)
	before := mustRead(t, s, "w")

	c := command(t, "crash", append([]string{dir, fmt.Sprint(n), id}, calls...)...)
	var out bytes.Buffer
	c.Stdout = &out
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL:
		t.Fatalf("step %d: %v", n, err)
	}
	log.read(out.String())

	// A reader of its own sees what was there, and at most one whole version more.
	reader := open(t, dir, Options{ReadOnly: true})
	after := mustRead(t, reader, "w")
	if len(after.Versions) < len(before.Versions) || len(after.Versions) > head {
		t.Fatalf("step %d: %d versions, were %d", n, len(after.Versions), len(before.Versions))
	}
	if diff := cmp.Diff(before.Versions, after.Versions[:len(before.Versions):len(before.Versions)], cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("step %d: acknowledged versions changed:\n%s", n, diff)
	}
	if len(after.Recordings) < len(before.Recordings) {
		t.Fatalf("step %d: %d recordings, were %d", n, len(after.Recordings), len(before.Recordings))
	}
	if after.Active != before.Active && after.Active != head {
		t.Fatalf("step %d: active %d, was %d", n, after.Active, before.Active)
	}

	// The next Add goes on.
	r := add(t, s, recording("w", id, calls...), activate)
	log.step("end")
	if r.Head != head {
		t.Fatalf("step %d: head %d, want %d", n, r.Head, head)
	}
	end := mustRead(t, reader, "w")
	if len(end.Versions) != head || end.Active != head {
		t.Fatalf("step %d: %d versions, active %d, want %d", n, len(end.Versions), end.Active, head)
	}
	for _, call := range calls {
		if !bytes.Contains(fmt.Append(nil, end.Manifests[head-1].Calls), []byte(call)) {
			t.Fatalf("step %d: version %d lacks %s", n, head, call)
		}
	}
	found := false
	for _, rec := range end.Recordings {
		found = found || rec.ID == id
	}
	if !found {
		t.Fatalf("step %d: recording %s is lost", n, id)
	}
	noLeftovers(t, dir)
	if err := log.check(); err != nil {
		t.Fatalf("step %d: %v\n%s", n, err, strings.Join(log, "\n"))
	}
	return true
}

// powerLog is the steps of one or more writers, from an empty store on, "end"
// behind each Add that returned nil.
type powerLog []string

func (l *powerLog) step(next string) { *l = append(*l, next) }

func (l *powerLog) read(out string) {
	for line := range strings.Lines(out) {
		l.step(strings.TrimSuffix(line, "\n"))
	}
}

// check plays the machine that loses all that wasn't synced at the worst moment:
// what gets its final name must be durable in itself, and what it refers to must be
// durable before it, and everything when an Add returns.
func (l powerLog) check() error {
	exists := map[string]bool{".": true}
	dirty := map[string]bool{}   // files whose data wasn't synced
	entries := map[string]bool{} // names that weren't synced in their directory
	visible := func(name string) bool { return !strings.Contains(name, leftover) }
	for i, line := range l {
		f := strings.Fields(line)
		switch f[0] {
		case "mkdir":
			if !exists[f[1]] {
				exists[f[1]], entries[f[1]] = true, true
			}
		case "create", "write":
			exists[f[1]], dirty[f[1]] = true, true
			if f[0] == "create" {
				entries[f[1]] = true
			}
		case "fsync":
			delete(dirty, f[1])
			for name := range entries {
				if path.Dir(name) == f[1] {
					delete(entries, name)
				}
			}
		case "rename":
			from, to := f[1], f[2]
			for name := range dirty {
				if name == from || path.Dir(name) == from {
					return fmt.Errorf("step %d: %s: data of %s not synced", i, line, name)
				}
			}
			for name := range entries {
				if path.Dir(name) == from {
					return fmt.Errorf("step %d: %s: %s not synced in it", i, line, name)
				}
				if visible(name) && path.Dir(name) != path.Dir(to) {
					return fmt.Errorf("step %d: %s: %s before it is not durable", i, line, name)
				}
			}
			delete(entries, from)
			entries[to], exists[to] = true, true
		case "unlink", "rmdir":
			delete(dirty, f[1])
			delete(entries, f[1])
			delete(exists, f[1])
		case "end":
			for name := range entries {
				if visible(name) {
					return fmt.Errorf("step %d: returned before %s was durable", i, name)
				}
			}
		case "flock":
		default:
			return fmt.Errorf("step %d: unknown %q", i, line)
		}
	}
	return nil
}

// TestSteps holds the package comment to what Add does.
func TestSteps(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	var log powerLog
	s.step = log.step
	rec := recording("w", "r", "read")
	add(t, s, rec, activate)
	data, err := profiles.EncodeRecording(rec)
	if err != nil {
		t.Fatal(err)
	}
	name := "w/recordings/r.sha256-" + strings.TrimPrefix(profiles.Digest(data), "sha256:") + ".json"
	file := func(name string) []string { return []string{"create " + name, "write " + name, "fsync " + name} }
	var want []string
	for _, x := range [][]string{
		{"mkdir w", "flock w", "mkdir w/versions", "mkdir w/recordings"},
		file("w/.tmp-workload"),
		{"fsync .", "rename w/.tmp-workload w/workload", "fsync w"},
		file("w/recordings/.tmp-r"),
		{"rename w/recordings/.tmp-r " + name, "fsync w/recordings", "mkdir w/versions/.tmp-000001"},
		file("w/versions/.tmp-000001/profile.json"),
		file("w/versions/.tmp-000001/manifest.json"),
		file("w/versions/.tmp-000001/sha256sums"),
		{"fsync w/versions/.tmp-000001", "rename w/versions/.tmp-000001 w/versions/000001", "fsync w/versions"},
		file("w/.tmp-active"),
		{"rename w/.tmp-active w/active", "fsync w"},
	} {
		want = append(want, x...)
	}
	if diff := cmp.Diff(want, []string(log)); diff != "" {
		t.Error(diff)
	}
}

// TestPowerLog proves that the check can fail: leaving out any one fsync shows.
func TestPowerLog(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	var log powerLog
	s.step = log.step
	add(t, s, recording("w", "r", "read"), activate)
	log.step("end")
	if err := log.check(); err != nil {
		t.Fatal(err)
	}
	for i, line := range log {
		if !strings.HasPrefix(line, "fsync ") {
			continue
		}
		cut := append(append(powerLog{}, log[:i]...), log[i+1:]...)
		if cut.check() == nil {
			t.Errorf("without %q (step %d) the check passes", line, i)
		}
	}
}
