// SPDX-License-Identifier: Apache-2.0

// Package cli holds what the three programs' command lines share: exit codes
// that scripts can rely on and the way an error becomes one.
//
// Exit codes: 0 success, 1 the operation was refused or came to nothing, 2 the
// command line was wrong. `syslatch phase set` tells two refusals apart: 3 the switch
// was refused and nothing has changed, 4 it was begun and doesn't hold for every task
// yet. `syslatch record` and `syslatch run` follow the
// container tools instead, because the status belongs to the command they run:
// 125 syslatch itself, 126 the command can't be executed, 127 it wasn't found.
package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// Exit codes.
const (
	ExitFailure    = 1
	ExitUsage      = 2
	ExitRefused    = 3
	ExitIncomplete = 4
	ExitSyslatch   = 125
	ExitCannotExec = 126
	ExitNotFound   = 127
)

// ExitError carries the exit status for an error. A nil Err exits silently:
// the status is a command's own, or everything was said already.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("exit status %d", e.Code)
	}
	return e.Err.Error()
}

func (e *ExitError) Unwrap() error { return e.Err }

// Usage marks err as the caller's misuse of the command line (exit 2).
func Usage(err error) error { return &ExitError{Code: ExitUsage, Err: err} }

// Report writes err to w as "PROGRAM: error" and returns the exit status for it.
func Report(w io.Writer, program string, err error) int {
	if err == nil {
		return 0
	}
	var exit *ExitError
	if errors.As(err, &exit) {
		if exit.Err != nil {
			fmt.Fprintf(w, "%s: %v\n", program, exit.Err)
		}
		return exit.Code
	}
	fmt.Fprintf(w, "%s: %v\n", program, err)
	return ExitFailure
}

// Root applies to a program's root command what all of them do alike: errors
// are printed once, by main; a wrong flag or argument exits with 2.
func Root(c *cobra.Command) *cobra.Command {
	c.SilenceErrors = true
	c.SilenceUsage = true
	c.Version = Version().String()
	c.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	c.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return Usage(fmt.Errorf("%w (see '%s --help')", err, c.CommandPath()))
	})
	return c
}

// Args wraps a positional-argument check so that its error is a usage error.
func Args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return Usage(fmt.Errorf("%w (see '%s --help')", err, c.CommandPath()))
		}
		return nil
	}
}

// Group makes c a command that only has subcommands: by itself it prints its
// help, and what it doesn't know is a usage error that offers what is near.
func Group(c *cobra.Command, subcommands ...*cobra.Command) *cobra.Command {
	c.AddCommand(subcommands...)
	c.Args = Args(func(c *cobra.Command, args []string) error { return unknownCommand(c, args) })
	c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	return c
}

// unknownCommand is an error unless args are empty.
func unknownCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	c.SuggestionsMinimumDistance = 2
	hint := ""
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		hint = fmt.Sprintf(", did you mean %s?", strings.Join(near, " or "))
	}
	return fmt.Errorf("unknown command %q for %q%s", args[0], c.CommandPath(), hint)
}

// Help is the help command, to whom a topic that doesn't exist is a usage error.
func Help() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND...]",
		Short: "Show the help of a command",
		ValidArgsFunction: func(c *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			at, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var names []string
			for _, sub := range at.Commands() {
				if sub.IsAvailableCommand() && strings.HasPrefix(sub.Name(), prefix) {
					names = append(names, cobra.CompletionWithDesc(sub.Name(), sub.Short))
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(c *cobra.Command, args []string) error {
			at, rest, err := c.Root().Find(args)
			if err != nil {
				return Usage(err)
			}
			if err := unknownCommand(at, rest); err != nil {
				return Usage(err)
			}
			return at.Help()
		},
	}
}

// OutputFlag adds -o, text or json, with its completion.
func OutputFlag(c *cobra.Command, into *string) {
	c.Flags().StringVarP(into, "output", "o", "text", "output `format`: text or json")
	Must(c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)))
}

var formats = []string{"text", "json"}

// CheckOutput is a usage error unless format is one that OutputFlag offers.
func CheckOutput(format string) error {
	if !slices.Contains(formats, format) {
		return Usage(fmt.Errorf("output %q: want text or json", format))
	}
	return nil
}

// Must is for declarations that only a programming error can make fail.
func Must(err error) {
	if err != nil {
		panic(err)
	}
}
