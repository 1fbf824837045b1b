// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ABI is a system call ABI in the runtime-spec's spelling, such as
// SCMP_ARCH_X86_64. The same number means different calls under different ABIs.
type ABI = specs.Arch

// Calls is a set of system call names per ABI, as libseccomp spells them for
// that ABI; each slice is sorted and without repeats.
type Calls map[ABI][]string

// Call is one system call: a number under an ABI. Name is libseccomp's, and
// empty where libseccomp knows none. For SCMP_ARCH_X32 the number carries no
// x32 bit.
type Call struct {
	ABI    ABI    `json:"abi"`
	Number uint32 `json:"nr"`
	Name   string `json:"name,omitempty"`
}

// DefaultPhase is the phase of a container whose policy names no phases.
const DefaultPhase = "default"

// Gate says from which moment on an instance's calls were counted.
type Gate string

const (
	// GateFilter counts a task's calls once it has loaded one more seccomp
	// filter than it came with: exactly what an enforced profile must allow.
	GateFilter Gate = "filter"
	// GateExec counts from the first execve in the container on; the runtime's
	// own calls come from the floor instead of from evidence.
	GateExec Gate = "execve"
	// GateOpen counts everything from the attach on: the recording was attached
	// to something that ran already.
	GateOpen Gate = "open"
)

// Subject names the container that a recording was made of.
type Subject struct {
	ID          string `json:"id"`
	Name        string `json:"name,omitempty"`
	Namespace   string `json:"namespace,omitempty"`
	Pod         string `json:"pod,omitempty"`
	Image       string `json:"image,omitempty"`
	ImageDigest string `json:"imageDigest,omitempty"`
	// Command is what `syslatch record` ran, where there was no container.
	Command []string `json:"command,omitempty"`
}

// Recording is the evidence of one instance's run.
type Recording struct {
	SchemaVersion int       `json:"schemaVersion"` // 1
	ID            string    `json:"id"`            // unique, sorts by time, safe as a file name
	Workload      string    `json:"workload"`
	Subject       Subject   `json:"subject"`
	Started       time.Time `json:"started"`
	Ended         time.Time `json:"ended"`
	Kernel        string    `json:"kernel"`            // uname -r of the recording host
	Runtime       string    `json:"runtime,omitempty"` // "containerd 2.4.2", "syslatch record"
	Gate          Gate      `json:"gate"`
	// Initial is the phase that it began in, if it was made by phase.
	Initial string `json:"initial,omitempty"`
	// Phases holds what was called in each phase, by phase name.
	Phases map[string]Calls `json:"phases"`
	// Unresolved are numbers that libseccomp has no name for; each is a loss too.
	Unresolved []Call      `json:"unresolved,omitempty"`
	FirstSeen  []FirstSeen `json:"firstSeen,omitempty"`
	Arguments  []Argument  `json:"arguments,omitempty"`
	Losses     []Loss      `json:"losses,omitempty"`
}

// FirstSeen tells when and by whom a call was first made.
type FirstSeen struct {
	Call
	Phase string        `json:"phase"`
	After time.Duration `json:"afterNanos"` // since the recording started
	Comm  string        `json:"comm,omitempty"`
	Exe   string        `json:"exe,omitempty"` // base name of the executable
	PID   uint32        `json:"pid"`           // in the host's pid namespace
}

// Argument is the set of values that one argument of one call took.
type Argument struct {
	Call
	Phase string `json:"phase"`
	Index int    `json:"index"` // argument position, from 0
	// Mask is the part of the value that was kept (all ones: the whole).
	Mask   uint64   `json:"mask"`
	Values []uint64 `json:"values"` // sorted
	// AnyValue: more values were seen than are kept.
	AnyValue bool `json:"anyValue,omitempty"`
}

// LossKind names a way in which a recording can be incomplete.
type LossKind string

const (
	LossUnresolved     LossKind = "unresolved-number" // a call without a name can't be put into a profile
	LossOutOfRange     LossKind = "number-out-of-range"
	LossCgroupMapFull  LossKind = "cgroup-map-full" // a nested cgroup was not tracked
	LossAttachedLate   LossKind = "attached-late"
	LossForeignLineage LossKind = "foreign-lineage" // a task joined with fewer filters than the gate's base
	LossNoFilterGate   LossKind = "no-filter-gate"
	LossFirstSeen      LossKind = "first-seen-events" // bits are set; only the who and when is missing
	LossArguments      LossKind = "argument-values"   // the call counts as "any value"
	LossInterrupted    LossKind = "interrupted"       // the end of the instance was not observed
)

// Loss is one way in which a recording is known to be incomplete.
type Loss struct {
	Kind   LossKind `json:"kind"`
	Count  uint64   `json:"count"`
	Detail string   `json:"detail,omitempty"`
}

// Manifest stands beside each version's profile and says where it came from.
type Manifest struct {
	SchemaVersion int       `json:"schemaVersion"` // 1
	Workload      string    `json:"workload"`
	Version       int       `json:"version"`          // from 1
	Digest        string    `json:"digest"`           // "sha256:<hex>" of the profile's bytes
	Parent        string    `json:"parent,omitempty"` // digest of the version before
	Created       time.Time `json:"created"`
	// Calls is the evidence by ABI; the profile's flat list can't tell ABIs
	// apart, because OCI seccomp rules apply to every listed architecture.
	Calls Calls `json:"calls"`
	// Recordings are the ids of the recordings that brought something new.
	Recordings []string `json:"recordings"`
	Kernel     string   `json:"kernel"`
	Runtime    string   `json:"runtime,omitempty"`
	Losses     []Loss   `json:"losses,omitempty"`
	// MustAllow, MustDeny, Architectures are the policy's, as applied.
	MustAllow     []string `json:"mustAllow,omitempty"`
	MustDeny      []string `json:"mustDeny,omitempty"`
	Architectures []ABI    `json:"architectures,omitempty"`
	// Floor are calls of container runtimes' start-up that the profile allows
	// without evidence, because a recording began only at the execve (GateExec).
	Floor []string `json:"floor,omitempty"`
	// Incidental are calls that the profile allows, some under conditions,
	// without evidence: see the function of this name.
	Incidental []string `json:"incidental,omitempty"`
}

// Version is an immutable profile with its manifest.
type Version struct {
	Manifest Manifest
	Profile  *specs.LinuxSeccomp
}
