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
// watched cgroup, and of those below it.
type FilterDenial struct {
	Cgroup uint64
	Tag    uint32 // of the cgroup, at the time
	Arch   uint32 // AUDIT_ARCH_X86_64, for x32 too, or AUDIT_ARCH_I386
	// Call is the number as the kernel has it, or 1,024 for all above 1,023, of which
	// Number is the last.
	Call, Number uint32
	PID          int    // of the last process, in the first pid namespace
	Count        uint64 // since the cgroup is watched
}

// watched are cgroups, in one of the object's maps.
type watched struct{ cgroups *ebpf.Map }

// Watch begins to watch a cgroup, with those below it, or gives it another tag.
func (w watched) Watch(cgroup uint64, tag uint32) error {
	err := w.cgroups.Put(cgroup, tag)
	if errors.Is(err, unix.E2BIG) {
		return full(err, "watched cgroups", w.cgroups)
	}
	if err != nil {
		return fmt.Errorf("watch cgroup %d: %w", cgroup, err)
	}
	return nil
}

// Forget ends that. It is no error if the cgroup isn't watched.
func (w watched) Forget(cgroup uint64) error {
	if err := w.cgroups.Delete(cgroup); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("watch cgroup %d no more: %w", cgroup, err)
	}
	return nil
}

// FilterDenials counts what seccomp filters deny to the tasks of watched cgroups, of those
// filters that were loaded with SECCOMP_FILTER_FLAG_LOG: the kernel tells its audit log of
// each, and what listens there is fentry/audit_seccomp. Of what kills it counts all. What a
// supervisor denied isn't in it.
//
// Nothing is pinned: it counts while it is open.
type FilterDenials struct {
	watched
	calls, lost *ebpf.Map
	link        link.Link
}

// OpenFilterDenials begins to count. The error wraps ErrUnsupported where the kernel has
// no fentry programs.
func OpenFilterDenials() (*FilterDenials, error) {
	maps, l, err := attachAlone(denialsProgSyslatchAudit, denialsMapWatched, denialsMapDeniedCalls, denialsMapDeniedLost)
	if err != nil {
		return nil, fmt.Errorf("fentry/audit_seccomp: %w", err)
	}
	return &FilterDenials{watched{maps[denialsMapWatched]}, maps[denialsMapDeniedCalls], maps[denialsMapDeniedLost], l}, nil
}

// attachAlone attaches one of the object's programs. Its maps are the caller's to close.
func attachAlone(program string, maps ...string) (map[string]*ebpf.Map, link.Link, error) {
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
	return coll.Maps, l, coll.Programs[program].Close() // the link has it
}

// Read lists all counts, and says how many denials there was no room to count.
func (d *FilterDenials) Read() (all []FilterDenial, lost uint64, err error) {
	const batch = 4096 // more than a bucket of the hash will have
	keys, values := make([]denialsDenialKey, batch), make([]denialsDenialCount, batch)
	var cursor ebpf.MapBatchCursor
	for last := false; !last; {
		n, err := d.calls.BatchLookup(&cursor, keys, values, nil)
		last = errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return nil, 0, fmt.Errorf("list denials: %w", err)
		}
		for i, key := range keys[:n] {
			v := &values[i]
			all = append(all, FilterDenial{key.Cgroup, key.Tag, key.Arch, key.Nr, v.Nr, int(v.Pid), v.N})
		}
	}
	if err := d.lost.Lookup(uint32(0), &lost); err != nil {
		return nil, 0, fmt.Errorf("read lost denials: %w", err)
	}
	return all, lost, nil
}

// Forget ends the watch of a cgroup, and its counts.
func (d *FilterDenials) Forget(cgroup uint64) error {
	return errors.Join(d.watched.Forget(cgroup),
		dropKeys(d.calls, func(k denialsDenialKey, _ denialsDenialCount) bool { return k.Cgroup == cgroup }))
}

// Close ends the counting.
func (d *FilterDenials) Close() error {
	return errors.Join(d.link.Close(), d.cgroups.Close(), d.calls.Close(), d.lost.Close())
}

// Ended says in, or below, which watched cgroup processes were that have ended, of those
// that had seccomp filters: some thousands of the last.
type Ended struct {
	watched
	processes *ebpf.Map
	link      link.Link
}

// OpenEnded begins to note them. Nothing is pinned.
func OpenEnded() (*Ended, error) {
	maps, l, err := attachAlone(denialsProgSyslatchEnd, denialsMapWatched, denialsMapEnded)
	if err != nil {
		return nil, fmt.Errorf("tp_btf/sched_process_exit: %w", err)
	}
	return &Ended{watched{maps[denialsMapWatched]}, maps[denialsMapEnded], l}, nil
}

// Cgroup is the watched cgroup's id, 0 if there is none.
func (e *Ended) Cgroup(pid int) (id uint64) {
	if e.processes.Lookup(uint32(pid), &id) != nil {
		return 0
	}
	return id
}

// Close ends it.
func (e *Ended) Close() error {
	return errors.Join(e.link.Close(), e.cgroups.Close(), e.processes.Close())
}
