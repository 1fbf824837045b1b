// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/profiles"
)

// Denial is a call that filters denied to processes of one cgroup.
type Denial struct {
	Cgroup uint64 // its id
	ABI    profiles.ABI
	Number uint32
	PID    int // of one of the processes, which may have ended
	Count  uint64
	Time   time.Time // as audit's records have it; zero: since the last were told
}

// source is one way to see denials.
type source interface {
	// read is what was denied since it was last called, and how many denials it can't
	// tell of. For the last time it waits for what is on its way.
	read(last bool) (all []Denial, lost uint64, err error)
	io.Closer
}

// Denials tells of denials.
type Denials struct {
	mechanism string
	log       *logrus.Entry

	mu     sync.Mutex // one tells at a time
	source source     // guarded by mu; nil once it is closed
	found  func(Denial)
}

// readEvery is how often denials are looked for.
const readEvery = time.Second

// OpenDenials begins to see denials, by the best way that this host has; found is called
// with those that there were since, by [Denials.Watch] once a second and by
// [Denials.Flush]. The error says why there is no way.
func OpenDenials(log *logrus.Entry, found func(Denial)) (*Denials, error) {
	h, err := cgroup.Detect()
	if err == nil {
		err = h.RequireV2()
	}
	if err == nil {
		err = logged()
	}
	if err != nil {
		return nil, fmt.Errorf("denials by filters can't be seen: %w", err)
	}
	var errs []error
	for _, way := range ways {
		s, err := way.open(h, log)
		if err == nil {
			if err = heard(h, s); err == nil {
				return &Denials{mechanism: way.name, log: log, source: s, found: found}, nil
			}
			err = errors.Join(fmt.Errorf("%s: %w", way.name, err), s.Close())
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("denials by filters can't be seen: %w", errors.Join(errs...))
}

// ways are in the order in which they are tried.
var ways = []struct {
	name string
	open func(*cgroup.Hierarchy, *logrus.Entry) (source, error)
}{
	{"fentry/audit_seccomp", openCounts},
	{"audit netlink", openRecords},
}

// Try is the way that [OpenDenials] takes here.
func Try() (mechanism string, err error) {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	d, err := OpenDenials(logrus.NewEntry(quiet), func(Denial) {})
	if err != nil {
		return "", err
	}
	return d.mechanism, d.Close()
}

// actionsLogged says of which actions the kernel tells its audit log (seccomp(2)).
const actionsLogged = "/proc/sys/kernel/seccomp/actions_logged"

func logged() error {
	data, err := os.ReadFile(actionsLogged)
	if err != nil {
		return fmt.Errorf("the kernel doesn't say what it logs of seccomp: %w", err)
	}
	if !slices.Contains(strings.Fields(string(data)), "errno") {
		return fmt.Errorf("%s lacks errno: this host's administrator doesn't have denials logged (sysctl kernel.seccomp.actions_logged)", actionsLogged)
	}
	return nil
}

// Mechanism is the way that was taken: fentry/audit_seccomp or audit netlink.
func (d *Denials) Mechanism() string { return d.mechanism }

// Watch tells of denials until ctx ends, and then of the last. A nil d has none.
func (d *Denials) Watch(ctx context.Context) {
	if d == nil {
		return
	}
	tick := time.NewTicker(readEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			d.Flush()
			return
		case <-tick.C:
			d.Tell()
		}
	}
}

// Tell tells of what was denied up to now. With audit netlink that is what the kernel has
// sent.
func (d *Denials) Tell() { d.tell(false) }

// Flush does that, and with audit netlink it waits a moment for what is on its way.
func (d *Denials) Flush() { d.tell(true) }

func (d *Denials) tell(last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.source == nil {
		return
	}
	all, lost, err := d.source.read(last)
	for _, one := range all {
		d.found(one)
	}
	if lost > 0 {
		d.log.WithField("at_least", lost).Warn("denials by filters can't be told: there were too many at once, or their process had ended before it could be looked at")
	}
	if err != nil {
		d.log.WithError(err).Error("denials by filters can't be read")
	}
}

// Close ends it. It may be called on nil.
func (d *Denials) Close() error {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.source == nil {
		return nil
	}
	err := d.source.Close()
	d.source = nil
	return err
}
