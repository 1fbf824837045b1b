// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/profiles"
)

// limited is an instance that runs, with an oom_score_adj by phase; 0 is none.
func limited(g *cgroup.Group, pid int, scores map[string]int) *instance {
	in := &instance{CgroupID: g.ID(), Ran: true, Phases: &instancePhases{}}
	in.Container.ID, in.Container.PID = "c1", pid
	in.Decision.Phases = &policy.Phases{}
	for name, score := range scores {
		ph := policy.Phase{Phase: profiles.Phase{Name: name}}
		if score != 0 {
			ph.Limits.OOMScoreAdj = &score
		}
		in.Decision.Phases.Phases = append(in.Decision.Phases.Phases, ph)
	}
	in.limits.begin(nil, (&Agent{}).setsLimits)
	return in
}

func newLimiting(t *testing.T) *phasing {
	return &phasing{a: &Agent{journal: newJournal(t), log: logrus.NewEntry(logrus.New())}, kernel: detect(t)}
}

// TestLimitsOfAnother: what has a container's pid, and is not the container's, has its
// limits neither set nor read.
func TestLimitsOfAnother(t *testing.T) {
	const score = 300
	g, other := newGroup(t), newGroup(t)
	p := newLimiting(t)
	// again has pid be another's, unless a third has taken it.
	again := func(pid int) bool {
		for range 100 {
			if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
				t.Fatal(err)
			}
			is, stop := occupy(t, other)
			if is == pid {
				return true
			}
			stop()
		}
		return false
	}
	reused := false
	for range 5 {
		pid, stop := occupy(t, g)
		in := limited(g, pid, map[string]int{"a": score})
		in.limits.write = func(kernelHost, *cgroup.Process, adjust.Expectation) error {
			stop()
			if reused = again(pid); !reused {
				return nil
			}
			return writeFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), strconv.Itoa(score))
		}
		if err := p.setLimits(t.Context(), in, "a"); !errors.Is(err, cgroup.ErrGone) {
			t.Errorf("ended meanwhile: %v", err)
		}
		if !reused {
			continue
		}
		in.limits.write = func(kernelHost, *cgroup.Process, adjust.Expectation) error {
			t.Error("written")
			return nil
		}
		if err := p.setLimits(t.Context(), in, "a"); err == nil || !strings.Contains(err.Error(), "not in the container's cgroup") {
			t.Errorf("another process: %v", err)
		}
		return
	}
	t.Fatal("no process got the pid of another")
}

// TestLimitsFromInside: a container may not have itself switched to where it has more.
func TestLimitsFromInside(t *testing.T) {
	g := newGroup(t)
	pid, _ := occupy(t, g)
	p, in := newLimiting(t), limited(g, pid, map[string]int{"none": 0, "low": 300, "high": 600})
	now := "none"
	for _, tc := range []struct {
		to      string
		loosens bool
	}{{"none", false}, {"low", false}, {"none", true}, {"high", false}, {"low", true}, {"none", true}} {
		err := p.loosens(t.Context(), in, tc.to)
		if (err != nil) != tc.loosens || err != nil && !strings.Contains(err.Error(), "oom_score_adj is") {
			t.Errorf("from %s to %s: %v", now, tc.to, err)
		}
		if err != nil {
			continue
		}
		if err := p.setLimits(t.Context(), in, tc.to); err != nil {
			t.Fatal(err)
		}
		now = tc.to
	}
}

// TestLimitsThatHang: a write that the kernel holds up costs a switch no more than its
// time, and is the last of its phase.
func TestLimitsThatHang(t *testing.T) {
	g := newGroup(t)
	pid, _ := occupy(t, g)
	scores := map[string]int{"a": 100, "b": 200, "c": 300}
	in := limited(g, pid, scores)
	p := newLimiting(t)
	var (
		mu      sync.Mutex
		written []string
	)
	hangs, begun := make(chan struct{}), make(chan struct{}, 10)
	in.limits.write = func(h kernelHost, of *cgroup.Process, e adjust.Expectation) error {
		mu.Lock()
		written = append(written, e.Want)
		mu.Unlock()
		begun <- struct{}{}
		<-hangs
		return writeLimit(h, of, e)
	}
	ctx, cancel := context.WithCancel(t.Context())
	answers := make(chan error, 2)
	go func() { answers <- p.setLimits(ctx, in, "a") }()
	<-begun
	go func() { answers <- p.setLimits(ctx, in, "b") }()
	cancel()
	for range 2 {
		select {
		case err := <-answers:
			if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "not set in time") {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("a switch waits for the kernel beyond its time")
		}
	}
	close(hangs)
	if err := p.setLimits(t.Context(), in, "c"); err != nil {
		t.Fatal(err)
	}
	process, err := cgroup.OpenProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer process.Close()
	if score, err := process.OOMScoreAdj(); err != nil || score != scores["c"] {
		t.Errorf("oom_score_adj %d, %v", score, err)
	}
	p.a.workers.Wait()
	mu.Lock()
	defer mu.Unlock()
	if diff := cmp.Diff([]string{"100", "300"}, slices.Clone(written)); diff != "" {
		t.Errorf("written: %s", diff)
	}
}

// TestScoreTakesCapability: what a write to oom_score_adj lacks is told with its remedy.
func TestScoreTakesCapability(t *testing.T) {
	g := newGroup(t)
	pid, _ := occupy(t, g)
	p, err := cgroup.OpenProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	kernel, answer := detect(t), make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&hdr, &caps[0])
		caps[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
		if err == nil {
			err = unix.Capset(&hdr, &caps[0])
		}
		if err == nil {
			err = writeScores(kernel, p, "-1000")
		}
		answer <- err
	}()
	if err := <-answer; !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "CAP_SYS_RESOURCE for a value as low (contrib/systemd/oom-score.conf)") {
		t.Error(err)
	}
}
