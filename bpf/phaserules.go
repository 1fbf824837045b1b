// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
)

// What one phase may have.
const (
	MaxTrees        = 64 // of each kind
	MaxTreeLength   = 245
	MaxDestinations = 256
	MaxPorts        = 16 // of one prefix, those of prefixes around it included
)

// FamilySet is a set of address families: a bit for each number. The kernel knows
// none above 63.
type FamilySet uint64

// AllFamilies is every family there is.
const AllFamilies = ^FamilySet(0)

// Families makes a set.
func Families(families ...int) FamilySet {
	var s FamilySet
	for _, f := range families {
		if f >= 0 && f < 64 {
			s |= 1 << f
		}
	}
	return s
}

// PhaseRules are what the programs let pass in one phase. The zero value lets
// nothing pass; [AnyPhase] is the start for the rest.
//
// An open is for writing if it writes, creates or truncates. An execve's own opens
// are no opens here: Exec decides.
type PhaseRules struct {
	OpenRead, OpenWrite bool
	// ReadTrees and WriteTrees are files and directories, as absolute clean paths,
	// with all below them, where an open for reading and for writing may be; nil is
	// anywhere. They are names in the mount namespace of the instance: a task that
	// has another root than its mount namespace's opens nothing.
	ReadTrees, WriteTrees []string
	// ReadFiles and WriteFiles are for regular files that are open: whether they are
	// read and written, mapped so, and truncated.
	ReadFiles, WriteFiles bool

	Exec bool

	// Families are those of sockets that may be made; Send and Receive of those that
	// may be used. What socketpair(2) makes is used as pipes are, whatever they say.
	Families, Send, Receive       FamilySet
	Connect, Bind, Listen, Accept bool
	// Destinations are where sockets may reach, by connecting, by sending, and by
	// using a connection that is there, whichever side began it; nil is anywhere.
	Destinations *Destinations
}

// AnyPhase lets everything pass.
func AnyPhase() PhaseRules {
	return PhaseRules{
		OpenRead: true, OpenWrite: true, ReadFiles: true, WriteFiles: true, Exec: true,
		Families: AllFamilies, Send: AllFamilies, Receive: AllFamilies,
		Connect: true, Bind: true, Listen: true, Accept: true,
	}
}

// Destinations are addresses. Of families other than unix, version 4 and version 6
// there are none.
type Destinations struct {
	Unix     bool // any
	Prefixes []Destination
}

// Destination is a prefix at one port, or at any if that is 0. Protocols that have no
// ports, raw sockets among them, reach prefixes with any port only.
type Destination struct {
	Prefix netip.Prefix
	Port   uint16
}

// PhaseSet is an instance's phases, by number, from 0 to [Phases]-1. Numbers that
// aren't in it can't be set.
type PhaseSet map[uint8]PhaseRules

func (s PhaseSet) check() error {
	if len(s) == 0 {
		return errors.New("no phases: give the rules of one at least")
	}
	for n, r := range s {
		if n >= Phases {
			return fmt.Errorf("phase %d: give one below %d", n, Phases)
		}
		if err := r.check(); err != nil {
			return fmt.Errorf("phase %d: %w", n, err)
		}
	}
	return nil
}

func (r *PhaseRules) check() error {
	for _, trees := range [][]string{r.ReadTrees, r.WriteTrees} {
		if len(trees) > MaxTrees {
			return fmt.Errorf("%d trees of one kind: give at most %d", len(trees), MaxTrees)
		}
		for _, t := range trees {
			if !strings.HasPrefix(t, "/") || t != "/" && strings.HasSuffix(t, "/") || strings.Contains(t, "//") ||
				strings.Contains(t, "\x00") || strings.Contains(t+"/", "/./") || strings.Contains(t+"/", "/../") {
				return fmt.Errorf("tree %.300q is no absolute clean path", t)
			}
			if len(t) > MaxTreeLength {
				return fmt.Errorf("tree %.300q: give one of at most %d bytes", t, MaxTreeLength)
			}
		}
	}
	if r.Destinations == nil {
		return nil
	}
	if n := len(r.Destinations.Prefixes); n > MaxDestinations {
		return fmt.Errorf("%d destinations: give at most %d", n, MaxDestinations)
	}
	for _, d := range r.Destinations.Prefixes {
		if !d.Prefix.IsValid() || d.Prefix != d.Prefix.Masked() {
			return fmt.Errorf("destination %s is no prefix", d.Prefix)
		}
	}
	_, err := r.Destinations.table()
	return err
}

