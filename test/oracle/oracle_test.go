// SPDX-License-Identifier: Apache-2.0

// Package oracle holds the recorder against strace and against the kernel's own
// enforcement: what `syslatch record` and the recorder under real runtimes saw
// is what strace saw in the same run, call by call and ABI by ABI, and what a
// filter must allow for the same run to succeed.
//
// SYSLATCH_TEST_BIN names a directory with syslatch and the workloads, which are
// built where it is not set; SYSLATCH_TOOLS one with runc 1.5.
package oracle

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// Set by TestMain, read by all.
var (
	programs   string // directory of syslatch and the workloads
	ownFilters int    // seccomp filters that a child of this process starts with
)

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "oracle:", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (_ int, err error) {
	if os.Getuid() != 0 {
		fmt.Println("skipped: recording and tracing need root")
		return 0, nil
	}
	if programs = os.Getenv("SYSLATCH_TEST_BIN"); programs == "" {
		if programs, err = os.MkdirTemp("", "syslatch-oracle-"); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(programs)) }()
		if err := build(programs); err != nil {
			return 0, err
		}
	}
	own, err := cgroup.Status(os.Getpid())
	if err != nil {
		return 1, err
	}
	ownFilters = own.SeccompFilters
	code := m.Run()
	left, err := leftovers()
	for _, l := range left {
		fmt.Fprintln(os.Stderr, "left behind:", l)
		code = 1
	}
	return code, err
}

// build is what the Makefile's testbin does.
func build(dir string) error {
	for _, args := range [][]string{
		{"go", "build", "-o", dir + "/", "../../cmd/syslatch", "../workloads/allcalls"},
		{"gcc", "-O1", "-static", "-o", dir + "/forms", "../workloads/forms/forms.c"},
		{"gcc", "-m32", "-O1", "-ffreestanding", "-fno-pic", "-no-pie", "-nostdlib", "-static", "-o", dir + "/compat", "../workloads/compat/compat.c"},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(args, " "), err)
		}
	}
	return nil
}

// leftovers are the cgroups of ours, in all hierarchies.
func leftovers() ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var all []string
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 3 || !strings.HasPrefix(f[2], "cgroup") {
			continue
		}
		left, err := filepath.Glob(filepath.Join(f[1], cgroupPrefix()+"*"))
		if err != nil {
			return nil, err
		}
		all = append(all, left...)
	}
	return all, nil
}

// cgroupPrefix starts the names of this run's cgroups.
func cgroupPrefix() string { return fmt.Sprintf("syslatch-oracle-%d-", os.Getpid()) }

const (
	x64  = specs.ArchX86_64
	i386 = specs.ArchX86
	x32  = specs.ArchX32
)

