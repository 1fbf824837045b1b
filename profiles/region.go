// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// A region is a set of argument values of one call, as a union of boxes; nil is the
// empty one. Conditions of the runtime-spec can't be complemented or intersected,
// and libseccomp knows no order of rules: what is allowed in one phase and not in
// another can be told apart in one filter only if the rules for it are disjoint.
// Boxes can do both.
//
// An argument is 33 bits here: its lower 32, and one that says whether any of the
// upper 32 is set. Conditions that would need more are refused (checkArgs), because
// an OCI rule holds for every ABI, and i386 and x32 have no more than 32 bits. Where
// the kernel takes an int, the 33rd is left out.
type region []box

// box is one value or any for each bit of each argument.
type box [6]bits

// bits are those of an argument whose values must be those of val where mask is set.
type bits struct{ mask, val uint64 }

const (
	low32 = 1<<32 - 1
	above = 1 << 32 // one of the upper 32 bits is set
	whole = above | low32
)

var anything = region{{}}

// errManyBoxes: the conditions are too many to be told apart.
var errManyBoxes = errors.New("conditions of too many kinds: compare for equality, or under a mask")

// Bounds of what is computed for a call, as a container waits for it. One comparison
// takes 33 boxes at most.
const (
	maxBoxes  = 512
	maxSpread = 512
	maxText   = 128
)

// word is an argument's value as regions see it.
func word(abi ABI, v uint64) uint64 {
	w := v & low32
	if abi == specs.ArchX86_64 && v > low32 {
		w |= above
	}
	return w
}

func (r region) has(abi ABI, args [6]uint64) bool {
	return slices.ContainsFunc(r, func(b box) bool {
		for i := range b {
			if word(abi, args[i])&b[i].mask != b[i].val {
				return false
			}
		}
		return true
	})
}

// covers says whether b is within a.
func (a box) covers(b box) bool {
	for i := range a {
		if a[i].mask&^b[i].mask != 0 || a[i].val != b[i].val&a[i].mask {
			return false
		}
	}
	return true
}

func (a box) disjoint(b box) bool {
	for i := range a {
		if (a[i].val^b[i].val)&a[i].mask&b[i].mask != 0 {
			return true
		}
	}
	return false
}

// minus is what is in a and not in b, as disjoint boxes.
func (a box) minus(b box) region {
	if a.disjoint(b) {
		return region{a}
	}
	var out region
	for i := range a {
		for bit := uint64(1); bit <= above; bit <<= 1 {
			if b[i].mask&^a[i].mask&bit == 0 {
				continue
			}
			other := a
			other[i].mask |= bit
			other[i].val |= ^b[i].val & bit
			out = append(out, other)
			a[i].mask |= bit
			a[i].val |= b[i].val & bit
		}
	}
	return out
}

// spread is r without s as boxes that may overlap, and are fewer than those of minus.
func (r region) spread(s region) (region, error) {
	r = slices.Clone(r)
	for _, b := range s {
		var next region
		for _, a := range r {
			if a.disjoint(b) {
				next = append(next, a)
				continue
			}
			for i := range a {
				for bit := uint64(1); bit <= above; bit <<= 1 {
					if b[i].mask&^a[i].mask&bit != 0 {
						other := a
						other[i].mask |= bit
						other[i].val |= ^b[i].val & bit
						next = append(next, other)
					}
				}
			}
			if len(next) > maxSpread {
				return nil, errManyBoxes
			}
		}
		r = next.tidy()
	}
	// Those that fix most bits first: what others cover together isn't needed.
	slices.SortStableFunc(r, func(a, b box) int { return masks(b) - masks(a) })
	for i := 0; i < len(r); {
		if rest, err := r[i : i+1].minus(slices.Concat(r[:i], r[i+1:])); err == nil && len(rest) == 0 {
			r = slices.Delete(r, i, i+1)
		} else {
			i++
		}
	}
	return r, nil
}

func (r region) minus(s region) (region, error) { return r.minusUpTo(s, maxBoxes) }

func (r region) minusUpTo(s region, most int) (region, error) {
	for _, b := range s {
		var next region
		for _, a := range r {
			next = append(next, a.minus(b)...)
		}
		if len(next) > most {
			return nil, errManyBoxes
		}
		r = next
	}
	return r, nil
}

