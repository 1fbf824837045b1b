// SPDX-License-Identifier: Apache-2.0

package seccomp

import (
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestInfo(t *testing.T) {
	s, err := Info()
	if err != nil {
		t.Fatal(err)
	}
	// Linux 5.19 and later have all of these; syslatch is tested from 6.1 on.
	for _, want := range []specs.LinuxSeccompAction{specs.ActKillProcess, specs.ActErrno, specs.ActNotify, specs.ActLog, specs.ActAllow} {
		if !slices.Contains(s.Actions, want) {
			t.Errorf("no %s in %q", want, s.Actions)
		}
	}
	for _, want := range []string{"SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_NEW_LISTENER", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"} {
		if !slices.Contains(s.Flags, want) {
			t.Errorf("no %s in %q", want, s.Flags)
		}
	}
	if !slices.Equal(s.Notify, []uint16{80, 24, 64}) {
		t.Errorf("notification sizes %v", s.Notify)
	}
	if s.Library < "2.5" || s.API < 5 {
		t.Errorf("libseccomp %s, API level %d", s.Library, s.API)
	}
}
