// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"maps"
	"slices"
)

// multiplexers are calls that reach others by their first argument: net/socket.c
// and ipc/syscall.c. They exist on x86 (32-bit), s390, ppc, mips, sparc, m68k, sh.
var multiplexers = map[string][]string{
	"socketcall": {
		"socket", "bind", "connect", "listen", "accept", "getsockname", "getpeername", "socketpair",
		"send", "recv", "sendto", "recvfrom", "shutdown", "setsockopt", "getsockopt",
		"sendmsg", "recvmsg", "accept4", "recvmmsg", "sendmmsg", "recvmmsg_time64",
	},
	"ipc": {
		"semop", "semget", "semctl", "semtimedop", "msgsnd", "msgrcv", "msgget", "msgctl",
		"shmat", "shmdt", "shmget", "shmctl",
	},
}

// Multiplexed lists the calls that socketcall or ipc reaches; nil for any other
// name.
func Multiplexed(name string) []string { return slices.Clone(multiplexers[name]) }

// Multiplexers lists, sorted, those of socketcall and ipc that reach one of calls.
func Multiplexers(calls []string) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(multiplexers)) {
		if slices.ContainsFunc(multiplexers[name], func(c string) bool { return slices.Contains(calls, c) }) {
			out = append(out, name)
		}
	}
	return out
}
