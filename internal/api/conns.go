// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// conn is a connection of which is known who made it.
type conn struct {
	*net.UnixConn // with its CloseWrite, which net/http looks for
	peer          peer
	release       func()
	linger        time.Duration
	answered      atomic.Bool
	closing       sync.Once
}

// peer is the process that connected, as the kernel says. The connection may have been
// passed on since.
type peer struct {
	uid uint32
	pid int32
	// instance is whose process it is, if it is an instance's.
	instance string
}

func (p peer) String() string { return fmt.Sprintf("uid %d pid %d", p.uid, p.pid) }

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	c.answered.Store(true)
	return c.UnixConn.Write(p)
}

// lingers bounds what is read of a client that doesn't close.
const lingers = 64 << 10

// Close implements net.Conn. Once this end is closed the kernel doesn't know any more
// whose socket it was: a client whose phase lets it read from this one alone (see
// bpf.Enforcer.Own) could not read an answer that waits there. So it is given time.
func (c *conn) Close() (err error) {
	c.closing.Do(func() {
		if c.linger == 0 || !c.answered.Load() || c.CloseWrite() != nil || c.SetReadDeadline(time.Now().Add(c.linger)) != nil {
			defer c.release()
			err = c.UnixConn.Close()
			return
		}
		go func() {
			defer c.release()
			_, _ = io.CopyN(io.Discard, c.UnixConn, lingers)
			_ = c.UnixConn.Close() // nothing is to be done about it
		}()
	})
	return err
}

// guarded accepts those that admit lets in, and keeps at most cap(slots) open: the rest
// waits in the socket's backlog.
type guarded struct {
	*Listener
	slots  chan struct{} // a token for each open connection
	closed chan struct{}
	close  func() error
	linger time.Duration
	// admit says no; nil lets all in. It doesn't wait.
	admit func(*peer) *Problem
}

func guard(l *Listener, limits limits, admit func(*peer) *Problem) *guarded {
	g := &guarded{Listener: l, slots: make(chan struct{}, limits.connections), closed: make(chan struct{}), linger: limits.linger, admit: admit}
	g.close = sync.OnceValue(func() error {
		close(g.closed)
		return l.Close()
	})
	return g
}

// Close implements net.Listener.
func (g *guarded) Close() error { return g.close() }

// Accept implements net.Listener.
func (g *guarded) Accept() (net.Conn, error) {
	for {
		select {
		case g.slots <- struct{}{}:
		case <-g.closed:
			return nil, net.ErrClosed
		}
		release := sync.OnceFunc(func() { <-g.slots })
		c, err := g.AcceptUnix()
		if err != nil {
			release()
			return nil, err
		}
		who, err := credentials(c)
		if err != nil { // the peer is gone
			c.Close()
			release()
			continue
		}
		if g.admit != nil {
			if p := g.admit(&who); p != nil {
				turnAway(c, p)
				release()
				continue
			}
		}
		return &conn{UnixConn: c, peer: who, release: release, linger: g.linger}, nil
	}
}

func credentials(c *net.UnixConn) (peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return peer{}, err
	}
	var cred *unix.Ucred
	controlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(controlErr, err); err != nil {
		return peer{}, err
	}
	return peer{uid: cred.Uid, pid: cred.Pid}, nil
}

// turnAway answers without reading a byte. The answer fits into the buffer of a socket
// that nothing was written to, so this doesn't wait for whoever it is.
func turnAway(c *net.UnixConn, p *Problem) {
	defer c.Close()
	if err := c.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return
	}
	w := &rawResponse{header: http.Header{"Connection": {"close"}}}
	p.write(w, p)
	// The peer is gone, if not: nothing is to be done about it.
	_, _ = c.Write(w.bytes())
	_ = c.CloseWrite()
}

// rawResponse is a response of HTTP/1.1 that is made outside of net/http's server.
type rawResponse struct {
	header http.Header
	status int
	body   []byte
}

func (w *rawResponse) Header() http.Header    { return w.header }
func (w *rawResponse) WriteHeader(status int) { w.status = status }
func (w *rawResponse) Write(p []byte) (int, error) {
	w.body = append(w.body, p...)
	return len(p), nil
}

func (w *rawResponse) bytes() []byte {
	out := fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Length: %d\r\n", w.status, http.StatusText(w.status), len(w.body))
	for key, values := range w.header {
		out = fmt.Appendf(out, "%s: %s\r\n", key, values[0])
	}
	return append(append(out, "\r\n"...), w.body...)
}

type peerKey struct{}

// withPeer is an http.Server's ConnContext.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, c.(*conn).peer)
}

// bucket lets burst through at once and rate a second after that.
type bucket struct {
	rate, burst float64
	now         func() time.Time

	mu     sync.Mutex
	tokens float64   // guarded by mu
	at     time.Time // when tokens were that many; guarded by mu
}

func newBucket(rate, burst float64, now func() time.Time) *bucket {
	return &bucket{rate: rate, burst: burst, now: now, tokens: burst, at: now()}
}

func (b *bucket) take() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	b.tokens = min(b.burst, b.tokens+now.Sub(b.at).Seconds()*b.rate)
	b.at = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
