// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// LoadOptions of Load.
type LoadOptions struct {
	// NoNewPrivs sets no_new_privs on the calling thread first, without which
	// the kernel takes a filter only from CAP_SYS_ADMIN.
	NoNewPrivs bool
	// AllThreads loads on all threads of the process (TSYNC), or on none: it
	// fails if one of them has a filter that the calling thread hasn't.
	AllThreads bool
	// Log lets the kernel's audit log have all actions but ALLOW, where
	// kernel.seccomp.actions_logged has them.
	Log bool
	// WaitKillable, of LoadListener, has calls that a supervisor has received wait
	// for its answer even if a signal comes, but for SIGKILL (Linux 5.19).
	WaitKillable bool
}

// Load loads a filter on the calling thread, which the caller has locked
// (runtime.LockOSThread) and, unless the filter allows all that a Go program
// calls, never unlocks: the Go runtime runs other goroutines on what is unlocked.
// A filter can't be taken back.
func Load(f Filter, opts LoadOptions) error {
	var flags uintptr
	if opts.AllThreads {
		flags |= unix.SECCOMP_FILTER_FLAG_TSYNC
	}
	thread, err := load(f, opts, flags)
	if err == nil && thread != 0 {
		err = fmt.Errorf("seccomp(2): thread %d has a filter of its own: not loaded", thread)
	}
	return err
}

// LoadListener is Load for a filter with SCMP_ACT_NOTIFY, on the calling thread
// alone: it returns the descriptor by which that is answered, for [NewListener].
// There can be one in a chain of filters (EBUSY).
func LoadListener(f Filter, opts LoadOptions) (*os.File, error) {
	if opts.AllThreads {
		return nil, errors.New("seccomp(2): a listener can't be had together with all threads")
	}
	flags := uintptr(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	if opts.WaitKillable {
		flags |= unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	}
	fd, err := load(f, opts, flags)
	if err != nil {
		return nil, err
	}
	return os.NewFile(fd, "seccomp notify"), nil
}

func load(f Filter, opts LoadOptions, flags uintptr) (uintptr, error) {
	if len(f) == 0 || len(f) > unix.BPF_MAXINSNS {
		return 0, fmt.Errorf("filter of %d instructions, want 1 to %d", len(f), unix.BPF_MAXINSNS)
	}
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	if opts.Log {
		flags |= unix.SECCOMP_FILTER_FLAG_LOG
	}
	if opts.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return 0, fmt.Errorf("prctl(PR_SET_NO_NEW_PRIVS): %w", err)
		}
	}
	ret, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return 0, loadError(errno, flags)
	}
	return ret, nil
}

func loadError(errno unix.Errno, flags uintptr) error {
	switch listener := flags&unix.SECCOMP_FILTER_FLAG_NEW_LISTENER != 0; {
	case errno == unix.EACCES:
		return fmt.Errorf("seccomp(2): %w: no_new_privs or CAP_SYS_ADMIN is needed", errno)
	case errno == unix.EBUSY && listener:
		return fmt.Errorf("seccomp(2): %w: the thread has a filter with a listener, and can't have another", errno)
	}
	return fmt.Errorf("seccomp(2): %w", errno)
}
