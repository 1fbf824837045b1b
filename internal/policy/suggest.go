// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"bytes"
	"fmt"
	"strings"
	"unicode"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.yaml.in/yaml/v3"

	"github.com/syslatch/syslatch/profiles"
)

// SuggestedPhases is a suggestion as the fields of a policy: phases, and architectures
// where it takes any. What there is to say of it stands in front as comments.
func SuggestedPhases(s *profiles.Suggestion) ([]byte, error) {
	var out bytes.Buffer
	comment := func(format string, args ...any) {
		// Recordings are files, which anybody can write.
		text := strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) {
				return '?'
			}
			return r
		}, fmt.Sprintf(format, args...))
		fmt.Fprintf(&out, "# %s\n", text)
	}
	comment("Made by 'syslatch profile suggest' of what %s did in each phase.", s.Workload)
	for _, rec := range s.Recordings {
		line := fmt.Sprintf("recording %s, kernel %s: %s", rec.ID, rec.Kernel, strings.Join(rec.Phases, " "))
		switch {
		case rec.LeftOut != "":
			line = fmt.Sprintf("recording %s left out: %s", rec.ID, rec.LeftOut)
		case len(rec.Losses) > 0:
			line += fmt.Sprintf(", with losses (%s)", rec.Losses[0].Kind)
		}
		comment("%s", line)
	}
	for _, note := range s.Notes {
		comment("%s", note)
	}
	fields := mapping(0)
	if s.Architectures != nil {
		var list []*yaml.Node
		for _, arch := range s.Architectures {
			list = append(list, text(string(arch)))
		}
		put(fields, "architectures", sequence(yaml.FlowStyle, list...))
	}
	phases := mapping(0)
	put(phases, "initial", text(s.Initial))
	for _, p := range s.Phases {
		phase := mapping(yaml.FlowStyle) // {} for the floor alone
		if len(p.Allow) > 0 {
			phase = mapping(0)
			var rules []*yaml.Node
			for _, r := range p.Allow {
				rules = append(rules, suggestedRule(r)...)
			}
			put(phase, "allow", sequence(0, rules...))
		}
		put(phases, p.Name, phase)
	}
	put(fields, "phases", phases)
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(fields); err != nil {
		return nil, err
	}
	return out.Bytes(), e.Close()
}

func suggestedRule(r profiles.PhaseRule) (out []*yaml.Node) {
	var calls []*yaml.Node
	for _, name := range r.Names {
		calls = append(calls, text(name))
	}
	if len(r.Args) == 0 {
		return calls
	}
	var args []*yaml.Node
	for _, a := range r.Args {
		c := mapping(yaml.FlowStyle)
		put(c, "index", number("%d", uint64(a.Index)))
		put(c, "op", text(string(a.Op)))
		put(c, "value", number("%#x", a.Value))
		if a.Op == specs.OpMaskedEqual {
			put(c, "valueTwo", number("%#x", a.ValueTwo))
		}
		args = append(args, c)
	}
	rule := mapping(yaml.FlowStyle)
	put(rule, "names", sequence(yaml.FlowStyle, calls...))
	put(rule, "args", sequence(yaml.FlowStyle, args...))
	return []*yaml.Node{rule}
}

func mapping(style yaml.Style) *yaml.Node {
	return &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map", Style: style}
}

func sequence(style yaml.Style, items ...*yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq", Style: style, Content: items}
}

func put(m *yaml.Node, key string, value *yaml.Node) { m.Content = append(m.Content, text(key), value) }

// text is quoted where it would be read as something else.
func text(s string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(s)
	switch strings.ToLower(s) {
	case "on", "off", "yes", "no", "y", "n": // by readers of YAML 1.1
		n.Style = yaml.DoubleQuotedStyle
	}
	return n
}

func number(format string, v uint64) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: fmt.Sprintf(format, v)}
}
