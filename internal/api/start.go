// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"io"
)

// Start serves in the background, on a socket for root and this process's user, until
// what it returns is closed. A failure of a running server is logged.
func (s *Server) Start(path string) (io.Closer, error) {
	l, err := Listen(path, 0o600)
	if err != nil {
		return nil, err
	}
	log := s.Log.WithField("socket", path)
	return background(func(ctx context.Context) {
		if err := s.Serve(ctx, l); err != nil {
			log.WithError(err).Error("phases can't be switched any more (restart this program)")
		}
	}), nil
}

// Start is [Server.Start] for a workload's own socket, which everybody who sees it may
// use. That nobody else listens there is the caller's to see to.
func (in *Inside) Start(path string) (io.Closer, error) {
	l, err := listen(path, 0o666, false)
	if err != nil {
		return nil, err
	}
	log := in.Log.WithField("socket", path)
	return background(func(ctx context.Context) {
		if err := in.Serve(ctx, l); err != nil {
			log.WithError(err).Error("a workload can't tighten itself any more")
		}
	}), nil
}

func background(serve func(context.Context)) io.Closer {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(ctx)
	}()
	return closer(func() error {
		cancel()
		<-done
		return nil
	})
}

type closer func() error

func (c closer) Close() error { return c() }
