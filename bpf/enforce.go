// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// PhaseHandle names an instance of an [Enforcer], in every process that uses its pins.
type PhaseHandle struct {
	Slot       uint32
	Generation uint32
}

func (h PhaseHandle) String() string {
	return fmt.Sprintf("enforced instance %d.%d", h.Slot, h.Generation)
}

// MissingError says that a set of phases needs programs that there aren't.
type MissingError struct {
	Programs []string // section names: "lsm/file_open"
}

func (e *MissingError) Error() string {
	return "these phases need programs that can't be had here: " + strings.Join(e.Programs, " ")
}

// Unwrap is ErrUnsupported.
func (e *MissingError) Unwrap() error { return ErrUnsupported }

// EnforceOptions are for one instance.
type EnforceOptions struct {
	// Phase is the one that is in force first.
	Phase uint8
	// Starting, if not nil, is a pidfd of the process that is to become the instance's
	// program. Nothing is denied to it, nor to what it forks, until it executes a
	// program under more than StartFilters seccomp filters.
	Starting     *os.File
	StartFilters uint32
	// Entered says the same of each process that somebody who is in no instance puts
	// into the cgroup later, and of the filters that it comes with: a container
	// runtime's, of an exec. It has to load a filter.
	Entered bool
	// Dir is the instance's cgroup, open, to which the programs that look at
	// addresses (cgroup/connect4 and its kin) are attached. They run for sockets that
	// are made in it and below. Without it there are none, and BPF LSM has to do.
	Dir *os.File
	// MountNS is the inode number of the mount namespace (/proc/PID/ns/mnt) in which
	// ReadTrees and WriteTrees are names, and without which none is opened. With 0 it
	// is that of Starting when it executes the program, or of whichever task: one that can
	// make namespaces gives names as it likes.
	MountNS uint32
	// Partial takes an instance whose set needs programs that are missing. What they
	// would deny passes.
	Partial bool
	// Tag is the caller's own mark of the instance, 0 for none. A caller that is
	// killed before it has written down the handle finds the instance by it.
	Tag uint64
}

// Add puts the tasks of a cgroup, and of its descendants, under phases. Descendants
// that are made later belong to it by themselves; name those that exist with
// [Enforcer.AddCgroup].
//
// Add returns ErrTracked if the cgroup belongs to an instance already, ErrEnforcerFull if
// there is no room for it, its trees or destinations, and a *[MissingError] if programs are
// missing that its set needs.
//
// The writes, in order: the slot is set up; trees and destinations; links' pins; the
// starting process's mark; the cgroup's entry; the phase, from which on it holds; the slot is active. What a crash
// leaves before the last is undone by the next OpenEnforcer.
func (e *Enforcer) Add(cgroup uint64, set PhaseSet, opts EnforceOptions) (PhaseHandle, error) {
	what := fmt.Sprintf("enforce cgroup %d", cgroup)
	if err := set.check(); err != nil {
		return PhaseHandle{}, fmt.Errorf("%s: %w", what, err)
	}
	if _, ok := set[opts.Phase]; !ok {
		return PhaseHandle{}, fmt.Errorf("%s: first phase %d is none of its phases", what, opts.Phase)
	}
	release, err := e.acquire()
	if err != nil {
		return PhaseHandle{}, err
	}
	defer release()
	kinds := []attachKind{attachLSM}
	if opts.Dir != nil {
		kinds = append(kinds, attachCgroup)
	}
	have := e.hooks(kinds...)
	if lacks := set.lacks(have); lacks != 0 && !opts.Partial {
		return PhaseHandle{}, fmt.Errorf("%s: %w", what, &MissingError{lacks.names()})
	}
	if err := e.evictStale(cgroup); err != nil {
		return PhaseHandle{}, fmt.Errorf("%s: %w", what, err)
	}
	index := slices.IndexFunc(e.slots, func(s phasesPhaseSlot) bool { return s.State == uint32(phasesPhaseStatePHASE_FREE) })
	if index < 0 {
		return PhaseHandle{}, fmt.Errorf("%s: %w: all %d slots are taken, remove instances that have ended", what, ErrEnforcerFull, len(e.slots))
	}
	s := &e.slots[index]
	h := PhaseHandle{uint32(index), s.Generation + 1}
	if h.Generation == 0 { // 0 is what Now says when nothing is in force
		h.Generation = 1
	}
	next := phasesPhaseSlot{
		Cgroup: cgroup, Tag: opts.Tag, Generation: h.Generation, MountNs: opts.MountNS,
		State: uint32(phasesPhaseStatePHASE_SETUP), Needs: uint32(set.needs() & have),
	}
	if opts.Entered {
		next.Entered = 1
	}
	for n, r := range set {
		next.Known |= 1 << n
		next.Rules[n] = r.raw()
	}
	*s = next
	if err := e.begin(h, set, opts); err != nil {
		return PhaseHandle{}, errors.Join(fmt.Errorf("%s: %w", what, err), e.clear(index), e.detachIdle())
	}
	return h, nil
}