func (r region) and(s region) (region, error) {
	if len(r)*len(s) > maxBoxes*maxBoxes {
		return nil, errManyBoxes
	}
	var out region
	for _, a := range r {
		for _, b := range s {
			if a.disjoint(b) {
				continue
			}
			both := a
			for i := range both {
				both[i].mask |= b[i].mask
				both[i].val |= b[i].val
			}
			out = append(out, both)
		}
	}
	out = out.tidy()
	if len(out) > maxBoxes {
		return nil, errManyBoxes
	}
	return out, nil
}

func (r region) or(s region) region { return append(slices.Clip(r), s...).tidy() }

// tidy drops boxes that others cover, and sorts.
func (r region) tidy() region {
	r = slices.Clone(r)
	slices.SortFunc(r, compareBoxes)
	r = slices.Compact(r)
	return slices.DeleteFunc(slices.Clone(r), func(b box) bool {
		return slices.ContainsFunc(r, func(a box) bool { return a != b && a.covers(b) })
	})
}

func compareBoxes(a, b box) int {
	for i := range a {
		for _, d := range [2][2]uint64{{a[i].mask, b[i].mask}, {a[i].val, b[i].val}} {
			if d[0] != d[1] {
				if d[0] < d[1] {
					return -1
				}
				return 1
			}
		}
	}
	return 0
}

func (r region) within(s region) (bool, error) {
	rest, err := r.minus(s)
	return len(rest) == 0, err
}

func (r region) equal(s region) (bool, error) {
	a, err := r.within(s)
	if err != nil || !a {
		return false, err
	}
	return s.within(r)
}

func (r region) any() bool { return slices.Contains(r, box{}) }

// argument is the one argument that all boxes of the regions speak of: -1 if none
// does, false if there are several.
func argument(regions ...region) (int, bool) {
	index := -1
	for _, r := range regions {
		for _, b := range r {
			for i := range b {
				if b[i].mask == 0 {
					continue
				}
				if index >= 0 && index != i {
					return 0, false
				}
				index = i
			}
		}
	}
	return index, true
}

// checkArgs refuses conditions that regions, or runtimes, don't understand.
func checkArgs(args []specs.LinuxSeccompArg) error {
	var seen [6]bool
	for _, c := range args {
		switch {
		case c.Index > 5:
			return fmt.Errorf("argument %d, want 0 to 5", c.Index)
		case seen[c.Index]:
			return fmt.Errorf("argument %d has two conditions, of which runtimes take either: write two rules", c.Index)
		case c.Value > low32 || c.ValueTwo > low32:
			return fmt.Errorf("argument %d is compared with more than 32 bits", c.Index)
		case c.Op == specs.OpMaskedEqual && c.ValueTwo&^c.Value != 0:
			return fmt.Errorf("argument %d: %#x has bits outside of the mask %#x, so it is never equal", c.Index, c.ValueTwo, c.Value)
		case c.Op != specs.OpMaskedEqual && c.ValueTwo != 0:
			return fmt.Errorf("argument %d: %s takes one value", c.Index, c.Op)
		}
		if _, err := cubes(c, whole); err != nil {
			return err
		}
		seen[c.Index] = true
	}
	return nil
}

