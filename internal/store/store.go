// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

var (
	// ErrNoVersion means that a workload, or the store, has no such version.
	ErrNoVersion = errors.New("no such profile version")
	// ErrLocked means that somebody else held a workload's lock until the context
	// ended, whose error is wrapped, too.
	ErrLocked = errors.New("locked")
	// ErrCorrupt is what every [CorruptError] wraps.
	ErrCorrupt = errors.New("corrupt")
)

// CorruptError means that a file of the store isn't what was written.
type CorruptError struct {
	Path string
	Err  error
}

func (e *CorruptError) Error() string {
	remedy := "restore it from a backup, or move the workload's directory out of the store to record it anew"
	if filepath.Base(e.Path) == "active" {
		remedy = "remove it and activate a version again"
	}
	return fmt.Sprintf("%v: %s: %v (%s)", ErrCorrupt, e.Path, e.Err, remedy)
}

// Unwrap gives ErrCorrupt and the cause.
func (e *CorruptError) Unwrap() []error { return []error{ErrCorrupt, e.Err} }

func corrupt(path string, err error) error { return &CorruptError{path, err} }

// Options of Open.
type Options struct {
	// ReadOnly makes nothing: a store that isn't there is an error, and so is
	// every change.
	ReadOnly bool
	// Public lets everybody read the versions: modes 0755 and 0444 in place of
	// 0750 and 0440. Recordings hold command lines and stay private. The umask
	// counts in both cases.
	Public bool
}

// Store is a directory of workloads. Its methods may be called concurrently, by
// several processes.
type Store struct {
	dir      string // absolute
	root     *dir
	readOnly bool
	public   bool

	mu      sync.Mutex
	turns   map[string]chan struct{} // by encoded name; guarded by mu
	waiters sync.WaitGroup           // goroutines that wait for a lock

	// step is called before each system call that changes something, with its
	// name and operands. Tests crash there. Nil otherwise.
	step func(next string)
}

// Open opens the store in dir, and makes the directory unless ReadOnly.
func Open(name string, o Options) (*Store, error) {
	abs, err := filepath.Abs(name)
	if err != nil {
		return nil, fmt.Errorf("profile store: %w", err)
	}
	s := &Store{dir: abs, readOnly: o.ReadOnly, public: o.Public, turns: map[string]chan struct{}{}}
	if !o.ReadOnly {
		if err := makeDir(abs, os.FileMode(s.mode(0o750))); err != nil {
			return nil, fmt.Errorf("profile store: %w", err)
		}
	}
	f, err := os.OpenFile(abs, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("profile store: %w", err)
	}
	s.root = &dir{s, f, "."}
	return s, nil
}

// Close closes the directory. It must not be called while another method runs.
func (s *Store) Close() error { return s.root.Close() }

// mode gives others what the group may do, if the store is public, except to
// write.
func (s *Store) mode(m uint32) uint32 {
	if s.public {
		m |= m >> 3 & 0o5
	}
	return m
}

// label is a workload's name for messages: quoted, since others chose it.
func label(workload string) string { return fmt.Sprintf("%.100q", workload) }

// AddOptions of Add.
type AddOptions struct {
	Merge profiles.MergeOptions
	// Activate makes the newest version the active one, new or not: an older one
	// that was activated by hand stays active until the next Add only.
	Activate bool
}

// Result tells what Add did.
type Result struct {
	Version      *profiles.Version // the new one; nil if nothing was new
	Delta        profiles.Delta
	Head         int    // number of the newest version; 0 for none
	Observations int    // instances of the workload that were recorded
	Recording    string // path of the recording
}

// Add keeps a recording and, if it brings something new, publishes the
// workload's next version. Adding a recording again does no harm, and goes on
// where a crash or an error stopped it. A recording that is refused for its losses
// (*profiles.LossyError) is kept all the same. ctx bounds the wait for the
// workload's lock ([ErrLocked]). Result is filled as far as it got also with an
// error.
func (s *Store) Add(ctx context.Context, rec *profiles.Recording, o AddOptions) (Result, error) {
	var result Result
	if err := errors.Join(checkName(rec.Workload), checkID(rec.ID)); err != nil {
		return result, err
	}
	data, err := profiles.EncodeRecording(rec)
	if err != nil {
		return result, err
	}
	if err := checkSize(data); err != nil {
		return result, fmt.Errorf("recording %s: %w", rec.ID, err)
	}
	err = s.change(ctx, rec.Workload, func(w *dir) (err error) {
		if result.Recording, err = s.keep(w, rec.ID, data); err != nil {
			return err
		}
		if _, result.Observations, err = w.recordings(); err != nil {
			return err
		}
		if result.Head, err = w.head(); err != nil {
			return err
		}
		var parent *profiles.Version
		var digest string
		if result.Head > 0 {
			if parent, digest, err = w.version(rec.Workload, result.Head); err != nil {
				return err
			}
		}
		next, delta, err := profiles.Merge(parent, rec, o.Merge)
		if err != nil {
			return err
		}
		switch {
		case next != nil:
			if digest, err = s.publish(w, next); err != nil {
				return err
			}
			result.Version, result.Delta, result.Head = next, delta, next.Manifest.Version
		case result.Head > 0:
			// Nothing new in view of a version that perhaps nobody synced yet.
			if err := w.syncSub("versions"); err != nil {
				return err
			}
		}
		if !o.Activate || result.Head == 0 {
			return nil
		}
		want := active{result.Head, digest}
		// What is replaced is read whole before: corruption must not go unseen.
		switch _, got, err := w.activeVersion(rec.Workload); {
		case err != nil && !errors.Is(err, ErrNoVersion):
			return err
		case got == want:
			return nil
		}
		return s.activate(w, want)
	})
	return result, err
}

