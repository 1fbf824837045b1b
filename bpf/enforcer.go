// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Defaults of EnforcerOptions, beside DefaultInstances and DefaultCgroups.
const (
	DefaultTrees        = 65536
	DefaultDestinations = 65536
)

// EnforcerOptions are for the process that makes the maps; one that finds them pinned
// takes them as they are.
type EnforcerOptions struct {
	Instances    int // at most; 0: DefaultInstances
	Cgroups      int // at most, of all instances; 0: DefaultCgroups
	Trees        int // at most, of all instances' phases; 0: DefaultTrees
	Destinations int // prefixes at most, of all instances' phases; 0: DefaultDestinations
	// NoPin keeps all objects in this process, and ends enforcement with it. No
	// directory is used.
	NoPin bool
}

func (o *EnforcerOptions) complete() error {
	for _, v := range []struct {
		name  string
		value *int
		def   int
	}{
		{"Instances", &o.Instances, DefaultInstances},
		{"Cgroups", &o.Cgroups, DefaultCgroups},
		{"Trees", &o.Trees, DefaultTrees},
		{"Destinations", &o.Destinations, DefaultDestinations},
	} {
		if *v.value == 0 {
			*v.value = v.def
		}
		if *v.value < 0 || *v.value > 1<<24 {
			return fmt.Errorf("bpf: option %s is %d: give a number from 1 to %d", v.name, *v.value, 1<<24)
		}
	}
	return nil
}

// attachKind is how a program is attached.
type attachKind int

const (
	attachTracing attachKind = iota // with any instance
	attachLSM                       // with the first instance that needs it
	attachCgroup                    // to the cgroup of an instance that needs it
)

// phaseProgram is one program of the object.
type phaseProgram struct {
	name    string
	section string // as in Missing
	kind    attachKind
	hook    int // a phasesPhaseHook, or -1
	at      ebpf.AttachType
}

func lsmProgram(name, hook string, h phasesPhaseHook) phaseProgram {
	return phaseProgram{name, "lsm/" + hook, attachLSM, int(h), ebpf.AttachLSMMac}
}

// phasePrograms are all, in the order in which they are attached.
var phasePrograms = []phaseProgram{
	{phasesProgSyslatchPmkdir, "tp_btf/cgroup_mkdir", attachTracing, -1, ebpf.AttachTraceRawTp},
	{phasesProgSyslatchPrmdir, "tp_btf/cgroup_release", attachTracing, -1, ebpf.AttachTraceRawTp},
	{phasesProgSyslatchPattach, "tp_btf/cgroup_attach_task", attachTracing, -1, ebpf.AttachTraceRawTp},
	{phasesProgSyslatchPfork, "tp_btf/sched_process_fork", attachTracing, -1, ebpf.AttachTraceRawTp},
	{phasesProgSyslatchPexec, "tp_btf/sched_process_exec", attachTracing, -1, ebpf.AttachTraceRawTp},
	lsmProgram(phasesProgSyslatchOpen, "file_open", phasesPhaseHookHOOK_FILE_OPEN),
	lsmProgram(phasesProgSyslatchCreate, "inode_create", phasesPhaseHookHOOK_INODE_CREATE),
	lsmProgram(phasesProgSyslatchFperm, "file_permission", phasesPhaseHookHOOK_FILE_PERMISSION),
	lsmProgram(phasesProgSyslatchMmap, "mmap_file", phasesPhaseHookHOOK_MMAP_FILE),
	lsmProgram(phasesProgSyslatchMprot, "file_mprotect", phasesPhaseHookHOOK_FILE_MPROTECT),
	lsmProgram(phasesProgSyslatchPtrunc, "path_truncate", phasesPhaseHookHOOK_PATH_TRUNCATE),
	lsmProgram(phasesProgSyslatchFtrunc, "file_truncate", phasesPhaseHookHOOK_FILE_TRUNCATE),
	lsmProgram(phasesProgSyslatchBprm, "bprm_check_security", phasesPhaseHookHOOK_BPRM_CHECK),
	lsmProgram(phasesProgSyslatchSocket, "socket_create", phasesPhaseHookHOOK_SOCKET_CREATE),
	lsmProgram(phasesProgSyslatchConn, "socket_connect", phasesPhaseHookHOOK_SOCKET_CONNECT),
	lsmProgram(phasesProgSyslatchBind, "socket_bind", phasesPhaseHookHOOK_SOCKET_BIND),
	lsmProgram(phasesProgSyslatchListen, "socket_listen", phasesPhaseHookHOOK_SOCKET_LISTEN),
	lsmProgram(phasesProgSyslatchAccept, "socket_accept", phasesPhaseHookHOOK_SOCKET_ACCEPT),
	lsmProgram(phasesProgSyslatchSend, "socket_sendmsg", phasesPhaseHookHOOK_SOCKET_SENDMSG),
	lsmProgram(phasesProgSyslatchRecv, "socket_recvmsg", phasesPhaseHookHOOK_SOCKET_RECVMSG),
	{phasesProgSyslatchConn4, "cgroup/connect4", attachCgroup, int(phasesPhaseHookHOOK_CONNECT4), ebpf.AttachCGroupInet4Connect},
	{phasesProgSyslatchConn6, "cgroup/connect6", attachCgroup, int(phasesPhaseHookHOOK_CONNECT6), ebpf.AttachCGroupInet6Connect},
	{phasesProgSyslatchSend4, "cgroup/sendmsg4", attachCgroup, int(phasesPhaseHookHOOK_SENDMSG4), ebpf.AttachCGroupUDP4Sendmsg},
	{phasesProgSyslatchSend6, "cgroup/sendmsg6", attachCgroup, int(phasesPhaseHookHOOK_SENDMSG6), ebpf.AttachCGroupUDP6Sendmsg},
}

