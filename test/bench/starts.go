// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/syslatch/syslatch/test/harness"
)

// startsPart measures how long it takes until something is recorded: from the
// start of syslatchd until a container could be, and from the start of `syslatch
// record` until the command runs.
func (b *bench) startsPart(ctx context.Context) (err error) {
	h, err := harness.Start(ctx, harness.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	command := []string{"/bin/busybox", "echo"}
	record := append([]string{filepath.Join(b.opts.bin, "syslatch"), "record", "-o", filepath.Join(b.dir, "echo.json"), "--"}, command...)
	var cold, warm, direct, directAll, recorded, recordedAll []float64
	for n := range b.opts.starts {
		for _, to := range []*[]float64{&cold, &warm} {
			d, err := b.startDaemon(ctx, "starts", h.NRISocket, byAnnotation)
			if err != nil {
				return err
			}
			*to = append(*to, ms(d.ready))
			err = errors.Join(d.complaint(), d.stop(syscall.SIGTERM))
			if to == &warm || err != nil {
				err = errors.Join(err, d.forget())
			}
			if err != nil {
				return err
			}
		}
		for _, c := range []struct {
			argv       []string
			first, all *[]float64
		}{{command, &direct, &directAll}, {record, &recorded, &recordedAll}} {
			first, all, err := output(ctx, c.argv)
			if err != nil {
				return err
			}
			*c.first, *c.all = append(*c.first, ms(first)), append(*c.all, ms(all))
		}
		b.progress("starts", n+1, b.opts.starts)
	}
	t := table{head: []string{"", "p50, ms", "most"}}
	for _, row := range []struct {
		title, name string
		v           []float64
	}{
		{"`syslatchd`: start until a container can be recorded, for the first time", "syslatchd-first", cold},
		{"the same, with the pins of an earlier one", "syslatchd-again", warm},
		{"a command: start until its first output", "command-output", direct},
		{"the same under `syslatch record`", "record-output", recorded},
		{"a command: start until its end", "command-end", directAll},
		{"the same under `syslatch record`, the profile written", "record-end", recordedAll},
	} {
		b.report.metric(median(row.v), "ms", "starts", row.name, "p50")
		t.rows = append(t.rows, []string{row.title, fmt.Sprintf("%.1f", median(row.v)), fmt.Sprintf("%.1f", quantile(row.v, 1))})
	}
	b.report.add(section{
		title:  "From start to recording",
		tables: []table{t},
		notes:  []string{fmt.Sprintf("%d starts each, taking turns. The command is a static busybox's `echo`. `syslatch record` loads the recorder for itself each time; it needs no daemon.", len(cold))},
	})
	return nil
}

// output runs a command, and measures how long it takes until it has written
// something and until it has ended.
func output(ctx context.Context, argv []string) (first, all time.Duration, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, 0, err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout = w
	began := time.Now()
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, 0, err
	}
	_, err = io.ReadFull(r, make([]byte, 1))
	first = time.Since(began)
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return 0, 0, fmt.Errorf("%v: %w", argv, err)
	}
	return first, time.Since(began), nil
}
