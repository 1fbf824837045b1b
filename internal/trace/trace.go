// SPDX-License-Identifier: Apache-2.0

// Package trace serves the annotation io.containers.trace-syscall as
// containers/oci-seccomp-bpf-hook does: "of:FILE", "if:FILE;of:FILE" or
// "of:FILE;if:FILE". FILE of of: becomes a seccomp profile of what the container
// called, FILE of if: is a profile that it is added to.
//
// Whoever starts a container writes the annotation, and root writes the file.
// So both files must lie in directories that the administrator named; no
// symbolic link on the way is followed, not even one that is put there while we
// look; and the file is replaced by rename, so that it is the old one or the new
// one, never half of it.
package trace

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// ErrAnnotation is wrapped by errors that the annotation's value causes.
var ErrAnnotation = errors.New("annotation io.containers.trace-syscall")

// Request is what an annotation asks for: absolute, clean paths.
type Request struct {
	Output string `json:"output"`
	Input  string `json:"input,omitempty"` // empty: none
	// Profile is what Input held when the container was created: what becomes of
	// the file later is of no account. Nil without one.
	Profile *specs.LinuxSeccomp `json:"profile,omitempty"`
}

// maxValue bounds an annotation: two paths of the kernel's PATH_MAX.
const maxValue = 2*4096 + 16

// Parse reads the annotation's value.
func Parse(value string) (Request, error) {
	var r Request
	fail := func(format string, args ...any) (Request, error) {
		return Request{}, fmt.Errorf("%w: %s; want of:FILE, if:FILE;of:FILE or of:FILE;if:FILE with absolute paths", ErrAnnotation, fmt.Sprintf(format, args...))
	}
	if len(value) > maxValue {
		return fail("%d bytes, more than %d", len(value), maxValue)
	}
	if !utf8.ValidString(value) {
		return fail("value %s is not UTF-8", quote(value))
	}
	parts := strings.Split(value, ";")
	if len(parts) > 2 {
		return fail("value %s has %d parts", quote(value), len(parts))
	}
	for _, part := range parts {
		var into *string
		path, ok := strings.CutPrefix(part, "of:")
		if into = &r.Output; !ok {
			if path, ok = strings.CutPrefix(part, "if:"); !ok {
				return fail("part %s begins with neither of: nor if:", quote(part))
			}
			into = &r.Input
		}
		path = strings.TrimSpace(path)
		switch {
		case *into != "":
			return fail("%s is given twice", part[:3])
		case !filepath.IsAbs(path):
			return fail("path %s is not absolute", quote(path))
		case strings.ContainsFunc(path, unicode.IsControl):
			return fail("path %s has a control character", quote(path))
		case filepath.Clean(path) != path:
			return fail("path %s is not the shortest form of itself, %s", quote(path), quote(filepath.Clean(path)))
		}
		*into = path
	}
	if r.Output == "" {
		return fail("of: is missing")
	}
	return r, nil
}

