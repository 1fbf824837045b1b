// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

const (
	// publishTimeout bounds the wait for the store's lock, which somebody else's
	// command can hold.
	publishTimeout = 30 * time.Second
	// An end that failed is tried again after retryFirst, then twice that, and so
	// on up to retryMost: a full disk needs a person. The next Plan of the
	// workload tries at once.
	retryFirst = 15 * time.Second
	retryMost  = 4 * time.Minute
	// emptyTime bounds the wait for the last process of a container that the
	// runtime says has ended.
	emptyTime = 5 * time.Second
)

// Stopped ends an instance: its recording is published in the background, and
// the next Plan of the same workload waits for it.
func (a *Agent) Stopped(_ context.Context, id string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if in := a.instances[id]; in != nil && !in.ended {
		a.end(in)
	}
	return nil
}

// end begins an instance's end, or the next attempt at it if one failed, and
// returns what is closed when the attempt that runs is over. a.mu is held.
func (a *Agent) end(in *instance) <-chan struct{} {
	if in.attempt != nil {
		return in.attempt
	}
	attempt := make(chan struct{})
	if a.closed || in.gone {
		close(attempt)
		return attempt
	}
	in.attempt = attempt
	if in.ended {
		in.again <- struct{}{} // it is empty: whoever waits for it left attempt nil
		return attempt
	}
	in.ended = true
	a.workers.Go(func() { a.ending(in) })
	return attempt
}

// endNow ends an instance and waits until nothing is left of it.
func (a *Agent) endNow(ctx context.Context, in *instance) error {
	a.mu.Lock()
	attempt := a.end(in)
	a.mu.Unlock()
	select {
	case <-attempt:
	case <-ctx.Done():
		return fmt.Errorf("its end takes long (does a disk hang, or does another process hold the store's lock?): %w", ctx.Err())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case in.gone:
		return nil
	case a.closed:
		return errClosed
	}
	return fmt.Errorf("its recording is kept and not published yet: %w", in.failed)
}

func (a *Agent) hasEnded(in *instance) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return in.ended
}

// ending runs an instance's end until it succeeds or the agent is closed. Up to
// then the instance stays, in the kernel and in the journal.
func (a *Agent) ending(in *instance) {
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		err := a.safely("end of container "+in.Container.ID, func() error { return a.finish(in) })
		a.mu.Lock()
		in.failed = err
		close(in.attempt)
		in.attempt = nil
		a.mu.Unlock()
		if err == nil || a.stopped.Err() != nil {
			return
		}
		a.instanceLog(in).WithError(err).WithField("retry_in", wait).Error("recording not published yet, kept for another try")
		timer := time.NewTimer(wait)
		select {
		case <-a.stopped.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-in.again:
			timer.Stop()
		}
		a.mu.Lock()
		if in.attempt == nil {
			in.attempt = make(chan struct{})
		}
		select {
		case <-in.again: // somebody asked while the time ran out
		default:
		}
		a.mu.Unlock()
	}
}

// finish runs one attempt at an instance's end, in the order that the package
// comment gives. What an earlier attempt did is done again, or found done.
func (a *Agent) finish(in *instance) error {
	if err := in.take(a.stopped); err != nil {
		return err
	}
	defer in.put()
	if in.Record && !in.Kept {
		rec, err := a.recorded(in)
		if err != nil {
			return err
		}
		if rec != nil {
			if err := a.keep(in, rec); err != nil {
				return err
			}
		}
		a.change(func() { in.Kept = true })
		if err := a.journal.save(in); err != nil {
			return err
		}
	}
	if in.Phases != nil && a.phases != nil {
		ctx, cancel := context.WithTimeout(a.stopped, emptyTime)
		a.phases.end(ctx, in)
		cancel()
		if err := a.phases.endInside(in); err != nil {
			return err
		}
	}
	if err := a.removeInside(in); err != nil {
		return err
	}
	if err := a.release(in); err != nil {
		return fmt.Errorf("release recording: %w", err)
	}
	in.file.Lock()
	defer in.file.Unlock()
	in.forgotten = true
	if err := a.journal.remove(in.Container.ID); err != nil {
		return err
	}
	a.mu.Lock()
	in.gone = true
	delete(a.instances, in.Container.ID)
	a.mu.Unlock()
	a.instanceLog(in).Info("container ended")
	return nil
}

