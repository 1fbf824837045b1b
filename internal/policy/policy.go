// SPDX-License-Identifier: Apache-2.0

// Package policy says what applies to which container. It owns the format of
// syslatchd's one configuration file and the decision that follows from it; it
// knows no kernel, runtime or store.
//
// # The file
//
// testdata/example.yaml shows every field but phases with its meaning. Decoding is strict:
// an unknown field, a wrong type, a bad value, a duplicate key or policy name,
// and a policy that an earlier one shadows are errors, and all of them are
// reported at once, as [Errors], one line each:
//
//	policy.yaml:12: policies[0].mode: unknown value "recrod", want off, record, audit or enforce (did you mean "record"?)
//
// Usage:
//
//	file, err := policy.Load("/etc/syslatch/policy.yaml", policy.Options{KnownCall: known})
//	...
//	decision, err := file.Decide(container)
//	if err != nil && decision.Failure == policy.FailureDeny { /* refuse the container */ }
//
// # Patterns
//
// In a pattern `*` stands for any run of characters, `/` included, `?` for any
// one character, `[a-c]` for one of a class (`[!a-c]` for one outside of it),
// and `\` takes the next character literally. A pattern must match the whole.
//
// Image patterns are compared with the normalised repository, with and without
// tag and digest: for nginx:1.27 that is docker.io/library/nginx and
// docker.io/library/nginx:1.27. Patterns are normalised alike, so that `nginx`,
// `nginx:1.*` and `bitnami/*` mean docker.io; a pattern that begins with a
// wildcard, or whose first component is a registry's host, is taken as it is. An
// image without a name, given by its id, is matched by `*` alone.
package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
)

// APIVersion is the only apiVersion of the file so far.
const APIVersion = "syslatch.dev/v1"

// Defaults of [File].
const (
	DefaultStore    = "/var/lib/syslatch/profiles"
	DefaultStateDir = "/run/syslatch"
	DefaultBPFFS    = "/sys/fs/bpf/syslatch"
	DefaultWorkload = "{image}/{container}"
	// DefaultRootlessSocket is where syslatchd serves rootless podman.
	DefaultRootlessSocket = "/run/syslatch/hook.sock"
)

// Annotation keys, in NRI's convention: KEY/container.NAME for one container,
// KEY/pod for all of the pod's, and a bare KEY, in this order of precedence.
// They count only where the policy lists them.
const (
	AnnotationMode     = "mode.syslatch.dev"
	AnnotationWorkload = "workload.syslatch.dev"
	AnnotationPhase    = "phase.syslatch.dev" // to begin in
)

// plainKeys are further forms of a bare KEY, of the least precedence: what one
// types after podman's --annotation.
var plainKeys = map[string]string{
	AnnotationMode:     "syslatch.dev/mode",
	AnnotationWorkload: "syslatch.dev/workload",
	AnnotationPhase:    "syslatch.dev/phase",
}

// AnnotationTrace is that of oci-seccomp-bpf-hook, which syslatch-hook serves
// too where the file says so.
const AnnotationTrace = "io.containers.trace-syscall"

// Bounds of what a file or a pod can bring along, in bytes.
const (
	MaxFileSize       = 1 << 20
	MaxAnnotationSize = 1024
	MaxWorkloadSize   = 512
)

// Mode is what is done with a container.
type Mode string

// The modes, from the loosest to the strictest.
const (
	ModeOff     Mode = "off"     // left alone
	ModeRecord  Mode = "record"  // its calls are recorded
	ModeAudit   Mode = "audit"   // recorded; what the profile would deny is reported
	ModeEnforce Mode = "enforce" // what the profile does not allow is denied
)

// Failure says what happens to a container for which syslatch can't do what the
// policy asks.
type Failure string

const (
	// FailureDeny refuses the container.
	FailureDeny Failure = "deny"
	// FailureRuntimeDefault lets it run as it would without syslatch.
	FailureRuntimeDefault Failure = "runtime-default"
)

// ExistingProfile says what becomes of the pod's own seccomp profile.
type ExistingProfile string

const (
	// ExistingKeep leaves it in force: what it denies can't be recorded, and a
	// version is narrowed to it.
	ExistingKeep ExistingProfile = "keep"
	// ExistingReplace puts the version in its place, or while recording a profile
	// that allows everything.
	ExistingReplace ExistingProfile = "replace"
)

// Activate says how a new version becomes the one that is injected.
type Activate string

const (
	ActivatePublish Activate = "publish" // as soon as it is published
	ActivateManual  Activate = "manual"  // by an operator's command
)

// AnnotationField names what a pod may choose by annotation.
type AnnotationField string

const (
	FieldMode     AnnotationField = "mode"
	FieldWorkload AnnotationField = "workload"
	FieldPhase    AnnotationField = "phase"
)

// File is a configuration file. Its paths are absolute and clean.
type File struct {
	APIVersion string
	Store      string // directory of profile versions
	StateDir   string // directory of what a reboot may forget
	BPFFS      string // directory in which BPF objects are pinned
	NRI        NRI
	Hook       Hook
	Policies   []Policy // first match wins; none: mode off
}