func TestRecordSeesWhatStraceSees(t *testing.T) {
	form := func(args ...string) []string { return append([]string{filepath.Join(programs, "forms")}, args...) }
	allcalls := func(abi string) []string { return []string{filepath.Join(programs, "allcalls"), abi} }
	hierarchy, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		command []string
		// needs are calls without which the run wasn't what it should have been.
		needs map[profiles.ABI]string
		// least is how many calls there must be at least.
		least int
		// losses that there must be, and no others.
		losses []profiles.LossKind
		// denied are calls that a filter of the program's own denied: strace
		// stands before filters, the recorder behind.
		denied []string
		// enforce: the calls are the same on every run, so that the command must
		// run as well under its own profile.
		enforce bool
	}{
		"true":                 {command: []string{"/bin/true"}, least: 10, enforce: true},
		"shell with children":  {command: []string{"/bin/sh", "-c", `for i in 1 2 3; do ls / | wc -l; done; (cd /tmp && mkdir -p "$0" && rmdir "$0")`, "syslatch-oracle-dir"}, needs: map[profiles.ABI]string{x64: "mkdir rmdir getdents64 pipe2 execve"}, enforce: true},
		"background process":   {command: []string{"/bin/sh", "-c", "(sleep 0.2; date) & exit 0"}, least: 20},
		"perl, sockets, forks": {command: []string{"/usr/bin/perl", "-e", `use Socket; socket(my $s, AF_INET, SOCK_STREAM, 0); my $p = fork // die; exec "id" unless $p; waitpid $p, 0; kill 0, $$; getppid; times`}, needs: map[profiles.ABI]string{x64: "socket kill times getppid"}},
		"Go, with threads":     {command: []string{filepath.Join(programs, "syslatch"), "version"}, needs: map[profiles.ABI]string{x64: "clone3 sigaltstack"}},

		// Each kind of task makes a call that no other one does.
		"fork, vfork, clone, clone3": {command: form("forks"), needs: map[profiles.ABI]string{x64: "fork getpgrp vfork getsid clone getresuid clone3 getresgid getpriority"}, enforce: true},
		"threads":                    {command: form("threads"), needs: map[profiles.ABI]string{x64: "sched_get_priority_max sched_get_priority_min sched_getparam sched_rr_get_interval exit sched_getscheduler exit_group"}},
		"execve from a thread":       {command: form("threadexec"), needs: map[profiles.ABI]string{x64: "times execve getrusage"}},
		"signals":                    {command: form("signals"), needs: map[profiles.ABI]string{x64: "rt_sigreturn getitimer restart_syscall rt_sigsuspend alarm pause getcpu"}},
		"execve that fails":          {command: form("execs"), needs: map[profiles.ABI]string{x64: "execve execveat vfork getrusage"}, enforce: true},
		"exit and exit_group":        {command: form("ends"), needs: map[profiles.ABI]string{x64: "exit wait4"}, enforce: true},
		"exit_group alone":           {command: form("rusage"), needs: map[profiles.ABI]string{x64: "exit_group"}, enforce: true},
		"orphans":                    {command: form("orphans"), needs: map[profiles.ABI]string{x64: "setsid sysinfo getgroups"}, enforce: true},
		"pid and user namespaces":    {command: form("namespaces"), needs: map[profiles.ABI]string{x64: "unshare getpgrp"}, enforce: true},
		"nested cgroup":              {command: form("nested", hierarchy.Unified), needs: map[profiles.ABI]string{x64: "mkdir getpgrp"}},

		// rt_sigaction and writev are what i386's time and getpid would be misnamed.
		"int 0x80, x32 numbers": {command: form("abis"), needs: map[profiles.ABI]string{x64: "ioctl clone", i386: "getpid time ioctl getppid fork getpgrp exit_group", x32: "getpid ioctl"}, enforce: true},
		"a 32-bit program":      {command: []string{filepath.Join(programs, "compat"), filepath.Join(programs, "forms"), "rusage"}, needs: map[profiles.ABI]string{i386: "getppid getgid32 fork getpgrp exit waitpid execve", x64: "getrusage exit_group"}, enforce: true},

		"every x86_64 call":   {command: allcalls("x86_64"), least: 430, losses: []profiles.LossKind{profiles.LossUnresolved}},
		"every i386 call":     {command: allcalls("i386"), least: 480, losses: []profiles.LossKind{profiles.LossUnresolved}},
		"every x32 call":      {command: allcalls("x32"), least: 480, losses: []profiles.LossKind{profiles.LossUnresolved}},
		"no such number":      {command: allcalls("beyond"), least: 30, losses: []profiles.LossKind{profiles.LossUnresolved, profiles.LossOutOfRange}},
		"uprobes' own calls":  {command: form("uprobes"), least: 10, losses: []profiles.LossKind{profiles.LossUnresolved}},
		"a filter of its own": {command: form("ownfilter"), needs: map[profiles.ABI]string{x64: "seccomp times"}, denied: []string{"getpgrp"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			recording := filepath.Join(dir, "recording.json")
			command := append([]string{
				filepath.Join(programs, "syslatch"), "record", "-o", filepath.Join(dir, "profile.json"),
				"--recording", recording, "--allow-losses", "--",
			}, tt.command...)
			tr, out := strace(t, ownFilters, command...)
			data, err := os.ReadFile(recording)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			var rec profiles.Recording
			if err := json.Unmarshal(data, &rec); err != nil {
				t.Fatal(err)
			}
			tr = slices.DeleteFunc(tr, func(e entry) bool { return slices.Contains(tt.denied, e.name) && e.result != "" && !e.ok() })
			tr.compare(t, firstSeen(&rec))
			checkNames(t, tr, &rec)
			checkFirstSeen(t, tr, &rec)
			checkArguments(t, tr, &rec)
			checkLosses(t, &rec, tt.losses)

			calls := rec.All()
			for abi, names := range tt.needs {
				for name := range strings.FieldsSeq(names) {
					if !slices.Contains(calls[abi], name) {
						t.Errorf("no %s under %s: the run wasn't what it should have been", name, abi)
					}
				}
			}
			if n := len(tr.set(true)); n < tt.least {
				t.Errorf("strace saw %d calls, want at least %d", n, tt.least)
			}
			if tt.enforce {
				under := []string{filepath.Join(programs, "syslatch"), "run", "--profile", filepath.Join(dir, "profile.json"), "--"}
				if out, err := run(t, append(under, tt.command...)); err != nil {
					t.Errorf("under its own profile: %v\n%s", err, out)
				}
			}
			for abi := range calls {
				if tt.needs[abi] == "" && tt.needs != nil {
					t.Errorf("calls under %s, which the command didn't make: %v", abi, calls[abi])
				}
			}
		})
	}
}

