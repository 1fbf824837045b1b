// SPDX-License-Identifier: Apache-2.0

// Package harness runs a real, private containerd, or CRI-O, with NRI for tests
// and the demo: own directories and sockets, images built from what Debian has, CRI
// pods on the host's network. It leaves nothing behind.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Options of Start.
type Options struct {
	// Tools is where containerd, ctr, containerd-shim-runc-v2 and runc 1.5 are.
	// Default: SYSLATCH_TOOLS.
	Tools string
	// PrelaunchedPlugin is a binary that the runtime starts as 10-syslatch, and
	// PrelaunchedConfig its configuration.
	PrelaunchedPlugin, PrelaunchedConfig string
	// RequiredPlugins are names that the default validator insists on.
	RequiredPlugins []string
	// RequestTimeout is NRI's; default 10 s, because the guests are slow.
	RequestTimeout string
	// CRIO is the directory of crio and pinns, which run in place of containerd
	// where it is given. Default: SYSLATCH_CRIO.
	CRIO string
}

// Host is a running containerd or CRI-O.
type Host struct {
	Dir       string // everything of this host is below
	Socket    string // the runtime's
	NRISocket string
	Runtime   runtimeapi.RuntimeServiceClient
	images    runtimeapi.ImageServiceClient

	tools string
	conn  *grpc.ClientConn
	cmd   *exec.Cmd
	ended <-chan struct{} // closed when cmd has
	log   *os.File
	// load is a command that imports an image.
	load     func(ctx context.Context, i *Image) *exec.Cmd
	cgroup   string // parent of all pods, in every hierarchy
	pods     []*Pod
	imported map[string]bool // by the image's name
	counter  atomic.Int64    // of pods and containers
}

// Runtimes that a pod can name as its handler.
const (
	Runc11 = "runc"   // Debian's, 1.1.5
	Runc15 = "runc15" // 1.5.2, built from source
)

const configTemplate = `version = 3
root = %[1]q
state = %[2]q
[grpc]
  address = %[3]q
[ttrpc]
  address = %[4]q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'syslatch.test/pause:1'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    BinaryName = '/usr/sbin/runc'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc15]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc15.options]
    BinaryName = %[5]q
[plugins.'io.containerd.nri.v1.nri']
  disable = false
  socket_path = %[6]q
  plugin_path = %[7]q
  plugin_config_path = %[8]q
  plugin_request_timeout = %[9]q
  [plugins.'io.containerd.nri.v1.nri'.default_validator]
    enable = %[10]t
    required_plugins = [%[11]s]
`

// Prefix begins the names of this process's hosts: of their directories, and of
// their cgroups.
func Prefix() string { return fmt.Sprintf("syslatch-host-%d-", os.Getpid()) }