// quote bounds and escapes what a user wrote before it gets into a message.
func quote(s string) string {
	const most = 128
	if len(s) > most {
		return fmt.Sprintf("%q... (%d bytes)", s[:most], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// Prepare checks that both files can be had, and reads the input. directories
// are the ones that the policy names.
func (r *Request) Prepare(directories []string) error {
	dir, err := parent(r.Output, directories)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := checkTarget(dir, filepath.Base(r.Output)); err != nil {
		return fmt.Errorf("of:%s: %w", r.Output, err)
	}
	if r.Input == "" {
		return nil
	}
	data, err := readInput(r.Input, directories)
	if err != nil {
		return err
	}
	if r.Profile, err = profiles.DecodeProfile(data); err != nil {
		return fmt.Errorf("if:%s: %w (want a seccomp profile as podman takes it)", r.Input, err)
	}
	return nil
}

// Write replaces the output by what the calls of rec make of the input. The
// directories are those of Prepare.
//
// The system calls are: openat2 of the directory, of the file's parent below it;
// openat O_EXCL of a temporary file; write; fchmod; fsync; renameat; fsync of the
// parent. A crash before the rename leaves the old file, and perhaps a hidden one
// beside it.
func (r *Request) Write(directories []string, rec *profiles.Recording) (err error) {
	profile, err := Merge(r.Profile, rec)
	if err != nil {
		return fmt.Errorf("of:%s: %w", r.Output, err)
	}
	data, err := profiles.EncodeProfile(profile)
	if err != nil {
		return fmt.Errorf("of:%s: %w", r.Output, err)
	}
	dir, err := parent(r.Output, directories)
	if err != nil {
		return err
	}
	defer dir.Close()
	name := filepath.Base(r.Output)
	defer func() {
		if err != nil {
			err = fmt.Errorf("of:%s: %w", r.Output, err)
		}
	}()
	if err := checkTarget(dir, name); err != nil {
		return err
	}
	var salt [8]byte
	_, _ = rand.Read(salt[:]) // never fails
	temporary := ".syslatch-" + hex.EncodeToString(salt[:])
	fd, err := unix.Openat(int(dir.Fd()), temporary, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), temporary)
	defer func() {
		if err != nil {
			_ = unix.Unlinkat(int(dir.Fd()), temporary, 0) // renamed, or of no use
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(0o644) // as oci-seccomp-bpf-hook; profiles hold no secrets
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := unix.Renameat(int(dir.Fd()), temporary, int(dir.Fd()), name); err != nil {
		return err
	}
	return dir.Sync()
}

// Merge adds what was recorded to a profile, as oci-seccomp-bpf-hook does: a call
// that the profile has a rule for keeps it, be it a denial; all others are
// allowed; the default action denies. Without a profile, the result is a version
// like those of the store.
func Merge(input *specs.LinuxSeccomp, rec *profiles.Recording) (*specs.LinuxSeccomp, error) {
	// The losses stand in the log; whoever asked for a trace wants a file.
	version, _, err := profiles.Merge(nil, rec, profiles.MergeOptions{AllowLosses: true, Incidental: true, Created: rec.Ended})
	if err != nil {
		return nil, err
	}
	if version == nil {
		return nil, errors.New("the container made no system call")
	}
	if input == nil {
		return version.Profile, nil
	}
	out := *input
	out.Syscalls = slices.Clone(input.Syscalls)
	ruled := map[string]bool{}
	for _, rule := range input.Syscalls {
		for _, name := range rule.Names {
			ruled[name] = true
		}
	}
	for _, rule := range version.Profile.Syscalls {
		rule.Names = slices.DeleteFunc(slices.Clone(rule.Names), func(name string) bool { return ruled[name] })
		if len(rule.Names) > 0 {
			out.Syscalls = append(out.Syscalls, rule)
		}
	}
	for _, arch := range version.Profile.Architectures {
		if !slices.Contains(out.Architectures, arch) {
			out.Architectures = append(slices.Clone(out.Architectures), arch)
		}
	}
	if !profiles.Denies(out.DefaultAction) {
		out.DefaultAction, out.DefaultErrnoRet = specs.ActErrno, nil
	}
	return &out, nil
}

const resolve = unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// parent opens the directory that a file is to be in. It must be one of
// directories or below one; they are not made.
func parent(path string, directories []string) (*os.File, error) {
	return open(filepath.Dir(path), path, directories, unix.O_RDONLY|unix.O_DIRECTORY)
}

// open opens target, which is path or its parent, below the directory that has it.
func open(target, path string, directories []string, flags uint64) (*os.File, error) {
	root := ""
	for _, d := range directories {
		if path != d && strings.HasPrefix(path, d+"/") && len(d) > len(root) {
			root = d
		}
	}
	if root == "" {
		return nil, fmt.Errorf("%w: %s is in none of the directories that the policy's hook.traceDirectories has (%s)",
			ErrAnnotation, quote(path), strings.Join(directories, ", "))
	}
	at, err := unix.Openat2(unix.AT_FDCWD, root, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolve})
	if err != nil {
		return nil, explain(root, err)
	}
	defer unix.Close(at)
	below, err := filepath.Rel(root, target)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat2(at, below, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve | unix.RESOLVE_BENEATH})
	if err != nil {
		return nil, explain(target, err)
	}
	return os.NewFile(uintptr(fd), target), nil
}

func explain(path string, err error) error {
	err = &fs.PathError{Op: "open", Path: path, Err: err}
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
		return fmt.Errorf("%w: %w: symbolic links are not followed (name the directory that they lead to)", ErrAnnotation, err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w (make it first)", ErrAnnotation, err)
	}
	return fmt.Errorf("%w: %w", ErrAnnotation, err)
}

// checkTarget refuses to replace anything but a file.
func checkTarget(dir *os.File, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return fmt.Errorf("%w: %w", ErrAnnotation, err)
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%w: it is there and no regular file (remove it first)", ErrAnnotation)
	}
	return nil
}

func readInput(path string, directories []string) ([]byte, error) {
	// O_NONBLOCK: a fifo would wait for a writer.
	f, err := open(path, path, directories, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, fmt.Errorf("if:%s: %w", path, err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, fmt.Errorf("if:%s: %w: no regular file", path, ErrAnnotation)
	}
	data, err := io.ReadAll(io.LimitReader(f, profiles.MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("if:%s: %w", path, err)
	}
	return data, nil // DecodeProfile refuses what is too long
}