func (e *Enforcer) begin(h PhaseHandle, set PhaseSet, opts EnforceOptions) error {
	if err := e.maps[phasesMapPhaseDenials].Put(h.Slot, phasesPhaseCounts{}); err != nil {
		return fmt.Errorf("clear counts %d: %w", h.Slot, err)
	}
	if err := e.writeRules(h, set); err != nil {
		return err
	}
	s := &e.slots[h.Slot]
	for _, p := range phasePrograms {
		if p.hook >= 0 && s.Needs&(1<<p.hook) == 0 {
			continue
		}
		name := p.name
		if p.kind == attachCgroup {
			name = ownLink(p, int(h.Slot))
		}
		if err := e.attach(p, name, opts.Dir); err != nil {
			return err
		}
	}
	if opts.Starting != nil {
		entry := phasesPhaseEntry{Filters: opts.StartFilters, Starts: 1}
		if err := e.maps[phasesMapPhaseEntries].Put(uint32(opts.Starting.Fd()), entry); err != nil {
			return fmt.Errorf("mark the process that starts: %w", err)
		}
	}
	if err := e.enter(h, s.Cgroup); err != nil {
		return err
	}
	atomic.StoreUint64(&s.Now, uint64(opts.Phase)<<32|uint64(h.Generation))
	// State last: a slot that is active without being live would look enforced.
	atomic.StoreUint32(&s.State, uint32(phasesPhaseStatePHASE_ACTIVE))
	return nil
}

// writeRules writes what is too large for a slot.
func (e *Enforcer) writeRules(h PhaseHandle, set PhaseSet) error {
	for n, r := range set {
		for _, key := range r.trees(h, n) {
			if err := e.maps[phasesMapPhaseTrees].Put(key, uint32(1)); err != nil {
				return full(err, "trees", e.maps[phasesMapPhaseTrees])
			}
		}
		all, err := r.destinations(h, n)
		if err != nil {
			return err
		}
		for key, ports := range all {
			if err := e.maps[phasesMapPhaseDests].Put(key, ports); err != nil {
				return full(err, "destinations", e.maps[phasesMapPhaseDests])
			}
		}
	}
	return nil
}

func full(err error, what string, m *ebpf.Map) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("%w: it has room for %d %s, of all instances", ErrEnforcerFull, m.MaxEntries(), what)
	}
	return fmt.Errorf("write %s: %w", what, err)
}

