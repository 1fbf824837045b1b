// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// bpffs is where programs look for one.
const bpffs = "/sys/fs/bpf"

// ours is the source of a mount of a test's.
const ours = "syslatch-test"

// MountBPFFS mounts a bpffs at /sys/fs/bpf where there is none. Tests of several processes
// may do so at once: the last that calls release unmounts it.
func MountBPFFS() (release func() error, err error) {
	// A lock of the directory above: a file would have to be left.
	lock, err := os.Open("/sys/fs")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("bpffs for tests: %w", err), lock.Close())
		}
	}()
	// Shared while it is there, by this process as well: alone only to mount it. Another
	// may be about to do that, so nobody waits for that lock.
	for deadline := time.Now().Add(10 * time.Second); ; {
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_SH); err != nil {
			return nil, err
		}
		var st unix.Statfs_t
		if err := unix.Statfs(bpffs, &st); err != nil {
			return nil, err
		}
		if st.Type == unix.BPF_FS_MAGIC {
			break
		}
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			err = unix.Mount(ours, bpffs, "bpf", 0, "")
		}
		if err != nil && (!errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline)) {
			return nil, err
		}
	}
	return func() error { return releaseBPFFS(lock) }, nil
}

func releaseBPFFS(lock *os.File) error {
	defer lock.Close()
	// Not in one step, which would have two that do so keep each other from it.
	err := unix.Flock(int(lock.Fd()), unix.LOCK_UN)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil // others have it, or are about to unmount it
	}
	if err != nil {
		return err
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err == nil && strings.Contains("\n"+string(mounts), "\n"+ours+" "+bpffs+" bpf ") {
		err = unix.Unmount(bpffs, 0)
	}
	return err
}
