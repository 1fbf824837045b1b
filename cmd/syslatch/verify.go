// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/api"
	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/phase"
)

func newVerifyCommand() *cobra.Command {
	var f phaseFlags
	c := &cobra.Command{
		Use:   "verify [INSTANCE]",
		Short: "Say whether instances' phases hold",
		Long: `Asks who supervises the instances whether the phase of each, or of one, holds for every
task, and names what doesn't: a switch that could not be finished, a listener that was
lost, BPF programs that somebody removed. What a phase asks for and this host never
enforces isn't a failure, and is told as well.

Exit status: 0 all phases hold, those of ended instances aside; 4 one of them doesn't,
or is being switched, as it is while a syslatchd that was restarted looks through it;
2 the command line is wrong; 1 everything else (nobody listens, there is no such
instance).`,
		Example: `  syslatch verify
  syslatch verify 4f2a
  syslatch verify -o json | jq '.instances[] | select(.state != "holds")'`,
		Args:              cli.Args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: f.complete(false),
		RunE: func(c *cobra.Command, args []string) error {
			if err := cli.CheckOutput(f.output); err != nil {
				return err
			}
			return f.with(func(client *api.Client) error {
				var all []phase.Status
				var err error
				if len(args) == 0 {
					all, err = client.List(c.Context())
				} else {
					all = make([]phase.Status, 1)
					all[0], err = client.Get(c.Context(), args[0])
				}
				if err != nil {
					return err
				}
				if f.output == "json" {
					err = writeJSON(c.OutOrStdout(), api.List{Instances: all})
				} else {
					err = showVerified(c.OutOrStdout(), all)
				}
				if err != nil {
					return err
				}
				return verified(all)
			})
		},
	}
	f.add(c)
	return c
}

func showVerified(w io.Writer, all []phase.Status) error {
	for _, s := range all {
		if _, err := fmt.Fprintf(w, "%s %s: %s\n", shortID(s.ID, all), clean(s.Phase), clean(string(s.State))); err != nil {
			return err
		}
		if err := listUncovered(w, s); err != nil {
			return err
		}
	}
	return nil
}

// verified is an error unless all phases hold. An instance that has ended has no task
// that its phase would have to hold for.
func verified(all []phase.Status) error {
	bad := 0
	for _, s := range all {
		if s.State != phase.Holds && s.State != phase.Ended {
			bad++
		}
	}
	if bad == 0 {
		return nil
	}
	return &cli.ExitError{Code: cli.ExitIncomplete, Err: fmt.Errorf("%d of %d instances are not in a phase that holds (switch to it again, or create the container anew if it has lost what enforces)", bad, len(all))}
}
