// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"fmt"
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
}

// Load loads a filter on the calling thread, which the caller has locked
// (runtime.LockOSThread) and, unless the filter allows all that a Go program
// calls, never unlocks: the Go runtime runs other goroutines on what is unlocked.
// A filter can't be taken back.
func Load(f Filter, opts LoadOptions) error {
	if len(f) == 0 || len(f) > unix.BPF_MAXINSNS {
		return fmt.Errorf("filter of %d instructions, want 1 to %d", len(f), unix.BPF_MAXINSNS)
	}
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	var flags uintptr
	if opts.AllThreads {
		flags |= unix.SECCOMP_FILTER_FLAG_TSYNC
	}
	if opts.Log {
		flags |= unix.SECCOMP_FILTER_FLAG_LOG
	}
	if opts.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("prctl(PR_SET_NO_NEW_PRIVS): %w", err)
		}
	}
	thread, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(f)
	switch {
	case errno == unix.EACCES:
		return fmt.Errorf("seccomp(2): %w: no_new_privs or CAP_SYS_ADMIN is needed", errno)
	case errno != 0:
		return fmt.Errorf("seccomp(2): %w", errno)
	case thread != 0:
		return fmt.Errorf("seccomp(2): thread %d has a filter of its own: not loaded", thread)
	}
	return nil
}
