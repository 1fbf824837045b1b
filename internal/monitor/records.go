// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

// records are those of the kernel's audit log about seccomp, read from its multicast
// group, beside an auditd or without one. They name a process: its cgroup is looked up when
// the record comes, which may be behind its end.
type records struct {
	conn      *netlink.Conn
	hierarchy *cgroup.Hierarchy
	ended     *bpf.Ended    // nil: the cgroups of processes that have ended are not known
	arrived   chan struct{} // has an element if something has come since it was last taken
	done      chan struct{} // closed when nothing more comes

	mu      sync.Mutex
	pending map[recorded]*Denial // guarded by mu: since the last read
	cgroups map[int]uint64       // guarded by mu: by process, since the last read
	lost    uint64               // guarded by mu: since the last read
	failed  error                // guarded by mu: why nothing more comes
}

type recorded struct {
	cgroup uint64
	abi    profiles.ABI
	number uint32
	at     int64 // in units of coarse
}

const (
	// readLog is AUDIT_NLGRP_READLOG (linux/audit.h).
	readLog = 1
	// auditSeccomp is AUDIT_SECCOMP.
	auditSeccomp = 1326
	// coarse is the longest that the clock stands which audit reads.
	coarse = 10 * time.Millisecond
	// mostPending bounds what is kept between two reads.
	mostPending = 4096
	// A record is on its way for some microseconds: settled is how long nothing has to
	// come, and mostSettling the longest that this is waited for.
	settled      = 20 * time.Millisecond
	mostSettling = 200 * time.Millisecond
)

func openRecords(h *cgroup.Hierarchy, log *logrus.Entry) (source, error) {
	conn, err := netlink.Dial(unix.NETLINK_AUDIT, nil)
	if err != nil {
		return nil, fmt.Errorf("audit netlink: %w", err)
	}
	if err := conn.JoinGroup(readLog); err != nil {
		return nil, errors.Join(fmt.Errorf("audit netlink: join the group of readers (CAP_AUDIT_READ is needed): %w", err), conn.Close())
	}
	_ = conn.SetReadBuffer(4 << 20) // the default's is less
	r := &records{
		conn: conn, hierarchy: h, arrived: make(chan struct{}, 1), done: make(chan struct{}),
		pending: map[recorded]*Denial{}, cgroups: map[int]uint64{},
	}
	if r.ended, err = bpf.OpenEnded(); err != nil {
		log.WithError(err).Debug("denials of processes that end at once can't be told")
	}
	go r.receive()
	return r, nil
}

func (r *records) receive() {
	defer close(r.done)
	for {
		messages, err := r.conn.Receive()
		r.mu.Lock()
		for _, m := range messages {
			if m.Header.Type == auditSeccomp {
				r.add(string(m.Data))
			}
		}
		if errors.Is(err, unix.ENOBUFS) {
			r.lost++ // at least
			err = nil
		}
		if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) {
			r.failed = fmt.Errorf("audit netlink: %w", err)
		}
		r.mu.Unlock()
		if err != nil {
			return
		}
		select {
		case r.arrived <- struct{}{}:
		default:
		}
	}
}

// add keeps what a record tells. mu is held.
func (r *records) add(text string) {
	rec, ok := parseRecord(text)
	if !ok {
		r.lost++
		return
	}
	if rec.action == unix.SECCOMP_RET_LOG || rec.action == unix.SECCOMP_RET_USER_NOTIF {
		return // only logged; or denied by a supervisor, which tells of it itself
	}
	abi, number, ok := seccomp.CallOf(rec.arch, rec.number)
	if !ok {
		r.lost++
		return
	}
	id, ok := r.cgroups[rec.pid]
	if !ok {
		if dir, err := r.hierarchy.OfPID(rec.pid); err == nil {
			id, _ = cgroup.ID(dir) // 0 if it is gone
		}
		if id == 0 && r.ended != nil {
			id = r.ended.Cgroup(rec.pid)
		}
		if id != 0 && len(r.cgroups) < mostPending {
			r.cgroups[rec.pid] = id
		}
	}
	key := recorded{id, abi, number, rec.time.UnixNano() / int64(coarse)}
	switch d := r.pending[key]; {
	case id == 0:
		r.lost++
	case d != nil:
		d.Count++
		d.PID = rec.pid
	case len(r.pending) < mostPending:
		r.pending[key] = &Denial{Cgroup: id, ABI: abi, Number: number, PID: rec.pid, Count: 1, Time: rec.time}
	default:
		r.lost++
	}
}

func (r *records) read(last bool) (all []Denial, lost uint64, err error) {
	if last {
		r.settle()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.pending {
		all = append(all, *d)
	}
	clear(r.pending)
	clear(r.cgroups)
	lost, r.lost = r.lost, 0
	err, r.failed = r.failed, nil
	return all, lost, err
}

// settle waits for records that are on their way.
func (r *records) settle() {
	limit := time.After(mostSettling)
	for {
		select {
		case <-r.arrived:
		case <-time.After(settled):
			return
		case <-limit:
			return
		case <-r.done:
			return
		}
	}
}

func (r *records) Close() error {
	err := r.conn.Close()
	<-r.done
	if r.ended != nil {
		err = errors.Join(err, r.ended.Close())
	}
	return err
}

// record is what one of the kernel's says (kernel/auditsc.c, audit_seccomp).
type record struct {
	time   time.Time
	pid    int
	arch   uint32
	number uint32
	action uint32
}

// parseRecord reads "audit(1700000000.123:4): auid=0 … pid=7 comm="sh" exe="/bin/sh" sig=0
// arch=c000003e syscall=101 compat=0 ip=0x7f… code=0x50000". What a task chooses, comm and
// exe, has no spaces: with any the kernel writes it in hexadecimal.
func parseRecord(text string) (r record, ok bool) {
	fields := map[string]string{}
	for _, field := range strings.Fields(strings.TrimRight(text, "\x00\n")) {
		if key, value, ok := strings.Cut(field, "="); ok {
			fields[key] = value
		}
	}
	number := func(key string, base, bits int) uint32 {
		n, err := strconv.ParseUint(strings.TrimPrefix(fields[key], "0x"), base, bits)
		ok = ok && err == nil
		return uint32(n)
	}
	ok = true
	r = record{parseTime(text), int(number("pid", 10, 31)), number("arch", 16, 32), 0, number("code", 16, 32)}
	ok = ok && !r.time.IsZero()
	// The kernel writes the number as a signed long.
	n, err := strconv.ParseInt(fields["syscall"], 10, 64)
	r.number = uint32(n)
	return r, ok && err == nil
}

// parseTime reads "audit(1700000000.123:4):".
func parseTime(text string) (t time.Time) {
	text, _, _ = strings.Cut(strings.TrimPrefix(text, "audit("), ":")
	seconds, milliseconds, _ := strings.Cut(text, ".")
	s, err := strconv.ParseInt(seconds, 10, 64)
	ms, err2 := strconv.ParseInt(milliseconds, 10, 64)
	if err != nil || err2 != nil {
		return t
	}
	return time.Unix(s, ms*int64(time.Millisecond))
}
