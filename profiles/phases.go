// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// PhaseRule allows calls.
type PhaseRule struct {
	// Names are system calls, and in a phase groups ("@file-read").
	Names []string `json:"names"`
	// Args must all hold, each on an argument of its own. Groups take none.
	Args []specs.LinuxSeccompArg `json:"args,omitempty"`
}

// Phase is what a workload may do for a stretch of its life, as a policy says it.
type Phase struct {
	Name  string      `json:"name"`
	Allow []PhaseRule `json:"allow,omitempty"` // beside the floor
	// ReadPaths and WritePaths are files and directories, with all that is below
	// them, that may be opened for reading and for writing; nil leaves that to the
	// calls. An empty WritePaths lets nothing be opened for writing.
	ReadPaths  []string `json:"readPaths"`
	WritePaths []string `json:"writePaths"`
	// Network is where sockets may reach: nil leaves that to the calls, empty is
	// nowhere, else "unix" and destinations such as "10.0.0.0/8:443", or with "[" in
	// front "[2001:db8::]/32". They are not looked at here but for that.
	Network []string `json:"network"`
	// Next are the phases that may follow; nil is any other.
	Next []string `json:"next"`
	// Irreversible: nothing follows.
	Irreversible bool `json:"irreversible,omitempty"`
}

// PhaseSet are the phases of one policy.
type PhaseSet struct {
	Initial string
	Phases  []Phase
	// MustAllow and MustDeny are the policy's, for all phases.
	MustAllow, MustDeny []string
}

// MaxPhases is how many phases one policy may have: the recorder keeps that many
// sets of calls for an instance.
const MaxPhases = 8