// SetActive makes a version the one that is injected. ctx bounds the wait for the
// workload's lock.
func (s *Store) SetActive(ctx context.Context, workload string, n int) error {
	if _, err := s.Version(workload, n); err != nil {
		return err // before change, which would make the workload
	}
	return s.change(ctx, workload, func(w *dir) error {
		_, digest, err := w.version(workload, n)
		if err != nil {
			return err
		}
		if err := w.syncSub("versions"); err != nil {
			return err
		}
		return s.activate(w, active{n, digest})
	})
}

// Active is the version that is injected. It wraps ErrNoVersion if there is none.
func (s *Store) Active(workload string) (*profiles.Version, error) {
	w, err := s.workload(workload)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	v, _, err := w.activeVersion(workload)
	return v, err
}

// Version reads one version. It wraps ErrNoVersion if it isn't there.
func (s *Store) Version(workload string, n int) (*profiles.Version, error) {
	w, err := s.workload(workload)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	v, _, err := w.version(workload, n)
	return v, err
}

// Versions lists a workload's manifests, oldest first, each checked to be the
// child of the one before. A workload that the store doesn't know wraps
// ErrNoVersion.
func (s *Store) Versions(workload string) ([]profiles.Manifest, error) {
	w, err := s.workload(workload)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	head, err := w.head()
	if err != nil {
		return nil, err
	}
	var out []profiles.Manifest
	parent := ""
	for n := 1; n <= head; n++ {
		v, _, err := w.version(workload, n)
		if err != nil {
			return nil, err
		}
		if v.Manifest.Parent != parent {
			return nil, corrupt(w.path(filepath.Join("versions", versionName(n), "manifest.json")),
				fmt.Errorf("names the parent %q, but version %d has %q", v.Manifest.Parent, n-1, parent))
		}
		parent = v.Manifest.Digest
		out = append(out, v.Manifest)
	}
	return out, nil
}

// Path is where a version's profile is, or would be.
func (s *Store) Path(workload string, n int) (string, error) {
	return filepath.Join(s.dir, encodeName(workload), "versions", versionName(n), "profile.json"), nil
}

// Recordings reads a workload's recordings, oldest first; of an instance that was
// harvested twice, the one that ended last. An unknown workload has none.
func (s *Store) Recordings(workload string) ([]*profiles.Recording, error) {
	w, err := s.workload(workload)
	if errors.Is(err, ErrNoVersion) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer w.Close()
	names, _, err := w.recordings()
	if err != nil || len(names) == 0 {
		return nil, err
	}
	d, err := w.sub("recordings")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var out []*profiles.Recording
	for _, name := range names {
		rec, err := d.recording(workload, name)
		if err != nil {
			return nil, err
		}
		if last := len(out) - 1; last >= 0 && out[last].ID == rec.ID {
			if rec.Ended.After(out[last].Ended) {
				out[last] = rec
			}
			continue
		}
		out = append(out, rec)
	}
	return out, nil
}

// Summary is a workload at a glance.
type Summary struct {
	Workload     string    `json:"workload"`
	Versions     int       `json:"versions"`
	Active       int       `json:"active"`       // 0: none
	Observations int       `json:"observations"` // instances that were recorded
	Updated      time.Time `json:"updated"`      // when the newest recording or version was written
}

// Workloads lists all, sorted by name. Those that can be read are returned also
// with an error, which joins what is wrong with the others. It checks names, not
// contents.
func (s *Store) Workloads() ([]Summary, error) {
	names, err := s.root.entries()
	if err != nil {
		return nil, err
	}
	out := []Summary{}
	var errs []error
	for _, name := range names {
		if st, err := s.root.stat(name); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
			continue // a README, say: nothing of ours is a file here
		}
		sum, err := s.summary(name)
		switch {
		case err == nil:
			out = append(out, sum)
		case !errors.Is(err, errNoWorkload):
			errs = append(errs, err)
		}
	}
	slices.SortFunc(out, func(a, b Summary) int { return strings.Compare(a.Workload, b.Workload) })
	return out, errors.Join(errs...)
}

