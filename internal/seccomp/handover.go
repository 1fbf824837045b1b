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
