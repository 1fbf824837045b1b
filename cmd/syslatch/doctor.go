// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/doctor"
)

func newDoctorCommand() *cobra.Command {
	var o doctor.Options
	var output string
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this host offers, what syslatch uses of it, and how to get the rest",
		Long: `doctor looks at the kernel, cgroups, BPF, seccomp, container runtimes and NRI of this
host, and tells what syslatch will therefore use for each of its jobs. It changes
nothing: programs that it loads and a cgroup that it makes are gone when it ends.
It connects to the runtime's NRI socket and hangs up at once.

Each check is ok, warn (works, and not all that there could be), missing (a job
needs it and it isn't there) or error (it stands in the way, or could not be
asked), and comes with a remedy unless it is ok. A check that fails does not end
the others, and none takes longer than --timeout.

JSON output has the schema ` + doctor.Schema + `:
  schema      that name; fields may be added to it, none is changed or removed
  works       recording commands, recording containers and enforcing all work
  checks      name, status, found, uses, remedy
  mechanisms  job, status, uses, remedy

Text is coloured on a terminal only, and not where NO_COLOR is set.

Exit status: 0 recording and enforcing work here; 1 they don't; 2 the command
line is wrong.`,
		Example: `  syslatch doctor
  syslatch doctor -o json | jq -r '.checks[] | select(.status != "ok") | "\(.name): \(.remedy)"'
  syslatch doctor --containerd-config /etc/k3s/containerd/config.toml`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			if o.Timeout <= 0 {
				return cli.Usage(fmt.Errorf("timeout %s: want more than 0", o.Timeout))
			}
			r := doctor.Examine(c.Context(), doctor.System(), o)
			if err := writeReport(c.OutOrStdout(), r, output); err != nil {
				return err
			}
			if !r.Works {
				return &cli.ExitError{Code: cli.ExitFailure}
			}
			return nil
		},
	}
	f := c.Flags()
	cli.OutputFlag(c, &output)
	f.StringVar(&o.ContainerdConfig, "containerd-config", "", "containerd's configuration `file` (default: as containerd finds it)")
	f.StringVar(&o.BPFFS, "bpffs", "/sys/fs/bpf", "`directory` of the bpffs, or in it")
	f.DurationVar(&o.Timeout, "timeout", 10*time.Second, "for each check")
	return c
}

func writeReport(w io.Writer, r *doctor.Report, output string) error {
	if output == "text" {
		return r.WriteText(w, colourful(w))
	}
	return writeJSON(w, r)
}

// colourful says whether w is a terminal whose user wants colour (no-color.org).
func colourful(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
