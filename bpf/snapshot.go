// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// Snapshot reads what an instance did so far, without disturbing it. Every call
// that was entered before Snapshot is in it.
func (r *Recorder) Snapshot(h Handle) (*Snapshot, error) {
	release, err := r.acquire()
	if err != nil {
		return nil, err
	}
	defer release()
	s, err := r.slot(h)
	if err != nil {
		return nil, err
	}
	return r.snapshot(h, s)
}

// snapshot reads a slot and its record. The lock is held.
func (r *Recorder) snapshot(h Handle, s *syslatchSlot) (*Snapshot, error) {
	raw, err := r.records.LookupBytes(h.Slot)
	if err != nil {
		return nil, fmt.Errorf("read record %d: %w", h.Slot, err)
	}
	var rec syslatchRecord
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, &rec); err != nil {
		return nil, fmt.Errorf("read record %d: %w", h.Slot, err)
	}
	boot, err := bootTime()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	lost := func(i syslatchLoss) uint64 { return atomic.LoadUint64(&s.Losses[i]) }
	return &Snapshot{
		Instance: s.instance(h.Slot, now.Add(time.Duration(s.StartNs)-boot)),
		Taken:    now,
		GateOpen: atomic.LoadInt32(&s.Threshold) != thresholdShut,
		Calls:    rec.calls(),
		Args:     rec.args(r.argRows[:]),
		OddCalls: rec.oddCalls(),
		Losses: Losses{
			Events:       lost(syslatchLossLOSS_EVENTS),
			ForeignCalls: lost(syslatchLossLOSS_FOREIGN),
			Cgroups:      lost(syslatchLossLOSS_CGROUPS),
			OddCalls:     lost(syslatchLossLOSS_ODD_CALLS),
			Args:         lost(syslatchLossLOSS_ARGS),
		},
	}, nil
}

func (rec *syslatchRecord) calls() []CallSet {
	var sets []CallSet
	for phase := range rec.Bits {
		for abi := range rec.Bits[phase] {
			var numbers []uint16
			for i, word := range rec.Bits[phase][abi] {
				for ; word != 0; word &= word - 1 {
					numbers = append(numbers, uint16(i*64+bits.TrailingZeros64(word)))
				}
			}
			if numbers != nil {
				sets = append(sets, CallSet{Phase: uint8(phase), ABI: ABI(abi), Numbers: numbers})
			}
		}
	}
	return sets
}

// args reads the sets of argument values: the words say what was seen, the
// lanes which sets have become any value.
func (rec *syslatchRecord) args(rows []syslatchArgRow) []ArgSet {
	type key struct {
		phase, abi, row uint8
	}
	sets := make(map[key][]uint64)
	for abi := range rec.ArgCounts {
		for row, lanes := range rec.ArgCounts[abi] {
			for phase := range uint8(Phases) {
				if uint8(lanes>>(8*phase)) > MaxArgValues {
					sets[key{phase, uint8(abi), uint8(row)}] = make([]uint64, MaxArgValues+1)
				}
			}
		}
	}
	for _, word := range rec.Args {
		if word != 0 {
			k := key{uint8(word>>40) & 7, uint8(word>>37) & 3, uint8(word>>32) & 31}
			sets[k] = append(sets[k], word&0xffffffff)
		}
	}
	all := make([]ArgSet, 0, len(sets))
	for k, values := range sets {
		row := rows[k.row]
		set := ArgSet{Phase: k.phase, ABI: ABI(k.abi), Number: row.Nr[k.abi], Arg: row.Arg, Mask: row.Mask}
		if len(values) > MaxArgValues {
			set.Any = true
		} else {
			slices.Sort(values)
			set.Values = values
		}
		all = append(all, set)
	}
	slices.SortFunc(all, func(a, b ArgSet) int {
		rank := func(s ArgSet) int {
			return int(s.Phase)<<24 | int(s.ABI)<<20 | int(s.Number)<<4 | int(s.Arg)
		}
		return rank(a) - rank(b)
	})
	return all
}

func (rec *syslatchRecord) oddCalls() []OddCall {
	var all []OddCall
	for _, word := range rec.OddCalls {
		if word != 0 {
			all = append(all, OddCall{Phase: uint8(word>>40) & 7, ABI: ABI(word>>32) & 3, Number: uint32(word)})
		}
	}
	slices.SortFunc(all, func(a, b OddCall) int {
		rank := func(c OddCall) int { return int(c.Phase)<<40 | int(c.ABI)<<32 | int(c.Number) }
		return rank(a) - rank(b)
	})
	return all
}

// gatherTime is how long Events lets new events lie in the ring, once it has read
// all that were there.
const gatherTime = 10 * time.Millisecond

