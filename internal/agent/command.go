// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// ErrExec marks a command that could not be executed, as against a failure of
// syslatch; the error it is joined to holds the kernel's reason.
var ErrExec = errors.New("can't be executed")

// RecordOptions say what RecordCommand runs and what it writes.
type RecordOptions struct {
	Command     []string
	Attach      *Attach       // what runs already, instead of Command
	Phases      *RecordPhases // of Command; nil records it as one
	Profile     string        // path; "-" for Stdout, and Command's output goes to standard error
	Recording   string        // path; empty for none
	Append      bool          // unite with the profile that Profile holds
	AllowLosses bool
	// Container also allows what runtimes call to start a container: they do so
	// under the container's profile, and here was no runtime to record.
	Container bool
	Quiet     bool      // no summary
	Stdout    io.Writer // for Profile "-"
	Messages  io.Writer // the summary, and what the recording lost
}

// RecordCommand runs a command under the recorder in a cgroup of its own and
// writes the profile of what it and its descendants called. It returns the
// command's exit status in the shell's form. The profile is written whatever
// that status is: a failing run is evidence too.
//
// All that can fail without the command fails before it runs. While it runs
// nothing is printed: the terminal is the command's.
func RecordCommand(opts RecordOptions) (status int, err error) {
	signals, stop := catchSignals()
	defer stop()
	var path string
	if opts.Attach == nil {
		if path, err = lookCommand(opts.Command[0]); err != nil {
			return 0, err
		}
	}
	if err := needCapabilities(unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYS_ADMIN); err != nil {
		return 0, err
	}
	out, err := openOutput(opts.Profile, opts.Stdout, 0o644) // profiles hold no secrets
	if err != nil {
		return 0, err
	}
	defer out.close()
	var evidence *output
	if opts.Recording != "" {
		// Arguments of commands and of calls may be secrets.
		if evidence, err = openOutput(opts.Recording, opts.Stdout, 0o600); err != nil {
			return 0, err
		}
		defer evidence.close()
	}
	if opts.Attach != nil {
		opts.Container = true // of its start, a late recording has nothing
	}
	merge := profiles.MergeOptions{AllowLosses: opts.AllowLosses, Incidental: opts.Container}
	if opts.Container {
		merge.MustAllow = profiles.Floor("")
	}
	var parent *profiles.Version
	if opts.Append {
		var forContainer bool
		if parent, forContainer, err = readProfileAsVersion(opts.Profile); err != nil {
			return 0, err
		}
		merge.Incidental = merge.Incidental || forContainer
	}
	stdout := os.Stdout
	if opts.Profile == "-" || opts.Recording == "-" {
		stdout = os.Stderr // what is read from standard output is JSON, whole
	}
	messages := opts.Messages
	if opts.Quiet {
		messages = io.Discard
	}
	var rec *profiles.Recording
	if opts.Attach != nil {
		rec, err = recordAttached(*opts.Attach, signals, messages)
	} else {
		rec, status, err = recordCommand(path, opts.Command, opts.Phases, stdout, signals, messages)
	}
	if err != nil {
		return 0, err
	}
	var written error
	if evidence != nil {
		data, err := profiles.EncodeRecording(rec)
		if err != nil {
			return 0, err
		}
		written = evidence.write(data) // the profile is written all the same
	}
	for _, l := range rec.Losses {
		fmt.Fprintf(messages, "syslatch: recording lost something: %s\n", describeLoss(l))
	}
	merge.NewerThanKernel, merge.Created = seccomp.NewerThan(rec.Kernel), rec.Ended
	version, delta, err := profiles.Merge(parent, rec, merge)
	if err != nil {
		return 0, errors.Join(fmt.Errorf("no profile written: %w", err), written)
	}
	if version == nil {
		version = parent // nothing new
	}
	if version == nil {
		return 0, errors.Join(errors.New("no profile written: not one call was recorded"), written)
	}
	if err := seccomp.Check(version.Profile); err != nil {
		return 0, errors.Join(fmt.Errorf("no profile written: libseccomp refuses it: %w", err), written)
	}
	data, err := profiles.EncodeProfile(version.Profile)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(out.write(data), written); err != nil {
		return 0, err
	}
	calls := version.Manifest.Calls
	more := len(slices.DeleteFunc(slices.Concat(version.Manifest.MustAllow, version.Manifest.Incidental), func(name string) bool {
		return slices.Contains(calls.Names(), name)
	}))
	fmt.Fprintf(messages, "syslatch: %s: %s\n", out.path, summary(calls, more, parent, delta, status))
	return status, nil
}