// recorded is an instance's recording, finished; nil if there is nothing to keep
// because the container's program was never executed.
func (a *Agent) recorded(in *instance) (*profiles.Recording, error) {
	log := a.instanceLog(in)
	if a.recorder == nil {
		return nil, fmt.Errorf("read recording: %w", a.recorderErr)
	}
	slot, err := a.slot(in)
	if err != nil {
		return nil, fmt.Errorf("read recording: %w", err)
	}
	if slot == nil && in.CgroupID == 0 && !in.Ran {
		if in.pickedUp {
			log.Warn("the container was planned, and was not seen to start: if it ran, it was not recorded")
		}
		return nil, nil
	}
	if err := a.ended(in, slot); err != nil {
		return nil, err
	}
	rec := *in.Recording
	rec.Losses = slices.Clone(rec.Losses)
	if slot == nil {
		return lost(&rec), nil
	}
	snapshot, err := a.recorder.Finish(*in.handle)
	if isUnknown(err) {
		return lost(&rec), nil
	}
	if err != nil {
		return nil, fmt.Errorf("read recording: %w", err)
	}
	a.awaitEvents(in, snapshot)
	events, err := a.journal.events(in.Container.ID)
	if err != nil {
		log.WithError(err).Warn("some first-seen events can't be read")
	}
	if in.marked() {
		rec.Initial = in.Decision.Phase
	}
	fill(&rec, snapshot, events, in.phaseNames())
	if n := eventCount(snapshot) - len(events); n > 0 {
		rec.Losses = append(rec.Losses, profiles.Loss{Kind: profiles.LossFirstSeen, Count: uint64(n), Detail: "not written down in time"})
	}
	if executed(&rec, snapshot) {
		return &rec, nil
	}
	// The daemon may have been dead when the program was executed.
	if !in.Ran && !(in.pickedUp && (in.CgroupID != 0 || snapshot.RootCgroup != 0)) {
		log.Info("nothing is kept of the recording: the container's program was never executed")
		return nil, nil
	}
	if len(rec.Blocking()) == 0 {
		rec.Losses = append(rec.Losses, profiles.Loss{
			Kind: profiles.LossNoFilterGate, Count: 1,
			Detail: "the container ran, but no execve of it was seen: its runtime loaded no seccomp filter (does it support seccomp? was the container created while syslatchd was away?)",
		})
	}
	return &rec, nil
}

// ended writes down when an instance ended, once, so that every attempt to
// publish has the same recording. Whether it has ended is the kernel's to say: a
// runtime may tell of it while the last processes are being killed.
func (a *Agent) ended(in *instance, slot *bpf.Instance) error {
	if !in.Recording.Ended.IsZero() {
		return nil
	}
	cgroupID := in.CgroupID
	if slot != nil && slot.RootCgroup != 0 {
		cgroupID = slot.RootCgroup
	}
	var running error
	if cgroupID != 0 {
		ctx, cancel := context.WithTimeout(a.stopped, emptyTime)
		running = a.host.Empty(ctx, cgroupID)
		cancel()
		if err := a.stopped.Err(); running != nil && err != nil {
			return err
		}
	}
	a.change(func() {
		in.Recording.Ended = time.Now().UTC()
		if running != nil {
			in.Recording.Losses = append(in.Recording.Losses, profiles.Loss{
				Kind: profiles.LossInterrupted, Count: 1,
				Detail: fmt.Sprintf("the runtime said that the container had stopped, and its cgroup was not empty %s later: %v", emptyTime, running),
			})
		}
	})
	return a.journal.save(in)
}

// lost is a recording whose calls are gone.
func lost(rec *profiles.Recording) *profiles.Recording {
	rec.Phases = map[string]profiles.Calls{}
	rec.Losses = append(rec.Losses, profiles.Loss{
		Kind: profiles.LossInterrupted, Count: 1,
		Detail: "the kernel has no record of the calls (were the pins removed, or syslatchd killed or refused while it attached late?)",
	})
	return rec
}

