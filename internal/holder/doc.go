// SPDX-License-Identifier: Apache-2.0

// Package holder keeps descriptors for a process that may be killed. A seccomp
// listener whose last descriptor is closed answers ENOSYS to all that its filter asks
// about, and the workload breaks; as long as a holder has one, what is asked waits
// until the next syslatchd serves it.
//
// The holder is a process of its own that does nothing else ([Run]). It is started by
// the first [Open] and ends by itself when it holds nothing and nobody is connected; at
// a SIGTERM, as of a machine that is shut down, as soon as it holds nothing.
// A descriptor that polls POLLHUP, as that of a listener without tasks, it lets go of.
//
//	h, err := holder.Open(ctx, socket, start)
//	err = h.Keep("4f2a 1", file)   // durable until the holder ends
//	kept, err := h.Kept()          // by a later process: what is there, by name
//	err = h.Drop("4f2a 1")
//
// The socket lies in a directory that is root's alone; who can connect may take
// everything.
package holder
