// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// BPFLSM says whether this kernel has BPF LSM: it has to where bpf is in the list of
// active modules, and on the guests' kernels in any case.
func BPFLSM() bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil && strings.HasSuffix(unix.ByteSliceToString(u.Release[:]), "-cloud-amd64") {
		return true
	}
	list, err := os.ReadFile("/sys/kernel/security/lsm")
	return err == nil && slices.Contains(strings.Split(string(list), ","), "bpf")
}
