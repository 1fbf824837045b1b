// SPDX-License-Identifier: Apache-2.0

// Package bpf records, in the kernel, which system calls the tasks of tracked
// cgroups make.
//
// It owns the BPF programs, their maps and their pins. It knows cgroup ids,
// slots and numbers: which container a cgroup is, what a call is named and
// what becomes of a recording are its callers' business.
//
//	r, err := bpf.Open("/sys/fs/bpf/syslatch", bpf.Options{})
//	h, err := r.Track(cgroupID, bpf.TrackOptions{Gate: bpf.GateFilter, BaseFilters: n})
//	// start the container, let it run
//	s, err := r.Finish(h)  // nothing is recorded any more
//	// keep s in a safe place
//	err = r.Release(h)     // the slot is free
//
// # What is recorded
//
// An instance is a cgroup and its descendants, be they made before or after:
// children that are made while the instance is tracked join it by themselves,
// those that exist already are named with [Recorder.AddCgroup]. For each phase
// and ABI of an instance there is a bitmap of 1,024 call numbers, which the
// programs set; nothing streams for each call, so nothing can be dropped.
// Numbers that no bitmap holds are listed, up to 32 of them. The values of some
// arguments are kept as sets of up to 32, see [ArgSet].
//
// A [Gate] decides from when on a task's calls count. What could not be kept is
// counted in [Losses].
//
// Calls are seen where seccomp has let them through, and those through the
// vsyscall page, which it judges too.
//
// BUG(bpf): a call that a filter answers itself is not seen. For an enforced
// profile that is as it should be, and for a program's own filter that denies it
// makes no difference; but where a program has its own calls answered by a
// supervisor or a tracer (SECCOMP_RET_USER_NOTIF, SECCOMP_RET_TRACE), a profile of
// the recording denies them first.
//
// BUG(bpf): a task that is moved to a cgroup outside of the instance is no longer
// recorded, and nothing counts that. It takes write access to the hierarchy.
//
// BUG(bpf): a helper that joins an instance with more filters than BaseFilters,
// such as an exec from a service that is confined more tightly than the one that
// started the container, is recorded from its first call on: too much, never too
// little.
//
// # Pins
//
// Maps, programs and links are pinned in a directory of a bpffs, below one
// named after the layout of the maps. A process that is killed loses nothing:
// recording goes on without it, and the next Open finds every instance. Any
// number of processes may use one directory; a lock on it serialises them while
// slots are taken and given back. Programs are attached while an instance is
// tracked, by whichever process, and not a moment longer: attached, they cost
// every task of the host some 90 ns a call.
//
// # Kernels
//
// Linux 6.1 or later on x86_64, with BTF and cgroup version 2, mounted as
// hybrid or unified. The caller needs CAP_BPF, CAP_PERFMON and, for the pins,
// write access to a bpffs. [Probe] says what a host has.
//
// # Errors
//
// [ErrFull], [ErrTracked], [ErrUnknown], [ErrLayout], [ErrBusy] and
// [ErrUnsupported] are what callers decide on. All other errors are the
// kernel's, wrapped with what was attempted.
package bpf
