// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/api"
	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/phase"
)

// socketVariable names the socket where --socket doesn't.
const socketVariable = "SYSLATCH_SOCKET"

// phaseFlags are those of all phase commands.
type phaseFlags struct {
	socket string
	output string
}

func (f *phaseFlags) addSocket(c *cobra.Command) {
	c.Flags().StringVar(&f.socket, "socket", "", "`path` of the API's socket (default: $"+socketVariable+", or else "+api.DefaultSocket+")")
	cli.Must(c.MarkFlagFilename("socket", "sock"))
}

func (f *phaseFlags) add(c *cobra.Command) {
	f.addSocket(c)
	cli.OutputFlag(c, &f.output)
}

func (f *phaseFlags) path() string {
	switch fromEnv := os.Getenv(socketVariable); {
	case f.socket != "":
		return f.socket
	case fromEnv != "":
		return fromEnv
	}
	return api.DefaultSocket
}

// with runs do with a client, and tells what its errors mean to a user.
func (f *phaseFlags) with(do func(*api.Client) error) error {
	c := api.NewClient(f.path())
	defer c.Close()
	return phaseError(do(c))
}

// phaseError gives an error its exit status, and what to do about it.
func phaseError(err error) error {
	var (
		transition *phase.TransitionError
		generation *phase.GenerationError
		incomplete *phase.IncompleteError
		exit       *cli.ExitError
	)
	switch {
	case err == nil || errors.As(err, &exit):
		return err
	case errors.Is(err, api.ErrNobody):
		return fmt.Errorf("%w (start syslatchd with a policy that has phases, or one command with 'syslatch run --policy FILE --api-socket PATH -- COMMAND', and name PATH by --socket or $%s)", err, socketVariable)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w (the API is root's: use sudo)", err)
	case errors.As(err, &incomplete):
		return &cli.ExitError{Code: cli.ExitIncomplete, Err: err}
	case errors.As(err, &transition), errors.As(err, &generation):
		return &cli.ExitError{Code: cli.ExitRefused, Err: err}
	case errors.Is(err, phase.ErrUnknown):
		return fmt.Errorf("%w ('syslatch phase list' shows what there is; IDs may be shortened, names don't count)", err)
	}
	return err
}

func newPhaseCommand() *cobra.Command {
	return cli.Group(&cobra.Command{
		Use:   "phase",
		Short: "Show and switch the phases of what runs",
		Long: `A policy's phases are sets of system calls, files, addresses and limits; one of them
is in force for an instance (a container, or a command of 'syslatch run'). Of one that is
recorded nothing is enforced: the phase is where its calls count. These commands ask
who supervises the instances, over a unix socket; the same can be done by HTTP, which
docs/phases.md shows and 'GET /v1/openapi.yaml' on that socket describes.

What phases a policy has, and what they come to on this host, 'syslatch profile
phases' shows: it asks nobody.

INSTANCE is an ID as 'syslatch phase list' prints it, or as much of its beginning as
no other ID has.`,
		Example: `  syslatch phase list
  syslatch phase set 4f2a network`,
	}, newPhaseListCommand(), newPhaseGetCommand(), newPhaseSetCommand(), newPhaseWatchCommand())
}

func newPhaseListCommand() *cobra.Command {
	var f phaseFlags
	c := &cobra.Command{
		Use:   "list",
		Short: "List instances and the phases that they are in",
		Long: `Lists the instances, by ID. STATE is "holds" if the phase does for every task,
"switching" while it is being made to, "degraded" if it could not be, or if a part of
what enforces was lost, and "ended". A "+" behind it says that a part of the phase
isn't enforced on this host: 'syslatch phase get' says which.`,
		Example: `  syslatch phase list
  syslatch phase list -o json | jq -r '.instances[] | select(.state == "degraded") | .id'`,
		Args:              cli.Args(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := cli.CheckOutput(f.output); err != nil {
				return err
			}
			return f.with(func(client *api.Client) error {
				all, err := client.List(c.Context())
				if err != nil {
					return err
				}
				if f.output == "json" {
					return writeJSON(c.OutOrStdout(), api.List{Instances: all})
				}
				return listInstances(c.OutOrStdout(), all)
			})
		},
	}
	f.add(c)
	return c
}

func listInstances(w io.Writer, all []phase.Status) error {
	return table(w, "INSTANCE\tNAME\tWORKLOAD\tPHASE\tSTATE\tGENERATION\tSINCE", func(row func(...any)) {
		for _, s := range all {
			state := string(s.State)
			if len(s.Uncovered) > 0 {
				state += "+"
			}
			row(shortID(s.ID, all), cell(s.Name), cell(s.Workload), cell(s.Phase), clean(state), s.Generation, s.Since.Local().Format(time.DateTime))
		}
	})
}

// shortID is the beginning of a container's ID that people know, where no other
// instance's begins with it.
func shortID(id string, all []phase.Status) string {
	const short = 12
	if len(id) <= short || strings.Trim(id, "0123456789abcdef") != "" {
		return clean(id)
	}
	for _, other := range all {
		if other.ID != id && strings.HasPrefix(other.ID, id[:short]) {
			return id
		}
	}
	return id[:short]
}

// clean makes text harmless to a terminal: names are chosen by who makes a container.
func clean(text string) string {
	if quoted := strconv.Quote(text); quoted != `"`+text+`"` {
		return quoted
	}
	return text
}

func cell(text string) string {
	if text == "" {
		return "-"
	}
	return clean(text)
}

func newPhaseGetCommand() *cobra.Command {
	var f phaseFlags
	c := &cobra.Command{
		Use:   "get INSTANCE",
		Short: "Show an instance's phase, and what of it isn't enforced",
		Example: `  syslatch phase get 4f2a
  syslatch phase get 4f2a -o json | jq -r .phase`,
		Long: `Shows the phase that is in force, since when, which may follow, and what the phase
asks for and is not enforced on this host.`,
		Args:              needInstance(1),
		ValidArgsFunction: f.complete(false),
		RunE: func(c *cobra.Command, args []string) error {
			if err := cli.CheckOutput(f.output); err != nil {
				return err
			}
			return f.with(func(client *api.Client) error {
				s, err := client.Get(c.Context(), args[0])
				if err != nil {
					return err
				}
				if f.output == "json" {
					return writeJSON(c.OutOrStdout(), s)
				}
				return showInstance(c.OutOrStdout(), s)
			})
		},
	}
	f.add(c)
	return c
}

func showInstance(w io.Writer, s phase.Status) error {
	for _, line := range [][2]string{
		{"instance", s.ID},
		{"name", s.Name},
		{"workload", s.Workload},
		{"policy", s.Policy},
		{"phase", s.Phase},
		{"state", string(s.State)},
		{"generation", strconv.FormatUint(s.Generation, 10)},
		{"since", s.Since.Local().Format(time.RFC3339)},
		{"next", strings.Join(s.Next, " ")},
		{"denied", fmt.Sprintf("%d calls", s.Denied)},
	} {
		if _, err := fmt.Fprintf(w, "%-10s  %s\n", line[0], cell(line[1])); err != nil {
			return err
		}
	}
	return writeUncovered(w, s)
}

func writeUncovered(w io.Writer, s phase.Status) error {
	if len(s.Uncovered) == 0 {
		return nil
	}
	fmt.Fprintln(w, "Not enforced:")
	return listUncovered(w, s)
}

func listUncovered(w io.Writer, s phase.Status) error {
	for _, one := range s.Uncovered {
		if _, err := fmt.Fprintf(w, "- %s\n", clean(one)); err != nil {
			return err
		}
	}
	return nil
}

func newPhaseSetCommand() *cobra.Command {
	var f phaseFlags
	s := setter{}
	c := &cobra.Command{
		Use:   "set INSTANCE PHASE",
		Short: "Switch an instance to a phase",
		Long: `Switches, and ends when the phase holds for every task of the instance, calls that
were blocked in the kernel included, or --timeout is over. Interrupted, it leaves a
switch that was begun to be finished.

With --generation N the switch is refused unless the instance's generation is still
N: nobody else has switched since 'syslatch phase get' said so.

With --wait, what time may cure isn't an error until --timeout is over: nobody
listens at the socket yet, there is no such instance yet, or a switch is not
finished. The latter is tried again, unless somebody else has switched meanwhile.

Exit status: 0 the phase holds; 3 the switch was refused and nothing has changed (the
policy doesn't lead there, or the generation is another); 4 the phase is in force for
new calls and doesn't hold for every task, what is missing is said; 2 the command line
is wrong; 1 everything else (nobody listens, there is no such instance, it has ended):
nothing is known to have changed.`,
		Example: `  syslatch phase set 4f2a network
  syslatch phase set 4f2a read_only --wait --timeout 20s
  syslatch phase set 4f2a write_logs --generation "$(syslatch phase get 4f2a -o json | jq .generation)"`,
		Args:              needInstance(2),
		ValidArgsFunction: f.complete(true),
		RunE: func(c *cobra.Command, args []string) error {
			if err := cli.CheckOutput(f.output); err != nil {
				return err
			}
			if s.timeout <= 0 || s.timeout > api.MaxTimeout && !s.wait {
				return cli.Usage(fmt.Errorf("--timeout %v: want more than 0 and, without --wait, at most %v", s.timeout, api.MaxTimeout))
			}
			if c.Flags().Changed("generation") && s.generation == 0 {
				return cli.Usage(errors.New("--generation 0: generations count from 1"))
			}
			return f.with(func(client *api.Client) error {
				status, err := s.set(c.Context(), client, args[0], args[1])
				var incomplete *phase.IncompleteError
				if err != nil && (f.output != "json" || !errors.As(err, &incomplete)) {
					return err
				}
				if incomplete != nil {
					status = incomplete.Status
				}
				if f.output == "json" {
					return errors.Join(phaseError(err), writeJSON(c.OutOrStdout(), status))
				}
				fmt.Fprintf(c.OutOrStdout(), "%s %s: %s, generation %d\n", shortID(status.ID, nil), clean(status.Phase), clean(string(status.State)), status.Generation)
				return writeUncovered(c.OutOrStdout(), status)
			})
		},
	}
	f.add(c)
	c.Flags().BoolVar(&s.wait, "wait", false, "until --timeout, wait for the socket and the instance, and try again what isn't finished")
	c.Flags().DurationVar(&s.timeout, "timeout", api.DefaultTimeout, "`time` that all of it may take")
	c.Flags().Uint64Var(&s.generation, "generation", 0, "refuse unless the instance's generation is `N`")
	return c
}

// setter is a wish to switch.
type setter struct {
	wait       bool
	timeout    time.Duration
	generation uint64
}

func (s setter) set(ctx context.Context, client *api.Client, id, to string) (phase.Status, error) {
	deadline := time.Now().Add(s.timeout)
	generation := s.generation
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		left := max(time.Until(deadline), time.Millisecond)
		status, err := client.Set(ctx, id, to, api.SetOptions{Generation: generation, Timeout: min(left, api.MaxTimeout).Round(time.Millisecond)})
		var incomplete *phase.IncompleteError
		var problem *api.Problem
		again := errors.As(err, &incomplete) || errors.Is(err, api.ErrNobody) || errors.Is(err, phase.ErrUnknown) ||
			errors.As(err, &problem) && problem.Type == api.TypeBusy
		if err == nil || !s.wait || !again || time.Until(deadline) <= pause {
			return status, err
		}
		if incomplete != nil {
			// What is tried again is this switch: not over one that came after it.
			generation = incomplete.Status.Generation
		}
		select {
		case <-ctx.Done():
			return status, ctx.Err()
		case <-time.After(pause):
		}
	}
}

