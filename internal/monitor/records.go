// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

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
//
// BUG(monitor): audit's own limits (audit_backlog_limit, auditctl -r) drop records before
// anybody can count them.
type records struct {
	socket    *os.File
	hierarchy *cgroup.Hierarchy
	ended     *bpf.Ended    // nil: the cgroups of processes that have ended are not known
	done      chan struct{} // closed when nothing more comes
	closing   atomic.Bool

	mu      sync.Mutex
	tags    map[uint64][]tagged  // guarded by mu: by watched cgroup, the oldest first
	pending map[recorded]*Denial // guarded by mu: since the last read
	cgroups map[int]uint64       // guarded by mu: watched ones by process, since the last read
	last    time.Time            // guarded by mu: when something came
	lost    uint64               // guarded by mu: since the last read
	drops   uint32               // guarded by mu: the kernel's count, as of the last read
	failed  error                // guarded by mu: why nothing more comes
}

// tagged is a tag of a cgroup, and since when.
type tagged struct {
	tag   uint32
	since time.Time // by auditTime
}

type recorded struct {
	cgroup uint64
	tag    uint32
	abi    profiles.ABI
	number uint32 // or manyCalls
}

const (
	// auditSeccomp is AUDIT_SECCOMP, and readLog the group AUDIT_NLGRP_READLOG
	// (linux/audit.h).
	auditSeccomp = 1326
	readLog      = 1
	// mostRecord is more than one about seccomp has, in multiples of NLMSG_ALIGNTO.
	mostRecord = 16 << 10
	// manyCalls stands for all numbers from it on.
	manyCalls = 1024
	// mostPending bounds what is kept between two reads, and mostTags what is kept of a
	// cgroup for records that come late.
	mostPending = 4096
	mostTags    = 32
	// A record is on its way for some microseconds, or until the kernel has written those
	// before to a slow console: settled is how long nothing has to come, and mostSettling
	// the longest that this is waited for.
	settled      = 20 * time.Millisecond
	mostSettling = 200 * time.Millisecond
)

func openRecords(h *cgroup.Hierarchy, log *logrus.Entry) (source, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_AUDIT)
	if err != nil {
		return nil, fmt.Errorf("audit netlink: %w", err)
	}
	socket := os.NewFile(uintptr(fd), "audit netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (readLog - 1)}); err != nil {
		return nil, errors.Join(fmt.Errorf("audit netlink: join the group of readers (CAP_AUDIT_READ is needed): %w", err), socket.Close())
	}
	// The default is less than a burst of some hundred.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20) // as far as it may be
	}
	r := &records{
		socket: socket, hierarchy: h, done: make(chan struct{}),
		tags: map[uint64][]tagged{}, pending: map[recorded]*Denial{}, cgroups: map[int]uint64{},
	}
	if r.ended, err = bpf.OpenEnded(); err != nil {
		log.WithError(err).Debug("denials of processes that end at once can't be told")
	}
	go r.receive()
	return r, nil
}

func (r *records) receive() {
	defer close(r.done)
	defer func() {
		if p := recover(); p != nil {
			r.fail(fmt.Errorf("internal error: %v", p))
		}
	}()
	conn, err := r.socket.SyscallConn()
	buf := make([]byte, mostRecord)
	for err == nil {
		var n, flags int
		var from unix.Sockaddr
		var readErr error
		err = conn.Read(func(fd uintptr) bool {
			n, _, flags, from, readErr = unix.Recvmsg(int(fd), buf, nil, 0)
			return !errors.Is(readErr, unix.EAGAIN)
		})
		// What the socket had no room for is in its count of drops.
		if errors.Is(readErr, unix.ENOBUFS) || errors.Is(readErr, unix.EINTR) {
			continue
		}
		err = errors.Join(err, readErr)
		// Others than the kernel may send here, too.
		if kernel, ok := from.(*unix.SockaddrNetlink); err != nil || !ok || kernel.Pid != 0 {
			continue
		}
		if flags&unix.MSG_TRUNC != 0 {
			continue // none about seccomp is as long
		}
		r.mu.Lock()
		r.take(buf, n)
		r.last = time.Now()
		r.mu.Unlock()
	}
	if !r.closing.Load() {
		r.fail(err)
	}
}

func (r *records) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = fmt.Errorf("audit netlink: %w (restart this program)", err)
}

// take adds what a message of n bytes has, whose buffer has room to align it. mu is held.
func (r *records) take(buf []byte, n int) {
	messages, err := syscall.ParseNetlinkMessage(buf[:(n+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)])
	if err != nil {
		r.lost++
	}
	for _, m := range messages {
		if m.Header.Type == auditSeccomp {
			r.add(string(m.Data))
		}
	}
}

