// SPDX-License-Identifier: Apache-2.0

// Command demo shows the main job with real output: a command without an engine,
// then containers on a real containerd with the plugin. `make demo` runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/test/harness"
)

const pins = "/sys/fs/bpf/syslatch-demo"

const policy = `apiVersion: syslatch.dev/v1
store: %[1]s/store
stateDir: %[1]s/state
bpffs: ` + pins + `
policies:
- name: demo
  match: {namespaces: [demo]}
  mode: record
  annotations: [mode]
  allowedModes: [record, enforce]
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	bin, err := filepath.Abs("bin")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "syslatch-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chdir(dir); err != nil {
		return err
	}
	if err := os.Setenv("PATH", bin+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	if err := command(ctx, dir); err != nil {
		return err
	}
	return containers(ctx, bin, dir)
}

func title(format string, args ...any) {
	bold, plain := "\033[1m", "\033[0m"
	if st, err := os.Stdout.Stat(); err != nil || st.Mode()&os.ModeCharDevice == 0 || os.Getenv("NO_COLOR") != "" {
		bold, plain = "", ""
	}
	fmt.Printf("\n%s== %s%s\n", bold, fmt.Sprintf(format, args...), plain)
}

// shell shows a command line and what it prints, and returns its status.
func shell(ctx context.Context, line string) (int, error) {
	fmt.Println("$", line)
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", line)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// want is shell for a line that must end with a status.
func want(ctx context.Context, status int, line string) error {
	got, err := shell(ctx, line)
	if err == nil && got != status {
		err = fmt.Errorf("%q ended with status %d, want %d", line, got, status)
	}
	return err
}

func command(ctx context.Context, dir string) error {
	title("1. Any command, with no container engine")
	if err := want(ctx, 0, `syslatch record -o app.json -- sh -c 'ls /etc | wc -l'`); err != nil {
		return err
	}
	if err := want(ctx, 0, `head -c 230 app.json; echo …`); err != nil {
		return err
	}
	if err := want(ctx, 0, `syslatch run --profile app.json -- sh -c 'ls /etc | wc -l'`); err != nil {
		return err
	}
	fmt.Println("# mkdir is not in the profile:")
	if err := want(ctx, 1, `syslatch run --profile app.json -- mkdir made`); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); err == nil {
		return errors.New("the directory was made")
	}
	return nil
}

func containers(ctx context.Context, bin, dir string) (err error) {
	title("2. containerd with the plugin")
	unmount, err := mountBPFFS()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	h, err := harness.Start(ctx, harness.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close(), bpf.Remove(pins)) }()
	image, err := harness.Busybox(dir, nil)
	if err != nil {
		return err
	}
	if err := h.Import(ctx, image); err != nil {
		return err
	}
	if err := os.WriteFile("policy.yaml", fmt.Appendf(nil, policy, dir), 0o600); err != nil {
		return err
	}
	if err := want(ctx, 0, "syslatchd --config policy.yaml --check-config"); err != nil {
		return err
	}
	fmt.Println("$ syslatchd --config policy.yaml --nri-socket", h.NRISocket, "&")
	log, err := os.Create("syslatchd.log")
	if err != nil {
		return err
	}
	defer log.Close()
	daemon := exec.Command(filepath.Join(bin, "syslatchd"), "--config", "policy.yaml", "--nri-socket", h.NRISocket)
	daemon.Stdout, daemon.Stderr = log, log
	if err := daemon.Start(); err != nil {
		return err
	}
	defer func() {
		_ = daemon.Process.Signal(syscall.SIGTERM)
		_ = daemon.Wait()
		if err != nil {
			text, _ := os.ReadFile("syslatchd.log")
			fmt.Fprintf(os.Stderr, "syslatchd's log:\n%s", text)
		}
	}()
	if err := waitFor(ctx, "syslatchd.log", "synchronized"); err != nil {
		return err
	}

	const work = "ls /bin | wc -l"
	runs := []struct {
		what, mode, script string
		want, never        string
		version            int
	}{
		{"Create 1 is recorded, and version 1 is published when it ends", "record", work, "", "", 1},
		{"Create 2 runs under version 1: the same work is allowed", "enforce", work, "", "not permitted", 0},
		{"mkdir, which run 1 never made, is denied", "enforce", "mkdir /tmp/x; " + work, "Operation not permitted", "", 0},
		{"A third run in record mode makes mkdir: version 2 is version 1 and what is new", "record", "mkdir /tmp/x; " + work, "", "not permitted", 2},
		{"Under version 2, mkdir is allowed", "enforce", "mkdir /tmp/x && echo made it; " + work, "made it", "not permitted", 0},
	}
	for _, r := range runs {
		title("%s", r.what)
		fmt.Printf("# pod annotation mode.syslatch.dev/pod: %s; container runs: %s\n", r.mode, r.script)
		result, err := h.Run(ctx,
			harness.PodOptions{Namespace: "demo", Runtime: harness.Runc15, Annotations: map[string]string{"mode.syslatch.dev/pod": r.mode}},
			harness.ContainerOptions{Command: []string{"/bin/sh", "-c", r.script}})
		if err != nil {
			return err
		}
		fmt.Print(indent(result.Log))
		if !strings.Contains(result.Log, r.want) || r.never != "" && strings.Contains(result.Log, r.never) {
			return fmt.Errorf("%s: unexpected output", r.what)
		}
		if r.version > 0 {
			if err := waitFor(ctx, "syslatchd.log", fmt.Sprintf("msg=\"version published\".*version=%d", r.version)); err != nil {
				return err
			}
			if err := showVersion(ctx, r.version); err != nil {
				return err
			}
		}
	}
	if err := want(ctx, 0, "syslatch profile list --store store"); err != nil {
		return err
	}
	title("Done. Nothing of this is left on the machine")
	return nil
}

const workload = "syslatch.test/busybox/app"

func showVersion(ctx context.Context, n int) error {
	if n == 1 {
		return want(ctx, 0, fmt.Sprintf("syslatch profile show --store store %s %d", workload, n))
	}
	s, err := store.Open("store", store.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer s.Close()
	var paths [2]string
	for i := range paths {
		if paths[i], err = s.Path(workload, n-1+i); err != nil {
			return err
		}
	}
	return want(ctx, 1, fmt.Sprintf("diff -U1 %s %s", paths[0], paths[1]))
}

func indent(s string) string {
	if s == "" {
		return ""
	}
	return "  | " + strings.ReplaceAll(strings.TrimSuffix(s, "\n"), "\n", "\n  | ") + "\n"
}

// waitFor waits until a line of a file matches, as grep -E has it.
func waitFor(ctx context.Context, path, pattern string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		if exec.CommandContext(ctx, "grep", "-qE", pattern, path).Run() == nil {
			tick.Stop()
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s never says %q", path, pattern)
		case <-tick.C:
		}
	}
}

// mountBPFFS mounts the BPF file system where it belongs, if it isn't there, as
// an init system would have.
func mountBPFFS() (unmount func() error, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/bpf", &st); err != nil {
		return nil, err
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return func() error { return nil }, nil
	}
	fmt.Println("$ mount -t bpf bpf /sys/fs/bpf")
	return func() error { return unix.Unmount("/sys/fs/bpf", 0) }, unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "")
}