// table has for each prefix all ports at which it is reached, as the kernel's map
// tells of an address the longest prefix alone; nil is any port.
func (d *Destinations) table() (map[netip.Prefix][]uint16, error) {
	out := map[netip.Prefix][]uint16{}
	plain := make([]Destination, len(d.Prefixes))
	for i, p := range d.Prefixes {
		// Addresses are looked up in their shorter form.
		if a := p.Prefix.Addr(); a.Is4In6() && p.Prefix.Bits() >= 96 {
			p.Prefix = netip.PrefixFrom(a.Unmap(), p.Prefix.Bits()-96)
		}
		plain[i] = p
	}
	for _, p := range plain {
		if _, done := out[p.Prefix]; done {
			continue
		}
		var ports []uint16
		anywhere := false
		for _, q := range plain {
			if q.Prefix.Bits() <= p.Prefix.Bits() && q.Prefix.Contains(p.Prefix.Addr()) {
				anywhere = anywhere || q.Port == 0
				ports = append(ports, q.Port)
			}
		}
		slices.Sort(ports)
		ports = slices.Compact(ports)
		switch {
		case anywhere:
			ports = nil
		case len(ports) > MaxPorts:
			return nil, fmt.Errorf("destination %s has %d ports: give at most %d, or none for all", p.Prefix, len(ports), MaxPorts)
		}
		out[p.Prefix] = ports
	}
	return out, nil
}

// hooks is a set of phasesPhaseHook.
type hooks uint32

func hookSet(list ...phasesPhaseHook) hooks {
	var s hooks
	for _, h := range list {
		s |= 1 << h
	}
	return s
}

// names lists the programs at a set's hooks, as section names.
func (s hooks) names() []string {
	var out []string
	for _, p := range phasePrograms {
		if p.hook >= 0 && s&(1<<p.hook) != 0 {
			out = append(out, p.section)
		}
	}
	return out
}

// The programs that look at addresses, in either way.
var (
	addressLSM    = hookSet(phasesPhaseHookHOOK_SOCKET_CONNECT, phasesPhaseHookHOOK_SOCKET_SENDMSG)
	addressCgroup = hookSet(phasesPhaseHookHOOK_CONNECT4, phasesPhaseHookHOOK_CONNECT6, phasesPhaseHookHOOK_SENDMSG4, phasesPhaseHookHOOK_SENDMSG6)
	truncating    = hookSet(phasesPhaseHookHOOK_PATH_TRUNCATE, phasesPhaseHookHOOK_FILE_TRUNCATE)
	anySocket     = hookSet(phasesPhaseHookHOOK_SOCKET_SENDMSG, phasesPhaseHookHOOK_SOCKET_RECVMSG, phasesPhaseHookHOOK_FILE_PERMISSION)
)

// needs is every hook that has to say no in some phase.
func (s PhaseSet) needs() hooks {
	var out hooks
	for _, r := range s {
		for _, n := range []struct {
			allowed bool
			hooks   hooks
		}{
			{r.OpenRead && r.OpenWrite && r.ReadTrees == nil && r.WriteTrees == nil, hookSet(phasesPhaseHookHOOK_FILE_OPEN)},
			{r.OpenWrite, hookSet(phasesPhaseHookHOOK_INODE_CREATE)},
			{r.ReadFiles && r.WriteFiles, hookSet(phasesPhaseHookHOOK_FILE_PERMISSION, phasesPhaseHookHOOK_MMAP_FILE)},
			{r.WriteFiles, truncating | hookSet(phasesPhaseHookHOOK_FILE_MPROTECT)},
			{r.Exec, hookSet(phasesPhaseHookHOOK_BPRM_CHECK)},
			{r.Families == AllFamilies, hookSet(phasesPhaseHookHOOK_SOCKET_CREATE)},
			{r.Connect, hookSet(phasesPhaseHookHOOK_SOCKET_CONNECT)},
			{r.Bind, hookSet(phasesPhaseHookHOOK_SOCKET_BIND)},
			{r.Listen, hookSet(phasesPhaseHookHOOK_SOCKET_LISTEN)},
			{r.Accept, hookSet(phasesPhaseHookHOOK_SOCKET_ACCEPT)},
			{r.Send == AllFamilies && r.Receive == AllFamilies, anySocket},
			{r.Destinations == nil, addressLSM | addressCgroup | anySocket | hookSet(phasesPhaseHookHOOK_SOCKET_CREATE)},
		} {
			if !n.allowed {
				out |= n.hooks
			}
		}
	}
	return out
}

