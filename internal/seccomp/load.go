// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ExecOptions of LoadAndExec.
type ExecOptions struct {
	// NoNewPrivs sets no_new_privs first, without which the kernel takes a
	// filter only from CAP_SYS_ADMIN.
	NoNewPrivs bool
	// ExitOnFailure, if not 0, ends the process with this status and a message
	// on standard error when the execve fails. The filter is in force by then,
	// and likely too tight for a Go program to return an error.
	ExitOnFailure int
	// Log has the kernel tell its audit log of what the filter denies.
	Log bool
	// Handover, if not nil, has the filter's listener sent to a supervisor.
	Handover *Handover
}

// LoadAndExec loads a filter on the calling thread and executes path, without
// searching PATH. It returns only on failure. Between the filter's load and the
// new program lies exactly one system call, the execve: everything that needs
// a call of its own (memory, limits, signals) is done before.
//
// The kernel ends the process's other threads at the execve; they never have
// the filter. With a Handover one of them sends the listener while the execve, of
// which the filter notifies, waits for the supervisor.
func LoadAndExec(f Filter, opts ExecOptions, path string, argv, env []string) error {
	if len(f) == 0 || len(f) > unix.BPF_MAXINSNS {
		return fmt.Errorf("filter of %d instructions, want 1 to %d", len(f), unix.BPF_MAXINSNS)
	}
	pathp, err := syscall.BytePtrFromString(path)
	if err != nil {
		return fmt.Errorf("path: %w", err)
	}
	argvp, err := syscall.SlicePtrFromStrings(argv)
	if err != nil {
		return fmt.Errorf("arguments: %w", err)
	}
	envp, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return fmt.Errorf("environment: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}

	var messages *[maxMessages][]byte
	if opts.ExitOnFailure != 0 {
		messages = failureMessages(path, opts.Handover != nil)
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	restoreNofile()
	// A garbage collection would stop this thread.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if opts.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("prctl(PR_SET_NO_NEW_PRIVS): %w", err)
		}
	}
	var flags uintptr
	if opts.Log {
		flags = unix.SECCOMP_FILTER_FLAG_LOG
	}
	var h *handover
	var listener *uint32
	if opts.Handover != nil {
		if h, err = opts.Handover.start(f); err != nil {
			return fmt.Errorf("handover: %w", err)
		}
		flags |= h.flags
		listener = (*uint32)(&h.c.listener)
	}
	var handlers [lastSignal + 1]kernelSigaction
	resetSignals(&handlers)
	loaded, errno := loadAndExec(&prog, flags, listener, pathp, &argvp[0], &envp[0], messages, uintptr(opts.ExitOnFailure))
	runtime.KeepAlive(f)
	runtime.KeepAlive(argvp)
	runtime.KeepAlive(envp)
	if !loaded {
		if h != nil {
			*listener = noListener
		}
		restoreSignals(&handlers)
		return loadError(errno, flags)
	}
	if h != nil && h.c.failed != 0 {
		return fmt.Errorf("%w: the listener could not be sent to the supervisor: %w", &ExecError{path, errno}, unix.Errno(h.c.failed))
	}
	return &ExecError{Path: path, Err: errno}
}

// kernelSigaction is struct sigaction of the kernel on x86_64 (asm/signal.h);
// zero is SIG_DFL.
type kernelSigaction struct {
	handler, flags, restorer, mask uint64
}

const lastSignal = 64

// resetSignals gives every signal that Go handles its default action, as the
// execve will, and keeps the handlers. The return from a handler is a call that
// the filter may not allow, and Go's scheduler sends SIGURG to a thread that runs
// for 10 ms; its default action is nothing. A fault's handler would make a panic
// of it, which can't end the process either.
func resetSignals(handlers *[lastSignal + 1]kernelSigaction) {
	for n := 1; n <= lastSignal; n++ {
		sigaction(n, nil, &handlers[n])
		if handlers[n].handler > 1 { // neither SIG_DFL nor SIG_IGN
			sigaction(n, &kernelSigaction{}, nil)
		}
	}
}

func restoreSignals(handlers *[lastSignal + 1]kernelSigaction) {
	for n := 1; n <= lastSignal; n++ {
		if handlers[n].handler > 1 {
			sigaction(n, &handlers[n], nil)
		}
	}
}

// sigaction can't fail with valid pointers but for SIGKILL and SIGSTOP, which
// have no handlers.
func sigaction(signal int, set, old *kernelSigaction) {
	_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(signal),
		uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(old)), unsafe.Sizeof(kernelSigaction{}.mask), 0, 0)
}

// maxMessages is a power of two above all that execve returns.
const maxMessages = 256

//go:nosplit
//go:norace
func loadAndExec(prog *unix.SockFprog, flags uintptr, listener *uint32, path *byte, argv, env **byte, messages *[maxMessages][]byte, status uintptr) (loaded bool, _ syscall.Errno) {
	fd, _, errno := syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(prog)))
	if errno != 0 {
		return false, errno
	}
	if listener != nil {
		*listener = uint32(fd) + firstListener
	}
	_, _, errno = syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(argv)), uintptr(unsafe.Pointer(env)))
	if messages == nil {
		return true, errno
	}
	if m := messages[errno%maxMessages]; len(m) > 0 {
		syscall.RawSyscall(unix.SYS_WRITE, 2, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)))
	}
	syscall.RawSyscall(unix.SYS_EXIT_GROUP, status, 0, 0)
	// Where that is denied, the signal of a fault ends the process.
	*(*byte)(nil) = 0 //nolint:govet // nilness: it is meant to fault
	return true, errno
}

// failureMessages are what is said of an execve that fails with each errno.
func failureMessages(path string, supervised bool) *[maxMessages][]byte {
	var out [maxMessages][]byte
	for e := range out {
		if e > 133 { // EHWPOISON: execve has no others
			break
		}
		hint := ""
		switch {
		case supervised && e == int(unix.ENOSYS):
			hint = " (its supervisor is gone)"
		case supervised && e == int(unix.EPERM):
			hint = " (does its supervisor allow execve?)"
		case e == int(unix.EPERM) || e == int(unix.ENOSYS):
			hint = " (does the profile allow execve?)"
		}
		out[e] = fmt.Appendf(nil, "syslatch: execute %s: %v%s\n", path, syscall.Errno(e), hint)
	}
	return &out
}

// ExecError is a failed execve under a filter that is loaded for good: the
// process can do little but end.
type ExecError struct {
	Path string
	Err  syscall.Errno
}

func (e *ExecError) Error() string { return fmt.Sprintf("execute %s: %v", e.Path, e.Err) }

// Unwrap gives the errno.
func (e *ExecError) Unwrap() error { return e.Err }

// restoreNofile undoes what Go's start-up did: it raises the soft limit of open
// files for Go's own sake (since 1.19), and syscall.Exec lowers it again before
// its execve, which is the only way to get at the old value. An execve of the
// empty path fails (ENOENT) and leaves just that.
func restoreNofile() { _ = syscall.Exec("", []string{""}, nil) }
