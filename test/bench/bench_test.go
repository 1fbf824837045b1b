// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if role := roles[os.Args[1]]; role != nil {
			if err := role(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	os.Exit(m.Run())
}

func TestQuantile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for _, c := range []struct {
		v    []float64
		q    float64
		want float64
	}{
		{[]float64{7}, 0.5, 7},
		{[]float64{7}, 0.99, 7},
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 3, 2, 1}, 0.5, 2},
		{hundred, 0.99, 99},
		{hundred, 0.25, 25},
		{hundred, 1, 100},
		{hundred, 0, 1},
	} {
		if got := quantile(c.v, c.q); got != c.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", c.v, c.q, got, c.want)
		}
	}
	if hundred[0] != 100 {
		t.Error("quantile sorted its argument")
	}
}

func TestReport(t *testing.T) {
	r := &report{Machine: machine{Date: "2026-01-02", Kernel: "6.18", CPU: "Z80", CPUs: 2, MemoryMiB: 2048, Cgroups: "v2", Load: 0.5}}
	r.goal("this", "%.1f ms", 5, 5)
	r.goal("that", "×%.2f", 1.91, 1.9)
	r.add(section{title: "Part", tables: []table{{head: []string{"", "ns"}, rows: [][]string{{"a", "1"}, {"a×b", "1000"}}}}, notes: []string{"A note."}})
	const want = `Measured on 2026-01-02: Linux 6.18, 2 × Z80, 2 GiB, cgroups v2, load average 0.50 before the run.

### Goals

|      |           goal | measured |            |
|------|---------------:|---------:|-----------:|
| this | at most 5.0 ms |   5.0 ms |        met |
| that |  at most ×1.90 |    ×1.91 | **missed** |

### Part

|     |   ns |
|-----|-----:|
| a   |    1 |
| a×b | 1000 |

A note.
`
	if got := r.markdown(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestOptions(t *testing.T) {
	good := options{rounds: 1, creates: 1, starts: 1, crowd: 1, only: "kernel,calls"}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for _, bad := range []func(*options){
		func(o *options) { o.only = "kernel,cals" },
		func(o *options) { o.only = "kernel," },
		func(o *options) { o.creates = 0 },
		func(o *options) { o.crowd = -1 },
	} {
		o := good
		bad(&o)
		if err := o.check(); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

func TestReplaceIn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("before\n" + beginMark + "old\n" + endMark + "after\n")
	if err := replaceIn(path, "new\n"); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := "before\n" + beginMark + "new\n" + endMark + "after\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, text := range []string{"", beginMark, endMark + beginMark} {
		write(text)
		if err := replaceIn(path, "new\n"); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

// The document can be updated.
func TestDocumentHasMarks(t *testing.T) {
	data, err := os.ReadFile("../../docs/benchmarks.md")
	if err != nil {
		t.Fatal(err)
	}
	if before, _, _ := strings.Cut(string(data), endMark); !strings.Contains(before, beginMark) {
		t.Errorf("docs/benchmarks.md lacks %q before %q", beginMark, endMark)
	}
}

// Every kind has its turn in every round, after one of the other host, and after
// each of those equally often.
func TestTurns(t *testing.T) {
	follows := map[[2]string]int{}
	for n := range 9 {
		order := turns(n)
		seen := map[string]bool{}
		for i, k := range order {
			seen[k.name] = true
			if i == 0 {
				continue
			}
			if k.plugin == order[i-1].plugin {
				t.Errorf("round %d: %s follows %s", n, k.name, order[i-1].name)
			}
			if k.plugin {
				follows[[2]string{order[i-1].name, k.name}]++
			}
		}
		if len(seen) != len(kinds) {
			t.Errorf("round %d has %d kinds, want %d", n, len(seen), len(kinds))
		}
	}
	for _, a := range kinds[:3] {
		for _, b := range kinds[3:] {
			if n := follows[[2]string{a.name, b.name}]; n != 3 {
				t.Errorf("%s follows %s %d times in 9 rounds, want 3", b.name, a.name, n)
			}
		}
	}
}

// Each call of the mix works, so that its usual way is measured, not its errors.
func TestMix(t *testing.T) {
	m, err := newMix(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.run(3); err != nil {
		t.Error(err)
	}
	if len(m.list) != len(loads[1].calls) {
		t.Errorf("%d calls, want those of %v", len(m.list), loads[1].calls)
	}
	m.list[1].Args[0] = 1<<64 - 1
	if err := m.run(1); err == nil || !strings.Contains(err.Error(), loads[1].calls[1]) {
		t.Errorf("a call that fails: %v, want an error that names it", err)
	}
}

// A body that measures something else than it should says so.
func TestBodies(t *testing.T) {
	if got, err := getppid(0).measure(100); err != nil || got.Wall <= 0 {
		t.Errorf("getppid: %+v, %v", got, err)
	}
	if _, err := getppid(unix.EPERM).measure(1); !errors.Is(err, unix.EPERM) {
		t.Errorf("getppid that is not denied: %v, want an error", err)
	}
}

// What is asked about first is denied by the ratchet.
func TestFilters(t *testing.T) {
	answers := func(always bool) (out [2]string) {
		t.Helper()
		first, ratchet, err := filters(always)
		if err != nil {
			t.Fatal(err)
		}
		for i, f := range []seccomp.Filter{first, ratchet} {
			v, err := f.Answer(specs.ArchX86_64, unix.SYS_GETPPID, [6]uint64{})
			if err != nil {
				t.Fatal(err)
			}
			out[i] = v.String()
		}
		return out
	}
	notify, allow := seccomp.Verdict(unix.SECCOMP_RET_USER_NOTIF).String(), seccomp.Verdict(unix.SECCOMP_RET_ALLOW).String()
	deny := seccomp.Verdict(unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)).String()
	if got, want := answers(false), [2]string{notify, deny}; got != want {
		t.Errorf("getppid that differs: %q, want %q", got, want)
	}
	if got, want := answers(true), [2]string{allow, allow}; got != want {
		t.Errorf("getppid that is always allowed: %q, want %q", got, want)
	}
}

// Connections are made, timed, and leave nothing.
func TestHandshakes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends, and the namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		s, err := newSockets()
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(s.udp)
		var w stopwatch
		if err := s.handshakes(backlog+1, &w); err != nil || w.cpu <= 0 {
			t.Errorf("%v, %+v", err, w)
		}
		stat, err := os.ReadFile("/proc/thread-self/net/sockstat")
		if !strings.Contains(string(stat), "TCP: inuse 1 orphan 0 tw 0 ") {
			t.Errorf("the listener isn't all that is left: %v\n%s", err, stat)
		}
		if err := unix.Close(s.listener); err != nil {
			t.Error(err)
		}
		if err := s.handshakes(1, &w); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("with nobody there: %v, want %v", err, unix.ECONNREFUSED)
		}
	}()
	<-done
}

// TestParts runs what `make bench` runs, as briefly as can be. The calls part is
// left out: it can't have other recorders come and go beside it.
func TestParts(t *testing.T) {
	if os.Getuid() != 0 || os.Getenv("SYSLATCH_TOOLS") == "" {
		t.Skip("needs root, and containerd in SYSLATCH_TOOLS (make unit sets it)")
	}
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", dir+"/", "../../cmd/...").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var text strings.Builder
	figures := filepath.Join(dir, "figures.json")
	o := options{bin: dir, only: "phases,containers,crowd,starts,kernel", json: figures, rounds: 1, creates: 1, starts: 1, crowd: 20}
	if err := run(ctx, o, &text); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(figures)
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, m := range r.Metrics {
		got[m.Name] = m.Value
	}
	for _, name := range []string{
		"phases/go/to-c", "phases/libseccomp-golang/to-c", "phases/ratchet-denied/ratio", "phases/set/p50", "phases/barrier/p99", "phases/switch/p99", "phases/ratchet/process/p50",
		"connect/udp/allowed/to-trivial", "connect/tcp/beside/ratio",
		"containers/none/p50", "containers/record/p99", "handlers/create-container-record/p50", "handlers/publish/p50",
		"daemon/rest/rss", "daemon/crowd/rss", "starts/syslatchd-first/p50", "starts/record-output/p50", "kernel/1024/recorded",
	} {
		if got[name] <= 0 {
			t.Errorf("%s is %v, want more than 0", name, got[name])
		}
	}
	for _, title := range []string{"Goals", "Phases", "Connecting in a phase", "Container create to start", "Time in the daemon", "Memory of the daemon", "From start to recording", "Kernel memory"} {
		if !strings.Contains(text.String(), "\n### "+title+"\n") {
			t.Errorf("no section %q in:\n%s", title, text.String())
		}
	}
}
