// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/hooksd"
	"github.com/syslatch/syslatch/internal/policy"
)

// hookFlags are what every hook command takes.
type hookFlags struct {
	hooksd.Options
	output string
}

func (f *hookFlags) add(c *cobra.Command) {
	c.Flags().StringVar((*string)(&f.Engine), "engine", string(hooksd.Podman), "`engine`: podman or crio")
	c.Flags().StringVar(&f.Dir, "dir", "", "hooks `directory` (default: "+hooksd.PodmanDir+" for podman, "+hooksd.SharedDir+" for crio)")
	c.Flags().StringVarP(&f.output, "output", "o", "text", "output `format`: text or json")
}

func (f *hookFlags) check() error {
	if f.output != "text" && f.output != "json" {
		return cli.Usage(fmt.Errorf("output %q: want text or json", f.output))
	}
	if f.Engine != hooksd.Podman && f.Engine != hooksd.CRIO {
		return cli.Usage(fmt.Errorf("engine %q: want podman or crio", f.Engine))
	}
	return nil
}

func newHookCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "hook",
		Short: "Set up syslatch-hook for podman or CRI-O",
		Long: `syslatch-hook does for podman what syslatchd does for containerd, with no daemon:
podman runs it when a container is created and when it has ended. These commands
write, remove and check the files by which an engine finds it.

Which containers are recorded, confined and limited is up to the policy file. To
let those who start containers choose, it says

  policies:
  - name: podman
    match: {}
    mode: "off"
    annotations: [mode, workload]
    allowedModes: [off, record, audit, enforce]

and they say podman run --annotation syslatch.dev/mode=record …`,
		Example: `  syslatch hook install
  syslatch hook status
  syslatch hook uninstall`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newHookInstallCommand(), newHookUninstallCommand(), newHookStatusCommand())
	return c
}

func newHookInstallCommand() *cobra.Command {
	var f hookFlags
	c := &cobra.Command{
		Use:   "install",
		Short: "Write the engine's hook files",
		Long: `Writes one JSON file for each stage (oci-hooks(5)) and prints what it wrote. podman
must be told of the directory by one line of containers.conf, which is printed
too and not written. Files that are there already are replaced.

CRI-O has no stage in which a container's spec could be changed: with
--engine crio the hook records, and refuses what asks for more. For limits and
enforcement there is syslatchd, its NRI plugin.`,
		Example: `  syslatch hook install
  syslatch hook install --dir /srv/hooks.d --config /srv/policy.yaml
  syslatch hook install -o json | jq -r .confLine
  syslatch hook install --engine crio`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if f.Hook == "" {
				f.Hook = besides("syslatch-hook")
			}
			r, err := hooksd.Install(f.Options)
			if err != nil {
				return err
			}
			if f.output == "json" {
				return writeJSON(c.OutOrStdout(), r)
			}
			listFiles(c.OutOrStdout(), "wrote", r.Files)
			if r.ConfLine != "" {
				fmt.Fprintf(c.OutOrStdout(), "\nFor podman to read them, put this line into %s:\n\n  %s\n", r.ConfFile, r.ConfLine)
			}
			return nil
		},
	}
	f.add(c)
	c.Flags().StringVar(&f.Hook, "hook", "", "`path` of syslatch-hook (default: beside this program)")
	c.Flags().StringVarP(&f.Config, "config", "c", "/etc/syslatch/policy.yaml", "policy `file` that the hook reads")
	c.Flags().StringVar(&f.Socket, "rootless-socket", "", "syslatchd's `socket` for rootless podman, where the policy file gives another than "+policy.DefaultRootlessSocket)
	return c
}

// besides is a program in this one's directory.
func besides(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(self), name)
}

func listFiles(w io.Writer, what string, files []string) {
	for _, path := range files {
		fmt.Fprintf(w, "%s %s\n", what, path)
	}
}

func newHookUninstallCommand() *cobra.Command {
	var f hookFlags
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove the engine's hook files",
		Long: `Removes what 'syslatch hook install' wrote. Containers that run keep their filters
and limits; podman knows their hooks and still runs poststop when they end, so
leave syslatch-hook in place until then. The line in containers.conf is yours to
remove.`,
		Example: `  syslatch hook uninstall
  syslatch hook uninstall --dir /srv/hooks.d -o json`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			r, err := hooksd.Uninstall(f.Options)
			if err != nil {
				return err
			}
			if f.output == "json" {
				return writeJSON(c.OutOrStdout(), r)
			}
			listFiles(c.OutOrStdout(), "removed", r.Files)
			if len(r.Files) == 0 {
				fmt.Fprintf(c.OutOrStdout(), "nothing to remove in %s\n", r.Dir)
			}
			return nil
		},
	}
	f.add(c)
	return c
}

func newHookStatusCommand() *cobra.Command {
	var f hookFlags
	c := &cobra.Command{
		Use:   "status",
		Short: "Tell whether the engine would find the hook",
		Long: `Looks at the hook files, the program and the policy file that they name, and
podman's configuration (containers.conf(5), CONTAINERS_CONF).

Exit status: 0 the engine finds all of it; 1 it doesn't, and why is printed; 2
the command line is wrong.`,
		Example: `  syslatch hook status
  syslatch hook status -o json | jq -r '.problems[]'`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			s, err := hooksd.Look(f.Options, "/", os.Getenv("CONTAINERS_CONF"))
			if err != nil {
				return err
			}
			if f.output == "json" {
				err = writeJSON(c.OutOrStdout(), s)
			} else {
				listFiles(c.OutOrStdout(), "good:", s.Files)
				for _, p := range s.Problems {
					fmt.Fprintln(c.OutOrStdout(), "problem:", p)
				}
			}
			if err == nil && !s.Works {
				err = &cli.ExitError{Code: cli.ExitFailure}
			}
			return err
		},
	}
	f.add(c)
	return c
}