// lacks is what of a set's needs isn't had with some hooks. Either way of looking at
// addresses is one too many; ftruncate(2) passes either of two hooks, as the kernel is.
func (s PhaseSet) lacks(have hooks) hooks {
	out := s.needs() &^ have
	if have&truncating != 0 {
		out &^= truncating &^ hookSet(phasesPhaseHookHOOK_PATH_TRUNCATE)
	}
	if have&addressLSM == addressLSM {
		out &^= addressCgroup
	}
	return out
}

// raw is the rules as the programs read them.
func (r *PhaseRules) raw() phasesPhaseRules {
	out := phasesPhaseRules{Families: uint64(r.Families), Send: uint64(r.Send), Receive: uint64(r.Receive)}
	allow := func(yes bool, bit phasesPhaseAllow) {
		if yes {
			out.Allow |= uint32(bit)
		}
	}
	limit := func(yes bool, bit phasesPhaseLimit) {
		if yes {
			out.Limit |= uint32(bit)
		}
	}
	allow(r.OpenRead, phasesPhaseAllowALLOW_OPEN_READ)
	allow(r.OpenWrite, phasesPhaseAllowALLOW_OPEN_WRITE)
	allow(r.ReadFiles, phasesPhaseAllowALLOW_FILE_READ)
	allow(r.WriteFiles, phasesPhaseAllowALLOW_FILE_WRITE)
	allow(r.Exec, phasesPhaseAllowALLOW_EXEC)
	allow(r.Connect, phasesPhaseAllowALLOW_CONNECT)
	allow(r.Bind, phasesPhaseAllowALLOW_BIND)
	allow(r.Listen, phasesPhaseAllowALLOW_LISTEN)
	allow(r.Accept, phasesPhaseAllowALLOW_ACCEPT)
	allow(r.Destinations == nil || r.Destinations.Unix, phasesPhaseAllowALLOW_UNIX)
	limit(r.ReadTrees != nil, phasesPhaseLimitLIMIT_READ_TREES)
	limit(r.WriteTrees != nil, phasesPhaseLimitLIMIT_WRITE_TREES)
	limit(r.Destinations != nil, phasesPhaseLimitLIMIT_DESTINATIONS)
	return out
}

// trees are the keys of a phase's trees.
func (r *PhaseRules) trees(h PhaseHandle, phase uint8) []phasesTreeKey {
	var out []phasesTreeKey
	for kind, trees := range [][]string{
		phasesTreeKindTREE_READ:  r.ReadTrees,
		phasesTreeKindTREE_WRITE: r.WriteTrees,
	} {
		for _, t := range trees {
			key := phasesTreeKey{Slot: h.Slot, Generation: h.Generation, Phase: phase, Kind: uint8(kind)}
			t = strings.TrimSuffix(t, "/") + "/"
			for i := range len(t) {
				key.Path[i] = int8(t[i])
			}
			key.Bits = uint32(8 * (binary.Size(key) - 4 - len(key.Path) + len(t)))
			out = append(out, key)
		}
	}
	return out
}

// destinations are the entries of a phase's table of addresses.
func (r *PhaseRules) destinations(h PhaseHandle, phase uint8) (map[phasesDestinationKey]phasesDestinationPorts, error) {
	if r.Destinations == nil {
		return nil, nil
	}
	table, err := r.Destinations.table()
	if err != nil {
		return nil, err
	}
	out := map[phasesDestinationKey]phasesDestinationPorts{}
	for prefix, ports := range table {
		key := phasesDestinationKey{Slot: h.Slot, Generation: h.Generation, Phase: phase, Family: 6}
		if prefix.Addr().Is4() {
			key.Family = 4
		}
		addr := prefix.Addr().AsSlice()
		for i := range len(addr) / 4 {
			key.Addr[i] = binary.NativeEndian.Uint32(addr[4*i:])
		}
		key.Bits = uint32(8*(binary.Size(key)-4-len(key.Addr)*4) + prefix.Bits())
		value := phasesDestinationPorts{N: uint32(len(ports))}
		if ports == nil {
			value.N = ^uint32(0)
		}
		for i, p := range ports {
			value.Ports[i] = bits.ReverseBytes16(p) // network byte order
		}
		out[key] = value
	}
	return out, nil
}
