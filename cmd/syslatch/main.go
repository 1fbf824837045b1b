// SPDX-License-Identifier: Apache-2.0

// Command syslatch records what a command calls, runs commands confined by the
// result, reads the profile store, and tells what a host offers.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/cli"
)

func main() {
	os.Exit(cli.Report(os.Stderr, "syslatch", run(os.Args[1:])))
}

// run leaves signals alone: those commands that have something to clean up or to
// pass on catch them.
func run(args []string) error {
	root := newRootCommand()
	root.SetArgs(args)
	return root.Execute()
}

func newRootCommand() *cobra.Command {
	root := cli.Root(cli.Group(&cobra.Command{
		Use:   "syslatch",
		Short: "Learn, keep and enforce the system calls that a container really makes",
		Long: `syslatch records the system calls that a command or container makes, keeps each
recording as the next version of a seccomp profile, and enforces that profile.

The node daemon is syslatchd (see 'syslatchd --help'); this is the command line
for recording without a container engine, for reading the profile store, and for the
phases of what runs.`,
		Example: `  syslatch record -o app.json -- ./app --selftest
  syslatch run --profile app.json -- ./app
  syslatch profile list
  syslatch doctor`,
	},
		newRecordCommand(),
		newRunCommand(),
		newApplyCommand(),
		newProfileCommand(),
		newPhaseCommand(),
		newVerifyCommand(),
		newHookCommand(),
		newDoctorCommand(),
		newVersionCommand(),
		newLaunchCommand(),
		newInjectCommand(),
	))
	root.SetHelpCommand(cli.Help())
	return root
}
