// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

func TestAdd(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "a", "b"), Options{})
	if _, err := s.Active("w"); !errors.Is(err, ErrNoVersion) {
		t.Errorf("active of an unknown workload: %v", err)
	}
	if _, err := s.Versions("w"); !errors.Is(err, ErrNoVersion) {
		t.Errorf("versions of an unknown workload: %v", err)
	}
	if err := s.SetActive(t.Context(), "w", 1); !errors.Is(err, ErrNoVersion) {
		t.Errorf("activate an unknown version: %v", err)
	}
	if got := files(t, dir); len(got) > 0 {
		t.Errorf("asking made %v", got)
	}

	r := add(t, s, recording("w", "r1", "read"), activate)
	if r.Version == nil || r.Head != 1 || r.Observations != 1 || r.Delta.Added.Len() != 1 {
		t.Errorf("first: %+v", r)
	}
	if _, err := os.Stat(r.Recording); err != nil {
		t.Error(err)
	}
	r = add(t, s, recording("w", "r2", "read"), activate)
	if r.Version != nil || r.Head != 1 || r.Observations != 2 {
		t.Errorf("nothing new: %+v", r)
	}
	r = add(t, s, recording("w", "r3", "write"), AddOptions{})
	if r.Version == nil || r.Head != 2 || r.Observations != 3 {
		t.Errorf("new: %+v", r)
	}
	r = add(t, s, recording("w", "r3", "write"), AddOptions{})
	if r.Version != nil || r.Head != 2 || r.Observations != 3 {
		t.Errorf("again: %+v", r)
	}
	x := mustRead(t, s, "w")
	if x.Active != 1 || len(x.Versions) != 2 || len(x.Recordings) != 3 {
		t.Errorf("active left alone: %+v", x)
	}
	if diff := cmp.Diff(x.Summaries, []Summary{{"w", 2, 1, 3, x.Summaries[0].Updated}}); diff != "" {
		t.Error(diff)
	}
	if age := time.Since(x.Summaries[0].Updated); age < -time.Second || age > time.Minute {
		t.Errorf("updated %v ago", age)
	}
	if err := s.SetActive(t.Context(), "w", 2); err != nil {
		t.Error(err)
	}
	if err := s.SetActive(t.Context(), "w", 3); !errors.Is(err, ErrNoVersion) {
		t.Errorf("activate what isn't there: %v", err)
	}
	if v, err := s.Active("w"); err != nil || v.Manifest.Version != 2 {
		t.Errorf("active: %v, %v", v, err)
	}
	for _, n := range []int{-1, 0, 3} {
		if _, err := s.Version("w", n); !errors.Is(err, ErrNoVersion) {
			t.Errorf("version %d: %v", n, err)
		}
	}
	name, err := s.Path("w", 2)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(name)
	if err != nil || profiles.Digest(data) != x.Manifests[1].Digest {
		t.Errorf("%s: %v", name, err)
	}
}

// A recording that may lack calls is evidence, but makes no version.
func TestLossy(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	rec := recording("w", "r1", "read")
	rec.Losses = []profiles.Loss{{Kind: profiles.LossAttachedLate, Count: 1}}
	r, err := s.Add(t.Context(), rec, activate)
	var lossy *profiles.LossyError
	if !errors.As(err, &lossy) {
		t.Fatalf("got %v", err)
	}
	if r.Head != 0 || r.Observations != 1 || r.Recording == "" {
		t.Errorf("%+v", r)
	}
	x := mustRead(t, s, "w")
	if len(x.Versions) != 0 || len(x.Recordings) != 1 {
		t.Errorf("%+v", x)
	}
	r = add(t, s, rec, AddOptions{Merge: profiles.MergeOptions{AllowLosses: true}})
	if r.Head != 1 || r.Observations != 1 {
		t.Errorf("overridden: %+v", r)
	}
}

