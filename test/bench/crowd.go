// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/rawcalls"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// Arguments of this program when it is the crowd's one process: first it loads a
// filter as a runtime's init does, then it makes calls.
const (
	visitorRole  = "internal-visitor"
	filteredRole = "internal-visitor-filtered"
)

const crowdPolicy = `
- name: bench
  match: {}
  mode: record
`

// crowdPart lets one daemon record many containers at once. As many real ones
// would take minutes, and are not what is measured; so this program is the
// runtime here, with the code by which containerd serves NRI, and makes the
// containers' cgroups. A single process visits them one after the other and
// makes the calls of a small program in each.
func (b *bench) crowdPart(ctx context.Context) (err error) {
	size := b.opts.crowd
	nrilog.Set(quiet{})
	socket := filepath.Join(b.dir, "crowd.sock")
	seen := &metrics{plugins: make(chan int, 8)}
	none := filepath.Join(b.dir, "none")
	r, err := adaptation.New("bench", "1",
		func(ctx context.Context, synchronize adaptation.SyncCB) error {
			_, err := synchronize(ctx, nil, nil)
			return err
		},
		func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
			return nil, nil
		},
		adaptation.WithSocketPath(socket), adaptation.WithPluginPath(none), adaptation.WithPluginConfigPath(none),
		adaptation.WithMetrics(seen))
	if err != nil {
		return fmt.Errorf("nri: %w", err)
	}
	if err := r.Start(); err != nil {
		return fmt.Errorf("nri: %w", err)
	}
	defer r.Stop()
	d, err := b.startDaemon(ctx, "crowd", socket, crowdPolicy)
	if err != nil {
		return err
	}
	// Killed: a thousand recordings are not to be published.
	defer func() { err = errors.Join(err, d.close(syscall.SIGKILL)) }()
	for n := 0; n == 0; {
		select {
		case n = <-seen.plugins:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	group, err := cgroup.New("bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.Remove()) }()
	v, err := startVisitor()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	if err := b.resident(d, "crowd-rest", "another daemon, at rest"); err != nil {
		return err
	}
	before, err := d.processor()
	if err != nil {
		return err
	}
	pod := &api.PodSandbox{Id: "pod", Name: "crowd", Uid: "pod", Namespace: "bench"}
	for n := range size {
		if err := ctx.Err(); err != nil {
			return err
		}
		id := fmt.Sprintf("%064x", n)
		c := &api.Container{
			Id: id, PodSandboxId: pod.Id, Name: "crowd", Image: &api.Image{Name: "syslatch.test/crowd:1"},
			Linux: &api.LinuxContainer{CgroupsPath: "/bench/" + id},
		}
		if _, err := r.CreateContainer(ctx, &api.CreateContainerRequest{Pod: pod, Container: c}); err != nil {
			return err
		}
		path := filepath.Join(group.Path(), id)
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		if err := v.visit(path); err != nil {
			return err
		}
		c.Pid = uint32(v.cmd.Process.Pid)
		if err := r.StartContainer(ctx, &api.StartContainerRequest{Pod: pod, Container: c}); err != nil {
			return err
		}
		b.progress("crowd", n+1, size)
	}
	// The last one's first-seen events reach the journal.
	journal := func(n int) string {
		return filepath.Join(d.state, "instances", fmt.Sprintf("%064x.first-seen", n))
	}
	if err := poll(ctx, 10*time.Second, func() (bool, error) {
		st, err := os.Stat(journal(size - 1))
		return err == nil && st.Size() > 0, nil
	}); err != nil {
		return fmt.Errorf("first-seen events of the last container: %w", err)
	}
	if err := b.resident(d, "crowd", fmt.Sprintf("the same, with %d containers recorded at once", size)); err != nil {
		return err
	}
	after, err := d.processor()
	if err != nil {
		return err
	}
	// The one before the last has them all by now.
	events, err := os.ReadFile(journal(max(size-2, 0)))
	if err != nil {
		return err
	}
	each := ms(after-before) / float64(size)
	b.report.metric(each, "ms", "crowd", "processor")
	if err := d.complaint(); err != nil {
		return err
	}
	creates := d.handled(func(event string) bool { return event == "create container crowd" })
	if len(creates) != size {
		return fmt.Errorf("the daemon saw %d containers, want %d", len(creates), size)
	}
	tenth := max(size/10, 1)
	first, late := median(creates[:tenth]), median(creates[size-tenth:])
	b.report.metric(first, "ms", "crowd", "create-first-tenth")
	b.report.metric(late, "ms", "crowd", "create-last-tenth")
	seen.mu.Lock()
	defer seen.mu.Unlock()
	created, started := median(seen.trips["CreateContainer"]), median(seen.trips["StartContainer"])
	b.report.metric(created, "ms", "crowd", "create-round-trip")
	b.report.metric(started, "ms", "crowd", "start-round-trip")
	b.crowd = fmt.Sprintf("CreateContainer in mode record took the daemon %.2f ms for the first %d of the %d, %.2f ms for the last (p50). The runtime waited %.2f ms for it, and %.2f ms for StartContainer, NRI's transport included. The daemon used %.1f ms of processor time for each, with %d calls seen for the first time.",
		first, tenth, size, late, created, started, each, bytes.Count(events, []byte{'\n'}))
	return nil
}

// quiet drops NRI's log.
type quiet struct{}

func (quiet) Debugf(context.Context, string, ...any) {}
func (quiet) Infof(context.Context, string, ...any)  {}
func (quiet) Warnf(context.Context, string, ...any)  {}
func (quiet) Errorf(context.Context, string, ...any) {}

// metrics tells when a plugin takes part in requests, which is a moment after
// it has been synchronized, and how long a request took the runtime.
type metrics struct {
	plugins chan int

	mu    sync.Mutex
	trips map[string][]float64 // by operation, in milliseconds; guarded by mu
}

func (*metrics) RecordPluginInvocation(string, string, error)                               {}
func (*metrics) RecordPluginAdjustments(string, string, *api.ContainerAdjustment, int, int) {}

func (m *metrics) RecordPluginLatency(_, operation string, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.trips == nil {
		m.trips = map[string][]float64{}
	}
	m.trips[operation] = append(m.trips[operation], ms(d))
}

func (m *metrics) UpdatePluginCount(n int) {
	select {
	case m.plugins <- n:
	default: // nobody counts any more
	}
}

// visitor is the process that goes from cgroup to cgroup.
type visitor struct {
	cmd *exec.Cmd
	in  *os.File
	out *os.File
}

func startVisitor() (*visitor, error) {
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirIn.Close()
	out, theirOut, err := os.Pipe()
	if err != nil {
		in.Close()
		return nil, err
	}
	defer theirOut.Close()
	v := &visitor{cmd: exec.Command("/proc/self/exe", visitorRole), in: in, out: out}
	v.cmd.Stdin, v.cmd.Stdout, v.cmd.Stderr = theirIn, theirOut, os.Stderr
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := v.cmd.Start(); err != nil {
		in.Close()
		out.Close()
		return nil, fmt.Errorf("start visitor: %w", err)
	}
	return v, nil
}

// visit returns when the process has made its calls within a cgroup.
func (v *visitor) visit(path string) error {
	if err := os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte(strconv.Itoa(v.cmd.Process.Pid)), 0); err != nil {
		return err
	}
	if _, err := v.in.Write([]byte{'\n'}); err != nil {
		return fmt.Errorf("visitor: %w", err)
	}
	if _, err := v.out.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("visitor: %w", err)
	}
	return nil
}

