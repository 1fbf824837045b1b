// SPDX-License-Identifier: Apache-2.0

package bpf

import "sync/atomic"

// CrashInTrack leaves what a process leaves that is killed before Track's last
// write: a slot in set-up that is live already.
func (r *Recorder) CrashInTrack(cgroup uint64) error {
	h, err := r.Track(cgroup, TrackOptions{Gate: GateOpen})
	if err != nil {
		return err
	}
	atomic.StoreUint32(&r.slots[h.Slot].State, uint32(syslatchSlotStateSLOT_SETUP))
	return nil
}

// CrashInFinish leaves what a process leaves that is killed after Finish's
// second write.
func (r *Recorder) CrashInFinish(h Handle) error { return r.stop(h) }

// LackVsyscalls makes the kernel one that doesn't emulate them, until restore.
func LackVsyscalls() (restore func()) {
	was := optional
	optional = map[string]string{syslatchProgSyslatchVsys: "no_such_tracepoint"}
	return func() { optional = was }
}

// CrashInAdd leaves what a process leaves that is killed before Add's last write.
func (e *Enforcer) CrashInAdd(h PhaseHandle) {
	atomic.StoreUint32(&e.slots[h.Slot].State, uint32(phasesPhaseStatePHASE_SETUP))
}

// BreakPhase makes a phase the current one that doesn't exist.
func (e *Enforcer) BreakPhase(h PhaseHandle) {
	atomic.StoreUint64(&e.slots[h.Slot].Now, uint64(Phases)<<32|uint64(h.Generation))
}