// An instance that is harvested again after a crash keeps its id, not its content.
func TestHarvestedTwice(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	add(t, s, recording("w", "r1", "read"), activate)
	second := recording("w", "r1", "read", "write")
	second.Ended = second.Ended.Add(time.Minute)
	r := add(t, s, second, activate)
	if r.Head != 2 || r.Observations != 1 {
		t.Errorf("%+v", r)
	}
	x := mustRead(t, s, "w")
	if diff := cmp.Diff(x.Recordings, []*profiles.Recording{second}); diff != "" {
		t.Error(diff)
	}
	if got, _ := filepath.Glob(filepath.Join(s.dir, "w/recordings/*")); len(got) != 2 {
		t.Errorf("evidence: %v", got)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	big := recording("w", "r1", "read")
	big.Runtime = strings.Repeat("x", profiles.MaxFileSize)
	for name, rec := range map[string]*profiles.Recording{
		"no id":     recording("w", "", "read"),
		"dots":      recording("w", "..", "read"),
		"slash":     recording("w", "a/b", "read"),
		"NUL":       recording("w", "a\x00b", "read"),
		"long":      recording("w", strings.Repeat("x", 129), "read"),
		"not UTF-8": recording("w\xff", "r1", "read"),
		"too big":   big,
	} {
		if _, err := s.Add(t.Context(), rec, activate); err == nil {
			t.Errorf("%s: no error", name)
		} else if len(err.Error()) > 1000 {
			t.Errorf("%s: error of %d bytes", name, len(err.Error()))
		}
	}
	reader := open(t, dir, Options{ReadOnly: true})
	if _, err := reader.Add(t.Context(), recording("w", "r1", "read"), activate); err == nil {
		t.Error("read-only: no error")
	}
	if _, err := Open(filepath.Join(dir, "none"), Options{ReadOnly: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("read-only: %v", err)
	}
	if got, _ := os.ReadDir(dir); len(got) > 0 {
		t.Errorf("made %v", got)
	}
}

func TestModes(t *testing.T) {
	defer unix.Umask(unix.Umask(0o022))
	for _, c := range []struct {
		public bool
		want   map[string]os.FileMode
	}{
		{false, map[string]os.FileMode{".": 0o750, "w": 0o750, "w/active": 0o640, "w/versions/000001": 0o750, "w/versions/000001/profile.json": 0o440, "w/recordings": 0o750}},
		{true, map[string]os.FileMode{".": 0o755, "w": 0o755, "w/active": 0o644, "w/versions/000001": 0o755, "w/versions/000001/profile.json": 0o444, "w/recordings": 0o750}},
	} {
		dir := filepath.Join(t.TempDir(), "s")
		s := open(t, dir, Options{Public: c.public})
		r := add(t, s, recording("w", "r1", "read"), activate)
		c.want[strings.TrimPrefix(r.Recording, dir+"/")] = 0o440
		for name, want := range c.want {
			st, err := os.Stat(filepath.Join(dir, name))
			if err != nil || st.Mode().Perm() != want {
				t.Errorf("public %v: %s: got %v, %v, want %v", c.public, name, st.Mode().Perm(), err, want)
			}
		}
	}
}

// full makes a store with two versions and returns it, its directory and its state.
func full(t *testing.T) (*Store, string, state) {
	t.Helper()
	dir := t.TempDir()
	s := open(t, dir, Options{})
	add(t, s, recording("w", "r1", "read"), AddOptions{})
	add(t, s, recording("w", "r2", "write"), activate)
	return s, dir, mustRead(t, s, "w")
}

func rewrite(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o440); err != nil {
		t.Fatal(err)
	}
}

// corruptOf checks that reading finds the file corrupt and says which.
func corruptOf(t *testing.T, s *Store, name, what string) {
	t.Helper()
	_, err := read(s, "w")
	var c *CorruptError
	if !errors.Is(err, ErrCorrupt) || !errors.As(err, &c) {
		t.Fatalf("%s: %s: got %v", name, what, err)
	}
	// A flipped digest can't be told from a flipped file.
	if !strings.HasPrefix(name, filepath.Dir(c.Path)) || !strings.Contains(err.Error(), name) {
		t.Fatalf("%s: %s: error names another file: %v", name, what, err)
	}
	if errors.Is(err, ErrNoVersion) {
		t.Fatalf("%s: %s: taken for a store without versions: %v", name, what, err)
	}
}

// Each flipped bit position, in each byte of each file.
func TestFlips(t *testing.T) {
	s, dir, want := full(t)
	n := 0
	for _, name := range files(t, dir) {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i := range data {
			flipped := slices.Clone(data)
			flipped[i] ^= 1 << (i % 8)
			rewrite(t, name, flipped)
			corruptOf(t, s, name, fmt.Sprintf("bit %d of byte %d", i%8, i))
			n++
		}
		rewrite(t, name, data)
	}
	if n < 2000 {
		t.Errorf("only %d bytes", n)
	}
	got := mustRead(t, s, "w")
	got.Summaries[0].Updated = want.Summaries[0].Updated
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestTorn(t *testing.T) {
	s, dir, want := full(t)
	for _, name := range files(t, dir) {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for what, torn := range map[string][]byte{
			"empty": nil, "half": data[:len(data)/2], "last byte cut": data[:len(data)-1],
			"byte more": append(slices.Clone(data), '\n'), "zeros": make([]byte, len(data)),
			"too large": make([]byte, profiles.MaxFileSize+1),
		} {
			rewrite(t, name, torn)
			corruptOf(t, s, name, what)
		}
		rewrite(t, name, data)

		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
		corruptOf(t, s, name, "a FIFO")
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		switch {
		case filepath.Base(name) == "active": // which no workload needs to have
			if x := mustRead(t, s, "w"); x.Active != 0 {
				t.Errorf("active %d", x.Active)
			}
		case filepath.Base(filepath.Dir(name)) == "recordings": // the audit log tells
		default:
			corruptOf(t, s, name, "removed")
		}
		rewrite(t, name, data)
	}
	got := mustRead(t, s, "w")
	got.Summaries[0].Updated = want.Summaries[0].Updated
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What isn't as it was is never built upon, and never replaced in silence.
func TestAddToCorrupt(t *testing.T) {
	for _, name := range []string{"workload", "active", "versions/000002/profile.json", "versions/000002/manifest.json"} {
		s, dir, _ := full(t)
		file := filepath.Join(dir, "w", name)
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		data[0] ^= 4
		rewrite(t, file, data)
		if _, err := s.Add(t.Context(), recording("w", "r3", "read"), activate); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: got %v", name, err)
		}
		if got, _ := os.ReadFile(file); string(got) != string(data) {
			t.Errorf("%s was replaced", name)
		}
	}
}

// A recording that is said to be kept is what is kept.
func TestAddToCorruptRecording(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	rec := recording("w", "r1", "read")
	kept := add(t, s, rec, activate).Recording
	data, err := os.ReadFile(kept)
	if err != nil {
		t.Fatal(err)
	}
	rewrite(t, kept, append(data[:len(data)/2:len(data)/2], make([]byte, len(data)-len(data)/2)...))
	if _, err := s.Add(t.Context(), rec, activate); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), kept) {
		t.Errorf("torn: %v", err)
	}
	if err := os.Remove(kept); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(kept, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Add(t.Context(), rec, activate); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a directory: %v", err)
	}
	if err := os.Remove(kept); err != nil {
		t.Fatal(err)
	}
	add(t, s, rec, activate)
	if got, _ := os.ReadFile(kept); string(got) != string(data) {
		t.Error("the recording isn't there again")
	}
}

