// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// HookRules is what the programs of a plan's Hooks let pass in one phase, as plain
// data: what is nobody's business in the phase passes. package bpf has programs that
// take it.
type HookRules struct {
	// OpenRead and OpenWrite are opens: those that write, create or truncate, and the
	// others.
	OpenRead, OpenWrite bool
	// ReadPaths and WritePaths are as in [Phase]: nil is anywhere.
	ReadPaths, WritePaths []string
	// WriteFiles are regular files that are open.
	WriteFiles bool
	Exec       bool
	// Families are those of which sockets may be made, a bit for each number; Send
	// and Receive those of which sockets that exist may be used. The kernel has no
	// family above 63.
	Families, Send, Receive       uint64
	Connect, Bind, Listen, Accept bool
	// Network is as in [Phase]: nil is anywhere.
	Network []string
}

const allFamilies = ^uint64(0)

// hook finds the programs that decide some calls, or have something to do beside.
func (p *PhasePlan) hook(program string) *PhaseHook {
	i := slices.IndexFunc(p.Hooks, func(h PhaseHook) bool { return h.Program == program })
	if i < 0 {
		return nil
	}
	return &p.Hooks[i]
}

// HookRules says what the programs of Hooks let pass in a phase, or in [StartPhase].
// Phases that don't exist let nothing pass.
func (p *PhasePlan) HookRules(phase string) HookRules {
	ph := p.phase(phase)
	if ph == nil && phase != StartPhase {
		return HookRules{ReadPaths: []string{}, WritePaths: []string{}, Network: []string{}}
	}
	r := HookRules{WriteFiles: true}
	// has says whether a hook lets pass what it sees as a value.
	has := func(program string, value uint64) bool {
		h := p.hook(program)
		return h == nil || h.regions == nil || h.regions[phase].has(specs.ArchX86_64, [6]uint64{value})
	}
	r.OpenRead, r.OpenWrite = has("lsm/file_open", 0), has("lsm/file_open", openWrites)
	r.Connect, r.Bind = has("lsm/socket_connect", 0), has("lsm/socket_bind", 0)
	r.Listen, r.Accept = has("lsm/socket_listen", 0), has("lsm/socket_accept", 0)
	r.Exec = has("lsm/bprm_check_security", 0)
	for family := range uint64(64) {
		if has("lsm/socket_create", family) {
			r.Families |= 1 << family
		}
	}
	r.Send, r.Receive = allFamilies, allFamilies
	if ph == nil {
		return r
	}
	if p.hook("lsm/file_open") != nil {
		r.ReadPaths, r.WritePaths = ph.ReadPaths, ph.WritePaths
		if ph.WritePaths != nil && len(ph.WritePaths) == 0 {
			r.OpenWrite = false
		}
	}
	if h := p.hook("lsm/file_permission"); h != nil {
		r.WriteFiles = h.Allows[phase] != onlyReading
	}
	for _, program := range []string{cgroupAddresses, lsmAddresses} {
		if h := p.hook(program); h != nil && ph.Network != nil {
			r.Network = ph.Network
		}
	}
	if h := p.hook(lsmOpenSockets); h != nil {
		switch h.Allows[phase] {
		case anySocket:
		case noSocket:
			r.Send, r.Receive = 0, 0
		default:
			r.Network = ph.Network
			var families uint64
			for _, f := range ph.families() {
				families |= 1 << f
			}
			r.Send, r.Receive = families, families
		}
	}
	return r
}
