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

// Denial is a call that filters denied to processes of a watched cgroup, or below it.
type Denial struct {
	Tag    uint32 // of the cgroup, when it was denied
	ABI    profiles.ABI
	Number uint32 // the last, if several: those above 1,023 are not told apart
	PID    int    // of one of the processes, which may have ended
	Count  uint64
}

// source is one way to see denials. One of its methods is called at a time, but for settle.
type source interface {
	// watch watches a cgroup, or gives it another tag.
	watch(cgroup uint64, tag uint32) error
	forget(cgroup uint64) error
	// settle waits for what is on its way.
	settle()
	// read is what was denied since it was last called, by cgroup, and how many denials, or
	// records that may be of some, it can't tell of.
	read() (all map[uint64][]Denial, lost uint64, err error)
	io.Closer
}

// Denials tells of denials.
type Denials struct {
	mechanism string
	log       *logrus.Entry

	telling sync.Mutex // held while found is called, which may take its time

	mu     sync.Mutex
	source source                  // guarded by mu; nil once it is closed
	found  map[uint64]func(Denial) // guarded by mu; by cgroup
}

// readEvery is how often denials are looked for.
const readEvery = time.Second

// OpenDenials takes the best way to see denials that this host has. The error says why
// there is none.
func OpenDenials(log *logrus.Entry) (*Denials, error) {
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
				return newDenials(way.name, s, log), nil
			}
			err = errors.Join(fmt.Errorf("%s: %w", way.name, err), s.Close())
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("denials by filters can't be seen: %w", errors.Join(errs...))
}

func newDenials(mechanism string, s source, log *logrus.Entry) *Denials {
	return &Denials{mechanism: mechanism, log: log, source: s, found: map[uint64]func(Denial){}}
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
	d, err := OpenDenials(logrus.NewEntry(quiet))
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

// Watch has found called with what is denied from now on to the tasks of a cgroup and of
// those below it, with the tag that the cgroup has at the time.
func (d *Denials) Watch(cgroup uint64, tag uint32, found func(Denial)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.source == nil {
		return os.ErrClosed
	}
	if err := d.source.watch(cgroup, tag); err != nil {
		return err
	}
	d.found[cgroup] = found
	return nil
}

// Tag gives a cgroup that is watched another tag.
func (d *Denials) Tag(cgroup uint64, tag uint32) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.source == nil:
		return os.ErrClosed
	case d.found[cgroup] == nil:
		return fmt.Errorf("cgroup %d is not watched", cgroup)
	}
	return d.source.watch(cgroup, tag)
}

// Forget tells of the last denials of a cgroup, and ends its watch.
func (d *Denials) Forget(cgroup uint64) error {
	d.mu.Lock()
	s := d.source
	d.mu.Unlock()
	if s == nil {
		return nil
	}
	s.settle()
	d.tell()
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.found, cgroup)
	if d.source == nil {
		return nil
	}
	return d.source.forget(cgroup)
}

// Run tells of denials once a second until ctx ends, and then of the last. A nil d has none.
func (d *Denials) Run(ctx context.Context) {
	if d == nil {
		return
	}
	tick := time.NewTicker(readEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
		d.tell()
	}
}

func (d *Denials) tell() {
	d.telling.Lock()
	defer d.telling.Unlock()
	type news struct {
		found func(Denial)
		all   []Denial
	}
	var told []news
	d.mu.Lock()
	if d.source == nil || len(d.found) == 0 {
		d.mu.Unlock()
		return
	}
	all, lost, err := d.source.read()
	for id, of := range all {
		if found := d.found[id]; found != nil {
			told = append(told, news{found, of})
		}
	}
	d.mu.Unlock()
	for _, n := range told {
		for _, one := range n.all {
			n.found(one)
		}
	}
	if lost > 0 {
		d.log.WithField("lost", lost).Warn("denials by filters may be missing: more came than there was room for")
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