// The active version's directory is gone: that isn't "no version yet", for which
// callers let a container run without a profile.
func TestMissingVersions(t *testing.T) {
	s, dir, _ := full(t)
	if err := os.Rename(filepath.Join(dir, "w/versions/000002"), filepath.Join(dir, "elsewhere")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Active("w"); !errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNoVersion) {
		t.Errorf("active: %v", err)
	}
	if _, err := s.Workloads(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("workloads: %v", err)
	}
	if err := os.Rename(filepath.Join(dir, "elsewhere"), filepath.Join(dir, "w/versions/000003")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Versions("w"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("gap: %v", err)
	}
	if _, err := s.Version("w", 3); !errors.Is(err, ErrCorrupt) {
		t.Errorf("version 2 in place of 3: %v", err)
	}
	if err := s.SetActive(t.Context(), "w", 1); err != nil {
		t.Errorf("remedy: %v", err)
	}
}

// A corrupt workload hides no other.
func TestWorkloads(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	for _, w := range []string{"b", "a", "c"} {
		add(t, s, recording(w, "r1", "read"), activate)
	}
	rewrite(t, filepath.Join(s.dir, "README.md"), []byte("ours"))
	for _, d := range []string{"lost+found", ".git"} {
		if err := os.Mkdir(filepath.Join(s.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	rewrite(t, filepath.Join(s.dir, "b", "active"), []byte("1"))
	got, err := s.Workloads()
	if !errors.Is(err, ErrCorrupt) || len(got) != 2 || got[0].Workload != "a" || got[1].Workload != "c" {
		t.Errorf("%+v, %v", got, err)
	}
}

// A link is never followed, wherever it stands and points.
func TestLinks(t *testing.T) {
	for _, name := range []string{
		"w", "w/workload", "w/active", "w/recordings", "w/versions", "w/versions/000002",
		"w/versions/000002/profile.json", "w/versions/000002/manifest.json", "w/versions/000002/sha256sums",
	} {
		for _, inside := range []bool{false, true} {
			s, dir, _ := full(t)
			target := filepath.Join(t.TempDir(), "target")
			if inside {
				target = filepath.Join(dir, "target")
			}
			link := filepath.Join(dir, name)
			if err := os.Rename(link, target); err != nil {
				t.Fatal(err)
			}
			to := target
			if inside {
				to, _ = filepath.Rel(filepath.Dir(link), target)
			}
			if err := os.Symlink(to, link); err != nil {
				t.Fatal(err)
			}
			before := tree(t, target)
			if _, err := read(s, "w"); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s -> %s: read: %v", name, to, err)
			}
			if _, err := s.Add(t.Context(), recording("w", "r3", "mkdir"), activate); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s -> %s: add: %v", name, to, err)
			}
			if diff := cmp.Diff(before, tree(t, target)); diff != "" {
				t.Errorf("%s -> %s: target changed:\n%s", name, to, diff)
			}
		}
	}
	s, dir, _ := full(t)
	for _, name := range []string{"..", "../x", "w/../../x", dir, "/etc/passwd"} {
		if f, err := s.root.open(name, unix.O_RDONLY, 0); !errors.Is(err, unix.EXDEV) {
			t.Errorf("open %s: %v", name, err)
			f.Close()
		}
	}
	// A planted leftover is removed, not what it points to.
	outside := t.TempDir()
	rewrite(t, filepath.Join(outside, "file"), nil)
	for _, name := range []string{"w/.tmp-x", "w/versions/.tmp-000003", "w/recordings/.tmp-r3"} {
		if err := os.Symlink(outside, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	add(t, s, recording("w", "r3", "mkdir"), activate)
	noLeftovers(t, dir)
	if got := files(t, outside); len(got) != 1 {
		t.Errorf("outside: %v", got)
	}
}

// tree lists names below dir, with contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, f := range files(t, dir) {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out[f] = string(data)
	}
	return out
}

// Two processes add at once, a third party reads all the while.
func TestConcurrentProcesses(t *testing.T) {
	const n = 25
	dir := t.TempDir()
	s := open(t, dir, Options{})
	done := make(chan error, 2)
	for _, name := range []string{"a", "b"} {
		c := command(t, "many", dir, name, fmt.Sprint(n))
		go func() { done <- c.Run() }()
	}
	last, reads := 0, 0
	for running := 2; running > 0; {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			running--
		default:
			x, err := read(s, "w")
			if err != nil {
				t.Fatalf("read %d: %v", reads, err)
			}
			if x.Active < last {
				t.Fatalf("active went from %d to %d", last, x.Active)
			}
			last = x.Active
			reads++
		}
	}
	t.Logf("%d reads meanwhile", reads)
	x := mustRead(t, s, "w")
	if len(x.Versions) != 2*n || x.Active != 2*n || len(x.Recordings) != 2*n {
		t.Fatalf("%d versions, %d recordings, active %d, want %d", len(x.Versions), len(x.Recordings), x.Active, 2*n)
	}
	head := x.Manifests[2*n-1]
	names := head.Calls.Names()
	for _, rec := range x.Recordings {
		for _, call := range rec.All().Names() {
			if !slices.Contains(names, call) {
				t.Errorf("head lacks %s", call)
			}
		}
		if !slices.Contains(head.Recordings, rec.ID) {
			t.Errorf("head lacks recording %s", rec.ID)
		}
	}
	noLeftovers(t, dir)
}

func TestLocked(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	holder, end := hold(t, dir)
	defer end()
	before := runtime.NumGoroutine()
	wait := 2 * time.Millisecond
	for i := range 50 {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		_, err := s.Add(ctx, recording("w", "r1", "read"), activate)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, ErrLocked) && wait < time.Second {
			wait *= 2 // over before the lock was tried: a slow machine
			continue
		}
		if !errors.Is(err, ErrLocked) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("add %d: %v", i, err)
		}
		if want := fmt.Sprintf("pid %d (", holder.Process.Pid); !strings.Contains(err.Error(), want) {
			t.Fatalf("add %d: want the holder, %s…: %v", i, want, err)
		}
	}
	if got := runtime.NumGoroutine(); got > before+10 { // 2, and what timers run in passing
		t.Errorf("%d goroutines wait after 50 attempts", got-before)
	}
	// Another workload isn't concerned, nor are readers.
	add(t, s, recording("other", "r1", "read"), activate)
	if _, err := s.Workloads(); err != nil {
		t.Error(err)
	}
	end()
	add(t, s, recording("w", "r1", "read"), activate)
	s.waiters.Wait()

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Add(ctx, recording("w", "r2", "write"), activate); !errors.Is(err, context.Canceled) || errors.Is(err, ErrLocked) {
		t.Errorf("a free lock, a done context: %v", err)
	}
}