// Start starts the runtime and waits until it answers. Close must be called.
func Start(ctx context.Context, o Options) (_ *Host, err error) {
	if o.Tools == "" {
		o.Tools = os.Getenv("SYSLATCH_TOOLS")
	}
	if o.CRIO == "" {
		o.CRIO = os.Getenv("SYSLATCH_CRIO")
	}
	if o.Tools == "" {
		return nil, errors.New("SYSLATCH_TOOLS names no directory with containerd (make deps builds it)")
	}
	if o.RequestTimeout == "" {
		o.RequestTimeout = "10s"
	}
	dir, err := os.MkdirTemp("", Prefix())
	if err != nil {
		return nil, err
	}
	h := &Host{
		Dir: dir, tools: o.Tools,
		Socket:    filepath.Join(dir, "c.sock"),
		NRISocket: filepath.Join(dir, "nri.sock"),
		cgroup:    "/" + filepath.Base(dir),
		imported:  map[string]bool{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	for _, d := range []string{"plugins", "conf.d", "logs"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if o.PrelaunchedPlugin != "" {
		if err := copyFile(o.PrelaunchedPlugin, filepath.Join(dir, "plugins", "10-syslatch"), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "conf.d", "10-syslatch.conf"), []byte(o.PrelaunchedConfig), 0o600); err != nil {
			return nil, err
		}
	}
	configure := h.containerd
	if o.CRIO != "" {
		configure = h.crio
	}
	if h.cmd, err = configure(o); err != nil {
		return nil, err
	}
	if h.log, err = os.Create(filepath.Join(dir, logName)); err != nil {
		return nil, err
	}
	if err := h.launch(); err != nil {
		return nil, err
	}
	h.conn, err = grpc.NewClient("unix://"+h.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	h.Runtime = runtimeapi.NewRuntimeServiceClient(h.conn)
	h.images = runtimeapi.NewImageServiceClient(h.conn)
	err = h.ready(ctx)
	if err != nil {
		return nil, err
	}
	pause, err := Pause(dir)
	if err != nil {
		return nil, err
	}
	return h, h.Import(ctx, pause)
}

// launch starts the runtime's process.
func (h *Host) launch() error {
	h.cmd.Stdout, h.cmd.Stderr = h.log, h.log
	if err := h.cmd.Start(); err != nil {
		return fmt.Errorf("start the runtime: %w", err)
	}
	cmd, ended := h.cmd, make(chan struct{})
	h.ended = ended
	go func() { _ = cmd.Wait(); close(ended) }() // the log tells why
	return nil
}

// ready waits until the runtime answers, or has ended.
func (h *Host) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	go func() {
		select {
		case <-h.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := until(ctx, func() error {
		_, err := h.Runtime.Version(ctx, &runtimeapi.VersionRequest{})
		return err
	})
	if err != nil {
		return fmt.Errorf("the runtime doesn't answer: %w\n%s", err, h.LogTail(40))
	}
	return nil
}

const logName = "runtime.log"

// containerd writes its configuration.
func (h *Host) containerd(o Options) (*exec.Cmd, error) {
	config := fmt.Sprintf(configTemplate,
		filepath.Join(h.Dir, "root"), filepath.Join(h.Dir, "state"), h.Socket, h.Socket+".ttrpc",
		filepath.Join(o.Tools, "runc"), h.NRISocket, filepath.Join(h.Dir, "plugins"), filepath.Join(h.Dir, "conf.d"), o.RequestTimeout,
		len(o.RequiredPlugins) > 0, quoted(o.RequiredPlugins))
	path := filepath.Join(h.Dir, "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return nil, err
	}
	h.load = func(ctx context.Context, i *Image) *exec.Cmd {
		return exec.CommandContext(ctx, filepath.Join(h.tools, "ctr"), "--address", h.Socket, "--namespace", "k8s.io", "images", "import", i.Archive)
	}
	cmd := exec.Command(filepath.Join(o.Tools, "containerd"), "--config", path, "--log-level", "debug")
	cmd.Env = append(os.Environ(), "PATH="+o.Tools+":"+os.Getenv("PATH")) // finds its shim
	return cmd, nil
}

// quoted lists strings as TOML does between brackets.
func quoted(list []string) string {
	var out []string
	for _, s := range list {
		out = append(out, strconv.Quote(s))
	}
	return strings.Join(out, ", ")
}

// until tries again, less and less often, until try succeeds or ctx ends: each try
// takes time from what is waited for, much of it in an emulated guest. Neither
// containerd's readiness nor a container's state has an event that a CRI client could
// wait for without missing some.
func until(ctx context.Context, try func() error) error {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

// Import loads an image's archive, if it isn't there yet.
func (h *Host) Import(ctx context.Context, i *Image) error {
	if h.imported[i.Name] {
		return nil
	}
	cmd := h.load(ctx, i)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("import %s: %w\n%s", i.Name, err, out)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err := until(ctx, func() error {
		r, err := h.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: i.Name}})
		if err == nil && r.GetImage() == nil {
			return fmt.Errorf("image %s is not there yet", i.Name)
		}
		return err
	})
	if err == nil {
		h.imported[i.Name] = true
	}
	return err
}

// LogTail is the end of the runtime's log.
func (h *Host) LogTail(lines int) string {
	data, err := os.ReadFile(filepath.Join(h.Dir, logName))
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Restart stops the runtime and starts it again; containers go on.
func (h *Host) Restart(ctx context.Context) error {
	if err := h.stop(); err != nil {
		return err
	}
	old := h.cmd
	h.cmd = exec.Command(old.Path, old.Args[1:]...)
	h.cmd.Env = old.Env
	if err := h.launch(); err != nil {
		return err
	}
	return h.ready(ctx)
}

func (h *Host) stop() error {
	if h.cmd == nil || h.cmd.Process == nil {
		return nil
	}
	_ = h.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-h.ended:
	case <-time.After(20 * time.Second):
		_ = h.cmd.Process.Kill()
		<-h.ended
	}
	return nil
}

// RemovePods removes all pods.
func (h *Host) RemovePods() error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	var errs []error
	for _, p := range slices.Clone(h.pods) {
		errs = append(errs, p.Remove(ctx))
	}
	return errors.Join(errs...)
}

// Close removes all pods, stops the runtime, and takes away what is left: shims,
// mounts, cgroups, files.
func (h *Host) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	var errs []error
	if h.conn != nil {
		errs = append(errs, h.RemovePods())
		h.conn.Close()
	}
	errs = append(errs, h.stop())
	// Shims end by themselves, a moment after their last container; what
	// doesn't is killed.
	errs = append(errs, until(ctx, func() error {
		left, err := killByArgument("containerd-shim-runc-v2", h.Socket)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("shims %v are still there", left)
		}
		return err
	}))
	errs = append(errs, unmountBelow(h.Dir), removeCgroups(h.cgroup))
	if h.log != nil {
		h.log.Close()
	}
	errs = append(errs, os.RemoveAll(h.Dir))
	return errors.Join(errs...)
}

