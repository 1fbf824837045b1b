// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// FilterDenial is how often seccomp filters have denied one call to the tasks of one
// cgroup. Numbers above 1,023 are one call.
type FilterDenial struct {
	Cgroup uint64
	Arch   uint32 // AUDIT_ARCH_X86_64, for x32 too, or AUDIT_ARCH_I386
	Number uint32 // as the kernel has it; the last, where they are one call
	PID    int    // of the last process, in the first pid namespace
	Count  uint64 // since OpenFilterDenials
}

// FilterDenials counts what seccomp filters deny on this host, of those that were loaded
// with SECCOMP_FILTER_FLAG_LOG: the kernel tells its audit log of each, and what listens
// there is fentry/audit_seccomp. Of what kills it counts all. What a supervisor denied
// isn't in it.
//
// Nothing is pinned: it counts while it is open.
type FilterDenials struct {
	calls, lost *ebpf.Map
	link        link.Link
}

// OpenFilterDenials begins to count. The error wraps ErrUnsupported where the kernel has
// no fentry programs.
func OpenFilterDenials() (*FilterDenials, error) {
	coll, l, err := attachAlone(denialsProgSyslatchAudit, denialsMapDeniedCalls, denialsMapDeniedLost)
	if err != nil {
		return nil, fmt.Errorf("fentry/audit_seccomp: %w", err)
	}
	return &FilterDenials{coll.Maps[denialsMapDeniedCalls], coll.Maps[denialsMapDeniedLost], l}, nil
}

// attachAlone attaches one of the object's programs. Its maps are the caller's to close.
func attachAlone(program string, maps ...string) (*ebpf.Collection, link.Link, error) {
	if err := rlimit.RemoveMemlock(); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, nil, err // see Open
	}
	spec, err := loadDenials()
	if err != nil {
		return nil, nil, err
	}
	spec.Programs = map[string]*ebpf.ProgramSpec{program: spec.Programs[program]}
	for name := range spec.Maps {
		if !slices.Contains(maps, name) {
			delete(spec.Maps, name)
		}
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil, nil, fmt.Errorf("%w: this kernel, or this process's privileges, don't allow it: %w", ErrUnsupported, unix.EPERM)
		}
		return nil, nil, explain(err)
	}
	l, err := link.AttachTracing(link.TracingOptions{Program: coll.Programs[program]})
	if err != nil {
		coll.Close()
		return nil, nil, fmt.Errorf("%w: attach: %w", ErrUnsupported, err)
	}
	return coll, l, coll.Programs[program].Close() // the link has it
}

// Ended says in which cgroup processes were that have ended, of those that had seccomp
// filters: some thousands of the last.
type Ended struct {
	cgroups *ebpf.Map
	link    link.Link
}

// OpenEnded begins to note them. Nothing is pinned.
func OpenEnded() (*Ended, error) {
	coll, l, err := attachAlone(denialsProgSyslatchEnd, denialsMapEnded)
	if err != nil {
		return nil, fmt.Errorf("tp_btf/sched_process_exit: %w", err)
	}
	return &Ended{coll.Maps[denialsMapEnded], l}, nil
}

// Cgroup is the id of a process's, 0 if it isn't known.
func (e *Ended) Cgroup(pid int) (id uint64) {
	if e.cgroups.Lookup(uint32(pid), &id) != nil {
		return 0
	}
	return id
}

// Close ends it.
func (e *Ended) Close() error { return errors.Join(e.link.Close(), e.cgroups.Close()) }

// Read lists all counts, and how many denials there was no room to count.
func (d *FilterDenials) Read() (all []FilterDenial, lost uint64, err error) {
	var key denialsDenialKey
	var value denialsDenialCount
	each := d.calls.Iterate()
	for each.Next(&key, &value) {
		all = append(all, FilterDenial{key.Cgroup, key.Arch, value.Nr, int(value.Pid), value.N})
	}
	if err := each.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, 0, fmt.Errorf("list denials: %w", err)
	}
	if err := d.lost.Lookup(uint32(0), &lost); err != nil {
		return nil, 0, fmt.Errorf("read lost denials: %w", err)
	}
	return all, lost, nil
}

// Forget removes the counts of cgroups that match and that are there no more: others may
// be counting.
func (d *FilterDenials) Forget(gone func(cgroup uint64) bool) error {
	return dropKeys(d.calls, func(k denialsDenialKey, _ denialsDenialCount) bool { return gone(k.Cgroup) })
}

// Close ends the counting.
func (d *FilterDenials) Close() error {
	return errors.Join(d.link.Close(), d.calls.Close(), d.lost.Close())
}