// phaseMaps lists those that are pinned, by their names, with the sizes of their
// values and what bpftool shows them as.
var phaseMaps = map[string]struct {
	shown string
	typ   ebpf.MapType
	value int
}{
	phasesMapPhaseCgroups: {"syslatch_pcgrp", ebpf.Hash, int(unsafe.Sizeof(phasesPhaseCgroup{}))},
	phasesMapPhaseSlots:   {"syslatch_pslots", ebpf.Array, phaseSlotSize},
	phasesMapPhaseDenials: {"syslatch_denied", ebpf.Array, int(unsafe.Sizeof(phasesPhaseCounts{}))},
	phasesMapPhaseTrees:   {"syslatch_trees", ebpf.LPMTrie, 4},
	phasesMapPhaseDests:   {"syslatch_dests", ebpf.LPMTrie, int(unsafe.Sizeof(phasesDestinationPorts{}))},
	phasesMapPhaseBuffers: {"syslatch_paths", ebpf.Array, int(unsafe.Sizeof(phasesPathBuffer{}))},
	phasesMapPhaseEntries: {"syslatch_enter", ebpf.TaskStorage, int(unsafe.Sizeof(phasesPhaseEntry{}))},
	phasesMapPhaseErrors:  {"syslatch_perror", ebpf.Array, 8},
}

const phaseSlotSize = int(unsafe.Sizeof(phasesPhaseSlot{}))

var phaseLayoutDir = fmt.Sprintf("layout-%d", phasesPhaseLayoutPHASE_LAYOUT)

// buffersPerCPU is PHASE_BUFFERS.
const buffersPerCPU = 4

// Enforcer is the way to the programs that say no by phase, and their maps. Its
// methods may be called concurrently.
type Enforcer struct {
	dir  string   // with the layout's directory; "" if NoPin
	lock *dirLock // nil if NoPin

	// mu serialises changes of slots and links within the process, as lock does
	// between processes. It is held wherever lock is; Set holds it for reading.
	mu     sync.RWMutex
	closed bool                 // owned by mu
	links  map[string]link.Link // owned by mu; NoPin only, by pin name

	maps    map[string]*ebpf.Map
	progs   map[string]*ebpf.Program // by section
	missing map[string]error         // by section
	slots   []phasesPhaseSlot        // the kernel's memory; Now by atomics only
	memory  []byte                   // slots, as mapped
}