// recordCommand runs the command and returns its recording and exit status.
func recordCommand(path string, argv []string, phases *RecordPhases, stdout *os.File, signals <-chan os.Signal, messages io.Writer) (*profiles.Recording, int, error) {
	recorder, err := bpf.Open("", bpf.Options{NoPin: true})
	if err != nil {
		return nil, 0, fmt.Errorf("recorder: %w", err)
	}
	defer recorder.Close()
	group, err := cgroup.New("record")
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		// Whatever is left is ours: it was started in this group.
		_ = group.Kill()
		_ = group.Wait(context.Background())
		_ = group.Remove()
	}()

	base, err := cgroup.Status(os.Getpid())
	if err != nil {
		return nil, 0, err
	}
	child, err := launch(group, path, argv, stdout, nil)
	if err != nil {
		return nil, 0, err
	}
	handle, err := recorder.Track(group.ID(), phases.options(bpf.TrackOptions{Gate: bpf.GateFilter, BaseFilters: base.SeccompFilters}))
	if err != nil {
		child.abandon()
		return nil, 0, fmt.Errorf("track cgroup %s: %w", group.Path(), err)
	}
	marked, err := phases.begin(recorder, handle, group, path)
	if err != nil {
		child.abandon()
		return nil, 0, err
	}
	defer func() { _ = marked.end() }() // where it matters it has ended by then
	events := collectEvents(recorder, handle)

	rec := newRecording(profiles.Subject{ID: group.Name(), Name: filepath.Base(path), Command: argv}, filepath.Base(path), "syslatch record", profiles.GateFilter)
	if err := child.proceed(launchOrder{Filter: seccomp.AllowAllFilter()}); err != nil {
		_ = child.cmd.Wait()
		return nil, 0, err
	}
	status, err := waitAll(filepath.Base(path), "recording", child.cmd, group, signals, messages)
	if err != nil {
		return nil, 0, err
	}
	if err := marked.end(); err != nil {
		fmt.Fprintf(messages, "syslatch: %v\n", err) // the recording is whole
	}
	snapshot, err := recorder.Untrack(handle)
	if err != nil {
		return nil, 0, err
	}
	rec.Ended = time.Now().UTC()
	if phases != nil {
		rec.Initial = phases.set().Initial
	}
	fill(rec, snapshot, events.take(snapshot), marked.names())
	return rec, status, nil
}

// catchSignals takes the signals that ask for an end, but for those that this
// process was told to ignore (nohup): the command is to ignore them as well, and
// an ignored signal that is caught is not inherited as ignored.
func catchSignals() (_ <-chan os.Signal, stop func()) {
	signals := make(chan os.Signal, 8)
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGQUIT, syscall.SIGHUP, syscall.SIGTERM} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	return signals, func() { signal.Stop(signals) }
}

// noticeAfter is how long a recording, or a run in phases, outlives its command
// without a word.
const noticeAfter = time.Second

