// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/profiles"
)

// Attach names something that runs already, by one of its fields.
type Attach struct {
	Container string // id, or the beginning of one
	Cgroup    string // path of a cgroup v2 directory, or below where that hierarchy is mounted
	PID       int    // a process; its whole cgroup is recorded
}

// recordAttached records a cgroup until no process is left in it, or until the
// first signal.
func recordAttached(target Attach, signals <-chan os.Signal, messages io.Writer) (*profiles.Recording, error) {
	h, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	if err := h.RequireV2(); err != nil {
		return nil, err
	}
	path, err := target.find(h)
	if err != nil {
		return nil, err
	}
	own, err := h.OfPID(os.Getpid())
	if err != nil {
		return nil, err
	}
	if own == path || strings.HasPrefix(own, path+"/") || path == h.Unified {
		return nil, fmt.Errorf("cgroup %s has this very command in it: it holds more than what is to be recorded", path)
	}
	id, err := cgroup.ID(path)
	if err != nil {
		return nil, err
	}
	recorder, err := bpf.Open("", bpf.Options{NoPin: true})
	if err != nil {
		return nil, fmt.Errorf("recorder: %w", err)
	}
	defer recorder.Close()
	rec := newRecording(profiles.Subject{ID: filepath.Base(path), Name: filepath.Base(path)}, filepath.Base(path), "syslatch record", profiles.GateOpen)
	rec.Losses = append(rec.Losses, profiles.Loss{
		Kind: profiles.LossAttachedLate, Count: 1,
		Detail: "the recording was attached to what ran already: what it called before is not in it",
	})
	handle, err := recorder.Track(id, gateOf(path))
	if err != nil {
		return nil, fmt.Errorf("track cgroup %s: %w", path, err)
	}
	children, err := cgroup.Children(path)
	if err != nil {
		return nil, err
	}
	for _, child := range children {
		childID, err := cgroup.ID(child)
		if err == nil {
			err = recorder.AddCgroup(handle, childID)
		}
		// It may be gone, or have joined by itself.
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, bpf.ErrTracked) {
			return nil, err
		}
	}
	events := collectEvents(recorder, handle)
	fmt.Fprintf(messages, "syslatch: recording %s (interrupt to end)\n", path)
	ctx, cancel := context.WithCancel(context.Background())
	empty := make(chan error, 1)
	go func() { empty <- kernelHost{Hierarchy: h}.Empty(ctx, id) }()
	select {
	case err = <-empty:
	case <-signals:
		cancel()
		<-empty // its error is the cancellation's
	}
	cancel()
	if err != nil {
		return nil, err
	}
	snapshot, err := recorder.Untrack(handle)
	if err != nil {
		return nil, err
	}
	rec.Ended = time.Now().UTC()
	fill(rec, snapshot, events.take(snapshot), map[uint8]string{0: profiles.DefaultPhase})
	return rec, nil
}

// gateOf keeps out of a container's recording what a runtime's `exec` calls before
// it has loaded the container's filter, if that has one: the least that a process
// in its cgroup has.
func gateOf(path string) bpf.TrackOptions {
	least := 0
	for i, pid := range procs(path) {
		if s, err := cgroup.Status(pid); err == nil && (i == 0 || s.SeccompFilters < least) {
			least = s.SeccompFilters
		}
	}
	if least == 0 {
		return bpf.TrackOptions{Gate: bpf.GateOpen}
	}
	return bpf.TrackOptions{Gate: bpf.GateFilter, BaseFilters: least - 1}
}

// find is the directory in the v2 hierarchy.
func (t Attach) find(h *cgroup.Hierarchy) (string, error) {
	switch {
	case t.PID != 0:
		return h.OfPID(t.PID)
	case t.Cgroup != "":
		path := filepath.Clean(t.Cgroup)
		if path != h.Unified && !strings.HasPrefix(path, h.Unified+"/") {
			path = filepath.Join(h.Unified, path)
		}
		if st, err := os.Stat(path); err != nil {
			return "", err
		} else if !st.IsDir() {
			return "", fmt.Errorf("%s is no cgroup (name its directory)", path)
		}
		return path, nil
	}
	all, err := cgroup.Children(h.Unified)
	if err != nil {
		return "", err
	}
	var found []string
	for _, path := range all {
		if strings.HasPrefix(containerOf(filepath.Base(path)), t.Container) {
			found = append(found, path)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("container %q: no cgroup below %s has this id (does it run? 'podman ps --no-trunc' and 'crictl ps --no-trunc' tell ids)", t.Container, h.Unified)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("container %q: %d cgroups have an id that begins so: %s (give more of it)", t.Container, len(found), strings.Join(found, ", "))
}

// containerOf is the container's id in the name that an engine gives its cgroup:
// "ID", "libpod-ID", "libpod-ID.scope", "cri-containerd-ID.scope", "docker-ID.scope";
// "" for other cgroups, of which conmon's is one.
func containerOf(name string) string {
	name = strings.TrimSuffix(name, ".scope")
	if strings.Contains(name, "conmon") {
		return ""
	}
	return name[strings.LastIndexByte(name, '-')+1:]
}