// OpenEnforcer opens the enforcer whose pins are in dir, and makes it if there is
// none. The directory is made too; its parent must be on a bpffs, and the recorder's
// can't be it. What a process that was killed left half done is undone.
//
// Each program is loaded by itself: those that this kernel, or the process's
// privileges, don't allow are in Missing. Without those that follow cgroups there is
// no enforcer, and the error wraps ErrUnsupported; ErrLayout if dir holds pins of
// another version.
func OpenEnforcer(dir string, opts EnforcerOptions) (*Enforcer, error) {
	if err := opts.complete(); err != nil {
		return nil, err
	}
	if err := rlimit.RemoveMemlock(); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, err // see Open
	}
	e := &Enforcer{
		links: map[string]link.Link{}, maps: map[string]*ebpf.Map{},
		progs: map[string]*ebpf.Program{}, missing: map[string]error{},
	}
	if !opts.NoPin {
		if err := onBPFFS(dir); err != nil {
			return nil, err
		}
		lock, err := lockDir(dir)
		if err != nil {
			return nil, err
		}
		defer lock.unlock()
		e.dir, e.lock = filepath.Join(dir, phaseLayoutDir), lock
	}
	if err := e.open(dir, opts); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

func (e *Enforcer) open(dir string, opts EnforcerOptions) error {
	if e.dir != "" {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if strings.HasPrefix(entry.Name(), "layout-") && entry.Name() != phaseLayoutDir {
				return fmt.Errorf("%w: %s is of another layout than this program's %s: end whatever uses it, then remove it with rm -r %s (its instances are enforced no more)",
					ErrLayout, filepath.Join(dir, entry.Name()), phaseLayoutDir, dir)
			}
		}
	}
	if err := e.openMaps(dir, opts); err != nil {
		return err
	}
	if err := e.openPrograms(); err != nil {
		return err
	}
	page := os.Getpagesize()
	n := (int(e.maps[phasesMapPhaseSlots].MaxEntries())*phaseSlotSize + page - 1) / page * page
	var err error
	if e.memory, err = unix.Mmap(e.maps[phasesMapPhaseSlots].FD(), 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map slots into memory: %w", err)
	}
	e.slots = unsafe.Slice((*phasesPhaseSlot)(unsafe.Pointer(&e.memory[0])), e.maps[phasesMapPhaseSlots].MaxEntries())
	if e.dir == "" {
		return nil
	}
	return e.reconcile()
}