var phaseName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,31}$`)

// reservedPhases have a meaning of their own.
var reservedPhases = []string{"initial", "gaps", DefaultPhase, StartPhase}

// CheckPhaseName refuses what can't name a phase.
func CheckPhaseName(name string) error {
	if !phaseName.MatchString(name) {
		return fmt.Errorf("%q is no name of a phase, want 1 to 32 letters, digits, '_' and '-', the first a letter", name)
	}
	if slices.Contains(reservedPhases, name) {
		return fmt.Errorf("%q can't name a phase: it has a meaning of its own", name)
	}
	return nil
}

// CheckPhaseRule refuses a rule that could not be compiled: groups that don't exist
// or have conditions, conditions on pointers, and those that would have no effect.
// It doesn't know which calls there are.
func CheckPhaseRule(r PhaseRule) error {
	if err := checkArgs(r.Args); err != nil {
		return err
	}
	for _, name := range r.Names {
		if _, err := regionOf(name, r.Args); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if strings.HasPrefix(name, "@") {
			if findGroup(name) == nil {
				return fmt.Errorf("unknown group %q ('syslatch profile groups' lists them)", name)
			}
			if len(r.Args) > 0 {
				return fmt.Errorf("%s is a group, which takes no conditions", name)
			}
			continue
		}
		if multiplexers[name] != nil {
			return fmt.Errorf("%s reaches other calls by its first argument: name those", name)
		}
		if len(r.Args) > 0 && inPhaseFloor(name) {
			return fmt.Errorf("%s is allowed in every phase, so conditions on it have no effect", name)
		}
		for _, c := range r.Args {
			if !ScalarArgument(name, c.Index) {
				return fmt.Errorf("argument %d of %s is no number: what a pointer points at can change after it was looked at", c.Index, name)
			}
		}
	}
	return nil
}

// PhaseError is a fault of one phase.
type PhaseError struct {
	Phase string
	Err   error
}

func (e *PhaseError) Error() string { return "phase " + e.Phase + ": " + e.Err.Error() }

// Unwrap gives the fault.
func (e *PhaseError) Unwrap() error { return e.Err }

// Check refuses phases that can't be compiled; what is wrong with one phase is a
// *[PhaseError].
func (s *PhaseSet) Check() error {
	if len(s.Phases) == 0 || len(s.Phases) > MaxPhases {
		return fmt.Errorf("%d phases, want 1 to %d", len(s.Phases), MaxPhases)
	}
	known := map[string]*Phase{}
	for i := range s.Phases {
		p := &s.Phases[i]
		if err := CheckPhaseName(p.Name); err != nil {
			return err
		}
		if known[p.Name] != nil {
			return &PhaseError{p.Name, errors.New("given twice")}
		}
		known[p.Name] = p
	}
	if known[s.Initial] == nil {
		return fmt.Errorf("initial phase %q does not exist", s.Initial)
	}
	for _, name := range s.MustDeny {
		if inPhaseFloor(name) || name == "clone" {
			return fmt.Errorf("%s is in mustDeny, but no phase can do without it", name)
		}
	}
	for _, p := range s.Phases {
		if err := p.check(s, known); err != nil {
			return &PhaseError{p.Name, err}
		}
	}
	if out := s.Unreachable(); len(out) > 0 {
		return &PhaseError{out[0], errors.New("no phase leads to it")}
	}
	_, err := s.regions("")
	return err
}

func (p *Phase) check(s *PhaseSet, known map[string]*Phase) error {
	for _, r := range p.Allow {
		if err := CheckPhaseRule(r); err != nil {
			return err
		}
		for _, name := range r.Names {
			if slices.Contains(s.MustDeny, name) {
				return fmt.Errorf("%s is allowed, and in mustDeny", name)
			}
			if err := p.contradicts(name); err != nil {
				return err
			}
		}
	}
	for _, name := range s.MustAllow {
		if err := p.contradicts(name); err != nil {
			return fmt.Errorf("mustAllow: %w", err)
		}
	}
	if p.Irreversible && p.Next != nil {
		return errors.New("is irreversible, and has phases that may follow")
	}
	for i, next := range p.Next {
		switch {
		case known[next] == nil:
			return fmt.Errorf("next: unknown phase %q", next)
		case next == p.Name:
			return errors.New("next: it is this phase itself")
		case slices.Contains(p.Next[:i], next):
			return fmt.Errorf("next: %s is listed twice", next)
		}
	}
	return nil
}

// contradicts says where a call is allowed that the phase's files or network leave
// no use of.
func (p *Phase) contradicts(name string) error {
	list := []string{name}
	if g := findGroup(name); g != nil {
		list = g.Calls()
	}
	for _, n := range list {
		if p.Network != nil && len(p.Network) == 0 && slices.Contains(networkCalls, n) {
			return fmt.Errorf("%s is allowed, and network is none", name)
		}
		if p.WritePaths != nil && len(p.WritePaths) == 0 && (slices.Contains(fileChanges, n) && n != "umask" || n == "creat" || n == "openat2") {
			return fmt.Errorf("%s is allowed, and no file may be written", name)
		}
	}
	return nil
}

// May says whether a phase may follow another.
func (s *PhaseSet) May(from, to string) bool {
	i := slices.IndexFunc(s.Phases, func(p Phase) bool { return p.Name == from })
	if i < 0 || from == to || !slices.ContainsFunc(s.Phases, func(p Phase) bool { return p.Name == to }) {
		return false
	}
	p := &s.Phases[i]
	return !p.Irreversible && (p.Next == nil || slices.Contains(p.Next, to))
}

// Unreachable lists the phases that the initial one doesn't lead to.
func (s *PhaseSet) Unreachable() []string {
	reached := []string{s.Initial}
	for i := 0; i < len(reached); i++ {
		for _, p := range s.Phases {
			if s.May(reached[i], p.Name) && !slices.Contains(reached, p.Name) {
				reached = append(reached, p.Name)
			}
		}
	}
	var out []string
	for _, p := range s.Phases {
		if !slices.Contains(reached, p.Name) {
			out = append(out, p.Name)
		}
	}
	return out
}
