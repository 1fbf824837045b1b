// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/inject"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// ApplyOptions say what ApplyCommand tightens, and to what: Allow or Profile.
type ApplyOptions struct {
	PID     int
	Tree    bool
	Allow   []string // calls and groups, beside the floor
	Profile string   // path
	Force   bool
	DryRun  bool
	Timeout time.Duration // for each task to stop
	// Messages takes what is told while it lasts.
	Messages io.Writer
}

// ApplyReport is what became of it.
type ApplyReport struct {
	PID    int  `json:"pid"`
	DryRun bool `json:"dryRun"`
	*inject.Report
}

// ApplyCommand gives a running process, or that and its descendants, a filter. The
// report is there also beside an error, if something was loaded.
func ApplyCommand(opts ApplyOptions) (*ApplyReport, error) {
	profile, err := opts.profile()
	if err != nil {
		return nil, err
	}
	filter, err := seccomp.Compile(profile, seccomp.Options{ENOSYSAbove: seccomp.KernelRelease()})
	if err != nil {
		return nil, err
	}
	if opts.PID == 1 && !opts.Force {
		return nil, errors.New("pid 1 is init, and the system or container ends with it (--force, to tighten it nevertheless)")
	}
	signals, stop := catchSignals()
	defer stop()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go func() {
		select {
		case s := <-signals:
			cancel(fmt.Errorf("ended by %v", s))
		case <-ctx.Done():
		}
	}()
	report, err := inject.Filter(ctx, inject.Scope{PIDs: []int{opts.PID}, Tree: opts.Tree}, filter, inject.Options{
		Force: opts.Force, DryRun: opts.DryRun, Timeout: opts.Timeout,
		Waiting: func(message string) { fmt.Fprintf(opts.Messages, "syslatch: %s\n", message) },
	})
	if errors.Is(err, context.Canceled) {
		err = errors.Join(context.Cause(ctx), err)
	}
	var refused *inject.RefusedError
	if errors.As(err, &refused) {
		err = fmt.Errorf("%w (nothing was changed; --force applies it nevertheless)", err)
	}
	if errors.Is(err, inject.ErrSelf) && opts.PID != os.Getpid() {
		err = fmt.Errorf("%w: syslatch is a descendant of pid %d", err, opts.PID)
	}
	if report == nil {
		return nil, err
	}
	return &ApplyReport{PID: opts.PID, DryRun: opts.DryRun, Report: report}, err
}

func (o *ApplyOptions) profile() (*specs.LinuxSeccomp, error) {
	if o.Profile != "" {
		p, err := readProfile(o.Profile)
		if err != nil {
			return nil, err
		}
		if p.DefaultAction == specs.ActNotify {
			return nil, fmt.Errorf("profile %s asks a supervisor (SCMP_ACT_NOTIFY), and there is none", o.Profile)
		}
		for i, r := range p.Syscalls {
			if r.Action == specs.ActNotify {
				return nil, fmt.Errorf("profile %s: syscalls[%d] asks a supervisor (SCMP_ACT_NOTIFY), and there is none", o.Profile, i)
			}
		}
		return p, nil
	}
	var names []string
	for _, name := range o.Allow {
		name = strings.TrimSpace(name)
		if name == "" || name == "@floor" {
			continue // always there
		}
		if !strings.HasPrefix(name, "@") && !seccomp.Known(name) {
			return nil, fmt.Errorf("unknown call %q (libseccomp doesn't have it)", name)
		}
		if err := profiles.CheckPhaseRule(profiles.PhaseRule{Names: []string{name}}); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return profiles.AllowOnly(names, profiles.PhaseOptions{})
}
