// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// MergeOptions say how a recording becomes a version.
type MergeOptions struct {
	MustAllow, MustDeny []string
	Architectures       []ABI
	// NewerThanKernel are the calls that the recording's kernel lacks; see
	// RenderOptions. What the parent's kernel lacked stays, so that recordings
	// that alternate between two kernels don't make versions without end.
	NewerThanKernel []string
	// AllowLosses makes a version even of a recording that may lack calls.
	AllowLosses bool
	// Incidental allows, beside what was recorded, what [Incidental] lists: for
	// containers that a runtime written in Go starts.
	Incidental bool
	Created    time.Time
}

// LossyError refuses a recording that may lack calls.
type LossyError struct {
	Recording string
	Losses    []Loss
}

func (e *LossyError) Error() string {
	parts := make([]string, len(e.Losses))
	for i, l := range e.Losses {
		parts[i] = fmt.Sprintf("%s (%d)", l.Kind, l.Count)
		if l.Detail != "" {
			parts[i] += ": " + l.Detail
		}
	}
	return fmt.Sprintf("recording %s may lack calls: %s (allow losses explicitly to use it nevertheless)", e.Recording, strings.Join(parts, "; "))
}

// Delta is how one version differs from another. A change of order, of errno or
// of a rule's conditions is none.
type Delta struct {
	Added   Calls `json:"added,omitempty"`
	Removed Calls `json:"removed,omitempty"`
}

// Merge unites a recording with parent, which may be nil, into the next version.
// It returns a nil version and an empty delta if the next would equal its
// parent, or would be a first one without any call.
//
// The evidence (Manifest.Calls) of the next version holds all of the parent's:
// only a changed policy can make its profile smaller. Delta.Added is the new
// evidence, must-deny calls among it; Delta.Removed is what the profile allowed
// before and denies now. Calls that a profile denied are no evidence: they never
// reach a recording, and never widen a profile. Incidental calls that a
// recording shows by chance and the profile allows already make no version.
//
// A recording with [Recording.Blocking] losses is refused with a *[LossyError];
// used all the same, its losses stand in this version's manifest.
func Merge(parent *Version, rec *Recording, o MergeOptions) (*Version, Delta, error) {
	if losses := rec.Blocking(); len(losses) > 0 && !o.AllowLosses {
		return nil, Delta{}, &LossyError{rec.ID, losses}
	}
	var before Manifest
	var old *specs.LinuxSeccomp
	if parent != nil {
		before, old = parent.Manifest, parent.Profile
	}
	if before.Workload != "" && before.Workload != rec.Workload {
		return nil, Delta{}, fmt.Errorf("recording %s is of workload %q, the version of %q", rec.ID, rec.Workload, before.Workload)
	}
	calls := Union(before.Calls, rec.All())
	delta := Delta{Added: calls.Minus(before.Calls)}
	if parent == nil && calls.Len() == 0 {
		return nil, Delta{}, nil
	}
	floor := before.Floor
	if rec.Gate == GateExec {
		floor = sorted(append(slices.Clone(floor), Floor("")...))
	}
	profile := Render(calls, RenderOptions{
		MustAllow: append(slices.Clone(o.MustAllow), floor...), MustDeny: o.MustDeny,
		Architectures:   o.Architectures,
		NewerThanKernel: append(slices.Clone(o.NewerThanKernel), fallbacks(old)...),
		Incidental:      o.Incidental,
	})
	data, err := EncodeProfile(profile)
	if err != nil {
		return nil, Delta{}, err
	}
	digest := Digest(data)
	if parent != nil && digest == before.Digest && (delta.Added.Len() == 0 || o.Incidental && onlyIncidental(delta.Added)) {
		return nil, Delta{}, nil
	}
	recordings := slices.Clone(before.Recordings)
	if delta.Added.Len() > 0 {
		recordings = append(recordings, rec.ID)
	}
	if old != nil {
		delta.Removed = Denied(profile, allowed(old))
	}
	return &Version{
		Manifest: Manifest{
			SchemaVersion: 1,
			Workload:      rec.Workload,
			Version:       before.Version + 1,
			Digest:        digest,
			Parent:        before.Digest,
			Created:       o.Created.UTC(),
			Calls:         calls,
			Recordings:    recordings,
			Kernel:        rec.Kernel,
			Runtime:       rec.Runtime,
			Losses:        slices.Clone(rec.Blocking()),
			MustAllow:     sorted(slices.Clone(o.MustAllow)),
			MustDeny:      sorted(slices.Clone(o.MustDeny)),
			Architectures: sortedABIs(slices.Clone(o.Architectures)),
			Floor:         floor,
			Incidental:    unrecorded(profile, calls, o.Incidental),
		},
		Profile: profile,
	}, delta, nil
}