// regionOf is where all of the conditions on a call hold.
func regionOf(name string, args []specs.LinuxSeccompArg) (region, error) {
	if err := checkArgs(args); err != nil {
		return nil, err
	}
	out := anything
	for _, c := range args {
		all := uint64(whole)
		if narrow(name, c.Index) {
			all = low32
		}
		values, err := cubes(c, all)
		if err != nil {
			return nil, err
		}
		if out, err = out.and(values); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// cubes is where one condition holds, on an argument whose bits are those of all.
func cubes(c specs.LinuxSeccompArg, all uint64) (region, error) {
	at := func(mask, val uint64) box {
		var b box
		b[c.Index] = bits{mask, val}
		return b
	}
	// below are the values less than n, at most 2^32.
	below := func(n uint64) region {
		if n > low32 {
			return region{at(all&above, 0)}
		}
		var out region
		for bit := uint64(1) << 31; bit > 0; bit >>= 1 {
			if n&bit != 0 {
				mask := all &^ (bit - 1)
				out = append(out, at(mask, (n&mask)&^bit))
			}
		}
		return out
	}
	switch c.Op {
	case specs.OpEqualTo:
		return region{at(all, c.Value)}, nil
	case specs.OpMaskedEqual:
		return region{at(c.Value, c.ValueTwo)}, nil
	case specs.OpNotEqual:
		return anything.minus(region{at(all, c.Value)})
	case specs.OpLessThan:
		return below(c.Value), nil
	case specs.OpLessEqual:
		return below(c.Value + 1), nil
	case specs.OpGreaterEqual:
		return anything.minus(below(c.Value))
	case specs.OpGreaterThan:
		return anything.minus(below(c.Value + 1))
	}
	return nil, fmt.Errorf("unknown operator %q", c.Op)
}

// rules are a region's boxes as rules with one condition each at most, the only
// ones that libseccomp compiles right in any company (internal/seccomp/verify.go).
// It is false where a box has conditions on several arguments or can't be said in
// one. loose may make a box larger: to "any value above 32 bits".
func (r region) rules(loose bool) ([][]specs.LinuxSeccompArg, bool) {
	var out [][]specs.LinuxSeccompArg
	for _, b := range r {
		var args []specs.LinuxSeccompArg
		for i, c := range b {
			index := uint(i)
			switch {
			case c.mask == 0:
				continue
			case c.mask&above == 0:
				args = append(args, masked(index, c.mask, c.val))
			case c.val&above != 0:
				if c.mask != above && !loose {
					return nil, false
				}
				args = append(args, specs.LinuxSeccompArg{Index: index, Op: specs.OpGreaterThan, Value: low32})
			case c.mask == whole:
				args = append(args, specs.LinuxSeccompArg{Index: index, Op: specs.OpEqualTo, Value: c.val})
			default:
				// Where arguments have 32 bits, runtimes compare what is left of the mask.
				args = append(args, masked(index, ^uint64(low32)|c.mask&low32, c.val))
			}
		}
		if len(args) > 1 {
			return nil, false
		}
		if !slices.ContainsFunc(out, func(have []specs.LinuxSeccompArg) bool { return slices.Equal(have, args) }) {
			out = append(out, args)
		}
	}
	return out, true
}

// String is for people: "any", "none", "arg2 & 0x243 == 0x0".
func (r region) String() string {
	if len(r) == 0 {
		return "none"
	}
	if r.any() {
		return "any"
	}
	// What is everything but little is said so.
	if rest, err := anything.minusUpTo(r, maxText); err == nil && len(rest) > 0 && len(rest) < len(r) && len(rest) <= 16 {
		return "not (" + rest.tidy().list() + ")"
	}
	return r.list()
}

func (r region) list() string {
	var parts, values []string
	var before string
	for _, b := range r {
		text := b.String()
		// Numbers for one argument: "int arg1 in 0x5401 0x5413".
		what, value, one := strings.Cut(text, " == ")
		if one && len(r) > 2 && !strings.Contains(text, " and ") && !strings.Contains(text, " & ") && (before == "" || before == what) {
			before, values = what, append(values, value)
			continue
		}
		parts = append(parts, text)
	}
	if len(values) > 0 {
		parts = append([]string{before + " in " + strings.Join(values, " ")}, parts...)
	}
	return strings.Join(parts, " or ")
}

func (a box) String() string {
	var parts []string
	for i, c := range a {
		switch {
		case c.mask == 0:
		case c.mask == whole:
			parts = append(parts, fmt.Sprintf("arg%d == %#x", i, c.val))
		case c.mask == low32:
			parts = append(parts, fmt.Sprintf("int arg%d == %#x", i, c.val))
		case c.mask&above == 0:
			parts = append(parts, fmt.Sprintf("arg%d & %#x == %#x", i, c.mask, c.val))
		case c.val&above != 0:
			parts = append(parts, fmt.Sprintf("arg%d > 0xffffffff", i))
		default:
			parts = append(parts, fmt.Sprintf("arg%d & %#x == %#x", i, ^uint64(low32)|c.mask&low32, c.val))
		}
	}
	if len(parts) == 0 {
		return "any"
	}
	return strings.Join(parts, " and ")
}
