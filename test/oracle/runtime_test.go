// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// ociRuntime is a runtime and how to call it here.
type ociRuntime struct {
	name   string
	prefix []string // of every command line, the program included
	goes   bool     // it is a Go program
}

// ociRuntimes are the three that recording is meant for. Which one is missing
// the error says.
func ociRuntimes(t *testing.T) []ociRuntime {
	t.Helper()
	tools := os.Getenv("SYSLATCH_TOOLS")
	if tools == "" {
		t.Fatal("SYSLATCH_TOOLS names no directory with runc 1.5 (make deps builds it)")
	}
	all := []ociRuntime{
		{"runc-1.1", []string{"/usr/sbin/runc"}, true},
		{"runc-1.5", []string{filepath.Join(tools, "runc")}, true},
		{"crun", []string{"/usr/bin/crun"}, false},
	}
	for i, rt := range all {
		version, err := exec.Command(rt.prefix[0], "--version").Output()
		if err != nil {
			t.Fatalf("%s: %v: apt-get install runc crun, make deps", rt.prefix[0], err)
		}
		words := strings.Fields(string(version))
		if got := strings.Join(words[:3], " "); !strings.HasPrefix(got, strings.ReplaceAll(rt.name, "-", " version ")) && rt.goes {
			t.Fatalf("%s is %s, want %s", rt.prefix[0], got, rt.name)
		}
		if rt.name == "crun" {
			all[i].prefix = append(crunView(t), rt.prefix...)
		}
	}
	return all
}

// crunView is what crun is to be run by. It refuses a hybrid hierarchy, so there
// it gets to see the cgroup2 tree alone, in a mount namespace.
func crunView(t *testing.T) []string {
	t.Helper()
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if h.Mode == cgroup.V2 {
		return nil
	}
	return []string{
		"unshare", "--mount", "--propagation", "private", "/bin/sh", "-c",
		`mount --bind "$0" /sys/fs/cgroup && exec "$@"`, h.Unified,
	}
}

// command is a runtime's command line, with its state in the bundle.
func (rt ociRuntime) command(b *bundle, args ...string) []string {
	return slices.Concat(rt.prefix, []string{"--root", filepath.Join(b.dir, "state")}, args)
}

// bundle is an OCI bundle with the program forms in it.
type bundle struct {
	t   *testing.T
	rt  ociRuntime
	dir string
	nnp bool
	id  string // of the latest container; its cgroup's name too
}

var containers atomic.Int32

func newBundle(t *testing.T, rt ociRuntime, nnp bool) *bundle {
	t.Helper()
	b := &bundle{t: t, rt: rt, dir: t.TempDir(), nnp: nnp}
	for _, d := range []string{"proc", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(b.dir, "rootfs", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(programs, "forms"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "rootfs", "forms"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	return b
}

// capabilities are docker's default.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE",
	"CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// configure writes the spec of a new container that runs a form.
func (b *bundle) configure(profile *specs.LinuxSeccomp, form string) {
	b.t.Helper()
	b.id = fmt.Sprintf("%s%d", cgroupPrefix(), containers.Add(1))
	var namespaces []specs.LinuxNamespace
	for _, n := range []specs.LinuxNamespaceType{specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.MountNamespace} {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: n})
	}
	spec := specs.Spec{
		Version: "1.0.2", // crun 1.8 knows no later one
		Process: &specs.Process{
			Args: []string{"/forms", form}, Env: []string{"PATH=/"}, Cwd: "/", NoNewPrivileges: b.nnp,
			Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
		},
		Root:     &specs.Root{Path: "rootfs", Readonly: true},
		Hostname: "oracle",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		},
		Linux: &specs.Linux{
			Namespaces: namespaces, CgroupsPath: "/" + b.id, Seccomp: profile,
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
		},
	}
	data, err := json.Marshal(spec)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "config.json"), data, 0o600); err != nil {
		b.t.Fatal(err)
	}
	id := b.id
	b.t.Cleanup(func() { b.remove(id) })
}

