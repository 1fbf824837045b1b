// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"maps"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// counts are those of a BPF program.
type counts struct {
	kernel *bpf.FilterDenials
	told   map[counted]uint64
	lost   uint64
}

// counted is what the kernel counts by.
type counted struct {
	cgroup          uint64
	tag, arch, call uint32
}

func openCounts(*cgroup.Hierarchy, *logrus.Entry) (source, error) {
	kernel, err := bpf.OpenFilterDenials()
	if err != nil {
		return nil, err
	}
	return &counts{kernel: kernel, told: map[counted]uint64{}}, nil
}

func (c *counts) watch(cgroup uint64, tag uint32) error { return c.kernel.Watch(cgroup, tag) }

func (c *counts) forget(cgroup uint64) error {
	maps.DeleteFunc(c.told, func(key counted, _ uint64) bool { return key.cgroup == cgroup })
	return c.kernel.Forget(cgroup)
}

func (c *counts) settle() {}

func (c *counts) read() (map[uint64][]Denial, uint64, error) {
	all, total, err := c.kernel.Read()
	if err != nil {
		return nil, 0, err
	}
	news := map[uint64][]Denial{}
	for _, d := range all {
		key := counted{d.Cgroup, d.Tag, d.Arch, d.Call}
		n := d.Count - c.told[key]
		c.told[key] = d.Count
		if abi, number, ok := seccomp.CallOf(d.Arch, d.Number); ok && n > 0 {
			news[d.Cgroup] = append(news[d.Cgroup], Denial{d.Tag, abi, number, d.PID, n})
		}
	}
	lost := total - c.lost
	c.lost = total
	return news, lost, nil
}

func (c *counts) Close() error { return c.kernel.Close() }
