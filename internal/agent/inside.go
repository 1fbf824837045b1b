// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/phase"
)

// insideDir is where a container with phases finds its own socket, phase.sock, by
// which it may tighten itself. The directory is mounted, and not the socket: the one
// that a restarted syslatchd makes is seen, too.
const insideDir = "/run/syslatch"

const insideSocket = "phase.sock"

// ServeInside serves one instance's own socket until what it returns is closed.
type ServeInside func(s *phase.Supervisor, id, socket string) (io.Closer, error)

// insidePath is a directory of this host for one container, short enough for a
// socket's path.
func (p *phasing) insidePath(id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(p.a.policy.StateDir, "inside", hex.EncodeToString(sum[:8]))
}

// serveInside makes an instance's socket. The container's users are many, so its
// directory is open to all who can reach it: those of the container, and root.
func (p *phasing) serveInside(in *instance) error {
	if p.inside == nil {
		return nil
	}
	dir := p.insidePath(in.Container.ID)
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("socket of the container: %w", err)
	}
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, os.ErrExist) {
		err = nil // an earlier process's
	}
	if err == nil {
		err = os.Chmod(dir, 0o755) //nolint:gosec // whatever the umask says
	}
	if err == nil {
		var server io.Closer
		if server, err = p.inside(p.supervisor, in.Container.ID, filepath.Join(dir, insideSocket)); err == nil {
			p.a.change(func() { in.inside = server })
			return nil
		}
	}
	return fmt.Errorf("socket of the container: %w", err)
}

// mounts are those of an instance whose socket is served.
func (p *phasing) mounts(in *instance) []specs.Mount {
	if in.inside == nil {
		return nil
	}
	return []specs.Mount{{
		Destination: insideDir, Type: "bind", Source: p.insidePath(in.Container.ID),
		Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"},
	}}
}

// endInside removes an instance's socket.
func (p *phasing) endInside(in *instance) error {
	if in.inside != nil {
		if err := in.inside.Close(); err != nil {
			return err
		}
		p.a.change(func() { in.inside = nil })
	}
	return os.RemoveAll(p.insidePath(in.Container.ID))
}

// closeInside stops serving all sockets, and leaves their directories to the next
// process.
func (p *phasing) closeInside() (err error) {
	for _, in := range p.a.all() {
		if in.inside != nil {
			err = errors.Join(err, in.inside.Close())
		}
	}
	return err
}
