// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// op is one thing that a process under phases is asked to do.
type op struct {
	Do    string
	Path  string
	FD    int
	Other int
	Flags int
	Kind  int    // a socket's family
	Addr  string // "127.0.0.1:80", "unix:PATH", "unspec:…" as one of no family
	Async bool   // io_uring: by a worker
}

// done is what came of it.
type done struct {
	N     int // a descriptor, a number of bytes
	Errno unix.Errno
	Err   string // of what has to work
}

// phased does as it is asked until its input ends.
func phased(in io.Reader, out io.Writer) error {
	runtime.LockOSThread() // for good: a thread may get a mount namespace of its own
	d, e := json.NewDecoder(in), json.NewEncoder(out)
	w := &worker{}
	for {
		var o op
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if o.Do == "again" { // the next answer is that of the program that it executes
			if err := e.Encode(done{}); err != nil {
				return err
			}
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			return unix.Exec(exe, []string{exe}, os.Environ())
		}
		n, err := w.do(o)
		r := done{N: n}
		if err != nil && !errors.As(err, &r.Errno) {
			r.Err = err.Error()
		}
		if err := e.Encode(r); err != nil {
			return err
		}
	}
}

// worker is the state of a process under phases: its last mapping.
type worker struct {
	memory []byte
}

func sockaddr(text string, kind int) (sa []byte, err error) {
	if path, ok := strings.CutPrefix(text, "unix:"); ok {
		sa = append([]byte{unix.AF_UNIX, 0}, path...)
		if strings.HasPrefix(path, "@") {
			sa[2] = 0
			return sa, nil
		}
		return append(sa, 0), nil
	}
	text, none := strings.CutPrefix(text, "unspec:")
	ap, err := netip.ParseAddrPort(text)
	if err != nil {
		return nil, err
	}
	family := byte(unix.AF_INET)
	if ap.Addr().Is6() {
		family = unix.AF_INET6
	}
	sa = []byte{family, 0, byte(ap.Port() >> 8), byte(ap.Port())}
	if none {
		sa[0] = unix.AF_UNSPEC
	}
	if ap.Addr().Is6() {
		sa = append(sa, 0, 0, 0, 0)
		sa = append(sa, ap.Addr().AsSlice()...)
		return append(sa, 0, 0, 0, 0), nil
	}
	return append(append(sa, ap.Addr().AsSlice()...), make([]byte, 8)...), nil
}

