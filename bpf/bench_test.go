// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/json"
	"io"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/rawcalls"
)

const benchCalls = 500_000

// benchCaller times a run of getppid for each byte it reads.
func benchCaller(in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	list := []rawcalls.Call{{Number: sysGetppid, Times: benchCalls}}
	enc := json.NewEncoder(out)
	for b := make([]byte, 1); ; {
		if _, err := in.Read(b); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		begin := time.Now()
		rawcalls.Run(list)
		if err := enc.Encode(float64(time.Since(begin)) / benchCalls); err != nil {
			return err
		}
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// BenchmarkGetppid compares the cheapest call there is: with nothing attached,
// with the recorder attached for someone else, and recorded. The three take
// turns, so that whatever else the machine does falls on all alike; ratios are
// medians of those within a turn.
func BenchmarkGetppid(b *testing.B) {
	r := open(b, pinDir(b), bpf.Options{})
	untracked, tracked := newCgroup(b), newCgroup(b)
	p, q := start(b, &untracked, "bench", nil), start(b, &tracked, "bench", nil)
	measure := func(p *process) (ns float64) {
		p.release()
		p.line(&ns)
		return ns
	}
	const rounds = 21
	var bare, others, ours, othersRatio, oursRatio []float64
	for b.Loop() {
		for range rounds {
			x := measure(p)
			h := track(b, r, tracked, bpf.TrackOptions{Gate: bpf.GateOpen})
			y, z := measure(p), measure(q)
			finish(b, r, h)
			bare, others, ours = append(bare, x), append(others, y), append(ours, z)
			othersRatio, oursRatio = append(othersRatio, y/x), append(oursRatio, z/x)
		}
	}
	p.in.Close()
	q.in.Close()
	p.wait()
	q.wait()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(bare), "bare-ns/call")
	b.ReportMetric(median(others), "untracked-ns/call")
	b.ReportMetric(median(ours), "tracked-ns/call")
	b.ReportMetric(median(othersRatio), "untracked-ratio")
	b.ReportMetric(median(oursRatio), "tracked-ratio")
}

// BenchmarkTrack is what a container's start pays, and the end.
func BenchmarkTrack(b *testing.B) {
	r := open(b, pinDir(b), bpf.Options{})
	// So that programs are attached already.
	first := track(b, r, newCgroup(b), bpf.TrackOptions{})
	cg := newCgroup(b)
	var tracks, finishes []float64
	for b.Loop() {
		begin := time.Now()
		h := track(b, r, cg, bpf.TrackOptions{})
		middle := time.Now()
		finish(b, r, h)
		tracks = append(tracks, float64(middle.Sub(begin))/1e3)
		finishes = append(finishes, float64(time.Since(middle))/1e3)
	}
	finish(b, r, first)
	b.ReportMetric(median(tracks), "track-us")
	b.ReportMetric(median(finishes), "untrack-us")
}

// BenchmarkOpen is what each run of a hook pays first.
func BenchmarkOpen(b *testing.B) {
	dir := pinDir(b)
	open(b, dir, bpf.Options{})
	for b.Loop() {
		r, err := bpf.Open(dir, bpf.Options{})
		if err != nil {
			b.Fatal(err)
		}
		if err := r.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMemory prints what the kernel holds for an instance, used or not,
// and for the rest.
func BenchmarkMemory(b *testing.B) {
	memory := func(instances int) uint64 {
		r, err := bpf.Open("", bpf.Options{NoPin: true, Instances: instances})
		if err != nil {
			b.Fatal(err)
		}
		defer r.Close()
		st, err := r.Stats()
		if err != nil {
			b.Fatal(err)
		}
		return st.Memory
	}
	needRoot(b)
	var half, all uint64
	for b.Loop() {
		half, all = memory(bpf.DefaultInstances/2), memory(bpf.DefaultInstances)
	}
	each := (all - half) / (bpf.DefaultInstances / 2)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(all), "bytes")
	b.ReportMetric(float64(each), "bytes/instance")
	b.Logf("%d bytes for %d instances", all, bpf.DefaultInstances)
}
