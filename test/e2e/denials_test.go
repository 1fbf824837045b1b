// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/syslatch/syslatch/test/harness"
)

// TestFilterDenials: what filters deny by themselves is an event where the policy says so,
// of short-lived processes, of an exec, and after a ratchet.
func TestFilterDenials(t *testing.T) {
	e := newEnv(t, harness.Options{})
	d := e.start(strings.Replace(ratchetPolicy, "  phases:\n", "  logDenials: true\n  phases:\n", 1))
	c := mustCreate(t, e, harness.PodOptions{Runtime: harness.Runc15}, sh("unshare -n true; sleep 1000"))
	if err := c.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	told := func(phase, call string) {
		t.Helper()
		d.waitLog("phase event", `"event":"denied"`, `"from":"`+phase+`"`, `"syscall":"SCMP_ARCH_X86_64 `+call+`"`, c.ID)
	}
	told("work", "unshare")
	if _, err := c.Exec(e.ctx, "/bin/sh", "-c", "mount -t tmpfs x /tmp"); err != nil {
		t.Fatal(err)
	}
	told("work", "mount")
	e.setPhase(c.ID, "locked")
	if _, err := c.Exec(e.ctx, "/bin/sh", "-c", "mkdir /tmp/x"); err != nil {
		t.Fatal(err)
	}
	told("locked", "mkdir")
	before := e.phaseStatus(c.ID).Denied
	// The last is told, too, with the container's end.
	if _, err := c.Exec(e.ctx, "/bin/sh", "-c", "chroot /tmp"); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(e.ctx, 0); err != nil {
		t.Fatal(err)
	}
	told("locked", "chroot")
	if before < 3 {
		t.Errorf("%d denied", before)
	}

	// An older runtime says what it lacks.
	pod, err := e.NewPod(e.ctx, harness.PodOptions{Runtime: harness.Runc11})
	if err != nil {
		t.Fatal(err)
	}
	old, err := pod.Create(e.ctx, sh("true"))
	if err == nil { // containerd; CRI-O has it created by then
		err = old.Start(e.ctx)
	}
	if err == nil || !strings.Contains(err.Error(), "seccomp flags") {
		t.Errorf("runc 1.1.5: %v", err)
	}
}
