// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// tmpfs mounts one of its own for the test.
func tmpfs(t *testing.T, options string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a tmpfs of a few blocks")
	}
	dir, err := os.MkdirTemp("", mountPrefix)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(mountPrefix, dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		t.Fatalf("mount tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestDiskFull runs out of blocks, and of inodes, at each place where it can.
func TestDiskFull(t *testing.T) {
	for _, c := range []struct {
		name, options string
		// fill leaves room for n blocks or inodes and returns what makes room again.
		fill  func(t *testing.T, dir string, n int) func()
		least int
	}{
		{"blocks", "size=256k,mode=0755", func(t *testing.T, dir string, n int) func() {
			f, err := os.Create(filepath.Join(dir, "fill"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			block := make([]byte, 4096)
			blocks := 0
			for ; err == nil; blocks++ {
				_, err = f.Write(block)
			}
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			if err := f.Truncate(int64(blocks-1-n) * 4096); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(f.Name()) }
		}, 5},
		{"inodes", "nr_inodes=64,mode=0755", func(t *testing.T, dir string, n int) func() {
			var made []string
			for i := 0; ; i++ {
				name := filepath.Join(dir, fmt.Sprint("fill", i))
				if err := unix.Mknod(name, unix.S_IFREG|0o600, 0); errors.Is(err, unix.ENOSPC) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				made = append(made, name)
			}
			for ; n > 0; n-- {
				os.Remove(made[0])
				made = made[1:]
			}
			return func() {
				for _, name := range made {
					os.Remove(name)
				}
			}
		}, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			mount := tmpfs(t, c.options)
			failures := 0
			for room := 0; ; room++ {
				dir := filepath.Join(mount, "store")
				s, err := Open(dir, Options{})
				if err != nil {
					t.Fatal(err)
				}
				add(t, s, recording("w", "r1", "read"), activate)
				before := mustRead(t, s, "w")
				free := c.fill(t, mount, room)

				_, err = s.Add(t.Context(), recording("w", "r2", "mkdir"), activate)
				if err != nil {
					failures++
					if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), dir) {
						t.Errorf("room %d: %v", room, err)
					}
					noLeftovers(t, dir)
					x := mustRead(t, s, "w")
					if diff := cmp.Diff(before.Versions, x.Versions[:1:1]); diff != "" {
						t.Errorf("room %d: %s", room, diff)
					}
					if x.Active != 1 {
						t.Errorf("room %d: active %d", room, x.Active)
					}
				}
				free()
				if r := add(t, s, recording("w", "r2", "mkdir"), activate); r.Head != 2 || r.Observations != 2 {
					t.Errorf("room %d: with space again: %+v", room, r)
				}
				if x := mustRead(t, s, "w"); x.Active != 2 {
					t.Errorf("room %d: active %d", room, x.Active)
				}
				s.Close()
				if removeErr := os.RemoveAll(dir); removeErr != nil {
					t.Fatal(removeErr)
				}
				if err == nil {
					break
				}
				if room == 0 {
					t.Log(err)
				}
			}
			t.Logf("%d adds failed", failures)
			if failures < c.least {
				t.Errorf("only %d failures, want at least %d", failures, c.least)
			}
		})
	}
}

func TestReadOnlyFileSystem(t *testing.T) {
	dir := tmpfs(t, "size=1m,mode=0755")
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	add(t, s, recording("w", "r1", "read"), activate)
	before := mustRead(t, s, "w")
	s.Close()
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(dir, Options{}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, w := range []string{"w", "new"} {
		_, err = s.Add(t.Context(), recording(w, "r2", "mkdir"), activate)
		if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "writable") {
			t.Errorf("%s: %v", w, err)
		}
	}
	if diff := cmp.Diff(before, mustRead(t, s, "w")); diff != "" {
		t.Error(diff)
	}
}

func TestPermissionDenied(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	dir := t.TempDir()
	s := open(t, dir, Options{Public: true})
	add(t, s, recording("w", "r1", "read"), activate)
	for p := dir; p != os.TempDir() && p != "/"; p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() { // the thread ends with the goroutine, which keeps it locked
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Setfsgid(65534); err != nil {
			t.Error(err)
			return
		}
		if err := unix.Setfsuid(65534); err != nil {
			t.Error(err)
			return
		}
		if v, err := s.Active("w"); err != nil || v.Manifest.Version != 1 {
			t.Errorf("a public version: %v, %v", v, err)
		}
		if _, err := s.Recordings("w"); !errors.Is(err, unix.EACCES) {
			t.Errorf("recordings: %v", err)
		}
		if _, err := s.Add(t.Context(), recording("w", "r2", "mkdir"), activate); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "writable") {
			t.Errorf("add: %v", err)
		}
	}()
	<-done
}
