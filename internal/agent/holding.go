// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/holder"
	"github.com/syslatch/syslatch/internal/phase"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// holderTime bounds the wait for a holder that is started.
const holderTime = 10 * time.Second

// keep has the holder keep a container's listener. Without a holder the container
// runs as well, but breaks when this process ends.
func (p *phasing) keep(id string, l *seccomp.Listener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.chains++
	name := id + " " + strconv.FormatUint(p.chains, 10)
	if p.kept[id] == nil {
		p.kept[id] = map[string]*seccomp.Listener{}
	}
	p.kept[id][name] = l
	if p.startHolder == nil {
		return
	}
	if p.holder != nil && p.holdOne(name, l) == nil {
		return
	}
	p.hold() // it has ended: everything is kept anew
}

func (p *phasing) holdOne(name string, l *seccomp.Listener) error {
	f, err := l.File()
	if err != nil {
		return nil //nolint:nilerr // its last task has ended, and it is closed
	}
	defer f.Close()
	return p.holder.Keep(name, f)
}

// hold connects to a holder, a new one if need be, and hands it all listeners. p.mu is
// held.
func (p *phasing) hold() {
	if p.holder != nil {
		p.holder.Close()
		p.holder = nil
	}
	ctx, cancel := context.WithTimeout(p.a.stopped, holderTime)
	defer cancel()
	h, err := holder.Open(ctx, holderSocket(p.a), p.startHolder)
	if err == nil {
		p.holder = h
		for _, chains := range p.kept {
			for name, l := range chains {
				if err == nil {
					err = p.holdOne(name, l)
				}
			}
		}
	}
	if err != nil {
		p.a.log.WithError(err).Error("nothing holds the listeners of containers with phases: they break if syslatchd ends")
		if p.holder != nil {
			p.holder.Close()
			p.holder = nil
		}
	}
}

func holderSocket(a *Agent) string { return filepath.Join(a.policy.StateDir, "holder.sock") }

// held takes what a holder has of an earlier process: by container, by name.
func (p *phasing) held() map[string]map[string]*os.File {
	out := map[string]map[string]*os.File{}
	if p == nil || p.startHolder == nil {
		return out
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold()
	if p.holder == nil {
		return out
	}
	files, err := p.holder.Kept()
	if err != nil {
		p.a.log.WithError(err).Error("what an earlier syslatchd left with the holder can't be had")
		return out
	}
	for name, f := range files {
		id, number, _ := strings.Cut(name, " ")
		if n, err := strconv.ParseUint(number, 10, 64); err == nil {
			p.chains = max(p.chains, n)
		}
		if out[id] == nil {
			out[id] = map[string]*os.File{}
		}
		out[id][name] = f
	}
	return out
}

// resume serves the listeners that were held for an instance, and tells how many. The
// container's own is at its start if its program has not run; an exec that was at its
// start is taken for one that is past it, and may fail.
func (p *phasing) resume(in *instance, sv *phase.Supervised, held map[string]*os.File) (n int) {
	id := in.Container.ID
	for name, f := range held {
		l, err := seccomp.NewListener(f)
		if err != nil {
			p.a.instanceLog(in).WithError(err).WithFields(logrus.Fields{"held": name}).Error("what was held is no listener")
			continue
		}
		p.mu.Lock()
		if p.kept[id] == nil {
			p.kept[id] = map[string]*seccomp.Listener{}
		}
		p.kept[id][name] = l
		p.mu.Unlock()
		if in.Ran {
			sv.Resume(l)
		} else {
			sv.Serve(l)
		}
		n++
	}
	return n
}

// release lets go of listeners that no instance has.
func (p *phasing) release(names map[string]*os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, f := range names {
		f.Close()
		if p.holder != nil {
			_ = p.holder.Drop(name) // it has ended, and so has what it held
		}
	}
}

// end forgets a container.
func (p *phasing) end(id string) {
	p.supervisor.End(id)
	p.forget(id)
}

// forget lets go of a container's listeners.
func (p *phasing) forget(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.kept[id] {
		if p.holder != nil {
			_ = p.holder.Drop(name) // as above
		}
	}
	delete(p.kept, id)
}

// checkHolder replaces a holder that has ended, and forgets the listeners of chains
// that have: each exec leaves one.
func (p *phasing) checkHolder() {
	if p == nil || p.startHolder == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, chains := range p.kept {
		for name, l := range chains {
			if f, err := l.File(); err != nil {
				delete(chains, name) // closed
			} else {
				f.Close()
			}
		}
	}
	if p.a.stopped.Err() == nil && (p.holder == nil || p.holder.Drop("?") != nil) {
		p.hold()
	}
}
