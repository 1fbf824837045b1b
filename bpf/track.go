// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Track begins to record the cgroup with the given id (the inode number of its
// directory) and all children that are made from now on. Calls made after Track
// returns are recorded. It returns ErrTracked if the cgroup belongs to an
// instance, and ErrFull if there is no slot left.
//
// The writes, in order: the record is cleared; the slot is set up; programs are
// attached; the cgroup is entered; the slot is live; it is active. A crash before
// the last leaves a slot in set-up, which the next Open undoes.
func (r *Recorder) Track(cgroup uint64, opts TrackOptions) (Handle, error) {
	return r.track(fmt.Sprintf("track cgroup %d", cgroup), cgroup, opts, func(h Handle) error {
		return r.enter(h, cgroup)
	})
}

// MaxName is how long the name that Await takes may be, in bytes.
const MaxName = int(unsafe.Sizeof(syslatchCgroupName{})) - 1

// Await begins to record the cgroup that will be made next with the given name,
// the last part of its path, wherever in the default hierarchy, and all its
// children: with it nothing is missed that a runtime calls before anyone else
// can learn the new cgroup's id. The instance's RootCgroup is 0 until then. It
// returns ErrTracked if the name is awaited already, and ErrFull as Track does.
// Finish ends the waiting.
//
// The writes are Track's, with the name in the cgroup's place.
func (r *Recorder) Await(name string, opts TrackOptions) (Handle, error) {
	what := fmt.Sprintf("await cgroup %.200q", name)
	var key syslatchCgroupName
	if name == "" || len(name) > MaxName || strings.ContainsAny(name, "/\x00") {
		return Handle{}, fmt.Errorf("%s: want the name of a directory, of 1 to %d bytes", what, MaxName)
	}
	for i := range len(name) {
		key.Name[i] = int8(name[i])
	}
	return r.track(what, 0, opts, func(h Handle) error {
		err := r.awaited.Update(key, syslatchTracked{Slot: h.Slot, Generation: h.Generation}, ebpf.UpdateNoExist)
		switch {
		case errors.Is(err, ebpf.ErrKeyExist):
			return ErrTracked
		case errors.Is(err, unix.E2BIG):
			return fmt.Errorf("%w: it waits for %d cgroups", ErrFull, r.awaited.MaxEntries())
		}
		return err
	})
}

// track sets a slot up and lets enter put its cgroup, 0 if it is yet to be made,
// where the programs find it.
func (r *Recorder) track(what string, cgroup uint64, opts TrackOptions, enter func(Handle) error) (Handle, error) {
	if opts.Phase >= Phases {
		return Handle{}, fmt.Errorf("%s: phase %d: give one below %d", what, opts.Phase, Phases)
	}
	start := uint32(0)
	if opts.Start != nil {
		if *opts.Start >= Phases {
			return Handle{}, fmt.Errorf("%s: start in phase %d: give one below %d", what, *opts.Start, Phases)
		}
		start = 1 + uint32(*opts.Start)
	}
	threshold, base := thresholdOpen, int32(0)
	switch opts.Gate {
	case GateFilter:
		if opts.BaseFilters < 0 || opts.BaseFilters >= math.MaxInt32 {
			return Handle{}, fmt.Errorf("%s: base of %d filters: give the count in /proc/PID/status", what, opts.BaseFilters)
		}
		threshold, base = int32(opts.BaseFilters), int32(opts.BaseFilters)
	case GateExec:
		threshold = thresholdShut
	case GateOpen:
	default:
		return Handle{}, fmt.Errorf("%s: unknown gate %d", what, opts.Gate)
	}
	release, err := r.acquire()
	if err != nil {
		return Handle{}, err
	}
	defer release()
	if cgroup != 0 {
		if err := r.evictStale(cgroup); err != nil {
			return Handle{}, fmt.Errorf("%s: %w", what, err)
		}
	}
	index := -1
	for i := range r.slots {
		if r.slots[i].State == uint32(syslatchSlotStateSLOT_FREE) {
			index = i
			break
		}
	}
	if index < 0 {
		return Handle{}, fmt.Errorf("%s: %w: all %d slots are taken, release finished instances", what, ErrFull, len(r.slots))
	}
	now, err := bootTime()
	if err != nil {
		return Handle{}, err
	}
	if err := r.records.Put(uint32(index), make([]byte, recordSize)); err != nil {
		return Handle{}, fmt.Errorf("clear record %d: %w", index, err)
	}
	s := &r.slots[index]
	generation := s.Generation + 1
	if generation == 0 { // 0 is what Live says when nothing is
		generation = 1
	}
	*s = syslatchSlot{
		State:       uint32(syslatchSlotStateSLOT_SETUP),
		Generation:  generation,
		Threshold:   threshold,
		BaseFilters: base,
		Phase:       uint32(opts.Phase),
		Start:       start,
		StartNs:     uint64(now),
		RootCgroup:  cgroup,
		Gate:        uint32(opts.Gate),
		Tag:         opts.Tag,
	}
	h := Handle{Slot: uint32(index), Generation: generation}
	if err := r.begin(h, enter); err != nil {
		atomic.StoreUint32(&s.State, uint32(syslatchSlotStateSLOT_FREE))
		return Handle{}, errors.Join(fmt.Errorf("%s: %w", what, err), r.detachIfIdle())
	}
	return h, nil
}

