// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/agent"
	"github.com/syslatch/syslatch/internal/cli"
)

func newApplyCommand() *cobra.Command {
	var opts agent.ApplyOptions
	var output string
	c := &cobra.Command{
		Use:   "apply --pid PID {--allow CALL,@GROUP... | --profile FILE} [flags]",
		Short: "Tighten a running process by a seccomp profile, for good",
		Long: `Gives a process that runs already a seccomp filter, in all of its threads, and with
--tree in all of its descendants. The process needn't know of it, and goes on; what
the filter denies fails from then on. A filter can't be taken back, and is inherited by
what the process starts; another one can only tighten further.

--allow takes system calls and groups ('syslatch profile groups' lists them), as the
phases of a policy do: the floor without which no program goes on is added ('syslatch
profile groups @floor'), and the rest is EPERM. --profile takes OCI seccomp JSON, as
'syslatch record' writes it, and adds nothing.

Every task is stopped for some milliseconds, with ptrace(2), and loads the filter
itself. A call in which it was blocked is made again, and is judged by the filter. It
succeeds only after /proc says of each task that it has the filter, of those forked
meanwhile, too.

Nothing is changed, and the reason is told, if the filter would end a process at once or
denies the call that it is blocked in; if it denies nothing that isn't denied already;
if a process is traced by another (strace, a debugger), is frozen, runs 32-bit code, or
may not be traced by who asks. --force overrides the first two. --dry-run stops and
looks, and changes nothing.

The user's own processes can be tightened, if kernel.yama.ptrace_scope allows it; all
others need CAP_SYS_PTRACE. Without CAP_SYS_ADMIN in the process no_new_privs is set
there: sudo and the like don't work in it any more. A process whose own filter forbids
to load another needs CAP_SYS_ADMIN of syslatch.

JSON output has pid, dryRun, processes (pid, command, threads, filtersBefore,
filtersAfter, setNoNewPrivs, perThread, present, addsNothing), scans, stoppedNs, and
refusals (pid, tid, call, why), which were overridden, or would have to be.

Exit status: 0 every task has the filter (or a dry run would have given it); 1 not all
have it, or none, or a dry run would be refused; 2 the command line is wrong.`,
		Example: `  syslatch apply --pid $PID --allow @file-read,@basic-io,@info
  syslatch apply --pid $PID --tree --profile app.json
  syslatch apply --pid $PID --allow read,close,openat --dry-run -o json`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			allow := c.Flags().Changed("allow")
			switch {
			case opts.PID <= 0:
				return cli.Usage(errors.New("say which process: --pid PID"))
			case allow == (opts.Profile != ""):
				return cli.Usage(errors.New("say what stays allowed: --allow CALL,@GROUP... or --profile FILE"))
			case opts.Timeout <= 0:
				return cli.Usage(fmt.Errorf("timeout %s: want more than 0", opts.Timeout))
			}
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			opts.Messages = c.ErrOrStderr()
			r, err := agent.ApplyCommand(opts)
			if r == nil {
				return err
			}
			if err := errors.Join(err, writeApplied(c.OutOrStdout(), r, output)); err != nil {
				return err
			}
			if r.DryRun && len(r.Refusals) > 0 {
				return &cli.ExitError{Code: cli.ExitFailure}
			}
			return nil
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.IntVar(&opts.PID, "pid", 0, "the `process`")
	f.BoolVar(&opts.Tree, "tree", false, "and all of its descendants")
	f.StringSliceVar(&opts.Allow, "allow", nil, "`calls` and groups to allow, separated by commas, beside the floor")
	f.StringVarP(&opts.Profile, "profile", "p", "", "seccomp profile `FILE` to apply")
	f.BoolVar(&opts.Force, "force", false, "also where it ends a process, or changes nothing")
	f.BoolVar(&opts.DryRun, "dry-run", false, "look only")
	f.DurationVar(&opts.Timeout, "timeout", time.Minute, "for each task to stop")
	cli.OutputFlag(c, &output)
	cli.Must(c.MarkFlagFilename("profile", "json"))
	cli.Must(c.RegisterFlagCompletionFunc("pid", completePID))
	cli.Must(c.RegisterFlagCompletionFunc("allow", completeGroups))
	return c
}

func writeApplied(w io.Writer, r *agent.ApplyReport, output string) error {
	if output == "json" {
		return writeJSON(w, r)
	}
	err := table(w, "PID\tCOMMAND\tTHREADS\tFILTERS\tNOTE", func(row func(...any)) {
		for _, p := range r.Processes {
			var notes []string
			for _, n := range []struct {
				is   bool
				text string
			}{
				{p.Present, "has this filter already"},
				{p.AddsNothing && !p.Present, "adds nothing to its filters"},
				{p.SetNoNewPrivs, "no_new_privs was set"},
				{p.PerThread, "loaded by each thread"},
			} {
				if n.is {
					notes = append(notes, n.text)
				}
			}
			if notes == nil {
				notes = []string{"-"}
			}
			filters := fmt.Sprintf("%d -> %d", p.FiltersBefore, p.FiltersAfter)
			if r.DryRun {
				filters = strconv.Itoa(p.FiltersBefore)
			}
			row(p.PID, printable(p.Command), p.Threads, filters, strings.Join(notes, ", "))
		}
	})
	for _, refusal := range r.Refusals {
		verb := "overridden"
		if r.DryRun {
			verb = "would be refused"
		}
		fmt.Fprintf(w, "%s: %s\n", verb, refusal)
	}
	return err
}

// completePID offers the processes that have a command line, with it.
func completePID(_ *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var offers []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || len(line) == 0 {
			continue // a kernel thread, or gone
		}
		text := strings.Join(strings.Fields(strings.ToValidUTF8(strings.ReplaceAll(string(line), "\x00", " "), "?")), " ")
		offers = append(offers, cobra.CompletionWithDesc(e.Name(), text[:min(len(text), 60)]))
	}
	return offers, cobra.ShellCompDirectiveNoFileComp
}

// completeGroups offers groups for the last of a list of names.
func completeGroups(_ *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	done, last := "", prefix
	if i := strings.LastIndexByte(prefix, ','); i >= 0 {
		done, last = prefix[:i+1], prefix[i+1:]
	}
	var offers []string
	for _, g := range groupsAndFloor() {
		if strings.HasPrefix(g.Name, last) && !slices.Contains(strings.Split(done, ","), g.Name) {
			offers = append(offers, cobra.CompletionWithDesc(done+g.Name, g.About))
		}
	}
	return offers, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// printable is a name that a process has chosen, fit for a terminal.
func printable(name string) string {
	quoted := strconv.QuoteToGraphic(name)
	return quoted[1 : len(quoted)-1]
}