func onlyIncidental(calls Calls) bool {
	return len(without(calls.Names(), Incidental())) == 0
}

// unrecorded lists the incidental calls that a profile allows without evidence.
func unrecorded(p *specs.LinuxSeccomp, calls Calls, incidental bool) []string {
	if !incidental {
		return nil
	}
	missing := Calls{specs.ArchX86_64: without(Incidental(), calls.Names())}
	return missing.Minus(Denied(p, missing))[specs.ArchX86_64]
}

// Diff is what b allows and a doesn't, and the reverse, whatever the arguments:
// calls that one of them allows under conditions count as neither.
func Diff(a, b *specs.LinuxSeccomp) Delta {
	in, out := allowed(a), allowed(b)
	return Delta{Added: out.Minus(in), Removed: in.Minus(out)}
}

// fallbacks are the calls that a profile answers ENOSYS; p may be nil.
func fallbacks(p *specs.LinuxSeccomp) []string {
	if p == nil {
		return nil
	}
	var out []string
	for _, rule := range p.Syscalls {
		if rule.Action == specs.ActErrno && rule.ErrnoRet != nil && *rule.ErrnoRet == errnoENOSYS && len(rule.Args) == 0 {
			out = append(out, rule.Names...)
		}
	}
	return out
}

// allowed is what a profile allows whatever the arguments.
func allowed(p *specs.LinuxSeccomp) Calls {
	out := Calls{}
	for _, rule := range p.Syscalls {
		if rule.Action != specs.ActAllow || len(rule.Args) > 0 {
			continue
		}
		for _, abi := range Architectures(p) {
			out[abi] = append(out[abi], rule.Names...)
		}
	}
	return Union(out)
}

// Adopt takes a profile that was written without a manifest as version 0, for
// uniting it with a recording: all that it allows counts as recorded, under
// every architecture that it lists.
func Adopt(p *specs.LinuxSeccomp) (*Version, error) {
	data, err := EncodeProfile(p)
	if err != nil {
		return nil, err
	}
	if !Denies(p.DefaultAction) {
		return nil, fmt.Errorf("default action %s: nothing can be added to a profile that allows everything", p.DefaultAction)
	}
	for i, rule := range p.Syscalls {
		switch {
		case Denies(rule.Action):
		case rule.Action != specs.ActAllow:
			return nil, fmt.Errorf("syscalls[%d] has action %s, which a recording can't be united with (%s can)", i, rule.Action, specs.ActAllow)
		case len(rule.Args) > 0:
			return nil, fmt.Errorf("syscalls[%d] has argument conditions, which a recording can't be united with", i)
		}
	}
	return &Version{Manifest{SchemaVersion: 1, Digest: Digest(data), Calls: allowed(p)}, p}, nil
}

// Digest is "sha256:" and the hash in hex.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Unseen estimates, from 0 to 1, which share of the next recording's calls no
// recording has shown before, by Good and Turing: calls seen in exactly one
// recording, divided by all sightings (a call counts once per recording and ABI).
// Times the calls of a usual run, it is how many new ones the next run makes. It
// is 1 without recordings and after one; it takes runs to be alike, and some ten
// of them to be worth something.
func Unseen(recordings []*Recording) float64 {
	seen := map[string]int{}
	sightings, once := 0, 0
	for _, r := range recordings {
		for abi, names := range r.All() {
			for _, name := range names {
				seen[string(abi)+" "+name]++
				sightings++
			}
		}
	}
	if sightings == 0 {
		return 1
	}
	for _, n := range seen {
		if n == 1 {
			once++
		}
	}
	return float64(once) / float64(sightings)
}
