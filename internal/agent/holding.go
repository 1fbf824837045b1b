// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
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

// Each chain of filters has a thread that answers. An exec makes one, which lasts as
// long as any of its processes.
const (
	ownChains    = 4    // of one container, however many others have
	maxChains    = 128  // of one container
	maxAllChains = 4096 // of all, beside those; Go ends a program with 10000 threads
)

// fits says no to one more chain of a container, given how many each has.
func fits(chains map[string]int, id string) error {
	all, n := 0, chains[id]
	for _, c := range chains {
		all += max(0, c-ownChains)
	}
	if n >= maxChains || n >= ownChains && all >= maxAllChains {
		return fmt.Errorf("%d chains of filters of this container have processes, and %d of containers that have many (at most %d and %d): the exec that made this one fails", n, all, maxChains, maxAllChains)
	}
	return nil
}

// chain is a listener of a container, which the holder may have, too.
type chain struct {
	*seccomp.Listener
	p        *phasing
	id, name string
}

// GiveUp is for a listener that nobody serves any more: that the holder has it would
// make its filter's calls wait for ever.
func (c *chain) GiveUp() {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	delete(c.p.kept[c.id], c.name)
	if c.p.holder != nil {
		_ = c.p.holder.Drop(c.name) // it has ended, and so has what it held
	}
}

// enter gives a new listener its name, or refuses it where there are too many.
func (p *phasing) enter(id string, l *seccomp.Listener) (*chain, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prune()
	counts := map[string]int{}
	for id, chains := range p.kept {
		counts[id] = len(chains)
	}
	if err := fits(counts, id); err != nil {
		return nil, err
	}
	p.chains++
	c := &chain{l, p, id, id + " " + strconv.FormatUint(p.chains, 10)}
	p.know(c)
	return c, nil
}

// know is for a listener with a name. p.mu is held.
func (p *phasing) know(c *chain) {
	if p.kept[c.id] == nil {
		p.kept[c.id] = map[string]*seccomp.Listener{}
	}
	p.kept[c.id][c.name] = c.Listener
}

// prune forgets the chains that have ended. p.mu is held.
func (p *phasing) prune() {
	for id, chains := range p.kept {
		for name, l := range chains {
			if f, err := l.File(); err != nil {
				delete(chains, name) // closed
			} else {
				f.Close()
			}
		}
		if len(chains) == 0 {
			delete(p.kept, id)
		}
	}
}

// keep has the holder keep a container's listener. Without a holder the container
// runs as well, but breaks when this process ends.
func (p *phasing) keep(c *chain) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.startHolder == nil || p.kept[c.id][c.name] == nil || p.holder != nil && p.holdOne(c.name, c.Listener) == nil {
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
func (p *phasing) held() (map[string]map[string]*os.File, error) {
	out := map[string]map[string]*os.File{}
	if p == nil || p.startHolder == nil {
		return out, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold()
	if p.holder == nil {
		return out, nil
	}
	files, err := p.holder.Kept()
	if err != nil {
		p.hold()
		if p.holder != nil {
			files, err = p.holder.Kept()
		}
	}
	if err != nil {
		// To go on would be to let containers wait for ever.
		return nil, fmt.Errorf("what an earlier syslatchd left with the holder can't be had: %w", err)
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
	return out, nil
}

// resume serves the listeners that were held for an instance, and tells how many. The
// container's own is at its start if its program's execve was not to be allowed yet;
// one that was, and an exec that was at its start, are taken for one that is past it, and
// may fail.
func (p *phasing) resume(in *instance, sv *phase.Supervised, held map[string]*os.File) (n int) {
	id := in.Container.ID
	for name, f := range held {
		l, err := seccomp.NewListener(f)
		if err != nil {
			p.a.instanceLog(in).WithError(err).WithFields(logrus.Fields{"held": name}).Error("what was held is no listener")
			continue
		}
		c := &chain{l, p, id, name}
		p.mu.Lock()
		p.know(c)
		p.mu.Unlock()
		if in.executed() {
			sv.Resume(c)
		} else {
			sv.Serve(c)
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

// end forgets a container; ctx bounds the wait for its last process.
func (p *phasing) end(ctx context.Context, in *instance) {
	p.programs.count(in)
	in.filtered.end()
	p.supervisor.End(in.Container.ID)
	p.forget(in.Container.ID)
	p.programs.remove(ctx, in)
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
	p.prune()
	if p.a.stopped.Err() == nil && (p.holder == nil || p.holder.Drop("?") != nil) {
		p.hold()
	}
}
