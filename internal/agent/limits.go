// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
)

// limits are the limits of one container that phases change. A phase that has none
// for a file gets back what the file held before any phase changed it.
type limits struct {
	turn     chan struct{} // has a token while limits are set
	start    func(set func() error, done func(error)) bool
	original []limitValue // with the turn
	write    func(kernelHost, *cgroup.Process, adjust.Expectation) error
}

// limitValue is a file of the container's cgroup, or of /proc/PID, and what it held.
type limitValue struct {
	Source     adjust.Source `json:"source"`
	Controller string        `json:"controller,omitempty"`
	File       string        `json:"file"`
	Content    string        `json:"content"`
}

func (v *limitValue) of(e *adjust.Expectation) bool {
	return v.Source == e.Source && v.Controller == e.Controller && v.File == e.File
}

func (v *limitValue) among(all []adjust.Expectation) bool {
	return slices.ContainsFunc(all, func(e adjust.Expectation) bool { return v.of(&e) })
}

// todo is what is wanted, and what is put back because it isn't any more. The caller has
// the turn.
func (l *limits) todo(want []adjust.Expectation) []adjust.Expectation {
	todo := slices.Clone(want)
	for _, v := range l.original {
		if !v.among(want) {
			todo = append(todo, adjust.Expectation{Source: v.Source, Controller: v.Controller, File: v.File, Want: v.Content, Rule: adjust.RuleEqual})
		}
	}
	return todo
}

// begin comes before all else. start runs what may hang, or says no.
func (l *limits) begin(original []limitValue, start func(set func() error, done func(error)) bool) {
	l.turn, l.original, l.start, l.write = make(chan struct{}, 1), original, start, writeLimit
}

// setsLimits is begin's start.
func (a *Agent) setsLimits(set func() error, done func(error)) bool {
	return a.spawn("set limits", func() { done(a.safely("set limits", set)) })
}

// within sets limits, and gives up when ctx ends: a write to memory.max takes as long
// as the kernel takes to reclaim. What hangs then is waited for by the next who sets
// limits, and sets nothing more: no write of a phase comes behind those of a later one.
func (l *limits) within(ctx context.Context, set func() error) error {
	late := func() error {
		return fmt.Errorf("not set in time (the kernel may still be reclaiming memory; ask for the phase again): %w", ctx.Err())
	}
	select {
	case l.turn <- struct{}{}:
	case <-ctx.Done():
		return late()
	}
	done := make(chan error, 1) // buffered: nobody may wait for it any more
	if !l.start(set, func(err error) {
		<-l.turn
		done <- err
	}) {
		<-l.turn
		return errClosed
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return late()
	}
}

