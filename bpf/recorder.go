// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Defaults of Options.
const (
	DefaultInstances = 1024
	DefaultCgroups   = 16384
	DefaultRingBytes = 256 << 10
)

// Options are for the process that makes the maps; one that finds them pinned
// takes them as they are.
type Options struct {
	Instances int // at most, tracked or finished; 0: DefaultInstances
	Cgroups   int // at most, of all instances; 0: DefaultCgroups
	RingBytes int // of the events' ring, a power of two, at least a page; 0: DefaultRingBytes
	// NoPin keeps all objects in this process, and ends recording with it. No
	// directory is used.
	NoPin bool
}

// programs lists what is attached, in order: the cgroups' coming and going is
// watched before calls are.
var programs = []string{
	syslatchProgSyslatchMkdir,
	syslatchProgSyslatchRmdir,
	syslatchProgSyslatchExec,
	syslatchProgSyslatchVsys,
	syslatchProgSyslatchEnter,
}

// optional is what a kernel may lack, with the tracepoint: built without
// CONFIG_X86_VSYSCALL_EMULATION there are no such calls to record.
var optional = map[string]string{syslatchProgSyslatchVsys: "emulate_vsyscall"}

const argRowsMap = ".rodata.args"

// maps lists those that are pinned, with their pins' names.
var maps = map[string]string{
	syslatchMapTrackedCgroups: "tracked_cgroups",
	syslatchMapAwaitedNames:   "awaited_names",
	syslatchMapSlots:          "slots",
	syslatchMapRecords:        "records",
	syslatchMapEvents:         "events",
	syslatchMapErrors:         "errors",
	argRowsMap:                "arg_rows",
}

const (
	slotSize   = int(unsafe.Sizeof(syslatchSlot{}))
	recordSize = int(unsafe.Sizeof(syslatchRecord{}))
)

// Converted as variables: bpf2go makes the enum unsigned.
var thresholdOpen, thresholdShut = func(a, b syslatchThreshold) (int32, int32) {
	return int32(a), int32(b)
}(syslatchThresholdTHRESHOLD_OPEN, syslatchThresholdTHRESHOLD_SHUT)

// layoutDir is the name of the directory that holds the pins of this layout.
var layoutDir = fmt.Sprintf("layout-%d", syslatchLayoutLAYOUT)

// Recorder is the way to the programs and their maps. Its methods may be
// called concurrently.
type Recorder struct {
	dir  string   // with the layout's directory; "" if NoPin
	lock *dirLock // nil if NoPin

	// mu serialises changes of slots and links within the process, as lock does
	// between processes. It is held wherever lock is.
	mu     sync.Mutex
	closed bool                     // owned by mu
	links  map[string]link.Link     // owned by mu; NoPin only
	progs  map[string]*ebpf.Program // NoPin only: else they are read from their pins

	tracked, awaited, slotMap, records, events, errors *ebpf.Map

	argRows [32]syslatchArgRow
	slots   []syslatchSlot // the kernel's memory; shared, so atomics only where live
	memory  []byte         // slots, as mapped
}

// Open opens the recorder whose pins are in dir, and makes it if there is none.
// The directory is made too; its parent must be on a bpffs. What a process that
// was killed left half done is finished or undone.
//
// Open wraps ErrUnsupported if the kernel or the process's privileges don't
// allow recording, and ErrLayout if dir holds pins of another version.
func Open(dir string, opts Options) (*Recorder, error) {
	if err := opts.complete(); err != nil {
		return nil, err
	}
	// Without the capability to raise it the limit doesn't apply either on the
	// kernels that the programs load on: they account by memory cgroup.
	if err := rlimit.RemoveMemlock(); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, err
	}
	if opts.NoPin {
		return openPrivate(opts)
	}
	return openPinned(dir, opts)
}

func (o *Options) complete() error {
	for _, v := range []struct {
		name  string
		value *int
		def   int
	}{
		{"Instances", &o.Instances, DefaultInstances},
		{"Cgroups", &o.Cgroups, DefaultCgroups},
		{"RingBytes", &o.RingBytes, DefaultRingBytes},
	} {
		if *v.value == 0 {
			*v.value = v.def
		}
		if *v.value < 0 || *v.value > 1<<30 {
			return fmt.Errorf("bpf: option %s is %d: give a number from 1 to %d", v.name, *v.value, 1<<30)
		}
	}
	if page := os.Getpagesize(); o.RingBytes < page || o.RingBytes&(o.RingBytes-1) != 0 {
		return fmt.Errorf("bpf: option RingBytes is %d: give a power of two of at least %d", o.RingBytes, page)
	}
	return nil
}

