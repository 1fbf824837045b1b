// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.yaml.in/yaml/v3"

	"github.com/syslatch/syslatch/profiles"
)

// phases reads a policy's phases. Where the caller doesn't enforce them, they are a
// fault, and checked nevertheless.
func (v value) phases(p *Policy) {
	if !v.d.opts.Phases {
		v.errorf("are not enforced by this program, and are not ignored either: remove them ('syslatch profile phases' shows what they compile to)")
	}
	if v.Kind != yaml.MappingNode || v.ShortTag() != "!!map" || len(v.Content) == 0 {
		v.errorf("is %s, want initial and a mapping for each phase; leave the field out for none", v.describe())
		return
	}
	ps := &Phases{Gaps: GapsDeny}
	faults := len(v.d.errs)
	known := fields{
		"initial": func(v value) { v.stringInto(&ps.Initial) },
		"gaps":    func(v value) { choiceInto(v, &ps.Gaps, []Gaps{GapsDeny, GapsReport}) },
	}
	for i := 0; i+1 < len(v.Content); i += 2 {
		key := v.Content[i]
		if key.Kind != yaml.ScalarNode || known[key.Value] != nil {
			continue // object says so
		}
		name, line := key.Value, key.Line
		at := value{key, v.join(printable(name)), v.d}
		if err := profiles.CheckPhaseName(name); err != nil {
			at.errorf("%v", err)
		}
		known[name] = func(v value) {
			ps.Phases = append(ps.Phases, v.phase(name, line))
		}
	}
	seen := v.object(known)
	if len(seen) == 0 {
		return
	}
	var names []string
	for _, phase := range ps.Phases {
		names = append(names, phase.Name)
	}
	switch {
	case len(names) == 0:
		v.errorf("has no phase, want a mapping for each")
	case len(names) > profiles.MaxPhases:
		v.errorf("%d phases, want at most %d", len(names), profiles.MaxPhases)
	case !seen["initial"]:
		v.require(seen, "initial", "the phase that a container begins in: "+oneOf(names))
	case ps.Initial != "" && !slices.Contains(names, ps.Initial):
		v.at("initial").errorf("unknown phase %s, want %s%s", quote(ps.Initial), oneOf(names), suggest(ps.Initial, names))
	}
	for _, phase := range ps.Phases {
		for i, next := range phase.Next {
			at := v.at(phase.Name).at("next")
			switch {
			case !slices.Contains(names, next):
				at.errorf("unknown phase %s, want %s%s", quote(next), oneOf(names), suggest(next, names))
			case next == phase.Name:
				at.errorf("%s is this phase itself", next)
			case slices.Contains(phase.Next[:i], next):
				at.errorf("%s is listed twice", next)
			}
		}
		if phase.Irreversible && phase.Next != nil {
			v.at(phase.Name).at("next").errorf("has no effect: the phase is irreversible")
		}
	}
	if len(v.d.errs) > faults {
		return
	}
	p.Phases = ps
	set := p.Set()
	for _, name := range set.Unreachable() {
		v.at(name).errorf("no phase leads to it from %s", ps.Initial)
	}
	if len(v.d.errs) == faults {
		// What is left concerns several fields, mustDeny among them.
		var one *profiles.PhaseError
		switch err := set.Check(); {
		case errors.As(err, &one):
			v.at(one.Phase).errorf("%v", one.Err)
		case err != nil:
			v.errorf("%v", err)
		}
	}
}

// at is the value of a field that is there.
func (v value) at(name string) value {
	for i := 0; i+1 < len(v.Content); i += 2 {
		if v.Content[i].Value == name {
			return value{v.Content[i+1], v.join(name), v.d}
		}
	}
	return v
}

func (v value) phase(name string, line int) Phase {
	p := Phase{Phase: profiles.Phase{Name: name}, Line: line}
	v.object(fields{
		"allow": func(v value) {
			v.nonEmptyList(func(v value) {
				if r, ok := v.phaseRule(); ok {
					p.Allow = append(p.Allow, r)
				}
			})
		},
		"files": func(v value) {
			v.object(fields{
				"read":  func(v value) { v.nonEmptyList(func(v value) { v.treeInto(&p.ReadPaths) }) },
				"write": func(v value) { p.WritePaths = []string{}; v.list(func(v value) { v.treeInto(&p.WritePaths) }) },
			})
		},
		"network": func(v value) { v.network(&p.Network) },
		"limits": func(v value) {
			v.limits(&p.Limits)
			if p.Limits.Rlimits != nil {
				v.at("rlimits").errorf("are set when a container starts, want them in the policy's limits")
			}
		},
		"next": func(v value) {
			v.nonEmptyList(func(v value) {
				var next string
				if v.stringInto(&next) {
					p.Next = append(p.Next, next)
				}
			})
		},
		"irreversible": func(v value) { v.boolInto(&p.Irreversible) },
	})
	return p
}