// errNoWorkload is for a directory that isn't ours, or whose first Add has only
// begun.
var errNoWorkload = errors.New("not a workload's directory")

func (s *Store) summary(name string) (Summary, error) {
	var sum Summary
	w, err := s.root.sub(name)
	if err != nil {
		return sum, err
	}
	defer w.Close()
	workload, err := w.read("workload")
	if errors.Is(err, fs.ErrNotExist) {
		// It is the first file that is written, perhaps since we looked.
		if head, headErr := w.head(); headErr != nil || head == 0 {
			return sum, errNoWorkload
		}
		if workload, err = w.read("workload"); errors.Is(err, fs.ErrNotExist) {
			err = corrupt(w.path("workload"), err)
		}
	}
	if err != nil {
		return sum, err
	}
	if encodeName(string(workload)) != name {
		return sum, corrupt(w.path("workload"), fmt.Errorf("is the name of %s, whose directory this is not", label(string(workload))))
	}
	sum.Workload = string(workload)
	// In this order: somebody may publish a version and activate it meanwhile.
	a, err := w.active()
	if err != nil && !errors.Is(err, ErrNoVersion) {
		return sum, err
	}
	if sum.Versions, err = w.head(); err != nil {
		return sum, err
	}
	recordings, ids, err := w.recordings()
	if err != nil {
		return sum, err
	}
	sum.Observations = ids
	if a.version > sum.Versions {
		return sum, corrupt(w.path("active"), fmt.Errorf("version %d is not there", a.version))
	}
	sum.Active = a.version
	var newest []string
	if n := len(recordings); n > 0 {
		newest = append(newest, filepath.Join("recordings", recordings[n-1]))
	}
	if sum.Versions > 0 {
		newest = append(newest, filepath.Join("versions", versionName(sum.Versions)))
	}
	for _, n := range newest {
		st, err := w.stat(n)
		if err != nil {
			return sum, err
		}
		if t := time.Unix(st.Mtim.Unix()).UTC(); t.After(sum.Updated) {
			sum.Updated = t
		}
	}
	return sum, nil
}

