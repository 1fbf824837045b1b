// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"errors"
	"io/fs"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// counts are those of a BPF program.
type counts struct {
	kernel    *bpf.FilterDenials
	hierarchy *cgroup.Hierarchy
	told      map[counted]uint64
	lost      uint64
	swept     time.Time
}

type counted struct {
	cgroup uint64
	abi    string
	number uint32
}

// sweepEvery is how often the counts of cgroups that are there no more are removed.
const sweepEvery = time.Minute

func openCounts(h *cgroup.Hierarchy, _ *logrus.Entry) (source, error) {
	kernel, err := bpf.OpenFilterDenials()
	if err != nil {
		return nil, err
	}
	return &counts{kernel: kernel, hierarchy: h, told: map[counted]uint64{}, swept: time.Now()}, nil
}

func (c *counts) read(bool) (news []Denial, lost uint64, err error) {
	if time.Since(c.swept) > sweepEvery {
		c.swept = time.Now()
		err = c.sweep()
	}
	all, total, readErr := c.kernel.Read()
	if readErr != nil {
		return nil, 0, errors.Join(err, readErr)
	}
	told := make(map[counted]uint64, len(all))
	for _, d := range all {
		abi, number, ok := seccomp.CallOf(d.Arch, d.Number)
		key := counted{d.Cgroup, string(abi), min(number, manyCalls)}
		told[key] = d.Count
		if n := d.Count - c.told[key]; n > 0 && ok {
			news = append(news, Denial{Cgroup: d.Cgroup, ABI: abi, Number: number, PID: d.PID, Count: n})
		}
	}
	c.told = told
	lost, c.lost = total-c.lost, total
	return news, lost, err
}

// manyCalls stands for those numbers that are counted as one.
const manyCalls = 1024

func (c *counts) sweep() error {
	return c.kernel.Forget(func(id uint64) bool {
		_, err := c.hierarchy.Path(id)
		return errors.Is(err, fs.ErrNotExist)
	})
}

func (c *counts) Close() error { return c.kernel.Close() }