// add keeps what a record tells of a watched cgroup. mu is held.
func (r *records) add(text string) {
	rec, ok := parseRecord(text)
	if !ok {
		r.lost++
		return
	}
	if rec.action == unix.SECCOMP_RET_LOG || rec.action == unix.SECCOMP_RET_USER_NOTIF {
		return // only logged; or denied by a supervisor, which tells of it itself
	}
	id := r.cgroupOf(rec.pid)
	tags := r.tags[id]
	abi, number, ok := seccomp.CallOf(rec.arch, rec.number)
	if len(tags) == 0 || !ok {
		return
	}
	if rec.time.Before(tags[0].since) && len(tags) < mostTags {
		return // it was denied before the cgroup was watched
	}
	tag := tags[0].tag
	for _, t := range tags {
		if !rec.time.Before(t.since) {
			tag = t.tag
		}
	}
	key := recorded{id, tag, abi, min(number, manyCalls)}
	switch d := r.pending[key]; {
	case d != nil:
		d.Count++
		d.PID, d.Number = rec.pid, number
	case len(r.pending) < mostPending:
		r.pending[key] = &Denial{tag, abi, number, rec.pid, 1}
	default:
		r.lost++
	}
}

// cgroupOf is the watched cgroup that a process is, or was, in or below; 0 if there is none.
func (r *records) cgroupOf(pid int) uint64 {
	if id, ok := r.cgroups[pid]; ok {
		return id
	}
	id, err := r.hierarchy.Above(pid, func(id uint64) bool { return r.tags[id] != nil })
	switch {
	case err == nil:
	case r.ended != nil:
		id = r.ended.Cgroup(pid)
	default:
		r.lost++ // whoever's it was
	}
	if len(r.cgroups) < mostPending {
		r.cgroups[pid] = id
	}
	return id
}

func (r *records) watch(cgroup uint64, tag uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	tags := r.tags[cgroup]
	if len(tags) == 0 {
		clear(r.cgroups)
	}
	if len(tags) == 0 && r.ended != nil {
		if err := r.ended.Watch(cgroup, tag); err != nil {
			return err
		}
	}
	tags = tags[max(0, len(tags)+1-mostTags):]
	r.tags[cgroup] = append(slices.Clip(tags), tagged{tag, auditTime()})
	return nil
}

func (r *records) forget(cgroup uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.tags, cgroup)
	clear(r.cgroups)
	if r.ended == nil {
		return nil
	}
	return r.ended.Forget(cgroup)
}

func (r *records) read() (all map[uint64][]Denial, lost uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	all = map[uint64][]Denial{}
	for key, d := range r.pending {
		all[key.cgroup] = append(all[key.cgroup], *d)
	}
	clear(r.pending)
	clear(r.cgroups)
	drops, dropsErr := r.dropped()
	lost = r.lost + uint64(drops-r.drops)
	r.lost, r.drops = 0, drops
	return all, lost, errors.Join(r.failed, dropsErr)
}

// dropped is how many messages the socket had no room for, of all that audit tells.
func (r *records) dropped() (n uint32, err error) {
	conn, err := r.socket.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info [9]uint32 // SK_MEMINFO_VARS; linux/sock_diag.h
	const drops = 8    // SK_MEMINFO_DROPS
	size := uint32(unsafe.Sizeof(info))
	var errno unix.Errno
	err = conn.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err == nil && errno != 0 {
		err = os.NewSyscallError("getsockopt(SO_MEMINFO)", errno)
	}
	return info[drops], err
}

func (r *records) settle() {
	begun := time.Now()
	for time.Since(begun) < mostSettling {
		r.mu.Lock()
		last := r.last
		r.mu.Unlock()
		if last.Before(begun) {
			last = begun
		}
		wait := settled - time.Since(last)
		if wait <= 0 {
			return
		}
		select {
		case <-time.After(wait):
		case <-r.done:
			return
		}
	}
}

func (r *records) Close() error {
	r.closing.Store(true)
	err := r.socket.Close()
	<-r.done
	if r.ended != nil {
		err = errors.Join(err, r.ended.Close())
	}
	return err
}

// auditTime is by the clock of audit's records, which stands for up to 10 ms, and is written
// there in milliseconds.
func auditTime() time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
		return time.Now() // it is always there
	}
	return time.Unix(now.Unix()).Truncate(time.Millisecond)
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
	// The kernel writes the number as a signed long.
	n, err := strconv.ParseInt(fields["syscall"], 10, 64)
	r.number = uint32(n)
	return r, ok && err == nil && !r.time.IsZero()
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
