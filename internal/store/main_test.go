// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

const childEnv = "SYSLATCH_STORE_TEST_CHILD"

func TestMain(m *testing.M) {
	if mode := os.Getenv(childEnv); mode != "" {
		if err := child(mode, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	fds, mounts := openFiles(), mountinfo()
	code := m.Run()
	if got := openFiles(); !slices.Equal(got, fds) {
		fmt.Printf("FAIL: leaked fds:\n%s\nbefore:\n%s\n", strings.Join(got, "\n"), strings.Join(fds, "\n"))
		code = 1
	}
	if got := mountinfo(); got != mounts {
		fmt.Printf("FAIL: leaked mounts:\n%s\nbefore:\n%s\n", got, mounts)
		code = 1
	}
	// A test's own goroutine may end a little later than m.Run.
	left := goroutines()
	for deadline := time.Now().Add(10 * time.Second); len(left) > 0 && time.Now().Before(deadline); left = goroutines() {
		runtime.Gosched()
	}
	if len(left) > 0 {
		fmt.Printf("FAIL: leaked goroutines:\n%s\n", strings.Join(left, "\n\n"))
		code = 1
	}
	os.Exit(code)
}

// goroutines are the stacks of all but this one and the fuzzer's.
func goroutines() []string {
	buf := make([]byte, 1<<20)
	all := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")[1:]
	return slices.DeleteFunc(all, func(g string) bool { return strings.Contains(g, "os/signal.") })
}

// openFiles lists what this process has open, without the runtime's own.
func openFiles() (out []string) {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	for _, fd := range fds {
		target, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err == nil && !strings.HasPrefix(target, "anon_inode:") && !strings.HasPrefix(target, "/proc/") {
			out = append(out, fd.Name()+" "+target)
		}
	}
	return out
}

// mountinfo is what the tests may have mounted: others mount, too.
func mountinfo() string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err)
	}
	var out []string
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, mountPrefix) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

const mountPrefix = "syslatch-store-test"

// recording makes one of workload w in which calls were made.
func recording(workload, id string, calls ...string) *profiles.Recording {
	slices.Sort(calls)
	return &profiles.Recording{
		SchemaVersion: 1, ID: id, Workload: workload,
		Subject: profiles.Subject{ID: "c-" + id},
		Started: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC),
		Ended:   time.Date(2026, 11, 24, 12, 1, 0, 0, time.UTC),
		Kernel:  "6.12.0", Gate: profiles.GateFilter,
		Phases: map[string]profiles.Calls{profiles.DefaultPhase: {specs.ArchX86_64: calls}},
	}
}

func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func add(t testing.TB, s *Store, rec *profiles.Recording, o AddOptions) Result {
	t.Helper()
	r, err := s.Add(t.Context(), rec, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

var activate = AddOptions{Activate: true}

// state is all that can be read of a workload.
type state struct {
	Versions   []*profiles.Version
	Manifests  []profiles.Manifest
	Recordings []*profiles.Recording
	Active     int
	Summaries  []Summary
}

func read(s *Store, workload string) (state, error) {
	var x state
	var err error
	if x.Manifests, err = s.Versions(workload); err != nil && !errors.Is(err, ErrNoVersion) {
		return x, fmt.Errorf("versions: %w", err)
	}
	for i, m := range x.Manifests {
		v, err := s.Version(workload, m.Version)
		if err != nil {
			return x, fmt.Errorf("version: %w", err)
		}
		if m.Version != i+1 {
			return x, fmt.Errorf("version %d at place %d", m.Version, i)
		}
		x.Versions = append(x.Versions, v)
	}
	if x.Recordings, err = s.Recordings(workload); err != nil {
		return x, fmt.Errorf("recordings: %w", err)
	}
	active, err := s.Active(workload)
	if err != nil && !errors.Is(err, ErrNoVersion) {
		return x, fmt.Errorf("active: %w", err)
	}
	if active != nil {
		x.Active = active.Manifest.Version
	}
	if x.Summaries, err = s.Workloads(); err != nil {
		return x, fmt.Errorf("workloads: %w", err)
	}
	return x, nil
}

func mustRead(t testing.TB, s *Store, workload string) state {
	t.Helper()
	x, err := read(s, workload)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// files lists the regular files below dir.
func files(t testing.TB, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			out = append(out, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func noLeftovers(t testing.TB, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if strings.HasPrefix(filepath.Base(p), leftover) {
			t.Errorf("leftover: %s", p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// command runs this test binary as a child.
func command(t testing.TB, mode string, args ...string) *exec.Cmd {
	t.Helper()
	c := exec.CommandContext(t.Context(), os.Args[0], args...)
	c.Env = append(os.Environ(), childEnv+"="+mode)
	c.Stderr = os.Stderr
	return c
}

// child is what the child does: it stands in for another process of syslatch.
func child(mode string, args []string) error {
	s, err := Open(args[0], Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	ctx := context.Background()
	switch mode {
	case "crash": // DIR N ID CALL…: add, but kill -9 yourself before the step N
		n := 0
		fmt.Sscan(args[1], &n)
		s.step = func(next string) {
			if n--; n == 0 {
				unix.Kill(unix.Getpid(), unix.SIGKILL)
				select {} // not one more call
			}
			fmt.Println(next)
		}
		_, err := s.Add(ctx, recording("w", args[2], args[3:]...), activate)
		return err
	case "many": // DIR NAME N: add N recordings, each with one call of its own
		n := 0
		fmt.Sscan(args[2], &n)
		for i := range n {
			name := fmt.Sprintf("%s_%d", args[1], i)
			if _, err := s.Add(ctx, recording("w", name, "read", name), activate); err != nil {
				return err
			}
		}
		return nil
	case "hold": // DIR: hold the lock until stdin ends
		return s.change(ctx, "w", func(*dir) error {
			fmt.Println("held")
			_, err := io.Copy(io.Discard, os.Stdin)
			return err
		})
	}
	return fmt.Errorf("mode %q", mode)
}

// hold starts a child that holds the lock of workload w. end ends the child.
func hold(t *testing.T, dir string) (c *exec.Cmd, end func()) {
	t.Helper()
	c = command(t, "hold", dir)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	return c, func() {
		in.Close()
		_ = c.Wait()
	}
}