func errnoOf(n, _ uintptr, errno syscall.Errno) (int, error) {
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

func (w *worker) do(o op) (int, error) {
	buf := []byte("x")
	switch o.Do {
	case "ready":
		return 0, nil
	case "udp connects", "tcp connects", "writes", "opens":
		return timed(o)
	case "open":
		dir := unix.AT_FDCWD
		if o.FD > 0 {
			dir = o.FD
		}
		return unix.Openat(dir, o.Path, o.Flags, 0o600)
	case "openat2":
		how := unix.OpenHow{Flags: uint64(o.Flags)}
		if o.Flags&unix.O_CREAT != 0 {
			how.Mode = 0o600
		}
		return unix.Openat2(unix.AT_FDCWD, o.Path, &how)
	case "handle":
		h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, o.Path, 0)
		if err != nil {
			return -1, errors.New("name_to_handle_at: " + err.Error())
		}
		return unix.OpenByHandleAt(o.FD, h, o.Flags)
	case "read":
		return unix.Read(o.FD, buf)
	case "write":
		return unix.Write(o.FD, buf)
	case "close":
		return 0, unix.Close(o.FD)
	case "ftruncate":
		return 0, unix.Ftruncate(o.FD, 1)
	case "truncate":
		return 0, unix.Truncate(o.Path, 1)
	case "fallocate":
		return 0, unix.Fallocate(o.FD, 0, 0, 1)
	case "sendfile":
		var at int64
		return unix.Sendfile(o.FD, o.Other, &at, 1)
	case "splice":
		n, err := unix.Splice(o.FD, nil, o.Other, nil, 1, unix.SPLICE_F_NONBLOCK)
		return int(n), err
	case "pidfd":
		return unix.PidfdOpen(os.Getpid(), 0)
	case "memfd":
		return unix.MemfdCreate("m", 0)
	case "mmap":
		var err error
		w.memory, err = unix.Mmap(o.FD, 0, 1, o.Flags, unix.MAP_SHARED)
		return 0, err
	case "mmap private":
		m, err := unix.Mmap(o.FD, 0, 1, o.Flags, unix.MAP_PRIVATE)
		if err == nil {
			err = unix.Munmap(m)
		}
		return 0, err
	case "mprotect":
		return 0, unix.Mprotect(w.memory[:cap(w.memory)], o.Flags)
	case "munmap":
		return 0, unix.Munmap(w.memory)
	case "store":
		w.memory[0] = 'y'
		return 0, nil
	case "mq_open":
		name, err := unix.BytePtrFromString(o.Path)
		if err != nil {
			return -1, err
		}
		n, m, errno := unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(name)), uintptr(o.Flags), 0o600, 0, 0, 0)
		return errnoOf(n, m, errno)
	case "mq_unlink":
		name, err := unix.BytePtrFromString(o.Path)
		if err != nil {
			return -1, err
		}
		n, m, errno := unix.Syscall(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(name)), 0, 0)
		return errnoOf(n, m, errno)
	case "filter":
		_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(allowAll())))
		return errnoOf(0, 0, errno)
	case "exec", "sh":
		argv := []string{o.Path}
		if o.Do == "sh" {
			argv = []string{"/bin/busybox", "sh", "-c", o.Path}
		}
		pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
		if err != nil {
			return -1, err
		}
		var st syscall.WaitStatus
		_, err = syscall.Wait4(pid, &st, 0, nil)
		return st.ExitStatus(), err
	case "chroot":
		if err := unix.Chroot(o.Path); err != nil {
			return -1, err
		}
		return 0, unix.Chdir("/")
	case "pivot":
		return pivot(o.Path)
	case "mkdir":
		return 0, unix.Mkdir(o.Path, 0o700)
	case "move":
		return 0, os.WriteFile(o.Path, []byte(fmt.Sprint(o.Other)), 0)
	case "socket":
		return unix.Socket(o.Kind, o.Flags, o.Other)
	case "socketpair":
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		return p[0]<<16 | p[1], err
	case "pipe":
		var p [2]int
		err := unix.Pipe(p[:])
		return p[0]<<16 | p[1], err
	case "listen":
		return 0, unix.Listen(o.FD, 5)
	case "accept":
		n, _, err := unix.Accept4(o.FD, unix.SOCK_NONBLOCK)
		return n, err
	case "port":
		sa, err := unix.Getsockname(o.FD)
		if err != nil {
			return -1, err
		}
		if in, ok := sa.(*unix.SockaddrInet4); ok {
			return in.Port, nil
		}
		return -1, errors.New("no port")
	case "recv":
		n, _, err := unix.Recvfrom(o.FD, buf, unix.MSG_DONTWAIT)
		return n, err
	case "send":
		n, m, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(o.FD), uintptr(unsafe.Pointer(&buf[0])), 1, unix.MSG_NOSIGNAL, 0, 0)
		return errnoOf(n, m, errno)
	case "connect", "bind", "sendto":
		sa, err := sockaddr(o.Addr, o.Kind)
		if err != nil {
			return -1, err
		}
		at, n := uintptr(unsafe.Pointer(&sa[0])), uintptr(len(sa))
		switch o.Do {
		case "connect":
			n, m, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(o.FD), at, n)
			return errnoOf(n, m, errno)
		case "bind":
			n, m, errno := unix.Syscall(unix.SYS_BIND, uintptr(o.FD), at, n)
			return errnoOf(n, m, errno)
		}
		n, m, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(o.FD), uintptr(unsafe.Pointer(&buf[0])), 1, uintptr(o.Flags)|unix.MSG_NOSIGNAL, at, n)
		return errnoOf(n, m, errno)
	case "uring open":
		path, err := unix.BytePtrFromString(o.Path)
		if err != nil {
			return -1, err
		}
		return ring(func(e *sqe) {
			e.opcode, e.fd, e.addr, e.len, e.flags2 = 18, unix.AT_FDCWD, uint64(uintptr(unsafe.Pointer(path))), 0o600, uint32(o.Flags)
		}, o.Async)
	case "uring connect":
		sa, err := sockaddr(o.Addr, o.Kind)
		if err != nil {
			return -1, err
		}
		return ring(func(e *sqe) {
			e.opcode, e.fd, e.addr, e.off = 16, int32(o.FD), uint64(uintptr(unsafe.Pointer(&sa[0]))), uint64(len(sa))
		}, o.Async)
	case "uring write":
		return ring(func(e *sqe) {
			e.opcode, e.fd, e.addr, e.len = 23, int32(o.FD), uint64(uintptr(unsafe.Pointer(&buf[0]))), 1
		}, o.Async)
	}
	return -1, fmt.Errorf("unknown: %s", o.Do)
}

// pivot makes a directory the root of a mount namespace, as container runtimes do, and
// gives the namespace's number.
func pivot(dir string) (int, error) {
	var st unix.Stat_t
	for _, do := range []func() error{
		func() error { return unix.Unshare(unix.CLONE_NEWNS) },
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, "") },
		func() error { return unix.Stat("/proc/thread-self/ns/mnt", &st) },
		func() error { return unix.Chdir(dir) },
		func() error { return unix.PivotRoot(".", ".") },
		func() error { return unix.Unmount(".", unix.MNT_DETACH) },
		func() error { return unix.Chdir("/") },
	} {
		if err := do(); err != nil {
			return -1, err
		}
	}
	return int(st.Ino), nil
}