// enter puts a cgroup into the map. The lock is held.
func (e *Enforcer) enter(h PhaseHandle, cgroup uint64) error {
	value := phasesPhaseCgroup{Cgroup: cgroup, Slot: h.Slot, Generation: h.Generation}
	err := e.maps[phasesMapPhaseCgroups].Update(cgroup, value, ebpf.UpdateNoExist)
	if errors.Is(err, unix.E2BIG) {
		// What was made below an instance while it was removed may be there yet.
		if err := e.purge(); err != nil {
			return err
		}
		err = e.maps[phasesMapPhaseCgroups].Update(cgroup, value, ebpf.UpdateNoExist)
	}
	switch {
	case errors.Is(err, ebpf.ErrKeyExist):
		return ErrTracked
	case errors.Is(err, unix.E2BIG):
		return full(err, "cgroups, nested ones included", e.maps[phasesMapPhaseCgroups])
	case err != nil:
		return fmt.Errorf("enter cgroup %d: %w", cgroup, err)
	}
	return nil
}

// inForce says whether a slot is what an entry of a cgroup is of. The lock is held.
func (e *Enforcer) inForce(c phasesPhaseCgroup) bool {
	return int(c.Slot) < len(e.slots) && e.slots[c.Slot].Generation == c.Generation && e.slots[c.Slot].State != uint32(phasesPhaseStatePHASE_FREE)
}

// evictStale removes a cgroup's entry if its instance is there no more.
func (e *Enforcer) evictStale(cgroup uint64) error {
	var c phasesPhaseCgroup
	err := e.maps[phasesMapPhaseCgroups].Lookup(cgroup, &c)
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return nil
	case err != nil:
		return err
	case e.inForce(c):
		return ErrTracked
	}
	return e.forget(func(other phasesPhaseCgroup) bool { return other == c })
}

// purge removes the entries of instances that are there no more.
func (e *Enforcer) purge() error {
	return e.forget(func(c phasesPhaseCgroup) bool { return !e.inForce(c) })
}

// forget removes the cgroups that match.
func (e *Enforcer) forget(match func(phasesPhaseCgroup) bool) error {
	return dropKeys(e.maps[phasesMapPhaseCgroups], func(_ uint64, c phasesPhaseCgroup) bool { return match(c) })
}

// dropKeys removes the elements of a map that match. Whoever calls it is the only one
// to remove any, but for cgroups that end.
func dropKeys[K, V any](m *ebpf.Map, match func(K, V) bool) error {
	var gone []K
	var key K
	var value V
	all := m.Iterate()
	for all.Next(&key, &value) {
		if match(key, value) {
			gone = append(gone, key)
		}
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("list %s: %w", m, err)
	}
	for _, k := range gone {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove from %s: %w", m, err)
		}
	}
	return nil
}

