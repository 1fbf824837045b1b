// SPDX-License-Identifier: Apache-2.0

// Command syslatchd is the node daemon: an NRI plugin that records, versions
// and injects seccomp profiles, started by a service manager or by the runtime.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/hook"
	"github.com/syslatch/syslatch/internal/agent"
	phaseapi "github.com/syslatch/syslatch/internal/api"
	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/holder"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/plugin"
)

const defaultConfig = "/etc/syslatch/policy.yaml"

func main() {
	os.Exit(cli.Report(os.Stderr, "syslatchd", run(os.Args[1:])))
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	c := newCommand()
	c.SetArgs(args)
	return c.ExecuteContext(ctx)
}

type options struct {
	config    string
	check     bool
	nriSocket string
	logLevel  string
	logFormat string
	logFile   string
}

func newCommand() *cobra.Command {
	var o options
	c := cli.Root(&cobra.Command{
		Use:   "syslatchd",
		Short: "Record, version and enforce the system calls of this node's containers",
		Long: `syslatchd connects to containerd's or CRI-O's NRI socket and, by one policy file,
records containers' system calls, publishes profile versions, and injects them.

It runs in two ways:

  external      started by a service manager; reads --config, connects to the NRI
                socket, and connects again when the runtime restarts
  pre-launched  started by the runtime from its NRI plugin directory, under a name
                like 10-syslatch. Its policy is the file 10-syslatch.conf (else
                syslatch.conf) of the runtime's NRI configuration directory, or
                ` + defaultConfig + ` where there is none. The runtime gives
                it no terminal: it logs to STATEDIR/syslatchd.log.

Where a policy has phases it supervises the containers that have them, and serves the
API by which they are switched at STATEDIR/api.sock (see 'syslatch phase --help').

With hook.rootless in the policy file it also serves the hooks of the users' rootless
podman that are listed there, at a socket of its own.

It may be killed at any moment: recordings go on in the kernel, and the next start
picks them up. Two of them on one host need a stateDir, a bpffs directory and an NRI
plugin name each.

Exit status: 0 stopped by a signal, or the configuration is good (--check-config);
1 it failed, or the configuration is bad; 2 the command line is wrong.`,
		Example: `  syslatchd --config /etc/syslatch/policy.yaml
  syslatchd --config policy.yaml --check-config
  syslatchd --log-format json --log-file /var/log/syslatchd.log
  ln -s /usr/bin/syslatchd /opt/nri/plugins/10-syslatch
  syslatchd completion bash > /etc/bash_completion.d/syslatchd`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if o.check {
				return checkConfig(c.OutOrStdout(), o.config)
			}
			return serve(c.Context(), o)
		},
	})
	c.AddCommand(newHolderCommand())
	f := c.Flags()
	f.StringVarP(&o.config, "config", "c", defaultConfig, "policy `file`")
	f.BoolVar(&o.check, "check-config", false, "check the policy file and exit")
	f.StringVar(&o.nriSocket, "nri-socket", "", "the runtime's NRI `socket` (default: the policy's, else "+api.DefaultSocketPath+")")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warning or error")
	f.StringVar(&o.logFormat, "log-format", "text", "text or json")
	f.StringVar(&o.logFile, "log-file", "", "append the log to this `file` (default: standard error)")
	cli.Must(c.MarkFlagFilename("config", "yaml", "yml", "conf"))
	cli.Must(c.MarkFlagFilename("log-file"))
	cli.Must(c.MarkFlagFilename("nri-socket", "sock"))
	for flag, values := range map[string][]string{"log-level": logLevels, "log-format": logFormats} {
		cli.Must(c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)))
	}
	return c
}

// holderCommand is the hidden subcommand that keeps listeners while no syslatchd runs.
const holderCommand = "internal-holder"

func newHolderCommand() *cobra.Command {
	return &cobra.Command{
		Use: holderCommand + " STATEDIR", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, _ []string) error { return holder.Serve(c.Context()) },
	}
}

var (
	logLevels  = []string{"debug", "info", "warning", "error"}
	logFormats = []string{"text", "json"}
)

func policyOptions() policy.Options { return policy.Options{KnownCall: seccomp.Known, Phases: true} }

