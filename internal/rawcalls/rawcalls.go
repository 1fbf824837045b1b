// SPDX-License-Identifier: Apache-2.0

// Package rawcalls makes system calls with nothing in between: from the first
// to the last of a list the thread makes no call that the list doesn't name, so
// that a test knows exactly what a recorder must have seen. It also makes those
// that Go has no way to: through the 32-bit gate, and by numbers that are none.
package rawcalls

// Call is one system call. The layout is known to the assembly.
type Call struct {
	Number uint64
	Args   [6]uint64
	Gate32 uint64 // 1: int $0x80, with the first five arguments
	Times  uint64 // how often; 0 is once
	Result uint64 // of the last time; negative errno if it failed
}

// Run makes the calls in order. The caller locks the thread, and keeps alive
// what the arguments point to.
func Run(calls []Call) {
	if len(calls) > 0 {
		run(&calls[0], len(calls))
	}
}

//go:noescape
func run(first *Call, n int)