// A holder that dies holds nothing.
func TestHolderKilled(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	c, end := hold(t, dir)
	waits := make(chan struct{})
	s.step = func(next string) {
		if next == "flock w" {
			close(waits)
		}
	}
	added := make(chan error)
	go func() {
		_, err := s.Add(t.Context(), recording("w", "r1", "read"), activate)
		added <- err
	}()
	<-waits
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-added; err != nil {
		t.Error(err)
	}
	end()
	s.waiters.Wait()
}

// The remedy for a corrupt workload is to move it away; who waits for its lock
// then works on the new one.
func TestMovedAway(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	_, end := hold(t, dir)
	away := filepath.Join(t.TempDir(), "away")
	waits := make(chan struct{}, 2)
	s.step = func(next string) {
		if next == "flock w" {
			waits <- struct{}{}
		}
	}
	added := make(chan error)
	go func() {
		_, err := s.Add(t.Context(), recording("w", "r1", "read"), activate)
		added <- err
	}()
	<-waits // the directory is open
	if err := os.Rename(filepath.Join(dir, "w"), away); err != nil {
		t.Fatal(err)
	}
	end()
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	s.waiters.Wait()
	if x := mustRead(t, s, "w"); x.Active != 1 {
		t.Errorf("%+v", x)
	}
	if got := files(t, away); len(got) > 1 {
		t.Errorf("written to what was moved away: %v", got)
	}
}

// Many goroutines of one process.
func TestConcurrentGoroutines(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	const n = 20
	done := make(chan error)
	for i := range n {
		go func() {
			name := fmt.Sprintf("c%d", i)
			_, err := s.Add(t.Context(), recording("w", name, name), activate)
			done <- err
		}()
	}
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if x := mustRead(t, s, "w"); len(x.Versions) != n || len(x.Manifests[n-1].Calls.Names()) != n {
		t.Errorf("%d versions", len(x.Versions))
	}
}
