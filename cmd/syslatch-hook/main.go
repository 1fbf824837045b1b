// SPDX-License-Identifier: Apache-2.0

// Command syslatch-hook is the OCI hook: podman and other engines run it at the
// stages of a container's life. It needs no daemon but for phases.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/hook"
	"github.com/syslatch/syslatch/internal/agent"
	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
)

const defaultConfig = "/etc/syslatch/policy.yaml"

func main() {
	// It lives for milliseconds: memory is given back by its end. Specs are
	// bounded, and so is this.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(256 << 20)
	os.Exit(cli.Report(os.Stderr, "syslatch-hook", run(os.Args[1:])))
}

func run(args []string) error {
	c := newCommand()
	c.SetArgs(args)
	return c.Execute()
}

func newCommand() *cobra.Command {
	var config, socket string
	root := cli.Root(&cobra.Command{
		Use:   "syslatch-hook",
		Short: "Record, enforce and limit containers of an engine that runs OCI hooks",
		Long: `syslatch-hook is run by podman, at stages of a container's life, as 'syslatch hook
install' sets it up. It does what the policy file says, with no daemon running:
between its runs, recordings go on in the kernel. Containers with phases need a
running syslatchd, which supervises them. Rootless podman's hooks, which can't do
any of that, ask syslatchd, where its policy file has hook.rootless.

Messages go to syslog, identifier "syslatch"; to standard error where there is no
syslog. What keeps a container from starting is shown by the engine.

Exit status: 0 done; 1 the container must not start, or its end could not be
published yet; 2 the command line is wrong.`,
		Example: `  syslatch hook install
  syslatch-hook precreate --config /etc/syslatch/policy.yaml <config.json >changed.json`,
		Version: cli.Version().String(),
		Args:    cli.Args(cobra.NoArgs),
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	})
	root.CompletionOptions.DisableDefaultCmd = true
	root.PersistentFlags().StringVarP(&config, "config", "c", defaultConfig, "policy `file`")
	root.PersistentFlags().StringVar(&socket, "rootless-socket", policy.DefaultRootlessSocket, "syslatchd's `socket` for hooks that are not the host's root")
	stage := func(name, short string) {
		root.AddCommand(&cobra.Command{
			Use: name, Short: short, Args: cli.Args(cobra.NoArgs),
			Example: "  syslatch-hook " + name + " --config /etc/syslatch/policy.yaml",
			RunE: func(c *cobra.Command, _ []string) error {
				return serve(c.Context(), name, config, socket, c.InOrStdin(), c.OutOrStdout())
			},
		})
	}
	stage(hook.StagePrecreate, "Change a container's spec: standard input to standard output")
	stage(hook.StageCreateRuntime, "Begin to record a container: its state on standard input")
	stage(hook.StagePoststart, "Read a running container's settings back: its state on standard input")
	stage(hook.StagePoststop, "Publish what a container did: its state on standard input")
	root.AddCommand(&cobra.Command{
		Use: hook.StageDeny + " -- MESSAGE", Hidden: true, Args: cli.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			hook.Tell(os.Stderr, args[0])
			return &cli.ExitError{Code: cli.ExitFailure}
		},
	})
	return root
}

// serve runs one stage.
func serve(ctx context.Context, stage, config, socket string, in io.Reader, out io.Writer) (err error) {
	if ctx == nil {
		ctx = context.Background()
	}
	log, closeLog := newLog(os.Stderr)
	defer closeLog()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	h := &hook.Hook{Log: log, Self: self, Args: []string{"--config", config}}
	if socket != policy.DefaultRootlessSocket {
		h.Args = append(h.Args, "--rootless-socket", socket)
	}
	if err := agent.HostRoot(); err != nil {
		h.Agent = hook.Remote{Socket: socket, Why: err, Check: func(profile, own *specs.LinuxSeccomp) error {
			return seccomp.Check(seccomp.WithoutUnknown(profile, own))
		}}
	} else {
		hooks, err := open(config, log)
		if err != nil {
			err = fmt.Errorf("%s: %w", stage, err)
			if stage == hook.StagePrecreate {
				return h.Refuse(in, out, err)
			}
			return failed(log, stage, err)
		}
		defer func() {
			// The engine has its answer. What hangs ends with this process.
			if err := hooks.Close(); err != nil {
				log.WithError(err).Warn("not closed")
			}
		}()
		h.Agent = hooks
	}
	switch stage {
	case hook.StagePrecreate:
		return h.Precreate(ctx, in, out)
	case hook.StageCreateRuntime:
		return failed(log, stage, h.CreateRuntime(ctx, in))
	case hook.StagePoststart:
		// Logged; the container runs.
		_ = h.Poststart(ctx, in)
		return nil
	default:
		if err := h.Poststop(ctx, in); err != nil {
			return &cli.ExitError{Code: cli.ExitFailure} // logged
		}
		return nil
	}
}
