// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
)

// Linux: include/uapi/linux/ptrace.h.
const (
	eventStop = 128 // PTRACE_EVENT_STOP
	syscallSt = unix.SIGTRAP | 0x80

	// Until a task stops, what it forks is traced from its first moment on.
	optionsThreads = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESYSGOOD
	optionsTree    = optionsThreads | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK
	optionsExec    = unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_TRACESYSGOOD
)

func ptrace(request, tid int, addr, data uintptr) (uintptr, error) {
	r, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0)
	if errno != 0 {
		return r, errno
	}
	return r, nil
}

// seizeCall may wait for the target's execve, so the Go scheduler has to know.
func seizeCall(tid, options int) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, uintptr(options), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// getRegs reads a stopped task's registers, and is ErrABI where they are those of
// 32-bit code (PTRACE_GETREGS is EIO there, or looks as if they weren't).
func getRegs(tid int, regs *unix.PtraceRegs) error {
	const ntPrstatus = 1
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(regs))}
	iov.SetLen(int(unsafe.Sizeof(*regs)))
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGSET, uintptr(tid), ntPrstatus, uintptr(unsafe.Pointer(&iov)), 0, 0)
	switch {
	case errno == unix.ESRCH:
		return fmt.Errorf("%w: %w", ErrGone, errno)
	case errno != 0:
		return fmt.Errorf("PTRACE_GETREGSET: %w", errno)
	case iov.Len != uint64(unsafe.Sizeof(*regs)):
		return ErrABI
	}
	return nil
}

// stands says whether a traced task is stopped where it can be given other registers,
// and not within a call that reports an event.
func stands(tid int) bool {
	info, stopped := stopOf(tid)
	return stopped && info.Code>>8 == eventStop
}

// stopOf is of a task that this thread traces, and that is stopped: no other has its number.
func stopOf(tid int) (info unix.Siginfo, stopped bool) {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GETSIGINFO, uintptr(tid), 0, uintptr(unsafe.Pointer(&info)), 0, 0)
	return info, errno == 0
}

func getSigmask(tid int) (mask uint64, err error) {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GETSIGMASK, uintptr(tid), unsafe.Sizeof(mask), uintptr(unsafe.Pointer(&mask)), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return mask, nil
}

func setSigmask(tid int, mask uint64) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SETSIGMASK, uintptr(tid), unsafe.Sizeof(mask), uintptr(unsafe.Pointer(&mask)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// rseqPointer is where a task's struct rseq has its rseq_cs, 0 if it has none.
func rseqPointer(tid int) uintptr {
	var config struct {
		pointer                     uint64
		size, signature, flags, pad uint32
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GET_RSEQ_CONFIGURATION, uintptr(tid), unsafe.Sizeof(config), uintptr(unsafe.Pointer(&config)), 0, 0)
	if errno != 0 || config.pointer == 0 {
		return 0
	}
	return uintptr(config.pointer) + 8
}

// mostRead is how many filters of a task are read. A process may have thousands, and the
// kernel goes through all for each that is read.
const mostRead = 64

// errUnreadable: the filters of a task can't be had (no CAP_SYS_ADMIN, a filter on
// this process, or a kernel without CONFIG_CHECKPOINT_RESTORE), or are more than mostRead.
var errUnreadable = errors.New("its filters can't be read")

// filtersOf reads the filters of a stopped task, the oldest first, and says how many there
// are.
func filtersOf(tid int) (filters []seccomp.Filter, count int, err error) {
	info, err := readStatus(tid)
	if err != nil {
		return nil, 0, err
	}
	if info.seccomp != 2 {
		return nil, 0, nil
	}
	if info.filters > mostRead {
		return nil, info.filters, errUnreadable
	}
	for i := range info.filters {
		f, err := filterOf(tid, i)
		if err != nil {
			return nil, info.filters, err
		}
		filters = append(filters, f)
	}
	return filters, info.filters, nil
}

// filterOf reads one filter of a stopped task; 0 is the oldest.
func filterOf(tid, i int) (seccomp.Filter, error) {
	get := func(to unsafe.Pointer) (uintptr, error) {
		n, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(tid), uintptr(i), uintptr(to), 0, 0)
		switch {
		case errno == unix.ESRCH:
			return 0, gone(errno)
		case errno != 0:
			return 0, errUnreadable
		}
		return n, nil
	}
	n, err := get(nil) // instructions
	if err != nil {
		return nil, err
	}
	f := make(seccomp.Filter, max(n, 1))
	if _, err = get(unsafe.Pointer(&f[0])); err != nil {
		return nil, err
	}
	return f[:n], nil
}

// program is struct sock_fprog at an address of the target, with the filter after it.
func program(f seccomp.Filter, at uint64) []byte {
	const header = 16
	b := make([]byte, header, header+8*len(f))
	binary.LittleEndian.PutUint16(b, uint16(len(f)))
	binary.LittleEndian.PutUint64(b[8:], at+header)
	for _, in := range f {
		b = binary.LittleEndian.AppendUint16(b, in.Code)
		b = append(b, in.Jt, in.Jf)
		b = binary.LittleEndian.AppendUint32(b, in.K)
	}
	return b
}