// remove undoes what a container left that didn't end as it should.
func (b *bundle) remove(id string) {
	if _, err := os.Stat(filepath.Join(b.dir, "state", id)); err == nil {
		args := b.rt.command(b, "delete", "--force", id)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			b.t.Errorf("delete %s: %v: %s", id, err, out)
		}
	}
	left, err := leftovers()
	if err != nil {
		b.t.Error(err)
	}
	for _, dir := range left {
		if filepath.Base(dir) == id {
			// crun leaves its cgroup behind where the start failed, empty by now.
			if err := unix.Rmdir(dir); err != nil {
				b.t.Errorf("rmdir %s: %v", dir, err)
			}
		}
	}
}

// run is the command line that runs the container.
func (b *bundle) run() []string { return b.rt.command(b, "run", "--bundle", b.dir, b.id) }

// runTimeout bounds one container; the guest is some ten times slower.
const runTimeout = time.Minute

// start runs the container without strace.
func (b *bundle) start() (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), runTimeout)
	defer cancel()
	args := b.run()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("no end after %s: %w", runTimeout, ctx.Err())
	}
	return out.String(), err
}

// recorder is in this process alone.
func recorder(t *testing.T) *bpf.Recorder {
	t.Helper()
	r, err := bpf.Open("", bpf.Options{NoPin: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// await records the bundle's next container as the daemon does.
func (b *bundle) await(r *bpf.Recorder, base int) bpf.Handle {
	b.t.Helper()
	h, err := r.Await(b.id, bpf.TrackOptions{Gate: bpf.GateFilter, BaseFilters: base})
	if err != nil {
		b.t.Fatal(err)
	}
	return h
}

// finish returns the calls, and fails on any loss.
func (b *bundle) finish(r *bpf.Recorder, h bpf.Handle) map[call]bool {
	b.t.Helper()
	s, err := r.Untrack(h)
	if err != nil {
		b.t.Fatal(err)
	}
	if s.RootCgroup == 0 {
		b.t.Errorf("no cgroup of the name %s was made", b.id)
	}
	if (s.Losses != bpf.Losses{}) || len(s.OddCalls) > 0 {
		b.t.Errorf("lost: %+v, odd calls %v", s.Losses, s.OddCalls)
	}
	set := map[call]bool{}
	for _, c := range s.Calls {
		for _, nr := range c.Numbers {
			set[call{abis[c.ABI], uint32(nr)}] = true
		}
	}
	return set
}

var abis = map[bpf.ABI]profiles.ABI{bpf.ABIX8664: x64, bpf.ABII386: i386, bpf.ABIX32: x32}

// names are those of recorded calls, which must all be x86_64's.
func names(t *testing.T, recorded map[call]bool) []string {
	t.Helper()
	var all []string
	for c := range recorded {
		name, ok := seccomp.Name(c.abi, c.nr)
		if !ok || c.abi != x64 {
			t.Errorf("recorded %s, which the container doesn't call", c)
			continue
		}
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// allowAll is what a container in record mode gets.
func allowAll() *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{x64, i386, x32}}
}

// forEachRuntime runs a test for each runtime, with and without no_new_privs:
// without it the filter is loaded early, and the runtime calls more under it.
func forEachRuntime(t *testing.T, test func(*testing.T, *bundle)) {
	for _, rt := range ociRuntimes(t) {
		for _, nnp := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/no_new_privs=%t", rt.name, nnp), func(t *testing.T) { test(t, newBundle(t, rt, nnp)) })
		}
	}
}

// The runtime's work before it loads the filter, some of it in every runtime:
// recorded, these would be what the gate is there to keep out.
var before = []string{"mount", "mount_setattr", "pivot_root", "sethostname", "setns", "unshare", "umount2", "mknodat"}

func checkGate(t *testing.T, got []string) {
	t.Helper()
	for _, name := range got {
		if slices.Contains(before, name) {
			t.Errorf("recorded %s, which the runtime called before it loaded the filter", name)
		}
	}
	for _, name := range []string{"execve", "exit_group"} {
		if !slices.Contains(got, name) {
			t.Errorf("no %s in %v", name, got)
		}
	}
}

// Under each runtime exactly that is recorded which is called under the filter:
// by strace's account, and by the kernel's, which ends the container at the
// first call that isn't allowed.
func TestRuntimeGate(t *testing.T) {
	forEachRuntime(t, func(t *testing.T, b *bundle) {
		r := recorder(t)
		b.configure(allowAll(), "steady")
		h := b.await(r, ownFilters)
		tr, out := strace(t, ownFilters, b.run()...)
		got := b.finish(r, h)
		tr.compare(t, got)
		if !strings.Contains(out, "steady") {
			t.Errorf("output: %s", out)
		}
		checkGate(t, names(t, got))

		// Once more without a tracer's delays.
		b.configure(allowAll(), "steady")
		h = b.await(r, ownFilters)
		if out, err := b.start(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		recorded := names(t, b.finish(r, h))
		checkGate(t, recorded)
		t.Logf("%d calls recorded: %s", len(recorded), strings.Join(recorded, " "))

		t.Run("enforced", func(t *testing.T) { b.enforced(t, recorded) })
		t.Run("one call less", func(t *testing.T) { b.oneLess(t, recorded) })
	})
}

// version is what the product makes of the recording.
func (b *bundle) version(t *testing.T, recorded []string) *specs.LinuxSeccomp {
	t.Helper()
	rec := &profiles.Recording{
		SchemaVersion: 1, ID: b.id, Workload: "oracle", Kernel: seccomp.KernelRelease(), Gate: profiles.GateFilter,
		Started: time.Now(), Ended: time.Now(),
		Phases: map[string]profiles.Calls{profiles.DefaultPhase: {x64: recorded}},
	}
	v, _, err := profiles.Merge(nil, rec, profiles.MergeOptions{
		NewerThanKernel: seccomp.NewerThan(rec.Kernel), Incidental: b.rt.goes, Created: rec.Ended,
	})
	if err != nil {
		t.Fatal(err)
	}
	return v.Profile
}

// strict makes every denial the end of the process, so that none passes
// unseen.
func strict(p *specs.LinuxSeccomp, without ...string) *specs.LinuxSeccomp {
	s := *p
	s.DefaultAction, s.DefaultErrnoRet, s.Syscalls = specs.ActKillProcess, nil, nil
	for _, rule := range p.Syscalls {
		if rule.Action != specs.ActAllow {
			continue
		}
		rule.Names = slices.DeleteFunc(slices.Clone(rule.Names), func(n string) bool { return slices.Contains(without, n) })
		if len(rule.Names) > 0 {
			s.Syscalls = append(s.Syscalls, rule)
		}
	}
	// runc answers ENOSYS to numbers above the highest that a profile names. So
	// that there is none below which a call could hide, one that nobody makes.
	s.Syscalls = append(s.Syscalls, specs.LinuxSyscall{Names: []string{"futex_waitv"}, Action: specs.ActAllow})
	return &s
}

func (b *bundle) enforced(t *testing.T, recorded []string) {
	profile := b.version(t, recorded)
	for i := range 5 {
		for name, p := range map[string]*specs.LinuxSeccomp{"as it is": profile, "with a kill for every denial": strict(profile)} {
			b.configure(p, "steady")
			if out, err := b.start(); err != nil || !strings.Contains(out, "steady") {
				t.Errorf("run %d under the recorded profile, %s: %v: %s", i, name, err, out)
			}
		}
	}
}

func (b *bundle) oneLess(t *testing.T, recorded []string) {
	profile := b.version(t, recorded)
	for _, name := range recorded {
		// These may be called at any time or never.
		if b.rt.goes && slices.Contains(profiles.Incidental(), name) {
			continue
		}
		b.configure(strict(profile, name), "steady")
		if out, err := b.start(); err == nil {
			t.Errorf("without %s it still runs: %s", name, out)
		}
	}
}

// announced tells when a word has been written to it.
type announced struct {
	text []byte
	word string
	seen chan struct{}
}

func (a *announced) Write(p []byte) (int, error) {
	had := bytes.Contains(a.text, []byte(a.word))
	a.text = append(a.text, p...)
	if !had && bytes.Contains(a.text, []byte(a.word)) {
		close(a.seen)
	}
	return len(p), nil
}

// What a runtime executes in the container later is recorded, and what its
// helper does to get in there is not.
func TestRuntimeExec(t *testing.T) {
	forEachRuntime(t, func(t *testing.T, b *bundle) {
		r, base := recorder(t), ownFilters
		b.configure(allowAll(), "waits")
		h := b.await(r, base)
		stdin, release, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		defer release.Close()
		type result struct {
			tr  trace
			err error
		}
		first := make(chan result, 1)
		out := &announced{word: "waits", seen: make(chan struct{})}
		go func() {
			tr, err := tryStrace(t.Context(), base, stdin, out, b.run()...)
			first <- result{tr, err}
		}()
		select {
		case <-out.seen:
		case res := <-first:
			t.Fatalf("the container ended: %v: %s", res.err, out.text)
		}
		helper, text := strace(t, base, b.rt.command(b, "exec", b.id, "/forms", "rusage")...)
		if err := release.Close(); err != nil {
			t.Fatal(err)
		}
		res := <-first
		if res.err != nil {
			t.Fatalf("%v: %s", res.err, out.text)
		}
		got := b.finish(r, h)
		append(res.tr, helper...).compare(t, got)
		all := names(t, got)
		checkGate(t, all)
		if !slices.Contains(all, "getrusage") {
			t.Errorf("no getrusage, which the executed program calls, in %v: %s", all, text)
		}
		for _, e := range res.tr {
			if e.name == "getrusage" {
				t.Error("the container's first program calls getrusage: the test shows nothing")
			}
		}
	})
}

// A filter that the runtime was started under, as a service manager does with
// SystemCallFilter=, is not the container's.
func TestRuntimeUnderFilter(t *testing.T) {
	forEachRuntime(t, func(t *testing.T, b *bundle) {
		outer := filepath.Join(b.dir, "outer.json")
		data, err := profiles.EncodeProfile(allowAll())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(outer, data, 0o600); err != nil {
			t.Fatal(err)
		}
		under := func() []string {
			return append([]string{filepath.Join(programs, "syslatch"), "run", "--profile", outer, "--"}, b.run()...)
		}
		r, base := recorder(t), ownFilters
		b.configure(allowAll(), "steady")
		h := b.await(r, base+1)
		tr, _ := strace(t, base+1, under()...)
		got := b.finish(r, h)
		tr.compare(t, got)
		checkGate(t, names(t, got))

		// Taken for none, the outer filter opens the gate for all that the runtime
		// does in the container's cgroup: that is what the base is for.
		b.configure(allowAll(), "steady")
		h = b.await(r, base)
		if out, err := run(t, under()); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		early := names(t, b.finish(r, h))
		if !slices.ContainsFunc(early, func(n string) bool { return slices.Contains(before, n) }) {
			t.Errorf("with a base too low nothing of %v was recorded, so the outer filter was not there: %v", before, early)
		}
	})
}

// What an enforcing filter denies doesn't reach the recorder: an attempt can't
// widen a profile.
func TestDeniedCallsAreNotRecorded(t *testing.T) {
	forEachRuntime(t, func(t *testing.T, b *bundle) {
		profile := allowAll()
		profile.Syscalls = []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActErrno}}
		r, base := recorder(t), ownFilters
		b.configure(profile, "steady")
		h := b.await(r, base)
		var out bytes.Buffer
		tr, err := tryStrace(t.Context(), base, nil, &out, b.run()...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || !strings.Contains(out.String(), "mkdir") {
			t.Errorf("%v: %s, want the program's complaint", err, out.String())
		}
		attempt := slices.IndexFunc(tr, func(e entry) bool { return e.name == "mkdir" })
		if attempt < 0 || tr[attempt].ok() {
			t.Fatal("strace saw no denied mkdir")
		}
		got := b.finish(r, h)
		if got[tr[attempt].call] {
			t.Error("a denied mkdir was recorded")
		}
		tr = slices.DeleteFunc(tr, func(e entry) bool { return e.call == tr[attempt].call })
		tr.compare(t, got)
	})
}

func run(t *testing.T, args []string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	return string(out), err
}