// load makes maps and programs. The caller closes the collection.
func load(opts Options) (*ebpf.Collection, error) {
	spec, err := loadSyslatch()
	if err != nil {
		return nil, err
	}
	spec.Maps[syslatchMapSlots].MaxEntries = uint32(opts.Instances)
	spec.Maps[syslatchMapRecords].MaxEntries = uint32(opts.Instances)
	spec.Maps[syslatchMapAwaitedNames].MaxEntries = uint32(opts.Instances)
	spec.Maps[syslatchMapTrackedCgroups].MaxEntries = uint32(opts.Cgroups)
	spec.Maps[syslatchMapEvents].MaxEntries = uint32(opts.RingBytes)
	// So that bpftool's lists show whose they are; 15 bytes at most.
	for name, shown := range map[string]string{
		syslatchMapTrackedCgroups: "syslatch_cgroup",
		syslatchMapAwaitedNames:   "syslatch_await",
		syslatchMapSlots:          "syslatch_slots",
		syslatchMapRecords:        "syslatch_record",
		syslatchMapEvents:         "syslatch_events",
		syslatchMapErrors:         "syslatch_errors",
		argRowsMap:                "syslatch_args",
		".rodata":                 "syslatch_rodata",
	} {
		spec.Maps[name].Name = shown
	}
	types := btf.NewCache() // reading the kernel's takes 20 ms
	if err := dropLacking(spec, types); err != nil {
		return nil, explain(err)
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Cache: types})
	if err != nil {
		return nil, explain(err)
	}
	return coll, nil
}

// dropLacking removes the optional programs that this kernel has no place for.
func dropLacking(spec *ebpf.CollectionSpec, types *btf.Cache) error {
	kernel, err := types.Kernel()
	if err != nil {
		return err
	}
	for name, tracepoint := range optional {
		var event *btf.Typedef
		switch err := kernel.TypeByName("btf_trace_"+tracepoint, &event); {
		case errors.Is(err, btf.ErrNotFound):
			delete(spec.Programs, name)
		case err != nil:
			return fmt.Errorf("tracepoint %s: %w", tracepoint, err)
		}
	}
	return nil
}