// executed says whether the execve of the container's program is in its
// recording. That one is made under the container's filter, whatever the runtime.
func executed(rec *profiles.Recording, snapshot *bpf.Snapshot) bool {
	if rec.Gate == profiles.GateExec {
		return snapshot.GateOpen
	}
	calls := rec.All()
	for abi := range calls {
		if calls.Has(abi, "execve") || calls.Has(abi, "execveat") {
			return true
		}
	}
	return false
}

// keep hands a finished recording to where its mode wants it.
func (a *Agent) keep(in *instance, rec *profiles.Recording) error {
	log := a.instanceLog(in).WithField("recording", rec.ID)
	for _, l := range rec.Losses {
		log.WithFields(logrus.Fields{"loss": l.Kind, "count": l.Count, "detail": l.Detail}).Warn("recording lost something")
	}
	var traceErr error // one that passes: the version comes first
	if in.Trace != nil {
		switch err := in.Trace.Write(a.policy.Hook.TraceDirectories, rec); {
		case err == nil:
			log.WithField("file", in.Trace.Output).Info("trace written")
		case passes(err):
			traceErr = err
		default:
			// What its creator made of the directory can stay so for good, and a
			// slot in the kernel with it.
			log.WithError(err).Error("trace not written")
		}
		if in.Decision.Workload == "" || in.Decision.Mode == policy.ModeEnforce {
			return traceErr // recorded for the trace alone
		}
	}
	return errors.Join(traceErr, a.publish(in, rec))
}

// publish makes a version of a recording, or holds it against one.
func (a *Agent) publish(in *instance, rec *profiles.Recording) error {
	log := a.instanceLog(in).WithField("recording", rec.ID)
	if in.Decision.Mode == policy.ModeAudit {
		return a.reportAudit(in, rec)
	}
	ctx, cancel := context.WithTimeout(a.stopped, publishTimeout)
	defer cancel()
	result, err := a.store.Add(ctx, rec, store.AddOptions{
		Merge: profiles.MergeOptions{
			MustAllow:       in.Decision.MustAllow,
			MustDeny:        in.Decision.MustDeny,
			Architectures:   in.Decision.Architectures,
			NewerThanKernel: seccomp.NewerThan(rec.Kernel),
			AllowLosses:     in.Decision.AllowLosses,
			Incidental:      true, // the engine doesn't say which runtime starts it; runc is Go
			Created:         rec.Ended,
		},
		Activate: in.Decision.Activate == policy.ActivatePublish,
	})
	var lossy *profiles.LossyError
	switch {
	case errors.As(err, &lossy):
		// The evidence is kept; a version is not made from it.
		log.WithError(err).Error("no version published (allowLosses: true in the policy overrides)")
		return nil
	case err != nil:
		return fmt.Errorf("publish: %w", err)
	case result.Version == nil:
		log.WithField("observations", result.Observations).Info("nothing new in this recording")
	default:
		log.WithFields(logrus.Fields{
			"version": result.Version.Manifest.Version,
			"digest":  result.Version.Manifest.Digest,
			"added":   result.Delta.Added,
		}).Info("version published")
	}
	return nil
}

// passes says whether what keeps a file from being written is the host's state, and
// not its creator's choice.
func passes(err error) bool {
	return slices.ContainsFunc([]error{unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EMFILE, unix.ENFILE, unix.ENOMEM},
		func(e error) bool { return errors.Is(err, e) })
}

// reportAudit logs what the dry run's profile would have denied.
func (a *Agent) reportAudit(in *instance, rec *profiles.Recording) error {
	log := a.instanceLog(in).WithField("version", in.Version)
	version, err := a.store.Version(in.Decision.Workload, in.Version)
	if errors.Is(err, store.ErrNoVersion) {
		// No later attempt will find it.
		log.WithError(err).Error("dry run not judged: its version was removed meanwhile")
		return nil
	}
	if err != nil {
		return err
	}
	denied := profiles.MayDenyOf(version.Profile, rec)
	switch losses := rec.Blocking(); {
	case denied.Len() > 0:
		log.WithField("would_deny", denied).Warn("dry run: the version would have denied calls")
	case len(losses) > 0:
		log.WithField("losses", losses).Warn("dry run not judged: the recording may lack calls, and none of those it has would have been denied")
	default:
		log.Info("dry run: the version would have denied nothing")
	}
	return nil
}
