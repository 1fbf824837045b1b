// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// seccompData is struct seccomp_data of linux/seccomp.h.
type seccompData struct {
	nr, arch uint32
	ip       uint64
	args     [6]uint64
}

func (d *seccompData) bytes() (b [64]byte) {
	binary.LittleEndian.PutUint32(b[0:], d.nr)
	binary.LittleEndian.PutUint32(b[4:], d.arch)
	binary.LittleEndian.PutUint64(b[8:], d.ip)
	for i, a := range d.args {
		binary.LittleEndian.PutUint64(b[16+8*i:], a)
	}
	return b
}

// run interprets a filter as the kernel does (net/core/filter.c, with the
// subset that seccomp_check_filter lets pass): loads are of aligned words in
// host order, which is why x/net/bpf, whose loads are big-endian, won't do.
// What the kernel would refuse to load is an error here.
func run(f Filter, d *seccompData) (uint32, error) {
	data := d.bytes()
	var a, x uint32
	var mem [16]uint32
	for pc := 0; pc < len(f); pc++ {
		in := f[pc]
		operand := in.K
		if in.Code&unix.BPF_X != 0 {
			operand = x
		}
		switch in.Code & 0x07 {
		case unix.BPF_LD:
			switch in.Code {
			case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
				if in.K%4 != 0 || in.K >= uint32(len(data)) {
					return 0, fmt.Errorf("%d: load at offset %d", pc, in.K)
				}
				a = binary.LittleEndian.Uint32(data[in.K:])
			case unix.BPF_LD | unix.BPF_IMM:
				a = in.K
			case unix.BPF_LD | unix.BPF_MEM:
				a = mem[in.K%16]
			default:
				return 0, fmt.Errorf("%d: code %#x", pc, in.Code)
			}
		case unix.BPF_LDX:
			switch in.Code {
			case unix.BPF_LDX | unix.BPF_IMM:
				x = in.K
			case unix.BPF_LDX | unix.BPF_MEM:
				x = mem[in.K%16]
			default:
				return 0, fmt.Errorf("%d: code %#x", pc, in.Code)
			}
		case unix.BPF_ST:
			mem[in.K%16] = a
		case unix.BPF_STX:
			mem[in.K%16] = x
		case unix.BPF_ALU:
			switch in.Code & 0xf0 {
			case unix.BPF_AND:
				a &= operand
			case unix.BPF_OR:
				a |= operand
			case unix.BPF_RSH:
				a >>= operand
			default:
				return 0, fmt.Errorf("%d: code %#x", pc, in.Code)
			}
		case unix.BPF_JMP:
			var taken bool
			switch in.Code & 0xf0 {
			case unix.BPF_JA:
				pc += int(in.K)
				continue
			case unix.BPF_JEQ:
				taken = a == operand
			case unix.BPF_JGT:
				taken = a > operand
			case unix.BPF_JGE:
				taken = a >= operand
			case unix.BPF_JSET:
				taken = a&operand != 0
			default:
				return 0, fmt.Errorf("%d: code %#x", pc, in.Code)
			}
			if taken {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		case unix.BPF_RET:
			if in.Code&0x18 == unix.BPF_A {
				return a, nil
			}
			return in.K, nil
		case unix.BPF_MISC:
			if in.Code&0xf8 == unix.BPF_TXA {
				a = x
			} else {
				x = a
			}
		}
	}
	return 0, fmt.Errorf("ran off the end of %d instructions", len(f))
}