func newPhaseWatchCommand() *cobra.Command {
	var f phaseFlags
	c := &cobra.Command{
		Use:   "watch [INSTANCE]",
		Short: "Print what happens to phases, as it happens",
		Long: `Prints switches, refusals, denied calls and losses from now on: of INSTANCE until it
ends, or of all until it is interrupted. With -o json each event is one line.

Exit status: 0 the instance has ended, or it was interrupted; 1 the stream has ended,
as it does when the supervisor stops; 2 the command line is wrong.`,
		Example: `  syslatch phase watch 4f2a
  syslatch phase watch 4f2a -o json | jq -r 'select(.kind == "denied") | .call'`,
		Args:              cli.Args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: f.complete(false),
		RunE: func(c *cobra.Command, args []string) error {
			if err := cli.CheckOutput(f.output); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			id := ""
			if len(args) > 0 {
				id = args[0]
			}
			err := f.with(func(client *api.Client) error { return watch(ctx, client, id, c.OutOrStdout(), f.output) })
			if ctx.Err() != nil {
				return nil // interrupted
			}
			return err
		},
	}
	f.add(c)
	return c
}

func watch(ctx context.Context, client *api.Client, id string, w io.Writer, output string) error {
	if id != "" { // what the end of the stream then means
		s, err := client.Get(ctx, id)
		if err != nil {
			return err
		}
		id = s.ID
	}
	events, err := client.Watch(ctx, id)
	if err != nil {
		return err
	}
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	for e, err := range events {
		switch {
		case err != nil:
			return err
		case output == "json":
			err = encoder.Encode(e)
		default:
			_, err = fmt.Fprintln(w, eventLine(e))
		}
		if err != nil {
			return err
		}
		if id != "" && e.Kind == phase.Over && e.Instance == id {
			return nil
		}
	}
	if id != "" {
		if s, err := client.Get(ctx, id); errors.Is(err, phase.ErrEnded) || errors.Is(err, phase.ErrUnknown) || err == nil && s.State == phase.Ended {
			return nil // it was known: it is gone
		}
	}
	return errors.New("the stream has ended: its supervisor has stopped")
}