// waitAll waits for the command and then for every process that it left in
// group. doing is for people: "recording".
//
// While the command runs, signals are its own affair: those of the terminal
// reach it by themselves, others are passed on, and only a second SIGTERM ends
// the group. What it left gets SIGTERM at the first signal, so that its way to
// end is recorded too, and SIGKILL at the second.
func waitAll(name, doing string, cmd *exec.Cmd, group *cgroup.Group, signals <-chan os.Signal, messages io.Writer) (int, error) {
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	asked := 0 // to end, and not by the terminal
	for running := true; running; {
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				return 0, fmt.Errorf("wait for the command: %w", err)
			}
			running = false
		case s := <-signals:
			if s == syscall.SIGTERM {
				asked++
			}
			if asked > 1 {
				if err := group.Kill(); err != nil {
					return 0, err
				}
			} else if s == syscall.SIGTERM || !inForeground() {
				_ = cmd.Process.Signal(s) // it may have ended meanwhile
			}
		}
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	empty := make(chan error, 1)
	go func() { empty <- group.Wait(ctx) }()
	end := func() error {
		if asked > 1 {
			return group.Kill()
		}
		for _, pid := range members(group) {
			_ = syscall.Kill(pid, syscall.SIGTERM) // it may have ended meanwhile
		}
		return nil
	}
	if asked > 0 {
		if err := end(); err != nil {
			return 0, err
		}
	}
	notice := time.NewTimer(noticeAfter)
	defer notice.Stop()
	for {
		select {
		case err := <-empty:
			if err != nil {
				return 0, err
			}
			return exitStatus(cmd.ProcessState), nil
		case <-notice.C:
			if left := members(group); len(left) > 0 {
				fmt.Fprintf(messages, "syslatch: %s has ended; %s until what it left in the background has, too: %s (interrupt to end it)\n",
					name, doing, describeProcesses(left))
			}
		case <-signals:
			asked++
			if err := end(); err != nil {
				return 0, err
			}
		}
	}
}

// inForeground says whether the terminal's signals reach this process's group,
// and so the command, which is in it.
func inForeground() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return false // no terminal
	}
	defer tty.Close()
	pgrp, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && pgrp == unix.Getpgrp()
}

// members are the processes in group and below.
func members(group *cgroup.Group) (pids []int) {
	children, err := cgroup.Children(group.Path())
	if err != nil {
		return nil // removed
	}
	for _, dir := range append(children, group.Path()) {
		pids = append(pids, procs(dir)...)
	}
	return pids
}

// procs are the processes in one cgroup.
func procs(dir string) (pids []int) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil // removed, or threaded: its processes are listed above it
	}
	for line := range strings.FieldsSeq(string(data)) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 0 { // 0: of another pid namespace
			pids = append(pids, pid)
		}
	}
	return pids
}

// describeProcesses is "sleep (123), sh (124) and 7 more".
func describeProcesses(pids []int) string {
	const most = 3
	var parts []string
	for _, pid := range pids[:min(len(pids), most)] {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			comm = []byte("?") // ended meanwhile
		}
		parts = append(parts, fmt.Sprintf("%q (%d)", strings.TrimSpace(string(comm)), pid))
	}
	s := strings.Join(parts, ", ")
	if n := len(pids) - most; n > 0 {
		s += fmt.Sprintf(" and %d more", n)
	}
	return s
}

// exitStatus is a process's end in the shell's form.
func exitStatus(state *os.ProcessState) int {
	if ws := state.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return state.ExitCode()
}

// RunOptions say what RunCommand becomes, and how it is confined.
type RunOptions struct {
	Command    []string
	Profile    string // path of an OCI seccomp profile
	NoNewPrivs bool   // also where CAP_SYS_ADMIN would do
}

// RunCommand loads the profile as this process's filter and becomes the
// command. It returns only on failure.
func RunCommand(opts RunOptions) error {
	path, err := lookCommand(opts.Command[0])
	if err != nil {
		return err
	}
	profile, err := readProfile(opts.Profile)
	if err != nil {
		return err
	}
	if profiles.Denied(profile, profiles.Calls{specs.ArchX86_64: {"execve"}}).Len() > 0 {
		return fmt.Errorf("profile %s doesn't allow execve under %s, so no command can start under it (record it with 'syslatch record', or add the call)",
			opts.Profile, specs.ArchX86_64)
	}
	effective, err := capabilities()
	if err != nil {
		return err
	}
	filter, err := seccomp.Compile(profile, seccomp.Options{ENOSYSAbove: seccomp.KernelRelease()})
	if err != nil {
		return fmt.Errorf("profile %s: %w", opts.Profile, err)
	}
	return seccomp.LoadAndExec(filter, seccomp.ExecOptions{
		NoNewPrivs:    opts.NoNewPrivs || effective&(1<<unix.CAP_SYS_ADMIN) == 0,
		ExitOnFailure: 126, // as a shell says "can't be executed"
	}, path, opts.Command, os.Environ())
}