// phaseRule reads a name, or names with conditions.
func (v value) phaseRule() (r profiles.PhaseRule, ok bool) {
	name := func(v value) {
		var s string
		isGroup := v.Kind == yaml.ScalarNode && strings.HasPrefix(v.Value, "@")
		switch {
		case isGroup && v.stringInto(&s):
			if _, found := profiles.FindGroup(s); !found {
				var all []string
				for _, g := range profiles.Groups() {
					all = append(all, g.Name)
				}
				v.errorf("unknown group %s, want one of those that 'syslatch profile groups' lists%s", quote(s), suggest(s, all))
				return
			}
		case isGroup || !v.callInto(&s):
			return
		}
		if slices.Contains(r.Names, s) {
			v.errorf("%s is listed twice", s)
			return
		}
		r.Names = append(r.Names, s)
	}
	faults := len(v.d.errs)
	if v.Kind != yaml.MappingNode {
		name(v)
	} else {
		seen := v.object(fields{
			"names": func(v value) { v.nonEmptyList(name) },
			"args": func(v value) {
				v.nonEmptyList(func(v value) { r.Args = append(r.Args, v.condition()) })
			},
		})
		if seen != nil {
			v.require(seen, "names", "a list of system calls")
			v.require(seen, "args", "conditions; without any, write the name alone")
		}
	}
	if len(v.d.errs) > faults {
		return r, false
	}
	if err := profiles.CheckPhaseRule(r); err != nil {
		v.errorf("%v", err)
		return r, false
	}
	return r, true
}

var argOperators = []specs.LinuxSeccompOperator{
	specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual,
	specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual,
}

// condition is as in OCI seccomp JSON, with numbers of at most 32 bits, hexadecimal
// ones among them.
func (v value) condition() (c specs.LinuxSeccompArg) {
	number := func(into *uint64) func(value) {
		return func(v value) {
			var s string
			if !v.scalarInto(&s, "a number") {
				return
			}
			n, err := strconv.ParseUint(s, 0, 32)
			if err != nil {
				v.errorf("%s is not allowed, want a number from 0 to 4294967295, or 0x0 to 0xffffffff", quote(s))
			}
			*into = n
		}
	}
	seen := v.object(fields{
		"index": func(v value) {
			if n, ok := v.number(0, 5, false); ok {
				c.Index = uint(n)
			}
		},
		"op":       func(v value) { choiceInto(v, &c.Op, argOperators) },
		"value":    number(&c.Value),
		"valueTwo": number(&c.ValueTwo),
	})
	if seen == nil {
		return c
	}
	for _, name := range []string{"index", "op", "value"} {
		v.require(seen, name, "index (of the argument, from 0), op and value")
	}
	if c.Op == specs.OpMaskedEqual {
		v.require(seen, "valueTwo", "what the argument has to be under the mask that value is")
	} else if seen["valueTwo"] && c.Op != "" {
		v.at("valueTwo").errorf("has no meaning for %s", c.Op)
	}
	return c
}

// treeInto adds a path that isn't there yet.
func (v value) treeInto(into *[]string) {
	var p string
	switch v.pathInto(&p); {
	case p == "":
	case slices.Contains(*into, p):
		v.errorf("%s is listed twice", p)
	default:
		*into = append(*into, p)
	}
}

func (v value) network(into *[]string) {
	if v.Kind == yaml.SequenceNode && len(v.Content) == 0 {
		v.errorf("is an empty list, want none (or any, or destinations)")
		return
	}
	if v.Kind == yaml.SequenceNode {
		v.list(func(v value) {
			var s string
			if !v.stringInto(&s) {
				return
			}
			if _, _, err := ParseDestination(s); err != nil {
				v.errorf("%v", err)
				return
			}
			if slices.Contains(*into, s) {
				v.errorf("%s is listed twice", s)
				return
			}
			*into = append(*into, s)
		})
		return
	}
	var word string
	if choiceInto(v, &word, []string{"none", "any"}); word == "none" {
		*into = []string{}
	}
}

// ParseDestination reads an entry of a phase's network: "unix", for which the prefix
// is the zero one, or an address or prefix, in brackets for IPv6, with or without a
// port; port 0 is any.
func ParseDestination(s string) (netip.Prefix, uint16, error) {
	if s == "unix" {
		return netip.Prefix{}, 0, nil
	}
	bad := fmt.Errorf("%s is no destination, want unix, or an address or prefix with or without a port, such as 10.0.0.0/8:443, 192.0.2.1 or [2001:db8::]/32:443", quote(s))
	host, rest := s, ""
	if inner, ok := strings.CutPrefix(s, "["); ok {
		if host, rest, ok = strings.Cut(inner, "]"); !ok {
			return netip.Prefix{}, 0, bad
		}
	} else if i := strings.IndexAny(s, "/:"); i >= 0 {
		host, rest = s[:i], s[i:]
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" || addr.Is4In6() || addr.Is6() != strings.HasPrefix(s, "[") {
		return netip.Prefix{}, 0, bad
	}
	length, port := uint64(addr.BitLen()), uint64(0)
	rest, after, hasPort := strings.Cut(rest, ":")
	if hasPort {
		if port, err = strconv.ParseUint(after, 10, 16); err != nil || port == 0 {
			return netip.Prefix{}, 0, bad
		}
	}
	if rest != "" {
		digits, ok := strings.CutPrefix(rest, "/")
		if length, err = strconv.ParseUint(digits, 10, 8); err != nil || !ok || length > uint64(addr.BitLen()) {
			return netip.Prefix{}, 0, bad
		}
	}
	prefix := netip.PrefixFrom(addr, int(length))
	if prefix != prefix.Masked() {
		return netip.Prefix{}, 0, fmt.Errorf("%s has bits set behind its prefix (did you mean %s?)", quote(s), prefix.Masked())
	}
	return prefix, uint16(port), nil
}