// set writes what is wanted of a container whose first process is p, and puts back what
// isn't wanted any more, then reads both back. keep is given what files held before, as
// soon as that is known. On v1 the order of some writes matters (memory and memory.memsw),
// so what fails is tried again after the others. The caller has the turn.
func (l *limits) set(ctx context.Context, h kernelHost, p *cgroup.Process, want []adjust.Expectation, keep func([]limitValue) error) error {
	original := slices.Clone(l.original)
	for i := range want {
		e := &want[i]
		if slices.ContainsFunc(original, func(v limitValue) bool { return v.of(e) }) {
			continue
		}
		content, err := h.readOf(p, *e)
		if err != nil {
			if e.Optional && errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return err
		}
		original = append(original, limitValue{e.Source, e.Controller, e.File, content})
	}
	if len(original) > len(l.original) {
		if err := keep(original); err != nil {
			return err
		}
		l.original = original
	}
	todo := l.todo(want)
	write := func(e adjust.Expectation) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return l.write(h, p, e)
	}
	var left []adjust.Expectation
	for _, e := range todo {
		if err := write(e); err != nil {
			left = append(left, e)
		}
	}
	var errs []error
	for _, e := range left {
		if err := write(e); err != nil && (!e.Optional || !errors.Is(err, fs.ErrNotExist)) {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if err := mismatchError(adjust.Verify(todo, func(e adjust.Expectation) (string, error) { return h.readOf(p, e) })); err != nil {
		return err
	}
	// What was put back may be changed by others from now on.
	if back := slices.DeleteFunc(slices.Clone(l.original), func(v limitValue) bool { return !v.among(want) }); len(back) < len(l.original) {
		if err := keep(back); err != nil {
			return err
		}
		l.original = back
	}
	return nil
}

// loosens says by an error of which limit there would be more than now. The caller has the
// turn.
func (l *limits) loosens(h kernelHost, p *cgroup.Process, want []adjust.Expectation) error {
	for _, e := range l.todo(want) {
		switch content, err := h.readOf(p, e); {
		case e.Optional && errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case e.Looser(content):
			return fmt.Errorf("%s is %.70q, and would be %.70q", e.File, strings.TrimSpace(content), e.Want)
		}
	}
	return nil
}

func writeLimit(h kernelHost, p *cgroup.Process, e adjust.Expectation) error {
	if e.Source == adjust.SourceProc {
		return writeScores(h, p, e.Want)
	}
	dir, err := h.DirOf(p, e.Controller)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, e.File)
	switch {
	case e.Controller == "memory" && e.Want == "max":
		return writeFile(path, "-1") // as v1 says it
	case e.File == "io.max":
		return writeDevices(path, e.Want)
	case e.Want == "":
		return writeFile(path, "\n") // as of cpuset.cpus
	}
	return writeFile(path, strings.TrimSpace(e.Want))
}

// writeDevices writes io.max, which takes a line at a time, and takes the limits from
// devices that aren't in it.
func writeDevices(path, want string) error {
	is, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	device := func(line string) string {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		return name
	}
	wanted := map[string]bool{}
	for line := range strings.Lines(want) {
		wanted[device(line)] = true
		if err := writeFile(path, strings.TrimSpace(line)); err != nil {
			return err
		}
	}
	for line := range strings.Lines(string(is)) {
		if d := device(line); !wanted[d] {
			if err := writeFile(path, d+" rbps=max wbps=max riops=max wiops=max"); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeFile writes to a file that is there.
func writeFile(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %q: %w", text, err)
	}
	return nil
}

// writeScores sets oom_score_adj of every process of a container. Those that are
// forked meanwhile have their parent's, so it looks again until nothing changes.
func writeScores(h kernelHost, p *cgroup.Process, want string) error {
	dir, err := h.DirOf(p, "")
	if err != nil {
		return err
	}
	const rounds = 16
	for range rounds {
		below, err := cgroup.Children(dir)
		if err != nil {
			return err
		}
		changed := false
		for _, d := range append(below, dir) {
			for _, pid := range procs(d) {
				path := "/proc/" + strconv.Itoa(pid) + "/oom_score_adj"
				is, err := os.ReadFile(path)
				if err == nil && strings.TrimSpace(string(is)) != want {
					changed = true
					err = scoreError(writeFile(path, want))
				}
				if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
					return err
				}
			}
		}
		if !changed {
			return nil
		}
	}
	return fmt.Errorf("oom_score_adj: processes with another value kept coming in %d rounds", rounds)
}

// scoreError says what a write to oom_score_adj lacks. The file is the user's that the
// process runs as; a value below the last that was written with CAP_SYS_RESOURCE takes
// that itself (oom_score_adj_min in fs/proc/base.c).
func scoreError(err error) error {
	lacks := "CAP_SYS_RESOURCE for a value as low"
	var at *fs.PathError
	switch {
	case !errors.Is(err, unix.EACCES):
		return err
	case errors.As(err, &at) && at.Op == "open":
		lacks = "CAP_DAC_OVERRIDE for a process that isn't root's"
	}
	return fmt.Errorf("%w: it takes %s (contrib/systemd/oom-score.conf)", err, lacks)
}