func (v *visitor) close() error {
	v.in.Close()
	v.out.Close()
	return v.cmd.Wait()
}

// loadFilter is the first half of the visitor's life.
func loadFilter() error {
	return seccomp.LoadAndExec(seccomp.AllowAllFilter(), seccomp.ExecOptions{}, "/proc/self/exe", []string{os.Args[0], filteredRole}, os.Environ())
}

// visits is the second.
func visits() error {
	// On no file, so that each fails and none waits.
	var list []rawcalls.Call
	for _, nr := range []uint64{
		unix.SYS_READ, unix.SYS_WRITE, unix.SYS_CLOSE, unix.SYS_FSTAT, unix.SYS_LSEEK, unix.SYS_IOCTL, unix.SYS_PREAD64,
		unix.SYS_PWRITE64, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_DUP, unix.SYS_FCNTL, unix.SYS_FLOCK, unix.SYS_FSYNC,
		unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_GETDENTS64, unix.SYS_FCHDIR, unix.SYS_FCHMOD, unix.SYS_FCHOWN,
		unix.SYS_CONNECT, unix.SYS_ACCEPT, unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_BIND, unix.SYS_LISTEN,
		unix.SYS_GETSOCKNAME, unix.SYS_SETSOCKOPT, unix.SYS_FSTATFS, unix.SYS_EPOLL_WAIT, unix.SYS_OPENAT, unix.SYS_NEWFSTATAT,
		unix.SYS_GETPID, unix.SYS_GETPPID, unix.SYS_GETUID, unix.SYS_GETGID, unix.SYS_GETTID, unix.SYS_SCHED_YIELD,
	} {
		c := rawcalls.Call{Number: nr}
		c.Args[0] = 1<<64 - 1
		list = append(list, c)
	}
	in := bufio.NewReader(os.Stdin)
	for {
		if _, err := in.ReadByte(); err != nil {
			return nil // no more visits
		}
		rawcalls.Run(list)
		if _, err := os.Stdout.Write([]byte{'\n'}); err != nil {
			return err
		}
	}
}