// firstSeen is the calls of the first-seen events, one for each that the kernel
// has a bit for.
func firstSeen(rec *profiles.Recording) map[call]bool {
	set := map[call]bool{}
	for _, f := range rec.FirstSeen {
		set[call{f.Call.ABI, f.Call.Number}] = true
	}
	return set
}

// checkNames holds the recorded sets, which have names, against the numbers, and
// the names against strace's.
func checkNames(t *testing.T, tr trace, rec *profiles.Recording) {
	t.Helper()
	want, unresolved := profiles.Calls{}, []profiles.Call{}
	for _, f := range rec.FirstSeen {
		switch name, ok := seccomp.Name(f.Call.ABI, f.Call.Number); {
		case ok:
			want[f.Call.ABI] = append(want[f.Call.ABI], name)
		case f.Call.Number < 1024:
			unresolved = append(unresolved, f.Call)
		}
	}
	for abi, names := range want {
		slices.Sort(names)
		want[abi] = slices.Compact(names)
	}
	got := rec.All()
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("names of what was seen first and of what was recorded (-seen +recorded):\n%s", diff)
	}
	slices.SortFunc(unresolved, func(a, b profiles.Call) int {
		return cmp.Or(strings.Compare(string(a.ABI), string(b.ABI)), cmp.Compare(a.Number, b.Number))
	})
	if !slices.Equal(unresolved, rec.Unresolved) {
		t.Errorf("calls without a name: %v seen first, %v recorded", unresolved, rec.Unresolved)
	}
	for _, e := range tr {
		name, ok := seccomp.Name(e.abi, e.nr)
		// The two end at different kernels, so one may know what the other doesn't.
		if ok && !strings.HasPrefix(e.name, "syscall_") && e.name != name {
			t.Errorf("%s is %s, and %s to strace", e.call, name, e.name)
		}
	}
}

// checkFirstSeen wants each event once, of a thread that made the call.
func checkFirstSeen(t *testing.T, tr trace, rec *profiles.Recording) {
	t.Helper()
	seen := map[call]bool{}
	for _, f := range rec.FirstSeen {
		c := call{f.Call.ABI, f.Call.Number}
		if seen[c] {
			t.Errorf("%s was seen first twice", c)
		}
		seen[c] = true
		if !slices.ContainsFunc(tr, func(e entry) bool { return e.call == c && e.thread == int(f.PID) }) {
			t.Errorf("%s was seen first of thread %d, which didn't make it", c, f.PID)
		}
		if f.Comm == "" || f.Exe == "" {
			t.Errorf("%s was seen first of comm %q, executable %q", c, f.Comm, f.Exe)
		}
	}
}

// checkArguments holds the kept values against those that strace saw.
func checkArguments(t *testing.T, tr trace, rec *profiles.Recording) {
	t.Helper()
	type key struct {
		call
		index int
	}
	sets := map[key]profiles.Argument{}
	for _, a := range rec.Arguments {
		sets[key{call{a.Call.ABI, a.Call.Number}, a.Index}] = a
	}
	// Some that must be there if the call is; the others are checked as they are.
	for _, e := range tr {
		switch e.name {
		case "socket", "unshare", "ioctl", "prctl", "fcntl", "fcntl64", "personality", "open", "openat", "mmap2", "mprotect":
			if !slices.ContainsFunc(rec.Arguments, func(a profiles.Argument) bool { return e.call == call{a.Call.ABI, a.Call.Number} }) {
				t.Errorf("no arguments kept of %s %s", e.call, e.name)
			}
		}
	}
	traced := map[key]map[uint64]bool{}
	for _, e := range tr {
		for k, a := range sets {
			if k.call != e.call || k.index >= len(e.args) {
				continue
			}
			v := e.args[k.index]
			if e.abi == i386 {
				v &= 0xffffffff
			}
			v &= a.Mask
			if traced[k] == nil {
				traced[k] = map[uint64]bool{}
			}
			traced[k][v] = true
			if e.certain && !a.AnyValue && !slices.Contains(a.Values, v) {
				t.Errorf("argument %d of %s %s was %#x, kept are %#x", k.index, e.call, e.name, v, a.Values)
			}
		}
	}
	for k, a := range sets {
		for _, v := range a.Values {
			// clone's arguments are not raw in the trace.
			if traced[k] != nil && !traced[k][v] {
				t.Errorf("argument %d of %s has %#x, which strace didn't see: %#x", k.index, k.call, v, slices.Sorted(maps.Keys(traced[k])))
			}
		}
	}
}

