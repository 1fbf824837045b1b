// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// maxState bounds what a runtime sends beside the listener: the container's
	// annotations are in it.
	maxState = 1 << 20
	// maxFDs is what the kernel takes in one message (SCM_MAX_FD).
	maxFDs = 253
)

// ReceiveListener takes what a runtime sends to linux.seccomp.listenerPath: the
// state of the container's process and its filter's listener, for [NewListener]. It
// reads until the state is complete, so set a deadline on conn before; it closes
// whatever else was sent, and doesn't close conn.
//
// Of the state only State.ID is to be relied on: crun 1.8.1 sends pid 0 and bundle
// "." for exec, and of runc's exec State.Pid is the container's first process.
func ReceiveListener(conn *net.UnixConn) (state specs.ContainerProcessState, listener *os.File, err error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			if f != listener {
				f.Close()
			}
		}
		if err != nil {
			err = fmt.Errorf("receive a seccomp listener: %w", err)
		}
	}()
	var text []byte
	buf, rights := make([]byte, 1<<16), make([]byte, unix.CmsgSpace(4*maxFDs))
	for {
		n, oobn, flags, _, err := conn.ReadMsgUnix(buf, rights) // sets MSG_CMSG_CLOEXEC
		got, bad := receivedFiles(rights[:oobn])
		files = append(files, got...)
		text = append(text, buf[:n]...)
		complete, invalid := decodeState(text, &state)
		switch {
		case bad != nil:
			return state, nil, bad
		case flags&unix.MSG_CTRUNC != 0:
			return state, nil, errors.New("more descriptors than there may be")
		case len(text) > maxState:
			return state, nil, fmt.Errorf("the state is longer than %d bytes", maxState)
		case invalid != nil:
			return state, nil, invalid
		case complete:
			listener, err = pickListener(state.Fds, files)
			return state, listener, err
		case err == nil && n == 0 || errors.Is(err, io.EOF):
			return state, nil, fmt.Errorf("%w after %d bytes of the state", io.ErrUnexpectedEOF, len(text))
		case err != nil:
			return state, nil, err
		}
	}
}

// receivedFiles are the descriptors in control messages, also if those are bad.
func receivedFiles(rights []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		if h := messages[i].Header; h.Level != unix.SOL_SOCKET || h.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

// decodeState says whether text is a whole state. Text that can't become one is an
// error.
func decodeState(text []byte, state *specs.ContainerProcessState) (complete bool, err error) {
	*state = specs.ContainerProcessState{}
	d := json.NewDecoder(bytes.NewReader(text))
	switch err := d.Decode(state); {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("the state: %w", err)
	}
	if rest := bytes.TrimSpace(text[d.InputOffset():]); len(rest) > 0 {
		return false, fmt.Errorf("%d bytes after the state", len(rest))
	}
	return true, nil
}

func pickListener(names []string, files []*os.File) (listener *os.File, err error) {
	if len(names) != len(files) {
		return nil, fmt.Errorf("%d descriptors, and names for %d", len(files), len(names))
	}
	for i, name := range names {
		if name != specs.SeccompFdName {
			continue
		}
		if listener != nil {
			return nil, fmt.Errorf("two descriptors are named %s", name)
		}
		listener = files[i]
	}
	if listener == nil {
		return nil, fmt.Errorf("no descriptor is named %s: %q", specs.SeccompFdName, names)
	}
	return listener, nil
}

// Handover gives the listener of a filter that [LoadAndExec] loads to a supervisor,
// as a container's runtime does.
type Handover struct {
	// Conn is connected to the supervisor, which calls [ReceiveListener] at its other
	// end. It is still the caller's to close; an execve closes it.
	Conn *net.UnixConn
	// State is sent along; Fds and, if it is 0, Pid are filled in.
	State specs.ContainerProcessState
	// WaitKillable is that of LoadOptions.
	WaitKillable bool
}

// handover is what the sending thread works with. It makes no call of Go's runtime
// from start on, so all that is prepared.
type handover struct {
	flags  uintptr // of seccomp(2)
	socket int
	text   []byte
	rights []byte // a control message whose descriptor is left open
	iov    unix.Iovec
	msg    unix.Msghdr

	running  atomic.Bool
	listener atomic.Uint32 // 0 until it is known, noListener, or the descriptor + firstListener
	failed   atomic.Uint32 // the errno
}

const (
	noListener    = 1
	firstListener = 2
)

func (o *Handover) prepare(f Filter) (*handover, error) {
	// A filter that lets the execve pass would leave nobody to send the listener.
	data := seccompData{nr: unix.SYS_EXECVE, arch: unix.AUDIT_ARCH_X86_64}
	if action, err := run(f, &data); err != nil || action&unix.SECCOMP_RET_ACTION_FULL != unix.SECCOMP_RET_USER_NOTIF {
		return nil, errors.Join(errors.New("the filter does not notify of execve"), err)
	}
	state := o.State
	state.Fds = []string{specs.SeccompFdName}
	if state.Pid == 0 {
		state.Pid = os.Getpid()
	}
	h := &handover{flags: unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, socket: -1}
	if o.WaitKillable {
		h.flags |= unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	}
	var err error
	if h.text, err = json.Marshal(state); err != nil {
		return nil, err
	}
	if len(h.text) > maxState {
		return nil, fmt.Errorf("the state is longer than %d bytes", maxState)
	}
	conn, err := o.Conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var dupErr error
	if err := conn.Control(func(fd uintptr) { h.socket, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || dupErr != nil {
		return nil, errors.Join(err, dupErr)
	}
	h.rights = unix.UnixRights(-1)
	h.iov.Base = &h.text[0]
	h.iov.SetLen(len(h.text))
	h.msg.Iov, h.msg.Control = &h.iov, &h.rights[0]
	h.msg.SetIovlen(1)
	h.msg.SetControllen(len(h.rights))
	return h, nil
}

func (h *handover) close() { unix.Close(h.socket) }

// start returns when the sending thread runs. Signals have been reset by then, so
// that nothing can preempt it: neither it nor the thread that loads the filter is
// left to Go's scheduler, which might want the one to start the other.
func (h *handover) start() {
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		h.send()
	}()
	for !h.running.Load() {
		runtime.Gosched()
	}
}

// send waits for the listener, sends it and closes this process's descriptor: when
// the supervisor's is closed too, or was never received, the execve fails (ENOSYS) in
// place of waiting for ever.
//
//go:nosplit
//go:norace
func (h *handover) send() {
	h.running.Store(true)
	pause := unix.Timespec{Nsec: 50_000}
	for h.listener.Load() == 0 {
		syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
	}
	if h.listener.Load() == noListener {
		return
	}
	listener := h.listener.Load() - firstListener
	*(*uint32)(unsafe.Pointer(&h.rights[unix.SizeofCmsghdr])) = listener
	for left := uintptr(len(h.text)); left > 0; {
		n, _, errno := syscall.RawSyscall(unix.SYS_SENDMSG, uintptr(h.socket), uintptr(unsafe.Pointer(&h.msg)), unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			// A part may have fit; the descriptor goes with the first.
			left -= n
			h.iov.Base = (*byte)(unsafe.Add(unsafe.Pointer(h.iov.Base), n))
			h.iov.Len = uint64(left)
			h.msg.Control, h.msg.Controllen = nil, 0
		case unix.EAGAIN: // Go's sockets don't block
			syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
		case unix.EINTR:
		default:
			h.failed.Store(uint32(errno))
			left = 0
		}
	}
	syscall.RawSyscall(unix.SYS_CLOSE, uintptr(listener), 0, 0)
}
