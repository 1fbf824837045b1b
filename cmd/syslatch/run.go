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
	"github.com/syslatch/syslatch/internal/policy"
)

type runFlags struct {
	profile    string
	noNewPrivs bool

	policy, policyName, phase string
	gaps, socket, events, id  string
	parent                    string
}

func newRunCommand() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use:   "run --profile FILE | --policy FILE [flags] -- COMMAND [ARG...]",
		Short: "Run a command confined by a seccomp profile, or in the phases of a policy",
		Long: `With --profile, loads the profile as a seccomp filter and becomes COMMAND: same
process, same standard streams, nothing left of syslatch. A call outside the profile
fails with the profile's errno (EPERM in recorded profiles); calls newer than this
kernel fail with ENOSYS, so that libc falls back.

The profile is plain OCI JSON, not a template of docker or podman (archMap,
includes), and must allow execve, as recorded profiles do. Without root
(precisely: without CAP_SYS_ADMIN) no_new_privs is set, as the kernel demands.

With --policy, runs COMMAND in a phase of a policy, in a cgroup of its own, and
stays to supervise it and all that it starts. The phase is switched over the socket
of --api-socket, with 'syslatch phase set --socket' or plain HTTP. What the phase does not
allow fails with EPERM. If syslatch is killed, what differs between phases fails
with ENOSYS from then on. That needs root, or a cgroup that is delegated. COMMAND,
which runs as the same user, may use that socket, too, but only to tighten itself.
Its phases' limits are set as far as COMMAND's cgroup has the controllers, which those
above it have to enable: it is below syslatch's own, or where --cgroup-parent says.

'syslatch profile phases' shows what phases come to. What a policy asks for and
this command can't enforce is an error, unless the policy's phases say
'gaps: report' or --gaps does.

Exit status: that of COMMAND; 125 if syslatch itself failed, 126 if COMMAND can't
be executed, 127 if it wasn't found; 2 if the command line is wrong.`,
		Example: `  syslatch run --profile app.json -- ./app
  syslatch run --profile app.json --no-new-privs -- mkdir /tmp/x
  syslatch run --policy phases.yaml --phase write_logs --api-socket /run/agent.sock -- ./app`,
		Args:              needCommand("syslatch run --profile FILE -- COMMAND"),
		ValidArgsFunction: completeCommand,
		RunE:              f.run,
	}
	fl := c.Flags()
	fl.SetInterspersed(false)
	fl.StringVarP(&f.profile, "profile", "p", "", "seccomp profile `FILE`")
	fl.BoolVar(&f.noNewPrivs, "no-new-privs", false, "set no_new_privs even where the filter could be loaded without")
	fl.StringVar(&f.policy, "policy", "", "policy `FILE` with phases")
	fl.StringVar(&f.policyName, "policy-name", "", "`name` of the policy in the file (default: the one that has phases)")
	fl.StringVar(&f.phase, "phase", "", "`phase` to begin in (default: the policy's initial one)")
	fl.StringVar(&f.parent, "cgroup-parent", "", "make COMMAND's cgroup below this `DIR` of cgroup v2 (default: syslatch's own cgroup)")
	fl.StringVar(&f.gaps, "gaps", "", "what to do about what can't be enforced: deny or report (default: as the policy says)")
	fl.StringVar(&f.socket, "api-socket", "", "serve the API that switches phases on this unix socket `PATH`")
	fl.StringVar(&f.events, "events", "", "append switches, refusals and denials to `FILE`, a line of JSON each")
	fl.StringVar(&f.id, "id", "", "`id` of the instance in the API (default: run-PID)")
	cli.Must(c.MarkFlagFilename("profile", "json"))
	cli.Must(c.MarkFlagFilename("policy", "yaml", "yml", "conf"))
	cli.Must(c.MarkFlagDirname("cgroup-parent"))
	cli.Must(c.RegisterFlagCompletionFunc("gaps", cobra.FixedCompletions([]string{string(policy.GapsDeny), string(policy.GapsReport)}, cobra.ShellCompDirectiveNoFileComp)))
	cli.Must(c.RegisterFlagCompletionFunc("phase", f.completePhase))
	return c
}

func (f *runFlags) completePhase(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	p, err := f.load()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return phaseNames(p), cobra.ShellCompDirectiveNoFileComp
}

func phaseNames(p *policy.Policy) (names []string) {
	for _, ph := range p.Phases.Phases {
		names = append(names, ph.Name)
	}
	return names
}

func (f *runFlags) load() (*policy.Policy, error) {
	return loadPhases(f.policy, f.policyName, "--policy-name")
}

func (f *runFlags) run(c *cobra.Command, args []string) error {
	switch {
	case f.profile == "" && f.policy == "":
		return cli.Usage(errors.New("say which profile: --profile FILE ('syslatch record' makes one), or which phases: --policy FILE"))
	case f.profile != "" && f.policy != "":
		return cli.Usage(errors.New("--profile and --policy exclude each other"))
	case f.profile != "":
		for _, name := range []string{"policy-name", "phase", "gaps", "api-socket", "events", "id", "cgroup-parent"} {
			if c.Flags().Changed(name) {
				return cli.Usage(fmt.Errorf("--%s is for --policy", name))
			}
		}
		return commandExit(0, agent.RunCommand(agent.RunOptions{Command: args, Profile: f.profile, NoNewPrivs: f.noNewPrivs}))
	}
	gaps := policy.Gaps(f.gaps)
	if c.Flags().Changed("gaps") && gaps != policy.GapsDeny && gaps != policy.GapsReport {
		return cli.Usage(fmt.Errorf("--gaps %q: want deny or report", f.gaps))
	}
	p, err := f.load()
	if err != nil {
		return commandExit(0, err)
	}
	if f.phase != "" && !slices.Contains(phaseNames(p), f.phase) {
		return cli.Usage(fmt.Errorf("--phase %q: policy %s has %s", f.phase, p.Name, strings.Join(phaseNames(p), ", ")))
	}
	log := logrus.New()
	log.SetOutput(os.Stderr)
	opts := agent.RunPhasesOptions{
		Command: args, Policy: p, Phase: f.phase, Gaps: gaps, ID: f.id, Events: f.events,
		NoNewPrivs: f.noNewPrivs, CgroupParent: f.parent, Log: logrus.NewEntry(log), Messages: c.ErrOrStderr(),
	}
	if f.socket != "" {
		opts.Socket = f.socket
		opts.Serve = func(s *phase.Supervisor, instanceOf func(int) (string, error)) (io.Closer, error) {
			return (&api.Server{Phases: s, Events: s, InstanceOf: instanceOf, Log: opts.Log}).Start(f.socket)
		}
	}
	status, err := agent.RunPhases(opts)
	return commandExit(status, err)
}

// newInjectCommand is for run, which starts it.
func newInjectCommand() *cobra.Command {
	return &cobra.Command{
		Use:    agent.InjectCommand,
		Hidden: true,
		Args:   cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			log := logrus.New()
			log.SetOutput(c.ErrOrStderr())
			log.SetLevel(logrus.WarnLevel)
			return agent.Injecting(c.InOrStdin(), c.OutOrStdout(), logrus.NewEntry(log))
		},
	}
}
