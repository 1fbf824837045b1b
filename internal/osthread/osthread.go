// SPDX-License-Identifier: Apache-2.0

// Package osthread runs functions on operating system threads of their own, for what a
// thread can't take back: a seccomp filter, or being a tracer.
package osthread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs f on a thread that ends with it. The main thread doesn't end, and is not used.
func Run(f func() error) error {
	result := make(chan error, 1)
	var start func()
	start = func() {
		runtime.LockOSThread() // and never unlocked
		if unix.Gettid() == unix.Getpid() {
			// Another goroutine gets another thread while this one is held.
			done := make(chan struct{})
			go func() { defer close(done); start() }()
			<-done
			runtime.UnlockOSThread()
			return
		}
		result <- f()
	}
	go start()
	return <-result
}
