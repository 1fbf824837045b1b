// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

const suggestSchema = "syslatch.dev/suggestion/v1"

type suggestFlags struct {
	profileFlags
	from []string
	opts profiles.SuggestOptions
}

func newProfileSuggestCommand() *cobra.Command {
	var f suggestFlags
	c := &cobra.Command{
		Use:   "suggest {WORKLOAD | --from FILE...}",
		Short: "Make the phases of a policy out of recordings by phase",
		Long: `Unites what a workload did in each phase while it was recorded, and prints it as
'phases' for its policy, to be read and put into the policy file. Recordings are by
phase where syslatchd recorded (mode: record) by a policy with phases, and where
'syslatch record --phases' did: such files are named with --from.

A phase allows what was called in it, and the floor. Where the recordings tell, it is
narrower than the call's name: opens that only read; processes in no new namespace;
families of sockets, requests of ioctl and options of prctl, if there are at most 8.
Paths and addresses are not recorded: add 'files' and 'network' by hand. What can be
enforced of it 'syslatch profile phases' shows.

A recording that may lack calls is left out, and so is one that wasn't made by phase;
both are named in the output. With --allow-losses the former counts. A file of --from
that may lack calls is an error.

JSON output has the schema ` + suggestSchema + `; fields may be added to it.

Exit status: 0 there are phases; 1 no recording is good for any, or it can't be read;
2 the command line is wrong.`,
		Example: `  syslatch profile suggest docker.io/library/node/agent >suggested.yaml
  syslatch profile suggest --from app.rec --initial read
  syslatch profile suggest docker.io/library/node/agent -o json | jq '.phases[] | .name'`,
		Args: cli.Args(func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return fmt.Errorf("%d arguments, want one: WORKLOAD", len(args))
			case len(args) == 0 && len(f.from) == 0:
				return errors.New("say which workload ('syslatch profile list' shows them), or which recordings: --from FILE")
			}
			return nil
		}),
		ValidArgsFunction: f.completeArgs(false),
		RunE:              f.run,
	}
	f.add(c)
	fl := c.Flags()
	fl.StringArrayVar(&f.from, "from", nil, "take the recording in `FILE` ('syslatch record --recording' makes it); may be repeated")
	fl.StringVar(&f.opts.Initial, "initial", "", "`phase` to begin in (default: the one in which the recordings began)")
	fl.BoolVar(&f.opts.AllowLosses, "allow-losses", false, "also take recordings that may lack calls")
	cli.Must(c.MarkFlagFilename("from"))
	cli.Must(c.RegisterFlagCompletionFunc("initial", f.completePhase))
	return c
}

func (f *suggestFlags) run(c *cobra.Command, args []string) error {
	if err := cli.CheckOutput(f.output); err != nil {
		return err
	}
	recordings, err := f.recordings(args)
	if err != nil {
		return err
	}
	s, err := profiles.SuggestPhases(recordings, f.opts)
	if errors.Is(err, profiles.ErrNoInitial) {
		err = fmt.Errorf("%w (say --initial PHASE)", err)
	}
	if err != nil {
		return err
	}
	for _, rec := range s.Recordings {
		if rec.LeftOut != "" {
			fmt.Fprintf(c.ErrOrStderr(), "syslatch: recording %s left out: %s\n", clean(rec.ID), clean(rec.LeftOut))
		}
	}
	if f.output == "json" {
		return writeJSON(c.OutOrStdout(), struct {
			Schema string `json:"schema"`
			*profiles.Suggestion
		}{suggestSchema, s})
	}
	data, err := policy.SuggestedPhases(s)
	if err == nil {
		_, err = c.OutOrStdout().Write(data)
	}
	return err
}

// recordings are those of a workload in the store, and those of files.
func (f *suggestFlags) recordings(args []string) (all []*profiles.Recording, err error) {
	if len(args) > 0 {
		s, err := f.open()
		if err != nil {
			return nil, err
		}
		defer s.Close()
		all, err = s.Recordings(args[0])
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w (recordings are root's: use sudo)", err)
		}
		if err == nil && len(all) == 0 {
			err = fmt.Errorf("workload %q has no recordings ('syslatch profile list' shows workloads)", args[0])
		}
		if err != nil {
			return nil, err
		}
	}
	for _, path := range f.from {
		rec, err := readRecording(path)
		if err != nil {
			return nil, err
		}
		if losses := rec.Blocking(); len(losses) > 0 && !f.opts.AllowLosses {
			return nil, fmt.Errorf("%s: %w", path, &profiles.LossyError{Recording: rec.ID, Losses: losses})
		}
		all = append(all, rec)
	}
	return all, nil
}

func readRecording(path string) (*profiles.Recording, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("recording: %w", err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, profiles.MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("recording: %w", err)
	}
	rec, err := profiles.DecodeRecording(data)
	if err != nil {
		return nil, fmt.Errorf("recording %s: %w ('syslatch record --recording' makes them)", path, err)
	}
	return rec, nil
}

func (f *suggestFlags) completePhase(_ *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
	recordings, _ := f.recordings(args) // none, if they can't be read
	for _, rec := range recordings {
		for name := range rec.Phases {
			if profiles.CheckPhaseName(name) == nil && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return names, cobra.ShellCompDirectiveNoFileComp
}
