// SPDX-License-Identifier: Apache-2.0

package holder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const roleEnv = "SYSLATCH_TEST_HOLDER"

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) != "" {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		defer stop()
		if err := Serve(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// starter starts this program as a holder, and tells its process.
func starter(started **exec.Cmd) Start {
	return func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), roleEnv+"=1")
		*started = cmd
		return cmd
	}
}

// gone waits until a holder has ended by itself.
func gone(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for deadline := time.Now().Add(time.Minute); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(time.Until(deadline).Milliseconds()))
		switch {
		case n == 1:
			return
		case err != nil && !errors.Is(err, unix.EINTR), time.Now().After(deadline):
			_ = unix.Kill(pid, unix.SIGKILL)
			t.Fatalf("the holder didn't end: %v", err)
		}
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func names(t *testing.T, c *Client) []string {
	t.Helper()
	kept, err := c.Kept()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range kept {
		f.Close()
	}
	return slices.Sorted(maps.Keys(kept))
}

// TestKeep: a descriptor outlives those who had it, is found by its name, and is let
// go of when it hangs up; then the holder ends.
func TestKeep(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "holder.sock")
	var cmd *exec.Cmd
	c, err := Open(t.Context(), socket, starter(&cmd))
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	r, w := pipe(t)
	if _, err := w.WriteString("inside"); err != nil {
		t.Fatal(err)
	}
	if err := c.Keep("a 1", r); err != nil {
		t.Fatal(err)
	}
	r2, w2 := pipe(t)
	if err := c.Keep("b 1", r2); err != nil {
		t.Fatal(err)
	}
	r.Close()
	r2.Close()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	// The next process: no second holder.
	c, err = Open(t.Context(), socket, func() *exec.Cmd { t.Error("a second holder"); return exec.Command("false") })
	if err != nil {
		t.Fatal(err)
	}
	kept, err := c.Kept()
	if err != nil || len(kept) != 2 || kept["a 1"] == nil {
		t.Fatalf("%v, %v", kept, err)
	}
	buf := make([]byte, 6)
	if _, err := io.ReadFull(kept["a 1"], buf); err != nil || string(buf) != "inside" {
		t.Errorf("%q, %v", buf, err)
	}
	for _, f := range kept {
		f.Close()
	}
	if err := c.Drop("b 1"); err != nil {
		t.Fatal(err)
	}
	if err := c.Drop("never"); err != nil {
		t.Error(err)
	}
	if _, err := w2.Write([]byte{1}); err == nil || !strings.Contains(err.Error(), "broken pipe") {
		t.Errorf("what was dropped is open: %v", err)
	}
	w.Close() // hangs up
	for deadline := time.Now().Add(60 * time.Second); len(names(t, c)) > 0 && time.Now().Before(deadline); {
		<-time.After(20 * time.Millisecond)
	}
	if got := names(t, c); len(got) > 0 {
		t.Errorf("held: %v", got)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	gone(t, cmd.Process.Pid)
	var second *exec.Cmd
	if c, err = Open(t.Context(), socket, starter(&second)); err != nil {
		t.Fatal(err)
	}
	if second == nil || len(names(t, c)) != 0 {
		t.Error("no second holder, or not an empty one")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	gone(t, second.Process.Pid)
}

// TestTerminated: a holder that is asked to end goes when it holds nothing, be somebody
// connected or not, and not before.
func TestTerminated(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "holder.sock")
	var cmd *exec.Cmd
	c, err := Open(t.Context(), socket, starter(&cmd))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, w := pipe(t)
	if err := c.Keep("a 1", r); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// Until the signal has been seen, and for a while after that.
	for deadline := time.Now().Add(idle / 4 * 3); time.Now().Before(deadline); {
		if got := names(t, c); len(got) != 1 {
			t.Fatalf("held: %v", got)
		}
		<-time.After(20 * time.Millisecond)
	}
	w.Close() // hangs up
	gone(t, cmd.Process.Pid)
	if err := c.Keep("b 1", r); err == nil {
		t.Error("kept by a holder that has ended")
	}

	empty := filepath.Join(t.TempDir(), "holder.sock")
	if c, err = Open(t.Context(), empty, starter(&cmd)); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	gone(t, cmd.Process.Pid)
}

// TestKilled: a holder that is killed is an error, not a hang.
func TestKilled(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "holder.sock")
	var cmd *exec.Cmd
	c, err := Open(t.Context(), socket, starter(&cmd))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	r, _ := pipe(t)
	if err := c.Keep("a", r); err == nil {
		t.Error("kept by a dead holder")
	}
	var second *exec.Cmd
	again, err := Open(t.Context(), socket, starter(&second))
	if err != nil || second == nil {
		t.Fatalf("%v", err)
	}
	if err := again.Keep("a", r); err != nil {
		t.Error(err)
	}
	if err := again.Drop("a"); err != nil {
		t.Error(err)
	}
	again.Close()
	gone(t, second.Process.Pid)
}

func TestStartFails(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "holder.sock")
	for name, start := range map[string]Start{
		"ends":    func() *exec.Cmd { return exec.Command("false") },
		"missing": func() *exec.Cmd { return exec.Command("/nowhere") },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		if c, err := Open(ctx, socket, start); err == nil {
			c.Close()
			t.Errorf("%s: no error", name)
		}
		cancel()
	}
}

// TestBadMessages: what is no request is an error, or the end of its connection, and
// loses nothing.
func TestBadMessages(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "holder.sock")
	var cmd *exec.Cmd
	c, err := Open(t.Context(), socket, starter(&cmd))
	if err != nil {
		t.Fatal(err)
	}
	r, w := pipe(t)
	if err := c.Keep("a", r); err != nil {
		t.Fatal(err)
	}
	for _, m := range []message{{Op: "steal"}, {Op: opKeep}, {Op: opKeep, Name: "x"}, {Op: opDrop, Name: strings.Repeat("x", maxName+1)}} {
		bad, err := dial(socket)
		if err != nil {
			t.Fatal(err)
		}
		if err := bad.ask(m, nil, nil); err == nil {
			t.Errorf("%+.40v: no error", m)
		}
		bad.Close()
	}
	for _, text := range []string{"", "{", strings.Repeat("x", 2*maxMessage)} {
		conn, err := net.Dial("unixpacket", socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	if got := names(t, c); !slices.Equal(got, []string{"a"}) {
		t.Errorf("held: %v", got)
	}
	w.Close()
	c.Close()
	gone(t, cmd.Process.Pid)
}