func (r *Recorder) begin(h Handle, enter func(Handle) error) error {
	if err := r.attach(); err != nil {
		return err
	}
	if err := enter(h); err != nil {
		return err
	}
	s := &r.slots[h.Slot]
	// State last: a slot that is active without being live would look recorded.
	atomic.StoreUint32(&s.Live, h.Generation)
	atomic.StoreUint32(&s.State, uint32(syslatchSlotStateSLOT_ACTIVE))
	return nil
}

// enter puts a cgroup into the map. The lock is held.
func (r *Recorder) enter(h Handle, cgroup uint64) error {
	err := r.tracked.Update(cgroup, syslatchTracked{Cgroup: cgroup, Slot: h.Slot, Generation: h.Generation}, ebpf.UpdateNoExist)
	switch {
	case errors.Is(err, ebpf.ErrKeyExist):
		return ErrTracked
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("%w: it has room for %d cgroups, nested ones included", ErrFull, r.tracked.MaxEntries())
	case err != nil:
		return fmt.Errorf("enter cgroup %d: %w", cgroup, err)
	}
	atomic.AddUint32(&r.slots[h.Slot].Cgroups, 1)
	return nil
}

// evictStale removes a cgroup's entry if its instance is no longer recorded.
// That happens where Finish was killed, or has yet to remove it.
func (r *Recorder) evictStale(cgroup uint64) error {
	var t syslatchTracked
	err := r.tracked.Lookup(cgroup, &t)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if s := &r.slots[t.Slot]; s.Generation == t.Generation && s.State == uint32(syslatchSlotStateSLOT_ACTIVE) {
		return ErrTracked
	}
	if err := r.tracked.Delete(cgroup); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// slot returns a handle's slot. The lock is held.
func (r *Recorder) slot(h Handle) (*syslatchSlot, error) {
	if int(h.Slot) < len(r.slots) {
		s := &r.slots[h.Slot]
		switch s.State {
		case uint32(syslatchSlotStateSLOT_ACTIVE), uint32(syslatchSlotStateSLOT_FINISHED):
			if s.Generation == h.Generation {
				return s, nil
			}
		}
	}
	return nil, fmt.Errorf("%s: %w", h, ErrUnknown)
}

func (r *Recorder) activeSlot(h Handle) (*syslatchSlot, error) {
	s, err := r.slot(h)
	if err != nil {
		return nil, err
	}
	if s.State != uint32(syslatchSlotStateSLOT_ACTIVE) {
		return nil, fmt.Errorf("%s: %w", h, ErrFinished)
	}
	return s, nil
}

// AddCgroup lets a cgroup that existed before belong to the instance. To attach
// to a tree late, Track its root first, then add every directory below, parents
// before children: what is made meanwhile joins by itself, and AddCgroup
// returns ErrTracked for it, which is no harm. If there is no room it returns
// ErrFull.
func (r *Recorder) AddCgroup(h Handle, cgroup uint64) error {
	release, err := r.acquire()
	if err != nil {
		return err
	}
	defer release()
	if _, err := r.activeSlot(h); err != nil {
		return err
	}
	if err := r.evictStale(cgroup); err != nil {
		return fmt.Errorf("add cgroup %d: %w", cgroup, err)
	}
	if err := r.enter(h, cgroup); err != nil {
		return fmt.Errorf("add cgroup %d: %w", cgroup, err)
	}
	return nil
}

// SetPhase makes later calls count for another phase; during the start, those
// behind it. A call that is being entered on another processor while SetPhase runs
// may still count for the old one.
func (r *Recorder) SetPhase(h Handle, phase uint8) error {
	if phase >= Phases {
		return fmt.Errorf("%s: phase %d: give one below %d", h, phase, Phases)
	}
	release, err := r.acquire()
	if err != nil {
		return err
	}
	defer release()
	s, err := r.activeSlot(h)
	if err != nil {
		return err
	}
	atomic.StoreUint32(&s.Phase, uint32(phase))
	return nil
}

// Finish ends an instance's recording and returns all of it: when Finish
// returns, no program writes to it any more. The instance keeps its slot until
// Release, so that a caller that is killed before the snapshot is safe finds it
// again; Finish may be repeated. With the last instance the programs are taken
// off.
//
// The writes, in order: the slot is no longer live; it is finished; its cgroups
// are removed; the links' pins are removed. Whichever of these a crash leaves
// out the next Open, or Finish, makes up for.
func (r *Recorder) Finish(h Handle) (*Snapshot, error) {
	if err := r.stop(h); err != nil {
		return nil, err
	}
	// Outside of the lock: a grace period takes tens of milliseconds.
	if err := waitForPrograms(); err != nil {
		return nil, err
	}
	release, err := r.acquire()
	if err != nil {
		return nil, err
	}
	defer release()
	s, err := r.slot(h)
	if err != nil {
		return nil, err
	}
	if err := r.forget(func(t syslatchTracked) bool { return t.Slot == h.Slot && t.Generation == h.Generation }); err != nil {
		return nil, fmt.Errorf("%s: %w", h, err)
	}
	atomic.StoreUint32(&s.Cgroups, 0)
	if err := r.forgetNames(func(t syslatchTracked) bool { return t.Slot == h.Slot && t.Generation == h.Generation }); err != nil {
		return nil, fmt.Errorf("%s: %w", h, err)
	}
	if err := r.detachIfIdle(); err != nil {
		return nil, err
	}
	return r.snapshot(h, s)
}

func (r *Recorder) stop(h Handle) error {
	release, err := r.acquire()
	if err != nil {
		return err
	}
	defer release()
	s, err := r.slot(h)
	if err != nil {
		return err
	}
	atomic.StoreUint32(&s.Live, 0)
	atomic.StoreUint32(&s.State, uint32(syslatchSlotStateSLOT_FINISHED))
	return nil
}

// Release gives a finished instance's slot back. Its record is gone.
func (r *Recorder) Release(h Handle) error {
	release, err := r.acquire()
	if err != nil {
		return err
	}
	defer release()
	s, err := r.slot(h)
	if err != nil {
		return err
	}
	if s.State != uint32(syslatchSlotStateSLOT_FINISHED) {
		return fmt.Errorf("%s: release: finish it first", h)
	}
	atomic.StoreUint32(&s.State, uint32(syslatchSlotStateSLOT_FREE))
	return nil
}

// Untrack is Finish and Release: for callers that don't mind losing the
// recording should they be killed before they have stored it.
func (r *Recorder) Untrack(h Handle) (*Snapshot, error) {
	s, err := r.Finish(h)
	if err != nil {
		return nil, err
	}
	return s, r.Release(h)
}

// Instances lists all that are tracked or finished, by slot. A daemon that
// starts finds here what goes on.
func (r *Recorder) Instances() ([]Instance, error) {
	release, err := r.acquire()
	if err != nil {
		return nil, err
	}
	defer release()
	boot, err := bootTime()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	var all []Instance
	for i := range r.slots {
		switch s := &r.slots[i]; s.State {
		case uint32(syslatchSlotStateSLOT_ACTIVE), uint32(syslatchSlotStateSLOT_FINISHED):
			all = append(all, s.instance(uint32(i), now.Add(time.Duration(s.StartNs)-boot)))
		}
	}
	return all, nil
}

func (s *syslatchSlot) instance(index uint32, started time.Time) Instance {
	return Instance{
		Handle:      Handle{Slot: index, Generation: s.Generation},
		RootCgroup:  atomic.LoadUint64(&s.RootCgroup),
		Gate:        Gate(s.Gate),
		BaseFilters: int(s.BaseFilters),
		Phase:       uint8(atomic.LoadUint32(&s.Phase)),
		Starting:    atomic.LoadUint32(&s.Start) != 0,
		Tag:         s.Tag,
		Started:     started,
		Cgroups:     int(atomic.LoadUint32(&s.Cgroups)),
		Finished:    s.State == uint32(syslatchSlotStateSLOT_FINISHED),
	}
}

// forget removes the cgroups that match.
func (r *Recorder) forget(match func(syslatchTracked) bool) error {
	var gone []uint64
	if err := r.eachCgroup(func(t syslatchTracked) {
		if match(t) {
			gone = append(gone, t.Cgroup)
		}
	}); err != nil {
		return err
	}
	for _, id := range gone {
		if err := r.tracked.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove cgroup %d: %w", id, err)
		}
	}
	return nil
}

