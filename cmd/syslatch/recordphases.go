// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/agent"
	"github.com/syslatch/syslatch/internal/api"
	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/phase"
)

// recordPhaseFlags are those of a recording by phase. What means the same has the names
// of `run`.
type recordPhaseFlags struct {
	names []string
	run   runFlags
}

func (f *recordPhaseFlags) add(c *cobra.Command) {
	fl := c.Flags()
	fl.StringSliceVar(&f.names, "phases", nil, "record by phase: `NAMES` of phases, separated by commas")
	fl.StringVar(&f.run.policy, "policy", "", "record by the phases of a policy in `FILE`")
	fl.StringVar(&f.run.policyName, "policy-name", "", "`name` of the policy in the file (default: the one that has phases)")
	fl.StringVar(&f.run.phase, "phase", "", "`phase` to begin in (default: the first of --phases, the policy's initial one)")
	fl.StringVar(&f.run.socket, "api-socket", "", "serve the API that switches phases on this unix socket `PATH`")
	fl.StringVar(&f.run.events, "events", "", "append switches and refusals to `FILE`, a line of JSON each")
	fl.StringVar(&f.run.id, "id", "", "`id` of the instance in the API (default: record-PID)")
	cli.Must(c.MarkFlagFilename("policy", "yaml", "yml", "conf"))
	cli.Must(c.RegisterFlagCompletionFunc("phases", cobra.NoFileCompletions))
	cli.Must(c.RegisterFlagCompletionFunc("phase", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		phases, err := f.load()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return phases.Names, cobra.ShellCompDirectiveNoFileComp
	}))
}

// given says whether anything of it is.
func (f *recordPhaseFlags) given() bool {
	r := &f.run
	return f.names != nil || slices.ContainsFunc([]string{r.policy, r.policyName, r.phase, r.socket, r.events, r.id}, func(s string) bool { return s != "" })
}

// load gives the phases that are named, or those of the policy.
func (f *recordPhaseFlags) load() (*agent.RecordPhases, error) {
	if f.run.policy == "" {
		return &agent.RecordPhases{Names: f.names}, nil
	}
	p, err := f.run.load()
	if err != nil {
		return nil, err
	}
	return &agent.RecordPhases{Names: phaseNames(p), Begin: p.Phases.Initial, Policy: p.Name}, nil
}

func (f *recordPhaseFlags) into(c *cobra.Command, opts *agent.RecordOptions) error {
	byName, byPolicy := c.Flags().Changed("phases"), c.Flags().Changed("policy")
	switch {
	case !f.given() && !byName && !byPolicy:
		return nil
	case byName && byPolicy:
		return cli.Usage(errors.New("--phases and --policy exclude each other"))
	case !byName && !byPolicy:
		return cli.Usage(errors.New("say which phases: --phases NAME,NAME..., or --policy FILE"))
	case byPolicy && f.run.policy == "":
		return cli.Usage(errors.New("--policy is empty: say which file"))
	case opts.Recording == "":
		return cli.Usage(errors.New("say where to write what belongs to which phase: --recording FILE (the profile has the calls of all phases)"))
	}
	phases, err := f.load()
	if err != nil {
		return commandExit(0, err)
	}
	phases.ID, phases.Events = f.run.id, f.run.events
	if f.run.phase != "" {
		if phases.Begin = f.run.phase; !slices.Contains(phases.Names, phases.Begin) {
			return cli.Usage(fmt.Errorf("--phase %q: want one of %s", phases.Begin, strings.Join(phases.Names, ", ")))
		}
	}
	if err := phases.Check(); err != nil {
		return cli.Usage(fmt.Errorf("--phases: %w", err))
	}
	log := logrus.New()
	log.SetOutput(os.Stderr)
	phases.Log = logrus.NewEntry(log)
	if f.run.socket != "" {
		phases.Serve = func(s *phase.Supervisor) (io.Closer, error) {
			return (&api.Server{Phases: s, Events: s, Log: phases.Log}).Start(f.run.socket)
		}
	}
	opts.Phases = phases
	return nil
}
