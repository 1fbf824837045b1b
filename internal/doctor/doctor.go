// SPDX-License-Identifier: Apache-2.0

// Package doctor tells what a host offers, what syslatch therefore uses, and
// how to get the rest.
//
//	report := doctor.Examine(ctx, doctor.System(), doctor.Options{})
//	err := report.WriteText(os.Stdout, false)
//
// A check that fails, or takes too long, is a line of the report and never the
// report's end. All that is asked of the host goes through [Host], so that
// tests can hand in another one.
package doctor

import (
	"context"
	"fmt"
	"time"
)

// Schema names the form of a report in JSON. Fields may be added to it; when one
// is changed or removed, the schema gets another name.
const Schema = "syslatch.dev/doctor/v1"

// Status is how a check came out.
type Status string

const (
	OK      Status = "ok"
	Warn    Status = "warn"    // works, and not all that there could be
	Missing Status = "missing" // something that a job needs isn't there
	Error   Status = "error"   // it is there and stands in the way, or couldn't be asked
)

// Check is one thing that was looked at.
type Check struct {
	Name   string `json:"name"` // stable: "bpf.tp_btf", "runtime.runc"
	Status Status `json:"status"`
	Found  string `json:"found"`            // one line
	Uses   string `json:"uses,omitempty"`   // what syslatch does with it
	Remedy string `json:"remedy,omitempty"` // never empty unless Status is OK
}

// Mechanism is how one job is done on this host.
type Mechanism struct {
	// Job is "record commands", "record containers", "gate", "enforce",
	// "violations", "limits" or "phases".
	Job    string `json:"job"`
	Status Status `json:"status"` // OK, Warn (a lesser way is used) or Missing (can't be done)
	Uses   string `json:"uses"`
	Remedy string `json:"remedy,omitempty"` // the checks that say what to do
}

// Report is what Examine found.
type Report struct {
	Schema string `json:"schema"`
	// Works: commands and containers can be recorded here, and profiles
	// enforced.
	Works      bool        `json:"works"`
	Checks     []Check     `json:"checks"`
	Mechanisms []Mechanism `json:"mechanisms"`
}

// Options of Examine.
type Options struct {
	// Timeout bounds each check; 0 means 20 s.
	Timeout time.Duration
	// ContainerdConfig is containerd's configuration file, if not its default.
	ContainerdConfig string
	// BPFFS is where objects are to be pinned; "" means /sys/fs/bpf.
	BPFFS string
}

const (
	defaultTimeout          = 20 * time.Second
	defaultBPFFS            = "/sys/fs/bpf"
	defaultContainerdConfig = "/etc/containerd/config.toml"
)

// Examine runs all checks, each in its time, and concludes from them.
func Examine(ctx context.Context, h *Host, o Options) *Report {
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.BPFFS == "" {
		o.BPFFS = defaultBPFFS
	}
	checks := []struct {
		name string // of what is reported if there is no answer: the part before the dot
		run  func(context.Context, *Host, Options) []Check
	}{
		{"kernel", checkKernel},
		{"cgroup", checkCgroup},
		{"bpf", checkBPF},
		{"bpffs", checkBPFFS},
		{"capability", checkCapabilities},
		{"inject", checkInject},
		{"memlock", checkMemlock},
		{"seccomp", checkSeccomp},
		{"systemd", checkSystemd},
		{"runtime.runc", checkRuntime("runc")},
		{"runtime.crun", checkRuntime("crun")},
		{"engine.podman", checkPodman},
		{"engine.containerd", checkContainerd},
		{"nri", checkNRI},
	}
	answers := make([]chan []Check, len(checks))
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	for i, c := range checks {
		answers[i] = make(chan []Check, 1)
		go func() {
			defer func() {
				if p := recover(); p != nil {
					answers[i] <- []Check{{
						Name: c.name, Status: Error, Found: fmt.Sprintf("the check panicked: %v", p),
						Remedy: "report this as a bug of syslatch",
					}}
				}
			}()
			answers[i] <- c.run(ctx, h, o)
		}()
	}
	r := &Report{Schema: Schema}
	for i, c := range checks {
		r.Checks = append(r.Checks, await(ctx, c.name, answers[i])...)
	}
	for i := range r.Checks {
		r.Checks[i].Found = printable(r.Checks[i].Found)
	}
	r.conclude()
	return r
}

// await takes a check's answer. One that doesn't come is left behind: a call
// that hangs in the kernel can't be taken back.
func await(ctx context.Context, name string, answer <-chan []Check) []Check {
	select {
	case got := <-answer:
		return got
	case <-ctx.Done():
	}
	select {
	case got := <-answer: // both were ready
		return got
	default:
		return []Check{{
			Name: name, Status: Error, Found: "no answer in time",
			Remedy: "see what hangs (dmesg, cat /proc/PID/stack of this program), then run it again",
		}}
	}
}
