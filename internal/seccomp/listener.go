// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// The kernel's side of SCMP_ACT_NOTIFY, by ioctls of our own: libseccomp-golang
// v0.11.1 lacks SECCOMP_IOCTL_NOTIF_SET_FLAGS and makes one error of all errnos.

// struct seccomp_notif and struct seccomp_notif_resp of linux/seccomp.h.
type (
	notif struct {
		id         uint64
		pid, flags uint32
		data       seccompData
	}
	notifResp struct {
		id    uint64
		val   int64
		errno int32
		flags uint32
	}
)

// Linux 5.17 and older also know ID_VALID by a number with the wrong direction.
const (
	notifIDValid  = 0x40082102 // SECCOMP_IOCTL_NOTIF_ID_VALID
	notifSetFlags = 0x40082104 // SECCOMP_IOCTL_NOTIF_SET_FLAGS, Linux 6.6
)

// Notification is one call that waits for an answer. What its arguments point to
// is not for deciding on: another thread may change it after it was looked at.
type Notification struct {
	ID uint64
	// PID is the calling thread's id in this process's pid namespace, 0 if it has
	// none there. It may be another's by now, unless [Listener.Valid] says after a
	// look at it that the call still waits.
	PID int
	// ABI is that of the entry, and Number the call's under it, without x32's bit:
	// what [Name] and profiles.PhaseTable.Decide take.
	ABI    profiles.ABI
	Number uint32
	Args   [6]uint64
	IP     uint64 // of the instruction that called
	// Accepted, if decide sets it, is called when the answer has reached the call,
	// which a signal may have taken back meanwhile.
	Accepted func()
}

var (
	// ErrServing: another Serve runs.
	ErrServing = errors.New("the listener is served already")
	// ErrNoListener: a descriptor is not one of a seccomp listener.
	ErrNoListener = errors.New("not a seccomp listener")
)

// Listener is a seccomp listener: the descriptor by which the kernel asks about the
// calls that a filter answers with SCMP_ACT_NOTIFY. While nobody serves it they
// wait; when its last descriptor is closed, those that wait and all later ones get
// ENOSYS.
type Listener struct {
	file *os.File
	sync bool

	mu   sync.Mutex
	stop context.CancelCauseFunc // guarded by mu: of the running Serve
}

// NewListener takes over f, which it closes if it fails: with [ErrNoListener] if f
// is something else.
func NewListener(f *os.File) (*Listener, error) {
	l := &Listener{file: f}
	if err := l.control(l.prepare); err != nil {
		return nil, errors.Join(fmt.Errorf("seccomp listener: %w", err), f.Close())
	}
	return l, nil
}

func (l *Listener) prepare(fd int) error {
	// An ioctl means something else to each kind of file, so the name comes first.
	target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return err
	}
	if target != "anon_inode:seccomp notify" {
		return fmt.Errorf("%w: %s", ErrNoListener, target)
	}
	unix.CloseOnExec(fd)
	var sizes [3]uint16 // of seccomp_notif, seccomp_notif_resp, seccomp_data
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_NOTIF_SIZES, 0, uintptr(unsafe.Pointer(&sizes))); errno != 0 {
		return fmt.Errorf("seccomp(SECCOMP_GET_NOTIF_SIZES): %w", errno)
	}
	if want := [3]uint16{uint16(unsafe.Sizeof(notif{})), uint16(unsafe.Sizeof(notifResp{})), uint16(unsafe.Sizeof(seccompData{}))}; sizes != want {
		return fmt.Errorf("the kernel's notifications have other sizes (%v) than those that syslatch knows (%v)", sizes, want)
	}
	for {
		switch errno := ioctl(fd, notifSetFlags, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP); errno {
		case 0:
			l.sync = true
			return nil
		case unix.EINTR:
		case unix.EINVAL, unix.ENOTTY: // before Linux 6.6
			return nil
		default:
			return fmt.Errorf("ioctl(SECCOMP_IOCTL_NOTIF_SET_FLAGS): %w", errno)
		}
	}
}

// Sync says whether the kernel runs caller and supervisor in turns on one processor
// (SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP, Linux 6.6), which makes an answer several
// times as fast.
func (l *Listener) Sync() bool { return l.sync }

// control calls do with the descriptor, which stays open meanwhile.
func (l *Listener) control(do func(fd int) error) error {
	conn, err := l.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if conn.Control(func(fd uintptr) { failed = do(int(fd)) }) != nil {
		return os.ErrClosed // its own error for that can't be tested for
	}
	return failed
}

// File returns a duplicate of the descriptor, which is the caller's to close: for a
// holder that keeps calls waiting while this process is replaced.
func (l *Listener) File() (f *os.File, err error) {
	err = l.control(func(fd int) error {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			f = os.NewFile(uintptr(dup), l.file.Name())
		}
		return err
	})
	return f, err
}

// Close closes the descriptor. A Serve that runs ends soon after with os.ErrClosed;
// Close doesn't wait for it.
func (l *Listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stop != nil {
		l.stop(os.ErrClosed)
	}
	return l.file.Close()
}

// Valid says whether a call that was received still waits for its answer: then its
// PID is still the caller's.
func (l *Listener) Valid(id uint64) (valid bool, err error) {
	err = l.control(func(fd int) error {
		valid, err = isValid(fd, id)
		return err
	})
	return valid, err
}

func isValid(fd int, id uint64) (bool, error) {
	for {
		switch errno := ioctl(fd, notifIDValid, uintptr(unsafe.Pointer(&id))); errno {
		case 0:
			return true, nil
		case unix.ENOENT:
			return false, nil
		case unix.EINTR:
		default:
			return false, fmt.Errorf("ioctl(SECCOMP_IOCTL_NOTIF_ID_VALID): %w", errno)
		}
	}
}