// openMaps finds the pinned maps, or makes them. The order of system calls is: make
// all; mkdir of a temporary directory; pin each; rename to the layout's name. See
// create.
func (e *Enforcer) openMaps(dir string, opts EnforcerOptions) error {
	_, err := os.Stat(e.dir)
	if e.dir != "" && err == nil {
		for name := range phaseMaps {
			if e.maps[name], err = ebpf.LoadPinnedMap(filepath.Join(e.dir, name), nil); err != nil {
				return fmt.Errorf("open map %s: %w", name, err)
			}
		}
		return e.checkMaps()
	}
	if e.dir != "" && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	spec, err := loadPhases()
	if err != nil {
		return err
	}
	for name, entries := range map[string]int{
		phasesMapPhaseCgroups: opts.Cgroups,
		phasesMapPhaseSlots:   opts.Instances,
		phasesMapPhaseDenials: opts.Instances,
		phasesMapPhaseTrees:   opts.Trees,
		phasesMapPhaseDests:   opts.Destinations,
		phasesMapPhaseBuffers: ebpf.MustPossibleCPU() * buffersPerCPU,
	} {
		spec.Maps[name].MaxEntries = uint32(entries)
	}
	for name, m := range phaseMaps {
		s := spec.Maps[name]
		s.Name = m.shown
		if e.maps[name], err = ebpf.NewMap(s); err != nil {
			return fmt.Errorf("make map %s: %w", name, explain(err))
		}
	}
	if err := e.checkMaps(); err != nil || e.dir == "" {
		return err
	}
	tmp := filepath.Join(dir, "new")
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	for _, d := range []string{tmp, filepath.Join(tmp, "links")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	for name := range phaseMaps {
		if err := e.maps[name].Pin(filepath.Join(tmp, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	if err := os.Rename(tmp, e.dir); err != nil {
		return err
	}
	return nil
}

// checkMaps holds the maps to this program's types. The layout's number should make
// a difference impossible.
func (e *Enforcer) checkMaps() error {
	for name, want := range phaseMaps {
		m := e.maps[name]
		if m.Type() != want.typ || int(m.ValueSize()) != want.value {
			return fmt.Errorf("%w: map %s is a %s of %d bytes, want %s of %d", ErrLayout, name, m.Type(), m.ValueSize(), want.typ, want.value)
		}
	}
	if a, b := e.maps[phasesMapPhaseSlots].MaxEntries(), e.maps[phasesMapPhaseDenials].MaxEntries(); a != b {
		return fmt.Errorf("%w: %d slots, but counts for %d", ErrLayout, a, b)
	}
	return nil
}

// openPrograms finds the pinned programs, and loads those that aren't. What is missing
// is tried at each open: whoever made the pins may have been allowed less.
func (e *Enforcer) openPrograms() error {
	var spec *ebpf.CollectionSpec
	types := btf.NewCache() // reading the kernel's takes 20 ms
	for _, p := range phasePrograms {
		pin := filepath.Join(e.dir, p.name)
		if e.dir != "" {
			switch prog, err := ebpf.LoadPinnedProgram(pin, nil); {
			case err == nil:
				e.progs[p.section] = prog
				continue
			case !errors.Is(err, fs.ErrNotExist):
				return fmt.Errorf("open program %s: %w", p.section, err)
			}
		}
		if spec == nil {
			var err error
			if spec, err = loadPhases(); err != nil {
				return err
			}
		}
		prog, err := e.loadOne(spec, p, types)
		if err != nil {
			if p.kind == attachTracing {
				return fmt.Errorf("load %s: %w", p.section, explain(err))
			}
			e.missing[p.section] = explainHook(p, err)
			continue
		}
		e.progs[p.section] = prog
		if e.dir != "" {
			if err := prog.Pin(pin); err != nil {
				return fmt.Errorf("pin program %s: %w", p.section, err)
			}
		}
	}
	return nil
}

func (e *Enforcer) loadOne(spec *ebpf.CollectionSpec, p phaseProgram, types *btf.Cache) (*ebpf.Program, error) {
	one := spec.Copy()
	one.Programs = map[string]*ebpf.ProgramSpec{p.name: one.Programs[p.name]}
	for name := range phaseMaps {
		// As the maps that replace them are.
		one.Maps[name].MaxEntries = e.maps[name].MaxEntries()
	}
	coll, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{Cache: types, MapReplacements: e.maps})
	if err != nil {
		return nil, err
	}
	defer coll.Close()
	return coll.DetachProgram(p.name), nil
}

// explainHook says why a kernel doesn't take a program that others take.
func explainHook(p phaseProgram, err error) error {
	switch {
	case p.kind == attachLSM && errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w: this kernel has no such hook: %w", ErrUnsupported, err)
	case p.kind == attachLSM && errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: this kernel, or this process's privileges, don't allow BPF LSM: %w", ErrUnsupported, unix.EPERM)
	case p.kind == attachCgroup && errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: CAP_NET_ADMIN is needed beside CAP_BPF: %w", ErrUnsupported, unix.EPERM)
	}
	return explain(err)
}

// Close closes this process's handles. Pins stay, and with them what is enforced;
// without pins it ends.
func (e *Enforcer) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil
	}
	e.closed = true
	var errs []error
	for _, l := range e.links {
		errs = append(errs, l.Close())
	}
	for _, p := range e.progs {
		errs = append(errs, p.Close())
	}
	if e.memory != nil {
		e.slots = nil
		errs = append(errs, unix.Munmap(e.memory))
	}
	for _, m := range e.maps {
		errs = append(errs, m.Close())
	}
	if e.lock != nil {
		errs = append(errs, e.lock.close())
	}
	return errors.Join(errs...)
}

// Missing is the programs that this kernel, or the privileges of whoever opened the
// enforcer, don't allow, and why; by section name, such as "lsm/file_open" and
// "cgroup/connect4". Before 6.2 lsm/file_truncate is no loss: lsm/path_truncate sees
// what it would.
func (e *Enforcer) Missing() map[string]error {
	out := make(map[string]error, len(e.missing))
	for name, err := range e.missing {
		out[name] = err
	}
	return out
}

// hooks is where there are programs, of those kinds.
func (e *Enforcer) hooks(kinds ...attachKind) hooks {
	var out hooks
	for _, p := range phasePrograms {
		if p.hook >= 0 && e.progs[p.section] != nil && slices.Contains(kinds, p.kind) {
			out |= 1 << p.hook
		}
	}
	return out
}

// acquire takes the locks that changes of slots and links need.
func (e *Enforcer) acquire() (release func(), err error) {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil, fmt.Errorf("enforcer: %w", os.ErrClosed)
	}
	if e.lock == nil {
		return e.mu.Unlock, nil
	}
	if err := e.lock.lock(); err != nil {
		e.mu.Unlock()
		return nil, err
	}
	release = func() {
		e.lock.unlock()
		e.mu.Unlock()
	}
	// See Recorder.acquire.
	if _, err := os.Stat(e.dir); err != nil {
		release()
		return nil, fmt.Errorf("pins are gone (syslatchd, or what else has opened them, makes new ones when it is restarted): %w", err)
	}
	return release, nil
}