// workload opens a workload's directory for reading.
func (s *Store) workload(name string) (*dir, error) {
	w, err := s.root.sub(encodeName(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("workload %s: %w ('syslatch profile list' shows what there is)", label(name), ErrNoVersion)
	}
	return w, err
}

func versionName(n int) string { return fmt.Sprintf("%06d", n) }

// syncSub syncs a directory below d.
func (d *dir) syncSub(name string) error {
	sub, err := d.sub(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	return sub.sync()
}

// list lists a directory below d. One that isn't there has nothing: the
// workload's first Add has only begun.
func (d *dir) list(name string) ([]string, error) {
	sub, err := d.sub(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer sub.Close()
	return sub.entries()
}

// head is the number of the newest version of workload directory d, 0 for none. A
// gap is corruption: versions are never removed.
func (d *dir) head() (int, error) {
	names, err := d.list("versions")
	if err != nil {
		return 0, err
	}
	listed := map[int]bool{}
	head := 0
	for _, name := range names {
		n, err := strconv.Atoi(name)
		if err != nil || n < 1 || versionName(n) != name {
			return 0, corrupt(d.path(filepath.Join("versions", name)), errors.New("is not a version's name"))
		}
		listed[n] = true
		head = max(head, n)
	}
	for n := 1; n <= head; n++ {
		if listed[n] {
			continue
		}
		// A directory that is read while two versions are published may show the
		// second only. The first one is there all the same.
		name := filepath.Join("versions", versionName(n))
		if _, err := d.stat(name); err != nil {
			return 0, corrupt(d.path(name), err)
		}
	}
	return head, nil
}

// version reads a version of workload directory d, checks it against itself, and
// returns its manifest's digest with it.
func (d *dir) version(workload string, n int) (*profiles.Version, string, error) {
	v, err := d.sub(filepath.Join("versions", versionName(n)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("workload %s, version %d: %w", label(workload), n, ErrNoVersion)
	}
	if err != nil {
		return nil, "", err
	}
	defer v.Close()
	files := map[string][]byte{"profile.json": nil, "manifest.json": nil, "sha256sums": nil}
	for name := range files {
		if files[name], err = v.read(name); errors.Is(err, fs.ErrNotExist) {
			return nil, "", corrupt(v.path(name), fs.ErrNotExist)
		} else if err != nil {
			return nil, "", err
		}
	}
	data, want := files["manifest.json"], sums(files["profile.json"], files["manifest.json"])
	if string(want) != string(files["sha256sums"]) {
		return nil, "", v.mismatch(want, files["sha256sums"])
	}
	m, err := profiles.DecodeManifest(data)
	if err != nil {
		return nil, "", corrupt(v.path("manifest.json"), err)
	}
	if m.Version != n || m.Workload != workload {
		return nil, "", corrupt(v.path("manifest.json"), fmt.Errorf("is of version %d of %s", m.Version, label(m.Workload)))
	}
	if got := profiles.Digest(files["profile.json"]); got != m.Digest {
		return nil, "", corrupt(v.path("profile.json"), fmt.Errorf("has digest %s, its manifest says %s", got, m.Digest))
	}
	p, err := profiles.DecodeProfile(files["profile.json"])
	if err != nil {
		return nil, "", corrupt(v.path("profile.json"), err)
	}
	return &profiles.Version{Manifest: *m, Profile: p}, profiles.Digest(data), nil
}

// mismatch names the file that doesn't fit its line in sha256sums, or that one if
// it isn't only a digest that differs.
func (d *dir) mismatch(got, recorded []byte) error {
	g, r := strings.Split(string(got), "\n"), strings.Split(string(recorded), "\n")
	if len(g) == len(r) {
		for i := range g {
			name := g[i][strings.LastIndexByte(g[i], ' ')+1:]
			if g[i] != r[i] && len(g[i]) == len(r[i]) && strings.HasSuffix(r[i], "  "+name) {
				return corrupt(d.path(name), fmt.Errorf("does not fit its digest in %s", d.path("sha256sums")))
			}
		}
	}
	return corrupt(d.path("sha256sums"), errors.New("is not what was written"))
}

// activeVersion reads the active version of workload directory d. It wraps
// ErrNoVersion if none is active.
func (d *dir) activeVersion(workload string) (*profiles.Version, active, error) {
	a, err := d.active()
	if err != nil {
		return nil, a, fmt.Errorf("workload %s: active version: %w", label(workload), err)
	}
	v, digest, err := d.version(workload, a.version)
	switch {
	case errors.Is(err, ErrNoVersion):
		// Not wrapped: to callers ErrNoVersion means that nothing is amiss.
		return nil, active{}, corrupt(d.path("active"), fmt.Errorf("version %d is not there", a.version))
	case err != nil:
		return nil, active{}, err
	case digest != a.digest:
		return nil, active{}, corrupt(d.path("active"), fmt.Errorf("is not of this version %d: its manifest's digest is %s, not %s", a.version, digest, a.digest))
	}
	return v, a, nil
}

// recordings lists the names of the recordings of workload directory d, sorted
// and so oldest first, and counts the instances that they are of.
func (d *dir) recordings() (names []string, ids int, err error) {
	names, err = d.list("recordings")
	last := ""
	for _, name := range names {
		id, _, err := splitRecordingName(name)
		if err != nil {
			return nil, 0, corrupt(d.path(filepath.Join("recordings", name)), err)
		}
		if id != last {
			ids++
		}
		last = id
	}
	return names, ids, err
}

// recording reads one of the recordings in directory d.
func (d *dir) recording(workload, name string) (*profiles.Recording, error) {
	id, want, err := splitRecordingName(name)
	if err != nil {
		return nil, corrupt(d.path(name), err)
	}
	data, err := d.read(name)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != want {
		return nil, corrupt(d.path(name), fmt.Errorf("has digest sha256:%x, its name says otherwise", sum))
	}
	rec, err := profiles.DecodeRecording(data)
	if err != nil {
		return nil, corrupt(d.path(name), err)
	}
	if rec.ID != id || rec.Workload != workload {
		return nil, corrupt(d.path(name), fmt.Errorf("is recording %s of %s", rec.ID, label(rec.Workload)))
	}
	return rec, nil
}

// active is the content of the file of that name. The digest is the manifest's,
// which no two versions share, so that not one flipped bit can select another.
type active struct {
	version int
	digest  string
}

func (a active) encode() []byte { return fmt.Appendf(nil, "%d %s\n", a.version, a.digest) }

// active reads which version of workload directory d is active. It wraps
// ErrNoVersion if none is.
func (d *dir) active() (active, error) {
	data, err := d.read("active")
	if errors.Is(err, fs.ErrNotExist) {
		return active{}, ErrNoVersion
	}
	if err != nil {
		return active{}, err
	}
	var a active
	_, err = fmt.Sscanf(string(data), "%d %s\n", &a.version, &a.digest)
	if err != nil || a.version < 1 || string(a.encode()) != string(data) {
		return active{}, corrupt(d.path("active"), fmt.Errorf("%.100q is not a version's number and digest", data))
	}
	return a, nil
}
