// SPDX-License-Identifier: Apache-2.0

// Command allcalls makes nearly every system call of an ABI once, raw, with
// arguments that the kernel refuses, from child processes and threads, so that
// a recorder can be compared with a tracer on calls that no ordinary program
// makes. It leaves out the calls that would not come back, or that would do
// something (see skip); command forms makes most of those.
//
// Its argument is the ABI: x86_64 (the default), i386 through int $0x80, or x32,
// which few kernels offer: others answer ENOSYS. With "beyond" it makes x86_64
// calls of numbers that no kernel has.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"github.com/syslatch/syslatch/internal/rawcalls"
)

const x32Bit = 0x40000000

// skip: calls that end or stop the caller, change the machine, or block.
var skip = map[string][]uintptr{
	"x86_64": {
		15,  // rt_sigreturn: would load a made-up frame
		34,  // pause
		56,  // clone: flags -1 are refused, but vfork-like flags would share our stack
		57,  // fork: of a threaded Go program
		58,  // vfork
		60,  // exit
		130, // rt_sigsuspend
		153, // vhangup
		162, // sync: of the whole machine
		169, // reboot
		231, // exit_group
		335, // uretprobe: SIGILL outside of its trampoline (Linux 6.11)
		336, // uprobe: likewise (Linux 6.18)
		435, // clone3
	},
	"i386": {
		1,   // exit
		2,   // fork
		29,  // pause
		36,  // sync
		72,  // sigsuspend
		88,  // reboot
		111, // vhangup
		119, // sigreturn
		120, // clone
		173, // rt_sigreturn
		179, // rt_sigsuspend
		190, // vfork
		252, // exit_group
		435, // clone3
	},
	"x32": {
		34, 56, 57, 58, 60, 130, 153, 162, 169, 231, 335, 336, 435, // as x86_64's
		513, // rt_sigreturn
	},
}

// ranges are made in a process each: what one breaks of itself (its credentials,
// its limits, its memory policy) doesn't hinder the next. 470 is the highest
// number of Linux 6.18, 547 that of x32.
var ranges = map[string][][2]uintptr{
	"x86_64": {{0, 199}, {200, 470}},
	"i386":   {{0, 199}, {200, 470}},
	"x32":    {{0, 199}, {200, 547}},
	"beyond": {{600, 603}, {1022, 1025}},
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "allcalls:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	abi := "x86_64"
	if len(args) > 0 {
		abi = args[0]
	}
	if ranges[abi] == nil {
		return fmt.Errorf("%q: want x86_64, i386, x32 or beyond", abi)
	}
	if len(args) == 2 {
		i, err := strconv.Atoi(args[1])
		if err != nil || i < 0 || i >= len(ranges[abi]) {
			return fmt.Errorf("%q: no such range", args[1])
		}
		part(abi, ranges[abi][i])
		return nil
	}
	for i := range ranges[abi] {
		cmd := exec.Command("/proc/self/exe", abi, strconv.Itoa(i))
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s %d: %w", abi, i, err)
		}
	}
	return nil
}

// part makes the calls from a thread that ends with it.
func part(abi string, numbers [2]uintptr) {
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread()
		for nr := numbers[0]; nr <= numbers[1]; nr++ {
			if slices.Contains(skip[abi], nr) {
				continue
			}
			// Bad descriptors, bad pointers, bad flags. Where an argument is
			// neither, the call fails for its lack of sense or does nothing
			// that outlives the process.
			const bad = ^uint64(0)
			c := rawcalls.Call{Number: uint64(nr), Args: [6]uint64{bad, bad, bad, bad, bad, bad}}
			switch abi {
			case "i386":
				c.Gate32 = 1
			case "x32":
				c.Number |= x32Bit
			}
			rawcalls.Run([]rawcalls.Call{c})
		}
	})
	wg.Wait()
}