// checkLosses wants the losses to be of the given kinds, and to name the numbers.
func checkLosses(t *testing.T, rec *profiles.Recording, kinds []profiles.LossKind) {
	t.Helper()
	var got []profiles.LossKind
	for _, l := range rec.Losses {
		got = append(got, l.Kind)
		var want []string
		switch l.Kind {
		case profiles.LossUnresolved:
			for _, c := range rec.Unresolved {
				want = append(want, fmt.Sprintf("%s:%d", c.ABI, c.Number))
			}
		case profiles.LossOutOfRange:
			for c := range firstSeen(rec) {
				if c.nr >= 1024 {
					want = append(want, c.String())
				}
			}
			slices.Sort(want)
		default:
			t.Errorf("lost: %+v", l)
		}
		if l.Count != uint64(len(want)) || l.Detail != strings.Join(want, " ") {
			t.Errorf("loss %+v, want %d: %s", l, len(want), strings.Join(want, " "))
		}
	}
	slices.Sort(got)
	kinds = slices.Sorted(slices.Values(kinds))
	if !slices.Equal(got, kinds) {
		t.Errorf("losses of kinds %v, want %v", got, kinds)
	}
}

// Calls through the vsyscall page enter the kernel by a fault: no tracer sees
// them, but filters judge them.
func TestVsyscallsAreRecorded(t *testing.T) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(maps), "[vsyscall]") {
		t.Skip("this kernel has no vsyscall page (vsyscall=none): a program that calls there is ended")
	}
	dir := t.TempDir()
	syslatch, form := filepath.Join(programs, "syslatch"), filepath.Join(programs, "forms")
	record := func(name string) (path string, names []string) {
		path = filepath.Join(dir, name)
		if out, err := exec.Command(syslatch, "record", "-o", path, "--recording", path+".recording", "--", form, name).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		data, err := os.ReadFile(path + ".recording")
		if err != nil {
			t.Fatal(err)
		}
		var rec profiles.Recording
		if err := json.Unmarshal(data, &rec); err != nil {
			t.Fatal(err)
		}
		return path, rec.All()[x64]
	}
	_, without := record("rusage")
	profile, got := record("vsyscall")
	got = slices.DeleteFunc(got, func(name string) bool { return slices.Contains(without, name) })
	if want := []string{"getcpu", "gettimeofday", "time"}; !slices.Equal(got, want) {
		t.Errorf("recorded %v, want %v", got, want)
	}
	if out, err := run(t, []string{syslatch, "run", "--profile", profile, "--", form, "vsyscall"}); err != nil {
		t.Errorf("under its own profile: %v\n%s", err, out)
	}
}

// Where cgroup v2 isn't mounted there is nothing to key a recording on: the
// error says so and what would help, before the command runs.
func TestRecordNeedsVersion2(t *testing.T) {
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ran := filepath.Join(dir, "ran")
	hide := `mount -t tmpfs none "$0" && `
	if h.Mode == cgroup.V2 {
		// A hierarchy of version 1 instead, with a name and no controllers.
		hide += `mkdir "$0/named" && mount -t cgroup -o none,name=syslatch-oracle none "$0/named" && `
	}
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", hide+`exec "$@"`, h.Unified,
		filepath.Join(programs, "syslatch"), "record", "-o", filepath.Join(dir, "profile.json"), "--", "/bin/sh", "-c", `>"$0"`, ran)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 125 {
		t.Errorf("%v, want exit status 125", err)
	}
	for _, want := range []string{"no cgroup v2 hierarchy is mounted", "systemd.unified_cgroup_hierarchy=1", "mount -t cgroup2"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("output doesn't say %q: %s", want, out)
		}
	}
	for _, file := range []string{ran, filepath.Join(dir, "profile.json")} {
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", filepath.Base(file), err)
		}
	}
}
