// SPDX-License-Identifier: Apache-2.0

// Command bench measures, on this machine, what syslatch costs, and prints the
// tables of docs/benchmarks.md. `make bench` runs it; see there for how to read
// them. It needs root, and leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

type options struct {
	bin     string // directory of syslatch and syslatchd
	json    string
	doc     string
	only    string
	rounds  int
	creates int
	starts  int
	crowd   int
}

// roles are what this program is as a process of its own.
var roles = map[string]func() error{
	workerRole:          work,
	visitorRole:         loadFilter,
	filteredRole:        visits,
	callerRole:          call,
	sleeperRole:         sleep,
	filteredSleeperRole: sleepOn,
	crowdRole:           sleepTogether,
	supervisorRole:      supervise,
	connectorRole:       connect,
}

func main() {
	if len(os.Args) > 1 {
		if role := roles[os.Args[1]]; role != nil {
			if err := role(); err != nil {
				fmt.Fprintf(os.Stderr, "bench: %s: %v\n", os.Args[1], err)
				os.Exit(1)
			}
			return
		}
	}
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "`directory` of syslatch and syslatchd")
	flag.StringVar(&o.json, "json", "", "also write all figures to `file`")
	flag.StringVar(&o.doc, "doc", "", "also replace the figures in `file`, a Markdown document")
	flag.StringVar(&o.only, "only", "", "`parts` to measure: "+strings.Join(partNames(), ",")+" (default all)")
	flag.IntVar(&o.rounds, "rounds", 31, "rounds of the calls and phases parts")
	flag.IntVar(&o.creates, "creates", 200, "containers in each mode, barriers, and switches")
	flag.IntVar(&o.starts, "starts", 15, "starts of each program")
	flag.IntVar(&o.crowd, "crowd", 1000, "containers that are recorded at once, at most 1024")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	opts   options
	report *report
	dir    string // on a disk
	tmpfs  string
	bpffs  string // private, so that nothing else's pins are met
	// Filled by several parts, for memoryReport.
	memory  table
	largest float64 // MiB
	crowd   string  // what is to be said of the crowd beside its memory
}

// parts run in this order.
var parts = []struct {
	name string
	run  func(*bench, context.Context) error
}{
	{"calls", (*bench).callsPart},
	{"phases", (*bench).phasesPart},
	{"containers", (*bench).containersPart},
	{"crowd", (*bench).crowdPart},
	{"starts", (*bench).startsPart},
	{"kernel", (*bench).kernelPart},
}

func partNames() (names []string) {
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

// check refuses what would measure nothing.
func (o options) check() error {
	if min(o.rounds, o.creates, o.starts, o.crowd) < 1 {
		return errors.New("-rounds, -creates, -starts and -crowd must be at least 1")
	}
	if o.only != "" {
		for _, name := range strings.Split(o.only, ",") {
			if !slices.Contains(partNames(), name) {
				return fmt.Errorf("-only: no part %q, there are %s", name, strings.Join(partNames(), ", "))
			}
		}
	}
	return nil
}

func run(ctx context.Context, o options, w io.Writer) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	if os.Getuid() != 0 {
		return errors.New("loading BPF programs and running containerd needs root")
	}
	// A child with Pdeathsig is killed when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b := &bench{opts: o, report: &report{}}
	if b.report.Machine, err = describeMachine(); err != nil {
		return err
	}
	if b.opts.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "syslatch-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	for _, m := range []struct {
		path *string
		typ  string
	}{{&b.tmpfs, "tmpfs"}, {&b.bpffs, "bpf"}} {
		*m.path = filepath.Join(b.dir, m.typ)
		if err := os.Mkdir(*m.path, 0o700); err != nil {
			return err
		}
		if err := unix.Mount(m.typ, *m.path, m.typ, 0, "mode=0700"); err != nil {
			return fmt.Errorf("mount %s: %w", m.typ, err)
		}
		defer func() { err = errors.Join(err, unix.Unmount(*m.path, 0)) }()
	}
	for _, p := range parts {
		if o.only != "" && !slices.Contains(strings.Split(o.only, ","), p.name) {
			continue
		}
		if err := p.run(b, ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	b.memoryReport()
	text := b.report.markdown()
	if _, err := io.WriteString(w, text); err != nil {
		return err
	}
	if o.json != "" {
		if err := b.report.writeJSON(o.json); err != nil {
			return err
		}
	}
	if o.doc != "" {
		return replaceIn(o.doc, text)
	}
	return nil
}

func (b *bench) memoryReport() {
	if len(b.memory.rows) == 0 {
		return
	}
	b.report.goal("resident memory of syslatchd, the most of below", "%.1f MiB", b.largest, 40)
	var notes []string
	if b.crowd != "" {
		notes = append(notes, b.crowd)
	}
	b.memory.head = []string{"", "VmRSS, MiB", "RssAnon", "RssFile", "VmHWM"}
	b.report.add(section{title: "Memory of the daemon", tables: []table{b.memory}, notes: notes})
}

// progress tells on standard error how far a part is, now and then.
func (b *bench) progress(part string, done, of int) {
	if step := max(of/5, 1); done%step == 0 || done == of {
		fmt.Fprintf(os.Stderr, "bench: %s: %d of %d\n", part, done, of)
	}
}
