// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	_ "embed"
	"slices"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// StartFloor is what one container runtime calls between loading a container's
// seccomp filter and executing its program, as measured on one kernel; see
// testdata/floor/README.md.
type StartFloor struct {
	Runtime string `json:"runtime"` // "runc", "crun"
	Version string `json:"version"`
	// NoNewPrivs is the spec's process.noNewPrivileges. Without it runtimes load
	// the filter before they give up privileges, and call more under it.
	NoNewPrivs bool   `json:"noNewPrivs"`
	Kernel     string `json:"kernel"` // uname -r
	// Called is the union of what several starts called under x86_64, sorted.
	// The execve is in it; the program's own calls are not.
	Called []string `json:"called"`
	// Needed is what of it made every start fail when it alone was denied.
	Needed []string `json:"needed"`
}

//go:embed floor.json
var floorJSON []byte

var startFloors = sync.OnceValue(func() []StartFloor {
	floors, err := decode[[]StartFloor](floorJSON)
	if err != nil {
		panic("profiles: floor.json: " + err.Error()) // a test has read it
	}
	return *floors
})

// StartFloors are the measurements that there are.
func StartFloors() []StartFloor { return slices.Clone(startFloors()) }

// Floor lists, sorted, what any measured version of a runtime called, with or
// without no_new_privs; for the empty name, what any runtime did. It is empty
// for a runtime that was not measured. It serves where a recording could not
// begin with the filter's load.
func Floor(runtime string) []string {
	var out []string
	for _, f := range startFloors() {
		if runtime == "" || f.Runtime == runtime {
			out = append(out, f.Called...)
		}
	}
	return sorted(out)
}

// MissingForStart names, sorted, the calls that a profile denies and without
// which no container starts under it: those that every measured version of the
// runtime needs, or, for an empty or unknown name, every version of every
// runtime. noNewPrivs is the spec's process.noNewPrivileges; where it isn't
// known, true demands less.
//
// BUG(profiles): a version that was not measured may need more, and a call that
// one version needs and another doesn't is not demanded.
func MissingForStart(p *specs.LinuxSeccomp, runtime string, noNewPrivs bool) []string {
	known := slices.ContainsFunc(startFloors(), func(f StartFloor) bool { return f.Runtime == runtime })
	var needed []string
	first := true
	for _, f := range startFloors() {
		switch {
		case known && f.Runtime != runtime || f.NoNewPrivs != noNewPrivs:
		case first:
			needed, first = slices.Clone(f.Needed), false
		default:
			needed = slices.DeleteFunc(needed, func(name string) bool { return !slices.Contains(f.Needed, name) })
		}
	}
	return Denied(p, Calls{specs.ArchX86_64: needed})[specs.ArchX86_64]
}