func eventLine(e phase.Event) string {
	parts := []string{e.Time.Local().Format("15:04:05.000"), fmt.Sprintf("%-8s", clean(string(e.Kind))), cell(shortID(e.Instance, nil))}
	switch {
	case e.From != "" && e.To != "":
		parts = append(parts, clean(e.From)+" -> "+clean(e.To))
	case e.To != "":
		parts = append(parts, clean(e.To))
	}
	if e.Call != "" {
		denied := fmt.Sprintf("%d %s in %s", e.Count, clean(e.Call), clean(e.From))
		if e.PID != 0 { // BPF programs don't tell
			denied += fmt.Sprintf(", pid %d", e.PID)
		}
		parts = append(parts, denied)
	}
	if e.By != "" {
		parts = append(parts, fmt.Sprintf("(%s, %s)", clean(string(e.Origin)), clean(e.By)))
	}
	if e.Message != "" {
		parts = append(parts, clean(e.Message))
	}
	return strings.Join(parts, "  ")
}

func needInstance(n int) cobra.PositionalArgs {
	return cli.Args(func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) > n:
			return fmt.Errorf("too many arguments: want %d", n)
		case len(args) == 0 || args[0] == "":
			return errors.New("say which instance")
		case len(args) < n || args[n-1] == "":
			return errors.New("say which phase")
		}
		return nil
	})
}

// complete offers instances, and then the phases that may follow.
func (f *phaseFlags) complete(phases bool) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		const only = cobra.ShellCompDirectiveNoFileComp
		ctx := c.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		client := api.NewClient(f.path())
		defer client.Close()
		var offers []string
		switch {
		case len(args) == 0:
			all, _ := client.List(ctx) // none, if nobody listens
			for _, s := range all {
				if strings.HasPrefix(s.ID, prefix) && s.State != phase.Ended {
					offers = append(offers, cobra.CompletionWithDesc(s.ID, clean(strings.TrimSpace(s.Name+" in "+s.Phase))))
				}
			}
		case len(args) == 1 && phases:
			s, _ := client.Get(ctx, args[0]) // an unknown one has none
			for _, next := range s.Next {
				if strings.HasPrefix(next, prefix) {
					offers = append(offers, next)
				}
			}
		}
		return offers, only
	}
}
