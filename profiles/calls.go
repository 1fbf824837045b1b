// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"maps"
	"slices"
)

// ABIs lists the ABIs with calls, sorted.
func (c Calls) ABIs() []ABI {
	var out []ABI
	for abi, names := range c {
		if len(names) > 0 {
			out = append(out, abi)
		}
	}
	slices.Sort(out)
	return out
}

// Len counts the calls over all ABIs.
func (c Calls) Len() int {
	n := 0
	for _, names := range c {
		n += len(names)
	}
	return n
}

// Names lists the names over all ABIs, sorted, each once.
func (c Calls) Names() []string {
	var out []string
	for _, names := range c {
		out = append(out, names...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Has says whether a call is in the set.
func (c Calls) Has(abi ABI, name string) bool {
	_, ok := slices.BinarySearch(c[abi], name)
	return ok
}

// Union is the set of what is in any of the sets. It shares no memory with
// them, and accepts sets that are not sorted.
func Union(sets ...Calls) Calls {
	out := Calls{}
	for _, set := range sets {
		for abi, names := range set {
			out[abi] = append(out[abi], names...)
		}
	}
	for abi, names := range out {
		if len(names) == 0 {
			delete(out, abi)
			continue
		}
		slices.Sort(names)
		out[abi] = slices.Compact(names)
	}
	return out
}

// Minus is what is in c and not in other.
func (c Calls) Minus(other Calls) Calls {
	out := Calls{}
	for abi, names := range c {
		for _, name := range names {
			if !other.Has(abi, name) {
				out[abi] = append(out[abi], name)
			}
		}
	}
	return out
}

// Equal says whether the sets hold the same calls.
func (c Calls) Equal(other Calls) bool {
	return maps.EqualFunc(Union(c), Union(other), slices.Equal[[]string])
}

// All is the union over a recording's phases.
func (r *Recording) All() Calls {
	var sets []Calls
	for _, calls := range r.Phases {
		sets = append(sets, calls)
	}
	return Union(sets...)
}

// Blocking lists the losses after which calls may be missing. The others lack
// only the circumstances of calls that are there.
func (r *Recording) Blocking() []Loss {
	var out []Loss
	for _, l := range r.Losses {
		switch l.Kind {
		case LossFirstSeen, LossArguments:
		default: // a kind of a later version, too
			out = append(out, l)
		}
	}
	return out
}
