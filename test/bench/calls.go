// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
)

// Variants of a round, in the order of the report.
const (
	bare      = iota // no recorder exists
	untracked        // attached for another cgroup's sake
	tracked          // this task is recorded
	detached         // the recorder exists, and nothing is recorded any more
	variants
)

var variantNames = [variants]string{"bare", "untracked", "tracked", "detached"}

var variantTitles = [variants]string{
	"nothing attached",
	"a recording runs, this task is not in it",
	"this task is recorded",
	"after the last recording ended",
}

// callsPart compares what a call costs in each variant. Within a round all
// variants of all loads take turns, so that whatever else the machine does falls
// on all alike. A round during which somebody else's programs came or went is
// done again.
func (b *bench) callsPart(ctx context.Context) (err error) {
	rounds := b.opts.rounds
	c := &callBench{pins: filepath.Join(b.bpffs, "calls")}
	// What doesn't end now is there to stay, like a node's monitoring.
	if err := c.settle(ctx, patience); errors.Is(err, errSpoiled) {
		if c.foreign, err = tracingLinks(); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	b.report.Machine.Foreign = c.foreign
	if c.worker, err = startWorker(0, workerRole, b.tmpfs); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.worker.close()) }()
	if c.decoy, err = cgroup.New("bench"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.decoy.Remove()) }()

	var cpu, wall [variants]map[string][]float64
	for v := range variants {
		cpu[v], wall[v] = map[string][]float64{}, map[string][]float64{}
	}
	spoiled := 0
	for done := 0; done < rounds; {
		if err := ctx.Err(); err != nil {
			return err
		}
		got, err := c.round(ctx, done)
		if errors.Is(err, errSpoiled) && spoiled < 2*rounds {
			spoiled++
			err = c.settle(ctx, 4*patience)
			if err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		for v, byLoad := range got {
			for name, t := range byLoad {
				cpu[v][name] = append(cpu[v][name], t.CPU)
				wall[v][name] = append(wall[v][name], t.Wall)
			}
		}
		done++
		b.progress("calls", done, rounds)
	}
	b.callsReport(cpu, wall, spoiled)
	return nil
}

func (b *bench) callsReport(cpu, wall [variants]map[string][]float64, spoiled int) {
	t := table{head: []string{""}}
	for _, l := range loads {
		t.head = append(t.head, l.name+", ns a call", "ratio", "quartiles")
	}
	for v := range variants {
		row := []string{variantTitles[v]}
		for _, l := range loads {
			ratios := paired(cpu[v][l.name], cpu[bare][l.name], ratio)
			ns, r := median(cpu[v][l.name]), median(ratios)
			b.report.metric(ns, "ns", "calls", l.name, variantNames[v], "time")
			b.report.metric(r, "ratio", "calls", l.name, variantNames[v], "ratio")
			quartiles := ""
			if v != bare {
				quartiles = fmt.Sprintf("%.2f–%.2f", quantile(ratios, 0.25), quantile(ratios, 0.75))
			}
			row = append(row, fmt.Sprintf("%.0f", ns), fmt.Sprintf("×%.2f", r), quartiles)
		}
		t.rows = append(t.rows, row)
	}
	over := func(v int) float64 { return median(paired(cpu[v]["getppid"], cpu[bare]["getppid"], ratio)) }
	b.report.goal("getppid of a recorded task", "×%.2f of bare", over(tracked), 1.9)
	b.report.goal("getppid of another task while a recording runs", "×%.2f of bare", over(untracked), 1.8)
	// Two measurements of one thing differ by a percent or two.
	b.report.goal("getppid when no recording runs any more", "×%.2f of bare", over(detached), 1.02)
	busy := 1 - median(paired(cpu[bare]["mix"], wall[bare]["mix"], ratio))
	b.report.metric(busy, "share", "calls", "processor-taken-by-others")
	b.report.add(section{
		title:  "Cost of a system call",
		tables: []table{t},
		notes: []string{
			fmt.Sprintf("Medians of %d rounds in which all variants took turns; ratios are medians of those within a round. One thread on one processor, by its own processor time (others took %.0f %% of the processor meanwhile). %s",
				len(cpu[bare]["mix"]), 100*busy, spoiledNote(spoiled)),
			"A round of the mix: " + strings.Join(loads[1].calls, ", ") + ".",
		},
	})
}

func spoiledNote(n int) string {
	switch n {
	case 0:
		return "No other tracing program came or went."
	case 1:
		return "One round was done again, because other tracing programs came or went."
	}
	return fmt.Sprintf("%d rounds were done again, because other tracing programs came or went.", n)
}

type callBench struct {
	pins    string
	foreign int // tracing links of others
	worker  *worker
	decoy   *cgroup.Group
}