// forgetNames removes the awaited names that match.
func (r *Recorder) forgetNames(match func(syslatchTracked) bool) error {
	var gone []syslatchCgroupName
	var name syslatchCgroupName
	var t syslatchTracked
	all := r.awaited.Iterate()
	for all.Next(&name, &t) {
		if match(t) {
			gone = append(gone, name)
		}
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("list awaited cgroups: %w", err)
	}
	for _, n := range gone {
		if err := r.awaited.Delete(n); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove an awaited cgroup: %w", err)
		}
	}
	return nil
}

func (r *Recorder) eachCgroup(visit func(syslatchTracked)) error {
	const chunk = 512
	var cursor ebpf.MapBatchCursor
	keys, values := make([]uint64, chunk), make([]syslatchTracked, chunk)
	for {
		n, err := r.tracked.BatchLookup(&cursor, keys, values, nil)
		for _, t := range values[:n] {
			visit(t)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // the end
		}
		if err != nil {
			return fmt.Errorf("list cgroups: %w", err)
		}
	}
}

// waitForPrograms returns when every program that ran when it was called has
// ended. The kernel promises that of updating a map of maps
// (maybe_wait_bpf_programs), on kernels where membarrier(2) doesn't.
func waitForPrograms() error {
	inner := &ebpf.MapSpec{Name: "syslatch_inner", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	in, err := ebpf.NewMap(inner)
	if err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	defer in.Close()
	out, err := ebpf.NewMap(&ebpf.MapSpec{Name: "syslatch_wait", Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: inner})
	if err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	defer out.Close()
	if err := out.Put(uint32(0), in); err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	return nil
}
