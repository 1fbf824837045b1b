// SPDX-License-Identifier: Apache-2.0

package holder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// answerTime bounds the wait for a holder's answer: it has nothing to do but that.
const answerTime = 5 * time.Second

// Start starts a holder that serves a listening socket: a command that calls
// [Serve] with descriptor 3 for that and 4 for its ready byte, and whose output goes
// nowhere. It is in a session of its own, and outlives this process.
type Start func() *exec.Cmd

// Client is connected to a holder.
type Client struct {
	mu   sync.Mutex // one request at a time
	conn *net.UnixConn
}

// Open connects to the holder at a socket, and starts one if there is none.
func Open(ctx context.Context, socket string, start Start) (*Client, error) {
	c, err := dial(socket)
	if err == nil {
		return c, nil
	}
	if err := launch(ctx, socket, start); err != nil {
		return nil, fmt.Errorf("start a holder of descriptors: %w", err)
	}
	return dial(socket)
}

func dial(socket string) (*Client, error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("holder of descriptors: %w", err)
	}
	return &Client{conn: conn}, nil
}

// launch starts a holder. The caller has the only syslatchd of the directory, so that
// what is at the path is what a dead holder left.
func launch(ctx context.Context, socket string, start Start) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(socket, 0o600); err != nil {
		return err
	}
	file, err := l.File()
	if err != nil {
		return err
	}
	defer file.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer readyR.Close()
	cmd := start()
	cmd.ExtraFiles = []*os.File{file, readyW}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	err = cmd.Start()
	readyW.Close()
	if err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // it may end while this process lives
	stop := context.AfterFunc(ctx, func() { _ = readyR.SetReadDeadline(time.Now()) })
	defer stop()
	if n, err := readyR.Read(make([]byte, 1)); n != 1 {
		return fmt.Errorf("it ended before it was ready: %w", err)
	}
	return nil
}

// Serve is the body of a holder's process; see [Start] and [Run].
func Serve(ctx context.Context) error {
	file, ready := os.NewFile(3, "socket"), os.NewFile(4, "ready")
	syscall.CloseOnExec(4)
	l, err := net.FileListener(file)
	if err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return errors.Join(fmt.Errorf("descriptor 3 is a %T", l), l.Close())
	}
	u.SetUnlinkOnClose(false) // a successor may have bound the path
	return Run(ctx, u, ready)
}

// Close disconnects. What is held stays so.
func (c *Client) Close() error { return c.conn.Close() }

// Keep has the holder keep a duplicate of f, in place of what had its name.
func (c *Client) Keep(name string, f *os.File) error {
	return c.ask(message{Op: opKeep, Name: name}, f, nil)
}

// Drop has the holder let go of a descriptor, if it has one of that name.
func (c *Client) Drop(name string) error { return c.ask(message{Op: opDrop, Name: name}, nil, nil) }

// Kept are duplicates of all that is held, by name; they are the caller's.
func (c *Client) Kept() (map[string]*os.File, error) {
	out := map[string]*os.File{}
	err := c.ask(message{Op: opList}, nil, func(name string, f *os.File) {
		if old := out[name]; old != nil {
			old.Close()
		}
		out[name] = f
	})
	if err != nil {
		for _, f := range out {
			f.Close()
		}
		return nil, err
	}
	return out, nil
}

// refusal is an answer.
type refusal struct{ text string }

func (r *refusal) Error() string { return r.text }

// ask makes one request. After an error that is no answer the client is of no use.
func (c *Client) ask(m message, f *os.File, held func(string, *os.File)) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var refused *refusal
	defer func() {
		if err == nil {
			return
		}
		if !errors.As(err, &refused) {
			c.conn.Close() // a late answer would be taken for the next one's
		}
		err = fmt.Errorf("holder of descriptors: %s: %w", m.Op, err)
	}()
	if err := c.conn.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	if err := send(c.conn, m, f); err != nil {
		return err
	}
	for {
		answer, f, err := receive(c.conn)
		switch {
		case err != nil:
			return err
		case answer.Op == opHeld && held != nil && f != nil:
			held(answer.Name, f)
		case answer.Op == opOK:
			return nil
		case answer.Op == opError:
			return &refusal{answer.Error}
		default:
			if f != nil {
				f.Close()
			}
			return fmt.Errorf("unexpected answer %q", answer.Op)
		}
	}
}