// slot returns a handle's slot. The lock is held.
func (e *Enforcer) slot(h PhaseHandle) (*phasesPhaseSlot, error) {
	if int(h.Slot) < len(e.slots) {
		if s := &e.slots[h.Slot]; s.State == uint32(phasesPhaseStatePHASE_ACTIVE) && s.Generation == h.Generation {
			return s, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", h, ErrUnknown)
}

// AddCgroup lets a cgroup that existed before belong to the instance: see
// [Recorder.AddCgroup].
func (e *Enforcer) AddCgroup(h PhaseHandle, cgroup uint64) error {
	release, err := e.acquire()
	if err != nil {
		return err
	}
	defer release()
	if _, err := e.slot(h); err != nil {
		return err
	}
	if err := e.evictStale(cgroup); err != nil {
		return fmt.Errorf("add cgroup %d: %w", cgroup, err)
	}
	if err := e.enter(h, cgroup); err != nil {
		return fmt.Errorf("add cgroup %d: %w", cgroup, err)
	}
	return nil
}

// Set changes the phase, by one write to memory that the programs read: what is asked
// after it returned is judged by the new phase. What a program was judging meanwhile,
// and a call that waits in the kernel past its hook, may be by the old one; see
// docs/phases.md for what a switch has to do beside.
func (e *Enforcer) Set(h PhaseHandle, phase uint8) error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.closed {
		return fmt.Errorf("enforcer: %w", os.ErrClosed)
	}
	if int(h.Slot) >= len(e.slots) || h.Generation == 0 {
		return fmt.Errorf("%s: %w", h, ErrUnknown)
	}
	s := &e.slots[h.Slot]
	for {
		now := atomic.LoadUint64(&s.Now)
		if uint32(now) != h.Generation {
			return fmt.Errorf("%s: %w", h, ErrUnknown)
		}
		if phase >= Phases || s.Known&(1<<phase) == 0 {
			return fmt.Errorf("%s: phase %d is none of its phases", h, phase)
		}
		// The generation is compared as well: another process may have removed the
		// instance and given its slot away.
		if atomic.CompareAndSwapUint64(&s.Now, now, uint64(phase)<<32|uint64(h.Generation)) {
			return nil
		}
	}
}

// Own lets every phase send to, and receive from, what is connected to a unix socket's
// listener that is bound to a file. Whether it may connect is the phase's business.
func (e *Enforcer) Own(h PhaseHandle, socket string) error {
	var st unix.Stat_t
	if err := unix.Lstat(socket, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: socket, Err: err}
	}
	release, err := e.acquire()
	if err != nil {
		return err
	}
	defer release()
	s, err := e.slot(h)
	if err != nil {
		return err
	}
	atomic.StoreUint64(&s.OwnIno, 0)
	atomic.StoreUint32(&s.OwnDev, unix.Major(st.Dev)<<20|unix.Minor(st.Dev)) // the kernel's form
	atomic.StoreUint64(&s.OwnIno, st.Ino)
	return nil
}

// Remove ends an instance: nothing is denied to its tasks any more.
func (e *Enforcer) Remove(h PhaseHandle) error {
	release, err := e.acquire()
	if err != nil {
		return err
	}
	defer release()
	if _, err := e.slot(h); err != nil {
		return err
	}
	return errors.Join(e.clear(int(h.Slot)), e.detachIdle())
}