// lookCommand finds a command as a shell would, the current directory only
// where the name says so.
func lookCommand(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	cause := err
	var looked *exec.Error
	if errors.As(err, &looked) {
		cause = looked.Err // without a second name
	}
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%q: %w", name, cause)
	}
	return "", cannotExec(name, cause)
}

// cannotExec is the error of a command that is there and no program.
func cannotExec(path string, err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		err = at.Err
	}
	hint := ""
	switch {
	case errors.Is(err, syscall.ENOEXEC):
		hint = " (no program; a script needs a first line such as #!/bin/sh)"
	case errors.Is(err, fs.ErrPermission):
		hint = " (is it executable, and its file system not mounted noexec?)"
	case errors.Is(err, fs.ErrNotExist):
		if _, serr := os.Stat(path); serr == nil {
			hint = " (that is said of its interpreter or loader: see its first line, or readelf -l)"
		}
	}
	return fmt.Errorf("%s %w: %w%s", path, ErrExec, err, hint)
}

// readProfile reads an OCI profile, no more of it than one can have.
func readProfile(path string) (*specs.LinuxSeccomp, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, profiles.MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	profile, err := profiles.DecodeProfile(data)
	if err != nil {
		return nil, fmt.Errorf("profile %s: %w", path, err)
	}
	return profile, nil
}

// readProfileAsVersion reads what an earlier run wrote, as the parent of what
// this run will, and says whether it was made for containers. A missing file is
// no parent.
func readProfileAsVersion(path string) (_ *profiles.Version, forContainer bool, err error) {
	if path == "-" {
		return nil, false, errors.New("append needs a file to append to, not standard output")
	}
	profile, err := readProfile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	if err := seccomp.Check(profile); err != nil {
		return nil, false, fmt.Errorf("append to %s: %w", path, err)
	}
	// Rules with conditions can't be united with a recording. Those of the
	// incidental calls are taken out, and come back with the result.
	incidental := profiles.Render(nil, profiles.RenderOptions{Incidental: true})
	profile.Syscalls = slices.DeleteFunc(profile.Syscalls, func(r specs.LinuxSyscall) bool {
		ours := len(r.Args) > 0 && slices.ContainsFunc(incidental.Syscalls, func(i specs.LinuxSyscall) bool { return sameConditions(r, i) })
		forContainer = forContainer || ours
		return ours
	})
	version, err := profiles.Adopt(profile)
	if err != nil {
		return nil, false, fmt.Errorf("append to %s: %w", path, err)
	}
	return version, forContainer, nil
}

// sameConditions says whether two rules allow one call under the same conditions.
func sameConditions(a, b specs.LinuxSyscall) bool {
	return a.Action == b.Action && slices.Equal(a.Names, b.Names) && slices.Equal(a.Args, b.Args)
}

// needCapabilities says what to do where this process lacks one.
func needCapabilities(needed ...uint) error {
	effective, err := capabilities()
	if err != nil {
		return err
	}
	var lacking []string
	for _, c := range needed {
		if effective&(1<<c) == 0 {
			lacking = append(lacking, capabilityNames[c])
		}
	}
	if lacking == nil {
		return nil
	}
	return fmt.Errorf("recording needs root: this process lacks %s (run it with sudo; in a container, add them)", strings.Join(lacking, ", "))
}

var capabilityNames = map[uint]string{
	unix.CAP_BPF: "CAP_BPF", unix.CAP_PERFMON: "CAP_PERFMON", unix.CAP_SYS_ADMIN: "CAP_SYS_ADMIN",
}

// capabilities are this thread's effective ones.
func capabilities() (uint64, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, fmt.Errorf("capget: %w", err)
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective), nil
}
