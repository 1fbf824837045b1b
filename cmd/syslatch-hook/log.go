// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"log/syslog"
	"os"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/hook"
	"github.com/syslatch/syslatch/internal/agent"
	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// identifier is the program's name in syslog: journalctl -t syslatch.
const identifier = "syslatch"

// newLog logs to syslog, or, where there is none, warnings and errors to stderr.
func newLog(stderr io.Writer) (log *logrus.Entry, closeLog func()) {
	l := logrus.New()
	l.SetFormatter(&logrus.TextFormatter{DisableTimestamp: true, DisableColors: true})
	w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, identifier)
	if err != nil {
		l.SetOutput(stderr)
		l.SetLevel(logrus.WarnLevel)
		return logrus.NewEntry(l), func() {}
	}
	l.SetOutput(io.Discard)
	l.AddHook(toSyslog{w})
	return logrus.NewEntry(l), func() { _ = w.Close() } // nothing is buffered
}

// toSyslog sends entries with their severity, one line each.
type toSyslog struct{ w *syslog.Writer }

func (toSyslog) Levels() []logrus.Level { return logrus.AllLevels }

func (s toSyslog) Fire(e *logrus.Entry) error {
	line, err := e.Bytes()
	if err != nil {
		return err
	}
	text := string(bytes.TrimSpace(line))
	switch e.Level {
	case logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel:
		return s.w.Err(text)
	case logrus.WarnLevel:
		return s.w.Warning(text)
	case logrus.InfoLevel:
		return s.w.Info(text)
	}
	return s.w.Debug(text)
}

// failed tells whoever waits for the container, and syslog, why it doesn't start.
func failed(log *logrus.Entry, stage string, err error) error {
	if err == nil {
		return nil
	}
	if log.Logger.Out == io.Discard { // else the same text would come twice
		log.WithError(err).Error(stage + ": container refused")
	}
	hook.Tell(os.Stderr, err.Error())
	return &cli.ExitError{Code: cli.ExitFailure}
}

func open(config string, log *logrus.Entry) (*agent.Hooks, error) {
	p, err := policy.Load(config, policy.Options{KnownCall: seccomp.Known, Phases: true})
	if err != nil {
		return nil, err
	}
	return agent.OpenHooks(p, agent.Options{Log: log, Check: seccomp.Check})
}
