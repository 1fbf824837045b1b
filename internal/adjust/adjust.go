// SPDX-License-Identifier: Apache-2.0

// Package adjust turns a policy's decision, a profile version and a container
// into a [Plan]: what is injected into the container and what is to be read
// back once it runs. It is pure: no file, kernel or runtime is touched, and the
// same input gives the same plan. The adapters (plugin, hook) translate plans.
//
//	plan, err := adjust.Build(adjust.Input{Decision: d, Container: c, Version: v, Runtime: r})
//
// # What can't be applied
//
// A limit that this host or adapter can't apply is an error wrapping
// [ErrNotApplicable] if the decision's failure policy is deny, and a warning
// that names it otherwise. A profile problem is always an error; what an error
// means for the container is for the caller to read from Decision.Failure.
//
// # What no plan does
//
// No injected profile allows a call of the must-deny list, in any mode.
package adjust

import (
	"errors"
	"fmt"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

var (
	// ErrNoVersion: audit or enforce was asked for, and the workload has no
	// version to inject.
	ErrNoVersion = errors.New("the workload has no profile version")
	// ErrNotApplicable: something that the policy asks for can't be applied
	// here.
	ErrNotApplicable = errors.New("can't be applied here")
)

// MissingCallsError refuses a profile that the runtime's own start-up would not
// survive.
type MissingCallsError struct {
	Workload string
	Version  int // 0: the profile is no version of ours
	Calls    []string
}

func (e *MissingCallsError) Error() string {
	what := "the container's own profile, less mustDeny,"
	if e.Version > 0 {
		what = fmt.Sprintf("version %d of workload %s", e.Version, e.Workload)
	}
	return fmt.Sprintf("%s lacks calls that a container needs to start: %s (record it again, or list them in the policy's mustAllow and not in mustDeny)",
		what, strings.Join(e.Calls, ", "))
}

// Adapters. They differ in what a plan can make the runtime do.
const (
	AdapterNRI  = ""     // memory: only the limit is applied, swap is set equal to it
	AdapterHook = "hook" // edits the OCI spec: everything in it is applied
)

// Cgroup modes, as internal/cgroup prints them.
const (
	CgroupV2     = "v2"
	CgroupHybrid = "hybrid" // controllers on v1, cgroup ids on v2
	CgroupV1     = "v1"
)

// Runtime is what is known of the runtime and the host.
type Runtime struct {
	Engine        string // "containerd"
	EngineVersion string // "2.4.2"
	PID           int    // of the engine's daemon; 0 if it isn't known
	Adapter       string // AdapterNRI or AdapterHook
	CgroupMode    string // CgroupV2, CgroupHybrid or CgroupV1
	// NoUnified: the OCI runtime doesn't know linux.resources.unified.
	NoUnified bool
	// NoErrno: the engine crashes on a seccomp rule that names an errno, as those
	// that use NRI 0.10 and 0.11 (CRI-O 1.36.1, containerd 2.2): a nil pointer in
	// api.ToOCILinuxSyscalls, mended in NRI 0.12.
	NoErrno bool
	// NoSysResource: the OCI runtime runs without CAP_SYS_RESOURCE, so it can
	// neither lower oom_score_adj below its own, OOMScoreAdj, nor raise a hard
	// rlimit above its own in HardLimits (by RLIMIT_ name; absent: not known).
	NoSysResource bool
	OOMScoreAdj   int
	HardLimits    map[string]uint64
	// BaseFilters is how many seccomp filters the runtime itself runs under.
	BaseFilters int
	// PageSize is the host's, in bytes; 0 means 4096.
	PageSize int
}

// Input is everything that a plan depends on.
type Input struct {
	Decision  policy.Decision
	Container policy.Container
	// Version is the workload's active version, nil if there is none.
	Version *profiles.Version
	Runtime Runtime
	// Phases is the filter of the decision's phases, nil if it has none: then no
	// version is injected.
	Phases *specs.LinuxSeccomp
}

// Plan is what to do with one container. It shares no memory with its Input.
type Plan struct {
	Mode     policy.Mode
	Workload string
	// Seccomp is to replace the container's profile; nil leaves it alone.
	Seccomp *specs.LinuxSeccomp
	// Record says that the container's calls are to be recorded, and Gate from
	// when on they can be counted: GateFilter if a filter will be loaded.
	Record bool
	Gate   profiles.Gate
	// Version and Digest tell what Seccomp was made from; 0 and "" if it is
	// no version. Seccomp may differ from the version by the must lists and by
	// what the container's own profile restricts further.
	Version int
	Digest  string
	// Resources, OOMScoreAdj and Rlimits are nil where nothing is to be set.
	// In Resources.Memory, Swap is memory plus swap, as in the OCI spec.
	Resources   *specs.LinuxResources
	OOMScoreAdj *int
	Rlimits     []specs.POSIXRlimit
	// Mounts are to be added: the socket by which a container with phases tightens
	// itself.
	Mounts []specs.Mount
	// Expect is what must be found once the container is there.
	Expect []Expectation
	// Notes explain; Warnings say that something asked for is not done.
	Notes, Warnings []string
}

// builder is a plan in the making.
type builder struct {
	Input
	plan     *Plan
	problems []error
}

// problem is something asked for that can't be done here.
func (b *builder) problem(format string, args ...any) {
	message := fmt.Sprintf(format, args...)
	if b.Decision.Failure == policy.FailureRuntimeDefault {
		b.plan.Warnings = append(b.plan.Warnings, "not applied: "+message)
		return
	}
	b.problems = append(b.problems, fmt.Errorf("%w: %s", ErrNotApplicable, message))
}

func (b *builder) warn(format string, args ...any) {
	b.plan.Warnings = append(b.plan.Warnings, fmt.Sprintf(format, args...))
}

func (b *builder) note(format string, args ...any) {
	b.plan.Notes = append(b.plan.Notes, fmt.Sprintf(format, args...))
}

// Build makes the plan for a container. In mode off it is empty.
func Build(in Input) (*Plan, error) {
	b := &builder{Input: in, plan: &Plan{Mode: in.Decision.Mode, Workload: in.Decision.Workload}}
	switch in.Decision.Mode {
	case policy.ModeOff:
		return b.plan, nil
	case policy.ModeRecord, policy.ModeAudit, policy.ModeEnforce:
	default:
		return nil, fmt.Errorf("unknown mode %q, want off, record, audit or enforce", in.Decision.Mode)
	}
	if in.Decision.Workload == "" {
		return nil, errors.New("decision names no workload")
	}
	if err := b.seccomp(); err != nil {
		return nil, err
	}
	b.limits()
	if len(b.problems) > 0 {
		return nil, errors.Join(b.problems...)
	}
	return b.plan, nil
}
