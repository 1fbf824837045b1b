// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// Bounds of what one user may hold of a server at once; the user's other hooks wait.
const (
	maxServed = 4  // stages
	maxOpen   = 64 // connections
	// ioTime bounds the transfer of a request, and of a response.
	ioTime = 5 * time.Second
)

// Server serves the hooks of rootless containers: whoever connects is a user, as the
// kernel tells, and what is told is believed of that user's own containers only.
type Server struct {
	// Agent is the agent for the hook with a pid, of a user.
	Agent func(u policy.User, pid int) Agent
	// Users are the names and uids of those that are served.
	Users []string
	Log   *logrus.Entry
}

// Listen makes the socket, which everybody may connect to. Its directory must be
// root's, and so must those above: whoever could replace the socket could answer in
// syslatchd's place. own is a directory of this program's, which others are let
// through if the socket is in it.
func Listen(path, own string) (*net.UnixListener, error) {
	dir := filepath.Dir(path)
	if dir == own {
		if err := os.MkdirAll(own, 0o711); err != nil {
			return nil, err
		}
		if err := os.Chmod(own, 0o711); err != nil {
			return nil, err
		}
	}
	for at := dir; ; at = filepath.Dir(at) {
		if err := checkDirectory(at, at == dir); err != nil {
			return nil, fmt.Errorf("socket %s: %w", path, err)
		}
		if at == "/" {
			break
		}
	}
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// checkDirectory: in a directory with the sticky bit others can't replace what is
// root's, but they can take a name that is free.
func checkDirectory(path string, last bool) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	writable := st.Mode&0o022 != 0 && (last || st.Mode&unix.S_ISVTX == 0)
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is no directory (name the directory itself, not a link to it)", path)
	case st.Uid != 0 || writable:
		return fmt.Errorf("others than root can write to %s (chown root, chmod go-w)", path)
	case st.Mode&0o001 == 0:
		return fmt.Errorf("%s lets users not through (chmod o+x)", path)
	}
	return nil
}

// removeStale removes a socket that nobody listens at: what a killed server leaves.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return errors.New("something else is there, which is left alone (move it away)")
	}
	conn, err := net.DialTimeout("unix", path, ioTime)
	if err == nil {
		conn.Close()
		return errors.New("another process listens there (is another syslatchd running? give each its own hook.rootless.socket)")
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// Serve answers until ctx ends, and closes the listener. It returns when all that it
// answers is answered, or what hangs has hung for a while.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	var answering sync.WaitGroup
	defer func() {
		done := make(chan struct{})
		go func() {
			answering.Wait()
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(ioTime):
		}
	}()
	shares := shares{of: map[uint32]*share{}}
	for {
		conn, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			// Out of descriptors, or the peer is gone already.
			s.Log.WithError(err).Warn("rootless hook not served")
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
			continue
		}
		answering.Go(func() {
			defer conn.Close()
			s.answer(ctx, conn, &shares)
		})
	}
}

// answer serves one connection.
func (s *Server) answer(ctx context.Context, conn *net.UnixConn, shares *shares) {
	log := s.Log
	res, err := func() (_ response, err error) {
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("internal error: %v (a bug: please report it) %s", r, debug.Stack())
			}
		}()
		peer, err := credentials(conn)
		if err != nil {
			return response{}, err
		}
		log = log.WithField("uid", peer.Uid)
		u, err := lookUpUser(peer.Uid)
		if err != nil {
			return response{}, err
		}
		if !slices.ContainsFunc(s.Users, u.Is) {
			return response{Unserved: fmt.Sprintf("%s is not one of hook.rootless.users in the policy file of syslatchd", u)}, nil
		}
		mine, err := shares.take(peer.Uid)
		if err != nil {
			return response{}, err
		}
		defer shares.put(peer.Uid)
		return s.serve(ctx, conn, mine, u, int(peer.Pid))
	}()
	if err != nil {
		log.WithError(err).Warn("rootless hook refused")
		res = response{Error: oneLine(err.Error())}
	}
	data, err := json.Marshal(res)
	if err == nil {
		err = conn.SetWriteDeadline(time.Now().Add(ioTime))
	}
	if err == nil {
		_, err = conn.Write(data)
	}
	if err != nil {
		log.WithError(err).Debug("rootless hook did not wait for its answer")
	}
}

func credentials(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	controlErr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return peer, errors.Join(controlErr, err)
}