// Hook is what holds for syslatch-hook alone.
type Hook struct {
	// TraceSyscall says what becomes of a container with the annotation
	// [AnnotationTrace], by which whoever starts it has a file written on the
	// host. TraceDirectories are where such files may lie.
	TraceSyscall     TraceSyscall
	TraceDirectories []string
	// Rootless says whose rootless containers syslatchd serves.
	Rootless Rootless
}

// Rootless is how the hooks of rootless containers, which can't record, reach
// syslatchd. The zero value is: not at all.
type Rootless struct {
	Users  []string // names or uids, none of them root's
	Socket string   // "" without Users
}

// TraceSyscall says what is done about [AnnotationTrace].
type TraceSyscall string

const (
	TraceRefuse TraceSyscall = "refuse" // the container doesn't start
	TraceServe  TraceSyscall = "serve"
	TraceIgnore TraceSyscall = "ignore" // another hook's business
)

// NRI is how syslatchd connects to the runtime. Zero values mean NRI's own:
// a pre-launched plugin gets all but the timeout from the runtime.
type NRI struct {
	Socket         string
	PluginName     string
	PluginIndex    string        // two digits
	RequestTimeout time.Duration // bound of one handler
}

// Policy is one entry of [File].Policies, with its defaults filled in.
type Policy struct {
	Name     string
	Line     int // in the file
	Match    Match
	Mode     Mode
	Workload string // template, see example.yaml
	// Annotations lists what a pod may choose; AllowedModes bounds its choice
	// of mode.
	Annotations  []AnnotationField
	AllowedModes []Mode
	Limits       Limits
	// MustAllow and MustDeny are sorted names of system calls.
	MustAllow, MustDeny []string
	Architectures       []specs.Arch
	ExistingProfile     ExistingProfile
	Activate            Activate
	// Failure is empty where the file gives none: the mode decides then.
	Failure     Failure
	AllowLosses bool
	// LogDenials: the filters of phases have the kernel tell of what they deny.
	LogDenials bool
	// Phases is nil where the file gives none, and where [Options].Phases isn't set.
	Phases *Phases
}

// Phases are what a container may do for stretches of its life, in the file's order.
type Phases struct {
	Initial string
	Gaps    Gaps
	Phases  []Phase
}

// Gaps says what becomes of a container whose phases can't be enforced as they are
// written, on the host where it starts.
type Gaps string

const (
	GapsDeny   Gaps = "deny"   // it doesn't start
	GapsReport Gaps = "report" // it runs, and what isn't enforced is named
)

// Phase is one of them.
type Phase struct {
	profiles.Phase
	Line   int // in the file
	Limits Limits
}

// Set is what of a policy's phases profiles compiles.
func (p *Policy) Set() *profiles.PhaseSet {
	s := &profiles.PhaseSet{Initial: p.Phases.Initial, MustAllow: p.MustAllow, MustDeny: p.MustDeny}
	for _, phase := range p.Phases.Phases {
		s.Phases = append(s.Phases, phase.Phase)
	}
	return s
}

// Match selects containers. A field left out matches all; within a list one
// pattern must match, and every field that is given must. With Users it selects
// rootless containers of these users, and without none: all else that is known of
// them is their users' word.
type Match struct {
	Users      []string // patterns of names or uids
	Namespaces []string
	PodLabels  map[string]string // label name -> pattern of its value
	Containers []string
	Images     []string
}

// Limits are resource limits; nil and empty fields are left alone.
type Limits struct {
	Memory      Memory            `json:"memory,omitzero"`
	CPU         CPU               `json:"cpu,omitzero"`
	Pids        *int64            `json:"pids,omitempty"` // -1: unlimited
	IO          IO                `json:"io,omitzero"`
	Unified     map[string]string `json:"unified,omitempty"`     // cgroup v2 file -> what is written
	OOMScoreAdj *int              `json:"oomScoreAdj,omitempty"` // -1000 to 1000
	Rlimits     []Rlimit          `json:"rlimits,omitempty"`
}

// None says whether no limit is set.
func (l *Limits) None() bool {
	return l.Memory == (Memory{}) && l.CPU == (CPU{}) && l.Pids == nil && l.IO.Weight == 0 && len(l.IO.Max) == 0 &&
		len(l.Unified) == 0 && l.OOMScoreAdj == nil && len(l.Rlimits) == 0
}

// Unlimited is the value of a limit that the file gives as "max".
const Unlimited int64 = -1

// Memory limits in bytes, by the names of cgroup v2.
type Memory struct {
	Max     *int64 `json:"max,omitempty"`
	High    *int64 `json:"high,omitempty"`
	SwapMax *int64 `json:"swapMax,omitempty"` // swap alone, as in v2
	Low     *int64 `json:"low,omitempty"`
	Min     *int64 `json:"min,omitempty"`
}

