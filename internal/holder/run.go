// SPDX-License-Identifier: Apache-2.0

package holder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// most is how many descriptors a holder keeps.
const most = 16384

// idle is how long a holder stays that has nothing, and nobody connected.
const idle = 2 * time.Second

// acceptPause is between two attempts to accept that fail: to end would be to drop all.
const acceptPause = 100 * time.Millisecond

// keeper is the state of a holder.
type keeper struct {
	mu        sync.Mutex
	files     map[string]*os.File // guarded by mu
	connected int                 // guarded by mu
	since     time.Time           // guarded by mu: nothing to do since then
	asked     bool                // guarded by mu: to end
	over      bool                // guarded by mu: nothing is kept any more
	changed   chan struct{}       // gets a token when there may be something else to poll
}

// Run is the holder: it serves a listening socket of the kind "unixpacket" until it
// holds nothing and nobody is connected, or once ctx has ended, until it holds nothing:
// what it holds is worth more than the wish that it end. What is left of the socket's
// file the next [Open] removes. It sends a byte to ready, if that is not nil, as soon as
// it serves.
func Run(ctx context.Context, l *net.UnixListener, ready *os.File) error {
	k := &keeper{files: map[string]*os.File{}, since: time.Now(), changed: make(chan struct{}, 1)}
	if ready != nil {
		_, err := ready.Write([]byte{1})
		if err = errors.Join(err, ready.Close()); err != nil {
			return errors.Join(err, l.Close())
		}
	}
	defer context.AfterFunc(ctx, k.end)()
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.watch()
		l.Close()
	}()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				<-done
				return nil
			}
			time.Sleep(acceptPause) //nolint:forbidigo // no event says that there are descriptors again
			continue
		}
		k.connect(1)
		go func() {
			defer k.connect(-1)
			defer c.Close()
			k.serve(c)
		}()
	}
}

func (k *keeper) end() {
	k.mu.Lock()
	k.asked = true
	k.mu.Unlock()
	k.look()
}

func (k *keeper) look() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

func (k *keeper) connect(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.connected += n
	k.since = time.Now()
}

func (k *keeper) serve(c *net.UnixConn) {
	for {
		m, f, err := receive(c)
		if err != nil {
			return // it is gone, or speaks another language
		}
		if err := k.answer(c, m, f); err != nil {
			if send(c, message{Op: opError, Error: err.Error()}, nil) != nil {
				return
			}
		}
	}
}

func (k *keeper) answer(c *net.UnixConn, m message, f *os.File) error {
	if m.Op != opKeep && f != nil {
		f.Close()
	}
	switch m.Op {
	case opKeep:
		if err := k.keep(m.Name, f); err != nil {
			return err
		}
	case opDrop:
		k.mu.Lock()
		old := k.files[m.Name]
		delete(k.files, m.Name)
		k.mu.Unlock()
		if old != nil {
			old.Close()
		}
	case opList:
		if err := k.list(c); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown request %q", m.Op)
	}
	return send(c, message{Op: opOK}, nil)
}

func (k *keeper) keep(name string, f *os.File) error {
	if f == nil || name == "" {
		return errors.New("keep wants a name and a descriptor")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over {
		f.Close()
		return errors.New("the holder ends")
	}
	old := k.files[name]
	if old == nil && len(k.files) >= most {
		f.Close()
		return fmt.Errorf("%d descriptors are held, and no more than that", most)
	}
	k.files[name] = f
	if old != nil {
		old.Close()
	}
	k.look()
	return nil
}

// list sends what there is. Under the lock, so that nothing is closed meanwhile; the
// socket's buffer bounds what a client that doesn't read holds up, and it is root.
func (k *keeper) list(c *net.UnixConn) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, f := range k.files {
		if err := send(c, message{Op: opHeld, Name: name}, f); err != nil {
			return err
		}
	}
	return nil
}

// watch lets go of what has hung up, and returns when there is nothing left to do.
func (k *keeper) watch() {
	tick := time.NewTicker(idle / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-k.changed:
		}
		if k.sweep() {
			return
		}
	}
}

// sweep says whether the holder has nothing to do any more.
func (k *keeper) sweep() (over bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, f := range k.files {
		if hungUp(f) {
			f.Close()
			delete(k.files, name)
			k.since = time.Now()
		}
	}
	k.over = len(k.files) == 0 && (k.asked || k.connected == 0 && time.Since(k.since) > idle)
	return k.over
}

func hungUp(f *os.File) bool {
	raw, err := f.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n == 1 && fds[0].Revents&unix.POLLHUP != 0
	})
	return gone || err != nil
}
