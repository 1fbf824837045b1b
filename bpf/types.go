// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"time"
)

var (
	// ErrFull means that there is no room for another instance, or cgroup. Those
	// that are in go on recording.
	ErrFull = errors.New("recorder is full")
	// ErrEnforcerFull means that there is no room in an [Enforcer].
	ErrEnforcerFull = errors.New("enforcer is full")
	// ErrTracked means that the cgroup belongs to an instance already.
	ErrTracked = errors.New("cgroup is tracked already")
	// ErrUnknown means that a handle's instance is not, or no longer, there.
	ErrUnknown = errors.New("no such instance")
	// ErrFinished means that an instance has been finished: it records nothing
	// more and can only be read and released.
	ErrFinished = errors.New("instance is finished")
	// ErrLayout means that the pins were made by another version.
	ErrLayout = errors.New("pinned by an incompatible version")
	// ErrBusy means that another reader has the events.
	ErrBusy = errors.New("another process reads the events")
	// ErrUnsupported means that the kernel, or this process's privileges, won't
	// do. Probe tells what is missing.
	ErrUnsupported = errors.New("not supported here")
)

// ABI is a system call table of the kernel. A call number means nothing
// without one.
type ABI uint8

const (
	ABIX8664 = ABI(syslatchAbiABI_X8664)
	ABII386  = ABI(syslatchAbiABI_I386) // 32-bit programs, and int 0x80 from 64-bit ones
	ABIX32   = ABI(syslatchAbiABI_X32)
)

// String is the ABI's name in the kernel's tables: x86_64, i386 or x32.
func (a ABI) String() string {
	switch a {
	case ABIX8664:
		return "x86_64"
	case ABII386:
		return "i386"
	case ABIX32:
		return "x32"
	}
	return fmt.Sprintf("ABI(%d)", uint8(a))
}

// Gate says from when on a task's calls count.
type Gate uint8

const (
	// GateFilter counts a task's calls once it has more seccomp filters than
	// TrackOptions.BaseFilters: from the runtime's own load on, so exactly what
	// that filter must allow.
	GateFilter = Gate(syslatchGateGATE_FILTER)
	// GateExec counts all calls after the first execve in the instance, which
	// is itself not counted.
	GateExec = Gate(syslatchGateGATE_EXEC)
	// GateOpen counts all calls.
	GateOpen = Gate(syslatchGateGATE_OPEN)
)

// String is filter, exec or open.
func (g Gate) String() string {
	switch g {
	case GateFilter:
		return "filter"
	case GateExec:
		return "exec"
	case GateOpen:
		return "open"
	}
	return fmt.Sprintf("Gate(%d)", uint8(g))
}

const (
	// Phases is how many phases an instance has, numbered from 0.
	Phases = 8
	// MaxNumber is the greatest call number that a bitmap holds.
	MaxNumber = 1023
	// MaxArgValues is how many values of an argument are kept for a phase.
	MaxArgValues = 32
)

// Handle names an instance. It stays valid over restarts, until Release.
type Handle struct {
	Slot       uint32
	Generation uint32 // of the slot: a slot that is used again has another
}

func (h Handle) String() string { return fmt.Sprintf("slot %d.%d", h.Slot, h.Generation) }

// TrackOptions are the ways to track a cgroup.
type TrackOptions struct {
	Gate Gate
	// BaseFilters is the number of seccomp filters of the instance's first task
	// (Seccomp_filters in /proc/PID/status) before its own is loaded. Used with
	// GateFilter only.
	BaseFilters int
	// Phase is the one to start in.
	Phase uint8
	// Start, if not nil, is the one in which calls count before: up to and with the
	// first execve of a task that is judged.
	Start *uint8
	// Tag is the caller's own mark of the instance, 0 for none. A caller that is
	// killed before it has written down the handle finds the instance by it.
	Tag uint64
}

// Instance is one that is tracked, or finished and not yet released.
type Instance struct {
	Handle
	RootCgroup  uint64 // as given to Track
	Gate        Gate
	BaseFilters int
	Phase       uint8
	Starting    bool      // the first execve has not been seen, and calls count for Start
	Tag         uint64    // as given to Track or Await
	Started     time.Time // when it was tracked
	Cgroups     int       // tracked now; 0 means that all have been removed
	Finished    bool
}

// Losses counts what an instance's recording lacks.
type Losses struct {
	// Events are first-seen events that the ring had no room for. The calls are
	// in the record nevertheless.
	Events uint64
	// ForeignCalls are calls of tasks with fewer filters than BaseFilters: they
	// come from outside the runtime's line of descent, so the gate can't judge
	// them, nor what they call after loading a filter.
	ForeignCalls uint64
	// Cgroups are children that were made while no room was left to track them.
	Cgroups uint64
	// OddCalls are calls with numbers above MaxNumber that the list of such
	// numbers had no room for.
	OddCalls uint64
	// Args are argument values that could not be kept; their sets say Any.
	Args uint64
}

// Evidence says whether calls may be missing from the record. Events and Args
// don't count: those calls are there.
func (l Losses) Evidence() bool {
	return l.ForeignCalls != 0 || l.Cgroups != 0 || l.OddCalls != 0
}

// CallSet is the calls of an instance in one phase, of one ABI.
type CallSet struct {
	Phase   uint8
	ABI     ABI
	Numbers []uint16 // ascending; x32's without their flag bit 0x40000000
}

// OddCall is a call with a number above MaxNumber.
type OddCall struct {
	Phase  uint8
	ABI    ABI
	Number uint32 // as in the register; x32's without its flag bit
}

// ArgSet is the values that were seen of one argument of a call.
type ArgSet struct {
	Phase  uint8
	ABI    ABI
	Number uint16
	Arg    uint8 // position, from 0
	// Mask was applied to the argument before it was kept, because the kernel
	// ignores the other bits or they carry no decision (access mode and the
	// creating bits of open flags, the type of a socket without its flags).
	// Conditions made of the values must apply it too.
	Mask   uint64
	Values []uint64 // ascending; nil if Any
	// Any means that there were more than MaxArgValues values, or one that could
	// not be kept.
	Any bool
}

// Snapshot is what an instance did until Taken.
type Snapshot struct {
	Instance
	Taken    time.Time
	GateOpen bool // GateExec: the first execve was seen; else true
	Calls    []CallSet
	Args     []ArgSet
	OddCalls []OddCall
	Losses   Losses
}

// Event tells that a call was made for the first time in a phase.
type Event struct {
	Handle
	Since  time.Duration // since the instance was tracked, suspended time included
	Cgroup uint64        // of the task
	Phase  uint8
	ABI    ABI
	Number uint32
	PID    int    // of the thread, in the initial pid namespace
	TGID   int    // of the process
	Comm   string // of the thread; up to 15 bytes, as the task likes
	// Exe is the last part of the executable's name, up to 63 bytes; empty if
	// it could not be read.
	Exe string
}

// Stats tells of the recorder as a whole.
type Stats struct {
	Instances int // tracked, without the finished ones
	Finished  int
	Capacity  int // slots
	Cgroups   int // tracked now
	Attached  bool
	// Errors counts helpers that failed, by place, since the maps were made.
	Errors map[string]uint64
	// Memory is what the kernel's maps take, in bytes.
	Memory uint64
}