func lookUpUser(uid uint32) (policy.User, error) {
	u := policy.User{UID: uid}
	found, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	var unknown user.UnknownUserIdError
	switch {
	case errors.As(err, &unknown):
		return u, nil
	case err != nil:
		return u, fmt.Errorf("look up the name of uid %d: %w", uid, err)
	}
	u.Name = found.Username
	return u, nil
}

// serve reads a request and runs it, in its turn.
func (s *Server) serve(ctx context.Context, conn *net.UnixConn, mine *share, u policy.User, pid int) (response, error) {
	wait := time.NewTimer(timeout)
	defer wait.Stop()
	select {
	case mine.served <- struct{}{}:
	case <-wait.C:
		return response{}, fmt.Errorf("%s's other containers take all of the time (try again)", u)
	case <-ctx.Done():
		return response{}, errors.New("syslatchd is stopping")
	}
	release := sync.OnceFunc(func() { <-mine.served })
	var req request
	err := conn.SetReadDeadline(time.Now().Add(ioTime))
	if err == nil {
		err = readJSON(conn, maxRequest, &req)
	}
	if err == nil && req.PID != pid {
		err = fmt.Errorf("the hook says that its pid is %d, and it is %d: it runs in another pid namespace, whose containers can't be told (run podman in the host's)", req.PID, pid)
	}
	if err == nil {
		err = req.Container.check()
	}
	if err != nil {
		release()
		return response{}, fmt.Errorf("request: %w", err)
	}
	agent := s.Agent(u, pid)
	plan := make(chan *adjust.Plan, 1)
	err = guard(ctx, req.Stage, timeout, func(ctx context.Context) error {
		defer release() // if it hangs, it keeps its place
		p, err := req.run(ctx, agent)
		plan <- p
		return err
	})
	if err != nil {
		return response{}, err
	}
	return response{Plan: <-plan}, nil
}

// run gives a stage to the agent.
func (r *request) run(ctx context.Context, agent Agent) (*adjust.Plan, error) {
	c := policy.Container{
		ID: r.Container.ID, Name: r.Container.Name, Image: r.Container.Image, ImageDigest: r.Container.ImageDigest,
		CgroupsPath: r.Container.CgroupsPath, Annotations: r.Container.Annotations, Seccomp: r.Container.Seccomp,
	}
	runtime := adjust.Runtime{Engine: "rootless podman", Adapter: adjust.AdapterHook}
	switch r.Stage {
	case StagePrecreate:
		return agent.Plan(ctx, c, runtime)
	case StageCreateRuntime:
		if r.Init <= 0 {
			return nil, fmt.Errorf("pid %d of the container", r.Init)
		}
		return nil, agent.Created(ctx, c.ID, r.Init, func() (policy.Container, adjust.Runtime, error) {
			if r.Unread != "" {
				return c, runtime, errors.New(r.Unread)
			}
			return c, runtime, nil
		})
	case StagePoststart:
		return nil, agent.Started(ctx, c.ID, r.Init)
	case StagePoststop:
		return nil, agent.Stopped(ctx, c.ID)
	}
	return nil, fmt.Errorf("stage %.40q is unknown", r.Stage)
}

// maxTold bounds names; engines' own are far below.
const maxTold = 1024

func (t *told) check() error {
	for what, s := range map[string]string{"id": t.ID, "name": t.Name, "image": t.Image, "imageDigest": t.ImageDigest, "cgroupsPath": t.CgroupsPath} {
		if len(s) > maxTold {
			return fmt.Errorf("%s has %d bytes, want at most %d", what, len(s), maxTold)
		}
	}
	return nil
}

// shares is what each user holds.
type shares struct {
	mu sync.Mutex
	of map[uint32]*share // by uid; guarded by mu
}

type share struct {
	open   int           // connections; guarded by shares.mu
	served chan struct{} // holds a token for each stage that is being served
}

func (s *shares) take(uid uint32) (*share, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	mine := s.of[uid]
	if mine == nil {
		mine = &share{served: make(chan struct{}, maxServed)}
		s.of[uid] = mine
	}
	if mine.open >= maxOpen {
		return nil, fmt.Errorf("uid %d has %d connections already, the most that one user may have (try again)", uid, maxOpen)
	}
	mine.open++
	return mine, nil
}

func (s *shares) put(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	mine := s.of[uid]
	mine.open--
	// What hangs keeps its share.
	if mine.open == 0 && len(mine.served) == 0 {
		delete(s.of, uid)
	}
}
