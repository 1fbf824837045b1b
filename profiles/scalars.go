// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	_ "embed"
	"strings"
	"sync"
)

// scalars.txt has a line for each call: its name and a letter for each argument, i
// for a number of 32 bits, l for one of 64, p for a pointer. It is made of the kernel's own description of its
// calls (events/syscalls/*/format of tracefs, 6.18 on x86_64). Not in it are calls
// without arguments, those that only i386 has, and those that the kernel described
// there lacks.
//
//go:embed scalars.txt
var scalarsText string

var scalars = sync.OnceValue(func() map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(scalarsText) {
		name, kinds, _ := strings.Cut(strings.TrimSpace(line), " ")
		out[name] = kinds
	}
	return out
})

// ScalarArgument says whether an argument (from 0) of a call is a number, which a
// filter sees whole. What a pointer points at it doesn't see, and a supervisor that
// looks may be shown something else than the kernel later reads. A number that the
// kernel takes for an address, such as the third argument of ioctl for most of its
// commands, counts as one: its value can be compared, its meaning is lost.
func ScalarArgument(name string, index uint) bool {
	kinds := scalars()[name]
	return index < uint(len(kinds)) && kinds[index] != 'p'
}

// narrow says whether the kernel looks at the lower 32 bits of an argument only: an
// int of -100 may come with its upper bits set or not, as the compiler likes.
func narrow(name string, index uint) bool {
	kinds := scalars()[name]
	return index < uint(len(kinds)) && kinds[index] == 'i'
}