// timed does something Flags times, and says how many nanoseconds of its thread's
// processor time that took: other programs may run meanwhile.
func timed(o op) (int, error) {
	var sa []byte
	fd, err := -1, error(nil)
	switch o.Do {
	case "writes":
		fd, err = unix.Open(o.Path, unix.O_WRONLY, 0)
	case "opens":
	default:
		if sa, err = sockaddr(o.Addr, 0); err == nil && o.Do == "udp connects" {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		}
	}
	if err != nil {
		return -1, err
	}
	if fd >= 0 {
		defer unix.Close(fd)
	}
	connect := func(fd int) error {
		_, err := errnoOf(unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa[0])), uintptr(len(sa))))
		return err
	}
	one := map[string]func() error{
		"udp connects": func() error { return connect(fd) },
		"tcp connects": func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return connect(fd)
		},
		"writes": func() error { _, err := unix.Pwrite(fd, []byte("x"), 0); return err },
		"opens": func() error {
			fd, err := unix.Open(o.Path, unix.O_RDWR, 0)
			if err == nil {
				err = unix.Close(fd)
			}
			return err
		},
	}[o.Do]
	used := func() (int, error) {
		var ts unix.Timespec
		err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
		return int(ts.Nano()), err
	}
	begin, err := used()
	if err != nil {
		return -1, err
	}
	for range o.Flags {
		if err := one(); err != nil {
			return -1, err
		}
	}
	end, err := used()
	return end - begin, err
}

// sqe is struct io_uring_sqe.
type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	len, flags2   uint32
	user          uint64
	rest          [3]uint64
}

// ring makes a ring, has it do one thing, and unmakes it. Numbers are those of
// linux/io_uring.h.
func ring(fill func(*sqe), async bool) (int, error) {
	var p struct {
		sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
		_                                                    [3]uint32
		sqHead, sqTail, sqMask, sqN, sqFlags, sqDrop, sqArr  uint32
		_                                                    [3]uint32
		cqHead, cqTail, cqMask, cqN, cqOver, cqes            uint32
		_                                                    [4]uint32
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return -1, errors.New("io_uring_setup: " + errno.Error())
	}
	defer unix.Close(int(fd))
	const rw, shared = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED
	rings, err := unix.Mmap(int(fd), 0, 4096, rw, shared)
	if err != nil {
		return -1, errors.New("map ring: " + err.Error())
	}
	defer unix.Munmap(rings)
	entries, err := unix.Mmap(int(fd), 0x10000000, 4096, rw, shared)
	if err != nil {
		return -1, errors.New("map entries: " + err.Error())
	}
	defer unix.Munmap(entries)
	e := (*sqe)(unsafe.Pointer(&entries[0]))
	*e = sqe{}
	fill(e)
	if async {
		e.flags |= 1 << 4 // IOSQE_ASYNC
	}
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&rings[p.sqTail])), 1) // entry 0, which sqArr has
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, fd, 1, 1, 1, 0, 0); errno != 0 {
		return -1, errors.New("io_uring_enter: " + errno.Error())
	}
	res := *(*int32)(unsafe.Pointer(&rings[p.cqes+8]))
	if res < 0 {
		return -1, unix.Errno(-res)
	}
	return int(res), nil
}

// task is a process under phases, seen by its test.
type task struct {
	t testing.TB
	*process
}

func startTask(t testing.TB, cg cgroup) *task {
	t.Helper()
	k := &task{t, start(t, &cg, "phased", nil)}
	k.want(0, op{Do: "ready"}) // it has loaded its libraries
	return k
}

// try has the task do something, and says what came of it.
func (k *task) try(o op) (int, unix.Errno) {
	k.t.Helper()
	line, err := json.Marshal(o)
	if err != nil {
		k.t.Fatal(err)
	}
	if _, err := k.in.Write(append(line, '\n')); err != nil {
		k.t.Fatal(err)
	}
	var d done
	k.line(&d)
	if d.Err != "" {
		k.t.Fatalf("%+v: %s", o, d.Err)
	}
	return d.N, d.Errno
}

// want holds the outcome to an errno, 0 for success.
func (k *task) want(errno unix.Errno, o op) int {
	k.t.Helper()
	n, got := k.try(o)
	if got != errno {
		k.t.Errorf("%+v: %v, want %v", o, text(got), text(errno))
	}
	return n
}

func text(e unix.Errno) string {
	if e == 0 {
		return "success"
	}
	return e.Error()
}

// opens holds the outcome to an errno, and closes what was opened.
func (k *task) opens(errno unix.Errno, o op) {
	k.t.Helper()
	if fd := k.want(errno, o); fd > 0 {
		k.want(0, op{Do: "close", FD: fd})
	}
}

// ends lets the task end by itself.
func (k *task) ends() {
	k.t.Helper()
	k.in.Close()
	k.wait()
}