// CPU limits. Quota and Period are microseconds; Quota is 0 if the file gives
// no limit, and [Unlimited] for "max".
type CPU struct {
	Quota  int64  `json:"quota,omitempty"`
	Period uint64 `json:"period,omitempty"`
	Weight uint64 `json:"weight,omitempty"` // 1 to 10000, 0 if not given
}

// IO limits of cgroup v2.
type IO struct {
	Weight uint64  `json:"weight,omitempty"` // 1 to 10000, 0 if not given
	Max    []IOMax `json:"max,omitempty"`
}

// IOMax bounds one device, per second; 0 if not given, [Unlimited] for "max".
type IOMax struct {
	Device string `json:"device"` // "8:16"
	RBPS   int64  `json:"rbps,omitempty"`
	WBPS   int64  `json:"wbps,omitempty"`
	RIOPS  int64  `json:"riops,omitempty"`
	WIOPS  int64  `json:"wiops,omitempty"`
}

// Rlimit is a POSIX resource limit. "unlimited" is RLIM_INFINITY, all ones.
type Rlimit struct {
	Type string `json:"type"` // RLIMIT_NOFILE, ...
	Soft uint64 `json:"soft"`
	Hard uint64 `json:"hard"`
}

// Container is what is known of a container before it is created, whichever
// runtime tells it.
type Container struct {
	ID          string            `json:"id"`
	Name        string            `json:"name,omitempty"`
	Namespace   string            `json:"namespace,omitempty"`
	Pod         string            `json:"pod,omitempty"`
	PodUID      string            `json:"podUID,omitempty"`
	PodLabels   map[string]string `json:"podLabels,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`      // the container's own
	Annotations map[string]string `json:"annotations,omitempty"` // the pod's
	Image       string            `json:"image,omitempty"`       // reference as the runtime gives it
	ImageDigest string            `json:"imageDigest,omitempty"` // "sha256:..."
	CgroupsPath string            `json:"cgroupsPath,omitempty"` // as in the OCI spec
	PID         int               `json:"pid,omitempty"`
	// User is whose rootless container it is; nil for all others.
	User *User `json:"user,omitempty"`

	// Seccomp is the profile that the runtime made for the container, nil if
	// it runs unconfined. It matters at create only, and isn't kept.
	Seccomp *specs.LinuxSeccomp `json:"-"`
	// SeccompUnknown: the runtime does not tell (CRI-O), and Seccomp is nil.
	SeccompUnknown bool `json:"seccompUnknown,omitempty"`
}

// User is who runs a rootless engine, as the kernel tells.
type User struct {
	UID  uint32 `json:"uid"`
	Name string `json:"name,omitempty"` // "" if the host knows none
}

// String is "nobody (uid 65534)".
func (u User) String() string {
	if u.Name == "" {
		return fmt.Sprintf("uid %d", u.UID)
	}
	return fmt.Sprintf("%s (uid %d)", u.Name, u.UID)
}

// Is reports whether a name or uid from the file is the user's.
func (u User) Is(entry string) bool {
	return entry == strconv.FormatUint(uint64(u.UID), 10) || u.Name != "" && entry == u.Name
}

// Asks reports whether whoever started the container asks for syslatch by an
// annotation of ours, be it a misspelt one.
func (c *Container) Asks() bool {
	for key := range c.Annotations {
		domain, _, _ := strings.Cut(key, "/")
		if domain == plainDomain || strings.HasSuffix(domain, "."+plainDomain) {
			return true
		}
	}
	return false
}

// Decision is what a policy means for one container.
type Decision struct {
	Policy          string          `json:"policy,omitempty"` // empty: no policy matches
	Mode            Mode            `json:"mode"`
	Workload        string          `json:"workload,omitempty"` // empty in mode off
	Limits          Limits          `json:"limits,omitzero"`
	MustAllow       []string        `json:"mustAllow,omitempty"`
	MustDeny        []string        `json:"mustDeny,omitempty"`
	Architectures   []specs.Arch    `json:"architectures,omitempty"`
	ExistingProfile ExistingProfile `json:"existingProfile,omitempty"`
	Activate        Activate        `json:"activate,omitempty"`
	Failure         Failure         `json:"failure"`
	AllowLosses     bool            `json:"allowLosses,omitempty"`
	LogDenials      bool            `json:"logDenials,omitempty"`
	// Phases are in force in mode enforce, from Phase on; in mode record they are marks
	// of the recording. nil if there are none, and in mode audit.
	Phases *Phases `json:"phases,omitempty"`
	Phase  string  `json:"phase,omitempty"`
	// Reasons are sentences for the log: which policy matched, which
	// annotation was used or ignored, and why.
	Reasons []string `json:"reasons,omitempty"`
}

// Options are what parsing needs from packages that policy must not import.
type Options struct {
	// KnownCall reports whether a system call of that name exists under any
	// ABI. Names are not checked if it is nil.
	KnownCall func(name string) bool
	// Phases: the caller does what phases say. For all others a file that has some is
	// faulty: to ignore them would be to allow what they don't.
	Phases bool
}
