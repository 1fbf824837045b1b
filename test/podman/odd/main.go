// SPDX-License-Identifier: Apache-2.0

// Command odd makes the calls that are easily missed: io_uring_setup, and, built
// with GOARCH=386, all of its calls through the 32-bit table.
//
// With arguments, numbers of calls, it makes those instead, with arguments that
// the kernel refuses, and prints what each answers.
package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
)

// The same number in both tables. Its arguments are bad.
const ioUringSetup = 425

func main() {
	for _, arg := range os.Args[1:] {
		nr, err := strconv.ParseUint(arg, 10, 31)
		if err != nil {
			fmt.Fprintln(os.Stderr, "odd:", err)
			os.Exit(1)
		}
		const bad = ^uintptr(0)
		_, _, errno := syscall.RawSyscall6(uintptr(nr), bad, bad, bad, bad, bad, bad)
		fmt.Println(nr, int(errno))
	}
	if len(os.Args) > 1 {
		return
	}
	_, _, errno := syscall.RawSyscall(ioUringSetup, 0, 0, 0)
	fmt.Println(runtime.GOARCH, errno == syscall.EPERM)
}
