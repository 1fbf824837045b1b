// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"

	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
)

// LaunchCommand is the hidden subcommand by which syslatch runs itself as the
// process that becomes the command. See [Launched].
const LaunchCommand = "internal-launch"

// Descriptors of the launched process.
const (
	launchGoFD       = 3 // read: a launchOrder when the parent is ready
	launchReportFD   = 4 // write: a launchError; closed by the execve otherwise
	launchListenerFD = 5 // a socket: the filter's listener goes there, if the order says so
)

// launchOrder travels from the parent to the launched process, as JSON.
type launchOrder struct {
	Filter     seccomp.Filter `json:"filter"`
	NoNewPrivs bool           `json:"noNewPrivs"`
	// Listener: the filter asks, and WaitKillable: a call that it was asked about is
	// taken back by SIGKILL alone.
	Listener     bool `json:"listener"`
	WaitKillable bool `json:"waitKillable"`
	Log          bool `json:"log"` // what the filter denies is told to the kernel's audit log
}

// launchError travels from the launched process to its parent.
type launchError struct {
	Errno   syscall.Errno `json:"errno"`
	Message string        `json:"message"`
	Exec    bool          `json:"exec"` // the execve failed
}

// launched is a process in a cgroup of its own, waiting to become a command.
type launched struct {
	path   string // of the command
	cmd    *exec.Cmd
	order  *os.File // write end of launchGoFD
	report *os.File // read end of launchReportFD
}

// launch starts this program again, inside group from its first instruction on
// (clone3 with CLONE_INTO_CGROUP), with the command's own standard streams.
// path is the command's resolved file, argv its arguments from argv[0] on, listener
// the launched process's end of the socket for the filter's listener, or nil.
func launch(group *cgroup.Group, path string, argv []string, stdout, listener *os.File) (_ *launched, err error) {
	dir, err := group.Open()
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	goR, goW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer goR.Close()
	repR, repW, err := os.Pipe()
	if err != nil {
		goW.Close()
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer repW.Close()

	cmd := exec.Command("/proc/self/exe", append([]string{LaunchCommand, "--", path}, argv...)...)
	cmd.Args[0] = "syslatch"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{goR, repW}
	if listener != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, listener)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		goW.Close()
		repR.Close()
		return nil, fmt.Errorf("start in cgroup %s: %w", group.Path(), err)
	}
	return &launched{path: path, cmd: cmd, order: goW, report: repR}, nil
}

// proceed lets the process load its filter and execute the command. It returns
// when the execve has happened, or the launched process's error.
func (l *launched) proceed(order launchOrder) error {
	err := json.NewEncoder(l.order).Encode(order)
	l.order.Close()
	if err != nil {
		return fmt.Errorf("launched process went away: %w", err)
	}
	var failure launchError
	// The write end is close-on-exec in the child: EOF is the execve's success.
	if err := json.NewDecoder(l.report).Decode(&failure); err == nil {
		if failure.Exec {
			return cannotExec(l.path, failure.Errno)
		}
		if failure.Errno != 0 {
			return fmt.Errorf("%s: %w", failure.Message, failure.Errno)
		}
		return errors.New(failure.Message)
	}
	return nil
}

// abandon kills the process before it became the command.
func (l *launched) abandon() {
	l.order.Close()
	_ = l.cmd.Process.Kill() // it may have ended by itself: Wait tells
	_ = l.cmd.Wait()
	l.report.Close()
}

// Launched is the body of the launched process: wait for the order, load its filter,
// execute path. Between the load and the execve, the only call is that execve, so
// that a recording holds nothing of ours. It returns only if it failed, and has told
// the parent by then.
func Launched(path string, argv []string) error {
	report := os.NewFile(launchReportFD, "report")
	syscall.CloseOnExec(launchReportFD)
	fail := func(message string, err error) error {
		var errno syscall.Errno
		errors.As(err, &errno)
		var exec *seccomp.ExecError
		// The parent may be gone; then there is nobody to tell.
		_ = json.NewEncoder(report).Encode(launchError{errno, message, errors.As(err, &exec)})
		return fmt.Errorf("%s: %w", message, err)
	}
	gate := os.NewFile(launchGoFD, "go")
	var order launchOrder
	if err := json.NewDecoder(gate).Decode(&order); err != nil {
		return fail("the parent gave up", err)
	}
	gate.Close()
	opts := seccomp.ExecOptions{NoNewPrivs: order.NoNewPrivs, Log: order.Log}
	if order.Listener {
		syscall.CloseOnExec(launchListenerFD)
		socket := os.NewFile(launchListenerFD, "listener's socket")
		conn, err := net.FileConn(socket)
		if err != nil {
			return fail("the listener's socket", err)
		}
		socket.Close()
		opts.Handover = &seccomp.Handover{Conn: conn.(*net.UnixConn), WaitKillable: order.WaitKillable}
	}
	return fail("execute "+path, seccomp.LoadAndExec(order.Filter, opts, path, argv, os.Environ()))
}