// Serve asks decide about every call that the filter notifies of, one after the
// other on one thread, and answers: the call goes on, or returns errno, which is
// EPERM if decide gives none that is one (1 to 4094). The Notification is decide's
// until it returns.
//
// It returns nil when the last task with the filter is gone (before Linux 6.11: and
// was waited for by its parent), the cause of ctx's end when that ends, and
// os.ErrClosed when the listener is closed; what waits then goes on waiting, for the
// next Serve. A call that was received is always answered: calls
// of an ABI that isn't x86's get EPERM without being asked about, and if decide
// panics its call gets EPERM and Serve returns a [PanicError].
//
// For each call that is poll(2), since a RECV of its own could not be ended: before
// Linux 6.11 it blocks for ever when the tasks are gone. Then
// SECCOMP_IOCTL_NOTIF_RECV, decide and SECCOMP_IOCTL_NOTIF_SEND. When this process
// dies before SEND, the caller waits until the listener's last descriptor is closed, or
// a signal or a freeze of its cgroup has it make its call again; with
// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV only SIGKILL does.
func (l *Listener) Serve(ctx context.Context, decide func(*Notification) (goOn bool, errno uint)) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	l.mu.Lock()
	if l.stop != nil {
		l.mu.Unlock()
		return ErrServing
	}
	l.stop = stop
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.stop = nil
	}()

	wakeFD, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	var woken sync.WaitGroup
	woken.Add(1)
	cancel := context.AfterFunc(ctx, func() {
		defer woken.Done()
		_, _ = unix.Write(wakeFD, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // can't fail
	})
	defer func() {
		if !cancel() {
			woken.Wait()
		}
		unix.Close(wakeFD)
	}()

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return l.control(func(fd int) error {
		fds := [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wakeFD), Events: unix.POLLIN}}
		var n Notification
		for {
			_, _, errno := unix.Syscall(unix.SYS_POLL, uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)), ^uintptr(0))
			switch {
			case errno == unix.EINTR:
				continue
			case errno != 0:
				return fmt.Errorf("poll: %w", errno)
			case fds[1].Revents != 0:
				return context.Cause(ctx)
			case fds[0].Revents&unix.POLLIN == 0:
				return nil // POLLHUP: only it tells the end, as ENOENT of RECV is also a call taken back
			}
			if err := one(fd, &n, decide); err != nil {
				return err
			}
		}
	})
}

// PanicError is a panic of decide.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v\n%s", e.Value, e.Stack) }

// one receives a notification, if there still is one, and answers it. It allocates
// nothing.
func one(fd int, n *Notification, decide func(*Notification) (bool, uint)) (err error) {
	var in notif // the kernel wants zeros
	// Not a RawSyscall: somebody else may have received what poll saw, and then this
	// blocks.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&in)))
	switch errno {
	case 0:
	case unix.ENOENT, unix.EINTR: // taken back
		return nil
	default:
		return fmt.Errorf("ioctl(SECCOMP_IOCTL_NOTIF_RECV): %w", errno)
	}
	answer := notifResp{id: in.id, errno: -int32(unix.EPERM)}
	decided := false
	defer func() {
		if !decided { // a panic, or runtime.Goexit
			if value := recover(); value != nil {
				err = &PanicError{value, debug.Stack()}
			}
			_, failed := send(fd, answer)
			err = errors.Join(err, failed)
		}
	}()
	*n = Notification{ID: in.id, PID: int(in.pid), Args: in.data.args, IP: in.data.ip}
	var known bool
	if n.ABI, n.Number, known = CallOf(in.data.arch, in.data.nr); known {
		goOn, errno := decide(n)
		switch {
		case goOn:
			answer.errno, answer.flags = 0, unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
		case errno > 0 && errno <= maxErrno:
			answer.errno = -int32(errno)
		}
	}
	decided = true
	accepted, err := send(fd, answer)
	if accepted && n.Accepted != nil {
		n.Accepted()
	}
	return err
}

// CallOf is the ABI of a call as the kernel has it, by an AUDIT_ARCH and a number, and its
// number under that.
func CallOf(arch, nr uint32) (profiles.ABI, uint32, bool) {
	switch {
	case arch == unix.AUDIT_ARCH_X86_64 && nr&x32Bit != 0:
		return specs.ArchX32, nr &^ x32Bit, true
	case arch == unix.AUDIT_ARCH_X86_64:
		return specs.ArchX86_64, nr, true
	case arch == unix.AUDIT_ARCH_I386:
		return specs.ArchX86, nr, true
	}
	return "", 0, false
}

// send answers. That a call doesn't wait any more is no error; then the answer was not
// accepted.
func send(fd int, r notifResp) (accepted bool, err error) {
	for {
		// It blocks no longer than a mutex is held.
		switch errno := ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r))); errno {
		case 0:
			return true, nil
		case unix.ENOENT, unix.EINPROGRESS: // taken back; answered by somebody else
			return false, nil
		case unix.EINTR:
		default:
			err := fmt.Errorf("ioctl(SECCOMP_IOCTL_NOTIF_SEND): %w", errno)
			if r.flags == 0 {
				return false, err
			}
			// Before Linux 5.5 there is no CONTINUE; the call must not wait for ever.
			_, failed := send(fd, notifResp{id: r.id, errno: -int32(unix.EPERM)})
			return false, errors.Join(err, failed)
		}
	}
}

func ioctl(fd int, request, arg uintptr) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	return errno
}