// killByArgument kills the processes of a program that have an argument; the
// argument is a path of ours, so they are ours.
func killByArgument(program, argument string) (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue // ended
		}
		args := strings.Split(string(data), "\x00")
		if filepath.Base(args[0]) == program && slices.Contains(args, argument) {
			pids = append(pids, pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	return pids, nil
}

func unmountBelow(dir string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for _, line := range strings.Split(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	slices.Reverse(points)
	var errs []error
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// removeCgroups removes our parent group in every hierarchy, with what is in it.
func removeCgroups(name string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	for _, line := range strings.Split(string(data), "\n") {
		before, after, _ := strings.Cut(line, " - ")
		f := strings.Fields(before)
		if len(f) < 5 || !strings.HasPrefix(after, "cgroup") {
			continue
		}
		top := f[4] + name
		var dirs []string
		_ = filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil // removed meanwhile, or never there
		})
		slices.Reverse(dirs)
		for _, d := range dirs {
			killGroup(d)
			// The kernel counts a killed process out a moment after its end.
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			err := until(ctx, func() error {
				if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
					return err
				}
				return nil
			})
			cancel()
			if err != nil {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", d, err))
			}
		}
	}
	return errors.Join(errs...)
}

// killGroup kills what is in one of our groups: a killed shim leaves its pause
// container behind.
func killGroup(dir string) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return // removed meanwhile
	}
	for _, f := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have ended: rmdir tells
		}
	}
}

func copyFile(from, to string, mode os.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, mode)
}

// parseLog strips the CRI log format: "TIME STREAM TAG TEXT".
func parseLog(data []byte) string {
	var out bytes.Buffer
	for _, line := range bytes.SplitAfter(data, []byte("\n")) {
		parts := bytes.SplitN(line, []byte(" "), 4)
		if len(parts) < 4 {
			continue
		}
		text := parts[3]
		if string(parts[2]) == "P" {
			text = bytes.TrimSuffix(text, []byte("\n"))
		}
		out.Write(text)
	}
	return out.String()
}
