// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// lastCalls is the highest call number that each kernel series has. Since 5.1
// new calls get one number on all x86 ABIs, but for those that i386 lacks.
//
// Source: arch/x86/entry/syscalls/syscall_64.tbl and syscall_32.tbl, v5.9 to
// v6.18; libseccomp's syscalls.csv names a release for each call, too. Three
// calls came later than their numbers' place here: uretprobe (335, 6.11) and
// uprobe (336, 6.18), which only the kernel's own trampolines make, and
// quotactl_fd (443, 5.14). x32 has numbers of its own from 512 to 547 beside
// these, none of them new.
var lastCalls = []struct {
	major, minor int // first release with this number
	x86_64, i386 uint32
}{
	{5, 9, 439, 439},  // faccessat2 (5.8); close_range is 436
	{5, 10, 440, 440}, // process_madvise
	{5, 11, 441, 441}, // epoll_pwait2
	{5, 12, 442, 442}, // mount_setattr
	{5, 13, 446, 446}, // landlock_*
	{5, 14, 447, 447}, // memfd_secret
	{5, 15, 448, 448}, // process_mrelease
	{5, 16, 449, 449}, // futex_waitv
	{5, 17, 450, 450}, // set_mempolicy_home_node
	{6, 5, 451, 451},  // cachestat
	{6, 6, 453, 452},  // fchmodat2; map_shadow_stack, on i386 only since 6.7
	{6, 7, 456, 456},  // futex_wake, futex_wait, futex_requeue
	{6, 8, 461, 461},  // statmount, listmount, lsm_*
	{6, 10, 462, 462}, // mseal
	{6, 13, 466, 466}, // *xattrat
	{6, 15, 467, 467}, // open_tree_attr
	{6, 17, 469, 469}, // file_getattr, file_setattr
}

// newestKnown is the newest release that lastCalls speaks of: what later ones
// add is not in it.
const newestKnownMajor, newestKnownMinor = 6, 18

// LastCall is the highest system call number of an x86 ABI in the kernel with a
// release such as "6.1.0-32-cloud-amd64", for x32 of those that it shares with
// x86_64. It knows the releases from 5.9 to 6.18. A distribution's kernel that
// took a call from a later one is not what its release says.
func LastCall(abi ABI, release string) (uint32, bool) {
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 {
		return 0, false
	}
	before := func(a, b, c, d int) bool { return a < c || a == c && b < d }
	if before(newestKnownMajor, newestKnownMinor, major, minor) {
		return 0, false
	}
	last, found := lastCalls[0], false
	for _, k := range lastCalls {
		if before(major, minor, k.major, k.minor) {
			break
		}
		last, found = k, true
	}
	switch {
	case !found:
		return 0, false
	case abi == specs.ArchX86_64, abi == specs.ArchX32:
		return last.x86_64, true
	case abi == specs.ArchX86:
		return last.i386, true
	}
	return 0, false
}
