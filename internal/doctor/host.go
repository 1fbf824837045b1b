// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/monitor"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// Host is all that the checks ask of a host.
type Host struct {
	// Release and Machine are uname(2)'s, "6.12.0" and "x86_64".
	Release, Machine string
	// ReadFile reads a file of /proc or /etc; Stat says whether a path is there.
	ReadFile func(path string) ([]byte, error)
	Stat     func(path string) error
	// Cgroup, Probe and Seccomp are cgroup.Detect, bpf.Probe and seccomp.Info.
	Cgroup  func() (*cgroup.Hierarchy, error)
	Probe   func(cgroupRoot string) []bpf.Feature
	Seccomp func() (seccomp.Support, error)
	// Denials says why denials by filters can't be seen, or by what they are.
	Denials func() (mechanism string, err error)
	// OpenRecorder loads the recorder's programs and lets them go.
	OpenRecorder func() error
	// Find is the path of an executable, or an error that wraps fs.ErrNotExist.
	Find func(name string) (string, error)
	// Run is a program's standard output. Its error holds standard error.
	Run func(ctx context.Context, path string, args ...string) (string, error)
	// Dial connects to a unix socket and hangs up.
	Dial func(ctx context.Context, socket string) error
}

// System is the host that this process runs on.
func System() *Host {
	h := &Host{
		ReadFile: os.ReadFile,
		Stat:     func(path string) error { _, err := os.Stat(path); return err },
		Cgroup:   cgroup.Detect,
		Probe:    bpf.Probe,
		Seccomp:  seccomp.Info,
		Denials:  monitor.Try,
		OpenRecorder: func() error {
			r, err := bpf.Open("", bpf.Options{NoPin: true})
			if err != nil {
				return err
			}
			return r.Close()
		},
		Find: find,
		Run:  run,
		Dial: func(ctx context.Context, socket string) error {
			c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
			if err != nil {
				return err
			}
			return c.Close()
		},
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		h.Release, h.Machine = unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:])
	}
	return h
}

// sbin is where runtimes are when PATH is an ordinary user's or a service's.
var sbin = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/opt/containerd/bin", "/usr/libexec/crio"}

func find(name string) (string, error) {
	// Relative entries of PATH are not taken: this runs as root.
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), sbin...) {
		path := filepath.Join(dir, name)
		if !filepath.IsAbs(path) {
			continue
		}
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, fs.ErrNotExist)
}

// killDelay is how long what outlives a killed program's group may hold its
// output open.
const killDelay = time.Second

// run gives a program half of the time that there is, so that the check can say
// what hung, and go on without it. Whatever the program started is killed with
// it.
func run(ctx context.Context, path string, args ...string) (string, error) {
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/2)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = killDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		if said := oneLine(stderr.String()); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
	}
	return stdout.String(), err
}

// oneLine is the first line that says something, in printable characters and of
// bounded length: it goes to a terminal.
func oneLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	line = printable(line)
	const most = 160
	if runes := []rune(line); len(runes) > most {
		line = string(runes[:most]) + "..."
	}
	return strings.TrimSpace(line)
}

// printable takes control characters out of what others wrote.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, s)
}
