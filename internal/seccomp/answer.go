// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"fmt"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// Verdict is what a filter answers to a call: an action of linux/seccomp.h
// (SECCOMP_RET_*) with its 16 bits of data.
type Verdict uint32

// LetsPass says whether the kernel makes the call.
func (v Verdict) LetsPass() bool {
	a := uint32(v) & unix.SECCOMP_RET_ACTION_FULL
	return a == unix.SECCOMP_RET_ALLOW || a == unix.SECCOMP_RET_LOG
}

// Kills says whether the call ends its thread or process.
func (v Verdict) Kills() bool {
	a := uint32(v) & unix.SECCOMP_RET_ACTION_FULL
	return a == unix.SECCOMP_RET_KILL_PROCESS || a == unix.SECCOMP_RET_KILL_THREAD
}

func (v Verdict) String() string {
	data := uint32(v) & unix.SECCOMP_RET_DATA
	switch uint32(v) & unix.SECCOMP_RET_ACTION_FULL {
	case unix.SECCOMP_RET_ALLOW:
		return "allowed"
	case unix.SECCOMP_RET_LOG:
		return "logged"
	case unix.SECCOMP_RET_ERRNO:
		if name := unix.ErrnoName(unix.Errno(data)); name != "" {
			return name
		}
		return fmt.Sprintf("errno %d", data)
	case unix.SECCOMP_RET_TRAP:
		return "SIGSYS"
	case unix.SECCOMP_RET_TRACE:
		return "left to a tracer"
	case unix.SECCOMP_RET_USER_NOTIF:
		return "left to a supervisor"
	case unix.SECCOMP_RET_KILL_THREAD:
		return "the thread is killed"
	case unix.SECCOMP_RET_KILL_PROCESS:
		return "the process is killed"
	}
	return fmt.Sprintf("%#x", uint32(v))
}

// Answer is a filter's verdict on one call with its arguments, at instruction
// pointer 0. A call of x32 has its bit in nr.
func (f Filter) Answer(abi profiles.ABI, nr uint32, args [6]uint64) (Verdict, error) {
	arch, ok := auditArch[abi]
	if abi == specs.ArchX32 {
		arch, ok = auditArch[specs.ArchX86_64], true
	}
	if !ok {
		return 0, fmt.Errorf("no filter is known for %s", abi)
	}
	v, err := run(f, &seccompData{nr: nr, arch: arch, args: args})
	return Verdict(v), err
}

// Answers are all verdicts that a filter may have on one call, whatever its
// arguments: never one too few, and one too many only where a filter contradicts
// itself or computes (libseccomp's don't).
func (f Filter) Answers(abi profiles.ABI, nr uint32) ([]Verdict, error) {
	arch, ok := auditArch[abi]
	if abi == specs.ArchX32 {
		arch, ok = auditArch[specs.ArchX86_64], true
	}
	if !ok {
		return nil, fmt.Errorf("no filter is known for %s", abi)
	}
	// known is the accumulator's value, where it depends on nr and arch alone.
	type known struct {
		value uint32
		is    bool
	}
	type place struct {
		pc int
		a  known
	}
	// Jumps go forward only, so one pass sees all. Hardly any place is reached with more
	// than one value.
	type reached struct {
		once bool
		a    known
		more []known
	}
	at := make([]reached, len(f)+1)
	reach := func(p place) {
		p.pc = min(p.pc, len(f))
		switch r := &at[p.pc]; {
		case !r.once:
			r.once, r.a = true, p.a
		case r.a != p.a && !slices.Contains(r.more, p.a):
			r.more = append(r.more, p.a)
		}
	}
	reach(place{})
	var out []Verdict
	follow := func(p place) error {
		in, next := f[p.pc], place{p.pc + 1, known{}} // what isn't followed is not known
		switch in.Code & 0x07 {
		case unix.BPF_LD:
			switch {
			case in.Code == unix.BPF_LD|unix.BPF_W|unix.BPF_ABS && in.K == 0:
				next.a = known{nr, true}
			case in.Code == unix.BPF_LD|unix.BPF_W|unix.BPF_ABS && in.K == 4:
				next.a = known{arch, true}
			case in.Code == unix.BPF_LD|unix.BPF_IMM:
				next.a = known{in.K, true}
			}
		case unix.BPF_LDX, unix.BPF_ST, unix.BPF_STX:
			next.a = p.a
		case unix.BPF_ALU:
			if p.a.is && in.Code == unix.BPF_ALU|unix.BPF_AND|unix.BPF_K {
				next.a = known{p.a.value & in.K, true}
			}
		case unix.BPF_MISC:
			if in.Code&0xf8 != unix.BPF_TXA {
				next.a = p.a
			}
		case unix.BPF_JMP:
			yes, no := p, p
			yes.pc, no.pc = p.pc+1+int(in.Jt), p.pc+1+int(in.Jf)
			if in.Code&0xf0 == unix.BPF_JA {
				yes.pc += int(in.K)
				reach(yes)
				return nil
			}
			taken, decided := false, p.a.is && in.Code&unix.BPF_X == 0
			switch in.Code & 0xf0 {
			case unix.BPF_JEQ:
				taken = p.a.value == in.K
			case unix.BPF_JGT:
				taken = p.a.value > in.K
			case unix.BPF_JGE:
				taken = p.a.value >= in.K
			case unix.BPF_JSET:
				taken = p.a.value&in.K != 0
			default:
				decided = false
			}
			if !decided || taken {
				reach(yes)
			}
			if !decided || !taken {
				reach(no)
			}
			return nil
		case unix.BPF_RET:
			switch in.Code & 0x18 {
			case unix.BPF_A:
				if !p.a.is {
					return fmt.Errorf("%d: returns what it computes", p.pc)
				}
				out = append(out, Verdict(p.a.value))
			default:
				out = append(out, Verdict(in.K))
			}
			return nil
		}
		reach(next)
		return nil
	}
	for pc := range f {
		r := &at[pc]
		if !r.once {
			continue
		}
		if err := follow(place{pc, r.a}); err != nil {
			return nil, err
		}
		for _, a := range r.more {
			if err := follow(place{pc, a}); err != nil {
				return nil, err
			}
		}
	}
	if at[len(f)].once {
		return nil, fmt.Errorf("ran off the end of %d instructions", len(f))
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// Adds says whether a filter denies, of x86_64's calls and with some arguments,
// anything that filters which are in force don't deny with all. The first such
// call's name is for people.
func (f Filter) Adds(present []Filter) (name string, adds bool, err error) {
	denies := func(f Filter, nr uint32) (some, all bool, err error) {
		verdicts, err := f.Answers(specs.ArchX86_64, nr)
		for _, v := range verdicts {
			some = some || !v.LetsPass()
		}
		return some, err == nil && !slices.ContainsFunc(verdicts, Verdict.LetsPass), err
	}
	for _, n := range append(slices.Clone(numbersOf()[specs.ArchX86_64]), number{unnamed, ""}) {
		some, _, err := denies(f, n.nr)
		if err != nil {
			return "", false, err
		}
		covered := !some
		for _, p := range present {
			if covered {
				break
			}
			if _, covered, err = denies(p, n.nr); err != nil {
				return "", false, err
			}
		}
		if !covered {
			return call(n), true, nil
		}
	}
	return "", false, nil
}
