// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/test/harness"
)

// byAnnotation lets pods choose; without an annotation the plugin looks at a
// container and leaves it alone.
const byAnnotation = `
- name: bench
  match: {}
  mode: "off"
  annotations: [mode]
  allowedModes: ["off", record, enforce]
`

// kind is one way to create a container.
type kind struct {
	name, title string
	plugin      bool
	confined    bool // with the runtime's default profile
	planned     bool // the daemon follows it to its end
}

// kinds are three without the plugin, one of them twice to see how much two
// measurements of one thing differ, and three with it.
var kinds = []kind{
	{"none", "no plugin", false, false, false},
	{"again", "no plugin, once more", false, false, false},
	{"default", "no plugin, profile RuntimeDefault", false, true, false},
	{"off", "plugin, mode off", true, false, false},
	{"record", "plugin, mode record", true, false, true},
	{"enforce", "plugin, mode enforce", true, false, true},
}

// sleeps is what every container runs: a shell that says that it runs, and
// becomes a sleep of some seconds.
func sleeps(k kind, seconds int) harness.ContainerOptions {
	return harness.ContainerOptions{
		Name: k.name, Command: []string{"/bin/sh", "-c", fmt.Sprintf("echo runs; exec sleep %d", seconds)},
		Confined: k.confined, Seccomp: runtimeapi.SecurityProfile_RuntimeDefault,
	}
}

// containersPart creates containers on two containerds that run side by side,
// one with the plugin. All kinds take turns.
func (b *bench) containersPart(ctx context.Context) (err error) {
	image, err := harness.Busybox(b.dir, nil)
	if err != nil {
		return err
	}
	hosts, pods := map[bool]*harness.Host{}, map[bool]*harness.Pod{}
	for _, plugin := range []bool{false, true} {
		h, err := harness.Start(ctx, harness.Options{})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, h.Close()) }()
		if err := h.Import(ctx, image); err != nil {
			return err
		}
		hosts[plugin] = h
	}
	d, err := b.startDaemon(ctx, "containers", hosts[true].NRISocket, byAnnotation)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close(syscall.SIGTERM)) }()
	if err := b.resident(d, "rest", "at rest, connected"); err != nil {
		return err
	}
	if err := b.train(ctx, hosts[true], d); err != nil {
		return err
	}
	for plugin, h := range hosts {
		pods[plugin], err = h.NewPod(ctx, harness.PodOptions{Runtime: harness.Runc15, Annotations: map[string]string{
			"mode.syslatch.dev/container.record": "record", "mode.syslatch.dev/container.enforce": "enforce",
		}})
		if err != nil {
			return err
		}
	}
	took := map[string]*latencies{}
	for _, k := range kinds {
		took[k.name] = &latencies{}
	}
	for n := range b.opts.creates {
		for _, k := range turns(n) {
			if err := took[k.name].take(ctx, k, pods[k.plugin], d); err != nil {
				return fmt.Errorf("%s: %w", k.title, err)
			}
		}
		b.progress("containers", n+1, b.opts.creates)
	}
	if err := b.resident(d, "containers", fmt.Sprintf("after %d containers in each of off, record and enforce", b.opts.creates)); err != nil {
		return err
	}
	if err := d.complaint(); err != nil {
		return err
	}
	b.containersReport(took)
	b.handlersReport(d)
	return nil
}

// turns is the order of a round. The hosts alternate: a container pays for what
// its containerd does after the removal of the one before. Within a host the
// order changes, so that each kind follows every other of the other host.
func turns(round int) (order []kind) {
	without, with := kinds[:3], kinds[3:]
	for i := range 3 {
		order = append(order, without[(i+round)%3], with[(i+round/3)%3])
	}
	return order
}

// train makes the version that is enforced, from a run that ends by itself: one
// that is killed never calls exit_group, which a profile must allow.
func (b *bench) train(ctx context.Context, h *harness.Host, d *daemon) error {
	r, err := h.Run(ctx, harness.PodOptions{Runtime: harness.Runc15, Annotations: map[string]string{"mode.syslatch.dev/pod": "record"}},
		sleeps(kinds[len(kinds)-1], 0))
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("status %d: %s", r.Code, r.Log)
	}
	if err == nil {
		_, err = d.await(ctx, func(e entry) bool { return e.Message == "version published" })
	}
	if err != nil {
		return fmt.Errorf("training run: %w", err)
	}
	return nil
}

// latencies are of one kind, in milliseconds.
type latencies struct{ create, start, both []float64 }

