// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// openUp lets everybody through to a socket below a test's temporary directory.
func openUp(socket string) error {
	if err := os.Chmod(socket, 0o666); err != nil {
		return err
	}
	for dir := filepath.Dir(socket); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil {
			return err
		}
	}
	return nil
}

func TestListenMode(t *testing.T) {
	for _, umask := range []int{0, 0o077, 0o777} {
		for _, mode := range []fs.FileMode{0o600, 0o666} {
			dir := filepath.Join(t.TempDir(), "own")
			old := unix.Umask(umask)
			if umask == 0o777 { // the directory, too, would be closed to us
				unix.Umask(0)
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				unix.Umask(umask)
			}
			l, err := Listen(dir+"/s", mode)
			unix.Umask(old)
			if err != nil {
				t.Fatal(err)
			}
			for path, want := range map[string]fs.FileMode{dir: fs.ModeDir | 0o700, dir + "/s": fs.ModeSocket | mode} {
				if st, err := os.Lstat(path); err != nil || st.Mode() != want {
					t.Errorf("umask %o: %s: %v, %v, want %v", umask, path, st.Mode(), err, want)
				}
			}
			if err := errors.Join(l.Close(), l.Close()); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(dir + "/s"); !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		}
	}
}

// The socket is never there with another mode than its own: the bind makes it so.
func TestListenIsBornClosed(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	path := filepath.Join(t.TempDir(), "s")
	if err := errors.Join(unix.Fchmod(fd, 0o600), unix.Bind(fd, &unix.SockaddrUnix{Name: path})); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: this kernel's bind doesn't take the inode's mode", st.Mode(), err)
	}
}

func TestListenReplacesWhatIsStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, 0o600); !errors.Is(err, errInUse) {
		t.Error("somebody who takes no lock listens:", err)
	}
	old.SetUnlinkOnClose(false)
	if err := old.Close(); err != nil { // as a killed process leaves it
		t.Fatal(err)
	}
	l, err := Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Listen(path, 0o600); !errors.Is(err, errInUse) || !strings.Contains(err.Error(), path) {
		t.Error("we listen:", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal("the socket is another's:", err)
	}
	c.Close()
	// Somebody replaces it by force: that one isn't ours to remove.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

func TestListenRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(dir string) error
		want    string
	}{
		"file":         {func(dir string) error { return os.WriteFile(dir+"/s", []byte("precious"), 0o600) }, "something else is there"},
		"link":         {func(dir string) error { return os.Symlink(dir+"/target", dir+"/s") }, "something else is there"},
		"linked lock":  {func(dir string) error { return os.Symlink(dir+"/target", dir+"/s.lock") }, "too many levels of symbolic links"},
		"fifo as lock": {func(dir string) error { return syscall.Mkfifo(dir+"/s.lock", 0o600) }, "is no file"},
		"open":         {func(dir string) error { return os.Chmod(dir, 0o777) }, "others can write to"},
		"sticky":       {func(dir string) error { return os.Chmod(dir, 0o777|fs.ModeSticky) }, "others can write to"},
		"linked directory": {func(dir string) error {
			return errors.Join(os.Rename(dir, dir+".real"), os.Symlink(dir+".real", dir))
		}, "name the directory itself"},
		"no parent": {func(dir string) error { return os.Remove(dir) }, ""},
		"too long":  {func(dir string) error { return nil }, "invalid argument"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "d")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := tc.prepare(dir); err != nil {
				t.Fatal(err)
			}
			path := dir + "/s"
			if name == "too long" {
				path = dir + "/" + strings.Repeat("x", 108)
			}
			l, err := Listen(path, 0o600)
			if tc.want == "" {
				if err != nil {
					t.Fatal(err) // the directory is made
				}
				l.Close()
				return
			}
			if err == nil {
				l.Close()
				t.Fatal("it listens")
			}
			if !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			if _, err := os.Lstat(dir + "/target"); err == nil {
				t.Error("a link was followed")
			}
		})
	}
	if os.Getuid() != 0 {
		return
	}
	dir := filepath.Join(t.TempDir(), "d")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dir+"/s", 0o600); err == nil || !strings.Contains(err.Error(), "others can write to") {
		t.Error("in a directory of another user's:", err)
	}
}