// Events calls fn for every event, in order, from the oldest that nobody has
// read, until ctx is done; then it returns nil. There can be one reader at a
// time for all processes: Events returns ErrBusy if there is another. Events of
// instances that are gone may come.
func (r *Recorder) Events(ctx context.Context, fn func(Event)) error {
	reader, done, err := r.reader()
	if err != nil {
		return err
	}
	defer done()
	// Not Close: that takes the ring from under AvailableBytes.
	stop := context.AfterFunc(ctx, func() { _ = reader.Flush() })
	defer stop()
	gather := time.NewTimer(gatherTime)
	defer gather.Stop()
	var rec ringbuf.Record
	for ctx.Err() == nil {
		e, err := read(reader, &rec)
		if errors.Is(err, ringbuf.ErrFlushed) {
			return nil
		}
		if err != nil {
			return err
		}
		fn(e)
		// The start of a container makes some sixty events, one after another:
		// to be woken for each would take the processor from that start.
		if reader.AvailableBytes() == 0 {
			gather.Reset(gatherTime)
			select {
			case <-gather.C:
			case <-ctx.Done():
			}
		}
	}
	return nil
}

// Drain calls fn for every event that is there now, as Events does, and returns.
// It returns ErrBusy if another process reads events. While it runs it is the
// reader: what was there before it began has been handed to somebody when it
// returns nil.
func (r *Recorder) Drain(fn func(Event)) error {
	reader, done, err := r.reader()
	if err != nil {
		return err
	}
	defer done()
	reader.SetDeadline(time.Unix(1, 0)) // long ago: don't wait
	var rec ringbuf.Record
	for {
		e, err := read(reader, &rec)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		fn(e)
	}
}

// reader is the ring's only one until done is called.
func (r *Recorder) reader() (_ *ringbuf.Reader, done func(), err error) {
	unlock, err := r.lockReader()
	if err != nil {
		return nil, nil, err
	}
	reader, err := ringbuf.NewReader(r.events)
	if err != nil {
		unlock()
		return nil, nil, fmt.Errorf("read events: %w", err)
	}
	return reader, func() { reader.Close(); unlock() }, nil
}

func read(reader *ringbuf.Reader, rec *ringbuf.Record) (Event, error) {
	if err := reader.ReadInto(rec); err != nil {
		return Event{}, fmt.Errorf("read events: %w", err)
	}
	var e syslatchEvent
	if err := binary.Read(bytes.NewReader(rec.RawSample), binary.NativeEndian, &e); err != nil {
		return Event{}, fmt.Errorf("decode event of %d bytes: %w", len(rec.RawSample), err)
	}
	return e.event(), nil
}

// lockReader makes this the only reader of the events.
func (r *Recorder) lockReader() (unlock func(), err error) {
	if r.lock == nil {
		return func() {}, nil
	}
	f, err := os.Open(filepath.Join(r.dir, "reader"))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrBusy
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil // closing unlocks
}

func (e *syslatchEvent) event() Event {
	return Event{
		Handle: Handle{Slot: e.Slot, Generation: e.Generation},
		Since:  time.Duration(e.SinceNs),
		Cgroup: e.Cgroup,
		Phase:  e.Phase,
		ABI:    ABI(e.Abi),
		Number: uint32(e.Nr),
		PID:    int(e.Pid),
		TGID:   int(e.Tgid),
		Comm:   text(e.Comm[:]),
		Exe:    text(e.Exe[:]),
	}
}

// text is the bytes up to the first NUL.
func text(c []int8) string {
	b := make([]byte, 0, len(c))
	for _, v := range c {
		if v == 0 {
			break
		}
		b = append(b, byte(v))
	}
	return string(b)
}

// Stats counts what there is.
func (r *Recorder) Stats() (Stats, error) {
	release, err := r.acquire()
	if err != nil {
		return Stats{}, err
	}
	defer release()
	st := Stats{Capacity: len(r.slots), Errors: make(map[string]uint64)}
	for i := range r.slots {
		switch r.slots[i].State {
		case uint32(syslatchSlotStateSLOT_ACTIVE):
			st.Instances++
		case uint32(syslatchSlotStateSLOT_FINISHED):
			st.Finished++
		}
	}
	if err := r.eachCgroup(func(syslatchTracked) { st.Cgroups++ }); err != nil {
		return Stats{}, err
	}
	if st.Attached, err = r.attached(); err != nil {
		return Stats{}, err
	}
	for place, name := range []string{"ring_reserve", "cgroup_insert", "comm", "exe"} {
		var n uint64
		if err := r.errors.Lookup(uint32(place), &n); err != nil {
			return Stats{}, fmt.Errorf("read error counts: %w", err)
		}
		st.Errors[name] = n
	}
	for _, m := range []*ebpf.Map{r.tracked, r.awaited, r.slotMap, r.records, r.events, r.errors} {
		info, err := m.Info()
		if err != nil {
			return Stats{}, fmt.Errorf("map info: %w", err)
		}
		n, _ := info.Memlock() // every kernel that the programs load on has it
		st.Memory += n
	}
	return st, nil
}

// attached says whether calls are being watched. The lock is held.
func (r *Recorder) attached() (bool, error) {
	if r.lock == nil {
		return len(r.links) > 0, nil
	}
	pins, err := os.ReadDir(filepath.Join(r.dir, "links"))
	return len(pins) > 0, err
}
