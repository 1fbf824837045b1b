// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// crowd is how many instances one supervisor has in TestManyInstances.
const crowd = 200

// member is one of them: a shell that makes a directory for each line it is told.
type member struct {
	id    string
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	group *cgroup.Group
}

// tries has the shell make a directory, and says whether it could.
func (m *member) tries(name string) (bool, error) {
	if _, err := fmt.Fprintln(m.in, name); err != nil {
		return false, err
	}
	line, err := m.out.ReadString('\n')
	return strings.TrimSpace(line) == "made", err
}

// TestManyInstances: 200 cgroups with a filter and a listener each, under one
// supervisor, are in the phases that they were switched to, each by itself.
func TestManyInstances(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	set := &profiles.PhaseSet{Initial: "closed", Phases: []profiles.Phase{
		{Name: "closed", Allow: []profiles.PhaseRule{{Names: []string{"@file-read", "@process", "@basic-io"}}}},
		{Name: "open", Allow: []profiles.PhaseRule{{Names: []string{"@file-read", "@process", "@basic-io", "mkdir"}}}},
	}}
	plan, err := profiles.CompilePhases(set, profiles.PhaseHost{Notify: true}, profiles.PhaseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	filter, err := seccomp.Compile(plan.Profile, seccomp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	s := phase.NewSupervisor(phase.Options{Log: logrus.NewEntry(log)})
	dir := t.TempDir()
	members := make([]*member, crowd)
	for i := range members {
		members[i] = startMember(t, s, set, plan, filter, fmt.Sprintf("m%d", i), dir)
	}
	all := func(what string, do func(i int, m *member) error) {
		t.Helper()
		var wg sync.WaitGroup
		for i, m := range members {
			wg.Go(func() {
				if err := do(i, m); err != nil {
					t.Errorf("%s: %s: %v", m.id, what, err)
				}
			})
		}
		wg.Wait()
	}
	expect := func(round string, want func(i int) bool) {
		t.Helper()
		all(round, func(i int, m *member) error {
			made, err := m.tries(fmt.Sprintf("%s/%s-%s", dir, m.id, round))
			if err == nil && made != want(i) {
				err = fmt.Errorf("made: %t", made)
			}
			return err
		})
	}
	expect("first", func(int) bool { return false })
	all("switch", func(i int, m *member) error {
		if i%2 == 0 {
			return nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := s.Set(ctx, m.id, "open", phase.SetOptions{})
		return err
	})
	expect("second", func(i int) bool { return i%2 == 1 })
	if got := len(s.List()); got != crowd {
		t.Errorf("%d instances", got)
	}
	all("end", func(_ int, m *member) error {
		_ = m.in.Close()
		err := m.cmd.Wait()
		s.End(m.id)
		return err
	})
}

func startMember(t *testing.T, s *phase.Supervisor, set *profiles.PhaseSet, plan *profiles.PhasePlan, filter seccomp.Filter, id, dir string) *member {
	t.Helper()
	m := &member{id: id}
	var err error
	if m.group, err = cgroup.New("crowd-test"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = m.group.Kill()
		_ = m.group.Wait(context.Background())
		if err := m.group.Remove(); err != nil {
			t.Error(err)
		}
	})
	freezer, err := cgroup.NewFreezer(m.group.Path())
	if err != nil {
		t.Fatal(err)
	}
	sv, err := s.Add(phase.Instance{ID: id, Policy: "crowd", Set: set, Plan: plan, Barrier: freezer})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.End(id) })
	ours, theirs, err := socketpair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close()
	orderR, orderW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer orderR.Close()
	reportR, reportW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cgroupDir, err := m.group.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer cgroupDir.Close()
	m.cmd = exec.Command("/proc/self/exe", LaunchCommand, "--", "/bin/sh", "sh", "-c",
		`while read name; do if mkdir "$name" 2>&-; then echo made; else echo denied; fi; done`)
	m.cmd.Dir = dir
	m.cmd.ExtraFiles = []*os.File{orderR, reportW, theirs}
	m.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroupDir.Fd())}
	if m.in, err = m.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	m.out = bufio.NewReader(out)
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reportW.Close()
	l := &launched{path: "/bin/sh", cmd: m.cmd, order: orderW, report: reportR}
	taken := make(chan error, 1)
	go func(conn *net.UnixConn) { taken <- takeListener(conn, sv) }(ours)
	err = l.proceed(launchOrder{Filter: filter, Listener: true})
	if tookErr := <-taken; err == nil {
		err = tookErr
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}
