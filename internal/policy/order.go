// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"slices"
)

// checkOrder finds duplicate names, and policies that can't be reached because
// an earlier one matches all that they match. It proves that only where
// patterns are equal, "*", or a pattern over a literal; it never errs the other
// way. A policy whose match is not reliable is left out.
func (d *decoder) checkOrder(policies []Policy, reliable []bool) {
	for i := range policies {
		p := &policies[i]
		at := func(message string) {
			d.errs = append(d.errs, &Error{d.file, p.Line, indexed(i), message})
		}
		named, shadowed := false, false
		for j := range policies[:i] {
			earlier := &policies[j]
			if p.Name != "" && earlier.Name == p.Name && !named {
				named = true
				at("name " + quote(p.Name) + " is taken by " + where(j, earlier))
			}
			if !shadowed && reliable[i] && reliable[j] && earlier.Match.covers(&p.Match) {
				shadowed = true
				at("is never reached: " + where(j, earlier) + " matches all that it matches (put the narrower policy first)")
			}
		}
	}
}

// covers reports whether m surely matches all that other matches.
func (m *Match) covers(other *Match) bool {
	for label, pattern := range m.PodLabels {
		narrower, ok := other.PodLabels[label]
		if !ok || !coversPattern(pattern, narrower) {
			return false
		}
	}
	if (len(m.Users) > 0) != (len(other.Users) > 0) {
		return false // the one matches rootless containers only, the other none
	}
	return coversList(m.Users, other.Users) &&
		coversList(m.Namespaces, other.Namespaces) &&
		coversList(m.Containers, other.Containers) &&
		coversList(mapped(m.Images), mapped(other.Images))
}

// coversList: an empty list matches everything, and so does "*".
func coversList(wide, narrow []string) bool {
	if len(wide) == 0 || slices.Contains(wide, "*") {
		return true
	}
	if len(narrow) == 0 {
		return false
	}
	for _, n := range narrow {
		if !slices.ContainsFunc(wide, func(w string) bool { return coversPattern(w, n) }) {
			return false
		}
	}
	return true
}

func coversPattern(wide, narrow string) bool {
	if wide == "*" || wide == narrow {
		return true
	}
	text, ok := literal(narrow)
	return ok && matchGlob(wide, text)
}

func mapped(images []string) []string {
	out := make([]string, len(images))
	for i := range images {
		out[i] = imagePattern(images[i])
	}
	return out
}

func indexed(i int) string { return fmt.Sprintf("policies[%d]", i) }

func where(i int, p *Policy) string {
	return fmt.Sprintf("policies[%d] (%s, line %d)", i, quote(p.Name), p.Line)
}
