// SPDX-License-Identifier: Apache-2.0

// Package phase owns which phase an instance is in, and that the phase holds: it
// answers what the instance's filter asks about (SCMP_ACT_NOTIFY), and makes a switch
// hold for every task before it says so.
//
//	s := phase.NewSupervisor(phase.Options{Log: log, Events: audit})
//	in, err := s.Add(phase.Instance{ID: id, Policy: p.Name, Set: p.Set(), Plan: plan, Barrier: freezer})
//	…
//	in.Serve(listener)                                 // each filter chain has one
//	status, err := s.Set(ctx, id, "network", phase.SetOptions{})
//	…
//	s.End(id)
//
// # A switch
//
// In this order, and one at a time for an instance:
//
//  1. May it be? The policy's transitions; from inside, only what tightens. If not, a
//     [*TransitionError], and nothing has changed.
//  2. Hooks: the programs that say no by phase are told, when Keep has kept the phase. If
//     that fails nothing has changed.
//  3. The table that answers by is replaced, in one atomic write. New calls are judged
//     by the new phase from here on.
//  4. The barrier: every task is stopped once. A call that was blocked in the kernel is
//     made again and asked about again; one that was answered by the old table is over.
//  5. Limits.
//  6. The ratchet, if the phase is irreversible.
//
// What fails behind 3, or takes longer than the deadline, leaves the instance Degraded
// in the new phase, an [*IncompleteError], and [Status].Uncovered says what may not hold.
// Asking for the same phase again does the rest again. Nothing goes back by itself: the
// new phase might be the tighter one.
//
// # While an instance is recorded
//
// Phases are marks then (Instance.Record): every switch may be, and Hooks tells the
// recorder where calls count. The barrier is run all the same. In enforcement a call that
// is blocked at a switch is judged by the new phase, so a phase that was recorded without
// it would deny what the recorded run did.
//
// # What a barrier doesn't reach
//
// A call that the kernel restarts by restart_syscall(2) goes on where it was: poll,
// nanosleep, clock_nanosleep and futex with a relative time. They are in the floor, so
// that no phase denies them.
package phase