// take creates and starts a container, and waits until nothing of it is left to
// do: what is measured next should not pay for it.
func (l *latencies) take(ctx context.Context, k kind, p *harness.Pod, d *daemon) error {
	t0 := time.Now()
	c, err := p.Create(ctx, sleeps(k, 3600))
	if err != nil {
		return err
	}
	t1 := time.Now()
	err = c.Start(ctx)
	t2 := time.Now()
	if err == nil {
		// The start ends before the program begins.
		err = c.WaitLog(ctx, func(log string) bool { return log != "" })
	}
	if err == nil {
		err = c.Stop(ctx, 0)
	}
	if err = errors.Join(err, c.Remove(ctx)); err != nil {
		return err
	}
	l.create, l.start, l.both = append(l.create, ms(t1.Sub(t0))), append(l.start, ms(t2.Sub(t1))), append(l.both, ms(t2.Sub(t0)))
	if !k.planned {
		return nil
	}
	_, err = d.await(ctx, func(e entry) bool { return e.Container == c.ID && e.Message == "container ended" })
	return err
}

func (b *bench) containersReport(took map[string]*latencies) {
	t := table{head: []string{"", "create p50, ms", "start p50", "both p50", "both p99", "added at p50", "added, median of pairs"}}
	base := took["none"].both
	for _, k := range kinds {
		l := took[k.name]
		p50, p99 := median(l.both), quantile(l.both, 0.99)
		added, pairs := p50-median(base), median(paired(l.both, base, difference))
		b.report.metric(p50, "ms", "containers", k.name, "p50")
		b.report.metric(p99, "ms", "containers", k.name, "p99")
		row := []string{k.title, fmt.Sprintf("%.1f", median(l.create)), fmt.Sprintf("%.1f", median(l.start)), fmt.Sprintf("%.1f", p50), fmt.Sprintf("%.1f", p99), "", ""}
		if k.name != "none" {
			b.report.metric(added, "ms", "containers", k.name, "added")
			b.report.metric(pairs, "ms", "containers", k.name, "added-paired")
			row[5], row[6] = fmt.Sprintf("%+.1f", added), fmt.Sprintf("%+.1f", pairs)
		}
		if k.plugin {
			b.report.goal("create to start, p50, added by: "+k.title, "%.1f ms", added, 5)
		}
		t.rows = append(t.rows, row)
	}
	b.report.add(section{
		title:  "Container create to start",
		tables: []table{t},
		notes: []string{fmt.Sprintf("%d containers of each kind, taking turns, on two containerds side by side: CRI CreateContainer and StartContainer, runc 1.5. The second row is what two measurements of the same thing differ by. The containers without a profile of their own are unconfined, so what enforce adds includes what runc takes to compile and load a filter, which RuntimeDefault costs too.",
			len(base))},
	})
}

// handlersReport tells what the daemon itself needed for the events.
func (b *bench) handlersReport(d *daemon) {
	t := table{head: []string{"event", "events", "p50, ms", "p99", "most"}}
	row := func(title, name string, v []float64) {
		if len(v) == 0 {
			return
		}
		b.report.metric(median(v), "ms", "handlers", name, "p50")
		b.report.metric(quantile(v, 0.99), "ms", "handlers", name, "p99")
		t.rows = append(t.rows, []string{title, fmt.Sprint(len(v)), fmt.Sprintf("%.2f", median(v)), fmt.Sprintf("%.2f", quantile(v, 0.99)), fmt.Sprintf("%.2f", quantile(v, 1))})
	}
	for _, e := range []struct{ title, event string }{
		{"CreateContainer", "create container"}, {"StartContainer", "start container"}, {"StopContainer", "stop container"},
	} {
		for _, k := range kinds {
			if k.plugin {
				event := e.event + " " + k.name
				row(e.title+", mode "+k.name, strings.ReplaceAll(event, " ", "-"), d.handled(func(s string) bool { return s == event }))
			}
		}
	}
	row("from the stop until the recording is kept", "publish", d.published("record"))
	b.report.add(section{
		title:  "Time in the daemon",
		tables: []table{t},
		notes:  []string{"From the daemon's own log: from an event's arrival to its answer, for which the runtime waits. It doesn't wait for what follows the stop of a recorded container: the kernel's programs end, and the recording is kept durably."},
	})
}

// resident notes the daemon's memory for the report.
func (b *bench) resident(d *daemon, name, when string) error {
	r, err := d.resident()
	if err != nil {
		return err
	}
	mib := func(kib int) float64 { return float64(kib) / 1024 }
	b.report.metric(mib(r.RSS), "MiB", "daemon", name, "rss")
	b.report.metric(mib(r.Anon), "MiB", "daemon", name, "anon")
	b.memory.rows = append(b.memory.rows, []string{when, fmt.Sprintf("%.1f", mib(r.RSS)), fmt.Sprintf("%.1f", mib(r.Anon)), fmt.Sprintf("%.1f", mib(r.File)), fmt.Sprintf("%.1f", mib(r.Peak))})
	b.largest = max(b.largest, mib(r.RSS))
	return nil
}
