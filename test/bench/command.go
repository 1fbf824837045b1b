// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/syslatch/syslatch/internal/api"
	"github.com/syslatch/syslatch/internal/phase"
)

// commandID is the command's, as an instance of the API.
const commandID = "bench"

// commandPhases follow each other; the supervisor is asked about mkdir.
var commandPhases = [2]string{"wide", "narrow"}

const commandPolicy = `apiVersion: syslatch.dev/v1
policies:
- name: bench
  match: {}
  mode: enforce
  phases:
    initial: wide
    wide: {allow: ["@file-read", "@basic-io", "@process", mkdir]}
    narrow: {allow: ["@file-read", "@basic-io", "@process"]}
`

// command is a crowd of sleepers under `syslatch run`, and a client of its API.
type command struct {
	cmd        *exec.Cmd
	hold       *os.File // its end ends the crowd
	client     *api.Client
	generation uint64 // of the last switch
}

// startCommand returns when the crowd waits, and the client is connected.
func (b *bench) startCommand(ctx context.Context) (_ *command, err error) {
	policies, socket := filepath.Join(b.dir, "phases.yaml"), filepath.Join(b.tmpfs, "api.sock")
	if err := os.WriteFile(policies, []byte(commandPolicy), 0o600); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	c := &command{hold: w, client: api.NewClient(socket)}
	c.cmd = exec.Command(filepath.Join(b.opts.bin, "syslatch"), "run", "--policy", policies, "--api-socket", socket, "--id", commandID, "--", self, crowdRole)
	c.cmd.Stdin, c.cmd.Stderr = r, os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	if err := c.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start syslatch (make build makes it): %w", err), w.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		return nil, fmt.Errorf("syslatch run: %w", err)
	}
	s, err := c.client.Get(ctx, commandID)
	c.generation = s.Generation
	return c, err
}

// switched asks for the other phase, and says how many milliseconds it took until that
// was acknowledged.
func (c *command) switched(ctx context.Context) (took float64, err error) {
	to := commandPhases[c.generation%2] // the first phase has generation 1
	begin := time.Now()
	s, err := c.client.Set(ctx, commandID, to, api.SetOptions{})
	took = ms(time.Since(begin))
	if err != nil {
		return 0, err
	}
	c.generation++
	if s.Phase != to || s.Generation != c.generation || s.State != phase.Holds || len(s.Uncovered) > 0 {
		return 0, fmt.Errorf("a switch to %s, generation %d, was acknowledged as %+v", to, c.generation, s)
	}
	return took, nil
}

func (c *command) close() error {
	c.client.Close()
	return errors.Join(c.hold.Close(), c.cmd.Wait())
}

// sleepTogether is the body of the command: one process of the crowd, which starts the
// others. They end with it, however it ends.
func sleepTogether() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	others := sleepers{hold: w}
	err = others.start(sleeperProcesses-1, r, filteredSleeperRole, nil)
	if err == nil {
		err = sleepOn()
	}
	return errors.Join(err, others.end())
}
