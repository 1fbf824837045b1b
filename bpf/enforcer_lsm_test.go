// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
)

// readOnly opens nothing for writing, and lets nothing be written that is open.
func readOnly() bpf.PhaseRules {
	r := bpf.AnyPhase()
	r.OpenWrite, r.WriteFiles = false, false
	return r
}

// files makes a directory with some files, by paths that end in '/' if they are
// directories.
func files(t testing.TB, paths ...string) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		at := filepath.Join(dir, p)
		if strings.HasSuffix(p, "/") {
			err = os.MkdirAll(at, 0o700)
		} else if err = os.MkdirAll(filepath.Dir(at), 0o700); err == nil {
			err = os.WriteFile(at, []byte("content"), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const (
	rdonly, wronly, rdwr = unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR
	eperm                = unix.EPERM
)

// Opens by mode, by whichever call.
func TestPhaseOpenModes(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir := newCgroup(t), files(t, "f")
	f := filepath.Join(dir, "f")
	if err := os.Symlink("f", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	h := add(t, e, cg, bpf.PhaseSet{0: bpf.AnyPhase(), 1: readOnly(), 2: {OpenWrite: true, WriteFiles: true}}, bpf.EnforceOptions{})
	k, other := startTask(t, cg), startTask(t, newCgroup(t))
	mount := k.want(0, op{Do: "open", Path: dir, Flags: rdonly | unix.O_DIRECTORY})
	path := k.want(0, op{Do: "open", Path: f, Flags: unix.O_PATH})
	again := fmt.Sprintf("/proc/self/fd/%d", path)
	verdict := func(writes unix.Errno) {
		t.Helper()
		for _, o := range []op{
			{Do: "open", Path: f, Flags: wronly},
			{Do: "open", Path: f, Flags: rdwr},
			{Do: "open", Path: f, Flags: 3},
			{Do: "open", Path: f, Flags: wronly | unix.O_APPEND},
			{Do: "open", Path: f, Flags: rdonly | unix.O_TRUNC},
			{Do: "open", Path: f, Flags: rdonly | unix.O_CREAT},
			{Do: "open", Path: f + ".new", Flags: rdonly | unix.O_CREAT},
			{Do: "open", Path: f + ".new2", Flags: wronly | unix.O_CREAT | unix.O_EXCL},
			{Do: "open", Path: dir, Flags: rdwr | unix.O_TMPFILE},
			{Do: "open", Path: filepath.Join(dir, "link"), Flags: wronly},
			{Do: "open", Path: "/proc/self/comm", Flags: wronly},
			{Do: "open", Path: "/dev/null", Flags: wronly},
			{Do: "open", Path: again, Flags: wronly},
			{Do: "openat2", Path: f, Flags: wronly},
			{Do: "openat2", Path: f + ".new3", Flags: rdonly | unix.O_CREAT},
			{Do: "handle", Path: f, FD: mount, Flags: wronly},
			{Do: "uring open", Path: f, Flags: wronly},
			{Do: "uring open", Path: f, Flags: wronly, Async: true},
			{Do: "uring open", Path: f + ".new4", Flags: rdonly | unix.O_CREAT, Async: true},
		} {
			k.opens(writes, o)
		}
		for _, o := range []op{
			{Do: "open", Path: f, Flags: unix.O_PATH},
			{Do: "open", Path: f, Flags: rdonly},
			{Do: "open", Path: dir, Flags: rdonly | unix.O_DIRECTORY},
			{Do: "open", Path: again, Flags: rdonly | unix.O_NONBLOCK},
			{Do: "openat2", Path: f, Flags: rdonly},
			{Do: "handle", Path: f, FD: mount, Flags: rdonly},
			{Do: "uring open", Path: f, Flags: rdonly},
			{Do: "uring open", Path: f, Flags: rdonly, Async: true},
		} {
			k.opens(0, o)
		}
		// Neither is an open of a file, nor is what the kernel opens to execute.
		k.opens(0, op{Do: "pidfd"})
		k.opens(0, op{Do: "mq_open", Path: "syslatch-test", Flags: rdwr | unix.O_CREAT})
		k.want(0, op{Do: "mq_unlink", Path: "syslatch-test"})
		k.want(0, op{Do: "exec", Path: "/bin/true"})
		other.opens(0, op{Do: "open", Path: f, Flags: wronly})
	}
	set(t, e, h, 1)
	verdict(eperm)
	if made, err := filepath.Glob(f + ".new*"); err != nil || len(made) > 0 {
		t.Errorf("what may not be opened was made: %v, %v", made, err)
	}
	if content, err := os.ReadFile(f); err != nil || string(content) != "content" {
		t.Errorf("the file has %q, %v", content, err)
	}
	set(t, e, h, 0)
	verdict(0)
	set(t, e, h, 2)
	k.opens(0, op{Do: "open", Path: f, Flags: wronly})
	k.opens(eperm, op{Do: "open", Path: f, Flags: rdonly})
	set(t, e, h, 1)
	k.opens(eperm, op{Do: "open", Path: f, Flags: wronly})
	if err := e.Remove(h); err != nil {
		t.Fatal(err)
	}
	k.opens(0, op{Do: "open", Path: f, Flags: wronly})
	k.ends()
	other.ends()
	noErrors(t, e)
}

// What was opened before is written no more, and is again when the phase is back.
func TestPhaseOpenFiles(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir := newCgroup(t), files(t, "f", "source")
	f := filepath.Join(dir, "f")
	noRead := bpf.AnyPhase()
	noRead.ReadFiles = false
	h := add(t, e, cg, bpf.PhaseSet{0: bpf.AnyPhase(), 1: readOnly(), 2: noRead}, bpf.EnforceOptions{})
	k := startTask(t, cg)
	fd := k.want(0, op{Do: "open", Path: f, Flags: rdwr})
	source := k.want(0, op{Do: "open", Path: filepath.Join(dir, "source"), Flags: rdonly})
	memory := k.want(0, op{Do: "memfd"})
	k.want(0, op{Do: "write", FD: memory})
	pipe := k.want(0, op{Do: "pipe"})
	r, w := pipe>>16, pipe&0xffff
	k.want(0, op{Do: "write", FD: w})
	k.want(0, op{Do: "write", FD: w})
	verdict := func(writes unix.Errno) {
		t.Helper()
		for _, o := range []op{
			{Do: "write", FD: fd},
			{Do: "ftruncate", FD: fd},
			{Do: "truncate", Path: f},
			{Do: "fallocate", FD: fd},
			{Do: "sendfile", FD: fd, Other: source},
			{Do: "splice", FD: r, Other: fd},
			{Do: "uring write", FD: fd},
			{Do: "uring write", FD: fd, Async: true},
		} {
			k.want(writes, o)
		}
		k.want(0, op{Do: "read", FD: source})
		k.want(0, op{Do: "mmap private", FD: fd, Flags: unix.PROT_READ | unix.PROT_WRITE})
		k.want(0, op{Do: "write", FD: w})
		k.want(0, op{Do: "write", FD: memory})
		k.want(0, op{Do: "ftruncate", FD: memory})
		k.want(0, op{Do: "mmap", FD: memory, Flags: unix.PROT_READ | unix.PROT_WRITE})
		k.want(0, op{Do: "munmap"})
		if _, errno := k.try(op{Do: "mmap", FD: fd, Flags: unix.PROT_READ | unix.PROT_WRITE}); errno != writes {
			t.Errorf("mapping it shared and writable: %s", text(errno))
		} else if errno == 0 {
			k.want(0, op{Do: "munmap"})
		}
		k.want(0, op{Do: "mmap", FD: fd, Flags: unix.PROT_READ})
		k.want(writes, op{Do: "mprotect", Flags: unix.PROT_READ | unix.PROT_WRITE})
		k.want(0, op{Do: "munmap"})
	}
	set(t, e, h, 1)
	verdict(eperm)
	set(t, e, h, 0)
	verdict(0)
	// What is mapped stays so: docs/phases.md says it.
	k.want(0, op{Do: "write", FD: fd})
	k.want(0, op{Do: "mmap", FD: fd, Flags: unix.PROT_READ | unix.PROT_WRITE})
	set(t, e, h, 1)
	k.want(0, op{Do: "store"})
	k.want(0, op{Do: "munmap"})
	set(t, e, h, 2)
	k.want(eperm, op{Do: "read", FD: source})
	k.want(eperm, op{Do: "sendfile", FD: w, Other: source})
	k.want(eperm, op{Do: "mmap private", FD: source, Flags: unix.PROT_READ})
	k.want(0, op{Do: "write", FD: fd})
	k.want(0, op{Do: "exec", Path: "/bin/busybox"}) // static: nothing but the kernel reads it
	set(t, e, h, 1)
	denials, err := e.Denials(h)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Remove(h); err != nil {
		t.Fatal(err)
	}
	verdict(0)
	k.ends()
	noErrors(t, e)
	truncates := "lsm/file_truncate"
	if kernelBefore(t, 6, 2) {
		truncates = ""
	}
	for _, name := range []string{"lsm/file_permission", "lsm/mmap_file", "lsm/file_mprotect", "lsm/path_truncate", truncates} {
		found := name == ""
		for _, d := range denials {
			found = found || d.Program == name
		}
		if !found {
			t.Errorf("%s denied nothing: %+v", name, denials)
		}
	}
}

func TestPhaseTrees(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg := newCgroup(t)
	long := strings.Repeat("l/", 300)
	dir := files(t, "log/a", "log/sub/b", "log2/x", "other/x", "log/bound/", "jail/log/x", "jail/root/", "one", "log/"+long)
	in := func(p string) string { return filepath.Join(dir, p) }
	for link, to := range map[string]string{"log/out": "../other/x", "other/in": "../log/a"} {
		if err := os.Symlink(to, in(link)); err != nil {
			t.Fatal(err)
		}
	}
	writes, reads, both, none, root := bpf.AnyPhase(), bpf.AnyPhase(), bpf.AnyPhase(), bpf.AnyPhase(), bpf.AnyPhase()
	writes.WriteTrees = []string{in("log"), in("one")}
	reads.ReadTrees = []string{in("log"), "/proc"}
	both.ReadTrees, both.WriteTrees = []string{in("log"), in("other"), "/proc"}, []string{in("log")}
	none.WriteTrees = []string{}
	root.ReadTrees, root.WriteTrees = []string{"/"}, []string{"/"}
	h := add(t, e, cg, bpf.PhaseSet{0: bpf.AnyPhase(), 1: writes, 2: reads, 3: both, 4: none, 5: root}, bpf.EnforceOptions{})
	k := startTask(t, cg)
	mount := k.want(0, op{Do: "open", Path: dir, Flags: rdonly | unix.O_DIRECTORY})
	log := k.want(0, op{Do: "open", Path: in("log"), Flags: unix.O_PATH})
	other := k.want(0, op{Do: "open", Path: in("other"), Flags: rdonly | unix.O_DIRECTORY})
	outside := k.want(0, op{Do: "open", Path: in("other/x"), Flags: unix.O_PATH})
	memory := k.want(0, op{Do: "memfd"})
	gone := k.want(0, op{Do: "open", Path: in("log/gone"), Flags: rdonly | unix.O_CREAT})
	if err := os.Remove(in("log/gone")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(in("other"), in("log/bound"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(in("log/bound"), 0); err != nil {
			t.Error(err)
		}
	})
	self := func(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
	for _, flags := range []int{rdonly | unix.O_CREAT, wronly, rdonly | unix.O_TRUNC} {
		set(t, e, h, 1)
		for _, o := range []op{
			{Path: in("log/a")},
			{Path: in("log/new")},
			{Path: in("log/sub/b")},
			{Path: in("one")},
			{Path: in("other/in")},
			{Path: "a", FD: log},
			{Path: "../log/a", FD: other},
			{Path: in("log/" + long + "deep")},
			{Path: in("log/bound/x")}, // its name is there
			{Path: self(gone)},
		} {
			o.Do, o.Flags = "open", flags
			k.opens(0, o)
			if o.FD == 0 {
				o.Do = "uring open"
				k.opens(0, o)
			}
		}
		k.opens(0, op{Do: "handle", Path: in("log/a"), FD: mount, Flags: flags &^ unix.O_CREAT})
		for _, o := range []op{
			{Path: in("log2/x")},
			{Path: in("other/x")},
			{Path: in("log/../other/x")},
			{Path: in("log/out")},
			{Path: "x", FD: other},
			{Path: "../other/x", FD: log},
			{Path: self(outside)},
			{Path: self(memory)},
			{Path: "/dev/null"},
		} {
			o.Do, o.Flags = "open", flags
			k.opens(eperm, o)
			if o.FD == 0 {
				o.Do, o.Async = "uring open", true
				k.opens(eperm, o)
			}
		}
		if flags&unix.O_CREAT == 0 {
			k.opens(eperm, op{Do: "handle", Path: in("other/x"), FD: mount, Flags: flags})
		}
		set(t, e, h, 4)
		k.opens(eperm, op{Do: "open", Path: in("log/a"), Flags: flags})
		set(t, e, h, 5)
		k.opens(0, op{Do: "open", Path: in("log/a"), Flags: flags})
		k.opens(0, op{Do: "open", Path: in("other/x"), Flags: flags})
		k.opens(eperm, op{Do: "open", Path: self(memory), Flags: flags})
	}
	set(t, e, h, 1)
	k.opens(0, op{Do: "open", Path: in("other/x"), Flags: rdonly})
	k.want(0, op{Do: "exec", Path: "/bin/true"})
	set(t, e, h, 2)
	k.opens(0, op{Do: "open", Path: in("log/a"), Flags: rdonly})
	k.opens(0, op{Do: "open", Path: in("log"), Flags: rdonly | unix.O_DIRECTORY})
	k.opens(0, op{Do: "open", Path: in("other/x"), Flags: wronly})
	k.opens(0, op{Do: "open", Path: in("other"), Flags: unix.O_PATH})
	for _, flags := range []int{rdonly, rdwr, rdonly | unix.O_NOFOLLOW} {
		k.opens(eperm, op{Do: "open", Path: in("other/x"), Flags: flags})
	}
	k.opens(eperm, op{Do: "open", Path: in("other"), Flags: rdonly | unix.O_DIRECTORY})
	k.opens(eperm, op{Do: "openat2", Path: "/etc/passwd", Flags: rdonly})
	k.want(0, op{Do: "exec", Path: "/bin/busybox"})
	set(t, e, h, 3)
	k.opens(0, op{Do: "open", Path: in("log/a"), Flags: rdwr})
	k.opens(eperm, op{Do: "open", Path: in("other/x"), Flags: rdwr})
	k.opens(0, op{Do: "open", Path: in("other/x"), Flags: rdonly})

	// Names of another root are none.
	for _, to := range []string{in("jail"), in("log/bound")} {
		set(t, e, h, 0)
		j := startTask(t, cg)
		j.want(0, op{Do: "chroot", Path: to})
		set(t, e, h, 5)
		j.opens(eperm, op{Do: "open", Path: "/", Flags: rdonly})
		set(t, e, h, 0)
		j.opens(0, op{Do: "open", Path: "/", Flags: rdonly})
		j.ends()
	}
	k.ends()
	noErrors(t, e)
	if err := e.Remove(h); err != nil {
		t.Fatal(err)
	}

	// Nor are those of another mount namespace.
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/mnt", &st); err != nil {
		t.Fatal(err)
	}
	for ns, want := range map[uint32]unix.Errno{uint32(st.Ino): 0, uint32(st.Ino) + 1: eperm} {
		h := add(t, e, cg, bpf.PhaseSet{0: writes}, bpf.EnforceOptions{MountNS: ns})
		k := startTask(t, cg)
		k.opens(want, op{Do: "open", Path: in("log/a"), Flags: wronly})
		k.opens(0, op{Do: "open", Path: in("log/a"), Flags: rdonly})
		k.ends()
		if err := e.Remove(h); err != nil {
			t.Fatal(err)
		}
	}
}

// A container's names are its own, and what it has of others is in no tree.
func TestPhaseContainerPaths(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir, host := newCgroup(t), files(t, "log/a", "other/x"), files(t, "log/a")
	log, root := bpf.AnyPhase(), bpf.AnyPhase()
	log.WriteTrees, root.WriteTrees = []string{"/log"}, []string{"/"}
	phases := bpf.PhaseSet{0: bpf.AnyPhase(), 1: log, 2: root}
	h := add(t, e, cg, phases, bpf.EnforceOptions{})
	k := startTask(t, cg)
	from := k.want(0, op{Do: "open", Path: host, Flags: rdonly | unix.O_DIRECTORY})
	ns := k.want(0, op{Do: "pivot", Path: dir})
	verdict := func(h bpf.PhaseHandle, own unix.Errno) {
		t.Helper()
		set(t, e, h, 1)
		k.opens(own, op{Do: "open", Path: "/log/a", Flags: wronly})
		k.opens(own, op{Do: "uring open", Path: "/log/a", Flags: wronly, Async: true})
		k.opens(eperm, op{Do: "open", Path: "/other/x", Flags: wronly})
		k.opens(eperm, op{Do: "open", FD: from, Path: "log/a", Flags: wronly})
		set(t, e, h, 2)
		k.opens(own, op{Do: "open", Path: "/other/x", Flags: wronly})
		k.opens(eperm, op{Do: "open", FD: from, Path: "log/a", Flags: wronly})
		k.opens(0, op{Do: "open", FD: from, Path: "log/a", Flags: rdonly})
		set(t, e, h, 0)
		k.opens(0, op{Do: "open", FD: from, Path: "log/a", Flags: wronly})
	}
	verdict(h, 0)
	for _, tc := range []struct {
		ns  int
		own unix.Errno
	}{{ns, 0}, {ns + 1, eperm}} {
		if err := e.Remove(h); err != nil {
			t.Fatal(err)
		}
		h = add(t, e, cg, phases, bpf.EnforceOptions{MountNS: uint32(tc.ns)})
		verdict(h, tc.own)
	}
	k.ends()
	noErrors(t, e)
}

// A path that is longer than the kernel tells is in no tree.
func TestPhaseLongPath(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir := newCgroup(t), files(t)
	root := bpf.AnyPhase()
	root.ReadTrees = []string{"/"}
	h := add(t, e, cg, bpf.PhaseSet{0: bpf.AnyPhase(), 1: root}, bpf.EnforceOptions{})
	k := startTask(t, cg)
	at, name := dir, strings.Repeat("n", 250)
	fd := k.want(0, op{Do: "open", Path: at, Flags: unix.O_PATH})
	for n := len(dir); n < 4200; n += len(name) + 1 {
		k.want(0, op{Do: "mkdir", Path: self(fd) + "/" + name})
		next := k.want(0, op{Do: "open", FD: fd, Path: name, Flags: unix.O_PATH})
		if n > 3800 {
			want := unix.Errno(0)
			if n+len(name)+1 >= 4096 {
				want = eperm
			}
			set(t, e, h, 1)
			k.opens(want, op{Do: "open", FD: fd, Path: name, Flags: rdonly})
			set(t, e, h, 0)
		}
		fd = next
	}
	k.ends()
	if errs, err := e.Errors(); err != nil || errs["path"] == 0 {
		t.Errorf("errors %v, %v", errs, err)
	}
}

func self(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// The layers of an overlay are opened by the kernel, for opens that have been judged.
func TestPhaseOverlay(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir := newCgroup(t), files(t, "lower/log/old", "lower/other/old", "upper/", "work/", "merged/")
	in := func(p string) string { return filepath.Join(dir, p) }
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", in("lower"), in("upper"), in("work"))
	if err := unix.Mount("overlay", in("merged"), "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(in("merged"), 0); err != nil {
			t.Error(err)
		}
	})
	r := bpf.AnyPhase()
	r.ReadTrees, r.WriteTrees = []string{in("merged/log")}, []string{in("merged/log")}
	h := add(t, e, cg, bpf.PhaseSet{0: r, 1: readOnly(), 2: bpf.AnyPhase()}, bpf.EnforceOptions{Phase: 2})
	k := startTask(t, cg)
	set(t, e, h, 0)
	fd := k.want(0, op{Do: "open", Path: in("merged/log/old"), Flags: rdwr}) // copied up
	k.want(0, op{Do: "write", FD: fd})
	k.opens(0, op{Do: "open", Path: in("merged/log/new"), Flags: wronly | unix.O_CREAT})
	k.opens(eperm, op{Do: "open", Path: in("merged/other/old"), Flags: rdwr})
	k.opens(eperm, op{Do: "open", Path: in("merged/other/old"), Flags: rdonly})
	set(t, e, h, 1)
	k.opens(eperm, op{Do: "open", Path: in("merged/log/old"), Flags: rdwr})
	read := k.want(0, op{Do: "open", Path: in("merged/other/old"), Flags: rdonly})
	k.want(0, op{Do: "read", FD: read})
	k.want(eperm, op{Do: "write", FD: fd})
	k.ends()
	if _, err := os.Stat(in("upper/other")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what may not be opened was copied up: %v", err)
	}
	noErrors(t, e)
}

func TestPhaseExec(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg := newCgroup(t)
	r := bpf.AnyPhase()
	r.Exec = false
	h := add(t, e, cg, bpf.PhaseSet{0: r, 5: bpf.AnyPhase()}, bpf.EnforceOptions{Phase: 5})
	k := startTask(t, cg)
	k.want(0, op{Do: "exec", Path: "/bin/true"})
	set(t, e, h, 0)
	k.want(eperm, op{Do: "exec", Path: "/bin/true"})
	k.opens(0, op{Do: "open", Path: "/bin/true"})
	set(t, e, h, 5)
	k.want(0, op{Do: "exec", Path: "/bin/true"})
	k.ends()
	noErrors(t, e)
}

// A runtime's processes are let alone until they execute the program.
func TestPhaseEntering(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir := newCgroup(t), files(t, "f")
	here := bpf.AnyPhase()
	here.WriteTrees = []string{cgroupRoot}
	writes := op{Do: "open", Path: filepath.Join(dir, "f"), Flags: wronly}
	shell := op{Do: "sh", Path: "exec 2>&-; : >" + writes.Path}

	starts := startTask(t, cg)
	fd, err := unix.PidfdOpen(starts.cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	defer pidfd.Close()
	add(t, e, cg, bpf.PhaseSet{0: here}, bpf.EnforceOptions{Starting: pidfd, StartFilters: uint32(baseFilters(t)), Entered: true})
	nested, procs := cg.child(t, "nested"), filepath.Join(cg.path, "cgroup.procs")
	cloned, moved := startTask(t, cg), startTask(t, newCgroup(t))
	if err := os.WriteFile(procs, fmt.Append(nil, moved.cmd.Process.Pid), 0); err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]*task{"starts": starts, "cloned": cloned, "moved": moved} {
		t.Run(name, func(t *testing.T) {
			k.t = t
			for range 2 {
				k.opens(0, writes)
				if n := k.want(0, shell); n != 0 {
					t.Errorf("what it forks: exit status %d", n)
				}
				k.want(0, op{Do: "again"}) // under no more filters
			}
			k.want(0, op{Do: "filter"})
			k.opens(0, writes)
			if n := k.want(0, shell); n == 0 {
				t.Error("what it forks executes the program, and is let alone")
			}
			k.opens(0, writes)
			k.want(0, op{Do: "again"})
			k.opens(eperm, writes)
			// From inside nobody enters.
			k.want(0, op{Do: "move", Path: filepath.Join(nested.path, "cgroup.procs")})
			k.opens(eperm, writes)
			k.want(0, op{Do: "move", Path: procs})
			k.opens(eperm, writes)
			other := startTask(t, newCgroup(t))
			k.want(0, op{Do: "move", Path: procs, Other: other.cmd.Process.Pid})
			other.opens(eperm, writes)
			other.ends()
			k.ends()
		})
	}
	noErrors(t, e)
}

// What is connected to the instance's own socket is used in every phase.
func TestPhaseOwnSocket(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir := newCgroup(t), files(t)
	silent := bpf.AnyPhase()
	silent.Send, silent.Receive, silent.Connect = 0, 0, false
	h := add(t, e, cg, bpf.PhaseSet{0: bpf.AnyPhase(), 1: silent}, bpf.EnforceOptions{})
	k := startTask(t, cg)
	var fds []int
	for _, name := range []string{"own", "other"} {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		fd := k.want(0, op{Do: "socket", Kind: unix.AF_UNIX, Flags: stream})
		k.want(0, op{Do: "connect", FD: fd, Addr: "unix:" + filepath.Join(dir, name)})
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	if err := e.Own(h, filepath.Join(dir, "own")); err != nil {
		t.Fatal(err)
	}
	set(t, e, h, 1)
	for i, want := range []unix.Errno{0, eperm} {
		for _, do := range []string{"write", "read", "send", "recv"} {
			k.want(want, op{Do: do, FD: fds[i]})
		}
	}
	again := k.want(0, op{Do: "socket", Kind: unix.AF_UNIX, Flags: stream})
	k.want(eperm, op{Do: "connect", FD: again, Addr: "unix:" + filepath.Join(dir, "own")})
	k.ends()
	noErrors(t, e)
}

// Calls on sockets, by phase.
func TestPhaseSocketCalls(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg := newCgroup(t)
	without := func(change func(*bpf.PhaseRules)) bpf.PhaseRules {
		r := bpf.AnyPhase()
		change(&r)
		return r
	}
	h := add(t, e, cg, bpf.PhaseSet{
		0: bpf.AnyPhase(),
		1: without(func(r *bpf.PhaseRules) { r.Connect = false }),
		2: without(func(r *bpf.PhaseRules) { r.Bind = false }),
		3: without(func(r *bpf.PhaseRules) { r.Listen = false }),
		4: without(func(r *bpf.PhaseRules) { r.Accept = false }),
		5: without(func(r *bpf.PhaseRules) { r.Families = bpf.Families(unix.AF_UNIX, unix.AF_INET6) }),
	}, bpf.EnforceOptions{})
	k := startTask(t, cg)
	verdict := func(denied bool) unix.Errno {
		if denied {
			return eperm
		}
		return 0
	}
	bound := k.want(0, op{Do: "socket", Kind: inet, Flags: stream | unix.SOCK_NONBLOCK})
	k.want(0, op{Do: "bind", FD: bound, Addr: "127.0.0.1:0"})
	k.want(0, op{Do: "listen", FD: bound})
	port := k.want(0, op{Do: "port", FD: bound})
	for phase := range uint8(6) {
		set(t, e, h, 0)
		waiting := k.want(0, op{Do: "socket", Kind: inet, Flags: stream})
		k.want(0, op{Do: "connect", FD: waiting, Addr: fmt.Sprintf("127.0.0.1:%d", port)})
		fresh := k.want(0, op{Do: "socket", Kind: inet, Flags: stream})
		ring := k.want(0, op{Do: "socket", Kind: inet, Flags: stream})
		ring2 := k.want(0, op{Do: "socket", Kind: inet, Flags: stream})
		set(t, e, h, phase)
		at := fmt.Sprintf("127.0.0.1:%d", port)
		k.want(verdict(phase == 2), op{Do: "bind", FD: fresh, Addr: "127.0.0.1:0"})
		k.want(verdict(phase == 1), op{Do: "connect", FD: fresh, Addr: at})
		k.want(verdict(phase == 1), op{Do: "uring connect", FD: ring, Addr: at})
		k.want(verdict(phase == 1), op{Do: "uring connect", FD: ring2, Addr: at, Async: true})
		k.want(verdict(phase == 3), op{Do: "listen", FD: bound})
		k.opens(verdict(phase == 4), op{Do: "accept", FD: bound})
		k.opens(verdict(phase == 5), op{Do: "socket", Kind: inet, Flags: unix.SOCK_RAW, Other: unix.IPPROTO_ICMP})
		k.opens(verdict(phase == 5), op{Do: "socket", Kind: unix.AF_NETLINK, Flags: unix.SOCK_RAW})
		k.opens(0, op{Do: "socket", Kind: unix.AF_UNIX, Flags: stream})
		k.opens(0, op{Do: "socket", Kind: unix.AF_INET6, Flags: stream})
		k.want(0, op{Do: "exec", Path: "/bin/true"})
		set(t, e, h, 0)
		for {
			fd, errno := k.try(op{Do: "accept", FD: bound})
			if errno == eperm {
				t.Fatalf("accept: %s", text(errno))
			}
			if errno == 0 {
				k.want(0, op{Do: "close", FD: fd})
				continue
			}
			if errno == unix.EAGAIN {
				break
			}
		}
		for _, fd := range []int{waiting, fresh, ring, ring2} {
			k.want(0, op{Do: "close", FD: fd})
		}
	}
	k.ends()
	noErrors(t, e)
}

// Sockets that are there send and receive where the phase lets them, by whichever call.
func TestPhaseOpenSockets(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg, dir := newCgroup(t), files(t, "source")
	a, b := serve(t, "127.0.0.1"), serve(t, "127.0.0.1")
	local := func(name string) net.Listener {
		l, err := net.Listen("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	path := filepath.Join(dir, "socket")
	listeners := []net.Listener{a.tcp, b.tcp, local(path)}
	silent, deaf, quiet, withUnix := bpf.AnyPhase(), bpf.AnyPhase(), bpf.AnyPhase(), reach("unix")
	silent.Send = bpf.Families(unix.AF_UNIX)
	deaf.Receive = 0
	quiet.Send, quiet.Receive = 0, 0
	h := add(t, e, cg, bpf.PhaseSet{
		0: bpf.AnyPhase(), 1: silent, 2: deaf, 3: quiet,
		4: reach("127.0.0.1/32", a.port), 5: withUnix, 6: reach("127.0.0.1/32", 0),
	}, bpf.EnforceOptions{})
	k := startTask(t, cg)
	var fds []int
	for i, to := range []string{fmt.Sprintf("127.0.0.1:%d", a.port), fmt.Sprintf("127.0.0.1:%d", b.port), "unix:" + path} {
		family := inet
		if i == 2 {
			family = unix.AF_UNIX
		}
		fd := k.want(0, op{Do: "socket", Kind: family, Flags: stream})
		k.want(0, op{Do: "connect", FD: fd, Addr: to})
		fds = append(fds, fd)
		c, err := listeners[i].Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write([]byte(strings.Repeat("x", 64))); err != nil {
			t.Fatal(err)
		}
	}
	pair := k.want(0, op{Do: "socketpair"})
	left, right := pair>>16, pair&0xffff
	pipe := k.want(0, op{Do: "pipe"})
	r, w := pipe>>16, pipe&0xffff
	source := k.want(0, op{Do: "open", Path: filepath.Join(dir, "source")})
	datagram := k.want(0, op{Do: "socket", Kind: inet, Flags: dgram})
	raw := k.want(0, op{Do: "socket", Kind: inet, Flags: unix.SOCK_RAW, Other: 253})
	u := k.want(0, op{Do: "socket", Kind: unix.AF_UNIX, Flags: dgram})
	verdict := func(ok bool) unix.Errno {
		if ok {
			return 0
		}
		return eperm
	}
	for _, tc := range []struct {
		phase         uint8
		send, receive [3]bool // a, b, unix
		any           bool    // any port of the address
	}{
		{0, [3]bool{true, true, true}, [3]bool{true, true, true}, true},
		{1, [3]bool{false, false, true}, [3]bool{true, true, true}, false},
		{2, [3]bool{true, true, true}, [3]bool{}, true},
		{3, [3]bool{}, [3]bool{}, false},
		{4, [3]bool{true, false, false}, [3]bool{true, false, false}, false},
		{5, [3]bool{false, false, true}, [3]bool{false, false, true}, false},
		{6, [3]bool{true, true, false}, [3]bool{true, true, false}, true},
		{0, [3]bool{true, true, true}, [3]bool{true, true, true}, true},
	} {
		set(t, e, h, tc.phase)
		for i, fd := range fds {
			send, receive := verdict(tc.send[i]), verdict(tc.receive[i])
			k.want(send, op{Do: "send", FD: fd})
			k.want(send, op{Do: "write", FD: fd})
			k.want(send, op{Do: "sendfile", FD: fd, Other: source})
			k.want(0, op{Do: "write", FD: w})
			k.want(send, op{Do: "splice", FD: r, Other: fd})
			k.want(send, op{Do: "uring write", FD: fd, Async: true})
			k.want(receive, op{Do: "recv", FD: fd})
			k.want(receive, op{Do: "read", FD: fd})
			k.want(receive, op{Do: "splice", FD: fd, Other: w})
		}
		k.want(verdict(tc.send[0]), op{Do: "sendto", FD: datagram, Addr: fmt.Sprintf("127.0.0.1:%d", a.port)})
		k.want(verdict(tc.send[1]), op{Do: "sendto", FD: datagram, Addr: fmt.Sprintf("127.0.0.1:%d", b.port)})
		// What has no ports reaches what is reached at all of them.
		k.want(verdict(tc.any), op{Do: "sendto", FD: raw, Addr: fmt.Sprintf("127.0.0.1:%d", a.port)})
		// Nobody is there: the kernel would say so.
		if _, errno := k.try(op{Do: "sendto", FD: u, Addr: "unix:@syslatch-nobody"}); (errno == eperm) == tc.send[2] {
			t.Errorf("a datagram to a unix socket: %s", text(errno))
		}
		s := k.want(0, op{Do: "socket", Kind: unix.AF_UNIX, Flags: stream})
		want := verdict(tc.send[2] || tc.phase < 4)
		k.want(want, op{Do: "connect", FD: s, Addr: "unix:" + path})
		k.want(0, op{Do: "close", FD: s})
		// Pairs are pipes.
		k.want(0, op{Do: "write", FD: left})
		k.want(0, op{Do: "send", FD: left})
		k.want(0, op{Do: "read", FD: right})
		k.want(0, op{Do: "recv", FD: right})
		if t.Failed() {
			t.Fatalf("in phase %d", tc.phase)
		}
	}
	// What came with the task is judged as well.
	out := startTask(t, newCgroup(t))
	fd := out.want(0, op{Do: "socket", Kind: inet, Flags: stream})
	out.want(0, op{Do: "connect", FD: fd, Addr: fmt.Sprintf("127.0.0.1:%d", b.port)})
	set(t, e, h, 4)
	out.want(0, op{Do: "write", FD: fd})
	out.want(0, op{Do: "move", Path: filepath.Join(cg.path, "cgroup.procs")})
	out.want(eperm, op{Do: "write", FD: fd})
	out.ends()
	k.ends()
	noErrors(t, e)
}

// Each of eight phases has its own tree.
func TestPhaseEight(t *testing.T) {
	needLSM(t)
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg := newCgroup(t)
	s := bpf.PhaseSet{}
	var names []string
	for n := range uint8(bpf.Phases) {
		names = append(names, fmt.Sprintf("tree%d/f", n))
	}
	dir := files(t, names...)
	for n := range uint8(bpf.Phases) {
		r := bpf.AnyPhase()
		r.WriteTrees = []string{filepath.Join(dir, filepath.Dir(names[n]))}
		s[n] = r
	}
	h := add(t, e, cg, s, bpf.EnforceOptions{})
	k := startTask(t, cg)
	for phase := range s {
		set(t, e, h, phase)
		for n := range names {
			want := eperm
			if n == int(phase) {
				want = 0
			}
			k.opens(want, op{Do: "open", Path: filepath.Join(dir, names[n]), Flags: wronly})
		}
	}
	k.ends()
	denials, err := e.Denials(h)
	if err != nil || len(denials) != len(s) {
		t.Fatalf("%+v, %v", denials, err)
	}
	for _, d := range denials {
		if d.Program != "lsm/file_open" || d.Count != bpf.Phases-1 {
			t.Errorf("%+v", d)
		}
	}
	// Only what is needed is attached.
	all, err := e.Instances()
	if err != nil || len(all) != 1 || strings.Join(all[0].Programs, " ") != "lsm/file_open" {
		t.Errorf("%+v, %v", all, err)
	}
}

// BenchmarkPhaseFiles compares reads, writes and opens: without an instance, beside one,
// and within one that has trees. Where it can run they are emulated, and good as ratios
// only.
func BenchmarkPhaseFiles(b *testing.B) {
	if !bpfLSM(b) {
		b.Skip("this kernel has no BPF LSM")
	}
	e := openEnforcer(b, pinDir(b), bpf.EnforcerOptions{})
	cg, dir := newCgroup(b), files(b, "f")
	path := filepath.Join(dir, "f")
	k, out := startTask(b, cg), startTask(b, newCgroup(b))
	trees := bpf.AnyPhase()
	trees.ReadTrees, trees.WriteTrees = []string{"/usr", "/lib", dir}, []string{"/var/log", dir}
	set := bpf.PhaseSet{0: trees, 1: readOnly()}
	results := map[string][]float64{}
	for b.Loop() {
		for range 7 {
			for _, what := range []string{"writes", "opens"} {
				const n = 10000
				measure := func(k *task) float64 { return float64(k.want(0, op{Do: what, Path: path, Flags: n})) }
				bare, outBare := measure(k), measure(out)
				h := add(b, e, cg, set, bpf.EnforceOptions{})
				ours, others := measure(k), measure(out)
				if err := e.Remove(h); err != nil {
					b.Fatal(err)
				}
				results[what+"-ratio"] = append(results[what+"-ratio"], ours/bare)
				results[what+"-others-ratio"] = append(results[what+"-others-ratio"], others/outBare)
			}
		}
	}
	k.ends()
	out.ends()
	b.ReportMetric(0, "ns/op")
	for name, v := range results {
		b.ReportMetric(median(v), name)
	}
}
