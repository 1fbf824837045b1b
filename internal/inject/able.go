// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Able says what this process lacks to give a filter to any process, whatever filters it
// has: nil if nothing.
func Able() error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("filters are injected on amd64 only, and this is %s", runtime.GOARCH)
	}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	for _, c := range []struct {
		number int
		name   string
	}{{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}, {unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}} {
		if caps[c.number/32].Effective&(1<<(c.number%32)) == 0 {
			return fmt.Errorf("no %s", c.name)
		}
	}
	own, err := readStatus(os.Getpid())
	if err != nil {
		return err
	}
	if own.seccomp != 0 {
		return errors.New("this process has a seccomp filter, so the kernel doesn't let it set those of others aside")
	}
	if yama, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil && strings.TrimSpace(string(yama)) == "3" {
		return errors.New("kernel.yama.ptrace_scope is 3, which allows nobody until the next boot")
	}
	return nil
}
