// SPDX-License-Identifier: Apache-2.0

// Package profiles is syslatch's domain: what a recording is, how recordings
// become versions of a profile, and how all of it is written down. It knows no
// kernel interface, runtime or log.
//
//	v1, _, err := profiles.Merge(nil, recording, profiles.MergeOptions{})
//	v2, delta, err := profiles.Merge(v1, another, profiles.MergeOptions{})
//	// v2 is nil if another brought nothing new
//
// Phases are named sets of calls of which one is in force at a time; what several
// allow is compiled into one filter and the tables that go with it:
//
//	plan, err := profiles.CompilePhases(set, host, profiles.PhaseOptions{})
//	plan.Profile                                       // the container's filter
//	plan.Table("network", number).Decide(abi, nr, args) // what it asks about
//
// # ABIs
//
// A recording and a manifest keep calls by ABI. A profile can't: an OCI rule
// holds for every architecture that the profile lists. So what was recorded
// under any ABI is allowed under all that were recorded, and a call under an ABI
// that was not kills its thread (libseccomp's answer to a bad architecture).
// Whoever wants to know what was really done reads Manifest.Calls.
//
// # The errno of what is denied
//
// A profile's default answer is EPERM: a program sees a plain refusal, and most
// report it well. But libc asks for newer calls first and falls back to older
// ones only on ENOSYS. So calls that the recording kernel didn't have, which no
// run there can have made, are answered ENOSYS by rules of their own: on a newer
// kernel the program behaves as it did where it was recorded. What this can't
// reach is what libseccomp has no name for. There runc answers ENOSYS by itself
// to every number above the highest that the profile names, `syslatch run` does
// to numbers above the kernel's last, and crun answers EPERM.
//
// NRI drops a profile's default errno (the runtime then uses EPERM) and keeps
// those of single rules, which is all that this needs.
package profiles
