// SPDX-License-Identifier: Apache-2.0

package holder

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// message is one packet, either way.
type message struct {
	Op    string `json:"op"`             // keep, drop, list; in answers ok, held, error
	Name  string `json:"name,omitempty"` // of a descriptor
	Error string `json:"error,omitempty"`
}

const (
	opKeep  = "keep"
	opDrop  = "drop"
	opList  = "list"
	opOK    = "ok"
	opHeld  = "held" // an answer to list, one for each, before ok
	opError = "error"
)

// maxMessage bounds a packet, and maxName a name in it.
const (
	maxMessage = 1024
	maxName    = 512
)

func send(c *net.UnixConn, m message, f *os.File) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if f == nil {
		_, err := c.Write(data)
		return err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) {
		_, _, sent = c.WriteMsgUnix(data, unix.UnixRights(int(fd)), nil)
	}); err != nil {
		return err
	}
	return sent
}

// receive returns a descriptor if exactly one came along, which is the caller's.
func receive(c *net.UnixConn) (m message, f *os.File, err error) {
	data, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(data, rights) // sets MSG_CMSG_CLOEXEC
	if err != nil {
		return m, nil, err
	}
	if n == 0 {
		return m, nil, io.EOF
	}
	var files []*os.File
	defer func() {
		if err != nil {
			for _, f := range files {
				f.Close()
			}
		}
	}()
	messages, err := unix.ParseSocketControlMessage(rights[:oobn])
	if err != nil {
		return m, nil, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // credentials, of which nobody asked
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "kept"))
		}
	}
	switch {
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return m, nil, errors.New("the message is too long")
	case len(files) > 1:
		return m, nil, fmt.Errorf("%d descriptors in a message", len(files))
	}
	if err := json.Unmarshal(data[:n], &m); err != nil {
		return m, nil, err
	}
	if len(m.Name) > maxName {
		return m, nil, errors.New("the name is too long")
	}
	if len(files) == 1 {
		f = files[0]
	}
	return m, f, nil
}