// attach attaches a program, in dir to a cgroup's directory. The lock is held.
func (e *Enforcer) attach(p phaseProgram, name string, dir *os.File) error {
	pin := filepath.Join(e.dir, "links", name)
	if e.dir == "" {
		if e.links[name] != nil {
			return nil
		}
	} else if _, err := os.Stat(pin); err == nil {
		return nil
	}
	var l link.Link
	var err error
	switch p.kind {
	case attachTracing:
		l, err = link.AttachTracing(link.TracingOptions{Program: e.progs[p.section]})
	case attachLSM:
		l, err = link.AttachLSM(link.LSMOptions{Program: e.progs[p.section]})
	case attachCgroup:
		l, err = link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: e.progs[p.section], Attach: p.at})
		runtime.KeepAlive(dir)
	}
	if err != nil {
		return fmt.Errorf("attach %s: %w", p.section, explain(err))
	}
	if e.dir == "" {
		e.links[name] = l
		return nil
	}
	// A crash before the pin closes the link with the process.
	if err := l.Pin(pin); err != nil {
		return errors.Join(fmt.Errorf("attach %s: %w", p.section, err), l.Close())
	}
	return l.Close()
}

// detach takes a program off; it is no error if it isn't attached.
func (e *Enforcer) detach(name string) error {
	if e.dir == "" {
		l := e.links[name]
		if l == nil {
			return nil
		}
		delete(e.links, name)
		return l.Close()
	}
	if err := os.Remove(filepath.Join(e.dir, "links", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("detach %s: %w", name, err)
	}
	return nil
}

// ownLink is the name of a link to the cgroup of a slot.
func ownLink(p phaseProgram, slot int) string { return fmt.Sprintf("%s-%d", p.name, slot) }

// detachIdle takes the programs off that no instance needs: some are in the way of
// every read of the host's. The lock is held.
func (e *Enforcer) detachIdle() error {
	var needs hooks
	any := false
	var errs []error
	for i := range e.slots {
		if e.slots[i].State != uint32(phasesPhaseStatePHASE_FREE) {
			any, needs = true, needs|hooks(e.slots[i].Needs)
		}
	}
	for _, p := range slices.Backward(phasePrograms) {
		switch {
		case p.kind == attachCgroup, any && (p.hook < 0 || needs&(1<<p.hook) != 0):
			continue
		}
		errs = append(errs, e.detach(p.name))
	}
	if !any {
		// Nobody is left who could be looked for among ancestors.
		errs = append(errs, e.maps[phasesMapPhaseErrors].Put(uint32(phasesPhaseErrorPHASE_ERROR_CGROUP), uint64(0)))
	}
	return errors.Join(errs...)
}

// reconcile undoes what a killed process left half done. The lock is held.
func (e *Enforcer) reconcile() error {
	var errs []error
	for i := range e.slots {
		if e.slots[i].State == uint32(phasesPhaseStatePHASE_SETUP) {
			errs = append(errs, e.clear(i))
		}
	}
	return errors.Join(append(errs, e.purge(), e.detachIdle())...)
}

// RemoveEnforcer takes the programs off and removes every pin in dir, of whichever
// layout, and dir itself: nothing is enforced any more. It is no error if there is
// nothing.
func RemoveEnforcer(dir string) error { return Remove(dir) }
