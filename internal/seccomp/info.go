// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"fmt"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// Support is what libseccomp and the kernel offer.
type Support struct {
	Library string `json:"library"` // version of libseccomp
	API     uint   `json:"api"`     // its API level on this kernel, see seccomp_api_get(3)
	// Actions are those that the kernel takes (SECCOMP_GET_ACTION_AVAIL).
	Actions []specs.LinuxSeccompAction `json:"actions"`
	// Flags are those of seccomp(2) that the kernel takes.
	Flags []string `json:"flags"`
	// Notify are the sizes in bytes of struct seccomp_notif, seccomp_notif_resp
	// and seccomp_data; nil where the kernel has no listeners (before 5.0).
	Notify []uint16 `json:"notify,omitempty"`
}

// Info asks libseccomp and the kernel.
func Info() (Support, error) {
	s := Support{Library: libraryVersion()}
	var err error
	if s.API, err = libseccomp.GetAPI(); err != nil {
		return s, fmt.Errorf("libseccomp: API level: %w", err)
	}
	for _, a := range []struct {
		name  specs.LinuxSeccompAction
		value uint32
	}{
		{specs.ActKillProcess, unix.SECCOMP_RET_KILL_PROCESS},
		{specs.ActKillThread, unix.SECCOMP_RET_KILL_THREAD},
		{specs.ActTrap, unix.SECCOMP_RET_TRAP},
		{specs.ActErrno, unix.SECCOMP_RET_ERRNO},
		{specs.ActNotify, unix.SECCOMP_RET_USER_NOTIF},
		{specs.ActTrace, unix.SECCOMP_RET_TRACE},
		{specs.ActLog, unix.SECCOMP_RET_LOG},
		{specs.ActAllow, unix.SECCOMP_RET_ALLOW},
	} {
		_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&a.value)))
		if errno == 0 {
			s.Actions = append(s.Actions, a.name)
		}
	}
	for _, f := range []struct {
		name  string
		value uintptr
	}{
		{"SECCOMP_FILTER_FLAG_TSYNC", unix.SECCOMP_FILTER_FLAG_TSYNC},
		{"SECCOMP_FILTER_FLAG_LOG", unix.SECCOMP_FILTER_FLAG_LOG},
		{"SECCOMP_FILTER_FLAG_SPEC_ALLOW", unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW},
		{"SECCOMP_FILTER_FLAG_NEW_LISTENER", unix.SECCOMP_FILTER_FLAG_NEW_LISTENER},
		{"SECCOMP_FILTER_FLAG_TSYNC_ESRCH", unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH},
		{"SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV | unix.SECCOMP_FILTER_FLAG_NEW_LISTENER},
	} {
		// A known flag gets as far as the missing filter: EFAULT.
		_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, f.value, 0)
		if errno == unix.EFAULT {
			s.Flags = append(s.Flags, f.name)
		}
	}
	var sizes [3]uint16
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_NOTIF_SIZES, 0, uintptr(unsafe.Pointer(&sizes))); errno == 0 {
		s.Notify = sizes[:]
	}
	return s, nil
}

func libraryVersion() string {
	major, minor, micro := libseccomp.GetLibraryVersion()
	return fmt.Sprintf("%d.%d.%d", major, minor, micro)
}
