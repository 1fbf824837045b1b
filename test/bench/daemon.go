// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/syslatch/syslatch/bpf"
)

// entry is a line of the daemon's log, as far as it is used here.
type entry struct {
	Time      time.Time     `json:"time"`
	Level     string        `json:"level"`
	Message   string        `json:"msg"`
	Error     string        `json:"error"`
	Container string        `json:"container"`
	Name      string        `json:"name"` // of the container
	Event     string        `json:"event"`
	Duration  time.Duration `json:"duration"`
}

// daemon is a running syslatchd with directories of its own: the store on a
// disk, the state on a tmpfs as /run is.
type daemon struct {
	cmd   *exec.Cmd
	store string
	state string
	pins  string
	ready time.Duration // from its start until it was synchronized
	ended chan struct{} // closed when the process has ended; then err is set
	err   error

	// The log is a file, read between measurements: a reader at the end of a
	// pipe would be woken by each line, in the middle of what is measured.
	log     *os.File
	rest    []byte // of a line that is not complete
	entries []entry
}

// startDaemon starts syslatchd for the runtime at an NRI socket, and waits until
// a container can be recorded.
func (b *bench) startDaemon(ctx context.Context, name, socket, policies string) (_ *daemon, err error) {
	d := &daemon{
		store: filepath.Join(b.dir, name+"-store"),
		state: filepath.Join(b.tmpfs, name+"-state"),
		pins:  filepath.Join(b.bpffs, name),
		ended: make(chan struct{}),
	}
	config := filepath.Join(b.dir, name+".yaml")
	text := fmt.Sprintf("apiVersion: syslatch.dev/v1\nstore: %s\nstateDir: %s\nbpffs: %s\npolicies:\n%s", d.store, d.state, d.pins, policies)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	// What is no log, as a crash's trace, goes to the same file.
	log, err := os.OpenFile(filepath.Join(b.tmpfs, name+".log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if d.log, err = os.Open(log.Name()); err != nil {
		return nil, err
	}
	d.cmd = exec.Command(filepath.Join(b.opts.bin, "syslatchd"), "--config", config, "--nri-socket", socket, "--log-level", "debug", "--log-format", "json")
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	d.cmd.Stdout, d.cmd.Stderr = log, log
	began := time.Now()
	if err := d.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start syslatchd (make build makes it): %w", err), d.log.Close())
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.ended)
	}()
	e, err := d.await(ctx, func(e entry) bool { return e.Message == "synchronized" })
	if err != nil {
		return nil, errors.Join(err, d.stop(syscall.SIGKILL))
	}
	d.ready = e.Time.Sub(began)
	return d, nil
}

// read takes in what the log has got since.
func (d *daemon) read() error {
	fresh, err := io.ReadAll(d.log)
	if err != nil {
		return fmt.Errorf("syslatchd's log: %w", err)
	}
	lines := bytes.Split(append(d.rest, fresh...), []byte{'\n'})
	d.rest = lines[len(lines)-1]
	for _, line := range lines[:len(lines)-1] {
		var e entry
		if err := json.Unmarshal(line, &e); err != nil {
			e.Level, e.Message = "error", string(line) // a crash's trace
		}
		d.entries = append(d.entries, e)
	}
	return nil
}

// await returns the first entry that matches, when it is there.
func (d *daemon) await(ctx context.Context, match func(entry) bool) (found entry, err error) {
	seen, ended := 0, false
	err = poll(ctx, 30*time.Second, func() (bool, error) {
		select {
		case <-d.ended:
			ended = true
		default:
		}
		if err := d.read(); err != nil {
			return false, err
		}
		for ; seen < len(d.entries); seen++ {
			if match(d.entries[seen]) {
				found = d.entries[seen]
				return true, nil
			}
		}
		if ended {
			return false, errors.New("it has ended")
		}
		return false, nil
	})
	if err != nil {
		return entry{}, fmt.Errorf("syslatchd doesn't log what was awaited: %w; its last words: %s", err, d.tail())
	}
	return found, nil
}

func (d *daemon) tail() string {
	var lines []string
	for _, e := range d.entries[max(0, len(d.entries)-5):] {
		lines = append(lines, strings.TrimSpace(e.Level+" "+e.Message+" "+e.Error))
	}
	return strings.Join(lines, "; ")
}

// handled are the durations of the events that match, in milliseconds.
func (d *daemon) handled(match func(event string) bool) (all []float64) {
	for _, e := range d.entries {
		if e.Message == "event handled" && match(e.Event) {
			all = append(all, ms(e.Duration))
		}
	}
	return all
}

// published is how long it took from the stop of each recorded container of a
// name until its recording was kept, in milliseconds.
func (d *daemon) published(name string) (all []float64) {
	var stopped time.Time
	for _, e := range d.entries {
		switch {
		case e.Message == "event handled" && e.Event == "stop container "+name:
			stopped = e.Time
		case e.Message == "container ended" && e.Name == name && !stopped.IsZero():
			all = append(all, ms(e.Time.Sub(stopped)))
		}
	}
	return all
}

// complaint is the first error that the daemon has logged: where there is one,
// what was measured is not what it seems.
func (d *daemon) complaint() error {
	if err := d.read(); err != nil {
		return err
	}
	for _, e := range d.entries {
		if e.Level == "error" || e.Level == "fatal" {
			return fmt.Errorf("syslatchd logged an error: %s %s", e.Message, e.Error)
		}
	}
	return nil
}

// stop ends the daemon, which keeps its pins. It is harmless if it has ended.
func (d *daemon) stop(sig syscall.Signal) error {
	_ = d.cmd.Process.Signal(sig) // it may have ended
	<-d.ended
	if err := d.log.Close(); errors.Is(err, os.ErrClosed) || sig == syscall.SIGKILL {
		return nil
	}
	return d.err
}

// close ends the daemon and removes what it kept.
func (d *daemon) close(sig syscall.Signal) error {
	return errors.Join(d.stop(sig), d.forget())
}

func (d *daemon) forget() error {
	return errors.Join(bpf.Remove(d.pins), os.RemoveAll(d.state), os.RemoveAll(d.store))
}

// resident is a process's memory, in KiB.
type resident struct {
	RSS, Anon, File, Shmem, Peak int
}

func (d *daemon) resident() (r resident, err error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(d.cmd.Process.Pid) + "/status")
	if err != nil {
		return r, err
	}
	fields := map[string]*int{"VmRSS:": &r.RSS, "RssAnon:": &r.Anon, "RssFile:": &r.File, "RssShmem:": &r.Shmem, "VmHWM:": &r.Peak}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 || fields[f[0]] == nil {
			continue
		}
		if *fields[f[0]], err = strconv.Atoi(f[1]); err != nil {
			return r, fmt.Errorf("%s: %w", f[0], err)
		}
	}
	return r, nil
}

// processor is how much processor time the daemon has used, in steps of 10 ms.
func (d *daemon) processor() (time.Duration, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(d.cmd.Process.Pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The second field is a name that may hold anything; utime and stime are the
	// 14th and 15th.
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("stat of %d: %q", d.cmd.Process.Pid, data)
	}
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	// USER_HZ is 100 on every architecture that the recorder has.
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}