// errSpoiled means that tracing programs of others came or went.
var errSpoiled = errors.New("tracing programs of others came or went")

// patience is how long somebody else's programs may take to go.
const patience = 30 * time.Second

// settle waits until no tracing programs are attached but those of others that
// are always there.
func (c *callBench) settle(ctx context.Context, limit time.Duration) error {
	have := 0
	err := poll(ctx, limit, func() (bool, error) {
		var err error
		have, err = tracingLinks()
		return have == c.foreign, err
	})
	if errors.Is(err, errLate) {
		return fmt.Errorf("%w: %d links after %s, want %d: measure again when they have gone", errSpoiled, have, limit, c.foreign)
	}
	return err
}

// round measures every variant of every load once.
func (c *callBench) round(ctx context.Context, n int) (out [variants]map[string]timing, err error) {
	take := func(v, links int) error {
		out[v] = map[string]timing{}
		if err := c.expectLinks(links); err != nil {
			return err
		}
		for i := range loads {
			l := loads[(i+n)%len(loads)]
			t, err := c.worker.run(l.name, l.rounds)
			if err != nil {
				return err
			}
			out[v][l.name] = t
		}
		return c.expectLinks(links)
	}
	if err := take(bare, 0); err != nil {
		return out, err
	}
	r, err := bpf.Open(c.pins, bpf.Options{})
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, r.Close(), bpf.Remove(c.pins)) }()
	handles := map[int]bpf.Handle{}
	end := func(v int) error {
		h, ok := handles[v]
		if !ok {
			return nil
		}
		delete(handles, v)
		s, err := r.Untrack(h)
		if err != nil {
			return err
		}
		// What was measured is what is claimed.
		if seen := len(s.Calls) > 0; seen != (v == tracked) {
			return fmt.Errorf("recorded calls of the %s task: %t", variantNames[v], seen)
		}
		return nil
	}
	defer func() { err = errors.Join(err, end(untracked), end(tracked)) }()
	begin := func(v int, g *cgroup.Group) (err error) {
		handles[v], err = r.Track(g.ID(), bpf.TrackOptions{Gate: bpf.GateOpen})
		return err
	}
	if err := begin(untracked, c.decoy); err != nil {
		return out, err
	}
	pins, err := filepath.Glob(filepath.Join(c.pins, "*", "links", "*"))
	if err != nil {
		return out, err
	}
	ownLinks := len(pins)
	if n%2 == 0 {
		if err := take(untracked, ownLinks); err != nil {
			return out, err
		}
	}
	if err := begin(tracked, c.worker.group); err != nil {
		return out, err
	}
	if err := take(tracked, ownLinks); err != nil {
		return out, err
	}
	if err := end(tracked); err != nil {
		return out, err
	}
	if n%2 != 0 {
		if err := take(untracked, ownLinks); err != nil {
			return out, err
		}
	}
	if err := end(untracked); err != nil {
		return out, err
	}
	// The kernel ends a link some time after its pin has gone.
	if err := c.settle(ctx, 5*time.Second); err != nil {
		return out, err
	}
	return out, take(detached, 0)
}

func (c *callBench) expectLinks(own int) error {
	have, err := tracingLinks()
	if err == nil && have != c.foreign+own {
		err = fmt.Errorf("%w: %d links, want %d", errSpoiled, have, c.foreign+own)
	}
	return err
}

// tracingLinks counts the links by which programs trace the kernel: each may be
// on the way of every system call.
func tracingLinks() (int, error) {
	return links(func(info *link.Info) bool {
		switch info.Type {
		case link.TracingType, link.RawTracepointType, link.PerfEventType, link.KprobeMultiType:
			return true
		}
		return false
	})
}

// links counts those of the whole machine that match.
func links(match func(*link.Info) bool) (int, error) {
	for {
		n, err := countLinks(match)
		// A link that somebody is about to make has a number, and no more.
		if !errors.Is(err, unix.EAGAIN) {
			return n, err
		}
	}
}

func countLinks(match func(*link.Info) bool) (n int, err error) {
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		info, err := it.Link.Info()
		if err != nil {
			return 0, fmt.Errorf("link %d: %w", it.ID, err)
		}
		if match(info) {
			n++
		}
	}
	return n, it.Err()
}

// errLate means that what was waited for did not come about.
var errLate = errors.New("waited in vain")

// poll waits for what the kernel, or somebody else, does on their own time and
// there is no event for.
func poll(ctx context.Context, limit time.Duration, done func() (bool, error)) error {
	late := time.NewTimer(limit)
	defer late.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late.C:
			return errLate
		case <-tick.C:
		}
	}
}
