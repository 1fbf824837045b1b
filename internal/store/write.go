// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// change runs f under the workload's lock, after making what is missing and
// removing what crashed writers left.
func (s *Store) change(ctx context.Context, workload string, f func(w *dir) error) (err error) {
	if s.readOnly {
		return fmt.Errorf("profile store %s is open for reading only", s.dir)
	}
	defer func() { err = s.explain(err) }()
	w, unlock, err := s.lock(ctx, workload)
	if err != nil {
		return err
	}
	defer unlock()
	dirs := []*dir{w}
	for _, d := range []struct {
		name string
		mode uint32
	}{
		{"versions", s.mode(0o750)},
		{"recordings", 0o750}, // they hold command lines: never public
	} {
		if err := w.mkdir(d.name, d.mode); err != nil {
			return err
		}
		sub, err := w.sub(d.name)
		if err != nil {
			return err
		}
		defer sub.Close()
		dirs = append(dirs, sub)
	}
	for _, d := range dirs {
		if err := d.removeLeftovers(); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				// As much as goes: on a full disk it is what makes room. What
				// stays, the next writer removes.
				_ = d.removeLeftovers()
			}
		}()
	}
	if err := s.mark(w, workload); err != nil {
		return err
	}
	return f(w)
}

// mark writes down the workload's name, or checks the one that is there, and
// leaves everything that W itself holds durable. That the mark is there means
// that W is durable in the store's directory, which is synced first.
func (s *Store) mark(w *dir, workload string) error {
	got, err := w.read("workload")
	switch {
	case err == nil && string(got) == workload:
		return w.sync()
	case err == nil:
		return corrupt(w.path("workload"), fmt.Errorf("is the name of %s, not of %s", label(string(got)), label(workload)))
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := w.create(leftover+"workload", []byte(workload), s.mode(0o440)); err != nil {
		return err
	}
	if err := s.root.sync(); err != nil {
		return err
	}
	return w.rename(leftover+"workload", "workload", unix.RENAME_NOREPLACE)
}

// keep writes a recording unless the very same one is there, and returns its
// path. Another one of the same id is no error: an instance whose harvest was
// interrupted is harvested again, and both are evidence.
func (s *Store) keep(w *dir, id string, data []byte) (string, error) {
	d, err := w.sub("recordings")
	if err != nil {
		return "", err
	}
	defer d.Close()
	name := recordingName(id, sha256.Sum256(data))
	switch got, err := d.read(name); {
	case err == nil && !bytes.Equal(got, data):
		return "", corrupt(d.path(name), errors.New("is not the recording that its name says"))
	case err == nil:
		return d.path(name), d.sync()
	case !errors.Is(err, fs.ErrNotExist):
		return "", err
	}
	if err := d.create(leftover+id, data, 0o440); err != nil {
		return "", err
	}
	return d.path(name), d.rename(leftover+id, name, unix.RENAME_NOREPLACE)
}

// publish puts a version in place, whole, and returns its manifest's digest.
func (s *Store) publish(w *dir, v *profiles.Version) (string, error) {
	profile, err := profiles.EncodeProfile(v.Profile)
	if err != nil {
		return "", err
	}
	manifest, err := profiles.EncodeManifest(&v.Manifest)
	if err != nil {
		return "", err
	}
	for _, data := range [][]byte{profile, manifest} {
		if err := checkSize(data); err != nil {
			return "", err
		}
	}
	if got := profiles.Digest(profile); got != v.Manifest.Digest {
		return "", fmt.Errorf("version %d: digest %s, but its profile's is %s", v.Manifest.Version, v.Manifest.Digest, got)
	}
	versions, err := w.sub("versions")
	if err != nil {
		return "", err
	}
	defer versions.Close()
	name := versionName(v.Manifest.Version)
	if err := versions.mkdir(leftover+name, s.mode(0o750)); err != nil {
		return "", err
	}
	d, err := versions.sub(leftover + name)
	if err != nil {
		return "", err
	}
	defer d.Close()
	if err := d.create("profile.json", profile, s.mode(0o440)); err != nil {
		return "", err
	}
	if err := d.create("manifest.json", manifest, s.mode(0o440)); err != nil {
		return "", err
	}
	if err := d.create("sha256sums", sums(profile, manifest), s.mode(0o440)); err != nil {
		return "", err
	}
	if err := d.sync(); err != nil {
		return "", err
	}
	return profiles.Digest(manifest), versions.rename(leftover+name, name, unix.RENAME_NOREPLACE)
}

// sums is what `sha256sum profile.json manifest.json` prints.
func sums(profile, manifest []byte) []byte {
	return fmt.Appendf(nil, "%x  profile.json\n%x  manifest.json\n", sha256.Sum256(profile), sha256.Sum256(manifest))
}

// activate replaces active.
func (s *Store) activate(w *dir, a active) error {
	if err := w.create(leftover+"active", a.encode(), s.mode(0o640)); err != nil {
		return err
	}
	return w.rename(leftover+"active", "active", 0)
}

func checkSize(data []byte) error {
	if len(data) > profiles.MaxFileSize {
		return fmt.Errorf("%d bytes are more than a file of the profile store may have (%d)", len(data), profiles.MaxFileSize)
	}
	return nil
}

// explain adds the store and the remedy to errors that have one.
func (s *Store) explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("profile store %s: %w (free space or inodes there and try again; nothing that was published is lost)", s.dir, err)
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("profile store %s: %w (it must be writable here)", s.dir, err)
	}
	return err
}
