// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// compiled is what a decision's phases compile to. It is shared: nothing of it changes.
type compiled struct {
	set    *profiles.PhaseSet
	plan   *profiles.PhasePlan
	tables func() map[string]*profiles.PhaseTable
	// ratchets are the filters of irreversible phases, which libseccomp may refuse.
	ratchets func() (map[string]seccomp.Filter, error)
}

// phasesInput is all that phases are compiled from.
type phasesInput struct {
	Policy  string
	Set     *profiles.PhaseSet
	Host    profiles.PhaseHost
	Options profiles.PhaseOptions
}

func inputOf(d *policy.Decision, ip *instancePhases) *phasesInput {
	p := policy.Policy{MustAllow: d.MustAllow, MustDeny: d.MustDeny, Phases: d.Phases}
	return &phasesInput{d.Policy, p.Set(), ip.Host, profiles.PhaseOptions{
		Architectures: d.Architectures, NewerThanKernel: ip.Newer, Log: d.LogDenials && !ip.Record,
	}}
}

func (in *phasesInput) compile() (*compiled, error) {
	plan, err := profiles.CompilePhases(in.Set, in.Host, in.Options)
	if err != nil {
		return nil, fmt.Errorf("phases of policy %s: %w", in.Policy, err)
	}
	return &compiled{
		in.Set, plan,
		sync.OnceValue(func() map[string]*profiles.PhaseTable { return phase.Tables(plan) }),
		sync.OnceValues(func() (map[string]seccomp.Filter, error) { return compileRatchets(plan) }),
	}, nil
}

// plans keeps what phases compile to: a node runs many containers of few policies, and has
// some seconds to answer for each.
type plans struct {
	mu   sync.Mutex
	made map[string]func() (*compiled, error) // guarded by mu; by all that it is made of
}

// mostPlans is how many are kept. Instances of the journal may have others than the
// policy file.
const mostPlans = 256

func (c *plans) of(d *policy.Decision, ip *instancePhases) (*compiled, error) {
	in := inputOf(d, ip)
	data, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("phases of policy %s: %w", d.Policy, err)
	}
	key := profiles.Digest(data)
	c.mu.Lock()
	once := c.made[key]
	if once == nil {
		if c.made == nil || len(c.made) >= mostPlans {
			c.made = map[string]func() (*compiled, error){}
		}
		once = sync.OnceValues(in.compile) // who comes meanwhile waits for it
		c.made[key] = once
	}
	c.mu.Unlock()
	return once()
}

// checks keeps the profiles that a check has passed: libseccomp takes milliseconds.
type checks struct {
	check  func(*specs.LinuxSeccomp) error
	mu     sync.Mutex
	passed map[string]bool // guarded by mu; by digest
}

// mostChecks is how many are kept. Whoever makes containers makes profiles, too.
const mostChecks = 4096

func (c *checks) do(p *specs.LinuxSeccomp) error {
	key := seccompDigest(p)
	c.mu.Lock()
	passed := c.passed[key]
	c.mu.Unlock()
	if passed {
		return nil
	}
	if err := c.check(p); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.passed == nil || len(c.passed) >= mostChecks {
		c.passed = map[string]bool{}
	}
	c.passed[key] = true
	return nil
}

// prepare compiles what the policy file has, so that the first container of a policy
// doesn't wait for it. What is wrong is said by that one.
func (p *phasing) prepare() {
	for i := range p.a.policy.Policies {
		of := &p.a.policy.Policies[i]
		if of.Phases == nil || p.a.stopped.Err() != nil {
			continue
		}
		d := &policy.Decision{Policy: of.Name, MustAllow: of.MustAllow, MustDeny: of.MustDeny, Phases: of.Phases, Architectures: of.Architectures, LogDenials: of.LogDenials}
		is, err := p.plans.of(d, &instancePhases{Host: p.host, Newer: p.newer})
		if err == nil {
			is.tables()
			err = p.a.check(is.filter(p.socket).Profile)
		}
		if err != nil {
			p.a.log.WithError(err).WithField("policy", of.Name).Debug("phases not compiled ahead")
		}
	}
}

// filter is the plan with a filter whose listener goes to a socket.
func (c *compiled) filter(socket string) *profiles.PhasePlan {
	plan, profile := *c.plan, *c.plan.Profile
	if plan.Listener {
		profile.ListenerPath = socket
	}
	plan.Profile = &profile
	return &plan
}
