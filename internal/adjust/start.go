// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
)

// missingForStart names, sorted, what a profile denies of the calls without
// which no container starts, whatever the runtime: those that every measured
// runtime needs, and exit_group, without which libc's exit ends in a fault.
//
// BUG(adjust): which runtime will start the container isn't known here (the
// engine doesn't tell plugins), so that what only one of them needs isn't
// demanded, and its start then fails with its own error.
func missingForStart(p *specs.LinuxSeccomp) []string {
	missing := profiles.MissingForStart(p, "", true)
	exit := profiles.Calls{specs.ArchX86_64: {"exit_group"}}
	missing = append(missing, profiles.Denied(p, exit)[specs.ArchX86_64]...)
	slices.Sort(missing)
	return slices.Compact(missing)
}