func loadPolicy(path string) (*policy.File, error) {
	p, err := policy.Load(path, policyOptions())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w (write one, or name yours with --config)", err)
	}
	return p, err
}

func checkConfig(w io.Writer, path string) error {
	p, err := loadPolicy(path)
	if err != nil {
		return err
	}
	policies := "policies"
	if len(p.Policies) == 1 {
		policies = "policy"
	}
	fmt.Fprintf(w, "%s: good, %d %s\n", path, len(p.Policies), policies)
	return nil
}

// serve runs the daemon until ctx ends.
func serve(ctx context.Context, o options) error {
	log, err := newLog(o)
	if err != nil {
		return err
	}
	if os.Getenv(api.PluginSocketEnvVar) != "" {
		return servePrelaunched(ctx, o, log)
	}
	p, err := loadPolicy(o.config)
	if err != nil {
		return err
	}
	a, err := newAgent(p, log)
	if err != nil {
		return err
	}
	defer closeAgent(a, log)
	stop, err := serveRootless(ctx, p, a, log)
	if err != nil {
		return err
	}
	defer stop()
	stopAPI, err := serveAPI(p, a, log)
	if err != nil {
		return err
	}
	defer stopAPI()
	log.WithFields(logrus.Fields{"version": cli.Version().String(), "config": o.config, "policies": len(p.Policies)}).Info("started")
	socket := o.nriSocket
	if socket == "" {
		socket = p.NRI.Socket
	}
	return reconnect(ctx, log, func() error {
		nri, err := plugin.New(a, log, plugin.Options{
			Socket: socket, Name: orDefault(p.NRI.PluginName, "syslatch"), Index: orDefault(p.NRI.PluginIndex, "10"),
			Timeout: p.NRI.RequestTimeout,
		})
		if err != nil {
			return err
		}
		return nri.Run(ctx)
	})
}

// serveRootless serves the hooks of rootless podman, where the policy file has any
// users. stop ends that and waits for it.
func serveRootless(ctx context.Context, p *policy.File, a *agent.Agent, log *logrus.Entry) (stop func(), err error) {
	r := p.Hook.Rootless
	if len(r.Users) == 0 {
		return func() {}, nil
	}
	l, err := hook.Listen(r.Socket, p.StateDir)
	if err != nil {
		return nil, fmt.Errorf("hook.rootless: %w", err)
	}
	s := &hook.Server{
		Agent: func(u policy.User, pid int) hook.Agent { return a.Hooks(u, pid) },
		Users: r.Users, Log: log,
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(ctx, l); err != nil {
			log.WithError(err).Error("rootless hooks are not served any more (restart syslatchd)")
		}
	}()
	log.WithFields(logrus.Fields{"socket": r.Socket, "users": r.Users}).Info("serving rootless podman")
	return func() {
		cancel()
		<-done
	}, nil
}

// serveAPI serves the API that switches phases, where the policy file has phases.
func serveAPI(p *policy.File, a *agent.Agent, log *logrus.Entry) (stop func(), err error) {
	s := a.Phases()
	if s == nil {
		return func() {}, nil
	}
	socket := filepath.Join(p.StateDir, "api.sock")
	server, err := (&phaseapi.Server{Phases: s, Events: s, InstanceOf: a.InstanceOf, Log: log}).Start(socket)
	if err != nil {
		return nil, err
	}
	log.WithField("socket", socket).Info("serving phases")
	return func() { _ = server.Close() }, nil
}

// reconnect runs connect again whenever it ends, until ctx does: the runtime may
// be restarted, or not be up yet.
func reconnect(ctx context.Context, log *logrus.Entry, connect func() error) error {
	const first, most = 100 * time.Millisecond, 5 * time.Second
	wait := first
	for {
		began := time.Now()
		err := connect()
		if ctx.Err() != nil {
			log.Info("stopped")
			return nil
		}
		if time.Since(began) > most {
			wait = first // that was a connection, not an attempt
		}
		log.WithError(err).WithField("retry_in", wait).Warn("not connected to the runtime: containers created now are not covered")
		select {
		case <-ctx.Done():
			log.Info("stopped")
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, most)
	}
}

