// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// abis maps the recorder's ABI indexes to libseccomp's architectures.
var abis = map[bpf.ABI]profiles.ABI{
	bpf.ABIX8664: "SCMP_ARCH_X86_64",
	bpf.ABII386:  "SCMP_ARCH_X86",
	bpf.ABIX32:   "SCMP_ARCH_X32",
}

// newRecording starts a recording now, on this kernel, with a fresh id.
func newRecording(subject profiles.Subject, workload, runtime string, gate profiles.Gate) *profiles.Recording {
	now := time.Now().UTC()
	return &profiles.Recording{
		SchemaVersion: 1,
		ID:            recordingID(now),
		Workload:      workload,
		Subject:       subject,
		Started:       now,
		Kernel:        seccomp.KernelRelease(),
		Runtime:       runtime,
		Gate:          gate,
	}
}

// recordingID is unique and sorts by time: "20261124T150102.123456789Z-1f2e3d4c".
func recordingID(t time.Time) string {
	var salt [4]byte
	_, _ = rand.Read(salt[:]) // never fails: crypto/rand aborts the program instead
	return t.UTC().Format("20060102T150405.000000000Z") + "-" + hex.EncodeToString(salt[:])
}

// fill puts into rec what the kernel counted: numbers become names, what has
// no name becomes a loss, and so does everything else that the kernel could
// not keep. phases names the phase indexes.
func fill(rec *profiles.Recording, snapshot *bpf.Snapshot, events []bpf.Event, phases map[uint8]string) {
	name := func(index uint8) string {
		if n, ok := phases[index]; ok {
			return n
		}
		return fmt.Sprintf("phase-%d", index)
	}
	call := func(abi bpf.ABI, nr uint32) profiles.Call {
		c := profiles.Call{ABI: abis[abi], Number: nr}
		c.Name, _ = seccomp.Name(c.ABI, nr)
		return c
	}
	rec.Phases = map[string]profiles.Calls{}
	unresolved := map[profiles.Call]bool{}
	for _, set := range snapshot.Calls {
		phase := name(set.Phase)
		for _, nr := range set.Numbers {
			c := call(set.ABI, uint32(nr))
			if c.Name == "" {
				unresolved[c] = true
				continue
			}
			calls := rec.Phases[phase]
			if calls == nil {
				calls = profiles.Calls{}
				rec.Phases[phase] = calls
			}
			calls[c.ABI] = append(calls[c.ABI], c.Name)
		}
	}
	for _, calls := range rec.Phases {
		for abi, names := range calls {
			slices.Sort(names)
			// i386 has pairs of numbers under one name.
			calls[abi] = slices.Compact(names)
		}
	}
	for c := range unresolved {
		rec.Unresolved = append(rec.Unresolved, c)
	}
	sort.Slice(rec.Unresolved, func(i, j int) bool {
		a, b := rec.Unresolved[i], rec.Unresolved[j]
		return a.ABI < b.ABI || a.ABI == b.ABI && a.Number < b.Number
	})

	for _, e := range events {
		rec.FirstSeen = append(rec.FirstSeen, profiles.FirstSeen{
			Call: call(e.ABI, e.Number), Phase: name(e.Phase), After: e.Since,
			Comm: e.Comm, Exe: e.Exe, PID: uint32(e.PID),
		})
	}
	sort.SliceStable(rec.FirstSeen, func(i, j int) bool { return rec.FirstSeen[i].After < rec.FirstSeen[j].After })

	for _, a := range snapshot.Args {
		rec.Arguments = append(rec.Arguments, profiles.Argument{
			Call: call(a.ABI, uint32(a.Number)), Phase: name(a.Phase), Index: int(a.Arg), Mask: a.Mask,
			Values: a.Values, AnyValue: a.Any,
		})
	}

	lose := func(kind profiles.LossKind, count uint64, detail string) {
		if count > 0 {
			rec.Losses = append(rec.Losses, profiles.Loss{Kind: kind, Count: count, Detail: detail})
		}
	}
	var odd []profiles.Call
	for _, c := range snapshot.OddCalls {
		odd = append(odd, profiles.Call{ABI: abis[c.ABI], Number: c.Number})
	}
	lost := snapshot.Losses
	lose(profiles.LossUnresolved, uint64(len(rec.Unresolved)), listCalls(rec.Unresolved))
	lose(profiles.LossOutOfRange, uint64(len(odd))+lost.OddCalls, listCalls(odd))
	lose(profiles.LossCgroupMapFull, lost.Cgroups, "children of the container's cgroup that were not tracked")
	lose(profiles.LossForeignLineage, lost.ForeignCalls, "calls by tasks that entered with fewer seccomp filters than the runtime's init")
	lose(profiles.LossFirstSeen, lost.Events, "")
	lose(profiles.LossArguments, lost.Args, "")
}

func listCalls(calls []profiles.Call) string {
	parts := make([]string, len(calls))
	for i, c := range calls {
		parts[i] = fmt.Sprintf("%s:%d", c.ABI, c.Number)
	}
	return strings.Join(parts, " ")
}

func describeLoss(l profiles.Loss) string {
	s := fmt.Sprintf("%s (%d)", l.Kind, l.Count)
	if l.Detail != "" {
		s += ": " + l.Detail
	}
	return s
}

// summary is "37 calls under SCMP_ARCH_X86_64", how many more the profile allows,
// what is new to parent, which may be nil, and a status that makes one doubt.
func summary(calls profiles.Calls, more int, parent *profiles.Version, delta profiles.Delta, status int) string {
	var parts []string
	for _, abi := range calls.ABIs() {
		parts = append(parts, fmt.Sprintf("%d calls under %s", len(calls[abi]), abi))
	}
	s := strings.Join(parts, ", ")
	if more > 0 {
		s += fmt.Sprintf(" and %d to start a container", more)
	}
	if parent != nil {
		if added := delta.Added.Names(); len(added) > 0 {
			s += "; new: " + strings.Join(added, " ")
		} else {
			s += "; nothing new"
		}
	}
	if status != 0 {
		s += fmt.Sprintf("; the command ended with status %d", status)
	}
	return s
}
