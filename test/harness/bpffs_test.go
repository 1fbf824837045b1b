// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMountBPFFS: it is there until the last has released it, in this process as well.
func TestMountBPFFS(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	there := func() bool {
		var st unix.Statfs_t
		if err := unix.Statfs(bpffs, &st); err != nil {
			t.Fatal(err)
		}
		return st.Type == unix.BPF_FS_MAGIC
	}
	first, err := MountBPFFS()
	if err != nil {
		t.Fatal(err)
	}
	second, err := MountBPFFS()
	if err != nil {
		t.Fatal(err)
	}
	for _, release := range []func() error{first, second} {
		if !there() {
			t.Error("unmounted too early")
		}
		if err := release(); err != nil {
			t.Error(err)
		}
	}
}