// servePrelaunched serves the one connection that the runtime gave; the runtime
// doesn't start a plugin twice.
func servePrelaunched(ctx context.Context, o options, log *logrus.Entry) error {
	type served struct {
		*agent.Agent
		stop func()
	}
	var made atomic.Pointer[served] // by Configure, on a goroutine of the stub's
	nri, err := plugin.New(nil, log, plugin.Options{
		Configure: func(_ context.Context, config string) (plugin.Agent, error) {
			a, p, err := prelaunchedAgent(o, config, log)
			if err != nil {
				return nil, err
			}
			stop, err := serveRootless(ctx, p, a, log)
			if err != nil {
				return nil, errors.Join(err, a.Close())
			}
			stopAPI, err := serveAPI(p, a, log)
			if err != nil {
				stop()
				return nil, errors.Join(err, a.Close())
			}
			made.Store(&served{a, func() { stopAPI(); stop() }})
			return a, nil
		},
	})
	if err == nil {
		err = nri.Run(ctx)
	}
	if a := made.Load(); a != nil {
		a.stop()
		closeAgent(a.Agent, log)
	}
	if ctx.Err() != nil {
		log.Info("stopped")
		return nil
	}
	// Standard error is /dev/null here.
	log.WithError(err).Error("ended: containers created from now on are not covered until the runtime is restarted")
	return err
}

func prelaunchedAgent(o options, config string, log *logrus.Entry) (*agent.Agent, *policy.File, error) {
	var p *policy.File
	var err error
	if config != "" {
		p, err = policy.Parse("NRI configuration of this plugin", []byte(config), policyOptions())
	} else {
		p, err = loadPolicy(o.config)
	}
	if err != nil {
		return nil, nil, err
	}
	if o.logFile == "" {
		if err := logTo(log.Logger, filepath.Join(p.StateDir, "syslatchd.log")); err != nil {
			return nil, nil, err
		}
	}
	a, err := newAgent(p, log)
	if err != nil {
		return nil, nil, err
	}
	log.WithFields(logrus.Fields{"version": cli.Version().String(), "policies": len(p.Policies)}).Info("started")
	return a, p, nil
}

func newAgent(p *policy.File, log *logrus.Entry) (*agent.Agent, error) {
	return agent.New(p, agent.Options{Log: log, Check: seccomp.Check, Holder: func() *exec.Cmd {
		// Its argument is for people, who see it in ps.
		cmd := exec.Command("/proc/self/exe", holderCommand, p.StateDir)
		cmd.Args[0] = "syslatchd"
		return cmd
	}, Inside: func(s *phase.Supervisor, id, socket string, admit func(pid int) error) (io.Closer, error) {
		return (&phaseapi.Inside{ID: id, Phases: s, Log: log, Admit: admit}).Start(socket)
	}})
}

func closeAgent(a *agent.Agent, log *logrus.Entry) {
	if err := a.Close(); err != nil {
		log.WithError(err).Error("shutdown incomplete")
	}
}

func newLog(o options) (*logrus.Entry, error) {
	l := logrus.New()
	level, err := logrus.ParseLevel(o.logLevel)
	if err != nil {
		return nil, cli.Usage(fmt.Errorf("--log-level %q: want %s", o.logLevel, strings.Join(logLevels, ", ")))
	}
	l.SetLevel(level)
	switch o.logFormat {
	case "text":
		l.SetFormatter(&logrus.TextFormatter{FullTimestamp: true, TimestampFormat: time.RFC3339Nano})
	case "json":
		l.SetFormatter(&logrus.JSONFormatter{TimestampFormat: time.RFC3339Nano})
	default:
		return nil, cli.Usage(fmt.Errorf("--log-format %q: want %s", o.logFormat, strings.Join(logFormats, " or ")))
	}
	if o.logFile != "" {
		if err := logTo(l, o.logFile); err != nil {
			return nil, err
		}
	}
	return logrus.NewEntry(l), nil
}

func logTo(l *logrus.Logger, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("log file: %w", err)
	}
	// Lives as long as the process.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("log file: %w", err)
	}
	l.SetOutput(f)
	return nil
}

func orDefault(s, d string) string {
	if s == "" {
		return d
	}
	return s
}
