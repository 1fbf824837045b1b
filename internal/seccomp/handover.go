// SPDX-License-Identifier: Apache-2.0

package seccomp

/*
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { NO_LISTENER = 1, FIRST_LISTENER = 2 };

struct handover {
	int socket;
	char *text;
	size_t left;
	// 0 until it is known, NO_LISTENER if there will be none, or the descriptor +
	// FIRST_LISTENER. Go's side stores it: an aligned word, after which a system
	// call follows.
	volatile unsigned int listener;
	volatile int failed; // errno, set before the execve fails
};

static void end_handover(struct handover *h)
{
	close(h->socket);
	free(h->text);
	free(h);
}

// It waits for the listener, sends it and closes this process's descriptor: when the
// supervisor's is closed too, or was never received, the execve fails (ENOSYS) in
// place of waiting for ever.
static void *hand_over(void *arg)
{
	struct handover *h = arg;
	const struct timespec pause = { .tv_nsec = 50 * 1000 };
	while (!h->listener)
		nanosleep(&pause, NULL);
	if (h->listener == NO_LISTENER) {
		end_handover(h);
		return NULL;
	}
	int fd = h->listener - FIRST_LISTENER;
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} rights = { .header = { .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int)) } };
	memcpy(CMSG_DATA(&rights.header), &fd, sizeof(fd));
	struct iovec text = { h->text, h->left };
	struct msghdr msg = { .msg_iov = &text, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof(rights) };
	while (text.iov_len) {
		ssize_t n = sendmsg(h->socket, &msg, MSG_NOSIGNAL);
		if (n >= 0) {
			// A part may have fit; the descriptor goes with the first.
			text.iov_base = (char *)text.iov_base + n;
			text.iov_len -= n;
			msg.msg_control = NULL;
			msg.msg_controllen = 0;
		} else if (errno == EAGAIN) { // Go's sockets don't block
			nanosleep(&pause, NULL);
		} else if (errno != EINTR) {
			h->failed = errno;
			break;
		}
	}
	close(h->socket);
	close(fd);
	return NULL; // h stays: the other thread may read it still, and can't wait
}

// The thread has no signals, so that they find the others.
static int start_handover(struct handover *h)
{
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_t thread;
	int err = pthread_create(&thread, NULL, hand_over, h);
	if (!err)
		pthread_detach(thread);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return err;
}
*/
import "C"

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

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

// ErrNoDescriptor is that of a whole state that came without a listener.
var ErrNoDescriptor = errors.New("no descriptor")

// ReceiveListener takes what a runtime sends to linux.seccomp.listenerPath: the
// state of the container's process and its filter's listener, for [NewListener]. It
// reads until the state is complete, so set a deadline on conn before; it closes
// whatever else was sent, and doesn't close conn. The state is also there with
// [ErrNoDescriptor].
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
		text = append(text, buf[:max(n, 0)]...) // -1 beside most errors
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
		return nil, fmt.Errorf("%w is named %s: %q", ErrNoDescriptor, specs.SeccompFdName, names)
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

// handover is the thread that sends. It is C's: one of Go's would have to run beside
// the one that loads the filter, at a time when neither can be stopped for a garbage
// collection or be given back to the scheduler.
type handover struct {
	flags uintptr // of seccomp(2)
	c     *C.struct_handover
}

const (
	noListener    = C.NO_LISTENER
	firstListener = C.FIRST_LISTENER
)

// start is called before the filter is loaded.
func (o *Handover) start(f Filter) (*handover, error) {
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
	text, err := json.Marshal(state)
	if err != nil {
		return nil, err
	}
	if len(text) > maxState {
		return nil, fmt.Errorf("the state is longer than %d bytes", maxState)
	}
	conn, err := o.Conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	h := &handover{flags: unix.SECCOMP_FILTER_FLAG_NEW_LISTENER}
	if o.WaitKillable {
		h.flags |= unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	}
	socket, dupErr := -1, error(nil)
	if err := conn.Control(func(fd uintptr) { socket, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || dupErr != nil {
		return nil, errors.Join(err, dupErr)
	}
	h.c = (*C.struct_handover)(C.calloc(1, C.sizeof_struct_handover)) // never nil, as of C.malloc
	h.c.socket, h.c.text, h.c.left = C.int(socket), (*C.char)(C.CBytes(text)), C.size_t(len(text))
	if errno := C.start_handover(h.c); errno != 0 {
		C.end_handover(h.c)
		return nil, fmt.Errorf("start a thread: %w", unix.Errno(errno))
	}
	return h, nil
}