// clear frees a slot and all that is of it. The writes, in order: its phase; links'
// pins; cgroups; trees and destinations; the slot. A crash before the last leaves a
// slot whose set-up didn't end. The lock is held.
func (e *Enforcer) clear(index int) error {
	s := &e.slots[index]
	atomic.StoreUint32(&s.State, uint32(phasesPhaseStatePHASE_SETUP))
	atomic.StoreUint64(&s.Now, 0)
	var errs []error
	for _, p := range phasePrograms {
		if p.kind == attachCgroup {
			errs = append(errs, e.detach(ownLink(p, index)))
		}
	}
	errs = append(errs, e.forget(func(c phasesPhaseCgroup) bool { return int(c.Slot) == index }))
	var limits uint32
	for _, r := range s.Rules {
		limits |= r.Limit
	}
	if limits&uint32(phasesPhaseLimitLIMIT_READ_TREES|phasesPhaseLimitLIMIT_WRITE_TREES) != 0 {
		errs = append(errs, dropKeys(e.maps[phasesMapPhaseTrees], func(k phasesTreeKey, _ uint32) bool { return int(k.Slot) == index }))
	}
	if limits&uint32(phasesPhaseLimitLIMIT_DESTINATIONS) != 0 {
		errs = append(errs, dropKeys(e.maps[phasesMapPhaseDests], func(k phasesDestinationKey, _ phasesDestinationPorts) bool { return int(k.Slot) == index }))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	*s = phasesPhaseSlot{Generation: s.Generation}
	return nil
}

// Enforced is an instance of an [Enforcer].
type Enforced struct {
	PhaseHandle
	Cgroup uint64
	Phase  uint8
	Phases []uint8 // that can be set
	Tag    uint64
	// Programs are those that look at it, by section name.
	Programs []string
}

// Instances lists all, by slot. A daemon that starts finds here what is enforced.
func (e *Enforcer) Instances() ([]Enforced, error) {
	release, err := e.acquire()
	if err != nil {
		return nil, err
	}
	defer release()
	var all []Enforced
	for i := range e.slots {
		s := &e.slots[i]
		if s.State != uint32(phasesPhaseStatePHASE_ACTIVE) {
			continue
		}
		one := Enforced{
			PhaseHandle: PhaseHandle{uint32(i), s.Generation}, Cgroup: s.Cgroup, Tag: s.Tag,
			Phase: uint8(atomic.LoadUint64(&s.Now) >> 32), Programs: hooks(s.Needs).names(),
		}
		for n := range uint8(Phases) {
			if s.Known&(1<<n) != 0 {
				one.Phases = append(one.Phases, n)
			}
		}
		all = append(all, one)
	}
	return all, nil
}

// Denial counts what one program denied to an instance in one phase.
type Denial struct {
	Phase   uint8
	Program string // section name: "lsm/file_open"
	Count   uint64 // since Add
}

// Denials lists what was denied to an instance, by phase. A call may be denied by more
// than one program, and is then counted by the first.
func (e *Enforcer) Denials(h PhaseHandle) ([]Denial, error) {
	release, err := e.acquire()
	if err != nil {
		return nil, err
	}
	defer release()
	if _, err := e.slot(h); err != nil {
		return nil, err
	}
	var counts phasesPhaseCounts
	if err := e.maps[phasesMapPhaseDenials].Lookup(h.Slot, unsafe.Slice((*byte)(unsafe.Pointer(&counts)), unsafe.Sizeof(counts))); err != nil {
		return nil, fmt.Errorf("read counts %d: %w", h.Slot, err)
	}
	var out []Denial
	for phase := range counts.Denied {
		for _, p := range phasePrograms {
			if p.hook >= 0 && counts.Denied[phase][p.hook] > 0 {
				out = append(out, Denial{uint8(phase), p.section, counts.Denied[phase][p.hook]})
			}
		}
	}
	return out, nil
}

// enforcerErrors names the places at which a program could not do its part.
var enforcerErrors = map[phasesPhaseError]string{
	phasesPhaseErrorPHASE_ERROR_SLOT:    "slot",
	phasesPhaseErrorPHASE_ERROR_PHASE:   "phase",
	phasesPhaseErrorPHASE_ERROR_BUFFER:  "buffer",
	phasesPhaseErrorPHASE_ERROR_PATH:    "path",
	phasesPhaseErrorPHASE_ERROR_ADDRESS: "address",
	phasesPhaseErrorPHASE_ERROR_CGROUP:  "cgroup",
	phasesPhaseErrorPHASE_ERROR_COUNT:   "count",
}

// Errors counts what failed in the programs, by place: "slot", "phase", "buffer",
// "path", "address" (each of which denied what was asked), "cgroup" (no room for a
// nested one: instances are looked for among ancestors, up to 32 levels deep, until
// the last is removed) and "count" (a denial that isn't among Denials).
func (e *Enforcer) Errors() (map[string]uint64, error) {
	release, err := e.acquire()
	if err != nil {
		return nil, err
	}
	defer release()
	out := map[string]uint64{}
	for place, name := range enforcerErrors {
		var n uint64
		if err := e.maps[phasesMapPhaseErrors].Lookup(uint32(place), &n); err != nil {
			return nil, fmt.Errorf("read errors: %w", err)
		}
		if n > 0 {
			out[name] = n
		}
	}
	return out, nil
}

// Memory is what the kernel's maps take, in bytes.
func (e *Enforcer) Memory() (uint64, error) {
	release, err := e.acquire()
	if err != nil {
		return 0, err
	}
	defer release()
	var sum uint64
	for name, m := range e.maps {
		info, err := m.Info()
		if err != nil {
			return 0, fmt.Errorf("map %s: %w", name, err)
		}
		n, _ := info.Memlock()
		sum += n
	}
	return sum, nil
}
