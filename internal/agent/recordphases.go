// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/profiles"
)

// RecordPhases are the marks of a recording by [RecordCommand].
type RecordPhases struct {
	Names  []string // of the phases, the first of them to begin in unless Begin is set
	Begin  string
	Policy string // name of the policy that they are of, if they are of one
	ID     string // of the instance; empty is "record-PID"
	Events string // path of a file for JSON lines of phase.Event; empty for none
	// Serve, if not nil, lets others switch phases while the command runs.
	Serve func(*phase.Supervisor) (io.Closer, error)
	Log   *logrus.Entry
}

// Check refuses phases that can't be recorded.
func (r *RecordPhases) Check() error {
	_, err := r.compile()
	return err
}

func (r *RecordPhases) set() *profiles.PhaseSet {
	set := &profiles.PhaseSet{}
	for _, name := range r.Names {
		set.Phases = append(set.Phases, profiles.Phase{Name: name})
	}
	if set.Initial = r.Begin; r.Begin == "" && len(r.Names) > 0 {
		set.Initial = r.Names[0]
	}
	return set
}

// compile gives a plan of phases that allow nothing, and of which nothing is enforced.
func (r *RecordPhases) compile() (*profiles.PhasePlan, error) {
	return profiles.CompilePhases(r.set(), profiles.PhaseHost{}, profiles.PhaseOptions{})
}

// marked is a recording by phase that goes on; nil is one that isn't by phase.
type marked struct {
	marks      marks
	id         string
	supervisor *phase.Supervisor
	server     io.Closer
	events     *events
}

// options are those of a recording that is yet to begin. It may be called on nil.
func (r *RecordPhases) options(o bpf.TrackOptions) bpf.TrackOptions {
	if r != nil {
		marks(r.Names).begin(&o, r.set().Initial, true)
	}
	return o
}

// begin supervises what the recorder tracks in group. It may be called on nil.
func (r *RecordPhases) begin(recorder *bpf.Recorder, handle bpf.Handle, group *cgroup.Group, path string) (m *marked, err error) {
	if r == nil {
		return nil, nil
	}
	m = &marked{marks: r.Names, id: r.ID}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.end())
		}
	}()
	if m.id == "" {
		m.id = fmt.Sprintf("record-%d", os.Getpid())
	}
	if m.events, err = openEvents(r.Events); err != nil {
		return m, err
	}
	plan, err := r.compile()
	if err != nil {
		return m, err
	}
	freezer, err := cgroup.NewFreezer(group.Path())
	if err != nil {
		return m, err
	}
	m.supervisor = phase.NewSupervisor(phase.Options{Log: r.Log, Events: m.events.add})
	_, err = m.supervisor.Add(phase.Instance{
		ID: m.id, Name: filepath.Base(path), Policy: r.Policy, Set: r.set(), Plan: plan, Record: true, Barrier: freezer,
		Hooks: func(name string) error {
			number, err := m.marks.number(name)
			if err == nil {
				err = recorder.SetPhase(handle, number)
			}
			return err
		},
	})
	if err == nil && r.Serve != nil {
		m.server, err = r.Serve(m.supervisor)
	}
	return m, err
}

// names are for fill. It may be called on nil.
func (m *marked) names() map[uint8]string {
	if m == nil {
		return map[uint8]string{0: profiles.DefaultPhase}
	}
	return m.marks.names()
}

// end ends the supervision, once. It may be called on nil.
func (m *marked) end() (err error) {
	if m == nil {
		return nil
	}
	if m.supervisor != nil {
		m.supervisor.End(m.id) // when it returns, nothing is switched any more
	}
	if m.server != nil {
		err, m.server = m.server.Close(), nil
	}
	if m.supervisor != nil {
		err = errors.Join(err, m.supervisor.Close())
	}
	if m.events != nil {
		err = errors.Join(err, m.events.close())
	}
	return err
}