// explain adds what to do about an error of loading or attaching.
func explain(err error) error {
	var refused *ebpf.VerifierError
	switch {
	case errors.As(err, &refused):
		return fmt.Errorf("%w: this kernel's verifier refuses a program: %w", ErrUnsupported, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: CAP_BPF and CAP_PERFMON are needed, or root: %w", ErrUnsupported, err)
	case errors.Is(err, btf.ErrNotFound), errors.Is(err, fs.ErrNotExist), errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w: Linux 6.1 or later with CONFIG_DEBUG_INFO_BTF and CONFIG_BPF_EVENTS is needed: %w", ErrUnsupported, err)
	}
	return err
}

func openPrivate(opts Options) (*Recorder, error) {
	coll, err := load(opts)
	if err != nil {
		return nil, err
	}
	defer coll.Close()
	r := &Recorder{links: make(map[string]link.Link), progs: make(map[string]*ebpf.Program)}
	for _, name := range programs {
		if p := coll.DetachProgram(name); p != nil {
			r.progs[name] = p
		}
	}
	if err := r.adopt(func(name string) (*ebpf.Map, error) { return coll.DetachMap(name), nil }); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func openPinned(dir string, opts Options) (_ *Recorder, err error) {
	if err := onBPFFS(dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	r := &Recorder{dir: filepath.Join(dir, layoutDir), lock: lock}
	defer func() {
		lock.unlock()
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "layout-") && e.Name() != layoutDir {
			return nil, fmt.Errorf("%w: %s is of another layout than this program's %s: end whatever uses it, then remove it with rm -r %s (its recordings are lost)",
				ErrLayout, filepath.Join(dir, e.Name()), layoutDir, dir)
		}
	}
	if _, err := os.Stat(r.dir); errors.Is(err, fs.ErrNotExist) {
		if err := create(dir, opts); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	if err := r.adopt(func(name string) (*ebpf.Map, error) {
		return ebpf.LoadPinnedMap(filepath.Join(r.dir, maps[name]), nil)
	}); err != nil {
		return nil, err
	}
	return r, r.reconcile()
}

// create makes the objects and their pins. The order of system calls is: load;
// mkdir of a temporary directory; pin each; rename to the layout's name. A crash
// before the rename leaves a temporary directory, which the next create removes;
// after it, everything is there.
func create(dir string, opts Options) error {
	coll, err := load(opts)
	if err != nil {
		return err
	}
	defer coll.Close()
	tmp := filepath.Join(dir, "new")
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	for _, d := range []string{tmp, filepath.Join(tmp, "links"), filepath.Join(tmp, "reader")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	for name, pin := range maps {
		if err := coll.Maps[name].Pin(filepath.Join(tmp, pin)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for _, name := range programs {
		if coll.Programs[name] == nil {
			continue
		}
		if err := coll.Programs[name].Pin(filepath.Join(tmp, name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return os.Rename(tmp, filepath.Join(dir, layoutDir))
}

// adopt takes the maps that get returns.
func (r *Recorder) adopt(get func(name string) (*ebpf.Map, error)) error {
	for _, m := range []struct {
		to    **ebpf.Map
		name  string
		typ   ebpf.MapType
		value int
	}{
		{&r.tracked, syslatchMapTrackedCgroups, ebpf.Hash, int(unsafe.Sizeof(syslatchTracked{}))},
		{&r.awaited, syslatchMapAwaitedNames, ebpf.Hash, int(unsafe.Sizeof(syslatchTracked{}))},
		{&r.slotMap, syslatchMapSlots, ebpf.Array, slotSize},
		{&r.records, syslatchMapRecords, ebpf.Array, recordSize},
		{&r.events, syslatchMapEvents, ebpf.RingBuf, 0},
		{&r.errors, syslatchMapErrors, ebpf.Array, 8},
	} {
		got, err := get(m.name)
		if err != nil {
			return fmt.Errorf("open map %s: %w", m.name, err)
		}
		*m.to = got
		// The layout's number should make this impossible.
		if got.Type() != m.typ || int(got.ValueSize()) != m.value {
			return fmt.Errorf("%w: map %s is a %s of %d bytes, want %s of %d",
				ErrLayout, m.name, got.Type(), got.ValueSize(), m.typ, m.value)
		}
	}
	rows, err := get(argRowsMap)
	if err != nil {
		return fmt.Errorf("open map %s: %w", argRowsMap, err)
	}
	defer rows.Close()
	raw, err := rows.LookupBytes(uint32(0))
	if err != nil {
		return fmt.Errorf("read map %s: %w", argRowsMap, err)
	}
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, &r.argRows); err != nil {
		return fmt.Errorf("%w: map %s: %w", ErrLayout, argRowsMap, err)
	}
	n := int(r.slotMap.MaxEntries())
	if int(r.records.MaxEntries()) != n {
		return fmt.Errorf("%w: %d slots, but %d records", ErrLayout, n, r.records.MaxEntries())
	}
	page := os.Getpagesize()
	r.memory, err = unix.Mmap(r.slotMap.FD(), 0, (n*slotSize+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map slots into memory: %w", err)
	}
	r.slots = unsafe.Slice((*syslatchSlot)(unsafe.Pointer(&r.memory[0])), n)
	return nil
}

// Close closes this process's handles. Pins stay, and with them the recording;
// without pins it ends.
func (r *Recorder) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	var errs []error
	for _, l := range r.links {
		errs = append(errs, l.Close())
	}
	for _, p := range r.progs {
		errs = append(errs, p.Close())
	}
	if r.memory != nil {
		r.slots = nil
		errs = append(errs, unix.Munmap(r.memory))
	}
	for _, m := range []*ebpf.Map{r.tracked, r.awaited, r.slotMap, r.records, r.events, r.errors} {
		errs = append(errs, m.Close())
	}
	if r.lock != nil {
		errs = append(errs, r.lock.close())
	}
	return errors.Join(errs...)
}

// acquire takes the locks that changes of slots and links need.
func (r *Recorder) acquire() (release func(), err error) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil, fmt.Errorf("recorder: %w", os.ErrClosed)
	}
	if r.lock == nil {
		return r.mu.Unlock, nil
	}
	if err := r.lock.lock(); err != nil {
		r.mu.Unlock()
		return nil, err
	}
	// Someone may have removed the pins meanwhile. What would be tracked in maps
	// that no one else can find would be lost with this process.
	if _, err := os.Stat(r.dir); err != nil {
		r.lock.unlock()
		r.mu.Unlock()
		return nil, fmt.Errorf("pins are gone (syslatchd, or what else has opened them, makes new ones when it is restarted): %w", err)
	}
	return func() {
		r.lock.unlock()
		r.mu.Unlock()
	}, nil
}

// reconcile ends what a killed process left half done. The lock is held.
func (r *Recorder) reconcile() error {
	var stale []int
	for i := range r.slots {
		s := &r.slots[i]
		switch s.State {
		case uint32(syslatchSlotStateSLOT_SETUP):
			// Track didn't return: nobody knows of it.
			stale = append(stale, i)
		case uint32(syslatchSlotStateSLOT_FINISHED):
			// Finish may still be at it in another process, which is no harm.
			if atomic.LoadUint32(&s.Cgroups) > 0 {
				stale = append(stale, i)
			}
		default:
			continue
		}
		atomic.StoreUint32(&s.Live, 0)
	}
	if len(stale) > 0 {
		// A program that saw the slot live may yet enter a child.
		if err := waitForPrograms(); err != nil {
			return err
		}
		isStale := func(t syslatchTracked) bool { return slices.Contains(stale, int(t.Slot)) }
		if err := errors.Join(r.forget(isStale), r.forgetNames(isStale)); err != nil {
			return err
		}
	}
	for _, i := range stale {
		s := &r.slots[i]
		atomic.StoreUint32(&s.Cgroups, 0)
		if s.State == uint32(syslatchSlotStateSLOT_SETUP) {
			atomic.StoreUint32(&s.State, uint32(syslatchSlotStateSLOT_FREE))
		}
	}
	return r.detachIfIdle()
}

// attach sees to it that every program is attached. The lock is held.
func (r *Recorder) attach() error {
	for _, name := range programs {
		if err := r.attachOne(name); err != nil {
			return fmt.Errorf("attach %s: %w", name, explain(err))
		}
	}
	return nil
}

func (r *Recorder) attachOne(name string) error {
	if r.lock == nil {
		if r.links[name] != nil || r.progs[name] == nil && optional[name] != "" {
			return nil
		}
		l, err := link.AttachTracing(link.TracingOptions{Program: r.progs[name]})
		if err != nil {
			return err
		}
		r.links[name] = l
		return nil
	}
	pin := filepath.Join(r.dir, "links", name)
	if _, err := os.Stat(pin); err == nil {
		return nil
	}
	prog, err := ebpf.LoadPinnedProgram(filepath.Join(r.dir, name), nil)
	if errors.Is(err, fs.ErrNotExist) && optional[name] != "" {
		return nil
	}
	if err != nil {
		return err
	}
	defer prog.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: prog})
	if err != nil {
		return err
	}
	// A crash before the pin closes the link with the process.
	if err := l.Pin(pin); err != nil {
		return errors.Join(err, l.Close())
	}
	return l.Close()
}

// detachIfIdle takes the programs off if nothing is tracked. The lock is held.
func (r *Recorder) detachIfIdle() error {
	for i := range r.slots {
		if r.slots[i].State == uint32(syslatchSlotStateSLOT_ACTIVE) {
			return nil
		}
	}
	var errs []error
	for _, name := range slices.Backward(programs) {
		if r.lock == nil {
			if l := r.links[name]; l != nil {
				errs = append(errs, l.Close())
				delete(r.links, name)
			}
			continue
		}
		if err := os.Remove(filepath.Join(r.dir, "links", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("detach %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// Remove takes the programs off and removes every pin in dir, of whichever
// layout, and dir itself. Recordings that were not read are lost. It is no
// error if there is nothing.
func Remove(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := onBPFFS(dir); err != nil {
		return err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.close()
	return os.RemoveAll(dir)
}

// onBPFFS checks that dir, or the nearest parent that exists, is on a bpffs.
func onBPFFS(dir string) error {
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		var st unix.Statfs_t
		err := unix.Statfs(at, &st)
		switch {
		case errors.Is(err, unix.ENOENT) && at != filepath.Dir(at):
			continue
		case err != nil:
			return fmt.Errorf("statfs %s: %w", at, err)
		case st.Type != unix.BPF_FS_MAGIC:
			return fmt.Errorf("%w: %s is not on a bpffs: mount one with mount -t bpf bpf /sys/fs/bpf", ErrUnsupported, dir)
		}
		return nil
	}
}

// bootTime is what the programs' clock says now.
func bootTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("read CLOCK_BOOTTIME: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
