// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
)

// kernelPart reads what the kernel holds for the recorder: for maps of several
// sizes, and with none and all of their instances in use.
func (b *bench) kernelPart(ctx context.Context) (err error) {
	group, err := cgroup.New("bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.Remove()) }()
	sizes := []int{1, 100, bpf.DefaultInstances}
	t := table{head: []string{"room for", "idle, KiB", "all recorded, KiB", "grown by, for each, bytes", "for each in all, KiB"}}
	var last []mapUse
	for _, n := range sizes {
		idle, used, err := b.kernelUse(ctx, group, n)
		if err != nil {
			return err
		}
		grown := float64(sum(used)-sum(idle)) / float64(n)
		b.report.metric(kib(sum(idle)), "KiB", "kernel", fmt.Sprint(n), "idle")
		b.report.metric(kib(sum(used)), "KiB", "kernel", fmt.Sprint(n), "recorded")
		t.rows = append(t.rows, []string{instances(n), fmt.Sprintf("%.0f", kib(sum(idle))), fmt.Sprintf("%.0f", kib(sum(used))), fmt.Sprintf("%.0f", grown), fmt.Sprintf("%.1f", kib(sum(used))/float64(n))})
		if n == bpf.DefaultInstances {
			for i := range used {
				used[i].idle = idle[i].bytes
			}
			last = used
		}
	}
	detail := table{head: []string{fmt.Sprintf("map or program, room for %d", bpf.DefaultInstances), "idle, KiB", "all recorded, KiB"}}
	for _, u := range last {
		detail.rows = append(detail.rows, []string{u.name, fmt.Sprintf("%.1f", kib(u.idle)), fmt.Sprintf("%.1f", kib(u.bytes))})
	}
	b.report.add(section{
		title:  "Kernel memory",
		tables: []table{t, detail},
		notes:  []string{fmt.Sprintf("As the kernel counts it (`memlock` in `/proc/PID/fdinfo`, `bpftool map`). Records and slots are allocated when the daemon starts for the first time, so that a recording can't fail for want of memory; `syslatchd` has room for %d. `tracked_cgroups` grows by one entry for each cgroup.", bpf.DefaultInstances)},
	})
	b.progress("kernel", 1, 1)
	return nil
}

func instances(n int) string {
	if n == 1 {
		return "1 instance"
	}
	return fmt.Sprintf("%d instances", n)
}

func kib(bytes uint64) float64 { return float64(bytes) / 1024 }

// mapUse is the memory of a map, or of a program.
type mapUse struct {
	name        string
	bytes, idle uint64
}

func sum(all []mapUse) (bytes uint64) {
	for _, u := range all {
		bytes += u.bytes
	}
	return bytes
}

// kernelUse makes a recorder with room for n instances and reads its memory
// before and while it records n cgroups.
func (b *bench) kernelUse(ctx context.Context, group *cgroup.Group, n int) (idle, used []mapUse, err error) {
	dir := filepath.Join(b.bpffs, "kernel")
	r, err := bpf.Open(dir, bpf.Options{Instances: n})
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, r.Close(), bpf.Remove(dir)) }()
	if idle, err = pinned(dir); err != nil {
		return nil, nil, err
	}
	for i := range n {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		path := filepath.Join(group.Path(), fmt.Sprintf("%d-%d", n, i))
		if err := os.Mkdir(path, 0o755); err != nil {
			return nil, nil, err
		}
		id, err := cgroup.ID(path)
		if err != nil {
			return nil, nil, err
		}
		if _, err := r.Track(id, bpf.TrackOptions{Gate: bpf.GateOpen}); err != nil {
			return nil, nil, err
		}
	}
	used, err = pinned(dir)
	return idle, used, err
}

// pinned reads the memory of everything that is pinned in a recorder's
// directory.
func pinned(dir string) (all []mapUse, err error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		return nil, err
	}
	programs := mapUse{name: "programs"}
	for _, path := range paths {
		if st, err := os.Stat(path); err != nil {
			return nil, err
		} else if st.IsDir() {
			continue
		}
		if m, err := ebpf.LoadPinnedMap(path, nil); err == nil {
			info, err := m.Info()
			m.Close()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			bytes, _ := info.Memlock() // every kernel that the programs load on has it
			all = append(all, mapUse{name: "`" + filepath.Base(path) + "`", bytes: bytes})
			continue
		}
		p, err := ebpf.LoadPinnedProgram(path, nil)
		if err != nil {
			return nil, fmt.Errorf("%s is neither map nor program: %w", path, err)
		}
		info, err := p.Info()
		p.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		bytes, _ := info.Memlock()
		jited, err := info.JitedSize()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		programs.bytes += bytes + uint64(jited)
	}
	return append(all, programs), nil
}
