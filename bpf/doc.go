// SPDX-License-Identifier: Apache-2.0

// Package bpf records, in the kernel, which system calls the tasks of tracked
// cgroups make ([Recorder]), and denies by phase what they ask for ([Enforcer]).
//
// It owns the BPF programs, their maps and their pins. It knows cgroup ids,
// slots and numbers: which container a cgroup is, what a call or a phase is
// named and what becomes of a recording are its callers' business.
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
// # Phases
//
// An Enforcer has programs at hooks of the kernel's that can say no: BPF LSM's, and
// those of cgroups that look at addresses. What they let pass in each phase of an
// instance is a [PhaseRules]; which phase it is, one word of memory:
//
//	e, err := bpf.OpenEnforcer("/sys/fs/bpf/syslatch-phases", bpf.EnforcerOptions{})
//	h, err := e.Add(cgroupID, bpf.PhaseSet{0: reading, 1: writing}, bpf.EnforceOptions{Dir: dir})
//	err = e.Set(h, 1)
//	err = e.Remove(h)
//
// Each program is loaded by itself, where the kernel takes it ([Enforcer.Missing]),
// and attached while an instance needs it. Tasks belong to instances as they do to
// the recorder's; what the map of cgroups has no room for is looked for among
// ancestors. What the programs can't tell they deny, and count ([Enforcer.Errors]).
//
// A container runtime's processes are in the cgroup before they execute the program,
// and do there what a phase may deny. With [EnforceOptions].Starting and Entered nothing
// is denied to them until then.
//
// BUG(bpf): a path is looked at where a file is opened. WriteTrees and ReadTrees say
// nothing of files that are open, nor of rename, link, mkdir and their kin; a file
// that an open makes outside of them is denied and stays, empty.
//
// BUG(bpf): mappings that are shared and writable stay so when the phase changes.
//
// BUG(bpf): programs of cgroups run for sockets that were made in the cgroup. Those
// that a task brought along are judged by BPF LSM only; so are raw ones.
//
// BUG(bpf): on an overlay, a change of a file's mode or owner that copies it up makes
// a file, which phases without OpenWrite deny.
//
// # Kernels
//
// Linux 6.1 or later on x86_64, with BTF and cgroup version 2, mounted as
// hybrid or unified. The caller needs CAP_BPF, CAP_PERFMON and, for the pins,
// write access to a bpffs; an Enforcer's programs of cgroups take CAP_NET_ADMIN
// beside. [Probe] says what a host has.
//
// # Errors
//
// [ErrFull], [ErrEnforcerFull], [ErrTracked], [ErrUnknown], [ErrLayout], [ErrBusy] and
// [ErrUnsupported], of which [MissingError] is one, are what callers decide on. All
// other errors are the kernel's, wrapped with what was attempted.
package bpf
