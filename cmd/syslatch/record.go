// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/agent"
	"github.com/syslatch/syslatch/internal/cli"
)

func newRecordCommand() *cobra.Command {
	var opts agent.RecordOptions
	var attach agent.Attach
	var phases recordPhaseFlags
	c := &cobra.Command{
		Use:   "record -o FILE [flags] {-- COMMAND [ARG...] | --container ID | --cgroup PATH | --pid PID}",
		Short: "Run a command and write the seccomp profile of what it called",
		Long: `Runs COMMAND in a cgroup of its own under the recorder, needs no container
engine, and writes a seccomp profile that allows exactly the system calls that
COMMAND and every process it started made, from its execve on. The profile is
plain OCI JSON, and 'syslatch run' enforces it without an engine.

For docker and podman (--security-opt seccomp=FILE) and a kubelet's
localhostProfile, add --for-container: runtimes start a container under its profile,
and need some 40 calls for that which COMMAND by itself doesn't make. What is
allowed so without having been seen is measured for runc and crun.

A profile knows only what it has seen: let COMMAND do all that it will ever do,
its start, errors and end included, or add later runs with --append.

Nothing is printed while COMMAND runs, and one line on standard error after it
(none with --quiet). With '-o -', what COMMAND prints goes to standard error.

Recording ends when COMMAND and all its descendants have ended. While COMMAND
runs, an interrupt (Ctrl-C) is its own affair, and SIGTERM is passed on to it; a
second SIGTERM kills. What it leaves in the background gets SIGTERM at the next
interrupt, and is killed at the one after. The profile is written in each case.

With --container, --cgroup or --pid, something that runs already is recorded, until
it ends or until an interrupt, which it doesn't get. What it called before is
missing, and the recording says so (attached-late): --allow-losses is needed. The
profile is one as with --for-container.

With --phases, or --policy for those of a policy, calls are recorded by phase: they
count for the phase that is named by 'syslatch phase set ID PHASE --socket PATH', or
plain HTTP, on the socket of --api-socket, from the moment on when that is answered.
Nothing is denied, and every phase may follow every other. The --recording keeps
them apart; the profile has the calls of all. 'syslatch profile suggest' makes the
phases of a policy of recordings.

No profile is written if the recording may be incomplete, unless --allow-losses.

Needs root (CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN and a writable cgroup v2 tree).

Exit status: that of COMMAND (128+N if signal N ended it); 125 if syslatch itself
failed, 126 if COMMAND can't be executed, 127 if it wasn't found; 2 if the command
line is wrong.`,
		Example: `  syslatch record -o app.json -- ./app --selftest
  syslatch record -o app.json --append -- ./app --other-feature
  syslatch record -o app.json --for-container -- ./app --selftest
  syslatch record -o sh.json --recording sh.recording.json -- sh -c 'date; ls'
  syslatch record -o app.json --allow-losses --container 5d0c9f41a2b3
  syslatch record -o app.json --recording app.rec --phases read,write --api-socket /run/app.sock -- ./app`,
		Args: func(c *cobra.Command, args []string) error {
			given := 0
			for _, flag := range []string{"container", "cgroup", "pid"} {
				if c.Flags().Changed(flag) {
					given++
				}
			}
			switch {
			case given == 0:
				return needCommand("syslatch record -o FILE -- COMMAND")(c, args)
			case given > 1 || len(args) > 0:
				return cli.Usage(errors.New("say one thing to record: a command, --container, --cgroup or --pid"))
			case phases.given():
				return cli.Usage(errors.New("phases are of a command's recording, or of a container's that syslatchd records by a policy with phases"))
			case attach == agent.Attach{}, attach.PID < 0:
				return cli.Usage(errors.New("--container, --cgroup or --pid is empty: say what to record"))
			}
			return nil
		},
		ValidArgsFunction: completeCommand,
		RunE: func(c *cobra.Command, args []string) error {
			if opts.Profile == "" {
				return cli.Usage(errors.New("say where to write the profile: -o FILE, or -o - for standard output"))
			}
			if attach != (agent.Attach{}) {
				if !opts.AllowLosses {
					return cli.Usage(errors.New("what runs already has made calls that the profile will lack: say --allow-losses to have it nevertheless"))
				}
				opts.Attach = &attach
			}
			if err := phases.into(c, &opts); err != nil {
				return err
			}
			opts.Command = args
			opts.Messages = c.ErrOrStderr()
			opts.Stdout = c.OutOrStdout()
			status, err := agent.RecordCommand(opts)
			return commandExit(status, err)
		},
	}
	f := c.Flags()
	f.SetInterspersed(false) // what follows COMMAND is COMMAND's
	f.StringVarP(&opts.Profile, "output", "o", "", "write the profile to `FILE` ('-' for standard output)")
	f.StringVar(&opts.Recording, "recording", "", "also write the evidence (first-seen times, arguments, losses) to `FILE`")
	f.BoolVar(&opts.Append, "append", false, "unite with the profile that is in FILE already")
	f.BoolVar(&opts.Container, "for-container", false, "also allow what runc and crun call to start a container")
	f.BoolVar(&opts.AllowLosses, "allow-losses", false, "write the profile even if the recording lost something")
	f.BoolVarP(&opts.Quiet, "quiet", "q", false, "print errors only")
	phases.add(c)
	f.StringVar(&attach.Container, "container", "", "record the running container with this `id`, or beginning of an id")
	f.StringVar(&attach.Cgroup, "cgroup", "", "record the cgroup (v2) at this `path`")
	f.IntVar(&attach.PID, "pid", 0, "record the cgroup that this `process` is in")
	return c
}

func needCommand(usage string) cobra.PositionalArgs {
	return cli.Args(func(_ *cobra.Command, args []string) error {
		if len(args) == 0 || args[0] == "" {
			return fmt.Errorf("say which command to run: %s", usage)
		}
		return nil
	})
}

// completeCommand offers the programs of PATH, and files where a path was begun
// or the arguments are COMMAND's.
func completeCommand(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || strings.ContainsRune(prefix, '/') {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var names []string
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // a PATH may name what isn't there
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), prefix) {
				continue
			}
			if st, err := os.Stat(filepath.Join(dir, e.Name())); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
				names = append(names, e.Name())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), cobra.ShellCompDirectiveDefault
}

func newLaunchCommand() *cobra.Command {
	return &cobra.Command{
		Use:    agent.LaunchCommand + " -- PATH ARG0 [ARG...]",
		Hidden: true,
		Args:   cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			// The parent reports the error, with its own exit status.
			return &cli.ExitError{Code: cli.ExitSyslatch, Err: discard(agent.Launched(args[0], args[1:]))}
		},
	}
}

func discard(error) error { return nil }

// commandExit makes an exit status of a command's end in the way of env(1),
// docker and podman.
func commandExit(status int, err error) error {
	switch {
	case err == nil && status == 0:
		return nil
	case err == nil:
		return &cli.ExitError{Code: status}
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist) && errors.Is(err, agent.ErrExec):
		return &cli.ExitError{Code: cli.ExitNotFound, Err: err}
	case errors.Is(err, agent.ErrExec), errors.Is(err, syscall.ENOEXEC):
		return &cli.ExitError{Code: cli.ExitCannotExec, Err: err}
	}
	return &cli.ExitError{Code: cli.ExitSyslatch, Err: err}
}
